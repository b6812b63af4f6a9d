package mover

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/restic"
	"github.com/abaca-csi/abaca/test/programs"
)

// These tests run the real restic over real mounts: btrfs on a loop device,
// where each snapshot has a device number of its own, as on a storage system.

func sh(t testing.TB, command string, args ...string) string {
	t.Helper()
	cmd := exec.Command("sh", append([]string{"-euc", command, "sh"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return string(out)
}

// site is a repository and the place of a mover.
type site struct {
	t      *testing.T
	repo   string
	client *restic.Repository
	env    Env
}

func newSite(t *testing.T) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{t: t, repo: dir + "/repo"}
	var err error
	s.client, err = restic.Open(restic.Config{
		Program: programs.Restic(t), CacheDir: dir + "/cache",
		Env: map[string]string{"RESTIC_REPOSITORY": s.repo, "RESTIC_PASSWORD": "geheim"},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.env = Env{Dir: dir + "/volume", Restic: s.client, Mounts: mount.New(), LockWait: time.Second}
	return s
}

// run mounts location at the mover's place and runs a task on it.
func (s *site) run(task Task, location string, readOnly bool) Result {
	s.t.Helper()
	data := filepath.Join(s.env.Dir, "data")
	task.Source = mount.Source{Protocol: "bind", Locations: []string{location}}
	if err := s.env.Mounts.Mount(s.t.Context(), task.Source, data, readOnly, nil); err != nil {
		s.t.Fatal(err)
	}
	defer func() {
		if err := s.env.Mounts.Unmount(context.Background(), data); err != nil {
			s.t.Error(err)
		}
	}()
	return Run(s.t.Context(), task, s.env)
}

func (s *site) backup(id, location string, change ...func(*Task)) Result {
	s.t.Helper()
	task := backupTask()
	task.Backup.Backup = id
	for _, c := range change {
		c(&task)
	}
	return s.run(task, location, true)
}

func (s *site) count(id string) int {
	s.t.Helper()
	list, err := s.client.Snapshots(s.t.Context(), TagBackup+id)
	if err != nil {
		s.t.Fatal(err)
	}
	return len(list)
}

// loop makes a btrfs on a loop device and returns its image and a function that
// mounts it, afresh if it is mounted.
func loop(t *testing.T) (image, top string, remount func()) {
	t.Helper()
	dir := t.TempDir()
	image, top = dir+"/image", dir+"/top"
	sh(t, `truncate -s 256M "$1"; mkfs.btrfs -q "$1"; mkdir "$2"`, image, top)
	remount = func() {
		sh(t, `if mountpoint -q "$2"; then umount "$2"; fi; mount -o loop "$1" "$2"`, image, top)
	}
	remount()
	t.Cleanup(func() { exec.Command("umount", "-l", top).Run() })
	return image, top, remount
}

// everything fills a directory with all that a share can hold.
const everything = `
cd "$1"
mkdir d d/e d/empty 'odd
name' "$(printf 'not\377utf8')"
i=0; while [ $i -lt 40 ]; do mkdir d/$i; echo $i >d/$i/f; i=$((i+1)); done
head -c 4000000 /dev/urandom >big
echo one >d/first
truncate -s 10M hole; printf x | dd of=hole bs=1 seek=5000000 conv=notrunc status=none
truncate -s 3M allhole
: >nothing; echo x >"d/-rf *"; echo x >'odd
name/ü"\'
ln -s ../nowhere symlink; ln -s d dirlink; mknod null c 1 3
chown 1000:2000 d/first; chown -h 5:6 symlink; chown 70000:70001 d/e
chmod 4755 d/0/f; chmod 2755 d/1; chmod 1777 d/2; chmod 000 d/3/f
setfattr -n user.x -v "some value" big; setfattr -n trusted.y -v t d/e; setfattr -n security.z -v z nothing
setfacl -m u:1234:rwx,g:4321:r d/4/f; setfacl -d -m u:1234:rwx d/5; setfacl -m u:9:x,m::x d/6
setcap cap_net_raw+ep d/7/f 2>/dev/null || true
touch -hd '2001-02-03 04:05:06.123456789' big symlink d/4/f d/5 null
chown 1111:2222 .; chmod 2750 .; setfattr -n user.root -v r .; setfacl -m u:77:rx .
touch -d '1999-12-31 23:59:59.987654321' .
`

// tree describes all of a directory that a restore must bring back.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all, links := map[string]string{}, map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("mode %o owner %d:%d mtime %d.%09d rdev %x", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev)
		if !d.IsDir() {
			s += fmt.Sprintf(" size %d links %d", st.Size, st.Nlink)
			if first, ok := links[st.Ino]; ok {
				s += " is " + first
			}
			links[st.Ino] = name
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			s += " to " + target
		case unix.S_IFREG:
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			s += fmt.Sprintf(" content %x sparse %v", h.Sum(nil), st.Size > 1<<20 && st.Blocks*512 < st.Size/2)
		}
		names := make([]byte, 10000)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		xattrs := strings.Split(string(names[:n]), "\x00")
		slices.Sort(xattrs)
		for _, x := range xattrs {
			value := make([]byte, 10000)
			if n, _ := unix.Lgetxattr(path, x, value); x != "" {
				s += fmt.Sprintf(" %s=%q", x, value[:n])
			}
		}
		all[name] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestRealVolume(t *testing.T) {
	t.Parallel()
	image, top, remount := loop(t)
	s := newSite(t)
	volume := top + "/volume"
	sh(t, `btrfs -q subvolume create "$1"`, volume)
	sh(t, everything, volume)
	snap := func(name string) string {
		sh(t, `btrfs -q subvolume snapshot -r "$1" "$2"`, volume, top+"/"+name)
		return top + "/" + name
	}
	good := func(r Result) Result {
		t.Helper()
		if r.Error != "" || r.Reason != "" || r.Snapshot == "" {
			t.Fatalf("%+v", r)
		}
		return r
	}
	recovering := func(task *Task) { task.Recover = true }

	// Nothing is backed up, and no repository made, but from the right mount.
	first := snap("s1")
	os.MkdirAll(s.env.Dir+"/data", 0o755)
	if r := Run(t.Context(), backupTask(), s.env); r.Reason != ReasonSource {
		t.Errorf("bare directory: %+v", r)
	}
	if r := s.run(backupTask(), volume, false); r.Reason != ReasonSource {
		t.Errorf("writable: %+v", r)
	}
	if _, err := os.Stat(s.repo); err == nil {
		t.Error("a repository was made")
	}

	one := good(s.backup("b1", first))
	if one.Backup.DataAdded < 4000000 || one.Backup.FilesNew != one.Backup.TotalFiles {
		t.Errorf("first: %+v", one.Backup)
	}
	two := good(s.backup("b2", snap("s2")))
	t.Logf("unchanged: %+v", two.Backup)
	if b := two.Backup; b.DataAdded > 4<<10 || b.FilesNew != 0 || b.FilesChanged > 1 || b.TotalFiles != one.Backup.TotalFiles {
		t.Errorf("unchanged: %+v", b)
	}
	// Restic stores the device number of hard links, which need it, and of fifos,
	// which do not: they make the directories above them cost something each time.
	sh(t, `cd "$1"; head -c 1000000 /dev/urandom >d/8/changed; ln d/first d/second; ln d/first d/e/third
		mkfifo fifo; chown 33:33 fifo; chmod 0640 fifo; touch -d '2001-02-03 04:05:06.123456789' fifo .`, volume)
	third := snap("s3")
	three := good(s.backup("b3", third))
	if b := three.Backup; b.DataAdded < 1000000 || b.DataAdded > 1100000 || b.FilesNew != 3 {
		t.Errorf("changed: %+v", b)
	}

	// The mover died before it could tell: there is one snapshot, not two.
	again := good(s.backup("b3", third, recovering))
	if again.Snapshot == three.Snapshot || s.count("b3") != 1 || again.Backup.DataAdded > 64<<10 {
		t.Errorf("again: %+v", again.Backup)
	}

	// Restores. A second run finds the first one's work, or what is left of it.
	sh(t, `btrfs -q subvolume create "$1"; chmod 777 "$1"`, top+"/fresh")
	task := restoreTask()
	task.Restore.Backup = "b3"
	want := tree(t, third)
	back := good(s.run(task, top+"/fresh", false))
	if diff := cmp.Diff(want, tree(t, top+"/fresh")); diff != "" || len(want) < 90 {
		t.Errorf("%d entries, -backup +restored:\n%s", len(want), diff)
	}
	if back.Snapshot != again.Snapshot || back.Restore.TotalFiles+back.Restore.FilesSkipped != int64(len(want)+1) || back.Restore.FilesRestored != back.Restore.TotalFiles {
		t.Errorf("restored: %+v of %d", back.Restore, len(want))
	}
	var description map[string]any
	text, _ := os.ReadFile(s.env.Dir + "/volume.json")
	if err := json.Unmarshal(text, &description); err != nil || description["b"] != 1.0 {
		t.Errorf("volume.json: %s", text)
	}
	sh(t, `cd "$1"; printf y | dd of=big bs=1 seek=99 conv=notrunc status=none; rm d/second; rm fifo; : >d/9/f; rm -r d/8; ln -sf /etc/passwd nothing`, top+"/fresh")
	task.Recover = true
	good(s.run(task, top+"/fresh", false))
	if diff := cmp.Diff(want, tree(t, top+"/fresh")); diff != "" {
		t.Errorf("second restore, -backup +restored:\n%s", diff)
	}
	small := t.TempDir()
	sh(t, `mount -t tmpfs -o size=2m tmpfs "$1"`, small)
	t.Cleanup(func() { exec.Command("umount", "-l", small).Run() })
	if r := s.run(task, small, false); r.Reason != ReasonNoSpace || !strings.Contains(r.Error, "too small") {
		t.Errorf("small volume: %+v", r)
	}

	// A file with an unreadable block.
	marker := strings.Repeat("find this block ", 1<<12)
	if err := os.WriteFile(volume+"/bad", []byte(marker), 0o600); err != nil {
		t.Fatal(err)
	}
	fourth := snap("s4")
	sh(t, `btrfs -q subvolume create "$1"; btrfs -q property set -ts "$1" ro true`, top+"/empty")
	sh(t, `sync -f "$1"`, top)
	corrupt(t, image, marker)
	remount()
	if r := s.backup("b4", fourth); r.Reason != ReasonIncomplete || !strings.Contains(r.Error, "data/bad") {
		t.Errorf("unreadable: %+v", r)
	}
	if n := s.count("b4"); n != 0 {
		t.Errorf("%d halves are left", n)
	}
	partial := good(s.backup("b4", fourth, func(task *Task) { task.Backup.AllowPartial = true }))
	if diff := cmp.Diff([]string{"data/bad"}, partial.Incomplete); diff != "" || s.count("b4") != 1 || !partial.Partial {
		t.Errorf("partial: %+v\n%s", partial, diff)
	}
	if marks, err := s.client.Snapshots(t.Context(), TagPartial+"b4"); err != nil || len(marks) != 1 || marks[0].Summary.TotalFiles != 1 {
		t.Errorf("what says that it is partial: %+v, %v", marks, err)
	}

	if r := s.backup("b5", top+"/empty"); r.Reason != ReasonEmpty || s.count("b5") != 0 {
		t.Errorf("empty: %+v", r)
	}
	good(s.backup("b5", top+"/empty", func(task *Task) { task.Backup.AllowEmpty = true }))

	// Plain restic finds all in order.
	if err := s.client.Check(t.Context(), restic.CheckRequest{}); err != nil {
		t.Error(err)
	}
	// A damaged repository is never restored with success.
	packs, _ := filepath.Glob(s.repo + "/data/*/*")
	for _, pack := range packs {
		if info, _ := os.Stat(pack); info.Size() > 1<<20 {
			sh(t, `chmod u+w "$1"; printf damage | dd of="$1" bs=1 seek=9999 conv=notrunc status=none`, pack)
		}
	}
	sh(t, `btrfs -q subvolume create "$1"`, top+"/other")
	if r := s.run(task, top+"/other", false); r.Error == "" || r.Reason != ReasonRepository {
		t.Errorf("damaged: %+v", r)
	} else {
		t.Log(r.Error)
	}
}

// corrupt overwrites every block of an image that begins like text.
func corrupt(t *testing.T, image, text string) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	found := false
	for offset := int64(0); offset < 256<<20; offset += 4096 {
		b := make([]byte, 64)
		if _, err := f.ReadAt(b, offset); err == nil && string(b) == text[:64] {
			found = true
			if _, err := f.WriteAt([]byte("corrupted"), offset+100); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := f.Sync(); err != nil || !found {
		t.Fatal("no block to corrupt", err)
	}
}

// TestMain runs a mover when the test asks for one that it can kill.
func TestMain(m *testing.M) {
	repo := os.Getenv("ABACA_TEST_REPOSITORY")
	if repo == "" {
		os.Exit(m.Run())
	}
	var task Task
	if err := json.Unmarshal([]byte(os.Getenv("ABACA_TEST_TASK")), &task); err != nil {
		panic(err)
	}
	client, err := restic.Open(restic.Config{
		Program: os.Getenv("ABACA_RESTIC"), Env: map[string]string{"RESTIC_REPOSITORY": repo, "RESTIC_PASSWORD": "geheim"},
	})
	if err != nil {
		panic(err)
	}
	fmt.Printf("%+v\n", Run(context.Background(), task, Env{
		Dir: os.Getenv("ABACA_TEST_DIR"), Restic: client, Mounts: mount.New(),
		Report: func(p restic.Progress) { fmt.Println(p.BytesDone) },
	}))
	os.Exit(0)
}

// A mover that is killed in the middle of a first backup takes restic along. The
// next one finds what was uploaded, is not stopped by the lock that is left, and
// ends with one snapshot.
func TestKilled(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	volume := t.TempDir()
	const files, size = 24, 8 << 20
	r := rand.New(rand.NewSource(1))
	for i := range files {
		b := make([]byte, size)
		r.Read(b)
		if err := os.WriteFile(fmt.Sprintf("%s/%02d", volume, i), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	task := backupTask()
	task.Source.Locations[0] = volume
	data := s.env.Dir + "/data"
	if err := s.env.Mounts.Mount(t.Context(), task.Source, data, true, nil); err != nil {
		t.Fatal(err)
	}
	defer s.env.Mounts.Unmount(context.Background(), data)

	text, _ := json.Marshal(task)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "ABACA_TEST_REPOSITORY="+s.repo, "ABACA_TEST_TASK="+string(text), "ABACA_TEST_DIR="+s.env.Dir, "ABACA_RESTIC="+programs.Restic(t))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var running []string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var done int64
		if fmt.Sscan(lines.Text(), &done); done > files*size/3 {
			running = users(s.repo)
			cmd.Process.Kill()
			t.Logf("killed after %d MiB, restic is %v", done>>20, running)
			break
		}
		if strings.Contains(lines.Text(), "Snapshot:") {
			t.Fatal("ended too early: ", lines.Text())
		}
	}
	cmd.Wait()
	if len(running) != 1 {
		t.Fatal("not killed with one restic running")
	}
	// A zombie that nobody has reaped yet is a live process to restic's unlock.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(running[0]); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("restic outlives its mover: %v", running)
		}
	}

	locks, _ := os.ReadDir(s.repo + "/locks")
	task.Recover = true
	result := Run(t.Context(), task, s.env)
	if result.Error != "" || s.count("b1") != 1 || len(locks) == 0 {
		t.Fatalf("%d locks, %+v", len(locks), result)
	}
	t.Logf("second run added %d MiB", result.Backup.DataAdded>>20)
	if b := result.Backup; b.TotalFiles != files+1 || b.DataAdded > files*size*9/10 {
		t.Errorf("what had been uploaded is uploaded again: %+v", b)
	}
	// The stale lock is gone: an exclusive one can be had.
	if err := s.client.Forget(t.Context(), 0, result.Snapshot); err != nil {
		t.Error(err)
	}
}

// users returns the processes with a repository in their environment.
func users(repo string) (found []string) {
	environs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, e := range environs {
		if text, _ := os.ReadFile(e); strings.Contains(string(text), "RESTIC_REPOSITORY="+repo+"\x00") {
			found = append(found, e)
		}
	}
	return found
}
