package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/abaca-csi/abaca/test/tree"
)

const (
	maxRatio  = 1.05
	maxAdded  = 4 << 10
	backupRow = "at most 1.05"
)

// bigTree returns the volume with the many files.
func (b *bench) bigTree(ctx context.Context) (*volume, error) {
	if b.tree != nil {
		return b.tree, nil
	}
	say("making %d files", b.files)
	v, err := b.mounted(ctx, "tree", int64(b.files)*32<<10+1<<30)
	if err == nil {
		err = tree.Build(ctx, v.dir, tree.Options{Files: b.files})
	}
	b.tree = v
	return v, err
}

// phases of a repository, in this order.
var phases = []string{"first", "unchanged", "1 % changed"}

// measureBackup compares a backup through Abaca with the same restic that backs
// up a mounted snapshot of the same volume.
func measureBackup(ctx context.Context, b *bench) error {
	v, err := b.bigTree(ctx)
	if err != nil {
		return err
	}
	tiny, err := b.mounted(ctx, "tiny", 16<<20)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tiny.dir, "file"), []byte("hello\n"), 0o644); err != nil {
		return err
	}
	through, plain := make([][]time.Duration, len(phases)), make([][]time.Duration, len(phases))
	// Where Abaca's time goes: begin, mover without restic, restic, end.
	spent := make([][4][]time.Duration, len(phases))
	var read, added []int64
	for run := range b.runs {
		pair, err := b.newPair(ctx, run, tiny)
		if err != nil {
			return err
		}
		for i, phase := range phases {
			if i == 2 {
				if _, err := tree.Change(v.dir, 0.01, uint64(run)+1); err != nil {
					return err
				}
			}
			name := fmt.Sprintf("backup-%d-%d", run, i)
			begun, ready, y, err := pair.measure(ctx, name, v, i > 0, (run+i)%2 == 0)
			if err != nil {
				return fmt.Errorf("%s: %w", phase, err)
			}
			x := ready.Sub(begun)
			through[i], plain[i] = append(through[i], x), append(plain[i], y)
			told, err := b.account(ctx, name)
			if err != nil {
				return err
			}
			own := told.BackupSummary.Duration
			for k, d := range []time.Duration{told.Started.Sub(begun), told.Ended.Sub(told.Started) - own, own, ready.Sub(told.Ended)} {
				spent[i][k] = append(spent[i][k], d)
			}
			say("run %d of %d: %s: Abaca %s, restic %s", run+1, b.runs, phase, durationText(x), durationText(y))
			if i == 1 {
				size, err := tree.Measure(v.dir)
				if err != nil {
					return err
				}
				// Restic reads a file unless it counts it as unmodified. The one
				// file besides the volume's is the backup's own volume.json.
				read, added = append(read, int64(size.Files)-told.BackupSummary.FilesUnmodified), append(added, told.BackupSummary.DataAdded)
			}
		}
		if err := pair.remove(); err != nil {
			return err
		}
	}
	t := b.table("backup", fmt.Sprintf("Backup of %d files, through Abaca and with plain restic", b.files),
		"backup", "Abaca", "restic", "Abaca - restic", "ratio", "ratios")
	for i, phase := range phases {
		ratios, more := make([]float64, b.runs), make([]time.Duration, b.runs)
		for k := range b.runs {
			ratios[k], more[k] = through[i][k].Seconds()/plain[i][k].Seconds(), through[i][k]-plain[i][k]
		}
		t.row(backupRow, median(ratios) <= maxRatio, phase, durationText(median(through[i])), durationText(median(plain[i])),
			durationText(median(more)), ratioText(median(ratios)), spread(ratios, ratioText))
	}
	t.notes = append(t.notes, fmt.Sprintf("Medians of %d paired runs; the ratio is the median of the pairs' ratios.", b.runs))
	w := b.table("backup", "Where the time of a backup through Abaca goes",
		"backup", "until the mover starts", "mover, without restic", "restic", "from the mover's end until ready")
	for i, phase := range phases {
		cells := []string{phase}
		for _, d := range spent[i] {
			cells = append(cells, durationText(median(d)))
		}
		w.plainRow(cells...)
	}
	u := b.table("backup", "What an unchanged backup through Abaca reads and adds", "what", "median", "range")
	count := func(n int64) string { return fmt.Sprint(n) }
	u.row("0", slices.Max(read) == 0, "files of the volume read", count(median(read)), spread(read, count))
	u.row("at most 4096 bytes", slices.Max(added) <= maxAdded, "bytes added to the repository", count(median(added)), spread(added, count))
	return nil
}

// pair is two repositories on one disk, one for each side.
type pair struct {
	*bench
	name   string
	parent string // the last snapshot in the plain one
}

// newPair makes both repositories and puts a tiny backup of another volume into
// each, so that what is measured does not have the making of one.
func (b *bench) newPair(ctx context.Context, run int, tiny *volume) (*pair, error) {
	p := &pair{bench: b, name: fmt.Sprintf("run%d", run)}
	if err := b.addRepository(p.name, p.repository("abaca")); err != nil {
		return nil, err
	}
	if _, _, err := b.backUp(ctx, "tiny-"+p.name, p.name, tiny); err != nil {
		return nil, err
	}
	if _, err := p.restic(ctx, "/", "init", "--repository-version=2"); err != nil {
		return nil, err
	}
	_, err := p.restic(ctx, filepath.Dir(tiny.dir), "backup", "--host=tiny", "--force", "--", "data")
	return p, err
}

func (p *pair) repository(side string) string { return p.path("repository-" + p.name + "-" + side) }

func (p *pair) remove() error {
	for _, dir := range []string{p.path("repositories", p.name), p.repository("abaca"), p.repository("plain")} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// measure backs the volume up on both sides. Plain restic gets a snapshot of
// its own each time, as Abaca does, so that neither side finds inodes and pages
// of it in memory.
func (p *pair) measure(ctx context.Context, name string, v *volume, parent, abacaFirst bool) (begun, ready time.Time, plain time.Duration, err error) {
	snapshot, drop, err := p.mountedSnapshot(ctx, name+"-plain", v)
	if err != nil {
		return begun, ready, 0, err
	}
	for i := range 2 {
		if err := p.settle(ctx); err != nil {
			return begun, ready, 0, err
		}
		if (i == 0) == abacaFirst {
			begun, ready, err = p.backUp(ctx, name, p.name, v)
		} else {
			plain, err = p.plainBackup(ctx, filepath.Dir(snapshot.dir), parent)
		}
		if err != nil {
			return begun, ready, 0, err
		}
	}
	return begun, ready, plain, drop()
}

func (p *pair) plainBackup(ctx context.Context, dir string, parent bool) (time.Duration, error) {
	which := "--force"
	if parent {
		which = "--parent=" + p.parent
	}
	begun := time.Now()
	id, err := p.restic(ctx, dir, "backup", "--host=plain", which, "--", "data")
	p.parent = id
	return time.Since(begun), err
}

// restic runs plain restic, in the environment that Abaca gives it, and returns
// the snapshot that it made.
func (p *pair) restic(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, p.path("bin", "restic"), append([]string{"--json"}, args...)...)
	cmd.Dir = dir
	cmd.Env = []string{"LC_ALL=C", "TZ=UTC", "HOME=" + p.dir, "PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir(),
		"RESTIC_PROGRESS_FPS=2", "RESTIC_FEATURES=device-id-for-hardlinks=true",
		"RESTIC_CACHE_DIR=" + p.path("plain-cache"), "RESTIC_REPOSITORY=" + p.repository("plain"), "RESTIC_PASSWORD=" + password}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("restic %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	var id string
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		var m struct {
			SnapshotID string `json:"snapshot_id"`
		}
		if json.Unmarshal(lines.Bytes(), &m) == nil && m.SnapshotID != "" {
			id = m.SnapshotID
		}
	}
	return id, nil
}
