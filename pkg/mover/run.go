package mover

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/restic"
)

const (
	dataName        = "data"
	descriptionName = "volume.json"
)

// DefaultLockWait is how long a mover waits for a live lock of the repository:
// longer than maintenance takes, which is what waits for it to end.
const DefaultLockWait = 24 * time.Hour

// Env is what a mover works with.
type Env struct {
	// Dir is where the volume is; empty for [Dir].
	Dir    string
	Restic restic.Client
	Mounts mount.Interface
	// Report is told how far restic is; nil for nobody. It must not block.
	Report func(restic.Progress)
	Log    logr.Logger
	// InitLock keeps two movers from making one repository at once, which on an
	// object store would end with two configurations; nil when nobody else can.
	InitLock func(ctx context.Context) (release func(), err error)
	// LockWait is how long to wait for a live lock; 0 is DefaultLockWait.
	LockWait time.Duration
	// Now is the clock by which maintenance holds new backups back; nil when nobody
	// maintains the repository.
	Now func() time.Time
}

// Run does the task, and says how it ended. It may be killed at any point and
// called again with the same task and Recover.
//
// After a successful backup exactly one restic snapshot bears the tag of the
// backup. After a lasting failure there may be one of an earlier run, if the
// failure came before the repository was reached.
func Run(ctx context.Context, task Task, env Env) Result {
	m := &mover{Env: env, task: task}
	m.Dir, m.LockWait = cmp.Or(m.Dir, Dir), cmp.Or(m.LockWait, DefaultLockWait)
	err := task.validate()
	switch {
	case err != nil:
		err = &failure{ReasonConfig, err}
	case task.Backup != nil:
		err = m.backup(ctx, task.Backup)
	default:
		err = m.restore(ctx, task.Restore)
	}
	if err == nil {
		return m.result
	}
	return Result{Error: err.Error(), Reason: m.reason(ctx, err)}
}

// Throttled reports at most once in a time, at the earliest at a first one: restic
// says twice a second how far it is. Trouble is reported at once if the last report
// had none.
func Throttled(clock func() time.Time, first time.Time, every time.Duration, report func(restic.Progress)) func(restic.Progress) {
	var mu sync.Mutex
	next, troubled := first, false
	return func(p restic.Progress) {
		mu.Lock()
		defer mu.Unlock()
		trouble := p.Trouble != ""
		if now := clock(); !now.Before(next) || trouble && !troubled {
			next, troubled = now.Add(every), trouble
			report(p)
		}
	}
}

type mover struct {
	Env
	task   Task
	result Result
}

// failure is an error whose reason is known where it is made.
type failure struct {
	reason Reason
	error
}

func (f *failure) Unwrap() error { return f.error }

func fail(reason Reason, format string, args ...any) error {
	return &failure{reason, fmt.Errorf(format, args...)}
}

// reasons are the errors of restic that mean the same to every task.
var reasons = []struct {
	is     error
	reason Reason
}{
	{restic.ErrWrongPassword, ReasonPassword},
	{restic.ErrLocked, ReasonLocked},
	{restic.ErrConfig, ReasonConfig},
	{restic.ErrVersion, ReasonConfig},
}

func (m *mover) reason(ctx context.Context, err error) Reason {
	var known *failure
	if errors.As(err, &known) {
		return known.reason
	}
	if ctx.Err() != nil {
		return ReasonStopped
	}
	var said *restic.Error
	if errors.As(err, &said) && said.NoSpace() {
		return ReasonNoSpace
	}
	for _, r := range reasons {
		if errors.Is(err, r.is) {
			return r.reason
		}
	}
	// A backup makes the repository, so one that is gone vanished meanwhile.
	if errors.Is(err, restic.ErrNoRepository) && m.task.Restore != nil {
		return ReasonNotFound
	}
	return ReasonRepository
}

var (
	validID = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
	// Restic separates tags by commas.
	validTag = regexp.MustCompile(`^[^,\s]+$`)
)

func (t *Task) validate() error {
	if !validID.MatchString(t.ID) {
		return fmt.Errorf("task id %q is not 1 to 63 bytes of [a-z0-9-]", t.ID)
	}
	if (t.Backup == nil) == (t.Restore == nil) {
		return errors.New("a task is either a backup or a restore")
	}
	if t.Restore != nil {
		if !validTag.MatchString(t.Restore.Backup) {
			return fmt.Errorf("backup id %q is empty or holds a comma or white space", t.Restore.Backup)
		}
		return nil
	}
	b := t.Backup
	for name, value := range map[string]string{"backup id": b.Backup, "volume handle": b.Volume, "host": b.Host} {
		if !validTag.MatchString(value) {
			return fmt.Errorf("%s %q is empty or holds a comma or white space", name, value)
		}
	}
	if err := CheckExclude(b.Exclude); err != nil {
		return err
	}
	if b.Time.IsZero() || b.Size < 0 || !json.Valid(b.Description) {
		return errors.New("a backup needs a time, a size of 0 or more, and a description in JSON")
	}
	return nil
}

// backup makes one restic snapshot of Dir.
func (m *mover) backup(ctx context.Context, b *Backup) error {
	if err := m.prove(ctx, true); err != nil {
		return err
	}
	if err := m.describe(b); err != nil {
		return err
	}
	if m.task.Recover {
		if err := m.recover(ctx); err != nil {
			return err
		}
	}
	// A new task has no snapshot yet, unless two controllers began it at once. So
	// it need not wait for the answer, which costs as much as the walk of a small
	// volume: restic derives its key anew in each call.
	listed := m.earlier(ctx, b)
	parent := b.Parent
	if parent == nil {
		if err := m.held(ctx); err != nil {
			return err
		}
		found, err := listed()
		if err != nil {
			return err
		}
		if found.done != "" {
			m.result.Snapshot = found.done
			return nil
		}
		if err := m.forget(ctx, found.doubtful...); err != nil {
			return err
		}
		parent = found.parent
	}
	if err := m.notEmptied(b, parent); err != nil {
		return err
	}
	var summary *restic.BackupSummary
	err := m.locked(ctx, func(wait time.Duration) (err error) {
		summary, err = m.Restic.Backup(ctx, restic.BackupRequest{
			Dir:     m.Dir,
			Targets: []string{dataName, descriptionName},
			Host:    b.Host,
			Tags: []string{
				TagBackup + b.Backup, TagVolume + b.Volume, TagName + url.QueryEscape(b.Name), fmt.Sprint(TagSize, b.Size),
			},
			Time:        b.Time,
			Parent:      parent.Snapshot,
			Exclude:     anchored(filepath.Join(m.Dir, dataName), b.Exclude),
			IgnoreInode: m.task.Source.Renumbers(),
			RetryLock:   wait,
		}, m.Report)
		return err
	})
	if b.Parent != nil {
		found, gone := listed()
		if summary == nil && ctx.Err() == nil && (gone != nil || found.parent.Snapshot != parent.Snapshot) {
			// There is no repository yet, or the parent has been deleted.
			look := *b
			look.Parent = nil
			return m.backup(ctx, &look)
		}
		if gone != nil && summary != nil {
			return errors.Join(gone, m.forget(ctx, summary.SnapshotID))
		}
		if found.done != "" && summary != nil {
			m.result.Snapshot = found.done
			return m.forget(ctx, summary.SnapshotID)
		}
		if summary != nil && found.parent.Snapshot != parent.Snapshot {
			// There was a newer one than it was told of.
			if err := m.notEmptied(b, found.parent); err != nil {
				return errors.Join(err, m.forget(ctx, summary.SnapshotID))
			}
		}
		if summary != nil { // which may be in the list already
			others := slices.DeleteFunc(found.doubtful, func(id string) bool { return id == summary.SnapshotID })
			if err := m.forget(ctx, others...); err != nil {
				return err
			}
		}
	}
	if summary != nil {
		// What was read must have been there to the end: a snapshot that is
		// removed under its mount reads as an empty directory.
		if err := m.prove(ctx, true); err != nil {
			return errors.Join(err, m.forget(ctx, summary.SnapshotID))
		}
	}
	if errors.Is(err, restic.ErrIncomplete) && summary != nil {
		if !b.AllowPartial {
			// Unless it is gone for sure, this task has not ended: the next run
			// of it starts with forgetting it.
			if err := m.forget(ctx, summary.SnapshotID); err != nil {
				return err
			}
			return fail(ReasonIncomplete, "%w; see to the files, or accept partial backups (allowPartial: \"true\" in the class)", err)
		}
		m.Log.Info("Backup lacks files", "snapshot", summary.SnapshotID, "reason", err.Error())
		m.result.Partial = true
		var said *restic.Error
		if errors.As(err, &said) {
			m.result.Incomplete = said.Paths
		}
		err = m.mark(ctx, b)
	}
	if err != nil {
		return err
	}
	m.result.Snapshot, m.result.Backup = summary.SnapshotID, summary
	// Restic makes the directories that it misses, so it does not notice that a
	// repository's file system has been unmounted meanwhile.
	if err := m.Restic.Holds(ctx, summary.SnapshotID); err != nil {
		return fmt.Errorf("look for snapshot %s after the backup: %w", summary.SnapshotID, err)
	}
	return nil
}

// mark says in the repository that a backup lacks files.
func (m *mover) mark(ctx context.Context, b *Backup) error {
	return m.locked(ctx, func(wait time.Duration) error {
		_, err := m.Restic.Backup(ctx, restic.BackupRequest{Dir: m.Dir, Targets: []string{descriptionName}, Host: b.Host,
			Tags: []string{TagVolume + b.Volume, TagPartial + b.Backup}, Time: b.Time, RetryLock: wait}, nil)
		return err
	})
}

// earlier is what the repository holds of a volume.
type earlier struct {
	// done is a snapshot of this very backup that another controller has made of
	// another cut: it succeeded, or its record would have kept this task from
	// beginning.
	done string
	// doubtful are the snapshots of this backup and this cut, and their marks. They
	// are from a run that died before it could say how it ended: files may be missing
	// from them, and nothing in them tells. Their packs stay when they are forgotten,
	// so what they had is read again and not uploaded again.
	doubtful []string
	parent   *Parent // the newest of the others
}

// earlier begins to list the restic snapshots of the volume. The function that
// it returns waits for them.
func (m *mover) earlier(ctx context.Context, b *Backup) func() (earlier, error) {
	type answer struct {
		snapshots []restic.Snapshot
		err       error
	}
	came := make(chan answer, 1)
	go func() {
		var a answer
		a.snapshots, a.err = m.snapshots(ctx, b)
		came <- a
	}()
	return func() (earlier, error) {
		a := <-came
		found := earlier{parent: &Parent{}}
		for _, s := range a.snapshots { // oldest first
			partial := slices.ContainsFunc(s.Tags, func(tag string) bool { return strings.HasPrefix(tag, TagPartial) })
			switch own := s.Time.Equal(b.Time.Truncate(time.Second)); {
			case partial && own && slices.Contains(s.Tags, TagPartial+b.Backup):
				found.doubtful = append(found.doubtful, s.ID)
			case partial:
			case !slices.Contains(s.Tags, TagBackup+b.Backup):
				found.parent = &Parent{Snapshot: s.ID, Time: s.Time}
				if s.Summary != nil {
					found.parent.Files = s.Summary.TotalFiles
				}
			case own:
				found.doubtful = append(found.doubtful, s.ID)
			default:
				found.done = s.ID
			}
		}
		return found, a.err
	}
}

// restore fills Dir/data from the restic snapshot of a backup.
func (m *mover) restore(ctx context.Context, r *Restore) error {
	if err := m.prove(ctx, false); err != nil {
		return err
	}
	if m.task.Recover {
		if err := m.Restic.Unlock(ctx); err != nil {
			return err
		}
	}
	snapshots, err := m.Restic.Snapshots(ctx, TagBackup+r.Backup)
	if len(snapshots) == 0 && err != nil {
		return err
	}
	if len(snapshots) == 0 {
		return fail(ReasonNotFound, "the repository has no backup %q", r.Backup)
	}
	snapshot := snapshots[len(snapshots)-1]
	if !slices.ContainsFunc(snapshot.Paths, func(p string) bool { return filepath.Base(p) == dataName }) {
		return fail(ReasonNotFound, "restic snapshot %s bears the tag of backup %q, but somebody else has made it: it has no %q at its top",
			snapshot.ID, r.Backup, dataName)
	}
	var summary *restic.RestoreSummary
	err = m.locked(ctx, func(wait time.Duration) (err error) {
		summary, err = m.Restic.Restore(ctx, restic.RestoreRequest{SnapshotID: snapshot.ID, Dir: m.Dir, RetryLock: wait}, m.Report)
		return err
	})
	var said *restic.Error
	if errors.As(err, &said) && said.NoSpace() {
		return fail(ReasonNoSpace, "%w: the volume is too small for this backup", err)
	}
	if err != nil {
		return err
	}
	// Restic has verified what it has written. That it has written everything is
	// checked here, by two counts that it made independently.
	restored := summary.FilesRestored + summary.FilesSkipped
	if summary.FilesRestored < summary.TotalFiles {
		return fmt.Errorf("restored %d of %d entries only", summary.FilesRestored, summary.TotalFiles)
	}
	if s := snapshot.Summary; s != nil && restored < s.TotalFiles+s.TotalDirs {
		return fmt.Errorf("restored %d entries, and the backup has at least %d", restored, s.TotalFiles+s.TotalDirs)
	}
	// restic leaves it to the kernel when what it wrote reaches the disk.
	if err := syncFS(filepath.Join(m.Dir, dataName)); err != nil {
		return fmt.Errorf("sync the volume: %w", err)
	}
	m.result.Snapshot, m.result.Restore = snapshot.ID, summary
	return nil
}

func syncFS(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

// prove makes sure that Dir/data is what the task means. Nothing else happens
// before it.
func (m *mover) prove(ctx context.Context, readOnly bool) error {
	err := m.Mounts.Prove(ctx, filepath.Join(m.Dir, dataName), m.task.Source, readOnly)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, mount.ErrNotMounted), errors.Is(err, mount.ErrOther), errors.Is(err, mount.ErrWritable), errors.Is(err, mount.ErrInvalid):
		return fail(ReasonSource, "source of task %s: %w", m.task.ID, err)
	}
	// A server that does not answer now may do so later.
	return fmt.Errorf("source of task %s: %w", m.task.ID, err)
}

// describe writes volume.json. Its mode and time depend on the task alone, so
// that a repeated run writes the same.
func (m *mover) describe(b *Backup) error {
	var text bytes.Buffer
	if err := json.Indent(&text, b.Description, "", "  "); err != nil {
		return fmt.Errorf("write description: %w", err)
	}
	text.WriteByte('\n')
	path := filepath.Join(m.Dir, descriptionName)
	err := os.WriteFile(path, text.Bytes(), 0o644)
	if err == nil {
		err = os.Chmod(path, 0o644) // whatever the umask
	}
	if err == nil {
		err = os.Chtimes(path, b.Time, b.Time)
	}
	if err != nil {
		return fmt.Errorf("write description: %w", err)
	}
	return nil
}

// recover tidies up after a mover that was killed. Its packs are in the
// repository and in no index, so without a repair they would be uploaded again.
// The repair needs the repository to itself, and is not worth waiting for.
func (m *mover) recover(ctx context.Context) error {
	err := m.Restic.Unlock(ctx)
	if err == nil {
		err = m.Restic.RepairIndex(ctx)
	}
	switch {
	case errors.Is(err, restic.ErrNoRepository):
		return nil // it died before it made one
	case errors.Is(err, restic.ErrLocked):
		m.Log.Info("Index is not repaired, as the repository is in use", "reason", err.Error())
		return nil
	}
	return err
}

// snapshots returns the restic snapshots of the volume, oldest first. It makes
// the repository when there is none, unless a backup has begun beside it.
func (m *mover) snapshots(ctx context.Context, b *Backup) ([]restic.Snapshot, error) {
	snapshots, err := m.Restic.Snapshots(ctx, TagVolume+b.Volume)
	if errors.Is(err, restic.ErrNoRepository) && m.task.Made {
		return nil, fmt.Errorf("%w, and was there before; is its disk mounted?", err)
	}
	if errors.Is(err, restic.ErrNoRepository) && b.Parent == nil {
		made := m.init(ctx)
		// Another mover may have been faster, so what counts is what is there.
		snapshots, err = m.Restic.Snapshots(ctx, TagVolume+b.Volume)
		if errors.Is(err, restic.ErrNoRepository) {
			err = cmp.Or(made, err)
		}
	}
	if errors.Is(err, restic.ErrIncomplete) {
		// One damaged snapshot must not end the backups of all volumes. It can
		// be no parent, and nobody can take it for this backup.
		m.Log.Info("Repository holds unreadable snapshots", "repository", m.task.Repository, "reason", err.Error())
		err = nil
	}
	return snapshots, err
}

// init makes the repository.
func (m *mover) init(ctx context.Context) error {
	if m.InitLock != nil {
		release, err := m.InitLock(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	m.Log.Info("Making the repository", "repository", m.task.Repository)
	return m.Restic.Init(ctx)
}

// notEmptied returns ReasonEmpty for a volume that has nothing but directories though
// its last backup had files besides the description: it is rather a mistake of
// the storage system, or of a person, than a volume worth a backup.
func (m *mover) notEmptied(b *Backup, parent *Parent) error {
	if b.AllowEmpty || parent.Files <= 1 {
		return nil
	}
	anything := errors.New("there is something")
	err := filepath.WalkDir(filepath.Join(m.Dir, dataName), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			return anything
		}
		return err
	})
	if errors.Is(err, anything) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read volume: %w", err)
	}
	return fail(ReasonEmpty, "the volume is empty, and its last backup (%s) has %d files; if this is meant, accept empty backups (allowEmpty: \"true\" in the class)",
		parent.Time.UTC().Format(time.RFC3339), parent.Files-1)
}

// forget removes snapshots.
func (m *mover) forget(ctx context.Context, ids ...string) error {
	if len(ids) == 0 {
		return nil
	}
	return m.locked(ctx, func(wait time.Duration) error { return m.Restic.Forget(ctx, wait, ids...) })
}

// holdPause is how long a mover waits before it asks again whether it is held.
const holdPause = 15 * time.Second

// held waits while maintenance holds new backups back, so that those that run
// can end and it has its turn.
func (m *mover) held(ctx context.Context) error {
	for said := false; m.Now != nil; said = true {
		snapshots, err := m.Restic.Snapshots(ctx, TagMaintenance)
		if err != nil && !errors.Is(err, restic.ErrIncomplete) && !errors.Is(err, restic.ErrNoRepository) {
			return err
		}
		until := Held(snapshots, m.Now())
		if until.IsZero() {
			return nil
		}
		if !said {
			m.Log.Info("Backup waits for maintenance of the repository", "repository", m.task.Repository, "until", until)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(holdPause, until.Sub(m.Now()))):
		}
	}
	return nil
}

// locked calls do until the repository is not locked, for as long as LockWait.
func (m *mover) locked(ctx context.Context, do func(wait time.Duration) error) error {
	return restic.AwaitLock(ctx, m.Restic, m.LockWait, func(err error) {
		m.Log.Info("Repository is locked", "repository", m.task.Repository, "reason", err.Error())
	}, do)
}
