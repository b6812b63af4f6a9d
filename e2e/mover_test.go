package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// deadly is a restic program that kills the mover which runs it, at points that
// a test names: before or after one of restic's commands.
type deadly struct {
	t    *testing.T
	path string // of the program
	dir  string // with its orders, and what movers have run
}

func (s *site) deadly() *deadly {
	s.t.Helper()
	k := &deadly{s.t, s.path("deadly", "restic"), s.path("deadly")}
	s.write("deadly/restic", fmt.Sprintf(`#!/bin/sh
real=%s dir=%s
grep -qz '^mover$' /proc/$PPID/cmdline || exec "$real" "$@"
for command; do case $command in -*) ;; *) break ;; esac; done
die() {
	[ "$command $1" = "$(head -n 1 "$dir/orders" 2>/dev/null)" ] || return
	sed -i 1d "$dir/orders"
	kill -9 $PPID
	exit 1
}
echo "$command" >>"$dir/run"
die before
"$real" "$@"
code=$?
die after
exit $code
`, restic, k.dir))
	if err := os.Chmod(k.path, 0o755); err != nil {
		s.t.Fatal(err)
	}
	return k
}

// order says where the next movers die.
func (k *deadly) order(points ...string) {
	k.t.Helper()
	if err := os.WriteFile(filepath.Join(k.dir, "orders"), []byte(strings.Join(points, "\n")+"\n"), 0o600); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(k.dir, "run")); err != nil && !os.IsNotExist(err) {
		k.t.Fatal(err)
	}
}

// left are the points that no mover has come to.
func (k *deadly) left() string {
	b, _ := os.ReadFile(filepath.Join(k.dir, "orders"))
	return strings.TrimSpace(string(b))
}

// run returns restic's commands that movers have run, each once.
func (k *deadly) run() []string {
	b, _ := os.ReadFile(filepath.Join(k.dir, "run"))
	all := strings.Fields(string(b))
	slices.Sort(all)
	return slices.Compact(all)
}

// TestMoverKilledAtEveryPoint kills the mover before and after each command of
// restic that it runs: in the first backup of a repository, in a later one, in
// the recovery after a death, and in a restore. The request that is repeated
// must end as if nothing had happened.
func TestMoverKilledAtEveryPoint(t *testing.T) {
	s := newSite(t)
	k := s.deadly()
	d := s.start("--restic", k.path)
	data := d.volume(volumeRequest("data", writers))
	live := d.publish(data, writers)
	put(t, live, "file", "kept\n")
	put(t, live, "other", strings.Repeat("also kept\n", 1000))
	d.unpublish(data)

	backups, points := 0, 0
	backup := func(point ...string) {
		t.Helper()
		backups++
		points += len(point)
		k.order(point...)
		saved, err := d.trySnapshot(backupRequest(fmt.Sprint("backup ", backups), data.GetVolumeId()))
		if err != nil || saved.GetSourceVolumeId() != data.GetVolumeId() {
			t.Errorf("killed %q: %v, %v", point, saved, err)
		}
		if left := k.left(); left != "" {
			t.Errorf("killed %q: no mover came to %q", point, left)
		}
		want := fmt.Sprintf("1 shares, 0 snapshots (0 temporary), 1 exports, %d backups, 0 movers, 0 locks", backups)
		d.settle(want)
		if got := s.inventory(); got != want {
			t.Errorf("killed %q: there is %s, want %s", point, got, want)
		}
		s.noDoubles()
	}
	both := func(commands []string, kill func(point string)) {
		for _, command := range commands {
			for _, when := range []string{"before", "after"} {
				kill(command + " " + when)
			}
		}
	}

	// The first one makes the repository.
	fresh := func() {
		d.stop(syscall.SIGTERM)
		for _, dir := range []string{s.path("offsite"), s.path("backend", "state", "repositories")} {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
		backups = 0
		d = s.start("--restic", k.path)
	}
	backup()
	first := k.run()
	both(first, func(point string) { fresh(); backup(point) })
	backup()
	later := k.run()
	both(later, func(point string) { backup(point) })
	for _, point := range []string{"unlock after", "repair after", "forget before", "forget after"} {
		backup("backup after", point) // before the mover could say that it ended
	}
	if !slices.Contains(first, "init") || !slices.Contains(later, "backup") {
		t.Errorf("movers ran %v and %v", first, later)
	}

	saved := d.snapshot(backupRequest("backup 1", data.GetVolumeId()))
	restores := 0
	restore := func(point ...string) {
		t.Helper()
		restores++
		points += len(point)
		k.order(point...)
		v, err := d.tryVolume(fromSnapshot(volumeRequest(fmt.Sprint("restored ", restores), writers), saved.GetSnapshotId()))
		if err != nil {
			t.Errorf("killed %q: %v", point, err)
			return
		}
		if left := k.left(); left != "" {
			t.Errorf("killed %q: no mover came to %q", point, left)
		}
		if dir := d.publish(v, writers); get(t, dir, "file") != "kept\n" || len(get(t, dir, "other")) != 10000 {
			t.Errorf("killed %q: the volume is not complete", point)
		}
		d.unpublish(v)
		d.deleteVolume(v.GetVolumeId())
		want := fmt.Sprintf("1 shares, 0 snapshots (0 temporary), 1 exports, %d backups, 0 movers, 0 locks", backups)
		d.settle(want)
		if got := s.inventory(); got != want {
			t.Errorf("killed %q: there is %s, want %s", point, got, want)
		}
	}
	restore()
	both(k.run(), func(point string) { restore(point) })
	if out, err := s.restic("check", "--read-data"); err != nil {
		t.Errorf("restic check: %v\n%s", err, out)
	}
	t.Logf("%d points; first backup: %v, later: %v, restore: %v", points, first, later, k.run())
	if _, err := d.DeleteVolume(d.ctx(), &csi.DeleteVolumeRequest{VolumeId: data.GetVolumeId()}); err != nil {
		t.Error(err)
	}
}
