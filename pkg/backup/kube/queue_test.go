package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr/funcr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
)

func TestNext(t *testing.T) {
	// An entry is NAMESPACE/ID@REPOSITORY, with + if it runs, ! if its repository
	// may not be there yet, and < if it is a restore. They were asked for in this
	// order.
	for _, test := range []struct {
		queue string
		limit int
		each  int
		want  string
	}{
		{"", 2, 2, ""},
		{"a/1@r a/2@r a/3@r", 2, 9, "1 2"},
		{"a/1@r+ a/2@r", 1, 9, ""},
		// Whoever has little goes before whoever has much.
		{"a/1@r a/2@r a/3@r b/4@r", 2, 9, "1 4"},
		{"a/1@r+ a/2@r b/3@r", 2, 9, "3"},
		{"a/1@r+ a/2@r c/3@r<", 2, 9, "3 2"},
		// A full repository holds nobody else up.
		{"a/1@r+ a/2@r a/3@s", 9, 1, "3"},
		{"a/1@r a/2@r a/3@s", 9, 1, "1 3"},
		// Restores wait for no backup.
		{"a/1@r+ a/2@r+ a/3@r a/4@r< a/5@r<", 2, 2, "4 5"},
		{"a/1@r+ a/2@r<+ a/3@r< a/4@s< a/5@r", 2, 1, "4"},
		// They take turns too, whatever else is done for a namespace, and one whose
		// namespace is not known is of one of its own.
		{"a/1@r< a/2@r< a/3@r< b/4@r<", 2, 9, "1 4"},
		{"a/1@r<+ a/2@r< b/3@r<", 2, 9, "3"},
		{"b/1@r+ b/2@r+ a/3@r< a/4@r< b/5@r<", 2, 9, "3 5"},
		{"a/1@r< a/2@r< /3@r< /4@r<", 3, 9, "1 3 2"},
		// One makes the repository, and the others come then.
		{"a/1@r! b/2@r! c/3@s!", 9, 9, "1 3"},
		{"a/1@r!+ b/2@r! c/3@r", 9, 9, "3"},
		// Those of namespaces do not hold up the administrator's.
		{"a/1@@a+ b/2@@b+ a/3@@a a/4@r a/5@@a< c/6@r<", 2, 2, "5 6 4"},
	} {
		var queue []entry
		for i, text := range strings.Fields(test.queue) {
			bare := strings.TrimRight(text, "+!<")
			name, repository, _ := strings.Cut(bare, "@")
			namespace, id, _ := strings.Cut(name, "/")
			job := backup.Job{Task: mover.Task{ID: id, Repository: repository, Made: !strings.Contains(text, "!")}}
			switch restores := strings.Contains(text, "<"); {
			case !restores && i%2 == 0: // a sidecar that does not say what for
				job.Task.Backup = &mover.Backup{Host: namespace + "/claim"}
			case !restores:
				job.Task.Backup = &mover.Backup{Host: "else/claim"}
			default:
				job.Task.Restore = &mover.Restore{}
			}
			if namespace != "" && (job.Task.Restore != nil || i%2 == 1) {
				job.About = []backup.Object{{Namespace: namespace}, {Namespace: "else"}}
			}
			queue = append(queue, entry{&record{Job: job, Started: time.Unix(int64(i), 0)}, strings.Contains(text, "+")})
		}
		var got []string
		for _, rec := range next(queue, test.limit, test.each) {
			got = append(got, rec.Job.Task.ID)
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("of %s, %d and %d: %v, want %s", test.queue, test.limit, test.each, got, test.want)
		}
	}
}

// TestAdmit: limits are the template's, and hold whoever starts.
func TestAdmit(t *testing.T) {
	c := newCluster(t)
	for i := range 3 {
		for _, repository := range []string{"offsite", "near.by"} {
			j := job(fmt.Sprint(repository[:1], i))
			j.Task.Repository = repository
			if err := c.runner().Start(t.Context(), j, wanted); err != nil {
				t.Fatal(err)
			}
		}
	}
	if run := c.jobs(); len(run) != 2 || run[0].Labels[Mover] != "n0" || run[1].Labels[Mover] != "o0" {
		t.Fatalf("%d Jobs run", len(run))
	}
	if err := c.runner().Remove(t.Context(), "n0"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.runner().admit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if run := c.jobs(); len(run) != 2 || run[0].Labels[Mover] != "n1" || run[1].Labels[Mover] != "o0" {
		t.Errorf("%d Jobs run", len(run))
	}
}

// TestMaker: two controllers that look at once, and choose one each, let only one
// make a repository; the other comes when that has ended. Whoever gave the word may
// be killed before the one that has it runs.
func TestMaker(t *testing.T) {
	c := newCluster(t)
	first, second := c.runner(), c.runner()
	asked := false
	first.Made = func(string) bool { // between its look and its deed
		if !asked {
			asked = true
			if err := second.Start(t.Context(), unmade("a"), wanted); err != nil {
				t.Error(err)
			}
		}
		return false
	}
	if err := first.Start(t.Context(), unmade("b"), wanted); err != nil {
		t.Fatal(err)
	}
	if run := c.jobs(); len(run) != 1 || run[0].Labels[Mover] != "a" {
		t.Fatalf("%d movers make a repository", len(run))
	}
	p := c.pod(ended(mover.Result{Snapshot: "s"}))
	c.remove(p)
	if err := second.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := first.admit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if run := c.jobs(); len(run) != 1 || run[0].Labels[Mover] != "b" {
		t.Errorf("%d movers run", len(run))
	}
	if err := first.Remove(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	c.has(nothing)

	// Whoever is killed between the word and the deed holds nobody up.
	for n := 1; ; n++ {
		c := newCluster(t)
		if err := c.runner().Start(t.Context(), unmade("b"), func(context.Context) error { c.kill(n); return nil }); err == nil {
			break
		}
		c.kill(0)
		c.now = c.now.Add(-time.Second) // a comes first
		_ = c.runner().Start(t.Context(), unmade("a"), wanted)
		c.now = c.now.Add(time.Hour)
		for range 2 {
			if err := c.runner().Start(t.Context(), unmade("b"), wanted); err != nil {
				t.Error(err)
			}
		}
		if run := c.jobs(); len(run) != 1 {
			t.Errorf("killed at call %d: %d movers make a repository", n, len(run))
		}
	}
}

// TestMakerGoes: who had the word may give it back between two looks at it.
func TestMakerGoes(t *testing.T) {
	c := newCluster(t)
	r := c.runner()
	word := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: makerName("offsite"), Labels: map[string]string{Attempt: "gone"}}}
	if _, err := c.client.CoreV1().ConfigMaps("abaca").Create(t.Context(), word, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.client.PrependReactor("get", "configmaps", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if name := a.(clienttesting.GetAction).GetName(); name == word.Name {
			_ = c.client.Tracker().Delete(a.GetResource(), "abaca", name)
		}
		return false, nil, nil
	})
	if err := r.Start(t.Context(), unmade("a"), wanted); err != nil {
		t.Error(err)
	}
	if err := r.admit(t.Context()); err != nil || len(c.jobs()) != 1 {
		t.Errorf("%d movers run, %v", len(c.jobs()), err)
	}
}

func unmade(id string) backup.Job {
	j := job(id)
	j.Task.Made = false
	return j
}

// TestBrokenRecord: what bears our label and is no record stops itself alone, is told
// of, and keeps what it has.
func TestBrokenRecord(t *testing.T) {
	c := newCluster(t)
	r, ctx := c.runner(), t.Context()
	if err := r.Start(ctx, job("broken"), wanted); err != nil {
		t.Fatal(err)
	}
	maps := c.client.CoreV1().ConfigMaps("abaca")
	for _, text := range []string{"{", "{}", `{"job":{"task":{"id":"other","backup":{}}}}`, `{"job":{"task":{"id":"broken"}}}`} {
		m, err := maps.Get(ctx, recordName("broken"), metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.Data[recordKey] = text
		if _, err := maps.Update(ctx, m, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		j := job("well")
		j.Task.Repository = "near.by"
		if err := r.Start(ctx, j, wanted); err != nil {
			t.Errorf("%s: start: %v", text, err)
		}
		if all, err := r.Jobs(ctx); err != nil || len(all) != 1 || all[0].Job.Task.ID != "well" {
			t.Errorf("%s: %d jobs, %v", text, len(all), err)
		}
		if run := c.jobs(); len(run) != 2 {
			t.Errorf("%s: %d movers run", text, len(run))
		}
		if _, err := r.Status(ctx, "broken"); err == nil || !strings.Contains(err.Error(), recordName("broken")) {
			t.Errorf("%s: its own status: %v", text, err)
		}
		c.now = c.now.Add(time.Hour)
		if err := r.sweep(ctx); err == nil || !strings.Contains(err.Error(), recordName("broken")) {
			t.Errorf("%s: not told of: %v", text, err)
		}
		if run := c.jobs(); len(run) != 2 {
			t.Errorf("%s: %d movers run after a sweep", text, len(run))
		}
		if err := r.Remove(ctx, "well"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBrokenRecordsAreToldOnce: what is wrong, and stays so, is one line in the log.
func TestBrokenRecordsAreToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		r := c.runner()
		r.Now = time.Now
		for _, id := range []string{"a", "b", "c", "d"} {
			m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: recordName(id), Labels: map[string]string{Mover: id}}}
			if _, err := c.client.CoreV1().ConfigMaps("abaca").Create(t.Context(), m, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		var said []string
		log := funcr.New(func(_, args string) { said = append(said, args) }, funcr.Options{})
		ctx, cancel := context.WithTimeout(klog.NewContext(t.Context(), log), 10*sweepEvery)
		defer cancel()
		r.Run(ctx, time.Second)
		if len(said) != 1 || !strings.Contains(said[0], recordName("d")) {
			t.Errorf("it says %q", said)
		}
	})
}
