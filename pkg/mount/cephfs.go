//go:build linux

package mount

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// cephfs is CephFS by the kernel, or by ceph-fuse where the kernel has none or
// the option mounter=fuse says so (mounter=kernel: never ceph-fuse). A location
// is MONITORS:/path, where monitors are separated by commas, each either
// host[:port] or the pair [v2:host:port,v1:host:port]. Options are those of
// mount.ceph(8), or, for ceph-fuse, Ceph's settings whose names begin with
// client_; fs= names the file system for both. The source's user is the cephx
// id, and its key is in [Options].
type cephfs struct{}

var cephSame = map[string]string{"_netdev": "", "defaults": "", "mds_namespace": "fs", "client_mds_namespace": "fs", "client_fs": "fs"}

var cephSecret = map[string]string{
	"name": "the source says who the user is", "secret": "it must be nowhere but in the directory of keys",
	"secretfile": "the key is looked for in the directory of keys", "mon_addr": "the location says where the monitors are",
}

var kernelWords = grammar{
	known: strings.Fields(`
		mounter= fs= ms_mode= rsize= wsize= rasize= mount_timeout= osd_idle_ttl= osdkeepalive= osd_request_timeout=
		caps_max= caps_wanted_delay_min= caps_wanted_delay_max= write_congestion_kb= readdir_max_entries= readdir_max_bytes=
		cap_release_safety= snapdirname= recover_session= read_from_replica= crush_location=
		dirstat nodirstat rbytes norbytes asyncreaddir noasyncreaddir dcache nodcache ino32 noino32 poolperm nopoolperm
		quotadf noquotadf copyfrom nocopyfrom wsync nowsync pagecache nopagecache sparseread nosparseread share noshare
		crc nocrc cephx_require_signatures nocephx_require_signatures cephx_sign_messages nocephx_sign_messages
		tcp_nodelay notcp_nodelay require_active_mds norequire_active_mds abort_on_full rxbounce fsc nofsc acl noacl
		context= fscontext= defcontext= rootcontext=`),
	same: cephSame, secret: cephSecret,
}

var fuseWords = grammar{known: []string{"mounter=", "fs="}, prefix: "client_", same: cephSame, secret: cephSecret}

func (cephfs) options(readOnly bool, src Source, flags []string) (options, error) {
	mounter := ""
	for _, word := range slices.Concat(src.Options, flags) {
		if v, ok := strings.CutPrefix(word, "mounter="); ok {
			mounter = v
		}
	}
	if mounter == "" {
		mounter = "fuse"
		// To ask for it makes the kernel load its module.
		if fd, err := unix.Fsopen("ceph", unix.FSOPEN_CLOEXEC); err == nil {
			unix.Close(fd)
			mounter = "kernel"
		} else if text, err := os.ReadFile("/proc/filesystems"); err == nil && bytes.Contains(text, []byte("\tceph\n")) {
			mounter = "kernel"
		}
	}
	words, ok := map[string]grammar{"kernel": kernelWords, "fuse": fuseWords}[mounter]
	if !ok {
		return options{}, fmt.Errorf("mount option mounter=%s is neither mounter=kernel nor mounter=fuse: %w", mounter, ErrInvalid)
	}
	o, err := wish(words, readOnly, src, flags)
	if err != nil {
		return o, fmt.Errorf("mounter=%s: %w", mounter, err)
	}
	o.usual("mounter=" + mounter)
	if mounter == "kernel" {
		// A snapshot lies in the same file system as its share, and mounts of
		// one path would share a superblock.
		o.usual("noshare", "share")
	}
	return o, nil
}

func (cephfs) find(ctx context.Context, m *Mounter, src Source) (origin, error) {
	if src.User == "" || strings.ContainsAny(src.User, "/,= \n") || strings.HasPrefix(src.User, ".") {
		return nil, fmt.Errorf("cephfs needs the name of a cephx user, and %q is none: %w", src.User, ErrInvalid)
	}
	fs := ""
	for _, word := range src.Options {
		name, value, _ := strings.Cut(word, "=")
		if name == "fs" || cephSame[name] == "fs" {
			fs = value
		}
	}
	return onNetwork(m, src, func(text string) (*cephLocation, error) {
		l, err := parseCeph(text)
		if err != nil {
			return nil, err
		}
		l.user, l.fs = src.User, fs
		return l, l.resolve(ctx)
	})
}

// A cephLocation is the monitors of a cluster and a path in one of its file
// systems, the default one if fs is empty.
type cephLocation struct {
	text, monitors, path string
	at                   []monitor
	user, fs             string
}

// A monitor is an address at which one speaks version 1 or 2 of the protocol,
// with addrs, the same as addresses with a port.
type monitor struct {
	version    int
	host, port string
	addrs      []string
}

func parseCeph(text string) (*cephLocation, error) {
	monitors, dir, ok := strings.Cut(text, ":/")
	if !ok || monitors == "" {
		return nil, fmt.Errorf("%q is not MONITORS:/path: %w", text, ErrInvalid)
	}
	l := &cephLocation{monitors: monitors, path: path.Clean("/" + dir)}
	l.text = monitors + ":" + l.path
	// The brackets around a pair only say that both are one monitor.
	for one := range strings.SplitSeq(strings.ReplaceAll(monitors, "[v", "v"), ",") {
		mon := monitor{}
		rest := one
		if v, ok := strings.CutPrefix(rest, "v1:"); ok {
			mon.version, rest = 1, v
		} else if v, ok := strings.CutPrefix(rest, "v2:"); ok {
			mon.version, rest = 2, v
		}
		if strings.Count(rest, "]") > strings.Count(rest, "[") {
			rest = strings.TrimSuffix(rest, "]")
		}
		if i := strings.LastIndexByte(rest, ':'); i >= 0 && !strings.HasSuffix(rest, "]") {
			mon.port, _, _ = strings.Cut(rest[i+1:], "/") // behind it is a nonce
			rest = rest[:i]
			if n, err := strconv.Atoi(mon.port); err != nil || n < 1 || n > 65535 {
				return nil, fmt.Errorf("location %q: monitor %q has no such port: %w", text, one, ErrInvalid)
			}
		}
		var err error
		if mon.host, err = hostOf(rest); err != nil {
			return nil, fmt.Errorf("location %q: %w", text, err)
		}
		if mon.version == 0 {
			mon.version = map[bool]int{true: 2, false: 1}[mon.port == "3300"]
		}
		mon.port = cmp.Or(mon.port, map[int]string{1: "6789", 2: "3300"}[mon.version])
		l.at = append(l.at, mon)
	}
	return l, nil
}

// resolve looks up the monitors, as the kernel knows addresses alone. One that
// is not found does no harm while others are.
func (l *cephLocation) resolve(ctx context.Context) (err error) {
	found := false
	for i := range l.at {
		addrs, lerr := net.DefaultResolver.LookupNetIP(ctx, "ip", l.at[i].host)
		if lerr != nil {
			err = fmt.Errorf("this node cannot look up monitor %s: %w", l.at[i].host, lerr)
		}
		for _, a := range addrs {
			found = true
			l.at[i].addrs = append(l.at[i].addrs, net.JoinHostPort(a.Unmap().String(), l.at[i].port))
		}
	}
	if found {
		return nil
	}
	return err
}

func (l *cephLocation) String() string { return l.text }

// below trusts the kernel's source if all of its monitors are of this location,
// and ceph-fuse's if it is what fuse wrote there.
func (l *cephLocation) below(e *mountinfo.Info) (string, bool) {
	switch e.FSType {
	case "ceph":
		monitors, dir, ok := strings.Cut(e.Source, ":/")
		for one := range strings.SplitSeq(monitors, ",") {
			ok = ok && slices.ContainsFunc(l.at, func(m monitor) bool { return slices.Contains(m.addrs, one) })
		}
		super := strings.Split(e.VFSOptions, ",")
		if !ok || l.fs != "" && !slices.Contains(super, "fs="+l.fs) && !slices.Contains(super, "mds_namespace="+l.fs) {
			return "", false
		}
		return under("/"+strings.TrimRight(dir, "/")+e.Root, l.path)
	case "fuse.ceph-fuse":
		fs, text, ok := strings.Cut(e.Source, "@")
		fs, _, token := strings.Cut(fs, "+")
		if !ok || !token || text != l.text || l.fs != "" && fs != l.fs {
			return "", false
		}
		return under(e.Root, "/")
	}
	return "", false
}

func (l *cephLocation) mount(ctx context.Context, m *Mounter, dir string, o options) error {
	key, err := m.key(ctx, l.user)
	if err != nil {
		return err
	}
	if o.value("mounter") == "fuse" {
		return l.fuse(ctx, m, dir, o, key)
	}
	return l.kernel(ctx, m, dir, o, key)
}

// kernel mounts by mount(2), so that the key is in no argument of a program.
func (l *cephLocation) kernel(ctx context.Context, m *Mounter, dir string, o options, key string) error {
	// Any kernel knows version 1 of the protocol; 5.11 and later know 2.
	version := map[bool]int{true: 2, false: 1}[o.has("ms_mode") && o.value("ms_mode") != "legacy"]
	if !o.has("ms_mode") && !slices.ContainsFunc(l.at, func(m monitor) bool { return m.version == 1 }) {
		version = 2
		o.usual("ms_mode=prefer-crc")
	}
	var at []string
	for _, mon := range l.at {
		if mon.version == version {
			at = append(at, mon.addrs...)
		}
	}
	if len(at) == 0 {
		return fmt.Errorf("no monitor at %s can be asked by version %d of the protocol, which ms_mode wants: %w", l, version, ErrInvalid)
	}
	o.usual("mount_timeout=" + seconds(ctx)) // nothing else ends the call
	data := []string{"name=" + l.user, "secret=" + key}
	for _, word := range o.fs {
		if v, ok := strings.CutPrefix(word, "fs="); ok {
			word = "mds_namespace=" + v // the name that every kernel knows
		}
		if !strings.HasPrefix(word, "mounter=") {
			data = append(data, word)
		}
	}
	all := strings.Join(data, ",")
	if len(all) >= os.Getpagesize() {
		return fmt.Errorf("the options are longer than the kernel takes: %w", ErrInvalid)
	}
	var flags uintptr
	for _, name := range o.vfs {
		flags |= vfs[name].flag
	}
	return l.meaning(unix.Mount(strings.Join(at, ",")+":"+l.path, dir, "ceph", flags, all))
}

// meaning adds a hint to an error that CephFS has answered a mount with.
func (l *cephLocation) meaning(err error) error {
	hint := fmt.Sprintf("do the monitors answer, is an MDS active, and is the key of user %q the right one? See dmesg", l.user)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("the cluster has no such path, or no file system of this name: %w: %w", ErrNoSource, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		hint = fmt.Sprintf("the cluster refuses user %q: is the key the right one, and may it read the path?", l.user)
	case errors.Is(err, unix.ENODEV):
		hint = "this kernel has no CephFS; take mounter=fuse, or load the module ceph"
	case errors.Is(err, unix.EINVAL):
		hint = "this kernel does not know one of the options, see dmesg"
	}
	return fmt.Errorf("%s: %w", hint, err)
}

// seconds is how many whole ones are left, for what counts in them.
func seconds(ctx context.Context) string {
	return strconv.Itoa(max(1, int(left(ctx).Seconds())))
}
