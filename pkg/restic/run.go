package restic

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// grace is how long restic may take to end after it was asked to: it finishes
// an upload and removes its lock.
const grace = 20 * time.Second

// A listing that has complained insistence times is given up patience after the
// first: its server is not there, and restic would go on for a quarter of an
// hour.
const (
	patience   = 15 * time.Second
	insistence = 3
)

// run runs one restic command in dir and gives each line of its standard output
// to line. Every other way to start restic is wrong: this one passes exactly
// the environment that it should, keeps restic from outliving us, and keeps
// secrets out of errors.
//
// What restic said on its standard error is returned in any case: several
// commands say there what went wrong and end with code 0.
func (r *Repository) run(ctx context.Context, dir string, line func([]byte), args ...string) (*complaints, error) {
	return r.listen(ctx, dir, line, func(string) {}, args...)
}

// listen is run, and gives what restic complains of to complaint at once, as
// another goroutine than line's.
func (r *Repository) listen(ctx context.Context, dir string, line func([]byte), complaint func(string), args ...string) (*complaints, error) {
	said := &complaints{}
	tried, giveUp := context.WithCancel(ctx)
	defer giveUp()
	cmd := r.command(tried, r.config.Program, slices.Concat(r.options, args)...)
	cmd.Dir, cmd.Env, cmd.ExtraFiles = dir, r.environ, r.config.ExtraFiles
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = grace
	var told atomic.Int32
	stdout := &lineWriter{line: line}
	stderr := &lineWriter{limit: 64 << 10, line: func(b []byte) {
		if tried.Err() != nil { // what follows is only about being interrupted
			return
		}
		if text := said.add(string(b), r.redact, dir); text != "" {
			complaint(text)
		}
		if n := told.Add(1); n == 1 && args[0] == "snapshots" {
			time.AfterFunc(patience, func() {
				if told.Load() >= insistence {
					giveUp()
				}
			})
		}
	}}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true, // a terminal's ^C reaches us, and restic through ctx
		Pdeathsig: syscall.SIGKILL, Cloneflags: r.apart,
	}
	// The kernel sends Pdeathsig when the thread that forked ends, so that
	// thread must live for as long as restic does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if ctx.Err() != nil {
		return said, said.ended(args[0], -1, ctx.Err())
	}
	err := cmd.Run()
	stdout.flush()
	stderr.flush()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return said, r.seen.mark()
	case cmd.ProcessState == nil:
		e := said.ended(args[0], 1, nil)
		e.ExitCode, e.Message = -1, r.redact.Replace(err.Error())
		return said, e
	case ctx.Err() != nil:
		return said, said.ended(args[0], -1, ctx.Err())
	case tried.Err() != nil:
		said.tail = said.tail[max(0, len(said.tail)-1):] // they say the same
		e := said.ended(args[0], -1, nil)
		e.kind = ErrFailed
		return said, e
	case errors.As(err, &exit) && exit.ExitCode() < 0:
		e := said.ended(args[0], -1, errors.New(exit.Error()))
		if e.Hint == "" {
			e.Hint = "a process that is killed from outside has often reached a memory limit"
		}
		return said, e
	case errors.As(err, &exit):
		e := said.ended(args[0], exit.ExitCode(), nil)
		if e.kind == ErrNoRepository {
			r.seen.before(e)
		}
		return said, e
	}
	// Restic ended well, but its output was cut off.
	return said, said.ended(args[0], 1, err)
}

// lineWriter splits what is written to it into lines. The rest of a line beyond
// limit bytes is dropped, unless limit is 0.
type lineWriter struct {
	buf   []byte
	limit int
	line  func([]byte)
}

func (w *lineWriter) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		part, after, found := bytes.Cut(rest, []byte{'\n'})
		if w.limit > 0 && len(w.buf)+len(part) > w.limit {
			part = part[:w.limit-len(w.buf)]
		}
		w.buf = append(w.buf, part...)
		if found {
			w.line(w.buf)
			w.buf = w.buf[:0]
		}
		rest = after
	}
	return len(p), nil
}

func (w *lineWriter) flush() {
	if len(w.buf) > 0 {
		w.line(w.buf)
	}
}

// newEnviron returns all that restic's environment holds. PWD is not in it: with
// it Go programs compare it with the working directory at each relative path,
// two stats for each entry of the volume. Neither is our own HOME, where cloud
// libraries look for credentials that are not this repository's.
func newEnviron(c Config) []string {
	home := c.CacheDir
	if home == "" {
		home = "/nonexistent"
	}
	environ := []string{
		"LC_ALL=C",
		"TZ=UTC",
		"HOME=" + home,
		"PATH=" + os.Getenv("PATH"), // ssh
		"TMPDIR=" + os.TempDir(),
		"RESTIC_PROGRESS_FPS=2",
		// Without this each new mount of a volume rewrites all directories
		// (restic #3041).
		"RESTIC_FEATURES=device-id-for-hardlinks=true",
	}
	if c.CacheDir != "" {
		environ = append(environ, "RESTIC_CACHE_DIR="+c.CacheDir)
	}
	for name, value := range c.Env {
		environ = append(environ, name+"="+value)
	}
	return environ
}

// Version returns the version of a restic program.
func Version(ctx context.Context, program string) (string, error) {
	cmd := exec.CommandContext(ctx, program, "version", "--json")
	cmd.Env = []string{}
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	var v struct{ Version string }
	if err == nil && json.Unmarshal(out, &v) != nil {
		err = fmt.Errorf("it says %.60q, and not in JSON", strings.TrimSpace(string(out)))
	}
	if err != nil || v.Version == "" {
		return "", fmt.Errorf("%w, which is %s: %s version: %v", ErrVersion, PinnedVersion, program, err)
	}
	return v.Version, nil
}

// CheckVersion returns ErrVersion unless program is the restic that is pinned.
func CheckVersion(ctx context.Context, program string) error {
	version, err := Version(ctx, program)
	if err != nil {
		return err
	}
	if version != PinnedVersion {
		return fmt.Errorf("%w: %s is restic %s, and Abaca was tested with %s only: use the program of Abaca's image, or run make build",
			ErrVersion, program, strings.TrimSpace(version), PinnedVersion)
	}
	return nil
}
