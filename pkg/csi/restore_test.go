package csi

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
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

// TestOwnRepositoryMakesNoVolumeLarger: what a namespace has written into its own
// repository raises no claim above what the quota has counted.
func TestOwnRepositoryMakesNoVolumeLarger(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	engine, runner := newEngine(f.driver.Backends)
	f.driver.Backups = engine
	forge := func(id, size string) string {
		runner.forged = append(runner.forged, restic.Snapshot{ID: fmt.Sprintf("%064x", len(runner.forged)), Time: time.Now(),
			Tags: []string{mover.TagBackup + id, mover.TagVolume + "mem/x", mover.TagSize + size}})
		return Snapshot{Repository: "@shop", Backup: id}.String()
	}
	const asked = 1 << 20
	for _, test := range []struct {
		size string
		want int64 // 0: refused
	}{{"109951162777600", 0}, {"1048577", 0}, {"1048576", asked}, {"-5", asked}, {"much", asked}} {
		req := create("from-"+test.size, writer, contentSource(forge(digest(test.size), test.size)))
		req.CapacityRange = &csi.CapacityRange{RequiredBytes: asked}
		before := f.count()
		got, err := f.CreateVolume(ctx, req)
		if test.want == 0 {
			code(t, err, codes.OutOfRange, "at least "+test.size+" bytes", "Secret shop/abaca-repository")
			if left := f.count(); left != before {
				t.Errorf("%s bytes: %s before, and %s after it", test.size, before, left)
			}
			continue
		}
		if err != nil || got.GetVolume().GetCapacityBytes() != test.want {
			t.Errorf("%s bytes: %v, %v", test.size, got, err)
		}
	}
	// Without a size, the least that a volume has is what is asked for.
	req := create("any", writer, contentSource(forge(digest("any"), fmt.Sprint(defaultSize+1))))
	req.CapacityRange = nil
	_, err := f.CreateVolume(ctx, req)
	code(t, err, codes.OutOfRange)

	forge("../../else", "1")
	all, err := f.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all.GetEntries() {
		if s := e.GetSnapshot(); s.GetSizeBytes() < 0 || strings.Contains(s.GetSnapshotId(), "else") {
			t.Errorf("listed: %v", s)
		}
	}
}

// TestPartialBackupIsMarked: nobody sees a backup ready that lacks files before its
// object says so.
func TestPartialBackupIsMarked(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	engine, runner := newEngine(f.driver.Backends)
	f.driver.Backups = engine
	var marked []backup.Object
	refuse := error(backend.ErrUnavailable)
	f.driver.MarkPartial = func(_ context.Context, o backup.Object) error {
		marked = append(marked, o)
		return refuse
	}
	v := f.volume(create("data", writer, nil))
	const uid = "01234567-89ab-cdef-0123-456789abcdef"
	for _, partial := range []bool{false, true} {
		runner.partial = partial
		name := fmt.Sprintf("%v-%s", partial, uid)
		save := &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.GetVolumeId(), Parameters: map[string]string{
			"type": "backup", "repository": "offsite", snapshotNamespaceKey: "shop", snapshotNameKey: name}}
		if _, err := f.CreateSnapshot(ctx, save); err != nil {
			t.Fatal(err)
		}
		if partial {
			_, err := f.CreateSnapshot(ctx, save)
			code(t, err, codes.Unavailable, "VolumeSnapshot shop/"+name, "lacks files")
			refuse = nil
		}
		if saved, err := f.CreateSnapshot(ctx, save); err != nil || !saved.GetSnapshot().GetReadyToUse() {
			t.Errorf("partial %v: %v, %v", partial, saved, err)
		}
		want := []backup.Object{{Kind: backup.VolumeSnapshot, Namespace: "shop", Name: name, UID: uid}}
		if want = append(want, want...); !partial {
			want = nil
		}
		if diff := cmp.Diff(want, marked); diff != "" {
			t.Errorf("partial %v, -want +got:\n%s", partial, diff)
		}
	}
}
