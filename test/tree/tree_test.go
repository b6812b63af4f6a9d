package tree

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// odd makes an odd tree. It holds everything that Compare must see.
func odd(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes files of other owners, and a device: needs root")
	}
	dir := filepath.Join(t.TempDir(), "odd")
	if err := Odd(t.Context(), dir, 3<<20+17); err != nil {
		t.Fatal(err)
	}
	return dir
}

func compare(t *testing.T, a, b string) []Difference {
	t.Helper()
	found, err := Compare(t.Context(), a, b)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestOddIsTheSameTwice(t *testing.T) {
	a, b := odd(t), odd(t)
	if found := compare(t, a, b); len(found) > 0 {
		t.Errorf("two odd trees differ: %v", found)
	}
	size, err := Measure(a)
	if err != nil {
		t.Fatal(err)
	}
	if size.Files < 45 || size.Dirs < 130 || size.Other < 8 || size.Bytes < 96<<20 {
		t.Errorf("the odd tree holds too little: %+v", size)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(a, "sparse/holes"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > st.Size/10 {
		t.Errorf("the sparse file of %d bytes takes %d", st.Size, st.Blocks*512)
	}
}

// TestCompareSees makes one change to a copy and wants exactly that one
// difference.
func TestCompareSees(t *testing.T) {
	type change func(path string) error
	tests := []struct {
		path   string // of the change
		change change
		want   []string // differences, as path and what
	}{
		{"acls/file", os.Remove, []string{"acls/file missing"}},
		{"acls/new", touch, []string{"acls/new extra"}},
		{"fifo", func(p string) error { return replace(p, touch) }, []string{"fifo type"}},
		{"modes/file-4755", func(p string) error { return unix.Chmod(p, 0o755) }, []string{"modes/file-4755 mode"}},
		{"modes/file-0444", func(p string) error { return unix.Chmod(p, 0o445) }, []string{"modes/file-0444 mode"}},
		{"modes/dir-1777", func(p string) error { return unix.Chmod(p, 0o777) }, []string{"modes/dir-1777 mode"}},
		{"fifo", func(p string) error { return unix.Chmod(p, 0o600) }, []string{"fifo mode"}},
		{".", func(p string) error { return unix.Chmod(p, 0o711) }, []string{". mode"}},
		{"owners/1000", func(p string) error { return os.Lchown(p, 1001, -1) }, []string{"owners/1000 owner"}},
		{"owners/link", func(p string) error { return os.Lchown(p, -1, 7) }, []string{"owners/link owner"}},
		{"owners/dir", func(p string) error { return os.Lchown(p, 0, -1) }, []string{"owners/dir owner"}},
		{".", func(p string) error { return os.Lchown(p, -1, 5) }, []string{". owner"}},
		{"empty", later, []string{"empty time"}},
		{"empty dirs/one/two", later, []string{"empty dirs/one/two time"}},
		{"links/dangling", later, []string{"links/dangling time"}},
		{"fifo", later, []string{"fifo time"}},
		{".", later, []string{". time"}},
		{"big", func(p string) error { return os.Truncate(p, 3<<20+16) }, []string{"big size"}},
		{"empty", func(p string) error { return os.WriteFile(p, []byte{0}, 0) }, []string{"empty size"}},
		{"big", func(p string) error { return flip(p, 0) }, []string{"big contents"}},
		{"big", func(p string) error { return flip(p, 3<<20+16) }, []string{"big contents"}},
		{"sparse/holes", func(p string) error { return flip(p, 30<<20) }, []string{"sparse/holes contents"}},
		{"sparse/holes", dense, []string{"sparse/holes holes", "sparse/holes holes", "sparse/holes holes"}},
		{"sparse/only a hole", dense, []string{"sparse/only a hole holes"}},
		{"xattrs/file", func(p string) error { return unix.Lremovexattr(p, "user.empty") }, []string{"xattrs/file xattr"}},
		{"xattrs/file", func(p string) error { return unix.Lsetxattr(p, "user.new", nil, 0) }, []string{"xattrs/file xattr"}},
		{"xattrs/file", func(p string) error { return unix.Lsetxattr(p, "user.abaca", []byte("A value"), 0) }, []string{"xattrs/file xattr"}},
		{"xattrs/file", func(p string) error { return unix.Lremovexattr(p, "trusted.abaca") }, []string{"xattrs/file xattr"}},
		{"xattrs/dir", func(p string) error { return unix.Lremovexattr(p, "user.abaca") }, []string{"xattrs/dir xattr"}},
		{"xattrs/capability", func(p string) error { return unix.Lremovexattr(p, "security.capability") }, []string{"xattrs/capability xattr"}},
		{"acls/file", func(p string) error {
			return unix.Lsetxattr(p, "system.posix_acl_access", acl(
				entry{aclUserObj, 6, 0}, entry{aclUser, 4, 1001}, entry{aclGroupObj, 4, 0}, entry{aclMask, 4, 0}, entry{aclOther, 0, 0}), 0)
		}, []string{"acls/file xattr"}},
		{"acls/dir", func(p string) error { return unix.Lremovexattr(p, "system.posix_acl_default") }, []string{"acls/dir xattr"}},
		{"links/absolute", func(p string) error {
			return replace(p, func(p string) error { return os.Symlink("/etc/hostnamE", p) })
		}, []string{"links/absolute link"}},
		{"null", func(p string) error {
			return replace(p, func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) })
		}, []string{"null device"}},
		// A hard link that became a file of its own: its group is smaller too.
		{"hardlinks/two", func(p string) error {
			return replace(p, func(p string) error { return os.WriteFile(p, []byte("linked"), 0o644) })
		}, []string{"hardlinks/elsewhere/three hard links", "hardlinks/one hard links", "hardlinks/two hard links"}},
	}
	a, b := odd(t), odd(t)
	for _, tt := range tests {
		t.Run(strings.Join(tt.want, ","), func(t *testing.T) {
			path := filepath.Join(b, tt.path)
			before, beforeErr := lstat(path)
			parent, err := lstat(filepath.Dir(path))
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.change(path); err != nil {
				t.Fatal(err)
			}
			// The change shall be the only one: the times are as they were.
			wantsTime := strings.HasSuffix(tt.want[0], " time")
			if after, err := lstat(path); err == nil && beforeErr == nil && !wantsTime {
				restoreOwner(t, path, before, after)
				setBack(t, path, before)
			}
			if tt.path != "." {
				setBack(t, filepath.Dir(path), parent)
			}
			var got []string
			for _, d := range compare(t, a, b) {
				got = append(got, d.Path+" "+d.What)
				if d.String() == "" {
					t.Error("a difference without words")
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("differences (-want +got):\n%s", diff)
			}
		})
		// The next change gets a fresh copy.
		if err := os.RemoveAll(b); err != nil {
			t.Fatal(err)
		}
		if err := Odd(t.Context(), b, 3<<20+17); err != nil {
			t.Fatal(err)
		}
	}
}

func touch(path string) error { return os.WriteFile(path, nil, 0o640) }

func later(path string) error {
	st, err := lstat(path)
	if err != nil {
		return err
	}
	return setTime(path, time.Unix(st.Mtim.Unix()).Add(time.Nanosecond))
}

func flip(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	b[0] ^= 0x80
	_, err = f.WriteAt(b, at)
	return err
}

// dense writes zeros where a file has holes.
func dense(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Write(b)
	return err
}

func replace(path string, with func(string) error) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return with(path)
}

// restoreOwner brings back what replacing a file has changed besides.
func restoreOwner(t *testing.T, path string, before, after *unix.Stat_t) {
	t.Helper()
	if before.Ino == after.Ino || after.Mode&unix.S_IFMT == unix.S_IFLNK {
		return
	}
	if err := unix.Chmod(path, before.Mode&^unix.S_IFMT); err != nil {
		t.Fatal(err)
	}
}

func setBack(t *testing.T, path string, st *unix.Stat_t) {
	t.Helper()
	if err := setTime(path, time.Unix(st.Mtim.Unix())); err != nil {
		t.Fatal(err)
	}
}

func TestCompareErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := Compare(t.Context(), dir, filepath.Join(dir, "none")); err == nil {
		t.Error("a tree that is not there is no error")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Compare(ctx, dir, dir); err == nil {
		t.Error("a comparison that was stopped is no error")
	}
}

func TestBuildAndChange(t *testing.T) {
	build := func() string {
		dir := t.TempDir()
		if err := Build(t.Context(), dir, Options{Files: 1000}); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	a, b, c := build(), build(), build()
	changed := map[string]Changed{}
	for dir, seed := range map[string]uint64{a: 1, b: 1, c: 2} {
		var err error
		if changed[dir], err = Change(dir, 0.01, seed); err != nil {
			t.Fatal(err)
		}
	}
	if got := changed[a]; got.Modified != 10 || got.Deleted != 2 || got.Renamed != 2 || got.ModifiedBytes == 0 || got.RenamedBytes == 0 {
		t.Errorf("changed %+v", got)
	}
	if changed[a] != changed[b] || changed[a] == changed[c] {
		t.Errorf("changed %+v and again %+v; with another seed %+v", changed[a], changed[b], changed[c])
	}
	notTime := func(all []Difference) []Difference {
		return slices.DeleteFunc(all, func(d Difference) bool { return d.What == "time" })
	}
	if found := notTime(compare(t, a, b)); len(found) > 0 {
		t.Errorf("the same change twice differs: %v", found)
	}
	// 10 modified, 2 deleted, 2 renamed: missing here and extra there.
	if found := notTime(compare(t, build(), a)); len(found) != 16 {
		t.Errorf("%d differences: %v", len(found), found)
	}
	if _, err := Change(t.TempDir(), 0.01, 1); err == nil {
		t.Error("changing an empty tree is no error")
	}
}

func TestBuildCopies(t *testing.T) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(strings.TrimSpace(string(out)), "src", "net")
	dir := t.TempDir()
	if err := Build(t.Context(), dir, Options{Source: source}); err != nil {
		t.Fatal(err)
	}
	for _, d := range compare(t, source, dir) {
		// Owner and root directory are not copied.
		if d.What != "owner" && d.Path != "." {
			t.Error(d)
		}
	}
}
