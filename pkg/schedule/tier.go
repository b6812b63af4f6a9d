package schedule

import (
	"errors"
	"fmt"
	"slices"
)

// Tier is one kind of snapshot that a schedule makes of each claim, and how
// many of them are kept.
type Tier struct {
	// Class is the VolumeSnapshotClass, and the name of the tier.
	Class string
	Rule
}

const classKey = "class"

// ParseTier reads a tier such as "class=abaca-snapshot,keep-last=24".
func ParseTier(text string) (Tier, error) {
	var t Tier
	err := eachSetting(text, append([]string{classKey}, ruleKeys()...), func(key, value string) error {
		if key == classKey {
			t.Class = value
			return validName(value)
		}
		return t.set(key, value)
	})
	if err == nil {
		err = t.Validate()
	}
	if err != nil {
		return Tier{}, fmt.Errorf("tier %q: %w", text, err)
	}
	return t, nil
}

// ParseTiers reads the tiers of one schedule: at least one, and each of a class
// of its own, since two rules over the same snapshots would drop each other's.
func ParseTiers(texts []string) ([]Tier, error) {
	tiers := make([]Tier, 0, len(texts))
	for _, text := range texts {
		t, err := ParseTier(text)
		if err != nil {
			return nil, err
		}
		tiers = append(tiers, t)
	}
	return tiers, validateTiers(tiers)
}

func validateTiers(tiers []Tier) error {
	if len(tiers) == 0 {
		return errors.New("no tier: say what is made and kept, such as class=abaca-backup,keep-daily=7")
	}
	for i, t := range tiers {
		if err := t.Validate(); err != nil {
			return fmt.Errorf("tier %q: %w", t, err)
		}
		if slices.ContainsFunc(tiers[:i], func(o Tier) bool { return o.Class == t.Class }) {
			return fmt.Errorf("two tiers of class %s: give all that is kept of it in one", t.Class)
		}
	}
	return nil
}

// Validate refuses a tier without a class, or with a rule that keeps nothing.
func (t Tier) Validate() error {
	if t.Class == "" {
		return errors.New("no class: give class=, a VolumeSnapshotClass")
	}
	if err := validName(t.Class); err != nil {
		return fmt.Errorf("%s=%s: %w", classKey, t.Class, err)
	}
	return t.Rule.Validate()
}

// String returns the tier as ParseTier reads it.
func (t Tier) String() string {
	return classKey + "=" + t.Class + "," + t.Rule.String()
}
