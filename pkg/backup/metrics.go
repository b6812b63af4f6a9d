package backup

import (
	"context"
	"slices"
	"strings"
	"time"

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
		"Backups that are not ready: they run for the first time, run again or wait for their next attempt after one that failed, or have failed for good.",
		[]string{"repository", "state"}, nil)

	volumeLabels = []string{"repository", "volume", "claim"}
	descSuccess  = prometheus.NewDesc("abaca_backup_last_success_timestamp_seconds",
		"When the snapshot of the newest backup of a volume was cut, as its repository was last seen.", volumeLabels, nil)
	descDuration = prometheus.NewDesc("abaca_backup_last_duration_seconds", "How long restic took for the newest backup of a volume.", volumeLabels, nil)
	descBytes    = prometheus.NewDesc("abaca_backup_last_bytes", "Bytes of all files in the newest backup of a volume.", volumeLabels, nil)
	descAdded    = prometheus.NewDesc("abaca_backup_last_added_bytes", "Bytes by which the repository grew with the newest backup of a volume.", volumeLabels, nil)
	descInIt     = prometheus.NewDesc("abaca_backup_last_files", "Files in the newest backup of a volume.", volumeLabels, nil)
	descRead     = prometheus.NewDesc("abaca_backup_last_read_files", "Files that were new or changed in the newest backup of a volume, and so were read.", volumeLabels, nil)
	descPartial  = prometheus.NewDesc("abaca_backup_last_partial", "1 if the newest backup of a volume lacks files that could not be read, and 0 if not.", volumeLabels, nil)
	descFailed   = prometheus.NewDesc("abaca_backup_last_failed", "1 if an attempt to back a volume up has failed and no later one has succeeded, and 0 if not.", volumeLabels, nil)

	repositoryLabels = []string{"repository"}
	descUp           = prometheus.NewDesc("abaca_repository_up", "1 if a repository could be listed when that was last tried, and 0 if not.", repositoryLabels, nil)
	descListed       = prometheus.NewDesc("abaca_repository_last_listed_timestamp_seconds", "When a repository was last seen.", repositoryLabels, nil)
	descBackups      = prometheus.NewDesc("abaca_repository_backups", "Backups in a repository.", repositoryLabels, nil)
	descSize         = prometheus.NewDesc("abaca_repository_size_bytes", "What the snapshots took in a repository after its last maintenance.", repositoryLabels, nil)
	descMaintained   = prometheus.NewDesc("abaca_repository_last_maintenance_timestamp_seconds", "When the last maintenance of a repository ended, however it did.", repositoryLabels, nil)
	descChecked      = prometheus.NewDesc("abaca_repository_last_check_timestamp_seconds", "When the last check of a repository ended that found nothing.", repositoryLabels, nil)
	descPruned       = prometheus.NewDesc("abaca_repository_last_prune_timestamp_seconds", "When a repository was last pruned.", repositoryLabels, nil)
	descDamaged      = prometheus.NewDesc("abaca_repository_damaged", "1 if the last check of a repository has found damage, or what it has found cannot be read, and 0 if not.", repositoryLabels, nil)
	descCoverage     = prometheus.NewDesc("abaca_repository_read_ratio", "Share of a repository, from 0 to 1, that was read within the stated number of days.", repositoryLabels, nil)
	descOldest       = prometheus.NewDesc("abaca_repository_oldest_read_timestamp_seconds",
		"When the part of a repository was last read that was read the longest ago; not before all was read once.", repositoryLabels, nil)

	allDescs = []*prometheus.Desc{descMoved, descToMove, descFiles, descAll, descRate, descEnded, descUnfinished,
		descSuccess, descDuration, descBytes, descAdded, descInIt, descRead, descPartial, descFailed,
		descUp, descListed, descBackups, descSize, descMaintained, descChecked, descPruned, descDamaged, descCoverage, descOldest}
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
	for _, d := range allDescs {
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
	newest := map[volumeKey]*Backup{}
	for repository, l := range e.listings {
		for _, b := range l.backups {
			// Whoever has the repository can have put anything there.
			if owner := Owner(repository); owner != "" && !strings.HasPrefix(b.Host, owner+"/") {
				continue
			}
			if key := keyOf(b); newest[key] == nil || newest[key].CreatedAt.Before(b.CreatedAt) {
				newest[key] = b
			}
		}
		e.collectRepository(gauge, repository, l)
	}
	for repository, is := range e.up {
		gauge(descUp, number(is), repository)
	}
	failed := map[volumeKey]bool{}
	for _, st := range jobs {
		if b := st.backup(); st.Job.Task.Backup != nil && failing(st) {
			last := newest[keyOf(b)]
			failed[keyOf(b)] = failed[keyOf(b)] || last == nil || last.CreatedAt.Before(b.CreatedAt)
		}
	}
	for key, b := range newest {
		labels := []string{key.repository, key.volume, key.claim}
		gauge(descSuccess, float64(b.CreatedAt.Unix()), labels...)
		gauge(descPartial, number(b.Partial), labels...)
		if _, known := failed[key]; !known {
			failed[key] = false
		}
		if s := b.Summary; s != nil {
			gauge(descDuration, s.Duration.Seconds(), labels...)
			gauge(descBytes, float64(s.TotalBytes), labels...)
			gauge(descAdded, float64(s.DataAddedPacked), labels...)
			gauge(descInIt, float64(s.TotalFiles), labels...)
			gauge(descRead, float64(s.FilesNew+s.FilesChanged), labels...)
		}
	}
	for key, is := range failed {
		gauge(descFailed, number(is), key.repository, key.volume, key.claim)
	}
}

// volumeKey is what the metrics of the newest backups are by.
type volumeKey struct{ repository, volume, claim string }

func keyOf(b *Backup) volumeKey {
	key := volumeKey{b.Repository, b.Volume, b.Host}
	if key.claim == key.volume {
		key.claim = ""
	}
	return key
}

// collectRepository tells what is known of one repository.
func (e *Engine) collectRepository(gauge func(*prometheus.Desc, float64, ...string), repository string, l listing) {
	when := func(d *prometheus.Desc, t time.Time) {
		if !t.IsZero() {
			gauge(d, float64(t.Unix()), repository)
		}
	}
	when(descListed, l.at)
	gauge(descBackups, float64(len(l.backups)), repository)
	if l.care == nil || l.careID == "" && !l.unread {
		return
	}
	when(descMaintained, l.care.Ended)
	when(descChecked, l.care.Checked)
	when(descPruned, l.care.Pruned)
	gauge(descDamaged, number(l.care.Damaged != "" || l.unread), repository)
	if l.care.Size > 0 {
		gauge(descSize, float64(l.care.Size), repository)
	}
	if l.care.Read != nil {
		gauge(descCoverage, l.care.Coverage(e.Now()), repository)
		when(descOldest, l.care.OldestRead())
	}
}

func number(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// failing says whether an attempt of a job has failed and none has succeeded: also while
// the next one waits or runs. One that was interrupted for the first time, as when a
// node is drained, has not failed.
func failing(st *Status) bool {
	switch n := st.Job.Attempt; st.Phase {
	case Running:
		return n > 2 || n == 2 && !st.Job.Task.Recover
	case Interrupted:
		return n > 1
	case Failed:
		return true
	}
	return false
}

// stateOf is what abaca_backup_unfinished counts by; empty for a success.
func stateOf(st *Status) string {
	switch {
	case st.Phase == Running && failing(st):
		return "retrying"
	case st.Phase == Running:
		return "running"
	case st.Phase == Failed && st.Result.Reason.Lasting():
		return "failed"
	case st.Phase == Failed, st.Phase == Interrupted:
		return "waiting"
	}
	return ""
}

// Recent returns the attempts that ended under this process, oldest first.
func (e *Engine) Recent() []*Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.recent)
}

func (e *Engine) remember(st *Status) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := st.Job.Task.ID
	if e.seen[id].Equal(st.Ended) {
		return
	}
	if e.seen == nil {
		e.seen, e.ended = map[string]time.Time{}, map[ending]int{}
	}
	e.seen[id] = st.Ended
	e.ended[endingOf(st)]++
	e.recent = append(e.recent, st)
	if len(e.recent) > recentMax {
		delete(e.seen, e.recent[0].Job.Task.ID)
		e.recent = slices.Delete(e.recent, 0, 1)
	}
}

// ending is what abaca_mover_ended_total counts by.
type ending struct{ kind, repository, result string }

func endingOf(st *Status) ending {
	result := "succeeded"
	if st.Result.Partial {
		result = "partial"
	}
	if st.Phase == Failed {
		result = string(st.Result.Reason)
	}
	return ending{Kind(st.Job.Task), st.Job.Task.Repository, result}
}
