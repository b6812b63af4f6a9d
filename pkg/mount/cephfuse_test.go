//go:build linux

package mount

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const fakeVariable = "ABACA_TEST_CEPH_FUSE"

const fakeKey = "AQD9agVrL6BCHxAAQr3wyRFFu2EVsT2MZmmP6A=="

// TestFakeCephFuse is ceph-fuse, when it is run as that: an empty file system.
func TestFakeCephFuse(t *testing.T) {
	how := os.Getenv(fakeVariable)
	if how == "" {
		return
	}
	ring, err := os.ReadFile("/proc/self/fd/3")
	if err != nil || string(ring) != "[client.me]\n\tkey = "+fakeKey+"\n" {
		fmt.Printf("the keyring holds %q, %v\n", ring, err)
		os.Exit(1)
	}
	all := strings.Join(os.Args, " ")
	for _, want := range []string{"-m 1.1.1.1:6789,2.2.2.2 ", "--id me ", "-r /p q ", "--client_fs=one ", "-c /dev/null "} {
		if !strings.Contains(all, want) {
			fmt.Printf("%q has no %q\n", all, want)
			os.Exit(1)
		}
	}
	switch how {
	case "refuse":
		fmt.Println("ceph mount failed with (1) Operation not permitted")
		os.Exit(1)
	case "babble":
		fmt.Println("what is", fakeKey)
		os.Exit(1)
	case "hang":
		time.Sleep(time.Minute)
	}
	var flags uintptr
	if strings.Contains(all, ",ro") {
		flags = unix.MS_RDONLY
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		_, name, _ := strings.Cut(all, "fsname=")
		name, _, _ = strings.Cut(name, " "+os.Args[len(os.Args)-1])
		err = unix.Mount(strings.ReplaceAll(name, `\,`, ","), os.Args[len(os.Args)-1], "fuse.ceph-fuse", flags,
			fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd))
	}
	for in := make([]byte, 1<<20); err == nil; {
		var n int
		if n, err = unix.Read(fd, in); err != nil || n < 40 {
			break
		}
		out := make([]byte, 16)
		binary.LittleEndian.PutUint64(out[8:], binary.LittleEndian.Uint64(in[8:]))
		switch op := binary.LittleEndian.Uint32(in[4:]); op { // <linux/fuse.h>
		case 2: // FORGET has no answer
			continue
		case 3, 17: // GETATTR, STATFS
			out = append(out, make([]byte, map[uint32]int{3: 104, 17: 80}[op])...)
			if op == 3 {
				binary.LittleEndian.PutUint64(out[32:], 1)
				binary.LittleEndian.PutUint32(out[16+16+60:], 0o40755)
			}
		case 26: // INIT
			out = append(out, make([]byte, 64)...)
			binary.LittleEndian.PutUint32(out[16:], 7)
			binary.LittleEndian.PutUint32(out[20:], 31)
			binary.LittleEndian.PutUint32(out[36:], 1<<16)
		default:
			binary.LittleEndian.PutUint32(out[4:], ^uint32(unix.ENOSYS)+1)
		}
		binary.LittleEndian.PutUint32(out, uint32(len(out)))
		_, err = unix.Write(fd, out)
	}
	if how == "linger" {
		time.Sleep(time.Minute)
	}
	fmt.Println(err)
	os.Exit(0)
}

// fakeCeph is a Mounter whose ceph-fuse is TestFakeCephFuse.
func fakeCeph(t *testing.T, own Options, how string) (*Mounter, Source) {
	t.Helper()
	if own.Keys == "" {
		own.Keys = t.TempDir()
		must(t, os.Chmod(own.Keys, 0o700))
		must(t, os.WriteFile(own.Keys+"/me", []byte(fakeKey+"\n"), 0o600))
	}
	m := New(own)
	m.patience = 300 * time.Millisecond
	m.command = func(ctx context.Context, name string, arg ...string) *exec.Cmd {
		if name != "ceph-fuse" {
			return exec.CommandContext(ctx, name, arg...)
		}
		cmd := exec.CommandContext(ctx, os.Args[0], append([]string{"-test.run=TestFakeCephFuse", "--"}, arg...)...)
		cmd.Env = append(os.Environ(), fakeVariable+"="+how)
		return cmd
	}
	return m, ceph("1.1.1.1:6789,2.2.2.2:/p q", "", "fs=one", "mounter=fuse")
}

func TestCephFuse(t *testing.T) {
	dir := scratch(t)
	target := dir + "/target"
	brief := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		t.Cleanup(cancel)
		return ctx
	}
	for _, how := range []string{"serve", "linger"} {
		m, src := fakeCeph(t, Options{}, how)
		for range 2 {
			ctx, cancel := context.WithCancel(brief())
			must(t, m.Mount(ctx, src, target, true, []string{"nodiratime"}))
			cancel() // a request that is over ends nothing
			time.Sleep(20 * time.Millisecond)
		}
		wantMounts(t, target, 1, "ro", "noatime", "nodiratime")
		must(t, m.Prove(brief(), target, src, true))
		wantIs(t, m.Prove(brief(), target, ceph("1.1.1.1:/p q", ""), true), ErrOther)
		pids := servers(t, target)
		if len(pids) != 1 {
			t.Fatalf("%v serve it", pids)
		}
		wantNoKey(t, fakeKey)

		// As long as it is mounted anywhere its server lives.
		must(t, m.Bind(brief(), target, dir+"/bound", true))
		must(t, m.Unmount(brief(), target))
		must(t, m.Check(brief(), dir+"/bound"))
		wantServers(t, target, pids...)
		must(t, m.Mount(brief(), src, target, true, nil))
		must(t, m.Unmount(brief(), target))
		wantServers(t, target, pids...)
		must(t, m.Check(brief(), dir+"/bound"))
		must(t, m.Unmount(brief(), dir+"/bound"))
		wantServers(t, target)

		// It dies, and is replaced.
		must(t, m.Mount(brief(), src, target, true, nil))
		for _, pid := range servers(t, target) {
			must(t, unix.Kill(pid, unix.SIGKILL))
		}
		for i := 0; m.Check(brief(), target) == nil; i++ {
			if i > 100 {
				t.Fatal("it does not die")
			}
			time.Sleep(10 * time.Millisecond)
		}
		wantIs(t, m.Check(brief(), target), ErrCorrupted)
		must(t, m.Mount(brief(), src, target, true, nil))
		wantMounts(t, target, 1, "ro")
		must(t, m.Unmount(brief(), target))
		wantServers(t, target)
	}

	for how, hint := range map[string]string{"refuse": `user "me"`, "babble": "***"} {
		m, src := fakeCeph(t, Options{}, how)
		err := m.Mount(brief(), src, target, true, nil)
		if err == nil || !strings.Contains(err.Error(), hint) || strings.Contains(err.Error(), fakeKey) {
			t.Errorf("%s: %v does not say %q, or says the key", how, err, hint)
		}
	}
	m, src := fakeCeph(t, Options{}, "hang")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	wantIs(t, m.Mount(ctx, src, target, true, nil), context.DeadlineExceeded)
	if took := time.Since(start); took > time.Second {
		t.Fatalf("took %v", took)
	}
	wantServers(t, target)
	wantMounts(t, target, 0)
	for range 100 {
		if _, err := os.Lstat(target); os.IsNotExist(err) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the directory is left")
}

// A process that is killed takes along what serves its mounts, if it is tied,
// and only then.
func TestTied(t *testing.T) {
	if dir := os.Getenv("ABACA_TEST_TIED"); dir != "" {
		m, src := fakeCeph(t, Options{Tied: os.Getenv("TIED") == "true", Keys: filepath.Join(dir, "keys")}, "serve")
		must(t, m.Mount(t.Context(), src, dir+"/target", true, nil))
		must(t, os.WriteFile(dir+"/ready", nil, 0o644))
		time.Sleep(time.Minute)
	}
	for _, tied := range []bool{true, false} {
		dir := scratch(t)
		must(t, os.Mkdir(dir+"/keys", 0o700))
		must(t, os.WriteFile(dir+"/keys/me", []byte(fakeKey), 0o600))
		cmd := exec.Command(os.Args[0], "-test.run=TestTied")
		cmd.Env = append(os.Environ(), "ABACA_TEST_TIED="+dir, fmt.Sprint("TIED=", tied))
		must(t, cmd.Start())
		for i := 0; ; i++ {
			if _, err := os.Stat(dir + "/ready"); err == nil {
				break
			} else if i > 500 {
				t.Fatal("it does not mount")
			}
			time.Sleep(10 * time.Millisecond)
		}
		pids := servers(t, dir+"/target")
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		if m := New(); tied {
			wantServers(t, dir+"/target")
			wantIs(t, m.Check(t.Context(), dir+"/target"), ErrCorrupted)
		} else {
			time.Sleep(100 * time.Millisecond)
			wantServers(t, dir+"/target", pids...)
			must(t, m.Check(t.Context(), dir+"/target"))
			must(t, m.Unmount(t.Context(), dir+"/target"))
			wantServers(t, dir+"/target")
		}
	}
}

// servers are the processes that have the target as their last argument.
func servers(t *testing.T, target string) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, f := range all {
		var pid int
		_, err := fmt.Sscanf(f, "/proc/%d/", &pid)
		must(t, err)
		if text, _ := os.ReadFile(f); strings.HasSuffix(string(text), "\x00"+target+"\x00") {
			pids = append(pids, pid)
		}
	}
	return pids
}

func wantServers(t *testing.T, target string, want ...int) {
	t.Helper()
	for i := 0; len(servers(t, target)) != len(want); i++ {
		if i > 200 {
			t.Fatalf("%v serve %s, want %v", servers(t, target), target, want)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// wantNoKey looks for a key where it must not be.
func wantNoKey(t *testing.T, key string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, f := range append(files, "/proc/self/mountinfo") {
		if text, _ := os.ReadFile(f); strings.Contains(string(text), key) {
			t.Fatalf("the key is in %s", f)
		}
	}
}
