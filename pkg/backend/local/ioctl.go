package local

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Btrfs is spoken to by ioctls, because an errno tells ENOSPC from EDQUOT and
// the text of the btrfs program does not. Names, numbers and layouts are those
// of linux/btrfs.h; the kernel refuses a structure of a wrong size, as its size
// is part of the request number. The direction bits are those of asm-generic
// (amd64, arm64, riscv64, s390x).
const (
	iow = 1 << 30
	ior = 2 << 30

	btrfsMagic = 0x94 << 8 // BTRFS_IOCTL_MAGIC

	iocResize           = iow | btrfsMagic | 3
	iocTreeSearch       = ior | iow | btrfsMagic | 17
	iocSnapCreateV2     = iow | btrfsMagic | 23
	iocStartSync        = ior | btrfsMagic | 24
	iocSubvolCreateV2   = iow | btrfsMagic | 24
	iocDevInfo          = ior | iow | btrfsMagic | 30
	iocFSInfo           = ior | btrfsMagic | 31
	iocQuotaCtl         = ior | iow | btrfsMagic | 40
	iocQgroupCreate     = iow | btrfsMagic | 42
	iocQgroupLimit      = ior | btrfsMagic | 43
	iocQuotaRescan      = iow | btrfsMagic | 44
	iocQuotaRescanState = ior | btrfsMagic | 45
	iocGetSubvolInfo    = ior | btrfsMagic | 60
	iocSnapDestroyV2    = iow | btrfsMagic | 63 // Linux 5.7
)

const (
	subvolReadOnly = 1 << 1 // BTRFS_SUBVOL_RDONLY
	subvolByID     = 1 << 4 // BTRFS_SUBVOL_SPEC_BY_ID
	limitReferred  = 1 << 0 // BTRFS_QGROUP_LIMIT_MAX_RFER
	quotaEnable    = 1      // BTRFS_QUOTA_CTL_ENABLE

	rootTree  = 1   // BTRFS_ROOT_TREE_OBJECTID
	rootItem  = 132 // BTRFS_ROOT_ITEM_KEY
	rootRef   = 156 // BTRFS_ROOT_REF_KEY
	firstFree = 256 // BTRFS_FIRST_FREE_OBJECTID: the first id of a subvolume
)

// The structures; what is of no use here is blank.

// struct btrfs_ioctl_vol_args
type volArgs struct {
	_    int64
	name [4088]byte
}

// struct btrfs_ioctl_vol_args_v2; a subvolume id takes the place of the name
// when flags has subvolByID.
type volArgsV2 struct {
	fd, _, flags uint64
	_            [4]uint64
	name         [4040]byte
}

// struct btrfs_ioctl_get_subvol_info_args
type subvolInfo struct {
	id    uint64
	_     [256]byte
	_     [4]uint64   // parent_id, dirid, generation, flags
	_     [3][16]byte // uuid, parent_uuid, received_uuid
	_     [4]uint64   // transactions
	_     timespec    // ctime
	otime timespec
	_     [2]timespec
	_     [8]uint64
}

// struct btrfs_ioctl_timespec
type timespec struct {
	sec  uint64
	nsec uint32
}

// struct btrfs_ioctl_search_args
type searchArgs struct {
	tree, minObject, maxObject, _, maxOffset, _, maxTrans uint64 // _: minima
	minType, maxType, items                               uint32
	_                                                     uint32
	_                                                     [4]uint64
	buf                                                   [3992]byte
}

// struct btrfs_ioctl_dev_info_args
type devInfo struct {
	id    uint64
	_     [16]byte
	_     uint64 // bytes_used
	total uint64
	_     [379]uint64
	path  [1024]byte
}

// ioctl adds the size of *arg to the request, as the macros _IOW and _IOR do.
func ioctl[T any](f *os.File, name string, request uintptr, arg *T) error {
	request |= unsafe.Sizeof(*arg) << 16
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(arg)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return os.NewSyscallError(name, errno)
	}
	return nil
}

// createSubvolume makes an empty subvolume below dir. The kernel commits it
// before it returns.
func createSubvolume(dir *os.File, name string) error {
	var a volArgsV2
	copy(a.name[:], name)
	return ioctl(dir, "create subvolume", iocSubvolCreateV2, &a)
}

// snapshotSubvolume makes an image of the subvolume src below dir, with
// everything that was written to it before, synced or not. The kernel commits
// it before it returns.
func snapshotSubvolume(src, dir *os.File, name string, readOnly bool) error {
	a := volArgsV2{fd: uint64(src.Fd())}
	if readOnly {
		a.flags = subvolReadOnly
	}
	copy(a.name[:], name)
	err := ioctl(dir, "snapshot subvolume", iocSnapCreateV2, &a)
	runtime.KeepAlive(src)
	return err
}

// destroySubvolume unlinks a subvolume and the subvolumes that a user has made
// inside it; the kernel frees the space in the background. Nothing keeps it
// from doing so while the subvolume is bind-mounted: the mount is empty then.
func destroySubvolume(dir *os.File, name string) error {
	var a volArgsV2
	copy(a.name[:], name)
	err := ioctl(dir, "delete subvolume", iocSnapDestroyV2, &a)
	if !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	info, err := subvolumeAt(dir, name)
	if err != nil {
		return err
	}
	if err := destroyInside(dir, info.id); err != nil {
		return err
	}
	return ioctl(dir, "delete subvolume", iocSnapDestroyV2, &a)
}

func destroyInside(fs *os.File, id uint64) error {
	for {
		inner, err := searchRoots(fs, id, rootRef)
		if err != nil || len(inner) == 0 {
			return err
		}
		for _, child := range inner {
			if err := destroyInside(fs, child); err != nil {
				return err
			}
			a := volArgsV2{flags: subvolByID}
			binary.NativeEndian.PutUint64(a.name[:], child)
			if err := ioctl(fs, "delete nested subvolume", iocSnapDestroyV2, &a); err != nil {
				return err
			}
		}
	}
}

// subvolumeAt describes the subvolume name below dir.
func subvolumeAt(dir *os.File, name string) (*subvolInfo, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return subvolume(f)
}

func subvolume(f *os.File) (*subvolInfo, error) {
	var info subvolInfo
	if err := ioctl(f, "describe subvolume", iocGetSubvolInfo, &info); err != nil {
		return nil, err
	}
	return &info, nil
}

func (i *subvolInfo) created() time.Time {
	return time.Unix(int64(i.otime.sec), int64(i.otime.nsec)).UTC()
}

// searchRoots returns the offsets of the items that the root tree has for a
// subvolume: with rootRef the ids of the subvolumes inside it (at most a
// buffer full), with rootItem one item as long as it is not entirely gone.
func searchRoots(fs *os.File, id uint64, itemType uint32) ([]uint64, error) {
	a := searchArgs{
		tree: rootTree, minObject: id, maxObject: id, maxOffset: math.MaxUint64, maxTrans: math.MaxUint64,
		minType: itemType, maxType: itemType, items: 64,
	}
	if err := ioctl(fs, "search root tree", iocTreeSearch, &a); err != nil {
		return nil, err
	}
	var offsets []uint64
	buf := a.buf[:]
	for range a.items { // struct btrfs_ioctl_search_header: transid, objectid, offset, type, len
		offsets = append(offsets, binary.NativeEndian.Uint64(buf[16:]))
		buf = buf[32+binary.NativeEndian.Uint32(buf[28:]):]
	}
	return offsets, nil
}

// startCommit begins a commit, after which the kernel's cleaner looks for
// deleted subvolumes; without it their space stays taken for half a minute.
// Waiting for it would be no use: the kernel may miss the call.
func startCommit(fs *os.File) error {
	var transaction uint64
	return ioctl(fs, "start commit", iocStartSync, &transaction)
}

func enableQuota(fs *os.File) error {
	return ioctl(fs, "enable quota", iocQuotaCtl, &struct{ cmd, status uint64 }{cmd: quotaEnable})
}

// limitQgroup bounds what the subvolume id may refer to. EDQUOT is what writers get.
func limitQgroup(fs *os.File, id uint64, size int64) error {
	return ioctl(fs, "set quota", iocQgroupLimit, &struct {
		id, flags, maxReferred, maxExclusive, reservedReferred, reservedExclusive uint64
	}{id: id, flags: limitReferred, maxReferred: uint64(size)})
}

func destroyQgroup(fs *os.File, id uint64) error {
	return ioctl(fs, "delete quota group", iocQgroupCreate, &struct{ create, id uint64 }{id: id})
}

func startRescan(fs *os.File) error {
	return ioctl(fs, "start quota rescan", iocQuotaRescan, &[8]uint64{})
}

func rescanRunning(fs *os.File) bool {
	var a [8]uint64 // flags, progress, reserved
	return ioctl(fs, "quota rescan state", iocQuotaRescanState, &a) == nil && a[0] != 0
}

// fsID returns the name of the file system below /sys/fs/btrfs.
func fsID(fs *os.File) (string, error) {
	var a [1024]byte // struct btrfs_ioctl_fs_info_args: max_id, num_devices, fsid, ...
	if err := ioctl(fs, "describe file system", iocFSInfo, &a); err != nil {
		return "", err
	}
	u := a[16:32]
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]), nil
}

// firstDevice returns the path of the device that a file system of one device
// lies on, and how many of its bytes the file system covers.
func firstDevice(fs *os.File) (path string, covered int64, err error) {
	a := devInfo{id: 1}
	if err := ioctl(fs, "describe device", iocDevInfo, &a); err != nil {
		return "", 0, err
	}
	name, _, _ := bytes.Cut(a.path[:], []byte{0})
	return string(name), int64(a.total), nil
}

// growToDevice extends a file system of one device over all of it.
func growToDevice(fs *os.File) error {
	var a volArgs
	copy(a.name[:], "max")
	return ioctl(fs, "resize", iocResize, &a)
}
