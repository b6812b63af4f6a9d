package manila

import (
	"context"
	"maps"
	"sync"
	"time"
)

// lately is what was read a moment ago. It saves a request where one call follows
// another about the same share. Nothing is decided by it alone: whoever uses it asks
// Manila again before what he does counts.
type lately struct {
	mu      sync.Mutex
	shares  map[string]glimpse // by id
	holders map[string]string  // ids, by consumer
}

type glimpse struct {
	at    time.Time
	share *share
}

const (
	latelyAge  = 2 * time.Second
	latelyMost = 1_000
)

func (s *share) clone() *share {
	c := *s
	c.Metadata = maps.Clone(s.Metadata)
	return &c
}

func (l *lately) saw(now time.Time, s *share) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shares == nil || len(l.shares) >= latelyMost || len(l.holders) >= latelyMost {
		l.shares, l.holders = map[string]glimpse{}, map[string]string{}
	}
	l.shares[s.ID] = glimpse{now, s.clone()}
	for _, h := range s.holds() {
		l.holders[h.consumer] = s.ID
	}
}

// find returns a share that was seen lately, or nil.
func (l *lately) find(now time.Time, id string) *share {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.shares[id]
	if !ok || now.Sub(s.at) > latelyAge {
		delete(l.shares, id)
		return nil
	}
	return s.share.clone()
}

// holder returns the share that a consumer was seen to hold, or a snapshot of
// which; or nil.
func (l *lately) holder(now time.Time, consumer string) *share {
	l.mu.Lock()
	id := l.holders[consumer]
	l.mu.Unlock()
	if s := l.find(now, id); s != nil && s.holdOf(consumer).live() {
		return s
	}
	return nil
}

// lateShare is getShare, as it was lately if it was ready then.
func (b *Backend) lateShare(ctx context.Context, id string) (*share, error) {
	if s := b.lately.find(b.o.Now(), id); s != nil && s.ready() {
		return s, nil
	}
	return b.getShare(ctx, id)
}

// lateHolder is holder, as it was lately: sure says that it is as it is now.
func (b *Backend) lateHolder(ctx context.Context, consumer string) (s *share, sure bool, err error) {
	if s := b.lately.holder(b.o.Now(), consumer); s != nil {
		return s, false, nil
	}
	s, _, err = b.holder(ctx, consumer)
	return s, true, err
}
