package backendtest

import (
	"errors"
	"fmt"
	"sync"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// race calls f callers times at once, over two opened backends, and returns
// the answers.
func race[T any](s *suite, f func(b backend.Backend, i int) (T, error)) ([]T, []error) {
	values, errs := make([]T, s.callers()), make([]error, s.callers())
	// Two processes: a lock in one's memory does not keep the other out.
	backends := []backend.Backend{s.open(), s.open()}
	start := make(chan struct{})
	var group sync.WaitGroup
	for i := range values {
		group.Go(func() {
			<-start
			values[i], errs[i] = f(backends[i%2], i)
		})
	}
	close(start)
	group.Wait()
	return values, errs
}

// testConcurrency: calls at once end as they would in some order.
func testConcurrency(s *suite) {
	share := s.share("data")
	s.sub("one share", func(s *suite) {
		shares, errs := race(s, func(b backend.Backend, _ int) (*backend.Share, error) {
			return b.CreateShare(s.ctx, s.request("one"))
		})
		allSame(s, shares, errs)
		race(s, func(b backend.Backend, _ int) (any, error) {
			err := b.DeleteShare(s.ctx, shares[0].ID)
			if err != nil {
				s.Errorf("delete: %v", err)
			}
			return nil, err
		})
		s.is(errOf(s.b.ShareNamed(s.ctx, "one")), backend.ErrNotFound)
	})
	s.sub("one share of two sizes", func(s *suite) {
		shares, errs := race(s, func(b backend.Backend, i int) (*backend.Share, error) {
			req := s.request("two sizes")
			req.MinSize *= int64(1 + i%4/2)
			req.MaxSize = req.MinSize
			return b.CreateShare(s.ctx, req)
		})
		oneWins(s, shares, errs, func(x *backend.Share) string { return x.ID })
	})
	s.sub("many shares", func(s *suite) {
		before := len(s.state(s.b).Shares)
		shares, errs := race(s, func(b backend.Backend, i int) (*backend.Share, error) {
			return b.CreateShare(s.ctx, s.request(fmt.Sprintf("many %d", i)))
		})
		s.ok(errors.Join(errs...))
		if got := len(s.state(s.b).Shares) - before; got != s.callers() {
			s.Errorf("%d shares, want %d", got, s.callers())
		}
		for _, share := range shares { // they are many; others need the room
			s.ok(s.b.DeleteShare(s.ctx, share.ID))
		}
	})
	s.sub("one snapshot", func(s *suite) {
		s.needs(share.Can.Snapshot, "Snapshot")
		snapshots, errs := race(s, func(b backend.Backend, _ int) (*backend.Snapshot, error) {
			return b.CreateSnapshot(s.ctx, backend.CreateSnapshotRequest{Name: "one", ShareID: share.ID, Role: backend.RoleUser})
		})
		allSame(s, snapshots, errs)
	})
	s.sub("one export", func(s *suite) {
		exports, errs := race(s, func(b backend.Backend, _ int) (*backend.Export, error) {
			return b.Export(s.ctx, ofShare(share), "one")
		})
		allSame(s, exports, errs)
	})
	s.sub("one consumer of two shares", func(s *suite) {
		targets := []backend.Target{ofShare(share), ofShare(s.share("other"))}
		exports, errs := race(s, func(b backend.Backend, i int) (*backend.Export, error) {
			return b.Export(s.ctx, targets[i%4/2], "two-targets") // both processes ask for both
		})
		oneWins(s, exports, errs, func(x *backend.Export) string { return x.Target.ShareID })
	})
	s.sub("export or delete", func(s *suite) {
		s.needs(share.Can.MountSnapshot, "MountSnapshot")
		for round := range s.callers() / 2 {
			snapshot := s.snapshot(fmt.Sprintf("round %d", round), share)
			// Each round another caller comes first, also on a single CPU.
			exporting := func(i int) bool { return (i+round)%4 < 2 }
			_, errs := race(s, func(b backend.Backend, i int) (any, error) {
				if exporting(i) {
					return b.Export(s.ctx, ofSnapshot(snapshot), fmt.Sprintf("reader-%d-%d", round, i))
				}
				return nil, b.DeleteSnapshot(s.ctx, snapshot.ID)
			})
			var held, deleted int
			for i, err := range errs {
				switch {
				case err == nil && exporting(i):
					held++
				case err == nil:
					deleted++
				case exporting(i):
					s.is(err, backend.ErrNotFound)
				default:
					s.is(err, backend.ErrInUse)
				}
			}
			// Some may be refused on account of others that were refused, but
			// nobody may hold what is deleted, and not all may be refused.
			_, err := s.b.Snapshot(s.ctx, snapshot.ID)
			if exists := err == nil; exists != (held > 0) || exists != (deleted == 0) {
				s.Fatalf("%d hold the snapshot, %d deleted it, and looking for it gives %v", held, deleted, err)
			}
		}
	})
}

// allSame wants one object, and all to get it.
func allSame[T any](s *suite, values []T, errs []error) {
	s.Helper()
	s.ok(errors.Join(errs...))
	for _, value := range values {
		s.same("two callers' answers", value, values[0])
	}
}

// oneWins wants one object, and a conflict for all who asked for another.
func oneWins[T any](s *suite, values []T, errs []error, key func(T) string) {
	s.Helper()
	won := map[string]int{}
	for i, err := range errs {
		if err == nil {
			won[key(values[i])]++
		} else {
			s.is(err, backend.ErrConflict)
		}
	}
	if len(won) != 1 {
		s.Errorf("objects and those who got them: %v, want one", won)
	}
	for _, n := range won {
		if n != len(errs)/2 {
			s.Errorf("%d callers got the object, want %d", n, len(errs)/2)
		}
	}
}
