package backendtest

import (
	"context"
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"testing"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// kinds are what an error of a backend can be.
var kinds = []error{
	backend.ErrInvalid, backend.ErrNotFound, backend.ErrConflict, backend.ErrInUse, backend.ErrExhausted,
	backend.ErrUnsupported, backend.ErrPending, backend.ErrUnavailable, backend.ErrAuth,
	context.Canceled, context.DeadlineExceeded,
}

var (
	validID       = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,48}$`)
	validConsumer = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
)

// checked checks the form of every answer of a backend, whatever the test
// asked for: no test can forget it. It only reports, as answers also come in
// goroutines.
type checked struct {
	t *testing.T
	b backend.Backend
}

func (c checked) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	return c.share(c.b.CreateShare(ctx, req))
}

func (c checked) Share(ctx context.Context, id string) (*backend.Share, error) {
	return c.share(c.b.Share(ctx, id))
}

func (c checked) ShareNamed(ctx context.Context, name string) (*backend.Share, error) {
	share, err := c.share(c.b.ShareNamed(ctx, name))
	if pending := errors.Is(err, backend.ErrPending); err != nil && pending != (share != nil) {
		c.t.Errorf("share %v with error %q: what was begun goes with ErrPending, and nothing with any other", share, err)
	}
	return share, err
}

func (c checked) CommitShare(ctx context.Context, id string) error {
	return c.err(c.b.CommitShare(ctx, id))
}

func (c checked) ExpandShare(ctx context.Context, id string, size int64) (*backend.Share, error) {
	return c.share(c.b.ExpandShare(ctx, id, size))
}

func (c checked) DeleteShare(ctx context.Context, id string) error {
	return c.err(c.b.DeleteShare(ctx, id))
}

func (c checked) CreateSnapshot(ctx context.Context, req backend.CreateSnapshotRequest) (*backend.Snapshot, error) {
	return c.snapshot(c.b.CreateSnapshot(ctx, req))
}

func (c checked) Snapshot(ctx context.Context, id string) (*backend.Snapshot, error) {
	return c.snapshot(c.b.Snapshot(ctx, id))
}

func (c checked) DeleteSnapshot(ctx context.Context, id string) error {
	return c.err(c.b.DeleteSnapshot(ctx, id))
}

func (c checked) Export(ctx context.Context, target backend.Target, consumer string) (*backend.Export, error) {
	return c.export(c.b.Export(ctx, target, consumer))
}

func (c checked) Unexport(ctx context.Context, target backend.Target, consumer string) error {
	return c.err(c.b.Unexport(ctx, target, consumer))
}

func (c checked) ExportOf(ctx context.Context, consumer string) (*backend.Export, error) {
	return c.export(c.b.ExportOf(ctx, consumer))
}

func (c checked) ListShares(ctx context.Context, after string, limit int) ([]*backend.Share, bool, error) {
	list, more, err := c.b.ListShares(ctx, after, limit)
	return list, more, each(c, list, err, c.share)
}

func (c checked) ListSnapshots(ctx context.Context, after string, limit int) ([]*backend.Snapshot, bool, error) {
	list, more, err := c.b.ListSnapshots(ctx, after, limit)
	return list, more, each(c, list, err, c.snapshot)
}

func (c checked) ListExports(ctx context.Context, after string, limit int) ([]*backend.Export, bool, error) {
	list, more, err := c.b.ListExports(ctx, after, limit)
	return list, more, each(c, list, err, c.hold)
}

func each[T any](c checked, list []T, err error, check func(T, error) (T, error)) error {
	for _, item := range list {
		check(item, nil)
	}
	return c.err(err)
}

// err wants exactly one kind, and more text than the kind's own.
func (c checked) err(err error) error {
	if err == nil {
		return nil
	}
	var is []error
	for _, kind := range kinds {
		if errors.Is(err, kind) {
			is = append(is, kind)
		}
	}
	if len(is) != 1 {
		c.t.Errorf("error %q wraps %q, want exactly one sentinel or the context's error", err, is)
	} else if err.Error() == is[0].Error() {
		c.t.Errorf("error %q does not say what was being done", err)
	}
	return err
}

func (c checked) share(s *backend.Share, err error) (*backend.Share, error) {
	switch {
	case err != nil:
	case s == nil:
		c.t.Errorf("neither a share nor an error")
	case !validID.MatchString(s.ID), s.Name == "", s.Size <= 0, s.CreatedAt.IsZero(), s.Problem != "":
		c.t.Errorf("malformed or unhealthy share %+v", *s)
	}
	return s, c.err(err)
}

func (c checked) snapshot(s *backend.Snapshot, err error) (*backend.Snapshot, error) {
	switch {
	case err != nil:
	case s == nil:
		c.t.Errorf("neither a snapshot nor an error")
	case !validID.MatchString(s.ID), !validID.MatchString(s.ShareID), s.Name == "", s.Size <= 0, s.CreatedAt.IsZero():
		c.t.Errorf("malformed snapshot %+v", *s)
	}
	return s, c.err(err)
}

func (c checked) export(e *backend.Export, err error) (*backend.Export, error) {
	switch {
	case err != nil:
	case e == nil:
		c.t.Errorf("neither an export nor an error")
	case e.Protocol == "", len(e.Locations) == 0, slices.Contains(e.Locations, ""):
		c.t.Errorf("malformed export %+v", *e)
	case e.ReadOnly != (e.Target.SnapshotID != ""):
		c.t.Errorf("export %+v: snapshots are read-only and shares are not", *e)
	default:
		// CSI spec 1.13, "Size Limits": the volume context has 4 KiB.
		if text, err := json.Marshal(e); err != nil || len(text) > 4096 {
			c.t.Errorf("export of %d bytes as JSON (error %v), want at most 4096", len(text), err)
		}
	}
	return c.hold(e, err)
}

// hold looks only at what a listing says of an export.
func (c checked) hold(e *backend.Export, err error) (*backend.Export, error) {
	if err == nil && e != nil {
		switch {
		case !validConsumer.MatchString(e.Consumer):
			c.t.Errorf("malformed consumer in %+v", *e)
		case (e.Target.ShareID == "") == (e.Target.SnapshotID == ""):
			c.t.Errorf("export %+v has not exactly one target", *e)
		}
	}
	return e, c.err(err)
}
