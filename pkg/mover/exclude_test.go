package mover

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/abaca-csi/abaca/test/programs"
)

// TestExclude asks the real restic what is left out.
func TestExclude(t *testing.T) {
	s := newSite(t)
	dir := t.TempDir()
	sh(t, `cd "$1"; mkdir -p a/deep cache/sub keep; touch x.tmp a/y.tmp a/deep/z.tmp a/file cache/sub/f keep/cache keep/me.json volume.json "we ird"`, dir)
	all := []string{"a", "a/deep", "a/deep/z.tmp", "a/file", "a/y.tmp", "cache", "cache/sub", "cache/sub/f", "keep", "keep/cache", "keep/me.json", "volume.json", "we ird", "x.tmp"}
	for i, test := range []struct {
		patterns []string
		out      []string // what is not in the backup
	}{
		{nil, nil},
		{[]string{"*.tmp"}, []string{"a/deep/z.tmp", "a/y.tmp", "x.tmp"}},
		{[]string{"/*.tmp"}, []string{"x.tmp"}},
		{[]string{"/cache"}, []string{"cache", "cache/sub", "cache/sub/f"}},
		{[]string{"cache"}, []string{"cache", "cache/sub", "cache/sub/f", "keep/cache"}},
		{[]string{"a/*.tmp"}, []string{"a/y.tmp"}},
		{[]string{"/a/**/*.tmp"}, []string{"a/deep/z.tmp", "a/y.tmp"}},
		{[]string{"*.json"}, []string{"keep/me.json", "volume.json"}},
		{[]string{"*.tmp", "!/a/y.tmp"}, []string{"a/deep/z.tmp", "x.tmp"}},
		{[]string{"/*", "!/keep"}, []string{"a", "a/deep", "a/deep/z.tmp", "a/file", "a/y.tmp", "cache", "cache/sub", "cache/sub/f", "volume.json", "we ird", "x.tmp"}},
		{[]string{"we ird"}, []string{"we ird"}},
		{[]string{"--no-such-option"}, nil},
	} {
		saved := s.backup(fmt.Sprint("saved-", i), dir, func(task *Task) { task.Backup.Exclude = test.patterns })
		if saved.Error != "" {
			t.Fatalf("%q: %s", test.patterns, saved.Error)
		}
		out := sh(t, `RESTIC_PASSWORD=geheim "$1" --no-cache -r "$2" ls --json "$3"`, programs.Restic(t), s.repo, saved.Snapshot)
		var left []string
		for _, path := range all {
			if !strings.Contains(out, `"path":"/data/`+path+`"`) {
				left = append(left, path)
			}
		}
		if !slices.Equal(left, test.out) || !strings.Contains(out, `"path":"/volume.json"`) {
			t.Errorf("%q leaves out %q, want %q and not the description", test.patterns, left, test.out)
		}
	}
}

// TestCheckExclude: what restic would refuse, or mean otherwise, is told before.
func TestCheckExclude(t *testing.T) {
	for pattern, words := range map[string]string{
		"": "itself", "/": "itself", "!": "itself", "//": "itself", "a/[": "syntax", "../etc": "..", "a/./b": ".", "a\nb": "control",
		strings.Repeat("a", 501): "500",
	} {
		if err := CheckExclude([]string{"fine", pattern}); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%q: %v, want %q", pattern, err, words)
		}
	}
	if err := CheckExclude(make([]string, 101)); err == nil || !strings.Contains(err.Error(), "101") {
		t.Error(err)
	}
	if err := CheckExclude([]string{"*.tmp", "!/a b/**", "..x", "/x/", "[a-z]?"}); err != nil {
		t.Error(err)
	}
}
