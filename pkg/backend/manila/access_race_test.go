package manila

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// left returns the entries that Grant and Revoke keep on the cloud's shares, but for
// those that have come back although they had ended, which count for nobody.
func (c *cloud) left() (all []string) {
	c.Alter(func(objects fakemanila.Objects) {
		for _, s := range objects.Shares {
			for key, value := range s.Metadata {
				ended, _ := (&share{made: made{Metadata: s.Metadata}}).ended(nameOf(key))
				if ended.IsZero() && (strings.HasPrefix(key, prefixGrant) || strings.HasPrefix(key, prefixLeaving)) {
					all = append(all, key+" is "+value)
				}
			}
		}
	})
	return all
}

// meet runs what does one thing once for each change that it makes, with between
// run before that change, in the middle of it if it is one of metadata, or after it.
func meet(t *testing.T, o fakemanila.Options, prepare func(c *cloud), doing func(c *cloud) error, between func(c *cloud), check func(c *cloud, when string, err error)) {
	t.Helper()
	points := 0
	for point, reached := 1, true; reached; point++ {
		for _, where := range []string{"before", "in the middle of", "after"} {
			c := newCloud(t, o)
			prepare(c)
			var struck atomic.Bool // between changes things too
			reached = false
			c.Strike(func(change int, after bool) bool {
				if change != point || struck.Load() {
					return false
				}
				reached = true
				if where == "in the middle of" {
					middle := func() {
						if struck.CompareAndSwap(false, true) {
							between(c)
						}
					}
					if after {
						middle = nil
					}
					c.Between(middle)
				} else if after == (where == "after") && struck.CompareAndSwap(false, true) {
					between(c)
				}
				return false
			})
			err := doing(c)
			c.Strike(nil)
			c.Between(nil)
			switch {
			case struck.Load():
				points++
				check(c, where+" change "+fmt.Sprint(point), err)
			case err != nil:
				t.Errorf("without the other: %v", err)
			}
			if !reached {
				break
			}
		}
	}
	if points < 4 {
		t.Errorf("met at %d points only", points)
	}
}

// first says whether what comes between comes first: nothing is written yet.
func first(when string) bool {
	return strings.HasSuffix(when, " change 1") && !strings.HasPrefix(when, "after")
}

func short(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// TestGrantMeetsItsRevoke: one process lets a node in again while another revokes
// what that node had for the same use. Whoever comes later wins: a node that was
// let in stays in, and keeps its key.
func TestGrantMeetsItsRevoke(t *testing.T) {
	for _, kind := range []string{"cephx", "ip"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			var here *Backend
			var early error
			meet(t, fakemanila.Options{Delay: slow}, func(c *cloud) {
				heldAs(c, kind)
				here = c.open()
				ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, false))
			}, func(c *cloud) error {
				return c.open().Revoke(t.Context(), "one", node1.Name)
			}, func(c *cloud) {
				_, early = here.Grant(short(t), "one", node1, false)
			}, func(c *cloud, when string, err error) {
				if err != nil && !notYet(err) {
					t.Errorf("%s: revoke: %v", when, err)
				}
				if early != nil && !notYet(early) {
					t.Errorf("%s: grant: %v", when, early)
				}
				if early == nil && err == nil && !first(when) { // where both came one after the other
					c.wantIn(kind, when+": let in, and revoked beside it")
				}
				c.wantInAndOut(here, kind, when)
			})
		})
	}
}

// TestRevokeMeetsItsGrant: it is revoked while another process lets in. Nobody is
// in of whom nothing is written down.
func TestRevokeMeetsItsGrant(t *testing.T) {
	for _, kind := range []string{"cephx", "ip"} {
		for _, end := range []string{"revoke", "unexport"} {
			t.Run(kind+" "+end, func(t *testing.T) {
				t.Parallel()
				var target backend.Target
				meet(t, fakemanila.Options{Delay: slow}, func(c *cloud) {
					target = backend.Target{ShareID: heldAs(c, kind).ID}
				}, func(c *cloud) error {
					_, err := c.open().Grant(t.Context(), "one", node1, false)
					return err
				}, func(c *cloud) {
					var err error
					if end == "revoke" {
						err = c.open().Revoke(t.Context(), "one", node1.Name)
					} else {
						err = c.open().Unexport(t.Context(), target, "one")
					}
					if err != nil {
						t.Error(err)
					}
				}, func(c *cloud, when string, err error) {
					if end == "revoke" {
						if err != nil {
							t.Errorf("%s: %v", when, err)
						}
						c.wantIn(kind, when)
						if err := c.open().Revoke(t.Context(), "one", node1.Name); err != nil {
							t.Error(err)
						}
					} else if err != nil && !errors.Is(err, backend.ErrNotFound) {
						t.Errorf("%s: %v", when, err)
					}
					c.wantNothing(when)
				})
			})
		}
	}
}

// TestGrantMeetsAnother: while a process lets a node in to a share, the consumer comes to
// hold a snapshot of it, and another process lets that node in to that. It stays in.
func TestGrantMeetsAnother(t *testing.T) {
	var share *backend.Share
	var shown backend.Target
	meet(t, fakemanila.Options{Delay: slow}, func(c *cloud) {
		share = heldAs(c, "cephx")
		shown.SnapshotID = ok[*backend.Snapshot](t)(c.open().CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID})).ID
	}, func(c *cloud) error {
		_, err := c.open().Grant(t.Context(), "one", node1, false)
		return err
	}, func(c *cloud) {
		b := c.open()
		if err := b.Unexport(t.Context(), backend.Target{ShareID: share.ID}, "one"); err != nil {
			t.Error(err)
		}
		ok[*backend.Export](t)(b.Export(t.Context(), shown, "one"))
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, true))
	}, func(c *cloud, when string, err error) {
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("%s: %v", when, err)
		}
		if rules := c.rules(); len(rules) != 1 || len(c.keys.keys) != 1 {
			t.Errorf("%s: rules %v, %d keys", when, rules, len(c.keys.keys))
		}
		if err := c.open().Unexport(t.Context(), shown, "one"); err != nil {
			t.Error(err)
		}
		c.wantNothing(when)
	})
}

// TestTwoRevokes: two processes revoke the same at once, and both have done it.
func TestTwoRevokes(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	heldAs(c, "cephx")
	here, there := c.open(), c.open()
	for round := range 10 {
		for _, node := range []backend.Node{node1, node2} {
			ok[*backend.Export](t)(here.Grant(t.Context(), "one", node, false))
		}
		var group sync.WaitGroup
		for _, call := range []struct {
			b    *Backend
			node string
		}{{here, node1.Name}, {there, node1.Name}, {there, node2.Name}, {here, ""}} {
			group.Go(func() {
				if err := call.b.Revoke(t.Context(), "one", call.node); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		group.Wait()
		c.wantNothing(fmt.Sprintf("round %d", round))
	}
}

// TestRevokeMeetsItsLike: two processes revoke the same node, one in the middle of the
// other, and then it is let in again. It stays in, and keeps its key.
func TestRevokeMeetsItsLike(t *testing.T) {
	for _, kind := range []string{"cephx", "ip"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			var early error
			meet(t, fakemanila.Options{Delay: slow}, func(c *cloud) {
				heldAs(c, kind)
				ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, false))
			}, func(c *cloud) error {
				return c.open().Revoke(t.Context(), "one", node1.Name)
			}, func(c *cloud) {
				if err := c.open().Revoke(t.Context(), "one", node1.Name); err != nil {
					t.Error(err)
				}
				_, early = c.open().Grant(short(t), "one", node1, false)
			}, func(c *cloud, when string, err error) {
				if err != nil {
					t.Errorf("%s: revoke: %v", when, err)
				}
				if early != nil && !notYet(early) {
					t.Errorf("%s: grant: %v", when, early)
				}
				if early == nil && !first(when) {
					c.wantIn(kind, when+": let in beside a revoke")
				}
				c.wantInAndOut(c.open(), kind, when)
			})
		})
	}
}

// TestLostRule: a rule that somebody has removed is made again, while another process
// revokes it. Nobody is in of whom nothing is written down.
func TestLostRule(t *testing.T) {
	for _, kind := range []string{"cephx", "ip"} {
		for _, after := range []bool{false, true} {
			c := newCloud(t, fakemanila.Options{Delay: slow})
			heldAs(c, kind)
			b := c.open()
			ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
			c.Alter(func(objects fakemanila.Objects) {
				clear(objects.Rules)
			})
			met := false
			c.Strike(func(_ int, now bool) bool {
				if now == after && !met {
					met = true
					if err := c.open().Revoke(t.Context(), "one", node1.Name); err != nil {
						t.Error(err)
					}
				}
				return false
			})
			ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
			c.Strike(nil)
			if !met {
				t.Fatal("nothing was asked for")
			}
			c.wantIn(kind, fmt.Sprintf("%s, after %v", kind, after))
			if err := c.open().Revoke(t.Context(), "one", node1.Name); err != nil {
				t.Error(err)
			}
			c.wantNothing("in the end")
		}
	}
}

// heldAs makes a share whose clients are of a kind, held by "one".
func heldAs(c *cloud, kind string) *backend.Share {
	if kind == "ip" {
		return c.served(c.open())
	}
	s := ok[*backend.Share](c.t)(c.open().CreateShare(c.t.Context(), request("data")))
	ok[*backend.Export](c.t)(c.open().Export(c.t.Context(), backend.Target{ShareID: s.ID}, "one"))
	return s
}

// wantIn wants what lets one node in: one rule, its key, and the need for it.
func (c *cloud) wantIn(kind, when string) {
	c.t.Helper()
	rules := c.rules()
	for _, state := range rules {
		if state != "rw active" || len(rules) != 1 {
			c.t.Errorf("%s: rules %v", when, rules)
		}
	}
	if len(rules) == 0 || kind == "cephx" && len(c.keys.keys) != 1 || len(c.left()) == 0 {
		c.t.Errorf("%s: rules %v, %d keys, entries %v", when, rules, len(c.keys.keys), c.left())
	}
}

// wantInAndOut has b let one node in, and wants that to do it, and its end to leave nothing.
func (c *cloud) wantInAndOut(b *Backend, kind, when string) {
	c.t.Helper()
	ok[*backend.Export](c.t)(b.Grant(c.t.Context(), "one", node1, false))
	c.wantIn(kind, when+": let in afterwards")
	if err := c.open().Revoke(c.t.Context(), "one", node1.Name); err != nil {
		c.t.Error(err)
	}
	c.wantNothing(when)
}

func (c *cloud) wantNothing(when string) {
	c.t.Helper()
	if rules, left := c.rules(), c.left(); len(rules)+len(left)+len(c.keys.keys) > 0 {
		c.t.Errorf("%s: left: rules %v, %d keys, entries %v", when, rules, len(c.keys.keys), left)
	}
}

// TestLateGrant: a process that saw a share a moment ago takes nothing away from
// what another has written since.
func TestLateGrant(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	share := c.served(c.open())
	late := c.open()
	ok[*backend.Export](t)(late.Export(t.Context(), backend.Target{ShareID: share.ID}, "one"))
	if _, err := late.getShare(t.Context(), share.ID); err != nil {
		t.Fatal(err)
	}
	ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, false))
	ok[*backend.Export](t)(late.Grant(t.Context(), "one", node1, true))
	all := strings.Join(c.left(), " ")
	if !strings.Contains(all, "rw=192.0.2.1") {
		t.Errorf("the writer's need is gone: %s", all)
	}
}

// TestLongDenial: a rule takes so long to go that somebody else is let in
// meanwhile. The key is his then, and stays.
func TestLongDenial(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	share := heldAs(c, "cephx")
	var offset atomic.Int64
	o := c.options()
	o.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	open := func() *Backend { return ok[*Backend](t)(Open(t.Context(), o)) }
	ok[*backend.Export](t)(open().Grant(t.Context(), "one", node1, false))
	here, there := open(), open()
	denied := false
	c.Strike(func(change int, after bool) bool {
		if change == 2 && after && !denied {
			denied = true
			offset.Store(int64(2 * leavingAge))
			ok[*backend.Export](t)(here.Grant(t.Context(), "one", node2, false))
		}
		return false
	})
	if err := there.Revoke(t.Context(), "one", node1.Name); err != nil && !notYet(err) {
		t.Error(err)
	}
	c.Strike(nil)
	if !denied {
		t.Fatal("the rule was never denied")
	}
	c.wantIn("cephx", "let in while the rule went")
	if err := there.Unexport(t.Context(), backend.Target{ShareID: share.ID}, "one"); err != nil {
		t.Error(err)
	}
	c.wantNothing("in the end")
}

// TestGrantMeetsDeleteShare: a share is deleted, and waits for its snapshot, while
// another process publishes it. Nobody has a rule for what is gone.
func TestGrantMeetsDeleteShare(t *testing.T) {
	var id string
	var early error
	meet(t, fakemanila.Options{Delay: slow}, func(c *cloud) {
		id = heldAs(c, "cephx").ID
		b := c.open()
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
		ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: id, Role: backend.RoleUser}))
	}, func(c *cloud) error {
		return c.open().DeleteShare(t.Context(), id)
	}, func(c *cloud) {
		b, ctx, deleted := c.open(), short(t), false
		c.Alter(func(objects fakemanila.Objects) {
			deleted = objects.Shares[id].Metadata[keyDeleted] != ""
		})
		if _, err := b.Grant(ctx, "one", node2, false); deleted && !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("let in to what was deleted: %v", err)
		}
		if _, early = b.Export(ctx, backend.Target{ShareID: id}, "two"); early == nil {
			_, early = b.Grant(ctx, "two", node2, false)
		}
	}, func(c *cloud, when string, err error) {
		if err != nil {
			t.Errorf("%s: delete: %v", when, err)
		}
		if early != nil && !errors.Is(early, backend.ErrNotFound) {
			t.Errorf("%s: publish: %v", when, early)
		}
		c.wantNothing(when)
	})
}

// TestDeleteShareAgain: a deletion that was killed lets nobody stay in, and one
// that takes several calls leaves no key.
func TestDeleteShareAgain(t *testing.T) {
	for point := 1; ; point++ {
		c := newCloud(t, fakemanila.Options{Delay: slow})
		share := heldAs(c, "cephx")
		b := c.open()
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
		ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
		ctx, cancel := context.WithCancel(t.Context())
		c.Strike(func(change int, after bool) bool {
			if change == point && after {
				cancel()
			}
			return ctx.Err() != nil
		})
		err := b.DeleteShare(ctx, share.ID)
		c.Strike(nil)
		if ctx.Err() == nil {
			cancel()
			break
		}
		if err == nil {
			t.Fatal("it was not killed")
		}
		if err := c.open().DeleteShare(t.Context(), share.ID); err != nil {
			t.Errorf("killed after change %d, and again: %v", point, err)
		}
		c.Alter(func(objects fakemanila.Objects) { // the mark of a call that was killed stays for a while
			maps.DeleteFunc(objects.Shares[share.ID].Metadata, func(key, _ string) bool { return strings.HasPrefix(key, prefixLeaving) })
		})
		c.wantNothing(fmt.Sprintf("killed after change %d", point))
	}

	c := newCloud(t, fakemanila.Options{Delay: func() time.Duration { return 200 * time.Millisecond }})
	share := heldAs(c, "cephx")
	ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, false))
	if err := c.open().DeleteShare(short(t), share.ID); !notYet(err) {
		t.Fatalf("a deletion that takes long: %v", err)
	}
	time.Sleep(300 * time.Millisecond) // and ends when nobody looks
	if err := c.open().DeleteShare(t.Context(), share.ID); err != nil {
		t.Error(err)
	}
	c.wantNothing("in the end")
}

// TestExportMeetsUnexport: one process ends a hold while another takes it again.
// Whoever has it afterwards has it whole.
func TestExportMeetsUnexport(t *testing.T) {
	var target backend.Target
	var early error
	meet(t, fakemanila.Options{Delay: slow}, func(c *cloud) {
		target = backend.Target{ShareID: heldAs(c, "cephx").ID}
		ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, false))
	}, func(c *cloud) error {
		return c.open().Unexport(t.Context(), target, "one")
	}, func(c *cloud) {
		b, ctx := c.open(), short(t)
		if _, early = b.Export(ctx, target, "one"); early == nil {
			_, early = b.Grant(ctx, "one", node2, false)
		}
	}, func(c *cloud, when string, err error) {
		if err != nil && !notYet(err) {
			t.Errorf("%s: unexport: %v", when, err)
		}
		if early != nil && !notYet(early) {
			t.Errorf("%s: export: %v", when, early)
		}
		if early == nil && err == nil && !first(when) {
			c.wantIn("cephx", when)
		}
		b := c.open()
		ok[*backend.Export](t)(b.Export(t.Context(), target, "one"))
		ok[*backend.Export](t)(b.Grant(t.Context(), "one", node2, false))
		c.wantIn("cephx", when+": exported afterwards")
		if err := b.Unexport(t.Context(), target, "one"); err != nil {
			t.Error(err)
		}
		c.wantNothing(when)
	})
}

// TestGrantMeetsExport: one process exports, another, which looked before, writes
// its intent over what the first one holds, and then the first lets a node in.
func TestGrantMeetsExport(t *testing.T) {
	for _, kind := range []string{"cephx", "ip"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			c := newCloud(t, fakemanila.Options{Delay: slow})
			target := backend.Target{ShareID: heldAs(c, kind).ID}
			here, there := c.open(), c.open()
			if err := here.Unexport(t.Context(), target, "one"); err != nil {
				t.Fatal(err)
			}
			granted := make(chan error, 1)
			c.Strike(func(change int, after bool) bool {
				if change == 1 && !after {
					ok[*backend.Export](t)(here.Export(t.Context(), target, "one"))
				}
				if change == 1 && after {
					go func() { granted <- errOf(here.Grant(t.Context(), "one", node1, false)) }()
					time.Sleep(50 * time.Millisecond) // it has looked by now
				}
				return false
			})
			ok[*backend.Export](t)(there.Export(t.Context(), target, "one"))
			if err := <-granted; err != nil {
				t.Fatal(err)
			}
			c.Strike(nil)
			c.wantIn(kind, "exported by both")
		})
	}
}

// TestHoldOfAnother: who is told that a consumer holds a snapshot does not count on a
// hold that another process has written, and withdraws then.
func TestHoldOfAnother(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	here, there := c.open(), c.open()
	share, snap := c.snapshotted(here, "data")
	target := backend.Target{SnapshotID: snap.ID}
	mark := prefixDeleting + snap.ID + ".ANOTHER"
	c.Alter(func(objects fakemanila.Objects) {
		objects.Shares[share.ID].Metadata[mark] = time.Now().UTC().Format(time.RFC3339)
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	met := false
	c.Strike(func(change int, after bool) bool {
		if change == 2 && !after && !met { // it has seen the mark
			met = true
			c.Alter(func(objects fakemanila.Objects) { delete(objects.Shares[share.ID].Metadata, mark) })
			ok[*backend.Export](t)(there.Export(t.Context(), target, "one"))
		}
		if change == 2 && after {
			cancel() // and does not come back
		}
		return false
	})
	_, err := here.Export(ctx, target, "one")
	c.Strike(nil)
	if err == nil || !met {
		t.Fatalf("it was not withdrawn: %v", err)
	}
	ok[*backend.Export](t)(there.ExportOf(t.Context(), "one"))
	if err := there.DeleteSnapshot(t.Context(), snap.ID); !errors.Is(err, backend.ErrInUse) {
		t.Errorf("a snapshot that is held was deleted: %v", err)
	}
}
