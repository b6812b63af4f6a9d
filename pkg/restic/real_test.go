package restic

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/test/programs"
)

// These tests run the real restic. Each of its commands costs half a second of
// CPU for the key alone, so cases share what they can.

const password = "correct horse"

var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "abaca-restic-test-"); err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(scratch)
	os.Exit(code)
}

func open(t testing.TB, dir string, pairs ...string) *Repository {
	t.Helper()
	env := map[string]string{"RESTIC_REPOSITORY": dir, "RESTIC_PASSWORD": password}
	for i := 0; i < len(pairs); i += 2 {
		env[pairs[i]] = pairs[i+1]
	}
	r, err := Open(Config{Program: programs.Restic(t), Env: env, CacheDir: filepath.Join(t.TempDir(), "cache")})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

var template struct {
	sync.Once
	ids []string // of three backups, oldest first
}

// copyOfTemplate returns a repository of its own with three backups: x by the
// tags v=1 b=1, y by v=1 b=2, x by v=2 b=1.
func copyOfTemplate(t *testing.T) (r *Repository, dir string, ids []string) {
	t.Helper()
	original := filepath.Join(scratch, "repo")
	template.Do(func() {
		r := open(t, original)
		if err := r.Init(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i, tags := range [][]string{{"v=1", "b=1"}, {"v=1", "b=2"}, {"v=2", "b=1"}} {
			s, err := r.Backup(t.Context(), BackupRequest{
				Dir: source(t, "f", fmt.Sprint("content ", i)), Targets: []string{"data"}, Host: "h", Tags: tags,
				Time: time.Date(2026, 1, 1+i, 0, 0, 0, 0, time.UTC),
			}, nil)
			if err != nil {
				t.Fatal(err)
			}
			template.ids = append(template.ids, s.SnapshotID)
		}
	})
	if len(template.ids) != 3 {
		t.Fatal("no template")
	}
	dir = filepath.Join(t.TempDir(), "repo")
	if out, err := exec.Command("cp", "-r", original, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return open(t, dir), dir, template.ids
}

// source returns a directory with data/<name>.
func source(t *testing.T, name, content string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeFiles(t, filepath.Join(dir, "data"), map[string]string{name: content})
	return dir
}

func random(t *testing.T, size int) string {
	t.Helper()
	b := make([]byte, size)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func ids(snapshots []Snapshot) (ids []string) {
	for _, s := range snapshots {
		ids = append(ids, s.ID)
	}
	return ids
}

func TestPinnedVersion(t *testing.T) {
	if err := CheckVersion(t.Context(), programs.Restic(t)); err != nil {
		t.Error(err)
	}
	out, err := os.ReadFile("../../go.mod")
	if err != nil || !strings.Contains(string(out), "github.com/restic/restic v"+PinnedVersion) {
		t.Errorf("go.mod does not pin %s: %v", PinnedVersion, err)
	}
}

func TestSnapshotsAndForget(t *testing.T) {
	t.Parallel()
	r, dir, want := copyOfTemplate(t)
	all, err := r.Snapshots(t.Context())
	if err != nil || !slices.Equal(ids(all), want) {
		t.Fatal(ids(all), err)
	}
	s := all[0]
	if s.Host != "h" || !s.Time.Equal(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)) || len(s.Tags) != 2 || len(s.Paths) != 1 ||
		s.Summary == nil || s.Summary.TotalFiles != 1 || s.Summary.TotalDirs != 1 || s.Summary.TotalBytes != 9 || s.Summary.DataAdded == 0 {
		t.Errorf("%+v %+v", s, s.Summary)
	}
	// All tags, not any.
	if some, err := r.Snapshots(t.Context(), "v=1", "b=1"); err != nil || !slices.Equal(ids(some), want[:1]) {
		t.Error(ids(some), err)
	}
	if none, err := r.Snapshots(t.Context(), "v=3"); err != nil || len(none) != 0 {
		t.Error(none, err)
	}
	// Gone, never there, and there.
	for range 2 {
		if err := r.Forget(t.Context(), 0, want[0], strings.Repeat("ab", 32)); err != nil {
			t.Error(err)
		}
	}
	if left, err := r.Snapshots(t.Context()); err != nil || !slices.Equal(ids(left), want[1:]) {
		t.Error(ids(left), err)
	}
	// A snapshot that cannot be read is not one that is not there.
	damage(t, filepath.Join(dir, "snapshots", want[1]))
	r = open(t, dir) // without the cache
	left, err := r.Snapshots(t.Context())
	if !errors.Is(err, ErrIncomplete) || !slices.Equal(ids(left), want[2:]) {
		t.Error(ids(left), err)
	}
	if err := r.Forget(t.Context(), 0, want[1]); !errors.Is(err, ErrIncomplete) {
		t.Errorf("forgot a damaged snapshot: %v", err)
	}
}

// damage overwrites the middle of a file.
func damage(t *testing.T, path string) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copy(data[len(data)/2:], "damaged!")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestWays(t *testing.T) {
	t.Parallel()
	r, dir, ids := copyOfTemplate(t)
	snapshots := func(r *Repository) func() error {
		return func() error { _, err := r.Snapshots(t.Context()); return err }
	}
	for _, test := range []struct {
		name string
		call func() error
		want error
		text string
	}{
		{"wrong password", snapshots(open(t, dir, "RESTIC_PASSWORD", "wrong-word")), ErrWrongPassword, "RESTIC_PASSWORD"},
		{"no repository", snapshots(open(t, dir+"x")), ErrNoRepository, "RESTIC_REPOSITORY"},
		{"no repository, unlock", func() error { return open(t, dir+"x").Unlock(t.Context()) }, ErrNoRepository, ""},
		{"init again", func() error { return r.Init(t.Context()) }, ErrFailed, "exist"},
		{"check", func() error { return r.Check(t.Context(), CheckRequest{}) }, nil, ""},
		{"no parent", func() error {
			_, err := r.Backup(t.Context(), BackupRequest{Dir: source(t, "f", ""), Targets: []string{"data"}, Parent: strings.Repeat("ab", 32)}, nil)
			return err
		}, ErrFailed, ""},
		{"not a repository", func() error {
			other := t.TempDir()
			writeFiles(t, other, map[string]string{"config": "nonsense"})
			return open(t, other).Check(t.Context(), CheckRequest{})
		}, ErrWrongPassword, ""}, // it has no keys
	} {
		err := test.call()
		if !errors.Is(err, test.want) || err != nil && (!strings.Contains(err.Error(), test.text) || strings.Contains(err.Error(), "wrong-word")) {
			t.Errorf("%s: %v, want %v with %q", test.name, err, test.want, test.text)
		}
		if err != nil {
			t.Log(err)
		}
	}
	// Without its packs a snapshot is listed and nothing more.
	packs, _ := filepath.Glob(filepath.Join(dir, "data/*/*"))
	for _, pack := range packs {
		damage(t, pack)
	}
	r = open(t, dir)
	if _, err := r.Restore(t.Context(), RestoreRequest{SnapshotID: ids[0], Dir: t.TempDir()}, nil); !errors.Is(err, ErrFailed) {
		t.Errorf("restore of damaged packs: %v", err)
	}
	for _, pack := range packs {
		os.Remove(pack)
	}
	if err := open(t, dir).Check(t.Context(), CheckRequest{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("check without packs: %v", err)
	}
}

// A live lock stops, is not removed, can be waited for, and the wait can be
// cancelled; when its holder is dead, unlock removes it.
func TestLocks(t *testing.T) {
	t.Parallel()
	r, dir, ids := copyOfTemplate(t)
	holder := exec.Command(programs.Restic(t), "check", "--no-cache")
	holder.Env = r.environ
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return lockIn(dir) })
	if err := holder.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := r.Forget(t.Context(), 0, ids[0]); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(holder.Process.Pid)) {
		t.Errorf("forget: %v", err)
	} else {
		t.Log(err)
	}
	if err := r.Unlock(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := r.Snapshots(t.Context()); err != nil {
		t.Errorf("snapshots takes a lock: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	_, err := r.Backup(ctx, BackupRequest{Dir: source(t, "f", ""), Targets: []string{"data"}, RetryLock: time.Minute}, nil)
	if !errors.Is(err, ErrInterrupted) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("backup while locked: %v", err)
	}
	holder.Process.Kill()
	holder.Wait()
	if err := r.Forget(t.Context(), 0, ids[0]); !errors.Is(err, ErrLocked) {
		t.Errorf("forget with a stale lock: %v", err)
	}
	if err := r.Unlock(t.Context()); err != nil {
		t.Error(err)
	}
	if err := r.Forget(t.Context(), 0, ids[0]); err != nil {
		t.Error(err)
	}
}

// The lock of a host that is gone goes, whatever its process's number, and the lock
// of another does not.
func TestUnlockHost(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root, for namespaces")
	}
	if os.Getenv("ABACA_RESTRICTED") == "" {
		// Here, and as in a container that is not privileged and has this capability alone.
		self := exec.Command("unshare", "--mount", "sh", "-ec", `mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys
exec setpriv --bounding-set=-all,+sys_admin --no-new-privs "$0" -test.run='^TestUnlockHost$' -test.v`, os.Args[0])
		self.Env = append(os.Environ(), "ABACA_RESTRICTED=1")
		if out, err := self.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestUnlockHost") {
			t.Errorf("with CAP_SYS_ADMIN alone, and a /proc/sys that is read-only: %v\n%s", err, out)
		}
	}
	r, dir, ids := copyOfTemplate(t)
	holder := exec.Command("/bin/sh", "-c", `mount -t proc proc /proc; echo pod-a >/proc/sys/kernel/hostname; "$@"; exit $?`, "sh", programs.Restic(t), "check", "--no-cache")
	holder.Env = r.environ
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUTS | unix.CLONE_NEWPID, Unshareflags: unix.CLONE_NEWNS}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return lockIn(dir) })
	holder.Process.Kill() // and with the first process all of them
	holder.Wait()
	if err := errors.Join(r.Unlock(t.Context()), r.UnlockHost(t.Context(), "pod-b")); err != nil {
		t.Fatal(err)
	}
	if err := r.Forget(t.Context(), 0, ids[0]); !errors.Is(err, ErrLocked) {
		t.Errorf("a lock that may be live was removed: %v", err)
	}
	if err := r.UnlockHost(t.Context(), "pod-a"); err != nil {
		t.Fatal(err)
	}
	if err := r.Forget(t.Context(), 0, ids[0]); err != nil {
		t.Error(err)
	}
	if name, err := os.Hostname(); err != nil || name == "pod-a" {
		t.Errorf("this host is called %s now, %v", name, err)
	}
}

// lockIn says whether there is a lock in a repository. While restic writes one,
// it has another name.
func lockIn(dir string) bool {
	locks, _ := os.ReadDir(filepath.Join(dir, "locks"))
	return len(locks) == 1 && fullID.MatchString(locks[0].Name())
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited for too long")
		}
	}
}

// Cancelled in the middle of an upload: no process, no lock, no snapshot.
func TestCancelBackup(t *testing.T) {
	t.Parallel()
	r, dir, want := copyOfTemplate(t)
	packs := func() int { names, _ := filepath.Glob(dir + "/data/*/*"); return len(names) }
	before := packs()
	src := source(t, "f", random(t, 64<<20))
	ctx, cancel := context.WithCancel(t.Context())
	cancelled := when(ctx, func() bool { return packs() > before }, func() error { cancel(); return nil })
	_, err := r.Backup(ctx, BackupRequest{Dir: src, Targets: []string{"data"}}, nil)
	if err := <-cancelled; err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, ErrInterrupted) || !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if locks, _ := os.ReadDir(filepath.Join(dir, "locks")); len(locks) != 0 {
		t.Errorf("%d locks are left", len(locks))
	}
	if left, err := r.Snapshots(t.Context()); err != nil || !slices.Equal(ids(left), want) {
		t.Error(ids(left), err)
	}
}

// when calls do in the background as soon as a condition holds, and sends how
// that went; or the context's error.
func when(ctx context.Context, holds func() bool, do func() error) <-chan error {
	done := make(chan error, 1)
	go func() {
		for !holds() {
			if ctx.Err() != nil {
				done <- ctx.Err()
				return
			}
			time.Sleep(time.Millisecond)
		}
		done <- do()
	}()
	return done
}

// What the arguments of a running restic show, all on the node can read.
func TestNothingSecretInArguments(t *testing.T) {
	t.Parallel()
	r, _, _ := copyOfTemplate(t)
	var seen string
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	looked := when(ctx, func() bool {
		lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, name := range lines {
			line, _ := os.ReadFile(name)
			environ, _ := os.ReadFile(strings.Replace(name, "cmdline", "environ", 1))
			if strings.HasPrefix(string(line), r.config.Program) && strings.Contains(string(environ), r.config.Env["RESTIC_REPOSITORY"]) {
				seen = string(line)
			}
		}
		return seen != ""
	}, func() error { return nil })
	if _, err := r.Snapshots(t.Context()); err != nil {
		t.Error(err)
	}
	<-looked
	if seen == "" || strings.Contains(seen, password) || strings.Contains(seen, r.config.Env["RESTIC_REPOSITORY"]) {
		t.Errorf("%q", seen)
	}
}

func TestFullRepository(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=20m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	r := open(t, filepath.Join(dir, "repo"))
	if err := r.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	summary, err := r.Backup(t.Context(), BackupRequest{Dir: source(t, "f", random(t, 32<<20)), Targets: []string{"data"}}, nil)
	var e *Error
	if !errors.As(err, &e) || !e.NoSpace() || summary != nil || !strings.Contains(err.Error(), "free space") {
		t.Error(summary, err)
	}
	if list, err := r.Snapshots(t.Context()); len(list) != 0 {
		t.Error(list, err)
	}
}

// A server that does not answer is tried by restic for 15 minutes; who gives up
// earlier learns why nothing happened.
func TestUnreachable(t *testing.T) {
	t.Parallel()
	r := open(t, "rest:http://user:t0ken@127.0.0.1:1/")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := r.Snapshots(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "connection refused") ||
		!strings.Contains(err.Error(), "network policies") || strings.Contains(err.Error(), "t0ken") {
		t.Error(err)
	}
}

// A repository that is write-protected or vanishes in the middle ends the
// backup. Restic makes missing directories, so it may not notice that a
// directory is another one now: whoever lists the snapshots then does.
func TestVanishes(t *testing.T) {
	t.Parallel()
	_, dir, _ := copyOfTemplate(t)
	mnt := t.TempDir()
	for name, spoil := range map[string]func() error{
		"gone":      func() error { return unix.Unmount(mnt, unix.MNT_DETACH) },
		"read-only": func() error { return unix.Mount("", mnt, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "") },
	} {
		if err := unix.Mount(dir, mnt, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(mnt, unix.MNT_DETACH) })
		r := open(t, mnt)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		src := source(t, "f", random(t, 32<<20))
		// Restic has made its lock, and waits for a moment.
		spoiled := when(ctx, func() bool { return lockIn(dir) }, spoil)
		_, err := r.Backup(ctx, BackupRequest{Dir: src, Targets: []string{"data"}}, nil)
		cancel()
		t.Log(name, err)
		if err := <-spoiled; err != nil {
			t.Fatal(err)
		}
		if err == nil && name == "gone" {
			_, err = r.Snapshots(t.Context())
		}
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		unix.Unmount(mnt, unix.MNT_DETACH)
		os.RemoveAll(mnt) // what restic made below it
		os.RemoveAll(dir + "/locks")
		for _, d := range []string{mnt, dir + "/locks"} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
}
