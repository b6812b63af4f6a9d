package kube

import (
	"errors"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
)

// TestJudge: what has become of a mover is told apart, in words.
func TestJudge(t *testing.T) {
	c := newCluster(t)
	r := c.runner()
	long := metav1.NewTime(c.now.Add(-time.Hour))
	status := func(s corev1.PodStatus, of corev1.ContainerState, conditions ...corev1.PodCondition) corev1.PodStatus {
		s.ContainerStatuses = []corev1.ContainerStatus{{Name: container, State: of}}
		s.Conditions = conditions
		return s
	}
	dead := func(code int32, reason string) corev1.ContainerState {
		return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, Reason: reason}}
	}
	waiting := func(reason string) corev1.ContainerState {
		return corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: "because"}}
	}
	failed, pending := corev1.PodStatus{Phase: corev1.PodFailed}, corev1.PodStatus{Phase: corev1.PodPending}
	no := func(what corev1.PodConditionType) corev1.PodCondition {
		return corev1.PodCondition{Type: what, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: "0/3 nodes", LastTransitionTime: long}
	}
	yes := corev1.PodCondition{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, Reason: "EvictionByEvictionAPI", Message: "drained"}
	stopped := ended(mover.Result{Error: "asked to stop", Reason: mover.ReasonStopped})
	stopped.Conditions = []corev1.PodCondition{yes}
	evicted := failed
	evicted.Reason, evicted.Message = "Evicted", "low on memory"
	end := func(kind batchv1.JobConditionType) *batchv1.Job {
		return &batchv1.Job{Status: batchv1.JobStatus{Conditions: []batchv1.JobCondition{{Type: kind, Status: corev1.ConditionTrue, LastTransitionTime: long}}}}
	}
	under := &batchv1.Job{}
	rec := &record{Job: job("a"), Name: "n", UID: "u"}
	if err := r.write(t.Context(), rec); err != nil {
		t.Fatal(err)
	}

	for name, test := range map[string]struct {
		job   *batchv1.Job
		pod   *corev1.PodStatus
		phase backup.Phase
		word  string // in the trouble, or in the error
	}{
		"waits its turn":            {&batchv1.Job{Spec: batchv1.JobSpec{Suspend: new(true)}}, nil, backup.Running, ""},
		"runs":                      {under, &running, backup.Running, ""},
		"unschedulable":             {under, new(status(pending, corev1.ContainerState{}, no(corev1.PodScheduled))), backup.Running, "0/3 nodes"},
		"no image":                  {under, new(status(pending, waiting("ImagePullBackOff"))), backup.Running, "ImagePullBackOff: because"},
		"being made":                {under, new(status(pending, waiting("ContainerCreating"))), backup.Running, ""},
		"its node does not answer":  {under, new(status(running, running.ContainerStatuses[0].State, no(corev1.PodReady))), backup.Running, "n1"},
		"succeeded":                 {under, new(ended(mover.Result{Snapshot: "s"})), backup.Succeeded, ""},
		"its pod has gone":          {end(batchv1.JobComplete), nil, backup.Succeeded, ""},
		"failed":                    {under, new(ended(mover.Result{Error: "wrong password", Reason: mover.ReasonPassword})), backup.Failed, "wrong password"},
		"drained":                   {under, &stopped, backup.Failed, "EvictionByEvictionAPI"},
		"evicted":                   {end(batchv1.JobFailed), &evicted, backup.Interrupted, "low on memory"},
		"out of memory":             {end(batchv1.JobFailed), new(status(failed, dead(137, "OOMKilled"))), backup.Interrupted, "movers.resources"},
		"killed":                    {end(batchv1.JobFailed), new(status(failed, dead(137, "Error"))), backup.Interrupted, "exit code 137"},
		"its pod was deleted":       {end(batchv1.JobFailed), nil, backup.Interrupted, "deleted"},
		"its Job was deleted":       {nil, nil, backup.Interrupted, "Job"},
		"its Job was, its pod runs": {nil, &running, backup.Running, ""},
	} {
		var pods []corev1.Pod
		if test.pod != nil {
			pods = []corev1.Pod{{ObjectMeta: metav1.ObjectMeta{Name: "p", CreationTimestamp: long}, Spec: corev1.PodSpec{NodeName: "n1"}, Status: *test.pod}}
		}
		st, err := r.judge(t.Context(), rec, test.job, pods)
		if err != nil {
			t.Fatal(err)
		}
		said := st.Trouble + st.Result.Error
		if st.Phase != test.phase || !strings.Contains(said, test.word) || (test.word == "") != (said == "") {
			t.Errorf("%s: %s, %q; want %s, and a word of %q", name, st.Phase, said, test.phase, test.word)
		}
	}

	// What only events know.
	if _, err := c.client.CoreV1().Events("abaca").Create(t.Context(), &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e"}, Type: "Warning",
		Reason: "FailedMount", Message: `secret "x" not found`}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	st, err := r.judge(t.Context(), rec, under, []corev1.Pod{{ObjectMeta: metav1.ObjectMeta{CreationTimestamp: long},
		Status: status(pending, waiting("ContainerCreating"))}})
	if err != nil || !strings.Contains(st.Trouble, "FailedMount") {
		t.Errorf("trouble: %+v, %v", st, err)
	}

	// Another controller has written down how it ended, and taken its objects away,
	// since the record was read.
	old := *rec
	rec.end(&backup.Status{Phase: backup.Failed, Result: mover.Result{Error: "wrong password", Reason: mover.ReasonPassword}})
	if err := r.write(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	for _, job := range []*batchv1.Job{nil, end(batchv1.JobComplete), end(batchv1.JobFailed)} {
		if st, err := r.judge(t.Context(), &old, job, nil); err != nil || st.Phase != backup.Failed || st.Result.Error != "wrong password" {
			t.Errorf("ended meanwhile: %+v, %v", st, err)
		}
	}
	rec.Phase = "" // and has begun anew
	if err := r.write(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	if st, err := r.judge(t.Context(), &old, nil, nil); err != nil || st.Phase != backup.Running {
		t.Errorf("begun anew meanwhile: %+v, %v", st, err)
	}
	if err := r.drop(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	if st, err := r.judge(t.Context(), &old, nil, nil); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("removed meanwhile: %+v, %v", st, err)
	}
}
