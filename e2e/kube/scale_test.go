package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/test/fakemanila"
)

// TestScale makes as many claims and VolumeSnapshots as ABACA_KUBE_SCALE says, at
// a steady rate, on a simulated Manila that takes two seconds for each, and
// deletes them. What it prints is a measurement; what is left behind is a failure.
func TestScale(t *testing.T) {
	c := start(t)
	n, _ := strconv.Atoi(os.Getenv("ABACA_KUBE_SCALE"))
	if n == 0 {
		t.Skip("measures: ABACA_KUBE_SCALE=1000 says how many")
	}
	listener, err := network.Listen()
	if err != nil {
		t.Fatal(err)
	}
	cloud := fakemanila.New(fakemanila.Options{Gigabytes: 1 << 20, Listener: listener, Delay: func() time.Duration { return 2 * time.Second }})
	t.Cleanup(cloud.Close)
	c.secret("clouds", "clouds.yaml="+cloud.Clouds())
	c.install(map[string]any{"backends": []any{map[string]any{"name": "manila", "manila": map[string]any{"cloud": "fake", "cloudsSecret": "clouds", "instance": "scale"}}}})
	c.kubectl("config set-context --current --namespace=default")
	cloud.Requests()

	const rate = 5 // in a second
	manifests := map[string]string{
		"pvc": `{"apiVersion":"v1","kind":"PersistentVolumeClaim","metadata":{"name":"scale-%d"},"spec":{"storageClassName":"abaca","accessModes":["ReadWriteMany"],"resources":{"requests":{"storage":"1Gi"}}}}`,
		"volumesnapshot": `{"apiVersion":"snapshot.storage.k8s.io/v1","kind":"VolumeSnapshot","metadata":{"name":"scale-%[1]d"},` +
			`"spec":{"volumeSnapshotClassName":"abaca-snapshot","source":{"persistentVolumeClaimName":"scale-%[1]d"}}}`,
	}
	for _, kind := range []string{"pvc", "volumesnapshot"} {
		begun, asked := time.Now(), map[string]time.Time{}
		var took []time.Duration
		for made := 0; len(took) < n; time.Sleep(time.Second) {
			if due := min(n, rate*int(time.Since(begun).Seconds()+1)); made < due {
				var all []string
				for ; made < due; made++ {
					asked[fmt.Sprint("scale-", made)] = time.Now()
					all = append(all, fmt.Sprintf(manifests[kind], made))
				}
				if out, err := c.try(strings.Join(all, "\n"), "kubectl", "create", "-f", "-"); err != nil {
					t.Fatal(out)
				}
			}
			for _, name := range c.done(kind) {
				if at, waiting := asked[name]; waiting {
					delete(asked, name)
					took = append(took, time.Since(at))
				}
			}
			if time.Since(begun) > time.Duration(n/rate)*time.Second+5*time.Minute {
				c.explain()
				t.Fatalf("%d of %d are done", len(took), n)
			}
		}
		slices.Sort(took)
		requests := map[string]int{}
		total := 0
		for _, r := range cloud.Requests() {
			total++
			requests[r.Method]++
		}
		t.Logf("%d × %s at %d/s: done after median %.1f s, 95 %% %.1f s, longest %.1f s; %.1f requests each to Manila and Keystone (%v); controller %d MiB",
			n, kind, rate, took[n/2].Seconds(), took[n*95/100].Seconds(), took[n-1].Seconds(), float64(total)/float64(n), requests, c.controllerMemory()>>20)
	}
	begun := time.Now()
	for _, kind := range []string{"volumesnapshot", "pvc"} {
		if out, err := c.try("", "kubectl", "delete", kind, "--all", "--wait=false"); err != nil {
			t.Fatal(out)
		}
		for until := time.Now().Add(15 * time.Minute); time.Now().Before(until) && c.kubectl("get pv,volumesnapshotcontents -o name") != "" &&
			(kind == "pvc" || c.kubectl("get volumesnapshotcontents -o name") != ""); {
			time.Sleep(2 * time.Second)
		}
	}
	t.Logf("deleted in %.0f s; %.1f requests for a pair; controller %d MiB", time.Since(begun).Seconds(), float64(len(cloud.Requests()))/float64(n), c.controllerMemory()>>20)
	if left := cloud.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left in Manila: %s", left)
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

// done are the names of the objects of a kind that are bound, or ready.
func (c *cluster) done(kind string) []string {
	c.Helper()
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				Phase      string
				ReadyToUse bool
			}
		}
	}
	if err := json.Unmarshal([]byte(c.kubectl("get "+kind+" -o json")), &list); err != nil {
		c.Fatal(err)
	}
	var names []string
	for _, o := range list.Items {
		if o.Status.Phase == "Bound" || o.Status.ReadyToUse {
			names = append(names, o.Metadata.Name)
		}
	}
	return names
}

// controllerMemory is what the controller's process has to itself, in bytes.
func (c *cluster) controllerMemory() (size int64) {
	c.Helper()
	for _, pid := range c.processes("controller") {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		for line := range strings.Lines(string(text)) {
			if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
				kib, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
				size = cmp.Or(size, kib<<10)
			}
		}
	}
	return size
}
