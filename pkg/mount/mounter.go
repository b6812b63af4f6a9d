//go:build linux

package mount

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mounter is the [Interface] of the kernel. It keeps nothing but the calls that
// are under way, and is safe for concurrent use. A context without a deadline
// gets one of two minutes.
type Mounter struct {
	calls   calls
	own     Options
	command func(ctx context.Context, name string, arg ...string) *exec.Cmd
	// patience is how long Unmount waits for a mount to answer before it counts
	// as dead, and for one in use to become free.
	patience time.Duration
	// classic does without the system calls of Linux 5.12.
	classic bool
}

var _ Interface = (*Mounter)(nil)

// Options are what a Mounter may be given.
type Options struct {
	// Keys is a directory of mode 0700 with one file of mode 0600 for each user
	// of a storage system, named after the user, that holds nothing but the key.
	Keys string
	// Key takes its place where keys are kept elsewhere. With neither nothing that
	// needs a key can be mounted.
	Key func(ctx context.Context, user string) (string, error)
	// Tied ends what serves a mount, ceph-fuse, when this process ends, however
	// it does: for a process whose mount namespace is to go with it.
	Tied bool
	// Placed is for a process in whose mount namespace somebody else has mounted
	// what it uses: the locations of binds are not seen there, so a bind is proved
	// by the names of its directory and of the one above it, in their file system.
	Placed bool
}

// New returns a Mounter for the mount namespace of this process, with at most
// one Options.
func New(own ...Options) *Mounter {
	return &Mounter{
		calls:    calls{running: map[string]*call{}},
		own:      append(own, Options{})[0],
		command:  exec.CommandContext,
		patience: 3 * time.Second,
	}
}

// A protocol is a way to reach a share. Each has one file.
type protocol interface {
	// options puts the mount's options together. What the protocol does not
	// know, or what contradicts itself or readOnly, is ErrInvalid.
	options(readOnly bool, src Source, flags []string) (options, error)
	// find looks the source up: ErrNoSource when it is not there.
	find(ctx context.Context, m *Mounter, src Source) (origin, error)
}

// An origin is a source as it was found.
type origin interface {
	// is says whether a mount, whose top directory is top, is exactly this.
	is(e *mountinfo.Info, top unix.Stat_t) bool
	// allows returns ErrInvalid for options that this cannot be mounted with.
	allows(o options) error
	// half says whether e is what attach leaves when it is killed half-way, and
	// nothing that anybody uses. What else it leaves must lack an option.
	half(e *mountinfo.Info) bool
	// attach mounts it at dir, an empty place that is open as target.
	attach(ctx context.Context, dir string, target int, o options) error
}

var protocols = map[string]protocol{"bind": bind{}, "cephfs": cephfs{}, "cifs": cifs{}, "nfs": nfs{}}

func protocolOf(src Source) (protocol, error) {
	p, ok := protocols[src.Protocol]
	if !ok {
		known := strings.Join(slices.Sorted(maps.Keys(protocols)), ", ")
		return nil, fmt.Errorf("protocol %q is not known, these are: %s: %w", src.Protocol, known, ErrInvalid)
	}
	return p, nil
}

// Mount implements [Interface].
func (m *Mounter) Mount(ctx context.Context, src Source, dir string, readOnly bool, flags []string) (err error) {
	ctx, end := begin(ctx, &err, "mount %s at %s", src, dir)
	defer end()
	p, err := protocolOf(src)
	if err != nil {
		return err
	}
	o, err := p.options(readOnly, src, flags)
	if err != nil {
		return err
	}
	from, err := p.find(ctx, m, src)
	if err != nil {
		return err
	}
	return m.put(ctx, from, dir, o)
}

// Bind implements [Interface].
func (m *Mounter) Bind(ctx context.Context, from, to string, readOnly bool) (err error) {
	ctx, end := begin(ctx, &err, "bind %s at %s", from, to)
	defer end()
	o, err := wish(grammar{}, readOnly, Source{}, nil)
	if err != nil {
		return err
	}
	place, err := m.place(ctx, from, false)
	if err != nil {
		return err
	}
	if _, _, err := m.mounted(ctx, place); err != nil {
		return err
	}
	d, err := m.directory(ctx, place)
	if err != nil {
		return err
	}
	if d.on.Mountpoint != place { // unmounted meanwhile
		return ErrNotMounted
	}
	return m.put(ctx, d, to, o)
}

// put makes dir a mount of from with the options, whatever it was before.
func (m *Mounter) put(ctx context.Context, from origin, dir string, o options) error {
	if err := from.allows(o); err != nil {
		return err
	}
	dir, err := m.place(ctx, dir, true)
	if err != nil {
		return err
	}
	return alter(ctx, &m.calls, dir, func() error {
		err := m.verify(ctx, from, dir, o)
		for ; errors.Is(err, ErrCorrupted) || errors.Is(err, errHalf); err = m.verify(ctx, from, dir, o) {
			e, terr := top(dir)
			if terr == nil && e != nil {
				terr = m.takeOff(ctx, dir, unix.MNT_DETACH)
			}
			if terr != nil {
				return fmt.Errorf("take the dead mount off: %w", terr)
			}
			m.reap(ctx, e)
		}
		var lacks missingError
		switch {
		case errors.Is(err, ErrNotMounted):
			return m.fresh(ctx, from, dir, o)
		case errors.As(err, &lacks):
			err := m.remount(ctx, dir, o)
			if ctx.Err() != nil {
				return ctx.Err()
			} else if err != nil {
				return fmt.Errorf("%w, and that cannot be set; does a process write there? %w", lacks, err)
			}
			return m.verify(ctx, from, dir, o)
		}
		return err
	})
}

// fresh mounts at dir, where nothing is mounted, and undoes it unless it
// becomes what was asked for.
func (m *Mounter) fresh(ctx context.Context, from origin, dir string, o options) (err error) {
	err = unix.Mkdir(dir, 0o750)
	if err == nil {
		defer func() {
			if err != nil {
				_ = unix.Rmdir(dir) // or Unmount does it
			}
		}()
	} else if !errors.Is(err, unix.EEXIST) {
		return err
	}
	// By descriptor: what becomes a symbolic link meanwhile is not followed.
	target, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return meaning(err, ErrNotMounted, ErrOther)
	}
	defer unix.Close(target)
	if err := from.attach(ctx, dir, target, o); err != nil {
		return err
	}
	if err = m.verify(ctx, from, dir, o); err != nil {
		_ = m.takeOff(ctx, dir, unix.MNT_DETACH)
	}
	return err
}

// verify returns nil when exactly from is mounted at dir, with the options in
// effect, and missingError when some can still be set.
func (m *Mounter) verify(ctx context.Context, from origin, dir string, o options) error {
	e, a, err := m.mounted(ctx, dir)
	if err != nil {
		return err
	}
	return match(from, e, a, o)
}

func match(from origin, e *mountinfo.Info, a answer, o options) error {
	missing := o.missing(e)
	switch {
	case !from.is(e, a.top) && from.half(e):
		return fmt.Errorf("it was not finished: %w: %w", errHalf, ErrOther)
	case !from.is(e, a.top):
		return fmt.Errorf("%s of %s (%s) is mounted there: %w", e.Root, e.Source, e.FSType, ErrOther)
	case slices.Contains(missing, "rw"):
		return fmt.Errorf("it is mounted there read-only, as somebody asked for: %w", ErrOther)
	case len(missing) > 0:
		return missingError(missing)
	case !o.readOnly():
		return nil
	}
	t, err := readTable()
	if err != nil {
		return err
	}
	for _, e := range t.below(e.Mountpoint) {
		if !has(e, "ro") {
			return fmt.Errorf("%s below it: %w", e.Mountpoint, ErrWritable)
		}
	}
	return nil
}

// errHalf: there is what an attach left that was killed half-way.
var errHalf = errors.New("a mount that was begun")

// missingError is the options that a mount of the right source lacks.
type missingError []string

func (e missingError) Error() string { return "it is mounted without " + strings.Join(e, ",") }

func (e missingError) Is(target error) bool {
	return target == ErrWritable && slices.Contains(e, "ro")
}

// Unmount implements [Interface]. A mount that is in use is an error, and
// stays; one that is dead, or does not answer, is taken out of sight, and the
// kernel drops it with its last user.
func (m *Mounter) Unmount(ctx context.Context, dir string) (err error) {
	ctx, end := begin(ctx, &err, "unmount %s", dir)
	defer end()
	place, err := m.place(ctx, dir, false)
	if errors.Is(err, ErrNotMounted) {
		return nil
	} else if err != nil {
		return err
	}
	return alter(ctx, &m.calls, place, func() error {
		if err := m.clear(ctx, place); err != nil {
			return err
		}
		switch err := unix.Rmdir(place); {
		case err == nil, errors.Is(err, unix.ENOENT):
			return nil
		case errors.Is(err, unix.ENOTEMPTY):
			return fmt.Errorf("nothing is mounted there any more, but it holds files, which stay: %w", ErrOther)
		default:
			return fmt.Errorf("remove the directory: %w", meaning(err, nil, ErrOther))
		}
	})
}

// clear takes everything off that is mounted at dir.
func (m *Mounter) clear(ctx context.Context, dir string) error {
	for {
		e, err := top(dir)
		if e == nil || err != nil {
			return err
		}
		flags := 0
		brief, cancel := context.WithTimeout(ctx, m.brief(ctx))
		if _, err := m.answer(brief, e); errors.Is(err, ErrCorrupted) || brief.Err() != nil {
			flags = unix.MNT_DETACH
		}
		cancel()
		if err := m.takeOff(ctx, dir, flags); err != nil {
			return err
		}
		m.reap(ctx, e)
	}
}

// takeOff takes the topmost mount at dir off, if there is one. When it is only
// just in use, by a statfs of ours perhaps, it is given time.
func (m *Mounter) takeOff(ctx context.Context, dir string, flags int) error {
	ctx, cancel := context.WithTimeout(ctx, m.brief(ctx))
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		switch err := unix.Unmount(dir, flags|unix.UMOUNT_NOFOLLOW); {
		case errors.Is(err, unix.EINVAL): // somebody else was faster, or may not
			if e, err := top(dir); e == nil || err != nil {
				return err
			}
			return fmt.Errorf("the kernel keeps it, as it came with the mount namespace: %w", err)
		case !errors.Is(err, unix.EBUSY):
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if t, err := readTable(); err == nil {
				for _, e := range t.below(dir) {
					return fmt.Errorf("%s is mounted below it: %w", e.Mountpoint, unix.EBUSY)
				}
			}
			return fmt.Errorf("a process uses it, see fuser -vm: %w", unix.EBUSY)
		}
	}
}

// brief is how long to wait when something must still be done before ctx ends.
func (m *Mounter) brief(ctx context.Context) time.Duration {
	return min(m.patience, left(ctx)/2)
}

// left is how much time there is until ctx ends.
func left(ctx context.Context) time.Duration {
	if end, ok := ctx.Deadline(); ok {
		return time.Until(end)
	}
	return time.Hour
}

// Prove implements [Interface]. With readOnly, no mount below dir may be
// writable either.
func (m *Mounter) Prove(ctx context.Context, dir string, src Source, readOnly bool) (err error) {
	ctx, end := begin(ctx, &err, "prove that %s is mounted at %s", src, dir)
	defer end()
	p, err := protocolOf(src)
	if err != nil {
		return err
	}
	place, err := m.place(ctx, dir, false)
	if err != nil {
		return err
	}
	e, a, err := m.mounted(ctx, place)
	if err != nil {
		return err
	}
	from, err := p.find(ctx, m, src)
	if errors.Is(err, ErrNoSource) {
		return fmt.Errorf("%s is not there to compare with: %w", src, ErrOther)
	} else if err != nil {
		return err
	}
	var o options
	if readOnly {
		o.vfs = []string{"ro"}
	}
	return match(from, e, a, o)
}

// Check implements [Interface].
func (m *Mounter) Check(ctx context.Context, dir string) error {
	_, err := m.Stats(ctx, dir)
	return err
}

// Stats implements [Interface]. A directory that is not a mount point is
// ErrNotMounted: its numbers would be those of the node's own disk.
func (m *Mounter) Stats(ctx context.Context, dir string) (_ Stats, err error) {
	ctx, end := begin(ctx, &err, "look at %s", dir)
	defer end()
	place, err := m.place(ctx, dir, false)
	if err != nil {
		return Stats{}, err
	}
	_, a, err := m.mounted(ctx, place)
	if err != nil {
		return Stats{}, err
	}
	block := int64(a.fs.Frsize)
	if block == 0 {
		block = int64(a.fs.Bsize)
	}
	free := a.fs.Ffree
	if int64(free) < 0 { // CephFS: as many as one likes
		free = 0
	}
	return Stats{
		TotalBytes:      int64(a.fs.Blocks) * block,
		AvailableBytes:  int64(a.fs.Bavail) * block,
		UsedBytes:       int64(a.fs.Blocks-a.fs.Bfree) * block,
		TotalInodes:     int64(a.fs.Files),
		AvailableInodes: int64(free),
		UsedInodes:      int64(a.fs.Files - free),
	}, nil
}

// Places implements [Interface]. It lists a place also when another mount hides
// the tree there.
func (m *Mounter) Places(dir string) (_ []string, err error) {
	ctx, end := begin(context.Background(), &err, "list the places of %s", dir)
	defer end()
	place, err := m.place(ctx, dir, false)
	if err != nil {
		return nil, err
	}
	t, err := readTable()
	if err != nil {
		return nil, err
	}
	tree := t.at(place)
	if tree == nil {
		return nil, ErrNotMounted
	}
	return t.places(tree), nil
}

// Below implements [Interface].
func (m *Mounter) Below(dir string) (_ []string, err error) {
	ctx, end := begin(context.Background(), &err, "list the mounts below %s", dir)
	defer end()
	place, err := m.place(ctx, dir, false)
	if errors.Is(err, ErrNotMounted) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	t, err := readTable()
	if err != nil {
		return nil, err
	}
	return t.points(place), nil
}

// place returns the path under which mountinfo lists dir: absolute, with no
// symbolic link but, perhaps, its last element. create makes the directories
// above it; without it, ErrNotMounted says that there are none.
func (m *Mounter) place(ctx context.Context, dir string, create bool) (string, error) {
	dir = filepath.Clean(dir)
	if !filepath.IsAbs(dir) || dir == "/" {
		return "", fmt.Errorf("%q is not an absolute path to mount at: %w", dir, ErrInvalid)
	}
	above := filepath.Dir(dir)
	parent, err := probe(ctx, m, fmt.Sprintf("place %t", create), above, func() (string, error) {
		if create {
			if err := os.MkdirAll(above, 0o750); err != nil {
				return "", err
			}
		}
		path, _, err := resolve(above)
		return path, err
	})
	if err != nil {
		return "", fmt.Errorf("open %s: %w", above, meaning(err, ErrNotMounted, ErrOther))
	}
	return filepath.Join(parent, filepath.Base(dir)), nil
}

// top returns the topmost mount at place, nil if there is none.
func top(place string) (*mountinfo.Info, error) {
	t, err := readTable()
	if err != nil {
		return nil, err
	}
	return t.at(place), nil
}

// mounted returns the topmost mount at place once it has answered.
func (m *Mounter) mounted(ctx context.Context, place string) (*mountinfo.Info, answer, error) {
	e, err := top(place)
	if err == nil && e == nil {
		err = ErrNotMounted
	}
	if err != nil {
		return nil, answer{}, err
	}
	a, err := m.answer(ctx, e)
	return e, a, err
}

// An answer is what a mount says about itself.
type answer struct {
	top unix.Stat_t
	fs  unix.Statfs_t
}

// answer asks a mount: ErrCorrupted if it is dead.
func (m *Mounter) answer(ctx context.Context, e *mountinfo.Info) (answer, error) {
	a, err := ask(ctx, &m.calls, fmt.Sprintf("answer %d %s", e.ID, e.Mountpoint), func() (a answer, err error) {
		if err := unix.Lstat(e.Mountpoint, &a.top); err != nil {
			return a, err
		}
		// stat may be answered from a cache, statfs asks the server.
		return a, unix.Statfs(e.Mountpoint, &a.fs)
	})
	return a, meaning(err, ErrNotMounted, ErrOther)
}
