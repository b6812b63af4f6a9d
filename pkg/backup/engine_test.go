package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr/funcr"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/memory"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// fakeRunner keeps records; its movers end when a test says so.
type fakeRunner struct {
	jobs   map[string]*Status
	starts int
	// mounted is why what a mover had mounted is still there.
	mounted   error
	released  int // how often it was asked for
	onRelease func(context.Context)
	onJobs    func() // when they have been read, if that is not nil
	now       func() time.Time
}

func (r *fakeRunner) Start(ctx context.Context, job Job, may func(context.Context) error) error {
	if err := may(ctx); err != nil {
		return err
	}
	if st := r.jobs[job.Task.ID]; st != nil && (st.Phase == Running || st.Phase == Succeeded) {
		return nil
	}
	r.starts++
	r.jobs[job.Task.ID] = &Status{Job: job, Phase: Running, Started: r.now()}
	return nil
}

func (r *fakeRunner) Status(_ context.Context, id string) (*Status, error) {
	if st := r.jobs[id]; st != nil {
		copied := *st
		return &copied, nil
	}
	return nil, fmt.Errorf("job %s: %w", id, backend.ErrNotFound)
}

func (r *fakeRunner) Jobs(ctx context.Context) ([]*Status, error) {
	var out []*Status
	for id := range r.jobs {
		st, _ := r.Status(ctx, id)
		out = append(out, st)
	}
	slices.SortFunc(out, func(a, b *Status) int { return cmp.Compare(a.Job.Task.ID, b.Job.Task.ID) })
	if r.onJobs != nil {
		r.onJobs()
	}
	return out, nil
}

func (r *fakeRunner) Stop(_ context.Context, id string) error {
	if st := r.jobs[id]; st != nil && st.Phase == Running {
		st.Phase, st.Result = Failed, mover.Result{Error: "deleted", Reason: mover.ReasonDeleted}
	}
	return nil
}

func (r *fakeRunner) Release(ctx context.Context, _ string) error {
	r.released++
	if r.onRelease != nil {
		r.onRelease(ctx)
	}
	return r.mounted
}

func (r *fakeRunner) Remove(_ context.Context, id string) error {
	delete(r.jobs, id)
	return nil
}

// fakeRepository is one repository in memory.
type fakeRepository struct {
	restic.Client
	snapshots []restic.Snapshot
	listed    int
	err       error
	asked     func() // while it is being listed, if that is not nil
	care      []byte // what maintenance has left
}

func (f *fakeRepository) Names(context.Context) ([]string, error) {
	return []string{"empty", "offsite"}, nil
}

func (f *fakeRepository) Open(_ context.Context, name string) (restic.Client, error) {
	switch name {
	case "empty":
		return &fakeRepository{}, nil
	case "offsite":
		return f, nil
	}
	return nil, fmt.Errorf("repository %q: %w", name, backend.ErrNotFound)
}

func (f *fakeRepository) Snapshots(_ context.Context, tags ...string) ([]restic.Snapshot, error) {
	if f.listed++; f.asked != nil {
		f.asked()
	}
	var out []restic.Snapshot
	for _, s := range f.snapshots {
		if !slices.ContainsFunc(tags, func(t string) bool { return !slices.Contains(s.Tags, t) }) {
			out = append(out, s)
		}
	}
	return out, f.err
}

func (f *fakeRepository) Dump(context.Context, string, string) ([]byte, error) {
	return f.care, nil
}

func (f *fakeRepository) Forget(_ context.Context, _ time.Duration, ids ...string) error {
	f.snapshots = slices.DeleteFunc(f.snapshots, func(s restic.Snapshot) bool { return slices.Contains(ids, s.ID) })
	return f.err
}

type bench struct {
	*Engine
	t          *testing.T
	now        time.Time
	runner     *fakeRunner
	repository *fakeRepository
	store      *memory.Store
	backend    backend.Backend
	share      *backend.Share
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, now: time.Date(2026, 4, 12, 1, 0, 0, 0, time.UTC), repository: &fakeRepository{}}
	clock := func() time.Time { return b.now }
	b.store = memory.NewStore("")
	b.store.Now = clock
	b.backend = b.store.Open()
	b.runner = &fakeRunner{jobs: map[string]*Status{}, now: clock}
	b.Engine = &Engine{Backends: map[string]backend.Backend{"mem": b.backend}, Repositories: b.repository, Runner: b.runner,
		Now: clock, Tick: time.Millisecond}
	var err error
	if b.share, err = b.backend.CreateShare(t.Context(), backend.CreateShareRequest{Name: "data", MinSize: 1 << 20, Role: backend.RoleUser}); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) request(id string) Request {
	return Request{ID: id, Name: "name of " + id, Repository: "offsite", Backend: "mem", ShareID: b.share.ID, Volume: "mem/" + b.share.ID, Host: "h"}
}

// end makes a running mover end, and what it made appear in the repository.
func (b *bench) end(id string, result mover.Result) {
	st := b.runner.jobs[id]
	st.Phase, st.Result, st.Ended = Succeeded, result, b.now
	if result.Error != "" {
		st.Phase = Failed
	}
	if result.Snapshot != "" {
		b.repository.snapshots = append(b.repository.snapshots, restic.Snapshot{ID: result.Snapshot, Time: st.Job.Task.Backup.Time,
			Tags: []string{mover.TagBackup + id, mover.TagVolume + st.Job.Task.Backup.Volume, mover.TagName + "n", mover.TagSize + "5"}})
	}
}

func (b *bench) finish(id string) {
	b.t.Helper()
	if err := b.look(b.t.Context(), id); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) snapshots() int {
	b.t.Helper()
	all, _, err := b.backend.ListSnapshots(b.t.Context(), "", 0)
	if err != nil {
		b.t.Fatal(err)
	}
	return len(all)
}

func TestBackupFromBeginningToEnd(t *testing.T) {
	b := newBench(t)
	first, err := b.Backup(t.Context(), b.request("one"))
	if err != nil || first.Ready {
		t.Fatalf("%+v, %v", first, err)
	}
	if again, err := b.Backup(t.Context(), b.request("one")); err != nil || again.Ready || b.runner.starts != 1 || b.snapshots() != 1 {
		t.Errorf("while it runs: %+v, %v, %d movers, %d snapshots", again, err, b.runner.starts, b.snapshots())
	}
	other := b.request("one")
	other.Volume = "mem/other"
	if _, err := b.Backup(t.Context(), other); !errors.Is(err, backend.ErrConflict) {
		t.Errorf("of another volume: %v", err)
	}
	b.end("one", mover.Result{Snapshot: "s1", Backup: &restic.BackupSummary{}})
	done, err := b.Backup(t.Context(), b.request("one"))
	b.finish("one") // which Run does
	if err != nil || !done.Ready || done.CreatedAt != first.CreatedAt || b.snapshots() != 0 || len(b.runner.jobs) != 0 {
		t.Errorf("at the end: %+v, %v, %d snapshots, %d records", done, err, b.snapshots(), len(b.runner.jobs))
	}
	// The source may go.
	if err := b.backend.DeleteShare(t.Context(), b.share.ID); err != nil {
		t.Fatal(err)
	}
	for _, later := range []time.Duration{0, time.Second, time.Hour} {
		b.now = b.now.Add(later)
		if found, err := b.Backup(t.Context(), b.request("one")); err != nil || !found.Ready {
			t.Errorf("%s later: %+v, %v", later, found, err)
		}
	}
	if found, err := b.Find(t.Context(), "offsite", "one"); err != nil || found.Snapshot != "s1" {
		t.Errorf("found %+v, %v", found, err)
	}
}

// The second backup of a volume is told the first as its parent, and asks the
// repository nothing.
func TestNextBackupIsToldItsParent(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	// Nobody has looked at it since, and nothing has finished it.
	b.end("one", mover.Result{Snapshot: "s1", Backup: &restic.BackupSummary{TotalFiles: 7}})
	before := b.repository.listed
	b.now = b.now.Add(time.Minute)
	if _, err := b.Backup(t.Context(), b.request("two")); err != nil {
		t.Fatal(err)
	}
	if p := b.runner.jobs["two"].Job.Task.Backup.Parent; p == nil || p.Snapshot != "s1" || p.Files != 7 || b.repository.listed != before {
		t.Errorf("parent %+v after %d listings", p, b.repository.listed-before)
	}
	// A mover that starts again looks for itself.
	b.runner.jobs["two"].Phase = Interrupted
	if _, err := b.Backup(t.Context(), b.request("two")); err != nil {
		t.Fatal(err)
	}
	if job := b.runner.jobs["two"].Job; job.Task.Backup.Parent != nil || !job.Task.Recover || job.Attempt != 2 {
		t.Errorf("started again as %+v", job)
	}
}

// So is one that is asked for as soon as the first was answered, when the last look at
// the jobs is of before.
func TestNextBackupComesAtOnce(t *testing.T) {
	b := newBench(t)
	b.Tick = time.Second
	if _, err := b.List(t.Context()); err != nil { // so that the repository is known
		t.Fatal(err)
	}
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.jobs(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	st := *b.runner.jobs["one"] // what was seen stays as it was seen
	b.runner.jobs["one"] = &st
	b.end("one", mover.Result{Snapshot: "s1", Backup: &restic.BackupSummary{}})
	if done, err := b.Backup(t.Context(), b.request("one")); err != nil || !done.Ready {
		t.Fatalf("at the end: %+v, %v", done, err)
	}
	if _, err := b.Backup(t.Context(), b.request("two")); err != nil {
		t.Fatal(err)
	}
	if p := b.runner.jobs["two"].Job.Task.Backup.Parent; p == nil || p.Snapshot != "s1" {
		t.Errorf("parent %+v", p)
	}
}

// While maintenance waits for its turn, a mover is not told the newest backup: it
// looks before it begins, and sees the hold.
func TestHeldBack(t *testing.T) {
	b := newBench(t)
	for _, test := range []struct {
		tags []string
		told bool
	}{
		{[]string{mover.TagMaintenance}, true},
		{[]string{mover.TagMaintenance, mover.TagHold + "2026-04-12T03:00:00Z"}, false},
		{[]string{mover.TagMaintenance, mover.TagHold + "2026-04-12T00:59:59Z"}, true}, // it is over
		{[]string{mover.TagMaintenance, mover.TagHold + "tomorrow"}, true},
	} {
		b.repository.snapshots = append(b.repository.snapshots, restic.Snapshot{ID: "m", Time: b.now, Tags: test.tags})
		b.forgetListing("offsite")
		if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
			t.Fatal(err)
		}
		if told := b.runner.jobs["one"].Job.Task.Backup.Parent != nil; told != test.told {
			t.Errorf("%v: told the parent: %v", test.tags, told)
		}
		if err := b.Delete(t.Context(), "offsite", "one"); err != nil {
			t.Fatal(err)
		}
	}
}

// restic keeps a snapshot of an incomplete backup too: a record outranks it.
func TestRepositoryIsNotBelievedOverARecord(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.end("one", mover.Result{Snapshot: "s1"})
	for _, phase := range []Phase{Running, Interrupted, Failed} {
		b.runner.jobs["one"].Phase = phase
		if found, err := b.Find(t.Context(), "offsite", "one"); err != nil || found.Ready {
			t.Errorf("%s: found %+v, %v", phase, found, err)
		}
		b.now = b.now.Add(time.Hour)
		if list, err := b.List(t.Context()); err != nil || len(list) != 1 || list[0].Ready {
			t.Errorf("%s: listed %+v, %v", phase, list, err)
		}
	}
}

func TestFailures(t *testing.T) {
	for _, reason := range []mover.Reason{mover.ReasonIncomplete, mover.ReasonSource, mover.ReasonEmpty, mover.ReasonPassword, mover.ReasonConfig} {
		b := newBench(t)
		if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
			t.Fatal(err)
		}
		b.end("one", mover.Result{Error: "because", Reason: reason})
		for range 2 {
			b.now = b.now.Add(time.Hour)
			if _, err := b.Backup(t.Context(), b.request("one")); !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "because") {
				t.Errorf("%s: %v", reason, err)
			}
		}
		if b.snapshots() != 0 || b.runner.starts != 1 {
			t.Errorf("%s: %d snapshots, %d movers", reason, b.snapshots(), b.runner.starts)
		}
		if err := b.Delete(t.Context(), "offsite", "one"); err != nil || len(b.runner.jobs) != 0 {
			t.Errorf("%s: delete: %v, %d records", reason, err, len(b.runner.jobs))
		}
	}
}

func TestPassingFailureIsTriedAgain(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	for attempt := 1; attempt <= 3; attempt++ {
		b.end("one", mover.Result{Error: "the network is down", Reason: mover.ReasonRepository})
		_, early := b.Backup(t.Context(), b.request("one"))
		if !errors.Is(early, backend.ErrUnavailable) || !strings.Contains(early.Error(), "network") {
			t.Errorf("too early: %v", early)
		}
		b.now = b.now.Add(time.Second)
		if again := b.look(t.Context(), "one"); again == nil || again.Error() != early.Error() {
			t.Errorf("%v, and then %v: it is logged anew each time that it says something else", early, again)
		}
		b.now = b.now.Add(backoff(attempt) - time.Second)
		if _, err := b.Backup(t.Context(), b.request("one")); err != nil || b.runner.starts != attempt+1 {
			t.Errorf("after a while: %v, %d movers", err, b.runner.starts)
		}
	}
	if b.snapshots() != 1 {
		t.Errorf("%d snapshots; it must be the same all the time", b.snapshots())
	}
	if len(b.Recent()) != 3 {
		t.Errorf("%d attempts are remembered", len(b.Recent()))
	}
}

// TestOneNameInTwoRepositories: the name of a backup is its identity, wherever
// it is.
func TestOneNameInTwoRepositories(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.end("one", mover.Result{Snapshot: strings.Repeat("a", 64), Backup: &restic.BackupSummary{}})
	if _, err := b.Find(t.Context(), "offsite", "one"); err != nil {
		t.Fatal(err)
	}
	if err := b.look(t.Context(), "one"); err != nil { // its record goes
		t.Fatal(err)
	}
	if _, err := b.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	req := b.request("one")
	req.Repository = "empty"
	if _, err := b.Backup(t.Context(), req); !errors.Is(err, backend.ErrConflict) || !strings.Contains(err.Error(), "offsite") {
		t.Errorf("the same name in another repository: %v", err)
	}
	if len(b.runner.jobs) != 0 {
		t.Error("a mover was started all the same")
	}
}

// A repository that cannot be asked keeps the record, which outranks what an
// incomplete backup may have left there.
func TestDeleteKeepsTheRecordUntilTheEnd(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.repository.snapshots = []restic.Snapshot{{ID: "half", Tags: []string{mover.TagBackup + "one", mover.TagVolume + "v"}}}
	b.repository.err = restic.ErrLocked
	if err := b.Delete(t.Context(), "offsite", "one"); !errors.Is(err, backend.ErrPending) || len(b.runner.jobs) != 1 {
		t.Errorf("locked: %v, %d records", err, len(b.runner.jobs))
	}
	b.now = b.now.Add(time.Hour)
	if err := b.look(t.Context(), "one"); !errors.Is(err, ErrFailed) || b.runner.starts != 1 {
		t.Errorf("it was started again: %v", err)
	}
	b.repository.err = nil
	if found, err := b.Find(t.Context(), "offsite", "one"); err != nil || found.Ready {
		t.Errorf("found %+v, %v", found, err)
	}
	if err := b.Delete(t.Context(), "offsite", "one"); err != nil || len(b.runner.jobs) != 0 || len(b.repository.snapshots) != 0 {
		t.Errorf("delete: %v", err)
	}
}

// One unreadable snapshot in a repository must not end the backups of all.
func TestUnreadableSnapshotsOfOthers(t *testing.T) {
	b := newBench(t)
	b.repository.err = restic.ErrIncomplete
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Errorf("backup: %v", err)
	}
	if list, err := b.List(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("list: %v, %v", list, err)
	}
}

// A restore that is not wanted any more does not begin.
func TestRestoreIsAskedForUnderItsLock(t *testing.T) {
	b := newBench(t)
	req := RestoreRequest{ID: "restore-x", Repository: "offsite", Backup: "one", Backend: "mem", Share: b.share.ID, Wanted: func(context.Context) error { return backend.ErrConflict }}
	if _, err := b.Restore(t.Context(), req); !errors.Is(err, backend.ErrConflict) || b.runner.starts != 0 {
		t.Errorf("%v, %d movers", err, b.runner.starts)
	}
	if _, err := b.backend.ExportOf(t.Context(), req.ID); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("the share is held for a restore that nobody wants: %v", err)
	}
	req.Wanted = always
	if _, err := b.Restore(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	req.Backup = "two"
	if _, err := b.Restore(t.Context(), req); !errors.Is(err, backend.ErrConflict) {
		t.Errorf("of another backup: %v", err)
	}
}

// What a mover used is not taken from under it, and why it does not get on is said.
func TestReleaseComesFirst(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.runner.jobs["one"].Trouble = "no node takes its pod"
	if _, err := b.Backup(t.Context(), b.request("one")); !errors.Is(err, backend.ErrUnavailable) || !strings.Contains(err.Error(), "no node takes") {
		t.Errorf("while it does not get on: %v", err)
	}
	b.runner.mounted = backend.ErrPending
	b.end("one", mover.Result{Snapshot: "s1"})
	if err := b.look(t.Context(), "one"); !errors.Is(err, backend.ErrPending) || b.snapshots() != 1 {
		t.Errorf("its snapshot is removed while it is mounted: %v", err)
	}
	req := RestoreRequest{ID: "restore-x", Repository: "offsite", Backup: "one", Backend: "mem", Share: b.share.ID, Wanted: always}
	if _, err := b.Restore(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	b.runner.jobs[req.ID].Phase = Succeeded
	if _, err := b.Restore(t.Context(), req); !errors.Is(err, backend.ErrPending) {
		t.Errorf("restored while it is mounted: %v", err)
	}
	if _, err := b.backend.ExportOf(t.Context(), req.ID); err != nil {
		t.Errorf("the hold ended while it is mounted: %v", err)
	}
	b.runner.mounted = nil
	if _, err := b.Restore(t.Context(), req); err != nil {
		t.Error(err)
	}
	if _, err := b.backend.ExportOf(t.Context(), req.ID); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("the hold is left: %v", err)
	}
	if err := b.look(t.Context(), "one"); err != nil || b.snapshots() != 0 {
		t.Errorf("left: %d snapshots, %v", b.snapshots(), err)
	}
}

func TestBackoff(t *testing.T) {
	for attempt, want := range map[int]time.Duration{1: 5 * time.Second, 2: 10 * time.Second, 3: 20 * time.Second, 50: 5 * time.Minute} {
		if got := backoff(attempt); got != want {
			t.Errorf("attempt %d: %s, want %s", attempt, got, want)
		}
	}
}

// A mover that dies each time must not be started in a tight loop.
func TestDyingMoverIsSlowedDown(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	for range 60 {
		b.runner.jobs["one"].Phase = Interrupted
		if err := b.look(t.Context(), "one"); err != nil {
			t.Fatal(err)
		}
		b.now = b.now.Add(time.Second)
	}
	if b.runner.starts > 6 {
		t.Errorf("%d movers in a minute", b.runner.starts)
	}
}

// TestNextAttemptOnAnotherNode: a mover that starts again is let in where it is
// now, and reads from where the snapshot is served now.
func TestNextAttemptOnAnotherNode(t *testing.T) {
	b := newBench(t)
	b.Node.Name = "first"
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.Node.Name = "second"
	req := RestoreRequest{ID: "restore-x", Repository: "offsite", Backup: "one", Backend: "mem", Share: b.share.ID, Wanted: always}
	if _, err := b.Restore(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	for _, st := range b.runner.jobs {
		st.Phase, st.Job.Task.Source.Protocol = Interrupted, "moved"
	}
	if err := b.look(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Restore(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	for id, consumer := range map[string]string{"one": consumerOf("one"), req.ID: req.ID} {
		granted := b.store.Granted(consumer)
		if _, ok := granted["second"]; !ok || b.runner.jobs[id].Job.Task.Source.Protocol == "moved" {
			t.Errorf("%s: let in: %v; the source is %+v", id, granted, b.runner.jobs[id].Job.Task.Source)
		}
	}
}

// TestOneStuckJobKeepsNoOther: Run goes on after a job whose end does not come,
// and asks for the end of one that failed for good once only.
func TestOneStuckJobKeepsNoOther(t *testing.T) {
	b := newBench(t)
	for _, id := range []string{"lost", "fine"} {
		if _, err := b.Backup(t.Context(), b.request(id)); err != nil {
			t.Fatal(err)
		}
	}
	b.end("lost", mover.Result{Error: "no", Reason: mover.ReasonEmpty})
	b.finishWith("lost", ErrFailed)
	released := b.runner.released
	b.finishWith("lost", ErrFailed)
	if b.runner.released != released {
		t.Error("what is released is released again")
	}
	deadline := time.Time{}
	b.runner.onRelease = func(ctx context.Context) { deadline, _ = ctx.Deadline() }
	b.end("fine", mover.Result{Snapshot: "s1"})
	b.finish("fine")
	if deadline.IsZero() || time.Until(deadline) > lookTimeout {
		t.Errorf("a look may last until %v", deadline)
	}
}

func (b *bench) finishWith(id string, want error) {
	b.t.Helper()
	if err := b.look(b.t.Context(), id); !errors.Is(err, want) {
		b.t.Fatal(err)
	}
}

// TestSweepGoesOn: one snapshot that cannot be removed keeps no other.
func TestSweepGoesOn(t *testing.T) {
	b := newBench(t)
	for _, id := range []string{"a", "b", "c"} {
		s, err := b.backend.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: temporaryName(id), ShareID: b.share.ID, Role: backend.RoleTemporary})
		if err == nil && id == "b" {
			_, err = b.backend.Export(t.Context(), backend.Target{SnapshotID: s.ID}, "somebody-else")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	b.now = b.now.Add(time.Hour)
	if err := b.sweep(t.Context()); !errors.Is(err, backend.ErrInUse) || b.snapshots() != 1 {
		t.Errorf("%d snapshots are left: %v", b.snapshots(), err)
	}
}

func TestDelete(t *testing.T) {
	b := newBench(t)
	for _, id := range []string{"one", "two", "three"} {
		if _, err := b.Backup(t.Context(), b.request(id)); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"one", "two"} {
		b.end(id, mover.Result{Snapshot: "s-" + id})
		if _, err := b.Backup(t.Context(), b.request(id)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		for _, id := range []string{"one", "three"} { // a finished one, and one that runs
			if err := b.Delete(t.Context(), "offsite", id); err != nil {
				t.Fatal(err)
			}
		}
	}
	list, err := b.List(t.Context())
	if err != nil || len(list) != 1 || list[0].ID != "two" || b.snapshots() != 0 || len(b.repository.snapshots) != 1 {
		t.Errorf("left: %+v, %v, %d snapshots", list, err, b.snapshots())
	}
	if err := b.Delete(t.Context(), "gone", "two"); !errors.Is(err, backend.ErrInUse) {
		t.Errorf("in a repository that is not configured: %v", err)
	}
	if _, err := b.Backup(t.Context(), b.request("four")); err != nil {
		t.Fatal(err)
	}
	if err := b.Delete(t.Context(), "empty", "four"); err != nil || len(b.runner.jobs) != 1 || b.snapshots() != 1 {
		t.Errorf("of the same name in another repository: %v, %d records, %d snapshots", err, len(b.runner.jobs), b.snapshots())
	}
}

// TestListedMeanwhile: a listing has what has been made while it was asked for, and is not
// thrown away for it; one during which something was deleted is.
func TestListedMeanwhile(t *testing.T) {
	for _, deleted := range []bool{false, true} {
		b := newBench(t)
		if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
			t.Fatal(err)
		}
		b.repository.asked = func() {
			b.learn(&Backup{ID: "new", Repository: "offsite", Volume: "v"})
			b.learn(&Backup{ID: "other", Repository: "empty", Volume: "v"})
			if deleted {
				b.forgetListing("offsite")
			}
		}
		b.forgetListing("offsite")
		got, err := b.list(t.Context(), "offsite", refreshEvery)
		if err != nil || !deleted && (len(got) != 1 || got[0].ID != "new") {
			t.Errorf("listed: %v, %v", got, err)
		}
		before := b.repository.listed
		b.repository.asked = nil
		_, err = b.list(t.Context(), "offsite", refreshEvery)
		if again := b.repository.listed > before; err != nil || again != deleted {
			t.Errorf("deleted %v: listed again %v, %v", deleted, again, err)
		}
	}
}

// TestForgottenMeanwhile: a backup that was deleted while the jobs were read, which still
// have it, is in no listing.
func TestForgottenMeanwhile(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.end("one", mover.Result{Snapshot: "s1", Backup: &restic.BackupSummary{}})
	asked, learned, listed := make(chan struct{}), make(chan struct{}), make(chan []*Backup, 1)
	b.runner.onJobs = func() {
		b.runner.onJobs = nil
		if err := b.Delete(t.Context(), "offsite", "one"); err != nil {
			t.Error(err)
		}
		b.repository.asked = func() { close(asked); <-learned }
		go func() {
			all, err := b.list(context.WithoutCancel(t.Context()), "offsite", 0)
			if err != nil {
				t.Error(err)
			}
			listed <- all
		}()
		<-asked
	}
	b.forgetListing("offsite") // so that the jobs are read
	if err := b.learnEnded(t.Context()); err != nil {
		t.Fatal(err)
	}
	close(learned)
	if all := <-listed; len(all) > 0 {
		t.Errorf("listed: %+v", all[0])
	}
}

// TestLostAfterASuccess: a mover that has made a backup, of which the repository knows
// nothing, is no mistake in the class.
func TestLostAfterASuccess(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.end("one", mover.Result{})
	if _, err := b.Backup(t.Context(), b.request("one")); !errors.Is(err, backend.ErrUnavailable) || errors.Is(err, backend.ErrNotFound) {
		t.Errorf("it is not in the repository: %v", err)
	}
}

// TestEndings: what abaca_mover_ended_total counts; a backup that lacks files is no success
// like the others.
func TestEndings(t *testing.T) {
	for want, st := range map[string]*Status{
		"succeeded": {Phase: Succeeded}, "partial": {Phase: Succeeded, Result: mover.Result{Partial: true}},
		"no-space": {Phase: Failed, Result: mover.Result{Reason: mover.ReasonNoSpace}},
	} {
		if got := endingOf(st); got.result != want {
			t.Errorf("%q, want %q", got.result, want)
		}
	}
}

// guarded is a runner whose jobs a test changes while Run looks.
type guarded struct {
	*fakeRunner
	mu sync.Mutex
}

func (g *guarded) Jobs(ctx context.Context) ([]*Status, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.fakeRunner.Jobs(ctx)
}

func (g *guarded) Status(ctx context.Context, id string) (*Status, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.fakeRunner.Status(ctx, id)
}

// TestEachErrorIsSaidOnce: what is wrong with a job is logged once, and again if it is of
// another job with the same id: what is gone is not remembered.
func TestEachErrorIsSaidOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		g := &guarded{fakeRunner: b.runner}
		b.Tick, b.Runner = time.Second, g
		var said int
		log := funcr.New(func(_, args string) { said += strings.Count(args, "Backup is not done") }, funcr.Options{})
		ctx, cancel := context.WithCancel(klog.NewContext(t.Context(), log))
		go b.Run(ctx)
		for want := 1; want <= 2; want++ {
			g.mu.Lock()
			b.runner.jobs["one"] = &Status{Phase: "unheard of", Job: Job{Task: mover.Task{ID: "one", Backup: &mover.Backup{}}}}
			g.mu.Unlock()
			time.Sleep(3500 * time.Millisecond)
			synctest.Wait()
			if said != want {
				t.Errorf("said %d times, want %d", said, want)
			}
			g.mu.Lock()
			delete(b.runner.jobs, "one")
			g.mu.Unlock()
			time.Sleep(2 * time.Second)
			synctest.Wait()
		}
		cancel()
		synctest.Wait()
	})
}

func TestRunFinishesWhatNobodyAsksFor(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.end("one", mover.Result{Snapshot: "s1"})
	// A snapshot that a killed controller has cut for a backup nobody knows.
	if _, err := b.backend.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: temporaryName("lost"), ShareID: b.share.ID, Role: backend.RoleTemporary}); err != nil {
		t.Fatal(err)
	}
	if err := b.sweep(t.Context()); err != nil || b.snapshots() != 2 {
		t.Errorf("swept too early: %v, %d snapshots", err, b.snapshots())
	}
	b.now = b.now.Add(time.Hour)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); b.Run(ctx) }()
	for ctx.Err() == nil && b.snapshots() > 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-done
	if b.snapshots() != 0 || len(b.runner.jobs) != 0 {
		t.Errorf("left: %d snapshots, %d records", b.snapshots(), len(b.runner.jobs))
	}
}

func TestRestore(t *testing.T) {
	b := newBench(t)
	req := RestoreRequest{ID: "restore-x", Repository: "offsite", Backup: "one", Backend: "mem", Share: b.share.ID, Wanted: always}
	if st, err := b.Restore(t.Context(), req); err != nil || st.Phase != Running {
		t.Fatalf("%+v, %v", st, err)
	}
	for reason, want := range map[mover.Reason]error{
		mover.ReasonNotFound: ErrFailed, mover.ReasonNoSpace: backend.ErrExhausted, mover.ReasonRepository: backend.ErrUnavailable,
	} {
		st := b.runner.jobs[req.ID]
		st.Phase, st.Result, st.Ended = Failed, mover.Result{Error: "because", Reason: reason}, b.now
		if _, err := b.Restore(t.Context(), req); !errors.Is(err, want) || len(b.runner.jobs) != 0 {
			t.Errorf("%s: %v, %d records", reason, err, len(b.runner.jobs))
		}
		if _, err := b.Restore(t.Context(), req); err != nil {
			t.Errorf("the next one: %v", err)
		}
	}
	b.runner.jobs[req.ID].Phase = Interrupted
	if st, err := b.Restore(t.Context(), req); err != nil || st.Phase != Running || !b.runner.jobs[req.ID].Job.Task.Recover {
		t.Errorf("interrupted: %+v, %v", st, err)
	}
	b.runner.jobs[req.ID].Phase = Succeeded
	if st, err := b.Restore(t.Context(), req); err != nil || st.Phase != Succeeded {
		t.Errorf("done: %+v, %v", st, err)
	}
	if err := b.EndRestore(t.Context(), req.ID); err != nil || len(b.runner.jobs) != 0 {
		t.Errorf("end: %v", err)
	}
}

// TestFinishedByAnother: a backup whose record another controller has taken away is
// found, however new the listing before it, and is not made once more.
func TestFinishedByAnother(t *testing.T) {
	for name, begin := range map[string]func(*bench){
		"begun here": func(b *bench) { b.must(errOf(b.Backup(t.Context(), b.request("one")))) },
		"begun there": func(b *bench) {
			other := &Engine{Backends: b.Backends, Repositories: b.repository, Runner: b.runner, Now: b.Now, Tick: b.Tick}
			b.must(errOf(other.Backup(t.Context(), b.request("one"))))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			if _, err := b.List(t.Context()); err != nil {
				t.Fatal(err)
			}
			begin(b)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			done := make(chan struct{})
			go func() { defer close(done); b.Run(ctx) }()
			for ctx.Err() == nil && !b.hasSeen("one") {
				time.Sleep(time.Millisecond)
			}
			cancel()
			<-done
			b.end("one", mover.Result{Snapshot: "s1"})
			delete(b.runner.jobs, "one")
			found, err := b.Backup(t.Context(), b.request("one"))
			if err != nil || !found.Ready || b.runner.starts != 1 {
				t.Errorf("%+v, %v, %d movers", found, err, b.runner.starts)
			}
		})
	}
}

// TestPartial: that a backup lacks files stays with it, in the repository, for
// controllers that have not seen its mover too; and what says so goes with it.
func TestPartial(t *testing.T) {
	b := newBench(t)
	for _, id := range []string{"whole", "one"} {
		if _, err := b.Backup(t.Context(), b.request(id)); err != nil {
			t.Fatal(err)
		}
		b.end(id, mover.Result{Snapshot: id, Backup: &restic.BackupSummary{}, Partial: id == "one"})
	}
	b.repository.snapshots = append(b.repository.snapshots, restic.Snapshot{ID: "mark", Tags: []string{mover.TagVolume + "mem/" + b.share.ID, mover.TagPartial + "one"}})
	is := func(when string) {
		t.Helper()
		for id, want := range map[string]bool{"one": true, "whole": false} {
			if got, err := b.Backup(t.Context(), b.request(id)); err != nil || !got.Ready || got.Partial != want {
				t.Errorf("%s: %+v, %v", when, got, err)
			}
			if got, err := b.Find(t.Context(), "offsite", id); err != nil || got.Partial != want {
				t.Errorf("%s, found: %+v, %v", when, got, err)
			}
		}
		if all, err := b.List(t.Context()); err != nil || len(all) != 2 || !all[0].Partial || all[1].Partial {
			t.Errorf("%s, listed: %+v, %v", when, all, err)
		}
	}
	is("its mover has ended")
	b.finish("one")
	b.finish("whole")
	is("its record is gone")
	b.Engine = &Engine{Backends: b.Backends, Repositories: b.repository, Runner: b.runner, Now: b.Now, Tick: b.Tick}
	is("another controller")
	if err := b.Delete(t.Context(), "offsite", "one"); err != nil || len(b.repository.snapshots) != 1 {
		t.Errorf("%v, and left are %v", err, b.repository.snapshots)
	}
}
