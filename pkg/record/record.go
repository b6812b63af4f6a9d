// Package record keeps small files, most of them JSON, that survive a kill at any
// point.
package record

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// Read reads a file that Write has written. fs.ErrNotExist when there is none.
func Read(path string, into any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// Write replaces a file by v as JSON; see Replace.
func Write(path string, v any, lasting bool) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return Replace(path, b, lasting)
}

// Replace replaces a file in one step, with mode 0600. It survives a kill of the
// process; if lasting, a crash of the machine too.
func Replace(path string, b []byte, lasting bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if lasting {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	if lasting {
		return SyncDir(filepath.Dir(path))
	}
	return nil
}

// SyncDir makes what was renamed in or removed from a directory last.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
