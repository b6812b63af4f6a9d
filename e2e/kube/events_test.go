package kube

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// told is an event, as kubectl prints it.
type told struct {
	Reason, Message string
	Source          struct{ Component string }
	InvolvedObject  struct{ UID string }
}

// eventsAbout are the events that `kubectl describe` shows for an object.
func (c *cluster) eventsAbout(kind, name string) []told {
	c.Helper()
	uid := c.kubectl("get " + kind + " " + name + " -o jsonpath={.metadata.uid}")
	var list struct{ Items []told }
	if err := json.Unmarshal([]byte(c.kubectl("get events -o json --field-selector=involvedObject.uid="+uid)), &list); err != nil {
		c.Fatal(err)
	}
	return list.Items
}

// tells waits for an event of an object that speaks of all words, at most a minute.
func (c *cluster) tells(kind, name, reason string, words ...string) {
	c.Helper()
	var all []told
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(time.Second) {
		all = c.eventsAbout(kind, name)
	events:
		for _, e := range all {
			if reason != "" && e.Reason != reason {
				continue
			}
			for _, w := range words {
				if !strings.Contains(e.Message, w) {
					continue events
				}
			}
			c.Logf("%s %s after %s: %s (%s): %s", kind, name, time.Since(began).Round(time.Second), e.Reason, e.Source.Component, e.Message)
			return
		}
	}
	c.explain()
	c.Errorf("no event %s of %s %s speaks of %q within a minute; it has %+v", reason, kind, name, words, all)
}

// TestEvents: what becomes of a backup and of a restore is told on the objects of
// the user, once, with two controllers and after both were killed; and whatever can
// be wrong with what a user writes is told there within a minute; an administrator's
// namespace that takes no driver, by the chart's notes.
func TestEvents(t *testing.T) {
	c := start(t)
	c.kubectl("create namespace strict")
	t.Cleanup(func() { c.kubectl("delete namespace strict --wait=false") })
	c.kubectl("label namespace strict pod-security.kubernetes.io/enforce=restricted")
	if notes := c.run("helm", "install", "abaca", filepath.Join(root, "deploy/charts/abaca"), "--namespace", "strict", "--dry-run=server",
		"--set-json", `backends=[{"name": "local", "local": {"node": "`+node+`"}}]`); !strings.Contains(notes, "strict takes no privileged pods") {
		t.Errorf("the notes of an installation that cannot work: %s", notes)
	}
	c.secret("wrong", "RESTIC_PASSWORD=donkey", "RESTIC_REPOSITORY="+c.data("offsite"))
	c.secret("incomplete", "RESTIC_REPOSITORY="+c.data("offsite"))
	class := func(name, repository string) any {
		return map[string]any{"name": name, "type": "backup", "repository": repository}
	}
	repository := func(name string) any { return map[string]any{"name": name, "secretName": name} }
	schedule := func(name string, more map[string]any) any {
		s := map[string]any{"name": name, "namespace": "default", "schedule": "0 0 1 1 *", "suspend": true, "tiers": []any{"class=abaca-snapshot,keep-last=1"}}
		for k, v := range more {
			s[k] = v
		}
		return s
	}
	c.install(map[string]any{
		"controller":      map[string]any{"replicas": 2},
		"movers":          c.movers(map[string]any{"resources": map[string]any{"requests": map[string]any{"cpu": "20m", "memory": "192Mi"}, "limits": map[string]any{"cpu": "100m"}}}),
		"repositories":    []any{repository("offsite"), repository("wrong"), repository("incomplete"), repository("missing")},
		"snapshotClasses": []any{class("abaca-backup", "offsite"), class("wrong", "wrong"), class("incomplete", "incomplete"), class("missing", "missing"), map[string]any{"name": "abaca-snapshot", "type": "snapshot"}},
		"schedules": []any{schedule("selects-nothing", map[string]any{"selector": "app=nobody"}),
			schedule("keeps-nothing", map[string]any{"claims": []any{"data"}, "tiers": []any{"class=abaca-snapshot,keep-last=0"}})},
	})
	c.kubectl("config set-context --current --namespace=default")
	c.apply("1-claim.yaml")
	c.apply("2-writer.yaml")
	c.await("Running", "get pod writer -o jsonpath={.status.phase}")
	c.exec("writer", "dd if=/dev/urandom of=/data/first bs=1M count=4 2>/dev/null; sync")

	// What goes well.
	c.snapshot("well", "abaca-backup")
	c.await("true", "get volumesnapshot well"+ready)
	c.tells("volumesnapshot", "well", "BackupFinished", "default/data", `"offsite"`, "new or changed")
	c.restore("back", "well")
	c.await("Bound", "get pvc back -o jsonpath={.status.phase}")
	c.tells("pvc", "back", "RestoreFinished", "4.0 MiB")
	c.kubectl("delete pods --force --grace-period=0 -l app.kubernetes.io/component=controller -n " + namespace)
	c.rolledOut()
	for object, reasons := range map[string][]string{
		"volumesnapshot well": {"BackupStarted", "BackupFinished"}, "pvc data": {"BackupFinished"}, "pvc back": {"RestoreStarted", "RestoreFinished"}} {
		kind, name, _ := strings.Cut(object, " ")
		got := map[string]int{}
		for _, e := range c.eventsAbout(kind, name) {
			if e.Source.Component == "abaca-csi.github.io" {
				got[e.Reason]++
				if e.Reason == "BackupFinished" && !strings.Contains(e.Message, "new or changed") {
					t.Errorf("%s: %s", object, e.Message)
				}
			}
		}
		for _, r := range reasons {
			if got[r] != 1 || len(got) != len(reasons) {
				t.Errorf("%s has events %v, want one of each of %s", object, got, reasons)
			}
		}
		if out := c.kubectl("describe " + object); !strings.Contains(out, reasons[0]) {
			t.Errorf("kubectl describe %s shows no %s:\n%s", object, reasons[0], out)
		}
	}

	// How far a mover is: the controller has it of the mover's log.
	c.exec("writer", "dd if=/dev/urandom of=/data/more bs=1M count=80 2>/dev/null; sync")
	c.snapshot("slow", "abaca-backup")
	c.progress("slow")
	c.await("true", "get volumesnapshot slow"+ready)

	// An attempt that fails, and the next one.
	c.exec("writer", "dd if=/dev/urandom of=/data/first bs=1M count=1 2>/dev/null; sync")
	c.writable("offsite/data", 0o555)
	c.snapshot("later", "abaca-backup")
	c.tells("volumesnapshot", "later", "BackupDelayed", "attempt 1", "permission denied")
	c.writable("offsite/data", 0o700)
	c.await("true", "get volumesnapshot later"+ready)
	c.tells("volumesnapshot", "later", "BackupFinished", "new or changed")

	// A controller that is killed with a repository in hand leaves a lock, under its
	// own host name, which the next one removes.
	holder := strings.Fields(c.kubectl("get pods -o jsonpath={.items[*].metadata.name} -l app.kubernetes.io/component=controller -n " + namespace))[0]
	c.exec2(holder, lockRepository)
	if locks, err := os.ReadDir(c.data("offsite/locks")); err != nil || len(locks) == 0 {
		t.Errorf("no lock: %v", err)
	}
	c.kubectl("delete pod --force --grace-period=0 -n " + namespace + " " + holder)
	began := time.Now()
	for locks := []os.DirEntry{nil}; len(locks) > 0; time.Sleep(time.Second) {
		if locks, _ = os.ReadDir(c.data("offsite/locks")); time.Since(began) > 100*time.Second {
			c.explain()
			t.Fatalf("%d locks are left of controller %s", len(locks), holder)
		}
	}
	t.Logf("its lock is gone after %s", time.Since(began).Round(time.Second))
	c.rolledOut()
	if out := c.kubectl("logs -n " + namespace + " -l app.kubernetes.io/component=controller -c abaca --tail=-1"); !strings.Contains(out, `"host":"`+holder+`"`) {
		t.Error("no controller says that it has removed the lock")
	}

	// What cannot be.
	c.snapshot("classless", "nowhere")
	c.tells("volumesnapshot", "classless", "", "nowhere")
	c.snapshot("secretless", "missing")
	c.tells("volumesnapshot", "secretless", "SnapshotRefused", `"missing"`, "RESTIC_REPOSITORY")
	c.snapshot("half", "incomplete")
	c.tells("volumesnapshot", "half", "SnapshotRefused", `"incomplete"`, "RESTIC_PASSWORD")
	c.snapshot("locked-out", "wrong")
	c.tells("volumesnapshot", "locked-out", "SnapshotRefused", `"wrong"`, "password")
	c.kubectl("annotate --overwrite pvc data abaca-csi.github.io/exclude=a/[")
	c.snapshot("patterned", "abaca-backup")
	c.tells("volumesnapshot", "patterned", "SnapshotRefused", "abaca-csi.github.io/exclude", `"a/["`)
	c.kubectl("annotate pvc data abaca-csi.github.io/exclude-")
	c.apply2(foreign)
	c.apply2(strings.NewReplacer("data-offsite", "foreign", "persistentVolumeClaimName: data", "persistentVolumeClaimName: foreign").Replace(c.example("5-backup.yaml")))
	c.tells("volumesnapshot", "foreign", "SnapshotRefused", "not the id of a volume of this driver", "another driver")
	claim := strings.NewReplacer("data-restored", "small", "data-offsite", "well", "storage: 1Gi", "storage: 1Mi")
	c.apply2(claim.Replace(c.example("6-restore.yaml")))
	c.tells("pvc", "small", "ProvisioningFailed", "1048576", "less than")
	c.kubectl("create job nothing --from=cronjob/selects-nothing")
	c.tells("cronjob", "selects-nothing", "NothingSelected", "app=nobody")
	c.kubectl("create job all --from=cronjob/keeps-nothing")
	c.tells("cronjob", "keeps-nothing", "ScheduleInvalid", "keep-last")

	c.kubectl("delete job nothing all --wait")
	c.kubectl("delete pod writer --grace-period=1 --wait")
	c.kubectl("delete pvc small back --wait")
	c.kubectl("delete volumesnapshot --all --wait --timeout=100s")
	c.kubectl("delete pvc data foreign --wait")
	c.kubectl("delete pv foreign --wait")
	c.await("", "get pv,volumesnapshotcontents,volumeattachments -o name")
	c.nothingLeft()
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

// asked is what each controller answers at a path of its loopback, or why it does not.
func (c *cluster) asked(path string) (answers []string) {
	c.Helper()
	for _, pod := range strings.Fields(c.kubectl("get pods -o jsonpath={.items[*].metadata.name} -l app.kubernetes.io/component=controller -n " + namespace)) {
		out, err := forwarded(pod, path)
		if err != nil {
			out = err.Error()
		}
		answers = append(answers, out)
	}
	return answers
}

// forwarded asks a controller's pod as docs/monitoring.md says.
func forwarded(pod, path string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	forward := exec.CommandContext(ctx, "kubectl", "port-forward", "--namespace="+namespace, "pod/"+pod, ":29685")
	said, err := forward.StdoutPipe()
	if err == nil {
		err = forward.Start()
	}
	if err != nil {
		return "", err
	}
	defer forward.Wait() // after cancel, which is what ends it
	defer cancel()
	line, err := bufio.NewReader(said).ReadString('\n')
	address := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(line)
	if address == "" {
		return "", fmt.Errorf("%s is not forwarded: %q, %v", pod, line, err)
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/"+path, nil)
	if err != nil {
		return "", err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return string(text), err
}

// progress waits until a controller's /status says how far a mover is.
func (c *cluster) progress(snapshot string) {
	c.Helper()
	name := "snapshot-" + c.kubectl("get volumesnapshot "+snapshot+" -o jsonpath={.metadata.uid}")
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(time.Second) {
		for _, out := range c.asked("status") {
			var status struct {
				Movers []struct {
					Name     string
					Progress struct{ BytesDone, BytesTotal int64 }
				}
			}
			_ = json.Unmarshal([]byte(out), &status)
			for _, m := range status.Movers {
				if m.Name == name && m.Progress.BytesDone > 0 {
					c.Logf("/status after %s: %+v", time.Since(began).Round(time.Second), m)
					return
				}
			}
		}
	}
	c.explain()
	c.Errorf("no controller says within a minute how far the mover of %s is", snapshot)
}

// writable makes the directories of a repository ones that can be written, or not.
func (c *cluster) writable(dir string, mode os.FileMode) {
	c.Helper()
	folders, err := filepath.Glob(c.data(dir, "*"))
	if err != nil || len(folders) == 0 {
		c.Fatalf("%d folders in %s: %v", len(folders), dir, err)
	}
	for _, f := range folders {
		if err := os.Chmod(f, mode); err != nil {
			c.Fatal(err)
		}
	}
}

// lockRepository leaves a restic with a lock behind in a controller's pod.
const lockRepository = `cd /etc/abaca/repositories/offsite; for v in RESTIC_*; do export $v="$(cat $v)"; done
restic --no-cache --limit-download 1 check --read-data >/dev/null 2>&1 &
until [ "$(ls $RESTIC_REPOSITORY/locks)" ]; do sleep 0.2; done`

// foreign is a claim of another driver.
const foreign = `
apiVersion: v1
kind: PersistentVolume
metadata: {name: foreign}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  csi: {driver: other.example.org, volumeHandle: x}
  claimRef: {namespace: default, name: foreign}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: foreign, namespace: default}
spec: {accessModes: [ReadWriteOnce], storageClassName: "", volumeName: foreign, resources: {requests: {storage: 1Gi}}}
`
