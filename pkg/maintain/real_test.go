package maintain

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
	"github.com/abaca-csi/abaca/test/programs"
)

// These tests run the real restic.

// site is a real repository.
type site struct {
	t    *testing.T
	dir  string
	repo string
	*restic.Repository
	env     []string
	options Options
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir()}
	program := programs.Restic(t)
	s.repo = s.dir + "/repo"
	env := map[string]string{"RESTIC_REPOSITORY": s.repo, "RESTIC_PASSWORD": "geheim", "RESTIC_PACK_SIZE": "4"}
	var err error
	s.Repository, err = restic.Open(restic.Config{Program: program, CacheDir: s.dir + "/cache", Env: env})
	if err != nil {
		t.Fatal(err)
	}
	s.env = []string{"RESTIC_REPOSITORY=" + s.repo, "RESTIC_PASSWORD=geheim", "RESTIC_CACHE_DIR=" + s.dir + "/cache", program}
	if err := s.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.options = Options{Repository: "offsite", Check: true, Prune: true, ReadDays: 30, Now: time.Now}
	return s
}

// backup backs some random megabytes up, in files of one.
func (s *site) backup(id string, megabytes int) string {
	s.t.Helper()
	dir := s.t.TempDir()
	for i := range megabytes {
		b := make([]byte, 1<<20)
		_, _ = rand.Read(b)
		path := filepath.Join(dir, "data", fmt.Sprint(i))
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, b, 0o644)); err != nil {
			s.t.Fatal(err)
		}
	}
	done, err := s.Backup(s.t.Context(), restic.BackupRequest{Dir: dir, Targets: []string{"data"}, Host: "shop/" + id,
		Tags: []string{mover.TagBackup + id, mover.TagVolume + "local/" + id}}, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return done.SnapshotID
}

func (s *site) run() Result {
	s.t.Helper()
	result, err := Run(s.t.Context(), s.Repository, s.options)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, step := range result.Steps {
		s.t.Logf("%s: %s: %s (%.1f s)", step.Step, step.Status, step.Message, step.Seconds)
	}
	return result
}

func (s *site) packs() []string {
	packs, err := filepath.Glob(s.repo + "/data/*/*")
	if err != nil || len(packs) == 0 {
		s.t.Fatal(packs, err)
	}
	return packs
}

// stop starts restic and halts it when it has the repository's lock.
func (s *site) stop(args ...string) *exec.Cmd {
	s.t.Helper()
	cmd := exec.Command(s.env[3], args...)
	cmd.Env = s.env[:3]
	cmd.Dir = s.t.TempDir()
	if err := os.WriteFile(filepath.Join(cmd.Dir, "file"), make([]byte, 1<<20), 0o644); err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for s.locks() == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		s.t.Fatal(err)
	}
	if s.locks() == 0 {
		s.t.Fatal("it was too fast")
	}
	return cmd
}

// goOn lets what was halted go on, and waits for its end.
func (s *site) goOn(cmd *exec.Cmd) {
	s.t.Helper()
	if err := errors.Join(cmd.Process.Signal(syscall.SIGCONT), cmd.Wait()); err != nil {
		s.t.Error(err)
	}
}

func (s *site) locks() int {
	locks, _ := filepath.Glob(s.repo + "/locks/" + strings.Repeat("?", 64)) // no temporary files
	return len(locks)
}

// TestDamageIsFound: a pack in which one byte has changed is found by the first
// run that reads it, which is within the stated number of runs, with the backups
// that it is in; and not before, so the runs do not just read everything.
func TestDamageIsFound(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	now := time.Now().UTC().Truncate(time.Second)
	s.options.Now, s.options.ReadDays, s.options.Prune = func() time.Time { return now }, 4, false
	s.backup("b1", 24)
	s.backup("b2", 1)
	if code := s.run().ExitCode(); code != ExitOK {
		t.Fatal(code)
	}
	first := s.record()
	// One that the first run did not read, and of b1's data.
	var pack string
	for _, p := range s.packs() {
		info, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		var b byte
		fmt.Sscanf(filepath.Base(p)[:2], "%02x", &b)
		read := false
		for i, at := range first.Read {
			reversed := 0
			for bit := range 8 {
				reversed |= int(b) >> bit & 1 << (7 - bit)
			}
			read = read || i == reversed && !at.Before(first.Began)
		}
		if !read && info.Size() > 1<<21 {
			pack = p
		}
	}
	if pack == "" {
		t.Fatal("every pack was read in the first run")
	}
	flip(t, pack, 1<<20)
	for run := 1; ; run++ {
		now = now.Add(day)
		result := s.run()
		if result.ExitCode() == ExitDamaged {
			t.Logf("found in run %d", run)
			if len(result.Damaged) != 1 || result.Damaged[0].Backup != "b1" || result.Damaged[0].Host != "shop/b1" {
				t.Errorf("damaged: %+v", result.Damaged)
			}
			if r := s.record(); !strings.Contains(r.Damaged, filepath.Base(pack)) {
				t.Errorf("the record says: %q", r.Damaged)
			}
			break
		}
		if run == 4 {
			t.Fatal("not found")
		}
	}
	// A repair, by the book; then all is well again.
	flip(t, pack, 1<<20)
	if result := s.run(); result.ExitCode() != ExitOK || s.record().Damaged != "" {
		t.Errorf("after the repair: %+v", result)
	}
	// What is gone is found without reading.
	if err := os.Remove(pack); err != nil {
		t.Fatal(err)
	}
	s.options.Prune = true
	result := s.run()
	if result.ExitCode() != ExitDamaged || result.Steps[1].Status != StatusSkipped {
		t.Errorf("a pack is gone: %+v", result)
	}
}

func flip(t *testing.T, path string, at int64) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

func (s *site) record() *Record {
	s.t.Helper()
	snapshots, err := s.Snapshots(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	r, err := Latest(s.t.Context(), s.Repository, snapshots)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// TestPruneWaits: maintenance that begins during a backup waits for it, holds a
// new one back, and has its turn before that; both backups end well.
func TestPruneWaits(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	gone := s.backup("gone", 6)
	if err := s.Forget(t.Context(), 0, gone); err != nil {
		t.Fatal(err)
	}
	running := s.stop("backup", "--tag", "running", "file")
	ran := make(chan Result, 1)
	go func() { ran <- s.run() }()
	for s.held().IsZero() {
		select {
		case r := <-ran:
			t.Fatalf("it did not wait: %+v", r)
		case <-time.After(100 * time.Millisecond):
		}
	}
	moved := make(chan mover.Result, 1)
	go func() { moved <- s.move("new") }()
	select {
	case <-moved:
		t.Fatal("a new backup was not held back")
	case <-ran:
		t.Fatal("it did not wait")
	case <-time.After(3 * time.Second):
	}
	s.goOn(running)
	result := <-ran
	if result.ExitCode() != ExitOK {
		t.Errorf("%+v", result)
	}
	left := int64(0)
	for _, pack := range s.packs() {
		if info, err := os.Stat(pack); err == nil {
			left += info.Size()
		}
	}
	if left > 3<<20 {
		t.Errorf("%d bytes are left", left)
	}
	if m := <-moved; m.Error != "" {
		t.Error(m.Error)
	}
	record := s.record()
	snapshots, err := s.Snapshots(t.Context(), mover.TagBackup+"new")
	if err != nil || len(snapshots) != 1 || snapshots[0].Summary == nil || record.Pruned.IsZero() {
		t.Fatal(snapshots, record, err)
	}
	if running, err := s.Snapshots(t.Context(), "running"); err != nil || len(running) != 1 {
		t.Error(running, err)
	}
	if err := s.Check(t.Context(), restic.CheckRequest{Exclusive: true}); err != nil {
		t.Error(err)
	}
}

// held asks restic, as a mover does.
func (s *site) held() time.Time {
	s.t.Helper()
	snapshots, err := s.Snapshots(s.t.Context(), mover.TagMaintenance)
	if err != nil {
		s.t.Fatal(err)
	}
	return mover.Held(snapshots, time.Now())
}

// mounted is what a mover proves; here anything is the right snapshot.
type mounted struct{ mount.Interface }

func (mounted) Prove(context.Context, string, mount.Source, bool) error { return nil }

// move is what a mover does for a backup, from where it is told to begin.
func (s *site) move(id string) mover.Result {
	dir := s.t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/data", 0o755), os.WriteFile(dir+"/data/file", []byte(id), 0o644)); err != nil {
		s.t.Error(err)
	}
	return mover.Run(s.t.Context(), mover.Task{ID: id, Repository: "offsite", Backup: &mover.Backup{Backup: id, Volume: "local/" + id, Name: id,
		Host: "shop/" + id, Time: time.Now(), Description: json.RawMessage(`{}`)}}, mover.Env{Dir: dir, Restic: s.Repository, Mounts: mounted{}, Now: time.Now})
}

// TestBackupWaits: a backup that begins while the repository is pruned waits, and
// ends well; one that begins while it is checked does not even wait.
func TestBackupWaits(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.backup("b1", 1)
	pruning := s.stop("prune")
	moved := make(chan mover.Result, 1)
	go func() { moved <- s.move("new") }()
	select {
	case m := <-moved:
		t.Fatalf("a backup did not wait for a prune: %+v", m)
	case <-time.After(4 * time.Second):
	}
	s.goOn(pruning)
	if m := <-moved; m.Error != "" {
		t.Error(m.Error)
	}

	// A check of ours has no lock, so there is nothing to wait for: it is halted
	// while a backup runs from its beginning to its end.
	began := make(chan struct{})
	checked := make(chan error, 1)
	go func() {
		close(began)
		checked <- s.Check(t.Context(), restic.CheckRequest{Part: 1, Parts: 1})
	}()
	<-began
	for range 3 {
		if m := s.move(fmt.Sprint("beside", time.Now().UnixNano())); m.Error != "" {
			t.Error(m.Error)
		}
	}
	if err := <-checked; err != nil {
		t.Error(err)
	}
}

// TestKilledPrune: a prune that was killed leaves a lock, which the next run
// removes, and goes on.
func TestKilledPrune(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.backup("b1", 1)
	pruning := s.stop("prune")
	if err := pruning.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = pruning.Wait()
	if s.locks() != 1 {
		t.Fatalf("%d locks", s.locks())
	}
	if result := s.run(); result.ExitCode() != ExitOK {
		t.Errorf("%+v", result)
	}
	if s.locks() != 0 || !s.held().IsZero() {
		t.Errorf("%d locks, held until %s", s.locks(), s.held())
	}
}

// TestDamagedRecord: a record that lies in what is damaged keeps the repository from being
// pruned, also without a check, and is not replaced.
func TestDamagedRecord(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.backup("b1", 1)
	var was []string
	for range 2 {
		was = s.packs()
		if code := s.run().ExitCode(); code != ExitOK {
			t.Fatal(code)
		}
	}
	last := s.record()
	if err := os.RemoveAll(s.dir + "/cache"); err != nil {
		t.Fatal(err)
	}
	for _, p := range s.packs() {
		if !slices.Contains(was, p) {
			flip(t, p, 0)
		}
	}
	s.options.Check = false
	result := s.run()
	if result.ExitCode() != ExitFailed || result.Steps[0].Status != StatusSkipped || result.Steps[1].Status != StatusFailed {
		t.Errorf("%+v", result)
	}
	for _, p := range s.packs() {
		if !slices.Contains(was, p) {
			flip(t, p, 0)
		}
	}
	if r := s.record(); !r.Ended.Equal(last.Ended) {
		t.Errorf("the newest record is of %s, and was of %s", r.Ended, last.Ended)
	}
}

// TestRecordIsNoBackup: plain restic takes what maintenance leaves for a small
// snapshot, and pruning and checking go on with it; it is among no volume's.
func TestRecordIsNoBackup(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	backup := s.backup("b1", 1)
	for range 5 {
		if code := s.run().ExitCode(); code != ExitOK {
			t.Fatal(code)
		}
	}
	all, err := s.Snapshots(t.Context())
	if err != nil || len(all) != 1+keptRecords {
		t.Fatal(all, err)
	}
	for _, r := range all {
		if r.ID == backup {
			continue
		}
		if r.Host != recordHost || !slices.Equal(r.Tags, []string{mover.TagMaintenance}) || r.Summary.TotalFiles != 1 || r.Summary.DataAddedPacked > 8<<10 {
			t.Errorf("%+v %+v", r, r.Summary)
		}
	}
	if r := s.record(); r.Size < 1<<20 || r.Size > 2<<20 {
		t.Errorf("size %d", r.Size)
	}
}
