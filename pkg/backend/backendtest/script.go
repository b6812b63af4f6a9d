package backendtest

import (
	"context"
	"errors"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// Step is one call of a script, under the name of the method that it calls.
type Step struct {
	Method string
	Call   func(ctx context.Context, b backend.Backend) error
}

// Script is a life of shares, snapshots and exports that calls every method of
// a backend at least once, each with success, and begins and ends with an empty
// storage. Every step can be repeated. Size is as Harness.ShareSize; all
// abilities are needed. Each call of Script is another run: its steps hand each
// other what they made.
func Script(size int64) []Step {
	var share, clone *backend.Share
	var snapshot, temporary *backend.Snapshot
	create := func(into **backend.Share, req func() backend.CreateShareRequest) func(context.Context, backend.Backend) error {
		return func(ctx context.Context, b backend.Backend) (err error) {
			return keep(into)(b.CreateShare(ctx, req()))
		}
	}
	cut := func(into **backend.Snapshot, name string, role backend.Role) func(context.Context, backend.Backend) error {
		return func(ctx context.Context, b backend.Backend) error {
			return keep(into)(b.CreateSnapshot(ctx, backend.CreateSnapshotRequest{Name: name, ShareID: share.ID, Role: role}))
		}
	}
	return []Step{
		{"CreateShare", create(&share, func() backend.CreateShareRequest {
			return backend.CreateShareRequest{
				Name: "data", MinSize: size, Role: backend.RoleUser, Draft: true, Description: map[string]string{"a": "1"},
			}
		})},
		// The steps share variables, so they are functions of what came before.
		{"CommitShare", func(ctx context.Context, b backend.Backend) error { return b.CommitShare(ctx, share.ID) }},
		{"Share", func(ctx context.Context, b backend.Backend) error { return errOf(b.Share(ctx, share.ID)) }},
		{"ShareNamed", func(ctx context.Context, b backend.Backend) error { return errOf(b.ShareNamed(ctx, "data")) }},
		{"ExpandShare", func(ctx context.Context, b backend.Backend) error {
			return errOf(b.ExpandShare(ctx, share.ID, 2*size))
		}},
		{"CreateSnapshot", cut(&snapshot, "cut", backend.RoleUser)},
		{"CreateSnapshot", cut(&temporary, "temporary", backend.RoleTemporary)},
		{"Snapshot", func(ctx context.Context, b backend.Backend) error { return errOf(b.Snapshot(ctx, snapshot.ID)) }},
		{"CreateShare", create(&clone, func() backend.CreateShareRequest {
			return backend.CreateShareRequest{
				Name: "clone", MinSize: 2 * size, Role: backend.RoleTemporary, FromSnapshot: snapshot.ID,
			}
		})},
		{"Export", func(ctx context.Context, b backend.Backend) error {
			return errOf(b.Export(ctx, ofShare(share), "writer"))
		}},
		{"Export", func(ctx context.Context, b backend.Backend) error {
			return errOf(b.Export(ctx, ofSnapshot(snapshot), "reader"))
		}},
		{"ExportOf", func(ctx context.Context, b backend.Backend) error { return errOf(b.ExportOf(ctx, "reader")) }},
		{"ListShares", func(ctx context.Context, b backend.Backend) error {
			_, _, err := b.ListShares(ctx, "", 1)
			return err
		}},
		{"ListSnapshots", func(ctx context.Context, b backend.Backend) error {
			_, _, err := b.ListSnapshots(ctx, "", 1)
			return err
		}},
		{"ListExports", func(ctx context.Context, b backend.Backend) error {
			_, _, err := b.ListExports(ctx, "", 1)
			return err
		}},
		{"DeleteSnapshot", func(ctx context.Context, b backend.Backend) error { return b.DeleteSnapshot(ctx, temporary.ID) }},
		{"DeleteShare", func(ctx context.Context, b backend.Backend) error { return b.DeleteShare(ctx, share.ID) }},
		{"Unexport", func(ctx context.Context, b backend.Backend) error {
			return b.Unexport(ctx, ofSnapshot(snapshot), "reader")
		}},
		{"DeleteSnapshot", func(ctx context.Context, b backend.Backend) error { return b.DeleteSnapshot(ctx, snapshot.ID) }},
		{"DeleteShare", func(ctx context.Context, b backend.Backend) error { return b.DeleteShare(ctx, clone.ID) }},
	}
}

// keep stores a result for later steps, and only a good one.
func keep[T any](into **T) func(*T, error) error {
	return func(v *T, err error) error {
		if err == nil {
			*into = v
		}
		return err
	}
}

// script plays Script, each step with how, and compares what this process and a
// new one see after it.
func (s *suite) script(how func(step Step)) {
	probe := s.share("probe")
	s.needs(probe.Can.Snapshot && probe.Can.Clone && probe.Can.MountSnapshot, "Snapshot, Clone, MountSnapshot")
	s.ok(s.b.DeleteShare(s.ctx, probe.ID))
	for i, step := range Script(s.ShareSize) {
		how(step)
		s.same("another process's view", s.state(s.open()), s.state(s.b))
		if s.Failed() {
			s.Fatalf("at step %d, %s", i, step.Method)
		}
	}
	s.same("what is left", s.state(s.open()), state{})
}

// testAgain: a step taken twice is a step taken once.
func testAgain(s *suite) {
	s.script(func(step Step) {
		s.ok(step.Call(s.ctx, s.b))
		want := s.state(s.b)
		s.ok(step.Call(s.ctx, s.b))
		s.same("after the second call", s.state(s.b), want)
	})
}

// testReopen: every step is taken by a process that saw none of the others.
func testReopen(s *suite) {
	s.script(func(step Step) { s.ok(step.Call(s.ctx, s.open())) })
}

// testCancel: a call whose context has ended says so at once, and does no harm.
func testCancel(s *suite) {
	s.script(func(step Step) {
		ctx, cancel := context.WithCancel(s.ctx)
		cancel()
		start := time.Now()
		s.is(step.Call(ctx, s.b), context.Canceled, backend.ErrPending)
		if took := time.Since(start); took > 5*time.Second {
			s.Errorf("%s took %s to see that its context was cancelled", step.Method, took)
		}
		s.ok(step.Call(s.ctx, s.b))
	})
}

// testInterrupt: a call broken off anywhere, time and again, by processes that
// know nothing of each other, ends as one. The time that each has doubles, so
// that it is broken off early, late and in the middle.
func testInterrupt(s *suite) {
	s.script(func(step Step) {
		for patience := 50 * time.Microsecond; ; patience *= 2 {
			ctx, cancel := context.WithTimeout(s.ctx, patience)
			err := step.Call(ctx, s.open())
			cancel()
			if err == nil {
				break
			}
			s.is(err, context.DeadlineExceeded, backend.ErrPending)
			if patience > time.Minute || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				s.Fatalf("%s within %s: %v", step.Method, patience, err)
			}
		}
	})
}
