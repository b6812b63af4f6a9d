package backup

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/go-logr/logr/funcr"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/mover"
)

// TestRestoreThatNobodyAsksAbout: its record goes, and after it the draft, sooner if the
// claim is gone; not what has become a volume, begins again or is asked about.
func TestRestoreThatNobodyAsksAbout(t *testing.T) {
	claim := Object{Kind: PersistentVolumeClaim, Namespace: "shop", Name: "back"}
	for name, c := range map[string]struct {
		exists               func(context.Context, Object) (bool, error)
		phase                Phase
		record, share        time.Duration // until when they are there
		between              func(*bench, RestoreRequest)
		recordStays, shareIs bool // in the end
	}{
		"done":        {phase: Succeeded, record: askedAgain, share: draftAge},
		"failed":      {phase: Failed, record: askedAgain, share: draftAge},
		"interrupted": {phase: Interrupted, record: askedAgain, share: draftAge},
		"claim gone": {phase: Succeeded, record: goneAge, share: goneAge,
			exists: func(_ context.Context, o Object) (bool, error) { return o != claim, nil }},
		"claim there": {phase: Succeeded, record: askedAgain, share: draftAge,
			exists: func(context.Context, Object) (bool, error) { return true, nil }},
		"claim unknown": {phase: Succeeded, record: askedAgain, share: draftAge,
			exists: func(context.Context, Object) (bool, error) { return false, backend.ErrUnavailable }},
		"committed": {phase: Succeeded, record: askedAgain, share: draftAge, shareIs: true,
			between: func(b *bench, r RestoreRequest) { b.must(b.backend.CommitShare(t.Context(), r.Share)) }},
		"begun anew": {phase: Succeeded, record: askedAgain, share: draftAge, recordStays: true, shareIs: true,
			between: func(b *bench, r RestoreRequest) { b.must(errOf(b.Restore(t.Context(), r))) }},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.Exists = c.exists
			d := newDrafts(b.Engine)
			share, err := b.backend.CreateShare(t.Context(), backend.CreateShareRequest{Name: "back", MinSize: 1 << 20, Role: backend.RoleUser, Draft: true})
			b.must(err)
			req := RestoreRequest{ID: "restore-x", Repository: "offsite", Backup: "one", Backend: "mem", Share: share.ID, Wanted: always, About: []Object{claim}}
			b.must(errOf(b.Restore(t.Context(), req)))
			b.now = b.now.Add(24 * time.Hour)
			b.pass(d)
			st := b.runner.jobs[req.ID]
			if st == nil {
				t.Fatal("a restore that runs is given up")
			}
			st.Phase, st.Ended = c.phase, b.now
			if c.phase == Failed {
				st.Result = mover.Result{Error: "because", Reason: mover.ReasonNoSpace}
			}
			there := func(when string, record, draft bool) {
				t.Helper()
				_, err := b.backend.Share(t.Context(), share.ID)
				if (b.runner.jobs[req.ID] != nil) != record || (err == nil) != draft {
					t.Errorf("%s: record %v, share %v", when, b.runner.jobs[req.ID], err)
				}
			}
			b.pass(d)
			b.now = b.now.Add(c.record - time.Second)
			b.pass(d)
			there("waiting to be asked about", true, true)
			b.now = b.now.Add(time.Second)
			b.pass(d)
			there("not asked about", false, true)
			if exports, _, err := b.backend.ListExports(t.Context(), "", 0); err != nil || len(exports) > 0 {
				t.Errorf("held still: %v, %v", exports, err)
			}
			b.now = b.now.Add(c.share - time.Second)
			b.pass(d)
			there("a call may be under way", false, true)
			if c.between != nil {
				c.between(b, req)
			}
			b.now = b.now.Add(time.Second)
			b.pass(d)
			there("in the end", c.recordStays, c.shareIs)
		})
	}
}

// TestDraftWithoutARecord: what a controller that was killed has left goes; a share
// that is no draft, or has a record, stays.
func TestDraftWithoutARecord(t *testing.T) {
	b := newBench(t)
	lost, err := b.backend.CreateShare(t.Context(), backend.CreateShareRequest{Name: "lost", MinSize: 1 << 20, Role: backend.RoleUser, Draft: true})
	b.must(err)
	kept, err := b.backend.CreateShare(t.Context(), backend.CreateShareRequest{Name: "kept", MinSize: 1 << 20, Role: backend.RoleUser, Draft: true})
	b.must(err)
	b.must(errOf(b.Restore(t.Context(), RestoreRequest{ID: "restore-x", Repository: "offsite", Backup: "one", Backend: "mem", Share: kept.ID, Wanted: always})))
	d := newDrafts(b.Engine)
	for range 3 {
		if _, err := b.backend.Share(t.Context(), lost.ID); err != nil {
			t.Errorf("after %s: %v", b.now.Sub(lost.CreatedAt), err)
		}
		b.must(d.sweep(t.Context()))
		b.pass(d)
		b.now = b.now.Add(draftAge)
	}
	for _, s := range []*backend.Share{b.share, kept} {
		b.must(errOf(b.backend.Share(t.Context(), s.ID)))
	}
	if _, err := b.backend.Share(t.Context(), lost.ID); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("it is left: %v", err)
	}
}

// TestDefectEndsNobody: what panics for one restore that nobody asks about is an error of it.
func TestDefectEndsNobody(t *testing.T) {
	b := newBench(t)
	b.must(errOf(b.Restore(t.Context(), RestoreRequest{ID: "restore-x", Repository: "offsite", Backup: "one", Backend: "mem", Share: b.share.ID, Wanted: always})))
	b.runner.jobs["restore-x"].Phase = Succeeded
	b.runner.onRelease = func(context.Context) { panic("a defect") }
	d := newDrafts(b.Engine)
	b.pass(d)
	b.now = b.now.Add(askedAgain)
	b.pass(d)
	seen := b.runner.jobs["restore-x"]
	if first, next := b.giveUp(t.Context(), seen), b.giveUp(t.Context(), seen); first.Error() != next.Error() {
		t.Errorf("it is logged anew each time:\n%v\n%v", first, next)
	}
	b.runner.onRelease = nil
	if b.pass(d); len(b.runner.jobs) > 0 {
		t.Error("the restore is not given up afterwards")
	}
}

// pass is one look at the records.
func (b *bench) pass(d *drafts) {
	b.t.Helper()
	jobs, err := b.runner.Jobs(b.t.Context())
	b.must(err)
	d.tick(b.t.Context(), jobs)
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func errOf[T any](_ T, err error) error { return err }

// TestClaimsAreNotAskedForAllTheTime: a restore that waits costs a request now and then,
// and one line in the log if that is not answered.
func TestClaimsAreNotAskedForAllTheTime(t *testing.T) {
	b := newBench(t)
	asked := 0
	b.Exists = func(context.Context, Object) (bool, error) { asked++; return false, backend.ErrUnavailable }
	said := 0
	ctx := klog.NewContext(t.Context(), funcr.New(func(_, args string) { said++ }, funcr.Options{}))
	b.must(errOf(b.Restore(t.Context(), RestoreRequest{ID: "restore-x", Repository: "offsite", Backup: "one", Backend: "mem", Share: b.share.ID, Wanted: always,
		About: []Object{{Kind: PersistentVolumeClaim, Namespace: "shop", Name: "back"}}})))
	b.runner.jobs["restore-x"].Phase = Succeeded
	d := newDrafts(b.Engine)
	for end := b.now.Add(10 * goneAge); b.now.Before(end); b.now = b.now.Add(2 * time.Second) {
		d.tick(ctx, []*Status{b.runner.jobs["restore-x"]})
	}
	if asked != 9 || said != 1 {
		t.Errorf("asked %d times in %s, want every %s; said %d times that it is not known", asked, 10*goneAge, goneAge, said)
	}
}
