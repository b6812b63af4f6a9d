//go:build linux

package mount

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// vfs holds the options that the kernel keeps per mount, whatever is mounted.
var vfs = map[string]struct{ set, clear uint64 }{
	"ro":         {set: unix.MOUNT_ATTR_RDONLY},
	"rw":         {},
	"nosuid":     {set: unix.MOUNT_ATTR_NOSUID},
	"nodev":      {set: unix.MOUNT_ATTR_NODEV},
	"noexec":     {set: unix.MOUNT_ATTR_NOEXEC},
	"noatime":    {set: unix.MOUNT_ATTR_NOATIME, clear: unix.MOUNT_ATTR__ATIME},
	"relatime":   {set: unix.MOUNT_ATTR_RELATIME, clear: unix.MOUNT_ATTR__ATIME},
	"nodiratime": {set: unix.MOUNT_ATTR_NODIRATIME},
}

// options are what mountinfo must show of a mount, sorted.
type options []string

// wish puts together what the caller, the storage system and the user ask for:
// always one of ro and rw; with ro, noatime, as field-guide D.4 wants it.
func wish(readOnly bool, lists ...[]string) (options, error) {
	asked := map[string]bool{}
	if readOnly {
		asked["ro"] = true
	}
	for _, o := range slices.Concat(lists...) {
		if _, ok := vfs[o]; !ok {
			known := slices.Sorted(maps.Keys(vfs))
			return nil, fmt.Errorf("mount option %q is not known, these are: %s: %w", o, strings.Join(known, ", "), ErrInvalid)
		}
		asked[o] = true
	}
	for _, pair := range [][2]string{{"ro", "rw"}, {"noatime", "relatime"}} {
		if asked[pair[0]] && asked[pair[1]] {
			return nil, fmt.Errorf("mount options %s and %s contradict each other: %w", pair[0], pair[1], ErrInvalid)
		}
	}
	if !asked["ro"] {
		asked["rw"] = true
	} else if !asked["relatime"] {
		asked["noatime"] = true
	}
	return slices.Sorted(maps.Keys(asked)), nil
}

func (o options) readOnly() bool { return slices.Contains(o, "ro") }

// missing returns the options that are not in effect at e.
func (o options) missing(e *mountinfo.Info) []string {
	return slices.DeleteFunc(slices.Clone(o), func(name string) bool { return has(e, name) })
}

// attr is the options in the words of mount_setattr(2).
func (o options) attr() *unix.MountAttr {
	a := &unix.MountAttr{}
	for _, name := range o {
		a.Attr_set |= vfs[name].set
		a.Attr_clr |= vfs[name].clear
	}
	return a
}
