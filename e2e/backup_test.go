package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/abaca-csi/abaca/test/tree"
)

// TestBackupAndRestore carries a tree with everything that a file system can
// hold to a repository and back.
func TestBackupAndRestore(t *testing.T) {
	s := newSite(t)
	d := s.start()
	req := volumeRequest("data", writers)
	req.CapacityRange.RequiredBytes = 600 * mib
	req.Parameters = map[string]string{"csi.storage.k8s.io/pvc/name": "data", "csi.storage.k8s.io/pvc/namespace": "prod"}
	data := d.volume(req)
	dir := d.publish(data, writers)
	if err := tree.Odd(t.Context(), dir, 8*mib); err != nil {
		t.Fatal(err)
	}
	saved := d.snapshot(backupRequest("saved", data.GetVolumeId()))
	if saved.GetSizeBytes() != 600*mib || saved.GetSourceVolumeId() != data.GetVolumeId() || time.Since(saved.GetCreationTime().AsTime()) > time.Hour {
		t.Errorf("the backup is %v", saved)
	}
	if again := d.snapshot(backupRequest("saved", data.GetVolumeId())); again.GetCreationTime().AsTime() != saved.GetCreationTime().AsTime() || again.GetSnapshotId() != saved.GetSnapshotId() {
		t.Errorf("the second answer is %v, the first %v", again, saved)
	}
	target := volumeRequest("restored", writers)
	target.CapacityRange.RequiredBytes = 0 // as large as it was
	restored := d.volume(fromSnapshot(target, saved.GetSnapshotId()))
	if restored.GetCapacityBytes() != 600*mib {
		t.Errorf("the restored volume has %d bytes", restored.GetCapacityBytes())
	}
	differences, err := tree.Compare(t.Context(), dir, d.publish(restored, writers))
	if err != nil || len(differences) > 0 {
		t.Errorf("restored with %d differences: %v, %v", len(differences), differences, err)
	}

	// Without Abaca: plain restic, and what is at the top of a snapshot.
	if out, err := s.restic("check", "--read-data"); err != nil {
		t.Errorf("restic check: %v\n%s", err, out)
	}
	var list []struct {
		Hostname string
		Paths    []string
		Tags     []string
	}
	out, err := s.restic("snapshots", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &list)
	}
	if err != nil || len(list) != 1 || list[0].Hostname != "prod/data" || list[0].Paths[0] != "/run/abaca/volume/data" {
		t.Errorf("restic shows %+v, %v", list, err)
	}
	out, err = s.restic("dump", "latest", "/volume.json")
	var description struct {
		Claim, Volume string
		SizeBytes     int64
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &description)
	}
	if err != nil || description.Claim != "prod/data" || description.Volume != data.GetVolumeId() || description.SizeBytes != 600*mib {
		t.Errorf("volume.json is %s, %v", out, err)
	}
	d.unpublish(restored)
	d.unpublish(data)
}

// TestRestoreElsewhere restores with a driver that has never heard of the backup, on a
// backend and a state of its own: from the name that it calls the repository by, and the
// tag of the restic snapshot.
func TestRestoreElsewhere(t *testing.T) {
	here := newSite(t)
	d := here.start()
	data := d.volume(volumeRequest("data", writers))
	put(t, d.publish(data, writers), "letter", "dear all\n")
	d.snapshot(backupRequest("saved", data.GetVolumeId()))
	d.unpublish(data)
	var list []struct{ Tags []string }
	out, err := here.restic("snapshots", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &list)
	}
	if err != nil || len(list) != 1 {
		t.Fatalf("%v\n%s", err, out)
	}
	handle := ""
	for _, tag := range list[0].Tags {
		if id, ok := strings.CutPrefix(tag, "abaca.backup="); ok {
			handle = "backup/of-old/" + id
		}
	}

	there := newSite(t)
	there.repository("of-old", here.path("offsite"))
	d = there.start()
	// As csi-snapshotter does for a VolumeSnapshotContent that somebody has written.
	found, err := d.ListSnapshots(d.ctx(), &csi.ListSnapshotsRequest{SnapshotId: handle})
	if err != nil || len(found.GetEntries()) != 1 || !found.GetEntries()[0].GetSnapshot().GetReadyToUse() {
		t.Fatalf("%s: %v, %v", handle, found, err)
	}
	restored := d.volume(fromSnapshot(volumeRequest("restored", writers), handle))
	if got := get(t, d.publish(restored, writers), "letter"); got != "dear all\n" {
		t.Errorf("restored: %q", got)
	}
	d.unpublish(restored)
}

// TestUnchangedBackupIsCheap backs the same volume up again: nothing is read,
// next to nothing added.
func TestUnchangedBackupIsCheap(t *testing.T) {
	s := newSite(t)
	d := s.start("--http-endpoint", "127.0.0.1:0")
	data := d.volume(volumeRequest("data", writers))
	dir := d.publish(data, writers)
	for i := range 200 {
		put(t, dir, fmt.Sprintf("file-%03d", i), strings.Repeat(strconv.Itoa(i), 2000))
	}
	d.snapshot(backupRequest("first", data.GetVolumeId()))
	d.snapshot(backupRequest("second", data.GetVolumeId()))
	var list []struct {
		Summary struct {
			FilesUnmodified int64 `json:"files_unmodified"`
			FilesChanged    int64 `json:"files_changed"`
			FilesNew        int64 `json:"files_new"`
			DataAdded       int64 `json:"data_added"`
		}
		Parent string
	}
	out, err := s.restic("snapshots", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &list)
	}
	if err != nil || len(list) != 2 {
		t.Fatalf("%v\n%s", err, out)
	}
	// volume.json bears the time of its snapshot, and is the one file that may
	// be written again.
	if sum := list[1].Summary; sum.FilesUnmodified < 200 || sum.FilesChanged+sum.FilesNew > 1 || sum.DataAdded > 4096 || list[1].Parent == "" {
		t.Errorf("the second backup of an unchanged volume: %+v", list[1])
	}
	d.unpublish(data)
}

// TestBackupGoesOn deletes the source while its backup runs, and kills first the
// controller and then the mover: the backup still ends well, and is one.
func TestBackupGoesOn(t *testing.T) {
	s := newSite(t)
	d := s.start()
	data := d.large("data")
	req := backupRequest("saved", data.GetVolumeId())
	resp, err := d.CreateSnapshot(d.ctx(), req)
	if err != nil || resp.GetSnapshot().GetReadyToUse() {
		t.Fatalf("the answer was %v, %v; it must come at once", resp, err)
	}
	d.deleteVolume(data.GetVolumeId())
	mover := s.moverOf()
	if err := syscall.Kill(mover, syscall.SIGSTOP); err != nil { // it must not be done before it is killed
		t.Fatal(err)
	}
	d.stop(syscall.SIGKILL)
	if s.moverOf() != mover {
		t.Error("the mover went with its controller")
	}
	d = s.start()
	if err := syscall.Kill(mover, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	saved := d.snapshot(req)
	if saved.GetSnapshotId() != resp.GetSnapshot().GetSnapshotId() {
		t.Errorf("it became %s, and was %s", saved, resp.GetSnapshot().GetSnapshotId())
	}
	d.settle("0 shares, 0 snapshots (0 temporary), 0 exports, 1 backups, 0 movers, 0 locks")
	if got := s.inventory(); got != "0 shares, 0 snapshots (0 temporary), 0 exports, 1 backups, 0 movers, 0 locks" {
		t.Errorf("there is %s", got)
	}
	if out, err := s.restic("check", "--read-data"); err != nil {
		t.Errorf("restic check: %v\n%s", err, out)
	}
	restored := d.volume(fromSnapshot(volumeRequestOf("restored", 512*mib), saved.GetSnapshotId()))
	if info, err := os.Stat(filepath.Join(d.publish(restored, writers), "large")); err != nil || info.Size() != largeSize {
		t.Errorf("restored %v, %v", info, err)
	}
	d.unpublish(restored)
}

// TestDeleteRunningBackup deletes a backup while it is made.
func TestDeleteRunningBackup(t *testing.T) {
	s := newSite(t)
	d := s.start()
	data := d.large("data")
	resp, err := d.CreateSnapshot(d.ctx(), backupRequest("saved", data.GetVolumeId()))
	if err != nil {
		t.Fatal(err)
	}
	mover := s.moverOf()
	d.deleteSnapshot(resp.GetSnapshot().GetSnapshotId())
	if err := syscall.Kill(mover, 0); err == nil {
		t.Errorf("the mover %d is still there", mover)
	}
	if got := s.inventory(); got != "1 shares, 0 snapshots (0 temporary), 1 exports, 0 backups, 0 movers, 0 locks" {
		t.Errorf("there is %s", got)
	}
	list, err := d.ListSnapshots(d.ctx(), &csi.ListSnapshotsRequest{})
	if err != nil || len(list.GetEntries()) != 0 {
		t.Errorf("listed: %v, %v", list, err)
	}
}

const largeSize = 256 * mib

func volumeRequestOf(name string, size int64) *csi.CreateVolumeRequest {
	req := volumeRequest(name, writers)
	req.CapacityRange.RequiredBytes = size
	return req
}

// large makes a volume with a file that takes a mover a while.
func (d *driver) large(name string) *csi.Volume {
	d.site.t.Helper()
	v := d.volume(volumeRequestOf(name, 512*mib))
	f, err := os.Create(filepath.Join(d.publish(v, writers), "large"))
	if err != nil {
		d.site.t.Fatal(err)
	}
	random, err := os.Open("/dev/urandom")
	if err != nil {
		d.site.t.Fatal(err)
	}
	defer random.Close()
	if _, err := io.CopyN(f, random, largeSize); err != nil {
		d.site.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		d.site.t.Fatal(err)
	}
	d.unpublish(v)
	return v
}

// moverOf returns the process of the site's one mover, once restic is at work.
func (s *site) moverOf() int {
	s.t.Helper()
	for range 200 {
		found, _ := filepath.Glob(s.path("backend", "state", "movers", "*", "mover.json"))
		if len(found) == 1 {
			var p struct{ PID int }
			if b, err := os.ReadFile(found[0]); err == nil && json.Unmarshal(b, &p) == nil {
				if _, err := os.Stat(s.path("offsite", "config")); err == nil {
					return p.PID
				}
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.t.Fatal("there is no mover")
	return 0
}

// TestBadRepositories names repositories that cannot be used.
func TestBadRepositories(t *testing.T) {
	s := newSite(t)
	d := s.start()
	data := d.volume(volumeRequest("data", writers))
	put(t, d.publish(data, writers), "file", "text\n")
	d.unpublish(data)
	d.snapshot(backupRequest("good", data.GetVolumeId()))
	s.repository("wrong", s.path("offsite"))
	s.write("repositories/wrong/RESTIC_PASSWORD", "battery staple")
	s.repository("typo", s.path("typo"))
	s.write("repositories/typo/RESTIC_PASWORD", "x")
	s.repository("nowhere", "rest:http://127.0.0.1:9/")
	s.write("repositories/bare/RESTIC_REPOSITORY", s.path("bare"))
	for _, c := range []struct {
		repository string
		code       codes.Code
		words      []string
	}{
		{"missing", codes.InvalidArgument, []string{`"missing"`, "offsite"}},
		{"wrong", codes.Unauthenticated, []string{"password"}},
		{"typo", codes.InvalidArgument, []string{"RESTIC_PASWORD", "RESTIC_PASSWORD"}},
		{"bare", codes.InvalidArgument, []string{"RESTIC_PASSWORD"}},
	} {
		req := backupRequest("b-"+c.repository, data.GetVolumeId())
		req.Parameters["repository"] = c.repository
		_, err := d.CreateSnapshot(d.ctx(), req)
		wantCode(t, err, c.code, c.words...)
		if err != nil && (strings.Contains(err.Error(), "battery staple") || strings.Contains(err.Error(), "correct horse")) {
			t.Errorf("the error tells the password: %v", err)
		}
	}
	if strings.Contains(d.log.String(), "battery staple") || strings.Contains(d.log.String(), "correct horse") {
		t.Error("the log tells a password")
	}
	// A restore from a backup that is not there makes no volume.
	_, err := d.CreateVolume(d.ctx(), fromSnapshot(volumeRequest("r", writers), "backup/offsite/"+strings.Repeat("a", 26)))
	wantCode(t, err, codes.NotFound)
	_, err = d.CreateVolume(d.ctx(), fromSnapshot(volumeRequest("r", readers), "backup/offsite/"+strings.Repeat("a", 26)))
	wantCode(t, err, codes.InvalidArgument)
	s.calm()
	for _, dir := range []string{"wrong", "typo", "nowhere", "bare"} {
		if err := os.RemoveAll(s.path("repositories", dir)); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.inventory(); got != "1 shares, 0 snapshots (0 temporary), 1 exports, 1 backups, 0 movers, 0 locks" {
		t.Errorf("there is %s", got)
	}
}

// TestVanishedRepository: the disk of a repository is not mounted. Nothing may be
// taken for gone, and no other repository may be made in its place.
func TestVanishedRepository(t *testing.T) {
	s := newSite(t)
	d := s.start()
	data := d.volume(volumeRequest("data", writers))
	put(t, d.publish(data, writers), "file", "text\n")
	d.unpublish(data)
	first := d.snapshot(backupRequest("first", data.GetVolumeId()))
	s.calm() // its record would answer for the repository
	if err := os.Rename(s.path("offsite"), s.path("unmounted")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.path("offsite"), 0o755); err != nil { // the mount point
		t.Fatal(err)
	}
	d.stop(syscall.SIGKILL) // what was seen is not only in memory
	d = s.start()
	_, err := d.CreateSnapshot(d.ctx(), backupRequest("second", data.GetVolumeId()))
	wantCode(t, err, codes.Unavailable, "mounted")
	_, err = d.ListSnapshots(d.ctx(), &csi.ListSnapshotsRequest{})
	wantCode(t, err, codes.Unavailable, "mounted")
	_, err = d.CreateVolume(d.ctx(), fromSnapshot(volumeRequest("r", writers), first.GetSnapshotId()))
	wantCode(t, err, codes.Unavailable, "mounted")
	_, err = d.DeleteSnapshot(d.ctx(), &csi.DeleteSnapshotRequest{SnapshotId: first.GetSnapshotId()})
	wantCode(t, err, codes.Unavailable, "offsite", "mounted")
	if left, err := os.ReadDir(s.path("offsite")); err != nil || len(left) > 0 {
		t.Errorf("in the place of the repository there is %v, %v", left, err)
	}
	if err := os.Remove(s.path("offsite")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.path("unmounted"), s.path("offsite")); err != nil {
		t.Fatal(err)
	}
	d.snapshot(backupRequest("second", data.GetVolumeId()))
	d.deleteSnapshot(first.GetSnapshotId())
	s.calm()
	if got := s.inventory(); got != "1 shares, 0 snapshots (0 temporary), 1 exports, 1 backups, 0 movers, 0 locks" {
		t.Errorf("there is %s", got)
	}
}

// TestUnreachableRepository: its server is not there. That is said while the
// caller still waits, and in the terms of a server that is not there.
func TestUnreachableRepository(t *testing.T) {
	s := newSite(t)
	s.repository("nowhere", "rest:http://127.0.0.1:9/")
	d := s.start()
	_, err := d.ListSnapshots(d.ctx(), &csi.ListSnapshotsRequest{})
	wantCode(t, err, codes.Unavailable, "nowhere", "host and port")
}

// TestDamagedRepository restores from a repository that has lost a part: no
// volume may come of it.
func TestDamagedRepository(t *testing.T) {
	s := newSite(t)
	d := s.start()
	data := d.volume(volumeRequest("data", writers))
	put(t, d.publish(data, writers), "file", strings.Repeat("text\n", 1000))
	d.unpublish(data)
	saved := d.snapshot(backupRequest("saved", data.GetVolumeId()))
	packs, err := filepath.Glob(s.path("offsite", "data", "*", "*"))
	if err != nil || len(packs) == 0 {
		t.Fatalf("no packs: %v", err)
	}
	for _, p := range packs {
		if err := os.Remove(p); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(s.path("backend", "state", "cache")); err != nil {
		t.Fatal(err)
	}
	for range 40 {
		if _, err = d.CreateVolume(d.ctx(), fromSnapshot(volumeRequest("r", writers), saved.GetSnapshotId())); err == nil {
			t.Fatal("a volume was made from a damaged backup")
		}
		if !strings.Contains(err.Error(), "is being restored") {
			break
		}
	}
	t.Logf("the error is: %v", err)
	list, err := d.ListVolumes(d.ctx(), &csi.ListVolumesRequest{})
	if err != nil || len(list.GetEntries()) != 1 {
		t.Errorf("listed: %v, %v", list, err)
	}
}

// TestEmptiedVolume refuses to back up a volume that shrank to nothing.
func TestEmptiedVolume(t *testing.T) {
	s := newSite(t)
	d := s.start()
	data := d.volume(volumeRequest("data", writers))
	dir := d.publish(data, writers)
	put(t, dir, "file", "text\n")
	d.snapshot(backupRequest("full", data.GetVolumeId()))
	if err := os.Remove(filepath.Join(dir, "file")); err != nil {
		t.Fatal(err)
	}
	_, err := d.trySnapshot(backupRequest("empty", data.GetVolumeId()))
	wantCode(t, err, codes.FailedPrecondition, "empty")
	if got := s.inventory(); got != "1 shares, 0 snapshots (0 temporary), 1 exports, 1 backups, 1 movers, 0 locks" {
		t.Errorf("there is %s", got)
	}
	d.deleteSnapshot("backup/offsite/" + s.jobOf())
	meant := backupRequest("meant", data.GetVolumeId())
	meant.Parameters["allowEmpty"] = "true"
	d.snapshot(meant)
	d.unpublish(data)
}

func (s *site) jobOf() string {
	s.t.Helper()
	found, _ := filepath.Glob(s.path("backend", "state", "movers", "*", "job.json"))
	if len(found) != 1 {
		s.t.Fatalf("jobs: %v", found)
	}
	return filepath.Base(filepath.Dir(found[0]))
}

// TestHTTP reads what is for people and their tools.
func TestHTTP(t *testing.T) {
	s := newSite(t)
	d := s.start("--http-endpoint", "127.0.0.1:39471")
	data := d.volume(volumeRequest("data", writers))
	saved := d.snapshot(backupRequest("saved", data.GetVolumeId()))
	restored := d.volume(fromSnapshot(volumeRequest("restored", writers), saved.GetSnapshotId()))
	for path, words := range map[string][]string{
		"/healthz": {"ok"},
		"/status": {`"kind":"backup"`, `"name":"saved"`, `"phase":"succeeded"`, `"backupSummary":{"snapshotID":"`,
			`"kind":"restore","name":"restored","volume":"` + restored.GetVolumeId(), `"restoreSummary":{"totalFiles":`},
		"/metrics": {"csi_plugin_operations_seconds", `abaca_mover_ended_total{kind="backup",repository="offsite",result="succeeded"} 1`,
			`abaca_build_info{goversion="go`},
	} {
		resp, err := http.Get("http://127.0.0.1:39471" + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		for _, w := range words {
			if err != nil || !strings.Contains(string(b), w) {
				t.Errorf("%s lacks %q: %v\n%.2000s", path, w, err, b)
			}
		}
	}
}
