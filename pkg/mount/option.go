//go:build linux

package mount

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/nearest"
)

// vfs holds the options that the kernel keeps per mount, whatever is mounted:
// in the words of mount_setattr(2), and in those of mount(2).
var vfs = map[string]struct {
	set, clear uint64
	flag       uintptr
}{
	"ro":         {set: unix.MOUNT_ATTR_RDONLY, flag: unix.MS_RDONLY},
	"rw":         {},
	"nosuid":     {set: unix.MOUNT_ATTR_NOSUID, flag: unix.MS_NOSUID},
	"nodev":      {set: unix.MOUNT_ATTR_NODEV, flag: unix.MS_NODEV},
	"noexec":     {set: unix.MOUNT_ATTR_NOEXEC, flag: unix.MS_NOEXEC},
	"noatime":    {set: unix.MOUNT_ATTR_NOATIME, clear: unix.MOUNT_ATTR__ATIME, flag: unix.MS_NOATIME},
	"relatime":   {set: unix.MOUNT_ATTR_RELATIME, clear: unix.MOUNT_ATTR__ATIME, flag: unix.MS_RELATIME},
	"nodiratime": {set: unix.MOUNT_ATTR_NODIRATIME, flag: unix.MS_NODIRATIME},
}

// options are how something is mounted.
type options struct {
	vfs []string // what mountinfo must show of the mount, sorted
	fs  []string // what the file system is told, in the protocol's words
	// immutable says that nothing below changes, so that all may be cached.
	immutable bool
}

// A grammar is the options that a protocol knows besides those of vfs.
type grammar struct {
	known  []string          // each name; with "=" behind it when it has a value
	prefix string            // of further names with a value, if not empty
	same   map[string]string // other names; those of "" mean nothing to us
	apart  [][]string        // of each list, one name at most may be given
	secret map[string]string // what must not be given, and what to do instead
}

// wish puts together what the caller, the storage system and the user ask for:
// always one of ro and rw; with ro, noatime, as field-guide D.4 wants it.
func wish(g grammar, readOnly bool, src Source, flags []string) (options, error) {
	none := func(format string, arg ...any) (options, error) {
		return options{}, fmt.Errorf("mount option "+format+": %w", append(arg, ErrInvalid)...)
	}
	asked, fs := map[string]string{}, []string(nil)
	if readOnly {
		asked["ro"] = "ro"
	}
	immutable := readOnly && src.Path != ""
	for i, word := range slices.Concat(src.Options, flags) {
		if i < len(src.Options) && word == Immutable {
			immutable = true
			continue
		}
		name, value, valued := strings.Cut(word, "=")
		if why, ok := g.secret[name]; ok {
			return none("%q cannot be used: %s", name, why)
		}
		if other, ok := g.same[name]; ok {
			if other == "" {
				continue
			}
			name, word = other, strings.Replace(word, name, other, 1)
		}
		_, ofMount := vfs[name]
		further := g.prefix != "" && strings.HasPrefix(name, g.prefix)
		switch wantsValue := slices.Contains(g.known, name+"=") || further; {
		case !ofMount && !wantsValue && !slices.Contains(g.known, name):
			known := slices.Collect(maps.Keys(vfs))
			for _, k := range g.known {
				known = append(known, strings.TrimSuffix(k, "="))
			}
			return none("%q is not known%s", word, nearest.Hint(name, known))
		case valued != wantsValue:
			return none("%q: %s has %s", word, name, map[bool]string{true: "a value", false: "no value"}[wantsValue])
		case wantsValue && (value == "" || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r == ',' || r == '\x7f' })):
			return none("%q: the value is empty, or holds a comma or a space", word)
		}
		if before, ok := asked[name]; ok && before != word {
			return none("%s and %s contradict each other", before, word)
		} else if ok {
			continue
		}
		asked[name] = word
		if !ofMount {
			fs = append(fs, word)
		}
	}
	for name := range asked {
		if other, ok := asked["no"+name]; ok {
			return none("%s and %s contradict each other", asked[name], other)
		}
	}
	for _, list := range append([][]string{{"ro", "rw"}, {"noatime", "relatime"}}, g.apart...) {
		var given []string
		for _, name := range list {
			if word, ok := asked[name]; ok {
				given = append(given, word)
			}
		}
		if len(given) > 1 {
			return none("%s contradict each other", strings.Join(given, " and "))
		}
	}
	if _, ro := asked["ro"]; !ro {
		if immutable {
			return options{}, fmt.Errorf("what is to be mounted cannot be changed, and must be mounted read-only: %w", ErrInvalid)
		}
		asked["rw"] = "rw"
	} else if _, ok := asked["relatime"]; !ok {
		asked["noatime"] = "noatime"
	}
	o := options{fs: fs, immutable: immutable}
	for name := range vfs {
		if _, ok := asked[name]; ok {
			o.vfs = append(o.vfs, name)
		}
	}
	slices.Sort(o.vfs)
	return o, nil
}

// usual adds an option of the file system unless it, or one of those that rule
// it out, is there.
func (o *options) usual(word string, unless ...string) {
	name, _, _ := strings.Cut(word, "=")
	for _, other := range append(unless, name) {
		if o.has(other) {
			return
		}
	}
	o.fs = append(o.fs, word)
}

func (o options) has(name string) bool {
	return slices.ContainsFunc(o.fs, func(w string) bool { return w == name || strings.HasPrefix(w, name+"=") })
}

// value returns the value of an option of the file system, "" without it.
func (o options) value(name string) string {
	for _, word := range o.fs {
		if v, ok := strings.CutPrefix(word, name+"="); ok {
			return v
		}
	}
	return ""
}

// basic are the options of the mount that every helper knows.
func (o options) basic() []string {
	return slices.DeleteFunc(slices.Clone(o.vfs), func(name string) bool { return name != "ro" && !slices.Contains(guard, name) })
}

func (o options) readOnly() bool { return slices.Contains(o.vfs, "ro") }

// missing returns the options that are not in effect at e.
func (o options) missing(e *mountinfo.Info) []string {
	return slices.DeleteFunc(slices.Clone(o.vfs), func(name string) bool { return has(e, name) })
}

// attr is the options in the words of mount_setattr(2).
func (o options) attr() *unix.MountAttr {
	a := &unix.MountAttr{}
	for _, name := range o.vfs {
		a.Attr_set |= vfs[name].set
		a.Attr_clr |= vfs[name].clear
	}
	return a
}
