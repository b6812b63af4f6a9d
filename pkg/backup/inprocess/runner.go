// Package inprocess runs movers as child processes of the controller, on the
// machine that holds the shares.
//
// A mover outlives the controller that started it, in a session and a mount
// namespace of its own, so nothing that it mounts can be left behind. It holds
// a lock on a file of its record from before it starts until it and its restic
// are gone; whoever sees the lock free knows that nobody works on the job.
//
// A record is a directory <id> with
//
//	job.json       the job, written before the mover starts
//	lock           held while the mover lives
//	mover.json     the mover's process, for Stop
//	progress.json  written by the mover about once a second
//	result.json    how it ended; the last thing that it writes
package inprocess

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/record"
)

const (
	// stopGrace is how long a mover may take to end restic and itself before it
	// is killed.
	stopGrace = 25 * time.Second
	pollEvery = 50 * time.Millisecond
)

// Runner keeps its records below Dir.
type Runner struct {
	Dir          string
	Repositories backup.Directory
	// Command starts a mover: the program and its first arguments, to which the
	// flags of Args are added.
	Command []string
	// Keys is where the access keys of shares are; empty for nowhere.
	Keys string
	Now  func() time.Time
}

var jobID = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

// process identifies a mover beyond the reuse of its pid.
type process struct {
	PID     int    `json:"pid"`
	Started string `json:"started"` // field 22 of /proc/<pid>/stat
}

// outcome is what result.json holds.
type outcome struct {
	Result mover.Result `json:"result"`
	Ended  time.Time    `json:"ended"`
}

// recorded is what job.json holds.
type recorded struct {
	Job     backup.Job `json:"job"`
	Started time.Time  `json:"started"`
}

func (r *Runner) path(id string, file ...string) string {
	return filepath.Join(append([]string{r.Dir, id}, file...)...)
}

// Start implements [backup.Runner].
func (r *Runner) Start(ctx context.Context, job backup.Job, may func(context.Context) error) error {
	id := job.Task.ID
	if !jobID.MatchString(id) {
		return fmt.Errorf("task id %q: %w", id, backend.ErrInvalid)
	}
	folder, err := r.Repositories.Folder(ctx, job.Task.Repository)
	if err != nil {
		return err
	}
	lock, err := r.newLock(id)
	if err != nil {
		return err
	}
	if lock == nil {
		return nil // it runs, or somebody has just looked; then the next call starts it
	}
	defer lock.Close()
	if err := may(ctx); err != nil {
		if _, unknown := os.Stat(r.path(id, "job.json")); errors.Is(unknown, fs.ErrNotExist) {
			err = errors.Join(err, r.drop(id))
		}
		return err
	}
	// Under the lock: a result that another controller's mover has left since
	// the caller looked would be overwritten, and its work done twice.
	if done, err := r.result(id); err == nil && done.Result.Error == "" {
		return nil
	}
	if err := os.Remove(r.path(id, "result.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("record of mover %s: %w", id, err)
	}
	if err := record.Write(r.path(id, "job.json"), recorded{Job: job, Started: r.Now()}, true); err != nil {
		return fmt.Errorf("record of mover %s: %w", id, err)
	}
	return r.spawn(ctx, id, folder, lock)
}

// newLock takes the lock of a record, which it makes if there is none.
func (r *Runner) newLock(id string) (*os.File, error) {
	for {
		if err := os.MkdirAll(r.path(id), 0o700); err != nil {
			return nil, fmt.Errorf("record of mover %s: %w", id, err)
		}
		lock, err := r.tryLock(id)
		if !errors.Is(err, fs.ErrNotExist) { // removed in between
			return lock, err
		}
	}
}

// spawn starts a mover that inherits the lock.
func (r *Runner) spawn(ctx context.Context, id, folder string, lock *os.File) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	args := append(r.Command[1:len(r.Command):len(r.Command)], Args{
		Record: r.path(id), Repository: folder, Restic: r.Repositories.Program,
		Cache: r.Repositories.CacheDir, Seen: r.Repositories.SeenDir, Keys: r.Keys,
	}.flags()...)
	cmd := exec.Command(r.Command[0], args...) // not CommandContext: it outlives the request
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, os.Stderr
	cmd.ExtraFiles = []*os.File{lock} // becomes lockFD
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,                // not ended by the terminal's Ctrl-C
		Cloneflags: syscall.CLONE_NEWNS, // what it mounts goes with it
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start mover %s: %w", id, err)
	}
	log := klog.FromContext(ctx)
	go func() {
		// Reaped here; what it has to say is in its record.
		if err := cmd.Wait(); err != nil {
			log.Info("Mover ended", "task", id, "reason", err.Error())
		}
	}()
	return nil
}

// Status implements [backup.Runner].
func (r *Runner) Status(_ context.Context, id string) (*backup.Status, error) {
	if !jobID.MatchString(id) {
		return nil, fmt.Errorf("mover %q: %w", id, backend.ErrNotFound)
	}
	for {
		var rec recorded
		if err := record.Read(r.path(id, "job.json"), &rec); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("mover %s: %w", id, backend.ErrNotFound)
		} else if err != nil {
			return nil, fmt.Errorf("record of mover %s: %w", id, err)
		}
		st := &backup.Status{Job: rec.Job, Started: rec.Started, Phase: backup.Interrupted}
		_ = record.Read(r.path(id, "progress.json"), &st.Progress) // there is none at first
		held, err := r.held(id)
		if err != nil {
			return nil, err
		}
		if held {
			st.Phase = backup.Running
			return st, nil
		}
		done, err := r.result(id)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, fmt.Errorf("record of mover %s: %w", id, err)
		default:
			st.Result, st.Ended, st.Phase = done.Result, done.Ended, backup.Succeeded
			if done.Result.Error != "" {
				st.Phase = backup.Failed
			}
			return st, nil
		}
		// No lock and no result: interrupted, unless a mover has been started or
		// has ended between the two looks.
		var again recorded
		if err := record.Read(r.path(id, "job.json"), &again); err != nil || !again.Started.Equal(rec.Started) {
			continue
		}
		if held, err := r.held(id); err != nil {
			return nil, err
		} else if held {
			continue
		}
		if _, err := r.result(id); err == nil {
			continue
		}
		return st, nil
	}
}

func (r *Runner) result(id string) (outcome, error) {
	var o outcome
	err := record.Read(r.path(id, "result.json"), &o)
	return o, err
}

// Jobs implements [backup.Runner].
func (r *Runner) Jobs(ctx context.Context) ([]*backup.Status, error) {
	entries, err := os.ReadDir(r.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list movers: %w", err)
	}
	var out []*backup.Status
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), removedPrefix) {
			// Somebody was killed in the middle of a removal.
			if err := os.RemoveAll(r.path(e.Name())); err != nil {
				return nil, fmt.Errorf("list movers: %w", err)
			}
			continue
		}
		st, err := r.Status(ctx, e.Name())
		if errors.Is(err, backend.ErrNotFound) {
			continue // removed in between, or on its way in or out
		}
		if err != nil {
			return nil, err
		}
		out = append(out, st)
	}
	return out, nil
}

// Stop implements [backup.Runner].
func (r *Runner) Stop(ctx context.Context, id string) error {
	lock, err := r.stop(ctx, id)
	if err != nil || lock == nil {
		return err
	}
	defer lock.Close()
	deleted := outcome{Result: mover.Deleted, Ended: r.Now()}
	if err := record.Write(r.path(id, "result.json"), deleted, true); err != nil {
		return fmt.Errorf("record of mover %s: %w", id, err)
	}
	return nil
}

// Release implements [backup.Runner]: what a mover has mounted goes with it.
func (r *Runner) Release(context.Context, string) error { return nil }

// Remove implements [backup.Runner].
func (r *Runner) Remove(ctx context.Context, id string) error {
	lock, err := r.stop(ctx, id)
	if err != nil || lock == nil {
		return err
	}
	defer lock.Close()
	return r.drop(id)
}

const removedPrefix = ".removed-"

// drop removes a record whose lock is held.
func (r *Runner) drop(id string) error {
	// Renamed first, so that a record is there or not and never in part.
	trash := r.path(removedPrefix + id)
	err := os.RemoveAll(trash)
	if err == nil {
		err = os.Rename(r.path(id), trash)
	}
	if err == nil {
		err = os.RemoveAll(trash)
	}
	if err != nil {
		return fmt.Errorf("remove record of mover %s: %w", id, err)
	}
	return record.SyncDir(r.Dir)
}

// stop ends the mover and returns its lock; nil when there is no record.
func (r *Runner) stop(ctx context.Context, id string) (*os.File, error) {
	if !jobID.MatchString(id) {
		return nil, nil
	}
	deadline := r.Now().Add(stopGrace)
	asked, killed := 0, 0 // pids that were told to end
	for {
		lock, err := r.tryLock(id)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil || lock != nil {
			return lock, err
		}
		// The lock is held, so a mover or its restic lives; the process is only
		// touched when it is the one that was started.
		var p process
		if err := record.Read(r.path(id, "mover.json"), &p); err == nil && p.Started != "" && startTime(p.PID) == p.Started {
			switch late := r.Now().After(deadline); {
			case late && killed != p.PID:
				killed = p.PID
				_ = unix.Kill(-p.PID, unix.SIGKILL) // its restic goes with it
			case !late && asked != p.PID:
				asked = p.PID
				_ = unix.Kill(p.PID, unix.SIGTERM)
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("mover %s has been told to stop: %w", id, backend.ErrPending)
		case <-time.After(pollEvery):
		}
	}
}

// tryLock takes the lock of a record. It returns nil when a mover holds it, and
// fs.ErrNotExist when there is no record.
func (r *Runner) tryLock(id string) (*os.File, error) {
	for {
		f, err := os.OpenFile(r.path(id, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, nil
			}
			return nil, fmt.Errorf("lock of mover %s: %w", id, err)
		}
		// A record that was removed meanwhile took its lock file along.
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if now, err := os.Stat(r.path(id, "lock")); err == nil && os.SameFile(mine, now) {
			return f, nil
		}
		f.Close()
	}
}

// held says whether a mover holds the lock, without taking it for longer than
// the look: F_OFD_GETLK does not see flock(2), so a shared lock is tried.
func (r *Runner) held(id string) (bool, error) {
	f, err := os.Open(r.path(id, "lock"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// startTime is when a process was started, in the kernel's own units; empty
// when there is no such process.
func startTime(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The name in parentheses may hold anything; fields are counted behind it.
	_, rest, _ := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[19]
}

var _ backup.Runner = (*Runner)(nil)
