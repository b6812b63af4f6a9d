package kube

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestInherit: the locks of controllers whose pods are gone are removed, from all
// repositories, once; those of one that lives, or of a host that one lives on, are not.
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
	// They are no records of movers.
	if err := r.sweep(ctx); err != nil {
		t.Error(err)
	}
	if all, err := r.Jobs(ctx); err != nil || len(all) > 0 {
		t.Errorf("%d movers, %v", len(all), err)
	}
}
