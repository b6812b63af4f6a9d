package backup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/once"
)

const (
	// askedAgain is how long a restore whose mover has ended waits to be asked
	// about: an orchestrator asks every few minutes, and whoever asks takes the
	// record away or starts the mover again. It may be away itself for a while.
	askedAgain = time.Hour
	// draftAge is how long a draft without a record, of which the last call may
	// still be under way, is left alone.
	draftAge = 15 * time.Minute
	// goneAge is for both, once the claim that was to have the volume is gone, and how
	// often that is asked.
	goneAge = 2 * time.Minute
)

// draft is a share that is to be filled from a backup.
type draft struct{ backend, share string }

// drafts is what becomes of restores that nobody asks about any more: a claim is
// gone, and so is the VolumeSnapshot without which the provisioner does not ask for the
// volume again, not even to delete it. The record goes first, and the draft some time
// after it, so that a call which has found the one to be of use has ended before the
// other goes.
type drafts struct {
	engine *Engine
	idle   map[string]idle     // restores whose movers have ended, by id
	due    map[draft]time.Time // drafts without a record, and when they go
	said   once.Said
}

func newDrafts(e *Engine) *drafts {
	return &drafts{engine: e, idle: map[string]idle{}, due: map[draft]time.Time{}}
}

// idle is since when a restore has waited to be asked about, and when it was last looked
// whether its claim is gone; unclear is why that could not be seen.
type idle struct {
	attempt       int
	since, looked time.Time
	unclear       error
}

// tick looks at the records as they are now.
func (d *drafts) tick(ctx context.Context, jobs []*Status) {
	now := d.engine.Now()
	d.said.Next()
	waiting := map[string]idle{}
	for _, st := range jobs {
		if st.Job.Task.Restore == nil {
			continue
		}
		id, of := st.Job.Task.ID, draft{st.Job.Backend, st.Job.Share}
		delete(d.due, of)
		if st.Phase == Running {
			continue
		}
		w, known := d.idle[id]
		if !known || w.attempt != st.Job.Attempt {
			w = idle{attempt: st.Job.Attempt, since: now, looked: now}
		}
		waits, rest := askedAgain, draftAge
		if now.Sub(w.looked) >= goneAge {
			w.looked = now
			var gone bool
			if gone, w.unclear = d.gone(ctx, st.Job); gone {
				waits, rest = goneAge, goneAge
			}
		}
		d.say(ctx, of, w.unclear)
		waiting[id] = w
		if now.Sub(w.since) < waits {
			continue
		}
		if err := d.engine.giveUp(ctx, st); err != nil {
			d.say(ctx, of, err)
			continue
		}
		klog.FromContext(ctx).Info("Giving up a restore that nobody asks about any more", "task", id, "backend", of.backend, "share", of.share)
		delete(waiting, id)
		d.due[of] = now.Add(rest)
	}
	d.idle = waiting
	for of, at := range d.due {
		if now.Before(at) {
			continue
		}
		if err := d.remove(ctx, of); err != nil {
			d.say(ctx, of, err)
			continue
		}
		delete(d.due, of)
	}
}

// sweep finds drafts: a controller may have been killed before it had written down
// what is to become of one. What has a record is left alone by tick.
func (d *drafts) sweep(ctx context.Context) (err error) {
	now := d.engine.Now()
	for name, b := range d.engine.Backends {
		shares, _, lerr := b.ListShares(ctx, "", 0)
		if lerr != nil {
			err = errors.Join(err, fmt.Errorf("list shares of backend %s: %w", name, lerr))
		}
		for _, s := range shares {
			of := draft{name, s.ID}
			if _, waits := d.due[of]; s.Draft && !waits && now.Sub(s.CreatedAt) >= draftAge {
				d.due[of] = now.Add(draftAge)
			}
		}
	}
	return err
}

// gone says whether the claim that was to have a volume is known to be gone.
func (d *drafts) gone(ctx context.Context, job Job) (bool, error) {
	if d.engine.Exists == nil || len(job.About) == 0 {
		return false, nil
	}
	is, err := d.engine.Exists(ctx, job.About[0])
	return err == nil && !is, err
}

// remove deletes what is a draft still.
func (d *drafts) remove(ctx context.Context, of draft) error {
	b, err := d.engine.backend(of.backend)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	s, err := b.Share(ctx, of.share)
	if errors.Is(err, backend.ErrNotFound) || err == nil && !s.Draft {
		return nil
	}
	if err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Removing the share of a restore that nobody asks about any more", "backend", of.backend, "share", of.share)
	return b.DeleteShare(ctx, of.share)
}

// say tells each error once; nil is none.
func (d *drafts) say(ctx context.Context, of draft, err error) {
	if err != nil && ctx.Err() == nil && !errors.Is(err, backend.ErrPending) && d.said.New(fmt.Sprint(of, err)) {
		klog.FromContext(ctx).Error(err, "Restore that nobody asks about is not cleared away", "backend", of.backend, "share", of.share)
	}
}

// giveUp drops the record of a restore that has not begun again since it was seen.
func (e *Engine) giveUp(ctx context.Context, seen *Status) error {
	id := seen.Job.Task.ID
	return e.attend(ctx, id, func(ctx context.Context, st *Status) error {
		if st.Phase == Running || st.Job.Attempt != seen.Job.Attempt {
			return fmt.Errorf("%s is asked about: %w", id, backend.ErrPending)
		}
		e.remember(st)
		if err := e.release(ctx, st.Job); err != nil {
			return err
		}
		return e.Runner.Remove(ctx, id)
	})
}
