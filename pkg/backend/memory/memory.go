// Package memory is a backend without a storage system, for the tests of the
// layers above. It keeps the whole contract, and with a directory its exports
// can be mounted.
package memory

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// Store is the storage system: it outlives the backends that are opened over
// it, as a disk outlives a process. The exported fields are for a test to set
// before the first call.
type Store struct {
	// Now is the storage system's clock.
	Now func() time.Time
	// Can is what all shares can do; at first everything.
	Can backend.Abilities
	// Room is the bytes that all shares together can be given; at first 1 PiB.
	Room int64
	// Node is the only node that can mount exports; at first any.
	Node string

	dir       string
	mu        sync.Mutex
	made      int // objects so far
	shares    map[string]backend.Share
	snapshots map[string]backend.Snapshot
	exports   map[string]backend.Export // by consumer
	grants    map[grant]bool            // whether the node may only read
}

type grant struct{ consumer, node string }

// NewStore returns an empty store. Where dir is not empty, each share is a
// directory below it and each snapshot a copy of one; else exports lead nowhere.
func NewStore(dir string) *Store {
	return &Store{
		Now:       time.Now,
		Can:       backend.Abilities{Snapshot: true, Clone: true, MountSnapshot: true},
		Room:      1 << 50,
		dir:       dir,
		shares:    map[string]backend.Share{},
		snapshots: map[string]backend.Snapshot{},
		exports:   map[string]backend.Export{},
		grants:    map[grant]bool{},
	}
}

// Open returns a backend over the store. It is a backend.CapacityReporter, a
// backend.Bound, a backend.UsageReporter and a backend.Granter too.
func (s *Store) Open() backend.Backend { return handle{s} }

type handle struct{ *Store }

// do runs one method: alone, not after ctx has ended, and with its errors
// saying what was being done.
func do[T any](ctx context.Context, s *Store, f func() (T, error), what string, args ...any) (T, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var result T
	err := ctx.Err()
	if err == nil {
		result, err = f()
	}
	if err != nil {
		var none T
		return none, fmt.Errorf(what+": %w", append(args, err)...)
	}
	return result, nil
}

// try is do for a method that returns only an error.
func try(ctx context.Context, s *Store, f func() error, what string, args ...any) error {
	_, err := do(ctx, s, func() (struct{}, error) { return struct{}{}, f() }, what, args...)
	return err
}

func (h handle) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	return do(ctx, h.Store, func() (*backend.Share, error) { return h.createShare(req) }, "create share %q", req.Name)
}

func (s *Store) createShare(req backend.CreateShareRequest) (*backend.Share, error) {
	if req.Name == "" || req.MinSize < 0 || req.MaxSize < 0 || (req.MaxSize > 0 && req.MaxSize < req.MinSize) {
		return nil, fmt.Errorf("%w: name or range of sizes %d to %d", backend.ErrInvalid, req.MinSize, req.MaxSize)
	}
	if old, err := s.shareNamed(req.Name); err == nil {
		fits := old.Size >= req.MinSize && (req.MaxSize == 0 || old.Size <= req.MaxSize)
		if !fits || old.FromSnapshot != req.FromSnapshot || old.Role != req.Role || !maps.Equal(old.Description, req.Description) {
			return nil, backend.ErrConflict
		}
		return old, nil
	}
	// The source comes behind the name: a repeated call does not need it.
	if req.FromSnapshot != "" {
		source, err := get(s.snapshots, req.FromSnapshot)
		switch {
		case err != nil:
			return nil, fmt.Errorf("source: %w", err)
		case !s.Can.Clone:
			return nil, fmt.Errorf("clone: %w", backend.ErrUnsupported)
		case req.MinSize < source.Size:
			return nil, fmt.Errorf("%w: %d bytes cannot hold the source of %d", backend.ErrInvalid, req.MinSize, source.Size)
		}
	}
	size := max(req.MinSize, 1) // no size wished for: the smallest there is
	if left := s.available(); size > left {
		return nil, fmt.Errorf("%w: %d bytes asked for, %d left", backend.ErrExhausted, size, left)
	}
	id := s.newID(req.Name)
	if err := s.makeTree(id, req.FromSnapshot); err != nil {
		return nil, err
	}
	s.shares[id] = backend.Share{
		ID: id, Name: req.Name, Size: size, Node: s.Node, CreatedAt: s.Now(), FromSnapshot: req.FromSnapshot,
		Draft: req.Draft, Role: req.Role, Description: maps.Clone(req.Description), Can: s.Can,
	}
	return s.share(id)
}

func (h handle) Share(ctx context.Context, id string) (*backend.Share, error) {
	return do(ctx, h.Store, func() (*backend.Share, error) { return h.share(id) }, "share %q", id)
}

func (h handle) ShareNamed(ctx context.Context, name string) (*backend.Share, error) {
	return do(ctx, h.Store, func() (*backend.Share, error) { return h.shareNamed(name) }, "share named %q", name)
}

func (h handle) CommitShare(ctx context.Context, id string) error {
	return try(ctx, h.Store, func() error {
		share, err := h.share(id)
		if err == nil {
			share.Draft = false
			h.shares[id] = *share
		}
		return err
	}, "commit share %q", id)
}

func (h handle) ExpandShare(ctx context.Context, id string, size int64) (*backend.Share, error) {
	return do(ctx, h.Store, func() (*backend.Share, error) {
		share, err := h.share(id)
		if err != nil || size <= share.Size {
			return share, err
		}
		if left := h.available(); size-share.Size > left {
			return nil, fmt.Errorf("%w: %d bytes left", backend.ErrExhausted, left)
		}
		share.Size = size
		h.shares[id] = *share
		return h.share(id)
	}, "expand share %q to %d bytes", id, size)
}

func (h handle) DeleteShare(ctx context.Context, id string) error {
	return try(ctx, h.Store, func() error {
		if _, err := h.share(id); err != nil {
			return nil
		}
		maps.DeleteFunc(h.exports, func(consumer string, e backend.Export) bool {
			if e.Target.ShareID != id {
				return false
			}
			h.revoke(consumer, "")
			return true
		})
		// The snapshots stay, with the id of a share that is no more.
		delete(h.shares, id)
		return h.removeTree(id)
	}, "delete share %q", id)
}

func (h handle) CreateSnapshot(ctx context.Context, req backend.CreateSnapshotRequest) (*backend.Snapshot, error) {
	return do(ctx, h.Store, func() (*backend.Snapshot, error) { return h.createSnapshot(req) },
		"create snapshot %q of share %q", req.Name, req.ShareID)
}

func (s *Store) createSnapshot(req backend.CreateSnapshotRequest) (*backend.Snapshot, error) {
	if req.Name == "" {
		return nil, fmt.Errorf("%w: no name", backend.ErrInvalid)
	}
	// The share is looked up behind the name: a repeated call does not need it.
	for _, old := range s.snapshots {
		switch {
		case old.Name != req.Name:
		case old.ShareID != req.ShareID || old.Role != req.Role:
			return nil, backend.ErrConflict
		default:
			return &old, nil
		}
	}
	share, err := s.share(req.ShareID)
	if err != nil {
		return nil, err
	}
	if !share.Can.Snapshot {
		return nil, backend.ErrUnsupported
	}
	id := s.newID(req.Name)
	if err := s.makeTree(id, share.ID); err != nil {
		return nil, err
	}
	s.snapshots[id] = backend.Snapshot{
		ID: id, Name: req.Name, ShareID: share.ID, Size: share.Size, CreatedAt: s.Now(), Role: req.Role,
	}
	return get(s.snapshots, id)
}

func (h handle) Snapshot(ctx context.Context, id string) (*backend.Snapshot, error) {
	return do(ctx, h.Store, func() (*backend.Snapshot, error) { return get(h.snapshots, id) }, "snapshot %q", id)
}

func (h handle) DeleteSnapshot(ctx context.Context, id string) error {
	return try(ctx, h.Store, func() error {
		if _, err := get(h.snapshots, id); err != nil {
			return nil
		}
		for consumer, export := range h.exports {
			if export.Target.SnapshotID == id {
				return fmt.Errorf("%w by %s", backend.ErrInUse, consumer)
			}
		}
		delete(h.snapshots, id)
		return h.removeTree(id)
	}, "delete snapshot %q", id)
}

var validConsumer = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

func (h handle) Export(ctx context.Context, target backend.Target, consumer string) (*backend.Export, error) {
	return do(ctx, h.Store, func() (*backend.Export, error) { return h.export(target, consumer) },
		"export %+v to %q", target, consumer)
}

func (s *Store) export(target backend.Target, consumer string) (*backend.Export, error) {
	if !validConsumer.MatchString(consumer) {
		return nil, fmt.Errorf("%w: consumer", backend.ErrInvalid)
	}
	id, err := s.find(target)
	if err != nil {
		return nil, err
	}
	// What is held is looked at before what the store can do: an ability that
	// went away takes no export with it.
	if held, err := get(s.exports, consumer); err == nil {
		if held.Target != target {
			return nil, fmt.Errorf("%w: it holds %+v", backend.ErrConflict, held.Target)
		}
		return held, nil
	}
	isSnapshot := target.SnapshotID != ""
	if isSnapshot && !s.Can.MountSnapshot {
		return nil, fmt.Errorf("mount a snapshot: %w", backend.ErrUnsupported)
	}
	s.exports[consumer] = backend.Export{
		Target: target, Consumer: consumer, ReadOnly: isSnapshot,
		Protocol: "bind", Locations: []string{s.tree(id)}, Node: s.Node,
	}
	return get(s.exports, consumer)
}

func (h handle) Unexport(ctx context.Context, target backend.Target, consumer string) error {
	return try(ctx, h.Store, func() error {
		if h.exports[consumer].Target == target {
			delete(h.exports, consumer)
			h.revoke(consumer, "")
		}
		return nil
	}, "unexport %+v from %q", target, consumer)
}

// Grant implements backend.Granter. It lets in whoever it is told of, and holds
// nobody off that it is not.
func (h handle) Grant(ctx context.Context, consumer string, node backend.Node, readOnly bool) (*backend.Export, error) {
	return do(ctx, h.Store, func() (*backend.Export, error) {
		export, err := get(h.exports, consumer)
		if err != nil {
			return nil, err
		}
		g := grant{consumer, node.Name}
		reads, granted := h.grants[g]
		h.grants[g] = readOnly && (reads || !granted)
		return export, nil
	}, "let node %q in to what %q holds", node.Name, consumer)
}

// Revoke implements backend.Granter.
func (h handle) Revoke(ctx context.Context, consumer, node string) error {
	return try(ctx, h.Store, func() error { h.revoke(consumer, node); return nil }, "revoke node %q from %q", node, consumer)
}

func (s *Store) revoke(consumer, node string) {
	maps.DeleteFunc(s.grants, func(g grant, _ bool) bool { return g.consumer == consumer && (node == "" || g.node == node) })
}

// Granted returns the nodes that were let in to what a consumer holds, and
// whether each may only read.
func (s *Store) Granted(consumer string) map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	nodes := map[string]bool{}
	for g, readOnly := range s.grants {
		if g.consumer == consumer {
			nodes[g.node] = readOnly
		}
	}
	return nodes
}

func (h handle) ExportOf(ctx context.Context, consumer string) (*backend.Export, error) {
	return do(ctx, h.Store, func() (*backend.Export, error) { return get(h.exports, consumer) }, "export of %q", consumer)
}

func (h handle) ListShares(ctx context.Context, after string, limit int) (list []*backend.Share, more bool, err error) {
	err = try(ctx, h.Store, func() error {
		list, more = page(h.shares, after, limit)
		for _, share := range list {
			share.Description = maps.Clone(share.Description)
		}
		return nil
	}, "list shares")
	return list, more, err
}

func (h handle) ListSnapshots(ctx context.Context, after string, limit int) (list []*backend.Snapshot, more bool, err error) {
	err = try(ctx, h.Store, func() error { list, more = page(h.snapshots, after, limit); return nil }, "list snapshots")
	return list, more, err
}

func (h handle) ListExports(ctx context.Context, after string, limit int) (list []*backend.Export, more bool, err error) {
	err = try(ctx, h.Store, func() error { list, more = page(h.exports, after, limit); return nil }, "list exports")
	return list, more, err
}

// Capacity implements backend.CapacityReporter.
func (h handle) Capacity(ctx context.Context) (backend.Capacity, error) {
	return do(ctx, h.Store, func() (backend.Capacity, error) {
		return backend.Capacity{Available: h.available(), MaxShareSize: h.Room, MinShareSize: 1, Node: h.Node}, nil
	}, "capacity")
}

// OnlyNode implements backend.Bound.
func (h handle) OnlyNode() string { return h.Node }

// Usage implements backend.UsageReporter: the apparent sizes of the files, or
// unknown where there are none.
func (h handle) Usage(ctx context.Context, target backend.Target) (backend.Usage, error) {
	return do(ctx, h.Store, func() (backend.Usage, error) {
		id, err := h.find(target)
		if err != nil || h.dir == "" {
			return backend.Usage{UsedBytes: -1, UsedInodes: -1}, err
		}
		var usage backend.Usage
		err = filepath.WalkDir(h.tree(id), func(_ string, entry fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			usage.UsedInodes++
			if info, err := entry.Info(); err == nil && info.Mode().IsRegular() {
				usage.UsedBytes += info.Size()
			}
			return nil
		})
		return usage, unavailable(err)
	}, "usage of %+v", target)
}

func (s *Store) share(id string) (*backend.Share, error) {
	share, err := get(s.shares, id)
	if err == nil {
		share.Description = maps.Clone(share.Description)
	}
	return share, err
}

func (s *Store) shareNamed(name string) (*backend.Share, error) {
	for id, share := range s.shares {
		if share.Name == name {
			return s.share(id)
		}
	}
	return nil, backend.ErrNotFound
}

// available is the room that is left. The sizes of shares are promises: what
// is written into them does not matter.
func (s *Store) available() int64 {
	left := s.Room
	for _, share := range s.shares {
		left -= share.Size
	}
	return left
}

// newID never gives an id twice, also not to the same name, and its ids come in
// no order: nobody shall come to rely on either.
func (s *Store) newID(name string) string {
	s.made++
	return fmt.Sprintf("%x", sha256.Sum256(fmt.Appendf(nil, "%d %s", s.made, name)))[:32]
}

func (s *Store) find(target backend.Target) (id string, err error) {
	switch {
	case (target.ShareID == "") == (target.SnapshotID == ""):
		err = fmt.Errorf("%w: not exactly one target", backend.ErrInvalid)
	case target.ShareID != "":
		_, err = get(s.shares, target.ShareID)
	default:
		_, err = get(s.snapshots, target.SnapshotID)
	}
	return cmp.Or(target.ShareID, target.SnapshotID), err
}

func (s *Store) tree(id string) string {
	return filepath.Join(cmp.Or(s.dir, "/nonexistent"), id)
}

// makeTree makes the directory of an object, with the contents of another one
// if from is not empty. What a failed call left is of an id that is never used
// again.
func (s *Store) makeTree(id, from string) error {
	if s.dir == "" {
		return nil
	}
	err := os.Mkdir(s.tree(id), 0o777)
	if err == nil && from != "" {
		err = os.CopyFS(s.tree(id), os.DirFS(s.tree(from)))
	}
	if err != nil {
		return unavailable(errors.Join(err, os.RemoveAll(s.tree(id))))
	}
	return nil
}

func (s *Store) removeTree(id string) error {
	if s.dir == "" {
		return nil
	}
	return unavailable(os.RemoveAll(s.tree(id)))
}

// unavailable is the kind of every error of the file system.
func unavailable(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", backend.ErrUnavailable, err)
}

// get returns a copy: what a caller does to it is not done to the store.
func get[T any](objects map[string]T, id string) (*T, error) {
	if object, ok := objects[id]; ok {
		return &object, nil
	}
	return nil, backend.ErrNotFound
}

func page[T any](objects map[string]T, after string, limit int) (list []*T, more bool) {
	for _, id := range slices.Sorted(maps.Keys(objects)) {
		if id <= after {
			continue
		}
		if limit > 0 && len(list) == limit {
			return list, true
		}
		object := objects[id]
		list = append(list, &object)
	}
	return list, false
}
