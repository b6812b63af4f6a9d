package restic

import (
	"context"
	"errors"
	"time"
)

// lockRound is how long one restic waits for a lock. Between two rounds the
// locks go that have become stale meanwhile, which restic waits for as it does
// for others.
const lockRound = 10 * time.Minute

// AwaitLock calls do until the repository is not locked: at once; then, without
// the stale locks, for as long as wait. A lock that is alive is waited for and
// one that is not is gone half an hour after its process, so what ends with
// ErrLocked was kept out by somebody who works. do hands retry to restic; waiting
// is told once that there is something to wait for.
func AwaitLock(ctx context.Context, c Client, wait time.Duration, waiting func(error), do func(retry time.Duration) error) error {
	err := do(0)
	if errors.Is(err, ErrLocked) {
		waiting(err)
	}
	for ; errors.Is(err, ErrLocked) && wait > 0; wait -= lockRound {
		if err := c.Unlock(ctx); err != nil {
			return err
		}
		err = do(min(wait, lockRound))
	}
	return err
}
