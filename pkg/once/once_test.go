package once

import (
	"slices"
	"strings"
	"testing"
)

func TestSaid(t *testing.T) {
	var s Said
	for _, round := range []struct{ comes, said string }{
		{"", ""},
		{"a", "a"},
		{"a a", ""},
		{"a b b", "b"},
		{"b", ""},
		{"a", "a"}, // it was away
		{"", ""},
		{"a", "a"},
	} {
		s.Next()
		var said []string
		for _, text := range strings.Fields(round.comes) {
			if s.New(text) {
				said = append(said, text)
			}
		}
		if want := strings.Fields(round.said); !slices.Equal(said, want) {
			t.Errorf("of %q it says %q, want %q", round.comes, said, want)
		}
	}
	if s.Next(); len(s.before) != 1 || len(s.now) != 0 {
		t.Errorf("it remembers more than a round: %v", s)
	}
}
