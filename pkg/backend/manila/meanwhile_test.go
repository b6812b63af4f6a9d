package manila

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// TestWrittenMeanwhile: Manila reads all metadata of a share and writes all of it when
// somebody adds an entry. Whatever a call does while another process's entry is under
// way like that stays done.
func TestWrittenMeanwhile(t *testing.T) {
	type scene struct {
		share       *backend.Share
		cut, other  *backend.Snapshot
		here, there *Backend
	}
	snapshotOf := func(s *backend.Snapshot) backend.Target { return backend.Target{SnapshotID: s.ID} }
	for name, test := range map[string]struct {
		before, during, after func(s scene) error
	}{
		"a hold": {
			during: func(s scene) error { return errOf(s.here.Export(t.Context(), snapshotOf(s.cut), "one")) },
			after: func(s scene) error {
				if err := s.here.DeleteSnapshot(t.Context(), s.cut.ID); !errors.Is(err, backend.ErrInUse) {
					return fmt.Errorf("it was deleted: %w", err)
				}
				return errOf(s.there.ExportOf(t.Context(), "one"))
			},
		},
		"its end": {
			before: func(s scene) error { return errOf(s.here.Export(t.Context(), snapshotOf(s.cut), "one")) },
			during: func(s scene) error { return s.here.Unexport(t.Context(), snapshotOf(s.cut), "one") },
			after: func(s scene) error {
				if err := errOf(s.there.ExportOf(t.Context(), "one")); !errors.Is(err, backend.ErrNotFound) {
					return fmt.Errorf("it is held: %w", err)
				}
				if err := errOf(s.there.Export(short(t), snapshotOf(s.other), "one")); err != nil && !notYet(err) {
					return fmt.Errorf("something else: %w", err)
				}
				return s.there.DeleteSnapshot(t.Context(), s.cut.ID)
			},
		},
		"a deletion that is refused": {
			before: func(s scene) error { return errOf(s.here.Export(t.Context(), snapshotOf(s.cut), "one")) },
			during: func(s scene) error {
				if err := s.here.DeleteSnapshot(t.Context(), s.cut.ID); !errors.Is(err, backend.ErrInUse) {
					return fmt.Errorf("it was deleted: %w", err)
				}
				return nil
			},
			after: func(s scene) error { return errOf(s.there.Export(t.Context(), snapshotOf(s.cut), "two")) },
		},
		"a draft that is filled": {
			during: func(s scene) error { return s.here.CommitShare(t.Context(), s.share.ID) },
			after: func(s scene) error {
				if now, err := s.there.Share(t.Context(), s.share.ID); err != nil || now.Draft {
					return fmt.Errorf("%+v, %w", now, err)
				}
				return nil
			},
		},
		"a share that goes with its snapshots": {
			during: func(s scene) error { return s.here.DeleteShare(t.Context(), s.share.ID) },
			after: func(s scene) error {
				if err := errOf(s.there.Share(t.Context(), s.share.ID)); !errors.Is(err, backend.ErrNotFound) {
					return fmt.Errorf("it is there: %w", err)
				}
				if waiting, err := s.there.Sweep(t.Context()); err != nil || len(waiting) != 1 {
					return fmt.Errorf("waiting: %q, %w", waiting, err)
				}
				return nil
			},
		},
		"a node that leaves": {
			before: func(s scene) error {
				return errors.Join(errOf(s.here.Export(t.Context(), backend.Target{ShareID: s.share.ID}, "one")), errOf(s.here.Grant(t.Context(), "one", node1, false)),
					errOf(s.here.Export(t.Context(), backend.Target{ShareID: s.share.ID}, "two")))
			},
			during: func(s scene) error { return s.here.Revoke(t.Context(), "one", node1.Name) },
			after: func(s scene) error { // nobody else needs the rule that "two" has now
				return errors.Join(errOf(s.there.Grant(t.Context(), "two", node1, false)), s.there.Revoke(t.Context(), "two", node1.Name))
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCloud(t, fakemanila.Options{Delay: slow, Protocol: "NFS"})
			s := scene{here: c.open(), there: c.open()}
			req := request("data")
			req.Draft, req.Parameters = true, map[string]string{"snapshotDirectory": ".snapshot/{id}"}
			s.share = ok[*backend.Share](t)(s.here.CreateShare(t.Context(), req))
			for name, into := range map[string]**backend.Snapshot{"cut": &s.cut, "other": &s.other} {
				*into = ok[*backend.Snapshot](t)(s.here.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: name, ShareID: s.share.ID, Role: backend.RoleUser}))
			}
			if test.before != nil {
				if err := test.before(s); err != nil {
					t.Fatal(err)
				}
			}
			c.Between(func() {
				c.Between(nil)
				if err := test.during(s); err != nil {
					t.Errorf("meanwhile: %v", err)
				}
			})
			if err := s.there.setMetadata(t.Context(), "shares/"+s.share.ID, map[string]string{"another": time.Now().String()}); err != nil {
				t.Fatal(err)
			}
			if err := test.after(s); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if rules := c.rules(); len(rules) > 0 {
				t.Errorf("rules %v", rules)
			}
		})
	}
}

// TestWithdrawalMeetsExport: while a process withdraws a hold, as its snapshot is about to
// be deleted, another one has the same consumer hold something else. That is found.
func TestWithdrawalMeetsExport(t *testing.T) {
	changes := 0
	for point, reached := 3, true; reached; point++ {
		c := newCloud(t, fakemanila.Options{Delay: slow})
		share := ok[*backend.Share](t)(c.open().CreateShare(t.Context(), request("data")))
		cut := ok[*backend.Snapshot](t)(c.open().CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID}))
		target := backend.Target{ShareID: share.ID}
		reached = false
		c.Strike(func(change int, after bool) bool {
			switch {
			case change == 1 && after:
				c.Alter(func(objects fakemanila.Objects) {
					objects.Shares[share.ID].Metadata[prefixDeleting+cut.ID+".other"] = time.Now().UTC().Format(time.RFC3339)
				})
			case change == point && !after && !reached:
				reached = true
				ok[*backend.Export](t)(c.open().Export(t.Context(), target, "one"))
			}
			return false
		})
		_, err := c.open().Export(short(t), backend.Target{SnapshotID: cut.ID}, "one")
		c.Strike(nil)
		if !reached {
			break
		}
		changes++
		if err == nil {
			t.Errorf("before change %d: a consumer holds two", point)
		}
		if now, err := c.open().ExportOf(t.Context(), "one"); err != nil || now.Target != target {
			t.Errorf("before change %d: %+v, %v", point, now, err)
		}
		if err := c.open().Unexport(t.Context(), target, "one"); err != nil {
			t.Error(err)
		}
	}
	if changes < 2 {
		t.Errorf("met at %d points only", changes)
	}
}

// TestKilledUnexport: what a killed Unexport has left, long ago, ends nothing that the
// consumer has come to hold since.
func TestKilledUnexport(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow, Protocol: "NFS"})
	b := c.open()
	req := request("data")
	req.Parameters = map[string]string{"snapshotDirectory": ".snapshot/{id}"}
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
	var cut []backend.Target
	for _, name := range []string{"held again", "held before"} {
		cut = append(cut, backend.Target{SnapshotID: ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: name, ShareID: share.ID})).ID})
	}
	long := time.Now().Add(-2 * leavingAge).UTC()
	c.Alter(func(objects fakemanila.Objects) {
		for i, target := range cut {
			m, name := objects.Shares[share.ID].Metadata, fmt.Sprint("OLD", i)
			m[hold{consumer: "one", what: target.SnapshotID, name: name}.key()] = long.Format(time.RFC3339Nano)
			m[prefixEnd+name+"."+long.Format(endStamp)] = endDone
		}
	})
	ok[*backend.Export](t)(b.Export(t.Context(), cut[0], "one"))
	ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, true))
	if err := c.open().DeleteSnapshot(t.Context(), cut[0].SnapshotID); !errors.Is(err, backend.ErrInUse) || !strings.HasSuffix(err.Error(), "held by one") {
		t.Errorf("delete what is held: %v", err)
	}
	if err := c.open().DeleteSnapshot(t.Context(), cut[1].SnapshotID); err != nil {
		t.Errorf("delete what was held: %v", err)
	}
	if now, err := c.open().ExportOf(t.Context(), "one"); err != nil || now.Target != cut[0] || len(c.rules()) != 1 {
		t.Errorf("%+v, %v, rules %v", now, err, c.rules())
	}
	if err := c.open().Unexport(t.Context(), cut[0], "one"); err != nil {
		t.Error(err)
	}
	c.wantNothing("in the end")
	if err := b.DeleteSnapshot(t.Context(), cut[0].SnapshotID); err != nil {
		t.Error(err)
	}
}

// TestUnlistedHold: a hold that no filter finds ends all the same.
func TestUnlistedHold(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	share, snap := c.snapshotted(c.open(), "data")
	target := backend.Target{SnapshotID: snap.ID}
	ok[*backend.Export](t)(c.open().Export(t.Context(), target, "one"))
	c.Alter(func(objects fakemanila.Objects) { delete(objects.Shares[share.ID].Metadata, prefixConsumer+"one") })
	if err := c.open().Unexport(t.Context(), target, "one"); err != nil {
		t.Error(err)
	}
	if err := c.open().DeleteSnapshot(t.Context(), snap.ID); err != nil {
		t.Error(err)
	}
}

// TestCopyMeetsUnexport: while the share is made that shows a snapshot, its hold ends. The
// share goes.
func TestCopyMeetsUnexport(t *testing.T) {
	var target backend.Target
	meet(t, fakemanila.Options{Delay: slow}, func(c *cloud) {
		req := request("data")
		req.Parameters = map[string]string{"protocol": "NFS"}
		share := ok[*backend.Share](t)(c.open().CreateShare(t.Context(), req))
		target.SnapshotID = ok[*backend.Snapshot](t)(c.open().CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID})).ID
	}, func(c *cloud) error {
		_, err := c.open().Export(t.Context(), target, "one")
		return err
	}, func(c *cloud) {
		if err := c.open().Unexport(t.Context(), target, "one"); err != nil && !notYet(err) {
			t.Error(err)
		}
	}, func(c *cloud, when string, err error) {
		if err != nil && !errors.Is(err, backend.ErrUnavailable) && !notYet(err) {
			t.Errorf("%s: %v", when, err)
		}
		_, held := c.open().ExportOf(t.Context(), "one")
		if want := map[bool]string{true: "2 shares, 1 snapshots, 0 rules", false: "1 shares, 1 snapshots, 0 rules"}[held == nil]; c.Counts() != want {
			t.Errorf("%s: %v, held: %v: there is %s", when, err, held, c.Counts())
		}
	})
}

// TestOldEntries: what has come back to the metadata of a share, or was left by those who
// were killed, holds nobody up and goes. What an Unexport has to finish stays.
func TestOldEntries(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share, snap := c.snapshotted(b, "data")
	target := backend.Target{ShareID: share.ID}
	ok[*backend.Export](t)(b.Export(t.Context(), target, "one"))
	long, now := time.Now().Add(-2*endAge).UTC(), time.Now().UTC()
	kept := map[string]string{
		hold{consumer: "killed", what: snap.ID, name: "A"}.key(): long.Format(time.RFC3339Nano),
		prefixEnd + "A." + long.Format(endStamp):                 endDone,
		prefixEnd + "B." + now.Format(endStamp):                  endDone, // it may still bring B back
	}
	old := map[string]string{
		hold{consumer: "late", what: snap.ID, name: "C"}.key():      long.Format(time.RFC3339Nano),
		prefixEnd + "C." + long.Format(endStamp):                    endWithdrawn,
		prefixDeleting + "7.D":                                      long.Format(time.RFC3339),
		grant{consumer: "one", node: "0", name: "E"}.key():          "rw=abaca-e",
		prefixEnd + "E." + long.Format(endStamp):                    endDone,
		prefixLeaving + "E.F":                                       long.Format(time.RFC3339) + " at=" + share.ID + " rw=" + b.user("one"),
		prefixEnd + "G." + long.Format(endStamp):                    endDone,
		hold{consumer: "long gone", what: snap.ID, name: "H"}.key(): long.Format(time.RFC3339Nano),
		prefixEnd + "H." + long.Format(endStamp):                    endDone,
		prefixEnd + "H." + long.Add(time.Minute).Format(endStamp):   endWithdrawn,
	}
	ended := map[string]string{ // a mark that came back
		prefixLeaving + "E.I":                   now.Format(time.RFC3339) + " at=" + share.ID + " rw=" + b.user("one"),
		prefixEnd + "I." + now.Format(endStamp): endDone,
	}
	c.Alter(func(objects fakemanila.Objects) {
		for _, m := range []map[string]string{kept, old, ended} {
			maps.Copy(objects.Shares[share.ID].Metadata, m)
		}
	})
	here := func() (left map[string]bool) {
		c.Alter(func(objects fakemanila.Objects) {
			left = map[string]bool{}
			for key := range objects.Shares[share.ID].Metadata {
				left[key] = true
			}
		})
		return left
	}
	for range 4 { // each drops some
		ok[*backend.Export](t)(b.Grant(short(t), "one", node1, false))
		if err := b.Revoke(t.Context(), "one", node1.Name); err != nil {
			t.Fatal(err)
		}
	}
	for key := range kept {
		if !here()[key] {
			t.Errorf("%s has gone", key)
		}
	}
	for key := range old {
		if here()[key] && !strings.HasPrefix(key, prefixEnd) { // whose ends go the next time
			t.Errorf("%s is left", key)
		}
	}
	if err := b.DeleteSnapshot(t.Context(), snap.ID); err != nil {
		t.Error(err)
	}
	for key := range here() {
		if strings.Contains(key, snap.ID) {
			t.Errorf("the snapshot is gone, and %s is left", key)
		}
	}
}
