package maintain

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// Record is what maintenance leaves in the repository itself: in a restic
// snapshot of its own, as the file recordName, with the tag
// [mover.TagMaintenance]. So nobody can lose it who has the repository, and
// whoever lists the backups finds it. The newest counts.
type Record struct {
	// Ended is when the run ended that left it.
	Ended time.Time `json:"ended"`
	// Pruned and Checked are when the last prune and the last check ended that
	// ended well, and Damaged what the last check has found, for people; empty for
	// nothing.
	Pruned  time.Time `json:"pruned,omitzero"`
	Checked time.Time `json:"checked,omitzero"`
	Damaged string    `json:"damaged,omitempty"`
	// Size is how many bytes the snapshots took in the repository; 0: not known.
	Size int64 `json:"size,omitempty"`
	// ReadDays is in how many days everything is to be read, and Began when the
	// first check that reads began: what was not read since was never read.
	ReadDays int       `json:"readDays,omitempty"`
	Began    time.Time `json:"began,omitzero"`
	Read     *coverage `json:"read,omitempty"`
	// Last is when the last check began, whose distance to the next tells how often
	// they come.
	Last time.Time `json:"last,omitzero"`
}

const (
	recordName = "maintenance.json"
	recordHost = "abaca-maintenance"
	// keptRecords is how many are kept: the newest one counts, and the others are
	// for people, and for when that cannot be read.
	keptRecords = 3
)

// Latest is the record of the newest maintenance, given the snapshots of a
// repository; an empty one if there was none. With an error it is the newest that
// can be read, and one that is newer may say that the repository is damaged.
func Latest(ctx context.Context, c restic.Client, snapshots []restic.Snapshot) (*Record, error) {
	var unread error
	for _, s := range slices.Backward(records(snapshots)) {
		r := &Record{}
		text, err := c.Dump(ctx, s.ID, "/"+recordName)
		if err == nil {
			err = json.Unmarshal(text, r)
		}
		if err == nil {
			return r, unread
		}
		unread = cmp.Or(unread, fmt.Errorf("read the record of maintenance in restic snapshot %s: %w", s.ID, err))
	}
	return &Record{}, unread
}

// LatestID is the id of the restic snapshot that Latest reads, or empty.
func LatestID(snapshots []restic.Snapshot) string {
	if all := records(snapshots); len(all) > 0 {
		return all[len(all)-1].ID
	}
	return ""
}

// records are the snapshots of maintenance, oldest first.
func records(snapshots []restic.Snapshot) (all []restic.Snapshot) {
	for _, s := range snapshots {
		if slices.Contains(s.Tags, mover.TagMaintenance) {
			all = append(all, s)
		}
	}
	return all
}

// OldestRead is when that part of the repository was read that was read the
// longest ago; zero while there are parts that were never read.
func (r *Record) OldestRead() time.Time {
	if r.Read == nil || r.Read.oldest().Before(r.Began) {
		return time.Time{}
	}
	return r.Read.oldest()
}

// Coverage is the share of the repository, from 0 to 1, that was read within the
// stated number of days before a time.
func (r *Record) Coverage(now time.Time) float64 {
	if r.Read == nil {
		return 0
	}
	from := now.Add(-days(r.ReadDays))
	if from.Before(r.Began) {
		from = r.Began
	}
	return r.Read.since(from)
}

func days(n int) time.Duration { return time.Duration(n) * 24 * time.Hour }

// save writes the record into the repository as a snapshot of its own, cut at a
// time. With hold, new backups wait until then, or until the next record.
func (r *Record) save(ctx context.Context, c restic.Client, at, hold time.Time, retry time.Duration) error {
	dir, err := os.MkdirTemp("", "abaca-maintain-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, recordName), append(text, '\n'), 0o600); err != nil {
		return err
	}
	tags := []string{mover.TagMaintenance}
	if !hold.IsZero() {
		tags = append(tags, mover.TagHold+hold.UTC().Format(time.RFC3339))
	}
	_, err = c.Backup(ctx, restic.BackupRequest{Dir: dir, Targets: []string{recordName}, Host: recordHost, Tags: tags, Time: at, RetryLock: retry}, nil)
	return err
}
