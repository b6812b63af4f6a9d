package e2e

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/local"
)

// The seventh promise: one tenant can neither name nor read another's share,
// snapshot, backup or repository. What a tenant can choose are the contents of
// its shares and of a repository that it may write to; a forged handle or
// context is what one would need to get further.

// TestForgedNames: nothing that a request says beside the handle is believed,
// and a handle names an object that a user was given or nothing.
func TestForgedNames(t *testing.T) {
	s := newSite(t)
	d := s.start()
	mine, theirs := d.volume(volumeRequest("mine", writers)), d.volume(volumeRequest("theirs", writers))
	put(t, d.publish(mine, writers), "file", "mine\n")
	put(t, d.publish(theirs, writers), "file", "theirs\n")
	d.unpublish(mine)
	snap := d.snapshot(snapshotRequest("snap", theirs.GetVolumeId()))
	myRef := d.volume(fromSnapshot(volumeRequest("ref", readers), d.snapshot(snapshotRequest("my snap", mine.GetVolumeId())).GetSnapshotId()))

	b, err := local.Open(context.Background(), local.Options{Path: s.path("backend"), Size: imageSize, Node: nodeID})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	_, share, _ := strings.Cut(theirs.GetVolumeId(), "/")
	temporary, err := b.CreateSnapshot(context.Background(), backend.CreateSnapshotRequest{Name: "backup/x", ShareID: share, Role: backend.RoleTemporary})
	if err != nil {
		t.Fatal(err)
	}
	draft, err := b.CreateShare(context.Background(), backend.CreateShareRequest{Name: "draft", MinSize: mib, Role: backend.RoleUser, Draft: true})
	if err != nil {
		t.Fatal(err)
	}
	hidden, err := b.CreateShare(context.Background(), backend.CreateShareRequest{Name: "hidden", MinSize: mib, Role: backend.RoleTemporary})
	if err != nil {
		t.Fatal(err)
	}

	// Contexts.
	export, err := json.Marshal(backend.Export{Target: backend.Target{ShareID: share}, Protocol: "bind",
		Locations: []string{s.path("backend", "mnt", "shares", share)}})
	if err != nil {
		t.Fatal(err)
	}
	forged := map[string]string{"export": string(export), "location": s.path("backend", "mnt", "shares", share), "shareID": share}
	staging, target := s.path("staging"), s.path("target")
	if _, err := d.NodeStageVolume(d.ctx(), &csi.NodeStageVolumeRequest{VolumeId: mine.GetVolumeId(), StagingTargetPath: staging,
		VolumeCapability: capability(writers), VolumeContext: forged, PublishContext: forged}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.NodePublishVolume(d.ctx(), &csi.NodePublishVolumeRequest{VolumeId: mine.GetVolumeId(), StagingTargetPath: staging,
		TargetPath: target, VolumeCapability: capability(writers), VolumeContext: forged, PublishContext: forged}); err != nil {
		t.Fatal(err)
	}
	if got := get(t, target, "file"); got != "mine\n" {
		t.Errorf("with a forged context the volume holds %q", got)
	}

	// Handles of volumes.
	_, consumer, _ := strings.Cut(myRef.GetVolumeId(), "#")
	for handle, code := range map[string]codes.Code{
		"local/../snapshots/x":                      codes.NotFound,
		"local/" + share + "/..":                    codes.NotFound,
		"local/" + hidden.ID:                        codes.NotFound,
		"local/" + draft.ID:                         codes.Aborted,
		"other/" + share:                            codes.InvalidArgument, // here the controller need not tell
		"local/" + share + "\x00":                   codes.NotFound,
		snap.GetSnapshotId() + "#" + consumer:       codes.NotFound, // held by nobody of that name
		"local/@" + temporary.ID + "#" + consumer:   codes.NotFound,
		"local/@" + temporary.ID + "#backup-" + "x": codes.NotFound,
	} {
		c := capability(writers)
		if strings.Contains(handle, "@") {
			c = capability(readers)
		}
		_, err := d.NodeStageVolume(d.ctx(), &csi.NodeStageVolumeRequest{VolumeId: handle, StagingTargetPath: s.path("s2"), VolumeCapability: c,
			VolumeContext: forged, PublishContext: forged})
		wantCode(t, err, code)
		_, err = d.CreateVolume(d.ctx(), fromVolume(volumeRequest("stolen", readers), handle))
		if err == nil {
			t.Errorf("a volume was made from %q", handle)
		}
	}
	// Handles of snapshots and backups.
	for _, handle := range []string{
		"local/@" + temporary.ID, "local/@../" + temporary.ID, "local/@" + strings.ToUpper(temporary.ID),
		"backup/../repositories/x", "backup/offsite/..", "backup/offsite/" + strings.Repeat("a", 26), "backup/elsewhere/" + strings.Repeat("a", 26),
	} {
		for _, mode := range []csi.VolumeCapability_AccessMode_Mode{readers, writers} {
			if v, err := d.CreateVolume(d.ctx(), fromSnapshot(volumeRequest("stolen", mode), handle)); err == nil {
				t.Errorf("a volume was made from %q: %v", handle, v)
			}
		}
		if r, err := d.ListSnapshots(d.ctx(), &csi.ListSnapshotsRequest{SnapshotId: handle}); err == nil && len(r.GetEntries()) > 0 {
			t.Errorf("%q is listed: %v", handle, r)
		}
	}
	all, err := d.ListSnapshots(d.ctx(), &csi.ListSnapshotsRequest{SourceVolumeId: mine.GetVolumeId()})
	if err != nil || len(all.GetEntries()) != 1 || all.GetEntries()[0].GetSnapshot().GetSourceVolumeId() != mine.GetVolumeId() {
		t.Errorf("the snapshots of one volume are %v, %v", all, err)
	}
	// Repositories.
	for _, name := range []string{"../offsite", "offsite/../offsite", "/etc", "..", "."} {
		req := backupRequest("stolen", mine.GetVolumeId())
		req.Parameters["repository"] = name
		_, err := d.CreateSnapshot(d.ctx(), req)
		wantCode(t, err, codes.InvalidArgument)
	}
	for _, path := range []string{target, staging} {
		if _, err := d.NodeUnpublishVolume(d.ctx(), &csi.NodeUnpublishVolumeRequest{VolumeId: mine.GetVolumeId(), TargetPath: path}); err != nil {
			t.Error(err)
		}
	}
	d.unpublish(theirs)
}

// TestHostileContents: a tenant fills its share, and a repository that it may
// write to, with what leads elsewhere.
func TestHostileContents(t *testing.T) {
	s := newSite(t)
	d := s.start()
	outside := s.path("outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, outside, "secret", "of another tenant\n")
	mine := d.volume(volumeRequest("mine", writers))
	live := d.publish(mine, writers)
	for _, link := range []string{"link", "data", "volume.json"} {
		if err := os.Symlink(outside, filepath.Join(live, link)); err != nil {
			t.Fatal(err)
		}
	}
	put(t, live, "file", "mine\n")
	d.unpublish(mine)
	saved := d.snapshot(backupRequest("saved", mine.GetVolumeId()))
	if out, err := s.restic("ls", "latest", "--json"); err != nil || strings.Contains(out, "secret") {
		t.Errorf("the backup has gone through a link: %v\n%s", err, out)
	}
	restored := d.volume(fromSnapshot(volumeRequest("restored", writers), saved.GetSnapshotId()))
	dir := d.publish(restored, writers)
	if to, err := os.Readlink(filepath.Join(dir, "link")); err != nil || to != outside {
		t.Errorf("the link leads to %q: %v", to, err)
	}
	d.unpublish(restored)

	// Whoever has the password can write any restic snapshot. Its top is what a
	// restore is put under.
	craft := s.path("craft")
	victim := s.path("victim")
	if err := os.Mkdir(victim, 0o755); err != nil {
		t.Fatal(err)
	}
	id := strings.TrimPrefix(saved.GetSnapshotId(), "backup/offsite/")
	for name, make := range map[string]func(dir string) error{
		"data is a link":   func(dir string) error { return os.Symlink(victim, filepath.Join(dir, "data")) },
		"data is a file":   func(dir string) error { return os.WriteFile(filepath.Join(dir, "data"), []byte("x"), 0o644) },
		"there is no data": func(dir string) error { return os.Symlink(victim, filepath.Join(dir, "volume.json")) },
	} {
		at := filepath.Join(craft, strings.ReplaceAll(name, " ", "-"))
		if err := os.MkdirAll(at, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := make(at); err != nil {
			t.Fatal(err)
		}
		if out, err := s.restic("forget", "--tag", "abaca.backup="+id, "--unsafe-allow-remove-all"); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		args := []string{"backup", "--host", "x", "--tag", "abaca.backup=" + id, "--tag", "abaca.volume=" + mine.GetVolumeId(), "--"}
		if out, err := s.resticIn(at, append(args, ls(at)...)...); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		// Calls go on as an orchestrator's would, for a while.
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
			resp, err := d.CreateVolume(d.ctx(), fromSnapshot(volumeRequest("r "+name, writers), saved.GetSnapshotId()))
			if err == nil {
				t.Errorf("%s: it became %v", name, resp)
				break
			}
			if !retryable(err) {
				break
			}
		}
		if left := ls(victim); len(left) > 0 {
			t.Errorf("%s: the restore has written %v outside of its volume", name, left)
		}
	}
	d.settle("2 shares, 0 snapshots (0 temporary), 2 exports, 1 backups, 0 movers, 0 locks")
}

func ls(dir string) (names []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
