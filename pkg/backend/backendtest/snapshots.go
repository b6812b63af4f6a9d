package backendtest

import (
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// testAbilities: what a share cannot do is refused as such.
func testAbilities(s *suite) {
	share := s.share("data")
	cut := backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}
	snapshot, err := s.b.CreateSnapshot(s.ctx, cut)
	if !share.Can.Snapshot {
		s.is(err, backend.ErrUnsupported)
		return
	}
	s.ok(err)
	clone := s.request("clone")
	clone.FromSnapshot = snapshot.ID
	for _, call := range []struct {
		can bool
		err error
	}{
		{share.Can.Clone, errOf(s.b.CreateShare(s.ctx, clone))},
		{share.Can.MountSnapshot, errOf(s.b.Export(s.ctx, ofSnapshot(snapshot), "reader"))},
	} {
		if call.can {
			s.ok(call.err)
		} else {
			s.is(call.err, backend.ErrUnsupported)
		}
	}
}

// testSnapshot: the name is the identity, of a snapshot of one share.
func testSnapshot(s *suite) {
	share, other := s.share("data"), s.share("other")
	first := s.snapshot("cut", share)
	s.same("cut", first, &backend.Snapshot{
		Name: "cut", ShareID: share.ID, Size: share.Size, Role: backend.RoleUser,
	}, cmpopts.IgnoreFields(backend.Snapshot{}, "ID", "CreatedAt"))

	// Its size is the one at the cut, whatever becomes of the share.
	share, err := s.b.ExpandShare(s.ctx, share.ID, 2*s.ShareSize)
	s.ok(err)
	s.same("again after the share grew", s.snapshot("cut", share), first)
	if later := s.snapshot("later", share); later.Size != share.Size || later.ID == first.ID {
		s.Errorf("got %+v, want another snapshot of size %d", later, share.Size)
	}

	s.is(errOf(s.b.CreateSnapshot(s.ctx, backend.CreateSnapshotRequest{
		Name: "cut", ShareID: other.ID, Role: backend.RoleUser,
	})), backend.ErrConflict)
	s.is(errOf(s.b.CreateSnapshot(s.ctx, backend.CreateSnapshotRequest{
		Name: "cut", ShareID: share.ID, Role: backend.RoleTemporary,
	})), backend.ErrConflict)
	temporary := s.cut(backend.CreateSnapshotRequest{Name: "temporary", ShareID: other.ID, Role: backend.RoleTemporary})
	if temporary.Role != backend.RoleTemporary {
		s.Errorf("got role %q, want %q", temporary.Role, backend.RoleTemporary)
	}

	// A call repeated late finds its snapshot without the share; a new one does not.
	s.ok(s.b.DeleteShare(s.ctx, share.ID))
	for _, b := range []backend.Backend{s.b, s.open()} {
		again, err := b.CreateSnapshot(s.ctx, backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser})
		s.ok(err)
		s.same("again without the share", again, first)
	}
	s.is(errOf(s.b.CreateSnapshot(s.ctx, backend.CreateSnapshotRequest{
		Name: "too late", ShareID: share.ID, Role: backend.RoleUser,
	})), backend.ErrNotFound)

	for range 2 {
		s.ok(s.b.DeleteSnapshot(s.ctx, first.ID))
		s.is(errOf(s.open().Snapshot(s.ctx, first.ID)), backend.ErrNotFound)
	}
	for _, left := range s.state(s.b).Snapshots {
		if left.ID == first.ID {
			s.Errorf("the deleted snapshot is listed")
		}
	}
	s.snapshot("cut", other) // the name is free again, for another share too
}

// testClone: a share with a source is a share, and needs the source once only.
func testClone(s *suite) {
	source := s.request("source")
	source.MinSize, source.MaxSize = 2*s.ShareSize, 2*s.ShareSize
	share := s.create(source)
	s.needs(share.Can.Clone, "Clone")
	snapshot, other := s.snapshot("cut", share), s.snapshot("other", share)

	for _, size := range []struct {
		name     string
		min, max int64
	}{
		{"exactly too small", s.ShareSize, s.ShareSize},
		{"at least too small", s.ShareSize, 0},
		{"no size at all", 0, 0},
	} {
		s.sub(size.name, func(s *suite) {
			req := s.request("small")
			req.MinSize, req.MaxSize, req.FromSnapshot = size.min, size.max, snapshot.ID
			s.is(errOf(s.b.CreateShare(s.ctx, req)), backend.ErrInvalid)
			s.is(errOf(s.b.ShareNamed(s.ctx, req.Name)), backend.ErrNotFound)
		})
	}

	req := s.request("clone")
	req.MinSize, req.MaxSize, req.FromSnapshot = 3*s.ShareSize, 3*s.ShareSize, snapshot.ID
	clone := s.create(req)
	s.same("cloned", clone, &backend.Share{
		Name: "clone", Size: 3 * s.ShareSize, Role: backend.RoleUser, FromSnapshot: snapshot.ID,
	}, cmpopts.IgnoreFields(backend.Share{}, "ID", "Node", "CreatedAt", "Can"))

	for _, from := range []string{other.ID, ""} {
		conflict := req
		conflict.FromSnapshot = from
		s.is(errOf(s.b.CreateShare(s.ctx, conflict)), backend.ErrConflict)
	}
	s.ok(s.b.DeleteSnapshot(s.ctx, snapshot.ID)) // a clone holds nothing
	s.same("cloned again without the snapshot", s.create(req), clone)
	gone := s.request("late")
	gone.MinSize, gone.MaxSize, gone.FromSnapshot = 2*s.ShareSize, 0, snapshot.ID
	s.is(errOf(s.b.CreateShare(s.ctx, gone)), backend.ErrNotFound)
}

// testIndependence: the end of a share is not the end of its snapshots.
func testIndependence(s *suite) {
	share := s.share("data")
	snapshot := s.snapshot("cut", share)
	s.ok(s.b.DeleteShare(s.ctx, share.ID))
	s.same("what is left", s.state(s.open()), state{Snapshots: []*backend.Snapshot{snapshot}})

	// Nor is a new share of the old name their share.
	again := s.share("data")
	if share.ID != again.ID {
		s.is(errOf(s.b.CreateSnapshot(s.ctx, backend.CreateSnapshotRequest{
			Name: "cut", ShareID: again.ID, Role: backend.RoleUser,
		})), backend.ErrConflict)
	}
	s.needs(share.Can.Clone && share.Can.MountSnapshot, "Clone, MountSnapshot")
	s.export(ofSnapshot(snapshot), "reader")
	clone := s.request("clone")
	clone.FromSnapshot = snapshot.ID
	s.create(clone)
	s.ok(s.b.Unexport(s.ctx, ofSnapshot(snapshot), "reader"))
	s.ok(s.b.DeleteSnapshot(s.ctx, snapshot.ID))
}

// testContents: a snapshot is a point in time, and nothing written elsewhere
// shows in it.
func testContents(s *suite) {
	if s.Write == nil || s.Read == nil {
		s.Skip("this harness cannot look into exports")
	}
	share := s.share("data")
	s.needs(share.Can.Clone && share.Can.MountSnapshot, "Clone, MountSnapshot")
	live := s.export(ofShare(share), "writer")
	s.Write(s.T, live, "file", "at the cut")
	snapshot := s.snapshot("cut", share)
	frozen := s.export(ofSnapshot(snapshot), "reader")
	s.Write(s.T, live, "file", "afterwards")
	s.ok(errOf(s.b.ExpandShare(s.ctx, share.ID, 2*s.ShareSize)))
	s.snapshot("cut", share) // again: it must not be cut again

	req := s.request("clone")
	req.FromSnapshot = snapshot.ID
	clone := s.create(req)
	copied := s.export(ofShare(clone), "copier")
	has := func(e *backend.Export, want string) {
		s.Helper()
		if got := s.Read(s.T, e, "file"); got != want {
			s.Errorf("%+v holds %q, want %q", e.Target, got, want)
		}
	}
	has(live, "afterwards")
	has(frozen, "at the cut")
	has(copied, "at the cut")

	s.Write(s.T, copied, "file", "in the clone")
	has(live, "afterwards")
	has(frozen, "at the cut")
	s.create(req) // again: it must not be filled again

	s.ok(s.b.DeleteShare(s.ctx, share.ID))
	has(frozen, "at the cut")
	s.ok(s.b.Unexport(s.ctx, ofSnapshot(snapshot), "reader"))
	s.ok(s.b.DeleteSnapshot(s.ctx, snapshot.ID))
	has(copied, "in the clone")

	// A new share of an old name is empty: the old files are another tenant's.
	s.ok(s.b.DeleteShare(s.ctx, clone.ID))
	for _, name := range []string{"data", "clone"} {
		has(s.export(ofShare(s.share(name)), "new-"+name), "")
	}
}
