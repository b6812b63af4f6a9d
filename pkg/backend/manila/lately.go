package manila

import (
	"context"
	"maps"
	"sync"
	"time"
)

// lately is what was read a moment ago. It saves requests where a call follows
// another about the same share, and is only for looks that Manila's own answer
// comes after: what is decided is decided by that.
type lately struct {
	mu     sync.Mutex
	shares map[string]sight // by id
}

type sight struct {
	at    time.Time
	share *share
}

const (
	latelyAge  = 2 * time.Second
	latelyMost = 10_000
)

func (s *share) clone() *share {
	c := *s
	c.Metadata = maps.Clone(s.Metadata)
	return &c
}

func (l *lately) saw(now time.Time, s *share) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shares == nil || len(l.shares) >= latelyMost {
		l.shares = map[string]sight{}
	}
	l.shares[s.ID] = sight{now, s.clone()}
}

// find returns a share that was seen lately and that fits, or nil.
func (l *lately) find(now time.Time, fits func(*share) bool) *share {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, s := range l.shares {
		switch {
		case now.Sub(s.at) > latelyAge:
			delete(l.shares, id)
		case fits(s.share):
			return s.share.clone()
		}
	}
	return nil
}

// lateShare is getShare, as it was lately if it was ready then.
func (b *Backend) lateShare(ctx context.Context, id string) (*share, error) {
	if s := b.lately.find(b.o.Now(), func(s *share) bool { return s.ID == id && s.ready() }); s != nil {
		return s, nil
	}
	return b.getShare(ctx, id)
}

// lateHolder is holder, as it was lately: sure says that it is as it is now.
func (b *Backend) lateHolder(ctx context.Context, consumer string) (s *share, sure bool, err error) {
	if s := b.lately.find(b.o.Now(), func(s *share) bool { return s.holds()[consumer] != "" }); s != nil {
		return s, false, nil
	}
	s, _, err = b.holder(ctx, consumer)
	return s, true, err
}
