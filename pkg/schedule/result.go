package schedule

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/abaca-csi/abaca/pkg/line"
)

// Exit codes of `abaca schedule`. They are part of what users build upon.
const (
	// ExitOK is a run that did everything.
	ExitOK = 0
	// ExitFailed is a run in which no snapshot became ready, or that could not
	// begin.
	ExitFailed = 1
	// ExitPartial is a run with at least one ready snapshot, in which something
	// else was not done: a snapshot, or dropping one. 3 is restic's code for a
	// backup that lacks something.
	ExitPartial = 3
	// ExitLacking is a run in which everything was done, but at least one of its
	// backups lacks files that could not be read.
	ExitLacking = 4
)

// Status is what has become of a snapshot of a run.
type Status string

// A run ends with the first five, a dry one with the last two or StatusFailed.
const (
	StatusReady       Status = "ready"
	StatusPartial     Status = "partial" // ready, but it lacks files
	StatusFailed      Status = "failed"
	StatusLate        Status = "late"        // not ready at the deadline
	StatusInterrupted Status = "interrupted" // not ready when the run was ended
	StatusPlanned     Status = "planned"     // would be made
	StatusExists      Status = "exists"      // is there already, made for the same time
)

// Good says that there is something to restore from, or would be.
func (s Status) Good() bool {
	return s == StatusReady || s == StatusPartial || s == StatusPlanned || s == StatusExists
}

// Entry is what a run did for one claim and tier.
type Entry struct {
	Claim    string  `json:"claim"`
	Tier     string  `json:"tier"`
	Snapshot string  `json:"snapshot"`
	Status   Status  `json:"status"`
	Message  string  `json:"message,omitempty"`
	Seconds  float64 `json:"seconds"` // until it was ready, or given up
	// Retention is what was kept and dropped of the claim and tier.
	Retention Retention `json:"retention"`

	series Series
	rule   Rule
	uid    string // of the snapshot that became ready
}

// Retention is what a rule did, or would do in a dry run. Both lists have the
// newest first.
type Retention struct {
	Keep []Choice `json:"keep,omitempty"`
	// Drop has what the rule drops. What could not be dropped has an error.
	Drop []Choice `json:"drop,omitempty"`
	// Skipped says why the rule was not applied.
	Skipped string `json:"skipped,omitempty"`
	// Error says what went wrong.
	Error string `json:"error,omitempty"`
}

func (e *Entry) fail(reason string) {
	e.Status, e.Message = StatusFailed, line.One(reason, "failed")
}

// Result is what a run did, by claim, and within a claim in the order of the
// tiers.
type Result struct {
	Schedule  string
	Scheduled time.Time
	DryRun    bool
	Entries   []Entry
}

// ExitCode is the truth about a run in one number.
func (r Result) ExitCode() int {
	good, bad, lacking := 0, 0, 0
	for _, e := range r.Entries {
		if e.Status == StatusPartial {
			lacking++
		}
		switch {
		case !e.Status.Good():
			bad++
		case e.Retention.Error != "":
			good++
			bad++
		default:
			good++
		}
	}
	switch {
	case good == 0:
		return ExitFailed
	case bad > 0:
		return ExitPartial
	case lacking > 0:
		return ExitLacking
	}
	return ExitOK
}

// JSON writes the result as one object. Fields may be added to it, not removed.
func (r Result) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(struct {
		Schedule  string    `json:"schedule"`
		Scheduled time.Time `json:"scheduledTime"`
		DryRun    bool      `json:"dryRun"`
		ExitCode  int       `json:"exitCode"`
		Entries   []Entry   `json:"snapshots"`
	}{r.Schedule, r.Scheduled, r.DryRun, r.ExitCode(), r.Entries})
}

// Table writes the result for people: a line for each claim and tier. A dry run
// also has a line for each snapshot, with the reasons for which it is kept or
// dropped.
func (r Result) Table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CLAIM\tTIER\tSNAPSHOT\tSTATUS\tSECONDS\tKEPT\tDROPPED\tMESSAGE")
	for _, e := range r.Entries {
		message := e.Message
		if message == "" {
			message = e.Retention.Error
		}
		dropped := 0
		for _, c := range e.Retention.Drop {
			if c.Error == "" {
				dropped++
			}
		}
		kept, gone := fmt.Sprint(len(e.Retention.Keep)), fmt.Sprint(dropped)
		if e.Retention.Skipped != "" || e.Retention.Keep == nil {
			kept, gone = "-", "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%.0f\t%s\t%s\t%s\n", e.Claim, e.Tier, e.Snapshot, e.Status, e.Seconds, kept, gone, line.One(message, "-"))
	}
	if err := t.Flush(); err != nil || !r.DryRun {
		return err
	}
	fmt.Fprintln(t, "\nSNAPSHOT\tSTATE\tDRY RUN\tREASON")
	for _, e := range r.Entries {
		for _, c := range e.Retention.Keep {
			fmt.Fprintf(t, "%s\t%s\tkeep\t%s\n", c.Name, c.State, strings.Join(c.Reasons, "; "))
		}
		for _, c := range e.Retention.Drop {
			fmt.Fprintf(t, "%s\t%s\tdrop\t%s\n", c.Name, c.State, strings.Join(c.Reasons, "; "))
		}
	}
	return t.Flush()
}
