package manila

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// The ways to mount a snapshot, in the order in which they are preferred.
const (
	wayAPI       = "mountable" // Manila exports the snapshot itself
	wayDirectory = "directory" // it is a directory below its share's export
	wayCopy      = "copy"      // a temporary share is made from it
)

// wayOf is how snapshots of the share are mounted; empty if they cannot be.
func (s *share) wayOf() string {
	switch {
	case !s.Snapshots:
		return ""
	case s.Mountable:
		return wayAPI
	case s.Protocol == "CEPHFS", s.class("snapshotDirectory") != "":
		return wayDirectory
	case s.Clones:
		return wayCopy
	}
	return ""
}

var validConsumer = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// Export implements backend.Backend.
func (b *Backend) Export(ctx context.Context, target backend.Target, consumer string) (_ *backend.Export, err error) {
	defer wrap(&err, "export %+v to %q", target, consumer)
	if (target.ShareID == "") == (target.SnapshotID == "") || !validConsumer.MatchString(consumer) {
		return nil, fmt.Errorf("%w: one target and a consumer of 1 to 64 of a-z, 0-9 and - are needed", backend.ErrInvalid)
	}
	unlock, err := b.busy.lock(ctx, "consumer "+consumer)
	if err != nil {
		return nil, err
	}
	defer unlock()
	again := false
	for p := (pause{b: b}); ; again = true {
		s, err := b.hold(ctx, target, consumer, again)
		if err == nil {
			if err := b.prepare(ctx, s, consumer); err != nil {
				return nil, b.giveUp(ctx, err, s, consumer, target)
			}
			return b.exportOf(ctx, s, consumer)
		}
		if !errors.Is(err, errUndecided) {
			return nil, err
		}
		if err := p.sleep(ctx); err != nil {
			return nil, err
		}
	}
}

// holdable returns the share that is the target, or whose snapshot is, if the consumer
// has it already or it can be mounted.
func (b *Backend) holdable(ctx context.Context, target backend.Target, consumer string) (*share, error) {
	if target.ShareID != "" {
		if !validID(target.ShareID) {
			return nil, backend.ErrNotFound
		}
		return b.usable(b.lateShare(ctx, target.ShareID))
	}
	snap, err := b.findSnapshot(ctx, target.SnapshotID)
	if err != nil {
		return nil, err
	}
	s, err := b.lateShare(ctx, snap.ShareID) // one that was deleted is there for its snapshots
	if err != nil {
		return nil, err
	}
	if h := s.holdOf(consumer); h.what == snap.ID && h.live() {
		return s, nil
	}
	if stateOf(snap.Status) != usable {
		return nil, fmt.Errorf("%w: the snapshot is in the state %s", backend.ErrUnavailable, snap.Status)
	}
	switch s.wayOf() {
	case "":
		return nil, fmt.Errorf("%w: snapshots of the share type %q cannot be mounted", backend.ErrUnsupported, s.TypeName)
	case wayDirectory: // what cannot be found is not held
		_, err = b.directory(ctx, s, snap.ID)
	}
	return s, err
}

// prepare makes what the export of a snapshot needs beside the hold.
func (b *Backend) prepare(ctx context.Context, s *share, consumer string) error {
	target := s.target(consumer)
	if target.SnapshotID == "" || s.wayOf() != wayCopy {
		return nil
	}
	snap, err := b.findSnapshot(ctx, target.SnapshotID)
	if err != nil {
		return err
	}
	_, err = b.CreateShare(ctx, backend.CreateShareRequest{Name: copyName(consumer), FromSnapshot: target.SnapshotID,
		MinSize: snap.Size * gib, Role: backend.RoleTemporary, Note: "shows snapshot " + target.SnapshotID})
	if err != nil {
		return err
	}
	// It takes long. An Unexport that came in between may have found none.
	now, err := b.getShare(ctx, s.ID)
	if err != nil || now.holdOf(consumer).live() && now.target(consumer) == target {
		return err
	}
	if err := b.dropCopies(ctx, consumer, target); err != nil {
		return err
	}
	return fmt.Errorf("%w: it was unexported while its copy was made", backend.ErrUnavailable)
}

func copyName(consumer string) string { return "export/" + consumer }

// dropCopies removes what prepare has made of a snapshot for a consumer.
func (b *Backend) dropCopies(ctx context.Context, consumer string, target backend.Target) error {
	found, err := b.named(ctx, copyName(consumer))
	if err != nil {
		return err
	}
	for _, copied := range found {
		if copied.about().source == target.SnapshotID {
			if err := b.removeShare(ctx, copied); err != nil {
				return err
			}
		}
	}
	return nil
}

// giveUp lets go of what is held when preparing it has failed for good: nobody
// may call again.
func (b *Backend) giveUp(ctx context.Context, err error, s *share, consumer string, target backend.Target) error {
	if ctx.Err() != nil || errors.Is(err, backend.ErrPending) || errors.Is(err, backend.ErrUnavailable) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpTimeout)
	defer cancel()
	now, gerr := b.getShare(ctx, s.ID)
	if gerr == nil && len(slices.DeleteFunc(now.holds(), func(h hold) bool { return h.consumer != consumer || !h.live() })) > 1 {
		return fmt.Errorf("%w: %s", backend.ErrUnavailable, err) // another call is at it, and may have what it needs
	}
	return undone(err, b.release(ctx, s, consumer, target))
}

// giveUpTimeout bounds what is still done for a call that has failed.
const giveUpTimeout = 30 * time.Second

// exportOf describes what a consumer holds.
func (b *Backend) exportOf(ctx context.Context, s *share, consumer string) (*backend.Export, error) {
	target := s.target(consumer)
	x := &backend.Export{Target: target, Consumer: consumer, ReadOnly: target.SnapshotID != "", Protocol: strings.ToLower(s.Protocol)}
	at := s
	var paths []exportPath
	var err error
	if target.SnapshotID != "" {
		x.Way = s.wayOf()
	}
	switch x.Way {
	case wayAPI:
		paths, err = b.snapshotPaths(ctx, target.SnapshotID)
	case wayCopy:
		found, nerr := b.named(ctx, copyName(consumer))
		if nerr != nil || len(found) == 0 {
			return nil, errors.Join(nerr, fmt.Errorf("%w: the copy of the snapshot has gone", backend.ErrUnavailable))
		}
		at, x.Renumbered = found[0], true
		paths, err = b.pathsOf(ctx, at.ID)
	case wayDirectory:
		if x.Path, err = b.directory(ctx, s, target.SnapshotID); err != nil {
			return nil, err
		}
		paths, err = b.pathsOf(ctx, s.ID)
	default:
		paths, err = b.pathsOf(ctx, s.ID)
	}
	if err != nil {
		return nil, err
	}
	for _, p := range orderOf(paths, s.class("exportNetworks")) {
		if !p.Admin {
			x.Locations = append(x.Locations, p.Path)
		}
	}
	if len(x.Locations) == 0 {
		return nil, fmt.Errorf("%w: Manila shows no export location of share %s", backend.ErrUnavailable, at.ID)
	}
	if s.Protocol == "CEPHFS" {
		x.User = b.user(consumer)
		for option := range strings.SplitSeq(at.Metadata["__mount_options"], ",") {
			if strings.HasPrefix(option, "fs=") { // others are the user's business
				x.Options = append(x.Options, option)
			}
		}
		if m := s.class("cephfs-mounter"); m != "" {
			x.Options = append(x.Options, "mounter="+m)
		}
	}
	return x, nil
}

// orderOf returns export locations in the order in which a node tries them: by the class's
// networks, then those that Manila prefers.
func orderOf(paths []exportPath, list string) []exportPath {
	networks, _ := networks("exportNetworks", list) // which was read before
	return slices.SortedStableFunc(slices.Values(paths), func(x, y exportPath) int {
		rank := func(p bool) int {
			if p {
				return 0
			}
			return 1
		}
		return cmp.Or(cmp.Compare(distance(x.Path, networks), distance(y.Path, networks)), cmp.Compare(rank(x.Preferred), rank(y.Preferred)))
	})
}

// directory is where a snapshot is below its share's export.
func (b *Backend) directory(ctx context.Context, s *share, id string) (string, error) {
	pattern := s.class("snapshotDirectory")
	if pattern == "" { // CephFS: the snapshot's name is its id, and it is shown with the inode of where it was cut
		return ".snap/_" + id + "_*", nil
	}
	instance := ""
	if strings.Contains(pattern, placeInstance) || strings.Contains(pattern, placeUnderlined) {
		var err error
		if instance, err = b.instanceOf(ctx, id); err != nil {
			return "", err
		}
	}
	return strings.NewReplacer(placeID, id, placeInstance, instance, placeUnderlined, strings.ReplaceAll(instance, "-", "_")).Replace(pattern), nil
}

// cached are the export locations of a share. They move rarely.
type cached struct {
	at    time.Time
	paths []exportPath
}

const locationsAge = 30 * time.Second

func (b *Backend) pathsOf(ctx context.Context, id string) ([]exportPath, error) {
	b.mu.Lock()
	c, ok := b.locations[id]
	b.mu.Unlock()
	if ok && b.o.Now().Sub(c.at) < locationsAge && len(c.paths) > 0 {
		return c.paths, nil
	}
	paths, err := b.exportPaths(ctx, id)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(paths, func(x, y exportPath) int { return strings.Compare(x.Path, y.Path) })
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.locations) > 10_000 {
		clear(b.locations)
	}
	b.locations[id] = cached{b.o.Now(), paths}
	return paths, nil
}

// Unexport implements backend.Backend.
func (b *Backend) Unexport(ctx context.Context, target backend.Target, consumer string) (err error) {
	defer wrap(&err, "unexport %+v from %q", target, consumer)
	if !validConsumer.MatchString(consumer) {
		return nil
	}
	unlock, err := b.busy.lock(ctx, "consumer "+consumer)
	if err != nil {
		return err
	}
	defer unlock()
	_, all, err := b.holder(ctx, consumer)
	if err != nil {
		return err
	}
	if len(all) == 0 { // its share has gone, maybe by other hands, or a killed process has left what no filter finds
		s, err := b.shareOf(ctx, target)
		if errors.Is(err, backend.ErrNotFound) || err == nil && s.holdOf(consumer).name == "" {
			return b.dropKeys(ctx, consumer)
		}
		if err != nil {
			return err
		}
		all = []*share{s}
	}
	for _, s := range all {
		if slices.ContainsFunc(s.holds(), func(h hold) bool { return h.consumer == consumer && h.target(s) == target }) {
			err = errors.Join(err, b.release(ctx, s, consumer, target))
		}
	}
	return err
}

// shareOf is the share that is a target, or whose snapshot is.
func (b *Backend) shareOf(ctx context.Context, target backend.Target) (*share, error) {
	id := target.ShareID
	if target.SnapshotID != "" {
		snap, err := b.findSnapshot(ctx, target.SnapshotID)
		if err != nil {
			return nil, err
		}
		id = snap.ShareID
	}
	if !validID(id) {
		return nil, backend.ErrNotFound
	}
	s, err := b.getShare(ctx, id)
	if err == nil && !b.mine(s) {
		err = backend.ErrNotFound
	}
	return s, err
}

// release takes away what Grant and Export have made, and then the hold.
func (b *Backend) release(ctx context.Context, s *share, consumer string, target backend.Target) error {
	// A Grant that has not yet written what it needs will see this.
	begun, what := b.o.Now(), cmp.Or(target.SnapshotID, holdsShare)
	var ended []hold
	var names []string
	old := true // all of it has ended, and so long ago that no Export has waited for what is left of it
	for _, h := range s.holds() {
		if h.consumer == consumer && h.what == what {
			ended, names = append(ended, h), append(names, h.name)
			old = old && !h.live() && !h.parting(begun.Add(-leavingAge))
		}
	}
	err := b.setMetadata(ctx, "shares/"+s.ID, b.ends(endDone, names...))
	if err == nil {
		s, err = b.getShare(ctx, s.ID)
	}
	if err == nil && old && s.holdOf(consumer).live() { // what was granted is for that
		return b.letGo(ctx, s.ID, consumer, ended)
	}
	if err == nil {
		err = b.revoke(ctx, s, func(g grant) bool { return g.consumer == consumer })
	}
	if err != nil {
		return err
	}
	if target.SnapshotID != "" && s.wayOf() == wayCopy {
		if err := b.dropCopies(ctx, consumer, target); err != nil {
			return err
		}
	}
	if b.o.Now().Sub(begun) > leavingTime { // somebody may soon take it for what a killed process has left
		return b.release(ctx, s, consumer, target)
	}
	return b.letGo(ctx, s.ID, consumer, ended)
}

// ExportOf implements backend.Backend.
func (b *Backend) ExportOf(ctx context.Context, consumer string) (_ *backend.Export, err error) {
	defer wrap(&err, "export of %q", consumer)
	if !validConsumer.MatchString(consumer) {
		return nil, backend.ErrNotFound
	}
	s, _, err := b.holder(ctx, consumer)
	if err != nil {
		return nil, err
	}
	if s == nil {
		return nil, backend.ErrNotFound
	}
	return b.exportOf(ctx, s, consumer)
}

// ListExports implements backend.Backend.
func (b *Backend) ListExports(ctx context.Context, after string, limit int) (_ []*backend.Export, more bool, err error) {
	defer wrap(&err, "list exports")
	all, err := b.ours(ctx)
	if err != nil {
		return nil, false, err
	}
	holders := map[string]*share{}
	for _, s := range all {
		if s.Status == "deleting" {
			continue
		}
		for _, h := range s.holds() {
			if other := holders[h.consumer]; h.live() && (other == nil || h.compare(other.holdOf(h.consumer)) < 0) {
				holders[h.consumer] = s
			}
		}
	}
	page, more := pageOf(slices.Collect(maps.Keys(holders)), func(consumer string) string { return consumer }, after, limit)
	var out []*backend.Export
	for _, consumer := range page {
		out = append(out, &backend.Export{Target: holders[consumer].target(consumer), Consumer: consumer})
	}
	return out, more, nil
}
