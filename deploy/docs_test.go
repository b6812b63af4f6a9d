package deploy

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestLinks: what the documents link to is there, the heading too.
func TestLinks(t *testing.T) {
	link, heading := regexp.MustCompile(`\]\(([^)\s]+)\)`), regexp.MustCompile(`(?m)^#+ (.*)$`)
	fence, dropped := regexp.MustCompile("(?ms)^```.*?^```"), regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
	prose := func(file string) string { return fence.ReplaceAllString(read(t, file), "") }
	links := 0
	err := filepath.WalkDir("..", func(file string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || filepath.Ext(file) != ".md" {
			return err
		}
		for _, m := range link.FindAllStringSubmatch(prose(file), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			links++
			path, anchor, _ := strings.Cut(m[1], "#")
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			found := anchor == ""
			if !found {
				// As GitHub makes them.
				for _, h := range heading.FindAllStringSubmatch(prose(target), -1) {
					found = found || anchor == strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(h[1]), ""), " ", "-")
				}
			}
			if !found {
				t.Errorf("%s: %s has no heading for #%s", file, target, anchor)
			}
		}
		return nil
	})
	if err != nil || links < 50 {
		t.Errorf("%d links, %v", links, err)
	}
}
