package manila

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// side is where rules are: a share or a snapshot.
type side struct {
	id       string
	kind     string // of clients, as Manila calls it
	snapshot bool
	typeName string // of the share
}

func (at side) path() string {
	if at.snapshot {
		return "snapshots/" + url.PathEscape(at.id)
	}
	return "shares/" + url.PathEscape(at.id)
}

// side is where rules are, by the id of a share, of its snapshot or of a copy of that.
func (s *share) side(id string) side {
	at := side{id: id, kind: "ip", typeName: s.TypeName}
	switch {
	case id != s.ID && s.wayOf() == wayAPI:
		at.snapshot = true
	case s.Protocol == "CEPHFS":
		at.kind = "cephx"
	}
	return at
}

// sideFor is where the rules are that a consumer needs. ErrNotFound when a copy has
// gone.
func (b *Backend) sideFor(ctx context.Context, s *share, consumer string) (side, error) {
	snapshot := s.target(consumer).SnapshotID
	switch {
	case snapshot != "" && s.wayOf() == wayAPI:
		return s.side(snapshot), nil
	case snapshot != "" && s.wayOf() == wayCopy:
		found, err := b.named(ctx, copyName(consumer))
		if err != nil {
			return side{}, err
		}
		if len(found) == 0 {
			return side{}, fmt.Errorf("the copy of the snapshot: %w", backend.ErrNotFound)
		}
		return s.side(found[0].ID), nil
	}
	return s.side(s.ID), nil
}

// takeAway denies a client's rules, unless somebody needs them. Who needs one that
// is not there gets it: it was lost where a rule was to be raised.
func (b *Backend) takeAway(ctx context.Context, at side, to string, rules []rule, needed []access, begun time.Time) error {
	rules = slices.DeleteFunc(slices.Clone(rules), func(r rule) bool { return r.To != to || r.Type != at.kind })
	if i := slices.IndexFunc(needed, func(n access) bool { return n.to == to }); i >= 0 {
		if slices.ContainsFunc(rules, func(r rule) bool { return r.State != "error" }) {
			return nil
		}
		_, err := b.serve(ctx, at, needed, needed[i:i+1], nil)
		if refused := (*refusedRule)(nil); errors.As(err, &refused) {
			return nil // whoever needs it was told, or will be
		}
		return err
	}
	for _, r := range rules {
		if !b.madeByUs(at, r) {
			continue
		}
		if b.o.Now().Sub(begun) > leavingTime {
			return fmt.Errorf("%w: Manila is too slow to be sure that nobody else needs the access rule for %s", backend.ErrPending, to)
		}
		if err := b.deny(ctx, at, r); err != nil {
			return err
		}
	}
	return nil
}

// madeByUs keeps rules that others have made for a client of ours. Those of
// snapshots have no metadata that would tell, and are taken for ours.
func (b *Backend) madeByUs(at side, r rule) bool {
	return at.snapshot || at.kind == "cephx" || r.Metadata[keyInstance] == b.o.Instance
}

// refusedRule is why Manila could not let a client in at a level. The rule is gone,
// if it was ours.
type refusedRule struct{ error }

func (r *refusedRule) Unwrap() error { return r.error }

// errGone: a rule that was asked for is not there.
var errGone = fmt.Errorf("%w: the access rule has gone again", backend.ErrUnavailable)

// highest is the level that is needed for a client that wants in.
func highest(needed []access, wanted access) access {
	if rw := (access{wanted.to, "rw"}); slices.Contains(needed, rw) {
		return rw
	}
	return wanted
}

// askForNew asks for the rules that are wanted by clients of which nobody has needed one
// yet, and returns those that there were none of.
func (b *Backend) askForNew(ctx context.Context, at side, needed, wanted []access) (asked []access, err error) {
	for _, w := range wanted {
		if lets(needed, w.to) {
			continue
		}
		made, err := b.askFor(ctx, at, w)
		if err != nil {
			return asked, err
		}
		if made {
			asked = append(asked, w)
		}
	}
	return asked, nil
}

// serve has the rules for the clients that are wanted in effect, each at the
// highest level that is needed. Where that cannot be, who only reads is let in to
// read all the same: the rule that he had may have been lost in raising it. Rules that
// were asked for are waited for; anew says that another one was made.
func (b *Backend) serve(ctx context.Context, at side, needed, wanted, asked []access) (anew bool, err error) {
	for _, w := range wanted {
		ro, highest := access{w.to, "ro"}, highest(needed, w)
		made, err := b.allow(ctx, at, highest, slices.Contains(asked, w))
		anew = anew || made
		if refused := (*refusedRule)(nil); highest.level == "rw" && errors.As(err, &refused) && slices.Contains(needed, ro) {
			made, back := b.allow(ctx, at, ro, false)
			anew = anew || made
			if w == ro {
				err = back
			} else if back != nil {
				err = fmt.Errorf("%w; and to read: %s", err, back)
			}
		}
		if err != nil {
			return anew, err
		}
	}
	return anew, nil
}

// allow makes a rule, or finds it, and waits until it is in effect, and until the
// key that goes with it is in the store; made says which. asked says that it was asked
// for a moment ago. A rule of ours that Manila could not apply goes, as it may block
// others, and its reason is told.
func (b *Backend) allow(ctx context.Context, at side, a access, asked bool) (made bool, err error) {
	kind, to := at.kind, a.to
	begun, readless := b.o.Now(), false
	p := pause{b: b, kind: "rule"}
	rest := func() error {
		if err := p.sleep(ctx); err != nil {
			return fmt.Errorf("the access rule for %s is not in effect yet: %w", to, err)
		}
		return nil
	}
	if asked {
		if err := rest(); err != nil {
			return made, err
		}
	}
	for {
		rules, err := b.rulesOn(ctx, at)
		if err != nil {
			return made, err
		}
		r := rule{} // none
		if i := slices.IndexFunc(rules, func(r rule) bool { return r.Type == kind && r.To == to }); i >= 0 {
			r = rules[i]
		}
		low := r.State == "active" && r.Level == "ro" && a.level == "rw"
		switch {
		case r.ID == "" && !asked:
			if asked, err = b.askFor(ctx, at, a); err != nil { // one that is there already may be on its way out
				return made, err
			}
			made = made || asked
		case r.ID == "":
			return made, fmt.Errorf("%w: %s", errGone, to)
		case r.State == "error":
			since := begun
			if !asked {
				since = time.Time{} // it may have failed long ago
			}
			told := b.complaint(ctx, at.id, since, ruling...)
			if !b.madeByUs(at, r) {
				return made, &refusedRule{why("Manila could not let "+to+" in by a rule that is not ours", told)}
			}
			reason := &refusedRule{why("Manila could not let "+to+" in", told)}
			if err := b.deny(ctx, at, r); err != nil {
				return made, fmt.Errorf("%w; and the rule does not go: %s", reason.error, err)
			}
			if !asked { // what has failed was another's attempt
				continue
			}
			if strings.TrimSpace(told.Detail) != noSuchLevel || a.level != "ro" {
				return made, reason
			}
			a.level, asked, readless = "rw", false, !at.snapshot // the node mounts it read-only all the same
			continue
		case low && !b.madeByUs(at, r):
			return made, &refusedRule{fmt.Errorf("%w: %s is let in to read only, by a rule that is not ours", backend.ErrConflict, to)}
		case low && b.minor >= sinceLevels:
			raise := map[string]any{"update_access": map[string]any{"access_level": a.level}}
			if err := b.put(ctx, "share-access-rules/"+url.PathEscape(r.ID), raise); err != nil {
				return made, err
			}
			asked = true
		case low:
			if err := b.deny(ctx, at, r); err != nil {
				return made, err
			}
			asked = false
			continue
		case r.State == "active" && (kind != "cephx" || r.Key != ""):
			if p.ended(); readless { // and it was the level that was refused, not the client
				b.readless.add(at.typeName)
			}
			if kind != "cephx" {
				return made, nil
			}
			return made, b.o.Keys.Put(ctx, to, r.Key)
		}
		if err := rest(); err != nil {
			return made, err
		}
	}
}

// noSuchLevel is the detail of a back end that knows no rules that only read.
const noSuchLevel = "021"

// askFor asks for a rule, and says whether there was none yet.
func (b *Backend) askFor(ctx context.Context, at side, a access) (made bool, err error) {
	if b.readless.has(at.typeName) {
		a.level = "rw"
	}
	req := map[string]any{"access_type": at.kind, "access_to": a.to}
	if !at.snapshot {
		req["access_level"], req["metadata"] = a.level, map[string]string{keyInstance: b.o.Instance}
	}
	err = b.actOn(ctx, at, "allow_access", req)
	if refusal(err).says(http.StatusBadRequest, "exists") {
		return false, nil
	}
	return err == nil, err
}

// actOn asks for a change of rules. ErrUnavailable while something is done to what
// they are of.
func (b *Backend) actOn(ctx context.Context, at side, action string, req map[string]any) error {
	err := b.post(ctx, at.path()+"/action", map[string]any{action: req}, nil)
	if refused := refusal(err); refused.says(http.StatusBadRequest, "state") {
		return fmt.Errorf("%w: %w", backend.ErrUnavailable, withoutKind(refused))
	}
	return err
}

// deny takes a rule away and waits until it is gone.
func (b *Backend) deny(ctx context.Context, at side, r rule) error {
	for p := (pause{b: b, kind: "deny"}); ; {
		if r.State != "queued_to_deny" && r.State != "denying" {
			err := b.actOn(ctx, at, "deny_access", map[string]any{"access_id": r.ID})
			if errors.Is(err, backend.ErrNotFound) {
				return nil
			}
			if err != nil {
				return err
			}
		}
		if err := p.sleep(ctx); err != nil {
			return fmt.Errorf("the access rule for %s is not gone yet: %w", r.To, err)
		}
		rules, err := b.rulesOn(ctx, at)
		if errors.Is(err, backend.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		i := slices.IndexFunc(rules, func(other rule) bool { return other.ID == r.ID })
		if i < 0 {
			p.ended()
			return nil
		}
		r = rules[i]
	}
}
