package main

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/csi"
)

// claims looks PersistentVolumeClaims up.
func claims(client kubernetes.Interface) func(context.Context, string, string) (csi.Claim, error) {
	return func(ctx context.Context, namespace, name string) (csi.Claim, error) {
		c, err := client.CoreV1().PersistentVolumeClaims(namespace).Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return csi.Claim{}, backend.ErrNotFound
		case err != nil:
			return csi.Claim{}, fmt.Errorf("%w: %w", backend.ErrUnavailable, err)
		}
		// The provisioner gives a volume and its PersistentVolume one name.
		return csi.Claim{Volume: c.Spec.VolumeName, UID: string(c.UID), Labels: c.Labels, Annotations: c.Annotations}, nil
	}
}
