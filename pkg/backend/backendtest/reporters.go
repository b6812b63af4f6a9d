package backendtest

import (
	"errors"
	"math"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// testCapacity: the numbers are estimates, but a share that they promise fits.
func testCapacity(s *suite) {
	reporter, ok := s.raw().(backend.CapacityReporter)
	if !ok {
		s.Skip("this backend does not report its capacity")
	}
	before, err := reporter.Capacity(s.ctx)
	if errors.Is(err, backend.ErrUnsupported) {
		s.Skipf("this backend does not report its capacity: %v", err)
	}
	s.ok(err)
	if before.Available < s.ShareSize || before.MinShareSize > s.ShareSize || before.MaxShareSize < s.ShareSize {
		s.Errorf("capacity %+v does not admit a share of %d bytes", before, s.ShareSize)
	}
	share := s.share("data")
	if export := s.export(ofShare(share), "consumer"); export.Node != before.Node || share.Node != before.Node {
		s.Errorf("the backend serves node %q, its share %q, and its export %q", before.Node, share.Node, export.Node)
	}
	if bound, ok := s.raw().(backend.Bound); before.Node != "" && !ok || ok && bound.OnlyNode() != before.Node {
		s.Errorf("the backend serves node %q, and does not say so", before.Node)
	}
	after, err := reporter.Capacity(s.ctx)
	s.ok(err)
	if after.Available > before.Available || after.Available < 0 {
		s.Errorf("a share was made, and the room went from %d to %d", before.Available, after.Available)
	}
	if before.MaxShareSize < math.MaxInt64 {
		req := s.request("too large")
		req.MinSize, req.MaxSize = before.MaxShareSize+1, 0
		s.is(errOf(s.b.CreateShare(s.ctx, req)), backend.ErrExhausted, backend.ErrInvalid)
		s.is(errOf(s.b.ShareNamed(s.ctx, req.Name)), backend.ErrNotFound)
	}
}

// testUsage: usage is of what exists, and is no more than the size.
func testUsage(s *suite) {
	reporter, ok := s.raw().(backend.UsageReporter)
	if !ok {
		s.Skip("this backend does not report usage")
	}
	share := s.share("data")
	targets := []backend.Target{ofShare(share)}
	if share.Can.Snapshot {
		targets = append(targets, ofSnapshot(s.snapshot("cut", share)))
	}
	for _, target := range targets {
		usage, err := reporter.Usage(s.ctx, target)
		if errors.Is(err, backend.ErrUnsupported) {
			s.Skipf("this backend does not report usage: %v", err)
		}
		s.ok(err)
		if usage.UsedBytes > share.Size {
			s.Errorf("%+v: %+v is more than the size of %d bytes", target, usage, share.Size)
		}
	}
	for _, target := range []backend.Target{{ShareID: "unknown"}, {SnapshotID: "unknown"}, {ShareID: "../x"}} {
		_, err := reporter.Usage(s.ctx, target)
		s.is(err, backend.ErrNotFound)
	}
}
