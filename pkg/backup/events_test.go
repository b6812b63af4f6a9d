package backup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// heard is a recorder that remembers.
type heard []string

func (h *heard) Record(_ context.Context, e Event) {
	*h = append(*h, fmt.Sprintf("%s %s x%d %s", e.Object.Name, e.Reason, e.Count, e.Text))
}

func (h *heard) take() []string {
	all := *h
	*h = nil
	return all
}

var objects = []Object{{VolumeSnapshot, "shop", "nightly", "u1"}, {PersistentVolumeClaim, "shop", "data", "u2"}}

// TestEventsOfABackup: each event is told once, whoever looks at the job, and how
// often; the claim hears the end only.
func TestEventsOfABackup(t *testing.T) {
	b, told := newBench(t), &heard{}
	other := &Engine{Backends: b.Backends, Repositories: b.repository, Runner: b.runner, Now: b.Now}
	b.Recorder = &News{To: told}
	other.Recorder = b.Recorder
	req := b.request("one")
	req.Complete = func(_ context.Context, r *Request) error { r.About = objects; return nil }
	look := func(want ...string) {
		t.Helper()
		for range 3 {
			for _, e := range []*Engine{b.Engine, other} {
				if _, err := e.Backup(t.Context(), req); err != nil && !Told(err) {
					t.Error(err)
				}
				for _, st := range b.runner.jobs {
					e.tell(t.Context(), st)
				}
			}
		}
		if diff := cmp.Diff(want, told.take()); diff != "" {
			t.Errorf("at %s (-want +got):\n%s", b.now.Format(time.TimeOnly), diff)
		}
	}
	look(`nightly BackupStarted x1 backup of h to repository "offsite"`)
	st := b.runner.jobs["one"]
	st.Progress = restic.Progress{BytesDone: 1, BytesTotal: 4, FilesDone: 2, FilesTotal: 8}
	b.now = b.now.Add(4 * time.Minute)
	look()
	b.now = b.now.Add(61 * time.Second)
	look(`nightly BackupProgress x1 25 % (1 of 4 bytes, 2 of 8 files)`)
	st.Progress.BytesDone = 2
	b.now = b.now.Add(4 * time.Minute)
	look()
	b.now = b.now.Add(time.Minute)
	look(`nightly BackupProgress x2 50 % (2 of 4 bytes, 2 of 8 files)`)
	st.Progress.Trouble = "no route to host"
	look(`nightly BackupDelayed x1 attempt 1: no route to host`)
	st.Progress.Trouble = "still no route"
	look() // at most one in a minute
	b.now = b.now.Add(time.Minute)
	look(`nightly BackupDelayed x1 attempt 1: still no route`)
	b.now = b.now.Add(4 * time.Minute)
	look()
	b.now = b.now.Add(time.Minute)
	look(`nightly BackupDelayed x1 attempt 1: still no route`)
	b.end("one", mover.Result{Error: "gave up", Reason: mover.ReasonRepository})
	look(`nightly BackupDelayed x1 attempt 1: gave up`)
	b.now = b.now.Add(time.Minute)
	look()
	b.now = b.now.Add(time.Minute)
	b.end("one", mover.Result{Snapshot: "s", Backup: &restic.BackupSummary{TotalFiles: 9, TotalBytes: 3 << 20, FilesNew: 1, FilesChanged: 2, DataAddedPacked: 2048}})
	numbers := `backup of h to repository "offsite": 9 files with 3.0 MiB, of which 3 were new or changed and have been read; the repository has grown by 2.0 KiB, in 1m0s`
	look("nightly BackupFinished x1 "+numbers, "data BackupFinished x1 VolumeSnapshot shop/nightly: "+numbers)
	b.finish("one")
	look()
}

// TestEvents: what the ends of jobs are called. A controller that is started anew
// does not tell what is old.
func TestEvents(t *testing.T) {
	now := time.Date(2026, 4, 12, 1, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		restore bool
		phase   Phase
		result  mover.Result
		want    []EventReason
	}{
		{false, Succeeded, mover.Result{Backup: &restic.BackupSummary{}, Partial: true, Incomplete: []string{"/a"}}, []EventReason{BackupStarted, BackupIncomplete, BackupIncomplete}},
		{false, Failed, mover.Result{Error: "e", Reason: mover.ReasonPassword}, []EventReason{BackupStarted, BackupFailed, BackupFailed}},
		{false, Failed, mover.Result{Error: "e", Reason: mover.ReasonNoSpace}, []EventReason{BackupStarted, BackupDelayed}},
		{false, Failed, mover.Deleted, []EventReason{BackupStarted}},
		{true, Succeeded, mover.Result{Restore: &restic.RestoreSummary{}}, []EventReason{RestoreStarted, RestoreFinished, RestoreFinished}},
		{true, Failed, mover.Result{Error: "e", Reason: mover.ReasonNoSpace}, []EventReason{RestoreStarted, RestoreFailed, RestoreFailed}},
		{true, Failed, mover.Result{Error: "e", Reason: mover.ReasonRepository}, []EventReason{RestoreStarted, RestoreDelayed}},
	} {
		st := &Status{Phase: test.phase, Result: test.result, Started: now.Add(-time.Minute), Ended: now, Job: Job{Attempt: 1, About: objects,
			Task: mover.Task{ID: "x", Repository: "offsite", Backup: &mover.Backup{Host: "h"}}}}
		if test.restore {
			st.Job.Task.Backup, st.Job.Task.Restore = nil, &mover.Restore{Backup: "b"}
		}
		var got []EventReason
		for _, e := range events(st, now) {
			got = append(got, e.Reason)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%+v: %s, want %s", test, got, test.want)
		}
		told := &heard{}
		e := &Engine{Recorder: &News{To: told}, Now: func() time.Time { return now.Add(2 * time.Hour) }}
		e.tell(t.Context(), st)
		if all := told.take(); len(all) > 0 {
			t.Errorf("two hours later it tells %v", all)
		}
	}
}

// TestTold: what a job is told of is not told again as a request that was refused.
func TestTold(t *testing.T) {
	b := newBench(t)
	if _, err := b.Backup(t.Context(), Request{Repository: "nowhere"}); err == nil || Told(err) {
		t.Errorf("without a job: %v", err)
	}
	if _, err := b.Backup(t.Context(), b.request("one")); err != nil {
		t.Fatal(err)
	}
	b.runner.jobs["one"].Trouble = "no node"
	if _, err := b.Backup(t.Context(), b.request("one")); !Told(err) || !errors.Is(err, backend.ErrUnavailable) {
		t.Errorf("trouble: %v", err)
	}
	for _, reason := range []mover.Reason{mover.ReasonRepository, mover.ReasonPassword} {
		b.end("one", mover.Result{Error: "because", Reason: reason})
		if _, err := b.Backup(t.Context(), b.request("one")); !Told(err) {
			t.Errorf("%s: %v", reason, err)
		}
	}
}

// TestReasonsAreDocumented: the table has all reasons, with their types, and no
// other.
func TestReasonsAreDocumented(t *testing.T) {
	code, err := os.ReadFile("events.go")
	if err != nil {
		t.Fatal(err)
	}
	docs, err := os.ReadFile("../../docs/events.md")
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, m := range regexp.MustCompile(`EventReason = "(\w+)"`).FindAllStringSubmatch(string(code), -1) {
		kind := "Normal"
		if EventReason(m[1]).Warning() {
			kind = "Warning"
		}
		want = append(want, m[1]+" "+kind)
	}
	table, _, _ := strings.Cut(string(docs), "\n## ")
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\| (\\w+) \\| \\S.* \\| \\S.* \\|$").FindAllStringSubmatch(table, -1) {
		got = append(got, m[1]+" "+m[2])
	}
	if diff := cmp.Diff(want, got); diff != "" || len(want) == 0 {
		t.Errorf("docs/events.md (-code +docs):\n%s", diff)
	}
}
