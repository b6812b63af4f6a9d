// Package fault wraps a backend and lets chosen calls fail, before or after
// their effect, or wait. It is how tests find out what a crash, a lost answer
// or a slow storage system leaves behind.
package fault

import (
	"context"
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// Backend is a backend with faults. It is safe for concurrent use.
//
// It implements the optional interfaces of package backend whether or not the
// inner backend does; where that does not, they return backend.ErrUnsupported.
type Backend struct {
	inner backend.Backend

	mu     sync.Mutex
	calls  map[string]int
	faults []*Fault
}

// Wrap returns inner without any faults yet.
func Wrap(inner backend.Backend) *Backend {
	return &Backend{inner: inner, calls: map[string]int{}}
}

// Fault is what happens to some calls of one method. Its methods set one
// property each and return it, so that it reads as a sentence:
//
//	f.On("CreateShare").Nth(2).FailAfter(backend.ErrPending)
type Fault struct {
	b             *Backend
	method        string
	seen          int // calls since the fault was made
	first, repeat int
	before, after error
	delay         time.Duration
}

// On makes a fault for the next call of a method. Of several that meet in one
// call all delays pass, and the earliest made error is returned. On panics
// where there is no such method: the test that misspells it would pass.
func (f *Backend) On(method string) *Fault {
	if !known(method) {
		panic(fmt.Sprintf("fault: a backend has no method %q", method))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	fault := &Fault{b: f, method: method, first: 1, repeat: 1}
	f.faults = append(f.faults, fault)
	return fault
}

// Calls returns how often a method was called, with or without a fault.
func (f *Backend) Calls(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

// Nth defers the fault to the n-th call from now, the next being the first.
func (t *Fault) Nth(n int) *Fault { return t.set(func() { t.first = t.seen + n }) }

// Repeat lets the fault happen to n calls in a row.
func (t *Fault) Repeat(n int) *Fault { return t.set(func() { t.repeat = n }) }

// Fail returns err instead of calling the inner backend.
func (t *Fault) Fail(err error) *Fault { return t.set(func() { t.before = err }) }

// FailAfter calls the inner backend, and returns err if that succeeds: the
// effect is there, the answer is lost.
func (t *Fault) FailAfter(err error) *Fault { return t.set(func() { t.after = err }) }

// Delay waits for d before the call, or until its context ends; then it does
// not call the inner backend.
func (t *Fault) Delay(d time.Duration) *Fault { return t.set(func() { t.delay = d }) }

func (t *Fault) set(change func()) *Fault {
	t.b.mu.Lock()
	defer t.b.mu.Unlock()
	change()
	return t
}

func known(method string) bool {
	for _, of := range []reflect.Type{
		reflect.TypeFor[backend.Backend](), reflect.TypeFor[backend.CapacityReporter](), reflect.TypeFor[backend.UsageReporter](),
		reflect.TypeFor[backend.Granter](),
	} {
		if _, ok := of.MethodByName(method); ok {
			return true
		}
	}
	return false
}

// next counts a call of a method and sums up what is to happen to it.
func (f *Backend) next(method string) (sum Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[method]++
	for _, t := range f.faults {
		if t.method != method {
			continue
		}
		if t.seen++; t.seen < t.first || t.seen >= t.first+t.repeat {
			continue
		}
		sum.delay += t.delay
		if sum.before == nil && sum.after == nil {
			sum.before, sum.after = t.before, t.after
		}
	}
	return sum
}

// call makes one call with its faults. After one of those the result is T's zero
// value, as if the answer had never come.
func call[T any](ctx context.Context, f *Backend, method string, inner func() (T, error)) (T, error) {
	fault := f.next(method)
	var none T
	if fault.delay > 0 {
		select {
		case <-time.After(fault.delay):
		case <-ctx.Done():
			return none, fmt.Errorf("%s, delayed: %w", method, ctx.Err())
		}
	}
	if fault.before != nil {
		return none, fmt.Errorf("%s, not done: %w", method, fault.before)
	}
	result, err := inner()
	if err == nil && fault.after != nil {
		return none, fmt.Errorf("%s, done: %w", method, fault.after)
	}
	return result, err
}

// do is call for a method that returns only an error.
func do(ctx context.Context, f *Backend, method string, inner func() error) error {
	_, err := call(ctx, f, method, func() (struct{}, error) { return struct{}{}, inner() })
	return err
}

// list is call for a listing.
func list[T any](ctx context.Context, f *Backend, method string, inner func() ([]T, bool, error)) ([]T, bool, error) {
	var more bool
	items, err := call(ctx, f, method, func() (items []T, err error) {
		items, more, err = inner()
		return items, err
	})
	return items, more && err == nil, err
}

func (f *Backend) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	return call(ctx, f, "CreateShare", func() (*backend.Share, error) { return f.inner.CreateShare(ctx, req) })
}

func (f *Backend) Share(ctx context.Context, id string) (*backend.Share, error) {
	return call(ctx, f, "Share", func() (*backend.Share, error) { return f.inner.Share(ctx, id) })
}

func (f *Backend) ShareNamed(ctx context.Context, name string) (*backend.Share, error) {
	return call(ctx, f, "ShareNamed", func() (*backend.Share, error) { return f.inner.ShareNamed(ctx, name) })
}

func (f *Backend) CommitShare(ctx context.Context, id string) error {
	return do(ctx, f, "CommitShare", func() error { return f.inner.CommitShare(ctx, id) })
}

func (f *Backend) ExpandShare(ctx context.Context, id string, size int64) (*backend.Share, error) {
	return call(ctx, f, "ExpandShare", func() (*backend.Share, error) { return f.inner.ExpandShare(ctx, id, size) })
}

func (f *Backend) DeleteShare(ctx context.Context, id string) error {
	return do(ctx, f, "DeleteShare", func() error { return f.inner.DeleteShare(ctx, id) })
}

func (f *Backend) CreateSnapshot(ctx context.Context, req backend.CreateSnapshotRequest) (*backend.Snapshot, error) {
	return call(ctx, f, "CreateSnapshot", func() (*backend.Snapshot, error) { return f.inner.CreateSnapshot(ctx, req) })
}

func (f *Backend) Snapshot(ctx context.Context, id string) (*backend.Snapshot, error) {
	return call(ctx, f, "Snapshot", func() (*backend.Snapshot, error) { return f.inner.Snapshot(ctx, id) })
}

func (f *Backend) DeleteSnapshot(ctx context.Context, id string) error {
	return do(ctx, f, "DeleteSnapshot", func() error { return f.inner.DeleteSnapshot(ctx, id) })
}

func (f *Backend) Export(ctx context.Context, target backend.Target, consumer string) (*backend.Export, error) {
	return call(ctx, f, "Export", func() (*backend.Export, error) { return f.inner.Export(ctx, target, consumer) })
}

func (f *Backend) Unexport(ctx context.Context, target backend.Target, consumer string) error {
	return do(ctx, f, "Unexport", func() error { return f.inner.Unexport(ctx, target, consumer) })
}

func (f *Backend) ExportOf(ctx context.Context, consumer string) (*backend.Export, error) {
	return call(ctx, f, "ExportOf", func() (*backend.Export, error) { return f.inner.ExportOf(ctx, consumer) })
}

func (f *Backend) ListShares(ctx context.Context, after string, limit int) ([]*backend.Share, bool, error) {
	return list(ctx, f, "ListShares", func() ([]*backend.Share, bool, error) { return f.inner.ListShares(ctx, after, limit) })
}

func (f *Backend) ListSnapshots(ctx context.Context, after string, limit int) ([]*backend.Snapshot, bool, error) {
	return list(ctx, f, "ListSnapshots", func() ([]*backend.Snapshot, bool, error) { return f.inner.ListSnapshots(ctx, after, limit) })
}

func (f *Backend) ListExports(ctx context.Context, after string, limit int) ([]*backend.Export, bool, error) {
	return list(ctx, f, "ListExports", func() ([]*backend.Export, bool, error) { return f.inner.ListExports(ctx, after, limit) })
}

// Capacity implements backend.CapacityReporter.
func (f *Backend) Capacity(ctx context.Context) (backend.Capacity, error) {
	inner, ok := f.inner.(backend.CapacityReporter)
	if !ok {
		return backend.Capacity{}, fmt.Errorf("capacity of %T: %w", f.inner, backend.ErrUnsupported)
	}
	return call(ctx, f, "Capacity", func() (backend.Capacity, error) { return inner.Capacity(ctx) })
}

// OnlyNode implements backend.Bound; it cannot fail.
func (f *Backend) OnlyNode() string {
	if inner, ok := f.inner.(backend.Bound); ok {
		return inner.OnlyNode()
	}
	return ""
}

// Usage implements backend.UsageReporter.
func (f *Backend) Usage(ctx context.Context, target backend.Target) (backend.Usage, error) {
	inner, ok := f.inner.(backend.UsageReporter)
	if !ok {
		return backend.Usage{}, fmt.Errorf("usage of %T: %w", f.inner, backend.ErrUnsupported)
	}
	return call(ctx, f, "Usage", func() (backend.Usage, error) { return inner.Usage(ctx, target) })
}

// Grant implements backend.Granter.
func (f *Backend) Grant(ctx context.Context, consumer string, node backend.Node, readOnly bool) (*backend.Export, error) {
	inner, ok := f.inner.(backend.Granter)
	if !ok {
		return nil, fmt.Errorf("grant by %T: %w", f.inner, backend.ErrUnsupported)
	}
	return call(ctx, f, "Grant", func() (*backend.Export, error) { return inner.Grant(ctx, consumer, node, readOnly) })
}

// Revoke implements backend.Granter.
func (f *Backend) Revoke(ctx context.Context, consumer, node string) error {
	inner, ok := f.inner.(backend.Granter)
	if !ok {
		return fmt.Errorf("revoke by %T: %w", f.inner, backend.ErrUnsupported)
	}
	_, err := call(ctx, f, "Revoke", func() (struct{}, error) { return struct{}{}, inner.Revoke(ctx, consumer, node) })
	return err
}

// Sweep implements backend.Sweeper.
func (f *Backend) Sweep(ctx context.Context) ([]string, error) {
	inner, ok := f.inner.(backend.Sweeper)
	if !ok {
		return nil, nil
	}
	return call(ctx, f, "Sweep", func() ([]string, error) { return inner.Sweep(ctx) })
}

// Parameters implements backend.Parameterized; it meets no fault.
func (f *Backend) Parameters() []string {
	if inner, ok := f.inner.(backend.Parameterized); ok {
		return inner.Parameters()
	}
	return nil
}

// CheckReference implements backend.Parameterized; it meets no fault.
func (f *Backend) CheckReference(ctx context.Context, shareID string, parameters map[string]string) error {
	if inner, ok := f.inner.(backend.Parameterized); ok {
		return inner.CheckReference(ctx, shareID, parameters)
	}
	return nil
}
