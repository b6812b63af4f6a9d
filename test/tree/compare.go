package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Difference is one thing in which two trees differ.
type Difference struct {
	Path string // relative; "." is the root
	What string // missing, extra, type, mode, owner, time, size, contents, holes, xattr, link, hard links, device
	A, B string // what it is in either tree
}

func (d Difference) String() string {
	switch d.What {
	case "missing", "extra":
		return fmt.Sprintf("%q: %s", d.Path, d.What)
	}
	return fmt.Sprintf("%q: %s: %s, but %s", d.Path, d.What, d.A, d.B)
}

// Compare walks two trees and returns in what b differs from a, in the order of
// the paths: types, modes, owners, modification times to the nanosecond (the
// roots' too), sizes, contents byte for byte, extended attributes and with
// them ACLs and capabilities, targets of symbolic links, which names are one
// file, device numbers. b may be more dense than a, but not where a has a big
// hole. An error is a tree that cannot be read.
func Compare(ctx context.Context, a, b string) ([]Difference, error) {
	c := comparer{
		ctx: ctx, a: a, b: b,
		firstA: map[uint64]string{}, firstB: map[uint64]string{},
		bufA: make([]byte, 1<<20), bufB: make([]byte, 1<<20),
	}
	if err := c.entry("."); err != nil {
		return c.found, fmt.Errorf("compare %q with %q: %w", a, b, err)
	}
	return c.found, nil
}

type comparer struct {
	ctx   context.Context
	a, b  string
	found []Difference
	// The first path of each inode that has several. A file that is linked
	// otherwise has another first path in one of the trees.
	firstA, firstB map[uint64]string
	bufA, bufB     []byte
}

func (c *comparer) differ(path, what string, a, b any) {
	c.found = append(c.found, Difference{path, what, fmt.Sprint(a), fmt.Sprint(b)})
}

func (c *comparer) entry(path string) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	pa, pb := filepath.Join(c.a, path), filepath.Join(c.b, path)
	sa, err := lstat(pa)
	if err != nil {
		return err
	}
	sb, err := lstat(pb)
	if err != nil {
		return err
	}
	kind := sa.Mode & unix.S_IFMT
	if kind != sb.Mode&unix.S_IFMT {
		c.differ(path, "type", kindName(sa.Mode), kindName(sb.Mode))
		return nil
	}
	if sa.Mode != sb.Mode {
		c.differ(path, "mode", fmt.Sprintf("%04o", sa.Mode&^unix.S_IFMT), fmt.Sprintf("%04o", sb.Mode&^unix.S_IFMT))
	}
	if sa.Uid != sb.Uid || sa.Gid != sb.Gid {
		c.differ(path, "owner", fmt.Sprintf("%d:%d", sa.Uid, sa.Gid), fmt.Sprintf("%d:%d", sb.Uid, sb.Gid))
	}
	if sa.Mtim != sb.Mtim {
		c.differ(path, "time", timeText(sa.Mtim), timeText(sb.Mtim))
	}
	if err := c.xattrs(path, pa, pb); err != nil {
		return err
	}
	if kind != unix.S_IFDIR {
		c.hardLinks(path, sa, sb)
	}
	switch kind {
	case unix.S_IFDIR:
		return c.dir(path, pa, pb)
	case unix.S_IFREG:
		if sa.Size != sb.Size {
			c.differ(path, "size", sa.Size, sb.Size)
			return nil
		}
		return c.file(path, pa, pb)
	case unix.S_IFLNK:
		la, err := os.Readlink(pa)
		if err != nil {
			return err
		}
		lb, err := os.Readlink(pb)
		if err != nil {
			return err
		}
		if la != lb {
			c.differ(path, "link", fmt.Sprintf("%q", la), fmt.Sprintf("%q", lb))
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if sa.Rdev != sb.Rdev {
			c.differ(path, "device", deviceText(sa.Rdev), deviceText(sb.Rdev))
		}
	}
	return nil
}

func (c *comparer) dir(path, pa, pb string) error {
	na, err := names(pa)
	if err != nil {
		return err
	}
	nb, err := names(pb)
	if err != nil {
		return err
	}
	all := slices.Concat(na, nb)
	slices.Sort(all)
	for _, name := range slices.Compact(all) {
		at := filepath.Join(path, name)
		_, inA := slices.BinarySearch(na, name)
		_, inB := slices.BinarySearch(nb, name)
		switch {
		case !inB:
			c.differ(at, "missing", "", "")
		case !inA:
			c.differ(at, "extra", "", "")
		default:
			if err := c.entry(at); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *comparer) hardLinks(path string, sa, sb *unix.Stat_t) {
	if sa.Nlink == 1 && sb.Nlink == 1 {
		return
	}
	first := func(seen map[uint64]string, ino uint64) string {
		if _, ok := seen[ino]; !ok {
			seen[ino] = path
		}
		return seen[ino]
	}
	fa, fb := first(c.firstA, sa.Ino), first(c.firstB, sb.Ino)
	if fa != fb || sa.Nlink != sb.Nlink {
		c.differ(path, "hard links", fmt.Sprintf("%d, the first %q", sa.Nlink, fa), fmt.Sprintf("%d, the first %q", sb.Nlink, fb))
	}
}

func (c *comparer) xattrs(path, pa, pb string) error {
	xa, err := xattrs(pa)
	if err != nil {
		return err
	}
	xb, err := xattrs(pb)
	if err != nil {
		return err
	}
	all := slices.Collect(maps.Keys(xa))
	all = slices.AppendSeq(all, maps.Keys(xb))
	slices.Sort(all)
	for _, name := range slices.Compact(all) {
		va, inA := xa[name]
		vb, inB := xb[name]
		if inA != inB || va != vb {
			c.differ(path, "xattr", xattrText(name, va, inA), xattrText(name, vb, inB))
		}
	}
	return nil
}

func (c *comparer) file(path, pa, pb string) error {
	fa, err := open(pa)
	if err != nil {
		return err
	}
	defer fa.Close()
	fb, err := open(pb)
	if err != nil {
		return err
	}
	defer fb.Close()
	// Before the contents are read: a file system may not have decided yet
	// where they lie, but reading does not change the answer.
	if err := c.holes(path, fa, fb); err != nil {
		return err
	}
	for at := int64(0); ; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, errA := io.ReadFull(fa, c.bufA)
		m, errB := io.ReadFull(fb, c.bufB)
		if n != m || !bytes.Equal(c.bufA[:n], c.bufB[:n]) {
			i := 0
			for i < min(n, m) && c.bufA[i] == c.bufB[i] {
				i++
			}
			c.differ(path, "contents", fmt.Sprintf("%x at byte %d", tail(c.bufA[:n], i), at+int64(i)), fmt.Sprintf("%x", tail(c.bufB[:m], i)))
			return nil
		}
		at += int64(n)
		for _, err := range []error{errA, errB} {
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return err
			}
		}
		if errA != nil || errB != nil {
			return nil
		}
	}
}

func tail(b []byte, from int) []byte { return b[from:min(from+8, len(b))] }

const (
	// bigHole is the smallest hole, in bytes, that b must have too.
	bigHole = 4 << 20
	// holeLoss is how much of it may be missing. restic finds holes again by
	// chunks that are all zero, and its chunks are 512 KiB to 8 MiB long; of
	// zeros they are 512 KiB.
	holeLoss = 2 << 20
)

func (c *comparer) holes(path string, fa, fb *os.File) error {
	ha, err := holes(fa)
	if err != nil {
		return err
	}
	var hb []extent
	for _, h := range ha {
		if h.end-h.start < bigHole {
			continue
		}
		if hb == nil {
			if hb, err = holes(fb); err != nil {
				return err
			}
		}
		var common int64
		for _, o := range hb {
			common += max(0, min(h.end, o.end)-max(h.start, o.start))
		}
		if common < h.end-h.start-holeLoss {
			c.differ(path, "holes", fmt.Sprintf("bytes %d to %d", h.start, h.end), fmt.Sprintf("%d bytes of it", common))
		}
	}
	return nil
}

type extent struct{ start, end int64 }

// holes lists where a file has no data (lseek(2), SEEK_HOLE).
func holes(f *os.File) ([]extent, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	found := []extent{}
	for at, size := int64(0), info.Size(); at < size; {
		hole, err := unix.Seek(int(f.Fd()), at, unix.SEEK_HOLE)
		if err != nil {
			return nil, &os.PathError{Op: "seek hole", Path: f.Name(), Err: err}
		}
		if hole >= size {
			break
		}
		at, err = unix.Seek(int(f.Fd()), hole, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // a hole up to the end
			at = size
		} else if err != nil {
			return nil, &os.PathError{Op: "seek data", Path: f.Name(), Err: err}
		}
		found = append(found, extent{hole, at})
	}
	_, err = f.Seek(0, io.SeekStart)
	return found, err
}

func open(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME, 0)
}

func lstat(path string) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return &st, nil
}

// names are the entries of a directory, sorted.
func names(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	list, err := f.Readdirnames(-1)
	slices.Sort(list)
	return list, err
}

func xattrs(path string) (map[string]string, error) {
	wrap := func(err error) error { return &os.PathError{Op: "read extended attributes", Path: path, Err: err} }
	size, err := unix.Llistxattr(path, nil)
	if errors.Is(err, unix.ENOTSUP) || err == nil && size == 0 {
		return nil, nil
	} else if err != nil {
		return nil, wrap(err)
	}
	list := make([]byte, size)
	if size, err = unix.Llistxattr(path, list); err != nil {
		return nil, wrap(err)
	}
	found := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:size]), "\x00"), "\x00") {
		if name == "security.selinux" { // the label belongs to the place, not to the file
			continue
		}
		value := make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, wrap(err)
		}
		found[name] = string(value[:n])
	}
	return found, nil
}

func xattrText(name, value string, ok bool) string {
	if !ok {
		return "no " + name
	}
	return fmt.Sprintf("%s=%.40q", name, value)
}

func timeText(ts unix.Timespec) string {
	return time.Unix(ts.Unix()).UTC().Format(time.RFC3339Nano)
}

func deviceText(rdev uint64) string {
	return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
}

func kindName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFREG:
		return "file"
	case unix.S_IFLNK:
		return "symbolic link"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFSOCK:
		return "socket"
	}
	return fmt.Sprintf("type %o", mode&unix.S_IFMT)
}
