package manila

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// onlyCopies makes the type "mountable" one whose snapshots are neither mountable
// nor in a directory.
func (c *cloud) onlyCopies() {
	c.Alter(func(objects fakemanila.Objects) {
		for _, typ := range objects.Types {
			delete(typ.Specs, "mount_snapshot_support")
		}
	})
}

// plainNFS makes a share of 2 GiB whose snapshots can be shown by a copy only, and
// a snapshot of it.
func (c *cloud) plainNFS(b *Backend) (*backend.Share, *backend.Snapshot) {
	c.t.Helper()
	c.onlyCopies()
	req := request("data")
	req.MinSize, req.Parameters = 2*gib, map[string]string{"type": "mountable", "protocol": "NFS"}
	share := ok[*backend.Share](c.t)(b.CreateShare(c.t.Context(), req))
	return share, ok[*backend.Snapshot](c.t)(b.CreateSnapshot(c.t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
}

// TestNoCopy: a snapshot that cannot be shown, since there is no room for the
// copy, is not held; and while a copy is being made the listings go on.
func TestNoCopy(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Gigabytes: 3})
	b := c.open()
	_, snapshot := c.plainNFS(b)
	if _, err := b.Export(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "one"); !errors.Is(err, backend.ErrExhausted) {
		t.Errorf("without room for the copy: %v", err)
	}
	if _, err := b.ExportOf(t.Context(), "one"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("it is held all the same: %v", err)
	}
	if err := b.DeleteSnapshot(t.Context(), snapshot.ID); err != nil {
		t.Error(err)
	}

	var slow atomic.Bool
	c = newCloud(t, fakemanila.Options{Delay: func() time.Duration {
		if slow.Load() {
			return time.Hour
		}
		return 0
	}})
	b = c.open()
	_, snapshot = c.plainNFS(b)
	slow.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	target := backend.Target{SnapshotID: snapshot.ID}
	if _, err := b.Export(ctx, target, "one"); !errors.Is(err, backend.ErrPending) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while the copy is made: %v", err)
	}
	held, _, err := b.ListExports(t.Context(), "", 0)
	if err != nil || len(held) != 1 || held[0].Target != target || held[0].Consumer != "one" {
		t.Errorf("listed: %v, %v", held, err)
	}
}

// TestUndoneAtEveryRequest breaks Export off at each request that changes
// something, as kill -9 does. Nobody calls it again; Unexport must be enough.
func TestUndoneAtEveryRequest(t *testing.T) {
	for n, struck := 1, true; struck; n++ {
		for _, after := range []bool{false, true} {
			c := newCloud(t, fakemanila.Options{})
			b := c.open()
			_, snapshot := c.plainNFS(b)
			ctx, cancel := context.WithCancel(t.Context())
			struck = false
			c.Strike(func(change int, now bool) bool {
				if change == n && now == after {
					struck = true
					cancel()
				}
				return struck
			})
			_, err := b.Export(ctx, backend.Target{SnapshotID: snapshot.ID}, "one")
			cancel()
			c.Strike(nil)
			if struck == (err == nil) {
				t.Fatalf("change %d: %v", n, err)
			}
			b = c.open()
			for _, call := range []func() error{
				func() error { return b.Unexport(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "one") },
				func() error { return b.DeleteSnapshot(t.Context(), snapshot.ID) },
			} {
				for err = call(); errors.Is(err, backend.ErrPending); err = call() {
				}
				if err != nil {
					t.Errorf("cut at change %d, after it: %v: %v", n, after, err)
				}
			}
		}
	}
}
