// Package kube runs each mover as a Job in the driver's namespace.
//
// A job is a ConfigMap, the record; and while a mover is to run, a Job, a
// PersistentVolume of what it reads or fills, and the claim that binds the two.
// All bear the label [Mover], and nothing is remembered anywhere else:
//
//	claimed   a record without the UID of a Job: somebody asks whether it is wanted
//	waiting   its Job is suspended: limits are reached, and others come first
//	running   its Job is not: from now on its pod says how far it is
//	ended     the record says how; its objects go
//
// A record is changed only in the version that was read, a Job is let run only if
// a record names its UID, and a record that has ended names none that could. So
// whoever ends a job and then finds no Job and no pod of it knows that none will
// come. A pod that Kubernetes does not call gone may write, wherever its node is.
package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
)

const (
	// claimAge is how long a claim counts as being asked about.
	claimAge = 30 * time.Second
	// firstPause is that between two looks whether objects are gone. Each is twice as
	// long as the last, up to lastPause.
	firstPause, lastPause = 200 * time.Millisecond, 2 * time.Second
	// unlockTimeout bounds what is asked of a repository after a mover's death.
	unlockTimeout = 30 * time.Second
)

// Runner implements [backup.Runner]. It needs the verbs get, list, create, update
// and delete on ConfigMaps, get, list, create, patch and delete on Jobs, list,
// create and delete on PersistentVolumeClaims, create on Secrets, list on pods and
// events, get on pods/log and the PodTemplate, all in its namespace, what
// [Repositories] needs, and list, create and delete on PersistentVolumes.
type Runner struct {
	Client kubernetes.Interface
	// Namespace is where movers run, and Template the name of a PodTemplate there,
	// which says what their pods are like: the image of the container "mover",
	// where they may run, its cache, how many at a time, and which Secret is
	// whose repository's.
	Namespace, Template string
	// Driver is the name of the CSI driver, and ZoneKey the label of a node that says
	// in which zone it is.
	Driver, ZoneKey string
	// Handle is the id by which the driver publishes what a mover reads or fills.
	Handle func(backup.Job) string
	// Repositories are those that movers write to. A mover that ended without a
	// word leaves locks, which bear the name of its attempt as their host.
	Repositories backup.Repositories
	// Pod is the pod of this controller, and Host its host name, which its own locks
	// bear; empty if it has no pod.
	Pod, Host string
	// Made says whether a repository is known to be there; nil knows of none but
	// those that tasks know of.
	Made func(repository string) bool
	Now  func() time.Time

	admitting sync.Mutex
	asked     atomic.Int64 // how often it was asked for
	admitted  int64        // and how many of these a look was for, under admitting
	heard     sync.Map     // how far movers are: a restic.Progress by the UID of each pod
}

var _ backup.Runner = (*Runner)(nil)

// Start implements [backup.Runner]. The mover waits its turn.
func (r *Runner) Start(ctx context.Context, job backup.Job, may func(context.Context) error) error {
	if !jobID.MatchString(job.Task.ID) {
		return fmt.Errorf("task id %q: %w", job.Task.ID, backend.ErrInvalid)
	}
	template, err := r.template(ctx)
	if err != nil {
		return err
	}
	rec, err := r.claim(ctx, job)
	if err != nil || rec == nil {
		return err
	}
	if err := may(ctx); err != nil {
		return errors.Join(err, r.unclaim(ctx, rec))
	}
	name, err := attemptName(job, rec.version)
	if err != nil {
		return err
	}
	uid, err := r.make(ctx, template, job, name)
	if err != nil {
		// The next request is told why too, and not that somebody is at work on it.
		left := r.unclaim(ctx, rec)
		if left == nil && rec.claimed() { // so nobody can record what has been made
			left = r.unmake(ctx, name)
		}
		return errors.Join(err, left)
	}
	next := &record{Job: job, Started: r.Now(), Name: name, UID: uid, version: rec.version}
	if err := r.write(ctx, next); err != nil {
		if now, read := r.read(ctx, job.Task.ID); read == nil && now.Name == name {
			return nil // by another controller, or by this one, which did not hear the answer
		}
		return errors.Join(err, r.unmake(ctx, name))
	}
	return r.admit(ctx)
}

// claim returns a record that a mover may be started for, nil if none may.
func (r *Runner) claim(ctx context.Context, job backup.Job) (*record, error) {
	id := job.Task.ID
	rec, err := r.read(ctx, id)
	if errors.Is(err, backend.ErrNotFound) {
		rec = &record{Job: job, Started: r.Now()}
		err = r.write(ctx, rec)
	}
	if err != nil || rec.claimed() {
		return rec, err
	}
	st, err := r.look(ctx, rec)
	if err != nil || st.Phase == backup.Running || st.Phase == backup.Succeeded {
		return nil, err
	}
	rec, err = r.release(ctx, id)
	if err == nil && rec.Phase == backup.Succeeded {
		rec = nil
	}
	return rec, err
}

// unclaim drops a record that is a claim only.
func (r *Runner) unclaim(ctx context.Context, rec *record) error {
	if !rec.claimed() {
		return nil
	}
	return r.drop(ctx, rec)
}

// Status implements [backup.Runner].
func (r *Runner) Status(ctx context.Context, id string) (*backup.Status, error) {
	if !jobID.MatchString(id) {
		return nil, fmt.Errorf("mover %q: %w", id, backend.ErrNotFound)
	}
	rec, err := r.read(ctx, id)
	if err != nil {
		return nil, err
	}
	if rec.claimed() {
		if r.Now().Sub(rec.Started) > claimAge { // by somebody who was killed
			return nil, fmt.Errorf("mover %s: %w", id, backend.ErrNotFound)
		}
		return nil, fmt.Errorf("mover %s is being started: %w", id, backend.ErrPending)
	}
	return r.look(ctx, rec)
}

// Jobs implements [backup.Runner].
func (r *Runner) Jobs(ctx context.Context) ([]*backup.Status, error) {
	s, err := r.survey(ctx)
	if err != nil {
		return nil, err
	}
	var all []*backup.Status
	for _, rec := range s.records {
		if rec.claimed() {
			continue
		}
		st, err := r.judge(ctx, rec, s.job(rec), s.pods[rec.Name])
		if errors.Is(err, backend.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		all = append(all, st)
	}
	return all, nil
}

// Stop implements [backup.Runner].
func (r *Runner) Stop(ctx context.Context, id string) error {
	_, err := r.end(ctx, id, true)
	return err
}

// Release implements [backup.Runner].
func (r *Runner) Release(ctx context.Context, id string) error {
	if !jobID.MatchString(id) {
		return nil
	}
	_, err := r.release(ctx, id)
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	return err
}

// Remove implements [backup.Runner].
func (r *Runner) Remove(ctx context.Context, id string) error {
	// Not Stop: whoever is killed before the record goes must leave a success one.
	rec, err := r.end(ctx, id, false)
	if err != nil || rec == nil {
		return err
	}
	return r.drop(ctx, rec)
}

// end makes the job one that has ended, and its objects go. If deleted, or if it has
// not ended yet, it has failed for good. It returns the record, nil when there is none.
func (r *Runner) end(ctx context.Context, id string, deleted bool) (*record, error) {
	if !jobID.MatchString(id) {
		return nil, nil
	}
	rec, err := r.read(ctx, id)
	if errors.Is(err, backend.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if deleted && rec.Result.Reason != mover.ReasonDeleted || rec.Phase == "" {
		how := &backup.Status{Phase: backup.Running}
		if !deleted && !rec.claimed() {
			if how, err = r.look(ctx, rec); err != nil {
				return nil, err
			}
		}
		if how.Phase == backup.Running {
			how = &backup.Status{Phase: backup.Failed, Ended: r.Now(),
				Result: mover.Deleted}
		}
		rec.end(how)
		if err := r.write(ctx, rec); err != nil {
			return nil, err
		}
	}
	return rec, r.clear(ctx, rec)
}

// release writes down how a job has ended, and takes away its objects.
func (r *Runner) release(ctx context.Context, id string) (*record, error) {
	rec, err := r.read(ctx, id)
	if err != nil || rec.claimed() {
		return rec, err
	}
	st, err := r.look(ctx, rec)
	if err != nil {
		return nil, err
	}
	if st.Phase == backup.Running {
		return nil, fmt.Errorf("mover %s still runs: %w", id, backend.ErrPending)
	}
	if rec.Phase == "" {
		rec.end(st)
		if err := r.write(ctx, rec); err != nil {
			return nil, err
		}
	}
	return rec, r.clear(ctx, rec)
}

// clear removes the objects of the attempt that has ended, and waits until they are gone:
// then nothing of it is mounted or attached anywhere. Only then its locks are those of a
// process that is gone.
func (r *Runner) clear(ctx context.Context, rec *record) error {
	if rec.Name == "" {
		return nil // it was claimed only
	}
	err := r.gone(ctx, rec.Name)
	if err == nil && !rec.Job.Task.Made {
		err = r.unmaker(ctx, rec)
	}
	if err != nil || rec.Unlocked || !rec.abrupt() {
		return err
	}
	rec.Unlocked = true
	if err := r.unlock(ctx, rec.Job.Task.Repository, rec.Name); err != nil {
		// Nobody has to wait for a repository that is not there; its locks are
		// stale in half an hour.
		klog.FromContext(ctx).Error(err, "Locks of a mover that is gone may be left", "task", rec.Job.Task.ID, "repository", rec.Job.Task.Repository)
	}
	return r.write(ctx, rec)
}

// unlock removes the locks of a host that is gone.
func (r *Runner) unlock(ctx context.Context, name, host string) error {
	repository, err := r.Repositories.Open(ctx, name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, unlockTimeout)
	defer cancel()
	return repository.UnlockHost(ctx, host)
}

// gone tells the objects of an attempt to go, and waits until they are gone.
func (r *Runner) gone(ctx context.Context, name string) error {
	if err := r.unmake(ctx, name); err != nil {
		return err
	}
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		left, err := r.left(ctx, name)
		if err != nil || left == "" {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s has been told to go, and there is still %s: %w", name, left, backend.ErrPending)
		case <-time.After(pause):
		}
	}
}

// left names something that is left of an attempt; empty when nothing is.
func (r *Runner) left(ctx context.Context, name string) (string, error) {
	of := metav1.ListOptions{LabelSelector: Attempt + "=" + name}
	jobs, err := r.Client.BatchV1().Jobs(r.Namespace).List(ctx, of)
	if err != nil {
		return "", waiting(ctx, err, name)
	}
	pods, err := r.Client.CoreV1().Pods(r.Namespace).List(ctx, of)
	if err != nil {
		return "", waiting(ctx, err, name)
	}
	if len(pods.Items) > 0 {
		p := &pods.Items[0]
		return cmp.Or(r.lost(p), fmt.Sprintf("pod %s on node %q", p.Name, p.Spec.NodeName)), nil
	}
	if len(jobs.Items) > 0 {
		return "Job " + jobs.Items[0].Name, nil
	}
	// A volume is kept by Kubernetes for as long as it is attached to a node.
	volumes, err := r.Client.CoreV1().PersistentVolumes().List(ctx, of)
	if err != nil {
		return "", waiting(ctx, err, name)
	}
	claims, err := r.Client.CoreV1().PersistentVolumeClaims(r.Namespace).List(ctx, of)
	if err != nil {
		return "", waiting(ctx, err, name)
	}
	if len(volumes.Items)+len(claims.Items) > 0 {
		return fmt.Sprintf("its volume (%d PersistentVolumes, %d claims)", len(volumes.Items), len(claims.Items)), nil
	}
	return "", nil
}

// waiting is an error of a call while one waits for something to go.
func waiting(ctx context.Context, err error, name string) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s has been told to go: %w", name, backend.ErrPending)
	}
	return kind(err, "objects of %s", name)
}

// unmake tells the objects of an attempt to go.
func (r *Runner) unmake(ctx context.Context, name string) error {
	jobs, claims := r.Client.BatchV1().Jobs(r.Namespace), r.Client.CoreV1().PersistentVolumeClaims(r.Namespace)
	for _, err := range []error{
		// The Job goes after its pods.
		jobs.Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationForeground)}),
		claims.Delete(ctx, name, metav1.DeleteOptions{}),
		r.Client.CoreV1().PersistentVolumes().Delete(ctx, name, metav1.DeleteOptions{}),
	} {
		if err != nil && !apierrors.IsNotFound(err) {
			return kind(err, "remove %s", name)
		}
	}
	return nil
}

// survey is everything that there is of movers.
type survey struct {
	records []*record // ordered by id
	jobs    map[string]*batchv1.Job
	pods    map[string][]corev1.Pod // by their attempts
	// broken are the ids of which the record cannot be read, and why.
	broken map[string]error
}

// job is the Job of a record's attempt, nil if it is gone.
func (s *survey) job(rec *record) *batchv1.Job {
	if j := s.jobs[rec.Name]; j != nil && j.UID == rec.UID {
		return j
	}
	return nil
}

func (r *Runner) survey(ctx context.Context) (*survey, error) {
	s := &survey{jobs: map[string]*batchv1.Job{}, pods: map[string][]corev1.Pod{}, broken: map[string]error{}}
	all := metav1.ListOptions{LabelSelector: Mover}
	maps, err := r.Client.CoreV1().ConfigMaps(r.Namespace).List(ctx, all)
	if err != nil {
		return nil, kind(err, "list movers")
	}
	for _, c := range maps.Items {
		rec, err := parseRecord(&c)
		if err != nil {
			s.broken[c.Labels[Mover]] = err // it stops nobody else
			continue
		}
		s.records = append(s.records, rec)
	}
	slices.SortFunc(s.records, func(a, b *record) int { return strings.Compare(a.Job.Task.ID, b.Job.Task.ID) })
	// Jobs before pods: no pod comes of a Job that is gone.
	jobs, err := r.Client.BatchV1().Jobs(r.Namespace).List(ctx, all)
	if err != nil {
		return nil, kind(err, "list movers")
	}
	for i := range jobs.Items {
		s.jobs[jobs.Items[i].Name] = &jobs.Items[i]
	}
	pods, err := r.Client.CoreV1().Pods(r.Namespace).List(ctx, all)
	if err != nil {
		return nil, kind(err, "list movers")
	}
	for _, p := range pods.Items {
		s.pods[p.Labels[Attempt]] = append(s.pods[p.Labels[Attempt]], p)
	}
	return s, nil
}
