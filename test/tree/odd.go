package tree

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// BigFile is the size in bytes of the big file of the demonstration.
const BigFile = 300 << 20

// Odd makes dir and in it everything that backups like to lose: hard links,
// holes, extended attributes, ACLs, odd names, a fifo, a device, special modes,
// owners, symbolic links, old times. big is the size of one big file, in bytes.
// It needs root. What has no ACLs is left without. Two calls make equal trees, to
// the nanosecond.
func Odd(ctx context.Context, dir string, big int64) error {
	m := maker{root: dir}
	m.dir("")

	m.file("hardlinks/one", "linked")
	m.link("hardlinks/one", "hardlinks/two")
	m.link("hardlinks/one", "hardlinks/elsewhere/three")
	m.file("hardlinks/pair", "another inode, the same size")
	m.link("hardlinks/pair", "hardlinks/pair too")

	m.sparse("sparse/holes", 64<<20, 0, 16<<20+4096, 40<<20)
	m.sparse("sparse/only a hole", 32<<20)

	m.file("xattrs/file", "with attributes")
	m.xattr("xattrs/file", "user.abaca", []byte("a value"))
	m.xattr("xattrs/file", "user.empty", nil)
	m.xattr("xattrs/file", "user.binary", []byte{0, 1, 0xfe, 0xff, '\n'})
	m.xattr("xattrs/file", "trusted.abaca", []byte("of root"))
	m.dir("xattrs/dir")
	m.xattr("xattrs/dir", "user.abaca", []byte(strings.Repeat("long", 500)))
	m.file("xattrs/capability", "may ping")
	// linux/capability.h, vfs_cap_data, revision 2: CAP_NET_RAW, effective.
	m.xattr("xattrs/capability", "security.capability", le(uint32(0x02000001), uint32(1<<13), uint32(0), uint32(0), uint32(0)))

	m.file("acls/file", "with an ACL")
	m.acl("acls/file", "system.posix_acl_access", acl(
		entry{aclUserObj, 6, 0}, entry{aclUser, 4, 1000}, entry{aclGroupObj, 4, 0}, entry{aclMask, 4, 0}, entry{aclOther, 0, 0}))
	m.dir("acls/dir")
	m.acl("acls/dir", "system.posix_acl_default", acl(
		entry{aclUserObj, 7, 0}, entry{aclGroupObj, 5, 0}, entry{aclGroup, 7, 2000}, entry{aclMask, 7, 0}, entry{aclOther, 0, 0}))

	for _, name := range []string{
		"two words", " blanks around ", "tab\tand\nnewline", "-rf", "--help", "~", "...", "*?[a]{b}$HOME`x`", `back\slash`, `"quotes'`,
		"\u00e9 composed", "e\u0301 decomposed", "\u65e5\u672c\u8a9e", "\U0001f9f5", "not utf-8 \xff\xfe\x80", "control \x01\x1b[31m", "CON", "a:b", "comma,equals=",
		strings.Repeat("n", 255), strings.Repeat("\u65e5", 85),
	} {
		m.file("names/"+name, "named "+name)
	}
	m.file("names/dir \xff\n/inside", "deeper")

	m.file("empty", "")
	m.fifo("fifo")
	m.device("null", 1, 3)
	m.big(ctx, "big", big)

	for _, mode := range []uint32{0o4755, 0o2755, 0o6711, 0o1644, 0o000, 0o444, 0o200, 0o777} {
		name := fmt.Sprintf("modes/file-%04o", mode)
		m.file(name, name)
		m.mode(name, mode)
	}
	for _, mode := range []uint32{0o1777, 0o2775, 0o700, 0o000} {
		name := fmt.Sprintf("modes/dir-%04o", mode)
		m.dir(name)
		m.mode(name, mode)
	}

	for _, id := range []int{1, 1000, 65534, 2_000_000_000} {
		name := fmt.Sprintf("owners/%d", id)
		m.file(name, name)
		m.owner(name, id, id+1)
	}
	m.dir("owners/dir")
	m.owner("owners/dir", 1000, 1001)
	m.symlink("owners/link", "1000")
	m.owner("owners/link", 1000, 1001)
	// chown takes setuid away, so the mode comes after it, here and in a restore.
	m.file("owners/setuid", "of another user")
	m.owner("owners/setuid", 1000, 1000)
	m.mode("owners/setuid", 0o4750)

	m.symlink("links/relative", "../empty")
	m.symlink("links/dangling", "nowhere/at all")
	m.symlink("links/absolute", "/etc/hostname")
	m.symlink("links/loop", "loop")
	m.symlink("links/long", strings.Repeat("long/", 600)+"end")
	m.symlink("links/odd \xff\n", "target \xfe\n")

	m.file("deep/"+strings.Repeat("level/", 120)+"bottom", "deep down")
	m.dir("empty dirs/one/two/three")

	if m.err != nil {
		return fmt.Errorf("make the odd part of the tree: %w", m.err)
	}
	return settle(dir)
}

// settle gives each entry a time of its own, by its path: before 1970, after
// 2038, and all with nanoseconds.
func settle(dir string) error {
	var paths []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil {
		return err
	}
	first := time.Date(1965, 1, 1, 0, 0, 0, 0, time.UTC).Unix()
	last := time.Date(2090, 1, 1, 0, 0, 0, 0, time.UTC).Unix()
	for _, path := range slices.Backward(paths) {
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		h := fnv.New64a()
		h.Write([]byte(rel))
		sum := h.Sum64()
		if err := setTime(path, time.Unix(first+int64(sum>>8)%(last-first), int64(sum%1e9))); err != nil {
			return err
		}
	}
	return nil
}

// maker makes entries below root until one fails.
type maker struct {
	root string
	err  error
}

func (m *maker) do(op, name string, f func(path string) error) {
	if m.err != nil {
		return
	}
	path := filepath.Join(m.root, name)
	if name != "" {
		if m.err = os.MkdirAll(filepath.Dir(path), 0o755); m.err != nil {
			return
		}
	}
	if err := f(path); err != nil {
		var perr *fs.PathError
		if !errors.As(err, &perr) {
			err = &os.PathError{Op: op, Path: path, Err: err}
		}
		m.err = err
	}
}

func (m *maker) dir(name string) {
	m.do("mkdir", name, func(path string) error { return os.MkdirAll(path, 0o755) })
}

func (m *maker) file(name, text string) {
	m.do("write", name, func(path string) error { return os.WriteFile(path, []byte(text), 0o644) })
}

func (m *maker) link(old, name string) {
	m.do("link", name, func(path string) error { return os.Link(filepath.Join(m.root, old), path) })
}

func (m *maker) symlink(name, target string) {
	m.do("symlink", name, func(path string) error { return os.Symlink(target, path) })
}

func (m *maker) xattr(name, attr string, value []byte) {
	m.do("setxattr "+attr, name, func(path string) error { return unix.Lsetxattr(path, attr, value, 0) })
}

func (m *maker) mode(name string, mode uint32) {
	m.do("chmod", name, func(path string) error { return unix.Chmod(path, mode) })
}

func (m *maker) owner(name string, uid, gid int) {
	m.do("chown", name, func(path string) error { return os.Lchown(path, uid, gid) })
}

func (m *maker) fifo(name string) {
	m.do("mkfifo", name, func(path string) error { return unix.Mkfifo(path, 0o640) })
}

func (m *maker) device(name string, major, minor uint32) {
	m.do("mknod", name, func(path string) error {
		return unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(major, minor)))
	})
}

// sparse makes a file with 64 KiB of data at each offset, and holes between.
func (m *maker) sparse(name string, size int64, offsets ...int64) {
	m.do("write", name, func(path string) error {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			return err
		}
		b := make([]byte, 64<<10)
		for _, at := range offsets {
			fill(rand.New(rand.NewPCG(2, uint64(at))), b)
			if _, err := f.WriteAt(b, at); err != nil {
				return err
			}
		}
		return f.Close()
	})
}

// big makes a file of size bytes that neither compress nor repeat.
func (m *maker) big(ctx context.Context, name string, size int64) {
	m.do("write", name, func(path string) error {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		random := rand.New(rand.NewPCG(3, uint64(size)))
		b := make([]byte, 1<<20)
		for left := size; left > 0; left -= int64(len(b)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			b = b[:min(left, int64(len(b)))]
			fill(random, b)
			if _, err := f.Write(b); err != nil {
				return err
			}
		}
		return f.Close()
	})
}

// acl sets an ACL where the file system has them.
func (m *maker) acl(name, attribute string, value []byte) {
	if m.err == nil && errors.Is(unix.Setxattr(filepath.Join(m.root, name), attribute, value, 0), unix.ENOTSUP) {
		return
	}
	m.xattr(name, attribute, value)
}

// The kernel's form of an ACL: linux/posix_acl_xattr.h. The entries of one tag
// are ordered by id. Setting it by hand saves the need for setfacl.
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

type entry struct {
	tag, perm uint16
	id        uint32
}

func acl(entries ...entry) []byte {
	b := le(uint32(2)) // the version
	for _, e := range entries {
		if e.tag != aclUser && e.tag != aclGroup {
			e.id = ^uint32(0)
		}
		b = append(b, le(e.tag, e.perm, e.id)...)
	}
	return b
}

// le is its arguments, of fixed size, as little-endian bytes.
func le(values ...any) []byte {
	var b []byte
	for _, v := range values {
		b, _ = binary.Append(b, binary.LittleEndian, v)
	}
	return b
}
