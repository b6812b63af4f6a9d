// Package kube is a namespace of Kubernetes as a run of a schedule sees it.
package kube

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/abaca-csi/abaca/pkg/event"
	"github.com/abaca-csi/abaca/pkg/line"
	"github.com/abaca-csi/abaca/pkg/schedule"
)

// tellTime bounds the writing of an event.
const tellTime = 10 * time.Second

// Namespace implements schedule.Cluster. It needs the verbs get and list on claims,
// and get, list, create and delete on VolumeSnapshots; Job needs get on pods and
// jobs.
type Namespace struct {
	Core      kubernetes.Interface
	Snapshots snapshots.Interface
	Name      string
}

var _ schedule.Cluster = (*Namespace)(nil)

// kind tells an error of the API in the terms of a schedule.
func kind(err error) error {
	status := apierrors.APIStatus(nil)
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%w: %w", schedule.ErrNotFound, err)
	case apierrors.IsAlreadyExists(err):
		return fmt.Errorf("%w: %w", schedule.ErrExists, err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case !errors.As(err, &status), // no answer at all
		apierrors.IsTimeout(err), apierrors.IsServerTimeout(err), apierrors.IsTooManyRequests(err),
		apierrors.IsServiceUnavailable(err), apierrors.IsInternalError(err):
		return fmt.Errorf("%w: %w", schedule.ErrUnavailable, err)
	}
	return err
}

// Claims implements schedule.Cluster.
func (n *Namespace) Claims(ctx context.Context, which schedule.Selection) ([]schedule.Claim, error) {
	var found []corev1.PersistentVolumeClaim
	if which.Selector != "" {
		list, err := n.Core.CoreV1().PersistentVolumeClaims(n.Name).List(ctx, metav1.ListOptions{LabelSelector: which.Selector})
		if err != nil {
			return nil, kind(err)
		}
		found = list.Items
	}
	for _, name := range which.Names {
		claim, err := n.Core.CoreV1().PersistentVolumeClaims(n.Name).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, kind(err)
		}
		found = append(found, *claim)
	}
	claims := make([]schedule.Claim, len(found))
	for i, c := range found {
		claims[i].Name = c.Name
		switch {
		case c.DeletionTimestamp != nil:
			claims[i].Problem = "the claim is being deleted"
		case c.Status.Phase != corev1.ClaimBound:
			claims[i].Problem = fmt.Sprintf("the claim is not bound to a volume (%s)", c.Status.Phase)
		}
	}
	return claims, nil
}

// Create implements schedule.Cluster.
func (n *Namespace) Create(ctx context.Context, want schedule.Snapshot) (schedule.Snapshot, error) {
	s, err := n.Snapshots.SnapshotV1().VolumeSnapshots(n.Name).Create(ctx, &snapshotv1.VolumeSnapshot{
		ObjectMeta: metav1.ObjectMeta{Name: want.Name, Namespace: n.Name, Labels: want.Labels(), Annotations: want.Annotations(want.Scheduled)},
		Spec: snapshotv1.VolumeSnapshotSpec{
			Source:                  snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &want.Claim},
			VolumeSnapshotClassName: &want.Tier,
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return schedule.Snapshot{}, kind(err)
	}
	return read(s), nil
}

// Get implements schedule.Cluster.
func (n *Namespace) Get(ctx context.Context, name string) (schedule.Snapshot, error) {
	s, err := n.Snapshots.SnapshotV1().VolumeSnapshots(n.Name).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return schedule.Snapshot{}, kind(err)
	}
	return read(s), nil
}

// List implements schedule.Cluster.
func (n *Namespace) List(ctx context.Context, series schedule.Series) ([]schedule.Snapshot, error) {
	// Without a limit the API answers with all of them at once.
	list, err := n.Snapshots.SnapshotV1().VolumeSnapshots(n.Name).List(ctx, metav1.ListOptions{
		LabelSelector: metav1.FormatLabelSelector(metav1.SetAsLabelSelector(series.Labels()))})
	if err != nil {
		return nil, kind(err)
	}
	all := make([]schedule.Snapshot, len(list.Items))
	for i := range list.Items {
		all[i] = read(&list.Items[i])
	}
	return all, nil
}

// Delete implements schedule.Cluster.
func (n *Namespace) Delete(ctx context.Context, s schedule.Snapshot) error {
	uid := types.UID(s.UID)
	err := n.Snapshots.SnapshotV1().VolumeSnapshots(n.Name).Delete(ctx, s.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
	if apierrors.IsConflict(err) { // another one has its name by now
		return fmt.Errorf("%w: %w", schedule.ErrNotFound, err)
	}
	return kind(err)
}

// read is a VolumeSnapshot in the terms of a schedule. What it is of is taken from
// its spec: an annotation can be copied.
func read(v *snapshotv1.VolumeSnapshot) schedule.Snapshot {
	s := schedule.Snapshot{Name: v.Name, UID: string(v.UID), State: schedule.Pending, Deleting: v.DeletionTimestamp != nil}
	if series, at, ok := schedule.ReadSeries(v.Labels, v.Annotations); ok {
		s.Series, s.Scheduled = series, at
		s.Claim, s.Tier = "", ""
		if name := v.Spec.Source.PersistentVolumeClaimName; name != nil {
			s.Claim = *name
		}
		if class := v.Spec.VolumeSnapshotClassName; class != nil {
			s.Tier = *class
		}
	}
	if v.Status == nil {
		s.Message = "the snapshot controller has not seen it yet"
		return s
	}
	switch {
	case v.Status.ReadyToUse != nil && *v.Status.ReadyToUse:
		s.State = schedule.Ready
		if v.Annotations[schedule.PartialKey] == "true" {
			s.State = schedule.Partial
		}
	case v.Status.Error != nil:
		if m := v.Status.Error.Message; m != nil {
			s.Message = *m
		}
		if !goesOn(v.Status, s.Message) {
			// The snapshotter goes on trying.
			s.State, s.Retried = schedule.Failed, true
		}
	}
	return s
}

// goesOn says whether work may be going on for a snapshot that is not ready and has an
// error. The error stays after what it tells of is over, until the snapshot is ready
// (csi-snapshotter v8.7.0, updateSnapshotContentStatus). So of one that was begun, and
// has a time of creation by that, it only counts if it is the one that a driver gives
// up with; of another one, if it does not say that the work goes on.
func goesOn(status *snapshotv1.VolumeSnapshotStatus, message string) bool {
	if status.CreationTime != nil {
		return !strings.Contains(message, "code = FailedPrecondition")
	}
	return strings.Contains(message, "code = Aborted") || strings.Contains(message, "code = DeadlineExceeded")
}

// Job returns the Job that a pod runs for. schedule.ErrNotFound if it runs for
// none.
func (n *Namespace) Job(ctx context.Context, pod string) (*batchv1.Job, error) {
	p, err := n.Core.CoreV1().Pods(n.Name).Get(ctx, pod, metav1.GetOptions{})
	if err != nil {
		return nil, kind(err)
	}
	owner := metav1.GetControllerOf(p)
	if owner == nil || owner.Kind != "Job" {
		return nil, fmt.Errorf("%w: pod %s is of no Job", schedule.ErrNotFound, pod)
	}
	job, err := n.Core.BatchV1().Jobs(n.Name).Get(ctx, owner.Name, metav1.GetOptions{})
	return job, kind(err)
}

// Tell tells on an object of the namespace what the run for a time has come to; once,
// however often that is tried. It needs the verbs create and patch on events, and
// does so when ctx has ended, too.
func (n *Namespace) Tell(ctx context.Context, o corev1.ObjectReference, reason schedule.EventReason, text string, at, now time.Time) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tellTime)
	defer cancel()
	return event.Put(ctx, n.Core, event.Event{Object: o, Reason: string(reason), Subject: at.UTC().Format(time.RFC3339), Text: line.One(text, ""),
		Warning: reason.Warning(), Count: 1, First: now, Last: now, Source: "abaca-schedule"})
}
