package kube

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
)

// A controller locks repositories too, to delete backups, under the host name of its
// pod. So each writes that name down, and those that come after it remove its locks
// once its pod is gone. A name in a lock would not do: it may be that of another
// cluster's controller. Maintenance has no rights in the cluster, so controllers write
// down its pods while they see them.

// The entries of a ConfigMap: a pod, its host name, and the repository that it locks, if
// that is one only.
const podKey, hostKey, repositoryKey = "pod", "host", "repository"

// inherit writes down this controller, and looks for those that are gone, until ctx
// ends.
func (r *Runner) inherit(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		err := r.register(ctx)
		if err == nil {
			err = r.bury(ctx)
		}
		if err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Looking for locks of controllers that are gone")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// register writes down under which host name this controller locks repositories.
func (r *Runner) register(ctx context.Context) error {
	return r.enter(ctx, map[string]string{podKey: r.Pod, hostKey: r.Host})
}

// enter writes down a pod. The ConfigMap belongs to the PodTemplate, and goes with that.
func (r *Runner) enter(ctx context.Context, data map[string]string) error {
	template, err := r.template(ctx)
	if err != nil {
		return err
	}
	_, err = r.Client.CoreV1().ConfigMaps(r.Namespace).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "abaca-host-" + data[podKey], Labels: map[string]string{Controller: ""}, OwnerReferences: []metav1.OwnerReference{
			{APIVersion: "v1", Kind: "PodTemplate", Name: template.Name, UID: template.UID}}},
		Data: data,
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return kind(err, "record of pod %s", data[podKey])
}

// bury removes the locks of controllers and of maintenance whose pods are gone.
func (r *Runner) bury(ctx context.Context) error {
	maps := r.Client.CoreV1().ConfigMaps(r.Namespace)
	all, err := maps.List(ctx, metav1.ListOptions{LabelSelector: Controller})
	if err != nil {
		return kind(err, "list controllers")
	}
	// The pods after the records: one that writes itself down is there.
	pods, err := r.Client.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return kind(err, "list pods")
	}
	alive, hosts := map[string]bool{}, map[string]bool{}
	for _, p := range pods.Items {
		alive[p.Name] = p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
	}
	known := map[string]bool{}
	for _, c := range all.Items {
		known[c.Data[podKey]] = true
		if alive[c.Data[podKey]] {
			hosts[c.Data[hostKey]] = true // which may be a node's, and so another's too
		}
	}
	for _, p := range pods.Items {
		if repository := p.Labels[Maintains]; repository != "" && alive[p.Name] && !known[p.Name] {
			if err := r.enter(ctx, map[string]string{podKey: p.Name, hostKey: p.Name, repositoryKey: repository}); err != nil {
				return err
			}
		}
	}
	for _, c := range all.Items {
		host := c.Data[hostKey]
		if alive[c.Data[podKey]] {
			continue
		}
		if !hosts[host] && host != "" {
			r.unlockAll(ctx, host, c.Data[repositoryKey])
		}
		err := maps.Delete(ctx, c.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &c.ResourceVersion}})
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			return kind(err, "remove record of pod %s", c.Data[podKey])
		}
	}
	return nil
}

// unlockAll removes the locks of a host from a repository, or from all if it has no
// name. One that cannot be reached keeps them for restic's half an hour.
func (r *Runner) unlockAll(ctx context.Context, host, repository string) {
	log := klog.FromContext(ctx).WithValues("host", host)
	names, err := []string{repository}, error(nil)
	if repository == "" {
		names, err = r.Repositories.Names(ctx)
	}
	if err != nil {
		log.Error(err, "Listing repositories")
	}
	for _, name := range names {
		log.Info("Removing the locks of a pod that is gone", "repository", name)
		if err := r.unlock(ctx, name, host); err != nil {
			log.Error(err, "Locks of a pod that is gone may be left", "repository", name)
		}
	}
}
