// Package local is the embedded backend: shares are btrfs subvolumes on the
// node itself, in a directory of a btrfs file system or in an image file.
//
// Everything lies below one directory:
//
//	shares/<id>                 subvolume; its root is the share
//	snapshots/<id>              read-only subvolume
//	meta/shares/<id>.json       what is known about a share
//	meta/snapshots/<id>.json
//	meta/exports/<consumer>.json
//	meta/lock
//
// There is no journal and nothing in memory. An object exists when its metadata
// does: creating writes the metadata last, deleting removes it first, each in
// one rename or unlink. A subvolume without metadata is debris of a call that
// was killed; the next call for the object and the next Open remove it.
//
// The size of a share is a quota (qgroup) on what its subvolume refers to. So
// a clone counts in full, and data that only snapshots keep counts nowhere.
// Sizes are promises, not reservations: they may add up to more than the file
// system has.
package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// MinShareSize is the smallest size of a share, in bytes.
const MinShareSize = 1 << 20

// minFree is the free space in bytes below which no share is created: a last
// resort for those that are there.
const minFree = 16 << 20

// maxName is the longest name of an object, in bytes.
const maxName = 1024

// Options says where the storage is.
type Options struct {
	// Path is a directory. It lies on btrfs, or Size is set.
	Path string
	// Size, if not 0, is the size in bytes of an image file that is made below
	// Path. Opening again with a larger size grows it.
	Size int64
	// Node is the name of this node, the only one that can mount the exports.
	Node string
}

// Backend implements backend.Backend, CapacityReporter, Bound and UsageReporter.
type Backend struct {
	node  string
	dir   string   // absolute path of the file system's part that is ours
	root  *os.Root // the same; it also keeps the image from being unmounted under us
	fs    *os.File // the same, for ioctls
	sysfs string   // /sys/fs/btrfs/<fsid>
	image *image   // nil if there is none
}

var (
	_ backend.Backend          = (*Backend)(nil)
	_ backend.CapacityReporter = (*Backend)(nil)
	_ backend.Bound            = (*Backend)(nil)
	_ backend.UsageReporter    = (*Backend)(nil)
)

// crash is called where being killed would leave something half done. Tests
// replace it by what kills the process.
var crash = func(point string) {}

// Open opens the storage at o.Path, makes it if necessary, and removes what
// killed calls have left. Any number of processes may have it open. It turns
// quotas on for the whole file system. ErrInvalid when o does not fit what is
// there.
func Open(ctx context.Context, o Options) (_ *Backend, err error) {
	defer wrap(&err, "open local storage %q", o.Path)
	if o.Path == "" || o.Size < 0 {
		return nil, fmt.Errorf("%w: a path is needed, and a size of 0 or more bytes", backend.ErrInvalid)
	}
	if o.Size != 0 {
		if err := (image{o.Path}).check(o.Size); err != nil {
			return nil, err
		}
		if err := os.MkdirAll(o.Path, 0o700); err != nil {
			return nil, err
		}
	}
	dir, err := filepath.Abs(o.Path)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no such directory", backend.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	b := &Backend{node: o.Node, dir: dir}
	if o.Size != 0 {
		b.image = &image{dir}
		root, err := b.image.attach(ctx, o.Size)
		if err != nil {
			return nil, err
		}
		defer root.Close()
		b.dir = b.image.mount()
	}
	if b.root, err = os.OpenRoot(b.dir); err != nil {
		return nil, err
	}
	if err := b.setUp(ctx); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

func (b *Backend) setUp(ctx context.Context) (err error) {
	if b.fs, err = b.root.Open("."); err != nil {
		return err
	}
	if !isBtrfs(b.fs) {
		return fmt.Errorf("%w: this is %s, not btrfs: set a size to keep the shares in an image file", backend.ErrInvalid, fsName(b.fs))
	}
	id, err := fsID(b.fs)
	if err != nil {
		return err
	}
	b.sysfs = filepath.Join("/sys/fs/btrfs", id)
	// Only root may pass: what a share grants to others, it grants to those
	// who have it mounted.
	for _, dir := range []string{"shares", "snapshots", "meta/shares", "meta/snapshots", "meta/exports"} {
		if err := b.root.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	f, err := b.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	unlock, err := b.lock(ctx, "open")
	if err != nil {
		return err
	}
	defer unlock()
	if err := b.setUpQuota(ctx); err != nil {
		return err
	}
	b.sweep(ctx)
	return nil
}

// Close releases what the backend holds in this process. The image stays
// mounted, as shares and other processes may need it.
func (b *Backend) Close() error {
	var err error
	if b.fs != nil {
		err = b.fs.Close()
	}
	return errors.Join(err, b.root.Close())
}

// Detach closes the backend and unmounts its image, if it has one. ErrInUse
// while a share is mounted or another process has the backend open. It may be
// called after Close, and more than once.
func (b *Backend) Detach(ctx context.Context) (err error) {
	b.Close()
	if b.image == nil {
		return nil
	}
	defer wrap(&err, "detach local storage %q", b.image.dir)
	return b.image.detach(ctx)
}

// sweep removes what killed calls have left, and sets quotas that were lost,
// except where somebody is working. What it cannot do is left to the next Open.
func (b *Backend) sweep(ctx context.Context) {
	for _, k := range []kind{shares, snapshots} {
		ids, _ := b.names(string(k))
		for _, id := range ids {
			if k.valid(id) && b.absent(k.meta(id)) {
				b.unlessBusy(k.subvolume(id), func() { b.removeDebris(k, id) })
			}
		}
	}
	for _, k := range []kind{shares, snapshots, exports} {
		names, _ := b.names(k.metaDir())
		for _, name := range names {
			key, ok := strings.CutSuffix(name, tmpSuffix)
			if !ok || !k.valid(key) {
				continue
			}
			lock := string(exports)
			if k != exports {
				lock = k.subvolume(key)
			}
			b.unlessBusy(lock, func() { b.root.Remove(k.tmp(key)) })
		}
	}
	b.sweepQgroups()
	b.restoreLimits(ctx)
}

// removeDebris removes the subvolume of an object that has no metadata, if there
// is one. The caller holds the object's lock.
func (b *Backend) removeDebris(k kind, id string) error {
	if !b.absent(k.meta(id)) || !b.exists(k.subvolume(id)) {
		return nil
	}
	dir, err := b.root.Open(string(k))
	if err != nil {
		return err
	}
	defer dir.Close()
	info, err := subvolumeAt(dir, id)
	if err != nil {
		return err
	}
	if err := destroySubvolume(dir, id); err != nil {
		return err
	}
	crash("remove: subvolume gone")
	startCommit(b.fs)
	// Since Linux 6.11 the quota group goes with the subvolume, later, and
	// asking for it is refused.
	destroyQgroup(b.fs, info.id)
	b.settleQuota()
	return nil
}

// make makes the subvolume of a new object, from the subvolume source unless
// that is empty. Then finish writes the metadata; if it fails nothing is left.
// The caller holds the object's lock.
func (b *Backend) make(k kind, id, source string, finish func(f *os.File, info *subvolInfo) error) (err error) {
	if err := b.removeDebris(k, id); err != nil {
		return err
	}
	dir, err := b.root.Open(string(k))
	if err != nil {
		return err
	}
	defer dir.Close()
	crash("make: begin")
	if source == "" {
		err = createSubvolume(dir, id)
	} else {
		var src *os.File
		if src, err = b.root.Open(source); err != nil {
			return err
		}
		defer src.Close()
		err = snapshotSubvolume(src, dir, id, k == snapshots)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			b.removeDebris(k, id)
		}
	}()
	crash("make: subvolume made")
	f, err := b.root.Open(k.subvolume(id))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := subvolume(f)
	if err != nil {
		return err
	}
	return finish(f, info)
}

// delete removes an object unless mayDelete returns an error. The exports are
// locked while that is asked and the object stops to exist.
func (b *Backend) delete(ctx context.Context, k kind, id string, mayDelete func() error) error {
	if !k.valid(id) {
		return nil
	}
	unlock, err := b.lock(ctx, k.subvolume(id))
	if err != nil {
		return err
	}
	defer unlock()
	unlockExports, err := b.lock(ctx, string(exports))
	if err != nil {
		return err
	}
	err = mayDelete()
	if err == nil {
		err = b.forget(k, id)
	}
	unlockExports()
	if err != nil {
		return err
	}
	return b.removeDebris(k, id)
}

// Capacity implements backend.CapacityReporter. What is available is what the
// file system has free; sizes of shares are not subtracted from it.
func (b *Backend) Capacity(ctx context.Context) (_ backend.Capacity, err error) {
	defer wrap(&err, "capacity")
	if err := ctx.Err(); err != nil {
		return backend.Capacity{}, err
	}
	total, free, err := b.space()
	return backend.Capacity{Available: free, MaxShareSize: total, MinShareSize: MinShareSize, Node: b.node}, err
}

// OnlyNode implements backend.Bound.
func (b *Backend) OnlyNode() string { return b.node }

func checkName(name string) error {
	if name == "" || len(name) > maxName || !utf8.ValidString(name) {
		return fmt.Errorf("%w: a name is 1 to %d bytes of UTF-8, this has %d bytes", backend.ErrInvalid, maxName, len(name))
	}
	return nil
}

func (b *Backend) location(k kind, id string) string { return filepath.Join(b.dir, string(k), id) }

// absent is true only where the file system says so for sure: what cannot be
// looked at may be there, and must not be taken for debris.
func (b *Backend) absent(name string) bool {
	_, err := b.root.Lstat(name)
	return errors.Is(err, fs.ErrNotExist)
}

func (b *Backend) exists(name string) bool {
	_, err := b.root.Lstat(name)
	return err == nil
}

// space returns the size and the free space of the file system, in bytes.
func (b *Backend) space() (total, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(b.fs.Fd()), &st); err != nil {
		return 0, 0, os.NewSyscallError("statfs", err)
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil
}

func isBtrfs(f *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && st.Type == unix.BTRFS_SUPER_MAGIC
}

func fsName(f *os.File) string {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return err.Error()
	}
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.TMPFS_MAGIC: "tmpfs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.NFS_SUPER_MAGIC: "nfs",
	}
	if name, ok := names[int64(st.Type)]; ok {
		return name
	}
	return fmt.Sprintf("a file system of type %#x", st.Type)
}

// wrap says what was being done, and gives an error that has no sentinel yet the
// one that fits.
func wrap(err *error, format string, args ...any) {
	if *err != nil {
		*err = fmt.Errorf(format+": %w", append(args, classify(*err))...)
	}
}

func classify(err error) error {
	for _, known := range []error{
		backend.ErrInvalid, backend.ErrNotFound, backend.ErrConflict, backend.ErrInUse, backend.ErrExhausted,
		backend.ErrPending, backend.ErrUnavailable, context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, known) {
			return err
		}
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %v: delete shares or snapshots, or add space", backend.ErrExhausted, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %v: somebody has it mounted or open", backend.ErrInUse, err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: %v: btrfs goes read-only after an error: look into the kernel log", backend.ErrUnavailable, err)
	}
	return fmt.Errorf("%w: %v", backend.ErrUnavailable, err)
}
