package backendtest

import (
	"net/netip"
	"strings"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// testExport: a consumer holds one target, and every call finds that.
func testExport(s *suite) {
	share, other := s.share("data"), s.share("other")
	first := s.export(ofShare(share), "one")
	if first.Target != ofShare(share) || first.Consumer != "one" {
		s.Errorf("got %+v, want an export of %s to one", first, share.ID)
	}
	for _, b := range []backend.Backend{s.b, s.open()} {
		again, err := b.Export(s.ctx, ofShare(share), "one")
		s.ok(err)
		s.same("exported again", again, first)
	}
	longest := s.export(ofShare(share), strings.Repeat("a-0", 21)+"z")
	s.same("all exports", s.state(s.open()).Exports, []*backend.Export{longest, first})

	for _, consumer := range []string{"", "A", "a/b", "..", "a b", "a\n", "a\x00", "é", "a_b", strings.Repeat("a", 65)} {
		s.is(errOf(s.b.Export(s.ctx, ofShare(share), consumer)), backend.ErrInvalid)
		s.is(errOf(s.b.ExportOf(s.ctx, consumer)), backend.ErrNotFound)
	}
	for _, target := range []backend.Target{{}, {ShareID: share.ID, SnapshotID: share.ID}} {
		s.is(errOf(s.b.Export(s.ctx, target, "two")), backend.ErrInvalid)
	}

	// Only the holder's own Unexport of this very target ends it.
	s.is(errOf(s.b.Export(s.ctx, ofShare(other), "one")), backend.ErrConflict)
	s.ok(s.b.Unexport(s.ctx, ofShare(other), "one"))
	s.ok(s.b.Unexport(s.ctx, ofShare(share), "two"))
	s.ok(s.b.Unexport(s.ctx, backend.Target{SnapshotID: share.ID}, "one"))
	s.same("all exports", s.state(s.b).Exports, []*backend.Export{longest, first})
	for range 2 {
		s.ok(s.b.Unexport(s.ctx, ofShare(share), "one"))
		s.same("what is left", s.state(s.open()).Exports, []*backend.Export{longest})
		s.is(errOf(s.b.ExportOf(s.ctx, "one")), backend.ErrNotFound)
	}
	moved := s.export(ofShare(other), "one")

	// What another process has ended, a moment ago, is held no more.
	s.export(ofShare(other), "short")
	for _, target := range []backend.Target{ofShare(other), ofShare(share)} {
		s.ok(s.open().Unexport(s.ctx, ofShare(other), "short"))
		short := s.export(target, "short")
		s.same("all exports", s.state(s.open()).Exports, []*backend.Export{longest, moved, short})
	}

	// DeleteShare ends the exports of this share, and no other's.
	s.ok(s.b.DeleteShare(s.ctx, share.ID))
	s.same("what is left", s.state(s.open()).Exports, []*backend.Export{moved})
	s.is(errOf(s.b.ExportOf(s.ctx, longest.Consumer)), backend.ErrNotFound)
	s.ok(s.b.Unexport(s.ctx, ofShare(share), longest.Consumer))
	s.export(ofShare(other), longest.Consumer)
	s.is(errOf(s.b.Export(s.ctx, ofShare(share), "two")), backend.ErrNotFound)
}

// testHold: a snapshot stays as long as anybody holds it.
func testHold(s *suite) {
	share := s.share("data")
	s.needs(share.Can.MountSnapshot, "MountSnapshot")
	snapshot, other := s.snapshot("cut", share), s.snapshot("other", share)
	one := s.export(ofSnapshot(snapshot), "one")
	two := s.export(ofSnapshot(snapshot), "two")
	held := func() {
		s.Helper()
		s.is(s.b.DeleteSnapshot(s.ctx, snapshot.ID), backend.ErrInUse)
		s.is(s.open().DeleteSnapshot(s.ctx, snapshot.ID), backend.ErrInUse)
		s.ok(errOf(s.open().Snapshot(s.ctx, snapshot.ID)))
	}
	held()
	s.same("all exports", s.state(s.open()).Exports, []*backend.Export{one, two})
	s.same("exported again", s.export(ofSnapshot(snapshot), "one"), one)
	s.is(errOf(s.b.Export(s.ctx, ofSnapshot(other), "one")), backend.ErrConflict)
	s.is(errOf(s.b.Export(s.ctx, ofShare(share), "one")), backend.ErrConflict)

	s.ok(s.b.DeleteShare(s.ctx, share.ID)) // neither held by the snapshot nor letting go of it
	held()
	s.ok(s.b.Unexport(s.ctx, ofSnapshot(snapshot), "three"))
	s.ok(s.b.Unexport(s.ctx, ofSnapshot(other), "one"))
	held()
	for range 2 { // ending one hold twice does not end the other
		s.ok(s.b.Unexport(s.ctx, ofSnapshot(snapshot), "one"))
		held()
	}
	s.export(ofSnapshot(other), "one")
	s.ok(s.b.Unexport(s.ctx, ofSnapshot(snapshot), "two"))
	s.ok(s.open().DeleteSnapshot(s.ctx, snapshot.ID))
	s.ok(s.b.Unexport(s.ctx, ofSnapshot(snapshot), "two"))
	s.is(errOf(s.b.Export(s.ctx, ofSnapshot(snapshot), "two")), backend.ErrNotFound)
	s.is(s.b.DeleteSnapshot(s.ctx, other.ID), backend.ErrInUse)
}

// testGrant: a backend that is told of nodes lets them in to what is held, and to
// nothing else, for as long as it is.
func testGrant(s *suite) {
	g, ok := s.raw().(backend.Granter)
	if !ok {
		return // it lets in whoever can reach it
	}
	other := s.raw().(backend.Granter) // another process
	share := s.share("data")
	one := backend.Node{Name: "one", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}}
	two := backend.Node{Name: "two", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")}}
	s.is(errOf(g.Grant(s.ctx, "consumer", one, false)), backend.ErrNotFound)
	s.ok(g.Revoke(s.ctx, "consumer", "one"))

	held := s.export(ofShare(share), "consumer")
	reads, err := g.Grant(s.ctx, "consumer", one, true)
	s.ok(err)
	if reads.Target != held.Target || reads.Consumer != "consumer" {
		s.Errorf("granted %+v of %+v", reads, held)
	}
	again, err := other.Grant(s.ctx, "consumer", one, true)
	s.ok(err)
	s.same("granted again", again, reads)
	writes, err := other.Grant(s.ctx, "consumer", two, false)
	s.ok(err)
	raised, err := g.Grant(s.ctx, "consumer", one, false)
	s.ok(err)
	s.same("raised", raised, writes)
	s.ok(g.Revoke(s.ctx, "consumer", "nobody"))
	for range 2 {
		s.ok(other.Revoke(s.ctx, "consumer", "one"))
	}
	s.same("what is held", s.state(s.open()).Exports, []*backend.Export{held})

	s.ok(s.b.Unexport(s.ctx, ofShare(share), "consumer")) // and with it what two has
	s.is(errOf(g.Grant(s.ctx, "consumer", two, false)), backend.ErrNotFound)
	s.ok(g.Revoke(s.ctx, "consumer", ""))

	// It is of what the consumer holds now, whoever has changed that a moment ago.
	if share.Can.MountSnapshot {
		s.export(ofShare(share), "consumer")
		s.ok(errOf(g.Grant(s.ctx, "consumer", one, true)))
		s.ok(s.open().Unexport(s.ctx, ofShare(share), "consumer"))
		snapshot := ofSnapshot(s.snapshot("shown", share))
		s.ok(errOf(s.open().Export(s.ctx, snapshot, "consumer")))
		shown, err := g.Grant(s.ctx, "consumer", one, true)
		s.ok(err)
		s.same("the target", shown.Target, snapshot)
		s.ok(s.b.Unexport(s.ctx, snapshot, "consumer"))
	}

	// DeleteShare ends it too, also of a share whose snapshots live on.
	s.export(ofShare(share), "consumer")
	s.ok(errOf(g.Grant(s.ctx, "consumer", one, false)))
	if share.Can.Snapshot {
		s.snapshot("cut", share)
	}
	for range 2 {
		s.ok(s.b.DeleteShare(s.ctx, share.ID))
		s.is(errOf(g.Grant(s.ctx, "consumer", one, false)), backend.ErrNotFound)
		s.ok(other.Revoke(s.ctx, "consumer", "one"))
	}
	s.same("what is held", s.state(s.open()).Exports, []*backend.Export(nil))
}
