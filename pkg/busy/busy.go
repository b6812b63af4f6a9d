// Package busy says which objects somebody is working on, so that a second
// request for one of them can be refused at once instead of waiting in a queue
// past its deadline (CSI spec 1.13, "Operation pending for volume").
package busy

import "sync"

// Set holds the keys of busy objects. The zero value is ready; all methods may
// be called from any goroutine.
type Set struct {
	mu   sync.Mutex
	keys map[string]bool
}

// TryLock marks all the keys as busy, or none of them: then it returns the
// first key that is busy already. release may be called more than once.
func (s *Set) TryLock(keys ...string) (release func(), busy string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range keys {
		if s.keys[k] {
			return nil, k
		}
	}
	if s.keys == nil {
		s.keys = map[string]bool{}
	}
	for _, k := range keys {
		s.keys[k] = true
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, k := range keys {
			delete(s.keys, k)
		}
	}), ""
}
