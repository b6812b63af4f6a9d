package main

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// statusReport is what /status answers: the movers that there are, and how the
// last ones ended.
type statusReport struct {
	Movers   []moverReport `json:"movers"`
	Finished []moverReport `json:"finished"`
}

// moverReport is one attempt. The fields are described in docs/usage.md.
type moverReport struct {
	ID         string       `json:"id"`
	Kind       string       `json:"kind"` // backup or restore
	Name       string       `json:"name"`
	Volume     string       `json:"volume"`
	Repository string       `json:"repository"`
	Phase      backup.Phase `json:"phase"`
	Attempt    int          `json:"attempt"`
	Started    time.Time    `json:"started"`
	Ended      *time.Time   `json:"ended,omitempty"`
	// Progress is of one that runs or has failed: of a success, the summary is
	// the last word.
	Progress *restic.Progress `json:"progress,omitempty"`
	Trouble  string           `json:"trouble,omitempty"`
	Snapshot string           `json:"snapshot,omitempty"`
	Error    string           `json:"error,omitempty"`
	Reason   mover.Reason     `json:"reason,omitempty"`
	// Partial and Incomplete say that a backup lacks files, and which ones first.
	Partial    bool                   `json:"partial,omitempty"`
	Incomplete []string               `json:"incomplete,omitempty"`
	Backup     *restic.BackupSummary  `json:"backupSummary,omitempty"`
	Restore    *restic.RestoreSummary `json:"restoreSummary,omitempty"`
}

func report(all []*backup.Status) []moverReport {
	out := make([]moverReport, 0, len(all))
	for _, st := range all {
		r := moverReport{
			ID: st.Job.Task.ID, Kind: backup.Kind(st.Job.Task), Repository: st.Job.Task.Repository, Phase: st.Phase,
			Attempt: st.Job.Attempt, Started: st.Started, Trouble: st.Trouble, Snapshot: st.Result.Snapshot,
			Error: st.Result.Error, Reason: st.Result.Reason,
			Partial: st.Result.Partial, Incomplete: st.Result.Incomplete, Backup: st.Result.Backup, Restore: st.Result.Restore,
		}
		if b := st.Job.Task.Backup; b != nil {
			r.Name, r.Volume = b.Name, b.Volume
		}
		if b := st.Job.Task.Restore; b != nil {
			r.Name, r.Volume = b.Name, b.Volume
		}
		if st.Phase != backup.Succeeded {
			r.Progress = &st.Progress
		}
		if !st.Ended.IsZero() {
			r.Ended = &st.Ended
		}
		out = append(out, r)
	}
	return out
}

func statusOf(e *backup.Engine) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		jobs, err := e.Runner.Jobs(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(statusReport{Movers: report(jobs), Finished: report(e.Recent())})
	}
}
