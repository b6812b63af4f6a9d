package inprocess

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/record"
)

// actVariable makes this test program a mover that acts instead of moving.
const actVariable = "ABACA_TEST_MOVER"

func TestMain(m *testing.M) {
	if act := os.Getenv(actVariable); act != "" {
		os.Exit(play(act))
	}
	os.Exit(m.Run())
}

// play does what a mover does with its record, and nothing else.
func play(act string) int {
	dir := ""
	for i, a := range os.Args {
		if a == "--record" {
			dir = os.Args[i+1]
		}
	}
	if err := record.Write(filepath.Join(dir, "mover.json"), process{PID: os.Getpid(), Started: startTime(os.Getpid())}, false); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	switch act {
	case "succeed":
		time.Sleep(50 * time.Millisecond)
		_ = record.Write(filepath.Join(dir, "result.json"), outcome{Result: mover.Result{Snapshot: "s"}, Ended: time.Now()}, true)
	case "fail":
		_ = record.Write(filepath.Join(dir, "result.json"), outcome{Result: mover.Result{Error: "e", Reason: mover.ReasonEmpty}, Ended: time.Now()}, true)
	case "hang":
		time.Sleep(time.Minute)
	case "leave a child": // as a restic that outlives a killed mover
		child := exec.Command("sleep", "1")
		child.ExtraFiles = []*os.File{os.NewFile(lockFD, "lock")}
		if err := child.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	return 0
}

func newRunner(t *testing.T, act string) *Runner {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, for mount namespaces")
	}
	dir := t.TempDir()
	for _, d := range []string{"movers", "repositories/offsite"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(actVariable, act)
	return &Runner{Dir: filepath.Join(dir, "movers"), Repositories: backup.Directory{Path: filepath.Join(dir, "repositories")},
		Command: []string{os.Args[0]}, Now: time.Now}
}

func job(id string) backup.Job {
	return backup.Job{Attempt: 1, Task: mover.Task{ID: id, Repository: "offsite"}}
}

func wanted(context.Context) error { return nil }

func await(t *testing.T, r *Runner, id string, phase backup.Phase) *backup.Status {
	t.Helper()
	var st *backup.Status
	for range 500 {
		var err error
		if st, err = r.Status(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if st.Phase == phase {
			return st
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s is %s, want %s", id, st.Phase, phase)
	return nil
}

func TestPhases(t *testing.T) {
	for act, want := range map[string]backup.Phase{"succeed": backup.Succeeded, "fail": backup.Failed, "die": backup.Interrupted} {
		t.Run(act, func(t *testing.T) {
			r := newRunner(t, act)
			if _, err := r.Status(t.Context(), "a"); !errors.Is(err, backend.ErrNotFound) {
				t.Errorf("before: %v", err)
			}
			if err := r.Start(t.Context(), job("a"), wanted); err != nil {
				t.Fatal(err)
			}
			if st, err := r.Status(t.Context(), "a"); err != nil || st.Phase == backup.Interrupted && act == "succeed" {
				t.Errorf("just started: %+v, %v", st, err)
			}
			await(t, r, "a", want)
			if jobs, err := r.Jobs(t.Context()); err != nil || len(jobs) != 1 || jobs[0].Phase != want {
				t.Errorf("jobs: %+v, %v", jobs, err)
			}
			for range 2 {
				if err := r.Remove(t.Context(), "a"); err != nil {
					t.Error(err)
				}
			}
			if jobs, err := r.Jobs(t.Context()); err != nil || len(jobs) != 0 {
				t.Errorf("after: %+v, %v", jobs, err)
			}
		})
	}
}

// Many starters, in one process and over two runners, start one mover.
func TestOneMoverOnly(t *testing.T) {
	r := newRunner(t, "hang")
	other := *r
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			runner := []*Runner{r, &other}[i%2]
			if err := runner.Start(context.Background(), job("a"), wanted); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	await(t, r, "a", backup.Running)
	if n := movers(t, r.path("a")); n != 1 {
		t.Errorf("%d movers", n)
	}
	if err := r.Remove(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	if n := movers(t, r.path("a")); n != 0 {
		t.Errorf("%d movers are still there", n)
	}
}

// movers counts the processes that work on a record.
func movers(t *testing.T, dir string) int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range all {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), "--record\x00"+dir+"\x00") {
			n++
		}
	}
	return n
}

func TestSucceededIsNotDoneAgain(t *testing.T) {
	r := newRunner(t, "succeed")
	if err := r.Start(t.Context(), job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	first := await(t, r, "a", backup.Succeeded)
	if err := r.Start(t.Context(), job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	if again := await(t, r, "a", backup.Succeeded); !again.Ended.Equal(first.Ended) {
		t.Error("it was done twice")
	}
}

// The job counts as running until the last process that works on it is gone.
func TestLockOutlivesTheMover(t *testing.T) {
	r := newRunner(t, "leave a child")
	if err := r.Start(t.Context(), job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	time.Sleep(400 * time.Millisecond)
	if st, err := r.Status(t.Context(), "a"); err != nil || st.Phase != backup.Running {
		t.Errorf("while the child lives: %+v, %v", st, err)
	}
	await(t, r, "a", backup.Interrupted)
}

func TestStopGivesUpWithItsContext(t *testing.T) {
	r := newRunner(t, "leave a child") // the mover cannot be found, and the lock is held
	if err := r.Start(t.Context(), job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := r.Stop(ctx, "a"); !errors.Is(err, backend.ErrPending) {
		t.Errorf("stop: %v", err)
	}
	if err := r.Remove(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

// A job that is not wanted leaves nothing; a stopped one is not started again.
func TestUnwantedAndStopped(t *testing.T) {
	r := newRunner(t, "hang")
	if err := r.Start(t.Context(), job("a"), func(context.Context) error { return backend.ErrConflict }); !errors.Is(err, backend.ErrConflict) {
		t.Errorf("start: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(r.Dir, "*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if err := r.Start(t.Context(), job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	await(t, r, "a", backup.Running)
	if err := r.Stop(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if st := await(t, r, "a", backup.Failed); st.Result.Reason != mover.ReasonDeleted {
		t.Errorf("stopped: %+v", st.Result)
	}
	if err := r.Remove(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

func TestHostileIDs(t *testing.T) {
	r := newRunner(t, "succeed")
	for _, id := range []string{"", "..", "a/b", ".init-offsite", strings.Repeat("a", 64)} {
		if err := r.Start(t.Context(), job(id), wanted); !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("start %q: %v", id, err)
		}
		if _, err := r.Status(t.Context(), id); !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("status %q: %v", id, err)
		}
		if err := r.Remove(t.Context(), id); err != nil {
			t.Errorf("remove %q: %v", id, err)
		}
	}
	unknown := job("a")
	unknown.Task.Repository = "nowhere"
	if err := r.Start(t.Context(), unknown, wanted); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("unknown repository: %v", err)
	}
}
