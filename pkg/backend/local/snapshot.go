package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/abaca-csi/abaca/pkg/backend"
)

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

// ListSnapshots implements backend.Backend.
func (b *Backend) ListSnapshots(ctx context.Context, after string, limit int) (_ []*backend.Snapshot, more bool, err error) {
	defer wrap(&err, "list snapshots")
	return page(ctx, b, snapshots, after, limit, b.loadSnapshot)
}
