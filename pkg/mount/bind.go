//go:build linux

package mount

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// bind is the protocol of what the node can see already: its location is the
// absolute path of a directory. Options and the user's flags may be ro, rw,
// nosuid, nodev, noexec, noatime, nodiratime and relatime.
type bind struct{}

func (bind) options(readOnly bool, src Source, flags []string) (options, error) {
	return wish(grammar{}, readOnly, src, flags)
}

func (bind) find(ctx context.Context, m *Mounter, src Source) (origin, error) {
	if len(src.Locations) != 1 || src.Path != "" || src.User != "" {
		return nil, fmt.Errorf("%s: bind needs one location, an absolute path, and neither a path below it nor a user: %w", src, ErrInvalid)
	}
	if m.own.Placed {
		return placed(src.Locations[0]), nil
	}
	return m.directory(ctx, src.Locations[0])
}

// placed is the origin of a bind that somebody else has made from what is not
// seen here. It can be recognized, and not mounted.
type placed string

func (p placed) is(e *mountinfo.Info, _ unix.Stat_t) bool {
	up, down := filepath.Split(filepath.Clean(string(p)))
	rootUp, rootDown := filepath.Split(e.Root)
	return down != "" && down == rootDown && filepath.Base(up) == filepath.Base(rootUp)
}

func (p placed) allows(options) error {
	return fmt.Errorf("%s is not seen here: %w", string(p), ErrNoSource)
}

func (placed) half(*mountinfo.Info) bool { return false }

func (p placed) attach(context.Context, string, int, options) error { return p.allows(options{}) }

// directory is the origin of a bind: a directory and its place in a file
// system, as mountinfo will show it. The device in mountinfo is not always
// st_dev, which differs for each subvolume of btrfs; so both are kept.
type directory struct {
	mounter  *Mounter
	path     string
	on       *mountinfo.Info // the mount that it lies on
	root     string
	dev, ino uint64
}

// directory finds out what there is to bind at path.
func (m *Mounter) directory(ctx context.Context, path string) (*directory, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%q is not an absolute path: %w", path, ErrInvalid)
	}
	d, err := probe(ctx, m, "find", filepath.Clean(path), func() (*directory, error) {
		path, st, err := resolve(path)
		if err != nil {
			return nil, err
		}
		t, err := readTable()
		if err != nil {
			return nil, err
		}
		on := t.cover(path)
		if on == nil {
			return nil, errors.New("it lies on no mount of this namespace")
		}
		return &directory{mounter: m, path: path, on: on, root: rootOf(on, path), dev: uint64(st.Dev), ino: st.Ino}, nil
	})
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, meaning(err, ErrNoSource, ErrInvalid))
	}
	return d, nil
}

func (d *directory) is(e *mountinfo.Info, top unix.Stat_t) bool {
	return e.Major == d.on.Major && e.Minor == d.on.Minor && e.Root == d.root && uint64(top.Dev) == d.dev && top.Ino == d.ino
}

// half is false: nothing is at the target before all of it is.
func (d *directory) half(*mountinfo.Info) bool { return false }

// allows refuses to make a writable mount out of a read-only one.
func (d *directory) allows(o options) error {
	if !o.readOnly() && has(d.on, "ro") {
		return fmt.Errorf("%s is on a read-only mount, and cannot be mounted writable from there: %w", d.path, ErrInvalid)
	}
	return nil
}

// attach makes the mount where nobody can reach it and moves it to dir when it
// is as it must be: there is no moment at which dir can be written through that
// must not be. The mount is private, so that nothing that is mounted into the
// origin later appears in it; and it shows one file system, as the origin does.
func (d *directory) attach(ctx context.Context, dir string, target int, o options) error {
	err := error(unix.ENOSYS)
	if !d.mounter.classic {
		err = d.move(ctx, target, o)
	}
	if errors.Is(err, unix.ENOSYS) {
		err = d.attachClassic(ctx, dir, o)
	}
	return err
}

func (d *directory) move(ctx context.Context, target int, o options) error {
	tree, err := clone(d.path, o.attr())
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return move(ctx, tree, target)
}

// clone returns a private mount of what is seen at path, and of nothing that is
// mounted below it, that is mounted nowhere yet and goes when it is closed.
func clone(path string, attr *unix.MountAttr) (int, error) {
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, fmt.Errorf("clone the mount of %s: %w", path, err)
	}
	attr.Propagation = unix.MS_PRIVATE
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, attr); err != nil {
		unix.Close(tree)
		return -1, fmt.Errorf("set the options of the mount of %s: %w", path, err)
	}
	return tree, nil
}

// move mounts a clone on the directory that is open as target.
func move(ctx context.Context, tree, target int) error {
	if err := ctx.Err(); err != nil { // the caller has gone
		return err
	}
	return unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// attachClassic is attach before Linux 5.12: bind, and then set the options.
func (d *directory) attachClassic(ctx context.Context, dir string, o options) error {
	if err := d.mounter.program(ctx, d.path, dir, "", []string{"bind"}); err != nil {
		return err
	}
	err := d.mounter.remount(ctx, dir, o)
	if err != nil {
		_ = d.mounter.takeOff(ctx, dir, unix.MNT_DETACH)
	}
	return err
}
