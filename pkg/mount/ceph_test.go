//go:build linux && servers

package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCephFS runs in the machine of e2e/vm/ceph; or on any cluster, in the words
// of ABACA_TEST_CEPHFS: location, user, kernel or fuse. The user may make
// snapshots there.
func TestCephFS(t *testing.T) {
	keys := os.Getenv("ABACA_TEST_KEYS")
	if keys == "" {
		t.Skip("needs a Ceph cluster: make e2e-nfs")
	}
	if words := strings.Fields(os.Getenv("ABACA_TEST_CEPHFS")); len(words) == 3 {
		testCephFS(t, keys, words[0], words[1], "mounter="+words[2])
		return
	}
	for name, words := range map[string]string{
		"kernel v1":   "127.0.0.1:6789:/share mounter=kernel",
		"kernel pair": "[v2:127.0.0.1:3300/0,v1:127.0.0.1:6789/0]:/share",
		"kernel v2":   "127.0.0.1:3300:/share mounter=kernel",
		"kernel mode": "[v2:127.0.0.1:3300,v1:127.0.0.1:6789]:/share ms_mode=secure",
		"kernel name": "192.0.2.1,localhost:/share mounter=kernel",
		"fuse v1":     "127.0.0.1:6789:/share mounter=fuse",
		"fuse v2":     "[v2:127.0.0.1:3300,v1:127.0.0.1:6789]:/share mounter=fuse",
	} {
		t.Run(name, func(t *testing.T) {
			words := strings.Fields(words)
			testCephFS(t, keys, words[0], "abaca", words[1:]...)
		})
	}
}

func testCephFS(t *testing.T, keys, location, user string, options ...string) {
	dir, ctx := scratch(t), t.Context()
	m := New(Options{Keys: keys})
	fuse := slices.Contains(options, "mounter=fuse")
	src := Source{Protocol: "cephfs", Locations: []string{location}, User: user, Options: append([]string{"fs=cephfs"}, options...)}
	text, err := os.ReadFile(filepath.Join(keys, user))
	must(t, err)
	key := strings.TrimSpace(string(text))

	start := time.Now()
	must(t, m.Mount(ctx, src, dir+"/rw", false, nil))
	t.Logf("mounted in %v: %+v", time.Since(start), at(t, dir+"/rw")[0])
	wantNoKey(t, key)
	must(t, m.Mount(ctx, src, dir+"/rw", false, nil))
	wantMounts(t, dir+"/rw", 1, "rw")
	id := fmt.Sprint(time.Now().UnixNano())
	f, err := os.Create(dir + "/rw/file")
	must(t, err)
	_, err = f.WriteString("old " + id)
	must(t, err)
	must(t, f.Sync()) // a snapshot holds what the cluster has
	must(t, f.Close())
	for _, s := range []string{"one_" + id, "two_1_" + id, "two_2_" + id} {
		must(t, os.Mkdir(dir+"/rw/.snap/"+s, 0o755))
		t.Cleanup(func() {
			must(t, m.Mount(context.Background(), src, dir+"/clean", false, nil))
			must(t, os.Remove(dir+"/clean/.snap/"+s))
			must(t, m.Unmount(context.Background(), dir+"/clean"))
		})
	}
	must(t, os.WriteFile(dir+"/rw/file", []byte("new "+id), 0o644))
	snap := src
	snap.Path = ".snap/one_*" + id
	for range 2 {
		must(t, m.Mount(ctx, snap, dir+"/snap", true, nil))
	}
	t.Logf("snapshot: %+v", at(t, dir+"/snap")[0])
	wantMounts(t, dir+"/snap", 1, "ro", "noatime")
	wantNoKey(t, key)
	if got, err := os.ReadFile(dir + "/snap/file"); err != nil || string(got) != "old "+id {
		t.Fatalf("the snapshot holds %q, %v", got, err)
	}
	wantClosed(t, dir+"/snap")
	must(t, m.Mount(ctx, src, dir+"/ro", true, nil))
	wantClosed(t, dir+"/ro")
	must(t, os.WriteFile(dir+"/rw/file", []byte("newer "+id), 0o644))
	for _, a := range []struct {
		dir  string
		src  Source
		ro   bool
		want error
	}{
		{"/rw", src, false, nil}, {"/rw", src, true, ErrWritable}, {"/ro", src, true, nil},
		{"/snap", snap, true, nil}, {"/snap", src, true, ErrOther}, {"/ro", snap, true, ErrOther},
	} {
		wantIs(t, m.Prove(ctx, dir+a.dir, a.src, a.ro), a.want)
	}
	must(t, m.Bind(ctx, dir+"/snap", dir+"/pod", true))
	must(t, m.Unmount(ctx, dir+"/snap"))
	must(t, m.Check(ctx, dir+"/pod"))
	if s, err := m.Stats(ctx, dir+"/pod"); err != nil || s.UsedInodes < 0 || s.AvailableInodes < 0 {
		t.Fatalf("Stats = %+v, %v", s, err)
	}
	if _, err := os.Stat(dir + "/pod/file"); err != nil {
		t.Fatal(err)
	}
	must(t, m.Unmount(ctx, dir+"/pod"))
	must(t, m.Unmount(ctx, dir+"/ro"))

	two, none := src, src
	two.Path, none.Path = ".snap/two_*"+id, ".snap/none_*"
	wantIs(t, m.Mount(ctx, two, dir+"/x", true, nil), ErrInvalid)
	wantIs(t, m.Mount(ctx, none, dir+"/x", true, nil), ErrNoSource)
	wantMounts(t, dir+"/x", 0)

	// Nobody is at the first place, and the right key is not at hand.
	brief, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	start = time.Now()
	_, path, _ := strings.Cut(location, ":/")
	places := src
	places.Locations = []string{"127.0.0.1:1:/" + path, location}
	must(t, m.Mount(brief, places, dir+"/places", true, nil))
	t.Logf("by the second place after %v", time.Since(start))
	must(t, m.Prove(ctx, dir+"/places", src, true))
	must(t, m.Unmount(ctx, dir+"/places"))
	places.Locations = places.Locations[:1]
	brief, cancel = context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	start = time.Now()
	if err := m.Mount(brief, places, dir+"/places", true, nil); err == nil || time.Since(start) > 3*time.Second {
		t.Fatalf("mounted from nobody: %v after %v", err, time.Since(start))
	}
	lost := src
	lost.Locations = []string{location + "/not/there"}
	wantNoSource := func(src Source) {
		t.Helper()
		err := m.Mount(ctx, src, dir+"/x", true, nil)
		if t.Log(err); strings.Contains(fmt.Sprint(err), key) {
			t.Fatal("it says the key")
		}
		wantIs(t, err, ErrNoSource)
	}
	wantNoSource(lost)
	lost = src
	lost.Options = append([]string{"fs=none"}, options...)
	wantIs(t, m.Prove(ctx, dir+"/rw", lost, false), ErrOther)
	if err := m.Mount(brief, lost, dir+"/x", true, nil); err == nil || strings.Contains(err.Error(), key) {
		t.Fatalf("mounted from no file system: %v", err)
	}
	bad := New(Options{Keys: t.TempDir()})
	must(t, os.Chmod(bad.own.Keys, 0o700))
	wrong := "AQ" + strings.Map(func(r rune) rune {
		if r == rune(key[len(key)/2]) {
			return 'x'
		}
		return r
	}, key[2:])
	must(t, os.WriteFile(filepath.Join(bad.own.Keys, user), []byte(wrong), 0o600))
	wider, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err = bad.Mount(wider, src, dir+"/x", true, nil)
	if t.Log(err); err == nil || !strings.Contains(err.Error(), "key") || strings.Contains(err.Error(), wrong) {
		t.Fatalf("mounted with the wrong key, or the error says it: %v", err)
	}

	// A dead server. User-mode Linux does not always end a stopped process of
	// many threads that is killed.
	if fuse && os.Getenv("ABACA_TEST_CEPHFS") != "" {
		must(t, m.Mount(ctx, snap, dir+"/dead", true, nil))
		pid := servers(t, dir+"/dead")
		if len(pid) != 1 {
			t.Fatalf("%d processes serve it", len(pid))
		}
		must(t, unix.Kill(pid[0], unix.SIGSTOP))
		brief, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		wantIs(t, m.Check(brief, dir+"/dead"), context.DeadlineExceeded)
		must(t, unix.Kill(pid[0], unix.SIGKILL))
		for i := 0; !errors.Is(m.Check(ctx, dir+"/dead"), ErrCorrupted); i++ {
			if i > 100 {
				t.Fatal("not dead")
			}
			time.Sleep(20 * time.Millisecond)
		}
		must(t, m.Mount(ctx, snap, dir+"/dead", true, nil))
		wantMounts(t, dir+"/dead", 1, "ro")
		// One that is taken off while its server hangs ends too.
		pid = servers(t, dir+"/dead")
		must(t, unix.Kill(pid[0], unix.SIGSTOP))
		must(t, m.Unmount(ctx, dir+"/dead"))
		wantServers(t, dir+"/dead")
	}
	must(t, m.Unmount(ctx, dir+"/rw"))
	for _, d := range []string{"/rw", "/snap", "/pod", "/ro", "/x", "/places", "/dead"} {
		wantMounts(t, dir+d, 0)
		wantServers(t, dir+d)
	}
}
