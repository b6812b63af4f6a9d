package backup

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/busy"
	"github.com/abaca-csi/abaca/pkg/maintain"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

const (
	// repositoryTimeout bounds what a controller itself asks of a repository:
	// listings and single deletions.
	repositoryTimeout = time.Minute
	// lockWait is how long a deletion waits for the repository's lock. Longer
	// waits are the caller's, who calls again.
	lockWait = 10 * time.Second
	// turnWait is how long a request waits while another asks the same repository,
	// if that is a namespace's own.
	turnWait = 3 * time.Second
	turnPoll = 50 * time.Millisecond
	// listingAge is how long a listing may answer for its repository. Whatever
	// this process changes is seen at once; what others change, after this.
	listingAge = 10 * time.Second
	// backoffMin doubles with each failed attempt up to backoffMax.
	backoffMin = 5 * time.Second
	backoffMax = 5 * time.Minute
	// sweepAge is how old a temporary snapshot without a job must be before it
	// counts as left behind: far more than the time between its cut and the
	// record of its job.
	sweepAge = 15 * time.Minute
	// refreshEvery is how often Run lists the repositories anew, for the metrics.
	refreshEvery = 10 * time.Minute
	// refreshAtOnce is how many are listed at a time.
	refreshAtOnce = 4
	// lookTimeout bounds what Run does for one job before it looks after the next.
	lookTimeout = 30 * time.Second
	// recentMax is how many ended jobs Recent remembers.
	recentMax = 100
	// releasedMax is how many jobs that failed for good are remembered as released;
	// another look at one that is forgotten costs some requests.
	releasedMax = 10_000
)

// Engine makes, finds, deletes and restores backups. Its fields are set before
// its first use; its methods may be called from any goroutine.
type Engine struct {
	Backends     map[string]backend.Backend
	Repositories Repositories
	Runner       Runner
	Now          func() time.Time
	// Node is the machine that movers run on, as storage systems see it; its name
	// is empty where an orchestrator publishes to the movers what they mount.
	Node backend.Node
	// Tick is how often Run looks after the jobs.
	Tick time.Duration
	// Recorder is told what becomes of backups and restores; nil for nobody.
	Recorder Recorder

	wakeOnce sync.Once
	woken    chan struct{}
	busy     busy.Set
	asked    busy.Set // the repositories of namespaces that restic is asking
	mu       sync.Mutex
	listings map[string]listing
	recent   []*Status
	seen     map[string]time.Time // end of the last attempt that was remembered, by job
	ended    map[ending]int
	// releasedAt is as seen, of jobs for which nothing is held any more.
	releasedAt map[string]time.Time
	learned    int // counts what was learned or forgotten of any repository
}

type listing struct {
	at      time.Time // when it was made
	stale   bool      // something is known to have changed since
	backups []*Backup
	held    time.Time // until when maintenance holds new backups back
	// care is what maintenance has left, read from the snapshot careID.
	care   *maintain.Record
	careID string
}

// Request asks for a backup of a share.
type Request struct {
	ID         string // as Backup.ID
	Name       string
	Repository string
	Backend    string
	ShareID    string
	Zone       string // as Job.Zone
	Volume     string // the handle of the volume
	// Host is the restic host: the claim, or the volume's handle.
	Host string
	// Description becomes volume.json.
	Description json.RawMessage
	// AllowPartial and AllowEmpty are as in mover.Backup.
	AllowPartial, AllowEmpty bool
	Exclude                  []string // as mover.Backup.Exclude
	About                    []Object // as Job.About
	// Complete adds what has to be asked for when the backup begins, and only then;
	// nil adds nothing.
	Complete func(context.Context, *Request) error
}

// Backup begins a backup, or says how far the one with this id is. It returns
// as soon as the snapshot is cut and the mover has been started. ErrConflict
// when the id belongs to a backup of another volume; ErrFailed when it has
// failed for good; ErrUnavailable when an attempt failed and the next one is
// still to come.
func (e *Engine) Backup(ctx context.Context, req Request) (*Backup, error) {
	release, err := e.lock(req.ID)
	if err != nil {
		return nil, err
	}
	defer release()

	st, err := e.Runner.Status(ctx, req.ID)
	if err == nil {
		if err := fits(describe(st.Job), req); err != nil {
			return nil, err
		}
		if st.Phase == Succeeded && st.Result.Backup != nil {
			// Ready now; removing a snapshot that has just been read takes the
			// kernel a while, and is left to Run.
			e.wake()
			return st.backup(), nil
		}
		return e.advance(ctx, st)
	}
	if !errors.Is(err, backend.ErrNotFound) {
		return nil, fmt.Errorf("backup %q: %w", req.Name, err)
	}
	if err := e.learnEnded(ctx); err != nil {
		return nil, err
	}
	if err := e.nowhereElse(req); err != nil {
		return nil, err
	}
	// What is not in a listing that is not quite new can only be a backup that
	// another controller has finished since. The mover finds it and keeps it.
	b, err := e.findOrBegin(ctx, req, refreshEvery)
	if errors.Is(err, backend.ErrNotFound) {
		// The source has gone, so no mover will.
		b, err = e.findOrBegin(ctx, req, 0)
	}
	return b, err
}

// findOrBegin returns the backup if a listing of at most the given age has it.
func (e *Engine) findOrBegin(ctx context.Context, req Request, age time.Duration) (*Backup, error) {
	found, parent, err := e.lookup(ctx, req.Repository, req.ID, req.Volume, age)
	if err == nil {
		return found, fits(found, req)
	}
	if !errors.Is(err, errNoBackup) {
		return nil, fmt.Errorf("backup %q: %w", req.Name, err)
	}
	return e.begin(ctx, req, parent)
}

// nowhereElse returns ErrConflict when another repository is known to have a
// backup of that name. What a namespace's own says is believed of that one only.
func (e *Engine) nowhereElse(req Request) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for repository, l := range e.listings {
		if repository == req.Repository || Owner(repository) != "" {
			continue
		}
		for _, b := range l.backups {
			if b.ID == req.ID {
				return fits(b, req)
			}
		}
	}
	return nil
}

func fits(b *Backup, req Request) error {
	if b.Volume != req.Volume || b.Repository != req.Repository {
		return fmt.Errorf("backup %q exists, of volume %q in repository %q: %w",
			req.Name, b.Volume, b.Repository, backend.ErrConflict)
	}
	return nil
}

// begin cuts the snapshot, holds it and starts the mover. Each step is found
// again by the next call, and in the end by sweep if there is none.
func (e *Engine) begin(ctx context.Context, req Request, parent *mover.Parent) (*Backup, error) {
	if req.Complete != nil {
		if err := req.Complete(ctx, &req); err != nil {
			return nil, err
		}
	}
	b, err := e.backend(req.Backend)
	if err != nil {
		return nil, err
	}
	snap, err := b.CreateSnapshot(ctx, backend.CreateSnapshotRequest{
		Name: temporaryName(req.ID), ShareID: req.ShareID, Role: backend.RoleTemporary})
	if err != nil {
		return nil, fmt.Errorf("cut a snapshot for backup %q: %w", req.Name, err)
	}
	if e.held(req.Repository) {
		parent = nil // so that the mover looks before it begins, and waits
	}
	job := Job{
		Backend: req.Backend, Snapshot: snap.ID, Zone: req.Zone, Consumer: consumerOf(req.ID), Attempt: 1, Files: e.files(req.Repository), About: req.About,
		Task: mover.Task{
			ID: req.ID, Repository: req.Repository, Made: e.Made(req.Repository),
			Backup: &mover.Backup{
				Backup: req.ID, Volume: req.Volume, Name: req.Name, Size: snap.Size, Host: req.Host,
				Time: snap.CreatedAt.Truncate(time.Second), Description: req.Description,
				Parent: parent, AllowPartial: req.AllowPartial, AllowEmpty: req.AllowEmpty,
				Exclude: req.Exclude,
			},
		},
	}
	if err = e.hold(ctx, &job, true); err == nil {
		err = e.Runner.Start(ctx, job, always)
	}
	if err != nil {
		// The request's context may be what ended, so the clean-up has its own. A
		// job that was recorded all the same has the snapshot and goes on.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), repositoryTimeout)
		defer cancel()
		err = fmt.Errorf("start backup %q: %w", req.Name, err)
		if _, recorded := e.Runner.Status(ctx, req.ID); errors.Is(recorded, backend.ErrNotFound) {
			err = errors.Join(err, e.release(ctx, job))
		}
		return nil, err
	}
	e.wake() // to tell of it
	return describe(job), nil
}

// temporaryName and consumerOf name a backup's snapshot, and the mover that
// holds it, on the storage system.
func temporaryName(id string) string { return "backup/" + id }
func consumerOf(id string) string    { return "backup-" + id }

// hold has the mover hold what it reads or fills, and lets it in.
func (e *Engine) hold(ctx context.Context, job *Job, readOnly bool) error {
	b, err := e.backend(job.Backend)
	if err != nil {
		return err
	}
	export, err := b.Export(ctx, job.target(), job.Consumer)
	if g, ok := b.(backend.Granter); ok && err == nil && e.Node.Name != "" {
		export, err = g.Grant(ctx, job.Consumer, e.Node, readOnly)
	}
	if err != nil {
		return err
	}
	job.Task.Source, job.Node = Source(export), export.Node
	return nil
}

// Source is a backend's export as package mount wants it.
func Source(x *backend.Export) mount.Source {
	return mount.Source{Protocol: x.Protocol, Locations: x.Locations, Path: x.Path, Options: x.Options, User: x.User, Renumbered: x.Renumbered}
}

// advance takes a backup's job one step on from where it was found. The caller
// holds the job's lock.
func (e *Engine) advance(ctx context.Context, st *Status) (*Backup, error) {
	b := describe(st.Job)
	e.tell(ctx, st)
	switch st.Phase {
	case Running:
		return b, st.trouble()
	case Interrupted:
		if e.tooSoon(st) {
			return b, st.trouble()
		}
		return b, e.restart(ctx, st, true)
	case Failed:
		e.remember(st)
		b.Failure = st.Result.Error
		if st.Result.Reason.Lasting() {
			if !e.released(st) {
				if err := e.release(ctx, st.Job); err != nil {
					return nil, err
				}
				e.setReleased(st)
			}
			return nil, told{fmt.Errorf("backup %q in %s: %w: %s", b.Name, Title(b.Repository), ErrFailed, st.Result.Error)}
		}
		if wait := st.Ended.Add(backoff(st.Job.Attempt)).Sub(e.Now()); wait > 0 {
			return nil, told{fmt.Errorf("backup %q in %s: attempt %d: %s (next attempt at %s): %w", b.Name, Title(b.Repository), st.Job.Attempt, st.Result.Error,
				e.Now().Add(wait).UTC().Format(time.TimeOnly+"Z"), backend.ErrUnavailable)}
		}
		// One that was told to stop, as when its node is drained, has left as much
		// as one that was killed.
		return b, e.restart(ctx, st, st.Result.Reason == mover.ReasonStopped)
	case Succeeded:
		// The order matters: the record goes last, since it is what a killed
		// controller finds the snapshot by.
		e.remember(st)
		if err := e.release(ctx, st.Job); err != nil {
			return nil, err
		}
		if b = st.backup(); st.Result.Backup != nil {
			e.learn(b)
		} else { // another controller had made it, of another cut
			found, _, err := e.lookup(ctx, b.Repository, b.ID, b.Volume, 0)
			if err != nil {
				return nil, err
			}
			b = found
		}
		if err := e.Runner.Remove(ctx, st.Job.Task.ID); err != nil {
			return nil, err
		}
		return b, nil
	}
	return nil, fmt.Errorf("backup %q is in unknown phase %q", b.Name, st.Phase)
}

func (e *Engine) restart(ctx context.Context, st *Status, recover bool) error {
	job := st.Job
	job.Attempt++
	job.Task.Recover = recover || job.Task.Recover
	if job.Task.Backup != nil {
		// What is known may have changed, and the last attempt may have left
		// something: this one looks first.
		task := *job.Task.Backup
		task.Parent = nil
		job.Task.Backup = &task
	}
	// This may be another node than the last attempt's, and what it mounts may
	// have moved. What has gone is the mover's to report.
	if err := e.hold(ctx, &job, job.Task.Backup != nil); err != nil && !errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("hold what %s works on, again: %w", job.Task.ID, err)
	}
	klog.FromContext(ctx).Info("Mover starts again", "task", job.Task.ID, "attempt", job.Attempt, "phase", st.Phase,
		"error", cmp.Or(st.Result.Error, st.Trouble))
	same := func(ctx context.Context) error {
		now, err := e.Runner.Status(ctx, job.Task.ID)
		if err == nil && now.Job.Attempt != st.Job.Attempt {
			err = fmt.Errorf("another controller has started it: %w", backend.ErrPending)
		}
		return err
	}
	if err := e.Runner.Start(ctx, job, same); err != nil {
		return fmt.Errorf("start %s again: %w", job.Task.ID, err)
	}
	return nil
}

// tooSoon says whether an interrupted job has to wait: not the first time; then, as
// its mover dies each time, longer and longer.
func (e *Engine) tooSoon(st *Status) bool {
	return st.Job.Attempt > 1 && e.Now().Before(st.Started.Add(backoff(st.Job.Attempt)))
}

func backoff(attempt int) time.Duration {
	d := backoffMin
	for range attempt - 1 {
		if d *= 2; d >= backoffMax {
			return backoffMax
		}
	}
	return d
}

// release ends the mover's hold, once it uses nothing any more, and removes the
// temporary snapshot.
func (e *Engine) release(ctx context.Context, job Job) error {
	if job.target() == (backend.Target{}) {
		return nil
	}
	b, err := e.backend(job.Backend)
	if err != nil {
		return err
	}
	if err := e.Runner.Release(ctx, job.Task.ID); err != nil {
		return err
	}
	if err := b.Unexport(ctx, job.target(), job.Consumer); err != nil {
		return fmt.Errorf("release what mover %s held: %w", job.Task.ID, err)
	}
	if job.Snapshot == "" {
		return nil
	}
	if err := b.DeleteSnapshot(ctx, job.Snapshot); err != nil {
		return fmt.Errorf("remove temporary snapshot %s: %w", job.Snapshot, err)
	}
	return nil
}

// Find returns one backup. ErrNotFound when there is none.
func (e *Engine) Find(ctx context.Context, repository, id string) (*Backup, error) {
	st, err := e.Runner.Status(ctx, id)
	if err == nil && st.Job.Task.Backup != nil && st.Job.Task.Repository == repository {
		return st.backup(), nil
	}
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return nil, err
	}
	for _, age := range []time.Duration{listingAge, 0} {
		var found *Backup
		if found, _, err = e.lookup(ctx, repository, id, "", age); !errors.Is(err, errNoBackup) {
			return found, err
		}
	}
	return nil, fmt.Errorf("backup %s in repository %q: %w", id, repository, err)
}

// List returns the backups of all repositories, and those that are being made,
// ordered by repository and id.
func (e *Engine) List(ctx context.Context) ([]*Backup, error) {
	names, err := e.Repositories.Names(ctx)
	if err != nil {
		return nil, err
	}
	jobs, err := e.Runner.Jobs(ctx)
	if err != nil {
		return nil, err
	}
	type key struct{ repository, id string }
	all := map[key]*Backup{}
	for _, name := range names {
		backups, err := e.list(ctx, name, listingAge)
		if err != nil && unset(name, err) {
			continue
		}
		if err != nil && ctx.Err() == nil {
			// Whatever it is, it is not the request that is wrong; and a listing
			// that lacks backups would be taken for their end.
			return nil, fmt.Errorf("list backups: %w: %s", backend.ErrUnavailable, err)
		}
		if err != nil {
			return nil, err
		}
		for _, b := range backups {
			all[key{name, b.ID}] = b
		}
	}
	for _, st := range jobs {
		if st.Job.Task.Backup == nil {
			continue
		}
		// A job that has not said that all is well outranks what a repository
		// shows: restic keeps a snapshot of an incomplete backup too.
		b := st.backup()
		all[key{b.Repository, b.ID}] = b
	}
	out := make([]*Backup, 0, len(all))
	for _, b := range all {
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b *Backup) int {
		return cmp.Or(cmp.Compare(a.Repository, b.Repository), cmp.Compare(a.ID, b.ID))
	})
	return out, nil
}

// Delete removes one backup and nothing else: the mover that still makes it,
// its temporary snapshot, and its restic snapshots. What is gone is nil.
// ErrPending while others hold the repository's lock.
func (e *Engine) Delete(ctx context.Context, repository, id string) error {
	release, err := e.lock(id)
	if err != nil {
		return err
	}
	defer release()

	repo, turn, err := e.open(ctx, repository)
	defer turn()
	abandoned := errors.Is(err, ErrAbandoned)
	if errors.Is(err, backend.ErrNotFound) {
		// Success would leave the data where nobody looks for it any more.
		where := "put its folder back"
		if Owner(repository) != "" {
			where = "put the Secret back"
		}
		return fmt.Errorf("delete backup %s: %s is not configured; %s, or remove the backup with plain restic: %w",
			id, Title(repository), where, backend.ErrInUse)
	}
	if err != nil && !abandoned {
		return fmt.Errorf("delete backup %s: %w", id, err)
	}
	st, err := e.Runner.Status(ctx, id)
	switch {
	case err == nil && st.Job.Task.Backup != nil && st.Job.Task.Repository == repository:
		// The record goes last: a killed controller finds the snapshot by it, and
		// it outranks what an incomplete backup has left in the repository.
		if err := e.Runner.Stop(ctx, id); err != nil {
			return fmt.Errorf("stop backup %s: %w", id, err)
		}
		if err := e.release(ctx, st.Job); err != nil {
			return err
		}
	case err != nil && !errors.Is(err, backend.ErrNotFound):
		return err
	}
	if abandoned {
		// Nobody can mend that, and the namespace could not go before its backups.
		klog.FromContext(ctx).Info("Backup is left in its repository, as the namespace is gone", "backup", id, "repository", repository)
	} else if err := e.forget(ctx, repo, repository, id); err != nil {
		return err
	}
	return e.Runner.Remove(ctx, id)
}

// forget removes the restic snapshots that bear the backup's tag, by their ids.
func (e *Engine) forget(ctx context.Context, repo restic.Client, repository, id string) error {
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, repositoryTimeout)
	defer cancel()
	snapshots, err := repo.Snapshots(ctx, mover.TagBackup+id)
	if errors.Is(err, restic.ErrNoRepository) {
		return nil
	}
	if err != nil && !errors.Is(err, restic.ErrIncomplete) { // what cannot be read cannot be forgotten
		return repositoryError(asked, repository, err)
	}
	if len(snapshots) == 0 {
		return nil
	}
	ids := make([]string, len(snapshots))
	for i, s := range snapshots {
		ids[i] = s.ID
	}
	err = repo.Forget(ctx, lockWait, ids...)
	if errors.Is(err, restic.ErrLocked) {
		// A lock of a mover that is gone must not stay; a live one is waited for.
		if err := repo.Unlock(ctx); err != nil {
			return repositoryError(asked, repository, err)
		}
		err = repo.Forget(ctx, lockWait, ids...)
	}
	e.forgetListing(repository)
	if err != nil {
		return repositoryError(asked, repository, err)
	}
	klog.FromContext(ctx).Info("Backup deleted", "backup", id, "repository", repository, "resticSnapshots", ids)
	return nil
}

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
		return &Status{Job: job, Phase: Running}, nil
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

// EndRestore stops a restore that still runs and drops its record.
func (e *Engine) EndRestore(ctx context.Context, id string) error {
	release, err := e.lock(id)
	if err != nil {
		return err
	}
	defer release()
	return e.Runner.Remove(ctx, id)
}

// Run looks after the jobs until ctx ends: it finishes what a mover has ended,
// and starts again what was interrupted, whether or not anybody asks.
func (e *Engine) Run(ctx context.Context) {
	log := klog.FromContext(ctx)
	tick := time.NewTicker(e.Tick)
	defer tick.Stop()
	said := map[string]string{} // the last error of each job, to say each once
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
		if e.Now().Sub(swept) > refreshEvery {
			swept = e.Now()
			if err := e.sweep(ctx); err != nil && ctx.Err() == nil {
				log.Error(err, "Looking for temporary snapshots left behind")
			}
		}
		jobs, err := e.Runner.Jobs(ctx)
		if err != nil {
			log.Error(err, "Listing movers")
			continue
		}
		for _, st := range jobs {
			e.tell(ctx, st)
			id := st.Job.Task.ID
			if st.Job.Task.Backup == nil || st.Phase == Running || e.released(st) {
				continue // whoever asked for a restore looks after it
			}
			if err := e.look(ctx, id); err != nil && ctx.Err() == nil && !errors.Is(err, backend.ErrPending) {
				if said[id] != err.Error() {
					log.Error(err, "Backup is not done", "backup", id)
				}
				said[id] = err.Error()
			} else {
				delete(said, id)
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

// unset says that an error is of a namespace that may have a repository of its own, and
// has none.
func unset(repository string, err error) bool {
	return Owner(repository) != "" && (errors.Is(err, backend.ErrNotFound) || errors.Is(err, ErrAbandoned))
}

// look advances one job, read again under its lock.
func (e *Engine) look(ctx context.Context, id string) (err error) {
	defer func() {
		// No request waits for it, so none would answer a panic.
		if p := recover(); p != nil {
			err = fmt.Errorf("the driver has a defect: %v\n%s", p, debug.Stack())
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
	_, err = e.advance(ctx, st)
	return err
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

// released says whether nothing is held any more for a job that has failed for
// good, as far as this process has seen to it.
func (e *Engine) released(st *Status) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	at, ok := e.releasedAt[st.Job.Task.ID]
	return ok && at.Equal(st.Ended)
}

func (e *Engine) setReleased(st *Status) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.releasedAt == nil || len(e.releasedAt) > releasedMax {
		e.releasedAt = map[string]time.Time{}
	}
	e.releasedAt[st.Job.Task.ID] = st.Ended
}

// Recent returns the attempts that ended under this process, oldest first.
func (e *Engine) Recent() []*Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.recent)
}

func (e *Engine) remember(st *Status) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := st.Job.Task.ID
	if e.seen[id].Equal(st.Ended) {
		return
	}
	if e.seen == nil {
		e.seen, e.ended = map[string]time.Time{}, map[ending]int{}
	}
	e.seen[id] = st.Ended
	e.ended[endingOf(st)]++
	e.recent = append(e.recent, st)
	if len(e.recent) > recentMax {
		delete(e.seen, e.recent[0].Job.Task.ID)
		e.recent = slices.Delete(e.recent, 0, 1)
	}
}

func (e *Engine) lock(id string) (func(), error) {
	release, busy := e.busy.TryLock(id)
	if busy != "" {
		return nil, fmt.Errorf("%s is being worked on: %w", id, backend.ErrPending)
	}
	return release, nil
}

func (e *Engine) backend(name string) (backend.Backend, error) {
	if b := e.Backends[name]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("backend %q is not configured: %w", name, backend.ErrNotFound)
}

var errNoBackup = fmt.Errorf("no such backup: %w", backend.ErrNotFound)

// lookup finds a finished backup in a listing of at most the given age, of which
// it trusts a hit for listingAge only. With errNoBackup it returns the newest
// backup of the volume.
func (e *Engine) lookup(ctx context.Context, repository, id, volume string, age time.Duration) (*Backup, *mover.Parent, error) {
	is := func(b *Backup) bool { return b.ID == id }
	backups, err := e.list(ctx, repository, age)
	if err == nil && slices.ContainsFunc(backups, is) {
		backups, err = e.list(ctx, repository, min(age, listingAge))
	}
	if err != nil {
		return nil, nil, err
	}
	if i := slices.IndexFunc(backups, is); i >= 0 {
		return backups[i], nil, nil
	}
	parent := &mover.Parent{}
	for _, b := range backups {
		if b.Volume == volume && !b.CreatedAt.Before(parent.Time) {
			parent = &mover.Parent{Snapshot: b.Snapshot, Files: b.Files, Time: b.CreatedAt}
		}
	}
	return nil, parent, errNoBackup
}

// list returns the backups in a repository, from a listing of at most the
// given age. A repository that nobody has written to yet has none.
func (e *Engine) list(ctx context.Context, repository string, age time.Duration) ([]*Backup, error) {
	e.mu.Lock()
	l, ok := e.listings[repository]
	e.mu.Unlock()
	if ok && !l.stale && e.Now().Sub(l.at) < age {
		return l.backups, nil
	}
	repo, turn, err := e.open(ctx, repository)
	defer turn()
	if err != nil {
		return nil, err
	}
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, repositoryTimeout)
	defer cancel()
	at := e.Now()
	e.mu.Lock()
	learned := e.learned
	e.mu.Unlock()
	snapshots, err := repo.Snapshots(ctx)
	switch {
	case errors.Is(err, restic.ErrIncomplete):
		// One damaged snapshot must not hide the backups of all volumes.
		klog.FromContext(ctx).Error(err, "Repository holds snapshots that cannot be read", "repository", repository)
	case err != nil && !errors.Is(err, restic.ErrNoRepository):
		return nil, repositoryError(asked, repository, err)
	}
	care, careID := l.care, maintain.LatestID(snapshots)
	if careID != l.careID {
		read, err := maintain.Latest(ctx, repo, snapshots)
		if err != nil {
			klog.FromContext(ctx).Error(err, "What maintenance has left cannot be read", "repository", repository)
			careID = l.careID // the next listing tries again
		} else {
			care = read
		}
	}
	backups := make([]*Backup, 0, len(snapshots))
	for _, s := range snapshots {
		if b := fromTags(repository, s); b != nil {
			backups = append(backups, b)
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.listings == nil {
		e.listings = map[string]listing{}
	}
	if learned != e.learned {
		return backups, nil // it may lack what was learned while restic listed
	}
	e.listings[repository] = listing{at: at, backups: backups, held: mover.Held(snapshots, at), care: care, careID: careID}
	return backups, nil
}

// open opens a repository. The caller has its turn there until it calls turn, which is
// never nil: requests have few workers, which one namespace whose server does not
// answer must not keep from the others. An administrator's has no turns.
func (e *Engine) open(ctx context.Context, repository string) (repo restic.Client, turn func(), err error) {
	turn = func() {}
	for until := e.Now().Add(turnWait); Owner(repository) != ""; {
		release, busy := e.asked.TryLock(repository)
		if busy == "" {
			turn = release
			break
		}
		if e.Now().After(until) || ctx.Err() != nil {
			return nil, turn, fmt.Errorf("%s has not answered another request yet: %w", Title(repository), backend.ErrPending)
		}
		select {
		case <-ctx.Done():
		case <-time.After(turnPoll):
		}
	}
	repo, err = e.Repositories.Open(ctx, repository)
	return repo, turn, err
}

// forgetOthers drops what is known of repositories that are there no more.
func (e *Engine) forgetOthers(names []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	maps.DeleteFunc(e.listings, func(name string, _ listing) bool { return !slices.Contains(names, name) })
}

// held says that maintenance holds new backups back, as the repository was last
// seen. What is seen late only makes maintenance wait for longer.
func (e *Engine) held(repository string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.listings[repository].held.After(e.Now())
}

// Made says whether a repository is known to be there.
func (e *Engine) Made(repository string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.listings[repository].backups) > 0
}

// files counts the files of the newest backup of each volume.
func (e *Engine) files(repository string) (n int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	newest := map[string]*Backup{}
	for _, b := range e.listings[repository].backups {
		if old := newest[b.Volume]; old == nil || b.CreatedAt.After(old.CreatedAt) {
			newest[b.Volume] = b
		}
	}
	for _, b := range newest {
		n += b.Files
	}
	return n
}

// learn adds a backup that has just been made to what is known.
func (e *Engine) learn(b *Backup) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.learned++
	l, ok := e.listings[b.Repository]
	if !ok {
		return
	}
	l.backups = append(slices.DeleteFunc(slices.Clone(l.backups), func(o *Backup) bool { return o.ID == b.ID }), b)
	e.listings[b.Repository] = l
}

// learnEnded adds what movers have made and nobody has looked at yet, so that
// the next backup of a volume is compared with it.
func (e *Engine) learnEnded(ctx context.Context) error {
	jobs, err := e.Runner.Jobs(ctx)
	for _, st := range jobs {
		if st.Phase == Succeeded && st.Result.Backup != nil {
			e.learn(st.backup())
		}
	}
	return err
}

// forgetListing makes the next call read the repository again. The old listing
// stays for the metrics.
func (e *Engine) forgetListing(repository string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.learned++
	if l, ok := e.listings[repository]; ok {
		l.stale = true
		e.listings[repository] = l
	}
}

// trouble is why a job is not getting on, nil if nothing is known to be wrong.
func (st *Status) trouble() error {
	text := cmp.Or(st.Trouble, st.Progress.Trouble)
	if text == "" {
		return nil
	}
	return told{fmt.Errorf("mover of %s, attempt %d: %s: %w", st.Job.Task.ID, st.Job.Attempt, text, backend.ErrUnavailable)}
}

// backup says what a job has come to.
func (st *Status) backup() *Backup {
	b := describe(st.Job)
	b.Ready, b.Failure, b.Lost = st.Phase == Succeeded, st.Result.Error, st.Result.Reason.Lasting()
	b.Snapshot, b.Summary = st.Result.Snapshot, st.Result.Backup
	if st.Result.Backup != nil {
		b.Files = st.Result.Backup.TotalFiles
	}
	return b
}

func describe(job Job) *Backup {
	b := job.Task.Backup
	if b == nil {
		return &Backup{ID: job.Task.ID, Repository: job.Task.Repository}
	}
	return &Backup{ID: b.Backup, Repository: job.Task.Repository, Name: b.Name, Volume: b.Volume, Size: b.Size, CreatedAt: b.Time, Host: b.Host}
}

// fromTags reads a backup from its restic snapshot; nil if it is not one of
// ours.
func fromTags(repository string, s restic.Snapshot) *Backup {
	b := &Backup{Repository: repository, CreatedAt: s.Time.Truncate(time.Second), Ready: true, Snapshot: s.ID, Host: s.Host, Summary: s.Summary}
	if s.Summary != nil {
		b.Files = s.Summary.TotalFiles
	}
	for _, tag := range s.Tags {
		if v, ok := strings.CutPrefix(tag, mover.TagBackup); ok {
			b.ID = v
		} else if v, ok := strings.CutPrefix(tag, mover.TagVolume); ok {
			b.Volume = v
		} else if v, ok := strings.CutPrefix(tag, mover.TagName); ok {
			b.Name, _ = url.QueryUnescape(v) // only shown
		} else if v, ok := strings.CutPrefix(tag, mover.TagSize); ok {
			b.Size, _ = strconv.ParseInt(v, 10, 64)
		}
	}
	if b.ID == "" || b.Volume == "" {
		return nil
	}
	return b
}

// repositoryError puts an error of restic into the terms of package backend. ctx
// is the caller's: a time limit of our own is a repository that is not there.
func repositoryError(ctx context.Context, repository string, err error) error {
	kind := backend.ErrUnavailable
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", Title(repository), err)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w: %s", Title(repository), kind, err)
	case errors.Is(err, restic.ErrWrongPassword):
		kind = backend.ErrAuth
	case errors.Is(err, restic.ErrConfig):
		kind = backend.ErrInvalid
	case errors.Is(err, restic.ErrLocked):
		kind = backend.ErrPending
	}
	return fmt.Errorf("%s: %w: %w", Title(repository), kind, err)
}
