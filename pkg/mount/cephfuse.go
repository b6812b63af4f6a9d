//go:build linux

package mount

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// fuse starts ceph-fuse, which serves the mount as long as that is somewhere.
// It mounts at dir itself, as it has the kernel remount this path when it must
// give back what it caches. The key reaches it in a file that has no name.
func (l *cephLocation) fuse(ctx context.Context, m *Mounter, dir string, o options, key string) error {
	ring, err := nameless("keyring", fmt.Sprintf("[client.%s]\n\tkey = %s\n", l.user, key))
	if err != nil {
		return err
	}
	defer ring.Close()
	said, err := nameless("output", "")
	if err != nil {
		return err
	}
	defer said.Close()

	// mountinfo says whose mount it is: FS+TOKEN@LOCATION.
	name := o.value("fs") + "+" + rand.Text()[:8] + "@" + l.text
	flags := append([]string{"subtype=ceph-fuse"}, append(o.basic(), fuseName(name))...)
	arg := []string{"-f", "-m", l.monitors, "-c", "/dev/null", "--id", l.user, "--keyring=/proc/self/fd/3", "-r", l.path,
		"--log_file=", "--admin_socket=", "--client_mount_timeout=" + seconds(ctx)}
	for _, word := range o.fs {
		if v, ok := strings.CutPrefix(word, "fs="); ok {
			arg = append(arg, "--client_fs="+v)
		} else if strings.HasPrefix(word, "client_") {
			arg = append(arg, "--"+word)
		}
	}
	cmd := m.command(context.WithoutCancel(ctx), "ceph-fuse", append(arg, "-o", strings.Join(flags, ","), dir)...)
	cmd.ExtraFiles = []*os.File{ring}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if m.own.Tied {
		cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // the signal comes when this thread ends
		err := cmd.Start()
		if started <- err; err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start ceph-fuse, which serves CephFS where the kernel does not: %w", err)
	}
	err = m.served(ctx, dir, name, ended)
	if err == nil {
		// Nobody reads what it says from now on.
		_, _ = unix.FcntlInt(said.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK)
		return nil
	}
	_ = cmd.Process.Kill()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	text := make([]byte, 4000)
	n, _ := said.ReadAt(text, 0)
	if found := fuseErrno.FindSubmatch(text[:n]); found != nil {
		code, _ := strconv.Atoi(string(found[1]))
		return fmt.Errorf("ceph-fuse: %w", l.meaning(unix.Errno(code)))
	}
	return fmt.Errorf("ceph-fuse: %w; is the key of user %q the right one, and do the monitors answer? It said: %s",
		err, l.user, strings.ReplaceAll(strings.TrimSpace(string(text[:n])), key, "***"))
}

// fuseErrno is in the last words of a ceph-fuse that the cluster has refused.
var fuseErrno = regexp.MustCompile(`ceph mount failed with \((\d+)\)`)

// served waits until what is called name is mounted at dir and answers.
func (m *Mounter) served(ctx context.Context, dir, name string, ended <-chan struct{}) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ended:
			return errors.New("it has ended")
		case <-tick.C:
		}
		if e, err := top(dir); err != nil {
			return err
		} else if e != nil && e.FSType == "fuse.ceph-fuse" && e.Source == name {
			_, err := m.answer(ctx, e)
			return err
		}
	}
}

// fuseName is the option of libfuse that says what mountinfo shows as source.
func fuseName(name string) string {
	return "fsname=" + strings.NewReplacer(`\`, `\\`, ",", `\,`).Replace(name)
}

// reap ends the ceph-fuse that served e, which was taken off, when it is not
// mounted anywhere else. A healthy one has ended by itself; one whose cluster is
// gone would wait for it for ever.
func (m *Mounter) reap(ctx context.Context, e *mountinfo.Info) {
	if e == nil || e.FSType != "fuse.ceph-fuse" || !strings.Contains(e.Source, "+") {
		return
	}
	serves := func(pid string) bool {
		text, _ := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		return strings.Contains(string(text), fuseName(e.Source)+"\x00")
	}
	t, err := readTable()
	if err != nil || slices.ContainsFunc(t.all, func(o *mountinfo.Info) bool { return o.Major == e.Major && o.Minor == e.Minor }) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, m.brief(ctx))
	defer cancel()
	entries, _ := os.ReadDir("/proc")
	for _, d := range entries {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || !serves(d.Name()) {
			continue
		}
		for serves(d.Name()) {
			select {
			case <-ctx.Done():
				_ = unix.Kill(pid, unix.SIGKILL)
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
}

// nameless returns a file that is in no directory and holds text.
func nameless(name, text string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteString(text); err != nil {
		f.Close()
		return nil, fmt.Errorf("write a file in memory: %w", err)
	}
	return f, nil
}
