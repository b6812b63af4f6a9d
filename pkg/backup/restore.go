package backup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/mover"
)

// RestoreRequest asks for a share to be filled from a backup.
type RestoreRequest struct {
	// ID names the restore: as mover.Task.ID.
	ID         string
	Repository string
	Backup     string
	Volume     string // the handle of the volume that the share becomes
	Name       string // its CSI name
	// Backend and Share are the share that is filled, Zone as Job.Zone.
	Backend, Share, Zone string
	About                []Object // as Job.About
	// Wanted is asked before a mover starts, the last time when no other can: an
	// error says that the share is not to be written any more.
	Wanted func(context.Context) error
}

// Restore begins a restore, or says how far the one with this id is: Running
// or Succeeded, and then nobody has the share mounted. After a success the caller
// calls EndRestore once it has recorded it. ErrFailed when it failed for good, ErrUnavailable when it may
// succeed later; either way the next call begins anew.
func (e *Engine) Restore(ctx context.Context, req RestoreRequest) (*Status, error) {
	release, err := e.lock(req.ID)
	if err != nil {
		return nil, err
	}
	defer release()

	job := Job{Backend: req.Backend, Share: req.Share, Zone: req.Zone, Consumer: req.ID, Attempt: 1, Files: e.files(req.Repository), About: req.About,
		Task: mover.Task{ID: req.ID, Repository: req.Repository, Made: true,
			Restore: &mover.Restore{Backup: req.Backup, Volume: req.Volume, Name: req.Name}}}
	st, err := e.Runner.Status(ctx, req.ID)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		// Asked before anything is held, too: there is no record either when
		// another controller has just finished.
		err := req.Wanted(ctx)
		if err == nil {
			err = e.hold(ctx, &job, false)
		}
		if err == nil {
			err = e.Runner.Start(ctx, job, req.Wanted)
		}
		if err != nil {
			return nil, fmt.Errorf("start restore %s: %w", req.ID, err)
		}
		e.wake() // to tell of it
		return &Status{Job: job, Phase: Running, Started: e.Now()}, nil
	case err != nil:
		return nil, err
	}
	if now := st.Job.Task; now.Restore.Backup != req.Backup || now.Repository != req.Repository {
		return nil, fmt.Errorf("restore %s is of backup %s in repository %q: %w", req.ID, now.Restore.Backup, now.Repository, backend.ErrConflict)
	}
	e.tell(ctx, st)
	switch st.Phase {
	case Interrupted:
		var err error
		if !e.tooSoon(st) {
			err = e.restart(ctx, st, true)
		}
		st.Phase = Running
		return st, err
	case Failed:
		e.remember(st)
		if err := e.Runner.Remove(ctx, req.ID); err != nil {
			return nil, err
		}
		kind := backend.ErrUnavailable
		switch {
		case st.Result.Reason == mover.ReasonNoSpace:
			kind = backend.ErrExhausted
		case st.Result.Reason.Lasting():
			kind = ErrFailed
		}
		return nil, fmt.Errorf("restore of backup %s from %s: %w: %s", req.Backup, Title(req.Repository), kind, st.Result.Error)
	case Succeeded:
		e.remember(st)
		return st, e.release(ctx, st.Job)
	}
	return st, nil
}

const (
	// restorePoll is the first pause between two looks at a restore that is waited for;
	// each is twice as long as the last.
	restorePoll = 200 * time.Millisecond
	// restoreFresh is how long after its begin a restore is looked at by whoever waits
	// for it. After that, Run looks at all of them at once.
	restoreFresh = 2 * time.Second
)

// AwaitRestore is Restore, but gives a short one so much time to end.
func (e *Engine) AwaitRestore(ctx context.Context, wait time.Duration, req RestoreRequest) (*Status, error) {
	st, err := e.Restore(ctx, req)
	until := e.Now().Add(wait)
	for pause := restorePoll; err == nil && st.Phase == Running && e.Now().Before(until); {
		select {
		case <-ctx.Done():
			return st, nil
		case <-time.After(min(pause, until.Sub(e.Now()))):
		}
		if seen := e.seenRunning(req.ID); seen != nil && e.Now().Sub(seen.Started) > restoreFresh {
			st = seen
			continue
		}
		pause *= 2
		st, err = e.Restore(ctx, req)
	}
	return st, err
}

// EndRestore stops a restore that still runs and drops its record.
func (e *Engine) EndRestore(ctx context.Context, id string) error {
	release, err := e.lock(id)
	if err != nil {
		return err
	}
	defer release()
	return e.Runner.Remove(ctx, id)
}
