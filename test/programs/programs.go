// Package programs finds the programs that tests run.
package programs

import (
	"os"
	"path/filepath"
	"testing"
)

// Restic is the path of the pinned restic, which `make bin/restic` builds for the
// packages two directories below the top; ABACA_RESTIC names another.
func Restic(t testing.TB) string {
	t.Helper()
	path := os.Getenv("ABACA_RESTIC")
	if path == "" {
		path = "../../bin/restic"
	}
	path, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("no restic program, run make build: %v", err)
	}
	return path
}
