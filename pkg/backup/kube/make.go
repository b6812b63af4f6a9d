package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
)

const (
	// container is the template's container that moves.
	container = "mover"
	// perFile is the memory, in bytes, that restic needs for each file that its
	// repository knows, beyond what the template requests: about 110 for each blob
	// of its index, and most files are one or two.
	perFile = 256
	// folder is where a mover sees the Secret of its repository.
	folder = "/etc/abaca/repository"
	// taskVariable holds the task of a mover, in JSON. It has no secret.
	taskVariable = "ABACA_TASK"
)

// Capabilities of movers, which are root and have no others. Not another user:
// NFS servers go by the user's number, and let only root read all.
var (
	reading = []corev1.Capability{"DAC_READ_SEARCH"}
	writing = []corev1.Capability{"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "MKNOD", "SETFCAP"}
)

// template returns the PodTemplate of movers.
func (r *Runner) template(ctx context.Context) (*corev1.PodTemplate, error) {
	return podTemplate(ctx, r.Client, r.Namespace, r.Template)
}

func podTemplate(ctx context.Context, client kubernetes.Interface, namespace, name string) (*corev1.PodTemplate, error) {
	t, err := client.CoreV1().PodTemplates(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("PodTemplate %s/%s of the movers is not there: %w", namespace, name, backend.ErrUnavailable)
	}
	return t, kind(err, "PodTemplate %s/%s of the movers", namespace, name)
}

// make makes the objects of an attempt, unless they are there, and returns the UID of
// the Job, which does not run yet.
func (r *Runner) make(ctx context.Context, template *corev1.PodTemplate, job backup.Job, name string) (types.UID, error) {
	pod, err := podOf(template, name, job)
	if err != nil {
		return "", err
	}
	var own map[string][]byte
	if namespace := backup.Owner(job.Task.Repository); namespace != "" {
		if own, err = ownSecret(ctx, r.Client, template, namespace); err != nil {
			return "", err
		}
	}
	meta := metav1.ObjectMeta{Name: name, Labels: map[string]string{Mover: job.Task.ID, Attempt: name}}
	volume, claim := r.volumeOf(meta, job)
	if _, err := r.Client.CoreV1().PersistentVolumes().Create(ctx, volume, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return "", kind(err, "PersistentVolume of mover %s", job.Task.ID)
	}
	if _, err := r.Client.CoreV1().PersistentVolumeClaims(r.Namespace).Create(ctx, claim, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return "", kind(err, "claim of mover %s", job.Task.ID)
	}
	made, err := r.Client.BatchV1().Jobs(r.Namespace).Create(ctx, &batchv1.Job{ObjectMeta: meta, Spec: batchv1.JobSpec{
		Suspend: new(true), Parallelism: new(int32(1)), Completions: new(int32(1)),
		// One pod and no other: whether there is to be another is decided once
		// this one is gone. It has no time to live: how it ended is read first.
		BackoffLimit: new(int32(0)), PodReplacementPolicy: new(batchv1.Failed),
		Template: *pod,
	}}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		if made, err = r.Client.BatchV1().Jobs(r.Namespace).Get(ctx, name, metav1.GetOptions{}); apierrors.IsNotFound(err) {
			err = fmt.Errorf("another controller has just removed it: %w", backend.ErrPending)
		}
	}
	if err != nil {
		return "", kind(err, "Job of mover %s", job.Task.ID)
	}
	if own != nil {
		// It goes with the Job, whatever ends that: Kubernetes sees to it.
		meta.OwnerReferences = []metav1.OwnerReference{{APIVersion: "batch/v1", Kind: "Job", Name: name, UID: made.UID}}
		_, err := r.Client.CoreV1().Secrets(r.Namespace).Create(ctx, &corev1.Secret{ObjectMeta: meta, Data: own}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return "", kind(err, "copy of Secret %s/%s for mover %s", backup.Owner(job.Task.Repository), backup.SecretName, job.Task.ID)
		}
	}
	return made.UID, nil
}

// volumeOf returns the volume of what a mover reads or fills, which nobody else's
// claim can bind, and the claim that does.
func (r *Runner) volumeOf(meta metav1.ObjectMeta, job backup.Job) (*corev1.PersistentVolume, *corev1.PersistentVolumeClaim) {
	readOnly, mode := job.Task.Backup != nil, corev1.ReadWriteOnce
	if readOnly {
		mode = corev1.ReadOnlyMany
	}
	var where *corev1.VolumeNodeAffinity
	if job.Zone != "" {
		where = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: r.ZoneKey, Operator: corev1.NodeSelectorOpIn, Values: []string{job.Zone}}}}}}}
	}
	size := corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")} // of no consequence
	return &corev1.PersistentVolume{ObjectMeta: meta, Spec: corev1.PersistentVolumeSpec{
			Capacity: size, AccessModes: []corev1.PersistentVolumeAccessMode{mode}, NodeAffinity: where,
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			ClaimRef:                      &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: r.Namespace, Name: meta.Name},
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
				Driver: r.Driver, VolumeHandle: r.Handle(job), ReadOnly: readOnly}},
		}}, &corev1.PersistentVolumeClaim{ObjectMeta: meta, Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{mode}, Resources: corev1.VolumeResourceRequirements{Requests: size},
			StorageClassName: new(""), VolumeName: meta.Name,
		}}
}

// podOf fills the template in for one job.
func podOf(template *corev1.PodTemplate, name string, job backup.Job) (*corev1.PodTemplateSpec, error) {
	secret, ok := template.Annotations[Repository+job.Task.Repository]
	if backup.Owner(job.Task.Repository) != "" {
		secret, ok = name, true // its copy
	}
	if !ok {
		return nil, fmt.Errorf("repository %q: PodTemplate %s names no Secret for it: %w", job.Task.Repository, template.Name, backend.ErrNotFound)
	}
	pod := template.Template.DeepCopy()
	i := slices.IndexFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == container })
	if i < 0 {
		return nil, fmt.Errorf("PodTemplate %s has no container %q: %w", template.Name, container, backend.ErrUnavailable)
	}
	task, err := json.Marshal(job.Task)
	if err != nil {
		return nil, err
	}
	if pod.Labels == nil {
		pod.Labels = map[string]string{}
	}
	pod.Labels[Mover], pod.Labels[Attempt] = job.Task.ID, name
	pod.Spec.Hostname = name // restic's locks bear it, and no other pod ever has it
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	pod.Spec.AutomountServiceAccountToken = new(false)
	if job.Node != "" {
		pod.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
			NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{
				{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{job.Node}}}}}}}}
	}
	readOnly, capabilities := job.Task.Backup != nil, writing
	if readOnly {
		capabilities = reading
	}
	pod.Spec.Volumes = append(pod.Spec.Volumes,
		corev1.Volume{Name: "volume", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		corev1.Volume{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name, ReadOnly: readOnly}}},
		corev1.Volume{Name: "repository", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: secret, DefaultMode: new(int32(0o400))}}})
	c := &pod.Spec.Containers[i]
	c.Args = append(c.Args, "--repository="+folder)
	c.Env = append(c.Env, corev1.EnvVar{Name: taskVariable, Value: literal(task)})
	c.VolumeMounts = append(c.VolumeMounts,
		corev1.VolumeMount{Name: "volume", MountPath: mover.Dir},
		corev1.VolumeMount{Name: "data", MountPath: mover.Dir + "/data", ReadOnly: readOnly},
		corev1.VolumeMount{Name: "repository", MountPath: folder, ReadOnly: true})
	c.SecurityContext = &corev1.SecurityContext{
		RunAsUser: new(int64(0)), RunAsGroup: new(int64(0)), Privileged: new(false), AllowPrivilegeEscalation: new(false),
		ReadOnlyRootFilesystem: new(true), SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: capabilities},
	}
	if memory, ok := c.Resources.Requests[corev1.ResourceMemory]; ok {
		memory.Add(*resource.NewQuantity(job.Files*perFile, resource.BinarySI))
		if limit, limited := c.Resources.Limits[corev1.ResourceMemory]; limited && memory.Cmp(limit) > 0 {
			memory = limit
		}
		c.Resources.Requests[corev1.ResourceMemory] = memory
	}
	return pod, nil
}

// literal keeps the kubelet from expanding what looks like a reference to a
// variable: a "$" in JSON is within a string.
func literal(task []byte) string { return strings.ReplaceAll(string(task), "$", `\u0024`) }
