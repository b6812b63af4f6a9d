package manila

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// DeleteShare implements backend.Backend. Manila keeps no snapshot without its
// share, so one with snapshots is only marked, and goes with the last of them.
func (b *Backend) DeleteShare(ctx context.Context, id string) (err error) {
	defer wrap(&err, "delete share %q", id)
	if !validID(id) {
		return nil
	}
	s, err := b.getShare(ctx, id)
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if !b.mine(s) {
		return nil // whatever it is, it is not ours
	}
	if !s.deferred() {
		if err := dropTwinsOf(ctx, b, b.shareCalls(), s); err != nil {
			return err
		}
		left, err := b.snapshotsOf(ctx, id)
		if err != nil {
			return err
		}
		if len(left) == 0 {
			err := b.removeShare(ctx, s)
			if refused := refusal(err); refused == nil || !strings.Contains(refused.message, "dependent snapshots") {
				return err
			}
		}
		// Its name is free for another one from now on, and nobody is let in who has
		// not written yet that he is.
		if err := b.setMetadata(ctx, "shares/"+id, map[string]string{keyDeleted: "true", keyLeft: b.o.Now().UTC().Format(time.RFC3339)}); err != nil {
			return err
		}
		if s, err = b.getShare(ctx, id); err != nil {
			return err
		}
	}
	for _, h := range s.holds() {
		if h.what == holdsShare {
			if err := b.Unexport(ctx, backend.Target{ShareID: id}, h.consumer); err != nil && !errors.Is(err, backend.ErrNotFound) {
				return err
			}
		}
	}
	_, err = b.reap(ctx, s)
	return err
}

func (b *Backend) snapshotsOf(ctx context.Context, share string) ([]*snapshot, error) {
	return b.listSnapshots(ctx, url.Values{"share_id": {share}})
}

// reap removes a share that was deleted before, unless there are snapshots left.
func (b *Backend) reap(ctx context.Context, s *share) (left []*snapshot, err error) {
	if left, err = b.snapshotsOf(ctx, s.ID); err == nil && len(left) == 0 {
		err = b.removeShare(ctx, s)
	}
	return left, err
}

// sweepTime is how long Sweep waits for one share.
const sweepTime = time.Minute

// Sweep implements backend.Sweeper: it removes the shares that were deleted before
// and have lost their last snapshot by other hands than DeleteSnapshot's.
func (b *Backend) Sweep(ctx context.Context) (waiting []string, err error) {
	all, err := b.listShares(ctx, map[string]string{keyInstance: b.o.Instance, keyDeleted: "true"})
	if err != nil {
		return nil, fmt.Errorf("list the shares that wait for their deletion: %w", err)
	}
	for _, s := range all {
		if !b.mine(s) || !s.deferred() || s.Status == "deleting" {
			continue
		}
		part, cancel := context.WithTimeout(ctx, sweepTime)
		left, rerr := b.reap(part, s)
		cancel()
		switch {
		case errors.Is(rerr, backend.ErrNotFound):
		case rerr != nil:
			err = errors.Join(err, fmt.Errorf("delete share %s, which has waited for its snapshots: %w", s.ID, rerr))
		case len(left) > 0:
			var ours, others []string
			for _, snap := range left {
				if snap.Metadata[keyInstance] == b.o.Instance {
					ours = append(ours, snap.ID)
				} else {
					others = append(others, snap.ID)
				}
			}
			slices.Sort(ours)
			slices.Sort(others)
			waiting = append(waiting, fmt.Sprintf("share %s was deleted at %s, and goes with the last of its snapshots: Abaca's own %v, and %v that others have made",
				s.ID, s.Metadata[keyLeft], ours, others))
		}
	}
	return waiting, err
}

// removeShare drops the keys of those who hold a share, deletes it and waits until it
// is gone. The keys go first: whoever calls again, when the answer was lost, may find
// nothing that tells whose they were. If the share stays, Grant brings them back. And
// they go once more at the end, as a Grant may have put one there meanwhile.
func (b *Backend) removeShare(ctx context.Context, s *share) error {
	if err := b.dropKeysOf(ctx, s); err != nil {
		return err
	}
	if err := b.awaitRemoval(ctx, s); err != nil {
		return err
	}
	return b.dropKeysOf(ctx, s)
}

// dropKeysOf drops the keys of those who hold a share, and no other one.
func (b *Backend) dropKeysOf(ctx context.Context, s *share) error {
	if s.Protocol != "CEPHFS" || b.o.Keys == nil {
		return nil
	}
	for _, h := range s.holds() {
		other, _, err := b.holder(ctx, h.consumer)
		if err == nil && (other == nil || other.ID == s.ID) {
			err = b.dropKeys(ctx, h.consumer)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// awaitRemoval has Manila delete a share, and waits until it is gone.
func (b *Backend) awaitRemoval(ctx context.Context, s *share) error {
	id, path := s.ID, "shares/"+s.ID
	if s.Group != "" { // Manila wants to be told that one knows
		path += "?share_group_id=" + url.QueryEscape(s.Group)
	}
	status := s.Status
	refused, err := b.discard(ctx, path, status, func() (string, error) {
		now, err := b.await(ctx, id, "", func(s *share) bool { return settled(s.Status) })
		if status = ""; now != nil {
			status = now.Status
		}
		return status, err
	})
	switch {
	case refused != nil && status == "error_deleting":
		return why("Manila has failed to delete the share, and tries again only when an administrator has put it into the state error "+
			"(openstack share set --status error "+id+")", b.complaint(ctx, id, time.Time{}, deleting...))
	case refused != nil:
		return fmt.Errorf("%w: Manila does not delete it%s: %w", backend.ErrInUse, b.lockedBy(ctx, id), withoutKind(refused))
	case err != nil:
		return err
	}
	s, err = b.await(ctx, id, "delete", func(s *share) bool { return s.Status != "deleting" && stateOf(s.Status) == failed })
	if err != nil || s == nil {
		return err
	}
	return why("Manila could not delete the share, which is in the state "+s.Status, b.complaint(ctx, id, time.Time{}, deleting...))
}

// settled says whether nothing is being done to an object, but for its deletion.
func settled(status string) bool { return stateOf(status) != passing || status == "deleting" }

// refusals are how Manila refuses to delete what is in the wrong state: a share, one
// with a lock or snapshots, a snapshot.
var refusals = []int{http.StatusForbidden, http.StatusConflict, http.StatusBadRequest}

// discard has Manila begin to delete what is at a path, unless its status says that
// it has. After a refusal look waits until the object is settled, and returns its
// status, empty when it is gone; a second refusal is returned.
func (b *Backend) discard(ctx context.Context, path, status string, look func() (string, error)) (*apiError, error) {
	for times := 0; status != "deleting" && status != ""; {
		// One at a time: of two at once Manila takes both, and the one that its back end
		// does second fails, which is then the share's state.
		unlock, err := b.busy.lock(ctx, path)
		if err != nil {
			return nil, err
		}
		err = b.delete(ctx, path)
		unlock()
		refused := refusal(err)
		switch {
		case err == nil, errors.Is(err, backend.ErrNotFound):
			return nil, nil
		case refused == nil, refused.denied(), !slices.Contains(refusals, refused.status):
			return nil, err
		}
		// Is something else being done to it, or has somebody else deleted it?
		if status, err = look(); err != nil {
			return nil, err
		}
		if times++; status != "deleting" && status != "" && times > 1 {
			return refused, nil
		}
	}
	return nil, nil
}

// lockedBy names the resource locks that keep a share, if there are any.
func (b *Backend) lockedBy(ctx context.Context, id string) string {
	if b.minor < sinceLocks {
		return ""
	}
	type lock struct {
		ID     string
		Reason string `json:"lock_reason"`
	}
	locks, err := listing[lock](ctx, b, "resource-locks?resource_id="+url.QueryEscape(id), "resource_locks")
	if err != nil || len(locks) == 0 {
		return ""
	}
	var names []string
	for _, l := range locks {
		names = append(names, fmt.Sprintf("%s (%s)", l.ID, oneLine(l.Reason)))
	}
	return ", as it is locked by " + strings.Join(names, ", ")
}
