package csi

import (
	"context"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

// TestVolumeIsBoundWhenItIsRestored: while the mover is at work there is no
// volume, only an answer that says how far it is.
func TestVolumeIsBoundWhenItIsRestored(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	engine, runner := newEngine(f.driver.Backends)
	f.driver.Backups = engine
	v := f.volume(create("data", writer, nil))
	save := &csi.CreateSnapshotRequest{Name: "saved", SourceVolumeId: v.GetVolumeId(), Parameters: map[string]string{"type": "backup", "repository": "offsite"}}
	if _, err := f.CreateSnapshot(ctx, save); err != nil {
		t.Fatal(err)
	}
	saved, err := f.CreateSnapshot(ctx, save)
	if err != nil || !saved.GetSnapshot().GetReadyToUse() {
		t.Fatal(saved, err)
	}
	volumes := func() int {
		t.Helper()
		all, err := f.ListVolumes(ctx, &csi.ListVolumesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return len(all.GetEntries())
	}
	runner.slow = true
	req := create("restored", writer, contentSource(saved.GetSnapshot().GetSnapshotId()))
	for range 2 {
		short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		_, err := f.driver.CreateVolume(short, req)
		cancel()
		code(t, toStatus("/CreateVolume", err), codes.Aborted, "is being restored")
		if n := volumes(); n != 1 {
			t.Errorf("%d volumes are listed while one is restored", n)
		}
	}
	runner.end()
	restored, err := f.CreateVolume(ctx, req)
	if err != nil || volumes() != 2 {
		t.Errorf("after the restore: %v, %v, and %d volumes", restored, err, volumes())
	}
}
