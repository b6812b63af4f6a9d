package schedule

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/nearest"
)

// All, as a number of a Rule, keeps without limit.
const All = -1

// maxNumber bounds every number of a rule. It is far beyond what a schedule can
// make, so a larger one is a slip; who wants all of them says so.
const maxNumber = 100_000

// A State says what has become of a snapshot.
type State string

// The states of a snapshot. Ready and partial ones can be restored from, but what a
// partial one lacks is in none but an older or a later one.
const (
	Pending State = "pending"
	Ready   State = "ready"
	Partial State = "partial"
	Failed  State = "failed"
)

// good says that a snapshot can be restored from.
func (s State) good() bool { return s == Ready || s == Partial }

// Item is a snapshot as retention sees it.
type Item struct {
	Name string `json:"name"`
	// Time is the scheduled time of the run that made it, not the time at which
	// it came to be: what a daily run made late at night counts for its day.
	Time  time.Time `json:"time"`
	State State     `json:"state"`
}

// Choice is an Item, and why it is kept or dropped.
type Choice struct {
	Item
	Reasons []string `json:"reasons"`
	// Error says why an item that was to be dropped is still there.
	Error string `json:"error,omitempty"`
}

// Rule says which snapshots are kept: those that one of its parts keeps. A
// number is how many hours, days and so on, All for each of them, 0 for none.
//
// The meaning is that of `restic forget --keep-…` (restic 0.19, "Removing
// snapshots according to a policy" in doc/060_forget.rst):
//
//   - Of each hour, day, ISO week, month and year that has snapshots, the newest
//     is kept, beginning with the newest one. Times without any do not count,
//     so a pause in the schedule costs no history.
//   - While a part has not kept as many as it may, it also keeps the oldest one,
//     so that the history is as long as can be from the beginning.
//   - Within is counted back from the newest snapshot that is not in the future,
//     not from now: a schedule that stands still loses nothing.
//
// It differs where restic's result would surprise: an hour that the clock goes
// through twice, at the end of daylight-saving time, is two hours; and a month
// before 31 March is the last day of February, not 3 March.
type Rule struct {
	Last, Hourly, Daily, Weekly, Monthly, Yearly int
	Within                                       Span
}

// bucket stands for an hour, a day and so on: snapshots in one are alike.
type bucket [5]int

// parts are the parts of a rule that count, in the order in which they are
// printed. The bucket is of a time in the rule's zone, nr the position from the
// newest good one on.
var parts = []struct {
	key, word string
	number    func(*Rule) *int
	bucket    func(t time.Time, nr int) bucket
}{
	{"keep-last", "last", func(r *Rule) *int { return &r.Last }, func(_ time.Time, nr int) bucket { return bucket{nr} }},
	{"keep-hourly", "hourly", func(r *Rule) *int { return &r.Hourly }, func(t time.Time, _ int) bucket {
		_, offset := t.Zone()
		return bucket{t.Year(), int(t.Month()), t.Day(), t.Hour(), offset}
	}},
	{"keep-daily", "daily", func(r *Rule) *int { return &r.Daily }, func(t time.Time, _ int) bucket {
		return bucket{t.Year(), int(t.Month()), t.Day()}
	}},
	{"keep-weekly", "weekly", func(r *Rule) *int { return &r.Weekly }, func(t time.Time, _ int) bucket {
		year, week := t.ISOWeek()
		return bucket{year, week}
	}},
	{"keep-monthly", "monthly", func(r *Rule) *int { return &r.Monthly }, func(t time.Time, _ int) bucket {
		return bucket{t.Year(), int(t.Month())}
	}},
	{"keep-yearly", "yearly", func(r *Rule) *int { return &r.Yearly }, func(t time.Time, _ int) bucket {
		return bucket{t.Year()}
	}},
}

const withinKey = "keep-within"

// ruleKeys are the keys that ParseRule knows.
func ruleKeys() []string {
	keys := make([]string, 0, len(parts)+1)
	for _, p := range parts {
		keys = append(keys, p.key)
	}
	return append(keys, withinKey)
}

// ParseRule reads a rule such as "keep-daily=7,keep-weekly=5,keep-within=7d".
// A rule that keeps nothing is an error, and so is an unknown key.
func ParseRule(text string) (Rule, error) {
	var r Rule
	err := eachSetting(text, ruleKeys(), r.set)
	if err == nil {
		err = r.Validate()
	}
	if err != nil {
		return Rule{}, fmt.Errorf("retention %q: %w", text, err)
	}
	return r, nil
}

// eachSetting calls set for each key=value of a comma-separated list. Unknown
// and repeated keys are errors.
func eachSetting(text string, known []string, set func(key, value string) error) error {
	var seen []string
	for setting := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(setting, "=")
		switch {
		case !slices.Contains(known, key):
			return fmt.Errorf("unknown key %q%s", key, nearest.Hint(key, known))
		case !ok || value == "":
			return fmt.Errorf("%s has no value", key)
		case slices.Contains(seen, key):
			return fmt.Errorf("%s is given twice", key)
		}
		seen = append(seen, key)
		if err := set(key, value); err != nil {
			return fmt.Errorf("%s=%s: %w", key, value, err)
		}
	}
	return nil
}

func (r *Rule) set(key, value string) (err error) {
	if key == withinKey {
		r.Within, err = ParseSpan(value)
		return err
	}
	for _, p := range parts {
		if p.key == key {
			*p.number(r), err = parseNumber(value)
		}
	}
	return err
}

// parseNumber takes "unlimited" and -1 for All; restic's flags take the word,
// its policies keep the number.
func parseNumber(value string) (int, error) {
	if value == "unlimited" || value == "-1" {
		return All, nil
	}
	n, err := strconv.ParseUint(value, 10, 63)
	switch {
	case errors.Is(err, strconv.ErrRange) || n > maxNumber:
		return 0, fmt.Errorf("more than %d; to keep all, write unlimited", maxNumber)
	case err != nil:
		return 0, errors.New("not a number; it is 1 or more, or unlimited")
	case n == 0:
		return 0, errors.New("keeps nothing; leave it out")
	}
	return int(n), nil
}

// Validate refuses a rule that keeps nothing, and numbers that mean nothing.
func (r Rule) Validate() error {
	nothing := r.Within == Span{}
	for _, p := range parts {
		n := *p.number(&r)
		if n < All || n > maxNumber {
			return fmt.Errorf("%s=%d: not in 1 to %d, or unlimited", p.key, n, maxNumber)
		}
		nothing = nothing && n == 0
	}
	if nothing {
		return fmt.Errorf("no rule says what is kept; give one of %s (keep-last=unlimited drops nothing)", strings.Join(ruleKeys(), ", "))
	}
	return r.Within.validate()
}

// String returns the rule as ParseRule reads it.
func (r Rule) String() string {
	var settings []string
	for _, p := range parts {
		switch n := *p.number(&r); n {
		case 0:
		case All:
			settings = append(settings, p.key+"=unlimited")
		default:
			settings = append(settings, p.key+"="+strconv.Itoa(n))
		}
	}
	if r.Within != (Span{}) {
		settings = append(settings, withinKey+"="+r.Within.String())
	}
	return strings.Join(settings, ",")
}

// Keep divides the items, newest first, into what is kept and what is dropped.
// Hours, days and so on are those of loc, or of UTC if it is nil.
//
// Only good (ready or partial) ones count and are chosen by the rule. The newest
// good one is kept whatever the rule says, and so is the newest one that is not
// partial. A pending one is kept. A failed one is kept until there is a newer good
// one. Dropping some or all of what is to be
// dropped does not change what is kept.
func (r Rule) Keep(items []Item, now time.Time, loc *time.Location) (keep, drop []Choice) {
	if loc == nil {
		loc = time.UTC
	}
	choices := make([]Choice, 0, len(items))
	for _, item := range items {
		choices = append(choices, Choice{Item: item})
	}
	slices.SortStableFunc(choices, newestFirst)
	var good []*Choice
	for i := range choices {
		if choices[i].State.good() {
			good = append(good, &choices[i])
		}
	}
	r.choose(good, now, loc)
	for _, c := range choices {
		switch {
		case c.State == Pending:
			c.Reasons = []string{"not ready yet"}
		case c.State.good():
		case len(good) > 0 && c.Time.Before(good[0].Time):
			c.Reasons = []string{"failed, and there is a newer good one"}
			drop = append(drop, c)
			continue
		default:
			c.Reasons = []string{"failed, and there is no newer good one"}
		}
		if len(c.Reasons) == 0 {
			c.Reasons = []string{"no rule keeps it"}
			drop = append(drop, c)
			continue
		}
		keep = append(keep, c)
	}
	return keep, drop
}

func newestFirst(a, b Choice) int {
	return cmp.Or(b.Time.Compare(a.Time), cmp.Compare(b.Name, a.Name))
}

// choose writes into the good ones, which are sorted newest first, for what
// reasons they are kept.
func (r Rule) choose(good []*Choice, now time.Time, loc *time.Location) {
	if len(good) == 0 {
		return
	}
	for _, p := range parts {
		left := *p.number(&r)
		// A set, not the bucket before: where clocks go back at a minute past
		// midnight, yesterday comes twice (America/St_Johns until 2011).
		seen := map[bucket]bool{}
		for nr, c := range good {
			if left == 0 {
				break
			}
			b := p.bucket(c.Time.In(loc), nr)
			switch {
			case !seen[b]:
				c.Reasons = append(c.Reasons, p.word)
			case nr == len(good)-1:
				c.Reasons = append(c.Reasons, p.word+", as the oldest")
			default:
				continue
			}
			seen[b] = true
			if left > 0 {
				left--
			}
		}
	}
	if r.Within != (Span{}) {
		from := now
		if i := slices.IndexFunc(good, func(c *Choice) bool { return !c.Time.After(now) }); i >= 0 {
			from = good[i].Time
		}
		from = r.Within.before(from.In(loc))
		for _, c := range good {
			if c.Time.After(from) {
				c.Reasons = append(c.Reasons, "within "+r.Within.String())
			}
		}
	}
	if len(good[0].Reasons) == 0 {
		good[0].Reasons = []string{"the newest good one"}
	}
	if i := slices.IndexFunc(good, func(c *Choice) bool { return c.State == Ready }); i >= 0 && len(good[i].Reasons) == 0 {
		good[i].Reasons = []string{"the newest complete one"}
	}
}

// Span is a length of time by the calendar, written as restic does:
// 2y5m7d3h. The letter m is for months; there are no minutes, and no weeks.
type Span struct {
	Years, Months, Days, Hours int
}

func (s *Span) units() []struct {
	letter byte
	number *int
} {
	return []struct {
		letter byte
		number *int
	}{{'y', &s.Years}, {'m', &s.Months}, {'d', &s.Days}, {'h', &s.Hours}}
}

// ParseSpan reads a span, which is not zero and has each unit once at most.
func ParseSpan(text string) (Span, error) {
	var s Span
	seen := ""
	for rest := text; rest != ""; {
		i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
		if i <= 0 {
			return Span{}, errors.New("not a length of time; it is written like 1y6m, 7d or 36h")
		}
		letter := rest[i]
		n, err := strconv.Atoi(rest[:i])
		if err != nil || n > maxNumber {
			return Span{}, fmt.Errorf("more than %d%c; to keep all, write keep-last=unlimited", maxNumber, letter)
		}
		known := false
		for _, u := range s.units() {
			if u.letter == letter {
				known, *u.number = true, n
			}
		}
		if !known {
			return Span{}, fmt.Errorf("unknown unit %q; there are y (years), m (months), d (days) and h (hours)", rest[i:i+1])
		}
		if strings.IndexByte(seen, letter) >= 0 {
			return Span{}, fmt.Errorf("unit %c is given twice", letter)
		}
		seen += string(letter)
		rest = rest[i+1:]
	}
	if s == (Span{}) {
		return Span{}, errors.New("keeps nothing; leave it out")
	}
	return s, nil
}

// String returns the span as ParseSpan reads it.
func (s Span) String() string {
	var b strings.Builder
	for _, u := range s.units() {
		if *u.number != 0 {
			fmt.Fprintf(&b, "%d%c", *u.number, u.letter)
		}
	}
	return b.String()
}

func (s Span) validate() error {
	for _, u := range s.units() {
		if *u.number < 0 || *u.number > maxNumber {
			return fmt.Errorf("%s=%s: not in 0 to %d%c", withinKey, s, maxNumber, u.letter)
		}
	}
	return nil
}

// before returns the time that is the span before t, by the clocks of t's zone:
// a day before noon is noon, also where the day had 23 hours.
func (s Span) before(t time.Time) time.Time {
	year, month, day := t.Date()
	first := time.Date(year-s.Years, month-time.Month(s.Months), 1, 0, 0, 0, 0, time.UTC)
	day = min(day, first.AddDate(0, 1, -1).Day())
	t = time.Date(first.Year(), first.Month(), day-s.Days, t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), t.Location())
	return t.Add(-time.Duration(s.Hours) * time.Hour)
}
