package schedule

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"

	"github.com/google/go-cmp/cmp"
)

func zone(t *testing.T, name string) *time.Location {
	t.Helper()
	loc, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return loc
}

func rule(t *testing.T, text string) Rule {
	t.Helper()
	r, err := ParseRule(text)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// at reads the times of the tables, which are of a zone; a third word is its
// abbreviation, for the hour that comes twice.
func at(t *testing.T, text string, loc *time.Location) time.Time {
	t.Helper()
	layout := "2006-01-02 15:04"
	if strings.Count(text, " ") == 2 {
		layout += " MST"
	}
	got, err := time.ParseInLocation(layout, text, loc)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestKeep(t *testing.T) {
	tests := []struct {
		name, rule, zone string
		// Each item is a time, with "pending " or "failed " in front of it, and
		// is its own name. Those that are kept, newest first, have reasons.
		items []string
		want  []string
	}{
		{"last", "keep-last=2", "UTC",
			[]string{"2026-04-01 00:00", "2026-04-02 00:00", "2026-04-03 00:00"},
			[]string{"2026-04-03 00:00: last", "2026-04-02 00:00: last"}},
		{"all", "keep-last=unlimited", "UTC",
			[]string{"2026-04-01 00:00", "1999-04-02 00:00"},
			[]string{"2026-04-01 00:00: last", "1999-04-02 00:00: last"}},
		{"the newest of a day, days without any do not count, and the oldest while there is room", "keep-daily=3", "UTC",
			[]string{"2026-04-01 01:00", "2026-04-01 02:00", "2026-04-01 03:00", "2026-04-09 01:00", "2026-04-09 02:00"},
			[]string{"2026-04-09 02:00: daily", "2026-04-01 03:00: daily", "2026-04-01 01:00: daily, as the oldest"}},
		{"no room for the oldest", "keep-daily=2", "UTC",
			[]string{"2026-04-01 01:00", "2026-04-01 02:00", "2026-04-01 03:00", "2026-04-09 01:00", "2026-04-09 02:00"},
			[]string{"2026-04-09 02:00: daily", "2026-04-01 03:00: daily"}},
		{"all days", "keep-daily=-1", "UTC",
			[]string{"2026-04-01 01:00", "2026-04-02 02:00", "2026-04-02 03:00", "2026-04-09 01:00"},
			[]string{"2026-04-09 01:00: daily", "2026-04-02 03:00: daily", "2026-04-01 01:00: daily"}},
		{"days are those of the zone", "keep-daily=2", "America/New_York",
			[]string{"2026-04-01 20:30", "2026-04-01 19:30", "2026-03-31 23:30"}, // 1 April 19:30 is the 1st in UTC too, 20:30 is the 2nd
			[]string{"2026-04-01 20:30: daily", "2026-03-31 23:30: daily"}},
		{"ISO weeks go through the new year", "keep-weekly=2", "UTC",
			// 2024-12-30 (Monday) to 2025-01-05 is week 1 of 2025.
			[]string{"2024-12-29 00:00", "2024-12-30 00:00", "2025-01-01 00:00", "2025-01-05 00:00"},
			[]string{"2025-01-05 00:00: weekly", "2024-12-29 00:00: weekly"}},
		{"week 53", "keep-weekly=3", "UTC",
			[]string{"2026-12-27 00:00", "2026-12-28 00:00", "2027-01-03 00:00", "2027-01-04 00:00"},
			[]string{"2027-01-04 00:00: weekly", "2027-01-03 00:00: weekly", "2026-12-27 00:00: weekly"}},
		{"months and years", "keep-monthly=2,keep-yearly=2", "UTC",
			[]string{"2024-06-01 00:00", "2025-12-30 00:00", "2025-12-31 00:00", "2026-01-01 00:00", "2026-01-02 00:00"},
			[]string{"2026-01-02 00:00: monthly; yearly", "2025-12-31 00:00: monthly; yearly"}},
		{"within is counted from the newest that is not in the future", "keep-within=2d", "UTC",
			[]string{"2026-04-01 00:00", "2026-04-01 00:01", "2026-04-03 00:00", "2031-01-01 00:00"},
			[]string{"2031-01-01 00:00: within 2d", "2026-04-03 00:00: within 2d", "2026-04-01 00:01: within 2d"}},
		{"all in the future", "keep-within=1h", "UTC",
			[]string{"2031-01-01 00:00", "2032-01-01 00:00"},
			[]string{"2032-01-01 00:00: within 1h", "2031-01-01 00:00: within 1h"}},
		{"a month before the 31st of March is the end of February", "keep-within=1m", "UTC",
			[]string{"2026-02-28 00:00", "2026-02-28 00:01", "2026-03-01 00:00", "2026-03-31 00:00"},
			[]string{"2026-03-31 00:00: within 1m", "2026-03-01 00:00: within 1m", "2026-02-28 00:01: within 1m"}},
		{"the hour that comes twice is two hours", "keep-hourly=3", "Europe/Berlin",
			[]string{"2025-10-26 01:30 CEST", "2025-10-26 02:00 CEST", "2025-10-26 02:30 CEST", "2025-10-26 02:00 CET", "2025-10-26 02:30 CET"},
			[]string{"2025-10-26 02:30 CET: hourly", "2025-10-26 02:30 CEST: hourly", "2025-10-26 01:30 CEST: hourly"}},
		{"the day with 25 hours is one day", "keep-daily=1", "Europe/Berlin",
			[]string{"2025-10-25 23:59", "2025-10-26 00:00", "2025-10-26 23:30"},
			[]string{"2025-10-26 23:30: daily"}},
		{"a day before noon is noon, also where it had 23 hours", "keep-within=1d", "Europe/Berlin",
			[]string{"2025-03-29 12:00", "2025-03-29 12:30", "2025-03-30 12:00"},
			[]string{"2025-03-30 12:00: within 1d", "2025-03-29 12:30: within 1d"}},
		{"hours are as long as they are", "keep-within=24h", "Europe/Berlin",
			[]string{"2025-03-29 11:00", "2025-03-29 11:01", "2025-03-30 12:00"},
			[]string{"2025-03-30 12:00: within 24h", "2025-03-29 11:01: within 24h"}},
		{"yesterday that comes twice is one day", "keep-daily=4", "America/St_Johns",
			// On 2010-11-07 at 00:01 the clock went back to 23:01 of the 6th.
			[]string{"2010-11-05 12:00", "2010-11-05 13:00", "2010-11-06 12:00", "2010-11-07 00:00 NDT", "2010-11-06 23:30 NST", "2010-11-08 12:00"},
			[]string{"2010-11-08 12:00: daily", "2010-11-06 23:30 NST: daily", "2010-11-07 00:00 NDT: daily", "2010-11-05 13:00: daily"}},
		{"only good ones count", "keep-last=1", "UTC",
			[]string{"2026-04-01 00:00", "2026-04-02 00:00", "failed 2026-04-03 00:00", "pending 2026-04-04 00:00", "failed 2026-04-01 12:00", "pending 2026-03-01 00:00"},
			[]string{"pending 2026-04-04 00:00: not ready yet", "failed 2026-04-03 00:00: failed, and there is no newer good one", "2026-04-02 00:00: last", "pending 2026-03-01 00:00: not ready yet"}},
		{"partial ones count, and the newest complete one stays", "keep-last=2", "UTC",
			[]string{"2026-04-01 00:00", "2026-04-02 00:00", "partial 2026-04-03 00:00", "partial 2026-04-04 00:00", "partial 2026-04-05 00:00", "failed 2026-04-04 12:00"},
			[]string{"partial 2026-04-05 00:00: last", "partial 2026-04-04 00:00: last", "2026-04-02 00:00: the newest complete one"}},
		{"a partial one is the newest good one", "keep-last=1", "UTC",
			[]string{"partial 2026-04-03 00:00", "partial 2026-04-02 00:00"}, []string{"partial 2026-04-03 00:00: last"}},
		{"nothing is good", "keep-last=1", "UTC",
			[]string{"failed 2026-04-03 00:00", "failed 2026-04-02 00:00"},
			[]string{"failed 2026-04-03 00:00: failed, and there is no newer good one", "failed 2026-04-02 00:00: failed, and there is no newer good one"}},
		{"nothing at all", "keep-last=1", "UTC", nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			loc := zone(t, tt.zone)
			var items []Item
			for _, name := range tt.items {
				item := Item{Name: name, State: Ready}
				text := name
				for _, s := range []State{Pending, Partial, Failed} {
					if rest, ok := strings.CutPrefix(name, string(s)+" "); ok {
						item.State, text = s, rest
					}
				}
				item.Time = at(t, text, loc).UTC()
				items = append(items, item)
			}
			keep, drop := rule(t, tt.rule).Keep(items, at(t, "2027-06-01 00:00", loc), loc)
			var got []string
			for _, c := range keep {
				got = append(got, c.Name+": "+strings.Join(c.Reasons, "; "))
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("kept (-want +got):\n%s", d)
			}
			if len(keep)+len(drop) != len(items) {
				t.Errorf("%d kept and %d dropped of %d", len(keep), len(drop), len(items))
			}
			for _, c := range drop {
				if len(c.Reasons) != 1 {
					t.Errorf("%s is dropped for %q", c.Name, c.Reasons)
				}
			}
		})
	}
}

// The example of docs/schedule.md.
func TestExample(t *testing.T) {
	var items []Item
	for day := time.Date(2026, 1, 1, 3, 0, 0, 0, time.UTC); day.Before(time.Date(2026, 4, 13, 0, 0, 0, 0, time.UTC)); day = day.AddDate(0, 0, 1) {
		items = append(items, Item{day.Format("2 January"), day, Ready})
	}
	keep, _ := rule(t, "keep-daily=3,keep-weekly=3,keep-monthly=3").Keep(items, items[len(items)-1].Time, nil)
	var got []string
	for _, c := range keep {
		got = append(got, c.Name+": "+strings.Join(c.Reasons, ", "))
	}
	want := []string{"12 April: daily, weekly, monthly", "11 April: daily", "10 April: daily", "5 April: weekly", "31 March: monthly", "29 March: weekly", "28 February: monthly"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("kept (-want +got):\n%s", d)
	}
}

// The newest good one stays even for a rule that was never validated.
func TestNewestGoodStays(t *testing.T) {
	day := time.Date(2026, 4, 1, 0, 0, 0, 0, time.UTC)
	items := []Item{{"old", day, Ready}, {"new", day.AddDate(0, 0, 1), Ready}, {"bad", day.AddDate(0, 0, 2), Failed}}
	keep, drop := Rule{}.Keep(items, day, nil)
	if len(keep) != 2 || keep[1].Name != "new" || len(drop) != 1 {
		t.Errorf("kept %v, dropped %v", keep, drop)
	}
}

func TestParseRule(t *testing.T) {
	tests := []struct{ text, want, err string }{
		{"keep-last=24", "keep-last=24", ""},
		{"keep-within=7d,keep-daily=7,keep-weekly=5,keep-monthly=12", "keep-daily=7,keep-weekly=5,keep-monthly=12,keep-within=7d", ""},
		{"keep-yearly=-1,keep-hourly=unlimited", "keep-hourly=unlimited,keep-yearly=unlimited", ""},
		{"keep-within=37h1y6m", "keep-within=1y6m37h", ""},
		{"keep-within=0y3d", "keep-within=3d", ""},
		{"", "", `unknown key ""`},
		{"keep-dayly=7", "", `unknown key "keep-dayly" (did you mean "keep-daily"?)`},
		{"keep-last=1,", "", `unknown key ""`},
		{"keep-last =1", "", `did you mean "keep-last"`},
		{"keep-last", "", "keep-last has no value"},
		{"keep-last=", "", "keep-last has no value"},
		{"keep-last=1,keep-last=2", "", "keep-last is given twice"},
		{"keep-last=0", "", "keeps nothing"},
		{"keep-daily=7,keep-last=0", "", "keeps nothing"},
		{"keep-last=-2", "", "not a number"},
		{"keep-last=+2", "", "not a number"},
		{"keep-last=1.5", "", "not a number"},
		{"keep-last=many", "", "not a number"},
		{"keep-last=100001", "", "to keep all, write unlimited"},
		{"keep-last=99999999999999999999", "", "to keep all, write unlimited"},
		{"keep-within=0d", "", "keeps nothing"},
		{"keep-within=-1d", "", "not a length of time"},
		{"keep-within=7", "", "not a length of time"},
		{"keep-within=d", "", "not a length of time"},
		{"keep-within=unlimited", "", "not a length of time"},
		{"keep-within=1w", "", `unknown unit "w"`},
		{"keep-within=90s", "", `unknown unit "s"`},
		{"keep-within=1é", "", "unknown unit"},
		{"keep-within=1d2d", "", "given twice"},
		{"keep-within=999999999999999999999d", "", "more than"},
		{"keep-within=100001h", "", "more than"},
	}
	for _, tt := range tests {
		r, err := ParseRule(tt.text)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: %v, want %q", tt.text, err, tt.err)
			}
			continue
		}
		if err != nil || r.String() != tt.want {
			t.Errorf("%q: %q, %v, want %q", tt.text, r, err, tt.want)
		}
		if again, err := ParseRule(r.String()); err != nil || again != r {
			t.Errorf("%q is read back as %+v, %v", r, again, err)
		}
	}
	for _, r := range []Rule{{}, {Last: -2}, {Last: 1, Yearly: maxNumber + 1}, {Within: Span{Days: -1}}, {Last: 1, Within: Span{Hours: maxNumber + 1}}} {
		if err := r.Validate(); err == nil {
			t.Errorf("%+v is valid", r)
		}
	}
}

func TestParseTiers(t *testing.T) {
	tiers, err := ParseTiers([]string{"class=abaca-snapshot,keep-last=24", "keep-daily=7,class=abaca-backup,keep-weekly=5"})
	want := []Tier{{"abaca-snapshot", Rule{Last: 24}}, {"abaca-backup", Rule{Daily: 7, Weekly: 5}}}
	if d := cmp.Diff(want, tiers); d != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
	if got := tiers[1].String(); got != "class=abaca-backup,keep-daily=7,keep-weekly=5" {
		t.Errorf("printed as %q", got)
	}
	for _, tt := range []struct {
		err   string
		tiers []string
	}{
		{"no tier", nil},
		{"no rule says what is kept", []string{"class=a"}},
		{"no class", []string{"keep-last=1"}},
		{"no rule", []string{"class=a,keep-last=1", "class=b"}},
		{"two tiers of class a", []string{"class=a,keep-last=1", "class=a,keep-daily=1"}},
		{`unknown key "clas" (did you mean "class"?)`, []string{"clas=a,keep-last=1"}},
		{"class=A_b: not a name", []string{"class=A_b,keep-last=1"}},
		{"class has no value", []string{"class=,keep-last=1"}},
		{"class is given twice", []string{"class=a,class=b,keep-last=1"}},
		{"keep-last=0: keeps nothing", []string{"class=a,keep-last=0"}},
	} {
		if _, err := ParseTiers(tt.tiers); err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %v, want %q", tt.tiers, err, tt.err)
		}
	}
}

// zones have daylight-saving time in both halves of the world, an hour that is
// half repeated, a jump over a whole day, and none.
var zones = []string{"UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/St_Johns", "Pacific/Apia", "America/Sao_Paulo"}

// generator makes arbitrary rules and histories.
type generator struct{ *rand.Rand }

// generate runs a property many times. ABACA_SEED repeats a run that failed.
func generate(t *testing.T, times int, property func(t *testing.T, g generator)) {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("ABACA_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	g := generator{rand.New(rand.NewPCG(seed, 0))}
	for i := range times {
		property(t, g)
		if t.Failed() {
			t.Fatalf("attempt %d; repeat it with ABACA_SEED=%d", i, seed)
		}
	}
}

func (g generator) rule() Rule {
	var r Rule
	for r.Validate() != nil {
		for _, p := range parts {
			switch g.IntN(4) {
			case 0:
				*p.number(&r) = 1 + g.IntN(8)
			case 1:
				if g.IntN(5) == 0 {
					*p.number(&r) = All
				}
			}
		}
		if g.IntN(3) == 0 {
			r.Within = Span{g.IntN(2), g.IntN(14), g.IntN(40), g.IntN(50)}
		}
	}
	return r
}

// items are a history around a change of the clocks, with runs at intervals of
// minutes to months, some at the same time.
func (g generator) items(loc *time.Location) []Item {
	starts := []time.Time{
		time.Date(2025, 10, 26, 12, 0, 0, 0, loc), time.Date(2025, 3, 30, 12, 0, 0, 0, loc), time.Date(2025, 4, 6, 12, 0, 0, 0, loc),
		time.Date(2010, 11, 7, 3, 0, 0, 0, loc), time.Date(2011, 12, 31, 3, 0, 0, 0, loc), time.Date(2018, 11, 4, 3, 0, 0, 0, loc),
		time.Date(2021, 1, 3, 3, 0, 0, 0, loc), time.Date(2024, 2, 29, 12, 0, 0, 0, loc), time.Date(2026, 3, 31, 23, 59, 0, 0, loc),
	}
	now := starts[g.IntN(len(starts))].Add(time.Duration(g.IntN(3*24*60)) * time.Minute)
	steps := []time.Duration{10 * time.Minute, time.Hour, 6 * time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, 35 * 24 * time.Hour}
	step := steps[g.IntN(len(steps))]
	states := []State{Ready, Ready, Ready, Ready, Ready, Partial, Partial, Pending, Failed}
	var items []Item
	for i := range g.IntN(60) {
		items = append(items, Item{fmt.Sprint("s", i), now.UTC(), states[g.IntN(len(states))]})
		if g.IntN(12) > 0 {
			now = now.Add(-time.Duration(g.Int64N(int64(step))).Truncate(time.Minute))
		}
	}
	g.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
	return items
}

// now is a time at which the newest of the items may be in the future.
func (g generator) now(items []Item) time.Time {
	if len(items) == 0 {
		return time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	return items[g.IntN(len(items))].Time.Add(time.Duration(g.IntN(100)) * time.Hour)
}

func names(choices []Choice) []string {
	var names []string
	for _, c := range choices {
		names = append(names, c.Name)
	}
	slices.Sort(names)
	return names
}

func strip(choices []Choice) []Item {
	var items []Item
	for _, c := range choices {
		items = append(items, c.Item)
	}
	return items
}

func TestKeepProperties(t *testing.T) {
	generate(t, 300, func(t *testing.T, g generator) {
		zoneName := zones[g.IntN(len(zones))]
		loc := zone(t, zoneName)
		items, r := g.items(loc), g.rule()
		now := g.now(items)
		before := slices.Clone(items)
		keep, drop := r.Keep(items, now, loc)
		complain := func(format string, args ...any) {
			t.Helper()
			t.Errorf("%s in %s at %s: %s\n%+v", r, zoneName, now, fmt.Sprintf(format, args...), items)
		}

		if !slices.Equal(items, before) {
			complain("the items were changed")
		}
		// Each item is kept or dropped, never both.
		if got := append(names(keep), names(drop)...); len(got) != len(items) || len(slices.Compact(slices.Sorted(slices.Values(got)))) != len(items) {
			complain("kept and dropped are %v", got)
		}
		// The order is the newest first, and each has a reason.
		for _, list := range [][]Choice{keep, drop} {
			if !slices.IsSortedFunc(list, newestFirst) {
				complain("not sorted: %v", list)
			}
			if slices.ContainsFunc(list, func(c Choice) bool { return len(c.Reasons) == 0 }) {
				complain("no reason: %v", list)
			}
		}
		// An independent computation comes to the same.
		if want := oracle(r, items, now, loc); !slices.Equal(names(keep), want) {
			complain("kept %v, want %v", names(keep), want)
		}
		// Pending ones stay, and so do the newest good one and the newest complete one.
		newest := slices.IndexFunc(keep, func(c Choice) bool { return c.State.good() })
		complete := slices.IndexFunc(keep, func(c Choice) bool { return c.State == Ready })
		for _, c := range drop {
			if c.State == Pending || c.State.good() && (newest < 0 || keep[newest].Time.Before(c.Time)) ||
				c.State == Ready && (complete < 0 || keep[complete].Time.Before(c.Time)) {
				complain("dropped %v", c)
			}
		}
		// Dropping then applying again drops nothing, and dropping only some
		// keeps the same.
		if keep2, drop2 := r.Keep(strip(keep), now, loc); len(drop2) > 0 || !slices.Equal(names(keep2), names(keep)) {
			complain("the second time it drops %v", names(drop2))
		}
		some := strip(keep)
		for _, c := range drop {
			if g.IntN(2) == 0 {
				some = append(some, c.Item)
			}
		}
		if keep2, _ := r.Keep(some, now, loc); !slices.Equal(names(keep2), names(keep)) {
			complain("after half of the work it keeps %v, not %v", names(keep2), names(keep))
		}
		// More rules, or larger ones, never keep less.
		more, kept := g.more(r), names(keep)
		keepMore, _ := more.Keep(items, now, loc)
		for _, name := range kept {
			if !slices.Contains(names(keepMore), name) {
				complain("%s drops %s", more, name)
			}
		}
		// What is printed is what was meant.
		if again, err := ParseRule(r.String()); err != nil || again != r {
			complain("read back as %v, %v", again, err)
		}
	})
}

// more returns a rule with at least as much of everything.
func (g generator) more(r Rule) Rule {
	for _, p := range parts {
		n := p.number(&r)
		switch g.IntN(3) {
		case 0:
			if *n != All {
				*n += g.IntN(4)
			}
		case 1:
			if g.IntN(4) == 0 {
				*n = All
			}
		}
	}
	for _, u := range r.Within.units() {
		if g.IntN(3) == 0 {
			*u.number += g.IntN(3)
		}
	}
	return r
}

// oracle says who is kept, from the words of the documentation: slowly, with
// nothing of the code that is tested.
func oracle(r Rule, items []Item, now time.Time, loc *time.Location) (names []string) {
	after := func(a, b Item) bool { return a.Time.After(b.Time) || a.Time.Equal(b.Time) && a.Name > b.Name }
	newer := func(x Item, states ...State) (found []Item) {
		for _, i := range items {
			if slices.Contains(states, i.State) && after(i, x) {
				found = append(found, i)
			}
		}
		return found
	}
	older := func(x Item) bool {
		for _, i := range items {
			if (i.State == Ready || i.State == Partial) && after(x, i) {
				return true
			}
		}
		return false
	}
	text := map[string]func(Item) string{
		"last":    func(i Item) string { return i.Name },
		"hourly":  func(i Item) string { return i.Time.In(loc).Format("2006-01-02 15 -0700") },
		"daily":   func(i Item) string { return i.Time.In(loc).Format("2006-01-02") },
		"monthly": func(i Item) string { return i.Time.In(loc).Format("2006-01") },
		"yearly":  func(i Item) string { return i.Time.In(loc).Format("2006") },
		// A week is known by its Thursday (ISO 8601).
		"weekly": func(i Item) string {
			y, m, d := i.Time.In(loc).Date()
			day := time.Date(y, m, d, 12, 0, 0, 0, time.UTC)
			for day.Weekday() != time.Thursday {
				if w := day.Weekday(); w == time.Sunday || w > time.Thursday {
					day = day.AddDate(0, 0, -1)
				} else {
					day = day.AddDate(0, 0, 1)
				}
			}
			return day.Format("2006-01-02")
		},
	}
	numbers := map[string]int{"last": r.Last, "hourly": r.Hourly, "daily": r.Daily, "weekly": r.Weekly, "monthly": r.Monthly, "yearly": r.Yearly}
	keeps := func(x Item) bool {
		for kind, n := range numbers {
			before := map[string]bool{}
			for _, i := range newer(x, Ready, Partial) {
				before[text[kind](i)] = true
			}
			room := n == All || len(before) < n
			if room && (!before[text[kind](x)] || !older(x)) {
				return true
			}
		}
		if r.Within == (Span{}) {
			return false
		}
		reference, found := now, false
		for _, i := range items {
			if (i.State == Ready || i.State == Partial) && !i.Time.After(now) && (!found || i.Time.After(reference)) {
				reference, found = i.Time, true
			}
		}
		t := reference.In(loc)
		months := r.Within.Years*12 + r.Within.Months
		for day := t.Day(); ; day-- {
			back := time.Date(t.Year(), t.Month()-time.Month(months), day, 12, 0, 0, 0, time.UTC)
			if back.Day() == day {
				back = back.AddDate(0, 0, -r.Within.Days)
				t = time.Date(back.Year(), back.Month(), back.Day(), t.Hour(), t.Minute(), t.Second(), 0, loc)
				break
			}
		}
		return x.Time.Add(time.Duration(r.Within.Hours) * time.Hour).After(t)
	}
	for _, x := range items {
		switch x.State {
		case Pending:
			names = append(names, x.Name)
		case Failed:
			if !slices.ContainsFunc(items, func(i Item) bool { return (i.State == Ready || i.State == Partial) && i.Time.After(x.Time) }) {
				names = append(names, x.Name)
			}
		case Ready, Partial:
			if len(newer(x, Ready, Partial)) == 0 || x.State == Ready && len(newer(x, Ready)) == 0 || keeps(x) {
				names = append(names, x.Name)
			}
		}
	}
	slices.Sort(names)
	return names
}
