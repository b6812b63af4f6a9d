package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/local"
)

func commandOf(name string, args ...string) *exec.Cmd { return exec.Command(name, args...) }

// restic runs plain restic on the site's repository.
func (s *site) restic(args ...string) (string, error) { return s.resticIn("", args...) }

// resticIn is restic in a directory.
func (s *site) resticIn(dir string, args ...string) (string, error) {
	cmd := exec.Command(restic, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "RESTIC_REPOSITORY="+s.path("offsite"), "RESTIC_PASSWORD=correct horse", "RESTIC_CACHE_DIR="+s.path("cache"))
	out, err := cmd.Output()
	return string(out), err
}

// inventory counts everything that there is, and adds what is an orphan: what
// lies on the disk and no backend knows.
func (s *site) inventory() string {
	s.t.Helper()
	ctx := context.Background()
	b, err := local.Open(ctx, local.Options{Path: s.path("backend"), Size: imageSize, Node: nodeID})
	if err != nil {
		s.t.Fatal(err)
	}
	defer b.Close()
	shares, _, err1 := b.ListShares(ctx, "", 0)
	snapshots, _, err2 := b.ListSnapshots(ctx, "", 0)
	exports, _, err3 := b.ListExports(ctx, "", 0)
	for _, err := range []error{err1, err2, err3} {
		if err != nil {
			s.t.Fatal(err)
		}
	}
	temporary := 0
	for _, sn := range snapshots {
		if sn.Role == backend.RoleTemporary {
			temporary++
		}
	}
	entries := func(parts ...string) int {
		all, _ := filepath.Glob(s.path(append(parts, "[a-z0-9]*")...)) // no hidden ones
		return len(all)
	}
	orphans := ""
	if n := entries("backend", "mnt", "shares"); n != len(shares) {
		orphans += fmt.Sprintf("; %d subvolumes of shares", n)
	}
	if n := entries("backend", "mnt", "snapshots"); n != len(snapshots) {
		orphans += fmt.Sprintf("; %d subvolumes of snapshots", n)
	}
	return fmt.Sprintf("%d shares, %d snapshots (%d temporary), %d exports, %d backups, %d movers, %d locks",
		len(shares), len(snapshots), temporary, len(exports), entries("offsite", "snapshots"), entries("backend", "state", "movers"), entries("offsite", "locks")) + orphans
}

// noDoubles checks that no backup has two restic snapshots.
func (s *site) noDoubles() {
	s.t.Helper()
	var list []struct{ Tags []string }
	out, err := s.restic("snapshots", "--json", "--no-lock")
	if err == nil {
		err = json.Unmarshal([]byte(out), &list)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, r := range list {
		for _, tag := range r.Tags {
			if strings.HasPrefix(tag, "abaca.backup=") && seen[tag] {
				s.t.Errorf("two restic snapshots bear %s", tag)
			}
			seen[tag] = strings.HasPrefix(tag, "abaca.backup=")
		}
	}
}

// TestKilledAtEveryPoint kills the controller before and after every change
// that a request makes, starts it again, and repeats the same request. It must
// end as if nothing had happened, with one object, and nothing left behind.
func TestKilledAtEveryPoint(t *testing.T) {
	s := newSite(t)
	d := s.start()
	data := d.volume(volumeRequest("data", writers))
	put(t, d.publish(data, writers), "file", "kept\n")
	snap := d.snapshot(snapshotRequest("snap", data.GetVolumeId()))
	saved := d.snapshot(backupRequest("saved", data.GetVolumeId()))
	s.calm()
	d.stop(syscall.SIGTERM)

	volume := func(req *csi.CreateVolumeRequest) operation {
		return operation{
			do: func(d *driver) (string, error) {
				resp, err := d.CreateVolume(d.ctx(), req)
				return resp.GetVolume().GetVolumeId(), err
			},
			undo: func(d *driver, id string) { d.deleteVolume(id) },
		}
	}
	snapshot := func(req *csi.CreateSnapshotRequest) operation {
		return operation{
			do: func(d *driver) (string, error) {
				resp, err := d.CreateSnapshot(d.ctx(), req)
				if err == nil && !resp.GetSnapshot().GetReadyToUse() {
					err = errPending
				}
				return resp.GetSnapshot().GetSnapshotId(), err
			},
			undo: func(d *driver, id string) { d.deleteSnapshot(id) },
		}
	}
	for _, c := range []struct {
		name string
		operation
		deletes bool // what is killed is the undoing
	}{
		{"share", volume(volumeRequest("share", writers)), false},
		{"delete share", volume(volumeRequest("share", writers)), true},
		{"snapshot volume", volume(fromSnapshot(volumeRequest("ref", readers), snap.GetSnapshotId())), false},
		{"view", volume(fromVolume(volumeRequest("view", readers), data.GetVolumeId())), false},
		{"delete view", volume(fromVolume(volumeRequest("view", readers), data.GetVolumeId())), true},
		{"clone of a volume", volume(fromVolume(volumeRequest("clone", writers), data.GetVolumeId())), false},
		{"clone of a snapshot", volume(fromSnapshot(volumeRequest("clone", writers), snap.GetSnapshotId())), false},
		{"restore", volume(fromSnapshot(volumeRequest("restored", writers), saved.GetSnapshotId())), false},
		{"snapshot", snapshot(snapshotRequest("s", data.GetVolumeId())), false},
		{"delete snapshot", snapshot(snapshotRequest("s", data.GetVolumeId())), true},
		{"backup", snapshot(backupRequest("b", data.GetVolumeId())), false},
		{"delete backup", snapshot(backupRequest("b", data.GetVolumeId())), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.t = t
			before := s.inventory()
			with := ""
			points := 0
			for n := 1; ; n++ {
				id := ""
				if c.deletes {
					d := s.start()
					id = c.until(d)
					s.calm() // else it is the finishing that is killed
					d.stop(syscall.SIGTERM)
				}
				d := s.mortal(n)
				var killed bool
				if c.deletes {
					killed = d.survives(func() error { return d.tryDelete(id) }) != nil
				} else {
					killed = d.survives(func() error { _, err := c.do(d); return err }) != nil
				}
				d.stop(syscall.SIGTERM)
				// The next controller, and the same request.
				again := s.start()
				if c.deletes {
					c.undo(again, id)
				} else {
					id = c.until(again)
					s.calm()
					if now := s.inventory(); with == "" {
						with = now
					} else if with != now {
						t.Errorf("killed at point %d, there is %s; before, %s", n, now, with)
					}
					c.undo(again, id)
				}
				again.settle(before)
				again.stop(syscall.SIGTERM)
				if after := s.inventory(); after != before {
					t.Fatalf("killed at point %d, there is left %s; at first there was %s", n, after, before)
				}
				if !killed {
					break
				}
				points = n
			}
			if points < 2 {
				t.Errorf("killed at %d points only", points)
			}
			t.Logf("killed at %d points", points)
		})
	}
	s.t = t
	s.noDoubles()
	last := s.start()
	last.unpublish(data)
	last.stop(syscall.SIGTERM)
	if out, err := s.restic("check"); err != nil {
		t.Errorf("restic check: %v\n%s", err, out)
	}
}

var errPending = fmt.Errorf("not ready")

// operation is one request of a kill test, and how to take it back.
type operation struct {
	do   func(*driver) (id string, err error)
	undo func(*driver, string)
}

// until repeats the request until it is done.
func (o operation) until(d *driver) string {
	d.site.t.Helper()
	ctx := d.ctx()
	for {
		id, err := o.do(d)
		if err == nil {
			return id
		}
		if err != errPending && !retryable(err) || ctx.Err() != nil {
			d.site.t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// survives repeats a request until it is done, or the driver is dead: then it
// returns why.
func (d *driver) survives(do func() error) error {
	for {
		err := do()
		select {
		case <-d.ended:
			return fmt.Errorf("killed: %w", err)
		default:
		}
		if err == nil {
			// What goes on in the background counts too.
			select {
			case <-d.ended:
				return fmt.Errorf("killed afterwards")
			case <-time.After(400 * time.Millisecond):
				return nil
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (d *driver) tryDelete(id string) error {
	if strings.HasPrefix(id, "backup/") || strings.Contains(id, "/@") && !strings.Contains(id, "#") {
		_, err := d.DeleteSnapshot(d.ctx(), &csi.DeleteSnapshotRequest{SnapshotId: id})
		return err
	}
	_, err := d.DeleteVolume(d.ctx(), &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

// calm waits until no mover has a record any more. The record goes after the
// temporary snapshot.
func (s *site) calm() {
	s.t.Helper()
	for range 100 {
		if strings.Contains(s.inventory(), " 0 movers") {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// settle waits until what goes on in the background has led to the inventory.
func (d *driver) settle(want string) {
	for range 50 {
		if d.site.inventory() == want {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
