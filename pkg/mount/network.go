//go:build linux

package mount

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A location is one place at which a server serves a tree.
type location interface {
	fmt.Stringer
	// below says where below the location lies what e shows: "" for all of it.
	// It is false for what was not mounted from here.
	below(e *mountinfo.Info) (string, bool)
	// mount mounts the whole tree at dir, if so wanted never writable. It may
	// leave other options of the mount to the caller.
	mount(ctx context.Context, m *Mounter, dir string, o options) error
}

// network is the origin of what servers serve. The whole of a location is
// mounted at the target. If only a directory below is wanted, that is cloned,
// the whole is taken off, and the clone takes its place. So the whole is never
// at a place where somebody would look for it, and what is killed half-way
// leaves it where the next call finds it.
type network struct {
	m         *Mounter
	path      string // patterns
	locations []location
}

// onNetwork makes the origin of src from locations that parse understands.
func onNetwork[L location](m *Mounter, src Source, parse func(string) (L, error)) (origin, error) {
	n := &network{m: m, path: src.Path}
	if len(src.Locations) == 0 {
		return nil, fmt.Errorf("the source has no location: %w", ErrInvalid)
	}
	if _, err := path.Match(src.Path, ""); err != nil || src.Path != "" && !filepath.IsLocal(src.Path) || src.Path == "." || path.Clean("/"+src.Path) != "/"+src.Path {
		return nil, fmt.Errorf("%q is not a relative path with patterns that are well-formed: %w", src.Path, ErrInvalid)
	}
	for _, text := range src.Locations {
		l, err := parse(text)
		if err != nil {
			return nil, err
		}
		n.locations = append(n.locations, l)
	}
	return n, nil
}

// is needs no look at the top directory: mountinfo says where it comes from.
func (n *network) is(e *mountinfo.Info, _ unix.Stat_t) bool {
	return slices.ContainsFunc(n.locations, func(l location) bool {
		below, ok := l.below(e)
		// An asterisk does not match a slash, so no deeper directory passes.
		match, _ := path.Match(n.path, below)
		return ok && match && !strings.Contains(below, "//") // the mark of what was deleted
	})
}

// guard are the options by which half knows the whole of a location that was
// mounted for the sake of a directory below it. Nobody who wants that directory
// at a place has use for the whole there, and every helper sets these at once.
var guard = []string{"nodev", "noexec", "nosuid"}

func (n *network) half(e *mountinfo.Info) bool {
	return n.path != "" && !slices.ContainsFunc(guard, func(o string) bool { return !has(e, o) }) &&
		slices.ContainsFunc(n.locations, func(l location) bool { below, ok := l.below(e); return ok && below == "" })
}

func (n *network) allows(options) error { return nil }

func (n *network) attach(ctx context.Context, dir string, target int, o options) error {
	whole := o
	if n.path != "" {
		whole.vfs = slices.Compact(slices.Sorted(slices.Values(slices.Concat(o.vfs, guard))))
	}
	var failed error
	for i, l := range n.locations {
		err := n.try(ctx, l, len(n.locations)-i, dir, whole)
		reached := err == nil
		if reached && n.path != "" {
			err = n.narrow(ctx, dir, target, o)
		}
		if err == nil {
			return nil
		}
		_ = n.m.takeOff(ctx, dir, unix.MNT_DETACH) // also what a program left that was killed
		if len(n.locations) > 1 {
			err = fmt.Errorf("%s: %w", l, err)
		}
		if failed != nil {
			err = fmt.Errorf("%v; %w", failed, err)
		}
		failed = err
		if reached || ctx.Err() != nil {
			break // another place has the same tree
		}
	}
	return failed
}

// try mounts the first of some locations, which share the time there is.
func (n *network) try(ctx context.Context, l location, share int, dir string, o options) error {
	part, cancel := ctx, func() {}
	if share > 1 {
		part, cancel = context.WithTimeout(ctx, left(ctx)/time.Duration(share))
	}
	defer cancel()
	err := l.mount(part, n.m, dir, o)
	if err == nil {
		// mount.cifs and ceph-fuse know only some.
		if e, terr := top(dir); terr == nil && e != nil && len(o.missing(e)) > 0 {
			err = n.m.remount(part, dir, o)
		}
	}
	if err == nil {
		err = ctx.Err() // the caller has gone
	}
	if err != nil && ctx.Err() == nil && part.Err() != nil {
		// The caller's context has not ended, so its error must not be seen.
		err = fmt.Errorf("no answer in its share of the time: %w", unix.ETIMEDOUT)
	}
	return err
}

// narrow puts the one directory that n.path means in the place of the whole,
// which is mounted at dir.
func (n *network) narrow(ctx context.Context, dir string, target int, o options) error {
	below, err := probe(ctx, n.m, "find "+n.path, dir, func() (string, error) { return only(dir, n.path) })
	if err != nil {
		return fmt.Errorf("look for %s below it: %w", n.path, meaning(err, ErrNoSource, ErrInvalid))
	}
	attr := o.attr()
	for _, name := range guard {
		attr.Attr_clr |= vfs[name].set
	}
	tree := -1
	if err = unix.ENOSYS; !n.m.classic {
		tree, err = clone(filepath.Join(dir, below), attr)
	}
	if errors.Is(err, unix.ENOSYS) {
		// Before Linux 5.12 the whole stays, covered, until Unmount.
		if err := n.m.program(ctx, filepath.Join(dir, below), dir, "", []string{"bind"}); err != nil {
			return err
		}
		if err = n.m.program(ctx, "none", dir, "", append([]string{"remount", "bind"}, o.vfs...)); err != nil {
			_ = n.m.takeOff(ctx, dir, unix.MNT_DETACH)
		}
		return err
	} else if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := n.m.takeOff(ctx, dir, unix.MNT_DETACH); err != nil {
		return err
	}
	return move(ctx, tree, target)
}

// only returns the one directory below dir that pattern matches, ErrNoSource if
// there is none. An element that is no pattern is not looked for in a listing,
// as .snap and its like are in none, and symbolic links are not followed.
func only(dir, pattern string) (string, error) {
	found := []string{""}
	for elem := range strings.SplitSeq(pattern, "/") {
		var next []string
		for _, above := range found {
			names := []string{elem}
			if strings.ContainsAny(elem, `*?[\`) {
				f, err := inside(dir, above)
				if err != nil {
					return "", err
				}
				for names = nil; ; {
					some, err := f.Readdirnames(1000)
					for _, name := range some {
						if ok, _ := path.Match(elem, name); ok {
							names = append(names, name)
						}
					}
					if errors.Is(err, io.EOF) {
						break
					} else if err != nil {
						f.Close()
						return "", err
					}
				}
				f.Close()
			}
			for _, name := range names {
				f, err := inside(dir, path.Join(above, name))
				if err == nil {
					f.Close()
					next = append(next, path.Join(above, name))
				} else if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
					return "", err
				}
			}
		}
		found = next
	}
	switch slices.Sort(found); len(found) {
	case 0:
		return "", fmt.Errorf("there is no such directory: %w", ErrNoSource)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%d directories match, among them %s and %s: %w", len(found), found[0], found[1], ErrInvalid)
}

// inside opens a directory below dir, by no symbolic link.
func inside(dir, below string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for elem := range strings.SplitSeq(below, "/") {
		if err != nil || elem == "" {
			break
		}
		up := fd
		fd, err = unix.Openat(up, elem, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(up)
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir, below)), nil
}

// under is location.below for file systems whose names in mountinfo are paths.
func under(shown, location string) (string, bool) {
	rest, ok := strings.CutPrefix(strings.TrimRight(shown, "/"), strings.TrimRight(location, "/"))
	if !ok || rest != "" && rest[0] != '/' {
		return "", false
	}
	return strings.Trim(rest, "/"), true
}

var hostName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?$`)

// hostOf returns a host name or address without the brackets of IPv6.
func hostOf(text string) (string, error) {
	bare, ok := strings.CutPrefix(text, "[")
	bare, closed := strings.CutSuffix(bare, "]")
	addr, err := netip.ParseAddr(bare)
	if ok != closed || ok && (err != nil || !addr.Is6()) || err != nil && !hostName.MatchString(bare) {
		return "", fmt.Errorf("%q is no host name and no address: %w", text, ErrInvalid)
	}
	return bare, nil
}

// reach returns an error soon if no TCP connection to the server can be made.
// A server that refuses it is there, and mount(8) says more.
func (m *Mounter) reach(ctx context.Context, host, port string) error {
	brief, cancel := context.WithTimeout(ctx, m.brief(ctx))
	defer cancel()
	c, err := new(net.Dialer).DialContext(brief, "tcp", net.JoinHostPort(host, port))
	var name *net.DNSError
	switch {
	case err == nil:
		c.Close()
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, unix.ECONNREFUSED):
	case errors.As(err, &name):
		return fmt.Errorf("this node cannot look up %s: %s", host, name.Err)
	default:
		errno := cmp.Or(unwrapErrno(err), unix.ETIMEDOUT)
		return fmt.Errorf("this node cannot reach %s port %s; is the server up, and does no firewall stand between? %w", host, port, errno)
	}
	return nil
}

// unwrapErrno returns the kernel's error in err, 0 if there is none. A timeout
// of net looks like the end of the caller's context, which it is not.
func unwrapErrno(err error) unix.Errno {
	var errno unix.Errno
	errors.As(err, &errno)
	return errno
}
