package restic

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/test/programs"
)

// TestVanished: a repository that was there and is not there is not one that
// nobody has made yet.
func TestVanished(t *testing.T) {
	dir, marks := filepath.Join(t.TempDir(), "repo"), t.TempDir()
	at := func(location string) *Repository {
		r, err := Open(Config{Program: programs.Restic(t), SeenDir: marks,
			Env: map[string]string{"RESTIC_REPOSITORY": location, "RESTIC_PASSWORD": password}})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	_, err := at(dir).Snapshots(t.Context())
	if !errors.Is(err, ErrNoRepository) || errors.Is(err, ErrVanished) {
		t.Fatalf("before it was made: %v", err)
	}
	if err := at(dir).Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+".unmounted"); err != nil {
		t.Fatal(err)
	}
	for _, location := range []string{dir, "local:" + dir + "/"} {
		_, err := at(location).Snapshots(t.Context())
		if !errors.Is(err, ErrVanished) || errors.Is(err, ErrNoRepository) || !strings.Contains(err.Error(), marks) {
			t.Errorf("%s: %v", location, err)
		}
	}
	if _, err := at(dir + "2").Snapshots(t.Context()); !errors.Is(err, ErrNoRepository) {
		t.Errorf("another one: %v", err)
	}
	if err := os.Rename(dir+".unmounted", dir); err != nil {
		t.Fatal(err)
	}
	if _, err := at(dir).Snapshots(t.Context()); err != nil {
		t.Errorf("after it came back: %v", err)
	}
}

// A password in a location may change, and the repository is the same.
func TestPlace(t *testing.T) {
	if a, b := place("rest:https://u:p@host/x/"), place("rest:https://u:q@host/x"); a != b || strings.Contains(a, "p@") {
		t.Errorf("%q and %q", a, b)
	}
}

// TestGivesUp: a listing that only complains ends long before restic does.
func TestGivesUp(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the patience of a listing")
	}
	begun := time.Now()
	_, err := fake(t, nil, `for i in 1 2 3 4; do echo 'Load(<config/0>) failed: connection refused' >&2; done; exec sleep 100`).Snapshots(t.Context())
	if !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "network policies") || time.Since(begun) > 90*time.Second {
		t.Errorf("after %s: %v", time.Since(begun), err)
	}
}
