package maintain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// fakeRepository is a repository in memory. errs holds errors by method, in
// order; nil and the end of the list are success.
type fakeRepository struct {
	restic.Client
	snapshots []restic.Snapshot
	files     map[string][]byte
	errs      map[string][]error
	log       []string
	made      int
	then      map[string]func() // when a method is called
}

func (f *fakeRepository) say(method, format string, args ...any) error {
	f.log = append(f.log, strings.TrimSpace(method+" "+fmt.Sprintf(format, args...)))
	if then := f.then[method]; then != nil {
		then()
	}
	if list := f.errs[method]; len(list) > 0 {
		f.errs[method] = list[1:]
		return list[0]
	}
	return nil
}

func (f *fakeRepository) Snapshots(context.Context, ...string) ([]restic.Snapshot, error) {
	if err := f.say("snapshots", ""); err != nil {
		return nil, err
	}
	return slices.Clone(f.snapshots), nil
}

func (f *fakeRepository) Dump(_ context.Context, id, path string) ([]byte, error) {
	return f.files[id+path], f.say("dump", "%s", id)
}

func (f *fakeRepository) Check(ctx context.Context, r restic.CheckRequest) error {
	if err := f.say("check", "%d/%d exclusive=%v %s", r.Part, r.Parts, r.Exclusive, r.RetryLock); err != nil {
		return err
	}
	return ctx.Err()
}

func (f *fakeRepository) Prune(_ context.Context, r restic.PruneRequest) error {
	return f.say("prune", "%s %s %s", r.MaxUnused, r.MaxRepackSize, r.RetryLock)
}

func (f *fakeRepository) Size(context.Context) (int64, error) { return 1000, f.say("size", "") }
func (f *fakeRepository) Unlock(context.Context) error        { return f.say("unlock", "") }

func (f *fakeRepository) Users(_ context.Context, packs ...string) ([]string, error) {
	return []string{"s1"}, f.say("users", "%s", strings.Join(packs, ","))
}

func (f *fakeRepository) Forget(_ context.Context, _ time.Duration, ids ...string) error {
	if len(ids) == 0 {
		return nil
	}
	f.snapshots = slices.DeleteFunc(f.snapshots, func(s restic.Snapshot) bool { return slices.Contains(ids, s.ID) })
	return f.say("forget", "%s", strings.Join(ids, ","))
}

func (f *fakeRepository) Backup(_ context.Context, r restic.BackupRequest, _ func(restic.Progress)) (*restic.BackupSummary, error) {
	tags := strings.ReplaceAll(strings.Join(r.Tags, ","), mover.TagMaintenance, "record")
	if err := f.say("backup", "%s", tags); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(r.Dir, r.Targets[0]))
	if err != nil {
		return nil, err
	}
	f.made++
	s := restic.Snapshot{ID: fmt.Sprint("m", f.made), Tags: r.Tags, Time: r.Time, Host: r.Host}
	f.snapshots = append(f.snapshots, s)
	f.files[s.ID+"/"+r.Targets[0]] = text
	return &restic.BackupSummary{SnapshotID: s.ID}, nil
}

var start = time.Date(2026, 4, 12, 3, 0, 0, 0, time.UTC)

// bench is a repository with a backup, and a clock.
type bench struct {
	*fakeRepository
	now     time.Time
	options Options
}

func newBench() *bench {
	b := &bench{now: start, fakeRepository: &fakeRepository{files: map[string][]byte{}, errs: map[string][]error{}, then: map[string]func(){},
		snapshots: []restic.Snapshot{{ID: "s1", Host: "shop/data", Time: start.Add(-day), Tags: []string{mover.TagBackup + "b1", mover.TagVolume + "local/v"}}}}}
	b.options = Options{Repository: "offsite", Check: true, Prune: true, ReadDays: 30, Now: func() time.Time { return b.now }}
	return b
}

func (b *bench) run(t *testing.T) Result {
	t.Helper()
	b.log = nil
	result, err := Run(t.Context(), b.fakeRepository, b.options)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func (b *bench) record(t *testing.T) *Record {
	t.Helper()
	r, err := Latest(t.Context(), b.fakeRepository, b.snapshots)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// damage is as restic's own error: of the kind, with the packs.
type damage struct{ packs []string }

func damaged(packs ...string) error { return damage{packs} }
func (d damage) Error() string      { return "repository is damaged: pack x" }
func (d damage) Unwrap() []error {
	return []error{restic.ErrDamaged, &restic.Error{Packs: d.packs}}
}

// TestRun: what a run does in which order, and what it comes to.
func TestRun(t *testing.T) {
	const read, hold = "check 1/16", "backup record,abaca.hold=2026-04-12T05:00:00Z"
	for name, test := range map[string]struct {
		change func(*bench)
		log    []string
		code   int
		steps  string
	}{
		"good": {
			log:   []string{"snapshots", read + " exclusive=false 0s", "prune   0s", "size", "backup record"},
			steps: "check ok, prune ok, record ok",
		},
		"options": {
			change: func(b *bench) { b.options.MaxUnused, b.options.MaxRepackSize, b.options.ReadDays = "1%", "5G", 0 },
			log:    []string{"snapshots", "check 0/0 exclusive=false 0s", "prune 1% 5G 0s", "size", "backup record"},
			steps:  "check ok, prune ok, record ok",
		},
		"prune only": {
			change: func(b *bench) { b.options.Check = false },
			log:    []string{"snapshots", "prune   0s", "size", "backup record"}, steps: "prune ok, record ok",
		},
		"a dry run": {
			change: func(b *bench) { b.options.DryRun = true },
			log:    []string{"snapshots"}, steps: "check planned, prune planned",
		},
		"what looked damaged was not": {
			change: func(b *bench) { b.errs["check"] = []error{damaged()} },
			log:    []string{"snapshots", read + " exclusive=false 0s", read + " exclusive=true 0s", "prune   0s", "size", "backup record"},
			steps:  "check ok, prune ok, record ok",
		},
		"damage": {
			change: func(b *bench) { b.errs["check"] = []error{damaged("p"), damaged("p")} },
			log:    []string{"snapshots", read + " exclusive=false 0s", read + " exclusive=true 0s", "size", "backup record", "users p"},
			code:   ExitDamaged, steps: "check damaged, prune skipped, record ok",
		},
		"what looked damaged could not be looked at again": {
			change: func(b *bench) {
				b.errs["check"] = append([]error{damaged()}, slices.Repeat([]error{restic.ErrLocked}, 99)...)
			},
			code: ExitLocked, steps: "check locked, prune skipped, record ok",
		},
		"prune has to wait": {
			change: func(b *bench) { b.errs["prune"] = []error{restic.ErrLocked, restic.ErrLocked} },
			log:    []string{"snapshots", read + " exclusive=false 0s", "prune   0s", hold, "unlock", "prune   10m0s", "unlock", "prune   10m0s", "size", "backup record"},
			steps:  "check ok, prune ok, record ok",
		},
		"prune is locked out": {
			change: func(b *bench) { b.errs["prune"] = slices.Repeat([]error{restic.ErrLocked}, 99) },
			code:   ExitLocked, steps: "check ok, prune locked, record ok",
		},
		"new backups cannot be held back": {
			change: func(b *bench) {
				b.errs["prune"], b.errs["backup"] = []error{restic.ErrLocked}, []error{restic.ErrLocked}
			},
			log:   []string{"snapshots", read + " exclusive=false 0s", "prune   0s", hold, "unlock", "prune   10m0s", "size", "backup record"},
			steps: "check ok, prune ok, record ok",
		},
		"check fails": {
			change: func(b *bench) { b.errs["check"] = []error{restic.ErrFailed} },
			log:    []string{"snapshots", read + " exclusive=false 0s", "prune   0s", "size", "backup record"},
			code:   ExitFailed, steps: "check failed, prune ok, record ok",
		},
		"prune fails": {
			change: func(b *bench) { b.errs["prune"] = []error{restic.ErrFailed} },
			log:    []string{"snapshots", read + " exclusive=false 0s", "prune   0s", "size", "backup record"},
			code:   ExitFailed, steps: "check ok, prune failed, record ok",
		},
		"it is not written down": {
			change: func(b *bench) { b.errs["backup"] = []error{restic.ErrFailed} },
			log:    []string{"snapshots", read + " exclusive=false 0s", "prune   0s", "size", "backup record"},
			code:   ExitFailed, steps: "check ok, prune ok, record failed",
		},
		"size is not known": {
			change: func(b *bench) { b.errs["size"] = []error{restic.ErrFailed} },
			log:    []string{"snapshots", read + " exclusive=false 0s", "prune   0s", "size", "backup record"},
			steps:  "check ok, prune ok, record ok",
		},
		"the deadline": {
			change: func(b *bench) {
				b.options.Timeout = 50 * time.Millisecond
				b.then["check"] = func() { time.Sleep(100 * time.Millisecond) }
				b.errs["prune"] = []error{context.DeadlineExceeded}
			},
			log:  []string{"snapshots", read + " exclusive=false 0s", "prune   0s", "size", "backup record"},
			code: ExitFailed, steps: "check late, prune late, record ok",
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench()
			if test.change != nil {
				test.change(b)
			}
			result := b.run(t)
			if test.log != nil {
				if diff := cmp.Diff(test.log, b.log); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
			}
			var steps []string
			for _, s := range result.Steps {
				steps = append(steps, s.Step+" "+string(s.Status))
			}
			if got := strings.Join(steps, ", "); got != test.steps || result.ExitCode() != test.code {
				t.Errorf("%s, code %d; want %s, code %d", got, result.ExitCode(), test.steps, test.code)
			}
			if test.code == ExitDamaged && (len(result.Damaged) != 1 || result.Damaged[0].Host != "shop/data" || result.Damaged[0].Backup != "b1" || result.Damaged[0].Volume != "local/v") {
				t.Errorf("damaged: %+v", result.Damaged)
			}
			if until := mover.Held(b.snapshots, b.now); !until.IsZero() {
				t.Errorf("new backups wait until %s after the run", until)
			}
			var out bytes.Buffer
			if err := errors.Join(result.Table(&out), result.JSON(&out)); err != nil || !strings.Contains(out.String(), fmt.Sprintf(`"exitCode": %d`, test.code)) {
				t.Error(err, out.String())
			}
		})
	}
}

// While a run waits, new backups are held back, and not for longer than it waits:
// whoever kills it holds nobody for ever.
func TestHold(t *testing.T) {
	b := newBench()
	b.errs["prune"] = []error{restic.ErrLocked}
	seen := time.Time{}
	b.then["unlock"] = func() { seen = mover.Held(b.snapshots, b.now) }
	b.run(t)
	if !seen.Equal(start.Add(DefaultLockWait)) {
		t.Errorf("held until %s", seen)
	}
	b = newBench()
	b.errs["prune"] = []error{restic.ErrLocked}
	b.then["unlock"] = func() { panic("killed") }
	func() {
		defer func() { _ = recover() }()
		b.run(t)
	}()
	if mover.Held(b.snapshots, start.Add(time.Hour)).IsZero() || !mover.Held(b.snapshots, start.Add(3*time.Hour)).IsZero() {
		t.Error("a hold that outlives its time, or does not reach it")
	}
}

// TestRecord: what one run leaves is what the next one goes on with.
func TestRecord(t *testing.T) {
	b := newBench()
	b.run(t)
	first := b.record(t)
	if !first.Checked.Equal(start) || !first.Pruned.Equal(start) || !first.Began.Equal(start) || first.Damaged != "" || first.Size != 1000 ||
		first.Coverage(b.now) != 1.0/16 || !first.OldestRead().IsZero() {
		t.Errorf("%+v", first)
	}
	for range 31 {
		b.now = b.now.Add(day)
		b.run(t)
	}
	r := b.record(t)
	if r.Coverage(b.now) != 1 || b.now.Sub(r.OldestRead()) > 30*day || !r.Began.Equal(start) {
		t.Errorf("coverage %v, oldest %s after 31 days", r.Coverage(b.now), r.OldestRead())
	}
	if n := len(records(b.snapshots)); n != keptRecords {
		t.Errorf("%d records are kept", n)
	}
	if len(b.snapshots) != keptRecords+1 {
		t.Errorf("%d snapshots", len(b.snapshots))
	}
	b.options.Prune = false // and so without
	b.run(t)
	if n := len(records(b.snapshots)); n != keptRecords {
		t.Errorf("%d records are kept without a prune", n)
	}
	b.options.Prune = true

	// A check that finds damage is not one that ended well, and what it read was not
	// read: the next one reads it again, however soon that is.
	checked := b.record(t).Checked
	b.now = b.now.Add(2 * day)
	b.errs["check"] = []error{damaged("p"), damaged("p")}
	b.run(t)
	r = b.record(t)
	if r.Damaged == "" || !r.Checked.Equal(checked) || !r.Pruned.Equal(checked) || !r.OldestRead().IsZero() || r.Coverage(b.now) == 1 {
		t.Errorf("after damage: %+v", r)
	}
	found := b.log[2]
	b.options.ReadDays = 300 // it makes no difference
	b.run(t)
	if r := b.record(t); r.Damaged != "" || !r.Checked.Equal(b.now) || r.Coverage(b.now) != 1 || b.log[2] != found {
		t.Errorf("after a repair: %+v: %s, and not %s", r, b.log[2], found)
	}
}

// TestUnreadRecord: what an earlier run has found is not forgotten because its record
// cannot be read, for a moment or for good: nothing is pruned, nothing takes its place,
// and the exit code says so.
func TestUnreadRecord(t *testing.T) {
	b := newBench()
	b.run(t)
	b.now = b.now.Add(2 * day)
	b.errs["check"] = []error{damaged("p"), damaged("p")}
	b.run(t)
	found, again, last, left := b.now, b.log[2], LatestID(b.snapshots), len(b.snapshots)
	file, good := last+"/"+recordName, b.files[last+"/"+recordName]
	for name, change := range map[string]func(){
		"it is nonsense": func() { b.files[file] = []byte("{") },
		"restic fails":   func() { b.errs["dump"] = []error{restic.ErrFailed} },
		"no check":       func() { b.errs["dump"], b.options.Check = []error{restic.ErrFailed}, false },
		"a second look":  func() { b.errs["dump"], b.errs["check"] = []error{restic.ErrFailed}, []error{damaged()} },
		"and it has to wait": func() {
			b.errs["dump"], b.errs["check"] = []error{restic.ErrFailed}, []error{damaged(), restic.ErrLocked}
		},
	} {
		b.now, b.files[file], b.options.Check = b.now.Add(day), good, true
		change()
		result := b.run(t)
		if out := fmt.Sprint(result.Steps); result.ExitCode() != ExitFailed || !strings.Contains(out, last) || !strings.Contains(out, "restic forget") {
			t.Errorf("%s: code %d: %s", name, result.ExitCode(), out)
		}
		if LatestID(b.snapshots) != last || len(b.snapshots) != left || slices.ContainsFunc(b.log, func(l string) bool {
			return strings.HasPrefix(l, "prune") || strings.HasPrefix(l, "forget") || strings.HasPrefix(l, "backup")
		}) {
			t.Errorf("%s: %q", name, b.log)
		}
	}
	// It is read again: what was damaged is looked at first. Until then the older one counts.
	b.files[file], b.options.Check = []byte("{"), true
	if r, err := Latest(t.Context(), b.fakeRepository, b.snapshots); err == nil || r.Read == nil || r.Damaged != "" {
		t.Error(r, err)
	}
	b.now, b.files[file] = found, good
	if result := b.run(t); result.ExitCode() != ExitOK || b.log[2] != again {
		t.Errorf("%+v: %q", result, b.log)
	}
	// What nobody can read any more is forgotten by whoever has seen to it.
	b.files[LatestID(b.snapshots)+"/"+recordName] = []byte("{")
	b.run(t)
	b.snapshots = slices.DeleteFunc(b.snapshots, func(s restic.Snapshot) bool { return s.ID == LatestID(b.snapshots) })
	b.now = b.now.Add(day)
	if result := b.run(t); result.ExitCode() == ExitFailed {
		t.Errorf("%+v", result)
	}
}

// The newest record is that of the last run, however the clocks go.
func TestRecordsInOrder(t *testing.T) {
	b := newBench()
	b.run(t)
	b.now = b.now.Add(-time.Hour)
	b.errs["prune"] = []error{restic.ErrLocked}
	b.run(t)
	all := records(b.snapshots)
	for i := range all[1:] {
		if !all[i+1].Time.After(all[i].Time) {
			t.Errorf("%s is not after %s", all[i+1].Time, all[i].Time)
		}
	}
	if !mover.Held(b.snapshots, b.now).IsZero() {
		t.Error("the hold outlives the run")
	}
}

func TestInterrupted(t *testing.T) {
	b := newBench()
	ctx, cancel := context.WithCancel(t.Context())
	b.then["check"] = cancel
	result, err := Run(ctx, b.fakeRepository, b.options)
	if err == nil || result.Steps[0].Status != StatusInterrupted {
		t.Errorf("%+v, %v", result, err)
	}
	if len(records(b.snapshots)) != 1 {
		t.Error("nothing is left of it")
	}
}

func TestRefused(t *testing.T) {
	for _, change := range []func(*Options){
		func(o *Options) { o.Check, o.Prune = false, false },
		func(o *Options) { o.ReadDays = -1 },
		func(o *Options) { o.Timeout = -1 },
		func(o *Options) { o.Now = nil },
	} {
		b := newBench()
		change(&b.options)
		if _, err := Run(t.Context(), b.fakeRepository, b.options); err == nil || len(b.log) > 0 {
			t.Errorf("%+v: %v, %v", b.options, err, b.log)
		}
	}
	b := newBench()
	b.errs["snapshots"] = []error{restic.ErrNoRepository}
	if _, err := Run(t.Context(), b.fakeRepository, b.options); !errors.Is(err, restic.ErrNoRepository) {
		t.Error(err)
	}
	var r Record
	if text, err := json.Marshal(Record{}); err != nil || json.Unmarshal(text, &r) != nil {
		t.Error(string(text), err)
	}
}

// TestKnownDamageIsNotPruned: what one run has found counts until a check finds
// nothing, whether or not there is one.
func TestKnownDamageIsNotPruned(t *testing.T) {
	b := newBench()
	b.errs["check"] = []error{damaged("p"), damaged("p")}
	b.run(t)
	pruned := func() bool {
		return slices.ContainsFunc(b.log, func(l string) bool { return strings.HasPrefix(l, "prune") })
	}
	for name, change := range map[string]func(){
		"the check fails":   func() { b.errs["check"] = []error{errors.New("no network")} },
		"there is no check": func() { b.options.Check = false },
	} {
		b.options.Check, b.now = true, b.now.Add(day)
		change()
		if result := b.run(t); result.ExitCode() != ExitDamaged || pruned() {
			t.Errorf("%s: %d, %q", name, result.ExitCode(), b.log)
		}
	}
	b.options.Check, b.now = true, b.now.Add(day)
	b.run(t)
	b.now = b.now.Add(day)
	if result := b.run(t); result.ExitCode() != ExitOK || !pruned() {
		t.Errorf("after a check that has found nothing: %d, %q", result.ExitCode(), b.log)
	}
}
