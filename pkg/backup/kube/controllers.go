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
// cluster's controller.

// podKey and hostKey are the entries of a controller's ConfigMap.
const podKey, hostKey = "pod", "host"

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

// register writes down under which host name this controller locks repositories. The
// ConfigMap belongs to the PodTemplate, and goes with that.
func (r *Runner) register(ctx context.Context) error {
	template, err := r.template(ctx)
	if err != nil {
		return err
	}
	_, err = r.Client.CoreV1().ConfigMaps(r.Namespace).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "abaca-host-" + r.Pod, Labels: map[string]string{Controller: ""}, OwnerReferences: []metav1.OwnerReference{
			{APIVersion: "v1", Kind: "PodTemplate", Name: template.Name, UID: template.UID}}},
		Data: map[string]string{podKey: r.Pod, hostKey: r.Host},
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return kind(err, "record of controller %s", r.Pod)
}

// bury removes the locks of controllers whose pods are gone.
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
	for _, c := range all.Items {
		if alive[c.Data[podKey]] {
			hosts[c.Data[hostKey]] = true // which may be a node's, and so another's too
		}
	}
	for _, c := range all.Items {
		host := c.Data[hostKey]
		if alive[c.Data[podKey]] {
			continue
		}
		if !hosts[host] && host != "" {
			r.unlockAll(ctx, host)
		}
		err := maps.Delete(ctx, c.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &c.ResourceVersion}})
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			return kind(err, "remove record of controller %s", c.Data[podKey])
		}
	}
	return nil
}

// unlockAll removes the locks of a host from all repositories. One that cannot be
// reached keeps them for restic's half an hour.
func (r *Runner) unlockAll(ctx context.Context, host string) {
	log := klog.FromContext(ctx).WithValues("host", host)
	names, err := r.Repositories.Names(ctx)
	if err != nil {
		log.Error(err, "Listing repositories")
	}
	for _, name := range names {
		log.Info("Removing the locks of a controller that is gone", "repository", name)
		if err := r.unlock(ctx, name, host); err != nil {
			log.Error(err, "Locks of a controller that is gone may be left", "repository", name)
		}
	}
}
