package kube

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

const (
	ours = " -n " + namespace + " -l abaca-csi.github.io/mover"
	// podNames are the movers' pods that are not on their way out.
	podNames = "get pods --field-selector=status.phase!=Succeeded,status.phase!=Failed -o jsonpath={.items[*].metadata.name}" + ours
)

// snapshot makes a VolumeSnapshot of claim data.
func (c *cluster) snapshot(name, class string) {
	c.Helper()
	c.apply2(strings.NewReplacer("data-offsite", name, "abaca-backup", class).Replace(c.example("5-backup.yaml")))
}

// restore makes a claim from a VolumeSnapshot.
func (c *cluster) restore(name, snapshot string) {
	c.Helper()
	c.apply2(strings.NewReplacer("data-restored", name, "data-offsite", snapshot).Replace(c.example("6-restore.yaml")))
}

func (c *cluster) apply2(manifest string) {
	c.Helper()
	if out, err := c.try(manifest, "kubectl", "apply", "-f", "-"); err != nil {
		c.Fatal(out)
	}
}

// mover waits until one mover's pod is at work, other than those named, and
// returns its name.
func (c *cluster) mover(not ...string) string {
	c.Helper()
	var out string
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(300 * time.Millisecond) {
		out, _ = c.try("", "kubectl", strings.Fields(podNames+" --field-selector=status.phase=Running")...)
		if names := strings.Fields(out); len(names) == 1 && !strings.Contains(strings.Join(not, " "), names[0]) {
			if p, _ := c.try("", "kubectl", "exec", "-n", namespace, names[0], "--", "sh", "-c", "grep -l restic /proc/[0-9]*/comm"); p != "" {
				return names[0]
			}
		}
	}
	c.explain()
	c.Fatalf("no mover is at work: %q", out)
	return ""
}

// says waits until what a command prints holds a word, and returns how long it took.
func (c *cluster) says(word, args string) time.Duration {
	c.Helper()
	began, out := time.Now(), ""
	for time.Since(began) < time.Minute {
		if out, _ = c.try("", "kubectl", strings.Fields(args)...); strings.Contains(out, word) {
			return time.Since(began)
		}
		time.Sleep(300 * time.Millisecond)
	}
	c.explain()
	c.Fatalf("kubectl %s does not speak of %s in a minute:\n%s", args, word, out)
	return 0
}

// eventsOf asks for the events of a VolumeSnapshot's content, which is where the
// snapshotter tells what goes wrong.
func (c *cluster) eventsOf(snapshot string) string {
	c.Helper()
	content := c.kubectl("get volumesnapshot " + snapshot + " -o jsonpath={.status.boundVolumeSnapshotContentName}")
	return "get events -o jsonpath={.items[*].message} --field-selector=involvedObject.kind=VolumeSnapshotContent,involvedObject.name=" + content
}

// nothingLeft waits until there is no object of any mover, and nothing that one
// has used.
func (c *cluster) nothingLeft() {
	c.Helper()
	c.moved()
	var left []os.DirEntry
	for range 100 {
		if left, _ = os.ReadDir(c.data("mnt/snapshots")); len(left) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	c.Errorf("snapshots are left: %v", left)
}

// TestMovers: what can happen to a mover, with two controllers and volumes that are
// attached. Movers are slow here, so that there is a middle.
func TestMovers(t *testing.T) {
	c := start(t)
	c.secret("wrong", "RESTIC_PASSWORD=donkey", "RESTIC_REPOSITORY="+c.data("offsite"))
	c.secret("incomplete", "RESTIC_REPOSITORY="+c.data("offsite"))
	class := func(name, repository string) any {
		return map[string]any{"name": name, "type": "backup", "repository": repository}
	}
	c.install(map[string]any{
		"controller":   map[string]any{"replicas": 2},
		"csiDriver":    map[string]any{"attachRequired": true},
		"repositories": []any{map[string]any{"name": "offsite", "secretName": "offsite"}, map[string]any{"name": "wrong", "secretName": "wrong"}, map[string]any{"name": "incomplete", "secretName": "incomplete"}},
		"snapshotClasses": []any{class("abaca-backup", "offsite"), class("wrong", "wrong"), class("incomplete", "incomplete"),
			map[string]any{"name": "abaca-snapshot", "type": "snapshot"}},
		"movers": c.movers(map[string]any{"resources": map[string]any{"requests": map[string]any{"memory": "192Mi"}, "limits": map[string]any{"cpu": "100m"}}}),
	})
	c.kubectl("config set-context --current --namespace=default")
	c.apply("1-claim.yaml")
	c.apply("2-writer.yaml")
	c.await("Running", "get pod writer -o jsonpath={.status.phase}")
	fill := func(name string) string {
		return c.exec("writer", "dd if=/dev/urandom of=/data/"+name+" bs=1M count=24 2>/dev/null; sync; sha256sum </data/"+name)
	}
	fill("first")

	// The pod is deleted without grace, twice, and then its process killed: other
	// movers take over, one at a time.
	c.snapshot("first", "abaca-backup")
	first := c.mover()
	c.kubectl("delete pod --force --grace-period=0 -n " + namespace + " " + first)
	second := c.mover(first)
	c.exec2(second, "for p in /proc/[0-9]*; do grep -q abaca $p/comm && kill -9 ${p#/proc/}; done; true")
	third := c.mover(first, second)
	t.Logf("movers of one backup: %s, %s, %s", first, second, third)
	c.await("true", "get volumesnapshot first"+ready)
	c.nothingLeft()

	// Both controllers are killed: the mover goes on.
	sum := fill("first")
	c.snapshot("second", "abaca-backup")
	first = c.mover()
	c.kubectl("delete pods --force --grace-period=0 -l app.kubernetes.io/component=controller -n " + namespace)
	c.rolledOut()
	if now := c.kubectl(podNames); now != "" && now != first {
		t.Errorf("mover %s has become %s", first, now)
	}
	c.await("true", "get volumesnapshot second"+ready)
	c.nothingLeft()

	// A restore whose mover is killed fills the claim all the same.
	c.restore("back", "second")
	first = c.mover()
	c.kubectl("delete pod --force --grace-period=0 -n " + namespace + " " + first)
	c.mover(first)
	c.await("Bound", "get pvc back -o jsonpath={.status.phase}")
	c.nothingLeft()
	c.apply2(strings.NewReplacer("name: writer", "name: check", "claimName: data", "claimName: back", "date >>/data/log", "true").Replace(c.example("2-writer.yaml")))
	c.await("Running", "get pod check -o jsonpath={.status.phase}")
	if got := c.exec("check", "sha256sum </data/first"); got != sum {
		t.Errorf("restored %s, want %s", got, sum)
	}

	// A backup and a restore that are deleted while they run.
	fill("first")
	c.snapshot("third", "abaca-backup")
	c.mover()
	c.kubectl("delete volumesnapshot third --wait --timeout=100s")
	c.nothingLeft()
	c.restore("never", "second")
	c.mover()
	c.kubectl("delete pvc never --wait --timeout=100s")
	c.nothingLeft()

	// What cannot be, and why, is said where a user looks.
	for name, word := range map[string]string{"wrong": "password", "incomplete": "RESTIC_PASSWORD"} {
		c.snapshot(name, name)
		t.Logf("%s is said after %s", word, c.says(word, "get volumesnapshot "+name+" -o jsonpath={.status.error.message}"))
		c.says(word, c.eventsOf(name))
		c.kubectl("delete volumesnapshot " + name + " --wait --timeout=100s")
	}
	image := `patch podtemplate abaca-mover --type=json -p [{"op":"replace","path":"/template/spec/containers/0/image","value":"%s"}] -n ` + namespace
	c.kubectl(fmt.Sprintf(image, "127.0.0.1:1/nowhere:none"))
	c.snapshot("fourth", "abaca-backup")
	t.Logf("an image that cannot be pulled is said after %s", c.says("Pull", "get volumesnapshot fourth -o jsonpath={.status.error.message}"))
	c.says("Pull", c.eventsOf("fourth"))
	c.kubectl(fmt.Sprintf(image, "abaca:e2e"))
	c.kubectl("delete jobs --all -n " + namespace) // and not ten minutes later
	c.await("true", "get volumesnapshot fourth"+ready)

	c.kubectl("delete pod writer check --grace-period=1 --wait")
	c.kubectl("delete pvc data back --wait")
	c.kubectl("delete volumesnapshot --all --wait")
	c.await("", "get pv,volumesnapshotcontents,volumeattachments -o name")
	c.nothingLeft()
	for _, dir := range []string{"offsite/snapshots", "offsite/locks", "mnt/shares"} {
		if left, err := os.ReadDir(c.data(dir)); err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

func (c *cluster) exec2(pod, script string) {
	c.Helper()
	_, _ = c.try("", "kubectl", "exec", "-n", namespace, pod, "--", "sh", "-c", script)
}
