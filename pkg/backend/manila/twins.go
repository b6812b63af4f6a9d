package manila

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// Two calls may make an object each for one name: two processes at once, or one
// whose first request had an effect only after it had given up. Then all choose
// the same one, which is marked ready, and the others go.
//
// Who marks an object has looked just before that no other one counts more, and
// made his look and his mark within markTime. One that was made after such a look
// may count more all the same, as Manila tells times in whole seconds and has
// several clocks. So a call removes at once only what it has made itself, which
// nobody else chooses; a stranger's goes when the object that counts is older than
// twinAge, as whoever has not seen that one has marked his own by then.
const (
	markTime = 10 * time.Second
	twinAge  = 30 * time.Second
)

// made is what shares and snapshots have in common.
type made struct {
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Status   string            `json:"status"`
	Metadata map[string]string `json:"metadata"`
	Created  stamp             `json:"created_at"`
}

func (m *made) it() *made { return m }

func (m *made) ready() bool { return m.Metadata[keyReady] == "true" }

// object is a share or a snapshot.
type object interface{ it() *made }

// sortTwins puts the object that counts first: one that is ready, then one that has
// not failed, then the oldest, then the lowest id.
func sortTwins[T object](found []T) {
	rank := func(m *made) int {
		switch {
		case m.ready():
			return 0
		case stateOf(m.Status) != failed:
			return 1
		}
		return 2
	}
	slices.SortFunc(found, func(x, y T) int {
		a, b := x.it(), y.it()
		return cmp.Or(cmp.Compare(rank(a), rank(b)), a.Created.Compare(b.Created.Time), cmp.Compare(a.ID, b.ID))
	})
}

// sight is what was made for one name, the object that counts first, as it was asked
// for at a time.
type sight[T object] struct {
	at    time.Time
	found []T
}

// calls are those of the API for one kind of object.
type calls[T object] struct {
	named  func(ctx context.Context, id string) ([]T, error)                         // sorted; id is that of the name
	seen   func(ctx context.Context, id string, age time.Duration) (sight[T], error) // not older
	get    func(ctx context.Context, id string) (T, error)
	remove func(ctx context.Context, o T) error
	mark   func(ctx context.Context, o T) error // as ready
}

// errAgain is an object that has gone, or is not the one that counts, so that
// another one may do.
var errAgain = errors.New("it has gone while it was made")

// attempts has a creation done, and done again after errAgain.
func attempts[T any](do func() (T, error)) (T, error) {
	for n := 1; ; n++ {
		o, err := do()
		if !errors.Is(err, errAgain) {
			return o, err
		}
		if n == 3 {
			return o, fmt.Errorf("%w: %s", backend.ErrUnavailable, err)
		}
	}
}

// awaitMade waits until an object that is being made is done, by looking at all that
// is there of its name: who marks it as ready need not look again. errAgain when it is
// gone.
func awaitMade[T object](ctx context.Context, b *Backend, c calls[T], o T, kind string) (T, sight[T], error) {
	type look struct {
		o    T
		seen sight[T]
	}
	id := o.it().ID
	got, err := watch(ctx, b, id, kind, func(age time.Duration) (*look, error) {
		seen, err := c.seen(ctx, o.it().Metadata[keyID], age)
		if errors.Is(err, backend.ErrNotFound) { // that is not said of one object
			err = fmt.Errorf("%w: %s", backend.ErrUnavailable, err)
		}
		if err != nil {
			return nil, err
		}
		if i := slices.IndexFunc(seen.found, func(f T) bool { return f.it().ID == id }); i >= 0 {
			return &look{seen.found[i], seen}, nil
		}
		o, err := c.get(ctx, id)
		return &look{o: o}, err
	}, func(l *look) bool { return stateOf(l.o.it().Status) != passing })
	switch {
	case err != nil:
		return o, sight[T]{}, pendingOr(err)
	case got == nil:
		return o, sight[T]{}, errAgain
	}
	return got.o, got.seen, nil
}

// settleTwins marks an object that is done as ready, once it is the only one for its
// name; errAgain when another one counts. own says that this call has made it, and seen
// what was there of the name when it was done.
func settleTwins[T object](ctx context.Context, b *Backend, c calls[T], o T, own bool, seen sight[T]) error {
	m := o.it()
	for p := (pause{b: b}); ; seen = (sight[T]{}) {
		if b.o.Now().Sub(seen.at) > markTime/2 {
			var err error
			if seen, err = c.seen(ctx, m.Metadata[keyID], 0); err != nil {
				return pendingOr(err)
			}
		}
		found := seen.found
		switch {
		case len(found) == 0:
			return fmt.Errorf("%w: Manila does not list %s", backend.ErrPending, m.ID)
		case found[0].it().ID != m.ID && own:
			return cmp.Or(removeTwin(ctx, c, m.ID), errAgain)
		case found[0].it().ID != m.ID:
			return errAgain
		}
		rest, err := dropTwins(ctx, b, c, found, twinAge)
		if err != nil {
			return err
		}
		if rest == "" {
			ctx, cancel := context.WithDeadline(ctx, seen.at.Add(markTime))
			defer cancel()
			if err := c.mark(ctx, o); err != nil {
				return pendingOr(err)
			}
			m.Metadata[keyReady] = "true"
			return nil
		}
		if err := p.sleep(ctx); err != nil {
			return fmt.Errorf("%s was made too, by a call that may choose it: %w", rest, err)
		}
	}
}

// dropTwins removes what was made besides the object that counts, which is the
// first, and returns the id of one that may still be chosen by the call that made it,
// as the first is not so old yet.
func dropTwins[T object](ctx context.Context, b *Backend, c calls[T], found []T, age time.Duration) (rest string, err error) {
	for _, twin := range found[1:] {
		id := twin.it().ID
		if twin.it().ready() {
			continue
		}
		if age > 0 && b.o.Now().Sub(found[0].it().Created.Time) < age {
			rest = id
			continue
		}
		if err := removeTwin(ctx, c, id); err != nil {
			return "", err
		}
	}
	return rest, nil
}

// removeTwin removes what was made twice; errAgain if another call has chosen it.
func removeTwin[T object](ctx context.Context, c calls[T], id string) error {
	now, err := c.get(ctx, id)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		return nil
	case err == nil && now.it().ready():
		return errAgain
	case err == nil:
		err = c.remove(ctx, now)
	}
	if err != nil {
		return fmt.Errorf("remove %s, which was made twice: %w", id, pendingOr(err))
	}
	return nil
}

// dropTwinsOf is dropTwins for an object that is ready and about to be deleted, so
// that nobody makes it any more.
func dropTwinsOf[T object](ctx context.Context, b *Backend, c calls[T], o T) error {
	if m := o.it(); !m.ready() || m.Status == "deleting" {
		return nil
	}
	found, err := c.named(ctx, o.it().Metadata[keyID])
	if err != nil || len(found) == 0 || found[0].it().ID != o.it().ID {
		return err
	}
	_, err = dropTwins(ctx, b, c, found, 0)
	if errors.Is(err, errAgain) {
		return nil
	}
	return err
}
