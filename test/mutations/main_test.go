package main

import (
	"os"
	"strings"
	"testing"
)

// TestMutationsFit: each breaks the code as it is now, in one place.
func TestMutationsFit(t *testing.T) {
	for _, m := range mutations {
		b, err := os.ReadFile("../../" + m.file)
		if err != nil || strings.Count(string(b), m.old) != 1 {
			t.Errorf("%s: %s: %d of %q", m.promise, m.file, strings.Count(string(b), m.old), m.old)
		}
	}
}
