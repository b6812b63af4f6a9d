package kube

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/test/servers"
)

const worker = node + "-worker" // the second node

// TestNodes: what two nodes have of one another. The embedded backend is on the first
// alone, and pods and movers with it; shares of Manila are on both.
func TestNodes(t *testing.T) {
	c := start(t)
	if c.kubectl("get node "+worker+" -o name --ignore-not-found") == "" {
		t.Skip("needs a cluster of two nodes: NODES=2 make kube-up makes one of it")
	}
	c.kubectl("config set-context --current --namespace=default")
	c.kubectl("uncordon " + worker)
	t.Cleanup(func() { _, _ = c.try("", "kubectl", "uncordon", node, worker) })
	t.Run("embedded", func(t *testing.T) { (&cluster{t, c.dir}).embeddedNodes() })
	t.Run("manila", func(t *testing.T) { (&cluster{t, c.dir}).manilaNodes() })
}

// podOn is a pod that mounts a claim, on a node, or only rather there than elsewhere.
func podOn(name, claim, on, how string) string {
	const rather = `affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, preference:
  {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}}]}}`
	where := "nodeSelector: {kubernetes.io/hostname: " + on + "}"
	if how == "rather" {
		where = fmt.Sprintf(rather, on)
	}
	return strings.Replace(podWith(name, ofClaim(claim)), "spec: {", "spec: {"+where+", ", 1)
}

// nodesOf are the nodes of the pods that kubectl gets.
func (c *cluster) nodesOf(pods string) string {
	c.Helper()
	return c.kubectl("get pods -o jsonpath={.items[*].spec.nodeName} " + pods)
}

func (c *cluster) embeddedNodes() {
	c.repository("s3", network.S3(c, root+"/bin", c.TempDir()))
	c.install(map[string]any{
		"repositories":   []any{map[string]any{"name": "s3", "secretName": "s3"}},
		"storageClasses": []any{map[string]any{"name": "abaca"}, map[string]any{"name": "late", "volumeBindingMode": "WaitForFirstConsumer"}},
		"movers":         map[string]any{},
	})
	c.await(node+" "+node, "get pods -o jsonpath={.items[*].spec.nodeName} -l app.kubernetes.io/name=abaca -n "+namespace)

	// Pods that would rather be on the other node are where their volume is, or will be:
	// whether it is made before there is one, or for it.
	late := func(name string) string {
		return strings.Replace(claimFrom(name, ""), "storageClassName: abaca", "storageClassName: late", 1)
	}
	c.apply2(claimFrom("data", ""))
	c.await("Bound", "get pvc data -o jsonpath={.status.phase}")
	c.apply2(late("late"))
	for _, claim := range []string{"data", "late"} {
		c.apply2(podOn("of-"+claim, claim, worker, "rather"))
		c.await("Running "+node, "get pod of-"+claim+" -o jsonpath={.status.phase}{'\\x20'}{.spec.nodeName}")
		c.exec("of-"+claim, "dd if=/dev/urandom of=/data/file bs=1M count=8 2>/dev/null; sync")
	}

	// Those that must be there wait, and are told why. Nothing is made for them.
	c.apply2(late("never"))
	for claim, why := range map[string]string{"data": "PersistentVolume's node affinity", "never": "didn't find available persistent volumes"} {
		c.apply2(podOn("no-"+claim, claim, worker, "must"))
		c.says(why, "get pod no-"+claim+` -o jsonpath={.status.conditions[?(@.type=="PodScheduled")].message}`)
	}
	if got := c.kubectl("get pvc never -o jsonpath={.status.phase}{.spec.volumeName}"); got != "Pending" {
		c.Errorf("a claim that no node can have is %s", got)
	}
	c.kubectl("delete pod no-data no-never --grace-period=0 --force")
	c.kubectl("delete pvc never --wait")

	// Movers of all backups at once, which would rather be apart, and of a restore.
	for _, name := range []string{"first", "second", "third"} {
		c.snapshot(name, "abaca-backup")
	}
	were := map[string]bool{}
	await := func(want, args string) {
		c.Helper()
		for until := time.Now().Add(2 * time.Minute); c.kubectl(args) != want; time.Sleep(100 * time.Millisecond) {
			if time.Now().After(until) {
				c.explain()
				c.Fatalf("kubectl %s does not become %q", args, want)
			}
			for _, n := range strings.Fields(c.nodesOf(ours)) {
				were[n] = true
			}
		}
	}
	await("true true true", "get volumesnapshots -o jsonpath={.items[*].status.readyToUse}")
	c.restore("back", "first")
	await("Bound", "get pvc back -o jsonpath={.status.phase}")
	if len(were) != 1 || !were[node] {
		c.Errorf("movers were on %v", were)
	}

	c.kubectl("delete pod of-data of-late --wait")
	c.kubectl("delete pvc data late back --wait")
	c.kubectl("delete volumesnapshot --all --wait --timeout=150s")
	c.await("", "get pv,volumesnapshotcontents -o name")
	c.nothingLeft()
	if left, err := os.ReadDir(c.data("mnt/shares")); err != nil || len(left) > 0 {
		c.Errorf("shares are left: %v, %v", left, err)
	}
	if _, err := os.Stat(filepath.Join(c.dir, "cluster/worker/data/mnt")); !os.IsNotExist(err) {
		c.Errorf("the other node has a backend too: %v", err)
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

func (c *cluster) manilaNodes() {
	// Manila takes its time, on a machine that has others to serve.
	await := func(want, args string) { c.Helper(); c.awaitFor(5*time.Minute, want, args) }
	disk := c.TempDir()
	server := network.S3(c, root+"/bin", disk)
	c.repository("s3", server)
	other := servers.Place{Network: "/run/netns/" + worker}
	holds := c.manila(map[string]any{
		"controller":   map[string]any{"hostNetwork": true, "replicas": 2},
		"repositories": []any{map[string]any{"name": "s3", "secretName": "s3"}},
		"movers":       map[string]any{"resources": map[string]any{"requests": map[string]any{"memory": "192Mi"}, "limits": map[string]any{"cpu": "100m"}}},
	}, network, other)
	apart := func() {
		c.Helper()
		c.rolledOut()
		for _, pods := range []string{controllers, " -l app.kubernetes.io/component=node -n " + namespace} {
			if got := strings.Fields(c.nodesOf(pods)); len(got) != 2 || got[0] == got[1] {
				c.Errorf("pods of %s are on %v", pods, got)
			}
		}
	}
	apart()

	// Pods on both nodes write to one share, and see what the other does.
	all := []string{"one", "two"}
	on := map[string]string{"one": node, "two": worker}
	run := func(claim, prefix string) {
		c.Helper()
		for _, pod := range all {
			c.apply2(podOn(prefix+pod, claim, on[pod], "must"))
		}
		for _, pod := range all {
			await("Running", "get pod "+prefix+pod+" -o jsonpath={.status.phase}")
		}
	}
	c.apply2(claimFrom("data", ""))
	run("data", "")
	const sums = "cd /data && find . -type f -exec sha256sum {} + | sort -k 2"
	fill := func(pods ...string) string {
		c.Helper()
		for _, pod := range pods {
			c.exec(pod, "mkdir -p /data/"+pod+" && for i in 1 2 3; do dd if=/dev/urandom of=/data/"+pod+"/$i bs=1M count=4 2>/dev/null; done; sync")
		}
		return c.exec("one", sums)
	}
	written := fill(all...)
	if got := c.exec("two", sums); got != written || strings.Count(got, "\n") != 5 {
		c.Errorf("one pod sees\n%s\nand the other\n%s", written, got)
	}
	holds("1 shares, 0 snapshots, 1 rules")

	// Both read one snapshot, without a copy, and neither can write to it.
	c.snapshot("now", "abaca-snapshot")
	await("true", "get volumesnapshot now"+ready)
	c.apply2(strings.Replace(from("inside", "ReadOnlyMany", "VolumeSnapshot", "now"), "2Gi", "1Gi", 1))
	fill(all...)
	run("inside", "in-")
	for _, pod := range all {
		if got := c.exec("in-"+pod, sums); got != written {
			c.Errorf("pod %s sees of the snapshot\n%s\nwant\n%s", pod, got, written)
		}
		if got := c.exec("in-"+pod, "touch /data/x 2>&1; true"); !strings.Contains(got, "Read-only file system") {
			c.Errorf("pod %s writes into the snapshot: %s", pod, got)
		}
	}
	holds("1 shares, 1 snapshots, 2 rules")

	// A mover is at work on the other node; where the next one goes is free.
	moving := func(backup string) string {
		c.Helper()
		fill(all...)
		c.kubectl("cordon " + node)
		c.snapshot(backup, "abaca-backup")
		pod := c.mover()
		c.kubectl("uncordon " + node)
		if got := c.kubectl("get pod " + pod + " -o jsonpath={.spec.nodeName} -n " + namespace); got != worker {
			c.Fatalf("the mover is on %s", got)
		}
		return pod
	}
	saved := func(backup string, began time.Time) {
		c.Helper()
		c.awaitFor(5*time.Minute, "true", "get volumesnapshot "+backup+ready)
		c.Logf("backup %s is ready %s after its mover's node has gone", backup, time.Since(began).Round(time.Second))
		c.moved()
		if left := names(filepath.Join(disk, "backups/locks")); left != "" {
			c.Errorf("locks are left: %s", left)
		}
	}

	// Its node is drained: what it may go on with elsewhere is allowed by the budget.
	moving("drained")
	began := time.Now()
	c.kubectl("drain " + worker + " --ignore-daemonsets --delete-emptydir-data --force --timeout=150s")
	saved("drained", began)
	await("", "get volumeattachments -o jsonpath={.items[?(@.spec.nodeName==\""+worker+"\")].metadata.name}")
	c.kubectl("uncordon " + worker)
	apart()
	run("data", "")
	run("inside", "in-")

	// It is lost, as without power. Only that it does not come back, a person must say.
	moving("lost")
	lost := c.lose()
	began = time.Now()
	await("Unknown", "get node "+worker+` -o jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
	c.says("does not answer", "get volumesnapshot lost -o jsonpath={.status.error.message}")
	c.exec("one", "date >/data/alone; cat /data/alone; rm /data/alone; sync")
	c.kubectl("taint node " + worker + " node.kubernetes.io/out-of-service=nodeshutdown:NoExecute")
	saved("lost", began)
	await("", "get volumeattachments -o jsonpath={.items[?(@.spec.nodeName==\""+worker+"\")].metadata.name}")

	// It comes back, with nothing mounted, and has all again.
	lost.comesBack()
	c.kubectl("taint node " + worker + " node.kubernetes.io/out-of-service-")
	apart()
	run("data", "")
	run("inside", "in-")
	if one, two := fill(all...), c.exec("two", sums); one != two {
		c.Errorf("one pod sees\n%s\nand the other, on the node that was lost,\n%s", one, two)
	}

	// It is back before anybody has said anything: the mover is known to be gone.
	moving("short")
	lost = c.lose()
	began = time.Now()
	lost.comesBack()
	saved("short", began)
	apart()

	c.kubectl("delete pod --all --grace-period=1 --wait --timeout=150s")
	await("", "get volumeattachments -o name")
	holds("1 shares, 1 snapshots, 0 rules")
	c.kubectl("delete pvc --all --wait --timeout=150s")
	c.kubectl("delete volumesnapshot --all --wait --timeout=150s")
	await("", "get pv,volumesnapshotcontents -o name")
	holds("0 shares, 0 snapshots, 0 rules")
	await("", "get secret abaca-keys -o jsonpath={.data} -n "+namespace)
	if left := names(filepath.Join(disk, "backups/snapshots")); left != "" {
		c.Errorf("backups are left: %s", left)
	}
	mounts, err := os.ReadFile("/proc/" + c.pid("worker") + "/mountinfo")
	if err != nil {
		c.Error(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "ceph") {
			c.Errorf("CephFS is still mounted on the second node: %s", line)
		}
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
	c.kubectl("delete secret abaca-keys clouds -n " + namespace)
}

// lostNode is the second one, none of whose processes runs any more.
type lostNode struct{ *cluster }

// lose kills what runs on the second node, its daemons and all of its pods, and its
// mounts go with them, until there is nothing.
func (c *cluster) lose() lostNode {
	c.Helper()
	group := "/sys/fs/cgroup/pids/" // version 1
	if _, err := os.Stat(group); err != nil {
		group = "/sys/fs/cgroup/"
	}
	for until := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		left := strings.Fields(c.run("find", group+node+"/worker", "-name", "cgroup.procs", "-exec", "cat", "{}", "+"))
		if len(left) == 0 {
			return lostNode{c}
		}
		if time.Now().After(until) {
			c.Fatalf("processes of %s do not end: %v", worker, left)
		}
		for _, pid := range left {
			if n, err := strconv.Atoi(pid); err == nil {
				_ = syscall.Kill(n, syscall.SIGKILL)
			}
		}
	}
}

// comesBack starts it again.
func (l lostNode) comesBack() {
	l.Helper()
	l.up()
	l.await("True", "get node "+worker+` -o jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
}
