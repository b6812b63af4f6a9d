package local

import (
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// places returns where a share, or a directory in it, is mounted on this node,
// as far as this mount namespace shows.
func (b *Backend) places(id string) ([]string, error) {
	dir, err := filepath.EvalSymlinks(b.dir)
	if err != nil {
		return nil, err
	}
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	// The mount that the backend itself works on: the last of the longest.
	var own *mountinfo.Info
	for _, m := range all {
		if within(dir, m.Mountpoint) && (own == nil || len(m.Mountpoint) >= len(own.Mountpoint)) {
			own = m
		}
	}
	if own == nil {
		return nil, fmt.Errorf("%s lies on no mount of this namespace", dir)
	}
	root := path.Join(own.Root, strings.TrimPrefix(dir, own.Mountpoint), shares.subvolume(id))
	var found []string
	for _, m := range all {
		if m.Major == own.Major && m.Minor == own.Minor && within(m.Root, root) {
			found = append(found, m.Mountpoint)
		}
	}
	return found, nil
}

// within says whether a path is dir or below it.
func within(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}
