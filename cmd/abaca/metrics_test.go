package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/metrics"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/pkg/maintain"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// watched is a driver of which there is everything to tell: a repository that was
// maintained, with a backup, and movers in each state.
type watched struct {
	backup.Runner
	restic.Client
	now       time.Time
	snapshots []restic.Snapshot
	record    []byte
	jobs      []*backup.Status
}

func (w *watched) Names(context.Context) ([]string, error)                { return []string{"offsite"}, nil }
func (w *watched) Open(context.Context, string) (restic.Client, error)    { return w, nil }
func (w *watched) Jobs(context.Context) ([]*backup.Status, error)         { return w.jobs, nil }
func (w *watched) Dump(context.Context, string, string) ([]byte, error)   { return w.record, nil }
func (w *watched) Check(context.Context, restic.CheckRequest) error       { return nil }
func (w *watched) Size(context.Context) (int64, error)                    { return 1 << 30, nil }
func (w *watched) Prune(context.Context, restic.PruneRequest) error       { return nil }
func (w *watched) Forget(context.Context, time.Duration, ...string) error { return nil }
func (w *watched) Snapshots(context.Context, ...string) ([]restic.Snapshot, error) {
	return w.snapshots, nil
}

func (w *watched) Backup(_ context.Context, r restic.BackupRequest, _ func(restic.Progress)) (*restic.BackupSummary, error) {
	text, err := os.ReadFile(r.Dir + "/" + r.Targets[0])
	w.record = text
	w.snapshots = append(w.snapshots, restic.Snapshot{ID: "m", Tags: r.Tags, Time: r.Time})
	return &restic.BackupSummary{}, err
}

func job(id, volume string, cut time.Time, phase backup.Phase, reason mover.Reason) *backup.Status {
	return &backup.Status{Phase: phase, Ended: cut, Result: mover.Result{Reason: reason, Error: string(reason)}, Job: backup.Job{Task: mover.Task{ID: id, Repository: "offsite",
		Backup: &mover.Backup{Backup: id, Volume: volume, Host: "shop/data", Time: cut}}}}
}

func scrape(t *testing.T, w *watched) string {
	t.Helper()
	return get(watchedHandler(t, w), "/metrics").Body.String()
}

func get(h http.Handler, path string) *httptest.ResponseRecorder {
	web := httptest.NewRecorder()
	h.ServeHTTP(web, httptest.NewRequest("GET", path, nil))
	return web
}

func watchedHandler(t *testing.T, w *watched) http.Handler {
	t.Helper()
	engine := &backup.Engine{Repositories: w, Runner: w, Now: func() time.Time { return w.now }}
	if _, err := engine.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	driver := &csi.Driver{Backups: engine, Metrics: metrics.NewCSIMetricsManagerForPlugin(csi.DriverName)}
	driver.Metrics.RecordMetrics("/csi.v1.Node/NodeStageVolume", nil, time.Second)
	backends := newCalls()
	backends.of("manila")("GET shares/{id}", 200, time.Second)
	return handler(driver, backends, newLacks(time.Now))
}

// TestMetricsEndpoint: who may read the metrics reads nothing else.
func TestMetricsEndpoint(t *testing.T) {
	all := watchedHandler(t, newWatched(t))
	alone := metricsOf(all)
	for _, path := range []string{"/status", "/readyz", "/healthz", "/metrics"} {
		a, b := get(all, path), get(alone, path)
		want := http.StatusNotFound
		if path == "/metrics" {
			want = http.StatusOK
		}
		if a.Code != http.StatusOK || b.Code != want {
			t.Errorf("%s: %d, and %d where the metrics are alone", path, a.Code, b.Code)
		}
	}
	if text := get(alone, "/metrics").Body.String(); !strings.Contains(text, "abaca_build_info") {
		t.Errorf("/metrics: %s", text)
	}
}

// newWatched has a repository in which all was read once.
func newWatched(t *testing.T) *watched {
	t.Helper()
	cut := time.Date(2026, 4, 12, 1, 0, 0, 0, time.UTC)
	w := &watched{now: cut, snapshots: []restic.Snapshot{{ID: "s1", Time: cut, Host: "shop/data", Tags: []string{mover.TagBackup + "b1", mover.TagVolume + "local/v"},
		Summary: &restic.BackupSummary{TotalFiles: 10, FilesNew: 1, FilesChanged: 2, TotalBytes: 1000, DataAddedPacked: 100, Duration: 90 * time.Second}}}}
	for range 2 {
		if result, err := maintain.Run(t.Context(), w, maintain.Options{Check: true, Prune: true, ReadDays: 1, Now: func() time.Time { return w.now }}); err != nil || result.ExitCode() != 0 {
			t.Fatal(result, err)
		}
		w.now = w.now.Add(time.Hour)
	}
	w.jobs = []*backup.Status{
		job("b2", "local/v", cut.Add(time.Hour), backup.Failed, mover.ReasonRepository),
		job("b3", "local/w", cut.Add(time.Hour), backup.Running, ""),
	}
	return w
}

// TestMetricsAreDocumented: what is served is what docs/monitoring.md says.
func TestMetricsAreDocumented(t *testing.T) {
	served := map[string]bool{}
	text := scrape(t, newWatched(t))
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+) `).FindAllStringSubmatch(text, -1) {
		served[m[1]] = true
	}
	// It ends with the process that has seen movers end.
	served["abaca_mover_ended_total"] = true
	docs, err := os.ReadFile("../../docs/monitoring.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(string(docs), -1) {
		documented[m[1]] = true
		if !served[m[1]] {
			t.Errorf("%s is documented and not served", m[1])
		}
	}
	for name := range served {
		if !documented[name] && strings.HasPrefix(name, "abaca_") {
			t.Errorf("%s is served and not in docs/monitoring.md", name)
		}
	}
	if len(documented) < 20 {
		t.Errorf("%d metrics are documented", len(documented))
	}
}

// TestMetrics: the values are those of the newest backup, of the record that
// maintenance has left, and of the movers.
func TestMetrics(t *testing.T) {
	w := newWatched(t)
	expect := func(wants map[string]bool) {
		t.Helper()
		text := scrape(t, w)
		for line, is := range wants {
			if strings.Contains(text, line+"\n") != is {
				t.Errorf("%s: want %v in\n%s", line, is, text)
			}
		}
	}
	const of = `{claim="shop/data",repository="offsite",volume="local/v"} `
	expect(map[string]bool{
		"abaca_backup_last_success_timestamp_seconds" + of + "1.7759556e+09":                       true,
		"abaca_backup_last_duration_seconds" + of + "90":                                           true,
		"abaca_backup_last_bytes" + of + "1000":                                                    true,
		"abaca_backup_last_added_bytes" + of + "100":                                               true,
		"abaca_backup_last_files" + of + "10":                                                      true,
		"abaca_backup_last_read_files" + of + "3":                                                  true,
		"abaca_backup_last_failed" + of + "1":                                                      true,
		`abaca_backup_unfinished{repository="offsite",state="waiting"} 1`:                          true,
		`abaca_repository_backups{repository="offsite"} 1`:                                         true,
		`abaca_repository_damaged{repository="offsite"} 0`:                                         true,
		`abaca_repository_up{repository="offsite"} 1`:                                              true,
		`abaca_repository_read_ratio{repository="offsite"} 1`:                                      true,
		`abaca_repository_size_bytes{repository="offsite"} 1.073741824e+09`:                        true,
		`abaca_backend_call_seconds_count{backend="manila",call="GET shares/{id}",status="200"} 1`: true,
	})
	// It lacks files.
	expect(map[string]bool{"abaca_backup_last_partial" + of + "0": true})
	w.snapshots = append(w.snapshots, restic.Snapshot{ID: "p1", Time: w.snapshots[0].Time, Tags: []string{mover.TagPartial + "b1"}})
	expect(map[string]bool{"abaca_backup_last_partial" + of + "1": true})
	w.snapshots = w.snapshots[:len(w.snapshots)-1]
	// One that is tried again has failed until it succeeds, whatever ended it.
	for _, c := range []struct {
		phase   backup.Phase
		attempt int
		recover bool
		state   string
		failed  int
	}{
		{backup.Running, 1, false, "running", 0},
		{backup.Running, 2, false, "retrying", 1},
		{backup.Interrupted, 1, false, "waiting", 0},
		{backup.Running, 2, true, "running", 0}, // a node was drained
		{backup.Interrupted, 2, true, "waiting", 1},
		{backup.Running, 3, true, "retrying", 1},
	} {
		st := *w.jobs[0]
		w.jobs[0].Phase, w.jobs[0].Job.Attempt, w.jobs[0].Job.Task.Recover = c.phase, c.attempt, c.recover
		w.jobs = w.jobs[:1]
		expect(map[string]bool{
			fmt.Sprintf("abaca_backup_last_failed%s%d", of, c.failed):                        true,
			fmt.Sprintf(`abaca_backup_unfinished{repository="offsite",state=%q} 1`, c.state): true,
		})
		*w.jobs[0] = st
	}
	// A failure before the newest success is over.
	w.jobs[0].Job.Task.Backup.Time = w.now.Add(-48 * time.Hour)
	expect(map[string]bool{"abaca_backup_last_failed" + of + "0": true})

	var r map[string]any
	if err := json.Unmarshal(w.record, &r); err != nil {
		t.Fatal(err)
	}
	r["damaged"] = "pack x"
	w.record, _ = json.Marshal(r)
	expect(map[string]bool{`abaca_repository_damaged{repository="offsite"} 1`: true})

	// Of a repository that nobody has maintained there is nothing to say.
	w.snapshots = w.snapshots[:1]
	expect(map[string]bool{`abaca_repository_damaged{repository="offsite"} 0`: false, `abaca_repository_backups{repository="offsite"} 1`: true})
}
