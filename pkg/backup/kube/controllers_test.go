package kube

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestInherit: the locks of controllers and of maintenance whose pods are gone are removed,
// from all repositories, once; those of one that lives, or of a host that one lives on, are not.
func TestInherit(t *testing.T) {
	c, ctx := newCluster(t), t.Context()
	c.repositories = []string{"near.by", "offsite"}
	for pod, phase := range map[string]corev1.PodPhase{"alive": corev1.PodRunning, "evicted": corev1.PodFailed, "me": corev1.PodRunning} {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: pod, Namespace: "abaca"}, Status: corev1.PodStatus{Phase: phase}}
		if err := c.client.Tracker().Add(p); err != nil {
			t.Fatal(err)
		}
	}
	var r *Runner
	for pod, host := range map[string]string{"gone": "gone", "evicted": "evicted", "alive": "node-1", "gone-of-node": "node-1", "me": "me"} {
		r = c.runner()
		r.Pod, r.Host = pod, host
		for range 2 {
			if err := r.register(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 2 {
		if err := r.bury(ctx); err != nil {
			t.Fatal(err)
		}
		slices.Sort(c.unlocked)
		if want := []string{"evicted", "evicted", "gone", "gone"}; !slices.Equal(c.unlocked, want) {
			t.Errorf("unlocked %v, want %v", c.unlocked, want)
		}
	}
	c.has("2 records, 0 Jobs, 0 claims, 0 volumes")
	// Maintenance is written down while it is seen, and locks its own repository only.
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "prune-1", Namespace: "abaca", Labels: map[string]string{Maintains: "offsite"}}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	if err := c.client.Tracker().Add(pod); err != nil {
		t.Fatal(err)
	}
	for _, phase := range []corev1.PodPhase{corev1.PodRunning, corev1.PodRunning, corev1.PodFailed, corev1.PodFailed} {
		evicted := pod.DeepCopy()
		evicted.Status.Phase = phase
		if err := c.client.Tracker().Update(corev1.SchemeGroupVersion.WithResource("pods"), evicted, "abaca"); err != nil {
			t.Fatal(err)
		}
		c.unlocked = nil
		if err := r.bury(ctx); err != nil {
			t.Fatal(err)
		}
		want := []string(nil)
		if phase == corev1.PodFailed && pod.Labels != nil {
			want, pod.Labels = []string{"prune-1"}, nil // once
		}
		if !slices.Equal(c.unlocked, want) {
			t.Errorf("%s: unlocked %v, want %v", phase, c.unlocked, want)
		}
	}
	c.has("2 records, 0 Jobs, 0 claims, 0 volumes")
	// They are no records of movers.
	if err := r.sweep(ctx); err != nil {
		t.Error(err)
	}
	if all, err := r.Jobs(ctx); err != nil || len(all) > 0 {
		t.Errorf("%d movers, %v", len(all), err)
	}
}
