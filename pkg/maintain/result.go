package maintain

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/abaca-csi/abaca/pkg/line"
)

// Exit codes of `abaca maintain`. They are part of what users build upon.
const (
	// ExitOK is a run that did everything, and found nothing.
	ExitOK = 0
	// ExitFailed is a run in which something was not done.
	ExitFailed = 1
	// ExitDamaged is a run that has found damage, whatever else went wrong.
	ExitDamaged = 4
	// ExitLocked is a run in which others did not leave the repository in time. 11 is
	// restic's code for it.
	ExitLocked = 11
)

// Status is what has become of a step.
type Status string

const (
	StatusOK          Status = "ok"
	StatusDamaged     Status = "damaged"
	StatusFailed      Status = "failed"
	StatusLocked      Status = "locked"      // others did not leave the repository in time
	StatusLate        Status = "late"        // not done at the deadline
	StatusInterrupted Status = "interrupted" // not done when the run was ended
	StatusSkipped     Status = "skipped"     // not done, because of another step
	StatusPlanned     Status = "planned"     // would be done
)

// Entry is what has become of one step: check, prune, or record, which is the
// writing down of it.
type Entry struct {
	Step    string  `json:"step"`
	Status  Status  `json:"status"`
	Message string  `json:"message,omitempty"`
	Seconds float64 `json:"seconds"`
}

// Damaged is a backup that refers to what is damaged.
type Damaged struct {
	Snapshot string    `json:"snapshot"` // of restic
	Backup   string    `json:"backup,omitempty"`
	Volume   string    `json:"volume,omitempty"`
	Host     string    `json:"host"` // the claim
	Time     time.Time `json:"time"`
}

// Result is what a run did.
type Result struct {
	Repository string    `json:"repository"`
	DryRun     bool      `json:"dryRun,omitempty"`
	Began      time.Time `json:"began"`
	Steps      []Entry   `json:"steps"`
	Damaged    []Damaged `json:"damaged,omitempty"`
	// ReadDays is in how many days everything is to be read; 0: nothing is.
	ReadDays int `json:"readDays,omitempty"`
	// Coverage is the share that was read within the stated days, from 0 to 1, and
	// OldestRead when that was read that was read the longest ago; not before all
	// was.
	Coverage   float64   `json:"coverage"`
	OldestRead time.Time `json:"oldestRead,omitzero"`
	// Size is what the snapshots take in the repository, in bytes.
	Size int64 `json:"size,omitempty"`
}

// ExitCode is the truth about the run: the worst of what its steps have come to.
func (r Result) ExitCode() int {
	has := map[int]bool{}
	for _, s := range r.Steps {
		switch s.Status {
		case StatusOK, StatusPlanned, StatusSkipped:
		case StatusDamaged:
			has[ExitDamaged] = true
		case StatusLocked:
			has[ExitLocked] = true
		default:
			has[ExitFailed] = true
		}
	}
	for _, code := range []int{ExitDamaged, ExitFailed, ExitLocked} {
		if has[code] {
			return code
		}
	}
	return ExitOK
}

// JSON writes the result, with its exit code.
func (r Result) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(struct {
		Result
		ExitCode int `json:"exitCode"`
	}{r, r.ExitCode()})
}

// Table writes the result for people.
func (r Result) Table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "REPOSITORY\tSTEP\tSTATUS\tSECONDS\tMESSAGE")
	for _, s := range r.Steps {
		fmt.Fprintf(t, "%s\t%s\t%s\t%.0f\t%s\n", r.Repository, s.Step, s.Status, s.Seconds, line.One(s.Message, "-"))
	}
	if len(r.Damaged) > 0 {
		fmt.Fprintln(t, "\nDAMAGED BACKUP OF\tCUT\tVOLUME\tBACKUP\tRESTIC SNAPSHOT")
	}
	for _, d := range r.Damaged {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", line.One(d.Host, "-"), d.Time.UTC().Format(time.RFC3339), line.One(d.Volume, "-"), line.One(d.Backup, "-"), d.Snapshot)
	}
	if err := t.Flush(); err != nil || r.ReadDays == 0 {
		return err
	}
	read := "not all of it has been read yet"
	if !r.OldestRead.IsZero() {
		read = "all of it has been read since " + r.OldestRead.UTC().Format(time.RFC3339)
	}
	_, err := fmt.Fprintf(w, "\n%.0f %% were read within the last %d days; %s\n", 100*r.Coverage, r.ReadDays, read)
	return err
}
