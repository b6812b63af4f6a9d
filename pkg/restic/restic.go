// Package restic drives the restic program, by its JSON output and its exit
// codes and never by its prose (restic manual, "Scripting").
//
// Secrets reach restic by its environment only. They are removed from every
// error and are never logged.
package restic

import (
	"context"
	"errors"
	"time"
)

// PinnedVersion is the restic release that go.mod pins and this package was
// tested with.
const PinnedVersion = "0.19.1"

// Errors of a Repository wrap one of these, or the context's error; [Error]
// holds the details.
var (
	ErrNoRepository  = errors.New("repository does not exist")        // exit code 10
	ErrVanished      = errors.New("repository has vanished")          // exit code 10, of one that was there
	ErrLocked        = errors.New("repository is locked")             // exit code 11
	ErrWrongPassword = errors.New("wrong repository password")        // exit code 12
	ErrIncomplete    = errors.New("some files could not be read")     // exit code 3
	ErrDamaged       = errors.New("repository is damaged")            // exit code 1 of a check that has found something
	ErrInterrupted   = errors.New("restic was interrupted")           // exit code 130, or a signal
	ErrFailed        = errors.New("restic failed")                    // every other code
	ErrConfig        = errors.New("invalid repository configuration") // before restic is started
	ErrVersion       = errors.New("not the restic version that is pinned")
)

// Error is a restic run that did not end well. Error() is one line for people:
// what was run (the sub-command only), why it failed, a hint where one is
// known; no secret.
type Error struct {
	Command  string   // the sub-command, e.g. "backup"
	ExitCode int      // -1: ended by a signal or never started
	Message  string   // restic's own words, secrets removed
	Paths    []string // the first paths that could not be read or written
	Packs    []string // the packs that a check has found damaged; missing ones are in none
	Hint     string
	kind     error
	cause    error // the context's error, if that ended the run
	noSpace  bool
}

// Progress is how far a backup or a restore is. A total of 0 is not known yet.
type Progress struct {
	BytesDone  int64   `json:"bytesDone"`
	BytesTotal int64   `json:"bytesTotal"`
	FilesDone  int64   `json:"filesDone"`
	FilesTotal int64   `json:"filesTotal"`
	Rate       float64 `json:"bytesPerSecond"`
	// Trouble is what restic has complained of since it last moved on: it goes on
	// trying for a quarter of an hour. Empty when all is well.
	Trouble string `json:"trouble,omitempty"`
}

// Percent is the part of the bytes that is done, rounded down: 100 only when all files
// are done, too. 0 while the total is not known.
func (p Progress) Percent() int {
	if p.BytesTotal <= 0 {
		return 0
	}
	all := 100
	if p.FilesDone < p.FilesTotal {
		all = 99
	}
	return min(all, int(100*float64(p.BytesDone)/float64(p.BytesTotal)))
}

// Snapshot is one restic snapshot.
type Snapshot struct {
	ID      string
	Time    time.Time
	Host    string
	Tags    []string
	Paths   []string
	Summary *BackupSummary // nil when the snapshot has none
}

// BackupRequest says what to back up.
type BackupRequest struct {
	// Dir is the working directory; Targets are relative to it.
	Dir     string
	Targets []string
	Host    string
	Tags    []string
	Time    time.Time // zero: now
	Parent  string    // snapshot id, or empty for none
	// Exclude are patterns of what is left out, of absolute paths (restic manual,
	// "Excluding Files").
	Exclude []string
	// IgnoreInode takes a file for the parent's when its size and its modification
	// time are, whatever its inode number and its change time.
	IgnoreInode bool
	// RetryLock is how long to wait for a lock held by another process.
	RetryLock time.Duration
}

// BackupSummary is what restic says at the end of a backup.
type BackupSummary struct {
	SnapshotID      string `json:"snapshotID"`
	FilesNew        int64  `json:"filesNew"`
	FilesChanged    int64  `json:"filesChanged"`
	FilesUnmodified int64  `json:"filesUnmodified"`
	TotalFiles      int64  `json:"totalFiles"`
	TotalDirs       int64  `json:"totalDirs"`
	TotalBytes      int64  `json:"totalBytes"`
	// DataAdded is what the repository grew by before compression,
	// DataAddedPacked after it, both in bytes.
	DataAdded       int64         `json:"dataAdded"`
	DataAddedPacked int64         `json:"dataAddedPacked"`
	Duration        time.Duration `json:"durationNanoseconds"`
}

// RestoreRequest says what to restore: the whole snapshot, into Dir, made equal
// to it, sparse where it had holes, and verified.
type RestoreRequest struct {
	SnapshotID string
	Dir        string
	RetryLock  time.Duration
}

// RestoreSummary is what restic says at the end of a restore.
//
// Files are entries of any type here, directories too. Skipped are those that
// were there already with the right content, and are not in the totals.
type RestoreSummary struct {
	TotalFiles    int64 `json:"totalFiles"`
	FilesRestored int64 `json:"filesRestored"`
	TotalBytes    int64 `json:"totalBytes"`
	BytesRestored int64 `json:"bytesRestored"`
	FilesSkipped  int64 `json:"filesSkipped"`
	BytesSkipped  int64 `json:"bytesSkipped"`
}

// CheckRequest says what a check does besides verifying the structure: it reads
// those packs whose id's first byte, divided by Parts, leaves Part-1, as
// --read-data-subset has it. Parts 0 reads none; 256 is the most.
type CheckRequest struct {
	Part, Parts int
	// Exclusive keeps everybody else out meanwhile. Without it a check disturbs
	// nobody, but takes what others remove under it for damage.
	Exclusive bool
	RetryLock time.Duration
}

// PruneRequest says how much of what nobody refers to may stay, and how much may
// be rewritten, as restic's options of these names have it; empty for their
// defaults.
type PruneRequest struct {
	MaxUnused, MaxRepackSize string
	RetryLock                time.Duration
}

// Client is what one repository can be asked. [Repository] is the real one.
// Progress is called from one goroutine at a time and must not block.
type Client interface {
	// Init makes the repository. ErrFailed when there is one already.
	Init(ctx context.Context) error
	// Backup makes one snapshot. On ErrIncomplete the summary is returned too,
	// and the snapshot exists.
	Backup(ctx context.Context, req BackupRequest, progress func(Progress)) (*BackupSummary, error)
	Restore(ctx context.Context, req RestoreRequest, progress func(Progress)) (*RestoreSummary, error)
	// Snapshots returns the snapshots that bear all the given tags, oldest
	// first. It takes no lock. On ErrIncomplete some snapshots could not be
	// read, and those that could are returned too.
	Snapshots(ctx context.Context, tags ...string) ([]Snapshot, error)
	// Holds returns nil when the repository has the snapshot with the given id,
	// at the place where other clients would look for it. It takes no lock.
	Holds(ctx context.Context, id string) error
	// Forget removes exactly the snapshots with the given full ids. What is
	// gone already is nil.
	Forget(ctx context.Context, retryLock time.Duration, ids ...string) error
	// Unlock removes stale locks and no others: restic's rule is a dead process
	// of this host, or no refresh for 30 minutes.
	Unlock(ctx context.Context) error
	// UnlockHost removes the locks of a host of which the caller knows that it is
	// gone with all its processes, and stale ones. It needs CAP_SYS_ADMIN.
	UnlockHost(ctx context.Context, host string) error
	// RepairIndex rebuilds the index from the packs, so that what an
	// interrupted backup has uploaded is found again.
	RepairIndex(ctx context.Context) error
	// Check verifies the repository. ErrDamaged when it has found something,
	// which includes what it could not download.
	Check(ctx context.Context, req CheckRequest) error
	// Prune removes what no snapshot refers to. It has the repository to itself,
	// and may be cut off at any point.
	Prune(ctx context.Context, req PruneRequest) error
	// Size is how many bytes the snapshots take in the repository. It takes no
	// lock.
	Size(ctx context.Context) (int64, error)
	// Users returns the ids of the snapshots that refer to any of the packs. It
	// takes no lock.
	Users(ctx context.Context, packs ...string) ([]string, error)
	// Dump returns a file of a snapshot, by its path in it. It takes no lock.
	Dump(ctx context.Context, id, path string) ([]byte, error)
}
