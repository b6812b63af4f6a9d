package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/test/programs"
)

// faults is a cluster with two controllers, whose repository is on an S3 server
// that can be stopped and filled.
type faults struct {
	*cluster
	disk string // of the server: a tmpfs
}

// A moment is a state that a backup or a restore goes through.
type moment struct {
	name string
	// kind are the objects of movers in whose changes the moment is seen; without
	// one, it is looked for on the disk.
	kind string
	is   func(object) bool
}

// object is what moments know of an object.
type object struct {
	Metadata struct{ DeletionTimestamp string }
	Status   struct{ Phase string }
}

func phase(want string) func(object) bool {
	return func(o object) bool { return o.Status.Phase == want }
}

// The moments of a mover.
var (
	recorded = moment{"recorded", "configmaps", func(object) bool { return true }}
	queued   = moment{"queued", "jobs", func(object) bool { return true }}
	pending  = moment{"pending", "pods", phase("Pending")}
	running  = moment{"running", "pods", phase("Running")}
	ended    = moment{"ended", "pods", phase("Succeeded")}
	cleared  = moment{"cleared", "jobs", func(o object) bool { return o.Metadata.DeletionTimestamp != "" }}
)

// recorded says whether the backend has written down something of a kind whose name, or
// whose text, has the word.
func (c *cluster) recorded(kind, word string) bool {
	files, _ := filepath.Glob(c.data("mnt/meta", kind, "*.json"))
	return slices.ContainsFunc(files, func(f string) bool {
		text, err := os.ReadFile(f)
		return err == nil && strings.Contains(filepath.Base(f)+string(text), word)
	})
}

// onDisk are the moments before a mover's, and behind them, that the backend goes
// through: in one there is something, in the other it is no more.
func (c *cluster) onDisk(kind, word string) (there, gone func(object) bool) {
	there = func(object) bool { return c.recorded(kind, word) }
	was := false
	return there, func(o object) bool {
		was = was || there(o)
		return was && !there(o)
	}
}

// at begins something, and does something else in a moment of it. Changes come as
// they are made, so a moment of milliseconds is met too.
func (c *cluster) at(m moment, begin, do func()) {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.Context(), 2*time.Minute)
	defer cancel()
	seen := make(chan bool, 1)
	if m.kind == "" {
		go func() {
			for !m.is(object{}) && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			seen <- ctx.Err() == nil
		}()
	} else {
		cmd := exec.CommandContext(ctx, "kubectl", strings.Fields("get "+m.kind+" --watch --output-watch-events -o json"+ours)...)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			c.Fatal(err)
		}
		go func() {
			var event struct{ Object object }
			events := json.NewDecoder(out)
			for err = events.Decode(&event); err == nil && !m.is(event.Object); err = events.Decode(&event) {
				event.Object = object{}
			}
			seen <- err == nil
			cancel()
			_ = cmd.Wait()
		}()
	}
	begin()
	if !<-seen {
		c.explain()
		c.Fatalf("it is never %s", m.name)
	}
	do()
}

// controllers are the pods of the driver that bear this label.
const controllers = " -n " + namespace + " -l app.kubernetes.io/component=controller"

// killing returns what kills the processes of the driver, in all pods of a role,
// without a word to them. Who they are is looked for all the time until then, so that
// it is done at once.
func (c *cluster) killing(role string) (kill func()) {
	c.Helper()
	var known atomic.Pointer[[]int]
	look := func() []int {
		pids := c.processes(role)
		known.Store(&pids)
		return pids
	}
	if len(look()) == 0 {
		c.Fatalf("no process of a %s", role)
	}
	go func() {
		for c.Context().Err() == nil {
			time.Sleep(200 * time.Millisecond)
			look()
		}
	}()
	return func() {
		killed := 0
		for began, pids := time.Now(), *known.Load(); killed == 0 && time.Since(began) < time.Minute; pids = look() {
			for _, pid := range pids {
				if c.isDriver(pid, role) && syscall.Kill(pid, syscall.SIGKILL) == nil {
					killed++
				}
			}
		}
		if killed == 0 {
			c.Fatalf("no process of a %s could be killed", role)
		}
	}
}

// fill writes a file of claim data anew, and returns its sum.
func (f *faults) fill(mib int) string {
	f.Helper()
	return f.exec("writer", fmt.Sprintf("dd if=/dev/urandom of=/data/file bs=1M count=%d 2>/dev/null; sync; sha256sum </data/file", mib))
}

// restic runs restic where the server keeps the repository.
func (f *faults) restic(args string) string {
	f.Helper()
	return f.run("sh", "-c", "RESTIC_PASSWORD="+repositoryPassword+" "+programs.Restic(f)+" --no-cache --no-lock --quiet --repo "+filepath.Join(f.disk, "backups")+" "+args)
}

// backups are the ids of restic snapshots; all, or those of a VolumeSnapshot.
func (f *faults) backups(snapshot string) (ids []string) {
	f.Helper()
	if _, err := os.Stat(filepath.Join(f.disk, "backups/config")); os.IsNotExist(err) {
		return nil // this part of the test runs alone
	}
	var list []struct {
		ID   string
		Tags []string
	}
	if err := json.Unmarshal([]byte(f.restic("snapshots --json")), &list); err != nil {
		f.Fatal(err)
	}
	tag := mover.TagName
	if snapshot != "" {
		tag += "snapshot-" + f.kubectl("get volumesnapshot "+snapshot+" -o jsonpath={.metadata.uid}")
	}
	for _, s := range list {
		if slices.ContainsFunc(s.Tags, func(t string) bool { return t == tag || snapshot == "" && strings.HasPrefix(t, tag) }) {
			ids = append(ids, s.ID)
		}
	}
	return ids
}

// saved waits until a VolumeSnapshot is ready, and looks whether the repository has
// it once, with the right data, and nothing else is left of it.
func (f *faults) saved(snapshot, sum string) {
	f.Helper()
	f.awaitFor(5*time.Minute, "true", "get volumesnapshot "+snapshot+ready)
	f.nothingLeft()
	f.unlocked()
	ids := f.backups(snapshot)
	if len(ids) != 1 {
		f.Errorf("the repository has %s %d times: %v", snapshot, len(ids), ids)
		return
	}
	if got := f.restic("dump " + ids[0] + " /data/file | sha256sum"); got != sum {
		f.Errorf("%s has %s, want %s", snapshot, got, sum)
	}
}

// restored waits until a claim is bound, and looks whether it has the right data, and
// nothing is left of movers.
func (f *faults) restored(claim, sum string) {
	f.Helper()
	f.awaitFor(5*time.Minute, "Bound", "get pvc "+claim+" -o jsonpath={.status.phase}")
	f.nothingLeft()
	f.unlocked()
	volume := f.kubectl("get pvc " + claim + " -o jsonpath={.spec.volumeName}")
	_, share, _ := strings.Cut(f.kubectl("get pv "+volume+" -o jsonpath={.spec.csi.volumeHandle}"), "/")
	if got := f.run("sh", "-c", "sha256sum <"+f.data("mnt/shares", share, "file")); got != sum {
		f.Errorf("%s has %s, want %s", claim, got, sum)
	}
}

// unlocked looks for locks in the repository, which controllers have for moments.
func (f *faults) unlocked() {
	f.Helper()
	var locks string
	for range 60 {
		if locks = names(filepath.Join(f.disk, "backups/locks")); locks == "" {
			return
		}
		time.Sleep(time.Second)
	}
	f.Errorf("locks are left: %s", locks)
}

// mounted are the mounts of CSI volumes on the node.
func (c *cluster) mounted() (all []string) {
	c.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		c.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		where := strings.Fields(line)[4]
		if strings.HasPrefix(where, filepath.Join(c.dir, "cluster/kubelet")) && (strings.Contains(where, "kubernetes.io~csi") || strings.Contains(where, "globalmount")) {
			all = append(all, where)
		}
	}
	return all
}

// pid is the process number of what up has started.
func (c *cluster) pid(daemon string) string {
	c.Helper()
	text, err := os.ReadFile(filepath.Join(c.dir, "cluster/run", daemon))
	if err != nil {
		c.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// restartAPI kills the API server, and starts it as it was some time later.
func (c *cluster) restartAPI(down time.Duration) {
	c.Helper()
	pid, err := strconv.Atoi(c.pid("kube-apiserver"))
	if err == nil {
		err = syscall.Kill(pid, syscall.SIGKILL)
	}
	if err != nil {
		c.Fatal(err)
	}
	time.Sleep(down)
	c.up()
}

// up starts what does not run.
func (c *cluster) up() {
	c.Helper()
	c.run("env", "ABACA_CACHE="+filepath.Dir(c.dir), root+"/e2e/kube/up")
}

// leader is the pod whose sidecar leads: the snapshotter, or the provisioner.
func (c *cluster) leader(lease string) string {
	c.Helper()
	pod, _ := c.try("", "kubectl", strings.Fields("get lease "+lease+" -n "+namespace+" -o jsonpath={.spec.holderIdentity}")...)
	return pod
}

const (
	snapshotter = "external-snapshotter-leader-abaca-csi-github-io"
	provisioner = "abaca-csi-github-io"
)

// depose kills the pod whose sidecar leads, and waits for another to do so.
func (c *cluster) depose(lease string) {
	c.Helper()
	old := c.leader(lease)
	c.kubectl("delete pod --force --grace-period=0 -n " + namespace + " " + old)
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(500 * time.Millisecond) {
		if now := c.leader(lease); now != "" && now != old {
			c.Logf("%s leads instead of %s after %s", now, old, time.Since(began).Round(time.Second))
			return
		}
	}
	c.explain()
	c.Fatalf("nobody leads but %s", old)
}

// busy is a pod that does a round of work on its volume again and again, and writes
// down those that go wrong.
func busy(name, volume, begin, round string) string {
	script, _ := json.Marshal("i=0; " + begin + "; while i=$((i+1)); do { " + round + "; } || echo $i >>/tmp/wrong; echo $i >/tmp/round; sleep 0.2; done")
	return strings.Replace(podWith(name, volume), `[sleep, "3600"]`, "[sh, -c, "+string(script)+"]", 1)
}

// goesOn waits until busy pods have done some rounds more, none of which went wrong.
func (c *cluster) goesOn(pods ...string) {
	c.Helper()
	for _, pod := range pods {
		c.exec(pod, "end=$(($(cat /tmp/round)+5)); until [ $(cat /tmp/round) -ge $end ]; do sleep 0.2; done")
		if wrong := c.exec(pod, "cat /tmp/wrong 2>/dev/null; true"); wrong != "" {
			c.Errorf("rounds of %s that went wrong: %s", pod, strings.Join(strings.Fields(wrong), " "))
		}
	}
}

// size sets the size of the server's disk.
func (f *faults) size(flags uintptr, mib int) {
	f.Helper()
	if err := unix.Mount("small", f.disk, "tmpfs", flags, fmt.Sprintf("size=%dm", mib)); err != nil {
		f.Fatal(err)
	}
}

// TestFaults: whatever is killed, stopped, full or deleted in the middle of a backup or
// a restore, it ends in the state that was asked for, and nothing is left.
func TestFaults(t *testing.T) {
	c := start(t)
	all := &faults{c, t.TempDir()}
	all.size(0, 1024)
	t.Cleanup(func() { _ = unix.Unmount(all.disk, unix.MNT_DETACH) })
	server := network.S3(t, root+"/bin", all.disk)
	c.repository("s3", server)
	c.install(map[string]any{
		"controller":   map[string]any{"replicas": 2},
		"repositories": []any{map[string]any{"name": "s3", "secretName": "s3"}},
		"movers": map[string]any{"resources": map[string]any{
			"requests": map[string]any{"cpu": "20m", "memory": "192Mi"}}},
	})
	c.kubectl("config set-context --current --namespace=default")
	c.apply("1-claim.yaml")
	c.apply("2-writer.yaml")
	c.await("Running", "get pod writer -o jsonpath={.status.phase}")
	sub := func(name string, test func(f *faults)) {
		t.Run(name, func(t *testing.T) { test(&faults{&cluster{t, c.dir}, all.disk}) })
	}

	// The controllers are killed in each moment of a backup and of a restore, a few to
	// each: their processes, or with them their pods, whose names are then others.
	kill := func(f *faults, moments []moment, begin func()) {
		f.rolledOut()
		kill := f.killing("controller")
		for i, m := range moments {
			f.at(m, begin, kill)
			f.Logf("killed when it was %s", m.name)
			if i%2 > 0 {
				f.kubectl("delete pods --force --grace-period=0" + controllers)
			}
			begin = func() {}
		}
	}
	cut, _ := c.onDisk("snapshots", `"name":"backup/`)
	held, released := c.onDisk("exports", "backup-")
	sums := map[string]string{} // by the VolumeSnapshot
	for i, moments := range [][]moment{{{"cut", "", cut}, recorded, pending, cleared}, {{"held", "", held}, queued, running, {"released", "", released}}, {ended}} {
		name := fmt.Sprint("killed-", i)
		sub("controller/backup/"+name, func(f *faults) {
			sums[name] = f.fill(8)
			kill(f, moments, func() { f.snapshot(name, "abaca-backup") })
			f.saved(name, sums[name])
		})
	}
	drafted, committed := c.onDisk("shares", `"draft":true`)
	held, released = c.onDisk("exports", "restore-")
	for i, moments := range [][]moment{{{"drafted", "", drafted}, recorded, pending, cleared}, {{"held", "", held}, queued, running, {"released", "", released}}, {ended, {"committed", "", committed}}} {
		name := fmt.Sprint("killed-", i)
		sub("controller/restore/"+name, func(f *faults) {
			kill(f, moments, func() { f.restore(name, name) })
			f.restored(name, sums[name])
		})
	}
	c.rolledOut()
	all.slowly(true)

	sub("leader", func(f *faults) {
		sum := f.fill(32)
		f.snapshot("led", "abaca-backup")
		f.mover()
		f.depose(snapshotter)
		f.depose(snapshotter)
		f.saved("led", sum)
		f.restore("led", "led")
		f.mover()
		f.depose(provisioner)
		f.restored("led", sum)
		f.rolledOut()
	})

	// Pods that have volumes notice nothing of a node plugin that is killed, and those
	// that come meanwhile get theirs.
	sub("node", func(f *faults) {
		f.fill(8)
		f.apply2(busy("busy", ofClaim("data"), "true", "head -c 65536 /dev/urandom >/tmp/block && "+
			"dd if=/tmp/block of=/data/busy.$((i%4)) bs=64k conv=fsync 2>/dev/null && cmp /tmp/block /data/busy.$((i%4))"))
		f.apply2(busy("viewer", "ephemeral: {volumeClaimTemplate: {spec: {storageClassName: abaca, accessModes: [ReadOnlyMany], resources: {requests: {storage: 1Gi}}, "+
			"dataSource: {kind: PersistentVolumeClaim, name: data}}}}", "sum=$(sha256sum </data/file)", `[ "$(sha256sum </data/file)" = "$sum" ]`))
		for _, pod := range []string{"busy", "viewer"} {
			f.await("Running", "get pod "+pod+" -o jsonpath={.status.phase}")
			f.exec(pod, "until [ -s /tmp/round ]; do sleep 0.2; done")
		}
		f.killing("node")()
		f.apply2(podWith("late", ofClaim("data")))
		f.goesOn("busy", "viewer")
		f.await("Running", "get pod late -o jsonpath={.status.phase}")
		f.killing("node")()
		f.kubectl("delete pods --force --grace-period=0 -n " + namespace + " -l app.kubernetes.io/component=node")
		f.goesOn("busy", "viewer")
		f.rolledOut()
		f.goesOn("busy", "viewer")
		var uids []string
		for _, pod := range []string{"busy", "viewer", "late"} {
			uids = append(uids, f.kubectl("get pod "+pod+" -o jsonpath={.metadata.uid}"))
		}
		f.kubectl("delete pod busy viewer late --wait --timeout=100s")
		f.await("", "get pvc viewer-data -o name --ignore-not-found")
		f.nothingLeft()
		for _, m := range f.mounted() {
			if slices.ContainsFunc(uids, func(uid string) bool { return strings.Contains(m, uid) }) {
				f.Errorf("still mounted: %s", m)
			}
		}
		f.exec("writer", "rm /data/busy.*")
	})

	sub("API", func(f *faults) {
		sum := f.fill(32)
		f.snapshot("api", "abaca-backup")
		f.mover()
		f.restartAPI(15 * time.Second) // sidecars lose what they lead
		f.saved("api", sum)
		f.restore("api", "api")
		f.mover()
		f.restartAPI(0)
		f.restored("api", sum)
		f.rolledOut()
	})

	sub("stopped", func(f *faults) {
		sum := f.fill(32)
		f.snapshot("stopped", "abaca-backup")
		f.mover()
		server.Stop()
		began := time.Now()
		f.tells("volumesnapshot", "stopped", "BackupDelayed", "connection refused")
		if got := f.kubectl("get volumesnapshot stopped" + ready); got != "false" {
			f.Errorf("without a server it is ready: %q", got)
		}
		time.Sleep(2*time.Minute - time.Since(began))
		server.Start()
		f.saved("stopped", sum)
	})

	all.slowly(false)
	sub("full", func(f *faults) {
		sum := f.fill(64)
		var disk unix.Statfs_t
		if err := unix.Statfs(f.disk, &disk); err != nil {
			f.Fatal(err)
		}
		used := int(int64(disk.Blocks-disk.Bfree) * disk.Bsize >> 20)
		f.size(unix.MS_REMOUNT, used+16)
		f.snapshot("full", "abaca-backup")
		f.tells("volumesnapshot", "full", "BackupDelayed", "space")
		if got := f.kubectl("get volumesnapshot full" + ready); got != "false" {
			f.Errorf("without room it is ready: %q", got)
		}
		f.size(unix.MS_REMOUNT, 1024)
		f.saved("full", sum)
	})

	all.slowly(true)
	sub("deleted", func(f *faults) {
		f.fill(32)
		before := len(f.backups(""))
		f.snapshot("deleted", "abaca-backup")
		f.mover()
		f.kubectl("delete volumesnapshot deleted --wait --timeout=100s")
		f.nothingLeft()
		f.unlocked()
		if now := len(f.backups("")); now != before {
			f.Errorf("the repository had %d backups, and has %d", before, now)
		}
	})

	// A namespace goes with all that is under way in it.
	sub("namespace", func(f *faults) {
		before, shares := len(f.backups("")), names(f.data("mnt/shares"))
		doomed := f.tenant("doomed")
		doomed.apply(claimFrom("data", ""))
		doomed.apply(podWith("writer", ofClaim("data")))
		doomed.await("Running", "get pod writer -o jsonpath={.status.phase}")
		doomed.exec("writer", "dd if=/dev/urandom of=/data/file bs=1M count=32 2>/dev/null; sync")
		f.slowly(false)
		doomed.apply(snapshotFrom("kept", backupClass, "persistentVolumeClaimName: data"))
		doomed.await("true", "get volumesnapshot kept"+ready)
		f.nothingLeft()
		f.slowly(true)
		doomed.exec("writer", "dd if=/dev/urandom of=/data/file bs=1M count=32 2>/dev/null; sync")
		doomed.apply(snapshotFrom("half", backupClass, "persistentVolumeClaimName: data"))
		doomed.apply(claimFrom("back", ", dataSource: {"+snapshotGroup+", name: kept}"))
		f.await("Running Running", "get pods -o jsonpath={.items[*].status.phase}"+ours)
		f.kubectl("delete namespace doomed --wait --timeout=170s")
		f.nothingLeft()
		f.unlocked()
		if now := len(f.backups("")); now != before {
			f.Errorf("the repository had %d backups, and has %d", before, now)
		}
		now := ""
		for range 300 { // what was being restored goes a while after its mover
			if now = names(f.data("mnt/shares")); now == shares {
				return
			}
			time.Sleep(time.Second)
		}
		f.Errorf("shares are left: %s, and there were %s", now, shares)
	})

	// All is deleted, and nothing is left.
	c.kubectl("delete pod writer --grace-period=1 --wait")
	c.kubectl("delete pvc --all --wait --timeout=150s")
	c.kubectl("delete volumesnapshot --all --wait --timeout=150s")
	c.await("", "get pv,volumesnapshotcontents,volumeattachments -o name")
	c.nothingLeft()
	all.unlocked()
	if left := all.backups(""); len(left) > 0 {
		t.Errorf("backups are left: %v", left)
	}
	all.restic("check --read-data")
	for _, dir := range []string{"shares", "snapshots", "meta/shares", "meta/snapshots", "meta/exports"} {
		if left := names(c.data("mnt", dir)); left != "" {
			t.Errorf("left in %s: %s", dir, left)
		}
	}
	if left := c.mounted(); len(left) > 0 {
		t.Errorf("still mounted: %v", left)
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}
