package backup

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/abaca-csi/abaca/pkg/mover"
)

var (
	moverLabels = []string{"kind", "repository", "task"}
	descMoved   = prometheus.NewDesc("abaca_mover_bytes_done", "Bytes that a running mover has dealt with.", moverLabels, nil)
	descToMove  = prometheus.NewDesc("abaca_mover_bytes_total", "Bytes that a running mover will deal with; 0 while unknown.", moverLabels, nil)
	descFiles   = prometheus.NewDesc("abaca_mover_files_done", "Files that a running mover has dealt with.", moverLabels, nil)
	descAll     = prometheus.NewDesc("abaca_mover_files_total", "Files that a running mover will deal with; 0 while unknown.", moverLabels, nil)
	descRate    = prometheus.NewDesc("abaca_mover_bytes_per_second", "Bytes that a running mover deals with in a second.", moverLabels, nil)
	descEnded   = prometheus.NewDesc("abaca_mover_ended_total", "Movers that have ended, by how.",
		[]string{"kind", "repository", "result"}, nil)
	descUnfinished = prometheus.NewDesc("abaca_backup_unfinished",
		"Backups that are not ready: they run, wait for their next attempt after one that failed, or have failed for good.",
		[]string{"repository", "state"}, nil)
	descSuccess = prometheus.NewDesc("abaca_backup_last_success_timestamp_seconds",
		"When the snapshot of the newest backup of a volume was cut, as its repository was last seen.", []string{"repository", "volume"}, nil)
)

// Kind is what a task does: "backup" or "restore".
func Kind(t mover.Task) string {
	if t.Restore != nil {
		return "restore"
	}
	return "backup"
}

// Describe implements prometheus.Collector.
func (e *Engine) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descMoved, descToMove, descFiles, descAll, descRate, descEnded, descUnfinished, descSuccess} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. It asks no repository.
func (e *Engine) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	jobs, err := e.Runner.Jobs(context.Background())
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descMoved, err)
	}
	unfinished := map[[2]string]int{}
	for _, st := range jobs {
		if state := stateOf(st); st.Job.Task.Backup != nil && state != "" {
			unfinished[[2]string{st.Job.Task.Repository, state}]++
		}
		if st.Phase != Running {
			continue
		}
		labels := []string{Kind(st.Job.Task), st.Job.Task.Repository, st.Job.Task.ID}
		gauge(descMoved, float64(st.Progress.BytesDone), labels...)
		gauge(descToMove, float64(st.Progress.BytesTotal), labels...)
		gauge(descFiles, float64(st.Progress.FilesDone), labels...)
		gauge(descAll, float64(st.Progress.FilesTotal), labels...)
		gauge(descRate, st.Progress.Rate, labels...)
	}
	for k, n := range unfinished {
		gauge(descUnfinished, float64(n), k[0], k[1])
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for k, n := range e.ended {
		ch <- prometheus.MustNewConstMetric(descEnded, prometheus.CounterValue, float64(n), k.kind, k.repository, k.result)
	}
	for repository, l := range e.listings {
		newest := map[string]float64{}
		for _, b := range l.backups {
			newest[b.Volume] = max(newest[b.Volume], float64(b.CreatedAt.Unix()))
		}
		for volume, at := range newest {
			gauge(descSuccess, at, repository, volume)
		}
	}
}

// stateOf is what abaca_backup_unfinished counts by; empty for a success.
func stateOf(st *Status) string {
	switch {
	case st.Phase == Running:
		return "running"
	case st.Phase == Failed && st.Result.Reason.Lasting():
		return "failed"
	case st.Phase == Failed, st.Phase == Interrupted:
		return "waiting"
	}
	return ""
}

// ending is what abaca_mover_ended_total counts by.
type ending struct{ kind, repository, result string }

func endingOf(st *Status) ending {
	result := "succeeded"
	if st.Phase == Failed {
		result = string(st.Result.Reason)
	}
	return ending{Kind(st.Job.Task), st.Job.Task.Repository, result}
}
