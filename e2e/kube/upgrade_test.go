package kube

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// former is a state of Abaca that clusters may have: the first with movers as Jobs,
// conformance and maintenance; it knew no events, no logs of movers and no tenants.
const former = "f001820faee4f00edb51bac67e197111a1acbf85"

// lives is what a pod does that must notice nothing: it goes on writing into a file
// that it keeps open and into one that it opens each time, reads back what it has
// written, and notes what was wrong.
const lives = `exec 3>>/data/open; i=0
while sleep 0.2; do
  i=$((i+1))
  echo $i >&3 && echo $i >>/data/log && [ "$(tail -n 1 /data/log)" = $i ] && [ "$(tail -n 1 /data/open)" = $i ] && sha256sum -c -s /data/sum || echo "$i: $(date)" >>/tmp/wrong
done`

// TestUpgrade: a chart and program of before are upgraded while volumes and a snapshot
// are mounted and a backup is being made. Pods notice nothing, the backup ends, and
// what was made before is as good as what is made after.
func TestUpgrade(t *testing.T) {
	c := start(t)
	if out, err := c.try("", "git", "-c", "safe.directory=*", "-C", root, "cat-file", "-e", former+"^{commit}"); err != nil {
		t.Skipf("needs the history of this tree, in which %s is missing: %v %s", former, err, out)
	}
	cmd := exec.Command(root+"/e2e/kube/former", former)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	image := func(tag string) map[string]any { return map[string]any{"repository": "abaca", "tag": tag} }
	c.chart(filepath.Join(lines[len(lines)-1], "deploy/charts/abaca"), map[string]any{"image": image("former")})
	c.kubectl("config set-context --current --namespace=default")

	running := func(pods ...string) {
		t.Helper()
		for _, p := range pods {
			c.await("Running", "get pod "+p+" -o jsonpath={.status.phase}")
		}
	}
	fromSnapshot := func(name string) string { return ", dataSource: {" + snapshotGroup + ", name: " + name + "}" }
	c.apply2(claimFrom("data", ""))
	c.apply2(podWith("filler", ofClaim("data")))
	running("filler")
	sum := c.exec("filler", "dd if=/dev/urandom of=/data/blob bs=1M count=8 2>/dev/null; cd /data; sha256sum blob; sync")
	c.exec("filler", "echo '"+strings.Replace(sum, "blob", "/data/blob", 1)+"' >/data/sum")
	c.kubectl("delete pod filler --wait")
	c.apply2(strings.Replace(podWith("lives", ofClaim("data")), `[sleep, "3600"]`, "[sh, -c, "+strconv.Quote(lives)+"]", 1))
	running("lives")
	c.snapshot("before", "abaca-snapshot")
	c.snapshot("backup-before", "abaca-backup")
	c.await("true", "get volumesnapshot before"+ready)
	c.await("true", "get volumesnapshot backup-before"+ready)
	c.apply2(strings.Replace(claimFrom("look", fromSnapshot("before")), "ReadWriteMany", "ReadOnlyMany", 1))
	c.apply2(podWith("looks", ofClaim("look")))
	running("looks")
	count := func() int {
		t.Helper()
		n, err := strconv.Atoi(c.exec("lives", "tail -n 1 /data/log"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	pods := func() string {
		t.Helper()
		return c.exec("lives", "grep ' /data ' /proc/self/mountinfo") + "\n" + c.exec("looks", "grep ' /data ' /proc/self/mountinfo") + "\n" +
			c.kubectl("get pods lives looks -o jsonpath={.items[*].metadata.uid}{.items[*].status.containerStatuses[*].restartCount}")
	}
	before, wrote := pods(), count()

	// A backup that is in the middle when all of the driver is replaced.
	c.exec("lives", "dd if=/dev/urandom of=/data/more bs=1M count=64 2>/dev/null; sync")
	c.slowly(true)
	c.snapshot("meanwhile", "abaca-backup")
	mover := c.mover()
	thaw := c.freeze(mover, c.data("offsite"))
	c.slowly(false)
	plugins := c.kubectl("get pods -o jsonpath={.items[*].metadata.uid} -l app.kubernetes.io/name=abaca -n " + namespace)
	c.install(nil)
	for _, uid := range strings.Fields(c.kubectl("get pods -o jsonpath={.items[*].metadata.uid} -l app.kubernetes.io/component!=mover,app.kubernetes.io/name=abaca -n " + namespace)) {
		if strings.Contains(plugins, uid) {
			t.Errorf("pod %s of the driver is that of before", uid)
		}
	}
	if now := c.kubectl(podNames); now != mover {
		t.Errorf("mover %s has become %q", mover, now)
	}
	thaw()
	c.await("true", "get volumesnapshot meanwhile"+ready)
	c.moved()

	// The pods have noticed nothing.
	for end := time.Now().Add(time.Minute); count() < wrote+20 && time.Now().Before(end); {
		time.Sleep(time.Second)
	}
	if after := pods(); after != before {
		t.Errorf("the pods have become\n%s\nand were\n%s", after, before)
	}
	if wrong := c.exec("lives", "cat /tmp/wrong 2>/dev/null; true"); wrong != "" {
		t.Errorf("the pod noticed, at\n%s", wrong)
	}
	t.Logf("%d lines were written meanwhile", count()-wrote)
	c.exec("looks", "sha256sum -c -s /data/sum")

	// What is old is good, and what is new too.
	c.snapshot("after", "abaca-snapshot")
	c.snapshot("backup-after", "abaca-backup")
	for _, s := range []string{"after", "backup-after"} {
		c.await("true", "get volumesnapshot "+s+ready)
	}
	c.kubectl(`patch pvc data --type=merge -p {"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`)
	c.await("2Gi", "get pvc data -o jsonpath={.status.capacity.storage}")
	for _, s := range []string{"before", "backup-before", "meanwhile", "after", "backup-after"} {
		c.apply2(claimFrom("from-"+s, fromSnapshot(s)))
		c.apply2(podWith("from-"+s, ofClaim("from-"+s)))
		running("from-" + s)
		c.exec("from-"+s, "sha256sum -c -s /data/sum && echo mine >/data/mine")
	}

	c.kubectl("delete pods --all --wait --timeout=100s")
	c.kubectl("delete pvc --all --wait --timeout=100s")
	c.kubectl("delete volumesnapshots --all --wait --timeout=100s")
	c.await("", "get pv,volumesnapshotcontents,volumeattachments -o name")
	c.nothingLeft()
	for _, dir := range []string{"offsite/snapshots", "offsite/locks", "mnt/shares"} {
		if left := names(c.data(dir)); left != "" {
			t.Errorf("left in %s: %s", dir, left)
		}
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

// TestKustomize: what is applied without Helm, with the node, the image, the repository
// and the directories of this cluster written into it, works and goes again.
func TestKustomize(t *testing.T) {
	c := start(t)
	repository := t.TempDir()
	server := network.REST(t, root+"/bin", repository)
	dir := filepath.Join(t.TempDir(), "embedded")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(root, "deploy/kustomize/embedded"))); err != nil {
		t.Fatal(err)
	}
	write := func(file string, pairs ...string) {
		t.Helper()
		path := filepath.Join(dir, file)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(pairs); i += 2 {
			if !strings.Contains(string(text), pairs[i]) {
				t.Errorf("%s does not say %s", file, pairs[i])
			}
		}
		if err := os.WriteFile(path, []byte(strings.NewReplacer(pairs...).Replace(string(text))), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("kustomization.yaml", "value: node-name", "value: "+node, "newTag: dev", "newName: docker.io/library/abaca\n    newTag: e2e")
	write("abaca.yaml", "/var/lib/kubelet", filepath.Join(c.dir, "cluster/kubelet"), "/var/lib/abaca", c.data())
	env := "RESTIC_PASSWORD=" + repositoryPassword + "\n"
	for k, v := range server.Env {
		env += k + "=" + v + "\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "repository.env"), []byte(env), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			_, _ = c.try("", "kubectl", "delete", "-k", dir, "--ignore-not-found", "--wait=false")
		}
	})
	c.run("kubectl", "apply", "-k", dir)
	c.rolledOut()
	c.kubectl("config set-context --current --namespace=default")
	c.apply2(claimFrom("data", ""))
	c.apply2(podWith("writer", ofClaim("data")))
	c.await("Running", "get pod writer -o jsonpath={.status.phase}")
	sum := c.exec("writer", "date >/data/log; sha256sum </data/log")
	c.snapshot("saved", "abaca-backup")
	c.await("true", "get volumesnapshot saved"+ready)
	c.apply2(claimFrom("back", ", dataSource: {"+snapshotGroup+", name: saved}"))
	c.apply2(podWith("reader", ofClaim("back")))
	c.await("Running", "get pod reader -o jsonpath={.status.phase}")
	if got := c.exec("reader", "sha256sum </data/log"); got != sum {
		t.Errorf("restored %s, want %s", got, sum)
	}
	if out := c.job("abaca-maintain-offsite", "maintained", "-n "+namespace); !strings.Contains(out, "prune") {
		t.Errorf("maintenance says %s", out)
	}

	c.kubectl("delete pods --all --wait --timeout=100s")
	c.kubectl("delete pvc --all --wait --timeout=100s")
	c.kubectl("delete volumesnapshots --all --wait --timeout=100s")
	c.await("", "get pv,volumesnapshotcontents,volumeattachments -o name")
	c.nothingLeft()
	c.run("kubectl", "delete", "-k", dir, "--wait", "--timeout=150s")
	c.await("", "get namespaces,csidrivers,storageclasses,volumesnapshotclasses,clusterroles,clusterrolebindings -o name -l app.kubernetes.io/name=abaca")
	if left := c.kubectl("get namespaces -o name"); strings.Contains(left, namespace) {
		t.Errorf("left: %s", left)
	}
}
