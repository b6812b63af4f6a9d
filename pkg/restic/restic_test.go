package restic

import "testing"

// TestPercent: nothing is said to be done before it is.
func TestPercent(t *testing.T) {
	for _, c := range []struct {
		p    Progress
		want int
	}{
		{Progress{}, 0},
		{Progress{FilesDone: 1, FilesTotal: 2}, 0},
		{Progress{BytesDone: 999, BytesTotal: 1000, FilesDone: 2, FilesTotal: 2}, 99},
		{Progress{BytesDone: 1000, BytesTotal: 1000, FilesDone: 1, FilesTotal: 2}, 99}, // empty files come last
		{Progress{BytesDone: 1 << 62, BytesTotal: 1 << 62, FilesDone: 2, FilesTotal: 2}, 100},
		{Progress{BytesDone: 1500, BytesTotal: 1000}, 100}, // files grow meanwhile
	} {
		if got := c.p.Percent(); got != c.want {
			t.Errorf("%+v: %d %%, want %d", c.p, got, c.want)
		}
	}
}
