//go:build linux

package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	kmount "k8s.io/mount-utils"
)

// program runs mount(8), which gets no further than ctx: it and its helpers
// are one process group that is killed then. mount-utils makes the arguments
// but cannot run them, as it has no way to stop.
func (m *Mounter) program(ctx context.Context, source, dir, fstype string, options []string) error {
	cmd := m.command(ctx, "mount", kmount.MakeMountArgs(source, dir, fstype, options)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("mount -o %s: %w: %s", strings.Join(options, ","), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// remount sets options of the topmost mount at dir. The others stay.
func (m *Mounter) remount(ctx context.Context, dir string, o options) error {
	err := error(unix.ENOSYS)
	if !m.classic {
		err = unix.MountSetattr(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, o.attr())
	}
	if errors.Is(err, unix.ENOSYS) {
		e, terr := top(dir)
		if terr != nil {
			return terr
		}
		if e == nil {
			return ErrNotMounted
		}
		// Here the options that are not named are taken off.
		all := []string{"remount", "bind"}
		for name := range vfs {
			other := map[string]string{"rw": "ro", "relatime": "noatime", "noatime": "relatime"}[name]
			if slices.Contains(o.vfs, name) || has(e, name) && !slices.Contains(o.vfs, other) && name != "rw" {
				all = append(all, name)
			}
		}
		err = m.program(ctx, "none", dir, "", all)
	}
	return err
}
