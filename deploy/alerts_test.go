package deploy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/maintain"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// world is a cluster that Prometheus watches, on a clock of its own: a controller, which
// is the real engine with its real metrics, one repository and one claim.
type world struct {
	restic.Client // of "offsite"
	t             *testing.T
	step          time.Duration // between two scrapes
	start         time.Time
	scrapes       int
	series        map[string]*recorded

	// mu is held by whatever the engine asks. What happens to the world meanwhile is done
	// while the engine sleeps, and told to it by mu.
	mu sync.Mutex

	controller *prometheus.Registry // nil while there is none
	pod        int
	stop       context.CancelFunc

	down      error // of every request to the repository
	unread    error // of what maintenance has left there
	damaged   bool
	busy      bool // the repository cannot be had alone
	snapshots []restic.Snapshot
	record    []byte

	jobs map[string]*backup.Status
	fate func(attempt int) (lasts time.Duration, ends backup.Phase) // of movers

	claim           bool
	free            float64 // share of the claim's volume
	requests, fails float64 // per second, of the API of a storage system
	answer          string  // with which they fail
	made, failed    float64
}

// recorded is a series as hack/promql wants it.
type recorded struct {
	Labels map[string]string `json:"labels"`
	Values []*float64        `json:"values"`
}

func newWorld(t *testing.T, step time.Duration) *world {
	w := &world{t: t, step: step, start: time.Now(), series: map[string]*recorded{}, jobs: map[string]*backup.Status{}, claim: true, free: 0.5, requests: 1}
	w.fate = func(int) (time.Duration, backup.Phase) { return 5 * time.Minute, backup.Succeeded }
	w.up()
	return w
}

// up starts a controller, which then sleeps.
func (w *world) up() {
	e := &backup.Engine{Repositories: w, Runner: w, Now: time.Now, Tick: 10 * time.Second}
	ctx, stop := context.WithCancel(klog.NewContext(w.t.Context(), logr.Discard()))
	w.pod++
	w.stop, w.controller = stop, prometheus.NewPedanticRegistry()
	w.controller.MustRegister(e)
	go e.Run(ctx)
	synctest.Wait()
}

// gone ends it.
func (w *world) gone() {
	w.stop()
	synctest.Wait()
	w.controller = nil
}

// restart has a new pod after one scrape without any.
func (w *world) restart() {
	w.gone()
	w.pass(w.step)
	w.up()
}

// pass is time that passes, and Prometheus scrapes.
func (w *world) pass(d time.Duration) {
	for range d / w.step {
		w.mu.Lock()
		//lint:ignore SA2001 the engine sees what was done before
		w.mu.Unlock()
		time.Sleep(w.step)
		synctest.Wait()
		w.scrape()
		w.scrapes++
	}
}

func (w *world) scrape() {
	pod := map[string]string{"job": "abaca-controller-metrics", "namespace": namespace, "pod": fmt.Sprint("abaca-controller-", w.pod)}
	if w.controller != nil {
		w.add("up", 1, pod)
		families, err := w.controller.Gather()
		if err != nil {
			w.t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.Metric {
				labels := maps.Clone(pod)
				for _, l := range m.Label {
					labels[l.GetName()] = l.GetValue()
				}
				w.add(f.GetName(), m.GetGauge().GetValue()+m.GetCounter().GetValue(), labels)
			}
		}
	}
	w.made += w.requests * w.step.Seconds()
	w.failed += w.fails * w.step.Seconds()
	w.add("abaca_backend_call_seconds_count", w.made, pod, "backend", "manila", "call", "GET shares/{id}", "status", "200")
	w.add("abaca_backend_call_seconds_count", w.failed, pod, "backend", "manila", "call", "GET shares/{id}", "status", cmp.Or(w.answer, "503"))
	if w.claim {
		of := map[string]string{"namespace": "shop", "persistentvolumeclaim": "data"}
		w.add("kube_persistentvolumeclaim_info", 1, of, "storageclass", "fast")
		w.add("kubelet_volume_stats_capacity_bytes", 1000, of)
		w.add("kubelet_volume_stats_available_bytes", 1000*w.free, of)
	}
	others := map[string]string{"namespace": "shop", "persistentvolumeclaim": "of-another-driver"}
	w.add("kube_persistentvolumeclaim_info", 1, others, "storageclass", "other")
	w.add("kubelet_volume_stats_capacity_bytes", 1000, others)
	w.add("kubelet_volume_stats_available_bytes", 0, others)
}

func (w *world) add(name string, v float64, labels map[string]string, more ...string) {
	labels = maps.Clone(labels)
	labels["__name__"] = name
	for i := 0; i < len(more); i += 2 {
		labels[more[i]] = more[i+1]
	}
	key, _ := json.Marshal(labels) // in the order of the names
	s := w.series[string(key)]
	if s == nil {
		s = &recorded{Labels: labels}
		w.series[string(key)] = s
	}
	s.Values = append(append(s.Values, make([]*float64, w.scrapes-len(s.Values))...), &v)
}

// backUp begins a backup of the claim, as a schedule does.
func (w *world) backUp() {
	id := fmt.Sprint("b", time.Now().Unix())
	err := w.Start(w.t.Context(), backup.Job{Attempt: 1, Task: mover.Task{ID: id, Repository: "offsite",
		Backup: &mover.Backup{Backup: id, Volume: "local/v", Host: "shop/data", Time: time.Now()}}}, func(context.Context) error { return nil })
	if err != nil {
		w.t.Fatal(err)
	}
}

// maintain is what the CronJob of the repository runs.
func (w *world) maintain(check, prune bool) {
	o := maintain.Options{Check: check, Prune: prune, ReadDays: 1, LockWait: time.Second, Now: time.Now}
	if _, err := maintain.Run(klog.NewContext(w.t.Context(), logr.Discard()), w, o); err != nil {
		w.t.Fatal(err)
	}
}

// days are such in which all goes well, but for what is left out.
func (w *world) days(n int, backUp, check, prune bool) {
	for range n {
		if backUp {
			w.backUp()
		}
		w.pass(time.Hour)
		if check || prune {
			w.maintain(check, prune)
		}
		w.pass(23 * time.Hour)
	}
}

func (w *world) Names(context.Context) ([]string, error) { return []string{"offsite", "@shop"}, nil }

// Open has no repository of the namespace's own, which may have one.
func (w *world) Open(_ context.Context, name string) (restic.Client, error) {
	if name != "offsite" {
		return nil, fmt.Errorf("repository %q: %w", name, backend.ErrNotFound)
	}
	return w, nil
}

func (w *world) Snapshots(context.Context, ...string) ([]restic.Snapshot, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.snapshots, w.down
}
func (w *world) Dump(context.Context, string, string) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.record, cmp.Or(w.down, w.unread)
}
func (w *world) Size(context.Context) (int64, error)                        { return 1 << 30, nil }
func (w *world) Unlock(context.Context) error                               { return nil }
func (w *world) Forget(context.Context, time.Duration, ...string) error     { return nil }
func (w *world) Users(context.Context, ...string) (ids []string, err error) { return nil, nil }

func (w *world) Prune(context.Context, restic.PruneRequest) error {
	if w.busy {
		return restic.ErrLocked
	}
	return nil
}

func (w *world) Check(context.Context, restic.CheckRequest) error {
	if w.damaged {
		return restic.ErrDamaged
	}
	return nil
}

func (w *world) Backup(_ context.Context, r restic.BackupRequest, _ func(restic.Progress)) (*restic.BackupSummary, error) {
	text, err := os.ReadFile(r.Dir + "/" + r.Targets[0])
	w.mu.Lock()
	defer w.mu.Unlock()
	w.record = text
	w.snapshots = append(slices.Clone(w.snapshots), restic.Snapshot{ID: fmt.Sprint("m", len(w.snapshots)), Tags: r.Tags, Time: r.Time})
	return &restic.BackupSummary{}, err
}

func (w *world) Start(ctx context.Context, job backup.Job, may func(context.Context) error) error {
	if err := may(ctx); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.jobs[job.Task.ID] = &backup.Status{Job: job, Phase: backup.Running, Started: time.Now()}
	return nil
}

func (w *world) Status(_ context.Context, id string) (*backup.Status, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.status(id)
}

func (w *world) status(id string) (*backup.Status, error) {
	st := w.jobs[id]
	if st == nil {
		return nil, fmt.Errorf("job %s: %w", id, backend.ErrNotFound)
	}
	if lasts, ends := w.fate(st.Job.Attempt); st.Phase == backup.Running && time.Since(st.Started) >= lasts {
		st.Phase, st.Ended = ends, time.Now()
		switch ends {
		case backup.Failed:
			st.Result = mover.Result{Error: "S3 is full", Reason: mover.ReasonNoSpace}
		case backup.Succeeded:
			st.Result = mover.Result{Snapshot: id, Backup: &restic.BackupSummary{TotalFiles: 1}}
			w.snapshots = append(slices.Clone(w.snapshots), restic.Snapshot{ID: id, Time: st.Job.Task.Backup.Time, Host: "shop/data",
				Tags: []string{mover.TagBackup + id, mover.TagVolume + "local/v"}, Summary: st.Result.Backup})
		}
	}
	copied := *st
	return &copied, nil
}

func (w *world) Jobs(context.Context) (all []*backup.Status, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(w.jobs)) {
		st, _ := w.status(id)
		all = append(all, st)
	}
	return all, nil
}

func (w *world) Stop(context.Context, string) error    { return nil }
func (w *world) Release(context.Context, string) error { return nil }
func (w *world) Remove(_ context.Context, id string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.jobs, id)
	return nil
}

func (w *world) always(lasts time.Duration, ends backup.Phase) {
	w.fate = func(int) (time.Duration, backup.Phase) { return lasts, ends }
}

const day = 24 * time.Hour

// alertCases are what happens, and which alerts fire from when until when, since the
// beginning, give or take ten minutes; and no others. For each of near it is all but a
// case, that of a person who would be called for nothing.
var alertCases = []struct {
	name  string
	step  time.Duration
	run   func(*world)
	fires map[string][2]time.Duration // no end: it fires to the end
	near  []string
}{
	{name: "all is well", step: 5 * time.Minute, run: func(w *world) { w.days(3, true, true, true) },
		near: []string{"AbacaBackupTooOld", "AbacaCheckTooOld", "AbacaPruneTooOld", "AbacaNotMaintained", "AbacaBytesNotRead", "AbacaShareNearlyFull", "AbacaControllerDown"}},
	{name: "nobody backs up any more", step: 5 * time.Minute, run: func(w *world) {
		w.days(1, true, true, true)
		w.days(2, false, true, true)
		w.backUp()
		w.pass(time.Hour)
	}, fires: map[string][2]time.Duration{"AbacaBackupTooOld": {30*time.Hour + 15*time.Minute, 3 * day}}},
	{name: "the claim is gone", step: 5 * time.Minute, run: func(w *world) {
		w.days(1, true, true, true)
		w.claim = false
		w.days(2, false, true, true)
	}, near: []string{"AbacaBackupTooOld", "AbacaShareNearlyFull"}},
	{name: "a claim that is not to be backed up any more", step: 5 * time.Minute, run: func(w *world) {
		w.days(1, true, true, true)
		w.snapshots = slices.DeleteFunc(slices.Clone(w.snapshots), func(s restic.Snapshot) bool { return s.Host == "shop/data" })
		w.days(2, false, true, true)
	}, near: []string{"AbacaBackupTooOld"}},

	{name: "the repository is full", step: time.Minute, run: func(w *world) {
		w.backUp()
		w.pass(time.Hour)
		w.always(2*time.Minute, backup.Failed)
		w.backUp()
		w.pass(3 * time.Hour)
		w.always(2*time.Minute, backup.Succeeded)
		w.pass(time.Hour)
	}, fires: map[string][2]time.Duration{
		"AbacaBackupFailed": {92 * time.Minute, 4 * time.Hour},
		"AbacaMoversFail":   {122 * time.Minute, 4 * time.Hour}}},
	{name: "a mover that always dies, of a volume that was never backed up", step: time.Minute, run: func(w *world) {
		w.always(2*time.Minute, backup.Interrupted)
		w.backUp()
		w.pass(3 * time.Hour)
	}, fires: map[string][2]time.Duration{"AbacaBackupFailed": {34 * time.Minute}, "AbacaMoversFail": {64 * time.Minute}}},
	{name: "a node is drained, and the next attempt takes its time", step: time.Minute, run: func(w *world) {
		w.fate = func(attempt int) (time.Duration, backup.Phase) {
			if attempt == 1 {
				return time.Hour, backup.Interrupted
			}
			return 5 * time.Hour, backup.Succeeded
		}
		w.backUp()
		w.pass(7 * time.Hour)
	}, near: []string{"AbacaBackupFailed", "AbacaMoversFail"}},
	{name: "the repository is full for ten minutes", step: time.Minute, run: func(w *world) {
		w.fate = func(int) (time.Duration, backup.Phase) {
			if time.Since(w.start) < 10*time.Minute {
				return time.Minute, backup.Failed
			}
			return time.Minute, backup.Succeeded
		}
		w.backUp()
		w.pass(3 * time.Hour)
	}, near: []string{"AbacaBackupFailed", "AbacaMoversFail"}},

	{name: "the repository is away", step: time.Minute, run: func(w *world) {
		w.pass(time.Hour)
		w.down = errors.New("no route to host")
		w.pass(3 * time.Hour)
		w.down = nil
		w.pass(time.Hour)
	}, fires: map[string][2]time.Duration{"AbacaRepositoryUnreachable": {95 * time.Minute, 4*time.Hour + 5*time.Minute}}},
	{name: "the repository is away for a quarter of an hour", step: time.Minute, run: func(w *world) {
		w.pass(time.Hour)
		w.down = errors.New("no route to host")
		w.pass(15 * time.Minute)
		w.down = nil
		w.pass(time.Hour)
	}, near: []string{"AbacaRepositoryUnreachable"}},
	{name: "the repository is away, and the controller starts anew", step: 5 * time.Minute, run: func(w *world) {
		w.days(1, true, true, true)
		w.pass(7 * time.Hour)
		w.down = errors.New("no route to host")
		w.restart()
		w.pass(17 * time.Hour)
	}, fires: map[string][2]time.Duration{
		"AbacaBackupTooOld":          {day + 6*time.Hour + 15*time.Minute},
		"AbacaRepositoryUnreachable": {day + 7*time.Hour + 31*time.Minute}}},

	{name: "a check finds damage", step: 5 * time.Minute, run: func(w *world) {
		w.days(1, true, true, true)
		w.damaged = true
		w.days(1, true, true, true)
		w.damaged = false
		w.days(1, true, true, true)
	}, fires: map[string][2]time.Duration{"AbacaRepositoryDamaged": {day + 80*time.Minute, 2*day + 65*time.Minute}}},
	{name: "what a check has found cannot be read", step: 5 * time.Minute, run: func(w *world) {
		w.days(1, true, true, true)
		w.unread = errors.New("the pack is damaged")
		w.restart()
		w.pass(time.Hour)
	}, fires: map[string][2]time.Duration{"AbacaRepositoryDamaged": {day + 20*time.Minute}}},
	{name: "what a check has found cannot be read for a moment", step: time.Minute, run: func(w *world) {
		w.maintain(true, true)
		w.pass(5 * time.Minute)
		w.unread = errors.New("a connection was reset")
		w.pass(10 * time.Minute) // one listing
		w.unread = nil
		w.pass(time.Hour)
	}, near: []string{"AbacaRepositoryDamaged"}},
	{name: "nobody maintains any more", step: time.Hour, run: func(w *world) {
		w.days(3, true, true, true)
		w.days(9, true, false, false)
	}, fires: map[string][2]time.Duration{"AbacaCheckTooOld": {10*day + 2*time.Hour}, "AbacaPruneTooOld": {10*day + 2*time.Hour}, "AbacaBytesNotRead": {11*day + 2*time.Hour}}},
	{name: "the repository is never free", step: time.Hour, run: func(w *world) {
		w.days(3, true, true, true)
		w.busy = true
		w.days(9, true, true, true)
	}, fires: map[string][2]time.Duration{"AbacaPruneTooOld": {10*day + 2*time.Hour}}, near: []string{"AbacaCheckTooOld"}},
	{name: "nobody has ever maintained", step: time.Hour, run: func(w *world) { w.days(9, true, false, false) },
		fires: map[string][2]time.Duration{"AbacaNotMaintained": {8 * day}}},
	{name: "only prunes", step: time.Hour, run: func(w *world) {
		w.days(3, true, true, true)
		w.days(10, true, false, true)
	}, fires: map[string][2]time.Duration{"AbacaBytesNotRead": {11*day + 2*time.Hour}, "AbacaCheckTooOld": {10*day + 2*time.Hour}},
		near: []string{"AbacaPruneTooOld"}},

	{name: "a share is nearly full", step: time.Minute, run: func(w *world) {
		w.pass(time.Hour)
		w.free = 0.04
		w.pass(time.Hour)
	}, fires: map[string][2]time.Duration{"AbacaShareNearlyFull": {time.Hour + 15*time.Minute}}},
	{name: "a storage system fails", step: time.Minute, run: func(w *world) {
		w.fails = 0.5
		w.pass(time.Hour)
	}, fires: map[string][2]time.Duration{"AbacaBackendErrors": {16 * time.Minute}}},
	{name: "a storage system says no", step: time.Minute, run: func(w *world) {
		w.fails, w.answer = 10, "404"
		w.pass(time.Hour)
	}, near: []string{"AbacaBackendErrors"}},
	{name: "the controller is gone", step: time.Minute, run: func(w *world) {
		w.pass(time.Hour)
		w.gone()
		w.pass(30 * time.Minute)
	}, fires: map[string][2]time.Duration{"AbacaControllerDown": {time.Hour + 11*time.Minute}}},
	{name: "the controller starts anew", step: time.Minute, run: func(w *world) {
		w.pass(time.Hour)
		w.restart()
		w.pass(time.Hour)
	}, near: []string{"AbacaControllerDown", "AbacaRepositoryUnreachable", "AbacaRepositoryDamaged"}},
}

// TestAlerts: each alert fires when it should, and nobody is called when all is well. What
// is scraped comes from the real engine, and Prometheus' own engine evaluates the rules.
func TestAlerts(t *testing.T) {
	var rules []rule
	for _, m := range renderMonitoring(t, withMonitoring) {
		if m.Kind == "PrometheusRule" {
			rules = m.Spec.Groups[0].Rules
		}
	}
	fire, rest := map[string]bool{}, map[string]bool{}
	for _, c := range alertCases {
		for alert := range c.fires {
			fire[alert] = true
		}
		for _, alert := range c.near {
			rest[alert] = true
		}
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, c.step)
				c.run(w)
				w.gone()
				slack := max(10*time.Minute, c.step)
				at := func(scrape int) time.Duration { return time.Duration(scrape+1) * c.step }
				missing := maps.Clone(c.fires)
				for _, f := range w.fired(rules) {
					want, ok := c.fires[f.Alert]
					to := cmp.Or(want[1], at(w.scrapes))
					if _, first := missing[f.Alert]; !ok || !first || (at(f.From)-want[0]).Abs() > slack || (at(f.Until)-to).Abs() > slack {
						t.Errorf("%s fires from %s to %s, want %v: %v", f.Alert, at(f.From), at(f.Until), want, f.Labels)
					}
					delete(missing, f.Alert)
				}
				for alert := range missing {
					t.Errorf("%s does not fire", alert)
				}
			})
		})
	}
	for _, r := range rules {
		if !fire[r.Alert] || !rest[r.Alert] {
			t.Errorf("%s has no case in which it fires, or none in which it nearly does", r.Alert)
		}
		delete(fire, r.Alert)
		delete(rest, r.Alert)
	}
	for alert := range fire {
		t.Errorf("a case is of %s, which is not there", alert)
	}
	for alert := range rest {
		t.Errorf("a case is of %s, which is not there", alert)
	}
}

// fired is an alert that fired, from one scrape to before another, counted from 0.
type fired struct {
	Alert       string
	Labels      map[string]string
	From, Until int
}

// fired asks Prometheus when the rules fire over what was scraped.
func (w *world) fired(rules []rule) (all []fired) {
	text, err := json.Marshal(map[string]any{"rules": rules, "start": w.start.Add(w.step).Unix(), "step": int(w.step.Seconds()),
		"series": slices.Collect(maps.Values(w.series))})
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.Command(promql(w.t), "alerts")
	cmd.Stdin = bytes.NewReader(text)
	out, err := cmd.Output()
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		w.t.Fatalf("%s", failed.Stderr)
	}
	if err := cmp.Or(err, json.Unmarshal(out, &all)); err != nil {
		w.t.Fatal(err)
	}
	return all
}
