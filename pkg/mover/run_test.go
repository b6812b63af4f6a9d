package mover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// fakeMounts proves whatever it is told.
type fakeMounts struct {
	mount.Interface
	err error
	log *[]string
}

func (f *fakeMounts) Prove(_ context.Context, dir string, src mount.Source, readOnly bool) error {
	*f.log = append(*f.log, fmt.Sprintf("prove %s %s ro=%v", filepath.Base(dir), src.Locations[0], readOnly))
	return f.err
}

// fakeRepository is a repository in memory. errs holds errors by method, in
// order; nil and the end of the list are success.
type fakeRepository struct {
	restic.Client
	missing   bool
	snapshots []restic.Snapshot
	errs      map[string][]error
	restored  restic.RestoreSummary
	mu        sync.Mutex // a mover that is told the parent looks while it begins
	log       []string
	made      int
	request   restic.BackupRequest
	then      func() // after a backup
}

func (f *fakeRepository) say(format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, line)
	method, _, _ := strings.Cut(line, " ")
	if list := f.errs[method]; len(list) > 0 {
		f.errs[method] = list[1:]
		return list[0]
	}
	if f.missing && method != "init" {
		return restic.ErrNoRepository
	}
	return nil
}

func (f *fakeRepository) Init(context.Context) error {
	err := f.say("init")
	if err == nil {
		f.missing = false
	}
	return err
}
func (f *fakeRepository) Unlock(context.Context) error { return f.say("unlock") }
func (f *fakeRepository) UnlockHost(context.Context, string) error {
	return f.say("unlock host")
}
func (f *fakeRepository) RepairIndex(context.Context) error { return f.say("repair") }

func (f *fakeRepository) Snapshots(_ context.Context, tags ...string) ([]restic.Snapshot, error) {
	err := f.say("snapshots %s", strings.Join(tags, ","))
	if err != nil && !errors.Is(err, restic.ErrIncomplete) {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []restic.Snapshot
	for _, s := range f.snapshots {
		if !slices.ContainsFunc(tags, func(tag string) bool { return !slices.Contains(s.Tags, tag) }) {
			found = append(found, s)
		}
	}
	return found, err
}

func (f *fakeRepository) Holds(_ context.Context, id string) error {
	if err := f.say("holds %s", id); err != nil {
		return err
	}
	if !slices.ContainsFunc(f.snapshots, func(s restic.Snapshot) bool { return s.ID == id }) {
		return restic.ErrFailed
	}
	return nil
}

func (f *fakeRepository) Forget(_ context.Context, wait time.Duration, ids ...string) error {
	err := f.say("forget %s %s", strings.Join(ids, ","), wait)
	if err == nil {
		f.snapshots = slices.DeleteFunc(f.snapshots, func(s restic.Snapshot) bool { return slices.Contains(ids, s.ID) })
	}
	return err
}

func (f *fakeRepository) Backup(_ context.Context, r restic.BackupRequest, _ func(restic.Progress)) (*restic.BackupSummary, error) {
	f.request = r
	err := f.say("backup parent=%s %s", r.Parent, r.RetryLock)
	if err != nil && !errors.Is(err, restic.ErrIncomplete) {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.made++
	id := fmt.Sprint("new", f.made)
	f.snapshots = append(f.snapshots, restic.Snapshot{ID: id, Time: r.Time, Tags: r.Tags, Summary: &restic.BackupSummary{TotalFiles: 2}})
	if f.then != nil {
		f.then()
	}
	return &restic.BackupSummary{SnapshotID: id}, err
}

func (f *fakeRepository) Restore(_ context.Context, r restic.RestoreRequest, _ func(restic.Progress)) (*restic.RestoreSummary, error) {
	return &f.restored, f.say("restore %s %s", r.SnapshotID, r.RetryLock)
}

func backupTask() Task {
	return Task{
		ID: "task-1", Repository: "offsite", Source: mount.Source{Protocol: "bind", Locations: []string{"/src"}},
		Backup: &Backup{
			Backup: "b1", Volume: "local/v", Name: "nightly", Size: 5, Host: "ns/claim",
			Time: time.Date(2026, 4, 12, 1, 2, 3, 0, time.UTC), Description: json.RawMessage(`{"b":1,"a":[]}`),
		},
	}
}

func restoreTask() Task {
	return Task{ID: "task-1", Source: mount.Source{Protocol: "bind", Locations: []string{"/src"}}, Restore: &Restore{Backup: "b1"}}
}

// snapshot is one of the volume; files is -1 for no summary.
func snapshot(id, backup string, files int64) restic.Snapshot {
	s := restic.Snapshot{ID: id, Paths: []string{Dir + "/data", Dir + "/volume.json"}, Tags: []string{TagVolume + "local/v", TagBackup + backup}, Summary: &restic.BackupSummary{TotalFiles: files}}
	if files < 0 {
		s.Summary = nil
	}
	if backup == "b1" { // of the same cut as the task's
		s.Time = backupTask().Backup.Time
	}
	return s
}

// mark says that a backup is partial.
func mark(id, backup string) restic.Snapshot {
	s := snapshot(id, backup, 1)
	s.Paths, s.Tags = []string{Dir + "/volume.json"}, []string{TagVolume + "local/v", TagPartial + backup}
	return s
}

func TestFlow(t *testing.T) {
	const look, again = "snapshots abaca.volume=local/v", "snapshots abaca.backup=b1"
	const proof, held = "prove data /src ro=true", "holds new1"
	proved := []string{"prove data /src ro=true"}
	type tweak func(*Task, *fakeRepository, *fakeMounts)
	recovering := func(task *Task, _ *fakeRepository, _ *fakeMounts) { task.Recover = true }
	had := func(s ...restic.Snapshot) tweak {
		return func(_ *Task, f *fakeRepository, _ *fakeMounts) { f.snapshots = s }
	}
	missing := func(_ *Task, f *fakeRepository, _ *fakeMounts) { f.missing = true }
	errs := func(method string, errs ...error) tweak {
		return func(_ *Task, f *fakeRepository, _ *fakeMounts) { f.errs[method] = errs }
	}
	empty := func(task *Task, _ *fakeRepository, _ *fakeMounts) { task.Source.Options = []string{"empty"} }
	unproved := func(err error) tweak { return func(_ *Task, _ *fakeRepository, m *fakeMounts) { m.err = err } }

	for name, test := range map[string]struct {
		task   Task
		tweaks []tweak
		reason Reason
		log    []string
	}{
		"first": {task: backupTask(), log: []string{look, "backup parent= 0s", proof, held}},
		"second, with the newest as parent": {
			task: backupTask(), tweaks: []tweak{had(snapshot("s1", "a1", 2), snapshot("s2", "a2", 2))},
			log: []string{look, "backup parent=s2 0s", proof, held},
		},
		"no repository": {
			task: backupTask(), tweaks: []tweak{missing},
			log: []string{look, "init", look, "backup parent= 0s", proof, held},
		},
		"a repository that was there": {
			task: backupTask(), tweaks: []tweak{missing, func(task *Task, _ *fakeRepository, _ *fakeMounts) { task.Made = true }}, reason: ReasonRepository,
			log: []string{look},
		},
		"somebody else was faster": {
			task: backupTask(), tweaks: []tweak{errs("snapshots", restic.ErrNoRepository), errs("init", restic.ErrFailed)},
			log: []string{look, "init", look, "backup parent= 0s", proof, held},
		},
		"repository cannot be made": {
			task: backupTask(), tweaks: []tweak{missing, errs("init", restic.ErrFailed)}, reason: ReasonRepository,
			log: []string{look, "init", look},
		},
		"another mover makes the repository, for too long": {
			task: backupTask(), tweaks: []tweak{missing, func(task *Task, _ *fakeRepository, _ *fakeMounts) { task.Repository = "taken" }}, reason: ReasonRepository,
			log: []string{look, look},
		},
		"killed before": {
			task: backupTask(), tweaks: []tweak{recovering, had(snapshot("s1", "a1", 2), snapshot("half", "b1", 2), snapshot("half2", "b1", 2))},
			log: []string{"unlock", "repair", look, "forget half,half2 0s", "backup parent=s1 0s", proof, held},
		},
		"killed before there was a repository": {
			task: backupTask(), tweaks: []tweak{recovering, missing},
			log: []string{"unlock", look, "init", look, "backup parent= 0s", proof, held},
		},
		"killed before, and others use the repository": {
			task: backupTask(), tweaks: []tweak{recovering, errs("repair", restic.ErrLocked)},
			log: []string{"unlock", "repair", look, "backup parent= 0s", proof, held},
		},
		"repair fails": {
			task: backupTask(), tweaks: []tweak{recovering, errs("repair", restic.ErrFailed)}, reason: ReasonRepository,
			log: []string{"unlock", "repair"},
		},
		"stale lock": {
			task: backupTask(), tweaks: []tweak{errs("backup", restic.ErrLocked)},
			log: []string{look, "backup parent= 0s", "unlock", "backup parent= 10m0s", proof, held},
		},
		"live lock": {
			task: backupTask(), tweaks: []tweak{errs("backup", restic.ErrLocked, restic.ErrLocked)}, reason: ReasonLocked,
			log: []string{look, "backup parent= 0s", "unlock", "backup parent= 10m0s"},
		},
		"unreadable files": {
			task: backupTask(), tweaks: []tweak{errs("backup", restic.ErrIncomplete)}, reason: ReasonIncomplete,
			log: []string{look, "backup parent= 0s", proof, "forget new1 0s"},
		},
		"unreadable files, and the half is not forgotten": {
			task: backupTask(), tweaks: []tweak{errs("backup", restic.ErrIncomplete), errs("forget", restic.ErrLocked, restic.ErrLocked)}, reason: ReasonLocked,
			log: []string{look, "backup parent= 0s", proof, "forget new1 0s", "unlock", "forget new1 10m0s"},
		},
		"unreadable files are accepted": {
			task: backupTask(), tweaks: []tweak{errs("backup", restic.ErrIncomplete), func(task *Task, _ *fakeRepository, _ *fakeMounts) { task.Backup.AllowPartial = true }},
			log: []string{look, "backup parent= 0s", proof, "backup parent= 0s", held},
		},
		"unreadable files are accepted, but nothing says so": {
			task: backupTask(), tweaks: []tweak{errs("backup", restic.ErrIncomplete, restic.ErrFailed), func(task *Task, _ *fakeRepository, _ *fakeMounts) { task.Backup.AllowPartial = true }},
			reason: ReasonRepository, log: []string{look, "backup parent= 0s", proof, "backup parent= 0s"},
		},
		"killed before, and one that was partial is no parent": {
			task: backupTask(), tweaks: []tweak{recovering, had(snapshot("s1", "a1", 2), mark("m1", "a1"), snapshot("half", "b1", 2), mark("m2", "b1"))},
			log: []string{"unlock", "repair", look, "forget half,m2 0s", "backup parent=s1 0s", proof, held},
		},
		"unreadable snapshots of others": {
			task: backupTask(), tweaks: []tweak{errs("snapshots", restic.ErrIncomplete, restic.ErrIncomplete), had(snapshot("s1", "a1", 2))},
			log: []string{look, "backup parent=s1 0s", proof, held},
		},
		"empty": {task: backupTask(), tweaks: []tweak{empty, had(snapshot("s1", "a1", 2))}, reason: ReasonEmpty, log: []string{look}},
		"empty is accepted": {
			task: backupTask(), tweaks: []tweak{empty, had(snapshot("s1", "a1", 2)), func(task *Task, _ *fakeRepository, _ *fakeMounts) { task.Backup.AllowEmpty = true }},
			log: []string{look, "backup parent=s1 0s", proof, held},
		},
		"empty as ever":          {task: backupTask(), tweaks: []tweak{empty, had(snapshot("s1", "a1", 1))}, log: []string{look, "backup parent=s1 0s", proof, held}},
		"empty from the start":   {task: backupTask(), tweaks: []tweak{empty}, log: []string{look, "backup parent= 0s", proof, held}},
		"empty, parent unknown":  {task: backupTask(), tweaks: []tweak{empty, had(snapshot("s1", "a1", -1))}, log: []string{look, "backup parent=s1 0s", proof, held}},
		"not mounted":            {task: backupTask(), tweaks: []tweak{unproved(mount.ErrNotMounted)}, reason: ReasonSource},
		"something else mounted": {task: backupTask(), tweaks: []tweak{unproved(mount.ErrOther)}, reason: ReasonSource},
		"mounted writable":       {task: backupTask(), tweaks: []tweak{unproved(mount.ErrWritable)}, reason: ReasonSource},
		"server down":            {task: backupTask(), tweaks: []tweak{unproved(mount.ErrCorrupted)}, reason: ReasonRepository},
		"wrong password":         {task: backupTask(), tweaks: []tweak{errs("snapshots", restic.ErrWrongPassword)}, reason: ReasonPassword, log: []string{look}},
		"vanished afterwards": {
			task: backupTask(), tweaks: []tweak{errs("holds", restic.ErrFailed)}, reason: ReasonRepository,
			log: []string{look, "backup parent= 0s", proof, held},
		},

		"somebody else made it of another cut": {
			task: backupTask(), tweaks: []tweak{had(snapshot("s1", "a1", 2)), func(_ *Task, f *fakeRepository, _ *fakeMounts) {
				s := snapshot("s2", "b1", 2)
				s.Time = s.Time.Add(-time.Minute)
				f.snapshots = append(f.snapshots, s)
			}},
			log: []string{look},
		},
		"unmounted meanwhile": {
			task: backupTask(), tweaks: []tweak{func(_ *Task, f *fakeRepository, m *fakeMounts) {
				f.then = func() { m.err = mount.ErrNotMounted }
			}},
			reason: ReasonSource, log: []string{look, "backup parent= 0s", proof, "forget new1 0s"},
		},

		"restore": {
			task: restoreTask(), tweaks: []tweak{had(snapshot("s0", "b0", 3), snapshot("s1", "b1", 3))},
			log: []string{again, "restore s1 0s"},
		},
		"restore, unreadable snapshots of others": {
			task: restoreTask(), tweaks: []tweak{had(snapshot("s1", "b1", 3)), errs("snapshots", restic.ErrIncomplete)},
			log: []string{again, "restore s1 0s"},
		},
		"restore what may be unreadable": {task: restoreTask(), tweaks: []tweak{errs("snapshots", restic.ErrIncomplete)}, reason: ReasonRepository, log: []string{again}},
		"restore what somebody else has made": {
			task: restoreTask(), tweaks: []tweak{had(snapshot("s1", "b1", 3)), func(_ *Task, f *fakeRepository, _ *fakeMounts) { f.snapshots[0].Paths = []string{"/home"} }},
			reason: ReasonNotFound, log: []string{again},
		},
		"restore what is not there":  {task: restoreTask(), reason: ReasonNotFound, log: []string{again}},
		"restore without repository": {task: restoreTask(), tweaks: []tweak{missing}, reason: ReasonNotFound, log: []string{again}},
		"restore while locked": {
			task: restoreTask(), tweaks: []tweak{recovering, had(snapshot("s1", "b1", 3)), errs("restore", restic.ErrLocked)},
			log: []string{"unlock", again, "restore s1 0s", "unlock", "restore s1 10m0s"},
		},
		"restore with fewer than in the backup": {task: restoreTask(), tweaks: []tweak{had(snapshot("s1", "b1", 8))}, reason: ReasonRepository, log: []string{again, "restore s1 0s"}},
		"restore with fewer than found": {
			task: restoreTask(), tweaks: []tweak{had(snapshot("s1", "b1", 3)), func(_ *Task, f *fakeRepository, _ *fakeMounts) { f.restored.TotalFiles++ }},
			reason: ReasonRepository, log: []string{again, "restore s1 0s"},
		},
		"restore into the wrong mount": {task: restoreTask(), tweaks: []tweak{unproved(mount.ErrOther)}, reason: ReasonSource},
	} {
		t.Run(name, func(t *testing.T) {
			task := test.task
			if task.Backup != nil {
				b := *task.Backup
				task.Backup = &b
			}
			f := &fakeRepository{errs: map[string][]error{}, restored: restic.RestoreSummary{TotalFiles: 5, FilesRestored: 5, FilesSkipped: 2}}
			m := &fakeMounts{log: &f.log}
			for _, tweak := range test.tweaks {
				tweak(&task, f, m)
			}
			dir := t.TempDir()
			os.Mkdir(filepath.Join(dir, "data"), 0o755)
			if task.Source.Options == nil {
				os.WriteFile(filepath.Join(dir, "data", "file"), nil, 0o644)
			} else {
				os.Mkdir(filepath.Join(dir, "data", "lost+found"), 0o755)
			}
			initLocked := 0
			result := Run(t.Context(), task, Env{Dir: dir, Restic: f, Mounts: m, LockWait: 10 * time.Minute, InitLock: func(context.Context) (func(), error) {
				if task.Repository == "taken" {
					return nil, errors.New("taken")
				}
				initLocked++
				return func() { initLocked-- }, nil
			}})
			if initLocked != 0 {
				t.Error("the lock for init is not released")
			}
			if result.Reason != test.reason || (result.Error == "") != (test.reason == "") || (result.Snapshot == "") != (test.reason != "") {
				t.Errorf("%+v, want reason %q", result, test.reason)
			}
			want := append(slices.Clone(proved), test.log...)
			if task.Restore != nil {
				want[0] = "prove data /src ro=false"
			}
			if diff := cmp.Diff(want, f.log); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			// Promise: never two of one backup, and none after a lasting failure.
			mine := 0
			for _, s := range f.snapshots {
				if slices.Contains(s.Tags, TagBackup+"b1") {
					mine++
				}
			}
			if task.Backup != nil && (mine > 1 || mine == 0 && result.Error == "" || mine > 0 && result.Reason.Lasting()) {
				t.Errorf("%d snapshots of the backup after %+v", mine, result)
			}
		})
	}
}

// A mover that looks before it begins waits while maintenance holds it back, and
// no longer than that.
func TestHeldBack(t *testing.T) {
	for name, test := range map[string]struct {
		clock                   func() time.Time
		over, cancel, wantsWait bool
	}{
		"held":              {clock: time.Now, wantsWait: true},
		"asked to end":      {clock: time.Now, cancel: true},
		"it is over":        {clock: time.Now, over: true},
		"nobody can say so": {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			until := began.Add(2 * time.Second).Truncate(time.Second)
			f := &fakeRepository{errs: map[string][]error{}, snapshots: []restic.Snapshot{
				{ID: "m1", Tags: []string{TagMaintenance, TagHold + until.UTC().Format(time.RFC3339)}}}}
			if test.over {
				f.snapshots = append(f.snapshots, restic.Snapshot{ID: "m2", Tags: []string{TagMaintenance}})
			}
			dir := t.TempDir()
			os.Mkdir(filepath.Join(dir, "data"), 0o755)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if test.cancel {
				time.AfterFunc(50*time.Millisecond, cancel)
			}
			result := Run(ctx, backupTask(), Env{Dir: dir, Restic: f, Mounts: &fakeMounts{log: &[]string{}}, Now: test.clock})
			if waited := !time.Now().Before(until); waited != test.wantsWait {
				t.Errorf("waited: %v", waited)
			}
			if (result.Reason == ReasonStopped) != test.cancel || f.made == 1 == test.cancel {
				t.Errorf("%+v after %d backups", result, f.made)
			}
		})
	}
}

// A mover that is told the newest backup begins at once, and still ends with one
// snapshot whatever was wrong with what it was told.
func TestToldTheParent(t *testing.T) {
	old := restic.Snapshot{ID: "s1", Tags: []string{TagVolume + "local/v", TagBackup + "a1"}, Summary: &restic.BackupSummary{TotalFiles: 2}}
	other := restic.Snapshot{ID: "s2", Tags: []string{TagVolume + "local/v", TagBackup + "b1"}}
	for name, test := range map[string]struct {
		had     []restic.Snapshot
		missing bool
		failing error
		made    int
		parent  string
	}{
		"right":                          {had: []restic.Snapshot{old}, made: 1, parent: "s1"},
		"another controller was faster":  {had: []restic.Snapshot{old, other}, made: 1, parent: "s1"},
		"it has been deleted meanwhile":  {failing: restic.ErrFailed, made: 1, parent: ""},
		"and so has the repository":      {missing: true, made: 1, parent: ""},
		"unreadable files are forgotten": {had: []restic.Snapshot{old}, failing: restic.ErrIncomplete, made: 1, parent: "s1"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fakeRepository{missing: test.missing, snapshots: test.had, errs: map[string][]error{}}
			if test.failing != nil {
				f.errs["backup"] = []error{test.failing}
			}
			dir := t.TempDir()
			os.Mkdir(filepath.Join(dir, "data"), 0o755)
			os.WriteFile(filepath.Join(dir, "data", "file"), nil, 0o644)
			var proofs []string // of its own, as it is written while the mover looks
			task := backupTask()
			task.Backup.Parent = &Parent{Snapshot: "s1", Files: 2}
			result := Run(t.Context(), task, Env{Dir: dir, Restic: f, Mounts: &fakeMounts{log: &proofs}})
			incomplete := test.failing == restic.ErrIncomplete
			if (result.Error != "") != incomplete || f.made != test.made || f.request.Parent != test.parent {
				t.Errorf("%+v after %d backups, the last with parent %q\n%q", result, f.made, f.request.Parent, f.log)
			}
			mine := 0
			for _, s := range f.snapshots {
				if slices.Contains(s.Tags, TagBackup+"b1") {
					mine++
				}
			}
			if incomplete && mine != 0 || !incomplete && mine != 1 {
				t.Errorf("%d snapshots of the backup", mine)
			}
		})
	}
}

// A volume that was emptied is noticed, also by a mover that was told of no
// backup of it.
func TestToldOfNoParentOfAnEmptiedVolume(t *testing.T) {
	f := &fakeRepository{errs: map[string][]error{}, snapshots: []restic.Snapshot{
		{ID: "s1", Tags: []string{TagVolume + "local/v", TagBackup + "a1"}, Summary: &restic.BackupSummary{TotalFiles: 2}}}}
	dir := t.TempDir()
	os.MkdirAll(filepath.Join(dir, "data", "empty", "too"), 0o755)
	var proofs []string
	task := backupTask()
	task.Backup.Parent = &Parent{}
	if result := Run(t.Context(), task, Env{Dir: dir, Restic: f, Mounts: &fakeMounts{log: &proofs}}); result.Reason != ReasonEmpty || len(f.snapshots) != 1 {
		t.Errorf("%+v, %d snapshots", result, len(f.snapshots))
	}
}

func TestRequest(t *testing.T) {
	f := &fakeRepository{}
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "data"), 0o755)
	task := backupTask()
	task.Backup.Name = "a, abaca.backup=b2" // a CSI name can be anything
	for range 2 {                           // a second run writes the same
		if result := Run(t.Context(), task, Env{Dir: dir, Restic: f, Mounts: &fakeMounts{log: &f.log}}); result.Error != "" {
			t.Fatal(result)
		}
		at := backupTask().Backup.Time
		want := restic.BackupRequest{
			Dir: dir, Targets: []string{"data", "volume.json"}, Host: "ns/claim", Time: at,
			Tags: []string{"abaca.backup=b1", "abaca.volume=local/v", "abaca.name=a%2C+abaca.backup%3Db2", "abaca.size=5"},
		}
		if diff := cmp.Diff(want, f.request); diff != "" {
			t.Error(diff)
		}
		path := filepath.Join(dir, "volume.json")
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff("{\n  \"b\": 1,\n  \"a\": []\n}\n", string(text)); diff != "" {
			t.Error(diff)
		}
		if info, _ := os.Stat(path); !info.ModTime().Equal(at) || info.Mode() != 0o644 {
			t.Error(info.ModTime(), info.Mode())
		}
	}
	// Inode numbers count, wherever a snapshot keeps them.
	for _, source := range []mount.Source{{Protocol: "cifs"}, {Protocol: "cifs", Path: ".snapshot/s"}, {Protocol: "nfs", Path: ".snapshot/s"}, {Protocol: "cephfs", Path: ".snap/s"}} {
		task.Source = source
		task.Source.Locations = []string{"/src"}
		if result := Run(t.Context(), task, Env{Dir: dir, Restic: f, Mounts: &fakeMounts{log: &f.log}}); result.Error != "" || f.request.IgnoreInode != (source.Protocol == "cifs" && source.Path != "") {
			t.Errorf("%+v: %+v, %+v", source, result, f.request)
		}
	}
}

func TestStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, method := range []string{"snapshots", "restore"} {
		f := &fakeRepository{errs: map[string][]error{method: {errors.Join(restic.ErrInterrupted, ctx.Err())}}, snapshots: []restic.Snapshot{snapshot("s1", "b1", 1)}}
		if result := Run(ctx, restoreTask(), Env{Restic: f, Mounts: &fakeMounts{log: &f.log}}); result.Reason != ReasonStopped {
			t.Errorf("%+v", result)
		}
	}
	// Interrupted by somebody else: it may be tried again.
	f := &fakeRepository{errs: map[string][]error{"snapshots": {restic.ErrInterrupted}}}
	if result := Run(t.Context(), restoreTask(), Env{Restic: f, Mounts: &fakeMounts{log: &f.log}}); result.Reason != ReasonRepository {
		t.Errorf("%+v", result)
	}
}

func TestInvalidTasks(t *testing.T) {
	for name, spoil := range map[string]func(*Task){
		"no id":       func(t *Task) { t.ID = "" },
		"id":          func(t *Task) { t.ID = "A/b" },
		"neither":     func(t *Task) { t.Backup = nil },
		"both":        func(t *Task) { t.Restore = &Restore{Backup: "b"} },
		"comma":       func(t *Task) { t.Backup.Host = "a,b" },
		"space":       func(t *Task) { t.Backup.Volume = "a b" },
		"no host":     func(t *Task) { t.Backup.Host = "" },
		"no time":     func(t *Task) { t.Backup.Time = time.Time{} },
		"size":        func(t *Task) { t.Backup.Size = -1 },
		"description": func(t *Task) { t.Backup.Description = json.RawMessage(`{`) },
		"nothing":     func(t *Task) { t.Backup.Description = nil },
		"restore":     func(t *Task) { t.Backup, t.Restore = nil, &Restore{} },
	} {
		task := backupTask()
		spoil(&task)
		f := &fakeRepository{}
		if result := Run(t.Context(), task, Env{Restic: f, Mounts: &fakeMounts{log: &f.log}}); result.Reason != ReasonConfig || len(f.log) != 0 {
			t.Errorf("%s: %+v %v", name, result, f.log)
		}
	}
}

// TestThrottled: reports are some time apart, but trouble after a report without is
// not held back.
func TestThrottled(t *testing.T) {
	now := time.Unix(0, 0)
	var got []string
	report := Throttled(func() time.Time { return now }, now.Add(10*time.Second), 10*time.Second,
		func(p restic.Progress) { got = append(got, fmt.Sprint(now.Unix(), p.Trouble)) })
	for _, trouble := range []string{"", " first", " again", "", "", " soon", "", " late", " late"} {
		now = now.Add(4 * time.Second)
		report(restic.Progress{Trouble: trouble})
	}
	if diff := cmp.Diff([]string{"8 first", "20", "24 soon", "36 late"}, got); diff != "" {
		t.Error(diff)
	}
}
