package main

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// statusReport is what /status answers: the movers that there are, and how the
// last ones ended.
type statusReport struct {
	Movers   []moverReport `json:"movers"`
	Finished []moverReport `json:"finished"`
}

type moverReport struct {
	ID         string                 `json:"id"`
	Kind       string                 `json:"kind"` // backup or restore
	Name       string                 `json:"name,omitempty"`
	Repository string                 `json:"repository"`
	Phase      backup.Phase           `json:"phase"`
	Attempt    int                    `json:"attempt"`
	Started    time.Time              `json:"started"`
	Ended      *time.Time             `json:"ended,omitempty"`
	Progress   restic.Progress        `json:"progress"`
	Snapshot   string                 `json:"snapshot,omitempty"`
	Error      string                 `json:"error,omitempty"`
	Backup     *restic.BackupSummary  `json:"backupSummary,omitempty"`
	Restore    *restic.RestoreSummary `json:"restoreSummary,omitempty"`
}

func report(all []*backup.Status) []moverReport {
	out := make([]moverReport, 0, len(all))
	for _, st := range all {
		r := moverReport{
			ID: st.Job.Task.ID, Kind: backup.Kind(st.Job.Task), Repository: st.Job.Task.Repository, Phase: st.Phase,
			Attempt: st.Job.Attempt, Started: st.Started, Progress: st.Progress, Snapshot: st.Result.Snapshot,
			Error: st.Result.Error, Backup: st.Result.Backup, Restore: st.Result.Restore,
		}
		if st.Job.Task.Backup != nil {
			r.Name = st.Job.Task.Backup.Name
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
