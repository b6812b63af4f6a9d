// Package schedule is what a CronJob runs to make snapshots and backups: one
// VolumeSnapshot for each claim and tier, named by the scheduled time so that a
// retry makes no second one; it waits until they are ready, drops those that no
// rule keeps any more, and says what has become of each.
//
// When a schedule is due, in which time zone, and what happens with missed and
// overlapping runs is Kubernetes' own. What is here knows nothing of its API
// but a Cluster.
package schedule

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/line"
)

// ErrNothing is a run that has no claim to make snapshots of. A schedule that
// protects nothing must not look like one that works.
var ErrNothing = errors.New("nothing is selected")

// errLate is the cause of a context that ends with the deadline of a run.
var errLate = errors.New("the run's time is over")

const (
	// DefaultTimeout is how long a run waits for its snapshots.
	DefaultTimeout = time.Hour
	// DefaultParallel is how many snapshots of a run are made at once.
	DefaultParallel = 8

	// What is not ready is looked at again after a pause, which grows.
	firstPause, lastPause = time.Second, 15 * time.Second
	// retentionTime bounds retention of one claim, which begins when the claim's
	// snapshots are ready and may be past the deadline of the run.
	retentionTime = 5 * time.Minute
)

// Options say what a run does.
type Options struct {
	// Schedule is the name of the CronJob.
	Schedule string
	// At is the time that the run is for, see ScheduledTime.
	At time.Time
	// Claims is what snapshots are made of: by selector, or by names, not both.
	Claims Selection
	// Tiers are what is made of each claim. The first one is made of all claims
	// before the second is begun, so quick ones go first.
	Tiers []Tier
	// Timeout is how long to wait for all of them; 0 is DefaultTimeout. What is
	// not ready by then is left as it is, and may yet be.
	Timeout time.Duration
	// Parallel is how many are made at once; 0 is DefaultParallel.
	Parallel int
	// Location is the zone in which rules count days and so on; nil is UTC.
	Location *time.Location
	// DryRun changes nothing, and returns what a run would do if all its
	// snapshots became ready.
	DryRun bool
	// Now is the clock; by it, retention knows which snapshots are in the future.
	Now func() time.Time
}

// Validate refuses options with which a run would do nothing, or not what was
// meant.
func (o Options) Validate() error {
	if err := validName(o.Schedule); err != nil {
		return fmt.Errorf("schedule %q: %w", o.Schedule, err)
	}
	if o.At.IsZero() {
		return errors.New("no scheduled time")
	}
	if (o.Claims.Selector == "") == (len(o.Claims.Names) == 0) {
		return errors.New("give either a selector or names of claims: which ones are snapshots made of?")
	}
	for _, name := range o.Claims.Names {
		if err := validName(name); err != nil {
			return fmt.Errorf("claim %q: %w", name, err)
		}
	}
	if o.Timeout < 0 {
		return fmt.Errorf("timeout %s: less than nothing", o.Timeout)
	}
	if o.Parallel < 0 {
		return fmt.Errorf("%d at once: less than one", o.Parallel)
	}
	if o.Now == nil {
		return errors.New("no clock")
	}
	return validateTiers(o.Tiers)
}

// run is one run of a schedule.
type run struct {
	Options
	cluster Cluster
}

// Run makes, awaits and retains. The error says that there is no result, or that
// ctx ended before everything was done; whatever else went wrong is in the
// result, and in its exit code.
//
// A run may be ended at any time and repeated: with the same schedule and time
// it goes on with the snapshots that are there, and makes the rest.
func Run(ctx context.Context, cluster Cluster, o Options) (Result, error) {
	if err := o.Validate(); err != nil {
		return Result{}, err
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Parallel == 0 {
		o.Parallel = DefaultParallel
	}
	o.At = o.At.UTC().Truncate(time.Second) // as names and annotations have it
	r := &run{Options: o, cluster: cluster}
	waiting, cancel := context.WithTimeoutCause(ctx, o.Timeout, errLate)
	defer cancel()

	claims, err := r.claims(waiting)
	if err != nil {
		return Result{}, err
	}
	result := Result{Schedule: o.Schedule, Scheduled: o.At, DryRun: o.DryRun}
	var all []*Entry
	byClaim := make([][]*Entry, len(claims))
	for i, c := range claims {
		for _, t := range o.Tiers {
			e := &Entry{series: Series{o.Schedule, c.Name, t.Class}, rule: t.Rule, Claim: c.Name, Tier: t.Class}
			e.Snapshot = e.series.Name(o.At)
			if c.Problem != "" {
				e.fail(c.Problem)
			}
			all, byClaim[i] = append(all, e), append(byClaim[i], e)
		}
	}

	// One claim's retention waits for all its tiers, and takes its place among
	// those that work only then.
	var done sync.WaitGroup
	made := make([]sync.WaitGroup, len(claims))
	places := make(chan struct{}, o.Parallel)
	for i := range claims {
		made[i].Add(len(o.Tiers))
		done.Go(func() {
			made[i].Wait()
			places <- struct{}{}
			defer func() { <-places }()
			r.retainClaim(ctx, byClaim[i])
		})
	}
	for t := range o.Tiers {
		for i := range claims {
			e := byClaim[i][t]
			places <- struct{}{}
			done.Go(func() {
				defer func() { <-places; made[i].Done() }()
				if e.Status == "" {
					r.snapshot(waiting, e)
				}
			})
		}
	}
	done.Wait()
	for _, e := range all {
		result.Entries = append(result.Entries, *e)
	}
	if code := result.ExitCode(); ctx.Err() != nil && code != ExitOK && code != ExitLacking {
		return result, fmt.Errorf("schedule %s: %w", o.Schedule, context.Cause(ctx))
	}
	return result, nil
}

// claims are the selected claims by name, each once. Names that are not there
// are claims with a problem.
func (r *run) claims(ctx context.Context) ([]Claim, error) {
	var found []Claim
	if err := again(ctx, func() (err error) {
		found, err = r.cluster.Claims(ctx, r.Claims)
		return err
	}); err != nil {
		return nil, fmt.Errorf("list claims: %w", err)
	}
	if r.Claims.Selector != "" && len(found) == 0 {
		return nil, fmt.Errorf("schedule %s: %w: no claim in this namespace has the labels %q", r.Schedule, ErrNothing, r.Claims.Selector)
	}
	for _, name := range r.Claims.Names {
		if !slices.ContainsFunc(found, func(c Claim) bool { return c.Name == name }) {
			found = append(found, Claim{Name: name, Problem: "there is no such claim in this namespace"})
		}
	}
	slices.SortFunc(found, func(a, b Claim) int { return strings.Compare(a.Name, b.Name) })
	return slices.CompactFunc(found, func(a, b Claim) bool { return a.Name == b.Name }), nil
}

// again calls do until it is not ErrUnavailable, or ctx ends.
func again(ctx context.Context, do func() error) error {
	for pause := firstPause; ; pause = longer(pause) {
		err := do()
		if !errors.Is(err, ErrUnavailable) || !sleep(ctx, pause) {
			return err
		}
	}
}

func longer(pause time.Duration) time.Duration { return min(pause*3/2, lastPause) }

// sleep says whether the time passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// snapshot makes the snapshot of an entry, or goes on with it, until it is ready
// or has failed, or ctx ends.
func (r *run) snapshot(ctx context.Context, e *Entry) {
	log := klog.FromContext(ctx).WithValues("claim", e.Claim, "tier", e.Tier, "snapshot", e.Snapshot)
	if r.DryRun {
		r.look(ctx, e)
		return
	}
	began := r.Now()
	s, err := r.await(ctx, e)
	e.Seconds = max(0, r.Now().Sub(began).Seconds())
	switch {
	case err == nil:
		e.Status, e.uid = StatusReady, s.UID
		if s.State == Partial {
			e.Status, e.Message = StatusPartial, "it lacks files that could not be read; its event BackupIncomplete names them"
		}
		log.V(1).Info("Snapshot is ready", "seconds", e.Seconds)
		return
	case ctx.Err() == nil:
		e.fail(err.Error())
	case errors.Is(context.Cause(ctx), errLate):
		e.Status, e.Message = StatusLate, fmt.Sprintf("not ready when %s were over: %v", r.Timeout, err)
	default:
		e.Status, e.Message = StatusInterrupted, fmt.Sprintf("the run was ended: %v", err)
	}
	log.Info("Snapshot is not ready", "status", e.Status, "reason", e.Message)
}

// await returns the snapshot when it is ready. Its error says what was wrong
// last, also when ctx has ended.
func (r *run) await(ctx context.Context, e *Entry) (Snapshot, error) {
	uid := ""
	trouble := errors.New("it was not begun")
	for pause := firstPause; ctx.Err() == nil; pause = longer(pause) {
		s, err := r.attempt(ctx, e, uid)
		switch {
		case err == nil && s.State.good():
			return s, nil
		case err == nil:
			uid = s.UID
			trouble = errors.New(line.One(s.Message, "it is pending"))
		case ctx.Err() != nil:
			// The error is only that of a call that was cut short.
		case !errors.Is(err, ErrUnavailable):
			return Snapshot{}, err
		default:
			trouble = err
		}
		sleep(ctx, pause)
	}
	return Snapshot{}, trouble
}

// attempt looks at the snapshot of an entry once, and makes it if it is not
// there and has not been seen before. The error is one that waiting does not
// mend, or ErrUnavailable.
func (r *run) attempt(ctx context.Context, e *Entry, uid string) (Snapshot, error) {
	s, err := r.cluster.Get(ctx, e.Snapshot)
	if errors.Is(err, ErrNotFound) {
		if uid != "" {
			return Snapshot{}, errors.New("it vanished while it was waited for: somebody deleted it")
		}
		s, err = r.cluster.Create(ctx, Snapshot{Name: e.Snapshot, Series: e.series, Scheduled: r.At})
		if errors.Is(err, ErrExists) {
			// Another attempt of the same run was quicker, or an answer to ours
			// was lost. The next look says which.
			return Snapshot{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	if err != nil {
		return Snapshot{}, err
	}
	return s, r.check(e, s, uid)
}

// check says why a snapshot with the name of an entry will never be the ready
// snapshot of that entry.
func (r *run) check(e *Entry, s Snapshot, uid string) error {
	switch {
	case s.Series != e.series || !s.Scheduled.Equal(r.At):
		return errors.New("its name is taken by a snapshot that this schedule did not make of this claim and class; rename the schedule, or remove that snapshot")
	case uid != "" && s.UID != uid:
		return errors.New("it was replaced by another one while it was waited for")
	case s.Deleting:
		return errors.New("somebody is deleting it")
	case s.State == Failed && !s.Retried:
		return errors.New(line.One(s.Message, "it failed without saying why"))
	}
	return nil
}

// look is snapshot without changing anything.
func (r *run) look(ctx context.Context, e *Entry) {
	var s Snapshot
	err := again(ctx, func() (err error) {
		s, err = r.cluster.Get(ctx, e.Snapshot)
		return err
	})
	switch {
	case errors.Is(err, ErrNotFound):
		e.Status = StatusPlanned
		return
	case err == nil:
		if err = r.check(e, s, ""); err == nil {
			e.Status = StatusExists
			return
		}
	}
	e.fail(err.Error())
}

// retainClaim applies the rules of all tiers to the snapshots of one claim. It
// drops nothing of a claim of which anything failed in this run: a backup that
// is refused because the volume is suddenly empty must not leave the hourly
// snapshots to push the last good contents out.
func (r *run) retainClaim(ctx context.Context, entries []*Entry) {
	if slices.ContainsFunc(entries, func(e *Entry) bool { return !e.Status.Good() }) {
		for _, e := range entries {
			e.Retention.Skipped = "nothing of this claim is dropped while one of its snapshots is not ready"
		}
		return
	}
	ctx, cancel := context.WithTimeout(ctx, retentionTime)
	defer cancel()
	for _, e := range entries {
		if err := r.retain(ctx, e); err != nil {
			e.Retention.Error = line.One(err.Error(), "")
			klog.FromContext(ctx).Info("Retention is not complete", "claim", e.Claim, "tier", e.Tier, "reason", e.Retention.Error)
		}
	}
}

// retain applies the rule of an entry to its series.
func (r *run) retain(ctx context.Context, e *Entry) error {
	var listed []Snapshot
	if err := again(ctx, func() (err error) {
		listed, err = r.cluster.List(ctx, e.series)
		return err
	}); err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	found := map[string]Snapshot{}
	var items []Item
	for _, s := range listed {
		// What is being deleted is good for nothing. What has the labels and
		// annotations but not the name was copied by hand, to be kept.
		if s.Series != e.series || s.Name != e.series.Name(s.Scheduled) || s.Deleting {
			continue
		}
		found[s.Name] = s
		items = append(items, Item{Name: s.Name, Time: s.Scheduled, State: s.State})
	}
	own := slices.IndexFunc(items, func(i Item) bool { return i.Name == e.Snapshot })
	switch {
	case r.DryRun && own < 0:
		items = append(items, Item{Name: e.Snapshot, Time: r.At, State: Ready})
	case r.DryRun && !items[own].State.good():
		items[own].State = Ready
	case r.DryRun:
	case own < 0 || !items[own].State.good() || found[e.Snapshot].UID != e.uid:
		return errors.New("the snapshot that was just ready is not among those of the schedule any more; nothing is dropped")
	}
	keep, drop := e.rule.Keep(items, r.Now(), r.Location)
	// A retry of an old run may have made what the rule has no room for. The
	// next run drops it; this one has just reported it.
	drop = slices.DeleteFunc(drop, func(c Choice) bool {
		if c.Name == e.Snapshot {
			c.Reasons = []string{"just made"}
			keep = append(keep, c)
		}
		return c.Name == e.Snapshot
	})
	slices.SortStableFunc(keep, newestFirst)
	e.Retention.Keep, e.Retention.Drop = keep, drop
	if r.DryRun {
		return nil
	}
	refused := 0
	for i := range slices.Backward(drop) { // the oldest first
		err := r.cluster.Delete(ctx, found[drop[i].Name])
		if err != nil && !errors.Is(err, ErrNotFound) {
			drop[i].Error = line.One(err.Error(), "")
			refused++
		}
	}
	if refused > 0 {
		return fmt.Errorf("%d of %d are not dropped: %s", refused, len(drop), drop[slices.IndexFunc(drop, func(c Choice) bool { return c.Error != "" })].Error)
	}
	return nil
}
