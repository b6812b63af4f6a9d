package restic

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/record"
)

// seen is a file that says that a repository was at its location. Without it a
// repository whose disk is not mounted looks like one that nobody has made yet:
// the next backup would make another in its place, and a deletion would end well
// and leave the data.
type seen string

func newSeen(c Config) seen {
	if c.SeenDir == "" {
		return ""
	}
	digest := sha256.Sum256([]byte(place(c.Env["RESTIC_REPOSITORY"])))
	return seen(filepath.Join(c.SeenDir, hex.EncodeToString(digest[:16])))
}

// place is the location without what may change about it.
func place(location string) string {
	return strings.TrimRight(strings.TrimPrefix(userinfo.ReplaceAllString(location, "//"), "local:"), "/")
}

// mark remembers the repository.
func (s seen) mark() error {
	if s == "" {
		return nil
	}
	if _, err := os.Stat(string(s)); err == nil {
		return nil
	}
	if err := record.Replace(string(s), nil, true); err != nil {
		return fmt.Errorf("remember the repository: %w", err)
	}
	return nil
}

// before makes e, of a repository that is not there, the error of one that has
// vanished if it was there.
func (s seen) before(e *Error) {
	info, err := os.Stat(string(s))
	if s == "" || errors.Is(err, fs.ErrNotExist) {
		return
	}
	e.kind, e.Hint = ErrVanished, "is its disk mounted? If the repository was removed on purpose, remove "+string(s)+" too"
	if err == nil {
		e.Message = "it was there on " + info.ModTime().UTC().Format(time.RFC3339) + ": " + e.Message
	}
}
