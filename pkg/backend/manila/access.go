package manila

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
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

// grant is what a node was let in with, for one consumer. It is an entry that
// never changes (see hold.go): a node that comes to need more has a second one.
type grant struct {
	consumer, node string // node is a digest of its name
	name           string // its own, at random
	at             string // the id of what has the rules: the share, its snapshot, or a copy
	since          time.Time
	accesses       []access
	ended          bool
}

func (g grant) key() string {
	return prefixGrant + g.consumer + "." + g.node + "." + g.name
}

// leavingKey is that of the mark of a Revoke, which has a name of its own: when it began,
// and what it takes away, as a grant says it.
func (g grant) leavingKey(mark string) string { return prefixLeaving + g.name + "." + mark }

// value is "2006-01-02T15:04:05Z at=1b2c… rw=192.0.2.7 ro=2001:db8::7".
func (g grant) value() string {
	words := []string{g.since.UTC().Format(time.RFC3339), "at=" + g.at}
	for _, a := range g.accesses {
		words = append(words, a.level+"="+a.to)
	}
	return strings.Join(words, " ")
}

// read reads what value writes.
func (g *grant) read(value string) {
	g.since = sinceOf(value)
	for word := range strings.FieldsSeq(value) {
		switch what, to, _ := strings.Cut(word, "="); what {
		case "at":
			g.at = to
		case "ro", "rw":
			g.accesses = append(g.accesses, access{client(to), what})
		}
	}
}

// of says whether two grants are of one node of one consumer.
func (g grant) of(other grant) bool { return g.consumer == other.consumer && g.node == other.node }

// grants returns those on a share, and on its snapshots.
func (s *share) grants() (all []grant) {
	for key, value := range s.Metadata {
		rest, ok := strings.CutPrefix(key, prefixGrant)
		if !ok {
			continue
		}
		g := grant{}
		g.consumer, rest, _ = strings.Cut(rest, ".")
		g.node, g.name, _ = strings.Cut(rest, ".")
		g.read(value)
		end, _ := s.ended(g.name)
		g.ended = !end.IsZero()
		all = append(all, g)
	}
	return all
}

// lets says whether one of the accesses is of a client.
func lets(all []access, to string) bool {
	return slices.ContainsFunc(all, func(a access) bool { return a.to == to })
}

// needed returns the accesses that are needed of what has the rules, by those
// who hold something. A client may be there at both levels.
func (s *share) needed(at string) (all []access) {
	for _, g := range s.grants() {
		if g.at == at && !g.ended && s.holdOf(g.consumer).live() {
			all = append(all, g.accesses...)
		}
	}
	return all
}

// user is the CephX id of a consumer that may write, and of one of a snapshot.
func (b *Backend) user(consumer string) string { return "abaca-" + digest(b.o.Instance, consumer) }

// readers is the CephX id of a consumer for nodes that only read a share.
func (b *Backend) readers(consumer string) string { return b.user(consumer) + "-ro" }

// dropKeys drops all the keys of a consumer.
func (b *Backend) dropKeys(ctx context.Context, consumer string) error {
	for _, user := range []string{b.user(consumer), b.readers(consumer)} {
		if err := b.dropKey(ctx, user); err != nil {
			return fmt.Errorf("drop the key of %q: %w", consumer, err)
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
	x, err := b.letIn(ctx, s, consumer, node, readOnly)
	if errors.Is(err, backend.ErrNotFound) && !sure {
		if s, _, err = b.holder(ctx, consumer); err == nil {
			x, err = b.letIn(ctx, s, consumer, node, readOnly)
		}
	}
	return x, err
}

// letIn is Grant for what a consumer holds, or has held a moment ago.
func (b *Backend) letIn(ctx context.Context, s *share, consumer string, node backend.Node, readOnly bool) (*backend.Export, error) {
	if s == nil {
		return nil, backend.ErrNotFound
	}
	x, err := b.exportOf(ctx, s, consumer)
	if err != nil {
		return nil, err
	}
	g := grant{consumer: consumer, node: digest(node.Name)}
	writes := false
	for _, other := range s.grants() {
		writes = writes || other.of(g) && !other.ended && slices.Contains(other.accesses, access{x.User, "rw"})
	}
	if x.User != "" && !x.ReadOnly && readOnly && !writes {
		x.User = b.readers(consumer)
	}
	if g.accesses, err = b.accesses(s, x, node, readOnly || x.ReadOnly); err != nil {
		return nil, err
	}
	at, err := b.sideFor(ctx, s, consumer)
	if err != nil {
		return nil, err
	}
	g.at = at.id
	served := false // the rule is there, and it is to be seen that nobody revoked this before it was
	for p := (pause{b: b}); ; {
		var asked []access
		var unasked error
		if !s.granted(g) {
			g.name, g.since, served = newName(), b.o.Now(), false
			if err := b.setMetadata(ctx, "shares/"+s.ID, map[string]string{g.key(): g.value()}); err != nil {
				return nil, err
			}
			// Manila makes the rule while this looks whether it is to be.
			asked, unasked = b.askForNew(ctx, at, s.needed(at.id), g.accesses)
			s.Metadata[g.key()] = g.value()
		}
		now, err := b.getShare(ctx, s.ID)
		if err == nil && (!now.letsIn(consumer) || now.target(consumer) != x.Target) || errors.Is(err, backend.ErrNotFound) {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leavingTime) // whatever becomes of the caller
			defer cancel()
			// What was there before is that of a Revoke or Unexport.
			return nil, errors.Join(backend.ErrNotFound, b.revoke(ctx, s, func(other grant) bool { return g.name != "" && other.name == g.name }))
		}
		if err != nil {
			return nil, err
		}
		s = now
		if unasked != nil {
			return nil, unasked
		}
		if s.clearOf(g, b.o.Now().Add(-leavingAge)) {
			if served {
				return x, nil
			}
			// Whoever revokes from now on sees that it is needed.
			switch anew, err := b.serve(ctx, at, s.needed(at.id), g.accesses, asked); {
			case err == nil && !anew:
				return x, nil
			case err == nil: // who has revoked this node meanwhile may not have seen the rule
				served = true
				continue
			case !errors.Is(err, errGone): // else a Revoke that came before has taken it along
				return nil, err
			}
		}
		if err := p.sleep(ctx); err != nil {
			return nil, err
		}
	}
}

// granted says whether there is an entry that grants the same. One that is older than the
// hold is of a former one, and may be about to go.
func (s *share) granted(g grant) bool {
	begun := s.holdOf(g.consumer).since.Add(-clockSkew)
	return slices.ContainsFunc(s.grants(), func(other grant) bool {
		return other.of(g) && !other.ended && other.at == g.at && slices.Equal(other.accesses, g.accesses) && (other.name == g.name || other.since.After(begun))
	})
}

// clearOf says whether a grant is written down, and no Revoke at work, begun after a time,
// that may not have seen it.
func (s *share) clearOf(g grant, after time.Time) bool {
	return s.granted(g) && !s.leaving(g, after)
}

// letsIn says whether a consumer holds something of the share, and goes on to.
func (s *share) letsIn(consumer string) bool {
	h := s.holdOf(consumer)
	return h.live() && (h.what != holdsShare || !s.deferred() && s.Status != "deleting")
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
		named, err := networks("access", list)
		if x.Way == "" || x.Way == wayDirectory {
			level = "rw" // one rule for all of them; a copy shares its own with nobody
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
		a, err := netip.ParseAddr(server(l))
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

// server is the address or the name of what serves an export location of NFS or CIFS.
func server(location string) string {
	host := location
	if rest, ok := strings.CutPrefix(strings.ReplaceAll(location, `\`, "/"), "//"); ok {
		host, _, _ = strings.Cut(rest, "/")
	} else if i := strings.Index(location, ":/"); i > 0 {
		host = location[:i]
	}
	return strings.Trim(host, "[]")
}

// distance is the place in a list of addresses and networks of the first that a location
// is in; a location that is in none comes last.
func distance(location string, list []string) int {
	at, err := netip.ParseAddr(server(location))
	if i := slices.IndexFunc(list, func(n string) bool {
		p, perr := netip.ParsePrefix(n)
		return err == nil && (n == client(server(location)) || perr == nil && p.Contains(at.Unmap()))
	}); i >= 0 {
		return i
	}
	return len(list)
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
	s, all, err := b.holder(ctx, consumer)
	if err == nil && s == nil && len(all) == 0 {
		return b.dropKeys(ctx, consumer)
	}
	if err != nil || s == nil {
		return err
	}
	leaves := func(g grant) bool { return g.consumer == consumer && (node == "" || g.node == digest(node)) }
	if err = b.revoke(ctx, s, leaves); errors.Is(err, backend.ErrNotFound) {
		return nil // the share has gone, and with it all that was granted
	}
	return err
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
	for key, value := range s.Metadata {
		if !strings.HasPrefix(key, prefixLeaving) || !s.atWork(key, after) {
			continue
		}
		gone := grant{}
		if gone.read(value); gone.at == g.at && slices.ContainsFunc(gone.accesses, func(a access) bool { return lets(g.accesses, a.to) }) {
			return true
		}
	}
	return false
}

// revoke ends those grants on a share that leave.
//
// Manila has no compare-and-swap, so this and Grant look out for each other. This
// one marks what leaves, lists the rules and then looks who needs them: whoever is
// not seen there has written its need later, sees the mark, and waits. The rules are
// denied by the ids that they had before that look. What a node has written since s
// was read is of a Grant that comes after this.
func (b *Backend) revoke(ctx context.Context, s *share, leaves func(grant) bool) error {
	before, begun := s, b.o.Now()
	gone := slices.DeleteFunc(s.grants(), func(g grant) bool { return !leaves(g) })
	if len(gone) == 0 {
		return nil
	}
	path, mark := "shares/"+s.ID, newName() // another call that ends the same has its own
	adds, clients := map[string]string{}, map[string]map[string]bool{}
	var over []string
	for _, g := range gone {
		maps.Copy(adds, b.ends(endDone, g.name))
		over = append(over, g.key(), g.leavingKey(mark))
		if clients[g.at] == nil {
			clients[g.at] = map[string]bool{}
		}
		for _, a := range g.accesses {
			clients[g.at][a.to] = true
		}
		g.since = begun
		adds[g.leavingKey(mark)] = g.value()
	}
	if err := b.setMetadata(ctx, path, adds); err != nil {
		return err
	}
	rules := map[string][]rule{}
	for at := range clients {
		var err error
		if rules[at], err = b.rulesOn(ctx, s.side(at)); err != nil && !errors.Is(err, backend.ErrNotFound) { // a copy or snapshot that has gone
			return err
		}
	}
	s, err := b.getShare(ctx, s.ID)
	if err != nil {
		return err
	}
	var keys []string
	for id, leave := range clients {
		at, needed := s.side(id), s.needed(id)
		for to := range leave {
			if err := b.takeAway(ctx, at, to, rules[id], needed, begun); err != nil {
				return err
			}
			if at.kind == "cephx" && !lets(needed, to) {
				keys = append(keys, to)
			}
		}
	}
	if b.o.Now().Sub(begun) > leavingTime { // somebody may have been let in who was tired of waiting
		keys, err = nil, b.revoke(ctx, before, leaves)
	}
	for _, user := range keys {
		err = errors.Join(err, b.dropKey(ctx, user))
	}
	if err != nil {
		return err
	}
	if err := b.setMetadata(ctx, path, b.ends(endDone, mark)); err != nil {
		return err
	}
	for _, key := range over {
		if err := b.dropMetadata(ctx, path, key); err != nil {
			return err
		}
	}
	return b.tidy(ctx, s)
}
