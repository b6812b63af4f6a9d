package schedule

import (
	"errors"
	"fmt"
	"strings"
)

// ErrInvalid is a schedule that cannot be run as it is written.
var ErrInvalid = errors.New("the schedule is not sound")

// EventReason is what an event of a schedule is about, in one word that programs
// may rely on.
type EventReason string

// All reasons, described in docs/schedule.md.
const (
	ScheduleInvalid    EventReason = "ScheduleInvalid"
	NothingSelected    EventReason = "NothingSelected"
	ScheduleFailed     EventReason = "ScheduleFailed"
	ScheduleIncomplete EventReason = "ScheduleIncomplete"
	SchedulePartial    EventReason = "SchedulePartial"
	ScheduleFinished   EventReason = "ScheduleFinished"
)

// Warning says that something is not as it should be.
func (r EventReason) Warning() bool { return r != ScheduleFinished }

// News says for people what a run has come to, by what Run has returned.
func News(r Result, err error) (EventReason, string) {
	good, dropped, wrong := 0, 0, []string(nil)
	for _, e := range r.Entries {
		if e.Status.Good() {
			good++
		}
		if e.Status == StatusPartial || !e.Status.Good() {
			wrong = append(wrong, fmt.Sprintf("%s (%s) is %s: %s", e.Claim, e.Tier, e.Status, e.Message))
		}
		if e.Retention.Error != "" {
			wrong = append(wrong, fmt.Sprintf("%s (%s): %s", e.Claim, e.Tier, e.Retention.Error))
		}
		for _, c := range e.Retention.Drop {
			if c.Error == "" {
				dropped++
			}
		}
	}
	text := fmt.Sprintf("%d of %d snapshots are ready, %d old ones are dropped", good, len(r.Entries), dropped)
	if len(wrong) > 0 {
		text += ". " + strings.Join(wrong, "; ")
	}
	switch {
	case errors.Is(err, ErrInvalid):
		return ScheduleInvalid, err.Error()
	case errors.Is(err, ErrNothing):
		return NothingSelected, err.Error()
	case err != nil && len(r.Entries) == 0:
		return ScheduleFailed, err.Error()
	case r.ExitCode() == ExitFailed:
		return ScheduleFailed, text
	case r.ExitCode() == ExitPartial:
		return ScheduleIncomplete, text
	case r.ExitCode() == ExitLacking:
		return SchedulePartial, text
	}
	return ScheduleFinished, text
}
