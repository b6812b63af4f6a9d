package manila

import (
	"errors"
	"fmt"
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
