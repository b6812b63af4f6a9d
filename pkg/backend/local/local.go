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
	"maps"
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

// Backend implements backend.Backend, CapacityReporter and UsageReporter.
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
		if err := b.image.attach(ctx, o.Size); err != nil {
			return nil, err
		}
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
			if k.valid(id) && !b.exists(k.meta(id)) {
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
	if b.exists(k.meta(id)) || !b.exists(k.subvolume(id)) {
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

// CreateShare implements backend.Backend.
func (b *Backend) CreateShare(ctx context.Context, req backend.CreateShareRequest) (_ *backend.Share, err error) {
	defer wrap(&err, "create share %q", req.Name)
	if err := checkName(req.Name); err != nil {
		return nil, err
	}
	if req.MinSize < 0 || req.MaxSize < 0 || req.MaxSize != 0 && req.MaxSize < max(req.MinSize, MinShareSize) {
		return nil, fmt.Errorf("%w: no size between %d and %d bytes is possible: a share has at least %d bytes",
			backend.ErrInvalid, req.MinSize, req.MaxSize, MinShareSize)
	}
	id := idOf(req.Name)
	keys, source := []string{shares.subvolume(id)}, ""
	if req.FromSnapshot != "" {
		source = snapshots.subvolume(req.FromSnapshot)
		keys = append(keys, source)
	}
	unlock, err := b.lock(ctx, keys...)
	if err != nil {
		return nil, err
	}
	defer unlock()

	var m shareMeta
	if err := b.load(ctx, shares, id, &m); err == nil {
		if m.Name != req.Name || m.FromSnapshot != req.FromSnapshot || m.Role != req.Role || !maps.Equal(m.Description, req.Description) ||
			m.Size < req.MinSize || req.MaxSize != 0 && m.Size > req.MaxSize {
			return nil, fmt.Errorf("%w: there is one of %d bytes, source %q, role %s, description %v",
				backend.ErrConflict, m.Size, m.FromSnapshot, m.Role, m.Description)
		}
		return b.share(id, m), nil
	} else if !errors.Is(err, backend.ErrNotFound) {
		return nil, err
	}
	size, err := b.sizeFor(ctx, req)
	if err != nil {
		return nil, err
	}
	err = b.make(shares, id, source, func(f *os.File, info *subvolInfo) error {
		if source == "" {
			if err := f.Chmod(0o755); err != nil { // the umask has had its say
				return err
			}
		}
		if err := limitQgroup(b.fs, info.id, size); err != nil {
			return err
		}
		crash("create share: limited")
		m = shareMeta{
			Name: req.Name, Size: size, CreatedAt: info.created(), FromSnapshot: req.FromSnapshot,
			Draft: req.Draft, Role: req.Role, Description: req.Description,
		}
		return b.save(shares, id, m)
	})
	if err != nil {
		return nil, err
	}
	return b.share(id, m), nil
}

// sizeFor chooses the smallest size that the request allows.
func (b *Backend) sizeFor(ctx context.Context, req backend.CreateShareRequest) (int64, error) {
	size := max(req.MinSize, MinShareSize)
	if req.FromSnapshot != "" {
		var source snapshotMeta
		if err := b.load(ctx, snapshots, req.FromSnapshot, &source); err != nil {
			return 0, err
		}
		if req.MinSize < source.Size {
			return 0, fmt.Errorf("%w: %d bytes cannot hold snapshot %q of a share of %d bytes",
				backend.ErrInvalid, req.MinSize, req.FromSnapshot, source.Size)
		}
	}
	if err := b.checkTotal(size); err != nil {
		return 0, err
	}
	_, free, err := b.space()
	if err == nil && free < minFree {
		err = fmt.Errorf("%w: %d bytes are free, %d are needed: delete shares or snapshots, or add space",
			backend.ErrExhausted, free, minFree)
	}
	return size, err
}

func (b *Backend) checkTotal(size int64) error {
	total, _, err := b.space()
	if err == nil && size > total {
		err = fmt.Errorf("%w: %d bytes are more than the whole file system has (%d)", backend.ErrExhausted, size, total)
	}
	return err
}

// Share implements backend.Backend.
func (b *Backend) Share(ctx context.Context, id string) (_ *backend.Share, err error) {
	defer wrap(&err, "share %q", id)
	return b.loadShare(ctx, id)
}

// ShareNamed implements backend.Backend.
func (b *Backend) ShareNamed(ctx context.Context, name string) (_ *backend.Share, err error) {
	defer wrap(&err, "share named %q", name)
	s, err := b.loadShare(ctx, idOf(name))
	if err == nil && s.Name != name {
		return nil, fmt.Errorf("%w: there is no share of that name", backend.ErrNotFound)
	}
	return s, err
}

func (b *Backend) loadShare(ctx context.Context, id string) (*backend.Share, error) {
	var m shareMeta
	if err := b.load(ctx, shares, id, &m); err != nil {
		return nil, err
	}
	return b.share(id, m), nil
}

func (b *Backend) share(id string, m shareMeta) *backend.Share {
	s := &backend.Share{
		ID: id, Name: m.Name, Size: m.Size, CreatedAt: m.CreatedAt, FromSnapshot: m.FromSnapshot,
		Draft: m.Draft, Role: m.Role, Description: maps.Clone(m.Description),
		Can: backend.Abilities{Snapshot: true, Clone: true, MountSnapshot: true},
	}
	if !b.exists(shares.subvolume(id)) {
		s.Problem = fmt.Sprintf("Its subvolume %s is missing: somebody else has removed it.", b.location(shares, id))
	}
	return s
}

// CommitShare implements backend.Backend.
func (b *Backend) CommitShare(ctx context.Context, id string) (err error) {
	defer wrap(&err, "commit share %q", id)
	unlock, err := b.lock(ctx, shares.subvolume(id))
	if err != nil {
		return err
	}
	defer unlock()
	var m shareMeta
	if err := b.load(ctx, shares, id, &m); err != nil || !m.Draft {
		return err
	}
	m.Draft = false
	return b.save(shares, id, m)
}

// ExpandShare implements backend.Backend.
func (b *Backend) ExpandShare(ctx context.Context, id string, size int64) (_ *backend.Share, err error) {
	defer wrap(&err, "expand share %q to %d bytes", id, size)
	unlock, err := b.lock(ctx, shares.subvolume(id))
	if err != nil {
		return nil, err
	}
	defer unlock()
	var m shareMeta
	if err := b.load(ctx, shares, id, &m); err != nil {
		return nil, err
	}
	if size > m.Size {
		if err := b.checkTotal(size); err != nil {
			return nil, err
		}
		info, err := subvolumeAt(b.fs, shares.subvolume(id))
		if err != nil {
			return nil, err
		}
		// The quota goes first: once the metadata says the new size, no retry
		// would come to the quota.
		if err := limitQgroup(b.fs, info.id, size); err != nil {
			return nil, err
		}
		crash("expand share: limited")
		m.Size = size
		if err := b.save(shares, id, m); err != nil {
			return nil, err
		}
	}
	return b.share(id, m), nil
}

// DeleteShare implements backend.Backend. It does not know whether the share is
// mounted: a mount that outlives the share is an empty directory that cannot be
// written.
func (b *Backend) DeleteShare(ctx context.Context, id string) (err error) {
	defer wrap(&err, "delete share %q", id)
	return b.delete(ctx, shares, id, func() error {
		holders, err := b.holders(ctx, backend.Target{ShareID: id})
		for _, consumer := range holders {
			err = errors.Join(err, b.forget(exports, consumer))
		}
		return err
	})
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

// CreateSnapshot implements backend.Backend.
func (b *Backend) CreateSnapshot(ctx context.Context, req backend.CreateSnapshotRequest) (_ *backend.Snapshot, err error) {
	defer wrap(&err, "create snapshot %q", req.Name)
	if err := checkName(req.Name); err != nil {
		return nil, err
	}
	id, source := idOf(req.Name), shares.subvolume(req.ShareID)
	unlock, err := b.lock(ctx, snapshots.subvolume(id), source)
	if err != nil {
		return nil, err
	}
	defer unlock()

	var m snapshotMeta
	if err := b.load(ctx, snapshots, id, &m); err == nil {
		if m.Name != req.Name || m.ShareID != req.ShareID || m.Role != req.Role {
			return nil, fmt.Errorf("%w: there is one of share %q, role %s", backend.ErrConflict, m.ShareID, m.Role)
		}
		return snapshot(id, m), nil
	} else if !errors.Is(err, backend.ErrNotFound) {
		return nil, err
	}
	var of shareMeta
	if err := b.load(ctx, shares, req.ShareID, &of); err != nil {
		return nil, err
	}
	err = b.make(snapshots, id, source, func(_ *os.File, info *subvolInfo) error {
		m = snapshotMeta{Name: req.Name, ShareID: req.ShareID, Size: of.Size, CreatedAt: info.created(), Role: req.Role}
		return b.save(snapshots, id, m)
	})
	if err != nil {
		return nil, err
	}
	return snapshot(id, m), nil
}

// Snapshot implements backend.Backend.
func (b *Backend) Snapshot(ctx context.Context, id string) (_ *backend.Snapshot, err error) {
	defer wrap(&err, "snapshot %q", id)
	return b.loadSnapshot(ctx, id)
}

func (b *Backend) loadSnapshot(ctx context.Context, id string) (*backend.Snapshot, error) {
	var m snapshotMeta
	if err := b.load(ctx, snapshots, id, &m); err != nil {
		return nil, err
	}
	return snapshot(id, m), nil
}

func snapshot(id string, m snapshotMeta) *backend.Snapshot {
	return &backend.Snapshot{ID: id, Name: m.Name, ShareID: m.ShareID, Size: m.Size, CreatedAt: m.CreatedAt, Role: m.Role}
}

// DeleteSnapshot implements backend.Backend.
func (b *Backend) DeleteSnapshot(ctx context.Context, id string) (err error) {
	defer wrap(&err, "delete snapshot %q", id)
	return b.delete(ctx, snapshots, id, func() error {
		holders, err := b.holders(ctx, backend.Target{SnapshotID: id})
		if err != nil || len(holders) == 0 {
			return err
		}
		const named = 3
		more := ""
		if len(holders) > named {
			more = fmt.Sprintf(" and %d more", len(holders)-named)
			holders = holders[:named]
		}
		return fmt.Errorf("%w: held by %s%s", backend.ErrInUse, strings.Join(holders, ", "), more)
	})
}

// holders returns the consumers of a target, in order.
func (b *Backend) holders(ctx context.Context, target backend.Target) ([]string, error) {
	all, _, err := page(ctx, b, exports, "", 0, b.loadExport)
	var consumers []string
	for _, e := range all {
		if e.Target == target {
			consumers = append(consumers, e.Consumer)
		}
	}
	return consumers, err
}

// Export implements backend.Backend.
func (b *Backend) Export(ctx context.Context, target backend.Target, consumer string) (_ *backend.Export, err error) {
	k, id := kindOf(target)
	defer wrap(&err, "export %s to %q", k.subvolume(id), consumer)
	if err := checkExport(target, consumer); err != nil {
		return nil, err
	}
	unlock, err := b.lock(ctx, string(exports))
	if err != nil {
		return nil, err
	}
	defer unlock()
	var m exportMeta
	if err := b.load(ctx, exports, consumer, &m); err == nil {
		if held := backend.Target(m); held != target {
			return nil, fmt.Errorf("%w: this consumer holds %s", backend.ErrConflict, held)
		}
		return b.export(consumer, m), nil
	} else if !errors.Is(err, backend.ErrNotFound) {
		return nil, err
	}
	if err := b.load(ctx, k, id, &struct{}{}); err != nil {
		return nil, err
	}
	if !b.exists(k.subvolume(id)) {
		return nil, fmt.Errorf("%w: %s is missing: somebody else has removed it", backend.ErrUnavailable, b.location(k, id))
	}
	m = exportMeta(target)
	if err := b.save(exports, consumer, m); err != nil {
		return nil, err
	}
	return b.export(consumer, m), nil
}

func (b *Backend) loadExport(ctx context.Context, consumer string) (*backend.Export, error) {
	var m exportMeta
	if err := b.load(ctx, exports, consumer, &m); err != nil {
		return nil, err
	}
	return b.export(consumer, m), nil
}

func (b *Backend) export(consumer string, m exportMeta) *backend.Export {
	target := backend.Target(m)
	k, id := kindOf(target)
	return &backend.Export{
		Target: target, Consumer: consumer, ReadOnly: k == snapshots,
		Protocol: "bind", Location: b.location(k, id), Node: b.node,
	}
}

// Unexport implements backend.Backend.
func (b *Backend) Unexport(ctx context.Context, target backend.Target, consumer string) (err error) {
	k, id := kindOf(target)
	defer wrap(&err, "unexport %s from %q", k.subvolume(id), consumer)
	if err := checkExport(target, consumer); err != nil {
		return err
	}
	unlock, err := b.lock(ctx, string(exports))
	if err != nil {
		return err
	}
	defer unlock()
	var m exportMeta
	err = b.load(ctx, exports, consumer, &m)
	if errors.Is(err, backend.ErrNotFound) || err == nil && backend.Target(m) != target {
		return nil
	}
	if err != nil {
		return err
	}
	return b.forget(exports, consumer)
}

// ExportOf implements backend.Backend.
func (b *Backend) ExportOf(ctx context.Context, consumer string) (_ *backend.Export, err error) {
	defer wrap(&err, "export of %q", consumer)
	return b.loadExport(ctx, consumer)
}

// ListShares implements backend.Backend.
func (b *Backend) ListShares(ctx context.Context, after string, limit int) (_ []*backend.Share, more bool, err error) {
	defer wrap(&err, "list shares")
	return page(ctx, b, shares, after, limit, b.loadShare)
}

// ListSnapshots implements backend.Backend.
func (b *Backend) ListSnapshots(ctx context.Context, after string, limit int) (_ []*backend.Snapshot, more bool, err error) {
	defer wrap(&err, "list snapshots")
	return page(ctx, b, snapshots, after, limit, b.loadSnapshot)
}

// ListExports implements backend.Backend.
func (b *Backend) ListExports(ctx context.Context, after string, limit int) (_ []*backend.Export, more bool, err error) {
	defer wrap(&err, "list exports")
	return page(ctx, b, exports, after, limit, b.loadExport)
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

func kindOf(t backend.Target) (k kind, id string) {
	if t.SnapshotID != "" {
		return snapshots, t.SnapshotID
	}
	return shares, t.ShareID
}

func checkExport(t backend.Target, consumer string) error {
	if (t.ShareID == "") == (t.SnapshotID == "") {
		return fmt.Errorf("%w: the target is one share or one snapshot", backend.ErrInvalid)
	}
	if !exports.valid(consumer) {
		return fmt.Errorf("%w: a consumer is 1 to 64 of a-z, 0-9 and -", backend.ErrInvalid)
	}
	return nil
}

func checkName(name string) error {
	if name == "" || len(name) > maxName || !utf8.ValidString(name) {
		return fmt.Errorf("%w: a name is 1 to %d bytes of UTF-8, this has %d bytes", backend.ErrInvalid, maxName, len(name))
	}
	return nil
}

func (b *Backend) location(k kind, id string) string { return filepath.Join(b.dir, string(k), id) }

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
