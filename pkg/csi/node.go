package csi

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/record"
)

// use is how a request wants a volume on the node.
type use struct {
	id       string
	volume   Volume
	readOnly bool
	flags    []string
	mode     csi.VolumeCapability_AccessMode_Mode
}

// readUse checks what the requests to stage and to publish have in common. What
// can be read only is mounted read-only, whatever the request says: the flag of
// the request can only take away (kubernetes #70505).
func readUse(id string, vc *csi.VolumeCapability, readOnly bool) (use, error) {
	if id == "" {
		return use{}, errNoVolumeID
	}
	if vc == nil {
		return use{}, errNoCapability
	}
	v, err := parsePublished(id)
	if err != nil {
		return use{}, err
	}
	if _, err := readerOnly([]*csi.VolumeCapability{vc}); err != nil {
		return use{}, err
	}
	if v.Referring() && !reads(vc) {
		return use{}, fmt.Errorf("%s refers to a snapshot and can only be read; ask for an access mode that only reads: %w", v, backend.ErrUnsupported)
	}
	return use{id: id, volume: v, readOnly: readOnly || v.Referring() || reads(vc),
		flags: vc.GetMount().GetMountFlags(), mode: vc.GetAccessMode().GetMode()}, nil
}

var errNoCapability = fmt.Errorf("the volume capability is missing: %w", backend.ErrInvalid)

func checkPath(what, path string) error {
	switch {
	case path == "":
		return fmt.Errorf("the %s path is missing: %w", what, backend.ErrInvalid)
	case !filepath.IsAbs(path):
		return fmt.Errorf("the %s path %q is not absolute: %w", what, path, backend.ErrInvalid)
	}
	return nil
}

// NodeStageVolume mounts the volume once for the node. What is mounted already
// stays mounted from where it is.
func (d *Driver) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID
	}
	if err := checkPath("staging target", req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	u, err := readUse(req.GetVolumeId(), req.GetVolumeCapability(), false)
	if err != nil {
		return nil, err
	}
	if err := d.stage(ctx, u, req.GetStagingTargetPath(), req.GetPublishContext()); err != nil {
		return nil, err
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// stage mounts a volume at its staging path. A mount that is dead is replaced.
func (d *Driver) stage(ctx context.Context, u use, path string, published map[string]string) error {
	st, err := d.stagedAt(u.id, path)
	if err != nil || d.Mounts.Prove(ctx, path, st.Source, false) != nil {
		st = staged{Volume: u.id, Path: path}
		if st.Source, err = d.source(ctx, u, published); err != nil {
			return err
		}
		if err := record.Write(d.stagedFile(st.Volume, path), st, true); err != nil {
			return fmt.Errorf("record that volume %s is staged: %w", u.volume, err)
		}
	}
	if err := d.Mounts.Mount(ctx, st.Source, path, u.readOnly, u.flags); err != nil {
		return fmt.Errorf("stage volume %s: %w", u.volume, err)
	}
	return nil
}

// NodeUnstageVolume takes the node's mount off.
func (d *Driver) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if err := d.unmount(ctx, req.GetVolumeId(), "staging target", req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, d.dropStaged(req.GetVolumeId(), req.GetStagingTargetPath())
}

func (d *Driver) unmount(ctx context.Context, id, what, path string) error {
	if id == "" {
		return errNoVolumeID
	}
	if err := checkPath(what, path); err != nil {
		return err
	}
	return d.Mounts.Unmount(ctx, path)
}

// NodePublishVolume makes the staged volume visible to one workload.
func (d *Driver) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID
	}
	if err := checkPath("target", req.GetTargetPath()); err != nil {
		return nil, err
	}
	u, err := readUse(req.GetVolumeId(), req.GetVolumeCapability(), req.GetReadonly())
	if err != nil {
		return nil, err
	}
	staging := req.GetStagingTargetPath()
	if staging == "" {
		return nil, fmt.Errorf("the staging target path is missing: %w", mount.ErrNotMounted)
	}
	st, err := d.stagedAt(req.GetVolumeId(), staging)
	if err != nil {
		return nil, err
	}
	// The right volume must be staged there, and be as safe as this one.
	stagedUse := u
	stagedUse.readOnly = u.volume.Referring() || reads(req.GetVolumeCapability())
	err = d.Mounts.Prove(ctx, staging, st.Source, stagedUse.readOnly)
	if errors.Is(err, mount.ErrCorrupted) || errors.Is(err, mount.ErrNotMounted) {
		// What served it has ended, as ceph-fuse does with the node plugin's pod. While
		// another workload has the volume, the orchestrator does not stage it again.
		err = d.stage(ctx, stagedUse, staging, req.GetPublishContext())
	}
	if errors.Is(err, mount.ErrOther) || errors.Is(err, mount.ErrWritable) {
		return nil, fmt.Errorf("volume %s is not staged at %s: %w: %s", u.volume, staging, mount.ErrNotMounted, err)
	}
	if err != nil {
		return nil, fmt.Errorf("volume %s at %s: %w", u.volume, staging, err)
	}
	if u.mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
		if err := d.alone(u, staging, req.GetTargetPath()); err != nil {
			return nil, err
		}
	}
	if err := d.Mounts.Bind(ctx, staging, req.GetTargetPath(), u.readOnly); err != nil {
		return nil, fmt.Errorf("publish volume %s: %w", u.volume, err)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// alone checks that a volume for a single writer is published nowhere else.
func (d *Driver) alone(u use, staging, target string) error {
	places, err := d.Mounts.Places(staging)
	if err != nil {
		return err
	}
	for _, p := range places {
		if p != filepath.Clean(staging) && p != filepath.Clean(target) {
			return fmt.Errorf("volume %s is for a single writer and is published at %s: %w", u.volume, p, backend.ErrInUse)
		}
	}
	return nil
}

// NodeUnpublishVolume takes the workload's mount off.
func (d *Driver) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	return &csi.NodeUnpublishVolumeResponse{}, d.unmount(ctx, req.GetVolumeId(), "target", req.GetTargetPath())
}

// NodeGetVolumeStats returns how full a mounted volume is: by the storage
// system's account where it keeps one, else by statfs.
func (d *Driver) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID
	}
	if req.GetVolumePath() == "" {
		return nil, fmt.Errorf("the volume path is missing: %w", backend.ErrInvalid)
	}
	v, err := ParseVolume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	sources, err := d.stagedSources(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	// The numbers of another volume that is mounted there would be believed.
	err = mount.ErrNotMounted
	for _, source := range sources {
		if filepath.IsAbs(req.GetVolumePath()) && err != nil {
			err = d.Mounts.Prove(ctx, req.GetVolumePath(), source, false)
		}
	}
	if errors.Is(err, mount.ErrNotMounted) || errors.Is(err, mount.ErrOther) {
		return nil, fmt.Errorf("volume %s is not at %q: %w", v, req.GetVolumePath(), backend.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	stats, err := d.Mounts.Stats(ctx, req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	bytes := &csi.VolumeUsage{Unit: csi.VolumeUsage_BYTES, Total: stats.TotalBytes, Used: stats.UsedBytes, Available: stats.AvailableBytes}
	if reporter, ok := d.Backends[v.Backend].(backend.UsageReporter); ok {
		st, err := d.look(ctx, req.GetVolumeId())
		if err != nil {
			return nil, err
		}
		usage, err := reporter.Usage(ctx, v.Target())
		if err != nil {
			return nil, err
		}
		if usage.UsedBytes >= 0 {
			bytes.Total, bytes.Used = st.volume.GetCapacityBytes(), usage.UsedBytes
			bytes.Available = max(0, min(bytes.Total-bytes.Used, stats.AvailableBytes))
		}
	}
	inodes := &csi.VolumeUsage{Unit: csi.VolumeUsage_INODES, Total: stats.TotalInodes, Used: stats.UsedInodes, Available: stats.AvailableInodes}
	if v.Referring() {
		bytes.Available, inodes.Available = 0, 0 // nothing can be written
	}
	resp := &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{bytes}}
	if inodes.Total > 0 { // a file system without a fixed number of inodes says 0
		resp.Usage = append(resp.Usage, inodes)
	}
	return resp, nil
}

// NodeGetVolumeHealth says whether a volume's mounts on this node answer.
func (d *Driver) NodeGetVolumeHealth(ctx context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID
	}
	v, err := ParseVolume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	health := &csi.VolumeHealth{VolumeId: req.GetVolumeId()}
	if d.Backends[v.Backend] != nil { // the storage system's opinion counts first
		st, err := d.look(ctx, req.GetVolumeId())
		if err != nil {
			return nil, err
		}
		health = st.health()
	}
	for _, path := range []string{req.GetStagingTargetPath(), req.GetVolumePublishPath()} {
		if path == "" || len(health.HealthStatuses) > 0 {
			continue
		}
		if err := checkPath("volume", path); err != nil {
			return nil, err
		}
		if err := d.Mounts.Check(ctx, path); err != nil {
			health.HealthStatuses = append(health.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
				Status: csi.VolumeHealthErrorType_INACCESSIBLE, Reason: "MountProblem", Message: path + ": " + err.Error()})
		}
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: health}, nil
}

// self is this node.
func (d *Driver) self() backend.Node { return backend.Node{Name: d.NodeID, Addresses: d.Addresses} }

// NodeGetInfo names the node, and what volumes are bound to it by.
func (d *Driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	segments := map[string]string{TopologyKey: d.NodeID}
	if d.Zone != "" {
		segments[ZoneKey] = d.Zone
	}
	return &csi.NodeGetInfoResponse{NodeId: NodeID(d.self()), AccessibleTopology: &csi.Topology{Segments: segments}}, nil
}

// NodeGetCapabilities says what the node service can do. Shares grow by the
// controller alone.
func (d *Driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return resp, nil
}
