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

// CreateSnapshot implements backend.Backend.
func (b *Backend) CreateSnapshot(ctx context.Context, req backend.CreateSnapshotRequest) (_ *backend.Snapshot, err error) {
	defer wrap(&err, "create snapshot %q of share %q", req.Name, req.ShareID)
	if req.Name == "" {
		return nil, fmt.Errorf("%w: the name is empty", backend.ErrInvalid)
	}
	unlock, err := b.busy.lock(ctx, "snapshot "+req.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return attempts(func() (*backend.Snapshot, error) {
		seen, err := b.snapshotsSeen(ctx, b.id(req.Name), 0)
		if err != nil {
			return nil, pendingOr(err) // an earlier call may have cut one
		}
		kind := ""
		if len(seen.found) == 0 {
			cut, err := b.cut(ctx, req)
			if err != nil {
				return nil, err
			}
			seen.found, kind = []*snapshot{cut}, "snapshot"
		}
		s, err := b.finishSnapshot(ctx, req, seen, kind)
		if err != nil {
			return nil, err
		}
		return publicSnapshot(s), nil
	})
}

// finishSnapshot is finish for a snapshot.
func (b *Backend) finishSnapshot(ctx context.Context, req backend.CreateSnapshotRequest, seen sight[*snapshot], kind string) (s *snapshot, err error) {
	s = seen.found[0]
	if s.ShareID != req.ShareID || s.Metadata[keyRole] != string(req.Role) {
		return nil, fmt.Errorf("%w: snapshot %s is of share %s", backend.ErrConflict, s.ID, s.ShareID)
	}
	if s.ready() {
		if stateOf(s.Status) == failed { // somebody has it, so it stays
			return nil, fmt.Errorf("%w: snapshot %s is in the state %s: an administrator has to look", backend.ErrUnavailable, s.ID, s.Status)
		}
		_, err := dropTwins(ctx, b, b.snapshotCalls(), seen.found, twinAge)
		return s, err
	}
	if stateOf(s.Status) == passing {
		if s, seen, err = awaitMade(ctx, b, b.snapshotCalls(), s, kind); err != nil {
			return nil, err
		}
	}
	if stateOf(s.Status) == failed {
		reason := why("Manila could not cut the snapshot", b.complaint(ctx, s.ID, time.Time{}, creating...))
		return nil, undone(reason, b.removeSnapshot(ctx, s))
	}
	return s, settleTwins(ctx, b, b.snapshotCalls(), s, kind != "", seen)
}

// cut asks for a new snapshot.
func (b *Backend) cut(ctx context.Context, req backend.CreateSnapshotRequest) (*snapshot, error) {
	parent, err := b.findShare(ctx, req.ShareID)
	if err != nil {
		return nil, err
	}
	if !parent.Snapshots {
		return nil, fmt.Errorf("%w: the share type %q has no snapshots (its extra spec snapshot_support)", backend.ErrUnsupported, parent.TypeName)
	}
	if parent.Status != "available" {
		return nil, fmt.Errorf("%w: the share is in the state %s", backend.ErrUnavailable, parent.Status)
	}
	m := b.describeSnapshot(req)
	m[keyReady] = "false" // as long as what it will be, where there is little room
	ask := map[string]any{"share_id": req.ShareID, "name": label(req.Name), "metadata": m}
	if b.minor < sinceSnapMetadata {
		ask = map[string]any{"share_id": req.ShareID, "name": oldSnapshotName(b.id(req.Name)), "description": oldDescription(m)}
	}
	var answer struct{ Snapshot snapshot }
	err = b.post(ctx, "snapshots", map[string]any{"snapshot": ask}, &answer)
	if refused := refusal(err); refused.says(http.StatusForbidden, "") && !refused.denied() {
		return nil, fmt.Errorf("%w: %w", backend.ErrUnavailable, withoutKind(refused)) // its status has changed meanwhile
	}
	made := &answer.Snapshot
	if err := knownToBe(err, made.ID); err != nil {
		return nil, err
	}
	made.ShareID, made.Metadata = req.ShareID, m // who has cut it knows what it is for
	return made, nil
}

// findSnapshot returns a snapshot that is ours and ready, and not about to go.
func (b *Backend) findSnapshot(ctx context.Context, id string) (*snapshot, error) {
	if !validID(id) {
		return nil, backend.ErrNotFound
	}
	s, err := b.getSnapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	if !b.shown(s) {
		return nil, backend.ErrNotFound
	}
	return s, nil
}

// shown says whether a snapshot is one for those who have not made it.
func (b *Backend) shown(s *snapshot) bool {
	return s.Metadata[keyInstance] == b.o.Instance && s.ready() && s.Status != "deleting"
}

// source returns the snapshot that a share is made from, and the share that it is
// of.
func (b *Backend) source(ctx context.Context, id string) (*snapshot, *share, error) {
	s, err := b.findSnapshot(ctx, id)
	if err != nil {
		return nil, nil, fmt.Errorf("source snapshot %q: %w", id, err)
	}
	parent, err := b.getShare(ctx, s.ShareID)
	if err != nil {
		return nil, nil, fmt.Errorf("share %q of the source: %w", s.ShareID, err)
	}
	if !parent.Clones {
		return nil, nil, fmt.Errorf("%w: shares cannot be made from snapshots of the share type %q (its extra spec create_share_from_snapshot_support)",
			backend.ErrUnsupported, parent.TypeName)
	}
	return s, parent, nil
}

// Snapshot implements backend.Backend.
func (b *Backend) Snapshot(ctx context.Context, id string) (_ *backend.Snapshot, err error) {
	defer wrap(&err, "snapshot %q", id)
	s, err := b.findSnapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	return publicSnapshot(s), nil
}

// DeleteSnapshot implements backend.Backend.
//
// Manila has no compare-and-swap, so this and Export look out for each other:
// each writes what it is about to do and then looks for the other's mark. If
// both see one, this one withdraws.
func (b *Backend) DeleteSnapshot(ctx context.Context, id string) (err error) {
	defer wrap(&err, "delete snapshot %q", id)
	if !validID(id) {
		return nil
	}
	s, err := b.getSnapshot(ctx, id)
	if errors.Is(err, backend.ErrNotFound) {
		return b.finishGone(ctx, id)
	}
	if err != nil {
		return err
	}
	if s.Metadata[keyInstance] != b.o.Instance {
		return nil
	}
	if err := dropTwinsOf(ctx, b, b.snapshotCalls(), s); err != nil {
		return err
	}
	name, path := "", "shares/"+s.ShareID
	if s.Status != "deleting" {
		parent, err := b.unheld(ctx, s)
		if err != nil {
			return err
		}
		for _, old := range parent.deletions(id) {
			if !parent.atWork(old, b.o.Now().Add(-markAge)) {
				if err := b.dropMetadata(ctx, path, old); err != nil {
					return err
				}
			}
		}
		// The mark is this call's alone: one that withdraws must leave the others'.
		name = newName()
		if err := b.setMetadata(ctx, path, map[string]string{prefixDeleting + id + "." + name: b.o.Now().UTC().Format(time.RFC3339)}); err != nil {
			return err
		}
		if _, err := b.unheld(ctx, s); err != nil {
			return errors.Join(err, b.withdrawDeletion(ctx, path, id, name))
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, markAge/2) // while the mark counts
		defer cancel()
	}
	err = b.removeSnapshot(ctx, s)
	if kept := (*keptError)(nil); errors.As(err, &kept) && name != "" {
		return errors.Join(err, b.withdrawDeletion(ctx, path, id, name))
	}
	if err != nil {
		return err
	}
	return b.finishDeletion(ctx, s.ShareID, id)
}

// withdrawDeletion takes back the mark of a deletion that is not to be.
func (b *Backend) withdrawDeletion(ctx context.Context, path, id, name string) error {
	if err := b.setMetadata(ctx, path, b.ends(endDone, name)); err != nil {
		return err
	}
	return b.dropMetadata(ctx, path, prefixDeleting+id+"."+name)
}

// finishDeletion is what is left to do for the share of a snapshot that is gone.
func (b *Backend) finishDeletion(ctx context.Context, shareID, id string) error {
	parent, err := b.getShare(ctx, shareID)
	if err == nil && parent.deferred() {
		var left []*snapshot
		if left, err = b.reap(ctx, parent); len(left) == 0 {
			return err // and with the share its marks
		}
	}
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	over := parent.deletions(id)
	for _, h := range parent.holds() {
		if h.what == id { // it had ended, and has come back
			over = append(over, h.key())
		}
	}
	for _, key := range over {
		err = errors.Join(err, b.dropMetadata(ctx, "shares/"+shareID, key))
	}
	return err
}

// finishGone finishes the deletion of a snapshot that is gone already. Whoever
// began it has left a mark; shares that wait for nothing else are Sweep's.
func (b *Backend) finishGone(ctx context.Context, id string) error {
	all, err := b.ours(ctx)
	for _, s := range all {
		if len(s.deletions(id)) > 0 {
			err = errors.Join(err, b.finishDeletion(ctx, s.ID, id))
		}
	}
	return err
}

// markAge is how long a call may take from its mark to its request to delete: an
// older mark is of a process that was killed in between.
const markAge = 5 * time.Minute

// deletions are the keys of the marks of those who have begun to delete a snapshot
// of the share.
func (s *share) deletions(snapshot string) (marks []string) {
	for key := range s.Metadata {
		if strings.HasPrefix(key, prefixDeleting+snapshot+".") {
			marks = append(marks, key)
		}
	}
	return marks
}

// beingDeleted says whether somebody has begun to delete a snapshot of the share,
// after a time.
func (s *share) beingDeleted(snapshot string, after time.Time) bool {
	return slices.ContainsFunc(s.deletions(snapshot), func(mark string) bool { return s.atWork(mark, after) })
}

// unheld returns the share of a snapshot, or ErrInUse while a consumer holds the
// snapshot. What an Unexport has begun it ends: the request that says so may have had
// its effect only after that Unexport had been repeated, and nobody comes back.
func (b *Backend) unheld(ctx context.Context, s *snapshot) (*share, error) {
	parent, names, leaving, err := b.holding(ctx, s)
	for _, consumer := range leaving {
		if err == nil && len(names) == 0 {
			err = b.endUnexport(ctx, parent, s.ID, consumer)
		}
	}
	if err == nil && len(names) == 0 && len(leaving) > 0 {
		parent, names, leaving, err = b.holding(ctx, s)
	}
	if names = append(names, leaving...); err == nil && len(names) > 0 {
		slices.Sort(names)
		err = fmt.Errorf("%w: held by %s", backend.ErrInUse, strings.Join(slices.Compact(names), ", "))
	}
	return parent, err
}

func (b *Backend) endUnexport(ctx context.Context, parent *share, snapshot, consumer string) error {
	unlock, err := b.busy.lock(ctx, "consumer "+consumer)
	if err != nil {
		return err
	}
	defer unlock()
	return b.release(ctx, parent, consumer, backend.Target{SnapshotID: snapshot})
}

// holding returns the share of a snapshot, who holds that, and who is about to let go.
func (b *Backend) holding(ctx context.Context, s *snapshot) (parent *share, names, leaving []string, err error) {
	if parent, err = b.getShare(ctx, s.ShareID); err != nil {
		return nil, nil, nil, err
	}
	for _, h := range parent.holds() {
		switch {
		case h.what != s.ID || h.withdrawn:
		case h.live():
			names = append(names, h.consumer)
		default:
			leaving = append(leaving, h.consumer)
		}
	}
	return parent, names, leaving, nil
}

// keptError is why Manila does not delete a snapshot, and is not about to.
type keptError struct{ error }

func (k *keptError) Unwrap() error { return k.error }

// removeSnapshot deletes a snapshot and waits until it is gone.
func (b *Backend) removeSnapshot(ctx context.Context, s *snapshot) error {
	status := s.Status
	refused, err := b.discard(ctx, "snapshots/"+s.ID, status, func() (string, error) {
		now, err := b.awaitSnapshot(ctx, s.ID, "", func(s *snapshot) bool { return settled(s.Status) })
		if status = ""; now != nil {
			status = now.Status
		}
		return status, err
	})
	switch {
	case refused != nil && status == "error_deleting":
		return &keptError{why("Manila has failed to delete the snapshot, and tries again only when an administrator has put it into the state error "+
			"(openstack share snapshot set --status error "+s.ID+")", b.complaint(ctx, s.ID, time.Time{}, deleting...))}
	case refused != nil:
		return &keptError{fmt.Errorf("%w: Manila does not delete it in the state %s: %w", backend.ErrUnavailable, status, withoutKind(refused))}
	case err != nil:
		return err
	}
	gone, err := b.awaitSnapshot(ctx, s.ID, "delete snapshot", func(s *snapshot) bool { return s.Status == "error_deleting" })
	if err != nil || gone == nil {
		return err
	}
	return &keptError{why("Manila could not delete the snapshot", b.complaint(ctx, s.ID, time.Time{}, deleting...))}
}

// ListSnapshots implements backend.Backend.
func (b *Backend) ListSnapshots(ctx context.Context, after string, limit int) (_ []*backend.Snapshot, more bool, err error) {
	defer wrap(&err, "list snapshots")
	q := url.Values{"metadata": {filter(map[string]string{keyInstance: b.o.Instance})}}
	if b.minor < sinceSnapMetadata {
		q = url.Values{}
	}
	all, err := b.listSnapshots(ctx, q)
	if err != nil {
		return nil, false, err
	}
	all = slices.DeleteFunc(all, func(s *snapshot) bool { return !b.shown(s) })
	page, more := pageOf(all, func(s *snapshot) string { return s.ID }, after, limit)
	out := make([]*backend.Snapshot, len(page))
	for i, s := range page {
		out[i] = publicSnapshot(s)
	}
	return out, more, nil
}
