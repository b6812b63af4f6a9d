package mover

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode"
)

const (
	maxPatterns = 100
	maxPattern  = 500 // bytes
)

// CheckExclude says what is wrong with patterns of files that a backup leaves
// out. One that begins with "/" is of a path from the top of the volume, any other
// of the end of a path, at any depth. "*", "?" and "[a-z]" are within one name,
// "**" is any number of directories, and what a directory's pattern matches goes
// with all that is in it. "!" before a pattern takes back what an earlier one has
// left out, unless a whole directory around it was (restic manual, "Excluding
// Files").
func CheckExclude(patterns []string) error {
	if len(patterns) > maxPatterns {
		return fmt.Errorf("%d patterns of what is left out are more than %d", len(patterns), maxPatterns)
	}
	for _, p := range patterns {
		bare := strings.TrimPrefix(p, "!")
		names := strings.Split(bare, "/")
		_, err := path.Match(bare, "")
		switch {
		case strings.Trim(bare, "/ ") == "":
			err = fmt.Errorf("it names the volume itself")
		case len(p) > maxPattern:
			err = fmt.Errorf("it is longer than %d bytes", maxPattern)
		case strings.ContainsFunc(p, unicode.IsControl):
			err = fmt.Errorf("it holds a control character")
		case slices.Contains(names, "..") || slices.Contains(names, "."):
			err = fmt.Errorf("it must not hold \".\" and \"..\"")
		}
		if err != nil {
			return fmt.Errorf("pattern %q of what is left out: %w", p, err)
		}
	}
	return nil
}

// anchored makes the patterns restic's, which are of absolute paths: volume.json
// is beside the volume, and nobody means it.
func anchored(dir string, patterns []string) []string {
	var all []string
	for _, p := range patterns {
		bare, taken := strings.CutPrefix(p, "!")
		if bare = dir + "/" + strings.TrimPrefix("**/"+bare, "**//"); taken {
			bare = "!" + bare
		}
		all = append(all, bare)
	}
	return all
}
