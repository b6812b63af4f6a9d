package csi

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// state is what there is to say about one volume.
type state struct {
	volume  *csi.Volume
	problem string // empty for a healthy one
}

// look says what there is to say about the volume that a request names.
func (d *Driver) look(ctx context.Context, id string) (state, error) {
	v, b, err := d.volume(id)
	if err != nil {
		return state{}, err
	}
	return d.describe(ctx, b, v)
}

// describe looks a volume up. ErrNotFound when there is none.
func (d *Driver) describe(ctx context.Context, b backend.Backend, v Volume) (state, error) {
	if !v.Referring() {
		share, err := userShare(ctx, b, v)
		if err != nil {
			return state{}, err
		}
		return describeShareVolume(v, share), nil
	}
	snapshot, err := b.Snapshot(ctx, v.Snapshot)
	if err != nil {
		return state{}, err
	}
	export, err := heldExport(ctx, b, v)
	if err != nil {
		return state{}, err
	}
	s := describeReference(v, snapshot)
	s.volume.VolumeContext = wayContext(export.Way)
	return s, nil
}

func describeShareVolume(v Volume, share *backend.Share) state {
	volume := &csi.Volume{VolumeId: v.String(), CapacityBytes: share.Size}
	if source := share.Description[describeSource]; source != "" {
		volume.ContentSource = contentSource(source)
	}
	return state{volume: volume, problem: share.Problem}
}

func describeReference(v Volume, snapshot *backend.Snapshot) state {
	return state{volume: &csi.Volume{VolumeId: v.String(), CapacityBytes: snapshot.Size,
		ContentSource: contentSource(Snapshot{Backend: v.Backend, Snapshot: v.Snapshot}.String())}}
}

// ControllerGetVolume returns one volume.
func (d *Driver) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	s, err := d.look(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: s.volume, Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}

// ControllerGetVolumeHealth says what is wrong with one volume, if anything.
func (d *Driver) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	s, err := d.look(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: s.health()}, nil
}

func (s state) health() *csi.VolumeHealth {
	h := &csi.VolumeHealth{VolumeId: s.volume.GetVolumeId()}
	if s.problem != "" {
		h.HealthStatuses = []*csi.VolumeHealth_VolumeHealthEntry{{
			Status: csi.VolumeHealthErrorType_INACCESSIBLE, Reason: "StorageProblem", Message: s.problem}}
	}
	return h
}
