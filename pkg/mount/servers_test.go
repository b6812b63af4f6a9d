//go:build linux && servers

package mount

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// export is the directory that the machine of e2e/vm/servers serves.
const export = "/srv/share"

// onServers makes a share of some snapshots in the machine of e2e/vm.
func onServers(t *testing.T) (m *Mounter, dir string) {
	t.Helper()
	if os.Getenv("ABACA_TEST_VM") == "" {
		t.Skip("needs the machine of e2e/vm: make e2e-nfs")
	}
	run(t, "find", export, "-mindepth", "1", "-delete")
	must(t, os.WriteFile(export+"/file", []byte("now"), 0o644))
	for _, s := range []string{"one-1", "two-1", "two-2"} {
		must(t, os.MkdirAll(export+"/.snapshot/"+s, 0o755))
		must(t, os.WriteFile(export+"/.snapshot/"+s+"/file", []byte(s), 0o644))
	}
	return New(), scratch(t)
}

func run(t *testing.T, arg ...string) {
	t.Helper()
	if out, err := exec.Command(arg[0], arg[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v: %s", arg, err, out)
	}
}

// wantSuper checks the options of the superblock at path.
func wantSuper(t *testing.T, path string, want ...string) {
	t.Helper()
	got := strings.Split(at(t, path)[0].VFSOptions, ",")
	for _, w := range want {
		w, not := strings.CutPrefix(w, "-")
		found := false
		for _, g := range got {
			found = found || g == w
		}
		if found == not {
			t.Fatalf("%s has %q, want %q", path, got, want)
		}
	}
}

// shared is what holds for every protocol.
func shared(t *testing.T, src Source, flags []string, live, snapshot []string) {
	m, dir := onServers(t)
	for _, classic := range []bool{false, true} {
		m.classic = classic
		ctx := t.Context()
		rw, ro, target := dir+"/rw", dir+"/ro", dir+"/snap"
		snap := src
		snap.Path = ".snapshot/one-*"
		for range 2 {
			must(t, m.Mount(ctx, src, rw, false, flags))
			must(t, m.Mount(ctx, src, ro, true, flags))
			must(t, m.Mount(ctx, snap, target, true, flags))
		}
		t.Logf("%+v", at(t, target)[0])
		wantMounts(t, rw, 1, "rw")
		wantMounts(t, ro, 1, "ro", "noatime")
		wantMounts(t, target, map[bool]int{true: 2, false: 1}[classic], "ro", "noatime")
		wantSuper(t, rw, append(live, "rw")...)
		wantSuper(t, target, snapshot...)
		if src.Protocol == "nfs" { // cifs has one for both, which is writable
			wantSuper(t, ro, "ro")
			wantSuper(t, target, "ro")
		}
		must(t, os.WriteFile(rw+"/new", []byte("x"), 0o644))
		must(t, os.Remove(rw+"/new"))
		wantClosed(t, ro)
		wantClosed(t, target)
		if text, err := os.ReadFile(target + "/file"); err != nil || string(text) != "one-1" {
			t.Fatalf("the snapshot holds %q, %v", text, err)
		}
		if entries, err := os.ReadDir(target + "/.."); err != nil || len(entries) != 3 {
			t.Fatalf("above the snapshot: %v, %v", entries, err)
		}
		other := src
		other.Path = ".snapshot/two-1"
		for _, a := range []struct {
			dir  string
			src  Source
			ro   bool
			want error
		}{
			{rw, src, false, nil}, {rw, src, true, ErrWritable}, {ro, src, true, nil},
			{target, snap, true, nil}, {target, src, true, ErrOther}, {ro, snap, true, ErrOther}, {target, other, true, ErrOther},
		} {
			wantIs(t, m.Prove(ctx, a.dir, a.src, a.ro), a.want)
		}
		wantIs(t, m.Mount(ctx, other, target, true, flags), ErrOther)
		wantIs(t, m.Mount(ctx, src, ro, false, flags), ErrOther)

		other.Path = ".snapshot/two-*"
		wantIs(t, m.Mount(ctx, other, dir+"/x", true, flags), ErrInvalid)
		other.Path = ".snapshot/none"
		wantIs(t, m.Mount(ctx, other, dir+"/x", true, flags), ErrNoSource)
		// A directory of a share, to be written to.
		other.Path = ".snapshot"
		must(t, m.Mount(ctx, other, dir+"/x", false, flags))
		must(t, os.WriteFile(dir+"/x/new", nil, 0o644))
		must(t, os.Remove(dir+"/x/new"))
		must(t, m.Unmount(ctx, dir+"/x"))

		must(t, m.Bind(ctx, target, dir+"/pod", true))
		must(t, m.Unmount(ctx, target))
		must(t, m.Check(ctx, dir+"/pod"))
		must(t, m.Unmount(ctx, dir+"/pod"))

		// Killed when the whole was mounted and no more.
		must(t, os.Mkdir(target, 0o755))
		o, err := protocols[src.Protocol].options(true, snap, flags)
		must(t, err)
		from, err := protocols[src.Protocol].find(ctx, m, snap)
		must(t, err)
		o.vfs = append(o.vfs, guard...)
		must(t, from.(*network).locations[0].mount(ctx, m, target, o))
		wantIs(t, m.Prove(ctx, target, snap, true), ErrOther)
		must(t, m.Mount(ctx, snap, target, true, flags))
		must(t, m.Prove(ctx, target, snap, true))
		must(t, m.Unmount(ctx, target))

		must(t, m.Unmount(ctx, ro))
		must(t, m.Unmount(ctx, rw))
		if left, err := m.Below(dir); err != nil || len(left) != 1 {
			t.Fatalf("left: %q, %v", left, err)
		}
	}

	// The first place swallows what is sent to it.
	places := src
	places.Locations = []string{strings.Replace(src.Locations[0], "127.0.0.1", "192.0.2.1", 1), src.Locations[0]}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	start := time.Now()
	must(t, m.Mount(ctx, places, dir+"/places", true, flags))
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("the place that does not answer was left after %v", took)
	}
	must(t, m.Prove(ctx, dir+"/places", places, true))
	must(t, m.Prove(ctx, dir+"/places", src, true))
	must(t, m.Unmount(ctx, dir+"/places"))
	places.Locations[1] = strings.Replace(places.Locations[0], "192.0.2.1", "192.0.2.2", 1)
	err := m.Mount(ctx, places, dir+"/places", true, flags)
	if err == nil || !strings.Contains(err.Error(), "192.0.2.1") || !strings.Contains(err.Error(), "192.0.2.2") || ctxErr(err) {
		t.Fatalf("mounted from nobody: %v", err)
	}
	t.Log(err)
	lost := src
	lost.Locations = []string{src.Locations[0] + "x"}
	if err := m.Mount(ctx, lost, dir+"/lost", true, flags); err == nil {
		t.Fatal("what nobody serves is mounted")
	} else {
		t.Log(err)
	}
	if _, err := os.Lstat(dir + "/lost"); !os.IsNotExist(err) {
		t.Fatalf("the directory is left: %v", err)
	}
}

// onNFS is the export as version 3 or 4 knows it.
func onNFS(host, vers string) Source {
	if strings.HasSuffix(vers, "=3") {
		return Source{Protocol: "nfs", Locations: []string{host + ":" + export}}
	}
	return Source{Protocol: "nfs", Locations: []string{host + ":/share"}}
}

func TestNFS(t *testing.T) {
	cached := []string{"hard", "nocto", "acregmin=3600", "acregmax=3600", "acdirmin=3600", "acdirmax=3600"}
	for vers, shown := range map[string]string{"vers=3": "vers=3", "nfsvers=4.0": "vers=4.0", "vers=4.1": "vers=4.1", "nfsvers=4.2": "vers=4.2"} {
		t.Run(shown, func(t *testing.T) {
			flags := []string{vers, "nconnect=3"}
			live := []string{shown, "hard", "nconnect=3", "-nocto"}
			shared(t, onNFS("127.0.0.1", vers), flags, live, append([]string{shown, "nconnect=3"}, cached...))
		})
	}
	t.Run("any version", func(t *testing.T) { shared(t, onNFS("127.0.0.1", ""), nil, []string{"vers=4.2", "hard"}, cached) })
	// Or the second would have the first one's options, and show its name.
	t.Run("superblocks", func(t *testing.T) {
		m, dir := onServers(t)
		one, two := onNFS("127.0.0.1", ""), onNFS("nas", "")
		must(t, m.Mount(t.Context(), one, dir+"/one", false, nil))
		must(t, m.Mount(t.Context(), one, dir+"/again", false, nil))
		must(t, m.Mount(t.Context(), two, dir+"/two", false, nil))
		must(t, m.Prove(t.Context(), dir+"/two", two, false))
		if a, b := at(t, dir+"/one")[0], at(t, dir+"/again")[0]; a.Minor == b.Minor {
			t.Fatalf("one superblock for %+v and %+v", a, b)
		}
	})
	for _, host := range []string{"[::1]", "localhost"} {
		t.Run(host, func(t *testing.T) {
			m, dir := onServers(t)
			src := onNFS(host, "")
			src.Path = ".snapshot/one-?"
			for range 2 {
				must(t, m.Mount(t.Context(), src, dir+"/x", true, nil))
			}
			wantMounts(t, dir+"/x", 1, "ro")
			must(t, m.Unmount(t.Context(), dir+"/x"))
		})
	}
}

func TestCIFS(t *testing.T) {
	src := Source{Protocol: "cifs", Locations: []string{`\\127.0.0.1\share`}}
	shared(t, src, []string{"vers=3.1.1"}, []string{"vers=3.1.1", "serverino"}, []string{"actimeo=3600", "cache=loose", "nolease"})

	m, dir := onServers(t)
	who := t.TempDir() + "/who"
	must(t, os.WriteFile(who, []byte("username=abaca\npassword=geheim\n"), 0o600))
	private := Source{Protocol: "cifs", Locations: []string{"//[::1]/private"}}
	must(t, m.Mount(t.Context(), private, dir+"/x", false, []string{"credentials=" + who}))
	wantSuper(t, dir+"/x", "username=abaca")
	must(t, os.WriteFile(dir+"/x/new", nil, 0o644))
	must(t, m.Mount(t.Context(), private, dir+"/x", false, []string{"credentials=" + who}))
	wantMounts(t, dir+"/x", 1)
	must(t, m.Unmount(t.Context(), dir+"/x"))
	must(t, os.WriteFile(who, []byte("username=abaca\npassword=falsch\n"), 0o600))
	err := m.Mount(t.Context(), private, dir+"/x", false, []string{"credentials=" + who})
	if t.Log(err); err == nil || strings.Contains(err.Error(), "falsch") {
		t.Fatalf("error = %v", err)
	}
	if err := m.Mount(t.Context(), private, dir+"/x", false, nil); err == nil {
		t.Fatal("a guest is let in")
	}
	must(t, os.Chmod(who, 0o644))
	wantIs(t, m.Mount(t.Context(), private, dir+"/x", false, []string{"credentials=" + who}), ErrInvalid)
}

// Mounts of one server do not change one another, and what goes away on the
// server is replaced when it is there again.
func TestNFSStale(t *testing.T) {
	m, dir := onServers(t)
	ctx := t.Context()
	src := onNFS("127.0.0.1", "")
	src.Path = ".snapshot/one-1"
	must(t, m.Mount(ctx, src, dir+"/x", true, nil))
	must(t, os.RemoveAll(export+"/.snapshot/one-1"))
	wantIs(t, m.Check(ctx, dir+"/x"), ErrCorrupted)
	wantIs(t, m.Prove(ctx, dir+"/x", src, true), ErrCorrupted)
	wantIs(t, m.Mount(ctx, src, dir+"/x", true, nil), ErrNoSource)
	must(t, os.Mkdir(export+"/.snapshot/one-1", 0o755))
	must(t, m.Mount(ctx, src, dir+"/x", true, nil))
	must(t, m.Prove(ctx, dir+"/x", src, true))
	must(t, m.Unmount(ctx, dir+"/x"))
}

// A server that is gone holds nobody, and its mount is used again when it is
// back.
func TestNFSDead(t *testing.T) {
	for _, vers := range []string{"vers=3", "vers=4.2"} {
		t.Run(vers, func(t *testing.T) {
			m, dir := onServers(t)
			m.patience = time.Second
			src := onNFS("127.0.0.1", vers)
			snap := Source{Protocol: "nfs", Locations: src.Locations, Path: ".snapshot/one-1"}
			must(t, m.Mount(t.Context(), src, dir+"/a", false, []string{vers}))
			must(t, m.Mount(t.Context(), snap, dir+"/b", true, []string{vers}))
			must(t, m.Mount(t.Context(), snap, dir+"/c", true, []string{vers}))
			run(t, "rpc.nfsd", "0")
			back := func() {
				run(t, "rpc.nfsd", "--grace-time", "10", "--lease-time", "10", "4")
				_ = os.WriteFile("/proc/fs/nfsd/v4_end_grace", []byte("Y"), 0)
			}
			defer back()
			brief := func() context.Context {
				ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
				t.Cleanup(cancel)
				return ctx
			}
			wantSoon := func(limit time.Duration, f func() error, want error) {
				t.Helper()
				start := time.Now()
				wantIs(t, f(), want)
				if took := time.Since(start); took > limit {
					t.Fatalf("took %v", took)
				}
			}
			for _, d := range []string{"/a", "/b"} {
				wantSoon(2*time.Second, func() error { return m.Check(brief(), dir+d) }, context.DeadlineExceeded)
				wantSoon(2*time.Second, func() error { return m.Prove(brief(), dir+d, src, true) }, context.DeadlineExceeded)
			}
			wantSoon(2*time.Second, func() error { return m.Mount(brief(), snap, dir+"/b", true, []string{vers}) }, context.DeadlineExceeded)
			if err := m.Mount(brief(), src, dir+"/new", true, []string{vers}); err == nil {
				t.Fatal("mounted from a dead server")
			} else {
				t.Log(err)
			}
			wantMounts(t, dir+"/new", 0)
			// Taken off while dead.
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			wantSoon(10*time.Second, func() error { return m.Unmount(ctx, dir+"/c") }, nil)
			wantMounts(t, dir+"/c", 0)
			back()
			for i := 0; m.Check(brief(), dir+"/a") != nil; i++ {
				if i > 100 {
					t.Fatal("it does not answer though the server is back")
				}
			}
			ctx, cancel = context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			must(t, m.Mount(ctx, snap, dir+"/b", true, []string{vers}))
			must(t, m.Prove(ctx, dir+"/b", snap, true))
			must(t, os.WriteFile(dir+"/a/new", nil, 0o644))
			must(t, m.Unmount(ctx, dir+"/b"))
			must(t, m.Unmount(ctx, dir+"/a"))
			if !errors.Is(m.Check(ctx, dir+"/a"), ErrNotMounted) {
				t.Fatal("still mounted")
			}
		})
	}
}
