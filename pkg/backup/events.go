package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/line"
	"github.com/abaca-csi/abaca/pkg/mover"
)

// Object is an object of the orchestrator that people look at.
type Object struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"` // empty if it is not known
}

func (o Object) String() string { return o.Kind + " " + o.Namespace + "/" + o.Name }

// The kinds of objects.
const (
	VolumeSnapshot        = "VolumeSnapshot"
	PersistentVolumeClaim = "PersistentVolumeClaim"
)

// EventReason is what an event is about, in one word that programs may rely on.
type EventReason string

// All reasons, described in docs/events.md.
const (
	BackupStarted    EventReason = "BackupStarted"
	BackupProgress   EventReason = "BackupProgress"
	BackupDelayed    EventReason = "BackupDelayed"
	BackupFinished   EventReason = "BackupFinished"
	BackupIncomplete EventReason = "BackupIncomplete"
	BackupFailed     EventReason = "BackupFailed"
	RestoreStarted   EventReason = "RestoreStarted"
	RestoreProgress  EventReason = "RestoreProgress"
	RestoreDelayed   EventReason = "RestoreDelayed"
	RestoreFinished  EventReason = "RestoreFinished"
	RestoreFailed    EventReason = "RestoreFailed"
	SnapshotRefused  EventReason = "SnapshotRefused"
)

// Warning says that something is not as it should be.
func (r EventReason) Warning() bool {
	switch r {
	case BackupDelayed, BackupIncomplete, BackupFailed, RestoreDelayed, RestoreFailed, SnapshotRefused:
		return true
	}
	return false
}

// Event is news of an object. Those of one object, reason and subject are one
// event that is told again: with another count, text or last time.
type Event struct {
	Object      Object // zero: nobody looks at any
	Reason      EventReason
	Subject     string // the backup or restore
	Text        string // one line for people, without secrets
	Count       int
	First, Last time.Time
}

// Recorder is told what happens. It must not block, and cannot fail.
type Recorder interface {
	Record(ctx context.Context, e Event)
}

const (
	// progressPeriod is how often one is told of what goes on well.
	progressPeriod = 5 * time.Minute
	// troublePeriod is how often at most one is told of other trouble.
	troublePeriod = time.Minute
	// repeatPeriod is how often one is told of the same trouble.
	repeatPeriod = 5 * time.Minute
	// eventAge is how old news may be: Kubernetes keeps events for an hour, and
	// what it has dropped is not told again.
	eventAge = time.Hour
	// newsMax is how many events are remembered.
	newsMax = 10_000
)

// News is a Recorder that logs what is new, and tells To of it, which may be nil.
type News struct {
	To Recorder

	mu   sync.Mutex
	told map[[3]string]Event
}

// Record implements Recorder.
func (n *News) Record(ctx context.Context, e Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := [3]string{e.Object.String(), string(e.Reason), e.Subject}
	if old, ok := n.told[key]; ok && (e.Last.Equal(old.Last) && e.Count == old.Count ||
		e.Text == old.Text && e.Count == old.Count && e.Last.Sub(old.Last) < repeatPeriod) {
		return
	}
	if n.told == nil || len(n.told) >= newsMax {
		n.told = map[[3]string]Event{} // what is told twice is one event all the same
	}
	n.told[key] = e
	about := "nobody's"
	if e.Object != (Object{}) {
		about = e.Object.String()
	}
	klog.FromContext(ctx).Info("Event", "reason", e.Reason, "object", about, "subject", e.Subject, "text", e.Text)
	if n.To != nil && e.Object != (Object{}) {
		n.To.Record(ctx, e)
	}
}

// Refused is the event of a request for a snapshot that has failed before there
// was a backup, or for which there is none.
func Refused(o Object, why error, now time.Time) Event {
	at := now.Truncate(troublePeriod)
	return Event{Object: o, Reason: SnapshotRefused, Text: line.One(why.Error(), ""), Count: 1, First: at, Last: at}
}

// told is an error that events of its backup tell of.
type told struct{ error }

func (t told) Unwrap() error { return t.error }

// Told says whether there are events that tell of an error.
func Told(err error) bool { return errors.As(err, new(told)) }

// tell tells of all that a job has come to. It may be repeated, by others too.
func (e *Engine) tell(ctx context.Context, st *Status) {
	if e.Recorder == nil {
		return
	}
	now := e.Now()
	for _, event := range events(st, now) {
		if now.Sub(event.Last) < eventAge {
			e.Recorder.Record(ctx, event)
		}
	}
}

// events are those that tell what a job has come to. They are made of nothing but
// its record, so that whoever looks at it makes the same.
func events(st *Status, now time.Time) []Event {
	task, about := st.Job.Task, st.Job.About
	if len(about) == 0 {
		about = []Object{{}}
	}
	prefix, what, where := "Backup", "", fmt.Sprintf("repository %q", task.Repository)
	if b := task.Backup; b != nil {
		what = fmt.Sprintf("backup of %s to %s", b.Host, where)
	} else {
		prefix, what = "Restore", fmt.Sprintf("restore of backup %s from %s", task.Restore.Backup, where)
	}
	var all []Event
	add := func(o Object, reason string, text string, count int, first, last time.Time) {
		if last.IsZero() {
			last = now
		}
		all = append(all, Event{Object: o, Reason: EventReason(prefix + reason), Subject: task.ID, Text: line.One(text, ""),
			Count: count, First: first, Last: last})
	}
	// Whoever looks at the source of a backup has not asked for it: they are told the end.
	end := func(reason, text string) {
		for i, o := range about {
			text := text
			if i > 0 {
				text = about[0].String() + ": " + text
			}
			add(o, reason, text, 1, cmp.Or(st.Ended, now), st.Ended)
		}
	}
	delayed := func(text string, last time.Time) {
		add(about[0], "Delayed", fmt.Sprintf("attempt %d: %s", st.Job.Attempt, text), st.Job.Attempt, st.Started, last)
	}
	if st.Job.Attempt == 1 {
		add(about[0], "Started", what, 1, st.Started, st.Started)
	}
	switch trouble := cmp.Or(st.Trouble, st.Progress.Trouble); {
	case st.Phase == Succeeded:
		end(finished(st, what))
	case st.Phase == Failed && st.Result.Reason == mover.ReasonDeleted: // as somebody wanted
	case st.Phase == Failed && st.final():
		end("Failed", what+": "+st.Result.Error)
	case st.Phase == Failed:
		delayed(st.Result.Error, st.Ended)
	case trouble != "":
		delayed(trouble, now.Truncate(troublePeriod))
	case st.Phase == Running && st.Progress.BytesTotal > 0:
		if n := int(now.Sub(st.Started) / progressPeriod); n > 0 {
			add(about[0], "Progress", st.Progressed(), n, st.Started.Add(progressPeriod), st.Started.Add(time.Duration(n)*progressPeriod))
		}
	}
	return all
}

// final says that a job that has failed is not tried again by itself.
func (st *Status) final() bool {
	return st.Result.Reason.Lasting() || st.Job.Task.Restore != nil && st.Result.Reason == mover.ReasonNoSpace
}

// finished says how well a job has ended.
func finished(st *Status, what string) (reason, text string) {
	took := ""
	if d := st.Ended.Sub(st.Started); d > 0 && !st.Started.IsZero() {
		took = ", in " + d.Round(time.Second).String()
	}
	if r := st.Result.Restore; r != nil {
		return "Finished", fmt.Sprintf("%s: %d files and directories, %s%s", what, r.TotalFiles, Bytes(r.TotalBytes), took)
	}
	s := st.Result.Backup
	if s == nil {
		return "Finished", what + took
	}
	text = fmt.Sprintf("%s: %d files with %s, of which %d were new or changed and have been read; the repository has grown by %s%s",
		what, s.TotalFiles, Bytes(s.TotalBytes), s.FilesNew+s.FilesChanged, Bytes(s.DataAddedPacked), took)
	if st.Result.Partial {
		text += ". It lacks what could not be read"
		if lacks := st.Result.Incomplete; len(lacks) > 0 {
			text += ": " + strings.Join(lacks, ", ")
		}
		return "Incomplete", text
	}
	return "Finished", text
}

// Progressed says for people how far a job is, and what it has trouble with.
func (st *Status) Progressed() string {
	p := st.Progress
	if st.Trouble != "" {
		return st.Trouble
	}
	text := "0 %"
	if p.BytesTotal != 0 {
		text = fmt.Sprintf("%d %% (%d of %d bytes, %d of %d files)",
			p.Percent(), p.BytesDone, p.BytesTotal, p.FilesDone, p.FilesTotal)
	}
	if p.Trouble != "" {
		text += ", but " + p.Trouble
	}
	return text
}

// Bytes is a size for people, in binary units.
func Bytes(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n), ""
	for _, unit = range []string{"KiB", "MiB", "GiB", "TiB"} {
		if value /= 1 << 10; value < 999.95 {
			break
		}
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}
