package inprocess

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/record"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// lockFD is where a mover finds the lock of its record, held by the open file
// that it inherited.
const lockFD = 3

// progressEvery is how often a mover writes down how far it is.
const progressEvery = time.Second

// Args is what a mover is told on its command line: paths, never a secret.
type Args struct {
	Record     string // the directory of its record
	Repository string // the folder of its repository
	Restic     string // the restic program
	Cache      string // restic's cache
	Seen       string // where it is remembered which repositories were there
	Keys       string // where the access keys of shares are, or empty
}

func (a Args) flags() []string {
	return []string{"--record", a.Record, "--repository", a.Repository, "--restic", a.Restic, "--cache", a.Cache, "--seen", a.Seen, "--keys", a.Keys}
}

// Move is the body of a mover process: it mounts the job's source where nobody
// else sees it, carries the bytes, and writes down how that ended. The error is
// of the record only; a job that failed is a result.
func Move(ctx context.Context, a Args, mounts *mount.Mounter, now func() time.Time) error {
	lock := os.NewFile(lockFD, "lock")
	if lock == nil {
		return errors.New("a mover is started by its runner, which hands it the lock of its record")
	}
	var rec recorded
	if err := record.Read(filepath.Join(a.Record, "job.json"), &rec); err != nil {
		return err
	}
	if err := record.Write(filepath.Join(a.Record, "mover.json"), process{PID: os.Getpid(), Started: startTime(os.Getpid())}, false); err != nil {
		return err
	}
	result := move(ctx, a, mounts, rec.Job, lock, now)
	defer runtime.KeepAlive(lock) // a finalizer would free it
	return record.Write(filepath.Join(a.Record, "result.json"), outcome{Result: result, Ended: now()}, true)
}

func move(ctx context.Context, a Args, mounts *mount.Mounter, job backup.Job, lock *os.File, now func() time.Time) mover.Result {
	task := job.Task
	repo, err := backup.OpenFolder(a.Repository, restic.Config{
		Program: a.Restic, CacheDir: a.Cache, SeenDir: a.Seen, ExtraFiles: []*os.File{lock}})
	if err != nil {
		return mover.Result{Error: err.Error(), Reason: mover.ReasonConfig}
	}
	if err := place(ctx, mounts, task); err != nil {
		return mover.Result{Error: err.Error(), Reason: placing(ctx, err)}
	}
	return mover.Run(ctx, task, mover.Env{
		Dir: mover.Dir, Restic: repo, Mounts: mounts, Log: klog.FromContext(ctx),
		Report: mover.Throttled(now, time.Time{}, progressEvery, func(p restic.Progress) {
			// Only shown: a progress that cannot be written must not end the backup.
			_ = record.Write(filepath.Join(a.Record, "progress.json"), p, false)
		}), Now: now,
		InitLock: func(ctx context.Context) (func(), error) {
			return lockFile(ctx, filepath.Join(filepath.Dir(a.Record), ".init-"+task.Repository))
		},
	})
}

// placing says why a source could not be put in its place.
func placing(ctx context.Context, err error) mover.Reason {
	switch {
	case ctx.Err() != nil:
		return mover.ReasonStopped
	case errors.Is(err, mount.ErrNoSource), errors.Is(err, mount.ErrInvalid), errors.Is(err, mount.ErrOther), errors.Is(err, mount.ErrWritable):
		return mover.ReasonSource
	}
	return mover.ReasonRepository // may pass
}

// place makes mover.Dir with the job's source in it. The mover is in a mount
// namespace of its own, so all of it goes when the mover does, however it ends.
func place(ctx context.Context, mounts *mount.Mounter, task mover.Task) error {
	// Slave: what the node unmounts is not kept busy from here, and nothing
	// that is mounted here is seen outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("leave the node's mount namespace: %w", err)
	}
	if err := os.MkdirAll(mover.Dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", mover.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=16m,mode=0755"); err != nil {
		return fmt.Errorf("mount a tmpfs at %s: %w", mover.Dir, err)
	}
	return mounts.Mount(ctx, task.Source, filepath.Join(mover.Dir, "data"), task.Backup != nil, nil)
}

// lockFile waits for an exclusive lock on a file.
func lockFile(ctx context.Context, path string) (release func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(pollEvery):
		}
	}
}
