package schedule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	"github.com/google/go-cmp/cmp"
	"k8s.io/klog/v2"
)

// fake is a namespace in memory. Its snapshots become ready as time goes by,
// which is the time of a synctest bubble.
type fake struct {
	t      *testing.T
	mu     sync.Mutex
	claims []Claim
	// snapshots by name; readyAt says when a pending one will be ready.
	snapshots map[string]*Snapshot
	readyAt   map[string]time.Time
	// takes is how long a snapshot takes; by the series, or else the tier.
	takes map[string]time.Duration
	// lacks are the tiers whose snapshots become partial.
	lacks []string
	// fault is asked before each call, and may do anything. One that wraps
	// errDone strikes Create and Delete after the work.
	fault func(method, name string) error
	// mayDelete checks a deletion against the promises.
	mayDelete func(s Snapshot)

	uids                int
	created, deleted    []string
	calls, active, most int
}

var errDone = errors.New("the answer was lost")

func newFake(t *testing.T, claims ...string) *fake {
	f := &fake{t: t, snapshots: map[string]*Snapshot{}, readyAt: map[string]time.Time{}, takes: map[string]time.Duration{}}
	for _, c := range claims {
		f.claims = append(f.claims, Claim{Name: c})
	}
	return f
}

// enter takes the lock and asks for a fault.
func (f *fake) enter(ctx context.Context, method, name string) (leave func(), err error) {
	if err := ctx.Err(); err != nil {
		return func() {}, err
	}
	if f.fault != nil {
		err = f.fault(method, name)
	}
	f.mu.Lock()
	f.calls++
	return f.mu.Unlock, err
}

func (f *fake) Claims(ctx context.Context, which Selection) ([]Claim, error) {
	leave, err := f.enter(ctx, "Claims", "")
	defer leave()
	if err != nil {
		return nil, err
	}
	var found []Claim
	for _, c := range f.claims {
		if which.Selector != "" || slices.Contains(which.Names, c.Name) {
			found = append(found, c)
		}
	}
	return found, nil
}

func (f *fake) Create(ctx context.Context, want Snapshot) (Snapshot, error) {
	leave, err := f.enter(ctx, "Create", want.Name)
	defer leave()
	if err != nil && !errors.Is(err, errDone) {
		return Snapshot{}, err
	}
	if f.snapshots[want.Name] != nil {
		return Snapshot{}, ErrExists
	}
	s := f.put(want.Series, want.Scheduled, Pending)
	f.created = append(f.created, s.Name)
	takes, ok := f.takes[want.Claim+"/"+want.Tier]
	if !ok {
		takes = f.takes[want.Tier]
	}
	f.readyAt[s.Name] = time.Now().Add(takes)
	f.active++
	f.most = max(f.most, f.active)
	if err != nil {
		return Snapshot{}, err
	}
	return *s, nil
}

// put makes a snapshot without asking.
func (f *fake) put(series Series, at time.Time, state State) *Snapshot {
	f.uids++
	s := &Snapshot{Name: series.Name(at), UID: fmt.Sprint("uid-", f.uids), Series: series, Scheduled: at.UTC().Truncate(time.Second), State: state}
	f.snapshots[s.Name] = s
	return s
}

func (f *fake) now(s *Snapshot) Snapshot {
	if ready, ok := f.readyAt[s.Name]; ok && !time.Now().Before(ready) && !s.State.good() && !(s.State == Failed && !s.Retried) {
		if s.State, s.Message = Ready, ""; slices.Contains(f.lacks, s.Tier) {
			s.State = Partial
		}
		f.active--
	}
	return *s
}

func (f *fake) Get(ctx context.Context, name string) (Snapshot, error) {
	leave, err := f.enter(ctx, "Get", name)
	defer leave()
	if err != nil {
		return Snapshot{}, err
	}
	s := f.snapshots[name]
	if s == nil {
		return Snapshot{}, ErrNotFound
	}
	return f.now(s), nil
}

func (f *fake) List(ctx context.Context, series Series) ([]Snapshot, error) {
	leave, err := f.enter(ctx, "List", series.Claim)
	defer leave()
	if err != nil {
		return nil, err
	}
	var found []Snapshot
	for _, name := range slices.Sorted(maps.Keys(f.snapshots)) {
		// Labels are shorter than names: a cluster may return what only looks alike.
		if s := f.snapshots[name]; s.Schedule == series.Schedule {
			found = append(found, f.now(s))
		}
	}
	return found, nil
}

func (f *fake) Delete(ctx context.Context, s Snapshot) error {
	leave, err := f.enter(ctx, "Delete", s.Name)
	defer leave()
	if err != nil && !errors.Is(err, errDone) {
		return err
	}
	have := f.snapshots[s.Name]
	if have == nil {
		return ErrNotFound
	}
	if have.UID != s.UID {
		f.t.Errorf("deletes %s with the UID %s, which is not %s", s.Name, s.UID, have.UID)
	}
	if f.mayDelete != nil {
		f.mayDelete(*have)
	}
	delete(f.snapshots, s.Name)
	f.deleted = append(f.deleted, s.Name)
	return err
}

var one = time.Date(2026, 4, 12, 1, 0, 0, 0, time.UTC)

func options(t *testing.T, tiers ...string) Options {
	t.Helper()
	if len(tiers) == 0 {
		tiers = []string{"class=snap,keep-last=2", "class=backup,keep-daily=3"}
	}
	parsed, err := ParseTiers(tiers)
	if err != nil {
		t.Fatal(err)
	}
	return Options{Schedule: "nightly", At: one, Claims: Selection{Selector: "app=db"}, Tiers: parsed, Now: time.Now}
}

// bubble runs a test in a time of its own, from one on.
func bubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(one))
		test(t)
	})
}

// statuses are "claim/tier status" of a result.
func statuses(r Result) []string {
	var s []string
	for _, e := range r.Entries {
		s = append(s, e.Claim+"/"+e.Tier+" "+string(e.Status))
	}
	return s
}

func expect(t *testing.T, r Result, code int, want ...string) {
	t.Helper()
	if d := cmp.Diff(want, statuses(r)); d != "" {
		t.Errorf("result (-want +got):\n%s", d)
	}
	if r.ExitCode() != code {
		t.Errorf("exit code %d, want %d", r.ExitCode(), code)
	}
	if t.Failed() {
		for _, e := range r.Entries {
			t.Logf("%s/%s: %s %q %+v", e.Claim, e.Tier, e.Status, e.Message, e.Retention)
		}
	}
}

// quiet is a context without a log.
func quiet(t *testing.T) context.Context {
	return klog.NewContext(t.Context(), logr.Discard())
}

func mustRun(t *testing.T, f *fake, o Options) Result {
	t.Helper()
	r, err := Run(quiet(t), f, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRunTwice(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFake(t, "b", "a")
		f.takes["backup"] = 20 * time.Minute
		for d := range 6 {
			for _, s := range []Series{{"nightly", "a", "snap"}, {"nightly", "a", "backup"}, {"nightly", "b", "backup"}} {
				f.put(s, one.AddDate(0, 0, -1-d), Ready)
			}
		}
		o := options(t)
		r := mustRun(t, f, o)
		expect(t, r, ExitOK, "a/snap ready", "a/backup ready", "b/snap ready", "b/backup ready")
		if got := time.Since(one); got < 20*time.Minute || got > 21*time.Minute {
			t.Errorf("the run took %s", got)
		}
		if e := r.Entries[1]; e.Seconds < 1200 || e.Seconds > 1260 {
			t.Errorf("the backup took %v s", e.Seconds)
		}
		left := slices.Sorted(maps.Keys(f.snapshots))
		if d := cmp.Diff([]string{
			"nightly-a-backup-20260410t0100z", "nightly-a-backup-20260411t0100z", "nightly-a-backup-20260412t0100z",
			"nightly-a-snap-20260411t0100z", "nightly-a-snap-20260412t0100z",
			"nightly-b-backup-20260410t0100z", "nightly-b-backup-20260411t0100z", "nightly-b-backup-20260412t0100z",
			"nightly-b-snap-20260412t0100z",
		}, left); d != "" {
			t.Errorf("what is left (-want +got):\n%s", d)
		}
		// The oldest first: whatever stops a run, the newest are there longest.
		snaps := slices.DeleteFunc(slices.Clone(f.deleted), func(n string) bool { return !strings.Contains(n, "-a-snap-") })
		if !slices.IsSorted(snaps) || len(snaps) != 5 || len(f.deleted) != 5+4+4 {
			t.Errorf("deleted %q", f.deleted)
		}

		f.created, f.deleted = nil, nil
		o.At = o.At.Add(100 * time.Millisecond).In(time.FixedZone("", 7200))
		expect(t, mustRun(t, f, o), ExitOK, "a/snap ready", "a/backup ready", "b/snap ready", "b/backup ready")
		if len(f.created) > 0 || len(f.deleted) > 0 {
			t.Errorf("the second time it makes %q and drops %q", f.created, f.deleted)
		}
	})
}

func TestFaults(t *testing.T) {
	const name = "nightly-a-snap-20260412t0100z"
	series := Series{"nightly", "a", "snap"}
	old := func(f *fake) {
		for d := range 4 {
			f.put(series, one.AddDate(0, 0, -1-d), Ready)
		}
	}
	first := func(method string, do func() error) func(string, string) error {
		done := false
		return func(m, _ string) error {
			if m == method && !done {
				done = true
				return do()
			}
			return nil
		}
	}
	tests := []struct {
		name    string
		prepare func(f *fake, o *Options)
		want    string
		code    int
		message string // in that of the entry, or of its retention
		created int
		deleted int
	}{
		{"nothing", func(*fake, *Options) {}, "ready", ExitOK, "", 1, 3},
		{"somebody makes it at the same time", func(f *fake, _ *Options) {
			f.fault = first("Create", func() error {
				f.put(series, one, Ready)
				return nil
			})
		}, "ready", ExitOK, "", 0, 3},
		{"the answer to Create is lost", func(f *fake, _ *Options) {
			f.fault = first("Create", func() error { return fmt.Errorf("%w: %w", ErrUnavailable, errDone) })
		}, "ready", ExitOK, "", 1, 3},
		{"the API is away", func(f *fake, _ *Options) {
			f.fault = func(string, string) error {
				if time.Since(one) < 10*time.Minute {
					return fmt.Errorf("connect: %w", ErrUnavailable)
				}
				return nil
			}
		}, "ready", ExitOK, "", 1, 3},
		{"Create is forbidden", func(f *fake, _ *Options) {
			f.fault = first("Create", func() error { return errors.New("forbidden: quota\nof snapshots") })
		}, "failed", ExitFailed, "forbidden: quota of snapshots", 0, 0},
		{"ready in time", func(f *fake, _ *Options) { f.takes["snap"] = 59 * time.Minute }, "ready", ExitOK, "", 1, 3},
		{"ready too late", func(f *fake, _ *Options) { f.takes["snap"] = 61 * time.Minute }, "late", ExitFailed, "not ready when 1h0m0s were over: it is pending", 1, 0},
		{"it tells what it waits for", func(f *fake, o *Options) {
			o.Timeout = time.Minute
			f.put(series, one, Pending).Message = "Aborted: 10 of 20 GiB"
		}, "late", ExitFailed, "not ready when 1m0s were over: Aborted: 10 of 20 GiB", 0, 0},
		{"it fails", func(f *fake, _ *Options) {
			f.put(series, one, Failed).Message = "the share is gone"
		}, "failed", ExitFailed, "the share is gone", 0, 0},
		{"it fails and is tried again", func(f *fake, _ *Options) {
			s := f.put(series, one, Failed)
			s.Retried = true
			f.readyAt[s.Name] = one.Add(30 * time.Minute)
		}, "ready", ExitOK, "", 0, 3},
		{"it fails and is tried again for too long", func(f *fake, _ *Options) {
			s := f.put(series, one, Failed)
			s.Retried, s.Message = true, "no space"
		}, "late", ExitFailed, "no space", 0, 0},
		{"it vanishes", func(f *fake, _ *Options) {
			f.takes["snap"] = time.Hour
			f.fault = func(m, _ string) error {
				if m == "Get" && time.Since(one) > time.Minute {
					f.mu.Lock()
					delete(f.snapshots, name)
					f.mu.Unlock()
				}
				return nil
			}
		}, "failed", ExitFailed, "vanished", 1, 0},
		{"it is replaced", func(f *fake, _ *Options) {
			f.takes["snap"] = time.Hour
			f.fault = func(m, _ string) error {
				if m == "Get" && time.Since(one) > time.Minute {
					f.mu.Lock()
					f.put(series, one, Ready)
					f.mu.Unlock()
				}
				return nil
			}
		}, "failed", ExitFailed, "replaced", 1, 0},
		{"it is being deleted", func(f *fake, _ *Options) {
			f.put(series, one, Ready).Deleting = true
		}, "failed", ExitFailed, "deleting", 0, 0},
		{"somebody else has the name", func(f *fake, _ *Options) {
			f.put(series, one, Ready).Series = Series{}
		}, "failed", ExitFailed, "its name is taken", 0, 0},
		{"it is of another claim", func(f *fake, _ *Options) {
			f.put(series, one, Ready).Claim = "b"
		}, "failed", ExitFailed, "its name is taken", 0, 0},
		{"it is of another time", func(f *fake, _ *Options) {
			f.put(series, one, Ready).Scheduled = one.AddDate(0, 0, -1)
		}, "failed", ExitFailed, "its name is taken", 0, 0},
		{"a deletion is refused", func(f *fake, _ *Options) {
			f.fault = func(m, name string) error {
				if m == "Delete" && strings.Contains(name, "20260409") {
					return errors.New("denied by policy")
				}
				return nil
			}
		}, "ready", ExitPartial, "1 of 3 are not dropped: denied by policy", 1, 2},
		{"somebody else deletes too", func(f *fake, _ *Options) {
			f.fault = first("Delete", func() error { return ErrNotFound })
		}, "ready", ExitOK, "", 1, 2},
		{"the listing fails", func(f *fake, _ *Options) {
			f.fault = func(m, _ string) error {
				if m == "List" {
					return errors.New("forbidden")
				}
				return nil
			}
		}, "ready", ExitPartial, "list snapshots: forbidden", 1, 0},
		{"the deadline is not for retention", func(f *fake, _ *Options) {
			f.takes["snap"] = 59 * time.Minute
			f.fault = func(m, _ string) error {
				if m == "List" && time.Since(one) < 61*time.Minute {
					return ErrUnavailable
				}
				return nil
			}
		}, "ready", ExitOK, "", 1, 3},
		{"the listing never answers", func(f *fake, _ *Options) {
			f.fault = func(m, _ string) error {
				if m == "List" {
					return ErrUnavailable
				}
				return nil
			}
		}, "ready", ExitPartial, "list snapshots: unavailable", 1, 0},
		{"what was ready is gone from the listing", func(f *fake, _ *Options) {
			f.fault = first("List", func() error {
				f.mu.Lock()
				delete(f.snapshots, name)
				f.mu.Unlock()
				return nil
			})
		}, "ready", ExitPartial, "nothing is dropped", 1, 0},
		{"what was ready was replaced", func(f *fake, _ *Options) {
			f.fault = first("List", func() error {
				f.mu.Lock()
				f.put(series, one, Ready)
				f.mu.Unlock()
				return nil
			})
		}, "ready", ExitPartial, "nothing is dropped", 1, 0},
		{"what was ready is not in the listing", func(f *fake, _ *Options) {
			f.fault = first("List", func() error {
				f.mu.Lock()
				f.snapshots[name].State = Pending
				f.readyAt[name] = one.AddDate(1, 0, 0)
				f.mu.Unlock()
				return nil
			})
		}, "ready", ExitPartial, "nothing is dropped", 1, 0},
		{"a claim that cannot be snapshotted", func(f *fake, _ *Options) {
			f.claims[0].Problem = "it is not bound"
		}, "failed", ExitFailed, "it is not bound", 0, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				f, o := newFake(t, "a"), options(t, "class=snap,keep-last=2")
				old(f)
				tt.prepare(f, &o)
				r := mustRun(t, f, o)
				expect(t, r, tt.code, "a/snap "+tt.want)
				e := r.Entries[0]
				if got := e.Message + e.Retention.Error; !strings.Contains(got, tt.message) || (got == "") != (tt.message == "") {
					t.Errorf("the message is %q, want %q", got, tt.message)
				}
				if len(f.created) != tt.created || len(f.deleted) != tt.deleted {
					t.Errorf("made %q, dropped %q, want %d and %d", f.created, f.deleted, tt.created, tt.deleted)
				}
			})
		})
	}
}

// A run that was killed at any call is repeated, and ends as if nothing had been.
func TestKilled(t *testing.T) {
	prepare := func(t *testing.T) *fake {
		f := newFake(t, "a", "b")
		f.takes["backup"] = 5 * time.Minute
		for d := range 5 {
			for _, c := range []string{"a", "b"} {
				f.put(Series{"nightly", c, "snap"}, one.AddDate(0, 0, -1-d), Ready)
				f.put(Series{"nightly", c, "backup"}, one.AddDate(0, 0, -1-d), Ready)
			}
		}
		return f
	}
	var want []string
	calls := 0
	bubble(t, func(t *testing.T) {
		f := prepare(t)
		mustRun(t, f, options(t))
		want, calls = slices.Sorted(maps.Keys(f.snapshots)), f.calls
	})
	if calls < 30 {
		t.Fatalf("only %d calls to be killed at", calls)
	}
	for at := range calls {
		for _, method := range []string{"before", "after"} { // the work of the call
			bubble(t, func(t *testing.T) {
				f, n := prepare(t), 0
				ctx, kill := context.WithCancelCause(quiet(t))
				var mu sync.Mutex
				f.fault = func(string, string) error {
					mu.Lock()
					defer mu.Unlock()
					n++
					switch {
					case n <= at:
						return nil
					case n == at+1:
						kill(errors.New("SIGKILL"))
						if method == "after" {
							return fmt.Errorf("%w: %w", context.Canceled, errDone)
						}
					}
					return context.Canceled
				}
				if r, err := Run(ctx, f, options(t)); err == nil || r.ExitCode() == ExitOK {
					t.Errorf("killed %s call %d: %v, %v", method, at, statuses(r), err)
				}
				f.fault = nil
				expect(t, mustRun(t, f, options(t)), ExitOK, "a/snap ready", "a/backup ready", "b/snap ready", "b/backup ready")
				if d := cmp.Diff(want, slices.Sorted(maps.Keys(f.snapshots))); d != "" {
					t.Errorf("killed %s call %d (-want +got):\n%s", method, at, d)
				}
				if len(f.created) != 4 {
					t.Errorf("killed %s call %d, it made %q", method, at, f.created)
				}
			})
		}
	}
}

func TestInterrupted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFake(t, "a")
		f.takes["backup"] = time.Hour
		ctx, cancel := context.WithTimeout(quiet(t), time.Minute)
		defer cancel()
		r, err := Run(ctx, f, options(t))
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		expect(t, r, ExitPartial, "a/snap ready", "a/backup interrupted")
	})
}

// What this schedule did not make is not its own, whatever it looks like.
func TestRetentionIsOfTheScheduleOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFake(t, "a-b")
		own := Series{"nightly", "a-b", "snap"}
		day := func(d int) time.Time { return one.AddDate(0, 0, -d) }
		for d := 1; d < 5; d++ {
			f.put(own, day(d), Ready)
			f.put(Series{"weekly", "a-b", "snap"}, day(d), Ready)
			f.put(Series{"nightly", "a-b", "other"}, day(d), Ready)
			f.put(Series{"nightly", "b", "snap"}, day(d), Ready)
			f.put(Series{"nightly", "a", "b-snap"}, day(20+d), Ready) // of the same name as ours
		}
		foreign := len(f.snapshots) - 4
		// A copy that somebody made of an old one's manifest, to keep it.
		copied := f.put(own, day(9), Ready)
		delete(f.snapshots, copied.Name)
		copied.Name = "before-the-migration"
		f.snapshots[copied.Name] = copied
		// Taken out of the schedule's hands by removing the label.
		f.put(own, day(8), Ready).Series = Series{}
		// A good one that is going is no reason to drop another.
		f.put(own, day(1), Ready).Deleting = true

		expect(t, mustRun(t, f, options(t, "class=snap,keep-last=2")), ExitOK, "a-b/snap ready")
		if d := cmp.Diff([]string{own.Name(day(4)), own.Name(day(3))}, f.deleted); d != "" {
			t.Errorf("deleted (-want +got):\n%s", d)
		}
		if left := len(f.snapshots); left != foreign+5 {
			t.Errorf("%d snapshots are left, want %d", left, foreign+5)
		}
	})
}

// A claim of which one tier failed keeps everything; another claim does not
// suffer from it.
func TestFailureKeepsTheClaim(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFake(t, "a", "b")
		for d := range 5 {
			for _, c := range []string{"a", "b"} {
				f.put(Series{"nightly", c, "snap"}, one.AddDate(0, 0, -1-d), Ready)
			}
		}
		f.put(Series{"nightly", "a", "backup"}, one, Failed).Message = "the volume is empty, its last backup was not"
		r := mustRun(t, f, options(t))
		expect(t, r, ExitPartial, "a/snap ready", "a/backup failed", "b/snap ready", "b/backup ready")
		for _, name := range f.deleted {
			if !strings.HasPrefix(name, "nightly-b-") {
				t.Errorf("%s is dropped", name)
			}
		}
		if len(f.deleted) != 4 {
			t.Errorf("dropped %q", f.deleted)
		}
		if e := r.Entries[0]; e.Retention.Skipped == "" || e.Retention.Keep != nil {
			t.Errorf("retention %+v", e.Retention)
		}
	})
}

// TestPartialBackup: backups that lack files have an exit code of their own, also when
// the Job is tried again, and never push the last complete one out.
func TestPartialBackup(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFake(t, "a")
		f.lacks = []string{"backup"}
		complete := f.put(Series{"nightly", "a", "backup"}, one.AddDate(0, 0, -1), Ready).Name
		f.put(Series{"nightly", "a", "backup"}, one.AddDate(0, 0, -2), Ready)
		o := options(t, "class=snap,keep-last=1", "class=backup,keep-last=1")
		for range 2 {
			r := mustRun(t, f, o)
			expect(t, r, ExitLacking, "a/snap ready", "a/backup partial")
			if e := r.Entries[1]; !strings.Contains(e.Message, "BackupIncomplete") {
				t.Errorf("it says %q", e.Message)
			}
		}
		for range 3 {
			o.At = o.At.AddDate(0, 0, 1)
			expect(t, mustRun(t, f, o), ExitLacking, "a/snap ready", "a/backup partial")
		}
		if f.snapshots[complete] == nil || len(f.snapshots) != 3 {
			t.Errorf("dropped %q", f.deleted)
		}
		f.lacks = nil
		o.At = o.At.AddDate(0, 0, 1)
		expect(t, mustRun(t, f, o), ExitOK, "a/snap ready", "a/backup ready")
		if len(f.snapshots) != 2 {
			t.Errorf("left of %d are %v", f.uids, slices.Collect(maps.Keys(f.snapshots)))
		}
	})
}

// A retry of an old run is not undone by its own retention.
func TestOldRunKeepsItsOwn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFake(t, "a")
		for d := range 3 {
			f.put(Series{"nightly", "a", "snap"}, one.AddDate(0, 0, 1+d), Ready)
		}
		r := mustRun(t, f, options(t, "class=snap,keep-last=1"))
		expect(t, r, ExitOK, "a/snap ready")
		if f.snapshots["nightly-a-snap-20260412t0100z"] == nil || f.snapshots["nightly-a-snap-20260415t0100z"] == nil || len(f.snapshots) != 2 {
			t.Errorf("dropped %q", f.deleted)
		}
	})
}

func TestSelection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFake(t)
		if _, err := Run(t.Context(), f, options(t)); !errors.Is(err, ErrNothing) || !strings.Contains(err.Error(), "app=db") {
			t.Errorf("a selector of nothing: %v", err)
		}
		f = newFake(t, "a")
		o := options(t, "class=snap,keep-last=1")
		o.Claims = Selection{Names: []string{"x", "a", "a"}}
		expect(t, mustRun(t, f, o), ExitPartial, "a/snap ready", "x/snap failed")
		o.Claims.Names = []string{"x"}
		expect(t, mustRun(t, f, o), ExitFailed, "x/snap failed")
		f.fault = func(string, string) error { return errors.New("forbidden") }
		if _, err := Run(t.Context(), f, o); err == nil || !strings.Contains(err.Error(), "list claims: forbidden") {
			t.Errorf("claims that cannot be listed: %v", err)
		}
	})
}

// Runs keep to the bound, take the first tier first, and what had no turn is
// said to be late.
func TestParallel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var claims []string
		for i := range 20 {
			claims = append(claims, fmt.Sprintf("c%02d", i))
		}
		f, o := newFake(t, claims...), options(t)
		f.takes["backup"] = 15 * time.Minute
		o.Parallel = 3
		r := mustRun(t, f, o)
		if f.most != 3 {
			t.Errorf("%d at once, want 3", f.most)
		}
		if slices.ContainsFunc(f.created[:20-o.Parallel+1], func(n string) bool { return strings.Contains(n, "backup") }) {
			t.Errorf("made in the order %q", f.created)
		}
		count := map[Status]int{}
		for _, e := range r.Entries {
			count[e.Status]++
		}
		// In an hour, three at a time and 15 minutes each, with a little to look.
		if d := cmp.Diff(map[Status]int{StatusReady: 20 + 9, StatusLate: 11}, count); d != "" || r.ExitCode() != ExitPartial {
			t.Errorf("exit code %d (-want +got):\n%s", r.ExitCode(), d)
		}
		if last := r.Entries[39]; last.Message != "not ready when 1h0m0s were over: it was not begun" {
			t.Errorf("the last one says %q", last.Message)
		}
	})
}

func TestDryRun(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFake(t, "data", "web")
		for d := range 4 {
			f.put(Series{"nightly", "data", "abaca-backup"}, one.AddDate(0, 0, -1-d), Ready)
		}
		f.put(Series{"nightly", "data", "abaca-backup"}, one.Add(-90*time.Minute), Failed)
		f.put(Series{"nightly", "web", "abaca-backup"}, one, Pending)
		before := slices.Sorted(maps.Keys(f.snapshots))
		f.fault = func(method, _ string) error {
			if method == "Create" || method == "Delete" {
				t.Errorf("a dry run calls %s", method)
			}
			return nil
		}
		o := options(t, "class=abaca-backup,keep-last=2,keep-daily=3")
		o.DryRun = true
		r := mustRun(t, f, o)
		expect(t, r, ExitOK, "data/abaca-backup planned", "web/abaca-backup exists")
		if d := cmp.Diff(before, slices.Sorted(maps.Keys(f.snapshots))); d != "" {
			t.Errorf("a dry run changes (-want +got):\n%s", d)
		}
		var b bytes.Buffer
		if err := r.Table(&b); err != nil {
			t.Fatal(err)
		}
		// This is the example in docs/schedule.md.
		want := `CLAIM  TIER          SNAPSHOT                                  STATUS   SECONDS  KEPT  DROPPED  MESSAGE
data   abaca-backup  nightly-data-abaca-backup-20260412t0100z  planned  0        3     3        -
web    abaca-backup  nightly-web-abaca-backup-20260412t0100z   exists   0        1     0        -

SNAPSHOT                                  STATE   DRY RUN  REASON
nightly-data-abaca-backup-20260412t0100z  ready   keep     last; daily
nightly-data-abaca-backup-20260411t0100z  ready   keep     last; daily
nightly-data-abaca-backup-20260410t0100z  ready   keep     daily
nightly-data-abaca-backup-20260411t2330z  failed  drop     failed, and there is a newer good one
nightly-data-abaca-backup-20260409t0100z  ready   drop     no rule keeps it
nightly-data-abaca-backup-20260408t0100z  ready   drop     no rule keeps it
nightly-web-abaca-backup-20260412t0100z   ready   keep     last; daily
`
		if d := cmp.Diff(want, b.String()); d != "" {
			t.Errorf("table (-want +got):\n%s", d)
		}
		// A real run does what the dry one said.
		f.fault, o.DryRun = nil, false
		f.readyAt["nightly-web-abaca-backup-20260412t0100z"] = one
		real := mustRun(t, f, o)
		for i, e := range real.Entries {
			if d := cmp.Diff(r.Entries[i].Retention, e.Retention); d != "" {
				t.Errorf("%s (-dry +real):\n%s", e.Claim, d)
			}
		}

		o.DryRun = true
		f.snapshots["nightly-web-abaca-backup-20260412t0100z"].State = Failed
		expect(t, mustRun(t, f, o), ExitPartial, "data/abaca-backup exists", "web/abaca-backup failed")
		f.fault = func(m, _ string) error {
			if m == "Get" {
				return errors.New("forbidden")
			}
			return nil
		}
		expect(t, mustRun(t, f, o), ExitFailed, "data/abaca-backup failed", "web/abaca-backup failed")
	})
}

func TestResult(t *testing.T) {
	item := Item{"nightly-a-snap-20260411t0100z", one.AddDate(0, 0, -1), Ready}
	r := Result{Schedule: "nightly", Scheduled: one, Entries: []Entry{
		{Claim: "a", Tier: "snap", Snapshot: "nightly-a-snap-20260412t0100z", Status: StatusReady, Seconds: 1.5, Retention: Retention{
			Keep: []Choice{{Item: item, Reasons: []string{"last"}}}, Drop: []Choice{{Item: item, Reasons: []string{"no rule keeps it"}, Error: "denied"}}, Error: "1 of 1 are not dropped: denied"}},
		{Claim: "a", Tier: "backup", Snapshot: "nightly-a-backup-20260412t0100z", Status: StatusFailed, Message: "no \x1b[31mspace\n\tleft", Retention: Retention{Skipped: "why"}},
	}}
	var b bytes.Buffer
	if err := r.Table(&b); err != nil {
		t.Fatal(err)
	}
	want := `CLAIM  TIER    SNAPSHOT                         STATUS  SECONDS  KEPT  DROPPED  MESSAGE
a      snap    nightly-a-snap-20260412t0100z    ready   2        1     0        1 of 1 are not dropped: denied
a      backup  nightly-a-backup-20260412t0100z  failed  0        -     -        no [31mspace left
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("table (-want +got):\n%s", d)
	}
	b.Reset()
	if err := r.JSON(&b); err != nil {
		t.Fatal(err)
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, b.Bytes()); err != nil {
		t.Fatal(err)
	}
	want = `{"schedule":"nightly","scheduledTime":"2026-04-12T01:00:00Z","dryRun":false,"exitCode":3,"snapshots":[` +
		`{"claim":"a","tier":"snap","snapshot":"nightly-a-snap-20260412t0100z","status":"ready","seconds":1.5,"retention":{` +
		`"keep":[{"name":"nightly-a-snap-20260411t0100z","time":"2026-04-11T01:00:00Z","state":"ready","reasons":["last"]}],` +
		`"drop":[{"name":"nightly-a-snap-20260411t0100z","time":"2026-04-11T01:00:00Z","state":"ready","reasons":["no rule keeps it"],"error":"denied"}],` +
		`"error":"1 of 1 are not dropped: denied"}},` +
		`{"claim":"a","tier":"backup","snapshot":"nightly-a-backup-20260412t0100z","status":"failed","message":"no \u001b[31mspace\n\tleft","seconds":0,"retention":{"skipped":"why"}}]}`
	if d := cmp.Diff(want, compact.String()); d != "" {
		t.Errorf("JSON (-want +got):\n%s", d)
	}

	ok, late, refused := Entry{Status: StatusReady}, Entry{Status: StatusLate}, Entry{Status: StatusReady, Retention: Retention{Error: "x"}}
	lacks := Entry{Status: StatusPartial}
	for _, tt := range []struct {
		entries []Entry
		code    int
	}{
		{[]Entry{ok}, ExitOK}, {[]Entry{ok, ok}, ExitOK}, {[]Entry{late}, ExitFailed}, {[]Entry{late, late}, ExitFailed},
		{[]Entry{ok, late}, ExitPartial}, {[]Entry{refused}, ExitPartial}, {[]Entry{refused, ok}, ExitPartial}, {[]Entry{refused, late}, ExitPartial}, {nil, ExitFailed},
		{[]Entry{lacks}, ExitLacking}, {[]Entry{ok, lacks}, ExitLacking}, {[]Entry{lacks, late}, ExitPartial}, {[]Entry{refused, lacks}, ExitPartial},
	} {
		if got := (Result{Entries: tt.entries}).ExitCode(); got != tt.code {
			t.Errorf("%+v: exit code %d, want %d", tt.entries, got, tt.code)
		}
	}
}

func TestValidateOptions(t *testing.T) {
	if err := options(t).Validate(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		err   string
		spoil func(*Options)
	}{
		{`schedule "": not a name`, func(o *Options) { o.Schedule = "" }},
		{`schedule "Nightly": not a name`, func(o *Options) { o.Schedule = "Nightly" }},
		{"no scheduled time", func(o *Options) { o.At = time.Time{} }},
		{"either a selector or names", func(o *Options) { o.Claims = Selection{} }},
		{"either a selector or names", func(o *Options) { o.Claims.Names = []string{"a"} }},
		{`claim "a_b": not a name`, func(o *Options) { o.Claims = Selection{Names: []string{"a_b"}} }},
		{"no tier", func(o *Options) { o.Tiers = nil }},
		{"no class", func(o *Options) { o.Tiers[0].Class = "" }},
		{"class=A: not a name", func(o *Options) { o.Tiers[0].Class = "A" }},
		{"no rule", func(o *Options) { o.Tiers[0].Rule = Rule{} }},
		{"two tiers", func(o *Options) { o.Tiers[0].Class = "backup" }},
		{"less than nothing", func(o *Options) { o.Timeout = -1 }},
		{"less than one", func(o *Options) { o.Parallel = -1 }},
		{"no clock", func(o *Options) { o.Now = nil }},
	} {
		o := options(t)
		tt.spoil(&o)
		if _, err := Run(t.Context(), nil, o); err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%v, want %q", err, tt.err)
		}
	}
}

// TestMonths runs a schedule for months, with faults, kills and repeats, and
// checks at each deletion that the promises hold. A seed repeats the history,
// not the order in which goroutines run.
func TestMonths(t *testing.T) {
	generate(t, 2, func(t *testing.T, g generator) {
		bubble(t, func(t *testing.T) {
			f, o := newFake(t, "a", "b"), options(t, "class=snap,keep-last=3,keep-hourly=4", "class=backup,keep-daily=3,keep-weekly=2,keep-within=36h")
			o.Location = zone(t, "Europe/Berlin")
			o.Timeout = 30 * time.Minute
			rules := map[string]Rule{"snap": o.Tiers[0].Rule, "backup": o.Tiers[1].Rule}
			var mu sync.Mutex
			chance := func(n int) bool {
				mu.Lock()
				defer mu.Unlock()
				return g.IntN(n) == 0
			}
			var kill context.CancelFunc
			f.fault = func(method, name string) error {
				switch {
				case chance(300):
					kill()
					return context.Canceled
				case chance(15):
					return ErrUnavailable
				case chance(60):
					return errors.New("denied")
				case chance(40) && method == "Create":
					return fmt.Errorf("%w: %w", ErrUnavailable, errDone)
				}
				return nil
			}
			f.mayDelete = func(s Snapshot) {
				var items []Item
				for _, other := range f.snapshots {
					if other.Series == s.Series {
						items = append(items, Item{other.Name, other.Scheduled, other.State})
					}
				}
				if slices.Contains(oracle(rules[s.Tier], items, time.Now(), o.Location), s.Name) {
					t.Errorf("at %s it drops %s of %v", o.At, s.Name, items)
				}
			}
			const runs = 250
			good := 0
			for range runs {
				o.At = time.Now().Truncate(time.Minute)
				f.takes["backup"] = time.Duration(1+g.IntN(35)) * time.Minute
				for range 3 { // the Job's attempts
					var ctx context.Context
					ctx, kill = context.WithCancel(quiet(t))
					r, err := Run(ctx, f, o)
					kill()
					if err == nil && r.ExitCode() == ExitOK {
						good++
						break
					}
				}
				time.Sleep(time.Duration(1+g.IntN(12)) * time.Hour)
			}
			if len(slices.Compact(slices.Sorted(slices.Values(f.created)))) != len(f.created) {
				t.Error("something was made twice")
			}
			if good < runs/2 || len(f.deleted) < runs {
				t.Errorf("%d of %d runs were good, %d snapshots were dropped: this tests too little", good, runs, len(f.deleted))
			}
			if len(f.snapshots) > 100 {
				t.Errorf("%d snapshots are left", len(f.snapshots))
			}
		})
	})
}
