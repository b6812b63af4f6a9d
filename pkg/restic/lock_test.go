package restic

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

// locked is a repository that is locked for some rounds.
type locked struct {
	Client
	rounds int
	log    []string
	unlock error
}

func (l *locked) Unlock(context.Context) error {
	l.log = append(l.log, "unlock")
	return l.unlock
}

func (l *locked) do(retry time.Duration) error {
	l.log = append(l.log, retry.String())
	if l.rounds--; l.rounds >= 0 {
		return ErrLocked
	}
	return nil
}

// A lock is waited for as long as was said, and between the rounds stale ones go.
func TestAwaitLock(t *testing.T) {
	for _, test := range []struct {
		rounds int
		wait   time.Duration
		unlock error
		want   error
		log    []string
	}{
		{0, time.Hour, nil, nil, []string{"0s"}},
		{1, time.Hour, nil, nil, []string{"0s", "unlock", "10m0s"}},
		{3, 25 * time.Minute, nil, nil, []string{"0s", "unlock", "10m0s", "unlock", "10m0s", "unlock", "5m0s"}},
		{4, 25 * time.Minute, nil, ErrLocked, []string{"0s", "unlock", "10m0s", "unlock", "10m0s", "unlock", "5m0s"}},
		{1, 0, nil, ErrLocked, []string{"0s"}},
		{1, time.Hour, ErrFailed, ErrFailed, []string{"0s", "unlock"}},
	} {
		l, told := &locked{rounds: test.rounds, unlock: test.unlock}, 0
		err := AwaitLock(t.Context(), l, test.wait, func(error) { told++ }, l.do)
		if !errors.Is(err, test.want) || !slices.Equal(l.log, test.log) || told != min(1, test.rounds) {
			t.Errorf("%+v: %v after %v, told %d times", test, err, l.log, told)
		}
	}
}
