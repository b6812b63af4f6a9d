//go:build linux

package mount

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func TestOptions(t *testing.T) {
	ro := Source{Path: ".snapshot/x"}
	demand := func(o ...string) Source { return Source{Options: o} }
	for name, c := range map[string]struct {
		p        protocol
		readOnly bool
		src      Source
		flags    string
		want     string // of the mount and of the file system; or what the error says
	}{
		"nfs":             {nfs{}, false, Source{}, "", "rw: hard nosharecache retry=0"},
		"nfs ro":          {nfs{}, true, Source{}, "", "noatime ro: hard nosharecache retry=0"},
		"nfs snapshot":    {nfs{}, true, ro, "", "noatime ro: hard nosharecache retry=0 nocto actimeo=3600 nolock"},
		"nfs rw below":    {nfs{}, false, ro, "", "rw: hard nosharecache retry=0"},
		"nfs immutable":   {nfs{}, true, demand("immutable"), "", "noatime ro: hard nosharecache retry=0 nocto actimeo=3600 nolock"},
		"nfs by flag":     {nfs{}, false, demand("immutable"), "ro", "noatime ro: hard nosharecache retry=0 nocto actimeo=3600 nolock"},
		"nfs choices":     {nfs{}, true, ro, "nfsvers=4.1 nconnect=8 soft cto acregmax=5 retry=1 sharecache lock _netdev", "noatime ro: vers=4.1 nconnect=8 soft cto acregmax=5 retry=1 sharecache lock"},
		"nfs twice":       {nfs{}, false, demand("vers=4.1"), "nfsvers=4.1 vers=4.1", "rw: vers=4.1 hard nosharecache retry=0"},
		"mount options":   {nfs{}, false, Source{}, "nosuid nodev defaults", "nodev nosuid rw: hard nosharecache retry=0"},
		"cifs":            {cifs{}, false, Source{}, "vers=3.1.1", "rw: vers=3.1.1 guest"},
		"cifs file":       {cifs{}, true, demand("immutable"), "cred=/etc/who dom=x", "noatime ro: credentials=/etc/who domain=x actimeo=3600 nolease cache=loose"},
		"cifs uncached":   {cifs{}, true, demand("immutable"), "guest cache=none", "noatime ro: guest cache=none nolease"},
		"cifs kerberos":   {cifs{}, false, Source{}, "sec=krb5i cruid=0", "rw: sec=krb5i cruid=0"},
		"ceph":            {cephfs{}, true, demand("fs=one"), "mounter=kernel", "noatime ro: fs=one mounter=kernel noshare"},
		"ceph old name":   {cephfs{}, false, demand("fs=one"), "mounter=kernel mds_namespace=one ms_mode=secure share", "rw: fs=one mounter=kernel ms_mode=secure share"},
		"ceph-fuse":       {cephfs{}, false, Source{}, "mounter=fuse client_fs=one client_quota_df=false", "rw: mounter=fuse fs=one client_quota_df=false"},
		"ceph by the way": {cephfs{}, false, Source{}, "mounter=fuse rasize=1", `"rasize=1" is not known`},

		"two versions":    {nfs{}, false, demand("vers=3"), "nfsvers=4.2", "vers=3 and vers=4.2 contradict"},
		"hard and soft":   {nfs{}, false, demand("hard"), "soft", "hard and soft contradict"},
		"ac and noac":     {nfs{}, false, Source{}, "noac ac", "ac and noac contradict"},
		"ro and rw":       {nfs{}, true, Source{}, "rw", "ro and rw contradict"},
		"immutable rw":    {nfs{}, false, demand("immutable"), "", "read-only"},
		"immutable flag":  {nfs{}, true, Source{}, "immutable", `"immutable" is not known`},
		"nearest":         {nfs{}, false, Source{}, "nconect=4", `did you mean "nconnect"`},
		"no value":        {nfs{}, false, Source{}, "vers", "vers has a value"},
		"a value":         {nfs{}, false, Source{}, "hard=1", "hard has no value"},
		"joined":          {nfs{}, true, Source{}, "vers=3,rw", "comma"},
		"empty value":     {nfs{}, false, Source{}, "vers=", "empty"},
		"background":      {nfs{}, false, Source{}, "bg", `"bg" cannot be used`},
		"address":         {nfs{}, false, Source{}, "addr=10.0.0.1", "location"},
		"password":        {cifs{}, false, Source{}, "password=geheim", "credentials="},
		"guest and file":  {cifs{}, false, Source{}, "guest credentials=/x", "guest and credentials=/x contradict"},
		"ceph secret":     {cephfs{}, false, Source{}, "mounter=kernel secret=geheim", "directory of keys"},
		"ceph user":       {cephfs{}, false, Source{}, "mounter=fuse name=admin", "source says"},
		"ceph mounter":    {cephfs{}, false, Source{}, "mounter=ganesha", "mounter=fuse"},
		"ceph two":        {cephfs{}, false, demand("mounter=fuse"), "mounter=kernel", "contradict"},
		"ceph two fs":     {cephfs{}, false, demand("fs=one"), "mounter=kernel mds_namespace=two", "fs=one and fs=two contradict"},
		"any to a kernel": {cephfs{}, false, Source{}, "mounter=kernel client_fs=a client_x=1", "client_x"},
	} {
		o, err := c.p.options(c.readOnly, c.src, strings.Fields(c.flags))
		if err != nil {
			if wantIs(t, err, ErrInvalid); !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "geheim") {
				t.Errorf("%s: %v does not say %q, or says a secret", name, err, c.want)
			}
		} else if got := strings.Join(o.vfs, " ") + ": " + strings.Join(o.fs, " "); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", name, got, c.want)
		}
	}
}

// entry is a line of mountinfo: type, source, root, options of the superblock.
func entry(typ, source, root, super string) *mountinfo.Info {
	return &mountinfo.Info{FSType: typ, Source: source, Root: root, VFSOptions: super, Options: "ro,noatime"}
}

func TestLocations(t *testing.T) {
	ctx := t.Context()
	deep := ".snap/_*_1"
	for name, c := range map[string]struct {
		src  Source
		e    *mountinfo.Info
		want bool
	}{
		"nfs":            {Source{Protocol: "nfs", Locations: []string{"a:/x", "b:/x"}}, entry("nfs4", "b:/x", "/", ""), true},
		"nfs v3":         {Source{Protocol: "nfs", Locations: []string{"a:/x/"}}, entry("nfs", "a:/x", "/", ""), true},
		"nfs IPv6":       {Source{Protocol: "nfs", Locations: []string{"fd00::1:/x"}}, entry("nfs", "[fd00::1]:/x", "/", ""), true},
		"nfs root":       {Source{Protocol: "nfs", Locations: []string{"a:/"}}, entry("nfs4", "a:/", "/", ""), true},
		"nfs root below": {Source{Protocol: "nfs", Locations: []string{"a:/"}, Path: "x"}, entry("nfs4", "a:/x", "/", ""), true},
		"nfs below":      {Source{Protocol: "nfs", Locations: []string{"a:/x"}, Path: deep}, entry("nfs4", "a:/x/.snap/_u_1", "/", ""), true},
		"nfs whole":      {Source{Protocol: "nfs", Locations: []string{"a:/x"}, Path: deep}, entry("nfs4", "a:/x", "/", ""), false},
		"nfs deeper":     {Source{Protocol: "nfs", Locations: []string{"a:/x"}, Path: deep}, entry("nfs4", "a:/x/.snap/_u_1/d", "/", ""), false},
		"nfs deleted":    {Source{Protocol: "nfs", Locations: []string{"a:/x"}, Path: "*/*/deleted"}, entry("nfs4", "a:/x/b//deleted", "/", ""), false},
		"nfs host":       {Source{Protocol: "nfs", Locations: []string{"a:/x"}}, entry("nfs4", "c:/x", "/", ""), false},
		"nfs export":     {Source{Protocol: "nfs", Locations: []string{"a:/x"}}, entry("nfs4", "a:/xy", "/", ""), false},
		"nfs joined":     {Source{Protocol: "nfs", Locations: []string{"a:/x"}, Path: "y"}, entry("nfs4", "a:/xy", "/", ""), false},
		"nfs type":       {Source{Protocol: "nfs", Locations: []string{"a:/x"}}, entry("tmpfs", "a:/x", "/", ""), false},
		"cifs":           {Source{Protocol: "cifs", Locations: []string{`\\h\s`}}, entry("cifs", "//h/s", "/", ""), true},
		"cifs below":     {Source{Protocol: "cifs", Locations: []string{"//h/s/"}, Path: "d"}, entry("smb3", "//h/s", "/d", ""), true},
		"cifs other":     {Source{Protocol: "cifs", Locations: []string{"//h/s"}}, entry("cifs", "//h/t", "/", ""), false},
		"cifs root":      {Source{Protocol: "cifs", Locations: []string{"//h/s"}}, entry("cifs", "//h/s", "/d", ""), false},
		"cifs deleted":   {Source{Protocol: "cifs", Locations: []string{"//h/s"}, Path: "d"}, entry("cifs", "//h/s", "/d//deleted", ""), false},

		"ceph":         {ceph("1.1.1.1,2.2.2.2:/p", ""), entry("ceph", "2.2.2.2:6789,1.1.1.1:6789:/p", "/", "fs=b"), true},
		"ceph other":   {ceph("1.1.1.1,2.2.2.2:/p", ""), entry("ceph", "2.2.2.2:6789,3.3.3.3:6789:/p", "/", ""), false},
		"ceph v2":      {ceph("[v2:1.1.1.1:3300/0,v1:1.1.1.1:6789/0]:/p", ""), entry("ceph", "1.1.1.1:3300:/p", "/", ""), true},
		"ceph IPv6":    {ceph("[v2:[fd::1]:3300/0,v1:[fd::1]:6789/0],[fd::2]:/p", ""), entry("ceph", "[fd::1]:6789,[fd::2]:6789:/p", "/", ""), true},
		"ceph fs":      {ceph("1.1.1.1:/p", "", "fs=a"), entry("ceph", "1.1.1.1:6789:/p", "/", "rw,fs=a"), true},
		"ceph old":     {ceph("1.1.1.1:/p", "", "mds_namespace=a"), entry("ceph", "1.1.1.1:6789:/p", "/", "rw,mds_namespace=a"), true},
		"ceph no fs":   {ceph("1.1.1.1:/p", "", "fs=a"), entry("ceph", "1.1.1.1:6789:/p", "/", "rw,fs=ab"), false},
		"ceph path":    {ceph("1.1.1.1:/p", ""), entry("ceph", "1.1.1.1:6789:/q", "/", ""), false},
		"ceph below":   {ceph("1.1.1.1:/p", deep), entry("ceph", "1.1.1.1:6789:/p", "/.snap/_u_1", ""), true},
		"ceph root":    {ceph("1.1.1.1:/", deep), entry("ceph", "1.1.1.1:6789:/", "/.snap/_u_1", ""), true},
		"ceph syntax":  {ceph("1.1.1.1:/p", ""), entry("ceph", "me@.fs=/p", "/", ""), false},
		"fuse":         {ceph("1.1.1.1,2.2.2.2:/p", deep), entry("fuse.ceph-fuse", "+T@1.1.1.1,2.2.2.2:/p", "/.snap/_u_1", ""), true},
		"fuse fs":      {ceph("1.1.1.1:/p", "", "fs=a"), entry("fuse.ceph-fuse", "a+T@1.1.1.1:/p", "/", ""), true},
		"fuse no fs":   {ceph("1.1.1.1:/p", "", "fs=a"), entry("fuse.ceph-fuse", "b+T@1.1.1.1:/p", "/", ""), false},
		"fuse path":    {ceph("1.1.1.1:/p", ""), entry("fuse.ceph-fuse", "+T@1.1.1.1:/pq", "/", ""), false},
		"fuse by hand": {ceph("1.1.1.1:/p", ""), entry("fuse.ceph-fuse", "@1.1.1.1:/p", "/", ""), false},
		"fuse plain":   {ceph("1.1.1.1:/p", ""), entry("fuse.ceph-fuse", "ceph-fuse", "/", ""), false},
	} {
		from, err := protocols[c.src.Protocol].find(ctx, New(), c.src)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if got := from.is(c.e, unix.Stat_t{}); got != c.want {
			t.Errorf("%s: %t, want %t", name, got, c.want)
		}
		if from.half(c.e) {
			t.Errorf("%s: taken for a mount that was not finished", name)
		}
	}

	below := Source{Protocol: "nfs", Locations: []string{"a:/x"}, Path: deep}
	from, err := nfs{}.find(ctx, New(), below)
	must(t, err)
	for options, want := range map[string]bool{"ro,nosuid,nodev,noexec": true, "rw,noexec,nodev,nosuid": true, "ro,nosuid,nodev": false, "ro": false} {
		e := entry("nfs4", "a:/x", "/", "")
		e.Options = options
		if from.half(e) != want {
			t.Errorf("half of %s: want %t", options, want)
		}
	}
}

func ceph(location, path string, options ...string) Source {
	return Source{Protocol: "cephfs", Locations: []string{location}, Path: path, User: "me", Options: options}
}

func TestLocationsRefused(t *testing.T) {
	for _, src := range []Source{
		{Protocol: "nfs"},
		{Protocol: "nfs", Locations: []string{"host"}},
		{Protocol: "nfs", Locations: []string{":/x"}},
		{Protocol: "nfs", Locations: []string{"-o:/x"}},
		{Protocol: "nfs", Locations: []string{"a,b:/x"}},
		{Protocol: "nfs", Locations: []string{"a b:/x"}},
		{Protocol: "nfs", Locations: []string{"[::1:/x"}},
		{Protocol: "nfs", Locations: []string{"[1.2.3.4]:/x"}},
		{Protocol: "nfs", Locations: []string{"a:/x", "b"}},
		{Protocol: "nfs", Locations: []string{"a:/x"}, Path: "../y"},
		{Protocol: "nfs", Locations: []string{"a:/x"}, Path: "/y"},
		{Protocol: "nfs", Locations: []string{"a:/x"}, Path: "y/../z"},
		{Protocol: "nfs", Locations: []string{"a:/x"}, Path: "y//z"},
		{Protocol: "nfs", Locations: []string{"a:/x"}, Path: "[y"},
		{Protocol: "nfs", Locations: []string{"a:/x"}, Path: "."},
		{Protocol: "cifs", Locations: []string{"//h"}},
		{Protocol: "cifs", Locations: []string{"//h/"}},
		{Protocol: "cifs", Locations: []string{"//h/s/d"}},
		{Protocol: "cifs", Locations: []string{"//h/.."}},
		{Protocol: "cifs", Locations: []string{"h/s"}},
		{Protocol: "cifs", Locations: []string{"//-h/s"}},
		{Protocol: "cephfs", Locations: []string{"1.1.1.1:/p"}},
		{Protocol: "cephfs", Locations: []string{"1.1.1.1:/p"}, User: "a/b"},
		{Protocol: "cephfs", Locations: []string{"1.1.1.1:/p"}, User: ".."},
		{Protocol: "cephfs", Locations: []string{"1.1.1.1:/p"}, User: "a,secret=x"},
		{Protocol: "cephfs", Locations: []string{"/p"}, User: "me"},
		{Protocol: "cephfs", Locations: []string{"1.1.1.1:x:/p"}, User: "me"},
		{Protocol: "cephfs", Locations: []string{"1.1.1.1:70000:/p"}, User: "me"},
		{Protocol: "cephfs", Locations: []string{"1.1.1.1,,2.2.2.2:/p"}, User: "me"},
		{Protocol: "cephfs", Locations: []string{"[v2:1.1.1.1:3300,v3:1.1.1.1:1]:/p"}, User: "me"},
	} {
		_, err := protocols[src.Protocol].find(t.Context(), New(), src)
		if err == nil {
			t.Errorf("%+v is taken", src)
			continue
		}
		wantIs(t, err, ErrInvalid)
	}
}

func TestOnly(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{".snap/_one_1", ".snap/_two_1", ".snap/_two_2", "a/x", "b/y", "deep/er"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	must(t, os.WriteFile(dir+"/.snap/_file_1", nil, 0o644))
	must(t, os.Symlink("_one_1", dir+"/.snap/_link_1"))
	must(t, os.Symlink(t.TempDir(), dir+"/out"))
	for pattern, want := range map[string]string{
		".snap": ".snap", ".snap/_one_1": ".snap/_one_1", ".snap/_one_*": ".snap/_one_1", "*/x": "a/x", ".snap/*_2": ".snap/_two_2", "[a]/?": "a/x",
	} {
		if got, err := only(dir, pattern); err != nil || got != want {
			t.Errorf("only(%s) = %q, %v; want %q", pattern, got, err, want)
		}
	}
	for pattern, want := range map[string]error{
		".snap/_two_*": ErrInvalid, "?/*": ErrInvalid,
		"none": ErrNoSource, ".snap/_none_*": ErrNoSource, ".snap/_file_*": ErrNoSource, ".snap/_file_1": ErrNoSource,
		".snap/_link_1": ErrNoSource, ".snap/_link_*": ErrNoSource, "out": ErrNoSource, "a/x/none/none": ErrNoSource,
	} {
		_, err := only(dir, pattern)
		wantIs(t, err, want)
	}
}

func TestKey(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	m := New(Options{Keys: dir})
	const key = "AQD9agVrL6BCHxAAQr3wyRFFu2EVsT2MZmmP6A=="
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
		must(t, os.Chmod(filepath.Join(dir, name), mode))
	}
	write("good", key+"\n", 0o600)
	write("wide", key, 0o640)
	write("ring", "[client.ring]\n\tkey = "+key+"\n", 0o600)
	write("empty", "", 0o600)
	must(t, os.Symlink("good", dir+"/link"))
	if got, err := m.key(t.Context(), "good"); err != nil || got != key {
		t.Fatalf("key = %q, %v", got, err)
	}
	for user, hint := range map[string]string{"wide": "0600", "ring": "print-key", "empty": "empty", "link": "symbolic", "none": "no such file"} {
		_, err := m.key(t.Context(), user)
		if err == nil || !strings.Contains(err.Error(), hint) || !strings.Contains(err.Error(), user) || strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v does not say %q, or says the key", user, err, hint)
		}
	}
	must(t, os.Chmod(dir, 0o750))
	_, err := m.key(t.Context(), "good")
	if wantIs(t, err, ErrInvalid); !strings.Contains(err.Error(), "0700") {
		t.Error(err)
	}
	_, err = New().key(t.Context(), "good")
	wantIs(t, err, ErrInvalid)
}

// Places are tried in their order, share the time, and are all named.
func TestLocationsInOrder(t *testing.T) {
	dir := scratch(t)
	m := New()
	var mu sync.Mutex // the last call of a caller who has given up may still run
	var tried []string
	note := func(names ...string) {
		mu.Lock()
		defer mu.Unlock()
		if tried = append(tried, names...); len(names) == 0 {
			tried = nil
		}
	}
	at := func(name string, f func(ctx context.Context, dir string) error) location {
		return fakeLocation{name, func(ctx context.Context, dir string) error { note(name); return f(ctx, dir) }}
	}
	broken := at("broken", func(_ context.Context, dir string) error {
		must(t, unix.Mount("half", dir, "tmpfs", 0, "")) // and what it leaves goes
		return unix.ECONNREFUSED
	})
	silent := at("silent", func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() })
	good := at("good", func(_ context.Context, dir string) error {
		err := unix.Mount("good", dir, "tmpfs", unix.MS_RDONLY|unix.MS_NOATIME, "")
		return err
	})
	empty := at("empty", func(context.Context, string) error { return ErrNoSource })
	put := func(ls ...location) error {
		note()
		ctx, cancel := context.WithTimeout(t.Context(), 600*time.Millisecond)
		defer cancel()
		return m.put(ctx, &network{m: m, locations: ls}, dir+"/target", options{vfs: []string{"noatime", "ro"}})
	}
	must(t, put(broken, silent, good, empty))
	if diff := cmp.Diff([]string{"broken", "silent", "good"}, tried); diff != "" {
		t.Fatal(diff)
	}
	wantMounts(t, dir+"/target", 1, "ro")
	must(t, put(empty, good))
	if len(tried) != 0 {
		t.Fatalf("what is mounted was mounted again: %v", tried)
	}
	must(t, m.Unmount(t.Context(), dir+"/target"))

	err := put(silent, broken)
	if err == nil || !strings.Contains(err.Error(), "silent: ") || !strings.Contains(err.Error(), "; broken: ") {
		t.Fatalf("error = %v", err)
	}
	if wantIs(t, err, unix.ECONNREFUSED); ctxErr(err) {
		t.Fatalf("it looks as if the caller had given up: %v", err)
	}
	wantIs(t, put(silent), context.DeadlineExceeded)
	wantIs(t, put(broken, empty), ErrNoSource)
	wantIs(t, put(silent, silent), context.DeadlineExceeded)
	wantMounts(t, dir+"/target", 0)
}

func ctxErr(err error) bool { return strings.Contains(err.Error(), context.DeadlineExceeded.Error()) }

type fakeLocation struct {
	name string
	do   func(ctx context.Context, dir string) error
}

func (l fakeLocation) String() string { return l.name }
func (l fakeLocation) below(e *mountinfo.Info) (string, bool) {
	below, ok := under(e.Root, "/")
	return below, ok && e.FSType == "tmpfs" && e.Source == "good"
}
func (l fakeLocation) mount(ctx context.Context, _ *Mounter, dir string, o options) error {
	return l.do(ctx, dir)
}

// A directory below takes the place of the whole, and nothing else is left.
func TestNarrow(t *testing.T) {
	both(t, func(t *testing.T, m *Mounter, dir string) {
		target := dir + "/target"
		whole := fakeLocation{"fake", func(_ context.Context, dir string) error {
			must(t, unix.Mount("good", dir, "tmpfs", 0, ""))
			for _, d := range []string{"/.snap/_a_1", "/.snap/_b_1", "/.snap/_b_2"} {
				must(t, os.MkdirAll(dir+d, 0o755))
				must(t, os.WriteFile(dir+d+"/file", []byte(d), 0o644))
			}
			var flags uintptr = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY
			must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""))
			return nil
		}}
		put := func(path string) error {
			return m.put(t.Context(), &network{m: m, path: path, locations: []location{whole}}, target, options{vfs: []string{"noatime", "nosuid", "ro"}})
		}
		must(t, put(".snap/_a_*"))
		n := map[bool]int{true: 2, false: 1}[m.classic]
		wantMounts(t, target, n, "ro", "nosuid")
		e, err := top(target)
		must(t, err)
		if e.Root != "/.snap/_a_1" || has(e, "noexec") || has(e, "nodev") {
			t.Fatalf("mounted: %+v", e)
		}
		wantClosed(t, target)
		must(t, put(".snap/_a_*"))
		wantMounts(t, target, n)
		wantIs(t, put(".snap/_b_1"), ErrOther)
		must(t, m.Unmount(t.Context(), target))
		wantMounts(t, target, 0)

		wantIs(t, put(".snap/_b_*"), ErrInvalid)
		wantIs(t, put(".snap/_c_*"), ErrNoSource)
		wantMounts(t, target, 0)
		if _, err := os.Lstat(target); !os.IsNotExist(err) {
			t.Fatalf("the directory is left: %v", err)
		}

		// Killed when the whole was mounted and no more.
		must(t, os.Mkdir(target, 0o755))
		must(t, whole.do(t.Context(), target))
		must(t, put(".snap/_b_2"))
		wantMounts(t, target, n, "ro")
		// But the whole as somebody uses it stays.
		must(t, m.Unmount(t.Context(), target))
		must(t, os.Mkdir(target, 0o755))
		must(t, whole.do(t.Context(), target))
		must(t, unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
		wantIs(t, put(".snap/_b_2"), ErrOther)
		wantMounts(t, target, 1)
	})
}
