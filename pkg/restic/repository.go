package restic

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Config says how a repository is reached.
type Config struct {
	// Program is the restic program.
	Program string
	// Env is the repository's environment, as [LoadEnv] returns it.
	Env map[string]string
	// CacheDir is restic's cache; empty for none. Processes may share it.
	CacheDir string
	// SeenDir is where the repositories that were there are remembered, by their
	// locations; empty for nowhere. Processes may share it.
	SeenDir string
	// ExtraFiles are inherited by every restic process, from descriptor 3 on:
	// a flock on one is held for as long as any of them lives.
	ExtraFiles []*os.File
}

// Repository is a [Client] that runs restic. It is safe for concurrent use.
type Repository struct {
	config  Config
	environ []string
	options []string // before every command
	redact  *strings.Replacer
	seen    seen
	command func(ctx context.Context, name string, arg ...string) *exec.Cmd
	// apart are the namespaces that restic does not share with this process.
	apart uintptr
}

var _ Client = (*Repository)(nil)

// Open returns a client of a repository. It starts nothing and does not look
// for the repository; ErrConfig when the configuration cannot be right.
func Open(c Config) (*Repository, error) {
	if err := checkEnv(c.Env); err != nil {
		return nil, err
	}
	program, err := exec.LookPath(c.Program)
	if err != nil {
		return nil, fmt.Errorf("%w: restic program: %w", ErrConfig, err)
	}
	c.Program = program
	r := &Repository{
		config: c, environ: newEnviron(c), options: []string{"--json"},
		redact: newRedactor(c.Env), seen: newSeen(c), command: exec.CommandContext,
	}
	if c.CacheDir == "" {
		r.options = append(r.options, "--no-cache")
	} else if err := os.MkdirAll(c.CacheDir, 0o700); err != nil {
		return nil, fmt.Errorf("%w: restic cache: %w", ErrConfig, err)
	}
	if c.SeenDir != "" {
		if err := os.MkdirAll(c.SeenDir, 0o700); err != nil {
			return nil, fmt.Errorf("%w: memory of repositories: %w", ErrConfig, err)
		}
	}
	return r, nil
}

// message is what restic's commands say on their standard output.
type message struct {
	Type           string  `json:"message_type"`
	SecondsElapsed float64 `json:"seconds_elapsed"`
	TotalFiles     int64   `json:"total_files"`
	TotalBytes     int64   `json:"total_bytes"`
	FilesDone      int64   `json:"files_done"`
	BytesDone      int64   `json:"bytes_done"`
	FilesRestored  int64   `json:"files_restored"`
	BytesRestored  int64   `json:"bytes_restored"`
	FilesSkipped   int64   `json:"files_skipped"`
	BytesSkipped   int64   `json:"bytes_skipped"`
	SnapshotID     string  `json:"snapshot_id"`
	summary
}

// summary is in a backup's last message and in each snapshot.
type summary struct {
	FilesNew        int64     `json:"files_new"`
	FilesChanged    int64     `json:"files_changed"`
	FilesUnmodified int64     `json:"files_unmodified"`
	DirsNew         int64     `json:"dirs_new"`
	DirsChanged     int64     `json:"dirs_changed"`
	DirsUnmodified  int64     `json:"dirs_unmodified"`
	DataAdded       int64     `json:"data_added"`
	DataAddedPacked int64     `json:"data_added_packed"`
	FilesProcessed  int64     `json:"total_files_processed"`
	BytesProcessed  int64     `json:"total_bytes_processed"`
	Start           time.Time `json:"backup_start"`
	End             time.Time `json:"backup_end"`
}

func (s *summary) export(id string) *BackupSummary {
	return &BackupSummary{
		SnapshotID: id,
		FilesNew:   s.FilesNew, FilesChanged: s.FilesChanged, FilesUnmodified: s.FilesUnmodified,
		TotalFiles: s.FilesProcessed, TotalBytes: s.BytesProcessed,
		TotalDirs: s.DirsNew + s.DirsChanged + s.DirsUnmodified,
		DataAdded: s.DataAdded, DataAddedPacked: s.DataAddedPacked,
		Duration: s.End.Sub(s.Start),
	}
}

// stream runs a command that speaks in JSON lines. It returns the last summary,
// nil when there was none.
func (r *Repository) stream(ctx context.Context, dir string, progress func(Progress), args ...string) (*message, error) {
	var last *message
	var mu sync.Mutex
	var trouble string
	var stuck int64 // how far it was when it complained
	var at Progress
	complaint := func(text string) {
		mu.Lock()
		defer mu.Unlock()
		trouble, stuck = text, at.BytesDone
		if progress != nil { // at once: until it has opened the repository, it does not say how far it is
			p := at
			p.Trouble = trouble
			progress(p)
		}
	}
	_, err := r.listen(ctx, dir, func(line []byte) {
		var m message
		if json.Unmarshal(line, &m) != nil {
			return
		}
		switch m.Type {
		case "summary":
			last = &m
		case "status":
			if progress == nil {
				return
			}
			// Each command has one of the two of each.
			p := Progress{
				BytesDone: m.BytesDone + m.BytesRestored, BytesTotal: m.TotalBytes,
				FilesDone: m.FilesDone + m.FilesRestored, FilesTotal: m.TotalFiles,
			}
			if m.SecondsElapsed > 0 {
				p.Rate = float64(p.BytesDone) / m.SecondsElapsed
			}
			mu.Lock()
			defer mu.Unlock()
			if at = p; p.BytesDone > stuck {
				trouble = ""
			}
			p.Trouble = trouble
			progress(p)
		}
	}, complaint, args...)
	return last, err
}

// noSummary is a run that ended with code 0 and did not say what it did.
func noSummary(command string) error {
	return &Error{Command: command, Message: "no summary", Hint: "is this restic " + PinnedVersion + "?", kind: ErrFailed}
}

// Init implements [Client].
func (r *Repository) Init(ctx context.Context) error {
	_, err := r.run(ctx, "/", ignore, "init", "--repository-version=2")
	return err
}

// Backup implements [Client].
func (r *Repository) Backup(ctx context.Context, req BackupRequest, progress func(Progress)) (*BackupSummary, error) {
	args := []string{"backup", "--host=" + req.Host, "--retry-lock=" + req.RetryLock.String()}
	for _, tag := range req.Tags {
		if strings.ContainsAny(tag, ",\n") {
			return nil, fmt.Errorf("restic backup: tag %q holds a comma or a line break", tag)
		}
		args = append(args, "--tag="+tag)
	}
	if !req.Time.IsZero() {
		args = append(args, "--time="+req.Time.UTC().Format(time.DateTime)) // TZ is UTC
	}
	// Left alone, restic looks for a parent itself, by host and path.
	parent := "--force"
	if req.Parent != "" {
		parent = "--parent=" + req.Parent
	}
	args = append(args, parent)
	for _, pattern := range req.Exclude {
		args = append(args, "--exclude="+pattern)
	}
	if req.IgnoreInode {
		args = append(args, "--ignore-inode")
	}
	last, err := r.stream(ctx, req.Dir, progress, append(append(args, "--"), req.Targets...)...)
	if err != nil && !errors.Is(err, ErrIncomplete) {
		return nil, err
	}
	if last == nil || last.SnapshotID == "" {
		return nil, errors.Join(err, noSummary("backup"))
	}
	return last.export(last.SnapshotID), err
}

// Restore implements [Client]. Restic sets owners by number and ACLs as the
// extended attributes that they are. It says nothing when it may not change an
// owner because it does not run as root, or when the target has no extended
// attributes.
func (r *Repository) Restore(ctx context.Context, req RestoreRequest, progress func(Progress)) (*RestoreSummary, error) {
	if err := checkIDs(req.SnapshotID); err != nil {
		return nil, err
	}
	last, err := r.stream(ctx, req.Dir, progress, "restore", "--target="+req.Dir,
		"--sparse", "--verify", "--retry-lock="+req.RetryLock.String(), req.SnapshotID)
	if err != nil {
		return nil, err
	}
	if last == nil {
		return nil, noSummary("restore")
	}
	return &RestoreSummary{
		TotalFiles: last.TotalFiles, FilesRestored: last.FilesRestored, FilesSkipped: last.FilesSkipped,
		TotalBytes: last.TotalBytes, BytesRestored: last.BytesRestored, BytesSkipped: last.BytesSkipped,
	}, nil
}

// Snapshots implements [Client].
//
// Restic ends with code 0 though it could not read a snapshot, and even when it
// could not list any; it only complains. Most complaints are harmless: a
// snapshot was forgotten between the listing and the reading, a request had to
// be repeated. They are gone the next time.
func (r *Repository) Snapshots(ctx context.Context, tags ...string) ([]Snapshot, error) {
	args := []string{"snapshots", "--no-lock"}
	if len(tags) > 0 {
		args = append(args, "--tag="+strings.Join(tags, ",")) // a comma is "and"
	}
	for attempt := 1; ; attempt++ {
		var list []struct {
			ID       string
			Time     time.Time
			Hostname string
			Tags     []string
			Paths    []string
			Summary  *summary
		}
		parsed := noSummary("snapshots")
		said, err := r.run(ctx, "/", func(line []byte) { parsed = json.Unmarshal(line, &list) }, args...)
		if err = cmp.Or(err, parsed); err != nil {
			return nil, err
		}
		if said.noise && attempt < 3 {
			continue
		}
		if said.noise {
			e := said.ended("snapshots", 0, nil)
			e.kind = ErrIncomplete
			err = e
		}
		var snapshots []Snapshot
		for _, s := range list {
			snapshot := Snapshot{ID: s.ID, Time: s.Time, Host: s.Hostname, Tags: s.Tags, Paths: s.Paths}
			if s.Summary != nil {
				snapshot.Summary = s.Summary.export(s.ID)
			}
			snapshots = append(snapshots, snapshot)
		}
		slices.SortStableFunc(snapshots, func(a, b Snapshot) int { return a.Time.Compare(b.Time) })
		return snapshots, err
	}
}

// Holds implements [Client]. A local repository is a directory whose layout is
// documented (restic manual, "Repository Layout"), so a look is enough; others
// are asked.
func (r *Repository) Holds(ctx context.Context, id string) error {
	if err := checkIDs(id); err != nil {
		return err
	}
	dir := strings.TrimPrefix(r.config.Env["RESTIC_REPOSITORY"], "local:")
	if !filepath.IsAbs(dir) {
		_, err := r.run(ctx, "", ignore, "cat", "snapshot", id, "--no-lock")
		return err
	}
	for _, name := range []string{"config", filepath.Join("snapshots", id)} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("%w: the repository has lost what was written: %w", ErrFailed, err)
		}
	}
	return nil
}

// Forget implements [Client].
func (r *Repository) Forget(ctx context.Context, retryLock time.Duration, ids ...string) error {
	// Without an id restic would apply a policy to all snapshots.
	if len(ids) == 0 {
		return nil
	}
	if err := checkIDs(ids...); err != nil {
		return err
	}
	said, err := r.run(ctx, "/", ignore, append([]string{"forget", "--retry-lock=" + retryLock.String()}, ids...)...)
	if err != nil || !said.noise {
		return err
	}
	// A snapshot that is gone and one that cannot be read end alike, with code 0
	// and a complaint.
	left, err := r.Snapshots(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(left, func(s Snapshot) bool { return slices.Contains(ids, s.ID) }) {
		return said.ended("forget", 0, nil)
	}
	return nil
}

// Unlock implements [Client].
func (r *Repository) Unlock(ctx context.Context) error {
	_, err := r.run(ctx, "/", ignore, "unlock")
	return err
}

// onHost gives its namespaces the name of a host, and runs a program at a number at
// which no process is that a lock could name: restic takes a lock for dead when it
// is of its own host and there is no such process, or thread. The shell stays process 1.
// A /proc of its own, as that of a container that is not privileged is read-only in part.
const onHost = `mount --make-rslave / && mount -t proc proc /proc && max=$(cat /proc/sys/kernel/pid_max) && echo "$1" >/proc/sys/kernel/hostname && echo $((max / 2)) >/proc/sys/kernel/ns_last_pid && shift || exit 1
"$@"
exit $?`

// UnlockHost implements [Client].
func (r *Repository) UnlockHost(ctx context.Context, host string) error {
	there := *r
	there.apart = unix.CLONE_NEWUTS | unix.CLONE_NEWPID | unix.CLONE_NEWNS
	there.command = func(ctx context.Context, name string, arg ...string) *exec.Cmd {
		return r.command(ctx, "/bin/sh", append([]string{"-c", onHost, "sh", host, name}, arg...)...)
	}
	return there.Unlock(ctx)
}

// RepairIndex implements [Client].
func (r *Repository) RepairIndex(ctx context.Context) error {
	_, err := r.run(ctx, "/", ignore, "repair", "index")
	return err
}

// Check implements [Client].
func (r *Repository) Check(ctx context.Context, req CheckRequest) error {
	args := []string{"check", "--retry-lock=" + req.RetryLock.String()}
	if !req.Exclusive {
		args = append(args, "--no-lock")
	}
	if req.Parts != 0 {
		args = append(args, fmt.Sprintf("--read-data-subset=%d/%d", req.Part, req.Parts))
	}
	var found struct {
		Packs  []string `json:"broken_packs"`
		Errors int      `json:"num_errors"`
	}
	said, err := r.run(ctx, "/", func(line []byte) { _ = json.Unmarshal(line, &found) }, args...)
	var e *Error
	if errors.As(err, &e) && e.kind == ErrDamaged {
		// Restic writes its advice as errors too; only the summary can count.
		e.Message, e.Packs = said.first, found.Packs
		if found.Errors > 1 {
			e.Message += fmt.Sprintf("; and %d more", found.Errors-1)
		}
	}
	return err
}

// Prune implements [Client].
func (r *Repository) Prune(ctx context.Context, req PruneRequest) error {
	args := []string{"prune", "--retry-lock=" + req.RetryLock.String()}
	if req.MaxUnused != "" {
		args = append(args, "--max-unused="+req.MaxUnused)
	}
	if req.MaxRepackSize != "" {
		args = append(args, "--max-repack-size="+req.MaxRepackSize)
	}
	_, err := r.run(ctx, "/", ignore, args...)
	return err
}

// Size implements [Client].
func (r *Repository) Size(ctx context.Context) (int64, error) {
	var found struct {
		Size *int64 `json:"total_size"`
	}
	_, err := r.run(ctx, "/", func(line []byte) { _ = json.Unmarshal(line, &found) }, "stats", "--mode=raw-data", "--no-lock")
	if err == nil && found.Size == nil {
		err = noSummary("stats")
	}
	if err != nil {
		return 0, err
	}
	return *found.Size, nil
}

// Users implements [Client].
func (r *Repository) Users(ctx context.Context, packs ...string) ([]string, error) {
	if len(packs) == 0 {
		return nil, nil
	}
	if err := checkIDs(packs...); err != nil {
		return nil, err
	}
	var found []struct{ Snapshot string }
	parsed := noSummary("find")
	_, err := r.run(ctx, "/", func(line []byte) { parsed = json.Unmarshal(line, &found) }, append([]string{"find", "--no-lock", "--pack"}, packs...)...)
	if err = cmp.Or(err, parsed); err != nil {
		return nil, err
	}
	var ids []string
	for _, f := range found {
		if !slices.Contains(ids, f.Snapshot) {
			ids = append(ids, f.Snapshot)
		}
	}
	return ids, nil
}

// Dump implements [Client], less a newline at the file's end.
func (r *Repository) Dump(ctx context.Context, id, path string) ([]byte, error) {
	if err := checkIDs(id); err != nil {
		return nil, err
	}
	var lines [][]byte
	_, err := r.run(ctx, "/", func(line []byte) { lines = append(lines, bytes.Clone(line)) }, "dump", "--no-lock", id, path)
	return bytes.Join(lines, []byte{'\n'}), err
}

func ignore([]byte) {}

var fullID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// checkIDs keeps "latest", prefixes and options from being taken for ids.
func checkIDs(ids ...string) error {
	for _, id := range ids {
		if !fullID.MatchString(id) {
			return fmt.Errorf("%q is not a full restic snapshot id", id)
		}
	}
	return nil
}
