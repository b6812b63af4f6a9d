package keys

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDir(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "keys")
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	mode := func(path string, want fs.FileMode) {
		t.Helper()
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want mode %o", path, info.Mode(), err, want)
		}
	}
	mode(path, 0o700)
	for _, key := range []string{"secret", "secret", "another"} {
		if err := d.Put(t.Context(), "abaca-1", key); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(path, "abaca-1")); err != nil || string(got) != key {
			t.Errorf("got %q, %v, want %q", got, err, key)
		}
		mode(filepath.Join(path, "abaca-1"), 0o600)
	}
	if left, err := os.ReadDir(path); err != nil || len(left) != 1 {
		t.Errorf("%v, %v, want the one key and no other file", left, err)
	}
	for range 2 {
		if err := d.Delete(t.Context(), "abaca-1"); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(path); err != nil || len(left) != 0 {
		t.Errorf("%v, %v, want nothing", left, err)
	}
}

// TestStrangers: an id is never a path, and no error holds the key.
func TestStrangers(t *testing.T) {
	outside := t.TempDir()
	d, err := Open(filepath.Join(outside, "keys"))
	if err != nil {
		t.Fatal(err)
	}
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("stays"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", ".", "..", "../victim", "/etc/passwd", "a/b", ".new-1", "-rf", "a\x00", "a\n"} {
		if err := d.Put(t.Context(), id, "geheim"); err == nil || strings.Contains(err.Error(), "geheim") {
			t.Errorf("put under %q: %v", id, err)
		}
		if err := d.Delete(t.Context(), id); err != nil {
			t.Errorf("delete %q: %v", id, err)
		}
	}
	if got, err := os.ReadFile(victim); err != nil || string(got) != "stays" {
		t.Errorf("a file outside is %q, %v", got, err)
	}
	if err := os.RemoveAll(d.Path()); err != nil {
		t.Fatal(err)
	}
	if err := d.Put(t.Context(), "abaca-1", "geheim"); err == nil || strings.Contains(err.Error(), "geheim") {
		t.Errorf("put into no directory: %v", err)
	}
}
