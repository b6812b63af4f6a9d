package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
)

// restoreWait is how long a CreateVolume waits for its restore before it answers "not
// yet", and unusedPoll how often it looks whether a share is mounted nowhere any more.
const (
	restoreWait = 5 * time.Second
	unusedPoll  = 200 * time.Millisecond
)

// createFromBackup fills a draft share from the repository. It becomes a volume
// only once every byte is restored and verified.
func (d *Driver) createFromBackup(ctx context.Context, c creation, s Snapshot) (*csi.CreateVolumeResponse, error) {
	engine, err := d.engine()
	if err != nil {
		return nil, err
	}
	if c.readOnly {
		return nil, fmt.Errorf("a backup cannot be mounted in place yet; ask for a writer mode to restore it: %w", backend.ErrUnsupported)
	}
	share, err := c.existing(ctx)
	if err != nil {
		return nil, err
	}
	if share != nil && !share.Draft {
		// The record may have outlived the last call.
		if err := engine.EndRestore(ctx, restoreID(share)); err != nil {
			return nil, err
		}
		return answerShare(c, share), nil
	}
	if share == nil {
		if share, err = d.draftFor(ctx, c, engine, s); err != nil {
			return nil, err
		}
	}
	restore := restoreID(share)
	// Another controller may finish, or give up, what this one waits for.
	draft := func(ctx context.Context) error {
		now, err := c.backend.Share(ctx, share.ID)
		if isNotFound(err) || err == nil && (!now.Draft || !now.CreatedAt.Equal(share.CreatedAt)) {
			return errNoDraft
		}
		return err
	}
	namespace, claim, _ := strings.Cut(c.description[describeClaim], "/")
	st, err := engine.AwaitRestore(ctx, restoreWait, backup.RestoreRequest{
		ID: restore, Repository: s.Repository, Backup: s.Backup, Volume: Volume{Backend: c.backendName, Share: share.ID}.String(),
		Name: c.name, Backend: c.backendName, Share: share.ID, Zone: share.Zone, Wanted: draft,
		About: about(backup.PersistentVolumeClaim, namespace, claim, c.name)})
	if err != nil && final(err) {
		// The orchestrator may never come back, so nothing stays.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
		defer cancel()
		left := draft(ctx)
		if left == nil {
			left = engine.EndRestore(ctx, restore)
		}
		if left == nil {
			left = deleteUnused(ctx, c.backend, share.ID)
		}
		return nil, undone(err, left)
	}
	if err != nil {
		return nil, err
	}
	if st.Phase != backup.Succeeded {
		return nil, fmt.Errorf("volume %q is being restored: %s: %w", c.name, st.Progressed(), backend.ErrPending)
	}
	if err := c.backend.CommitShare(ctx, share.ID); err != nil {
		return nil, err
	}
	if err := engine.EndRestore(ctx, restore); err != nil {
		return nil, err
	}
	return answerShare(c, share), nil
}

// deleteUnused deletes a share as soon as the node that had it mounted has taken
// it off.
func deleteUnused(ctx context.Context, b backend.Backend, id string) error {
	for {
		err := b.DeleteShare(ctx, id)
		if !errors.Is(err, backend.ErrInUse) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(unusedPoll):
		}
	}
}

// errNoDraft asks the orchestrator to call again, and see what the share is now.
var errNoDraft = fmt.Errorf("another controller has dealt with the restore meanwhile: %w", backend.ErrPending)

// restoreID names the restore into one draft, and into no later one of its name.
func restoreID(share *backend.Share) string {
	return "restore-" + digest(share.ID+share.CreatedAt.UTC().Format(time.RFC3339Nano))
}

// draftFor makes the share that a backup is restored into.
func (d *Driver) draftFor(ctx context.Context, c creation, engine *backup.Engine, s Snapshot) (*backend.Share, error) {
	b, err := engine.Find(ctx, s.Repository, s.Backup)
	if err != nil {
		return nil, err
	}
	switch {
	case b.Failure != "" && b.Lost:
		return nil, fmt.Errorf("backup %s: %w: %s", c.source, backup.ErrFailed, b.Failure)
	case !b.Ready:
		return nil, fmt.Errorf("backup %s is still being made: %s: %w", c.source, b.Failure, backend.ErrUnavailable)
	}
	// Whoever has a repository can have written any size into it, and a quota counts
	// what the claim asks for.
	if asked := cmp.Or(c.min, defaultSize); backup.Owner(s.Repository) != "" && b.Size > asked {
		return nil, fmt.Errorf("the backup is of a volume of %d bytes, and asked for are %d: from %s, ask for a size of at least %d bytes: %w",
			b.Size, asked, backup.Title(s.Repository), b.Size, errRange)
	}
	if err := c.holding("backup", b.Size); err != nil {
		return nil, err
	}
	return c.makeShare(ctx, backend.CreateShareRequest{Draft: true})
}
