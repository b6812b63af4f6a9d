package manila

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// Who may mount what. Manila lets clients in by rules: on CephFS a CephX id, of
// which each consumer has one for each level, as an id has one level and one key;
// elsewhere the addresses of a node, or the networks that the class names. One
// rule may serve several nodes and consumers, so what each of them needs is
// written into the share's metadata before the rule is asked for, and the rule
// goes with the last that needs it.

// access is what one rule gives: to whom, and the level, "ro" or "rw".
type access struct{ to, level string }

// grant is what a node was let in with, for one consumer.
type grant struct {
	consumer, node string // node is a digest of its name
	accesses       []access
	leaving        time.Time // since when Revoke is at work on it, or zero
}

func (g grant) key() string { return prefixGrant + g.consumer + "." + g.node }

// value is "rw=192.0.2.7 ro=2001:db8::7", with " leaving=" and a time at the end
// of one that is being revoked.
func (g grant) value() string {
	var words []string
	for _, a := range g.accesses {
		words = append(words, a.level+"="+a.to)
	}
	if !g.leaving.IsZero() {
		words = append(words, "leaving="+g.leaving.UTC().Format(time.RFC3339))
	}
	return strings.Join(words, " ")
}

// grants returns those on a share, and on its snapshots.
func (s *share) grants() []grant {
	var all []grant
	for key, value := range s.Metadata {
		rest, ok := strings.CutPrefix(key, prefixGrant)
		if !ok {
			continue
		}
		g := grant{}
		g.consumer, g.node, _ = strings.Cut(rest, ".")
		for _, word := range strings.Fields(value) {
			what, to, _ := strings.Cut(word, "=")
			if what != "leaving" {
				g.accesses = append(g.accesses, access{to, what})
			} else if t, err := time.Parse(time.RFC3339, to); err == nil {
				g.leaving = t
			}
		}
		all = append(all, g)
	}
	return all
}

// include adds an access, or raises its level.
func (g *grant) include(a access) {
	i := slices.IndexFunc(g.accesses, func(other access) bool { return other.to == a.to })
	switch {
	case i < 0:
		g.accesses = append(g.accesses, a)
	case a.level == "rw":
		g.accesses[i].level = "rw"
	}
}

// at says what the rules are on that a consumer needs: two with the same answer
// share them.
func (s *share) at(consumer string) string {
	what := s.holds()[consumer]
	switch {
	case what == holdsShare || s.wayOf() == wayDirectory:
		return "share"
	case s.wayOf() == wayCopy:
		return "copy for " + consumer
	}
	return what
}

// needed returns the accesses that are needed where a consumer's rules are, but
// for those that are leaving.
func (s *share) needed(at string) grant {
	var all grant
	for _, g := range s.grants() {
		if g.leaving.IsZero() && s.at(g.consumer) == at {
			for _, a := range g.accesses {
				all.include(a)
			}
		}
	}
	return all
}

// user is the CephX id of a consumer that may write, and of one of a snapshot.
func (b *Backend) user(consumer string) string { return "abaca-" + digest(b.o.Instance, consumer) }

// readers is the CephX id of a consumer for nodes that only read a share.
func (b *Backend) readers(consumer string) string { return b.user(consumer) + "-ro" }

// Grant implements backend.Granter.
func (b *Backend) Grant(ctx context.Context, consumer string, node backend.Node, readOnly bool) (_ *backend.Export, err error) {
	defer wrap(&err, "let node %q in to what %q holds", node.Name, consumer)
	if !validConsumer.MatchString(consumer) {
		return nil, backend.ErrNotFound
	}
	unlock, err := b.busy.lock(ctx, "consumer "+consumer)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, sure, err := b.lateHolder(ctx, consumer)
	if err != nil {
		return nil, err
	}
	x, err := b.letIn(ctx, s, consumer, node, readOnly, sure)
	if errors.Is(err, backend.ErrNotFound) && !sure {
		if s, _, err = b.holder(ctx, consumer); err == nil {
			x, err = b.letIn(ctx, s, consumer, node, readOnly, true)
		}
	}
	return x, err
}

// letIn is Grant for what a consumer holds. Unless that is sure it may have been
// different, which is seen before there is a rule.
func (b *Backend) letIn(ctx context.Context, s *share, consumer string, node backend.Node, readOnly, sure bool) (*backend.Export, error) {
	if s == nil {
		return nil, backend.ErrNotFound
	}
	x, err := b.exportOf(ctx, s, consumer)
	if err != nil {
		return nil, err
	}
	g := grant{consumer: consumer, node: digest(node.Name)}
	before := ""
	for _, other := range s.grants() {
		if other.key() == g.key() {
			g.accesses, before = other.accesses, other.value()
		}
	}
	if x.User != "" && !x.ReadOnly && readOnly && !slices.Contains(g.accesses, access{x.User, "rw"}) {
		x.User = b.readers(consumer)
	}
	wanted, err := b.accesses(s, x, node, readOnly || x.ReadOnly)
	if err != nil {
		return nil, err
	}
	for _, a := range wanted {
		g.include(a)
	}
	fresh := g.value() != before
	if fresh || !sure {
		if err := b.setMetadata(ctx, "shares/"+s.ID, map[string]string{g.key(): g.value()}); err != nil {
			return nil, err
		}
	}
	// From here on whoever revokes sees that it is needed. One that looked before
	// has left its mark (see revoke), and is waited for.
	for p := (pause{b: b}); fresh || !sure; {
		if s, err = b.getShare(ctx, s.ID); err != nil {
			return nil, err
		}
		if s.Metadata[holdKey(consumer, s.holds()[consumer])] != held {
			return nil, errors.Join(backend.ErrNotFound, b.dropMetadata(ctx, "shares/"+s.ID, g.key()))
		}
		if !s.leaving(g, b.o.Now().Add(-leavingAge)) {
			break
		}
		if err := p.sleep(ctx); err != nil {
			return nil, err
		}
	}
	at, err := b.side(ctx, s, consumer)
	if err != nil {
		return nil, err
	}
	for _, a := range s.needed(s.at(consumer)).accesses {
		if slices.ContainsFunc(wanted, func(w access) bool { return w.to == a.to }) {
			if err := b.allow(ctx, at, a, fresh); err != nil {
				return nil, err
			}
		}
	}
	return x, nil
}

// accesses are what a node needs for an export.
func (b *Backend) accesses(s *share, x *backend.Export, node backend.Node, readOnly bool) (all []access, err error) {
	level := "rw"
	if readOnly {
		level = "ro"
	}
	if x.User != "" {
		if b.o.Keys == nil {
			return nil, fmt.Errorf("%w: CephFS needs an access-key store", backend.ErrInvalid)
		}
		return []access{{x.User, level}}, nil
	}
	if list := s.class("access"); list != "" && list != accessNode {
		named, err := clients(list)
		if x.Way != wayAPI {
			level = "rw" // one rule for all of them
		}
		for _, c := range named {
			all = append(all, access{c, level})
		}
		return all, err
	}
	v4, v6 := families(x.Locations)
	for _, a := range node.Addresses {
		if a = a.Unmap(); a.Is4() && v4 || a.Is6() && v6 {
			all = append(all, access{a.String(), level})
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: node %q has no address that the server at %s could know it by: name it with --node-address where the node's plugin is started, or name the clients with the parameter \"access\" of the class",
			backend.ErrInvalid, node.Name, x.Locations[0])
	}
	return all, nil
}

// families says to which kinds of address a node talks that mounts one of the
// locations: both if they are named by host.
func families(locations []string) (v4, v6 bool) {
	for _, l := range locations {
		host := l
		if rest, ok := strings.CutPrefix(strings.ReplaceAll(l, `\`, "/"), "//"); ok {
			host, _, _ = strings.Cut(rest, "/")
		} else if i := strings.Index(l, ":/"); i > 0 {
			host = l[:i]
		}
		a, err := netip.ParseAddr(strings.Trim(host, "[]"))
		switch {
		case err != nil:
			return true, true
		case a.Unmap().Is4():
			v4 = true
		default:
			v6 = true
		}
	}
	return v4, v6
}

// Revoke implements backend.Granter.
func (b *Backend) Revoke(ctx context.Context, consumer, node string) (err error) {
	defer wrap(&err, "take node %q from what %q holds", node, consumer)
	if !validConsumer.MatchString(consumer) {
		return nil
	}
	unlock, err := b.busy.lock(ctx, "consumer "+consumer)
	if err != nil {
		return err
	}
	defer unlock()
	s, _, err := b.holder(ctx, consumer)
	if err != nil || s == nil {
		return err
	}
	return b.revoke(ctx, s, consumer, node)
}

const (
	// leavingAge is after how long the mark of a Revoke that has not finished
	// holds nobody up any more: its process was killed.
	leavingAge = time.Minute
	// leavingTime is in what time Revoke has its rules denied, after its mark.
	leavingTime = 20 * time.Second
)

// leaving says whether a Revoke that began after a time is about to take away
// what a grant needs.
func (s *share) leaving(g grant, after time.Time) bool {
	return slices.ContainsFunc(s.grants(), func(other grant) bool {
		return other.key() != g.key() && other.leaving.After(after) && s.at(other.consumer) == s.at(g.consumer) &&
			slices.ContainsFunc(other.accesses, func(a access) bool {
				return slices.ContainsFunc(g.accesses, func(b access) bool { return a.to == b.to })
			})
	})
}

// revoke ends a consumer's grant of a node, or all if the node is empty.
//
// Manila has no compare-and-swap, so this and Grant look out for each other. This
// one marks its grant as leaving, lists the rules and then looks who needs them:
// whoever is not seen there has written its need later, sees the mark, and waits.
// The rules are denied by the ids that they had before that look.
func (b *Backend) revoke(ctx context.Context, s *share, consumer, node string) error {
	var gone grant
	marks := map[string]string{}
	begun := b.o.Now()
	for _, g := range s.grants() {
		if g.consumer == consumer && (node == "" || g.node == digest(node)) {
			for _, a := range g.accesses {
				gone.include(a)
			}
			g.leaving = begun
			marks[g.key()] = g.value()
		}
	}
	if len(marks) == 0 {
		return nil
	}
	if err := b.setMetadata(ctx, "shares/"+s.ID, marks); err != nil {
		return err
	}
	at, err := b.side(ctx, s, consumer)
	var rules []rule
	if err == nil {
		rules, err = at.list(ctx)
	}
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return err
	}
	if s, err = b.getShare(ctx, s.ID); err != nil {
		return err
	}
	needed := s.needed(s.at(consumer))
	for _, a := range gone.accesses {
		if slices.ContainsFunc(needed.accesses, func(n access) bool { return n.to == a.to }) {
			continue
		}
		for _, r := range rules {
			if r.To != a.to || r.Type != at.kind || !b.madeByUs(at, r) {
				continue
			}
			if b.o.Now().Sub(begun) > leavingTime {
				return fmt.Errorf("%w: Manila is too slow to be sure that nobody else needs the access rule for %s", backend.ErrPending, a.to)
			}
			if err := b.deny(ctx, at, r); err != nil {
				return err
			}
		}
		if at.kind == "cephx" {
			if err := b.dropKey(ctx, a.to); err != nil {
				return err
			}
		}
	}
	for key := range marks {
		if err := b.dropMetadata(ctx, "shares/"+s.ID, key); err != nil {
			return err
		}
	}
	return nil
}

func (b *Backend) dropKey(ctx context.Context, user string) error {
	if b.o.Keys == nil {
		return nil
	}
	return b.o.Keys.Delete(ctx, user)
}

// madeByUs keeps rules that others have made for a client of ours. Those of
// snapshots have no metadata that would tell.
func (b *Backend) madeByUs(at side, r rule) bool {
	return at.snapshot || at.kind == "cephx" || r.Metadata[keyInstance] == b.o.Instance
}

// side is where rules are: a share or a snapshot.
type side struct {
	path     string
	id       string
	kind     string // of clients, as Manila calls it
	snapshot bool
	list     func(context.Context) ([]rule, error)
}

// side is where the rules are that a consumer needs. ErrNotFound when a copy has
// gone.
func (b *Backend) side(ctx context.Context, s *share, consumer string) (side, error) {
	target := s.target(consumer)
	if target.SnapshotID != "" && s.wayOf() == wayAPI {
		id := target.SnapshotID
		return side{"snapshots/" + url.PathEscape(id), id, "ip", true, func(ctx context.Context) ([]rule, error) { return b.snapshotRules(ctx, id) }}, nil
	}
	id := s.ID
	if target.SnapshotID != "" && s.wayOf() == wayCopy {
		found, err := b.named(ctx, copyName(consumer))
		if err != nil {
			return side{}, err
		}
		if len(found) == 0 {
			return side{}, fmt.Errorf("the copy of the snapshot: %w", backend.ErrNotFound)
		}
		id = found[0].ID
	}
	kind := "ip"
	if s.Protocol == "CEPHFS" {
		kind = "cephx"
	}
	return side{"shares/" + url.PathEscape(id), id, kind, false, func(ctx context.Context) ([]rule, error) { return b.rules(ctx, id) }}, nil
}

// sinceLevels is the microversion that changes a rule's level.
const sinceLevels = 88

// allow makes a rule, or finds it, and waits until it is in effect, and until the
// key that goes with it is in the store. fresh says that there is probably none
// yet. A rule that Manila could not apply goes, as it may block others, and its
// reason is told.
func (b *Backend) allow(ctx context.Context, at side, a access, fresh bool) error {
	kind, to := at.kind, a.to
	asked := false
	for p := (pause{b: b, kind: "rule"}); ; {
		var rules []rule
		if asked || !fresh {
			var err error
			if rules, err = at.list(ctx); err != nil {
				return err
			}
		}
		i := slices.IndexFunc(rules, func(r rule) bool { return r.Type == kind && r.To == to })
		switch {
		case i < 0 && !asked:
			if err := b.askFor(ctx, at, a); err != nil {
				return err
			}
			asked = true
		case i < 0:
			return fmt.Errorf("%w: the access rule for %s has gone again", backend.ErrUnavailable, to)
		case rules[i].State == "error":
			told := b.complaint(ctx, at.id)
			reason := why("Manila could not let "+to+" in", told)
			if err := b.deny(ctx, at, rules[i]); err != nil {
				return errors.Join(reason, err)
			}
			if strings.TrimSpace(told.Detail) != noSuchLevel || a.level != "ro" {
				return reason
			}
			a.level, asked, fresh = "rw", false, true // the node mounts it read-only all the same
			continue
		case rules[i].State == "active" && rules[i].Level == "ro" && a.level == "rw" && !b.madeByUs(at, rules[i]):
			return fmt.Errorf("%w: %s is let in to read only, by a rule that is not ours", backend.ErrConflict, to)
		case rules[i].State == "active" && rules[i].Level == "ro" && a.level == "rw" && b.minor >= sinceLevels:
			raise := map[string]any{"update_access": map[string]any{"access_level": a.level}}
			if err := b.put(ctx, "share-access-rules/"+url.PathEscape(rules[i].ID), raise); err != nil {
				return err
			}
		case rules[i].State == "active" && rules[i].Level == "ro" && a.level == "rw":
			if err := b.deny(ctx, at, rules[i]); err != nil {
				return err
			}
			asked, fresh = false, true
			continue
		case rules[i].State == "active" && (kind != "cephx" || rules[i].Key != ""):
			p.ended()
			if kind != "cephx" {
				return nil
			}
			return b.o.Keys.Put(ctx, to, rules[i].Key)
		}
		if err := p.sleep(ctx); err != nil {
			return fmt.Errorf("the access rule for %s is not in effect yet: %w", to, err)
		}
	}
}

// noSuchLevel is the detail of a back end that knows no rules that only read.
const noSuchLevel = "021"

// askFor asks for a rule. One that is there already is nil.
func (b *Backend) askFor(ctx context.Context, at side, a access) error {
	req := map[string]any{"access_type": at.kind, "access_to": a.to}
	if !at.snapshot {
		req["access_level"], req["metadata"] = a.level, map[string]string{keyInstance: b.o.Instance}
	}
	err := b.post(ctx, at.path+"/action", map[string]any{"allow_access": req}, nil)
	refused := (*apiError)(nil)
	switch {
	case errors.As(err, &refused) && refused.status == http.StatusBadRequest && strings.Contains(refused.message, "exists"):
		return nil
	case errors.As(err, &refused) && refused.status == http.StatusBadRequest && strings.Contains(refused.message, "state"):
		return fmt.Errorf("%w: %w", backend.ErrUnavailable, withoutKind(refused)) // while something is done to the share
	}
	return err
}

// deny takes a rule away and waits until it is gone.
func (b *Backend) deny(ctx context.Context, at side, r rule) error {
	for p := (pause{b: b, kind: "deny"}); ; {
		if r.State != "queued_to_deny" && r.State != "denying" {
			err := b.post(ctx, at.path+"/action", map[string]any{"deny_access": map[string]any{"access_id": r.ID}}, nil)
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
		rules, err := at.list(ctx)
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
