package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
)

// CreateSnapshot cuts a snapshot on the storage system, or begins a backup and
// says whether it is done.
func (d *Driver) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := checkName(req.GetName()); err != nil {
		return nil, err
	}
	if req.GetSourceVolumeId() == "" {
		return nil, errNoVolumeID
	}
	params, err := parseSnapshotClass(req.GetParameters())
	if err != nil {
		return nil, err
	}
	v, err := ParseVolume(req.GetSourceVolumeId())
	if err != nil {
		// The snapshot-controller does not compare the class with the claim.
		return nil, fmt.Errorf("%w; a claim of another driver needs a VolumeSnapshotClass of that driver", err)
	}
	if v.Referring() {
		return nil, fmt.Errorf("%s refers to a snapshot, which is one already: %w", v, backend.ErrUnsupported)
	}
	b, err := d.backendOf(v.Backend)
	if err != nil {
		return nil, err
	}
	share, err := sourceShare(ctx, b, v)
	if err != nil {
		return nil, err
	}
	if share != nil && !share.Can.Snapshot {
		return nil, fmt.Errorf("the share type of volume %s has no snapshots: %w", v, backend.ErrUnsupported)
	}
	if params.backup {
		return d.createBackup(ctx, req, params, v, share)
	}
	s, err := b.CreateSnapshot(ctx, backend.CreateSnapshotRequest{Name: req.GetName(), ShareID: v.Share, Role: backend.RoleUser})
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: describeSnapshot(v.Backend, s)}, nil
}

func (d *Driver) createBackup(ctx context.Context, r *csi.CreateSnapshotRequest, params snapshotParameters, v Volume, share *backend.Share) (*csi.CreateSnapshotResponse, error) {
	engine, err := d.engine()
	if err != nil {
		return nil, err
	}
	req := backup.Request{
		ID: digest(r.GetName()), Name: r.GetName(), Repository: params.repository, Backend: v.Backend, ShareID: v.Share,
		Volume: v.String(), Host: v.String(), AllowPartial: params.allowPartial, AllowEmpty: params.allowEmpty,
		Exclude: params.exclude, About: aboutSnapshot(r),
	}
	description := Description{Version: 1, Driver: DriverName, Volume: v.String()} // of a volume that has gone
	if share != nil {
		description, req.Zone = describeVolume(v, share), share.Zone
	}
	if description.Claim != "" {
		req.Host = description.Claim
	}
	req.Complete = func(ctx context.Context, req *backup.Request) error {
		claim, err := d.claim(ctx, description.Claim, description.Name)
		if err != nil {
			return err
		}
		if req.Exclude, err = claim.exclude(req.Exclude); err != nil {
			return err
		}
		if namespace, name, _ := strings.Cut(description.Claim, "/"); claim.UID != "" {
			req.About = append(req.About, backup.Object{Kind: backup.PersistentVolumeClaim, Namespace: namespace, Name: name, UID: claim.UID})
		}
		description.Labels = claim.Labels
		req.Description, err = json.Marshal(description)
		return err
	}
	b, err := engine.Backup(ctx, req)
	if errors.Is(err, backend.ErrNotFound) && share != nil {
		// The repository: the volume is there. A class that names a wrong one is
		// a wrong argument.
		return nil, fmt.Errorf("parameter %q: %s: %w", repositoryKey, err, backend.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	if b.Ready && b.Partial && d.MarkPartial != nil {
		// Before it is ready, so that nobody takes it for whole.
		for _, o := range aboutSnapshot(r) {
			if err := d.MarkPartial(ctx, o); err != nil {
				return nil, fmt.Errorf("say on %s that its backup lacks files: %w", o, err)
			}
		}
	}
	return &csi.CreateSnapshotResponse{Snapshot: describeBackup(b)}, nil
}

// Description is volume.json at the top of every backup: what it takes to make
// the claim again elsewhere.
type Description struct {
	Version     int               `json:"version"` // of this format: 1
	Driver      string            `json:"driver"`
	Volume      string            `json:"volume"` // the handle
	Name        string            `json:"name"`   // the CSI volume name
	Claim       string            `json:"claim,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"` // of the claim, when it was backed up
	SizeBytes   int64             `json:"sizeBytes"`
	AccessModes []string          `json:"accessModes,omitempty"`
	Parameters  map[string]string `json:"parameters,omitempty"`
}

func describeVolume(v Volume, share *backend.Share) Description {
	out := Description{Version: 1, Driver: DriverName, Volume: v.String(), Name: share.Name,
		Claim: share.Description[describeClaim], SizeBytes: share.Size}
	if modes := share.Description[describeModes]; modes != "" {
		out.AccessModes = strings.Split(modes, ",")
	}
	// Written by us; what cannot be read is left out rather than in the way.
	_ = json.Unmarshal([]byte(share.Description[describeClass]), &out.Parameters)
	return out
}

func describeSnapshot(backendName string, s *backend.Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId:     Snapshot{Backend: backendName, Snapshot: s.ID}.String(),
		SourceVolumeId: Volume{Backend: backendName, Share: s.ShareID}.String(),
		SizeBytes:      s.Size, CreationTime: timestamppb.New(s.CreatedAt), ReadyToUse: true,
	}
}

func describeBackup(b *backup.Backup) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId:     Snapshot{Repository: b.Repository, Backup: b.ID}.String(),
		SourceVolumeId: b.Volume, SizeBytes: b.Size, CreationTime: timestamppb.New(b.CreatedAt), ReadyToUse: b.Ready,
	}
}

// DeleteSnapshot removes a snapshot, or forgets a backup. What is not one of
// ours is gone already.
func (d *Driver) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, errNoSnapshotID
	}
	s, err := ParseSnapshot(req.GetSnapshotId())
	if err != nil {
		return &csi.DeleteSnapshotResponse{}, nil
	}
	if s.Backed() {
		engine, err := d.engine()
		if err != nil {
			return nil, err
		}
		return &csi.DeleteSnapshotResponse{}, engine.Delete(ctx, s.Repository, s.Backup)
	}
	b, err := d.backendOf(s.Backend)
	if err != nil {
		return nil, err
	}
	err = b.DeleteSnapshot(ctx, s.Snapshot)
	if errors.Is(err, backend.ErrInUse) {
		return nil, fmt.Errorf("%w; delete the snapshot volumes that refer to it first: their handles begin with %s#", err, s)
	}
	if err != nil {
		return nil, fmt.Errorf("delete snapshot %s: %w", s, err)
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

var errNoSnapshotID = fmt.Errorf("the snapshot id is missing: %w", backend.ErrInvalid)

// GetSnapshot returns one snapshot or backup.
func (d *Driver) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, errNoSnapshotID
	}
	s, err := d.snapshot(ctx, req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: s}, nil
}

func (d *Driver) snapshot(ctx context.Context, id string) (*csi.Snapshot, error) {
	h, err := ParseSnapshot(id)
	if err != nil {
		return nil, err
	}
	if h.Backed() {
		engine, err := d.engine()
		if err != nil {
			return nil, err
		}
		b, err := engine.Find(ctx, h.Repository, h.Backup)
		if err != nil {
			return nil, err
		}
		return describeBackup(b), nil
	}
	_, b, err := d.backend(h.Backend)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, backend.ErrNotFound)
	}
	s, err := userSnapshot(ctx, b, h)
	if err != nil {
		return nil, err
	}
	return describeSnapshot(h.Backend, s), nil
}

// userSnapshot returns a snapshot that a user asked for. What Abaca cut for its
// own use is nobody's business.
func userSnapshot(ctx context.Context, b backend.Backend, h Snapshot) (*backend.Snapshot, error) {
	s, err := b.Snapshot(ctx, h.Snapshot)
	if err != nil {
		return nil, err
	}
	if s.Role != backend.RoleUser {
		return nil, fmt.Errorf("snapshot %s: %w", h, backend.ErrNotFound)
	}
	return s, nil
}

func isNotFound(err error) bool { return errors.Is(err, backend.ErrNotFound) }
