package local

import (
	"context"
	"errors"
	"fmt"

	"github.com/abaca-csi/abaca/pkg/backend"
)

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
		Protocol: "bind", Locations: []string{b.location(k, id)}, Node: b.node,
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

// ListExports implements backend.Backend.
func (b *Backend) ListExports(ctx context.Context, after string, limit int) (_ []*backend.Export, more bool, err error) {
	defer wrap(&err, "list exports")
	return page(ctx, b, exports, after, limit, b.loadExport)
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
