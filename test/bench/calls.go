package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/abaca-csi/abaca/pkg/restic"
)

const (
	writers = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	readers = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	// poll is how often an unfinished call is repeated. An orchestrator waits
	// longer, so this is about Abaca and not about it.
	poll = 20 * time.Millisecond
)

// volume is a volume, and where it is mounted if it is.
type volume struct {
	id      string
	context map[string]string
	mode    csi.VolumeCapability_AccessMode_Mode
	staging string
	dir     string
}

func (v *volume) capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: v.mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}}
}

// again repeats a call for as long as it is told to come back.
func again[R any](ctx context.Context, call func() (R, error)) (R, error) {
	for {
		r, err := call()
		if status.Code(err) != codes.Aborted {
			return r, err
		}
		select {
		case <-ctx.Done():
			return r, ctx.Err()
		case <-time.After(poll):
		}
	}
}

// createVolume makes a share, or a snapshot volume if there is a snapshot.
func (s *site) createVolume(ctx context.Context, name string, size int64, snapshot string) (*volume, error) {
	v := &volume{mode: writers}
	req := &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}}
	if snapshot != "" {
		v.mode = readers
		req.VolumeContentSource = snapshotSource(snapshot)
	}
	if s.cloud.shareType != "" && snapshot == "" {
		req.Parameters = map[string]string{"type": s.cloud.shareType}
	}
	req.VolumeCapabilities = []*csi.VolumeCapability{v.capability()}
	resp, err := again(ctx, func() (*csi.CreateVolumeResponse, error) { return s.controller.CreateVolume(ctx, req) })
	v.id, v.context = resp.GetVolume().GetVolumeId(), resp.GetVolume().GetVolumeContext()
	return v, err
}

func snapshotSource(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

// publish stages and publishes a volume. Its directory is <somewhere>/data.
func (s *site) publish(ctx context.Context, v *volume) error {
	at := s.path("node", strings.NewReplacer("/", "_", "#", "_").Replace(v.id))
	v.staging, v.dir = filepath.Join(at, "staging"), filepath.Join(at, "data")
	if err := os.MkdirAll(v.staging, 0o755); err != nil {
		return err
	}
	s.volumes[v.id] = v // before it is mounted
	if _, err := s.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging,
		VolumeCapability: v.capability(), VolumeContext: v.context}); err != nil {
		return err
	}
	_, err := s.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging,
		TargetPath: v.dir, VolumeCapability: v.capability(), VolumeContext: v.context})
	return err
}

func (s *site) unpublish(ctx context.Context, v *volume) error {
	if _, err := s.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.dir}); err != nil {
		return err
	}
	_, err := s.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
	if err == nil {
		delete(s.volumes, v.id)
	}
	return err
}

func (s *site) deleteVolume(ctx context.Context, v *volume) error {
	_, err := again(ctx, func() (*csi.DeleteVolumeResponse, error) {
		return s.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	})
	return err
}

// mounted makes a share and mounts it.
func (s *site) mounted(ctx context.Context, name string, size int64) (*volume, error) {
	v, err := s.createVolume(ctx, name, size, "")
	if err != nil {
		return nil, err
	}
	return v, s.publish(ctx, v)
}

func (s *site) createSnapshot(ctx context.Context, name string, of *volume) (string, error) {
	resp, err := again(ctx, func() (*csi.CreateSnapshotResponse, error) {
		return s.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: of.id})
	})
	if err == nil && !resp.GetSnapshot().GetReadyToUse() {
		err = fmt.Errorf("snapshot %q is not ready at once", name)
	}
	return resp.GetSnapshot().GetSnapshotId(), err
}

// mountedSnapshot takes a snapshot and mounts it, and returns what undoes both.
func (s *site) mountedSnapshot(ctx context.Context, name string, of *volume) (*volume, func() error, error) {
	id, err := s.createSnapshot(ctx, name, of)
	if err != nil {
		return nil, nil, err
	}
	v, err := s.createVolume(ctx, name, 0, id)
	if err == nil {
		err = s.publish(ctx, v)
	}
	return v, func() error {
		err := s.unpublish(ctx, v)
		if err == nil {
			err = s.deleteVolume(ctx, v)
		}
		if err == nil {
			_, err = s.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
		}
		return err
	}, err
}

// backUp makes a backup and says when the first call began, and when the answer
// came that it is ready.
func (s *site) backUp(ctx context.Context, name, repository string, of *volume) (begun, ready time.Time, err error) {
	req := &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: of.id,
		Parameters: map[string]string{"type": "backup", "repository": repository}}
	begun = time.Now()
	for {
		resp, err := s.controller.CreateSnapshot(ctx, req)
		if err == nil && resp.GetSnapshot().GetReadyToUse() {
			return begun, time.Now(), nil
		}
		if err != nil && status.Code(err) != codes.Aborted {
			return begun, begun, err
		}
		select {
		case <-ctx.Done():
			return begun, begun, ctx.Err()
		case <-time.After(poll):
		}
	}
}

// account is what the driver says of a backup that has ended.
type account struct {
	Name           string
	Started, Ended time.Time             // of the mover
	BackupSummary  *restic.BackupSummary // restic's own
}

// account returns that of one of the last backups.
func (s *site) account(ctx context.Context, name string) (*account, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.web+"/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var report struct {
		Finished []account
	}
	if err := json.NewDecoder(resp.Body).Decode(&report); err != nil {
		return nil, fmt.Errorf("read the driver's status: %w", err)
	}
	for _, f := range report.Finished {
		if f.Name == name && f.BackupSummary != nil {
			return &f, nil
		}
	}
	return nil, errors.New("the driver's status does not have the backup " + name)
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
