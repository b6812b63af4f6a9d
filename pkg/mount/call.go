//go:build linux

package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// begin bounds the context of an exported call, and end says in its error what
// was being done.
func begin(ctx context.Context, err *error, format string, arg ...any) (_ context.Context, end func()) {
	cancel := func() {}
	if _, ok := ctx.Deadline(); !ok {
		ctx, cancel = context.WithTimeout(ctx, 2*time.Minute)
	}
	return ctx, func() {
		cancel()
		if *err != nil {
			*err = fmt.Errorf("%s: %w", fmt.Sprintf(format, arg...), *err)
		}
	}
}

// calls are what this process is doing in the kernel, at most one a key. A call
// that a dead server holds keeps an OS thread for ever: it stays in the map
// until it returns, and nobody starts another one.
type calls struct {
	mu      sync.Mutex
	running map[string]*call
}

type call struct {
	done  chan struct{}
	value any
	err   error
}

// ask runs fn, which only reads, in a goroutine of its own until ctx ends.
// Whoever asks the same meanwhile gets the same answer.
func ask[T any](ctx context.Context, c *calls, key string, fn func() (T, error)) (T, error) {
	return do(ctx, c, key, true, fn)
}

// alter runs fn, which changes what is mounted at path, in a goroutine of its
// own until ctx ends. Changes of one path go one after the other, also when the
// caller of the one before has given up.
func alter(ctx context.Context, c *calls, path string, fn func() error) error {
	_, err := do(ctx, c, "alter "+path, false, func() (struct{}, error) { return struct{}{}, fn() })
	return err
}

func do[T any](ctx context.Context, c *calls, key string, join bool, fn func() (T, error)) (T, error) {
	var zero T
	for {
		if err := ctx.Err(); err != nil {
			return zero, err
		}
		c.mu.Lock()
		now, busy := c.running[key]
		if !busy {
			now = &call{done: make(chan struct{})}
			c.running[key] = now
			go func() {
				defer func() {
					// In a goroutine of its own, a panic would end the process.
					if p := recover(); p != nil {
						now.value, now.err = zero, fmt.Errorf("the driver has a defect: %v\n%s", p, debug.Stack())
					}
					c.mu.Lock()
					delete(c.running, key)
					c.mu.Unlock()
					close(now.done)
				}()
				now.value, now.err = fn()
			}()
		}
		c.mu.Unlock()

		select {
		case <-ctx.Done():
			return zero, fmt.Errorf("no answer in time, is its server down? %w", ctx.Err())
		case <-now.done:
			if !busy || join {
				return now.value.(T), now.err
			}
		}
	}
}

// probe asks the file system that path lies on. What is asked of one mount does
// not wait for what was asked of another that lay at the same path before.
func probe[T any](ctx context.Context, m *Mounter, what, path string, fn func() (T, error)) (T, error) {
	t, err := readTable()
	if err != nil {
		var zero T
		return zero, err
	}
	on := 0
	if e := t.cover(path); e != nil {
		on = e.ID
	}
	return ask(ctx, &m.calls, fmt.Sprintf("%s %d %s", what, on, path), fn)
}

// resolve returns the path of a directory as mountinfo writes it.
func resolve(path string) (string, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", st, err
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, &st); err != nil {
		return "", st, err
	}
	path, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	return path, st, err
}

// dead are the errors of a mount whose server is gone. EACCES is not among
// them: a FUSE server that refuses root is alive.
var dead = []error{unix.ENOTCONN, unix.ESTALE, unix.EIO, unix.EHOSTDOWN, unix.ECONNABORTED, unix.ENODEV}

// meaning adds what err of a system call means to its text.
func meaning(err, absent, noDirectory error) error {
	switch {
	case errors.Is(err, unix.ENOENT) && absent != nil:
		return fmt.Errorf("%w: %w", absent, err)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return fmt.Errorf("a file or a symbolic link instead of a directory: %w: %w", noDirectory, err)
	}
	for _, d := range dead {
		if errors.Is(err, d) {
			return fmt.Errorf("%w: %w", ErrCorrupted, err)
		}
	}
	return err
}
