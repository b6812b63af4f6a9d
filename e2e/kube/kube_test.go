// Package kube installs the chart into a real Kubernetes and runs the examples
// there, as their readers would: `make e2e-faults`.
package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/test/servers"
)

const (
	namespace = "abaca-system"
	node      = "abaca-kube"
	root      = "../.."

	repositoryPassword = "horse" // of all but a namespace's own
)

// network is where a server is started that pods shall reach: the node's address.
var network = servers.Place{Address: "10.251.0.2", Network: "/run/netns/" + node}

// cluster is one that e2e/kube/up has started.
type cluster struct {
	*testing.T
	dir string
}

func start(t *testing.T) *cluster {
	t.Helper()
	dir := os.Getenv("ABACA_KUBE")
	if dir == "" {
		t.Skip("needs a cluster: make e2e-faults starts one")
	}
	c := &cluster{t, dir}
	t.Setenv("KUBECONFIG", filepath.Join(dir, "cluster", "kubeconfig"))
	t.Setenv("PATH", filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
	if out, err := c.try("", "kubectl", "create", "namespace", namespace); err != nil && !strings.Contains(out, "already exists") {
		c.Fatal(out)
	}
	_, _ = c.try("", "kubectl", "cordon", worker) // if it is there; TestNodes alone is of two
	c.kubectl("label --overwrite namespace " + namespace + " pod-security.kubernetes.io/enforce=privileged")
	return c
}

// try runs a program, and returns what it prints.
func (c *cluster) try(stdin, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (c *cluster) run(name string, args ...string) string {
	c.Helper()
	out, err := c.try("", name, args...)
	if err != nil {
		c.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func (c *cluster) kubectl(args string) string {
	c.Helper()
	return c.run("kubectl", strings.Fields(args)...)
}

// exec runs a script in a pod.
func (c *cluster) exec(pod, script string) string {
	c.Helper()
	return c.run("kubectl", "exec", pod, "--", "sh", "-c", script)
}

// apply applies an example, with the images that the cluster has.
func (c *cluster) apply(example string) {
	c.Helper()
	manifest := strings.ReplaceAll(c.example(example), "ghcr.io/abaca-csi/abaca:dev", "abaca:e2e")
	if out, err := c.try(manifest, "kubectl", "apply", "-f", "-"); err != nil {
		c.Fatalf("apply %s: %v\n%s", example, err, out)
	}
}

// await waits until kubectl prints what is wanted.
func (c *cluster) await(want, args string) {
	c.Helper()
	c.awaitFor(2*time.Minute, want, args)
}

func (c *cluster) awaitFor(long time.Duration, want, args string) {
	c.Helper()
	var out string
	for until := time.Now().Add(long); time.Now().Before(until); time.Sleep(500 * time.Millisecond) {
		if out, _ = c.try("", "kubectl", strings.Fields(args)...); out == want {
			return
		}
	}
	c.explain()
	c.Fatalf("kubectl %s: %q, want %q", args, out, want)
}

// explain shows what the cluster says when something does not come.
func (c *cluster) explain() {
	c.Helper()
	for _, args := range []string{"get pods,pvc,volumesnapshots -A", "get events -A --sort-by=.lastTimestamp",
		"logs -n " + namespace + " deploy/abaca-controller -c abaca --tail=30"} {
		out, _ := c.try("", "kubectl", strings.Fields(args)...)
		lines := strings.Split(out, "\n")
		c.Logf("kubectl %s\n%s", args, strings.Join(lines[max(0, len(lines)-30):], "\n"))
	}
}

// job runs a CronJob now, and returns what it logs. More of kubectl's flags say where
// it is, and who runs it.
func (c *cluster) job(cronJob, name string, flags ...string) string {
	c.Helper()
	c.kubectl("create job " + name + " --from=cronjob/" + cronJob + " " + strings.Join(flags, " "))
	return c.finished(name, flags...)
}

// finished waits until a Job is complete, and returns what it logs.
func (c *cluster) finished(job string, flags ...string) string {
	c.Helper()
	in := " " + strings.Join(flags, " ")
	c.await("Complete", "get job "+job+" -o jsonpath={.status.conditions[?(@.type==\"Complete\")].type}"+in)
	return c.kubectl("logs job/" + job + in)
}

const ready = " -o jsonpath={.status.readyToUse}"

// TestExamples: the chart is installed, and the examples do what they say, in
// their order; in the end nothing is left.
func TestExamples(t *testing.T) {
	c := start(t)
	c.install(nil)
	c.kubectl("config set-context --current --namespace=default")

	c.apply("1-claim.yaml")
	c.apply("2-writer.yaml")
	c.await("Bound", "get pvc data -o jsonpath={.status.phase}")
	c.await("Running", "get pod writer -o jsonpath={.status.phase}")
	c.exec("writer", "until [ -s /data/log ]; do sleep 1; done")

	c.apply("3-snapshot.yaml")
	c.await("true", "get volumesnapshot data-now"+ready)
	c.apply("4-look-inside.yaml")
	c.await("Succeeded", "get pod reader -o jsonpath={.status.phase}")
	if out := c.kubectl("logs reader"); !strings.Contains(out, "it cannot be written") || !strings.Contains(out, "UTC") {
		t.Errorf("the reader says\n%s", out)
	}

	c.exec("writer", "echo secret >/data/proof; echo gone >/data/left.tmp")
	c.apply("5-backup.yaml")
	c.await("true", "get volumesnapshot data-offsite"+ready)
	c.apply("6-restore.yaml")
	c.await("Bound", "get pvc data-restored -o jsonpath={.status.phase}")
	if out, err := c.try(strings.NewReplacer("name: writer", "name: check", "claimName: data", "claimName: data-restored").Replace(c.example("2-writer.yaml")),
		"kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(out)
	}
	c.await("Running", "get pod check -o jsonpath={.status.phase}")
	if got := c.exec("check", "cat /data/proof; ls /data"); !strings.HasPrefix(got, "secret") || strings.Contains(got, "left.tmp") {
		t.Errorf("restored: %q", got)
	}

	// Both plugins are replaced while volumes are in use.
	c.kubectl("delete pods --all --wait -n " + namespace)
	c.rolledOut()
	c.exec("writer", "echo more >>/data/proof")
	if got := c.exec("check", "cat /data/proof"); got != "secret" {
		t.Errorf("after the plugins were replaced: %q", got)
	}

	c.apply("7-frozen-view.yaml")
	if out := c.job("nightly", "tonight"); !strings.Contains(out, "./proof") || !strings.Contains(out, "./log") {
		t.Errorf("the frozen view has\n%s", out)
	}
	c.apply("8-schedule.yaml")
	c.job("backup", "now")
	c.await("true true", "get volumesnapshots -l abaca-csi.github.io/schedule=backup -o jsonpath={.items[*].status.readyToUse}")

	c.kubectl(`patch pvc data --type=merge -p {"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`)
	c.await("2Gi", "get pvc data -o jsonpath={.status.capacity.storage}")

	// Users' own tools, over views as large as the claim that has grown.
	own := strings.ReplaceAll(c.example("10-own-tools.yaml"), "storage: 1Gi", "storage: 2Gi")
	if out, err := c.try(own, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(out)
	}
	for tool, words := range map[string][]string{"restic": {"snapshot ", " saved"}, "borg": {"proof", "log"}, "rsync": {"proof", "log"}} {
		out := c.job("own-"+tool, "own-"+tool+"-now")
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("%s does not say %q, but\n%s", tool, w, out)
			}
		}
	}

	// The claim goes before its snapshots.
	c.kubectl("delete pod writer reader check --grace-period=1 --wait")
	c.kubectl("delete cronjob nightly backup own-restic own-borg own-rsync --wait")
	c.kubectl("delete secret archive")
	c.kubectl("delete pvc data data-restored data-then archive --wait")
	c.kubectl("delete volumesnapshot --all --wait")
	c.await("", "get pv,volumesnapshotcontents,volumeattachments -o name")
	if left, err := os.ReadDir(c.data("offsite/snapshots")); err != nil || len(left) > 0 {
		t.Errorf("left in the repository: %v, %v", left, err)
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

func (c *cluster) example(name string) string {
	c.Helper()
	text, err := os.ReadFile(filepath.Join(root, "deploy/examples", name))
	if err != nil {
		c.Fatal(err)
	}
	return string(text)
}

// data is the directory of the node where all state is, and the repository.
func (c *cluster) data(path ...string) string {
	return filepath.Join(append([]string{c.dir, "cluster/data"}, path...)...)
}

// install installs the chart, with the embedded backend and a repository in a
// directory of the node. Values take the place of its own.
func (c *cluster) install(more map[string]any) {
	c.Helper()
	c.chart(filepath.Join(root, "deploy/charts/abaca"), more)
}

// chart installs another state of the chart, or upgrades to it.
func (c *cluster) chart(dir string, more map[string]any) {
	c.Helper()
	data := c.data()
	all := map[string]any{
		"image":          map[string]any{"repository": "abaca", "tag": "e2e"},
		"kubeletDir":     filepath.Join(c.dir, "cluster/kubelet"),
		"state":          map[string]any{"hostPath": data},
		"backends":       []any{map[string]any{"name": "local", "local": map[string]any{"node": node, "size": "10Gi"}}},
		"repositories":   []any{map[string]any{"name": "offsite", "secretName": "offsite"}},
		"storageClasses": []any{map[string]any{"name": "abaca"}},
		"movers":         c.movers(nil),
	}
	maps.Copy(all, more)
	values, err := json.Marshal(all)
	file := filepath.Join(c.TempDir(), "values.yaml")
	if err = errors.Join(err, os.WriteFile(file, values, 0o600)); err != nil {
		c.Fatal(err)
	}
	c.secret("offsite", "RESTIC_PASSWORD="+repositoryPassword, "RESTIC_REPOSITORY="+c.data("offsite"))
	c.run("helm", "upgrade", "--install", "abaca", dir, "--namespace", namespace, "--values", file)
	c.rolledOut()
}

// movers are the values of movers that have the repository, a directory of the
// node, mounted.
func (c *cluster) movers(more map[string]any) map[string]any {
	values := map[string]any{
		"volumes":      []any{map[string]any{"name": "offsite", "hostPath": map[string]any{"path": c.data("offsite"), "type": "DirectoryOrCreate"}}},
		"volumeMounts": []any{map[string]any{"name": "offsite", "mountPath": c.data("offsite")}},
	}
	maps.Copy(values, more)
	return values
}

// repository makes the Secret of a repository on a server.
func (c *cluster) repository(name string, server *servers.Server) {
	c.Helper()
	entries := []string{"RESTIC_PASSWORD=" + repositoryPassword}
	for key, value := range server.Env {
		entries = append(entries, key+"="+value)
	}
	c.secret(name, entries...)
}

// secret makes a Secret of the driver's namespace anew.
func (c *cluster) secret(name string, entries ...string) {
	c.Helper()
	c.kubectl("delete secret " + name + " --ignore-not-found -n " + namespace)
	args := []string{"create", "secret", "generic", name, "-n", namespace}
	for _, e := range entries {
		args = append(args, "--from-literal="+e)
	}
	c.run("kubectl", args...)
}

// rolledOut waits until both plugins are ready.
func (c *cluster) rolledOut() {
	c.Helper()
	for _, what := range []string{"deployment/abaca-controller", "daemonset/abaca-node"} {
		if out, err := c.try("", "kubectl", "rollout", "status", what, "-n", namespace, "--timeout=150s"); err != nil {
			c.explain()
			c.Fatalf("%s: %s", what, out)
		}
	}
}

// processes are those of the driver in the cluster: a "controller", or a "node".
func (c *cluster) processes(role string) (pids []int) {
	c.Helper()
	found, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range found {
		if pid, _ := strconv.Atoi(filepath.Base(dir)); c.isDriver(pid, role) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// isDriver says whether a process is one of those.
func (c *cluster) isDriver(pid int, role string) bool {
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	args := strings.Split(string(line), "\x00")
	if len(args) < 2 || filepath.Base(args[0]) != "abaca" || args[1] != role {
		return false
	}
	groups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return strings.Contains(string(groups), "/"+node+"/")
}
