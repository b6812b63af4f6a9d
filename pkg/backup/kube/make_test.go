package kube

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// TestObjects: a backup cannot write, a pod has no rights that it does not need,
// and nobody else's claim can bind the volume.
func TestObjects(t *testing.T) {
	c := newCluster(t)
	r := c.runner()
	restore := job("b")
	restore.Snapshot, restore.Share, restore.Files, restore.Node, restore.Zone = "", "share", 1<<20, "n1", "z1"
	restore.Task.Backup, restore.Task.Restore = nil, &mover.Restore{Backup: "x"}
	for _, j := range []struct {
		readOnly bool
		mode     corev1.PersistentVolumeAccessMode
		add      []corev1.Capability
	}{{true, corev1.ReadOnlyMany, []corev1.Capability{"DAC_READ_SEARCH"}}, {false, corev1.ReadWriteOnce, writing}} {
		one := job("a")
		if !j.readOnly {
			one = restore
		}
		template, err := r.template(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		template.Template.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")}
		pod, err := podOf(template, "name", one)
		if err != nil {
			t.Fatal(err)
		}
		volume, claim := r.volumeOf(metav1.ObjectMeta{Name: "name"}, one)
		if ref := volume.Spec.ClaimRef; ref == nil || ref.Namespace != "abaca" || ref.Name != "name" || claim.Spec.VolumeName != "name" || *claim.Spec.StorageClassName != "" {
			t.Errorf("volume %+v, claim %+v", volume.Spec, claim.Spec)
		}
		if volume.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain || volume.Spec.CSI.ReadOnly != j.readOnly ||
			!slices.Equal(volume.Spec.AccessModes, []corev1.PersistentVolumeAccessMode{j.mode}) {
			t.Errorf("volume %+v", volume.Spec)
		}
		if where := volume.Spec.NodeAffinity; (where != nil) != (one.Zone != "") || where != nil &&
			(where.Required.NodeSelectorTerms[0].MatchExpressions[0].Key != "zone" || where.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0] != "z1") {
			t.Errorf("in zone %q: %+v", one.Zone, where)
		}
		for _, v := range pod.Spec.Volumes {
			if v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ReadOnly != j.readOnly {
				t.Errorf("claim read-only: %v", !j.readOnly)
			}
		}
		m := pod.Spec.Containers[0]
		for _, at := range m.VolumeMounts {
			if at.Name == "data" && (at.ReadOnly != j.readOnly || at.MountPath != "/run/abaca/volume/data") {
				t.Errorf("mount %+v", at)
			}
		}
		s := m.SecurityContext
		if !slices.Equal(s.Capabilities.Add, j.add) || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || *s.AllowPrivilegeEscalation ||
			*s.Privileged || !*s.ReadOnlyRootFilesystem || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || *pod.Spec.AutomountServiceAccountToken {
			t.Errorf("security context %+v", s)
		}
		want := resource.MustParse("64Mi")
		want.Add(*resource.NewQuantity(one.Files*perFile, resource.BinarySI))
		if got := m.Resources.Requests.Memory(); got.Cmp(want) != 0 {
			t.Errorf("memory %s, want %s", got, want.String())
		}
		if (pod.Spec.Affinity != nil) != (one.Node != "") {
			t.Errorf("affinity %+v", pod.Spec.Affinity)
		}
	}
}

// TestMessage: what Kubernetes keeps of a message is all of it.
func TestMessage(t *testing.T) {
	long := strings.Repeat("é\x00\"", 20000)
	for _, r := range []mover.Result{
		{}, {Error: "short", Reason: mover.ReasonSource}, {Error: long, Reason: mover.ReasonSource},
		{Snapshot: strings.Repeat("a", 64), Backup: &restic.BackupSummary{TotalFiles: 1 << 60}, Partial: true, Incomplete: slices.Repeat([]string{long[:500]}, 100)},
		{Partial: true, Incomplete: []string{long}},
	} {
		text := message(r)
		var got mover.Result
		if err := json.Unmarshal(text, &got); err != nil || len(text) > maxMessage {
			t.Errorf("%d bytes, %v", len(text), err)
		}
		if got.Reason != r.Reason || got.Snapshot != r.Snapshot || got.Partial != r.Partial || (got.Error == "") != (r.Error == "") || (got.Backup == nil) != (r.Backup == nil) {
			t.Errorf("%.60s became %.60s", r.Error, got.Error)
		}
		if len(r.Error) > maxMessage && len(got.Error) < 300 {
			t.Errorf("only %q is left", got.Error)
		}
	}
}

// TestTaskIsTakenLiterally: the kubelet expands $(NAME) and $$ in a variable.
func TestTaskIsTakenLiterally(t *testing.T) {
	c := newCluster(t)
	one := job("a")
	one.Task.Backup.Exclude = []string{"/a$$b", "$(HOME)"}
	template, err := c.runner().template(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	pod, err := podOf(template, "name", one)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range pod.Spec.Containers[0].Env {
		var got mover.Task
		if e.Name != taskVariable {
			continue
		}
		if err := json.Unmarshal([]byte(e.Value), &got); err != nil || strings.Contains(e.Value, "$") || !slices.Equal(got.Backup.Exclude, one.Task.Backup.Exclude) {
			t.Errorf("%s: %q, %v", e.Value, got.Backup.Exclude, err)
		}
		return
	}
	t.Error("there is no task")
}
