package manila

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// snapshotted makes a share and a snapshot of it.
func (c *cloud) snapshotted(b *Backend, name string) (*backend.Share, *backend.Snapshot) {
	c.t.Helper()
	share := ok[*backend.Share](c.t)(b.CreateShare(c.t.Context(), request(name)))
	return share, ok[*backend.Snapshot](c.t)(b.CreateSnapshot(c.t.Context(), backend.CreateSnapshotRequest{Name: "of " + name, ShareID: share.ID, Role: backend.RoleUser}))
}

// snapshots changes those of the cloud behind the driver's back.
func (c *cloud) snapshots(change func(map[string]*fakemanila.Snapshot)) {
	c.Alter(func(objects fakemanila.Objects) {
		change(objects.Snapshots)
	})
}

// TestSweep: a share that was deleted goes with its last snapshot, also where that
// is somebody else's, or somebody else deletes it.
func TestSweep(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share, snap := c.snapshotted(b, "data")
	c.snapshots(func(all map[string]*fakemanila.Snapshot) {
		all["theirs"] = &fakemanila.Snapshot{ID: "theirs", ShareID: share.ID, Status: "available", Size: 1}
	})
	if err := b.DeleteShare(t.Context(), share.ID); err != nil {
		t.Error(err)
	}
	waits := func(want ...string) {
		t.Helper()
		waiting, err := c.open().Sweep(t.Context())
		if err != nil || len(waiting) != 1 {
			t.Fatalf("it waits for %v, %v", waiting, err)
		}
		for _, word := range append(want, share.ID) {
			if !strings.Contains(waiting[0], word) {
				t.Errorf("it waits for %s, not %s", waiting[0], word)
			}
		}
	}
	waits("own ["+snap.ID+"]", "[theirs]")
	if err := b.DeleteSnapshot(t.Context(), snap.ID); err != nil {
		t.Error(err)
	}
	waits("own []", "[theirs]")
	c.snapshots(func(all map[string]*fakemanila.Snapshot) { delete(all, "theirs") })
	if waiting, err := c.open().Sweep(t.Context()); err != nil || len(waiting) > 0 {
		t.Errorf("it waits for %v, %v", waiting, err)
	}
	if left := c.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left behind: %s", left)
	}
}

// TestStuckShare: a share that was deleted and cannot go keeps the snapshots of
// others from nothing.
func TestStuckShare(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	stuck, lost := c.snapshotted(b, "stuck")
	if err := b.DeleteShare(t.Context(), stuck.ID); err != nil {
		t.Error(err)
	}
	c.Lock(stuck.ID, "audit until May")
	c.snapshots(func(all map[string]*fakemanila.Snapshot) { delete(all, lost.ID) })
	_, snap := c.snapshotted(b, "data")
	for range 2 { // there, and gone
		if err := b.DeleteSnapshot(t.Context(), snap.ID); err != nil {
			t.Errorf("a snapshot of another share: %v", err)
		}
	}
	if _, err := b.Sweep(t.Context()); !errors.Is(err, backend.ErrInUse) || !strings.Contains(err.Error(), "(audit until May)") {
		t.Errorf("a share that is locked: %v", err)
	}
	c.Lock(stuck.ID, "")
	if _, err := b.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if left := c.Counts(); left != "1 shares, 0 snapshots, 0 rules" {
		t.Errorf("left behind: %s", left)
	}
}

// TestSnapshotStays: a snapshot that Manila does not delete has the marks of none
// who tried, nor of those who were killed long ago; and the error says what to do.
func TestSnapshotStays(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share, snap := c.snapshotted(b, "data")
	status := func(s string) {
		c.snapshots(func(all map[string]*fakemanila.Snapshot) { all[snap.ID].Status = s })
	}
	dead := prefixDeleting + snap.ID + ".dead"
	c.Alter(func(objects fakemanila.Objects) {
		objects.Shares[share.ID].Metadata[dead] = time.Now().Add(-2 * markAge).UTC().Format(time.RFC3339)
	})
	for s, word := range map[string]string{"error_deleting": "--status error " + snap.ID, "manage_error": "manage_error"} {
		status(s)
		for range 3 {
			if err := b.DeleteSnapshot(t.Context(), snap.ID); !errors.Is(err, backend.ErrUnavailable) || !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v", s, err)
			}
		}
	}
	c.Alter(func(objects fakemanila.Objects) {
		for key := range objects.Shares[share.ID].Metadata {
			if strings.HasPrefix(key, prefixDeleting) {
				t.Errorf("a mark is left: %s", key)
			}
		}
	})
	status("available")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // a mark would hold it up for markAge
	defer cancel()
	ok[*backend.Export](t)(b.Export(ctx, backend.Target{SnapshotID: snap.ID}, "reader"))
	if err := b.Unexport(t.Context(), backend.Target{SnapshotID: snap.ID}, "reader"); err != nil {
		t.Error(err)
	}
	status("error")
	if err := b.DeleteSnapshot(t.Context(), snap.ID); err != nil {
		t.Error(err)
	}
}

// TestLateParting: that a consumer lets go may be written once more after it has, by a
// request that was late. The snapshot can be deleted all the same, and nothing is left.
func TestLateParting(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share, snap := c.snapshotted(b, "data")
	target := backend.Target{SnapshotID: snap.ID}
	ok[*backend.Export](t)(b.Export(t.Context(), target, "reader"))
	ok[*backend.Export](t)(b.Grant(t.Context(), "reader", node1, true))
	if err := b.Unexport(t.Context(), target, "reader"); err != nil {
		t.Fatal(err)
	}
	c.Alter(func(objects fakemanila.Objects) {
		objects.Shares[share.ID].Metadata[hold{consumer: "reader", what: snap.ID, name: "LATE"}.key()] = time.Now().UTC().Format(time.RFC3339)
		objects.Shares[share.ID].Metadata[prefixEnd+"LATE."+time.Now().UTC().Format(endStamp)] = endDone
	})
	if err := errors.Join(b.DeleteSnapshot(t.Context(), snap.ID), b.DeleteShare(t.Context(), share.ID)); err != nil {
		t.Error(err)
	}
	if left := c.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left behind: %s", left)
	}
}

// TestKeysOfTheDeleted: the keys of a share that is deleted go, also one that came
// meanwhile; but not that of a consumer who holds another share by now.
func TestKeysOfTheDeleted(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	late := heldAs(c, "cephx")
	granted := false
	c.Strike(func(change int, after bool) bool {
		if !granted && !after {
			granted = true
			ok[*backend.Export](t)(c.open().Grant(t.Context(), "one", node1, false))
		}
		return false
	})
	err := b.DeleteShare(t.Context(), late.ID)
	c.Strike(nil)
	if err != nil || !granted {
		t.Errorf("granted: %v, %v", granted, err)
	}
	c.wantNothing("deleted beside a grant")

	var shares [2]*backend.Share
	for i := range shares {
		shares[i] = ok[*backend.Share](t)(b.CreateShare(t.Context(), request(fmt.Sprint(i))))
	}
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: shares[1].ID}, "one"))
	ok[*backend.Export](t)(b.Grant(t.Context(), "one", node1, false))
	c.Alter(func(objects fakemanila.Objects) { // a killed Unexport has left it
		objects.Shares[shares[0].ID].Metadata[hold{consumer: "one", what: holdsShare, name: "OLD"}.key()] = time.Now().UTC().Format(time.RFC3339Nano)
		objects.Shares[shares[0].ID].Metadata[prefixEnd+"OLD."+time.Now().UTC().Format(endStamp)] = endDone
	})
	if err := b.DeleteShare(t.Context(), shares[0].ID); err != nil {
		t.Error(err)
	}
	c.wantIn("cephx", "another share of the consumer's was deleted")
}

// TestUnfinishedSnapshot: what its call has not marked ready is nothing that others see.
func TestUnfinishedSnapshot(t *testing.T) {
	for _, version := range []string{"2.89", "2.60"} {
		t.Run(version, func(t *testing.T) {
			c := newCloud(t, fakemanila.Options{Microversion: version})
			b := c.open()
			share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
			cut := backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}
			c.Strike(func(change int, after bool) bool { return change == 1 && after || change > 1 }) // before its mark
			if _, err := c.open().CreateSnapshot(t.Context(), cut); err == nil {
				t.Fatal("it was not killed")
			}
			c.Strike(nil)
			id := ""
			c.Alter(func(objects fakemanila.Objects) {
				for id = range objects.Snapshots {
				}
			})
			if all, _, err := b.ListSnapshots(t.Context(), "", 0); err != nil || len(all) > 0 {
				t.Errorf("listed: %d, %v", len(all), err)
			}
			for what, err := range map[string]error{
				"look":   errOf(b.Snapshot(t.Context(), id)),
				"export": errOf(b.Export(t.Context(), backend.Target{SnapshotID: id}, "one")),
				"clone":  errOf(b.CreateShare(t.Context(), backend.CreateShareRequest{Name: "clone", FromSnapshot: id})),
			} {
				if !errors.Is(err, backend.ErrNotFound) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if again := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), cut)); again.ID != id || errOf(b.Snapshot(t.Context(), id)) != nil {
				t.Errorf("%+v, and it was %s", again, id)
			}
		})
	}
}
