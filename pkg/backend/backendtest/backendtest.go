// Package backendtest is the conformance suite of package backend: every
// implementation runs it, the in-memory fake too, so that what the layers above
// are tested against behaves as what they meet.
package backendtest

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// Harness is a backend under test.
type Harness struct {
	// New makes a fresh, empty storage system that lives as long as t, and
	// returns what opens it. Each call of open is another process over the same
	// storage: a second controller, or the first one again after kill -9.
	New func(t *testing.T) (open func() backend.Backend)
	// ShareSize is a size in bytes of which the backend serves small multiples
	// exactly. The storage has room for 48 shares of it.
	ShareSize int64
	// Write and Read put and get a file at the top of an exported tree; one that
	// does not exist reads as empty. Where they are nil, contents are not checked.
	Write func(t *testing.T, export *backend.Export, file, content string)
	Read  func(t *testing.T, export *backend.Export, file string) string
	// Slow is a storage where each step takes so long that few callers at once meet
	// at every one of them.
	Slow bool
}

// callers is enough for every pair of steps of two calls to meet some time: a multiple
// of four.
func (h Harness) callers() int {
	if h.Slow {
		return 8
	}
	return 32
}

// tests is ordered from what others build on to what builds on others: read the
// first failure first.
var tests = []struct {
	name string
	run  func(*suite)
}{
	{"create", testCreate},
	{"size", testSize},
	{"conflict", testConflict},
	{"draft", testDraft},
	{"expand", testExpand},
	{"delete", testDelete},
	{"begun", testBegun},
	{"names", testNames},
	{"ids", testIDs},
	{"aliasing", testAliasing},
	{"abilities", testAbilities},
	{"snapshot", testSnapshot},
	{"clone", testClone},
	{"independence", testIndependence},
	{"contents", testContents},
	{"export", testExport},
	{"hold", testHold},
	{"grant", testGrant},
	{"page", testPage},
	{"again", testAgain},
	{"reopen", testReopen},
	{"cancel", testCancel},
	{"interrupt", testInterrupt},
	{"concurrency", testConcurrency},
	{"capacity", testCapacity},
	{"usage", testUsage},
}

// Run checks the contract of package backend, one subtest a topic, each on a
// storage of its own.
func Run(t *testing.T, h Harness) {
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			raw := h.New(t)
			open := func() backend.Backend { return checked{t, raw()} }
			test.run(&suite{T: t, Harness: h, ctx: t.Context(), raw: raw, open: open, b: open()})
		})
	}
}

// suite is one subtest: its storage, and the vocabulary that tests are
// written in.
type suite struct {
	*testing.T
	Harness
	ctx  context.Context // of the subtest; the calls below have no other
	raw  func() backend.Backend
	open func() backend.Backend // raw with every answer checked
	b    backend.Backend        // opened once, for the tests that need no second
}

// sub runs f as a subtest over the same storage.
func (s *suite) sub(name string, f func(*suite)) {
	s.Helper()
	s.T.Run(name, func(t *testing.T) {
		inner := *s
		inner.T, inner.ctx = t, t.Context()
		f(&inner)
	})
}

// request is the plainest valid request for a share.
func (s *suite) request(name string) backend.CreateShareRequest {
	return backend.CreateShareRequest{
		Name: name, MinSize: s.ShareSize, MaxSize: s.ShareSize, Role: backend.RoleUser,
	}
}

// share makes the plainest share.
func (s *suite) share(name string) *backend.Share {
	s.Helper()
	return s.create(s.request(name))
}

func (s *suite) create(req backend.CreateShareRequest) *backend.Share {
	s.Helper()
	share, err := s.b.CreateShare(s.ctx, req)
	s.ok(err)
	return share
}

// snapshot cuts a snapshot, or skips the test where the share cannot have one.
func (s *suite) snapshot(name string, of *backend.Share) *backend.Snapshot {
	s.Helper()
	s.needs(of.Can.Snapshot, "Snapshot")
	return s.cut(backend.CreateSnapshotRequest{Name: name, ShareID: of.ID, Role: backend.RoleUser})
}

func (s *suite) cut(req backend.CreateSnapshotRequest) *backend.Snapshot {
	s.Helper()
	snapshot, err := s.b.CreateSnapshot(s.ctx, req)
	s.ok(err)
	return snapshot
}

func (s *suite) export(target backend.Target, consumer string) *backend.Export {
	s.Helper()
	export, err := s.b.Export(s.ctx, target, consumer)
	s.ok(err)
	return export
}

func (s *suite) needs(can bool, ability string) {
	s.Helper()
	if !can {
		s.Skipf("the shares of this harness lack the ability %s", ability)
	}
}

func (s *suite) ok(err error) {
	s.Helper()
	if err != nil {
		s.Fatalf("unexpected error: %v", err)
	}
}

// is wants err to be of one of the kinds. It does not end the test: what
// follows a wrong refusal is worth seeing too.
func (s *suite) is(err error, kinds ...error) {
	s.Helper()
	for _, kind := range kinds {
		if errors.Is(err, kind) {
			return
		}
	}
	s.Errorf("got error %v, want one of %q", err, kinds)
}

// same compares two values; a nil map is as good as an empty one.
func (s *suite) same(what string, got, want any, opts ...cmp.Option) {
	s.Helper()
	if diff := cmp.Diff(want, got, append(opts, cmpopts.EquateEmpty())...); diff != "" {
		s.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// errOf drops the value: what is tested is the refusal.
func errOf[T any](_ T, err error) error { return err }

func ofShare(s *backend.Share) backend.Target       { return backend.Target{ShareID: s.ID} }
func ofSnapshot(s *backend.Snapshot) backend.Target { return backend.Target{SnapshotID: s.ID} }

// state is all that a backend tells.
type state struct {
	Shares    []*backend.Share
	Snapshots []*backend.Snapshot
	Exports   []*backend.Export
}

// state reads all of it, and checks that the ways to read one object agree.
func (s *suite) state(b backend.Backend) state {
	s.Helper()
	var all state
	var err error
	all.Shares, _, err = b.ListShares(s.ctx, "", 0)
	s.ok(err)
	all.Snapshots, _, err = b.ListSnapshots(s.ctx, "", 0)
	s.ok(err)
	holds, _, err := b.ListExports(s.ctx, "", 0)
	s.ok(err)
	for _, want := range all.Shares {
		got, err := b.Share(s.ctx, want.ID)
		s.ok(err)
		s.same("Share against ListShares", got, want)
		got, err = b.ShareNamed(s.ctx, want.Name)
		s.ok(err)
		s.same("ShareNamed against ListShares", got, want)
	}
	for _, want := range all.Snapshots {
		got, err := b.Snapshot(s.ctx, want.ID)
		s.ok(err)
		s.same("Snapshot against ListSnapshots", got, want)
	}
	for _, want := range holds {
		got, err := b.ExportOf(s.ctx, want.Consumer)
		s.ok(err)
		if err == nil {
			s.same("ExportOf against ListExports", got.Target, want.Target)
			all.Exports = append(all.Exports, got)
		}
	}
	return all
}
