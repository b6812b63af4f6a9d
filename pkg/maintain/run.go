// Package maintain is what a CronJob runs for a repository: a check that reads a
// part of all bytes, so that every one is read within a stated number of days,
// and a prune.
//
// What it has to remember is in the repository itself (Record). It waits for
// whoever works there, and while it waits for its turn it holds new backups back,
// so that the turn comes; restic's own locks do the rest. It knows no Kubernetes.
package maintain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/line"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

const (
	// DefaultReadDays is in how many days everything is read.
	DefaultReadDays = 30
	// DefaultLockWait is how long to wait for the repository, and for how long new
	// backups are held back at most.
	DefaultLockWait = 2 * time.Hour
	// DefaultTimeout bounds a run.
	DefaultTimeout = 12 * time.Hour

	// firstInterval is how often checks come as long as there was only one.
	firstInterval = 24 * time.Hour
	// recordTime bounds the writing of the record, which is done after the deadline
	// too: what was read must not be read again.
	recordTime = 2 * time.Minute
	// usersOf is how many damaged packs are looked up, of any number.
	usersOf = 20
)

// errLate is the cause of a context that ends with the deadline of a run.
var errLate = errors.New("the run's time is over")

// Options say what a run does.
type Options struct {
	// Repository is its name, for messages.
	Repository string
	// Check and Prune say what is done.
	Check, Prune bool
	// ReadDays is in how many days every byte is read; 0 for never.
	ReadDays int
	// MaxUnused and MaxRepackSize are as in restic.PruneRequest.
	MaxUnused, MaxRepackSize string
	// Timeout bounds the run, and LockWait the time that it waits for the
	// repository; 0 for the defaults.
	Timeout, LockWait time.Duration
	// DryRun changes nothing, and returns what a run would do.
	DryRun bool
	// Now is the clock.
	Now func() time.Time
	// Step is told what begins, for a person who watches; nil for nobody.
	Step func(what string)
}

// Validate refuses options with which a run would do nothing, or not what was
// meant.
func (o Options) Validate() error {
	switch {
	case !o.Check && !o.Prune:
		return errors.New("neither check nor prune: nothing would be done")
	case o.ReadDays < 0 || o.ReadDays > 3650:
		return fmt.Errorf("to read everything in %d days: it must be 1 to 3650, or 0 for not at all", o.ReadDays)
	case o.Timeout < 0 || o.LockWait < 0:
		return errors.New("a time of less than nothing")
	case o.Now == nil:
		return errors.New("no clock")
	}
	return nil
}

// run is one run.
type run struct {
	Options
	repo    restic.Client
	record  *Record
	unread  error             // why a newer record cannot be read, which may tell of damage
	old     []restic.Snapshot // the records that were there, oldest first
	newest  time.Time         // of the newest record, this run's too
	held    bool              // new backups are held back
	result  Result
	suspect bool // a check has found what it could not look at again
}

// Run checks, and then prunes unless there is damage, of which a prune could make
// more, or may be, as what the last run has found cannot be read. The error says that there is no result; whatever else went wrong is in
// the result, and in its exit code.
//
// A run may be ended at any time and repeated.
func Run(ctx context.Context, repo restic.Client, o Options) (Result, error) {
	if err := o.Validate(); err != nil {
		return Result{}, err
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.LockWait == 0 {
		o.LockWait = DefaultLockWait
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	r := &run{Options: o, repo: repo, result: Result{Repository: o.Repository, DryRun: o.DryRun, Began: o.Now().UTC().Truncate(time.Second)}}
	working, cancel := context.WithTimeoutCause(ctx, o.Timeout, errLate)
	defer cancel()

	snapshots, err := repo.Snapshots(working)
	if err != nil && !errors.Is(err, restic.ErrIncomplete) { // which a check will say
		return Result{}, err
	}
	r.old = records(snapshots)
	if len(r.old) > 0 {
		r.newest = r.old[len(r.old)-1].Time
	}
	if r.record, err = Latest(working, repo, snapshots); err != nil {
		// Nothing that a later run would go by is written before somebody has seen to it.
		r.unread = fmt.Errorf("%w; nothing is pruned or written down meanwhile. If it is so again: `restic check --read-data`, "+
			"repair what that finds, and then `restic forget` this snapshot", err)
		klog.FromContext(ctx).Error(err, "What the last maintenance has found is not known", "repository", r.Repository)
	}
	blocks := r.plan()
	if o.DryRun {
		r.planned(blocks)
		return r.result, nil
	}
	damage := error(nil)
	if o.Check {
		damage = r.step(working, "check", func(e *Entry) error { return r.check(working, e, blocks) })
	}
	if o.Prune {
		r.step(working, "prune", func(e *Entry) error {
			switch {
			case errors.Is(damage, restic.ErrDamaged):
				e.Status, e.Message = StatusSkipped, "a damaged repository is not pruned"
			case r.record.Damaged != "":
				return fmt.Errorf("%w, as an earlier check has found (%s): it is not pruned before a check finds nothing", restic.ErrDamaged, r.record.Damaged)
			case r.unread != nil:
				e.Status, e.Message = StatusSkipped, "it is not known whether damage was found before"
			case r.suspect:
				e.Status, e.Message = StatusSkipped, "it may be damaged, which could not be looked into"
			default:
				return r.prune(working)
			}
			return nil
		})
	}
	if r.unread != nil {
		// What there is must not become less.
	} else if err := r.forget(working, 0); err != nil {
		klog.FromContext(ctx).V(1).Info("Old records are left to the next run", "reason", err.Error())
	}
	if size, err := repo.Size(working); err == nil {
		r.record.Size = size
	} else {
		klog.FromContext(ctx).Info("The repository's size is not known", "reason", err.Error())
	}
	r.known()
	r.step(ctx, "record", func(*Entry) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTime)
		defer cancel()
		r.record.Ended = r.Now().UTC().Truncate(time.Second)
		return r.save(ctx, time.Time{}, recordTime)
	})
	if errors.Is(damage, restic.ErrDamaged) {
		r.result.Damaged = r.users(ctx, snapshots, damage)
	}
	if ctx.Err() != nil && r.result.ExitCode() != ExitOK {
		return r.result, fmt.Errorf("maintain %s: %w", o.Repository, context.Cause(ctx))
	}
	return r.result, nil
}

// step does one thing and enters how it went.
func (r *run) step(ctx context.Context, name string, do func(*Entry) error) error {
	e := &Entry{Step: name}
	began := r.Now()
	err := do(e)
	e.Seconds = max(0, r.Now().Sub(began).Seconds())
	if err != nil {
		e.Message = line.One(err.Error(), "failed")
	}
	switch {
	case err == nil && e.Status == "":
		e.Status = StatusOK
	case err == nil: // it has said so itself
	case errors.Is(err, restic.ErrDamaged):
		e.Status = StatusDamaged
	case errors.Is(err, restic.ErrLocked):
		e.Status = StatusLocked
	case errors.Is(context.Cause(ctx), errLate):
		e.Status, e.Message = StatusLate, fmt.Sprintf("not done when %s were over: %s", r.Timeout, e.Message)
	case ctx.Err() != nil:
		e.Status = StatusInterrupted
	default:
		e.Status = StatusFailed
	}
	r.result.Steps = append(r.result.Steps, *e)
	return err
}

// plan says what is to be read now.
func (r *run) plan() []block {
	if !r.Check || r.ReadDays == 0 {
		return nil
	}
	now, interval := r.Now().UTC().Truncate(time.Second), firstInterval
	if r.record.Read == nil {
		r.record.Read, r.record.Began = newCoverage(now, days(r.ReadDays)), now
	} else if !r.record.Last.IsZero() {
		interval = max(0, now.Sub(r.record.Last))
	}
	r.record.Last, r.record.ReadDays = now, r.ReadDays
	return r.record.Read.due(now, days(r.ReadDays), min(interval, days(r.ReadDays)))
}

// known enters what the record says.
func (r *run) known() {
	r.result.Size, r.result.ReadDays = r.record.Size, r.record.ReadDays
	r.result.Coverage, r.result.OldestRead = r.record.Coverage(r.Now()), r.record.OldestRead()
}

// planned enters what a run would do.
func (r *run) planned(blocks []block) {
	r.known()
	if r.Check {
		r.result.Steps = append(r.result.Steps, Entry{Step: "check", Status: StatusPlanned, Message: reading(blocks)})
	}
	if r.Prune {
		r.result.Steps = append(r.result.Steps, Entry{Step: "prune", Status: StatusPlanned})
	}
}

// reading says what is read, as restic's --read-data-subset has it.
func reading(blocks []block) string {
	if len(blocks) == 0 {
		return "structure only"
	}
	var all []string
	for _, b := range blocks {
		n, t := b.subset()
		all = append(all, fmt.Sprintf("%d/%d", n, t))
	}
	return "reads " + strings.Join(all, ", ")
}

// check verifies the structure, and reads the blocks.
func (r *run) check(ctx context.Context, e *Entry, blocks []block) error {
	e.Message = reading(blocks)
	requests := []restic.CheckRequest{{}}
	if len(blocks) > 0 {
		requests = nil
	}
	for _, b := range blocks {
		n, t := b.subset()
		requests = append(requests, restic.CheckRequest{Part: n, Parts: t})
	}
	for i, req := range requests {
		began := r.Now().UTC().Truncate(time.Second)
		what := "checking the structure"
		if req.Parts != 0 {
			what = fmt.Sprintf("checking the structure, and reading %d/%d", req.Part, req.Parts)
		}
		r.Step(what)
		err := r.repo.Check(ctx, req)
		if errors.Is(err, restic.ErrDamaged) {
			// It had no lock, and may have seen what others were just removing; or
			// the repository could not be reached for a moment.
			r.Step(what + ", once more, with the repository to itself")
			klog.FromContext(ctx).Info("Check has found something, and looks again", "repository", r.Repository, "found", err.Error())
			req.Exclusive, r.suspect = true, true
			err = r.exclusive(ctx, func(retry time.Duration) error {
				req.RetryLock = retry
				return r.repo.Check(ctx, req)
			})
		}
		r.suspect = r.suspect && err != nil
		if errors.Is(err, restic.ErrDamaged) {
			r.record.Damaged = line.One(err.Error(), "damaged")
			if len(blocks) > 0 { // to be read in the next run, whenever that is
				r.record.Read.read(blocks[i], never)
			}
		}
		if err != nil {
			return err
		}
		if len(blocks) > 0 {
			r.record.Read.read(blocks[i], began)
		}
	}
	r.record.Checked, r.record.Damaged = r.Now().UTC().Truncate(time.Second), ""
	return nil
}

// prune drops old records, which need the repository too, and prunes.
func (r *run) prune(ctx context.Context) error {
	r.Step("pruning")
	err := r.exclusive(ctx, func(retry time.Duration) error {
		if err := r.forget(ctx, retry); err != nil {
			return err
		}
		return r.repo.Prune(ctx, restic.PruneRequest{MaxUnused: r.MaxUnused, MaxRepackSize: r.MaxRepackSize, RetryLock: retry})
	})
	if err == nil {
		r.record.Pruned = r.Now().UTC().Truncate(time.Second)
	}
	return err
}

// forget drops old records, so that with the one of this run there are as many
// as are kept.
func (r *run) forget(ctx context.Context, retry time.Duration) error {
	old := r.old[:max(0, len(r.old)-keptRecords+1)]
	ids := make([]string, len(old))
	for i, s := range old {
		ids[i] = s.ID
	}
	if err := r.repo.Forget(ctx, retry, ids...); err != nil {
		return err
	}
	r.old = r.old[len(old):]
	return nil
}

// exclusive does what needs the repository to itself: it queues behind whoever
// works there, and holds new backups back meanwhile.
func (r *run) exclusive(ctx context.Context, do func(retry time.Duration) error) error {
	return restic.AwaitLock(ctx, r.repo, r.LockWait, func(err error) {
		r.Step("waiting for the repository")
		klog.FromContext(ctx).Info("Repository is locked; new backups wait", "repository", r.Repository, "reason", err.Error())
		if r.held {
			return
		}
		// Without a hold it may have to wait longer, and that is all.
		if err := r.save(ctx, r.Now().Add(r.LockWait), 0); err != nil {
			klog.FromContext(ctx).Info("New backups are not held back", "reason", err.Error())
			return
		}
		r.held = true
	}, do)
}

// save writes the record, which is newer than any before it, and does not as long as
// that one cannot be read.
func (r *run) save(ctx context.Context, hold time.Time, wait time.Duration) error {
	if r.unread != nil {
		return r.unread
	}
	at := r.Now().UTC().Truncate(time.Second)
	if !at.After(r.newest) {
		at = r.newest.Truncate(time.Second).Add(time.Second)
	}
	err := restic.AwaitLock(ctx, r.repo, wait, func(error) {}, func(retry time.Duration) error {
		return r.record.save(ctx, r.repo, at, hold, retry)
	})
	if err == nil {
		r.newest = at
	}
	return err
}

// users are the backups that refer to what is damaged, as far as restic can say.
func (r *run) users(ctx context.Context, snapshots []restic.Snapshot, damage error) []Damaged {
	var said *restic.Error
	if !errors.As(damage, &said) || len(said.Packs) == 0 {
		return nil
	}
	r.Step("looking for the backups that are damaged")
	ids, err := r.repo.Users(ctx, said.Packs[:min(len(said.Packs), usersOf)]...)
	if err != nil {
		klog.FromContext(ctx).Info("Cannot say which backups are damaged", "reason", err.Error())
	}
	var all []Damaged
	for _, s := range snapshots {
		if !slices.Contains(ids, s.ID) {
			continue
		}
		d := Damaged{Snapshot: s.ID, Host: s.Host, Time: s.Time}
		for _, tag := range s.Tags {
			if v, ok := strings.CutPrefix(tag, mover.TagBackup); ok {
				d.Backup = v
			} else if v, ok := strings.CutPrefix(tag, mover.TagVolume); ok {
				d.Volume = v
			}
		}
		all = append(all, d)
	}
	return all
}
