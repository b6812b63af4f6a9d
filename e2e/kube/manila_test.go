package kube

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"

	"github.com/abaca-csi/abaca/test/cloud"
	"github.com/abaca-csi/abaca/test/servers"
)

// TestManila: all that a user does, on a real Manila with CephFS; and what becomes of the mounts of ceph-fuse, and of a
// backup, when the node plugin's pod is replaced.
func TestManila(t *testing.T) {
	c := start(t)
	holds := c.manila(map[string]any{
		// A pod's loopback is its own.
		"controller": map[string]any{"hostNetwork": true, "replicas": 1},
		"movers":     c.movers(map[string]any{"resources": map[string]any{"requests": map[string]any{"memory": "192Mi"}, "limits": map[string]any{"cpu": "100m"}}}),
	}, network)
	c.kubectl("config set-context --current --namespace=default")

	// Two pods write.
	c.apply2(claimFrom("data", ""))
	for _, pod := range []string{"one", "two"} {
		c.apply2(podWith(pod, ofClaim("data")))
	}
	for _, pod := range []string{"one", "two"} {
		c.await("Running", "get pod "+pod+" -o jsonpath={.status.phase}")
		c.exec(pod, "mkdir /data/"+pod+" && for i in 1 2 3; do dd if=/dev/urandom of=/data/"+pod+"/$i bs=1M count=3 2>/dev/null; done; sync")
	}
	const sums = "cd /data && find . -type f -exec sha256sum {} + | sort -k 2"
	written := c.exec("one", sums)
	if got := c.exec("two", sums); got != written || len(strings.Split(got, "\n")) != 6 {
		t.Errorf("one pod sees\n%s\nand the other\n%s", written, got)
	}
	holds("1 shares, 0 snapshots, 1 rules")

	c.kubectl(`patch pvc data --type=merge -p {"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`)
	c.await("2Gi", "get pvc data -o jsonpath={.status.capacity.storage}")
	c.exec("one", `for i in $(seq 60); do df -Pk /data | grep -q " 2097152 " && exit; sleep 1; done; df -Pk /data; exit 1`)

	// A snapshot, which is mounted without a copy and cannot be written.
	c.snapshot("now", "abaca-snapshot")
	c.await("true", "get volumesnapshot now"+ready)
	c.exec("one", "echo later >/data/one/1; rm /data/two/2; sync")
	changed := c.exec("one", sums)
	c.apply2(from("inside", "ReadOnlyMany", "VolumeSnapshot", "now"))
	c.apply2(podWith("reader", ofClaim("inside")))
	c.await("Running", "get pod reader -o jsonpath={.status.phase}")
	if got := c.exec("reader", sums); got != written {
		t.Errorf("the snapshot has\n%s\nwant\n%s", got, written)
	}
	if got := c.exec("reader", "touch /data/x 2>&1; touch /data/one/1 2>&1; ls -A /data; true"); strings.Count(got, "Read-only file system") != 2 || !strings.HasSuffix(got, "one\ntwo") {
		t.Errorf("to write into the snapshot, and to list it: %s", got)
	}
	if way := c.kubectl("get pv " + c.kubectl("get pvc inside -o jsonpath={.spec.volumeName}") + " -o jsonpath={.spec.csi.volumeAttributes.snapshotWay}"); way != "directory" {
		t.Errorf("the snapshot is mounted by way of %q", way)
	}
	holds("1 shares, 1 snapshots, 2 rules")
	c.survive(sums, written, changed)

	// A clone, a frozen view of the live claim, a backup and what it gives back.
	c.apply2(from("clone", "ReadWriteMany", "VolumeSnapshot", "now"))
	c.apply2(podWith("cloned", ofClaim("clone")))
	c.await("Running", "get pod cloned -o jsonpath={.status.phase}")
	if got := c.exec("cloned", sums+"; touch /data/x"); got != written {
		t.Errorf("the clone has\n%s\nwant\n%s", got, written)
	}
	c.apply2(strings.ReplaceAll(c.example("7-frozen-view.yaml"), "storage: 1Gi", "storage: 2Gi"))
	if out := c.job("nightly", "tonight"); sorted(out) != sorted(changed) {
		t.Errorf("the frozen view has\n%s\nwant\n%s", out, changed)
	}
	c.kubectl("delete job tonight --wait") // and the view with its pod
	c.snapshot("offsite", "abaca-backup")
	c.mover()
	c.replaceNode() // another mover takes over
	c.await("true", "get volumesnapshot offsite"+ready)
	c.apply2(from("back", "ReadWriteMany", "VolumeSnapshot", "offsite"))
	c.await("Bound", "get pvc back -o jsonpath={.status.phase}")
	c.apply2(podWith("check", ofClaim("back")))
	c.await("Running", "get pod check -o jsonpath={.status.phase}")
	if got := c.exec("check", sums); got != changed {
		t.Errorf("restored\n%s\nwant\n%s", got, changed)
	}
	c.moved()
	holds("3 shares, 1 snapshots, 4 rules")

	// The claim goes before its snapshots. Of all this nothing is left: in the cluster,
	// in Manila, among the keys, on the node and in the repository.
	c.kubectl("delete pod one two reader cloned check --grace-period=1 --wait")
	c.kubectl("delete cronjob nightly --wait")
	c.await("", "get volumeattachments -o name")
	holds("3 shares, 1 snapshots, 0 rules")
	c.kubectl("delete pvc data inside clone back --wait")
	c.kubectl("delete volumesnapshot --all --wait")
	c.await("", "get pv,volumesnapshotcontents -o name")
	holds("0 shares, 0 snapshots, 0 rules")
	c.await("", "get secret abaca-keys -o jsonpath={.data} -n "+namespace)
	for _, dir := range []string{"offsite/snapshots", "offsite/locks", "state/staged"} {
		if left, err := os.ReadDir(c.data(dir)); err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, c.dir) && strings.Contains(line, "ceph") {
			t.Errorf("CephFS is still mounted: %s", line)
		}
	}
	if err != nil {
		t.Error(err)
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
	c.kubectl("delete secret abaca-keys clouds -n " + namespace)
}

// manila installs the chart with a real Manila, whose default share type must be of
// CephFS, and which is reached in these networks. The returned function waits until
// Manila has what is wanted.
func (c *cluster) manila(values map[string]any, networks ...servers.Place) (holds func(want string)) {
	c.Helper()
	file, name := os.Getenv("ABACA_MANILA_CLOUDS"), os.Getenv("ABACA_MANILA_CLOUD")
	if file == "" {
		c.Skip("needs a Manila: ABACA_MANILA_CLOUDS and ABACA_MANILA_CLOUD name it")
	}
	for _, n := range networks {
		c.reach(file, name, n)
	}
	instance := fmt.Sprintf("kube-%d", time.Now().Unix())
	c.kubectl("delete secret clouds --ignore-not-found -n " + namespace)
	c.run("kubectl", "create", "secret", "generic", "clouds", "-n", namespace, "--from-file=clouds.yaml="+file)
	values["backends"] = []any{map[string]any{"name": "manila", "manila": map[string]any{"cloud": name, "cloudsSecret": "clouds", "instance": instance}}}
	c.install(values)
	return func(want string) {
		c.Helper()
		ctx, cancel := context.WithTimeout(c.Context(), 5*time.Minute)
		defer cancel()
		if err := cloud.Await(ctx, file, name, instance, want); err != nil {
			c.Error(err)
		}
	}
}

// survive replaces the node plugin's pod while ceph-fuse serves pods one and two, who
// lose what they have mounted, and reader: each of them is well when it is started
// again, also while another is still without.
func (c *cluster) survive(sums, snapshot, live string) {
	c.Helper()
	c.replaceNode()
	for _, pod := range []string{"one", "two", "reader"} {
		if out, err := c.try("", "kubectl", "exec", pod, "--", "ls", "/data"); err == nil || !strings.Contains(out, "not connected") {
			c.Errorf("pod %s after the node plugin was replaced: %s, %v; the docs say that it has lost its mount", pod, out, err)
		}
	}
	for pod, claim := range map[string]string{"one": "data", "reader": "inside"} {
		c.kubectl("delete pod " + pod + " --grace-period=1 --wait")
		c.apply2(podWith(pod, ofClaim(claim)))
		c.await("Running", "get pod "+pod+" -o jsonpath={.status.phase}")
	}
	for pod, want := range map[string]string{"one": live, "reader": snapshot} {
		if got := c.exec(pod, sums); got != want {
			c.Errorf("pod %s, started again, sees\n%s\nwant\n%s", pod, got, want)
		}
	}
	if out, err := c.try("", "kubectl", "exec", "two", "--", "ls", "/data"); err == nil {
		c.Errorf("pod two has got its mount back: %s", out)
	}
	c.kubectl("delete pod two --grace-period=1 --wait")
	c.apply2(podWith("two", ofClaim("data")))
	c.await("Running", "get pod two -o jsonpath={.status.phase}")
	c.exec("two", "date >/data/two/again && rm /data/two/again && sync")
}

// replaceNode replaces the node plugin's pod.
func (c *cluster) replaceNode() {
	c.Helper()
	c.kubectl("delete pods -l app.kubernetes.io/component=node --wait -n " + namespace)
	c.rolledOut()
}

// from is a claim with a source, as large as claim data.
func from(name, mode, kind, source string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: %s}, spec: {storageClassName: abaca, accessModes: [%s],
  resources: {requests: {storage: 2Gi}}, dataSource: {apiGroup: snapshot.storage.k8s.io, kind: %s, name: %s}}}`, name, mode, kind, source)
}

// sorted are lines of sha256sum in the order of their names.
func sorted(lines string) string {
	all := strings.Split(strings.TrimSpace(lines), "\n")
	slices.SortFunc(all, func(a, b string) int { return strings.Compare(a[min(64, len(a)):], b[min(64, len(b)):]) })
	return strings.Join(all, "\n")
}

// reach makes a cloud that listens on a loopback address of this machine one of a
// network, at the same address and ports, until the test ends: the catalogue
// and Ceph's monitors name them. Each network has a loopback of its own.
func (c *cluster) reach(file, name string, there servers.Place) {
	c.Helper()
	auth, _, _, err := clouds.Parse(clouds.WithCloudName(name), clouds.WithLocations(file))
	if err != nil {
		c.Fatal(err)
	}
	at, err := url.Parse(auth.IdentityEndpoint)
	if err != nil {
		c.Fatal(err)
	}
	ip := net.ParseIP(at.Hostname())
	if !ip.IsLoopback() {
		c.Fatalf("%s is not on this machine, and the cluster has no way out", at)
	}
	// Also what Ceph's daemons listen on, which changes with each start.
	addresses := regexp.MustCompile(regexp.QuoteMeta(ip.String())+`:\d+`).FindAllString(c.run("ss", "-Hltn", "src", ip.String()), -1)
	if !slices.Contains(addresses, at.Host) {
		c.Fatalf("nobody listens at %s: make manila-up", at)
	}
	there.Address = ip.String()
	for _, address := range addresses {
		l, err := there.Listen(address[strings.LastIndex(address, ":")+1:])
		if err != nil {
			c.Fatal(err)
		}
		c.Cleanup(func() { l.Close() })
		go func() {
			for {
				from, err := l.Accept()
				if err != nil {
					return
				}
				go join(from, address)
			}
		}()
	}
}

// join passes on what a connection has to say to an address of this machine, and the
// answers, until one of the two ends it.
func join(from net.Conn, address string) {
	defer from.Close()
	to, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	defer to.Close()
	go func() {
		defer to.Close()
		defer from.Close()
		_, _ = io.Copy(from, to)
	}()
	_, _ = io.Copy(to, from)
}
