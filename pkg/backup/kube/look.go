package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
)

const (
	// patience is how long what usually takes moments may take before it is asked
	// why: a Job to make its pod, a pod to find a node and to start, a node to
	// answer again.
	patience = 15 * time.Second
	// lateness is how long a pod may be late with its end before its node counts
	// as lost.
	lateness = time.Minute
)

// look says how far the attempt of a record is.
func (r *Runner) look(ctx context.Context, rec *record) (*backup.Status, error) {
	if rec.Phase != "" {
		return rec.status(), nil
	}
	id := rec.Job.Task.ID
	// The Job before its pods: no pod comes of one that is gone.
	job, err := r.Client.BatchV1().Jobs(r.Namespace).Get(ctx, rec.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && job.UID != rec.UID {
		job, err = nil, nil
	}
	if err != nil {
		return nil, kind(err, "Job of mover %s", id)
	}
	pods, err := r.Client.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: Attempt + "=" + rec.Name})
	if err != nil {
		return nil, kind(err, "pods of mover %s", id)
	}
	return r.judge(ctx, rec, job, pods.Items)
}

// judge says how far an attempt is that has this Job, if any, and these pods. They
// were read after the record.
func (r *Runner) judge(ctx context.Context, rec *record, job *batchv1.Job, pods []corev1.Pod) (*backup.Status, error) {
	st := rec.status()
	if st.Phase != "" {
		return st, nil
	}
	st.Phase = backup.Running
	var last *corev1.Pod
	for i := range pods {
		if p := &pods[i]; p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed {
			st.Progress, st.Trouble = r.progress(p.UID), r.trouble(ctx, p)
			return st, nil
		}
		last = &pods[i]
	}
	if last != nil {
		if result, ended, ok := said(last); ok {
			st.Result, st.Ended, st.Phase = result, ended, backup.Succeeded
			if result.Error != "" {
				st.Phase = backup.Failed
			}
			if why := taken(last); why != "" && result.Reason == mover.ReasonStopped {
				st.Result.Error = why + ": " + result.Error
			}
			return st, nil
		}
	}
	end := finished(job)
	if job == nil || end != nil {
		// Another controller may have written down how it ended, and then taken away
		// what would say so.
		now, err := r.read(ctx, rec.Job.Task.ID)
		if err != nil {
			return nil, err
		}
		if now.version != rec.version {
			if st = now.status(); st.Phase == "" {
				st.Phase = backup.Running // the next attempt
			}
			return st, nil
		}
	}
	switch {
	case job == nil:
		st.Phase, st.Trouble = backup.Interrupted, "its Job has been deleted"
	case end == nil && job.Spec.Suspend != nil && *job.Spec.Suspend:
		// It waits its turn.
	case end == nil && last == nil && job.Status.StartTime != nil && r.Now().Sub(job.Status.StartTime.Time) > patience:
		st.Trouble = r.complaint(ctx, job.UID)
	case end == nil:
	case end.Type == batchv1.JobComplete:
		// Its pod has gone with what it said; the repository has it.
		st.Phase, st.Ended = backup.Succeeded, end.LastTransitionTime.Time
	default:
		st.Phase, st.Trouble = backup.Interrupted, death(last)
	}
	return st, nil
}

// finished returns the condition by which a Job has ended, nil if it has not.
func finished(job *batchv1.Job) *batchv1.JobCondition {
	if job == nil {
		return nil
	}
	for i, c := range job.Status.Conditions {
		if (c.Type == batchv1.JobComplete || c.Type == batchv1.JobFailed) && c.Status == corev1.ConditionTrue {
			return &job.Status.Conditions[i]
		}
	}
	return nil
}

// state is the state of the mover's container.
func state(p *corev1.Pod) corev1.ContainerState {
	for _, c := range p.Status.ContainerStatuses {
		if c.Name == container {
			return c.State
		}
	}
	return corev1.ContainerState{}
}

// said is what a mover has said at its end.
func said(p *corev1.Pod) (result mover.Result, ended time.Time, ok bool) {
	t := state(p).Terminated
	if t == nil || json.Unmarshal([]byte(t.Message), &result) != nil || (t.ExitCode == 0) != (result.Error == "") {
		return mover.Result{}, time.Time{}, false
	}
	return result, t.FinishedAt.Time, true
}

// taken says why a pod was taken off its node, empty if it was not.
func taken(p *corev1.Pod) string {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.DisruptionTarget && c.Status == corev1.ConditionTrue {
			return fmt.Sprintf("its pod was taken off node %s (%s: %s)", p.Spec.NodeName, c.Reason, c.Message)
		}
	}
	if p.Status.Reason == "Evicted" {
		return fmt.Sprintf("its pod was evicted from node %s (%s)", p.Spec.NodeName, p.Status.Message)
	}
	return ""
}

// death says what ended a mover that has said nothing.
func death(p *corev1.Pod) string {
	if p == nil {
		return "its pod has been deleted"
	}
	if why := taken(p); why != "" {
		return why
	}
	t := state(p).Terminated
	switch {
	case t == nil && p.Status.Message != "":
		return fmt.Sprintf("its pod %s on node %s has failed: %s: %s", p.Name, p.Spec.NodeName, p.Status.Reason, p.Status.Message)
	case t == nil:
		return fmt.Sprintf("its pod %s on node %s has failed", p.Name, p.Spec.NodeName)
	case t.Reason == "OOMKilled":
		return fmt.Sprintf("it needed more memory than its limit on node %s (OOMKilled); raise movers.resources.limits.memory, or set none", p.Spec.NodeName)
	}
	return fmt.Sprintf("it was killed on node %s (exit code %d, %s)", p.Spec.NodeName, t.ExitCode, t.Reason)
}

// lost says that a pod is late with its end, empty if it is not.
func (r *Runner) lost(p *corev1.Pod) string {
	if at := p.DeletionTimestamp; at != nil && r.Now().Sub(at.Time) > lateness {
		return fmt.Sprintf("its pod %s on node %s, which should have ended at %s and may still write: if the node is lost, delete its Node object or taint it %s",
			p.Name, p.Spec.NodeName, at.UTC().Format(time.RFC3339), corev1.TaintNodeOutOfService)
	}
	return ""
}

// trouble says why a pod that has not ended does not get on, empty if it does as
// far as one can see.
func (r *Runner) trouble(ctx context.Context, p *corev1.Pod) string {
	if why := r.lost(p); why != "" {
		return why
	}
	scheduled, ready := condition(p, corev1.PodScheduled), condition(p, corev1.PodReady)
	s, age := state(p), r.Now().Sub(p.CreationTimestamp.Time)
	switch {
	case scheduled != nil && scheduled.Status == corev1.ConditionFalse && age > patience:
		return fmt.Sprintf("no node takes its pod: %s: %s", scheduled.Reason, scheduled.Message)
	case s.Running != nil && ready != nil && ready.Status == corev1.ConditionFalse && p.DeletionTimestamp == nil &&
		r.Now().Sub(ready.LastTransitionTime.Time) > patience:
		return fmt.Sprintf("node %s of its pod %s does not answer; no other mover is started as long as this one may live", p.Spec.NodeName, p.Name)
	case s.Waiting != nil && s.Waiting.Reason != "ContainerCreating" && s.Waiting.Reason != "PodInitializing":
		return fmt.Sprintf("its pod %s cannot start: %s: %s", p.Name, s.Waiting.Reason, s.Waiting.Message)
	case s.Running == nil && s.Terminated == nil && age > patience:
		if why := r.complaint(ctx, p.UID); why != "" {
			return fmt.Sprintf("its pod %s does not start: %s", p.Name, why)
		}
	}
	return ""
}

func condition(p *corev1.Pod, kind corev1.PodConditionType) *corev1.PodCondition {
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == kind {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}

// complaint is the last warning that Kubernetes has of an object. It is only
// shown, so what cannot be read is empty.
func (r *Runner) complaint(ctx context.Context, uid types.UID) string {
	events, err := r.Client.CoreV1().Events(r.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: "involvedObject.uid=" + string(uid) + ",type=" + corev1.EventTypeWarning})
	if err != nil || len(events.Items) == 0 {
		return ""
	}
	last := slices.MaxFunc(events.Items, func(a, b corev1.Event) int { return at(a).Compare(at(b)) })
	return strings.TrimSpace(last.Reason + ": " + last.Message)
}

func at(e corev1.Event) time.Time {
	if e.LastTimestamp.IsZero() {
		return e.EventTime.Time
	}
	return e.LastTimestamp.Time
}
