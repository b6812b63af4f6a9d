package backendtest

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// testCreate: the name is the identity.
func testCreate(s *suite) {
	req := s.request("data")
	req.Description = map[string]string{"claim": "default/data", "odd key\n=": "\x00\"é\\", "empty": ""}
	first := s.create(req)
	s.same("created", first, &backend.Share{
		Name: "data", Size: s.ShareSize, Role: backend.RoleUser, Description: req.Description,
	}, cmpopts.IgnoreFields(backend.Share{}, "ID", "Node", "CreatedAt", "Can"))

	wide, floor, ceiling, draft := req, req, req, req
	wide.MinSize, wide.MaxSize = 1, 4*s.ShareSize
	floor.MaxSize = 0
	ceiling.MinSize = 0
	draft.Draft = true
	for _, again := range []backend.CreateShareRequest{req, wide, floor, ceiling, draft} {
		for _, b := range []backend.Backend{s.b, s.open()} {
			share, err := b.CreateShare(s.ctx, again)
			s.ok(err)
			s.same(fmt.Sprintf("created again as %+v", again), share, first)
		}
	}
	s.same("all there is", s.state(s.b), state{Shares: []*backend.Share{first}})

	_, err := s.b.ShareNamed(s.ctx, "data2")
	s.is(err, backend.ErrNotFound)
	temporary := s.request("temporary")
	temporary.Role = backend.RoleTemporary
	if share := s.create(temporary); share.Role != backend.RoleTemporary || share.ID == first.ID {
		s.Errorf("got %+v, want another share of role %s", share, backend.RoleTemporary)
	}
}

// testSize: the size is the backend's choice within the bounds, never outside.
func testSize(s *suite) {
	size := s.ShareSize
	for _, test := range []struct {
		name     string
		min, max int64
		refused  bool
	}{
		{"exact", size, size, false},
		{"exact multiple", 3 * size, 3 * size, false},
		{"range", size, 3 * size, false},
		{"floor", size, 0, false},
		{"odd floor", size + 1, 0, false},
		{"odd range", size + 1, 3 * size, false},
		{"ceiling", 0, size, false},
		{"any", 0, 0, false},
		{"maximum below minimum", 2 * size, size, true},
		{"negative minimum", -1, 0, true},
		{"negative maximum", 0, -1, true},
	} {
		s.sub(test.name, func(s *suite) {
			req := s.request(test.name)
			req.MinSize, req.MaxSize = test.min, test.max
			share, err := s.b.CreateShare(s.ctx, req)
			if test.refused {
				s.is(err, backend.ErrInvalid)
				s.is(errOf(s.b.ShareNamed(s.ctx, test.name)), backend.ErrNotFound)
				return
			}
			s.ok(err)
			if share.Size < test.min || (test.max > 0 && share.Size > test.max) {
				s.Errorf("size %d, want at least %d and at most %d", share.Size, test.min, test.max)
			}
			// The size that was rounded up must satisfy the same request again.
			s.same("again", s.create(req), share)
		})
	}
}

// testConflict: what differs in anything but size, within the bounds, and
// Draft is another share, and the name cannot have both.
func testConflict(s *suite) {
	req := s.request("data")
	req.MinSize, req.MaxSize = 2*s.ShareSize, 2*s.ShareSize
	req.Description = map[string]string{"a": "1", "b": ""}
	first := s.create(req)
	source := "none"
	if first.Can.Snapshot {
		source = s.snapshot("source", first).ID
	}
	before := s.state(s.b)
	for _, test := range []struct {
		name   string
		change func(*backend.CreateShareRequest)
	}{
		{"larger", func(r *backend.CreateShareRequest) { r.MinSize, r.MaxSize = 3*s.ShareSize, 0 }},
		{"smaller", func(r *backend.CreateShareRequest) { r.MinSize, r.MaxSize = s.ShareSize, s.ShareSize }},
		{"role", func(r *backend.CreateShareRequest) { r.Role = backend.RoleTemporary }},
		{"source", func(r *backend.CreateShareRequest) { r.FromSnapshot = source }},
		{"description changed", func(r *backend.CreateShareRequest) { r.Description["a"] = "2" }},
		{"description longer", func(r *backend.CreateShareRequest) { r.Description["c"] = "" }},
		{"description shorter", func(r *backend.CreateShareRequest) { delete(r.Description, "b") }},
		{"description other key", func(r *backend.CreateShareRequest) { delete(r.Description, "b"); r.Description["c"] = "" }},
		{"no description", func(r *backend.CreateShareRequest) { r.Description = nil }},
	} {
		s.sub(test.name, func(s *suite) {
			if test.name == "source" {
				s.needs(first.Can.Snapshot, "Snapshot")
			}
			other := req
			other.Description = maps.Clone(req.Description)
			test.change(&other)
			s.is(errOf(s.b.CreateShare(s.ctx, other)), backend.ErrConflict)
			s.same("state after the refusal", s.state(s.b), before)
		})
	}
}

// testDraft: a draft is committed by CommitShare and by nothing else. A call
// repeated after the commit, late or by another controller, must not undo it.
func testDraft(s *suite) {
	req := s.request("data")
	req.Draft = true
	draft := s.create(req)
	if !draft.Draft {
		s.Fatalf("got %+v, want a draft", draft)
	}
	plain := req
	plain.Draft = false
	s.same("the draft created again as none", s.create(plain), draft)
	s.same("the draft after re-open", s.state(s.open()).Shares, []*backend.Share{draft})
	s.export(ofShare(draft), "filler") // it is exported to be filled

	want := *draft
	want.Draft = false
	for range 2 {
		s.ok(s.b.CommitShare(s.ctx, draft.ID))
		s.same("the committed share", s.state(s.open()).Shares, []*backend.Share{&want})
		s.same("the committed share created again as a draft", s.create(req), &want)
	}

	ordinary := s.share("ordinary")
	s.ok(s.b.CommitShare(s.ctx, ordinary.ID))
	s.ok(s.b.DeleteShare(s.ctx, ordinary.ID))
	s.is(s.b.CommitShare(s.ctx, ordinary.ID), backend.ErrNotFound)
}

// testExpand: shares grow, and never shrink.
func testExpand(s *suite) {
	req := s.request("data")
	share := s.create(req)
	size := s.ShareSize
	for _, step := range []struct{ ask, want int64 }{
		{0, size}, {size - 1, size}, {size, size},
		{2 * size, 2 * size}, {2 * size, 2 * size}, {size, 2 * size},
		{3 * size, 3 * size},
	} {
		got, err := s.b.ExpandShare(s.ctx, share.ID, step.ask)
		s.ok(err)
		want := *share
		want.Size = step.want
		s.same(fmt.Sprintf("expanded to %d", step.ask), got, &want)
		s.same("after re-open", s.state(s.open()).Shares, []*backend.Share{&want})
	}
	odd, err := s.b.ExpandShare(s.ctx, share.ID, 3*size+1)
	s.ok(err)
	if odd.Size <= 3*size {
		s.Errorf("expanded to %d, got %d", 3*size+1, odd.Size)
	}

	// The size that the name stands for is the present one.
	s.is(errOf(s.b.CreateShare(s.ctx, req)), backend.ErrConflict)
	req.MaxSize = 0
	s.same("the expanded share created again", s.create(req), odd)
}

// testDelete: what is deleted is gone in every way of looking, and its name too.
func testDelete(s *suite) {
	stays := s.share("stays")
	first := s.share("data")
	for range 2 {
		s.ok(s.b.DeleteShare(s.ctx, first.ID))
		s.ok(s.open().DeleteShare(s.ctx, first.ID))
		s.is(errOf(s.b.Share(s.ctx, first.ID)), backend.ErrNotFound)
		s.is(errOf(s.b.ShareNamed(s.ctx, "data")), backend.ErrNotFound)
		s.is(errOf(s.b.ExpandShare(s.ctx, first.ID, 1)), backend.ErrNotFound)
		s.same("what is left", s.state(s.b), state{Shares: []*backend.Share{stays}})
	}

	// The name is free again, also for what would have been in conflict.
	req := s.request("data")
	req.MinSize, req.MaxSize, req.Role = 2*s.ShareSize, 2*s.ShareSize, backend.RoleTemporary
	if again := s.create(req); again.Size != 2*s.ShareSize || again.Role != backend.RoleTemporary {
		s.Errorf("the name used again: got %+v", again)
	}
}

// testBegun: a share whose creation was broken off is known under its name, as what
// the repeated call makes of it.
func testBegun(s *suite) {
	req := s.request("data")
	req.Draft, req.Description = true, map[string]string{"a": "1"}
	for patience := 50 * time.Microsecond; ; patience *= 2 {
		ctx, cancel := context.WithTimeout(s.ctx, patience)
		_, err := s.open().CreateShare(ctx, req)
		cancel()
		begun, nerr := s.open().ShareNamed(s.ctx, req.Name)
		if nerr != nil {
			s.is(nerr, backend.ErrNotFound, backend.ErrPending)
		}
		if begun != nil {
			if begun.Size < req.MinSize {
				s.Errorf("begun with %d bytes, asked for %d", begun.Size, req.MinSize)
			}
			s.same("begun", begun, &backend.Share{Name: "data", Draft: true, Role: backend.RoleUser, Description: req.Description},
				cmpopts.IgnoreFields(backend.Share{}, "ID", "Size", "Node", "CreatedAt", "Can"))
		}
		if err == nil {
			break
		}
	}
}

// testNames: a name is any text, and never a part of a path.
func testNames(s *suite) {
	long := strings.Repeat("n", 299) // beyond NAME_MAX, so names cannot be file names
	names := []string{
		"a", "A", "a ", " a", "a\n", "a\x00", "a\x00b", "a/b", "a/../a", "/a", "a/", "../a", "..", ".", "/",
		"a:b", "a%00", `a\n`, `"a"`, "$(a)", "-a", "a;b", "*", "é", "e\u0301", "名前", "\u202ea",
		strings.Repeat("n", 128), long + "x", long + "y",
	}
	snapshots := true
	ids := map[string]string{}
	for _, name := range names {
		share := s.create(backend.CreateShareRequest{Name: name, MinSize: s.ShareSize, Role: backend.RoleUser})
		if other, taken := ids[share.ID]; taken || share.Name != name {
			s.Errorf("share %q is one with %q, and is named %q", name, other, share.Name)
		}
		ids[share.ID] = name
		snapshots = snapshots && share.Can.Snapshot
	}
	b := s.open()
	for id, name := range ids {
		share, err := b.ShareNamed(s.ctx, name)
		s.ok(err)
		if share.ID != id || share.Name != name {
			s.Errorf("under the name %q there is %s, %q; want %s", name, share.ID, share.Name, id)
		}
	}
	s.is(errOf(s.b.CreateShare(s.ctx, s.request(""))), backend.ErrInvalid)
	s.is(errOf(s.b.ShareNamed(s.ctx, "")), backend.ErrNotFound)

	// Snapshots have names of their own: one of a share's is no conflict.
	s.needs(snapshots, "Snapshot")
	share := s.share("a")
	clear(ids)
	for _, name := range names {
		snapshot := s.snapshot(name, share)
		if other, taken := ids[snapshot.ID]; taken || snapshot.Name != name {
			s.Errorf("snapshot %q is one with %q, and is named %q", name, other, snapshot.Name)
		}
		ids[snapshot.ID] = name
		s.same("the snapshot again", s.snapshot(name, share), snapshot)
	}
	s.is(errOf(s.b.CreateSnapshot(s.ctx, backend.CreateSnapshotRequest{ShareID: share.ID, Role: backend.RoleUser})), backend.ErrInvalid)
}

// testIDs: an id that is none, and above all one that could be a path or an
// option, is not found, and touches nothing.
func testIDs(s *suite) {
	share := s.share("data")
	s.export(ofShare(share), "consumer")
	before := s.state(s.b)
	create := s.request("new")
	// Besides plain strangers: other spellings of an id that exists.
	for _, id := range []string{
		"", "unknown", ".", "..", "../x", "../" + share.ID, "./" + share.ID, share.ID + "/", share.ID + "/.",
		share.ID + "\x00", share.ID + "\n", " " + share.ID, share.ID + "x", share.ID[:len(share.ID)-1],
		"/", "/etc/passwd", "-rf", "--help", "*", "%2e%2e", strings.Repeat("a", 49), strings.Repeat("a", 5000),
	} {
		s.sub(fmt.Sprintf("%.40q", id), func(s *suite) {
			s.is(errOf(s.b.Share(s.ctx, id)), backend.ErrNotFound)
			s.is(s.b.CommitShare(s.ctx, id), backend.ErrNotFound)
			s.is(errOf(s.b.ExpandShare(s.ctx, id, 2*s.ShareSize)), backend.ErrNotFound)
			s.is(errOf(s.b.Snapshot(s.ctx, id)), backend.ErrNotFound)
			s.ok(s.b.DeleteShare(s.ctx, id))
			s.ok(s.b.DeleteSnapshot(s.ctx, id))
			if share.Can.Snapshot {
				s.is(errOf(s.b.CreateSnapshot(s.ctx, backend.CreateSnapshotRequest{Name: "new", ShareID: id, Role: backend.RoleUser})), backend.ErrNotFound)
			}
			if id != "" { // an empty id is no target at all, which is ErrInvalid
				s.is(errOf(s.b.Export(s.ctx, backend.Target{ShareID: id}, "new")), backend.ErrNotFound)
				s.ok(s.b.Unexport(s.ctx, backend.Target{ShareID: id}, "consumer"))
				s.ok(s.b.Unexport(s.ctx, backend.Target{SnapshotID: id}, "consumer"))
			}
			if id != "" && share.Can.Clone {
				create.FromSnapshot = id
				s.is(errOf(s.b.CreateShare(s.ctx, create)), backend.ErrNotFound)
			}
			if id != "" && share.Can.MountSnapshot {
				s.is(errOf(s.b.Export(s.ctx, backend.Target{SnapshotID: id}, "new")), backend.ErrNotFound)
			}
			s.same("state", s.state(s.b), before)
		})
	}
}

// testAliasing: what was handed in or out is the caller's to change.
func testAliasing(s *suite) {
	req := s.request("data")
	req.Description = map[string]string{"a": "1"}
	share := s.create(req)
	before := s.state(s.b)
	req.Description["a"] = "2"
	share.Description["a"], share.Size, share.Draft = "3", 1, true
	s.state(s.b).Shares[0].Description["a"] = "4"
	s.same("state", s.state(s.b), before)
}
