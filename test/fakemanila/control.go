package fakemanila

import (
	"fmt"
	"net/http"
	"strings"
	"time"
)

// Request is one that was answered.
type Request struct {
	Method, Path, Microversion string
	Code                       int
}

// Fault is what happens to some requests.
type Fault struct {
	Method string // empty for any
	Path   string // what the path holds
	Body   string // what the request's body holds
	Skip   int    // how many that match are let through first
	Times  int    // how many are hit; 0 is one

	// Status, Header and Text are answered instead; a Status of 0 is none.
	Status int
	Header map[string]string
	Text   string
	// Cut ends the connection without an answer, and Delay puts it off. With After,
	// the request has its effect first.
	Cut, After bool
	Delay      time.Duration
	// Expire makes every token that was given out invalid first.
	Expire bool
}

// Add makes requests fail from now on.
func (s *Server) Add(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.Times == 0 {
		f.Times = 1
	}
	s.faults = append(s.faults, &f)
}

// Mend ends all failures that were added.
func (s *Server) Mend() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// Strike has f asked before and after each request that changes something, which
// are counted from 1. Where it says true the connection is cut. nil ends it.
func (s *Server) Strike(f func(change int, after bool) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes, s.strike = 0, f
}

// Between has f called in the middle of each request for a share's metadata: it has
// read what is there, and has not written it yet. nil ends it.
func (s *Server) Between(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.between = f
}

// Requests returns what was asked since the last call, Keystone's too.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.requests
	s.requests = nil
	return all
}

// ExpireTokens makes every token that was given out invalid.
func (s *Server) ExpireTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// fault returns what a test wants to happen to a request.
func (s *Server) fault(r *http.Request, body string) *Fault {
	for _, f := range s.faults {
		if f.Times == 0 || f.Method != "" && f.Method != r.Method || !strings.Contains(r.URL.Path, f.Path) || !strings.Contains(body, f.Body) {
			continue
		}
		if f.Skip > 0 {
			f.Skip--
			continue
		}
		f.Times--
		return f
	}
	return nil
}

// Counts says what there is, for tests that look for what is left behind.
func (s *Server) Counts() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.advance()
	return fmt.Sprintf("%d shares, %d snapshots, %d rules", len(s.shares), len(s.snapshots), len(s.rules))
}

// Objects are what the cloud has, by id.
type Objects struct {
	Shares    map[string]*Share
	Snapshots map[string]*Snapshot
	Rules     map[string]*Rule
	Types     []*Type
}

// Alter changes what there is behind a client's back.
func (s *Server) Alter(change func(Objects)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.advance()
	change(Objects{s.shares, s.snapshots, s.rules, s.types})
}

// Age makes all messages older.
func (s *Server) Age(by time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.messages {
		m.created = m.created.Add(-by)
	}
}

// Say adds a user message of level ERROR about a share, in Manila's form: the action,
// a colon and the detail.
func (s *Server) Say(share, detail, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.say(share, detail, text)
}

// Lock keeps a share from being deleted, for a reason; an empty one unlocks it.
func (s *Server) Lock(share, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.locks[share] = reason; reason == "" {
		delete(s.locks, share)
	}
}
