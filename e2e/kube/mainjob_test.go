package kube

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/schedule"
	"github.com/abaca-csi/abaca/test/servers"
)

// stored is a repository of the administrator's on a server, and the directory of
// this machine in which the server has it.
type stored struct {
	*cluster
	name   string
	server *servers.Server
	dir    string
}

// stored makes the Secret of a repository.
func (c *cluster) stored(name string, server *servers.Server, dir string) stored {
	c.Helper()
	c.repository(name, server)
	return stored{c, name, server, dir}
}

// restic runs plain restic on the repository, as somebody does who has the password
// and no cluster.
func (s stored) restic(args ...string) string {
	s.Helper()
	all := []string{"--net=" + network.Network, "--", "env", "RESTIC_PASSWORD=" + repositoryPassword}
	for k, v := range s.server.Env {
		all = append(all, k+"="+v)
	}
	return s.run("nsenter", append(append(all, root+"/bin/restic", "--no-cache", "--quiet"), args...)...)
}

// backups says when restic began to make each backup in the repository, by its handle.
func (s stored) backups() map[string]time.Time {
	s.Helper()
	var list []struct {
		Tags    []string
		Summary struct {
			Began time.Time `json:"backup_start"`
		}
	}
	out := s.restic("snapshots", "--no-lock", "--json")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		s.Fatalf("%v: %s", err, out)
	}
	all := map[string]time.Time{}
	for _, one := range list {
		for _, tag := range one.Tags {
			if id, ok := strings.CutPrefix(tag, mover.TagBackup); ok {
				all["backup/"+s.name+"/"+id] = one.Summary.Began
			}
		}
	}
	return all
}

// agrees waits until the repository has the backups that the cluster knows, and no
// others, and returns how many.
func (s stored) agrees() int {
	s.Helper()
	var known, has []string
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(time.Second) {
		known = nil
		for _, h := range strings.Fields(s.kubectl("get volumesnapshotcontents -o jsonpath={.items[*].status.snapshotHandle}")) {
			if strings.HasPrefix(h, "backup/"+s.name+"/") {
				known = append(known, h)
			}
		}
		slices.Sort(known)
		if has = slices.Sorted(maps.Keys(s.backups())); slices.Equal(has, known) {
			return len(has)
		}
	}
	s.explain()
	s.Fatalf("repository %s has %q, and the cluster %q", s.name, has, known)
	return 0
}

// holds waits until the repository says that new backups shall wait.
func (s stored) holds() {
	s.Helper()
	out := ""
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(time.Second) {
		if out = s.restic("snapshots", "--no-lock", "--json", "--tag", mover.TagMaintenance); strings.Contains(out, mover.TagHold) {
			s.Logf("%s holds backups back after %s", s.name, time.Since(began).Round(time.Second))
			return
		}
	}
	s.explain()
	s.Fatalf("%s does not hold new backups back: %s", s.name, out)
}

// size is what the contents of files take in the repository, in bytes.
func (s stored) size() (n int64) {
	s.Helper()
	err := filepath.WalkDir(filepath.Join(s.dir, "data"), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			info, err := e.Info()
			if err != nil {
				return err
			}
			n += info.Size()
		}
		return err
	})
	if err != nil {
		s.Fatal(err)
	}
	return n
}

// maintain runs the repository's CronJob of maintenance now.
func (s stored) maintain(name string) {
	s.Helper()
	before := s.size()
	out := s.job("abaca-maintain-"+s.name, name, "-n "+namespace)
	s.Logf("maintenance of %s: from %d bytes to %d\n%s", s.name, before, s.size(), out)
	for _, step := range []string{"check", "prune", "record"} {
		if !slices.ContainsFunc(strings.Split(out, "\n"), func(line string) bool {
			f := strings.Fields(line)
			return len(f) > 2 && f[0] == s.name && f[1] == step && f[2] == "ok"
		}) {
			s.Errorf("maintenance of %s does not say that step %s is ok", s.name, step)
		}
	}
}

// job runs a CronJob of the tenant's now, as its user.
func (t tenant) job(cronJob, name string) string {
	t.Helper()
	return t.cluster.job(cronJob, name, t.as())
}

// jobFor runs a CronJob as Kubernetes would have, had it been there at that time.
func (t tenant) jobFor(cronJob, name string, at time.Time) string {
	t.Helper()
	var job map[string]any
	if err := json.Unmarshal([]byte(t.kubectl("create job "+name+" --dry-run=client -o json --from=cronjob/"+cronJob)), &job); err != nil {
		t.Fatal(err)
	}
	job["metadata"].(map[string]any)["annotations"] = map[string]string{schedule.ScheduledKey: at.Format(time.RFC3339)}
	manifest, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	t.apply(string(manifest))
	return t.finished(name, t.as())
}

// scheduled are the VolumeSnapshots that a schedule has in a tier: the times in their
// names, the oldest first.
func (t tenant) scheduled(tier string) (times []string) {
	t.Helper()
	for _, name := range strings.Fields(t.kubectl("get volumesnapshots -o jsonpath={.items[*].metadata.name} -l " + schedule.TierKey + "=" + tier)) {
		times = append(times, name[strings.LastIndex(name, "-")+1:])
	}
	slices.Sort(times)
	return times
}

// freeze stops the restic of a mover that is backing up, when it has its lock in the
// repository, a directory of this machine; thaw lets it go on.
func (c *cluster) freeze(pod, repository string) (thaw func()) {
	c.Helper()
	signal := func(name string) string {
		out, _ := c.try("", "kubectl", "exec", "-n", namespace, pod, "--", "sh", "-c",
			`for p in /proc/[0-9]*; do grep -qx restic $p/comm && tr '\0' ' ' <$p/cmdline | grep -q ' backup ' && kill -`+name+` ${p#/proc/} && echo done; done`)
		return out
	}
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(100 * time.Millisecond) {
		if strings.Contains(signal("STOP"), "done") && names(filepath.Join(repository, "locks")) != "" {
			return func() { signal("CONT") }
		}
		signal("CONT")
	}
	c.explain()
	c.Fatalf("%s does not back up", pod)
	return nil
}

// slowly has the movers that begin from now on get little of the processor, or again
// as much as there is.
func (c *cluster) slowly(slow bool) {
	c.Helper()
	op := `"remove"`
	if slow {
		op = `"add","value":{"cpu":"100m"}`
	}
	c.kubectl(`patch podtemplate abaca-mover --type=json -p [{"path":"/template/spec/containers/0/resources/limits","op":` + op + `}] -n ` + namespace)
}

// controllersAnew replaces the controller, which then knows what the repositories have.
func (c *cluster) controllersAnew() {
	c.Helper()
	c.kubectl("delete pods -l app.kubernetes.io/component=controller --wait -n " + namespace)
	c.rolledOut()
}

// metrics waits until a controller serves all of the series, and returns their values.
func (c *cluster) metrics(series ...string) []float64 {
	c.Helper()
	var served []string
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(time.Second) {
		served = c.asked("metrics")
		for _, text := range served {
			var values []float64
			for _, s := range series {
				_, rest, _ := strings.Cut("\n"+text, "\n"+s+" ")
				line, _, _ := strings.Cut(rest, "\n")
				if v, err := strconv.ParseFloat(line, 64); err == nil {
					values = append(values, v)
				}
			}
			if len(values) == len(series) {
				return values
			}
		}
	}
	c.Fatalf("no controller serves all of %q:\n%s", series, served)
	return nil
}

// TestMainJob: everything that a namespace's user does with a volume, as that user, and
// what the administrator's CronJobs do behind it; with repositories on a server that
// speaks S3 and on a REST server. In the end nothing is left, anywhere.
func TestMainJob(t *testing.T) {
	c := start(t)
	user := c.tenant("office")
	t.Cleanup(func() {
		_, _ = c.try("", "kubectl", "delete", "namespace", "office", "--ignore-not-found", "--wait=false")
	})
	buckets, dir := t.TempDir(), t.TempDir()
	s3 := c.stored("s3", network.S3(t, root+"/bin", buckets), filepath.Join(buckets, "backups"))
	rest := c.stored("rest", network.REST(t, root+"/bin", dir), dir)
	repository := func(name string) any {
		return map[string]any{"name": name, "secretName": name, "maintenance": map[string]any{"suspend": true, "readDataDays": 1}}
	}
	class := func(repository string) any {
		return map[string]any{"name": "abaca-" + repository, "type": "backup", "repository": repository}
	}
	c.install(map[string]any{
		"repositories":    []any{repository("s3"), repository("rest")},
		"snapshotClasses": []any{map[string]any{"name": "abaca-snapshot", "type": "snapshot"}, class("s3"), class("rest")},
		"movers":          map[string]any{},
		"schedules": []any{map[string]any{"name": "backup", "namespace": "office", "schedule": "* * * * *", "suspend": true, "claims": []any{"data"},
			"tiers": []any{"class=abaca-snapshot,keep-last=1", "class=abaca-s3,keep-last=1,keep-daily=3", "class=abaca-rest,keep-last=2"}}},
	})
	running := func(pods ...string) {
		t.Helper()
		for _, p := range pods {
			user.await("Running", "get pod "+p+" -o jsonpath={.status.phase}")
		}
	}
	sum := func(pod string) string { t.Helper(); return user.exec(pod, "sha256sum </data/blob") }
	fill := func(mib int) string {
		t.Helper()
		user.exec("one", fmt.Sprintf("dd if=/dev/urandom of=/data/blob bs=1M count=%d 2>/dev/null; sync", mib))
		return sum("one")
	}
	grown := strings.NewReplacer("1Gi", "2Gi").Replace
	readOnly := strings.NewReplacer("1Gi", "2Gi", "ReadWriteMany", "ReadOnlyMany").Replace
	snapshot := func(name string) string { return ", dataSource: {" + snapshotGroup + ", name: " + name + "}" }

	// A share that two pods write at once, and that grows under them.
	user.apply(claimFrom("data", ""))
	user.apply(podWith("one", ofClaim("data")))
	user.apply(podWith("two", ofClaim("data")))
	running("one", "two")
	const write = "for i in $(seq 300); do echo $HOSTNAME $i >>/data/both; done"
	user.exec("one", "("+write+") >/dev/null 2>&1 &")
	user.exec("two", write+"; until [ $(wc -l </data/both) = 600 ]; do sleep 0.1; done")
	if got := user.exec("one", "sort -u /data/both | wc -l"); got != "600" {
		t.Errorf("two pods have written 600 lines, of which there are %s", got)
	}
	user.kubectl(`patch pvc data --type=merge -p {"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`)
	user.await("2Gi", "get pvc data -o jsonpath={.status.capacity.storage}")

	// What was then, and what is now: a snapshot, in place and as a share of its own;
	// a clone; and a view that is frozen while the share is written.
	then := fill(4)
	user.apply(snapshotFrom("then", snapshotClass, "persistentVolumeClaimName: data"))
	user.await("true", "get volumesnapshot then"+ready)
	now := fill(4)
	user.apply(grown(claimFrom("clone", ", dataSource: {kind: PersistentVolumeClaim, name: data}")))
	user.apply(grown(claimFrom("again", snapshot("then"))))
	user.apply(readOnly(claimFrom("look", snapshot("then"))))
	for _, claim := range []string{"clone", "again", "look"} {
		user.apply(podWith("of-"+claim, ofClaim(claim)))
	}
	running("of-clone", "of-again", "of-look")
	for pod, want := range map[string]string{"of-clone": now, "of-again": then, "of-look": then} {
		if got := sum(pod); got != want {
			t.Errorf("%s has %s, want %s", pod, got, want)
		}
	}
	for _, pod := range []string{"of-clone", "of-again"} {
		user.exec(pod, "echo mine >/data/blob")
	}
	if out := user.exec("of-look", "echo mine >/data/blob || echo refused"); !strings.Contains(out, "refused") || sum("of-look") != then || sum("one") != now {
		t.Errorf("what was written through a view: %s", out)
	}
	user.apply(grown(strings.Replace(c.example("7-frozen-view.yaml"), "find . -type f -exec sha256sum {} +", "cat log; sleep 3; echo; cat log", 1)))
	user.exec("one", "date >/data/log; (until [ -e /tmp/enough ]; do date >>/data/log; sleep 0.1; done) >/dev/null 2>&1 &")
	first, second, _ := strings.Cut(user.job("nightly", "tonight"), "\n\n")
	if first == "" || strings.TrimSpace(first) != strings.TrimSpace(second) {
		t.Errorf("the frozen view has become\n%s\nand was\n%s", second, first)
	}
	user.exec("one", "touch /tmp/enough")

	// Runs of a schedule, the last of them by Kubernetes' clock. What is kept is right,
	// here and in both repositories.
	sums := map[string]string{}
	for i, at := range []string{"2026-04-10T01:00:00Z", "2026-04-10T13:00:00Z", "2026-04-11T01:00:00Z"} {
		sums[at] = fill(8)
		scheduled, err := time.Parse(time.RFC3339, at)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("run for %s\n%s", at, user.jobFor("backup", fmt.Sprint("run-", i), scheduled))
	}
	last := fill(8)
	user.kubectl(`patch cronjob backup --type=merge -p {"spec":{"suspend":false}}`)
	run := ""
	for began := time.Now(); run == "" && time.Since(began) < 2*time.Minute; time.Sleep(time.Second) {
		run = user.kubectl("get cronjob backup -o jsonpath={.status.active[*].name}")
	}
	user.kubectl(`patch cronjob backup --type=merge -p {"spec":{"suspend":true}}`)
	t.Logf("run %s, by the clock\n%s", run, c.finished(run, user.as()))
	latest := user.scheduled("abaca-snapshot")
	for tier, want := range map[string][]string{
		"abaca-snapshot": nil,
		"abaca-s3":       {"20260410t1300z", "20260411t0100z"},
		"abaca-rest":     {"20260411t0100z"},
	} {
		if got := user.scheduled(tier); !slices.Equal(got, append(want, latest...)) || len(latest) != 1 {
			t.Errorf("%s has the snapshots of %q, want %q and the one by the clock", tier, got, want)
		}
	}
	if a, b := s3.agrees(), rest.agrees(); a != 3 || b != 2 {
		t.Errorf("%d backups by S3 and %d by REST, want 3 and 2", a, b)
	}

	// Maintenance frees what was dropped, and restores are what was.
	for _, s := range []stored{s3, rest} {
		before := s.size()
		s.maintain("maintained-" + s.name)
		if freed := before - s.size(); freed < 6<<20 {
			t.Errorf("%s had %d bytes, of which maintenance has freed %d", s.name, before, freed)
		}
	}
	for claim, want := range map[string]struct{ snapshot, sum string }{
		"from-s3":   {"backup-data-abaca-s3-20260410t1300z", sums["2026-04-10T13:00:00Z"]},
		"from-rest": {"backup-data-abaca-rest-" + strings.Join(latest, ""), last},
	} {
		user.apply(grown(claimFrom(claim, snapshot(want.snapshot))))
		user.apply(podWith("of-"+claim, ofClaim(claim)))
		running("of-" + claim)
		if got := sum("of-" + claim); got != want.sum {
			t.Errorf("%s is %s, want %s", claim, got, want.sum)
		}
		if got := user.exec("of-"+claim, "wc -l </data/both"); got != "600" {
			t.Errorf("%s has %s lines of two pods, want 600", claim, got)
		}
	}

	// Maintenance waits for a backup that runs, and holds back the next, once the
	// controller has seen it, as a new one does at once: the first backup ends, then the
	// repository is pruned, and then the next backup is made.
	fill(64)
	c.slowly(true)
	user.apply(snapshotFrom("runs", "volumeSnapshotClassName: abaca-s3", "persistentVolumeClaimName: data"))
	runs := c.mover()
	thaw := c.freeze(runs, s3.dir)
	c.slowly(false)
	c.kubectl("create job behind --from=cronjob/abaca-maintain-s3 -n " + namespace)
	c.says("new backups wait", "logs job/behind -n "+namespace)
	s3.holds()
	c.controllersAnew()
	user.apply(snapshotFrom("held", "volumeSnapshotClassName: abaca-s3", "persistentVolumeClaimName: clone"))
	held := ""
	for began := time.Now(); held == "" && time.Since(began) < time.Minute; time.Sleep(300 * time.Millisecond) {
		for _, pod := range strings.Fields(c.kubectl(podNames)) {
			if pod != runs {
				held = pod
			}
		}
	}
	c.says("Backup waits for maintenance", "logs "+held+" -n "+namespace)
	time.Sleep(3 * time.Second)
	for _, s := range []string{"runs", "held"} {
		if got := user.kubectl("get volumesnapshot " + s + ready); got != "false" {
			t.Errorf("%s is ready: %q", s, got)
		}
	}
	thaw()
	user.await("true", "get volumesnapshot runs"+ready)
	t.Logf("maintenance says\n%s", c.finished("behind", "-n "+namespace))
	user.await("true", "get volumesnapshot held"+ready)
	began := s3.backups()
	handle := func(snapshot string) string {
		return c.kubectl("get volumesnapshotcontent " + user.kubectl("get volumesnapshot "+snapshot+" -o jsonpath={.status.boundVolumeSnapshotContentName}") +
			" -o jsonpath={.status.snapshotHandle}")
	}

	// The metrics tell of it, also of another controller.
	c.controllersAnew()
	metrics := c.metrics(`abaca_repository_last_prune_timestamp_seconds{repository="s3"}`, `abaca_repository_last_prune_timestamp_seconds{repository="rest"}`,
		`abaca_repository_last_check_timestamp_seconds{repository="s3"}`, `abaca_repository_damaged{repository="s3"}`,
		`abaca_repository_backups{repository="s3"}`, `abaca_repository_read_ratio{repository="rest"}`)
	pruned := time.Unix(int64(metrics[0]), 0)
	if before, after := began[handle("runs")], began[handle("held")]; !before.Before(pruned) || after.Before(pruned) {
		t.Errorf("pruned at %s, a backup was begun before at %s, and one that was held back at %s", pruned, before, after)
	}
	if time.Since(pruned) > time.Hour || metrics[1] == 0 || metrics[2] == 0 || metrics[3] != 0 || metrics[4] != 5 || metrics[5] != 1 {
		t.Errorf("metrics of maintenance: %v", metrics)
	}

	// The end of all: first what was made, then what it was made from.
	user.kubectl("delete pods --all --wait --timeout=100s")
	user.kubectl("delete cronjob nightly --wait")
	user.kubectl("delete pvc --all --wait --timeout=100s")
	user.kubectl("delete volumesnapshots --all --wait --timeout=100s")
	c.await("", "get pv,volumesnapshotcontents,volumeattachments -o name")
	c.moved()
	c.nothingLeft()
	for _, dir := range []string{"shares", "snapshots"} {
		if left := names(c.data("mnt", dir)); left != "" {
			t.Errorf("left in %s: %s", dir, left)
		}
	}
	for _, s := range []stored{s3, rest} {
		if left := s.backups(); len(left) > 0 {
			t.Errorf("left in %s: %v", s.name, left)
		}
		if locks := s.restic("list", "locks", "--no-lock"); locks != "" {
			t.Errorf("locks in %s: %s", s.name, locks)
		}
		s.maintain("emptied-" + s.name)
		if left := s.size(); left > 1<<20 {
			t.Errorf("%d bytes are left in %s", left, s.name)
		}
		s.restic("check", "--read-data")
	}
	c.kubectl("delete jobs --all --wait -n " + namespace)
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
	if left := c.kubectl("get cronjobs,rolebindings,serviceaccounts -o name -n office"); strings.Contains(left, "abaca") || strings.Contains(left, "backup") {
		t.Errorf("left of the schedule: %s", left)
	}
	c.kubectl("delete namespace office --wait --timeout=100s")
}
