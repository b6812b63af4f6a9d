package manila

import (
	"context"
	"errors"
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
		objects.Shares[share.ID].Metadata[prefixEnd+"LATE"] = time.Now().UTC().Format(time.RFC3339)
	})
	if err := errors.Join(b.DeleteSnapshot(t.Context(), snap.ID), b.DeleteShare(t.Context(), share.ID)); err != nil {
		t.Error(err)
	}
	if left := c.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left behind: %s", left)
	}
}
