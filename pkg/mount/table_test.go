//go:build linux

package mount

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
)

const sample = `1 1 0:2 / / rw - rootfs rootfs rw
20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
21 20 0:5 / /proc rw - proc proc rw
30 20 0:30 /shares/one /data ro,noatime - btrfs /dev/sdb rw,subvol=/shares/one
31 30 0:31 / /data/sub rw - tmpfs none rw
32 30 0:32 / /data rw - tmpfs second rw
33 32 0:33 / /data/sub ro - tmpfs visible rw
34 20 0:34 /a\040b\011c\012d\134e /with\040space rw - ext4 /dev/sdc rw
35 20 0:35 / /database rw - tmpfs none rw
40 20 0:40 / /gone/deep rw - tmpfs hidden rw
41 20 0:41 / /gone rw - tmpfs over rw
`

func TestTable(t *testing.T) {
	all, err := mountinfo.GetMountsFromReader(strings.NewReader(sample), nil)
	must(t, err)
	for range 20 { // the order of the lines means nothing
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		tab := newTable(slices.Clone(all))
		for path, want := range map[string]int{
			"/": 20, "/x": 20, "/proc": 21, "/proc/1": 21,
			"/data": 32, "/data/x": 32, "/data/sub": 33, "/data/sub/x/y": 33, "/dat": 20, "/database": 35,
			"/with space": 34, "/with space/x": 34, "/gone": 41, "/gone/deep": 41,
		} {
			if got := tab.cover(path); got == nil || got.ID != want {
				t.Errorf("cover(%q) = %+v, want %d", path, got, want)
			}
		}
		for path, want := range map[string]int{"/data": 32, "/data/sub": 33, "/data/x": 0, "/gone": 41, "/gone/deep": 0} {
			if got := tab.at(path); got == nil && want != 0 || got != nil && got.ID != want {
				t.Errorf("at(%q) = %+v, want %d", path, got, want)
			}
		}
		if got := tab.below("/data"); len(got) != 1 || got[0].ID != 33 {
			t.Errorf("below = %+v", got)
		}
		if got := tab.below("/gone"); len(got) != 0 {
			t.Errorf("below = %+v", got)
		}
		if got, want := tab.points("/data"), []string{"/data/sub", "/data"}; !slices.Equal(got, want) {
			t.Errorf("points = %q, want %q", got, want)
		}
		if got, want := tab.points("/gone"), []string{"/gone/deep", "/gone"}; !slices.Equal(got, want) {
			t.Errorf("points = %q, want %q", got, want)
		}
		if e := tab.at("/with space"); rootOf(e, "/with space/x") != "/a b\tc\nd\\e/x" {
			t.Errorf("root = %q", rootOf(e, "/with space/x"))
		}
	}
}
