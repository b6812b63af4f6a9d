package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// MinImageSize is the smallest Options.Size, in bytes. Below it btrfs has next
// to no room left beside its own metadata.
const MinImageSize = 256 << 20

// image is a btrfs file system in a sparse file: dir/abaca.img, mounted at
// dir/mnt by a loop device that goes away with the mount. dir/lock serialises
// the processes that set it up.
type image struct{ dir string }

func (i image) file() string  { return filepath.Join(i.dir, "abaca.img") }
func (i image) mount() string { return filepath.Join(i.dir, "mnt") }

func (i image) lock(ctx context.Context) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(i.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockRange(ctx, f, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// check says whether there can be an image of a size, before anything is made.
func (i image) check(size int64) error {
	if size < MinImageSize {
		return fmt.Errorf("%w: size %s: an image has at least %s", backend.ErrInvalid, sizeText(size), sizeText(MinImageSize))
	}
	dir := i.dir
	for !exists(dir) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
	}
	// A file without a name is gone when it is closed. Where there is none, making
	// the image will say what is wrong.
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return nil
	}
	defer f.Close()
	if err := f.Truncate(size); errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("%w: size %s: the file system of %s has no files as large as that", backend.ErrInvalid, sizeText(size), dir)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// sizeText writes a size in the units in which people write one.
func sizeText(n int64) string {
	unit := 0
	for unit < 4 && n != 0 && n%1024 == 0 {
		n, unit = n/1024, unit+1
	}
	return strconv.FormatInt(n, 10) + []string{" bytes", "Ki", "Mi", "Gi", "Ti"}[unit]
}

// attach makes the image if there is none, mounts it if it is not mounted, and
// grows it if it is smaller than size. A process that is killed in between
// leaves nothing that the next call would not finish. It returns the root of the
// file system: as long as that is open, nobody can unmount it.
func (i image) attach(ctx context.Context, size int64) (root *os.File, err error) {
	size &^= 4095
	if err := os.MkdirAll(i.mount(), 0o700); err != nil {
		return nil, err
	}
	lock, err := i.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if _, err := os.Stat(i.file()); errors.Is(err, fs.ErrNotExist) {
		if err := i.make(ctx, size, lock); err != nil {
			return nil, err
		}
	}

	img, err := os.OpenFile(i.file(), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	st, err := img.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > size {
		return nil, fmt.Errorf("%w: size %s: the image %s has %s and cannot shrink; set the size to at least that",
			backend.ErrInvalid, sizeText(size), i.file(), sizeText(st.Size()))
	}
	if st.Size() < size {
		if err := img.Truncate(size); err != nil {
			return nil, err
		}
	}

	loop, err := findLoop(img)
	if loop == nil && err == nil {
		loop, err = attachLoop(img)
	}
	if err != nil {
		return nil, err
	}
	defer loop.Close()
	root, err = i.mounted(loop)
	if err != nil {
		return nil, err
	}
	if root == nil {
		crash("image: before mount")
		// Without discard a deleted share would go on occupying the disk below.
		if err := unix.Mount(loop.Name(), i.mount(), "btrfs", unix.MS_NOATIME, "discard=async"); err != nil {
			return nil, fmt.Errorf("mount %s at %s: %w", loop.Name(), i.mount(), err)
		}
		if root, err = os.Open(i.mount()); err != nil {
			return nil, err
		}
	}
	if err := grow(root, loop, size); err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// make formats a file of another name first, so that an image that exists is
// whole.
func (i image) make(ctx context.Context, size int64, lock *os.File) error {
	tmp := i.file() + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	crash("image: before mkfs")
	if err := run(ctx, lock, "mkfs.btrfs", "--quiet", "--label", "abaca", tmp); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	crash("image: made")
	if err := os.Rename(tmp, i.file()); err != nil {
		return err
	}
	dir, err := os.Open(i.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// mounted opens the root of the image's file system if it is mounted here, else
// it returns nil.
func (i image) mounted(loop *os.File) (*os.File, error) {
	root, err := os.Open(i.mount())
	if err != nil {
		return nil, err
	}
	if isBtrfs(root) {
		if device, _, err := firstDevice(root); err == nil && device == loop.Name() {
			return root, nil
		}
	}
	return nil, root.Close()
}

func grow(root, loop *os.File, size int64) error {
	_, covered, err := firstDevice(root)
	if err != nil || covered >= size {
		return err
	}
	if err := unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return os.NewSyscallError("LOOP_SET_CAPACITY", err)
	}
	crash("image: before resize")
	return growToDevice(root)
}

// detach unmounts the image and waits until its loop device is free.
func (i image) detach(ctx context.Context) error {
	lock, err := i.lock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	img, err := os.Open(i.file())
	if err != nil {
		return err
	}
	defer img.Close()

	for tries := 0; ; tries++ {
		if err = i.unmount(img); !errors.Is(err, unix.EBUSY) {
			return err
		}
		patience := inUse
		if errors.Is(err, errElsewhere) {
			patience = elsewhere
		}
		if time.Duration(tries)*detachPoll >= patience {
			return fmt.Errorf("%w: %v: unmount the shares, and end the processes that use %s or have it in a mount namespace of theirs",
				backend.ErrInUse, err, i.mount())
		}
		if err := sleep(ctx, detachPoll); err != nil {
			return err
		}
	}
}

// How long detach waits for others to let go of the image.
const (
	detachPoll = 50 * time.Millisecond
	// A program just being started has all our files open until it is, and udev
	// may look into the device for a moment.
	inUse = 2 * time.Second
	// A mount namespace made while the image was mounted, as each mover has one,
	// holds it until it ends.
	elsewhere = time.Minute
)

var errElsewhere = fmt.Errorf("it is mounted in other mount namespaces only: %w", unix.EBUSY)

// unmount returns EBUSY as long as the image is mounted, here or elsewhere.
func (i image) unmount(img *os.File) error {
	loop, err := findLoop(img)
	if loop == nil || err != nil {
		return err
	}
	root, err := i.mounted(loop)
	loop.Close()
	if err != nil {
		return err
	}
	if root != nil {
		root.Close()
		if err := unix.Unmount(i.mount(), 0); err != nil {
			return fmt.Errorf("unmount %s: %w", i.mount(), err)
		}
	}
	if loop, err = findLoop(img); loop == nil || err != nil {
		return err
	}
	defer loop.Close()
	// A share that is mounted here still may stay so for ever.
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if bytes.Contains(mounts, []byte(" "+loop.Name()+" ")) {
		return fmt.Errorf("%s, attached to %s, is still mounted: %w", loop.Name(), img.Name(), unix.EBUSY)
	}
	return fmt.Errorf("%s is still attached to %s: %w", loop.Name(), img.Name(), errElsewhere)
}

// findLoop opens the loop device that an image is attached to; nil when there
// is none. It may have been attached in another mount namespace, where the
// image has another path: its inode decides.
func findLoop(img *os.File) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(img.Fd()), &st); err != nil {
		return nil, err
	}
	bound, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, err
	}
	for _, dir := range bound {
		// Opening somebody else's device would disturb them when they detach it.
		file, err := os.ReadFile(filepath.Join(dir, "backing_file"))
		if err != nil || !strings.Contains(string(file), "/"+filepath.Base(img.Name())) {
			continue
		}
		name := filepath.Base(filepath.Dir(dir))
		var n uint32
		if _, err := fmt.Sscanf(name, "loop%d", &n); err != nil {
			continue
		}
		dev, err := openLoop(n)
		if err != nil {
			continue // gone since
		}
		info, err := unix.IoctlLoopGetStatus64(int(dev.Fd()))
		if err == nil && info.Device == st.Dev && info.Inode == st.Ino {
			return dev, nil
		}
		dev.Close()
	}
	return nil, nil
}

// attachLoop attaches an image to a free loop device. The kernel frees it when
// it is closed and not mounted, also when this process is killed.
func attachLoop(img *os.File) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	for {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, os.NewSyscallError("LOOP_CTL_GET_FREE", err)
		}
		dev, err := openLoop(uint32(n))
		if err != nil {
			return nil, err
		}
		config := unix.LoopConfig{Fd: uint32(img.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		copy(config.Info.File_name[:len(config.Info.File_name)-1], img.Name())
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) { // somebody else took it first
			return nil, os.NewSyscallError("LOOP_CONFIGURE", err)
		}
	}
}

func openLoop(n uint32) (*os.File, error) {
	path := fmt.Sprintf("/dev/loop%d", n)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		// The /dev of a container knows only the devices of when it was started.
		const loopMajor = 7
		if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(loopMajor, n))); err != nil {
			return nil, os.NewSyscallError("mknod "+path, err)
		}
		f, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	return f, err
}

// run runs a program to its end. The program inherits lock, so that nobody gets
// the lock while it lives, even if this process is killed.
func run(ctx context.Context, lock *os.File, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.ExtraFiles = []*os.File{lock}
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w: %v: install btrfs-progs", backend.ErrUnavailable, err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}
