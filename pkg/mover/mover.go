// Package mover carries bytes between a mounted snapshot or share and a
// repository. It is the work inside one short-lived process: prove the mount,
// run restic, report.
//
// A mover works in a directory with two entries: "data", the mount point, and
// "volume.json", the description of the volume. Each restic snapshot has these
// two at its top, so that every repository can be read with plain restic.
package mover

import (
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// Dir is the one path at which every mover sees its volume, so that restic
// records the same paths for every backup of every volume (restic manual,
// "Parent snapshot"). Each mover has it to itself: a mount namespace, or a pod.
const Dir = "/run/abaca/volume"

// Tags on every restic snapshot. Values hold no comma and no white space.
const (
	TagBackup = "abaca.backup=" // the backup's id
	TagVolume = "abaca.volume=" // the volume's handle
	TagName   = "abaca.name="   // the CSI snapshot name, percent-encoded
	TagSize   = "abaca.size="   // the size of the volume, in bytes
)

// TagPartial is on a restic snapshot of the description alone, beside that of the
// backup whose id it has: the backup lacks files that could not be read. It is no tag
// of the backup's own, since `restic tag` waits until nobody else uses the repository.
const TagPartial = "abaca.partial="

// Tags on the restic snapshots that maintenance leaves, which are no backups.
const (
	TagMaintenance = "abaca.maintenance" // all of them
	TagHold        = "abaca.hold="       // until when new backups wait, in RFC 3339
)

// Held says until when new backups wait, by the snapshots of a repository, of
// which the newest of maintenance counts; zero when they do not.
func Held(snapshots []restic.Snapshot, now time.Time) time.Time {
	var until time.Time
	for _, s := range snapshots { // oldest first
		if !slices.Contains(s.Tags, TagMaintenance) {
			continue
		}
		until = time.Time{}
		for _, tag := range s.Tags {
			if text, ok := strings.CutPrefix(tag, TagHold); ok {
				until, _ = time.Parse(time.RFC3339, text) // of nonsense, nobody waits
			}
		}
	}
	if until.After(now) {
		return until
	}
	return time.Time{}
}

// Task is all that a mover needs to know, apart from the repository's
// configuration, which holds secrets and travels by its environment.
type Task struct {
	// ID names the task: 1 to 63 bytes of [a-z0-9-].
	ID string `json:"id"`
	// Repository is the name of the repository.
	Repository string `json:"repository"`
	// Source is what must be mounted at Dir/data: the snapshot that is backed
	// up, or the share that is restored into.
	Source  mount.Source `json:"source"`
	Backup  *Backup      `json:"backup,omitempty"`
	Restore *Restore     `json:"restore,omitempty"`
	// Made says that the repository has been there, so that one which is not
	// there has vanished, and is not made anew.
	Made bool `json:"made,omitempty"`
	// Recover says that an earlier mover of this task ended without a word: its
	// stale locks are removed and the index is repaired first.
	Recover bool `json:"recover,omitempty"`
}

// Backup is a task that makes one backup.
type Backup struct {
	// Backup is the backup's id, Volume the handle of the volume.
	Backup string `json:"backup"`
	Volume string `json:"volume"`
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	// Host is the restic host: stable for the volume, never a pod or a node.
	Host string    `json:"host"`
	Time time.Time `json:"time"`
	// Description becomes volume.json.
	Description json.RawMessage `json:"description"`
	// Parent is the newest backup of the volume, if whoever made the task knows;
	// a mover that is told need not look before it begins.
	Parent *Parent `json:"parent,omitempty"`
	// Exclude is what is left out: see [CheckExclude].
	Exclude []string `json:"exclude,omitempty"`
	// AllowPartial accepts a backup that lacks unreadable files.
	AllowPartial bool `json:"allowPartial,omitempty"`
	// AllowEmpty accepts an empty volume though its last backup was not empty.
	AllowEmpty bool `json:"allowEmpty,omitempty"`
}

// Parent is the restic snapshot that a backup is compared with.
type Parent struct {
	Snapshot string `json:"snapshot,omitempty"` // empty: the volume has none yet
	// Files counts its files, volume.json included; Time is when it was cut.
	Files int64     `json:"files"`
	Time  time.Time `json:"time"`
}

// Restore is a task that fills a share from one backup.
type Restore struct {
	Backup string `json:"backup"`
	// Volume is the handle of the volume that the share becomes, and Name its CSI
	// name; both are only shown.
	Volume string `json:"volume,omitempty"`
	Name   string `json:"name,omitempty"`
}

// Result is how a mover ended.
type Result struct {
	// Snapshot is the restic snapshot that was made or restored; without
	// Backup, another controller had made it before.
	Snapshot string `json:"snapshot,omitempty"`
	// Error is empty for success; else for people, without secrets.
	Error string `json:"error,omitempty"`
	// Reason classifies Error.
	Reason  Reason                 `json:"reason,omitempty"`
	Backup  *restic.BackupSummary  `json:"backupSummary,omitempty"`
	Restore *restic.RestoreSummary `json:"restoreSummary,omitempty"`
	// Partial says that a successful backup lacks files, since AllowPartial accepted
	// that, and Incomplete are the first paths of them, as far as they are known.
	Partial    bool     `json:"partial,omitempty"`
	Incomplete []string `json:"incomplete,omitempty"`
}

// Deleted is the result of a task that nobody wants any more.
var Deleted = Result{Error: "it is being deleted", Reason: ReasonDeleted}

// Reason classifies a failure by what can be done about it.
type Reason string

const (
	ReasonSource     Reason = "source"      // not the right mount, or it can be written
	ReasonIncomplete Reason = "incomplete"  // unreadable files
	ReasonEmpty      Reason = "empty"       // shrank to nothing since the last backup
	ReasonNotFound   Reason = "not-found"   // no such repository or backup
	ReasonPassword   Reason = "password"    // wrong repository password
	ReasonConfig     Reason = "config"      // the repository's configuration is wrong
	ReasonNoSpace    Reason = "no-space"    // the target or the repository is full
	ReasonLocked     Reason = "locked"      // somebody else holds the repository
	ReasonRepository Reason = "unavailable" // everything else: it may pass
	ReasonStopped    Reason = "stopped"     // asked to stop
	ReasonDeleted    Reason = "deleted"     // its backup is being deleted
)

// Lasting says whether the same task would fail again.
func (r Reason) Lasting() bool {
	switch r {
	case ReasonSource, ReasonIncomplete, ReasonEmpty, ReasonNotFound, ReasonPassword, ReasonConfig, ReasonDeleted:
		return true
	}
	return false
}
