package busy

import (
	"sync"
	"sync/atomic"
	"testing"
)

func TestTryLockTakesAllOrNone(t *testing.T) {
	var s Set
	release, busy := s.TryLock("a", "b")
	if busy != "" {
		t.Fatalf("free keys are busy: %q", busy)
	}
	if _, busy := s.TryLock("c", "b"); busy != "b" {
		t.Fatalf("busy = %q, want b", busy)
	}
	again, busy := s.TryLock("c")
	if busy != "" {
		t.Fatalf("a refused call left %q locked", busy)
	}
	again()
	release()
	release() // must not free what somebody else has locked since
	if _, busy := s.TryLock("a"); busy != "" {
		t.Fatalf("released key %q is busy", busy)
	}
	release()
	if _, busy := s.TryLock("a"); busy != "a" {
		t.Fatal("a second release freed another holder's key")
	}
}

func TestTryLockExcludes(t *testing.T) {
	var s Set
	var inside, entered atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 200 {
				release, busy := s.TryLock("k")
				if busy != "" {
					continue
				}
				if inside.Add(1) != 1 {
					t.Error("two holders at once")
				}
				entered.Add(1)
				inside.Add(-1)
				release()
			}
		})
	}
	wg.Wait()
	if entered.Load() == 0 {
		t.Fatal("nobody ever entered")
	}
}
