//go:build linux && servers

package mover

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/restic"
	trees "github.com/abaca-csi/abaca/test/tree"
)

// These tests run the real restic on what the machine of e2e/vm/servers serves: a
// btrfs at export, with the share "live", read-only btrfs snapshots of it in
// .snapshot, and an empty share "fresh" to restore into. As on a storage system,
// each snapshot has a device number of its own.
const export = "/srv/share"

// protocol is a way to that file system.
type protocol struct {
	whole    mount.Source
	snapshot func(name string) mount.Source
	// read is how many bytes of files have come from the server, by the mount at
	// dir or by any.
	read func(t *testing.T, dir string) int64
	// settle ends the making of the share.
	settle func(t *testing.T)
	// unseen says that change times tell nothing, so that a change is overlooked
	// that leaves the size and the modification time as they were.
	unseen bool
	// renumbers says that all directories are written again for their new inode
	// numbers.
	renumbers bool
	// onServer says that what is restored is compared there, and not as the
	// protocol shows it.
	onServer bool
	// lost says what the protocol does not carry.
	lost func(trees.Difference) bool
}

func below(src mount.Source, path string) mount.Source {
	src.Path = path
	return src
}

func (p protocol) test(t *testing.T) {
	if os.Getenv("ABACA_TEST_VM") == "" {
		t.Skip("needs the machine of e2e/vm: make e2e-nfs")
	}
	sh(t, `cd "$1"; mkdir -p .snapshot
		for v in .snapshot/* live fresh; do if [ -e "$v" ]; then btrfs -q subvolume delete "$v"; fi; done
		btrfs -q subvolume create live; btrfs -q subvolume create fresh; mkdir -p "$2"`, export, Dir)
	s := newSite(t)
	s.env.Dir = Dir
	place := func(src mount.Source, dir string, readOnly bool) (remove func()) {
		t.Helper()
		if err := s.env.Mounts.Mount(t.Context(), src, dir, readOnly, nil); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := s.env.Mounts.Unmount(t.Context(), dir); err != nil {
				t.Error(err)
			}
		}
	}
	const data, pod = Dir + "/data", "/run/abaca/pod"
	// A pod uses the share all the time.
	defer place(below(p.whole, "live"), pod, false)()
	if err := trees.Build(t.Context(), pod, trees.Options{Files: 300}); err != nil {
		t.Fatal(err)
	}
	sh(t, `cd "$1"; mkdir few; echo a >few/changed; echo b >few/deleted; head -c 3000000 /dev/urandom >few/later
		head -c 2000 /dev/zero >few/sly; touch -d '2001-02-03 04:05:06.1234567' few/sly
		mkdir links; head -c 100000 /dev/urandom >links/0; for i in 1 2 3 4 5; do ln links/0 links/$i; done`, pod)
	p.settle(t)

	cut := func(name string) {
		sh(t, `sync; btrfs -q subvolume snapshot -r "$1/live" "$1/.snapshot/$2"`, export, name)
	}
	at := backupTask().Backup.Time
	// backup also returns how many bytes were read from the server.
	backup := func(name string) (*restic.BackupSummary, int64) {
		t.Helper()
		task := backupTask()
		task.Backup.Backup = name
		at = at.Add(time.Hour)
		task.Backup.Time, task.Source = at, p.snapshot(name)
		defer place(task.Source, data, true)()
		before := p.read(t, data)
		r := Run(t.Context(), task, s.env)
		if r.Error != "" {
			t.Fatalf("%+v", r)
		}
		read := p.read(t, data) - before
		t.Logf("%s: %d bytes read, %+v", name, read, *r.Backup)
		return r.Backup, read
	}
	// directories is what it may cost that some, or all, are written again: the
	// top for the description, and those with hard links, with which the numbers
	// of their devices are stored.
	directories := int64(24 << 10)

	cut("one")
	first, read := backup("one")
	if first.FilesNew != first.TotalFiles || read < 5<<20 {
		t.Errorf("first: %d bytes read, %+v", read, first)
	}
	if p.renumbers {
		directories += 1000 * (first.TotalFiles + first.TotalDirs)
	}
	cut("two")
	second, read := backup("two")
	// The description is always written anew.
	if read != 0 {
		t.Errorf("%d bytes of what has not changed were read", read)
	}
	if second.FilesUnmodified < first.TotalFiles-1 || second.DataAdded > directories {
		t.Errorf("unchanged: %+v", second)
	}

	sh(t, `cd "$1/few"; cat later >/dev/null; echo more >>changed; echo new >new; rm deleted
		printf x | dd of=sly bs=1 seek=1000 conv=notrunc status=none; touch -d '2001-02-03 04:05:06.1234567' sly`, pod)
	cut("three")
	sh(t, `cd "$1/few"; printf x | dd of=later bs=1 seek=1000 conv=notrunc status=none; echo later >>changed`, pod)
	want, changed := int64(len("a\nmore\n")+len("new\n")), int64(1)
	if !p.unseen {
		want, changed = want+2000, changed+1
	}
	third, read := backup("three")
	if read != want {
		t.Errorf("%d bytes were read, not the %d of what has changed", read, want)
	}
	if third.FilesNew != 1 || third.FilesChanged < changed || third.FilesChanged > changed+1 || third.DataAdded > want+directories {
		t.Errorf("changed: %+v", third)
	}

	task := restoreTask()
	task.Restore.Backup = "three"
	task.Source = below(p.whole, "fresh")
	remove := place(task.Source, data, false)
	if r := Run(t.Context(), task, s.env); r.Error != "" {
		t.Fatalf("%+v", r)
	}
	remove()
	a, b := export+"/.snapshot/three", export+"/fresh"
	if !p.onServer {
		// Anew, so that nothing comes from a cache.
		a, b = "/run/abaca/three", "/run/abaca/fresh"
		defer place(p.snapshot("three"), a, true)()
		defer place(task.Source, b, true)()
	}
	differences, err := trees.Compare(t.Context(), a, b)
	if err != nil {
		t.Fatal(err)
	}
	missed := false
	for _, d := range differences {
		if p.unseen && d.Path == "few/sly" && d.What == "contents" {
			missed = true
		} else if !p.lost(d) {
			t.Error(d)
		}
	}
	if missed != p.unseen {
		t.Error("change times tell something after all: say so in docs/mounting.md")
	}
	if err := s.client.Check(t.Context(), restic.CheckRequest{}); err != nil {
		t.Error(err)
	}
}

// number is the sum of the numbers in the lines of a statistic that match.
func number(t *testing.T, text, pattern string) (sum int64) {
	t.Helper()
	found := regexp.MustCompile("(?m)"+pattern).FindAllStringSubmatch(text, -1)
	if len(found) == 0 {
		t.Fatalf("no %q in\n%s", pattern, text)
	}
	for _, m := range found {
		n, err := strconv.ParseInt(m[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += n
	}
	return sum
}

// readNFS is what /proc/self/mountstats calls the bytes that READ has got.
func readNFS(t *testing.T, dir string) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountstats")
	if err != nil {
		t.Fatal(err)
	}
	_, mine, ok := strings.Cut(string(text), " mounted on "+dir+" with fstype nfs")
	if !ok {
		t.Fatalf("no %s in\n%s", dir, text)
	}
	mine, _, _ = strings.Cut(mine, "\ndevice ")
	return number(t, mine, `^\s*bytes:\s+(?:\d+ ){4}(\d+) `)
}

// readCIFS counts for all mounts.
func readCIFS(t *testing.T, _ string) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/fs/cifs/Stats")
	if err != nil {
		t.Fatal(err)
	}
	return number(t, string(text), `^Bytes read: (\d+)`)
}

func TestNFS(t *testing.T) {
	// What is there by other means: all that backups like to lose.
	odd := func(t *testing.T) {
		if err := trees.Odd(t.Context(), export+"/live/odd", 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	for vers, p := range map[string]protocol{
		"vers=3": {
			whole: mount.Source{Locations: []string{"127.0.0.1:" + export}},
			// It has no extended attributes, and times from 1970 on only.
			lost: func(d trees.Difference) bool {
				return d.What == "time" && d.A < "1970" || d.What == "xattr" && !strings.Contains(d.A, "system.")
			},
		},
		"vers=4.2": {
			whole: mount.Source{Locations: []string{"127.0.0.1:/share"}},
			// It has those of users, and ACLs.
			lost: func(d trees.Difference) bool {
				return d.What == "xattr" && (strings.Contains(d.A, "trusted.") || strings.Contains(d.A, "security."))
			},
		},
	} {
		t.Run(vers, func(t *testing.T) {
			p.whole.Protocol, p.whole.Options = "nfs", []string{vers}
			p.snapshot = func(name string) mount.Source { return below(p.whole, ".snapshot/"+name) }
			p.read, p.settle, p.onServer = readNFS, odd, true
			p.test(t)
		})
	}
}

// Samba shows the modification time as the time of the last change too.
func TestCIFS(t *testing.T) {
	p := protocol{
		whole: mount.Source{Protocol: "cifs", Locations: []string{"//127.0.0.1/share"}}, read: readCIFS, unseen: true,
		// The kernel closes a file late (closetimeo=1), and then sets its time.
		settle: func(*testing.T) { time.Sleep(3 * time.Second) },
		// A listing of a directory does not say what has several names.
		lost: func(d trees.Difference) bool { return d.What == "hard links" },
	}
	t.Run("in the share", func(t *testing.T) {
		p := p
		p.snapshot = func(name string) mount.Source { return below(p.whole, ".snapshot/"+name) }
		p.renumbers = true
		p.test(t)
	})
	t.Run("at a place of its own", func(t *testing.T) {
		p := p
		p.snapshot = func(name string) mount.Source {
			return mount.Source{Protocol: "cifs", Locations: []string{"//127.0.0.1/" + name}, Options: []string{mount.Immutable}}
		}
		p.test(t)
	})
}
