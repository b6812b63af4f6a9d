package backup

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/busy"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/mover"
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
	// sawAge is how long a record that is gone is remembered: more than the time
	// between two requests for the backup.
	sawAge = time.Hour
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
	// Exists says whether an object that people look at is there still; nil if that
	// cannot be told.
	Exists func(context.Context, Object) (bool, error)

	wakeOnce sync.Once
	woken    chan struct{}
	busy     busy.Set
	asked    busy.Set // the repositories of namespaces that restic is asking
	mu       sync.Mutex
	last     view
	listings map[string]listing
	up       map[string]bool // whether the last attempt to list each repository went well
	recent   []*Status
	seen     map[string]time.Time // end of the last attempt that was remembered, by job
	ended    map[ending]int
	// releasedAt is as seen, of jobs for which nothing is held any more.
	releasedAt map[string]time.Time
	// asking counts the repositories that are being listed, learned are the backups that
	// were made meanwhile, and forgotten counts the deletions.
	asking, forgotten int
	learned           []*Backup
	// sawAt is when a record of a backup was seen last, by its id.
	sawAt map[string]time.Time
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
			// kernel a while, and is left to Run. The next backup of the volume may
			// come before, and is compared with this one.
			e.learn(st.backup())
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
	// another controller has finished since. If this one has known of it, it looks
	// anew; else a mover finds the backup and keeps it.
	age := refreshEvery
	if e.hasSeen(req.ID) {
		age = 0
	}
	b, err := e.findOrBegin(ctx, req, age)
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
	e.saw([]*Status{{Job: job}})
	e.wake() // to tell of it
	return describe(job), nil
}

// temporaryName and consumerOf name a backup's snapshot, and the mover that
// holds it, on the storage system.
func temporaryName(id string) string { return "backup/" + id }

func consumerOf(id string) string { return "backup-" + id }

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
			if errors.Is(err, errNoBackup) {
				return nil, fmt.Errorf("backup %q was made, and is not in %s any more: %w", b.Name, Title(b.Repository), backend.ErrUnavailable)
			}
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

// trouble is why a job is not getting on, nil if nothing is known to be wrong.
func (st *Status) trouble() error {
	text := cmp.Or(st.Trouble, st.Progress.Trouble)
	if text == "" {
		return nil
	}
	return told{fmt.Errorf("mover of %s, attempt %d: %s: %w", st.Job.Task.ID, st.Job.Attempt, text, backend.ErrUnavailable)}
}

func (st *Status) isBackupIn(repository string) bool {
	return st.Job.Task.Backup != nil && st.Job.Task.Repository == repository
}

// backup says what a job has come to.
func (st *Status) backup() *Backup {
	b := describe(st.Job)
	b.Ready, b.Failure, b.Lost = st.Phase == Succeeded, st.Result.Error, st.Result.Reason.Lasting()
	b.Snapshot, b.Summary, b.Partial = st.Result.Snapshot, st.Result.Backup, st.Result.Partial
	if st.Result.Backup != nil {
		b.Files = st.Result.Backup.TotalFiles
	}
	return b
}
