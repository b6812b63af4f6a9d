//go:build linux

package mount

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// A table is /proc/self/mountinfo as the kernel walks it: by parent and path.
//
// It is read with moby/sys/mountinfo, which mount-utils itself uses to find
// mount points. mount-utils' own ParseMountInfo splits lines at every Unicode
// space, of which the kernel escapes only three: a directory whose name holds
// U+00A0, bound by a pod's subPath, would shift the fields of its line.
type table struct {
	all   []*mountinfo.Info
	child map[slot]*mountinfo.Info
}

type slot struct {
	parent int
	path   string
}

// outside is the parent of what has no parent in the table.
const outside = -1

func readTable() (*table, error) {
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	return newTable(all), nil
}

func newTable(all []*mountinfo.Info) *table {
	t := &table{all: all, child: make(map[slot]*mountinfo.Info, len(all))}
	ids := make(map[int]bool, len(all))
	for _, e := range all {
		ids[e.ID] = true
	}
	for _, e := range all {
		parent := e.Parent
		if !ids[parent] || parent == e.ID {
			parent = outside
		}
		t.child[slot{parent, e.Mountpoint}] = e
	}
	return t
}

// cover returns the mount that path lies on, nil if there is none. It goes from
// the root down, as the kernel does, so that a mount that another one hides is
// never the answer, whatever the order of the lines.
func (t *table) cover(path string) *mountinfo.Info {
	var top *mountinfo.Info
	parent := outside
	enter := func(point string) {
		for e := t.child[slot{parent, point}]; e != nil; e = t.child[slot{parent, point}] {
			top, parent = e, e.ID
		}
	}
	enter("/")
	for i := 1; i < len(path); i++ {
		if path[i] == '/' {
			enter(path[:i])
		}
	}
	if path != "/" {
		enter(path)
	}
	return top
}

// at returns the topmost mount at path, nil if path is not a mount point.
func (t *table) at(path string) *mountinfo.Info {
	if e := t.cover(path); e != nil && e.Mountpoint == path {
		return e
	}
	return nil
}

// below returns what is mounted below path, path excluded, and can be reached.
func (t *table) below(path string) []*mountinfo.Info {
	var found []*mountinfo.Info
	for _, e := range t.all {
		if within(e.Mountpoint, path) && e.Mountpoint != path && t.at(e.Mountpoint) == e {
			found = append(found, e)
		}
	}
	return found
}

// points returns the mount points at and below path, also those that are
// hidden, each once and the deepest first.
func (t *table) points(path string) []string {
	var found []string
	for _, e := range t.all {
		if within(e.Mountpoint, path) {
			found = append(found, e.Mountpoint)
		}
	}
	slices.SortFunc(found, func(a, b string) int {
		if d := strings.Count(b, "/") - strings.Count(a, "/"); d != 0 {
			return d
		}
		return strings.Compare(b, a)
	})
	return slices.Compact(found)
}

// places returns the mount points of the tree that e shows, each once, ordered.
func (t *table) places(e *mountinfo.Info) []string {
	var found []string
	for _, o := range t.all {
		if o.Major == e.Major && o.Minor == e.Minor && o.Root == e.Root {
			found = append(found, o.Mountpoint)
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// within says whether path is dir or lies below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// rootOf returns where path, which e covers, lies in e's file system.
func rootOf(e *mountinfo.Info, path string) string {
	return filepath.Join(e.Root, strings.TrimPrefix(path, e.Mountpoint))
}

// has says whether the mount has a per-mount option.
func has(e *mountinfo.Info, option string) bool {
	return slices.Contains(strings.Split(e.Options, ","), option)
}
