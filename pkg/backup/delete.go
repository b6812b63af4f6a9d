package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// Delete removes one backup and nothing else: the mover that still makes it,
// its temporary snapshot, and its restic snapshots. What is gone is nil.
// ErrPending while others hold the repository's lock.
func (e *Engine) Delete(ctx context.Context, repository, id string) error {
	release, err := e.lock(id)
	if err != nil {
		return err
	}
	defer release()

	repo, turn, err := e.open(ctx, repository)
	defer turn()
	abandoned := errors.Is(err, ErrAbandoned)
	if errors.Is(err, backend.ErrNotFound) {
		// Success would leave the data where nobody looks for it any more.
		where := "put its folder back"
		if Owner(repository) != "" {
			where = "put the Secret back"
		}
		return fmt.Errorf("delete backup %s: %s is not configured; %s, or remove the backup with plain restic: %w",
			id, Title(repository), where, backend.ErrInUse)
	}
	if err != nil && !abandoned {
		return fmt.Errorf("delete backup %s: %w", id, err)
	}
	st, err := e.Runner.Status(ctx, id)
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return err
	}
	others := err == nil && !st.isBackupIn(repository)
	if err == nil && !others {
		// The record goes last: a killed controller finds the snapshot by it, and
		// it outranks what an incomplete backup has left in the repository.
		if err := e.Runner.Stop(ctx, id); err != nil {
			return fmt.Errorf("stop backup %s: %w", id, err)
		}
		if err := e.release(ctx, st.Job); err != nil {
			return err
		}
	}
	if abandoned {
		// Nobody can mend that, and the namespace could not go before its backups.
		klog.FromContext(ctx).Info("Backup is left in its repository, as the namespace is gone", "backup", id, "repository", repository)
	} else if err := e.forget(ctx, repo, repository, id); err != nil {
		return err
	}
	if others {
		return nil
	}
	return e.Runner.Remove(ctx, id)
}

// forget removes the restic snapshots that bear the backup's tag, or say that it is
// partial, by their ids.
func (e *Engine) forget(ctx context.Context, repo restic.Client, repository, id string) error {
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, repositoryTimeout)
	defer cancel()
	snapshots, err := repo.Snapshots(ctx)
	if errors.Is(err, restic.ErrNoRepository) {
		return nil
	}
	if err != nil && !errors.Is(err, restic.ErrIncomplete) { // what cannot be read cannot be forgotten
		return repositoryError(asked, repository, err)
	}
	var ids []string
	for _, s := range snapshots {
		if slices.Contains(s.Tags, mover.TagBackup+id) || slices.Contains(s.Tags, mover.TagPartial+id) {
			ids = append(ids, s.ID)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	err = repo.Forget(ctx, lockWait, ids...)
	if errors.Is(err, restic.ErrLocked) {
		// A lock of a mover that is gone must not stay; a live one is waited for.
		if err := repo.Unlock(ctx); err != nil {
			return repositoryError(asked, repository, err)
		}
		err = repo.Forget(ctx, lockWait, ids...)
	}
	e.forgetListing(repository)
	if err != nil {
		return repositoryError(asked, repository, err)
	}
	klog.FromContext(ctx).Info("Backup deleted", "backup", id, "repository", repository, "resticSnapshots", ids)
	return nil
}
