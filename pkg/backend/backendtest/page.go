package backendtest

import (
	"fmt"
	"slices"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// testPage drives the three listings through one test: a listing is a way to
// add an object, one to remove it, and one to see what there is.
func testPage(s *suite) {
	s.sub("shares", func(s *suite) {
		s.page(
			func(name string) string { return s.share(name).ID },
			func(id string) { s.ok(s.b.DeleteShare(s.ctx, id)) },
			func(after string, limit int) ([]string, bool, error) {
				list, more, err := s.b.ListShares(s.ctx, after, limit)
				return keys(list, func(x *backend.Share) string { return x.ID }), more, err
			})
	})
	s.sub("snapshots", func(s *suite) {
		base := s.share("base of snapshots") // not earlier: any share may have been removed
		s.page(
			func(name string) string { return s.snapshot(name, base).ID },
			func(id string) { s.ok(s.b.DeleteSnapshot(s.ctx, id)) },
			func(after string, limit int) ([]string, bool, error) {
				list, more, err := s.b.ListSnapshots(s.ctx, after, limit)
				return keys(list, func(x *backend.Snapshot) string { return x.ID }), more, err
			})
	})
	s.sub("exports", func(s *suite) {
		base := s.share("base of exports")
		s.page(
			func(name string) string { return s.export(ofShare(base), name).Consumer },
			func(id string) { s.ok(s.b.Unexport(s.ctx, ofShare(base), id)) },
			func(after string, limit int) ([]string, bool, error) {
				list, more, err := s.b.ListExports(s.ctx, after, limit)
				ids := keys(list, func(x *backend.Export) string { return x.Consumer })
				if !slices.IsSorted(ids) {
					s.Errorf("exports %q are not ordered by consumer", ids)
				}
				return ids, more, err
			})
	})
}

// keys are what a listing is ordered by and resumes from.
func keys[T any](list []T, key func(T) string) []string {
	var ids []string
	for _, item := range list {
		ids = append(ids, key(item))
	}
	return ids
}

// page tests one listing. Its storage may hold some objects already.
func (s *suite) page(add func(name string) string, remove func(id string), list func(after string, limit int) ([]string, bool, error)) {
	page := func(after string, limit int) ([]string, bool) {
		s.Helper()
		ids, more, err := list(after, limit)
		s.ok(err)
		if limit > 0 && len(ids) > limit {
			s.Errorf("%d objects on a page of %d", len(ids), limit)
		}
		return ids, more
	}
	// Ids may be random or follow the names, so names go both ways in between.
	for i := range 6 {
		add(fmt.Sprintf("m%d", (i*5)%7))
	}
	all, more := page("", 0)
	if more || len(all) < 6 {
		s.Fatalf("without a limit: %d objects, more=%t", len(all), more)
	}
	// Every place to resume at, with every limit that makes a difference.
	for at := range all {
		for limit := range len(all) + 2 {
			after := ""
			if at > 0 {
				after = all[at-1]
			}
			want := all[at:]
			if limit > 0 && len(want) > limit {
				want = want[:limit]
			}
			got, more := page(after, limit)
			s.same(fmt.Sprintf("%d behind %q", limit, after), got, want)
			if more != (at+len(want) < len(all)) {
				s.Errorf("%d behind %q: more=%t", limit, after, more)
			}
		}
	}
	if got, more := page(all[len(all)-1], 2); len(got) > 0 || more {
		s.Errorf("behind the last: %q, more=%t", got, more)
	}

	// Walk while objects go, the one just passed above all, and others come.
	var seen []string
	gone := map[string]bool{}
	for step, after := 0, ""; ; step++ {
		ids, more := page(after, 2)
		seen = append(seen, ids...)
		if !more {
			break
		}
		if len(ids) == 0 || step > 20 {
			s.Fatalf("step %d: %q and more", step, ids)
		}
		after = ids[len(ids)-1]
		if step < 2 {
			remove(after)
			gone[after] = true
			add(fmt.Sprintf("a%d", step))
			add(fmt.Sprintf("z%d", step))
		}
	}
	// Those that came may be seen or not; nothing may be seen twice.
	if unique := slices.Compact(slices.Sorted(slices.Values(seen))); len(unique) != len(seen) {
		s.Errorf("objects repeat: %q", seen)
	}
	for _, id := range all {
		if !slices.Contains(seen, id) {
			s.Errorf("%q is hidden: %q", id, seen)
		}
	}
	left, _ := page("", 0)
	for _, id := range left {
		if gone[id] {
			s.Errorf("%q is listed, but it is gone", id)
		}
	}
}
