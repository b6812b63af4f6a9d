package maintain

import (
	"encoding/json"
	"math/rand"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const day = 24 * time.Hour

// A block is the packs that restic takes for its subset, and no others.
func TestSubset(t *testing.T) {
	for size := 1; size <= parts; size *= 2 {
		for first := 0; first < parts; first += size {
			n, of := block{first, size}.subset()
			if n < 1 || n > of || of > 256 {
				t.Fatalf("block %d+%d: %d/%d", first, size, n, of)
			}
			c := &coverage{}
			c.read(block{first, size}, time.Unix(1, 0))
			for b := range 256 {
				reversed := 0
				for bit := range 8 {
					reversed |= b >> bit & 1 << (7 - bit)
				}
				if restics := b%of == n-1; restics != !c[reversed].IsZero() {
					t.Fatalf("block %d+%d, %d/%d, byte %d: restic reads it: %v", first, size, n, of, b, restics)
				}
			}
		}
	}
}

// checks plays runs at the given distances, and returns how many parts were read
// and in how many pieces. After each run no part may be older than the period;
// steady says that none may get as old before the next one either.
func checks(t *testing.T, period time.Duration, gaps []time.Duration, steady bool) (read, pieces int) {
	t.Helper()
	now := time.Date(2026, 1, 1, 3, 0, 0, 0, time.UTC)
	began, interval := now, firstInterval
	c := newCoverage(now, period)
	for i, gap := range append([]time.Duration{0}, gaps...) {
		last := now
		if now = now.Add(gap); i > 0 {
			interval = now.Sub(last)
		}
		if steady && i > 1 && now.Sub(c.oldest()) > period {
			t.Fatalf("period %s, run %d after %s: a part is %s old", period, i, gap, now.Sub(c.oldest()))
		}
		blocks := c.due(now, period, min(interval, period))
		if len(blocks) > maxBlocks {
			t.Fatalf("%d pieces", len(blocks))
		}
		for _, b := range blocks {
			if b.first%b.size != 0 || b.first+b.size > parts || b.size&(b.size-1) != 0 {
				t.Fatalf("block %+v", b)
			}
			c.read(b, now)
			read += b.size
			pieces++
		}
		if age := now.Sub(c.oldest()); age > period {
			t.Fatalf("period %s, run %d after %s: a part was not read for %s", period, i, gap, age)
		}
		// Really read, and not only taken for read at first.
		if now.Sub(began) >= period && c.oldest().Before(began) {
			t.Fatalf("period %s, run %d: not everything was read in the first %s", period, i, now.Sub(began))
		}
	}
	return read, pieces
}

// Whenever runs come, however many are missed: when one has ended, every byte was
// read within the period.
func TestEveryByteIsReadInTime(t *testing.T) {
	random := rand.New(rand.NewSource(1))
	for range 600 {
		period := time.Duration(1+random.Intn(90)) * day
		gaps := make([]time.Duration, 60)
		usual := time.Duration(1+random.Intn(10*24)) * time.Hour
		for i := range gaps {
			switch gaps[i] = usual; random.Intn(4) {
			case 0: // missed ones
				gaps[i] *= time.Duration(1 + random.Intn(5))
			case 1: // by hand, between
				gaps[i] = time.Duration(random.Int63n(int64(usual)))
			case 2: // a little late or early
				gaps[i] += time.Duration(random.Int63n(int64(time.Hour))) - 30*time.Minute
			}
		}
		checks(t, period, gaps, false)
	}
}

// With regular runs no byte is ever older than the period, little more is read
// than has to be, and a run reads one piece.
func TestRegularRuns(t *testing.T) {
	random := rand.New(rand.NewSource(2))
	for _, test := range []struct{ period, every time.Duration }{
		{30 * day, day}, {28 * day, 7 * day}, {30 * day, 7 * day}, {7 * day, day}, {90 * day, day}, {365 * day, day},
		{30 * day, 6 * time.Hour}, {2 * day, day}, {14 * day, 12 * time.Hour}, {60 * day, 14 * day},
	} {
		runs := int(8 * test.period / test.every)
		gaps := make([]time.Duration, runs)
		for i := range gaps {
			gaps[i] = test.every
			if i > 0 { // the Job starts within a minute
				gaps[i] += time.Duration(random.Intn(60))*time.Second - 30*time.Second
			}
		}
		read, pieces := checks(t, test.period, gaps, true)
		// A run that is due a little before its period is over is a whole interval early.
		needed := float64(parts) * float64(runs) * float64(test.every) / float64(test.period)
		times, perRun := float64(read)/needed, float64(pieces)/float64(runs)
		t.Logf("all in %s, a run every %s: %.2f times what is needed, %.2f pieces a run", test.period, test.every, times, perRun)
		early := float64(test.period) / float64(test.period-test.every-test.every/8)
		if times > early*1.25 || perRun > 1.3 {
			t.Errorf("all in %s, a run every %s: %.2f times what is needed (at most %.2f), %.2f pieces a run", test.period, test.every, times, early*1.25, perRun)
		}
	}
}

func TestCoverageIsKept(t *testing.T) {
	now := time.Date(2026, 1, 1, 3, 0, 0, 0, time.UTC)
	c := newCoverage(now, 30*day)
	c.read(block{32, 32}, now)
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	again := &coverage{}
	if err := json.Unmarshal(text, again); err != nil {
		t.Fatal(err)
	}
	for i := range c {
		c[i] = c[i].Truncate(time.Second)
	}
	if diff := cmp.Diff(c[:], again[:]); diff != "" {
		t.Error(diff)
	}
	const when = " 2026-01-01T00:00:00Z"
	for _, bad := range []string{`{}`, `[]`, `["255` + when + `"]`, `["257` + when + `"]`, `["-1` + when + `","257` + when + `"]`, `["256"]`, `["256 now"]`, `["256x` + when + `"]`} {
		if err := json.Unmarshal([]byte(bad), &coverage{}); err == nil {
			t.Errorf("%s is a coverage", bad)
		}
	}
}
