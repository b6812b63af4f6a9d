package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/abaca-csi/abaca/test/servers"
	"github.com/abaca-csi/abaca/test/tree"
)

// serve puts the repository "offsite" on a server; what the server keeps of it is
// in the directory of that name.
func (s *site) serve(kind string) *servers.Server {
	s.t.Helper()
	var server *servers.Server
	if kind == "S3" {
		if err := os.Symlink(s.path("buckets", "backups"), s.path("offsite")); err != nil {
			s.t.Fatal(err)
		}
		server = servers.Loopback.S3(s.t, "../bin", s.path("buckets"))
	} else {
		server = servers.Loopback.REST(s.t, "../bin", s.path("offsite"))
	}
	server.Folder(s.path("repositories", "offsite"), "correct horse")
	return server
}

// onServers runs a test on each kind of server.
func onServers(t *testing.T, test func(t *testing.T, s *site, server *servers.Server)) {
	for _, kind := range []string{"REST", "S3"} {
		t.Run(kind, func(t *testing.T) {
			s := newSite(t)
			test(t, s, s.serve(kind))
		})
	}
}

// TestServers is the main job with the repository on a server: a backup, a second
// one that costs next to nothing, a restore, and the end of all.
func TestServers(t *testing.T) {
	onServers(t, func(t *testing.T, s *site, server *servers.Server) {
		d := s.start()
		data := d.volume(volumeRequest("data", writers))
		dir := d.publish(data, writers)
		if err := tree.Odd(t.Context(), dir, 8*mib); err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			put(t, dir, fmt.Sprintf("file-%03d", i), strings.Repeat(strconv.Itoa(i), 2000))
		}
		first := d.snapshot(backupRequest("first", data.GetVolumeId()))
		second := d.snapshot(backupRequest("second", data.GetVolumeId()))
		restored := d.volume(fromSnapshot(volumeRequest("restored", writers), first.GetSnapshotId()))
		differences, err := tree.Compare(t.Context(), dir, d.publish(restored, writers))
		if err != nil || len(differences) > 0 {
			t.Errorf("restored with %d differences: %v, %v", len(differences), differences, err)
		}
		d.unpublish(restored)
		d.unpublish(data)
		if out, err := s.restic("check", "--read-data"); err != nil {
			t.Errorf("restic check: %v\n%s", err, out)
		}
		var list []struct {
			Summary struct {
				Changed int64 `json:"files_changed"`
				New     int64 `json:"files_new"`
				Added   int64 `json:"data_added"`
			}
		}
		out, err := s.restic("snapshots", "--json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &list)
		}
		if err != nil || len(list) != 2 {
			t.Fatalf("%v\n%s", err, out)
		}
		// Files with several names are written with the device of their snapshot, and
		// with them the directories that they are in.
		if sum := list[1].Summary; sum.Changed+sum.New > 1 || sum.Added > 100_000 {
			t.Errorf("the second backup of an unchanged volume: %+v", sum)
		}
		d.deleteSnapshot(first.GetSnapshotId())
		d.deleteSnapshot(second.GetSnapshotId())
		d.deleteVolume(restored.GetVolumeId())
		d.deleteVolume(data.GetVolumeId())
		d.settle("0 shares, 0 snapshots (0 temporary), 0 exports, 0 backups, 0 movers, 0 locks")
	})
}

// TestServerDown stops the server first when nothing runs, and then in the middle
// of a backup. It is told, nothing is lost, and nobody has to tidy up.
func TestServerDown(t *testing.T) {
	onServers(t, func(t *testing.T, s *site, server *servers.Server) {
		server.Stop()
		d := s.start()
		data := d.large("data")
		_, err := d.CreateSnapshot(d.ctx(), backupRequest("saved", data.GetVolumeId()))
		wantCode(t, err, codes.Unavailable, "offsite", "host and port")
		server.Start()
		for {
			if _, err = d.CreateSnapshot(d.ctx(), backupRequest("saved", data.GetVolumeId())); err == nil {
				break
			}
			if !retryable(err) {
				t.Fatal(err)
			}
		}
		s.moverOf()
		time.Sleep(500 * time.Millisecond)
		server.Stop()
		time.Sleep(5 * time.Second)
		server.Start()
		d.snapshot(backupRequest("saved", data.GetVolumeId()))
		d.settle("1 shares, 0 snapshots (0 temporary), 1 exports, 1 backups, 0 movers, 0 locks")
		if out, err := s.restic("check", "--read-data"); err != nil {
			t.Errorf("restic check: %v\n%s", err, out)
		}
		s.noDoubles()
	})
}

// TestFullServer fills the server's disk. The reason is told, and when there is
// room again the backup ends well.
func TestFullServer(t *testing.T) {
	for kind, words := range map[string]string{"REST": "507 Insufficient Storage", "S3": "No space left"} {
		t.Run(kind, func(t *testing.T) {
			s := newSite(t)
			dir := s.path("offsite")
			if kind == "S3" {
				dir = s.path("buckets")
			}
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			size := func(flags uintptr, mib string) {
				if err := unix.Mount("small", dir, "tmpfs", flags, "size="+mib+"m"); err != nil {
					t.Fatal(err)
				}
			}
			size(0, "100")
			t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
			s.serve(kind)
			d := s.start()
			data := d.large("data")
			var err error
			for begun := time.Now(); time.Since(begun) < 90*time.Second; time.Sleep(200 * time.Millisecond) {
				if _, err = d.CreateSnapshot(d.ctx(), backupRequest("saved", data.GetVolumeId())); err != nil {
					break
				}
			}
			wantCode(t, err, codes.Unavailable, words)
			size(unix.MS_REMOUNT, "600")
			d.snapshot(backupRequest("saved", data.GetVolumeId()))
			d.settle("1 shares, 0 snapshots (0 temporary), 1 exports, 1 backups, 0 movers, 0 locks")
			if out, err := s.restic("check", "--read-data"); err != nil {
				t.Errorf("restic check: %v\n%s", err, out)
			}
			s.noDoubles()
		})
	}
}

// TestAppendOnly: a server that forbids deletions takes backups, and a deletion
// says why it cannot be.
func TestAppendOnly(t *testing.T) {
	s := newSite(t)
	server := s.serve("REST")
	server.Stop()
	server.Flags = []string{"--append-only"}
	server.Start()
	d := s.start()
	data := d.volume(volumeRequest("data", writers))
	put(t, d.publish(data, writers), "file", "text\n")
	d.unpublish(data)
	for _, name := range []string{"first", "second"} {
		d.snapshot(backupRequest(name, data.GetVolumeId()))
	}
	saved := d.snapshot(backupRequest("first", data.GetVolumeId()))
	_, err := d.DeleteSnapshot(d.ctx(), &csi.DeleteSnapshotRequest{SnapshotId: saved.GetSnapshotId()})
	wantCode(t, err, codes.Unavailable, "append")
	d.settle("1 shares, 0 snapshots (0 temporary), 0 exports, 2 backups, 0 movers, 0 locks")
}

// TestServerRefuses: credentials that the server does not take are named.
func TestServerRefuses(t *testing.T) {
	onServers(t, func(t *testing.T, s *site, server *servers.Server) {
		secret := "RESTIC_REST_PASSWORD"
		if server.Env[secret] == "" {
			secret = "AWS_SECRET_ACCESS_KEY"
		}
		s.write("repositories/offsite/"+secret, "not-this-one")
		d := s.start()
		data := d.volume(volumeRequest("data", writers))
		_, err := d.CreateSnapshot(d.ctx(), backupRequest("saved", data.GetVolumeId()))
		hint := map[string]string{"RESTIC_REST_PASSWORD": "RESTIC_REST_PASSWORD", "AWS_SECRET_ACCESS_KEY": "access key"}[secret]
		wantCode(t, err, codes.Unavailable, "offsite", hint)
		if err != nil && strings.Contains(err.Error(), "not-this-one") {
			t.Errorf("the error tells the secret: %v", err)
		}
		d.settle("1 shares, 0 snapshots (0 temporary), 0 exports, 0 backups, 0 movers, 0 locks")
	})
}
