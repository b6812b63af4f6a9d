//go:build linux

package mount

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fuse mounts a file system whose server never answers; kill ends the server,
// and everything answers ENOTCONN. Neither needs a word of the protocol.
func fuse(t *testing.T, dir string) (kill func()) {
	t.Helper()
	_ = os.Mkdir(dir, 0o755)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	kill = sync.OnceFunc(func() { unix.Close(fd) })
	t.Cleanup(kill)
	must(t, unix.Mount("abaca-test", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)))
	return kill
}

func TestDead(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		ctx := t.Context()
		src, target := share(t, dir+"/share"), dir+"/target"
		wantDead := func() {
			t.Helper()
			fuse(t, target)()
			wantIs(t, m.Check(ctx, target), ErrCorrupted)
			wantIs(t, m.Prove(ctx, target, src, true), ErrCorrupted)
			_, err := m.Stats(ctx, target)
			wantIs(t, err, ErrCorrupted)
			wantIs(t, m.Bind(ctx, target, dir+"/bound", true), ErrCorrupted)
			wantIs(t, m.Mount(ctx, Source{Protocol: "bind", Locations: []string{target}}, dir+"/bound", true, nil), ErrCorrupted)
		}
		wantDead()
		must(t, m.Mount(ctx, src, target, true, nil))
		wantMounts(t, target, 1, "ro")
		must(t, m.Prove(ctx, target, src, true))

		wantDead()
		fuse(t, target)() // on top of another dead one
		fd, err := unix.Open(target, unix.O_PATH|unix.O_CLOEXEC, 0)
		must(t, err)
		defer unix.Close(fd) // in use
		must(t, m.Unmount(ctx, target))
		wantMounts(t, target, 0)
		if _, err := os.Lstat(target); !os.IsNotExist(err) {
			t.Fatalf("the directory is left: %v", err)
		}

		// What lies below a dead mount.
		fuse(t, dir+"/up")()
		wantIs(t, m.Check(ctx, dir+"/up/below/x"), ErrCorrupted)
		wantIs(t, m.Unmount(ctx, dir+"/up/below/x"), ErrCorrupted)
	})
}

func TestHang(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		src, target := share(t, dir+"/share"), dir+"/target"
		kill := fuse(t, target)
		brief := func() context.Context {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			t.Cleanup(cancel)
			return ctx
		}
		hung := Source{Protocol: "bind", Locations: []string{target}}
		wantLate := func(err error) {
			t.Helper()
			wantIs(t, err, context.DeadlineExceeded)
			if !strings.Contains(err.Error(), "server") {
				t.Fatalf("no hint: %v", err)
			}
		}
		start := time.Now()
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() { m.Check(brief(), target) })
		}
		group.Wait()
		wantLate(m.Check(brief(), target))
		wantLate(m.Prove(brief(), target, src, true))
		wantLate(m.Mount(brief(), src, target, true, nil))
		wantLate(m.Mount(brief(), hung, dir+"/other", true, nil))
		wantLate(m.Mount(brief(), hung, dir+"/other", true, nil))
		wantLate(m.Check(brief(), target+"/below/below"))
		_, err := m.Stats(brief(), target)
		wantLate(err)
		wantLate(m.Bind(brief(), target, dir+"/other", true))
		if took := time.Since(start); took > 2*time.Second {
			t.Fatalf("calls with 50 ms each took %v", took)
		}
		// One of each kind: the mount, the source, what lies below.
		if m.calls.mu.Lock(); len(m.calls.running) > 3 {
			t.Errorf("%d calls hang: %v", len(m.calls.running), m.calls.running)
		}
		m.calls.mu.Unlock()

		// The rest of the node goes on.
		must(t, m.Mount(t.Context(), src, dir+"/fine", true, nil))
		// It can be taken off, and the place used again, while calls still hang.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		must(t, m.Unmount(ctx, target))
		wantMounts(t, target, 0)
		must(t, m.Mount(ctx, src, target, true, nil))
		must(t, m.Check(ctx, target))
		must(t, m.Mount(ctx, hung, dir+"/other", true, nil))

		kill()
		for i := 0; ; i++ {
			m.calls.mu.Lock()
			n := len(m.calls.running)
			m.calls.mu.Unlock()
			if n == 0 {
				break
			}
			if i > 100 {
				t.Fatalf("%d calls hang after the server has ended", n)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
}

// Whoever has given up does not find the mount made later.
func TestAttachAfterTheEnd(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		src, target := share(t, dir+"/share"), dir+"/target"
		d, err := m.directory(t.Context(), src.Locations[0])
		must(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		must(t, os.Mkdir(target, 0o755))
		fd, err := unix.Open(target, unix.O_PATH|unix.O_CLOEXEC, 0)
		must(t, err)
		defer unix.Close(fd)
		wantIs(t, d.attach(ctx, target, fd, options{vfs: []string{"ro"}}), context.Canceled)
		wantMounts(t, target, 0)
	})
}

// A change that hangs makes later ones of its path wait no longer than their
// contexts, and no others.
func TestAlterHangs(t *testing.T) {
	c := &calls{running: map[string]*call{}}
	release := make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	wantIs(t, alter(ctx, c, "/a", func() error { <-release; return nil }), context.DeadlineExceeded)
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	wantIs(t, alter(ctx, c, "/a", func() error { t.Error("two at a time"); return nil }), context.DeadlineExceeded)
	must(t, alter(t.Context(), c, "/b", func() error { return nil }))
	close(release)
	ran := false
	must(t, alter(t.Context(), c, "/a", func() error { ran = true; return nil }))
	if !ran {
		t.Fatal("not run")
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	wantIs(t, alter(gone, c, "/a", func() error { t.Error("run though cancelled"); return nil }), context.Canceled)
}

// fakeMount puts a shell script in front of mount(8).
func fakeMount(t *testing.T, script string) {
	t.Helper()
	bin := t.TempDir()
	must(t, os.WriteFile(bin+"/mount", []byte("#!/bin/sh\nPATH="+os.Getenv("PATH")+"\n"+script), 0o755))
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
}

func TestMountProgram(t *testing.T) {
	setup := func(t *testing.T) (*Mounter, Source, string) {
		dir := scratch(t)
		m := New()
		m.classic, m.patience = true, 200*time.Millisecond
		return m, share(t, dir+"/share"), dir + "/target"
	}

	t.Run("hangs", func(t *testing.T) {
		m, src, target := setup(t)
		pids := filepath.Join(t.TempDir(), "pids")
		fakeMount(t, "sleep 1000 & echo $! $$ > "+pids+"; wait")
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		start := time.Now()
		wantIs(t, m.Mount(ctx, src, target, true, nil), context.DeadlineExceeded)
		if took := time.Since(start); took > time.Second {
			t.Fatalf("took %v", took)
		}
		text, err := os.ReadFile(pids)
		must(t, err)
		for _, pid := range strings.Fields(string(text)) {
			for i := 0; ; i++ {
				stat, err := os.ReadFile("/proc/" + pid + "/stat")
				if err != nil || strings.Contains(string(stat), ") Z ") {
					break
				}
				if i > 50 {
					t.Fatalf("process %s still runs", pid)
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
	})

	t.Run("fails", func(t *testing.T) {
		m, src, target := setup(t)
		fakeMount(t, "echo it is broken >&2; exit 32")
		err := m.Mount(t.Context(), src, target, true, nil)
		if err == nil || !strings.Contains(err.Error(), "it is broken") {
			t.Fatalf("error = %v", err)
		}
		if _, err := os.Lstat(target); !os.IsNotExist(err) {
			t.Fatalf("the directory is left: %v", err)
		}
	})

	t.Run("cannot set read-only", func(t *testing.T) {
		m, src, target := setup(t)
		fakeMount(t, `case "$*" in *remount*) exit 32;; esac; exec mount "$@"`)
		if err := m.Mount(t.Context(), src, target, true, nil); err == nil {
			t.Fatal("no error")
		}
		wantMounts(t, target, 0)
	})

	t.Run("lies about read-only", func(t *testing.T) {
		m, src, target := setup(t)
		fakeMount(t, `case "$*" in *remount*) exit 0;; esac; exec mount "$@"`)
		wantIs(t, m.Mount(t.Context(), src, target, true, nil), ErrWritable)
		wantMounts(t, target, 0)
		// Nor when it is to repair.
		bindByHand(t, src.Locations[0], target)
		wantIs(t, m.Mount(t.Context(), src, target, true, nil), ErrWritable)
	})

	t.Run("mounts something else", func(t *testing.T) {
		m, src, target := setup(t)
		fakeMount(t, `case "$*" in *remount*) exec mount "$@";; esac; for d; do :; done; exec mount -t tmpfs none "$d"`)
		wantIs(t, m.Mount(t.Context(), src, target, true, nil), ErrOther)
		wantMounts(t, target, 0)
	})

	t.Run("killed in between", func(t *testing.T) {
		m, src, target := setup(t)
		func() {
			fakeMount(t, `case "$*" in *remount*) exec sleep 1000;; esac; exec mount "$@"`)
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			wantIs(t, m.Mount(ctx, src, target, true, nil), context.DeadlineExceeded)
		}()
		must(t, os.Setenv("PATH", strings.SplitN(os.Getenv("PATH"), ":", 2)[1]))
		must(t, m.Mount(t.Context(), src, target, true, nil))
		wantMounts(t, target, 1, "ro")
		wantClosed(t, target)
	})
}
