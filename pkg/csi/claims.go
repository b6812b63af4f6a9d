package csi

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
)

// Claim is what an orchestrator's object that a volume was made for says of it.
type Claim struct {
	// Volume is the CSI name of the volume that it is bound to.
	Volume, UID         string
	Labels, Annotations map[string]string
}

// ExcludeAnnotation is of a claim: what its backups leave out besides what the
// class does, in the same form.
const ExcludeAnnotation = DriverName + "/exclude"

// claim looks the claim of a volume up, as namespace/name; an empty one is of a
// volume that has none, or none any more: whoever makes one of that name again has
// nothing to say about it.
func (d *Driver) claim(ctx context.Context, name, volume string) (Claim, error) {
	namespace, name, ok := strings.Cut(name, "/")
	if d.Claims == nil || !ok {
		return Claim{}, nil
	}
	c, err := d.Claims(ctx, namespace, name)
	if isNotFound(err) || err == nil && c.Volume != volume {
		return Claim{}, nil
	}
	if err != nil {
		return Claim{}, fmt.Errorf("claim %s/%s: %w", namespace, name, err)
	}
	return c, nil
}

// exclude adds the patterns in the claim's annotation to those of the class.
func (c Claim) exclude(class []string) ([]string, error) {
	patterns := slices.Concat(class, lines(c.Annotations[ExcludeAnnotation]))
	if err := mover.CheckExclude(patterns); err != nil {
		return nil, fmt.Errorf("annotation %s of the claim: %w: %w", ExcludeAnnotation, err, backend.ErrInvalid)
	}
	return patterns, nil
}

// named is the UID of the object that a CSI name was made for, as sidecars make
// them: pvc-<UID> (external-provisioner, makeVolumeName), snapshot-<UID>
// (external-snapshotter, makeSnapshotName).
var named = regexp.MustCompile(`-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$`)

// about is the object that a CSI name was made for; none if the orchestrator does
// not say which.
func about(kind, namespace, name, csiName string) []backup.Object {
	if namespace == "" || name == "" {
		return nil
	}
	o := backup.Object{Kind: kind, Namespace: namespace, Name: name}
	if uid := named.FindStringSubmatch(csiName); uid != nil {
		o.UID = uid[1]
	}
	return []backup.Object{o}
}

// aboutSnapshot is the VolumeSnapshot that a request is for.
func aboutSnapshot(req *csi.CreateSnapshotRequest) []backup.Object {
	p := req.GetParameters()
	return about(backup.VolumeSnapshot, p[snapshotNamespaceKey], p[snapshotNameKey], req.GetName())
}
