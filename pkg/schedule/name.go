package schedule

import (
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// Labels and annotations of the VolumeSnapshots that a schedule makes. The
// labels select; a value that is longer than a label may be ends in a digest
// there, so the annotations of the same keys have the whole text.
const (
	prefix = "abaca-csi.github.io/" // the driver's name

	// ScheduleKey has the name of the schedule. Without this label, a snapshot
	// is out of the schedule's hands.
	ScheduleKey = prefix + "schedule"
	// ClaimKey has the name of the claim that the snapshot is of.
	ClaimKey = prefix + "claim"
	// TierKey has the tier, which is the snapshot's class.
	TierKey = prefix + "tier"
	// TimeKey, an annotation only, has the scheduled time (RFC 3339, UTC).
	TimeKey = prefix + "scheduled-time"
	// PartialKey is the annotation, "true", of a VolumeSnapshot whose backup lacks files
	// that could not be read, whoever made it. The driver writes it before that is ready.
	PartialKey = prefix + "partial"

	// ScheduledKey is the annotation of a Job by which its CronJob says the time
	// that the Job is for (Kubernetes 1.28; RFC 3339 in the CronJob's zone).
	ScheduledKey = "batch.kubernetes.io/cronjob-scheduled-timestamp"
	// instantiateKey is what `kubectl create job --from=cronjob/…` adds.
	instantiateKey = "cronjob.kubernetes.io/instantiate"
)

const (
	maxName  = 253 // of an object of Kubernetes (RFC 1123, "subdomain")
	maxLabel = 63  // of the value of a label

	// digestSize makes a collision of two names of one namespace as unlikely as
	// 1 to 2^50. What has a name is looked at before it is taken for ours.
	digestSize = 10
)

var subdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

func validName(name string) error {
	if len(name) > maxName || !subdomain.MatchString(name) {
		return errors.New("not a name in Kubernetes, which is lower-case letters, digits, '-' and '.'")
	}
	return nil
}

// Series names the snapshots that one schedule makes of one claim in one tier:
// what a rule is applied to. All three are names of objects in Kubernetes.
type Series struct {
	Schedule, Claim, Tier string
}

// Name returns the name of the snapshot for a scheduled time:
// <schedule>-<claim>-<tier>-20060102t1504z, in UTC, with seconds only if there
// are any (a Job that was made by hand has the time of its creation). The same
// schedule, claim, tier and second give the same name, in every version of
// Abaca: retention leaves alone what has another name.
//
// A name longer than Kubernetes allows is cut and gets a digest. Two series can
// have one name, as a-b of c and a of b-c do; so who finds a name looks whose it
// is.
func (s Series) Name(at time.Time) string {
	at = at.UTC()
	layout := "-20060102t1504z"
	if at.Second() != 0 {
		layout = "-20060102t150405z"
	}
	end := at.Format(layout)
	return cut(s.Schedule+"-"+s.Claim+"-"+s.Tier, s.Schedule+"\x00"+s.Claim+"\x00"+s.Tier, maxName-len(end)) + end
}

// cut returns a text that is not longer than size: if it has to be cut, a digest
// of whole takes the place of its end.
func cut(text, whole string, size int) string {
	if len(text) <= size {
		return text
	}
	sum := sha256.Sum256([]byte(whole))
	digest := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:digestSize]
	return strings.TrimRight(text[:size-1-digestSize], "-.") + "-" + digest
}

// Labels returns the labels by which the snapshots of the series are found.
func (s Series) Labels() map[string]string {
	return map[string]string{
		ScheduleKey: cut(s.Schedule, s.Schedule, maxLabel),
		ClaimKey:    cut(s.Claim, s.Claim, maxLabel),
		TierKey:     cut(s.Tier, s.Tier, maxLabel),
	}
}

// Annotations returns the annotations of the snapshot for a scheduled time.
func (s Series) Annotations(at time.Time) map[string]string {
	return map[string]string{
		ScheduleKey: s.Schedule, ClaimKey: s.Claim, TierKey: s.Tier,
		TimeKey: at.UTC().Format(time.RFC3339),
	}
}

// ReadSeries is the inverse of Labels and Annotations. It is false for what a
// schedule has not made, or what somebody has taken out of its hands.
func ReadSeries(labels, annotations map[string]string) (Series, time.Time, bool) {
	s := Series{annotations[ScheduleKey], annotations[ClaimKey], annotations[TierKey]}
	at, err := time.Parse(time.RFC3339, annotations[TimeKey])
	if err != nil || s.Schedule == "" || s.Claim == "" || s.Tier == "" {
		return Series{}, time.Time{}, false
	}
	for key, value := range s.Labels() {
		if labels[key] != value {
			return Series{}, time.Time{}, false
		}
	}
	return s, at.UTC(), true
}

// ScheduledTime returns the time that a Job is for: what its CronJob wrote into
// its annotations, or else the time of its creation, as for a Job made by hand.
// All attempts of one Job have the same. An annotation that cannot be read is an
// error, since another time would make a second snapshot.
func ScheduledTime(annotations map[string]string, created time.Time) (time.Time, error) {
	text, ok := annotations[ScheduledKey]
	if !ok || annotations[instantiateKey] == "manual" {
		if created.IsZero() {
			return time.Time{}, errors.New("the Job has neither a scheduled time nor one of creation")
		}
		return created.UTC().Truncate(time.Second), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, fmt.Errorf("the Job's annotation %s: %w", ScheduledKey, err)
	}
	return at.UTC().Truncate(time.Second), nil
}
