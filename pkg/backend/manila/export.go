package manila

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// What a consumer holds is written into the metadata of the share, also what it
// holds of its snapshots: they never outlive it, and every microversion has that.
// There are two entries: one of the consumer with a constant value, as filters
// ask for a key and its value, and one of the consumer and what it holds, which
// is an intent until nobody else can have the same consumer hold something else.

const (
	// holdsShare is what a consumer holds that does not hold a snapshot.
	holdsShare = "share"

	intended = "intended"
	held     = "held"
	parting  = "parting" // and since when Unexport is at work on it; nobody is let in any more
)

func holdKey(consumer, what string) string { return prefixHold + consumer + "." + what }

// marks calls f for each entry of what is held of a share, or is meant to be:
// holdsShare or the id of a snapshot.
func (s *share) marks(f func(consumer, what, value string)) {
	for key, value := range s.Metadata {
		if rest, ok := strings.CutPrefix(key, prefixHold); ok {
			consumer, what, _ := strings.Cut(rest, ".") // no consumer has a dot
			f(consumer, what, value)
		}
	}
}

// holds returns what is held of a share, by consumer.
func (s *share) holds() map[string]string {
	all := map[string]string{}
	s.marks(func(consumer, what, value string) {
		if value != intended {
			all[consumer] = what
		}
	})
	return all
}

// kept is what a consumer holds, or else means to hold; empty for nothing. Who
// exports again what is held writes its intent over that, for a moment.
func (s *share) kept(consumer string) (what string) {
	s.marks(func(c, other, value string) {
		if c == consumer && (value != intended || what == "") {
			what = other
		}
	})
	return what
}

func (s *share) target(consumer string) backend.Target {
	what := s.holds()[consumer]
	if what == holdsShare {
		return backend.Target{ShareID: s.ID}
	}
	return backend.Target{SnapshotID: what}
}

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
	for p := (pause{b: b}); ; {
		s, err := b.hold(ctx, target, consumer)
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

// holder returns the share that the consumer holds, or a snapshot of which; nil
// if it holds nothing. others are those that it may come to hold.
func (b *Backend) holder(ctx context.Context, consumer string) (s *share, others []*share, err error) {
	found, err := b.listShares(ctx, map[string]string{prefixConsumer + consumer: b.o.Instance})
	for _, f := range found {
		switch {
		case !b.mine(f) || f.Status == "deleting":
		case f.holds()[consumer] != "":
			s = f
		default:
			others = append(others, f)
		}
	}
	return s, others, err
}

// errUndecided: another process wants the consumer to hold something else, or the
// snapshot to be deleted; it will be clear in a moment which.
var errUndecided = fmt.Errorf("%w: another process is at work on it", backend.ErrPending)

// hold writes down what the consumer holds, unless it holds it already. Of two
// intents the one on the lower share stays, and waits until the other has gone.
func (b *Backend) hold(ctx context.Context, target backend.Target, consumer string) (*share, error) {
	s, _, err := b.holder(ctx, consumer)
	if err != nil {
		return nil, err
	}
	if s != nil {
		return s, b.holdOn(ctx, s, target, consumer)
	}
	if s, err = b.holdable(ctx, target); err != nil {
		return nil, err
	}
	id, what := s.ID, cmp.Or(target.SnapshotID, holdsShare)
	write := func(value string) error {
		return b.setMetadata(ctx, "shares/"+id, map[string]string{prefixConsumer + consumer: b.o.Instance, holdKey(consumer, what): value})
	}
	if err := write(intended); err != nil {
		return nil, err
	}
	// From here on both sides see each other: who wants something else, and who
	// deletes the snapshot (see DeleteSnapshot).
	for p := (pause{b: b}); ; {
		if s, err = b.decide(ctx, id, target, consumer); err == nil {
			break
		}
		if errors.Is(err, errWaits) {
			if err = p.sleep(ctx); err == nil {
				continue
			}
		}
		if errors.Is(err, errUndecided) || errors.Is(err, backend.ErrNotFound) {
			return nil, errors.Join(err, b.letGo(ctx, id, consumer, what))
		}
		return nil, err // the intent stays for the next call
	}
	if err := write(held); err != nil { // both entries, as an Unexport may have dropped the intent meanwhile
		return nil, err
	}
	s.Metadata[holdKey(consumer, what)] = held
	b.lately.saw(b.o.Now(), s)
	return s, nil
}

// holdOn is hold for a consumer that holds something of the share.
func (b *Backend) holdOn(ctx context.Context, s *share, target backend.Target, consumer string) error {
	if now := s.target(consumer); now != target {
		return fmt.Errorf("%w: this consumer holds %+v", backend.ErrConflict, now)
	}
	key := holdKey(consumer, s.holds()[consumer])
	if s.Metadata[key] == held {
		return nil
	}
	since, _ := time.Parse(parting+" "+time.RFC3339, s.Metadata[key])
	if since.After(b.o.Now().Add(-leavingAge)) {
		return errUndecided
	}
	s.Metadata[key] = held // a killed process has left it so
	return b.setMetadata(ctx, "shares/"+s.ID, map[string]string{key: held})
}

// holdable returns the share that is the target, or whose snapshot is, if that can be
// mounted.
func (b *Backend) holdable(ctx context.Context, target backend.Target) (*share, error) {
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
	if stateOf(snap.Status) != usable {
		return nil, fmt.Errorf("%w: the snapshot is in the state %s", backend.ErrUnavailable, snap.Status)
	}
	s, err := b.lateShare(ctx, snap.ShareID) // one that was deleted is there for its snapshots
	if err != nil {
		return nil, err
	}
	switch s.wayOf() {
	case "":
		return nil, fmt.Errorf("%w: snapshots of the share type %q cannot be mounted", backend.ErrUnsupported, s.TypeName)
	case wayDirectory: // what cannot be found is not held
		_, err = b.directory(ctx, s, snap.ID)
	}
	return s, err
}

// decide says whether the intent on the share with an id may become a hold, and
// returns that share. errWaits and errUndecided when it may not; ErrNotFound when
// there is nothing to hold any more.
func (b *Backend) decide(ctx context.Context, id string, target backend.Target, consumer string) (*share, error) {
	s, rivals, err := b.holder(ctx, consumer)
	if err != nil {
		return nil, err
	}
	if s != nil && s.target(consumer) != target {
		return nil, errUndecided // the next look says what it holds
	}
	what := cmp.Or(target.SnapshotID, holdsShare)
	for _, r := range rivals {
		if r.ID < id {
			return nil, errUndecided
		}
		if r.ID == id {
			s = r
		}
		r.marks(func(c, other, _ string) {
			if c == consumer && (r.ID != id || other != what) {
				err = errWaits
				if r.ID == id && other < what {
					err = errUndecided
				}
			}
		})
	}
	switch {
	case err != nil:
		return nil, err
	case s == nil: // it is not listed
		return nil, backend.ErrNotFound
	case target.ShareID != "" && (s.deferred() || s.Status == "deleting"):
		return nil, backend.ErrNotFound
	case target.ShareID != "":
		return s, nil
	case s.beingDeleted(what, b.o.Now().Add(-markAge)):
		return nil, errUndecided
	}
	_, err = b.findSnapshot(ctx, what)
	return s, err
}

// errWaits: another intent is there, and has to go.
var errWaits = errors.New("another intent is there")

// letGo drops what hold has written. What the filters find goes last, unless it
// is of something else too.
func (b *Backend) letGo(ctx context.Context, id, consumer, what string) error {
	err := b.dropMetadata(ctx, "shares/"+id, holdKey(consumer, what))
	if err != nil {
		return err
	}
	s, err := b.getShare(ctx, id)
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	more := false
	s.marks(func(c, _, _ string) { more = more || c == consumer })
	if more {
		return nil
	}
	return b.dropMetadata(ctx, "shares/"+id, prefixConsumer+consumer)
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
		MinSize: snap.Size * gib, Role: backend.RoleTemporary})
	return err
}

func copyName(consumer string) string { return "export/" + consumer }

// giveUp lets go of what is held when preparing it has failed for good: nobody
// may call again.
func (b *Backend) giveUp(ctx context.Context, err error, s *share, consumer string, target backend.Target) error {
	if ctx.Err() != nil || errors.Is(err, backend.ErrPending) || errors.Is(err, backend.ErrUnavailable) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpTimeout)
	defer cancel()
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
	for _, preferred := range []bool{true, false} {
		for _, p := range paths {
			if !p.Admin && p.Preferred == preferred {
				x.Locations = append(x.Locations, p.Path)
			}
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
	s, others, err := b.holder(ctx, consumer)
	if err != nil {
		return err
	}
	if s != nil {
		if s.target(consumer) == target {
			return b.release(ctx, s, consumer, target)
		}
		others = append(others, s)
	}
	if len(others) == 0 { // its share has gone, maybe by other hands
		return b.dropKeys(ctx, consumer)
	}
	// An Export that was killed may have left no more than its intent.
	for _, other := range others {
		what := target.SnapshotID
		if target.ShareID == other.ID {
			what = holdsShare
		}
		if _, ok := other.Metadata[holdKey(consumer, what)]; ok {
			err = errors.Join(err, b.letGo(ctx, other.ID, consumer, what))
		}
	}
	return err
}

// release takes away what Grant and Export have made, and then the hold.
func (b *Backend) release(ctx context.Context, s *share, consumer string, target backend.Target) error {
	// A Grant that has not yet written what it needs will see this.
	key, begun := holdKey(consumer, s.holds()[consumer]), b.o.Now()
	err := b.setMetadata(ctx, "shares/"+s.ID, map[string]string{key: parting + begun.UTC().Format(" "+time.RFC3339)})
	if err == nil {
		s, err = b.getShare(ctx, s.ID)
	}
	if err == nil {
		err = b.revoke(ctx, s, consumer, "")
	}
	if err != nil {
		return err
	}
	if target.SnapshotID != "" && s.wayOf() == wayCopy {
		found, err := b.named(ctx, copyName(consumer))
		if err != nil {
			return err
		}
		for _, copied := range found {
			if err := b.removeShare(ctx, copied); err != nil {
				return err
			}
		}
	}
	if b.o.Now().Sub(begun) > leavingTime { // somebody may soon take it for what a killed process has left
		return b.release(ctx, s, consumer, target)
	}
	return b.letGo(ctx, s.ID, consumer, s.holds()[consumer])
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
	type hold struct {
		consumer string
		share    *share
	}
	var holds []hold
	for _, s := range all {
		if s.Status == "deleting" {
			continue
		}
		for consumer := range s.holds() {
			holds = append(holds, hold{consumer, s})
		}
	}
	page, more := pageOf(holds, func(h hold) string { return h.consumer }, after, limit)
	var out []*backend.Export
	for _, h := range page {
		out = append(out, &backend.Export{Target: h.share.target(h.consumer), Consumer: h.consumer})
	}
	return out, more, nil
}
