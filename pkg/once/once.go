// Package once keeps out of the log what comes back in every round of work: it is said
// once, and again after a round without it.
package once

// Said is what was said in the last round and in this one. The zero value is ready; it is
// for one goroutine.
type Said struct{ before, now map[string]bool }

// New says whether a text is to be said: it did not come in the last round, nor in this
// one before.
func (s *Said) New(text string) bool {
	known := s.before[text] || s.now[text]
	if s.now == nil {
		s.now = map[string]bool{}
	}
	s.now[text] = true
	return !known
}

// Next begins the next round. What did not come in the one that ends is forgotten.
func (s *Said) Next() { s.before, s.now = s.now, nil }
