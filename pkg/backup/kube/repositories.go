package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// Repositories are an administrator's, in a directory, and those of the namespaces that
// the PodTemplate names. It needs get on the PodTemplate, on the Secret
// [backup.SecretName] in each of the namespaces, and on these namespaces.
type Repositories struct {
	backup.Directory
	Client kubernetes.Interface
	// Namespace and Template are as in [Runner].
	Namespace, Template string
}

var _ backup.Repositories = Repositories{}

// Names implements [backup.Repositories].
func (r Repositories) Names(ctx context.Context) ([]string, error) {
	names, err := r.Directory.Names(ctx)
	if err != nil {
		return nil, err
	}
	template, err := podTemplate(ctx, r.Client, r.Namespace, r.Template)
	if err != nil {
		return nil, err
	}
	for _, namespace := range namespaces(template) {
		names = append(names, backup.OfNamespace(namespace))
	}
	return names, nil
}

// Open implements [backup.Repositories].
func (r Repositories) Open(ctx context.Context, name string) (restic.Client, error) {
	namespace := backup.Owner(name)
	if namespace == "" {
		return r.Directory.Open(ctx, name)
	}
	template, err := podTemplate(ctx, r.Client, r.Namespace, r.Template)
	if err != nil {
		return nil, err
	}
	data, err := ownSecret(ctx, r.Client, template, namespace)
	if err != nil {
		return nil, err
	}
	env, err := restic.ForeignEnv(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", backup.Title(name), backend.ErrInvalid, err)
	}
	repository, err := restic.Open(restic.Config{Program: r.Program, Env: env,
		CacheDir: backup.Apart(r.CacheDir, name), SeenDir: backup.Apart(r.SeenDir, name)})
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", backup.Title(name), backend.ErrInvalid, err)
	}
	return repository, nil
}

// namespaces are those that may have a repository of their own.
func namespaces(template *corev1.PodTemplate) []string {
	all := strings.FieldsFunc(template.Annotations[Namespaces], func(c rune) bool { return c == ',' || c == ' ' })
	slices.Sort(all)
	return slices.Compact(all)
}

// ownSecret reads the Secret that is a namespace's own repository, and is one that
// [restic.ForeignEnv] takes. Its errors are those of [backup.Repositories].
func ownSecret(ctx context.Context, client kubernetes.Interface, template *corev1.PodTemplate, namespace string) (map[string][]byte, error) {
	title := backup.Title(backup.OfNamespace(namespace))
	listed := slices.Contains(namespaces(template), namespace)
	var err error
	if listed {
		var secret *corev1.Secret
		if secret, err = client.CoreV1().Secrets(namespace).Get(ctx, backup.SecretName, metav1.GetOptions{}); err == nil {
			if _, err := restic.ForeignEnv(secret.Data); err != nil {
				return nil, fmt.Errorf("%s: %w: %w", title, backend.ErrInvalid, err)
			}
			return secret.Data, nil
		}
		if !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err) {
			return nil, kind(err, "%s", title)
		}
	}
	// With a namespace go its Secret, and the right to read that, before its
	// VolumeSnapshots, which wait for their backups to be deleted.
	ns, gone := client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(gone), gone == nil && ns.DeletionTimestamp != nil:
		return nil, fmt.Errorf("%s: %w", title, backup.ErrAbandoned)
	case !listed:
		return nil, fmt.Errorf("%s: %w: namespace %s may have no repository of its own; the administrator adds it to repositoryNamespaces of the chart",
			title, backend.ErrNotFound, namespace)
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("%s: %w: the driver may not read it; a Role in the namespace is missing, which the chart makes: %w",
			title, backend.ErrUnavailable, err)
	}
	return nil, fmt.Errorf("%s: %w: make the Secret, with restic's variables as keys", title, backend.ErrNotFound)
}
