package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// cluster is an API server that knows versions and UIDs, and, when it is told,
// does what Kubernetes would.
type cluster struct {
	*testing.T
	client *fake.Clientset
	mu     sync.Mutex
	calls  int
	killed int // the call from which on nobody answers; 0 for never
	now    time.Time
	// unlocked are the hosts whose locks were removed.
	unlocked     []string
	repositories []string
	restic.Client
}

func (c *cluster) Names(context.Context) ([]string, error) { return c.repositories, nil }

func (c *cluster) Open(context.Context, string) (restic.Client, error) { return c, nil }

func (c *cluster) UnlockHost(_ context.Context, host string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.killed > 0 && c.calls >= c.killed {
		return errKilled
	}
	c.unlocked = append(c.unlocked, host)
	return nil
}

var errKilled = errors.New("the caller has been killed")

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{T: t, now: time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)}
	c.client = fake.NewClientset(&corev1.PodTemplate{
		ObjectMeta: metav1.ObjectMeta{Name: "mover", Namespace: "abaca", Annotations: map[string]string{
			Limit: "2", LimitEach: "1", Repository + "offsite": "secret-offsite", Repository + "near.by": "secret-near"}},
		Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: container, Args: []string{"mover"}}}}},
	})
	versions, tracker := 0, c.client.Tracker()
	stored := func(a clienttesting.Action, name string) (metav1.Object, error) {
		o, err := tracker.Get(a.GetResource(), a.GetNamespace(), name)
		if err != nil {
			return nil, err
		}
		return meta.Accessor(o)
	}
	c.client.PrependReactor("*", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.calls++; c.killed > 0 && c.calls >= c.killed {
			return true, nil, errKilled
		}
		resource := schema.GroupResource{Resource: a.GetResource().Resource}
		switch a := a.(type) {
		case clienttesting.UpdateActionImpl: // of which a create is no kind
			o, _ := meta.Accessor(a.Object)
			old, err := stored(a, o.GetName())
			if err != nil {
				return true, nil, err
			}
			if o.GetResourceVersion() != "" && o.GetResourceVersion() != old.GetResourceVersion() {
				return true, nil, apierrors.NewConflict(resource, o.GetName(), errors.New("another version"))
			}
			versions++
			o.SetResourceVersion(strconv.Itoa(versions))
		case clienttesting.CreateActionImpl:
			o, _ := meta.Accessor(a.Object)
			versions++
			o.SetResourceVersion(strconv.Itoa(versions))
			o.SetUID(types.UID(fmt.Sprint("uid-", versions)))
			o.SetCreationTimestamp(metav1.NewTime(c.now))
		case clienttesting.DeleteActionImpl:
			old, err := stored(a, a.Name)
			if err != nil {
				return true, nil, err
			}
			if p := a.DeleteOptions.Preconditions; p != nil && p.ResourceVersion != nil && *p.ResourceVersion != old.GetResourceVersion() {
				return true, nil, apierrors.NewConflict(resource, a.Name, errors.New("another version"))
			}
		case clienttesting.PatchActionImpl:
			old, err := stored(a, a.Name)
			if err != nil {
				return true, nil, err
			}
			var p struct{ Metadata struct{ UID types.UID } }
			if err := json.Unmarshal(a.Patch, &p); err != nil || p.Metadata.UID != old.GetUID() {
				return true, nil, apierrors.NewConflict(resource, a.Name, errors.New("another UID"))
			}
		}
		return false, nil, nil
	})
	return c
}

// kill has no call answered from the n-th on; 0 ends that.
func (c *cluster) kill(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls, c.killed = 0, n
}

func (c *cluster) runner() *Runner {
	return &Runner{Client: c.client, Namespace: "abaca", Template: "mover", Driver: "abaca-csi.github.io", ZoneKey: "zone", Now: func() time.Time { return c.now },
		Repositories: c, Handle: func(j backup.Job) string { return j.Backend + "/@" + j.Snapshot + "#" + j.Consumer }}
}

func job(id string) backup.Job {
	return backup.Job{Backend: "local", Snapshot: "snap", Consumer: "backup-" + id, Attempt: 1,
		Task: mover.Task{ID: id, Repository: "offsite", Made: true, Backup: &mover.Backup{Backup: id, Host: "default/data"}}}
}

func wanted(context.Context) error { return nil }

// jobs returns the Jobs that may run.
func (c *cluster) jobs() (run []batchv1.Job) {
	c.Helper()
	list, err := c.client.BatchV1().Jobs("abaca").List(context.Background(), metav1.ListOptions{})
	if err != nil {
		c.Fatal(err)
	}
	for _, j := range list.Items {
		if !*j.Spec.Suspend {
			run = append(run, j)
		}
	}
	return run
}

// pod makes the pod of the one Job that runs, in a state.
func (c *cluster) pod(status corev1.PodStatus) *corev1.Pod {
	c.Helper()
	run := c.jobs()
	if len(run) != 1 {
		c.Fatalf("%d Jobs run", len(run))
	}
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: run[0].Name + "-x", Namespace: "abaca", Labels: map[string]string{
		Mover: run[0].Labels[Mover], Attempt: run[0].Name}}, Spec: corev1.PodSpec{NodeName: "n1"}, Status: status}
	if err := c.client.Tracker().Add(p); err != nil {
		c.Fatal(err)
	}
	return p
}

// ended is the state of a pod whose mover has said something.
func ended(result mover.Result) corev1.PodStatus {
	phase, code := corev1.PodSucceeded, int32(0)
	if result.Error != "" {
		phase, code = corev1.PodFailed, 1
	}
	return corev1.PodStatus{Phase: phase, ContainerStatuses: []corev1.ContainerStatus{{Name: container, State: corev1.ContainerState{
		Terminated: &corev1.ContainerStateTerminated{ExitCode: code, Message: string(message(result))}}}}}
}

var running = corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{Name: container,
	State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}}

func (c *cluster) remove(p *corev1.Pod) {
	c.Helper()
	if err := c.client.Tracker().Delete(corev1.SchemeGroupVersion.WithResource("pods"), "abaca", p.Name); err != nil {
		c.Error(err)
	}
}

// objects names all that there is of movers.
func (c *cluster) objects() string {
	c.Helper()
	ctx, all := context.Background(), metav1.ListOptions{}
	maps, err1 := c.client.CoreV1().ConfigMaps("abaca").List(ctx, all)
	jobs, err2 := c.client.BatchV1().Jobs("abaca").List(ctx, all)
	claims, err3 := c.client.CoreV1().PersistentVolumeClaims("abaca").List(ctx, all)
	volumes, err4 := c.client.CoreV1().PersistentVolumes().List(ctx, all)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		c.Fatal(err)
	}
	return fmt.Sprintf("%d records, %d Jobs, %d claims, %d volumes", len(maps.Items), len(jobs.Items), len(claims.Items), len(volumes.Items))
}

func (c *cluster) has(want string) {
	c.Helper()
	if got := c.objects(); got != want {
		c.Errorf("there are %s; want %s", got, want)
	}
}

const (
	nothing = "0 records, 0 Jobs, 0 claims, 0 volumes"
	alive   = "1 records, 1 Jobs, 1 claims, 1 volumes"
	over    = "1 records, 0 Jobs, 0 claims, 0 volumes"
)

func (c *cluster) phase(r *Runner, id string, want backup.Phase) *backup.Status {
	c.Helper()
	st, err := r.Status(c.Context(), id)
	if err != nil {
		c.Fatal(err)
	}
	if st.Phase != want {
		c.Errorf("%s is %s (%s), want %s", id, st.Phase, st.Trouble, want)
	}
	return st
}

func TestLife(t *testing.T) {
	c := newCluster(t)
	r, ctx := c.runner(), t.Context()
	if _, err := r.Status(ctx, "a"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("before: %v", err)
	}
	for range 2 {
		if err := r.Start(ctx, job("a"), wanted); err != nil {
			t.Fatal(err)
		}
	}
	c.has(alive)
	c.phase(r, "a", backup.Running)
	if err := r.Release(ctx, "a"); !errors.Is(err, backend.ErrPending) {
		t.Errorf("released while it runs: %v", err)
	}
	pod := c.pod(ended(mover.Result{Snapshot: "s"}))
	if st := c.phase(r, "a", backup.Succeeded); st.Result.Snapshot != "s" {
		t.Errorf("result: %+v", st.Result)
	}
	if err := r.Start(ctx, job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	// What it has used is not released before its pod is gone.
	brief, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := r.Release(brief, "a"); !errors.Is(err, backend.ErrPending) || !strings.Contains(err.Error(), pod.Name) {
		t.Errorf("release: %v", err)
	}
	c.remove(pod)
	for range 2 {
		if err := r.Release(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	c.has(over)
	if err := r.Start(ctx, job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	if st := c.phase(r, "a", backup.Succeeded); st.Result.Snapshot != "s" {
		t.Errorf("result: %+v", st.Result)
	}
	if jobs, err := r.Jobs(ctx); err != nil || len(jobs) != 1 || jobs[0].Phase != backup.Succeeded {
		t.Errorf("jobs: %v, %v", jobs, err)
	}
	for range 2 {
		if err := r.Remove(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	c.has(nothing)
}

// A success stays one for whoever is killed in the middle of its removal.
func TestRemovalKeepsASuccess(t *testing.T) {
	for n := 1; ; n++ {
		c := newCluster(t)
		r := c.runner()
		if err := r.Start(t.Context(), job("a"), wanted); err != nil {
			t.Fatal(err)
		}
		c.remove(c.pod(ended(mover.Result{Snapshot: "s"})))
		list, _ := c.client.BatchV1().Jobs("abaca").List(t.Context(), metav1.ListOptions{})
		list.Items[0].Status.Conditions = []batchv1.JobCondition{{Type: batchv1.JobComplete, Status: corev1.ConditionTrue}}
		if _, err := c.client.BatchV1().Jobs("abaca").UpdateStatus(t.Context(), &list.Items[0], metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		c.kill(n)
		err := r.Remove(t.Context(), "a")
		c.kill(0)
		if err == nil {
			return
		}
		if st, err := r.Status(t.Context(), "a"); !errors.Is(err, backend.ErrNotFound) && (err != nil || st.Phase != backup.Succeeded) {
			t.Errorf("after call %d: %+v, %v", n, st, err)
		}
	}
}

// A job that is not wanted leaves nothing, and one that somebody else has dealt
// with while may was asked is not started.
func TestMay(t *testing.T) {
	c := newCluster(t)
	r, other, ctx := c.runner(), c.runner(), t.Context()
	if err := r.Start(ctx, job("a"), func(context.Context) error { return backend.ErrConflict }); !errors.Is(err, backend.ErrConflict) {
		t.Errorf("not wanted: %v", err)
	}
	c.has(nothing)
	err := r.Start(ctx, job("a"), func(ctx context.Context) error {
		if _, err := other.Status(ctx, "a"); !errors.Is(err, backend.ErrPending) {
			t.Errorf("status of what is being asked about: %v", err)
		}
		return errors.Join(other.Start(ctx, job("a"), wanted), other.Remove(ctx, "a"))
	})
	if !errors.Is(err, backend.ErrPending) {
		t.Errorf("the job was started and removed meanwhile: %v", err)
	}
	c.has(nothing)
	// A claim of somebody who was killed is taken over.
	c.kill(4)
	_ = r.Start(ctx, job("a"), wanted)
	c.kill(0)
	c.has("1 records, 0 Jobs, 0 claims, 0 volumes")
	c.now = c.now.Add(time.Minute)
	if _, err := r.Status(ctx, "a"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("status of a claim that was left: %v", err)
	}
	if err := r.Start(ctx, job("a"), wanted); err != nil {
		t.Error(err)
	}
	c.has(alive)
}

// Many starters over two runners let one Job run.
func TestOneMoverOnly(t *testing.T) {
	c := newCluster(t)
	runners := []*Runner{c.runner(), c.runner()}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			j := job("a")
			j.Files = int64(i % 3) // they do not quite agree
			if err := runners[i%2].Start(context.Background(), j, wanted); err != nil && !errors.Is(err, backend.ErrPending) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if run := c.jobs(); len(run) != 1 {
		t.Errorf("%d Jobs run", len(run))
	}
	c.has(alive)
}

// Wherever a controller is killed, the next one makes of the job what it wants:
// one mover, or nothing.
func TestKilledAnywhere(t *testing.T) {
	for n := 1; ; n++ {
		c := newCluster(t)
		c.kill(n)
		err := c.runner().Start(t.Context(), job("a"), wanted)
		c.kill(0)
		c.now = c.now.Add(time.Hour)
		again := job("a")
		again.Task.Recover = true // the next one asks for something else
		for range 2 {
			if err := c.runner().Start(t.Context(), again, wanted); err != nil {
				t.Fatalf("after call %d: %v", n, err)
			}
		}
		if err := c.runner().admit(t.Context()); err != nil {
			t.Error(err)
		}
		if run := c.jobs(); len(run) != 1 {
			t.Errorf("after call %d: %d Jobs run", n, len(run))
		}
		if err := c.runner().sweep(t.Context()); err != nil {
			t.Error(err)
		}
		c.has(alive)
		if len(c.jobs()) != 1 {
			t.Errorf("after call %d: the mover was swept away", n)
		}
		for stop := 1; ; stop++ {
			c.kill(stop)
			err := c.runner().Remove(t.Context(), "a")
			c.kill(0)
			if err == nil {
				break
			}
		}
		c.has(nothing)
		if err == nil {
			return
		}
	}
}

// What was made for a job and not recorded goes, and nothing else.
func TestSweep(t *testing.T) {
	c := newCluster(t)
	r := c.runner()
	for n := 1; ; n++ {
		c.kill(n)
		err := r.Start(t.Context(), job("a"), wanted)
		c.kill(0)
		if err == nil {
			break
		}
		c.now = c.now.Add(time.Hour)
		if _, err := r.Status(t.Context(), "a"); err == nil {
			break // recorded, and so no orphan
		}
		if err := r.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.has(nothing)
	}
	c.now = c.now.Add(time.Hour)
	if err := errors.Join(r.sweep(t.Context()), r.admit(t.Context())); err != nil {
		t.Fatal(err)
	}
	c.has(alive)
	// A pod that does not start is made anew.
	c.remove(c.pod(corev1.PodStatus{Phase: corev1.PodRunning}))
	pod := c.pod(corev1.PodStatus{Phase: corev1.PodPending})
	if err := r.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(c.jobs()) != 0 {
		t.Error("a Job whose pod does not start is still there")
	}
	c.phase(r, "a", backup.Running) // as long as the pod is
	c.remove(pod)
	c.phase(r, "a", backup.Interrupted)
}

// A pod that Kubernetes does not call gone may write: nobody else is started, and
// the error says what to do.
func TestLostNode(t *testing.T) {
	c := newCluster(t)
	r := c.runner()
	if err := r.Start(t.Context(), job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	pod := c.pod(running)
	pod.DeletionTimestamp = &metav1.Time{Time: c.now.Add(-time.Hour)}
	if err := c.client.Tracker().Update(corev1.SchemeGroupVersion.WithResource("pods"), pod, "abaca"); err != nil {
		t.Fatal(err)
	}
	if st := c.phase(r, "a", backup.Running); !strings.Contains(st.Trouble, "n1") || !strings.Contains(st.Trouble, "out-of-service") {
		t.Errorf("trouble: %s", st.Trouble)
	}
	again := job("a")
	again.Attempt = 2
	if err := r.Start(t.Context(), again, wanted); err != nil || len(c.jobs()) != 1 || c.jobs()[0].Name != pod.Labels[Attempt] {
		t.Errorf("started: %v", err)
	}
	brief, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.Stop(brief, "a"); !errors.Is(err, backend.ErrPending) || !strings.Contains(err.Error(), "out-of-service") {
		t.Errorf("stop: %v", err)
	}
	if len(c.unlocked) > 0 {
		t.Error("a lock was removed whose owner may live")
	}
	c.remove(pod)
	for range 2 {
		if err := r.Stop(t.Context(), "a"); err != nil {
			t.Error(err)
		}
	}
	c.has(over)
	if len(c.unlocked) != 1 || c.unlocked[0] != pod.Labels[Attempt] {
		t.Errorf("the locks of %v were removed", c.unlocked)
	}
	if st := c.phase(r, "a", backup.Failed); st.Result.Reason != mover.ReasonDeleted {
		t.Errorf("result: %+v", st.Result)
	}
}

// A next attempt begins when the last one is gone, and after it was asked for.
func TestNextAttempt(t *testing.T) {
	c := newCluster(t)
	r := c.runner()
	if err := r.Start(t.Context(), job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	first := c.jobs()[0].Name
	pod := c.pod(ended(mover.Result{Error: "e", Reason: mover.ReasonRepository}))
	again := job("a")
	again.Attempt = 2
	brief, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.Start(brief, again, wanted); !errors.Is(err, backend.ErrPending) {
		t.Errorf("beside the last one: %v", err)
	}
	c.remove(pod)
	if err := r.Start(t.Context(), again, func(context.Context) error { return backend.ErrConflict }); !errors.Is(err, backend.ErrConflict) {
		t.Errorf("not wanted: %v", err)
	}
	if st := c.phase(r, "a", backup.Failed); st.Result.Error != "e" {
		t.Errorf("result: %+v", st.Result)
	}
	if err := r.Start(t.Context(), again, wanted); err != nil {
		t.Fatal(err)
	}
	if run := c.jobs(); len(run) != 1 || run[0].Name == first {
		t.Errorf("runs: %v", run)
	}
	if st := c.phase(r, "a", backup.Running); st.Job.Attempt != 2 {
		t.Errorf("attempt %d", st.Job.Attempt)
	}
}

// Whoever is slow to remove an attempt does not remove the next one.
func TestSlowRemoval(t *testing.T) {
	c := newCluster(t)
	r := c.runner()
	if err := r.Start(t.Context(), job("a"), wanted); err != nil {
		t.Fatal(err)
	}
	pod := c.pod(ended(mover.Result{Error: "e", Reason: mover.ReasonRepository}))
	brief, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	slow, err := r.release(brief, "a")
	if !errors.Is(err, backend.ErrPending) {
		t.Fatal(err)
	}
	c.remove(pod)
	for _, next := range []func() error{
		func() error { return r.Start(t.Context(), job("a"), wanted) },
		func() error { return errors.Join(r.Remove(t.Context(), "a"), r.Start(t.Context(), job("a"), wanted)) },
	} {
		if err := next(); err != nil {
			t.Fatal(err)
		}
		if err := r.clear(t.Context(), slow); err != nil {
			t.Error(err)
		}
		c.has(alive)
	}
}

func TestHostileIDs(t *testing.T) {
	r := newCluster(t).runner()
	for _, id := range []string{"", "..", "a/b", "A", "-a", strings.Repeat("a", 41)} {
		if err := r.Start(t.Context(), job(id), wanted); !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("start %q: %v", id, err)
		}
		if _, err := r.Status(t.Context(), id); !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("status %q: %v", id, err)
		}
		if err := errors.Join(r.Stop(t.Context(), id), r.Release(t.Context(), id), r.Remove(t.Context(), id)); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
	unknown := job("a")
	unknown.Task.Repository = "nowhere"
	if err := r.Start(t.Context(), unknown, wanted); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("unknown repository: %v", err)
	}
}

// TestCannotBeMade: a job whose objects cannot be made leaves nothing, so that the next
// request is told why too, and not that another is at work on it.
func TestCannotBeMade(t *testing.T) {
	for _, kind := range []string{"persistentvolumes", "persistentvolumeclaims", "jobs"} {
		c := newCluster(t)
		r := c.runner()
		c.client.PrependReactor("create", kind, func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: kind}, "x", errors.New("says a policy"))
		})
		for range 2 {
			if err := r.Start(t.Context(), job("a"), wanted); !errors.Is(err, backend.ErrUnavailable) || !strings.Contains(err.Error(), "says a policy") {
				t.Errorf("%s: %v", kind, err)
			}
			if _, err := r.Status(t.Context(), "a"); !errors.Is(err, backend.ErrNotFound) {
				t.Errorf("%s: status: %v", kind, err)
			}
		}
		c.has(nothing)
	}
}
