package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/once"
)

// orphanAge is how old objects without a record must be before they count as
// left behind by somebody who was killed between making and recording them.
const orphanAge = 5 * time.Minute

const (
	// sweepEvery is how often one looks for them.
	sweepEvery = time.Minute
	// startAge is how long a pod may take to start before another is made, after
	// the template as it is then.
	startAge = 10 * time.Minute
)

// Run lets movers run as others end, and removes what was left behind, until ctx
// ends. Several controllers may do so at once.
func (r *Runner) Run(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	var beside sync.WaitGroup
	defer beside.Wait()
	beside.Go(func() { r.follow(ctx) })
	if r.Pod != "" {
		beside.Go(func() { r.inherit(ctx) })
	}
	var said once.Said
	var left error // why the last sweep was in vain
	for swept := r.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		said.Next()
		if r.Now().Sub(swept) > sweepEvery {
			swept, left = r.Now(), r.sweep(ctx)
		}
		for _, err := range []error{r.admit(ctx), left} {
			if err != nil && ctx.Err() == nil && said.New(err.Error()) {
				klog.FromContext(ctx).Error(err, "Looking after movers")
			}
		}
	}
}

// entry is a job in the queue.
type entry struct {
	rec     *record
	running bool
}

// tenant is whom a job is for: the namespace that asked for it, or, where that is not
// known, the one whose claim is backed up.
type tenant struct {
	restore   bool // backups of a namespace do not set back its restores
	namespace string
}

// tenant is who takes turns with others.
func (e entry) tenant() tenant {
	job := e.rec.Job
	t := tenant{restore: job.Task.Restore != nil}
	switch b := job.Task.Backup; {
	case len(job.About) > 0:
		t.namespace = job.About[0].Namespace
	case b != nil:
		t.namespace, _, _ = strings.Cut(b.Host, "/")
	}
	return t
}

// next returns those that may run now. Tenants take turns: who has less that runs or
// goes before comes first, then who has waited longer. A repository that is full
// holds nobody else up. Of one that may not be there yet, one mover runs at a time,
// as two would make it twice.
func next(queue []entry, limit, each int) []*record {
	// Restores are counted apart, so that they never wait for backups; and so are
	// the repositories of namespaces, so that none that does not answer, or is locked
	// on purpose, holds up the administrator's.
	type kind struct{ restore, own bool }
	kindOf := func(t mover.Task) kind { return kind{t.Restore != nil, backup.Owner(t.Repository) != ""} }
	type counted struct {
		restore    bool
		repository string
	}
	total, of, making, turns := map[kind]int{}, map[counted]int{}, map[string]bool{}, map[tenant]int{}
	count := func(e entry) {
		task := e.rec.Job.Task
		total[kindOf(task)]++
		of[counted{task.Restore != nil, task.Repository}]++
		making[task.Repository] = making[task.Repository] || !task.Made
	}
	var waiting []entry
	for _, e := range queue {
		if e.running {
			count(e)
			turns[e.tenant()]++
		} else {
			waiting = append(waiting, e)
		}
	}
	slices.SortFunc(waiting, func(a, b entry) int {
		return cmp.Or(a.rec.Started.Compare(b.rec.Started), strings.Compare(a.rec.Job.Task.ID, b.rec.Job.Task.ID))
	})
	turn := map[*record]int{}
	for _, e := range waiting {
		turn[e.rec] = turns[e.tenant()]
		turns[e.tenant()]++
	}
	slices.SortStableFunc(waiting, func(a, b entry) int { return cmp.Compare(turn[a.rec], turn[b.rec]) })
	var chosen []*record
	for _, e := range waiting {
		task := e.rec.Job.Task
		if total[kindOf(task)] < limit && of[counted{task.Restore != nil, task.Repository}] < each && (task.Made || !making[task.Repository]) {
			count(e)
			chosen = append(chosen, e.rec)
		}
	}
	return chosen
}

// admit lets those run whose turn it is. Of many that ask at once, one looks for all
// who have asked before it.
func (r *Runner) admit(ctx context.Context) error {
	asked := r.asked.Add(1)
	r.admitting.Lock() // two that look at once could let two make one repository
	defer r.admitting.Unlock()
	if asked <= r.admitted {
		return nil
	}
	r.admitted = r.asked.Load()
	s, err := r.survey(ctx)
	if err != nil {
		return err
	}
	var queue []entry
	for _, rec := range s.records {
		job := s.job(rec)
		if rec.claimed() || rec.Phase != "" || job == nil || job.DeletionTimestamp != nil || finished(job) != nil {
			continue
		}
		if task := &rec.Job.Task; r.Made != nil && !task.Made {
			task.Made = r.Made(task.Repository) // since it was asked for
		}
		queue = append(queue, entry{rec, job.Spec.Suspend == nil || !*job.Spec.Suspend})
	}
	if !slices.ContainsFunc(queue, func(e entry) bool { return !e.running }) {
		return nil
	}
	template, err := r.template(ctx)
	if err != nil {
		return err
	}
	limit, err := number(template, Limit)
	if err != nil {
		return err
	}
	each, err := number(template, LimitEach)
	if err != nil {
		return err
	}
	for _, rec := range next(queue, limit, each) {
		if !rec.Job.Task.Made {
			if rec, err = r.maker(ctx, rec, s); err != nil {
				return err
			}
			if rec == nil {
				continue // another turn
			}
		}
		// The UID keeps it from another Job of that name.
		patch := fmt.Sprintf(`{"metadata":{"uid":%q},"spec":{"suspend":false}}`, rec.UID)
		_, err := r.Client.BatchV1().Jobs(r.Namespace).Patch(ctx, rec.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			return kind(err, "let mover %s run", rec.Job.Task.ID)
		}
	}
	return nil
}

// maker returns the one that may make a repository: this one, or one that came
// before it. Two controllers that look at once may each choose another, but only one
// of them is written down. It is nil if none may just now.
func (r *Runner) maker(ctx context.Context, rec *record, s *survey) (*record, error) {
	maps, name := r.Client.CoreV1().ConfigMaps(r.Namespace), makerName(rec.Job.Task.Repository)
	want := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{Attempt: rec.Name}}}
	_, err := maps.Create(ctx, want, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		if err != nil {
			return nil, kind(err, "say who makes repository %q", rec.Job.Task.Repository)
		}
		return rec, nil
	}
	now, err := maps.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil // given back just now
	}
	if err != nil {
		return nil, kind(err, "who makes repository %q", rec.Job.Task.Repository)
	}
	holder := now.Labels[Attempt]
	job, err := r.Client.BatchV1().Jobs(r.Namespace).Get(ctx, holder, metav1.GetOptions{})
	switch {
	case err != nil && !apierrors.IsNotFound(err):
		return nil, kind(err, "who makes repository %q", rec.Job.Task.Repository)
	case holder == rec.Name:
		return rec, nil
	case err == nil && finished(job) == nil:
		// It has the word. Whoever gave it that may have been killed before it ran.
		i := slices.IndexFunc(s.records, func(o *record) bool { return o.Name == holder && o.Phase == "" })
		if i < 0 || job.DeletionTimestamp != nil {
			return nil, nil
		}
		return s.records[i], nil
	}
	want.ResourceVersion = now.ResourceVersion
	if _, err := maps.Update(ctx, want, metav1.UpdateOptions{}); apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, kind(err, "say who makes repository %q", rec.Job.Task.Repository)
	}
	return rec, nil
}

// unmaker removes the word that an attempt may make its repository, if it had it.
func (r *Runner) unmaker(ctx context.Context, rec *record) error {
	maps, name := r.Client.CoreV1().ConfigMaps(r.Namespace), makerName(rec.Job.Task.Repository)
	now, err := maps.Get(ctx, name, metav1.GetOptions{})
	if err == nil && now.Labels[Attempt] == rec.Name {
		err = maps.Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &now.ResourceVersion}})
	}
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return kind(err, "who makes repository %q", rec.Job.Task.Repository)
}

// number is an annotation of the template; without it there is no limit.
func number(t *corev1.PodTemplate, annotation string) (int, error) {
	text, ok := t.Annotations[annotation]
	if !ok {
		return int(^uint(0) >> 1), nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("PodTemplate %s: annotation %s is %q and not a number from 1: %w", t.Name, annotation, text, backend.ErrUnavailable)
	}
	return n, nil
}

// sweep removes objects that no record names, claims that nobody has come back to,
// and Jobs whose pods do not start.
func (r *Runner) sweep(ctx context.Context) error {
	all := metav1.ListOptions{LabelSelector: Mover}
	volumes, err := r.Client.CoreV1().PersistentVolumes().List(ctx, all)
	if err != nil {
		return kind(err, "list volumes of movers")
	}
	// The records last: what was made meanwhile is recorded later.
	s, err := r.survey(ctx)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, rec := range s.records {
		known[rec.Name] = true
		if rec.claimed() && r.Now().Sub(rec.Started) > orphanAge {
			if err := r.drop(ctx, rec); err != nil && !errors.Is(err, backend.ErrPending) {
				return err
			}
		}
	}
	orphans := map[string]bool{}
	old := func(o metav1.ObjectMeta) {
		if !known[o.Name] && s.broken[o.Labels[Mover]] == nil && o.DeletionTimestamp == nil && r.Now().Sub(o.CreationTimestamp.Time) > orphanAge {
			orphans[o.Name] = true
		}
	}
	for _, v := range volumes.Items { // made first, and so there if anything is
		old(v.ObjectMeta)
	}
	for _, j := range s.jobs {
		old(j.ObjectMeta)
	}
	for name, pods := range s.pods {
		for _, p := range pods {
			if p.Status.Phase == corev1.PodPending && p.DeletionTimestamp == nil && r.Now().Sub(p.CreationTimestamp.Time) > startAge {
				klog.FromContext(ctx).Info("Mover's pod does not start; another will be made", "pod", p.Name, "reason", r.trouble(ctx, &p))
				if err := r.unmake(ctx, name); err != nil {
					return err
				}
			}
		}
	}
	for name := range orphans {
		klog.FromContext(ctx).Info("Removing objects of a mover that were left behind", "name", name)
		if err := r.unmake(ctx, name); err != nil {
			return err
		}
	}
	var broken error
	for _, id := range slices.Sorted(maps.Keys(s.broken)) {
		broken = errors.Join(broken, s.broken[id])
	}
	return broken
}
