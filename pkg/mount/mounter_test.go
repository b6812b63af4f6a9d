//go:build linux

package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// scratch is an empty tmpfs in which a test may mount what it likes.
func scratch(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts with the real kernel: needs root")
	}
	dir := t.TempDir()
	must(t, unix.Mount("abaca-test", dir, "tmpfs", 0, "size=16m,mode=755"))
	must(t, unix.Mount("", dir, "", unix.MS_PRIVATE, ""))
	t.Cleanup(func() {
		for i := 0; i < 10; i++ {
			points, err := New().Below(dir)
			must(t, err)
			for _, p := range points {
				_ = unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			}
			if len(points) == 0 {
				return
			}
		}
		t.Errorf("mounts are left below %s", dir)
	})
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantIs checks that err wraps want (nil: no error) and none of the sentinels
// besides.
func wantIs(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error = %v, want %v", err, want)
	}
	for _, s := range []error{ErrNotMounted, ErrOther, ErrWritable, ErrCorrupted, ErrInvalid, ErrNoSource} {
		if s != want && errors.Is(err, s) {
			t.Fatalf("error = %v, which is also %v", err, s)
		}
	}
}

// share makes a directory with one file, "file".
func share(t *testing.T, path string) Source {
	t.Helper()
	must(t, os.MkdirAll(path, 0o755))
	must(t, os.WriteFile(filepath.Join(path, "file"), []byte("data"), 0o644))
	return Source{Protocol: "bind", Locations: []string{path}}
}

// at returns the mountinfo entries of a path.
func at(t *testing.T, path string) []*mountinfo.Info {
	t.Helper()
	tab, err := readTable()
	must(t, err)
	return slices.DeleteFunc(tab.all, func(e *mountinfo.Info) bool { return e.Mountpoint != path })
}

// wantMounts checks how many mounts are stacked at path, and the options of all.
func wantMounts(t *testing.T, path string, n int, options ...string) {
	t.Helper()
	got := at(t, path)
	if len(got) != n {
		t.Fatalf("%d mounts at %s, want %d", len(got), path, n)
	}
	for _, e := range got {
		for _, o := range options {
			if !has(e, o) {
				t.Fatalf("mount at %s has %s, want %s", path, e.Options, o)
			}
		}
	}
}

// wantClosed checks that nothing can be written through dir.
func wantClosed(t *testing.T, dir string) {
	t.Helper()
	for what, err := range map[string]error{
		"create": os.WriteFile(filepath.Join(dir, "new"), nil, 0o644),
		"open":   os.WriteFile(filepath.Join(dir, "file"), nil, 0o644),
		"remove": os.Remove(filepath.Join(dir, "file")),
		"chmod":  os.Chmod(filepath.Join(dir, "file"), 0o777),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Fatalf("%s through a read-only mount: %v, want EROFS", what, err)
		}
	}
}

func bindByHand(t *testing.T, from, to string) {
	t.Helper()
	must(t, os.MkdirAll(to, 0o755))
	must(t, unix.Mount(from, to, "", unix.MS_BIND, ""))
}

// both runs a test with the new system calls and without.
func both(t *testing.T, test func(t *testing.T, m *Mounter, dir string)) {
	for _, classic := range []bool{false, true} {
		t.Run(fmt.Sprintf("classic=%t", classic), func(t *testing.T) {
			dir := scratch(t)
			m := New()
			m.classic, m.patience = classic, 200*time.Millisecond
			test(t, m, dir)
		})
	}
}

func TestMount(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		ctx := t.Context()
		src := share(t, dir+"/share")
		for i := range 3 {
			must(t, m.Mount(ctx, src, dir+"/a/b/rw", false, nil))
			must(t, m.Mount(ctx, src, dir+"/a/b/ro", true, nil))
			wantMounts(t, dir+"/a/b/rw", 1, "rw")
			wantMounts(t, dir+"/a/b/ro", 1, "ro", "noatime")
			wantClosed(t, dir+"/a/b/ro")
			must(t, os.WriteFile(dir+"/a/b/rw/new", []byte{byte(i)}, 0o644))
			if got, err := os.ReadFile(dir + "/a/b/ro/new"); err != nil || got[0] != byte(i) {
				t.Fatalf("read through the read-only mount: %v, %v", got, err)
			}
			must(t, m.Prove(ctx, dir+"/a/b/ro", src, true))
			must(t, m.Prove(ctx, dir+"/a/b/rw", src, false))
			wantIs(t, m.Prove(ctx, dir+"/a/b/rw", src, true), ErrWritable)
			must(t, m.Check(ctx, dir+"/a/b/ro"))
			must(t, os.Remove(dir+"/a/b/rw/new"))
		}
		if info, err := os.Stat(dir + "/a"); err != nil || info.Mode().Perm() != 0o750 {
			t.Fatalf("parent has mode %v, %v", info.Mode(), err)
		}
		for range 2 {
			must(t, m.Unmount(ctx, dir+"/a/b/rw"))
			must(t, m.Unmount(ctx, dir+"/a/b/ro"))
			wantMounts(t, dir+"/a/b/rw", 0)
			wantMounts(t, dir+"/a/b/ro", 0)
		}
		if left, err := os.ReadDir(dir + "/a/b"); err != nil || len(left) != 0 {
			t.Fatalf("left behind: %v, %v", left, err)
		}
		if _, err := os.Stat(src.Locations[0] + "/file"); err != nil {
			t.Fatal(err)
		}
	})
}

// No other process ever finds the target writable, not even for a moment.
func TestMountReadOnlyIsNeverWritable(t *testing.T) {
	dir := scratch(t)
	m, src, target := New(), share(t, dir+"/share"), dir+"/target"
	stop := make(chan struct{})
	var through, tries int
	var group sync.WaitGroup
	group.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			fd, err := unix.Open(target+"/file", unix.O_WRONLY, 0)
			if err == nil {
				through++
				unix.Close(fd)
			} else if err == unix.EROFS {
				tries++
			}
		}
	})
	for range 300 {
		must(t, m.Mount(t.Context(), src, target, true, nil))
		must(t, m.Unmount(t.Context(), target))
	}
	close(stop)
	group.Wait()
	if through > 0 || tries == 0 {
		t.Fatalf("written through %d times, refused %d times", through, tries)
	}
}

// A process that is killed between bind and remount leaves a writable mount.
func TestMountRepairs(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		src, target := share(t, dir+"/share"), dir+"/target"
		bindByHand(t, src.Locations[0], target)
		wantIs(t, m.Prove(t.Context(), target, src, true), ErrWritable)
		must(t, m.Mount(t.Context(), src, target, true, []string{"nosuid", "nodev"}))
		wantMounts(t, target, 1, "ro", "nosuid", "nodev", "noatime")
		wantClosed(t, target)

		must(t, m.Mount(t.Context(), src, target, true, []string{"noexec"}))
		wantMounts(t, target, 1, "ro", "noexec", "nosuid", "nodev")

		// Somebody has a file open for writing.
		busy := dir + "/busy"
		bindByHand(t, src.Locations[0], busy)
		f, err := os.OpenFile(busy+"/file", os.O_WRONLY, 0)
		must(t, err)
		defer f.Close()
		wantIs(t, m.Mount(t.Context(), src, busy, true, nil), ErrWritable)
		wantMounts(t, busy, 1, "rw")
	})
}

func TestMountRefuses(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		ctx := t.Context()
		src, target := share(t, dir+"/share"), dir+"/target"

		t.Run("invalid", func(t *testing.T) {
			for name, c := range map[string]struct {
				src      Source
				dir      string
				readOnly bool
				flags    []string
				hint     string
			}{
				"protocol":        {Source{Protocol: "ftp", Locations: []string{"a:/b"}}, target, false, nil, "bind"},
				"relative source": {Source{Protocol: "bind", Locations: []string{"share"}}, target, false, nil, "absolute"},
				"empty source":    {Source{Protocol: "bind"}, target, false, nil, "absolute"},
				"file":            {Source{Protocol: "bind", Locations: []string{src.Locations[0] + "/file"}}, target, false, nil, "directory"},
				"relative dir":    {src, "target", false, nil, "absolute"},
				"root":            {src, "/", false, nil, "absolute"},
				"unknown flag":    {src, target, false, []string{"nosuid", "vers=4"}, "vers=4"},
				"suid":            {src, target, false, []string{"suid"}, "nosuid"},
				"joined flags":    {src, target, true, []string{"nosuid,rw"}, "nosuid,rw"},
				"rw":              {src, target, true, []string{"rw"}, "contradict"},
				"ro and rw":       {src, target, false, []string{"ro", "rw"}, "contradict"},
				"source rw":       {Source{Protocol: "bind", Locations: src.Locations, Options: []string{"rw"}}, target, true, nil, "contradict"},
				"source ro":       {Source{Protocol: "bind", Locations: src.Locations, Options: []string{"ro"}}, target, false, []string{"rw"}, "contradict"},
				"atime":           {src, target, false, []string{"noatime", "relatime"}, "contradict"},
			} {
				err := m.Mount(ctx, c.src, c.dir, c.readOnly, c.flags)
				if wantIs(t, err, ErrInvalid); !strings.Contains(err.Error(), c.hint) {
					t.Errorf("%s: %v does not say %q", name, err, c.hint)
				}
			}
			if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("the target was made: %v", err)
			}
		})

		t.Run("no source", func(t *testing.T) {
			wantIs(t, m.Mount(ctx, Source{Protocol: "bind", Locations: []string{dir + "/none"}}, target, true, nil), ErrNoSource)
		})

		t.Run("places", func(t *testing.T) {
			must(t, os.Mkdir(dir+"/real", 0o755))
			must(t, os.Symlink(dir+"/real", dir+"/link"))
			must(t, os.Symlink(dir+"/nowhere", dir+"/dangling"))
			must(t, os.WriteFile(dir+"/plain", nil, 0o644))
			for _, place := range []string{"/link", "/dangling", "/plain", "/plain/below"} {
				wantIs(t, m.Mount(ctx, src, dir+place, true, nil), ErrOther)
				wantIs(t, m.Unmount(ctx, dir+place), ErrOther)
			}
			wantMounts(t, dir+"/real", 0)
			// A link to a mount is not a mount.
			bindByHand(t, src.Locations[0], dir+"/real")
			wantIs(t, m.Prove(ctx, dir+"/link", src, false), ErrNotMounted)
			wantIs(t, m.Check(ctx, dir+"/link"), ErrNotMounted)
			wantIs(t, m.Unmount(ctx, dir+"/link"), ErrOther)
			wantMounts(t, dir+"/real", 1)
			// But directories above may be links.
			must(t, os.MkdirAll(dir+"/var/lib", 0o755))
			must(t, os.Symlink("var/lib", dir+"/kubelet"))
			must(t, m.Mount(ctx, src, dir+"/kubelet/pod", true, nil))
			must(t, m.Mount(ctx, src, dir+"/kubelet/pod", true, nil))
			wantMounts(t, dir+"/var/lib/pod", 1, "ro")
			must(t, m.Unmount(ctx, dir+"/kubelet/pod"))
			wantMounts(t, dir+"/var/lib/pod", 0)
		})

		t.Run("other", func(t *testing.T) {
			two := share(t, dir+"/two")
			bindByHand(t, two.Locations[0], dir+"/x")
			wantIs(t, m.Mount(ctx, src, dir+"/x", true, nil), ErrOther)
			wantIs(t, m.Prove(ctx, dir+"/x", src, false), ErrOther)
			wantMounts(t, dir+"/x", 1)

			// The same path in another file system, and the same inode number.
			must(t, os.Mkdir(dir+"/fs", 0o755))
			must(t, unix.Mount("other", dir+"/fs", "tmpfs", 0, ""))
			share(t, dir+"/fs/share")
			bindByHand(t, dir+"/fs/share", dir+"/y")
			wantIs(t, m.Prove(ctx, dir+"/y", src, false), ErrOther)

			// The share was deleted, and another one of its name made.
			old := share(t, dir+"/old")
			must(t, m.Mount(ctx, old, dir+"/z", true, nil))
			must(t, os.RemoveAll(old.Locations[0]))
			wantIs(t, m.Prove(ctx, dir+"/z", old, true), ErrOther)
			wantIs(t, m.Mount(ctx, old, dir+"/z", true, nil), ErrNoSource)
			share(t, dir+"/old")
			wantIs(t, m.Prove(ctx, dir+"/z", old, true), ErrOther)
			wantIs(t, m.Mount(ctx, old, dir+"/z", true, nil), ErrOther)
		})

		t.Run("read-only", func(t *testing.T) {
			must(t, m.Mount(ctx, src, dir+"/ro", true, nil))
			wantIs(t, m.Mount(ctx, src, dir+"/ro", false, nil), ErrOther)
			must(t, m.Mount(ctx, Source{Protocol: "bind", Locations: src.Locations, Options: []string{"ro"}}, dir+"/ro2", false, nil))
			must(t, m.Mount(ctx, src, dir+"/ro3", false, []string{"ro"}))
			wantMounts(t, dir+"/ro2", 1, "ro")
			wantMounts(t, dir+"/ro3", 1, "ro")
			wantIs(t, m.Bind(ctx, dir+"/ro", dir+"/rw", false), ErrInvalid)
			wantIs(t, m.Mount(ctx, Source{Protocol: "bind", Locations: []string{dir + "/ro"}, Options: nil}, dir+"/rw", false, nil), ErrInvalid)
			wantMounts(t, dir+"/rw", 0)
		})

		t.Run("writable below", func(t *testing.T) {
			must(t, os.MkdirAll(src.Locations[0]+"/sub", 0o755))
			must(t, m.Mount(ctx, src, dir+"/n", true, nil))
			must(t, unix.Mount("inner", dir+"/n/sub", "tmpfs", 0, ""))
			wantIs(t, m.Prove(ctx, dir+"/n", src, true), ErrWritable)
			wantIs(t, m.Mount(ctx, src, dir+"/n", true, nil), ErrWritable)
			must(t, unix.Mount("", dir+"/n/sub", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
			must(t, m.Prove(ctx, dir+"/n", src, true))
		})
	})
}

func TestMountFlags(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		src := share(t, dir+"/share")
		for i, flags := range [][]string{
			{"ro"}, {"rw"}, {"noatime"}, {"nodiratime"}, {"relatime"}, {"nosuid"}, {"nodev"}, {"noexec"},
			{"rw", "nosuid", "nodev", "noexec", "noatime", "nodiratime"}, {"ro", "relatime"},
		} {
			target := fmt.Sprint(dir, "/", i)
			for range 2 {
				must(t, m.Mount(t.Context(), src, target, false, flags))
				wantMounts(t, target, 1, flags...)
			}
		}
		must(t, os.WriteFile(src.Locations[0]+"/run", []byte("#!/bin/sh\n"), 0o755))
		must(t, m.Mount(t.Context(), src, dir+"/noexec", true, []string{"noexec"}))
		if err := exec.Command(dir + "/noexec/run").Run(); !errors.Is(err, fs.ErrPermission) {
			t.Fatalf("run from noexec: %v", err)
		}
		// Options of the mount that the source lies on stay.
		must(t, m.Bind(t.Context(), dir+"/noexec", dir+"/bound", true))
		wantMounts(t, dir+"/bound", 1, "ro", "noexec")
	})
}

// Each of the marks of a source counts by itself.
func TestBindIs(t *testing.T) {
	d := &directory{on: &mountinfo.Info{Major: 0, Minor: 40}, root: "/shares/one", dev: 45, ino: 256}
	for name, c := range map[string]struct {
		minor    int
		root     string
		dev, ino uint64
		want     bool
	}{
		"same":    {40, "/shares/one", 45, 256, true},
		"device":  {41, "/shares/one", 45, 256, false},
		"root":    {40, "/shares/two", 45, 256, false},
		"deleted": {40, "/shares/one//deleted", 45, 256, false},
		"st_dev":  {40, "/shares/one", 46, 256, false},
		"st_ino":  {40, "/shares/one", 45, 257, false},
	} {
		top := unix.Stat_t{Dev: c.dev, Ino: c.ino}
		if got := d.is(&mountinfo.Info{Minor: c.minor, Root: c.root}, top); got != c.want {
			t.Errorf("%s: %t, want %t", name, got, c.want)
		}
	}
}

// TestPlaced: where the origin of a bind is not seen, it is known by its place.
func TestPlaced(t *testing.T) {
	dir := scratch(t)
	for _, d := range []string{"snapshots/one", "snapshots/two", "shares/one", "at"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	m, at, ctx := New(Options{Placed: true}), filepath.Join(dir, "at"), context.Background()
	src := func(path string) Source { return Source{Protocol: "bind", Locations: []string{path}} }
	one := src("/elsewhere/snapshots/one")
	wantIs(t, m.Prove(ctx, at, one, true), ErrNotMounted)
	wantIs(t, m.Mount(ctx, one, at, true, nil), ErrNoSource)
	must(t, New().Mount(ctx, src(filepath.Join(dir, "snapshots/one")), at, true, nil))
	wantIs(t, m.Prove(ctx, at, one, true), nil)
	for _, other := range []string{"/elsewhere/snapshots/two", "/elsewhere/shares/one", "/one", "/"} {
		wantIs(t, m.Prove(ctx, at, src(other), true), ErrOther)
	}
	must(t, unix.Unmount(at, 0))
	must(t, New().Mount(ctx, src(filepath.Join(dir, "snapshots/one")), at, false, nil))
	wantIs(t, m.Prove(ctx, at, one, true), ErrWritable)
	wantIs(t, m.Prove(ctx, at, one, false), nil)
}

func TestBind(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		ctx := t.Context()
		src := share(t, dir+"/share")
		must(t, m.Mount(ctx, src, dir+"/stage", false, nil))
		for range 2 {
			must(t, m.Bind(ctx, dir+"/stage", dir+"/pod/rw", false))
			must(t, m.Bind(ctx, dir+"/stage", dir+"/pod/ro", true))
		}
		wantMounts(t, dir+"/pod/rw", 1, "rw")
		wantMounts(t, dir+"/pod/ro", 1, "ro")
		wantClosed(t, dir+"/pod/ro")
		must(t, m.Prove(ctx, dir+"/pod/ro", src, true))
		wantIs(t, m.Bind(ctx, dir+"/share", dir+"/pod/x", true), ErrNotMounted)
		wantIs(t, m.Bind(ctx, dir+"/none", dir+"/pod/x", true), ErrNotMounted)
		wantIs(t, m.Bind(ctx, dir+"/none/none", dir+"/pod/x", true), ErrNotMounted)
		wantIs(t, m.Bind(ctx, "stage", dir+"/pod/x", true), ErrInvalid)
		if _, err := os.Lstat(dir + "/pod/x"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("the target was made: %v", err)
		}
	})
}

func TestUnmount(t *testing.T) {
	dir := scratch(t)
	ctx := t.Context()
	m := New()
	m.patience = 300 * time.Millisecond
	src, two := share(t, dir+"/share"), share(t, dir+"/two")

	t.Run("stacked", func(t *testing.T) {
		target := dir + "/stack"
		bindByHand(t, src.Locations[0], target)
		bindByHand(t, two.Locations[0], target)
		wantIs(t, m.Prove(ctx, target, src, false), ErrOther)
		must(t, m.Prove(ctx, target, two, false))
		bindByHand(t, src.Locations[0], target)
		must(t, m.Prove(ctx, target, src, false))
		must(t, m.Unmount(ctx, target))
		wantMounts(t, target, 0)
		if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("the directory is left: %v", err)
		}
	})
	t.Run("nothing there", func(t *testing.T) {
		must(t, m.Unmount(ctx, dir+"/none"))
		must(t, m.Unmount(ctx, dir+"/none/none"))
		must(t, os.Mkdir(dir+"/empty", 0o755))
		must(t, m.Unmount(ctx, dir+"/empty"))
		wantIs(t, m.Unmount(ctx, "/"), ErrInvalid)
	})
	t.Run("hidden", func(t *testing.T) {
		must(t, os.MkdirAll(dir+"/up/target", 0o755))
		bindByHand(t, src.Locations[0], dir+"/up/target")
		bindByHand(t, two.Locations[0], dir+"/up")
		wantIs(t, m.Check(ctx, dir+"/up/target"), ErrNotMounted)
		must(t, m.Mount(ctx, two, dir+"/up/target", true, nil)) // in two
		must(t, m.Prove(ctx, dir+"/up/target", two, true))
		must(t, m.Unmount(ctx, dir+"/up/target"))
		must(t, m.Unmount(ctx, dir+"/up/target"))
		wantIs(t, m.Unmount(ctx, dir+"/up"), ErrOther)
		must(t, m.Prove(ctx, dir+"/up/target", src, false))
	})
	t.Run("files", func(t *testing.T) {
		share(t, dir+"/full")
		bindByHand(t, src.Locations[0], dir+"/full")
		wantIs(t, m.Unmount(ctx, dir+"/full"), ErrOther)
		wantMounts(t, dir+"/full", 0)
		if _, err := os.Stat(dir + "/full/file"); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("in use", func(t *testing.T) {
		must(t, m.Mount(ctx, src, dir+"/used", true, nil))
		f, err := os.Open(dir + "/used/file")
		must(t, err)
		err = m.Unmount(ctx, dir+"/used")
		if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "process") {
			t.Fatalf("unmount what is in use: %v", err)
		}
		wantMounts(t, dir+"/used", 1)
		// Only for a moment.
		time.AfterFunc(100*time.Millisecond, func() { f.Close() })
		must(t, m.Unmount(ctx, dir+"/used"))
	})
	t.Run("mount below", func(t *testing.T) {
		must(t, os.MkdirAll(src.Locations[0]+"/sub", 0o755))
		must(t, m.Mount(ctx, src, dir+"/outer", false, nil))
		bindByHand(t, two.Locations[0], dir+"/outer/sub")
		if err := m.Unmount(ctx, dir+"/outer"); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "outer/sub") {
			t.Fatalf("unmount with a mount below: %v", err)
		}
		got, err := m.Below(dir + "/outer")
		must(t, err)
		if want := []string{dir + "/outer/sub", dir + "/outer"}; !slices.Equal(got, want) {
			t.Fatalf("Below = %q, want %q", got, want)
		}
		for _, p := range got {
			must(t, m.Unmount(ctx, p))
			must(t, os.MkdirAll(p, 0o755))
		}
	})
	if got, err := m.Below(dir + "/none/none"); err != nil || got != nil {
		t.Fatalf("Below nothing = %q, %v", got, err)
	}
}

func TestPlaces(t *testing.T) {
	dir := scratch(t)
	m, ctx := New(), t.Context()
	src, two := share(t, dir+"/share"), share(t, dir+"/two")
	_, err := m.Places(dir + "/share")
	wantIs(t, err, ErrNotMounted)
	_, err = m.Places(dir + "/none/none")
	wantIs(t, err, ErrNotMounted)
	must(t, m.Mount(ctx, src, dir+"/stage", false, nil))
	must(t, m.Mount(ctx, two, dir+"/other", false, nil))
	must(t, m.Bind(ctx, dir+"/stage", dir+"/b", true))
	must(t, m.Bind(ctx, dir+"/stage", dir+"/a", false))
	bindByHand(t, src.Locations[0], dir+"/a")
	bindByHand(t, two.Locations[0], dir+"/a") // hides it
	for _, place := range []string{"/stage", "/b"} {
		got, err := m.Places(dir + place)
		must(t, err)
		if want := []string{dir + "/a", dir + "/b", dir + "/stage"}; !slices.Equal(got, want) {
			t.Fatalf("Places(%s) = %q, want %q", place, got, want)
		}
	}
}

func TestStats(t *testing.T) {
	dir := scratch(t)
	m := New()
	must(t, m.Mount(t.Context(), share(t, dir+"/share"), dir+"/target", false, nil))
	got, err := m.Stats(t.Context(), dir+"/target")
	must(t, err)
	if got.TotalBytes != 16<<20 || got.UsedBytes == 0 || got.UsedBytes+got.AvailableBytes != got.TotalBytes ||
		got.UsedInodes < 3 || got.UsedInodes+got.AvailableInodes != got.TotalInodes {
		t.Fatalf("Stats = %+v", got)
	}
	_, err = m.Stats(t.Context(), dir+"/share")
	wantIs(t, err, ErrNotMounted)
	_, err = m.Stats(t.Context(), dir+"/none")
	wantIs(t, err, ErrNotMounted)
}

// Names that mountinfo escapes, and names that look like fields of mountinfo.
func TestNames(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		ctx := t.Context()
		for i, name := range []string{
			"a b", "tab\tnew\nline", `back\slash`, `\040`, "#", "a,b", `"quote"`, "\xff\xfe", "-o", "cr\rlf",
			"nbsp\u00a0- x", "\u2003/\u00a0ro", "x//deleted", "(deleted)",
		} {
			src := share(t, fmt.Sprintf("%s/share%d/%s", dir, i, name))
			target := fmt.Sprintf("%s/target%d/%s", dir, i, name)
			for range 2 {
				must(t, m.Mount(ctx, src, target, true, nil))
			}
			wantMounts(t, filepath.Clean(target), 1, "ro")
			must(t, m.Prove(ctx, target, src, true))
			got, err := m.Below(target)
			must(t, err)
			if !slices.Equal(got, []string{filepath.Clean(target)}) {
				t.Fatalf("Below = %q", got)
			}
			must(t, m.Unmount(ctx, target))
		}
	})
}

func TestConcurrent(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		src := share(t, dir+"/share")
		var group sync.WaitGroup
		for i := range 24 {
			group.Go(func() {
				target := fmt.Sprintf("%s/new/%d", dir, i%3)
				if err := m.Mount(t.Context(), src, target, true, nil); err != nil {
					t.Error(err)
				}
				if err := m.Prove(t.Context(), target, src, true); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		for i := range 3 {
			wantMounts(t, fmt.Sprintf("%s/new/%d", dir, i), 1, "ro")
		}
		for i := range 24 {
			group.Go(func() {
				if err := m.Unmount(t.Context(), fmt.Sprintf("%s/new/%d", dir, i%3)); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if left, err := m.Below(dir + "/new"); err != nil || len(left) != 0 {
			t.Fatalf("left: %q, %v", left, err)
		}
		if len(m.calls.running) != 0 {
			t.Fatalf("calls are left: %v", m.calls.running)
		}
	})
}

// Targets lie under shared mounts; what is mounted into a source later does not
// appear in what was mounted from it.
func TestPropagation(t *testing.T) {
	dir := scratch(t)
	m, src := New(), share(t, dir+"/share")
	must(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	must(t, os.Mkdir(dir+"/share/sub", 0o755))
	must(t, os.Mkdir(dir+"/peer", 0o755))
	must(t, os.Mkdir(dir+"/target", 0o755))
	bindByHand(t, dir, dir+"/peer")
	must(t, os.Mkdir(dir+"/share/early", 0o755))
	must(t, unix.Mount("early", dir+"/share/early", "tmpfs", 0, ""))

	must(t, m.Mount(t.Context(), src, dir+"/target", true, nil))
	must(t, m.Prove(t.Context(), dir+"/target", src, true))
	wantMounts(t, dir+"/peer/target", 1, "ro")
	wantClosed(t, dir+"/peer/target")

	must(t, unix.Mount("late", dir+"/share/sub", "tmpfs", 0, ""))
	wantMounts(t, dir+"/target/sub", 0)
	wantMounts(t, dir+"/target/early", 0)
	must(t, m.Prove(t.Context(), dir+"/target", src, true))

	must(t, m.Unmount(t.Context(), dir+"/target"))
	wantMounts(t, dir+"/peer/target", 0)
}

// Subvolumes of btrfs have a device number each, which mountinfo does not show.
func TestBtrfs(t *testing.T) {
	dir := scratch(t)
	for _, tool := range []string{"mkfs.btrfs", "btrfs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	run := func(arg ...string) {
		t.Helper()
		if out, err := exec.Command(arg[0], arg[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", arg, err, out)
		}
	}
	image, err := os.Create(filepath.Join(t.TempDir(), "image"))
	must(t, err)
	must(t, image.Truncate(128<<20))
	must(t, image.Close())
	pool := dir + "/pool"
	must(t, os.Mkdir(pool, 0o755))
	run("mkfs.btrfs", "-q", image.Name())
	run("mount", "-o", "loop", image.Name(), pool)
	must(t, os.Mkdir(pool+"/shares", 0o755))
	run("btrfs", "-q", "subvolume", "create", pool+"/shares/one")
	run("btrfs", "-q", "subvolume", "create", pool+"/shares/two")
	one, two := share(t, pool+"/shares/one"), share(t, pool+"/shares/two")
	run("btrfs", "-q", "subvolume", "snapshot", "-r", one.Locations[0], pool+"/snap")
	snap := Source{Protocol: "bind", Locations: []string{pool + "/snap"}}

	m, ctx := New(), t.Context()
	for _, src := range []Source{one, two, snap} {
		target := dir + "/" + filepath.Base(src.Locations[0])
		for range 2 {
			must(t, m.Mount(ctx, src, target, true, nil))
		}
		wantMounts(t, target, 1, "ro")
		wantClosed(t, target)
		for _, other := range []Source{one, two, snap} {
			err := m.Prove(ctx, target, other, true)
			if other.Locations[0] == src.Locations[0] {
				must(t, err)
			} else {
				wantIs(t, err, ErrOther)
			}
		}
	}
	// The same subvolume by way of another mount of the same file system.
	must(t, os.Mkdir(dir+"/sub", 0o755))
	run("mount", "-o", "subvol=/shares/one", strings.Fields(at(t, pool)[0].Source)[0], dir+"/sub")
	must(t, m.Prove(ctx, dir+"/sub", one, false))
	wantIs(t, m.Prove(ctx, dir+"/sub", one, true), ErrWritable)
	wantIs(t, m.Prove(ctx, dir+"/sub", two, false), ErrOther)
	// Deleted and made again under the same name: the root is the same.
	must(t, m.Unmount(ctx, dir+"/sub"))
	run("btrfs", "-q", "subvolume", "delete", two.Locations[0])
	run("btrfs", "-q", "subvolume", "create", two.Locations[0])
	wantIs(t, m.Prove(ctx, dir+"/two", two, true), ErrOther)
}

func TestContextWithoutDeadlineIsBounded(t *testing.T) {
	var err error
	ctx, end := begin(context.Background(), &err, "test")
	if _, ok := ctx.Deadline(); !ok {
		t.Fatal("no deadline")
	}
	end()
	if ctx.Err() == nil {
		t.Fatal("the context is left")
	}
}
