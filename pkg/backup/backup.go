// Package backup makes, finds, deletes and restores backups: images of share
// snapshots in restic repositories, off the storage system.
//
// The truth about a finished backup is its repository, where it is found by
// tag; the truth about one that is being made is the runner's durable record.
// Nothing that matters is only in the memory of a controller, so one that was
// killed finds every run again and finishes it.
package backup

import (
	"context"
	"errors"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// ErrFailed: the backup or restore has failed, and would fail again. The
// sentinels of package backend classify all other errors.
var ErrFailed = errors.New("failed for good")

// ErrPassword: the repository is encrypted with another password.
var ErrPassword = errors.New("refused by the repository")

// Backup is an image of one share snapshot in a repository.
type Backup struct {
	// ID is unique within the repository: a digest of the CSI snapshot name.
	ID         string
	Repository string
	Name       string // the CSI snapshot name
	Volume     string // the handle of the volume that was backed up
	Size       int64  // the size of the volume when it was cut, in bytes
	// CreatedAt is when the storage system cut the snapshot, in whole seconds,
	// which is what restic keeps.
	CreatedAt time.Time
	// Ready is false while a mover carries it, and for ever if it failed.
	Ready bool
	// Snapshot is the restic snapshot, and Files the number of its files; empty
	// while a mover carries it.
	Snapshot string
	Files    int64
	// Host is the claim, or the volume's handle; Summary is restic's own account, nil
	// while a mover carries it.
	Host    string
	Summary *restic.BackupSummary
	// Partial says that it lacks files that could not be read.
	Partial bool
	// Failure says why the last attempt failed; empty if none did. Lost says that
	// there will be no other.
	Failure string
	Lost    bool
}

// Job is what a runner keeps about one mover: its task, and what the engine
// holds for it on the storage system.
type Job struct {
	Task mover.Task `json:"task"`
	// Snapshot names the temporary snapshot that a backup reads, Share the share
	// that a restore fills; the mover's export of it is held under Consumer.
	Backend  string `json:"backend,omitempty"`
	Snapshot string `json:"snapshot,omitempty"`
	Share    string `json:"share,omitempty"`
	Consumer string `json:"consumer,omitempty"`
	// Node is the only machine that can mount it, Zone the only zone; empty for any.
	Node string `json:"node,omitempty"`
	Zone string `json:"zone,omitempty"`
	// Files is how many files the repository is known to hold, each volume's
	// newest backup counted: a measure of the memory that restic needs.
	Files int64 `json:"files,omitempty"`
	// About are the objects that people look at: the first one hears of everything,
	// the others of how it ended.
	About []Object `json:"about,omitempty"`
	// Attempt counts the movers that were started for the job, from 1.
	Attempt int `json:"attempt"`
}

func (j Job) target() backend.Target {
	return backend.Target{SnapshotID: j.Snapshot, ShareID: j.Share}
}

// always is for a job that is wanted whatever has happened meanwhile.
func always(context.Context) error { return nil }

// Phase is what a runner knows of a job.
type Phase string

const (
	Running     Phase = "running"
	Succeeded   Phase = "succeeded"
	Failed      Phase = "failed"
	Interrupted Phase = "interrupted" // the mover is gone and has said nothing
)

// Status is a job and how far it is.
type Status struct {
	Job      Job             `json:"job"`
	Phase    Phase           `json:"phase"`
	Progress restic.Progress `json:"progress"`
	// Trouble says why a mover that runs does not get on, or why it was
	// interrupted: for people, empty where nothing is known.
	Trouble string `json:"trouble,omitempty"`
	// Result is set when the job has succeeded or failed.
	Result  mover.Result `json:"result"`
	Started time.Time    `json:"started"`
	Ended   time.Time    `json:"ended"` // zero while it runs
}

// Runner is where movers run. All methods are idempotent, survive kill -9 at
// any point, and may be called by several processes over the same records: of
// one job there is never more than one mover.
type Runner interface {
	// Start records the job and starts its mover. A job that runs or has
	// succeeded is left alone; one that failed or was interrupted starts again.
	// While nobody else can start, end or remove the job, may is asked whether
	// it is still wanted; its error is returned, and nothing has happened.
	Start(ctx context.Context, job Job, may func(context.Context) error) error
	// Status returns one job. backend.ErrNotFound when there is no record.
	Status(ctx context.Context, id string) (*Status, error)
	// Jobs returns every job that there is a record of, ordered by id.
	Jobs(ctx context.Context) ([]*Status, error)
	// Stop ends the mover, waits until it is gone, and makes the job one that has
	// failed for good with mover.ReasonDeleted, so that nobody starts it again.
	// If the mover does not go before ctx ends it returns backend.ErrPending.
	// What has no record is nil.
	Stop(ctx context.Context, id string) error
	// Release takes away what the mover of an ended job had mounted, so that
	// nobody is left who uses it; the record stays. ErrPending if that takes longer
	// than ctx. What has no record is nil.
	Release(ctx context.Context, id string) error
	// Remove is Stop and Release, and drops the record. What has none is nil.
	Remove(ctx context.Context, id string) error
}
