package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/pkg/schedule"
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

// claimThere says of a claim that a volume is made for whether it is there still. Of other
// objects it does not know.
func claimThere(claims func(context.Context, string, string) (csi.Claim, error)) func(context.Context, backup.Object) (bool, error) {
	return func(ctx context.Context, o backup.Object) (bool, error) {
		if o.Kind != backup.PersistentVolumeClaim {
			return true, nil
		}
		c, err := claims(ctx, o.Namespace, o.Name)
		if errors.Is(err, backend.ErrNotFound) {
			return false, nil
		}
		return err != nil || o.UID == "" || c.UID == o.UID, err
	}
}

// markPartial annotates VolumeSnapshots whose backups lack files, for people and for
// schedules. It needs the verb patch on them.
func markPartial(client snapshots.Interface) func(context.Context, backup.Object) error {
	return func(ctx context.Context, o backup.Object) error {
		meta := map[string]any{"annotations": map[string]string{schedule.PartialKey: "true"}}
		if o.UID != "" {
			meta["uid"] = o.UID // keeps it from another one of that name
		}
		patch, err := json.Marshal(map[string]any{"metadata": meta})
		if err != nil {
			return err
		}
		_, err = client.SnapshotV1().VolumeSnapshots(o.Namespace).Patch(ctx, o.Name, types.MergePatchType, patch, metav1.PatchOptions{})
		if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return nil
		}
		return fmt.Errorf("%w: %w", backend.ErrUnavailable, err)
	}
}
