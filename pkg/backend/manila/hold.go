package manila

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// What a consumer holds is written into the metadata of the share, also what it
// holds of its snapshots: they never outlive it, and every microversion has that.
//
// Manila reads all metadata of a share and writes all of it whenever one entry is
// added, so that an entry which is changed or dropped at the same time may be as it
// was before. What is added stays. So an entry that counts never changes: it has a
// name of its own, and what ends it is another entry by that name, which stays when
// the first is dropped, as that may come back.

// holdsShare is what a consumer holds that does not hold a snapshot.
const holdsShare = "share"

// hold is what one Export has written: a consumer holds the share, or a snapshot of it.
type hold struct {
	consumer, what string // holdsShare or the id of a snapshot
	name           string // its own, at random
	since          time.Time
	// ended is since when an Unexport is at work on it, or was: nobody is let in by
	// it any more. Nobody was by one that is withdrawn.
	ended     time.Time
	withdrawn bool
}

func (h hold) key() string { return prefixHold + h.consumer + "." + h.what + "." + h.name }

// live says whether there is a hold, and nobody has ended it.
func (h hold) live() bool { return h.name != "" && h.ended.IsZero() }

// parting says whether an Unexport is at work on it, which began after a time.
func (h hold) parting(after time.Time) bool { return !h.withdrawn && h.ended.After(after) }

// holds returns what is held of a share, that which counts first: what has not
// ended, and of that what is oldest.
func (s *share) holds() (all []hold) {
	for key, value := range s.Metadata {
		rest, ok := strings.CutPrefix(key, prefixHold)
		if !ok {
			continue
		}
		h := hold{}
		h.consumer, rest, _ = strings.Cut(rest, ".") // no consumer has a dot
		h.what, h.name, _ = strings.Cut(rest, ".")
		h.since, _ = time.Parse(time.RFC3339Nano, value)
		h.ended, h.withdrawn = s.ended(h.name)
		all = append(all, h)
	}
	slices.SortFunc(all, hold.compare)
	return all
}

// ended is since when what has a name has ended, or is about to, zero if it has not;
// and whether it has let nobody in. The last of several ends counts.
func (s *share) ended(name string) (since time.Time, withdrawn bool) {
	for key, value := range s.Metadata {
		stamp, ok := strings.CutPrefix(key, prefixEnd+name+".")
		if !ok {
			continue
		}
		at, err := time.Parse(endStamp, stamp)
		if err != nil {
			at = time.Unix(0, 0)
		}
		if at.After(since) {
			since = at
		}
		withdrawn = withdrawn || value == endWithdrawn
	}
	return since, withdrawn
}

func newName() string { return rand.Text()[:12] }

// An end has its time in its key, as whoever repeats what was cut off ends a thing again.
const (
	endStamp     = "20060102T150405Z"
	endDone      = "true"
	endWithdrawn = "withdrawn" // of a hold that was never one for its caller
)

// ends is what ends the things that have the names.
func (b *Backend) ends(value string, names ...string) map[string]string {
	all := map[string]string{}
	for _, name := range names {
		all[prefixEnd+name+"."+b.o.Now().UTC().Format(endStamp)] = value
	}
	return all
}

func (h hold) compare(other hold) int {
	rank := func(h hold) int {
		if h.live() {
			return 0
		}
		return 1
	}
	return cmp.Or(cmp.Compare(rank(h), rank(other)), h.since.Compare(other.since), cmp.Compare(h.key(), other.key()))
}

// holdOf is what a consumer holds of a share, or has held, if the Unexport has not
// finished; else it holds nothing, and what is empty.
func (s *share) holdOf(consumer string) hold {
	for _, h := range s.holds() {
		if h.consumer == consumer {
			return h
		}
	}
	return hold{}
}

// target is what is held, of a share.
func (h hold) target(s *share) backend.Target {
	if h.what == holdsShare {
		return backend.Target{ShareID: s.ID}
	}
	return backend.Target{SnapshotID: h.what}
}

func (s *share) target(consumer string) backend.Target { return s.holdOf(consumer).target(s) }

// holder returns the share that the consumer holds, or a snapshot of which; nil if
// it holds nothing. all are the shares with a hold of it, ended ones too.
func (b *Backend) holder(ctx context.Context, consumer string) (s *share, all []*share, err error) {
	found, err := b.listShares(ctx, map[string]string{prefixConsumer + consumer: b.o.Instance})
	for _, f := range found {
		h := f.holdOf(consumer)
		if !b.mine(f) || f.Status == "deleting" || h.what == "" {
			continue
		}
		all = append(all, f)
		if h.live() && (s == nil || h.compare(s.holdOf(consumer)) < 0) {
			s = f
		}
	}
	return s, all, err
}

// errUndecided: another process wants the consumer to hold something else, or to hold
// it no more, or the snapshot to be deleted; it will be clear in a moment which.
var errUndecided = fmt.Errorf("%w: another process is at work on it", backend.ErrPending)

// hold writes down what the consumer holds, unless it holds it already. It writes first
// and then looks who else does, and who deletes the snapshot (see DeleteSnapshot): of
// two, one sees the other, and who sees that withdraws. listed has it look before, too.
func (b *Backend) hold(ctx context.Context, target backend.Target, consumer string, listed bool) (*share, error) {
	if listed {
		if s, _, err := b.holder(ctx, consumer); err != nil {
			return nil, err
		} else if s != nil && s.target(consumer) != target {
			return nil, fmt.Errorf("%w: this consumer holds %+v", backend.ErrConflict, s.target(consumer))
		}
	}
	s, err := b.holdable(ctx, target, consumer)
	if err != nil {
		return nil, err
	}
	if listed || s.holdOf(consumer).name != "" { // which may be of a moment ago
		if s, err = b.getShare(ctx, s.ID); err != nil {
			return nil, err
		}
	}
	what := cmp.Or(target.SnapshotID, holdsShare)
	if slices.ContainsFunc(s.holds(), func(h hold) bool {
		return h.consumer == consumer && h.what == what && h.live() && b.decided.has(h.name)
	}) && s.Metadata[prefixConsumer+consumer] != "" {
		return s, nil
	}
	switch h := s.holdOf(consumer); {
	case h.live() && h.what != what:
		return nil, fmt.Errorf("%w: this consumer holds %+v", backend.ErrConflict, s.target(consumer))
	case h.parting(b.o.Now().Add(-leavingAge)), s.beingDeleted(what, b.o.Now().Add(-markAge)):
		return nil, errUndecided
	}
	path := "shares/" + s.ID
	mine, own := s.holdOf(consumer), false
	if !mine.live() || mine.since.After(b.o.Now().Add(-adoptAge)) { // whoever has written that may still withdraw it
		mine, own = hold{consumer: consumer, what: what, name: newName(), since: b.o.Now()}, true
		if err := b.setMetadata(ctx, path, map[string]string{prefixConsumer + consumer: b.o.Instance, mine.key(): mine.since.UTC().Format(time.RFC3339Nano)}); err != nil {
			return nil, err
		}
	}
	for p := (pause{b: b}); ; {
		now, err := b.decide(ctx, s.ID, target, mine, own)
		switch {
		case err == nil:
			b.lately.saw(b.o.Now(), now)
			b.decided.add(mine.name)
			return now, nil
		case errors.Is(err, errUnlisted):
			// An Unexport has dropped what the filters find.
			if err = b.setMetadata(ctx, path, map[string]string{prefixConsumer + consumer: b.o.Instance}); err != nil {
				return nil, err
			}
			fallthrough
		case errors.Is(err, errWaits):
			if err = p.sleep(ctx); err == nil {
				continue
			}
			return nil, err
		case own && (errors.Is(err, errUndecided) || errors.Is(err, backend.ErrNotFound) || errors.Is(err, backend.ErrConflict)):
			ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), mine.since.Add(withdrawTime)) // nobody may call again
			defer cancel()
			return nil, errors.Join(err, b.withdraw(ctx, s, mine))
		}
		return nil, err
	}
}

// Who has written a hold withdraws it within withdrawTime, or not at all, so that
// others may count on one that is older than adoptAge.
const (
	withdrawTime = 20 * time.Second
	adoptAge     = time.Minute
)

// names are some that this process remembers, and may forget.
type names struct {
	mu  sync.Mutex
	all map[string]bool
}

func (n *names) add(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.all == nil || len(n.all) >= 10_000 {
		n.all = map[string]bool{}
	}
	n.all[name] = true
}

func (n *names) has(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.all[name]
}

// decide says whether the hold that was written on the share with an id is one, and
// returns that share; own says that this call has written it. errWaits while it is not clear yet; errUndecided, ErrConflict and
// ErrNotFound when it is to be withdrawn.
func (b *Backend) decide(ctx context.Context, id string, target backend.Target, mine hold, own bool) (*share, error) {
	found, err := b.listShares(ctx, map[string]string{prefixConsumer + mine.consumer: b.o.Instance})
	if err != nil {
		return nil, err
	}
	var s *share
	for _, f := range found {
		if f.ID == id {
			s = f
		}
	}
	if s == nil {
		if _, err = b.getShare(ctx, id); err == nil {
			err = errUnlisted
		}
		return nil, err
	}
	if !b.mine(s) || s.Status == "deleting" || target.ShareID != "" && s.deferred() {
		return nil, backend.ErrNotFound
	}
	waits := false
	for _, f := range found {
		if !b.mine(f) || f.Status == "deleting" {
			continue
		}
		for _, h := range f.holds() {
			switch other := f.ID != id || h.what != mine.what; {
			case h.consumer != mine.consumer:
			case f.ID == id && h.name == mine.name && !h.live(): // it was ended at once
				return nil, errUndecided
			case f.ID == id && h.parting(b.o.Now().Add(-leavingAge)):
				waits = true // for what goes along with that
			case h.live() && other && !own && mine.compare(h) < 0: // it goes, as this has been here for long
			case h.live() && other && b.o.Now().Sub(mine.since) > rivalTime:
				return nil, backend.ErrConflict
			case h.live() && other && mine.compare(h) < 0:
				waits = true // it goes, unless it was decided before
			case h.live() && other:
				return nil, errUndecided // the next look says what it holds
			}
		}
	}
	if waits {
		return nil, errWaits
	}
	if target.ShareID != "" {
		return s, nil
	}
	if s.beingDeleted(mine.what, b.o.Now().Add(-markAge)) {
		return nil, errUndecided
	}
	_, err = b.findSnapshot(ctx, mine.what)
	return s, err
}

var (
	// errWaits: another process is at work, and will have finished in a moment.
	errWaits = errors.New("another process is at work on it")
	// errUnlisted: the share is there, and the consumer's name is not on it.
	errUnlisted = errors.New("the consumer is not on the share")
)

// rivalTime is how long a hold waits for a younger one of the same consumer, of
// something else, to withdraw.
const rivalTime = 5 * time.Second

// withdraw ends a hold that has let nobody in.
func (b *Backend) withdraw(ctx context.Context, s *share, h hold) error {
	err := b.setMetadata(ctx, "shares/"+s.ID, b.ends(endWithdrawn, h.name))
	if err == nil {
		err = b.letGo(ctx, s.ID, h.consumer, []hold{h})
	}
	if err == nil { // another hold may have been written just before the consumer's name was dropped
		s, err = b.getShare(ctx, s.ID)
	}
	if err == nil && s.holdOf(h.consumer).live() && s.Metadata[prefixConsumer+h.consumer] == "" {
		err = b.setMetadata(ctx, "shares/"+s.ID, map[string]string{prefixConsumer + h.consumer: b.o.Instance})
	}
	if errors.Is(err, backend.ErrNotFound) { // the share has gone
		return nil
	}
	return err
}

// letGo drops holds that have ended. What ended them stays for a while: a hold comes
// back when somebody has written something else of the share meanwhile. What the
// filters find goes first, unless the consumer holds something else of the share: an
// Export that is at work waits for the holds to go, and looks then whether it is found.
func (b *Backend) letGo(ctx context.Context, id, consumer string, ended []hold) error {
	path := "shares/" + id
	s, err := b.getShare(ctx, id)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(s.holds(), func(h hold) bool {
		return h.consumer == consumer && !h.withdrawn && !slices.ContainsFunc(ended, func(e hold) bool { return e.name == h.name })
	}) {
		if err := b.dropMetadata(ctx, path, prefixConsumer+consumer); err != nil {
			return err
		}
	}
	for _, h := range ended {
		if err := b.dropMetadata(ctx, path, h.key()); err != nil {
			return err
		}
	}
	return b.tidy(ctx, s)
}

const (
	// endAge is how old what has ended something is when no request can be under way
	// any more that has read that before, and brings it back.
	endAge = 5 * time.Minute
	// mostOld is how many old entries one call drops.
	mostOld = 8
)

// tidy drops what has ended something that is gone for good, and what has come back
// although it had ended, or is of a process that was killed.
func (b *Backend) tidy(ctx context.Context, s *share) error {
	before := b.o.Now().Add(-endAge)
	old := s.oldEntries(before)
	for _, key := range old[:min(len(old), mostOld)] {
		if err := b.dropMetadata(ctx, "shares/"+s.ID, key); err != nil {
			return err
		}
	}
	// A Grant that was killed beside an Unexport has left what nobody else ends.
	return b.revoke(ctx, s, func(g grant) bool { return !g.ended && g.since.Before(before) && s.holdOf(g.consumer).name == "" })
}

// oldEntries are the keys of what has ended before a time and is there all the same, but
// for holds that an Unexport has to finish; of marks that were made before that time;
// and of what has ended things that are gone.
func (s *share) oldEntries(before time.Time) (keys []string) {
	there := map[string]bool{}
	for key, value := range s.Metadata {
		i := slices.IndexFunc(namedEntries, func(prefix string) bool { return strings.HasPrefix(key, prefix) })
		if i < 0 {
			continue
		}
		name := nameOf(key)
		end, withdrawn := s.ended(name)
		switch prefix := namedEntries[i]; {
		case (prefix == prefixDeleting || prefix == prefixLeaving) && sinceOf(value).Before(before):
			keys = append(keys, key)
		case end.IsZero():
			continue
		case end.Before(before) && (prefix != prefixHold || withdrawn):
			keys = append(keys, key)
		}
		there[name] = true
	}
	for key := range s.Metadata {
		rest, ok := strings.CutPrefix(key, prefixEnd)
		name, stamp, _ := strings.Cut(rest, ".")
		if at, err := time.Parse(endStamp, stamp); ok && !there[name] && (err != nil || at.Before(before)) {
			keys = append(keys, key)
		}
	}
	return keys
}

// namedEntries are the prefixes of what has a name, and what ends it.
var namedEntries = []string{prefixHold, prefixGrant, prefixLeaving, prefixDeleting}

// nameOf is the name of an entry by its key.
func nameOf(key string) string { return key[strings.LastIndex(key, ".")+1:] }

// sinceOf is the time that the value of a grant or a mark begins with; zero if there is none.
func sinceOf(value string) time.Time {
	text, _, _ := strings.Cut(value, " ")
	at, _ := time.Parse(time.RFC3339, text)
	return at
}

// atWork says whether the call that has made a mark after a time goes on. A mark that
// nobody can read does.
func (s *share) atWork(mark string, after time.Time) bool {
	if end, _ := s.ended(nameOf(mark)); !end.IsZero() {
		return false
	}
	at := sinceOf(s.Metadata[mark])
	return at.IsZero() || at.After(after)
}
