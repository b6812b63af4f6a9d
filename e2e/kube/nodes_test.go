package kube

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
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
	if got := c.nodesOf("-l app.kubernetes.io/name=abaca -n " + namespace); got != node+" "+node {
		c.Errorf("controller and node plugin are on %s", got)
	}

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
	for claim, why := range map[string]string{"data": "volume node affinity", "never": "didn't find available persistent volumes"} {
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
	look := func() {
		for _, n := range strings.Fields(c.nodesOf(ours)) {
			were[n] = true
		}
		time.Sleep(100 * time.Millisecond)
	}
	for until := time.Now().Add(2 * time.Minute); c.kubectl("get volumesnapshots -o jsonpath={.items[*].status.readyToUse}") != "true true true"; look() {
		if time.Now().After(until) {
			c.explain()
			c.Fatal("the backups are not ready")
		}
	}
	c.restore("back", "first")
	for until := time.Now().Add(2 * time.Minute); c.kubectl("get pvc back -o jsonpath={.status.phase}") != "Bound"; look() {
		if time.Now().After(until) {
			c.explain()
			c.Fatal("the claim is not restored")
		}
	}
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
	if left, err := filepath.Glob(filepath.Join(c.dir, "cluster/worker/data/*")); err != nil || len(left) > 0 {
		c.Errorf("the other node has got %v, %v", left, err)
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}
