package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/backendtest"
)

const mib = 1 << 20

// storage is a storage system of its own below a test's directory, and the
// vocabulary of the tests.
type storage struct {
	*testing.T
	Options
}

func needKernel(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, for loop devices and mounts")
	}
	if _, err := os.Stat("/sys/fs/btrfs"); err != nil {
		t.Skipf("needs btrfs in the kernel: %v", err)
	}
}

// newStorage lets the test run beside others: most of its time it waits for a disk.
func newStorage(t *testing.T, size int64) *storage {
	t.Helper()
	needKernel(t)
	t.Parallel()
	s := &storage{t, Options{Path: filepath.Join(t.TempDir(), "storage"), Size: size, Node: "node-1"}}
	t.Cleanup(s.detach)
	return s
}

// open opens the storage once more, until the test ends.
func (s *storage) open() *Backend {
	s.Helper()
	b, err := Open(s.Context(), s.Options)
	s.ok(err)
	s.Cleanup(func() { b.Close() })
	return b
}

// detach is patient: whoever makes a mount namespace on this machine holds our
// mounts in it, until it ends.
func (s *storage) detach() {
	s.Helper()
	var err error
	for range 20 {
		if err = (image{s.Path}).detach(context.Background()); !errors.Is(err, unix.EBUSY) && !errors.Is(err, backend.ErrInUse) {
			break
		}
	}
	if err != nil {
		s.Errorf("detach: %v", err)
	}
}

func (s *storage) ok(err error) {
	s.Helper()
	if err != nil {
		s.Fatalf("unexpected error: %v", err)
	}
}

func (s *storage) is(err, kind error) {
	s.Helper()
	if !errors.Is(err, kind) {
		s.Errorf("got error %v, want %q", err, kind)
	}
}

func (s *storage) share(b *Backend, name string, size int64) *backend.Share {
	s.Helper()
	share, err := b.CreateShare(s.Context(), backend.CreateShareRequest{Name: name, MinSize: size, Role: backend.RoleUser})
	s.ok(err)
	return share
}

func (s *storage) clone(b *Backend, name string, of *backend.Snapshot) *backend.Share {
	s.Helper()
	share, err := b.CreateShare(s.Context(), backend.CreateShareRequest{
		Name: name, MinSize: of.Size, FromSnapshot: of.ID, Role: backend.RoleUser,
	})
	s.ok(err)
	return share
}

func (s *storage) snapshot(b *Backend, name string, of *backend.Share) *backend.Snapshot {
	s.Helper()
	snapshot, err := b.CreateSnapshot(s.Context(), backend.CreateSnapshotRequest{Name: name, ShareID: of.ID, Role: backend.RoleUser})
	s.ok(err)
	return snapshot
}

func (s *storage) used(b *Backend, target backend.Target) int64 {
	s.Helper()
	s.ok(unix.Syncfs(int(b.fs.Fd())))
	usage, err := b.Usage(s.Context(), target)
	s.ok(err)
	return usage.UsedBytes
}

// eventually waits for what the kernel does in the background.
func (s *storage) eventually(what string, cond func() bool) {
	s.Helper()
	for range 1200 {
		if cond() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.Fatalf("%s: not within a minute", what)
}

// audit wants every object to be whole, and nothing else to be there.
func (s *storage) audit(b *Backend) {
	s.Helper()
	read := func(dir string) []string {
		entries, err := os.ReadDir(filepath.Join(b.dir, dir))
		s.ok(err)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	for _, dir := range []struct {
		name string
		want []string
	}{
		{".", []string{"meta", "shares", "snapshots"}},
		{"meta", []string{"exports", "lock", "shares", "snapshots"}},
	} {
		if diff := cmp.Diff(dir.want, read(dir.name)); diff != "" {
			s.Errorf("entries of %s (-want +got):\n%s", dir.name, diff)
		}
	}
	for _, k := range []kind{shares, snapshots} {
		var want []string
		for _, id := range read(string(k)) {
			want = append(want, id+".json")
		}
		if diff := cmp.Diff(want, read(k.metaDir())); diff != "" {
			s.Errorf("subvolumes and metadata of the %s (-subvolumes +metadata):\n%s", k, diff)
		}
	}
	for _, name := range read(exports.metaDir()) {
		e, err := b.ExportOf(s.Context(), strings.TrimSuffix(name, ".json"))
		s.ok(err)
		if _, err := os.Stat(e.Locations[0]); err != nil {
			s.Errorf("export %s of nothing: %v", name, err)
		}
	}
}

// fill writes to a file until it gets an error.
func fill(file string) (written int64, err error) {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	chunk := bytes.Repeat([]byte("abaca "), mib/6/4)
	for err == nil {
		var n int
		if n, err = f.Write(chunk); err == nil {
			err = f.Sync()
		}
		written += int64(n)
	}
	return written, err
}

func isFull(err error) bool { return errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOSPC) }

func TestConformance(t *testing.T) {
	needKernel(t)
	t.Parallel()
	backendtest.Run(t, backendtest.Harness{
		New: func(t *testing.T) func() backend.Backend {
			s := newStorage(t, 512*mib)
			return func() backend.Backend { return s.open() }
		},
		ShareSize: 8 * mib,
		Write: func(t *testing.T, e *backend.Export, file, content string) {
			t.Helper()
			if err := os.WriteFile(filepath.Join(e.Locations[0], file), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		},
		Read: func(t *testing.T, e *backend.Export, file string) string {
			t.Helper()
			data, err := os.ReadFile(filepath.Join(e.Locations[0], file))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			return string(data)
		},
	})
}

func TestSizeIsEnforced(t *testing.T) {
	s := newStorage(t, 512*mib)
	b := s.open()
	share := s.share(b, "data", 16*mib)
	file := filepath.Join(b.location(shares, share.ID), "file")
	written, err := fill(file)
	if !isFull(err) {
		t.Fatalf("after %d bytes: %v, want EDQUOT", written, err)
	}
	used := s.used(b, backend.Target{ShareID: share.ID})
	if used > share.Size || written > share.Size || written < 14*mib {
		t.Errorf("%d bytes written and %d used in a share of %d", written, used, share.Size)
	}

	// A full share can be snapshot, cloned, and emptied.
	snapshot := s.snapshot(b, "cut", share)
	clone := s.clone(b, "clone", snapshot)
	if n, err := fill(filepath.Join(b.location(shares, clone.ID), "more")); !isFull(err) || n > mib {
		t.Errorf("the clone of a full share took %d bytes: %v", n, err)
	}

	share, err = b.ExpandShare(t.Context(), share.ID, 32*mib)
	s.ok(err)
	more, err := fill(file)
	if !isFull(err) || more < 14*mib || written+more > share.Size {
		t.Errorf("%d bytes could be added when the share grew from 16 MiB to 32 MiB: %v", more, err)
	}
	s.ok(os.Remove(file))
	s.eventually("room after the file went", func() bool { return s.used(b, backend.Target{ShareID: share.ID}) < mib })
	if n, err := fill(file); !isFull(err) || n < 28*mib {
		t.Errorf("the emptied share took %d bytes: %v; its snapshot does not count", n, err)
	}
}

func TestUsage(t *testing.T) {
	s := newStorage(t, 512*mib)
	b := s.open()
	share := s.share(b, "data", 64*mib)
	file := filepath.Join(b.location(shares, share.ID), "file")
	s.ok(os.WriteFile(file, make([]byte, 8*mib), 0o644))
	snapshot := s.snapshot(b, "cut", share)
	clone := s.clone(b, "clone", snapshot)
	s.ok(os.Remove(file))

	about := func(what string, target backend.Target, want int64) {
		t.Helper()
		if got := s.used(b, target); got < want || got > want+mib {
			t.Errorf("usage of the %s: %d, want about %d", what, got, want)
		}
	}
	about("emptied share", backend.Target{ShareID: share.ID}, 0)
	about("snapshot", backend.Target{SnapshotID: snapshot.ID}, 8*mib)
	about("clone", backend.Target{ShareID: clone.ID}, 8*mib)
	s.ok(b.DeleteShare(t.Context(), share.ID))
	s.ok(b.DeleteSnapshot(t.Context(), snapshot.ID))
	about("clone alone", backend.Target{ShareID: clone.ID}, 8*mib)
	_, err := b.Usage(t.Context(), backend.Target{ShareID: share.ID})
	s.is(err, backend.ErrNotFound)
}

func TestSnapshotIsThePast(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	share := s.share(b, "data", 64*mib)
	live := b.location(shares, share.ID)
	if info, err := os.Stat(live); err != nil || info.Mode() != fs.ModeDir|0o755 {
		t.Errorf("root of the share: mode %v, error %v", info.Mode(), err)
	}
	f, err := os.Create(filepath.Join(live, "file"))
	s.ok(err)
	defer f.Close()
	old := bytes.Repeat([]byte("old "), mib)
	_, err = f.Write(old) // and no sync
	s.ok(err)
	before := time.Now()
	snapshot := s.snapshot(b, "cut", share)
	if got := snapshot.CreatedAt; got.Before(before.Add(-time.Second)) || got.After(time.Now().Add(time.Second)) || got.Nanosecond() == 0 {
		t.Errorf("created at %v, want about %v", got, before)
	}
	var was, is unix.Stat_t
	frozen := filepath.Join(b.location(snapshots, snapshot.ID), "file")
	s.ok(unix.Stat(filepath.Join(live, "file"), &was))
	_, err = f.WriteAt([]byte("new "), 0)
	s.ok(err)
	s.ok(os.WriteFile(filepath.Join(live, "later"), nil, 0o644))

	s.ok(unix.Stat(frozen, &is))
	// What restic compares, so that an unchanged file is not read again.
	if was.Ino != is.Ino || was.Ctim != is.Ctim || was.Mtim != is.Mtim || was.Size != is.Size {
		t.Errorf("the file changed with the snapshot: %+v, was %+v", is, was)
	}
	check := func() {
		t.Helper()
		if got, err := os.ReadFile(frozen); err != nil || !bytes.Equal(got, old) {
			t.Errorf("the snapshot has %d bytes (error %v), want the old contents", len(got), err)
		}
		if names, err := b.names(snapshots.subvolume(snapshot.ID)); err != nil || !slices.Equal(names, []string{"file"}) {
			t.Errorf("the snapshot has %q (error %v), want one file", names, err)
		}
	}
	check()
	s.is(os.WriteFile(frozen, nil, 0o644), unix.EROFS)
	s.is(os.Chmod(frozen, 0o600), unix.EROFS)
	s.is(os.Remove(frozen), unix.EROFS)

	clone := s.clone(b, "clone", snapshot)
	s.ok(os.WriteFile(filepath.Join(b.location(shares, clone.ID), "file"), []byte("clone"), 0o644))
	s.ok(b.DeleteShare(t.Context(), share.ID))
	check()
}

func TestReboot(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	share := s.share(b, "data", 16*mib)
	s.ok(os.WriteFile(filepath.Join(b.location(shares, share.ID), "file"), []byte("contents"), 0o644))
	snapshot := s.snapshot(b, "cut", share)
	export, err := b.Export(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "reader")
	s.ok(err)
	if want := (backend.Export{
		Target: backend.Target{SnapshotID: snapshot.ID}, Consumer: "reader", ReadOnly: true, Protocol: "bind",
		Locations: []string{b.location(snapshots, snapshot.ID)}, Node: "node-1",
	}); !cmp.Equal(*export, want) {
		t.Errorf("export (-want +got):\n%s", cmp.Diff(want, *export))
	}

	other := s.open()
	s.is(other.Detach(t.Context()), backend.ErrInUse) // b has it open
	s.ok(b.Close())
	s.detach()
	s.ok(b.Detach(t.Context()))
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(s.Path)) {
		t.Errorf("still mounted (error %v):\n%s", err, mounts)
	}
	_, err = b.Share(t.Context(), share.ID)
	s.is(err, backend.ErrUnavailable)

	b = s.open()
	got, err := b.Share(t.Context(), share.ID)
	s.ok(err)
	if diff := cmp.Diff(share, got); diff != "" {
		t.Errorf("the share after a reboot (-want +got):\n%s", diff)
	}
	again, err := b.ExportOf(t.Context(), "reader")
	s.ok(err)
	if diff := cmp.Diff(export, again); diff != "" {
		t.Errorf("the export after a reboot (-want +got):\n%s", diff)
	}
	data, err := os.ReadFile(filepath.Join(again.Locations[0], "file"))
	if string(data) != "contents" {
		t.Errorf("the file after a reboot: %q, %v", data, err)
	}
	// The quota is still there.
	if n, err := fill(filepath.Join(b.location(shares, share.ID), "big")); !isFull(err) || n > share.Size {
		t.Errorf("%d bytes written after a reboot: %v", n, err)
	}
}

func TestFullFileSystem(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	small := s.share(b, "small", 4*mib)
	snapshot := s.snapshot(b, "cut", small)
	_, err := b.Export(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "reader")
	s.ok(err)
	empty, err := b.Capacity(t.Context())
	s.ok(err)
	big := s.share(b, "big", empty.Available-minFree/2)
	if _, err := fill(filepath.Join(b.location(shares, big.ID), "data")); !errors.Is(err, unix.EDQUOT) {
		t.Fatalf("got %v, want EDQUOT", err)
	}
	_, err = b.CreateShare(t.Context(), backend.CreateShareRequest{Name: "new", MinSize: mib, Role: backend.RoleUser})
	s.is(err, backend.ErrExhausted) // though there is room for its metadata
	_, err = b.ExpandShare(t.Context(), big.ID, 250*mib)
	s.ok(err)
	if _, err := fill(filepath.Join(b.location(shares, big.ID), "data")); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("got %v, want ENOSPC", err)
	}
	// Use up the metadata too: small files lie in the trees.
	for i := 0; ; i++ {
		err := os.WriteFile(filepath.Join(b.location(shares, big.ID), fmt.Sprint(i)), make([]byte, 2000), 0o644)
		if isFull(err) {
			break
		}
		s.ok(err)
	}
	before, err := b.Capacity(t.Context())
	s.ok(err)
	_, err = b.CreateShare(t.Context(), backend.CreateShareRequest{Name: "new", MinSize: mib, Role: backend.RoleUser})
	s.is(err, backend.ErrExhausted)
	for i := range 10000 { // until the metadata itself has no room, or for good
		_, err = b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: fmt.Sprint(i), ShareID: small.ID, Role: backend.RoleUser})
		if err != nil || i == 20 {
			break
		}
	}
	if err != nil {
		s.is(err, backend.ErrExhausted)
	}
	b = s.open() // a restart needs no room
	s.audit(b)

	s.ok(b.Unexport(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "reader"))
	s.ok(b.DeleteSnapshot(t.Context(), snapshot.ID))
	s.ok(b.DeleteShare(t.Context(), big.ID))
	s.audit(b)
	s.eventually("room after the deletion", func() bool {
		after, err := b.Capacity(t.Context())
		s.ok(err)
		return after.Available > before.Available+100*mib
	})
	s.share(b, "new", mib)
}

func TestImageSize(t *testing.T) {
	s := newStorage(t, MinImageSize)
	for _, size := range []int64{-1, 1, MinImageSize - 1} {
		_, err := Open(t.Context(), Options{Path: s.Path, Size: size})
		s.is(err, backend.ErrInvalid)
	}
	for size, words := range map[int64]string{10 << 10: "size 10Ki: an image has at least 256Mi", 1 << 60: "1048576Ti"} {
		path := filepath.Join(t.TempDir(), "new")
		_, err := Open(t.Context(), Options{Path: path, Size: size})
		s.is(err, backend.ErrInvalid)
		if err != nil && !strings.Contains(err.Error(), words) {
			t.Errorf("size %d: %v", size, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("size %d leaves something behind: %v", size, err)
		}
	}
	b := s.open()
	before, err := b.Capacity(t.Context())
	s.ok(err)
	share := s.share(b, "data", mib)
	_, err = b.ExpandShare(t.Context(), share.ID, 300*mib)
	s.is(err, backend.ErrExhausted)

	s.Size = 512*mib + 1
	s.ok(s.open().Close()) // while it is open and mounted
	after, err := b.Capacity(t.Context())
	s.ok(err)
	if before.MaxShareSize != MinImageSize || after.MaxShareSize != 512*mib || after.Available < before.Available+200*mib {
		t.Errorf("grown from %+v to %+v", before, after)
	}
	_, err = b.ExpandShare(t.Context(), share.ID, 300*mib)
	s.ok(err)
	s.ok(b.Close())
	s.detach()
	_, err = Open(t.Context(), Options{Path: s.Path, Size: MinImageSize})
	s.is(err, backend.ErrInvalid)
	s.Size = 600 * mib
	b = s.open() // while it was not mounted
	if c, err := b.Capacity(t.Context()); err != nil || c.MaxShareSize != 600*mib {
		t.Errorf("grown from %+v to %+v, error %v", after, c, err)
	}
}

func TestWithoutImage(t *testing.T) {
	s := newStorage(t, MinImageSize)
	for _, path := range []string{"", filepath.Join(t.TempDir(), "nothing"), t.TempDir(), "/proc"} {
		_, err := Open(t.Context(), Options{Path: path})
		s.is(err, backend.ErrInvalid)
	}
	_, err := Open(t.Context(), Options{Path: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "set a size") {
		t.Errorf("no hint in %v", err)
	}

	host := s.open()
	dir := filepath.Join(host.dir, "a", "directory")
	s.ok(os.MkdirAll(dir, 0o755))
	b, err := Open(t.Context(), Options{Path: dir})
	s.ok(err)
	defer b.Close()
	share := s.share(b, "data", 4*mib)
	if n, err := fill(filepath.Join(dir, "shares", share.ID, "file")); !isFull(err) || n > share.Size {
		t.Errorf("%d bytes written: %v", n, err)
	}
	s.audit(b)
	s.ok(b.Detach(t.Context())) // closes, and leaves a file system that is not ours alone
	if !isBtrfs(host.fs) || !host.exists("a/directory/shares") {
		t.Error("the file system is gone")
	}
}

func TestSharedByHand(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()

	dir, err := b.root.Open(string(shares))
	s.ok(err)
	defer dir.Close()
	share := s.share(b, "data", 4*mib)
	s.ok(destroySubvolume(dir, share.ID))
	got, err := b.Share(t.Context(), share.ID)
	s.ok(err)
	if got.Problem == "" {
		t.Errorf("a share without a subvolume has no problem: %+v", got)
	}
	_, err = b.Export(t.Context(), backend.Target{ShareID: share.ID}, "consumer")
	s.is(err, backend.ErrUnavailable)
	if usage, err := b.Usage(t.Context(), backend.Target{ShareID: share.ID}); err != nil || usage.UsedBytes != -1 {
		t.Errorf("usage %+v, error %v, want unknown", usage, err)
	}
	s.ok(b.DeleteShare(t.Context(), share.ID))

	// A user may make subvolumes in a share.
	share = s.share(b, "data", 4*mib)
	inner := b.location(shares, share.ID)
	for _, name := range []string{"one", "two"} {
		at, err := os.Open(inner)
		s.ok(err)
		s.ok(createSubvolume(at, name))
		at.Close()
		inner = filepath.Join(inner, name)
		s.ok(os.Mkdir(filepath.Join(inner, "dir"), 0o755))
		inner = filepath.Join(inner, "dir")
	}
	s.ok(b.DeleteShare(t.Context(), share.ID))
	s.audit(b)

	// Quotas get lost when somebody turns them off and on.
	share = s.share(b, "data", 4*mib)
	info, err := subvolumeAt(dir, share.ID)
	s.ok(err)
	s.ok(limitQgroup(b.fs, info.id, 1<<40))
	s.open()
	if n, err := fill(filepath.Join(b.location(shares, share.ID), "file")); !isFull(err) || n > share.Size {
		t.Errorf("%d bytes written into a share of %d: %v", n, share.Size, err)
	}
	s.ok(b.DeleteShare(t.Context(), share.ID))

	// Files of others between ours are neither listed nor removed.
	s.ok(os.WriteFile(filepath.Join(b.dir, "shares", "README"), nil, 0o644))
	s.ok(os.WriteFile(filepath.Join(b.dir, "meta", "shares", "README.json"), nil, 0o644))
	b = s.open()
	if list, _, err := b.ListShares(t.Context(), "", 0); err != nil || len(list) != 0 || !b.exists("shares/README") {
		t.Errorf("%d shares, error %v", len(list), err)
	}
}

// TestDetachWhileMounted: the image cannot be freed while a share is mounted, and
// says so.
func TestDetachWhileMounted(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	share := s.share(b, "data", 4*mib)
	target := t.TempDir()
	s.ok(unix.Mount(b.location(shares, share.ID), target, "", unix.MS_BIND, ""))
	defer unix.Unmount(target, unix.MNT_DETACH)
	s.is(b.Detach(t.Context()), backend.ErrInUse)
	s.ok(unix.Unmount(target, 0))
	s.detach()
}

func TestBusyObjectIsPending(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b, other := s.open(), s.open()
	share := s.share(b, "data", 4*mib)
	unlock, err := other.lock(t.Context(), shares.subvolume(share.ID))
	s.ok(err)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = b.ExpandShare(ctx, share.ID, 8*mib)
	s.is(err, backend.ErrPending)
	if errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is two kinds of error", err)
	}
	s.share(b, "unrelated", 4*mib) // is not held up
	time.AfterFunc(50*time.Millisecond, unlock)
	_, err = b.ExpandShare(t.Context(), share.ID, 8*mib)
	s.ok(err)

	// Two that lock the same pair in opposite order.
	var group sync.WaitGroup
	for i := range 50 {
		group.Go(func() {
			keys := []string{"one", "two"}
			if i%2 == 0 {
				slices.Reverse(keys)
			}
			unlock, err := b.lock(t.Context(), keys...)
			if err != nil {
				t.Error(err)
				return
			}
			unlock()
		})
	}
	group.Wait()
}

func TestSweepSparesTheLiving(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	id := idOf("data")
	dir, err := b.root.Open(string(shares))
	s.ok(err)
	defer dir.Close()
	s.ok(createSubvolume(dir, id))
	s.ok(os.WriteFile(filepath.Join(b.dir, shares.tmp(id)), nil, 0o600))
	unlock, err := b.lock(t.Context(), shares.subvolume(id))
	s.ok(err)
	s.open()
	if !b.exists(shares.subvolume(id)) || !b.exists(shares.tmp(id)) {
		t.Error("what a living process works on was swept away")
	}
	unlock()
	s.open()
	s.audit(b)
}

func TestSizes(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	for _, test := range []struct {
		min, max, want int64
		err            error
	}{
		{min: 0, max: 0, want: MinShareSize},
		{min: 1, max: 0, want: MinShareSize},
		{min: 1, max: MinShareSize - 1, err: backend.ErrInvalid},
		{min: mib + 1, max: mib + 1, want: mib + 1},
		{min: MinImageSize, want: MinImageSize},
		{min: MinImageSize + 1, err: backend.ErrExhausted},
		{min: 1<<63 - 1, max: 1<<63 - 1, err: backend.ErrExhausted},
	} {
		name := fmt.Sprintf("%d to %d", test.min, test.max)
		share, err := b.CreateShare(t.Context(), backend.CreateShareRequest{Name: name, MinSize: test.min, MaxSize: test.max})
		if test.err != nil {
			s.is(err, test.err)
		} else if err != nil || share.Size != test.want {
			t.Errorf("%s: got %+v, %v; want size %d", name, share, err, test.want)
		}
	}
	for _, name := range []string{strings.Repeat("n", maxName+1), "\xff"} {
		_, err := b.CreateShare(t.Context(), backend.CreateShareRequest{Name: name})
		s.is(err, backend.ErrInvalid)
	}
	s.audit(b)
}

func TestInUseNamesHolders(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	snapshot := s.snapshot(b, "cut", s.share(b, "data", 4*mib))
	for i := range 5 {
		_, err := b.Export(t.Context(), backend.Target{SnapshotID: snapshot.ID}, fmt.Sprintf("reader-%d", i))
		s.ok(err)
	}
	_, err := b.Export(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "reader")
	s.ok(err)
	err = b.DeleteSnapshot(t.Context(), snapshot.ID)
	s.is(err, backend.ErrInUse)
	if err == nil || !strings.HasSuffix(err.Error(), "held by reader, reader-0, reader-1 and 3 more") {
		t.Errorf("got %v", err)
	}
}

func TestListWhileChanging(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b, other := s.open(), s.open()
	want := []string{s.share(b, "stays 1", 4*mib).ID, s.share(b, "stays 2", 4*mib).ID, s.share(b, "stays 3", 4*mib).ID}
	slices.Sort(want)
	stop := make(chan struct{})
	var group sync.WaitGroup
	for i := range 4 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				share, err := other.CreateShare(t.Context(), backend.CreateShareRequest{Name: fmt.Sprintf("goes %d", i)})
				if err == nil {
					err = other.DeleteShare(t.Context(), share.ID)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 200 {
		var got []string
		for after, more := "", true; more; {
			var list []*backend.Share
			var err error
			list, more, err = b.ListShares(t.Context(), after, 1)
			s.ok(err)
			for _, share := range list {
				after = share.ID
				if strings.HasPrefix(share.Name, "stays") {
					got = append(got, share.ID)
				}
			}
			if len(list) == 0 {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("listed %q, want %q", got, want)
		}
	}
	close(stop)
	group.Wait()
	s.audit(b)
}

// TestQuotaGroupsGo: what quota keeps about a subvolume goes with it.
func TestQuotaGroupsGo(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	count := func() int {
		s.ok(unix.Syncfs(int(b.fs.Fd())))
		b.settleQuota()
		b.sweepQgroups()
		groups, err := filepath.Glob(filepath.Join(b.sysfs, "qgroups", "0_*"))
		s.ok(err)
		return len(groups)
	}
	before := count()
	for i := range 5 {
		share := s.share(b, fmt.Sprint(i), 4*mib)
		s.ok(os.WriteFile(filepath.Join(b.location(shares, share.ID), "file"), make([]byte, mib), 0o644))
		snapshot := s.snapshot(b, fmt.Sprint(i), share)
		s.ok(b.DeleteShare(t.Context(), share.ID))
		s.ok(b.DeleteSnapshot(t.Context(), snapshot.ID))
	}
	s.eventually("quota groups are gone", func() bool { return count() == before })
}

// TestLostCount: dropping a shared tree at once, the kernel loses count.
func TestLostCount(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	threshold := filepath.Join(b.sysfs, "qgroups", "drop_subtree_threshold")
	if err := os.WriteFile(threshold, []byte("0"), 0); err != nil {
		t.Skipf("this kernel always counts: %v", err)
	}
	share := s.share(b, "data", 64*mib)
	for i := range 2000 {
		s.ok(os.WriteFile(filepath.Join(b.location(shares, share.ID), fmt.Sprint(i)), make([]byte, 1000), 0o644))
	}
	snapshot := s.snapshot(b, "cut", share)
	s.ok(b.DeleteSnapshot(t.Context(), snapshot.ID))
	lost := false
	s.eventually("lost count and found it again", func() bool {
		s.ok(unix.Syncfs(int(b.fs.Fd())))
		usage, err := b.Usage(t.Context(), backend.Target{ShareID: share.ID})
		s.ok(err)
		lost = lost || usage.UsedBytes == -1
		return lost && usage.UsedBytes > 2*mib
	})
}

// TestDeleteMounted: a share does not go from under a mount.
func TestDeleteMounted(t *testing.T) {
	s := newStorage(t, MinImageSize)
	b := s.open()
	share, other := s.share(b, "data", 4*mib), s.share(b, "other", 4*mib)
	inside := filepath.Join(b.location(shares, share.ID), "directory")
	s.ok(os.Mkdir(inside, 0o755))
	for _, source := range []string{b.location(shares, share.ID), inside} {
		target := filepath.Join(t.TempDir(), "a b") // mountinfo escapes it
		s.ok(os.Mkdir(target, 0o755))
		s.ok(unix.Mount(source, target, "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
		err := b.DeleteShare(t.Context(), share.ID)
		if !errors.Is(err, backend.ErrInUse) || !strings.Contains(err.Error(), target) {
			t.Errorf("delete of what is mounted at %s: %v", target, err)
		}
		s.ok(unix.Unmount(target, 0))
	}
	s.ok(b.DeleteShare(t.Context(), other.ID))
	s.ok(b.DeleteShare(t.Context(), share.ID))
}
