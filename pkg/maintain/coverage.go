package maintain

import (
	"encoding/json"
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

// parts is how finely restic tells packs apart: by the first byte of their ids,
// which is as good as random.
const parts = 256

// maxBlocks is how many pieces are read in one run before larger ones are taken:
// for each of them restic verifies the structure anew.
const maxBlocks = 4

// coverage is when each part of a repository was last read, part i being the
// packs whose first byte is i with its bits reversed. In this order any aligned
// block of 2^m parts is one of restic's subsets n/t, so what is read together is
// neighbours, however much it is.
//
// A part that was never read has the time at which it would have been, had all of
// this always gone on: what there is at first is read little by little too.
type coverage [parts]time.Time

// block is 2^m parts from an aligned one on.
type block struct{ first, size int }

// subset is the block as restic's --read-data-subset has it: n of t.
func (b block) subset() (n, t int) {
	return int(bits.Reverse8(uint8(b.first))) + 1, parts / b.size
}

// newCoverage is that of a repository whose first check is now.
func newCoverage(now time.Time, period time.Duration) *coverage {
	c := &coverage{}
	for i := range c {
		c[i] = now.Add(-period + period*time.Duration(i)/parts)
	}
	return c
}

// due returns what must be read now, so that all is read within each period if
// the next run comes after interval, or an eighth of it later. What a missed run
// has left is due in the next one.
//
// The blocks are as large as an interval's share, or twice as large, and are due
// together ever after: most runs read one of them, and some none.
func (c *coverage) due(now time.Time, period, interval time.Duration) []block {
	horizon := now.Add(interval + interval/8 - period)
	unit := 1
	for unit < parts && time.Duration(unit)*period < parts*interval {
		unit *= 2
	}
	for ; ; unit *= 2 {
		if blocks := c.older(horizon, unit); len(blocks) <= maxBlocks {
			return blocks
		}
	}
}

// older returns the units with a part that was last read before horizon, joined
// where they make a larger block.
func (c *coverage) older(horizon time.Time, unit int) (blocks []block) {
	old := func(first, size int) bool { // every unit in it
		for u := first; u < first+size; u += unit {
			any := false
			for i := u; i < u+unit; i++ {
				any = any || c[i].Before(horizon)
			}
			if !any {
				return false
			}
		}
		return true
	}
	for first := 0; first < parts; {
		size := unit
		if !old(first, size) {
			first += size
			continue
		}
		for first%(2*size) == 0 && 2*size <= parts && old(first, 2*size) {
			size *= 2
		}
		blocks = append(blocks, block{first, size})
		first += size
	}
	return blocks
}

// never is when a part was read that has to be read whatever the period.
var never = time.Unix(0, 0).UTC()

// read notes that a block has been read, in a check that began at a time.
func (c *coverage) read(b block, at time.Time) {
	for i := b.first; i < b.first+b.size; i++ {
		c[i] = at
	}
}

// since returns the share of the parts that were last read at or after a time.
func (c *coverage) since(t time.Time) float64 {
	n := 0
	for _, at := range c {
		if !at.Before(t) {
			n++
		}
	}
	return float64(n) / parts
}

// oldest is when the part was read that was read the longest ago.
func (c *coverage) oldest() time.Time {
	oldest := c[0]
	for _, at := range c {
		if at.Before(oldest) {
			oldest = at
		}
	}
	return oldest
}

// MarshalJSON writes stretches of neighbours that were read at the same time, as
// their number and the time.
func (c *coverage) MarshalJSON() ([]byte, error) {
	var all []string
	for i := 0; i < parts; {
		n := 1
		for i+n < parts && c[i+n].Equal(c[i]) {
			n++
		}
		all = append(all, fmt.Sprintf("%d %s", n, c[i].UTC().Format(time.RFC3339)))
		i += n
	}
	return json.Marshal(all)
}

// UnmarshalJSON reads what MarshalJSON has written, and nothing else.
func (c *coverage) UnmarshalJSON(b []byte) error {
	var all []string
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	i := 0
	for _, s := range all {
		number, when, _ := strings.Cut(s, " ")
		n, err := strconv.Atoi(number)
		at, terr := time.Parse(time.RFC3339, when)
		if err != nil || terr != nil || n < 1 || n > parts-i {
			return fmt.Errorf("%q: not a coverage", s)
		}
		for end := i + n; i < end; i++ {
			c[i] = at
		}
	}
	if i != parts {
		return fmt.Errorf("%d parts: not a coverage", i)
	}
	return nil
}
