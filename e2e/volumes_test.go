package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

const stReadOnly = 1 // ST_RDONLY of statfs(2)

// TestSnapshotVolumeCannotBeWritten is the first promise: whatever the request
// says. The request to publish says readonly=false, as kubelet's does.
func TestSnapshotVolumeCannotBeWritten(t *testing.T) {
	s := newSite(t)
	d := s.start()
	data := d.volume(volumeRequest("data", writers))
	live := d.publish(data, writers)
	put(t, live, "file", "old\n")
	snap := d.snapshot(snapshotRequest("snap", data.GetVolumeId()))
	put(t, live, "file", "new\n")

	ref := d.volume(fromSnapshot(volumeRequest("ref", readers), snap.GetSnapshotId()))
	view := d.volume(fromVolume(volumeRequest("view", readers), data.GetVolumeId()))
	for _, c := range []struct {
		volume *csi.Volume
		want   string
	}{{ref, "old\n"}, {view, "new\n"}} {
		dir := d.publish(c.volume, readers)
		if got := get(t, dir, "file"); got != c.want {
			t.Errorf("the snapshot holds %q, want %q", got, c.want)
		}
		for _, path := range []string{dir, strings.Replace(dir, "/target", "/staging", 1)} {
			// The mount itself, not only the subvolume below it.
			var fs syscall.Statfs_t
			if err := syscall.Statfs(path, &fs); err != nil || fs.Flags&stReadOnly == 0 {
				t.Errorf("the mount at %s has flags %#x, not read-only: %v", path, fs.Flags, err)
			}
			if err := os.WriteFile(filepath.Join(path, "file"), []byte("x"), 0o644); !errors.Is(err, syscall.EROFS) {
				t.Errorf("writing %s: %v, want a read-only file system", path, err)
			}
			if err := syscall.Mount("", path, "", syscall.MS_REMOUNT|syscall.MS_BIND, ""); err == nil {
				// Even who may remount meets the read-only subvolume.
				if err := os.WriteFile(filepath.Join(path, "file"), []byte("x"), 0o644); !errors.Is(err, syscall.EROFS) {
					t.Errorf("writing %s after a remount: %v", path, err)
				}
			}
		}
	}
	_, err := d.DeleteSnapshot(d.ctx(), &csi.DeleteSnapshotRequest{SnapshotId: snap.GetSnapshotId()})
	wantCode(t, err, codes.FailedPrecondition)
	for _, v := range []*csi.Volume{ref, view, data} {
		d.unpublish(v)
		d.deleteVolume(v.GetVolumeId())
	}
	d.deleteSnapshot(snap.GetSnapshotId())
	if got := s.inventory(); got != "0 shares, 0 snapshots (0 temporary), 0 exports, 0 backups, 0 movers, 0 locks" {
		t.Errorf("left behind: %s", got)
	}
}

// TestSizeIsEnforced writes past the end of a volume, and again after it grew.
func TestSizeIsEnforced(t *testing.T) {
	s := newSite(t)
	d := s.start()
	v := d.volume(volumeRequest("data", writers))
	dir := d.publish(v, writers)
	fill := func(name string) (int64, error) {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return 0, err
		}
		defer f.Close()
		block := make([]byte, mib)
		for n := int64(0); ; n += mib {
			for i := range block {
				block[i] = byte(int64(i)*7 + n)
			}
			if _, err := f.Write(block); err != nil {
				return n, err
			}
			if err := f.Sync(); err != nil {
				return n, err
			}
			if n > 1<<30 {
				return n, nil
			}
		}
	}
	n, err := fill("a")
	if !errors.Is(err, syscall.EDQUOT) && !errors.Is(err, syscall.ENOSPC) || n > 64*mib {
		t.Errorf("wrote %d bytes into a volume of %d: %v", n, 64*mib, err)
	}
	stats, err := d.NodeGetVolumeStats(d.ctx(), &csi.NodeGetVolumeStatsRequest{VolumeId: v.GetVolumeId(), VolumePath: dir})
	if err != nil {
		t.Fatal(err)
	}
	if u := stats.GetUsage()[0]; u.GetTotal() != 64*mib || u.GetUsed() < 48*mib || u.GetUsed() > 64*mib {
		t.Errorf("usage of a full volume: %v", u)
	}
	grown, err := d.ControllerExpandVolume(d.ctx(), &csi.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId(), CapacityRange: &csi.CapacityRange{RequiredBytes: 128 * mib}})
	if err != nil || grown.GetCapacityBytes() != 128*mib || grown.GetNodeExpansionRequired() {
		t.Errorf("expand: %v, %v", grown, err)
	}
	if n, _ := fill("b"); n < 32*mib {
		t.Errorf("wrote %d bytes only after the volume grew by %d", n, 64*mib)
	}
	d.unpublish(v)
}

// TestBadTargets publishes where something is in the way.
func TestBadTargets(t *testing.T) {
	s := newSite(t)
	d := s.start()
	v := d.volume(volumeRequest("data", writers))
	other := d.volume(volumeRequest("other", writers))
	d.publish(v, writers)
	taken := d.publish(other, writers)
	staging := strings.Replace(strings.Replace(taken, strings.TrimPrefix(other.GetVolumeId(), "local/"), strings.TrimPrefix(v.GetVolumeId(), "local/"), 1), "/target", "/staging", 1)
	put(t, s.dir, "a-file", "x")
	if err := os.Symlink("/", s.path("a-link")); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{s.path("a-file"), s.path("a-link"), taken} {
		_, err := d.NodePublishVolume(d.ctx(), &csi.NodePublishVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging, TargetPath: target, VolumeCapability: capability(writers)})
		wantCode(t, err, codes.AlreadyExists, target)
	}
	// The staging path of another volume proves nothing.
	_, err := d.NodePublishVolume(d.ctx(), &csi.NodePublishVolumeRequest{VolumeId: v.GetVolumeId(),
		StagingTargetPath: strings.Replace(taken, "/target", "/staging", 1), TargetPath: s.path("t"), VolumeCapability: capability(writers)})
	wantCode(t, err, codes.FailedPrecondition)
	// What is mounted does not go from under its files.
	_, err = d.DeleteVolume(d.ctx(), &csi.DeleteVolumeRequest{VolumeId: other.GetVolumeId()})
	wantCode(t, err, codes.FailedPrecondition, taken, "unmount")
	for range 2 { // twice is once
		d.unpublish(v)
		d.unpublish(other)
	}
	d.deleteVolume(other.GetVolumeId())
}

// TestOddNames creates under names that no file could have.
func TestOddNames(t *testing.T) {
	s := newSite(t)
	d := s.start()
	names := []string{strings.Repeat("n", 128), strings.Repeat("n", 129), strings.Repeat("ä", 400), "a/b", "../../etc", "..", ".", "new\nline", "nul\x00", " ", "a,b c"}
	for _, name := range names {
		v := d.volume(volumeRequest(name, writers))
		sn := d.snapshot(snapshotRequest(name, v.GetVolumeId()))
		if len(v.GetVolumeId()) > 128 || len(sn.GetSnapshotId()) > 128 {
			t.Errorf("the ids of %q are too long: %s, %s", name, v.GetVolumeId(), sn.GetSnapshotId())
		}
	}
	_, err := d.CreateVolume(d.ctx(), volumeRequest(strings.Repeat("n", 5000), writers))
	wantCode(t, err, codes.InvalidArgument)
	list, err := d.ListVolumes(d.ctx(), &csi.ListVolumesRequest{})
	if err != nil || len(list.GetEntries()) != len(names) {
		t.Errorf("%d volumes of %d names, %v", len(list.GetEntries()), len(names), err)
	}
	b := d.snapshot(backupRequest("back, up\n/../", list.GetEntries()[0].GetVolume().GetVolumeId()))
	d.deleteSnapshot(b.GetSnapshotId())
	_, err = d.CreateVolume(d.ctx(), &csi.CreateVolumeRequest{Name: "huge", VolumeCapabilities: []*csi.VolumeCapability{capability(writers)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 50}})
	wantCode(t, err, codes.ResourceExhausted)
}

// TestTwoControllers lets two drivers over one backend and one repository do
// everything at once.
func TestTwoControllers(t *testing.T) {
	s := newSite(t)
	both := []*driver{s.start(), s.start()}
	together := func(what string, do func(d *driver) (string, error)) string {
		t.Helper()
		ids := make([]string, 6)
		var wg sync.WaitGroup
		for i := range ids {
			wg.Go(func() {
				id, err := do(both[i%2])
				if err != nil {
					t.Errorf("%s: %v", what, err)
				}
				ids[i] = id
			})
		}
		wg.Wait()
		for _, id := range ids {
			if id != ids[0] {
				t.Errorf("%s made %q and %q", what, ids[0], id)
			}
		}
		return ids[0]
	}
	volume := func(req func() *csi.CreateVolumeRequest) func(d *driver) (string, error) {
		return func(d *driver) (string, error) {
			v, err := d.tryVolume(req())
			return v.GetVolumeId(), err
		}
	}
	data := together("share", volume(func() *csi.CreateVolumeRequest { return volumeRequest("data", writers) }))
	put(t, both[0].publish(&csi.Volume{VolumeId: data}, writers), "file", "text\n")
	both[0].unpublish(&csi.Volume{VolumeId: data})
	snapshot := func(req *csi.CreateSnapshotRequest) func(d *driver) (string, error) {
		return func(d *driver) (string, error) {
			sn, err := d.trySnapshot(req)
			return sn.GetSnapshotId(), err
		}
	}
	snap := together("snapshot", snapshot(snapshotRequest("snap", data)))
	saved := together("backup", snapshot(backupRequest("saved", data)))
	ref := together("reference", volume(func() *csi.CreateVolumeRequest { return fromSnapshot(volumeRequest("ref", readers), snap) }))
	clone := together("clone", volume(func() *csi.CreateVolumeRequest { return fromVolume(volumeRequest("clone", writers), data) }))
	restored := together("restore", volume(func() *csi.CreateVolumeRequest { return fromSnapshot(volumeRequest("restored", writers), saved) }))
	both[0].settle("3 shares, 1 snapshots (0 temporary), 2 exports, 1 backups, 0 movers, 0 locks")
	if got := s.inventory(); got != "3 shares, 1 snapshots (0 temporary), 2 exports, 1 backups, 0 movers, 0 locks" {
		t.Errorf("together they made %s", got)
	}
	dir := both[1].publish(&csi.Volume{VolumeId: restored}, writers)
	if got := get(t, dir, "file"); got != "text\n" {
		t.Errorf("the restored volume holds %q", got)
	}
	// Nobody restores over a volume that is in use.
	put(t, dir, "file", "mine\n")
	time.Sleep(3 * time.Second)
	if got := get(t, dir, "file"); got != "mine\n" {
		t.Errorf("the file became %q", got)
	}
	both[1].unpublish(&csi.Volume{VolumeId: restored})
	deleting := func(id string) func(d *driver) (string, error) {
		return func(d *driver) (string, error) {
			for {
				if err := d.tryDelete(id); err == nil || !retryable(err) {
					return id, err
				}
			}
		}
	}
	for _, id := range []string{ref, clone, restored, data, snap, saved} {
		together("delete "+id, deleting(id))
	}
	if got := s.inventory(); got != "0 shares, 0 snapshots (0 temporary), 0 exports, 0 backups, 0 movers, 0 locks" {
		t.Errorf("left behind: %s", got)
	}
}

// TestFullBackend fills the disk below the backend; what is there stays, and
// deleting makes room.
func TestFullBackend(t *testing.T) {
	s := newSite(t)
	d := s.start()
	small := d.volume(volumeRequest("small", writers))
	put(t, d.publish(small, writers), "file", "kept\n")
	req := volumeRequest("big", writers)
	req.CapacityRange.RequiredBytes = imageSize - 64*mib
	big := d.volume(req)
	dir := d.publish(big, writers)
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 4*mib)
	for err = nil; err == nil; {
		if _, err = f.Write(block); err == nil {
			err = f.Sync()
		}
	}
	f.Close()
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		t.Fatal(err)
	}
	for i := range 50 {
		if _, err = d.CreateVolume(d.ctx(), volumeRequest(fmt.Sprintf("more-%d", i), writers)); err != nil {
			break
		}
	}
	if err != nil {
		wantCode(t, err, codes.ResourceExhausted)
	}
	d.unpublish(big)
	d.deleteVolume(big.GetVolumeId())
	// The kernel gives the room back in its own time.
	for range 120 {
		if _, err = d.CreateVolume(d.ctx(), volumeRequest("after", writers)); err == nil {
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("a minute after the big volume was deleted: %v", err)
	}
	if got := get(t, s.path("node", strings.Replace(small.GetVolumeId(), "/", "_", 1), "target"), "file"); got != "kept\n" {
		t.Errorf("the other volume holds %q", got)
	}
	d.unpublish(small)
}

// TestExample runs the client of the documentation.
func TestExample(t *testing.T) {
	s := newSite(t)
	d := s.start()
	out, err := exec.Command("go", "run", "../docs/examples/client", "unix://"+d.socket, s.path("mounted")).CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "backup/offsite/") {
		t.Errorf("%v: %s", err, out)
	}
	s.calm()
	if got := s.inventory(); got != "0 shares, 0 snapshots (0 temporary), 0 exports, 1 backups, 0 movers, 0 locks" {
		t.Errorf("there is %s", got)
	}
}
