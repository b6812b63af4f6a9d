package manila

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

func nodeOf(name string, addresses ...string) backend.Node {
	n := backend.Node{Name: name}
	for _, a := range addresses {
		n.Addresses = append(n.Addresses, netip.MustParseAddr(a))
	}
	return n
}

var (
	node1 = nodeOf("node-1", "192.0.2.1")
	node2 = nodeOf("node-2", "192.0.2.2")
)

// rules are those of the cloud: level and state by client, those of snapshots
// with an asterisk.
func (c *cloud) rules() map[string]string {
	all := map[string]string{}
	c.Alter(func(objects fakemanila.Objects) {
		for _, r := range objects.Rules {
			to := r.To
			if r.SnapshotID != "" {
				to += "*"
			}
			all[to] = r.Level + " " + r.State
		}
	})
	return all
}

func (c *cloud) wantRules(want map[string]string) {
	c.t.Helper()
	if got := c.rules(); !maps.Equal(got, want) {
		c.t.Errorf("rules: %v, want %v", got, want)
	}
}

// served makes an NFS share, held by "one" and "two".
func (c *cloud) served(b *Backend) *backend.Share {
	req := request("nfs")
	req.Parameters = map[string]string{"type": "mountable", "protocol": "NFS"}
	s := ok[*backend.Share](c.t)(b.CreateShare(c.t.Context(), req))
	for _, consumer := range []string{"one", "two"} {
		ok[*backend.Export](c.t)(b.Export(c.t.Context(), backend.Target{ShareID: s.ID}, consumer))
	}
	return s
}

// TestNodes: the nodes that mount are let in by their addresses, at the level that
// they need, for as long as one of them does.
func TestNodes(t *testing.T) {
	for _, version := range []string{"2.89", "2.80"} { // the older one cannot change a rule's level
		t.Run(version, func(t *testing.T) {
			c := newCloud(t, fakemanila.Options{Microversion: version, Delay: slow})
			b, ctx := c.open(), t.Context()
			share := c.served(b)
			grant := func(consumer string, node backend.Node, readOnly bool) {
				t.Helper()
				ok[*backend.Export](t)(c.open().Grant(ctx, consumer, node, readOnly))
			}
			revoke := func(consumer string, node backend.Node) {
				t.Helper()
				if err := c.open().Revoke(ctx, consumer, node.Name); err != nil {
					t.Error(err)
				}
			}
			if _, err := b.Grant(ctx, "one", nodeOf("bare"), false); !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), "--node-address") {
				t.Errorf("a node that the server cannot know: %v", err)
			}
			c.wantRules(map[string]string{})
			grant("one", node1, true)
			c.wantRules(map[string]string{"192.0.2.1": "ro active"})
			grant("two", node1, false) // the same machine
			c.wantRules(map[string]string{"192.0.2.1": "rw active"})
			grant("one", node2, true)
			grant("one", node1, true)
			c.wantRules(map[string]string{"192.0.2.1": "rw active", "192.0.2.2": "ro active"})
			revoke("one", node1)
			c.wantRules(map[string]string{"192.0.2.1": "rw active", "192.0.2.2": "ro active"})
			revoke("two", node1)
			c.wantRules(map[string]string{"192.0.2.2": "ro active"})

			// The snapshot's own rules are others than the share's.
			snap := ok[*backend.Snapshot](t)(b.CreateSnapshot(ctx, backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
			ok[*backend.Export](t)(b.Export(ctx, backend.Target{SnapshotID: snap.ID}, "reader"))
			grant("reader", node2, false)
			if got := c.rules(); got["192.0.2.2*"] == "" || got["192.0.2.2"] != "ro active" {
				t.Errorf("rules: %v", got)
			}
			if err := b.Unexport(ctx, backend.Target{SnapshotID: snap.ID}, "reader"); err != nil {
				t.Error(err)
			}
			if err := b.Unexport(ctx, backend.Target{ShareID: share.ID}, "one"); err != nil {
				t.Error(err)
			}
			c.wantRules(map[string]string{})

			// A rule that an administrator has made serves, and stays.
			c.Alter(func(objects fakemanila.Objects) {
				objects.Rules["theirs"] = &fakemanila.Rule{ID: "theirs", ShareID: share.ID, Type: "ip", To: "192.0.2.1", Level: "ro", State: "active"}
			})
			grant("two", node1, true)
			if _, err := b.Grant(ctx, "two", node1, false); !errors.Is(err, backend.ErrConflict) {
				t.Errorf("to raise somebody else's rule: %v", err)
			}
			revoke("two", node1)
			c.wantRules(map[string]string{"192.0.2.1": "ro active"})
		})
	}
}

// TestReaders: a node that only reads a CephFS share has an id of its own, whose
// key goes with the last that needs it.
func TestReaders(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b, ctx := c.open(), t.Context()
	share := ok[*backend.Share](t)(b.CreateShare(ctx, request("data")))
	ok[*backend.Export](t)(b.Export(ctx, backend.Target{ShareID: share.ID}, "one"))
	ro := ok[*backend.Export](t)(b.Grant(ctx, "one", node1, true))
	rw := ok[*backend.Export](t)(b.Grant(ctx, "one", node2, false))
	ok[*backend.Export](t)(b.Grant(ctx, "one", nodeOf("node-3"), true)) // needs no address
	c.wantRules(map[string]string{ro.User: "ro active", rw.User: "rw active"})
	if len(c.keys.keys) != 2 || ro.User == rw.User {
		t.Errorf("keys: %v", c.keys.keys)
	}
	for _, node := range []string{"node-1", "node-2"} {
		if err := b.Revoke(ctx, "one", node); err != nil {
			t.Error(err)
		}
	}
	c.wantRules(map[string]string{ro.User: "ro active"})
	if len(c.keys.keys) != 1 || c.keys.keys[ro.User] == "" {
		t.Errorf("keys: %v", c.keys.keys)
	}
	raised := ok[*backend.Export](t)(b.Grant(ctx, "one", nodeOf("node-3"), false))
	if raised.User != rw.User {
		t.Errorf("raised: %+v", raised)
	}
	if err := b.Revoke(ctx, "one", "node-3"); err != nil {
		t.Error(err)
	}
	c.wantRules(map[string]string{})
	if len(c.keys.keys) > 0 {
		t.Errorf("keys: %v", c.keys.keys)
	}
}

// TestLostShare: of a share that others have deleted no key is left once its users
// have been told to go.
func TestLostShare(t *testing.T) {
	for name, end := range map[string]func(*Backend, *backend.Share) error{
		"revoke": func(b *Backend, _ *backend.Share) error { return b.Revoke(t.Context(), "one", "node-1") },
		"unexport": func(b *Backend, s *backend.Share) error {
			return b.Unexport(t.Context(), backend.Target{ShareID: s.ID}, "one")
		},
	} {
		c := newCloud(t, fakemanila.Options{Delay: slow})
		b := c.open()
		share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
		for _, consumer := range []string{"one", "two"} {
			ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: share.ID}, consumer))
			ok[*backend.Export](t)(b.Grant(t.Context(), consumer, node2, true))
		}
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
		c.Alter(func(objects fakemanila.Objects) {
			delete(objects.Shares, share.ID)
		})
		if err := end(b, share); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if len(c.keys.keys) != 1 || c.keys.keys[b.readers("two")] == "" {
			t.Errorf("%s: keys are left: %v", name, c.keys.keys)
		}
	}
}

// TestLostDeletion: of a share that goes while the answer is lost no key is left, and
// of one that stays whoever is let in again has it.
func TestLostDeletion(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b, ctx := c.open(), t.Context()
	share := ok[*backend.Share](t)(b.CreateShare(ctx, request("data")))
	ok[*backend.Export](t)(b.Export(ctx, backend.Target{ShareID: share.ID}, "one"))
	for _, locked := range []bool{true, false} {
		user := ok[*backend.Export](t)(b.Grant(ctx, "one", node1, false)).User
		if c.keys.keys[user] == "" {
			t.Errorf("there is no key for %s: %v", user, c.keys.keys)
		}
		if locked {
			c.Lock(share.ID, "audit")
		} else {
			c.Lock(share.ID, "")
			c.Add(fakemanila.Fault{Method: "DELETE", Path: "shares/" + share.ID, Cut: true, After: true})
		}
		if err := b.DeleteShare(ctx, share.ID); err == nil {
			t.Error("it is deleted")
		}
	}
	if err := b.DeleteShare(ctx, share.ID); err != nil || len(c.keys.keys) > 0 {
		t.Errorf("keys are left: %v, %v", c.keys.keys, err)
	}
}

// TestNoReaders: where a back end knows no rules that only read, one that writes
// is made, and the node mounts read-only. What a share type lacks is asked for once.
func TestNoReaders(t *testing.T) {
	asked := atomic.Int32{}
	c := newCloud(t, fakemanila.Options{Delay: slow, Refuse: func(_, level string) string {
		if level != "ro" {
			return ""
		}
		asked.Add(1)
		return noSuchLevel
	}})
	b := c.open()
	c.served(b)
	for _, node := range []backend.Node{node1, node2} {
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node, true))
	}
	c.wantRules(map[string]string{"192.0.2.1": "rw active", "192.0.2.2": "rw active"})
	if n := asked.Load(); n != 1 {
		t.Errorf("a rule that only reads was asked for %d times", n)
	}

	c = newCloud(t, fakemanila.Options{Delay: slow, Refuse: func(to, _ string) string { // the client, at any level
		if to == "192.0.2.1" {
			return noSuchLevel
		}
		return ""
	}})
	b = c.open()
	c.served(b)
	if _, err := b.Grant(t.Context(), "one", node1, true); !errors.Is(err, backend.ErrUnsupported) {
		t.Errorf("a client that cannot be let in: %v", err)
	}
	ok[*backend.Export](t)(b.Grant(t.Context(), "one", node2, true))
	c.wantRules(map[string]string{"192.0.2.2": "ro active"})
}

// TestKilledGrant: what a Grant has left that was killed beside an Unexport, long ago, goes
// with the next that ends on the share. It is none for the consumer who holds it again.
func TestKilledGrant(t *testing.T) {
	for _, again := range []bool{false, true} {
		c := newCloud(t, fakemanila.Options{Delay: slow})
		b := c.open()
		share := c.served(b)
		target := backend.Target{ShareID: share.ID}
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
		c.Alter(func(objects fakemanila.Objects) {
			m := objects.Shares[share.ID].Metadata
			maps.DeleteFunc(m, func(key, _ string) bool { return strings.HasPrefix(key, prefixHold+"one.") })
			for key := range m {
				if strings.HasPrefix(key, prefixGrant) {
					m[key] = time.Now().Add(-2*endAge).UTC().Format(time.RFC3339) + m[key][len("2006-01-02T15:04:05Z"):]
				}
			}
		})
		if again {
			ok[*backend.Export](t)(c.open().Export(t.Context(), target, "one"))
			ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, false))
			if left := c.left(); len(left) != 2 {
				t.Errorf("there is %q", left)
			}
			continue
		}
		ok[*backend.Export](t)(b.Grant(t.Context(), "two", node2, false))
		if err := b.Revoke(t.Context(), "two", node2.Name); err != nil {
			t.Error(err)
		}
		c.wantNothing("somebody else has gone")
	}
}

// refusing makes a share for "one" and "two" on a cloud that cannot let anybody
// in at a level.
func refusing(t *testing.T, version, level string) *cloud {
	c := newCloud(t, fakemanila.Options{Microversion: version, Delay: slow, Refuse: func(_, asked string) string {
		if asked == level {
			return "020"
		}
		return ""
	}})
	c.served(c.open())
	return c
}

// TestFailedRaise: a reader's rule that cannot be raised for a writer stays the
// reader's.
func TestFailedRaise(t *testing.T) {
	for _, version := range []string{"2.89", "2.80"} {
		c := refusing(t, version, "rw")
		b := c.open()
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, true))
		if _, err := b.Grant(t.Context(), "two", node1, false); !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), "refuses") {
			t.Errorf("%s: raised: %v", version, err)
		}
		c.wantRules(map[string]string{"192.0.2.1": "ro active"})
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, true)) // whatever the writer would need
		c.wantRules(map[string]string{"192.0.2.1": "ro active"})
	}
}

// TestDeadRaise: a process is killed while it raises a reader's rule: between the
// denial of the old and the new one, or, where rules can be raised in place, when
// the back end has just refused. Once the writer is revoked, the reader is in again.
func TestDeadRaise(t *testing.T) {
	for version, last := range map[string]int{"2.80": 3, "2.89": 2} { // the need, the denial of the rule that is there, the new one
		c := refusing(t, version, "rw")
		ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, true))
		ctx, cancel := context.WithCancel(t.Context())
		c.Strike(func(change int, after bool) bool {
			if change == last && after == (version == "2.89") {
				cancel()
			}
			return ctx.Err() != nil
		})
		if _, err := c.open().Grant(ctx, "two", node1, false); err == nil {
			t.Fatal("it was not killed")
		}
		c.Strike(nil)
		for end := time.Now().Add(time.Second); c.rules()["192.0.2.1"] == "rw queued_to_update" && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if got := c.rules()["192.0.2.1"]; got != "" && got != "rw error" {
			t.Errorf("%s: %s", version, got)
		}
		if err := c.open().Revoke(t.Context(), "two", node1.Name); err != nil {
			t.Error(err)
		}
		c.wantRules(map[string]string{"192.0.2.1": "ro active"})
	}
}

// TestSpellings: a client is one however it is written.
func TestSpellings(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share := c.served(b)
	c.Alter(func(objects fakemanila.Objects) {
		objects.Rules["theirs"] = &fakemanila.Rule{ID: "theirs", ShareID: share.ID, Type: "ip", To: "192.0.2.1/32", Level: "rw", State: "active"}
	})
	ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
	if err := b.Revoke(t.Context(), "one", node1.Name); err != nil {
		t.Error(err)
	}
	c.wantRules(map[string]string{"192.0.2.1/32": "rw active"})

	req := request("listed")
	req.Parameters = map[string]string{"type": "mountable", "protocol": "NFS", "access": "192.0.2.7, 192.0.2.7/32,2001:DB8:0::7,2001:db8::7/128, 2001:db8::/32"}
	listed := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: listed.ID}, "three"))
	ok[*backend.Export](t)(b.Grant(t.Context(), "three", node1, false))
	c.wantRules(map[string]string{"192.0.2.1/32": "rw active", "192.0.2.7": "rw active", "2001:db8::7": "rw active", "2001:db8::/32": "rw active"})
	req = request("loose")
	req.Parameters = map[string]string{"type": "mountable", "protocol": "NFS", "access": "192.0.2.7/24"}
	if _, err := b.CreateShare(t.Context(), req); !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), "192.0.2.0/24") {
		t.Errorf("a network with bits behind its mask: %v", err)
	}
}

// TestCopyIsRead: the clients that a class names only read the copy of a snapshot.
func TestCopyIsRead(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	c.onlyCopies()
	b := c.open()
	req := request("data")
	req.Parameters = map[string]string{"type": "mountable", "protocol": "NFS", "access": "192.0.2.0/24"}
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
	snap := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{SnapshotID: snap.ID}, "reader"))
	ok[*backend.Export](t)(b.Grant(t.Context(), "reader", node1, true))
	c.wantRules(map[string]string{"192.0.2.0/24": "ro active"})
}

// TestDenyLater: while something is done to a share its rules stay; that is no
// fault of the request's.
func TestDenyLater(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share := c.served(b)
	ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
	for _, status := range []string{"extending", "available"} {
		c.Alter(func(objects fakemanila.Objects) {
			objects.Shares[share.ID].Status = status
		})
		if err := b.Revoke(t.Context(), "one", node1.Name); (err == nil) != (status == "available") || err != nil && !errors.Is(err, backend.ErrUnavailable) {
			t.Errorf("%s: %v", status, err)
		}
	}
	c.wantRules(map[string]string{})
}

// TestTheirs: a rule that somebody else has made is not denied, not even one that
// Manila could not apply.
func TestTheirs(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	share := c.served(c.open())
	c.Alter(func(objects fakemanila.Objects) {
		objects.Rules["theirs"] = &fakemanila.Rule{ID: "theirs", ShareID: share.ID, Type: "ip", To: "192.0.2.1", Level: "rw", State: "error"}
	})
	c.Say(share.ID, "020", "update access rules: the client ID is not allowed")
	if _, err := c.open().Grant(t.Context(), "one", node1, false); !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), "not ours") {
		t.Errorf("by a rule in error that is not ours: %v", err)
	}
	c.wantRules(map[string]string{"192.0.2.1": "rw error"})
}

// TestGhost: what was written for a consumer that holds nothing any more counts
// for nothing.
func TestGhost(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	req := request("shown")
	req.Parameters = map[string]string{"type": "cephfs", "protocol": "NFS", "snapshotDirectory": ".snapshot/{id}"}
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: share.ID}, "one"))
	ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, true))
	c.Alter(func(objects fakemanila.Objects) {
		objects.Shares[share.ID].Metadata[prefixGrant+"ghost."+digest("node-1")] = "rw=192.0.2.1"
	})
	ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, true))
	c.wantRules(map[string]string{"192.0.2.1": "ro active"})
	if err := b.Revoke(t.Context(), "one", node1.Name); err != nil {
		t.Error(err)
	}
	c.wantRules(map[string]string{})
}

// TestGrantMeetsRevoke: one process lets a node in to a share at the moment in
// which another is about to take the rule away that the node has had for another
// use. Whoever was let in stays in.
func TestGrantMeetsRevoke(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	share := c.served(c.open())
	here, there := c.open(), c.open()
	ok[*backend.Export](t)(there.Grant(t.Context(), "two", node1, false))
	early := errors.New("the rule was never denied")
	c.Strike(func(change int, after bool) bool {
		if change == 2 && !after { // the first is the mark
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, early = here.Grant(ctx, "one", node1, false)
		}
		return false
	})
	if err := there.Revoke(t.Context(), "two", node1.Name); err != nil {
		t.Error(err)
	}
	c.Strike(nil)
	if early == nil {
		c.wantRules(map[string]string{"192.0.2.1": "rw active"})
	} else if !notYet(early) {
		t.Errorf("let in while the rule goes: %v", early)
	}
	ok[*backend.Export](t)(here.Grant(t.Context(), "one", node1, false))
	c.wantRules(map[string]string{"192.0.2.1": "rw active"})
	if err := here.Revoke(t.Context(), "one", node1.Name); err != nil {
		t.Error(err)
	}
	c.wantRules(map[string]string{})
	c.Alter(func(objects fakemanila.Objects) {
		for key := range objects.Shares[share.ID].Metadata {
			if strings.HasPrefix(key, prefixGrant) {
				t.Errorf("left on the share: %s", key)
			}
		}
	})
}

// notYet says that a call has ended with its time, in a pause or in a request.
func notYet(err error) bool {
	return errors.Is(err, backend.ErrPending) || errors.Is(err, context.DeadlineExceeded)
}

// TestDeadRevoke: a mark that a killed process has left holds nobody up for long,
// and the repeated call finishes its work.
func TestDeadRevoke(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	c.served(c.open())
	ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, false))
	ctx, cancel := context.WithCancel(t.Context())
	c.Strike(func(change int, after bool) bool {
		if change == 1 && after {
			cancel()
		}
		return change > 1 || after
	})
	if err := c.open().Revoke(ctx, "one", "node-1"); err == nil {
		t.Fatal("it was not killed")
	}
	c.Strike(nil)
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.open().Grant(soon, "two", node1, false); !notYet(err) {
		t.Errorf("beside a fresh mark: %v", err)
	}
	later, err := Open(t.Context(), func() Options {
		o := c.options()
		o.Now = func() time.Time { return time.Now().Add(2 * leavingAge) }
		return o
	}())
	if err != nil {
		t.Fatal(err)
	}
	ok[*backend.Export](t)(later.Grant(t.Context(), "two", node1, false))
	if err := c.open().Revoke(t.Context(), "one", "node-1"); err != nil {
		t.Error(err)
	}
	c.wantRules(map[string]string{"192.0.2.1": "rw active"})
}

func TestFamilies(t *testing.T) {
	for location, want := range map[string]string{
		"192.0.2.7:/a": "true false", "[2001:db8::7]:/a": "false true", "nas.example:/a": "true true",
		`\\192.0.2.7\a`: "true false", "//[2001:db8::7]/a": "false true", `\\nas\a`: "true true",
	} {
		if v4, v6 := families([]string{location}); fmt.Sprint(v4, v6) != want {
			t.Errorf("%s: %v %v, want %s", location, v4, v6, want)
		}
	}
	if v4, v6 := families([]string{"192.0.2.7:/a", "[2001:db8::7]:/a"}); !v4 || !v6 {
		t.Error("both")
	}
}

// TestGrantMeetsUnexport: one process lets a node in at the moment in which another
// ends the hold. Nothing is left of either.
func TestGrantMeetsUnexport(t *testing.T) {
	for point := 1; point <= 3; point++ {
		c := newCloud(t, fakemanila.Options{Delay: slow})
		held := c.served(c.open())
		here, there := c.open(), c.open()
		ok[*share](t)(here.getShare(t.Context(), held.ID)) // it was held a moment ago
		early := errors.New("there are not so many changes")
		c.Strike(func(change int, after bool) bool {
			if change == point && !after {
				_, early = here.Grant(t.Context(), "one", node1, false)
			}
			return false
		})
		if err := there.Unexport(t.Context(), backend.Target{ShareID: held.ID}, "one"); err != nil {
			t.Error(err)
		}
		c.Strike(nil)
		if point > 1 && !errors.Is(early, backend.ErrNotFound) {
			t.Errorf("let in to what goes, before its change %d: %v", point, early)
		}
		c.wantRules(map[string]string{})
		c.Alter(func(objects fakemanila.Objects) {
			for key := range objects.Shares[held.ID].Metadata {
				if strings.HasPrefix(key, prefixGrant) {
					t.Errorf("left on the share before change %d: %s", point, key)
				}
			}
		})
	}
}
