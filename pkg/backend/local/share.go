package local

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"

	"github.com/abaca-csi/abaca/pkg/backend"
)

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
		ID: id, Name: m.Name, Size: m.Size, Node: b.node, CreatedAt: m.CreatedAt, FromSnapshot: m.FromSnapshot,
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

// DeleteShare implements backend.Backend. A share that is mounted on this node is
// backend.ErrInUse: its files would vanish under whoever has them open.
func (b *Backend) DeleteShare(ctx context.Context, id string) (err error) {
	defer wrap(&err, "delete share %q", id)
	return b.delete(ctx, shares, id, func() error {
		places, err := b.places(id)
		if err != nil {
			return err
		}
		if len(places) > 0 {
			return fmt.Errorf("%w: it is mounted at %s; unmount it first", backend.ErrInUse, strings.Join(places, ", "))
		}
		holders, err := b.holders(ctx, backend.Target{ShareID: id})
		for _, consumer := range holders {
			err = errors.Join(err, b.forget(exports, consumer))
		}
		return err
	})
}

// ListShares implements backend.Backend.
func (b *Backend) ListShares(ctx context.Context, after string, limit int) (_ []*backend.Share, more bool, err error) {
	defer wrap(&err, "list shares")
	return page(ctx, b, shares, after, limit, b.loadShare)
}
