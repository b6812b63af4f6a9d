package manila

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// poller spreads the looks at what Manila is doing. One that waits for one object
// asks for that; several share one listing.
type poller struct {
	waiting atomic.Int32
	// The last listing, and when it was asked for; whoever has the lock "listing" may read and write it.
	listed time.Time
	shares []*share
}

// await looks at a share until done says so, and returns it as it was last; nil
// when it is gone. ErrPending when the context ends before. Where the kind of
// work is named, it has just begun.
func (b *Backend) await(ctx context.Context, id, kind string, done func(*share) bool) (*share, error) {
	b.polls.waiting.Add(1)
	defer b.polls.waiting.Add(-1)
	return watch(ctx, b, "share "+id, kind, func(age time.Duration) (*share, error) { return b.glance(ctx, id, age) }, done)
}

// awaitSnapshot is await for a snapshot.
func (b *Backend) awaitSnapshot(ctx context.Context, id, kind string, done func(*snapshot) bool) (*snapshot, error) {
	return watch(ctx, b, "snapshot "+id, kind, func(time.Duration) (*snapshot, error) { return b.getSnapshot(ctx, id) }, done)
}

// watch is await for what look returns as it was at most so long ago.
func watch[T any](ctx context.Context, b *Backend, what, kind string, look func(age time.Duration) (*T, error), done func(*T) bool) (*T, error) {
	p := pause{b: b, kind: kind}
	var err error
	if kind != "" {
		err = p.sleep(ctx)
	}
	for ; err == nil; err = p.sleep(ctx) {
		o, err := look(p.next())
		switch {
		case errors.Is(err, backend.ErrNotFound):
			p.ended()
			return nil, nil
		case errors.Is(err, backend.ErrUnavailable) && p.patient(): // it may be back in a moment
		case err != nil:
			return nil, err
		case done(o):
			p.ended()
			return o, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", what, err)
}

// glance returns one share. While several are waited for, one listing of at most the
// given age answers for all, but that a share is gone is what Manila says of that
// share alone.
func (b *Backend) glance(ctx context.Context, id string, age time.Duration) (*share, error) {
	if b.polls.many() {
		_, all, err := b.listed(ctx, age)
		if err != nil {
			return nil, err
		}
		for _, s := range all {
			if s.ID == id {
				return s.clone(), nil
			}
		}
	}
	return b.getShare(ctx, id)
}

// many says whether several shares are waited for.
func (p *poller) many() bool { return p.waiting.Load() >= 3 }

// listed returns all shares of a listing of at most the given age, and when that was
// asked for. Nobody may change them.
func (b *Backend) listed(ctx context.Context, age time.Duration) (time.Time, []*share, error) {
	// One lists and the others wait, each no longer than its own time.
	unlock, err := b.busy.lock(ctx, "listing")
	if err != nil {
		return time.Time{}, nil, err
	}
	defer unlock()
	if at := b.o.Now(); at.Sub(b.polls.listed) >= age {
		all, err := b.ours(ctx)
		if errors.Is(err, backend.ErrNotFound) { // that is not said of a share
			err = fmt.Errorf("%w: %s", backend.ErrUnavailable, err)
		}
		if err != nil {
			return time.Time{}, nil, err
		}
		b.polls.listed, b.polls.shares = at, all
	}
	return b.polls.listed, b.polls.shares, nil
}

// pause is the time between two looks at work of one kind. The first is when that
// kind of work has lately been done, a little before, and the next come quickly,
// as it must be about to be; where nothing is known, each is an eighth of the time
// that has gone by, so that what takes long is asked for rarely. It is never quite
// the same for two that wait.
type pause struct {
	b     *Backend
	kind  string // empty for what nothing is learnt of
	begun time.Time
	looks int
}

const (
	longestPause = 8 * time.Second
	longestGuess = 10 * time.Second
)

func (p *pause) next() time.Duration {
	if p.begun.IsZero() {
		p.begun = p.b.o.Now()
	}
	d, least := p.b.o.Now().Sub(p.begun)/8, p.b.o.Poll
	guess := p.b.paces.guess(p.kind)
	switch {
	case p.looks == 0:
		d = guess
	case guess > 0 && p.looks < 4:
		d, least = d/2, least/2
	}
	return min(max(d, least), longestPause)
}

// patient says whether an answer that failed may be asked for again.
func (p *pause) patient() bool { return p.looks < 5 }

// sleep waits, or returns late if the caller's time ends.
func (p *pause) sleep(ctx context.Context) error {
	d := p.next()
	if p.looks > 0 {
		d += time.Duration(p.b.o.Now().UnixNano() % int64(d/4+1)) // jitter
	}
	p.looks++
	select {
	case <-ctx.Done():
		return late(ctx)
	case <-time.After(d):
		return nil
	}
}

// ended says that the work which was waited for is done.
func (p *pause) ended() {
	if p.kind != "" && p.looks > 0 {
		p.b.paces.learn(p.kind, p.b.o.Now().Sub(p.begun), p.looks == 1)
	}
}

// paces are how long each kind of work takes this cloud.
type paces struct {
	mu      sync.Mutex
	typical map[string]time.Duration
}

func (p *paces) guess(kind string) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.typical[kind] * 19 / 20
}

// learn remembers what a piece of work has taken. What was done at the first look
// may have been done long before, so the next look of this kind is sooner.
func (p *paces) learn(kind string, took time.Duration, first bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.typical == nil {
		p.typical = map[string]time.Duration{}
	}
	if first {
		took = took * 9 / 10
	}
	p.typical[kind] = min(took, longestGuess)
}
