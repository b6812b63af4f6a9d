package schedule

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNews(t *testing.T) {
	ready := Entry{Claim: "data", Tier: "a", Status: StatusReady, Retention: Retention{Drop: []Choice{{}, {Error: "no"}}}}
	failed := Entry{Claim: "web", Tier: "a", Status: StatusFailed, Message: "no such claim"}
	partial := Entry{Claim: "data", Tier: "b", Status: StatusPartial, Message: "it lacks files"}
	kept := ready
	kept.Retention.Error = "1 of 2 are not dropped: no"
	for _, test := range []struct {
		entries []Entry
		err     error
		reason  EventReason
		text    string
	}{
		{nil, fmt.Errorf("%w: tier x", ErrInvalid), ScheduleInvalid, "tier x"},
		{nil, fmt.Errorf("nightly: %w", ErrNothing), NothingSelected, "nightly: nothing is selected"},
		{nil, errors.New("list claims: forbidden"), ScheduleFailed, "forbidden"},
		{[]Entry{failed}, nil, ScheduleFailed, "0 of 1 snapshots are ready, 0 old ones are dropped. web (a) is failed: no such claim"},
		{[]Entry{ready, failed}, errors.New("ended"), ScheduleIncomplete, "1 of 2 snapshots are ready, 1 old ones are dropped. web (a) is failed"},
		{[]Entry{kept}, nil, ScheduleIncomplete, "data (a): 1 of 2 are not dropped"},
		{[]Entry{ready, partial}, nil, SchedulePartial, "2 of 2 snapshots are ready, 1 old ones are dropped. data (b) is partial: it lacks files"},
		{[]Entry{failed, partial}, nil, ScheduleIncomplete, "1 of 2 snapshots are ready"},
		{[]Entry{ready}, nil, ScheduleFinished, "1 of 1 snapshots are ready, 1 old ones are dropped"},
	} {
		if reason, text := News(Result{Entries: test.entries}, test.err); reason != test.reason || !strings.Contains(text, test.text) {
			t.Errorf("%+v, %v: %s, %s", test.entries, test.err, reason, text)
		}
	}
}

// TestReasonsAreDocumented: the table has all reasons, with their types, and no
// other.
func TestReasonsAreDocumented(t *testing.T) {
	code, err := os.ReadFile("event.go")
	if err != nil {
		t.Fatal(err)
	}
	docs, err := os.ReadFile("../../docs/schedule.md")
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, m := range regexp.MustCompile(`EventReason = "(\w+)"`).FindAllStringSubmatch(string(code), -1) {
		kind := "Normal"
		if EventReason(m[1]).Warning() {
			kind = "Warning"
		}
		want = append(want, m[1]+" "+kind)
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z]\\w+)` \\| (\\w+) \\| \\S.* \\|$").FindAllStringSubmatch(string(docs), -1) {
		got = append(got, m[1]+" "+m[2])
	}
	if diff := cmp.Diff(want, got); diff != "" || len(want) == 0 {
		t.Errorf("docs/schedule.md (-code +docs):\n%s", diff)
	}
}
