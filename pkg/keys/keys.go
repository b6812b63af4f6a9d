// Package keys is a directory of the keys with which nodes open shares: one
// file a key, called after the user whose key it is. The directory has mode
// 0700 and its files 0600, and nothing else is ever given a key.
package keys

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/abaca-csi/abaca/pkg/record"
)

// Dir is such a directory. All methods may be called from any goroutine, and
// from several processes over one directory.
type Dir struct{ path string }

// Open makes the directory if there is none, and closes it to others.
func Open(path string) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("open the key directory: %w", err)
	}
	// One that was there before may be open to others.
	if err := os.Chmod(path, 0o700); err != nil {
		return nil, fmt.Errorf("open the key directory: %w", err)
	}
	return &Dir{path}, nil
}

// Path is the directory, for those who read keys.
func (d *Dir) Path() string { return d.path }

// An id is a file's name: it is no path, and no hidden or temporary file.
var validID = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}$`)

// Put keeps the key of a user, in the place of one that was there. It is in
// place completely or not at all, and when Put returns nil it survives a crash
// of the machine. No error holds a key.
func (d *Dir) Put(_ context.Context, id, key string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("keep a key: %q cannot be the name of one", id)
	}
	path := filepath.Join(d.path, id)
	if old, err := os.ReadFile(path); err == nil && string(old) == key {
		return nil
	}
	if err := record.Replace(path, []byte(key), true); err != nil {
		return fmt.Errorf("keep the key of %s: %w", id, err)
	}
	return nil
}

// Delete removes the key of a user. One that is not there is nil.
func (d *Dir) Delete(_ context.Context, id string) error {
	if !validID.MatchString(id) {
		return nil
	}
	err := os.Remove(filepath.Join(d.path, id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = record.SyncDir(d.path)
	}
	if err != nil {
		return fmt.Errorf("remove the key of %s: %w", id, err)
	}
	return nil
}
