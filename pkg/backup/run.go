package backup

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/once"
)

// Run looks after the jobs until ctx ends: it finishes what a mover has ended,
// and starts again what was interrupted, whether or not anybody asks.
func (e *Engine) Run(ctx context.Context) {
	log := klog.FromContext(ctx)
	tick := time.NewTicker(e.Tick)
	defer tick.Stop()
	var said once.Said
	unasked := newDrafts(e)
	var beside sync.WaitGroup
	defer beside.Wait()
	beside.Go(func() { e.refresh(ctx) }) // no job waits for a repository that does not answer
	for swept := (time.Time{}); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-e.waking():
		}
		jobs, err := e.jobs(ctx, 0)
		if err != nil {
			log.Error(err, "Listing movers")
			continue
		}
		if e.Now().Sub(swept) > refreshEvery {
			swept = e.Now()
			if err := errors.Join(e.sweep(ctx), unasked.sweep(ctx)); err != nil && ctx.Err() == nil {
				log.Error(err, "Looking for what was left behind")
			}
		}
		e.saw(jobs)
		unasked.tick(ctx, jobs)
		said.Next()
		for _, st := range jobs {
			e.tell(ctx, st)
			id := st.Job.Task.ID
			if st.Job.Task.Backup == nil || st.Phase == Running || e.released(st) {
				continue // whoever asked for a restore looks after it, and else unasked does
			}
			err := e.look(ctx, id)
			if err != nil && ctx.Err() == nil && !errors.Is(err, backend.ErrPending) && said.New(id+": "+err.Error()) {
				log.Error(err, "Backup is not done", "backup", id)
			}
		}
	}
}

// wake makes Run look after the jobs at once.
func (e *Engine) wake() {
	select {
	case e.waking() <- struct{}{}:
	default: // it is about to
	}
}

func (e *Engine) waking() chan struct{} {
	e.wakeOnce.Do(func() { e.woken = make(chan struct{}, 1) })
	return e.woken
}

// refresh lists every repository now and then, so that the metrics know them after a
// start, and what others have changed.
func (e *Engine) refresh(ctx context.Context) {
	log := klog.FromContext(ctx)
	for {
		names, err := e.Repositories.Names(ctx)
		if err != nil {
			log.Error(err, "Listing repositories")
		} else {
			e.forgetOthers(names)
		}
		var listing sync.WaitGroup
		places := make(chan struct{}, refreshAtOnce)
		for _, name := range names {
			places <- struct{}{}
			listing.Go(func() {
				defer func() { <-places }()
				if _, err := e.list(ctx, name, refreshEvery); err != nil && ctx.Err() == nil && !unset(name, err) {
					log.Error(err, "Repository cannot be read")
				}
			})
		}
		listing.Wait()
		select {
		case <-ctx.Done():
			return
		case <-time.After(refreshEvery):
		}
	}
}

// look advances one job.
func (e *Engine) look(ctx context.Context, id string) error {
	return e.attend(ctx, id, func(ctx context.Context, st *Status) error {
		_, err := e.advance(ctx, st)
		return err
	})
}

// addresses differ in each stack, and an error that stays the same is said once.
var addresses = regexp.MustCompile(`0x[0-9a-f]+`)

// attend does something for a job that no request asks about, read again under its
// lock; nothing if it is gone.
func (e *Engine) attend(ctx context.Context, id string, do func(context.Context, *Status) error) (err error) {
	defer func() {
		// No request waits for it, so none would answer a panic.
		if p := recover(); p != nil {
			err = fmt.Errorf("the driver has a defect: %v\n%s", p, addresses.ReplaceAll(debug.Stack(), nil))
		}
	}()
	release, err := e.lock(id)
	if err != nil {
		return err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, lookTimeout) // the others wait for it
	defer cancel()
	st, err := e.Runner.Status(ctx, id)
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return do(ctx, st)
}

// sweep removes temporary snapshots of backups that no job knows: a controller
// was killed between the cut and the record, and nobody has called again.
func (e *Engine) sweep(ctx context.Context) (err error) {
	for name, b := range e.Backends {
		snapshots, _, lerr := b.ListSnapshots(ctx, "", 0)
		if lerr != nil {
			err = errors.Join(err, fmt.Errorf("list snapshots of backend %s: %w", name, lerr))
		}
		for _, s := range snapshots {
			id, ours := strings.CutPrefix(s.Name, temporaryName(""))
			if ours && s.Role == backend.RoleTemporary && e.Now().Sub(s.CreatedAt) >= sweepAge {
				err = errors.Join(err, e.sweepOne(ctx, Job{Backend: name, Snapshot: s.ID, Consumer: consumerOf(id), Task: mover.Task{ID: id}}))
			}
		}
	}
	return err
}

func (e *Engine) sweepOne(ctx context.Context, job Job) error {
	id := job.Task.ID
	release, err := e.lock(id)
	if err != nil {
		return nil // somebody does know it
	}
	defer release()
	if _, err := e.Runner.Status(ctx, id); !errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	klog.FromContext(ctx).Info("Removing a temporary snapshot that was left behind", "snapshotID", job.Snapshot, "backup", id)
	return e.release(ctx, job)
}
