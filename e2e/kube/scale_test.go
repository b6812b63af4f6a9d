package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/test/fakemanila"
)

// TestScale makes as many claims as ABACA_KUBE_SCALE says, at a steady rate, on a
// simulated Manila that takes two seconds for each, has one run of a schedule make a
// VolumeSnapshot of each, and deletes them all. What it prints is a measurement; what
// is left behind is a failure.
func TestScale(t *testing.T) {
	c := start(t)
	n, _ := strconv.Atoi(os.Getenv("ABACA_KUBE_SCALE"))
	if n == 0 {
		t.Skip("measures: ABACA_KUBE_SCALE=1000 says how many")
	}
	listener, err := network.Listen("0")
	if err != nil {
		t.Fatal(err)
	}
	cloud := fakemanila.New(fakemanila.Options{Gigabytes: 1 << 20, Listener: listener, Delay: func() time.Duration { return 2 * time.Second }})
	t.Cleanup(cloud.Close)
	c.secret("clouds", "clouds.yaml="+cloud.Clouds())
	c.install(map[string]any{
		"backends":   []any{map[string]any{"name": "manila", "manila": map[string]any{"cloud": "fake", "cloudsSecret": "clouds", "instance": "scale"}}},
		"controller": map[string]any{"replicas": 1}, // whose memory is measured
		"schedules": []any{map[string]any{"name": "scale", "namespace": "default", "schedule": "0 0 1 1 *", "suspend": true, "selector": "of=scale",
			"tiers": []any{"class=abaca-snapshot,keep-last=1"}}},
	})
	c.kubectl("config set-context --current --namespace=default")
	before, written := c.controllerMemory(), c.writes()
	count := func(n int) string {
		requests, writes, total, text := map[string]int{}, c.writes(), 0, ""
		for _, r := range cloud.Requests() {
			requests[r.Method]++
			total++
		}
		for _, kind := range slices.Sorted(maps.Keys(writes)) {
			text += fmt.Sprintf(" %.1f of %s,", float64(writes[kind]-written[kind])/float64(n), kind)
		}
		written = writes
		return fmt.Sprintf("%.1f requests each to Manila and Keystone (%v); writes each in Kubernetes:%s controller %d MiB, %d in the beginning",
			float64(total)/float64(n), requests, text, c.controllerMemory()>>20, before>>20)
	}
	count(n)

	const rate = 5 // in a second
	const claim = `{"apiVersion":"v1","kind":"PersistentVolumeClaim","metadata":{"name":"scale-%d","labels":{"of":"scale"}},` +
		`"spec":{"storageClassName":"abaca","accessModes":["ReadWriteMany"],"resources":{"requests":{"storage":"1Gi"}}}}`
	// until calls step each second until all n objects of a kind are done.
	until := func(kind string, longest time.Duration, step func(since time.Duration)) {
		begun, seen := time.Now(), map[string]bool{}
		var took []time.Duration
		for ; len(took) < n; time.Sleep(time.Second) {
			step(time.Since(begun))
			for name, asked := range c.done(kind) {
				if !seen[name] {
					seen[name] = true
					took = append(took, time.Since(asked))
				}
			}
			if time.Since(begun) > longest {
				c.explain()
				t.Fatalf("%d of %d are done", len(took), n)
			}
		}
		all := time.Since(begun)
		slices.Sort(took)
		t.Logf("%d × %s in %.0f s: each done after median %.0f s, 95 %% %.0f s, longest %.0f s; %s",
			n, kind, all.Seconds(), took[n/2].Seconds(), took[n*95/100].Seconds(), took[n-1].Seconds(), count(n))
	}
	made := 0
	until("pvc", time.Duration(n/rate)*time.Second+5*time.Minute, func(since time.Duration) {
		var due []string
		for ; made < min(n, rate*int(since.Seconds()+1)); made++ {
			due = append(due, fmt.Sprintf(claim, made))
		}
		if len(due) == 0 {
			return
		}
		if out, err := c.try(strings.Join(due, "\n"), "kubectl", "create", "-f", "-"); err != nil {
			t.Fatal(out)
		}
	})
	c.kubectl("create job all --from=cronjob/scale")
	until("volumesnapshot", time.Hour, func(time.Duration) {
		if c.kubectl("get job all -o jsonpath={.status.failed}") != "" {
			c.explain()
			t.Fatal(c.kubectl("logs --tail=20 job/all"))
		}
	})
	c.kubectl("wait --for=condition=complete --timeout=1m job/all")
	c.kubectl("delete job all --wait")

	begun := time.Now()
	for _, kind := range []string{"volumesnapshot", "pvc"} {
		if out, err := c.try("", "kubectl", "delete", kind, "--all", "--wait=false"); err != nil {
			t.Fatal(out)
		}
		for longest := time.Now().Add(25 * time.Minute); time.Now().Before(longest) && c.kubectl("get pv,volumesnapshotcontents -o name") != "" &&
			(kind == "pvc" || c.kubectl("get volumesnapshotcontents -o name") != ""); {
			time.Sleep(2 * time.Second)
		}
	}
	t.Logf("%d claims and as many VolumeSnapshots deleted in %.0f s; %s", n, time.Since(begun).Seconds(), count(n))
	if left := cloud.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left in Manila: %s", left)
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

// done are the objects of a kind that are bound, or ready, and when they were asked for,
// to a second.
func (c *cluster) done(kind string) map[string]time.Time {
	c.Helper()
	var list struct {
		Items []struct {
			Metadata struct {
				Name              string
				CreationTimestamp time.Time
			}
			Status struct {
				Phase      string
				ReadyToUse bool
			}
		}
	}
	if err := json.Unmarshal([]byte(c.kubectl("get "+kind+" -o json")), &list); err != nil {
		c.Fatal(err)
	}
	done := map[string]time.Time{}
	for _, o := range list.Items {
		if o.Status.Phase == "Bound" || o.Status.ReadyToUse {
			done[o.Metadata.Name] = o.Metadata.CreationTimestamp
		}
	}
	return done
}

// writes is how often the API server has been asked to write objects, by kind.
func (c *cluster) writes() map[string]int {
	c.Helper()
	all := map[string]int{}
	for _, m := range requestTotal.FindAllStringSubmatch(c.kubectl("get --raw /metrics"), -1) {
		n, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			c.Fatal(err)
		}
		all[m[1]] += int(n)
	}
	return all
}

var requestTotal = regexp.MustCompile(`(?m)^apiserver_request_total\{.*,resource="(persistentvolumeclaims|persistentvolumes|volumesnapshots|volumesnapshotcontents|events)",.*,verb="(?:POST|PUT|PATCH|APPLY|DELETE)".*\} (\S+)$`)

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
