// Package mount puts shares and snapshots on a node and takes them off again.
//
// Everything is decided by /proc/self/mountinfo, never by comparing device
// numbers of a directory and its parent, which cannot see bind mounts. No call
// outlives its context: a helper program or a system call that hangs on a dead
// server is left behind, and the caller gets the context's error.
//
// Every other error wraps exactly one of the errors below, or is the kernel's.
package mount

import (
	"context"
	"errors"
	"strings"
)

var (
	// ErrNotMounted: there is no mount at the path.
	ErrNotMounted = errors.New("not a mount point")
	// ErrOther: something else is mounted at the path, or the path is not a
	// directory that can be mounted on.
	ErrOther = errors.New("occupied by something else")
	// ErrWritable: the mount can be written through though it must not.
	ErrWritable = errors.New("mounted writable")
	// ErrCorrupted: the mount is there but dead (ENOTCONN, ESTALE, EIO, EHOSTDOWN).
	ErrCorrupted = errors.New("mount is dead")
	// ErrInvalid: the source or an option is not understood.
	ErrInvalid = errors.New("invalid mount")
	// ErrNoSource: what should be mounted does not exist.
	ErrNoSource = errors.New("nothing to mount")
)

// Source is what is mounted: the node's view of a backend's export.
type Source struct {
	// Protocol is "bind", "nfs", "cifs" or "cephfs"; each has one file in this
	// package, which says how locations and options are written.
	Protocol string `json:"protocol"`
	// Locations are the places at which the storage system serves this one tree,
	// the preferred first. They are tried in this order until one is mounted.
	// For "bind" it is one absolute path.
	Locations []string `json:"locations"`
	// Path is the directory below them that is mounted, the only one that is to
	// be seen: relative, empty for the whole tree. Its elements are patterns of
	// path.Match, and exactly one directory must match.
	Path string `json:"path,omitempty"`
	// Options are mount options that the storage system demands. [Immutable] is
	// one of every protocol.
	Options []string `json:"options,omitempty"`
	// User is the name under which the storage system knows the node, empty where
	// there is none. Its key is not here: the node has it.
	User string `json:"user,omitempty"`
	// Renumbered says that files which are the same may have other inode numbers
	// and change times than in the snapshot before.
	Renumbered bool `json:"renumbered,omitempty"`
}

// Immutable among a [Source]'s options says that nothing in it ever changes, so
// that everything may be cached for long. A Path that is mounted read-only
// means the same: it is a snapshot in the tree of its share.
const Immutable = "immutable"

// String names the source for people.
func (s Source) String() string {
	text := strings.Join(s.Locations, ",")
	if s.Path != "" {
		text += "/" + s.Path
	}
	return text
}

// Renumbers says that a file of this source may have another inode number in each
// snapshot, though it is the same file: because it is copied for each, or because
// it is in a snapshot that SMB shows in the tree of its share. Samba puts the
// snapshot's device number into all of them, and when the snapshot's top has the
// number of the share's, the kernel makes numbers up. One that has a location of its own keeps them.
func (s Source) Renumbers() bool {
	return s.Renumbered || s.Protocol == "cifs" && s.Path != ""
}

// Stats is what statfs(2) says about a mounted path.
type Stats struct {
	TotalBytes, AvailableBytes, UsedBytes    int64
	TotalInodes, AvailableInodes, UsedInodes int64
}

// Interface is what the CSI node service and the mover need of a node.
// [Mounter] is the real one.
type Interface interface {
	// Mount mounts src at dir, which it creates. With readOnly, success means
	// that mountinfo shows the mount read-only. flags are mount options of the
	// user; one that contradicts readOnly, or that the protocol does not know,
	// is ErrInvalid, and so is mounting writable what is on a read-only mount.
	//
	// Mounting what is already there, the same way, is nil. A mount of src that
	// lacks ro or a flag, as a killed process may leave it, is given them, or
	// is ErrWritable when a process writes there; one that is read-only and
	// should be writable is ErrOther, as is another mount. A dead mount is
	// replaced; one that does not answer is not, as its server may come back.
	Mount(ctx context.Context, src Source, dir string, readOnly bool, flags []string) error
	// Bind makes what is mounted at from visible at to, which it creates.
	// Otherwise it is as Mount. ErrNotMounted when from is not a mount point.
	Bind(ctx context.Context, from, to string, readOnly bool) error
	// Unmount takes off every mount stacked at dir, dead ones too, and removes
	// the directory. What is not mounted or not there is nil. A directory that
	// still holds files after the last unmount is left alone and is ErrOther.
	Unmount(ctx context.Context, dir string) error
	// Prove returns nil when dir is the mount point of exactly src and, with
	// readOnly, cannot be written through. Else ErrNotMounted, ErrOther,
	// ErrWritable or ErrCorrupted.
	Prove(ctx context.Context, dir string, src Source, readOnly bool) error
	// Check returns nil when dir is a mount point that answers, else
	// ErrNotMounted or ErrCorrupted.
	Check(ctx context.Context, dir string) error
	// Stats returns the statfs numbers of a mounted path.
	Stats(ctx context.Context, dir string) (Stats, error)
	// Places returns where the tree that is mounted at dir is mounted on this
	// node, dir included, ordered. ErrNotMounted when nothing is.
	Places(dir string) ([]string, error)
	// Below returns the mount points below dir (dir included), deepest first.
	Below(dir string) ([]string, error)
}
