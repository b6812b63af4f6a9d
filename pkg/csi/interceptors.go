package csi

import (
	"context"
	"fmt"
	"path"
	"runtime/debug"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
)

// interceptors returns what every request passes, outside in: recover, logger,
// metrics, status table, events, locks.
func (d *Driver) interceptors(log klog.Logger) []grpc.UnaryServerInterceptor {
	return []grpc.UnaryServerInterceptor{recovering(log), logging(log), d.measuring, tabling, d.telling, d.locking}
}

// recovering answers a panic with Internal; the process goes on.
func recovering(log klog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		defer func() {
			if p := recover(); p != nil {
				log.Error(nil, "A request panicked", "method", path.Base(info.FullMethod),
					"panic", fmt.Sprint(p), "stack", string(debug.Stack()))
				resp, err = nil, status.Error(codes.Internal, "the driver has a defect: this request made it panic; see its log")
			}
		}()
		return handler(ctx, req)
	}
}

// logging hands each request a logger that knows the method, and is the one
// place that logs errors.
func logging(log klog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		log := log.WithValues("method", path.Base(info.FullMethod))
		if v := log.V(4); v.Enabled() {
			v.Info("Request", "request", protosanitizer.StripSecrets(req).String())
		}
		resp, err := handler(klog.NewContext(ctx, log), req)
		switch code := status.Code(err); code {
		case codes.OK:
			if what := changed(req, resp); what != nil {
				log.Info("Request done", what...)
			}
			if v := log.V(4); v.Enabled() {
				v.Info("Response", "response", protosanitizer.StripSecrets(resp).String())
			}
		case codes.Internal, codes.Unknown, codes.DataLoss:
			log.Error(err, "Request went wrong")
		case codes.Aborted:
			log.V(2).Info("Request is not done yet", "code", code.String(), "reason", status.Convert(err).Message())
		default:
			log.Info("Request refused", "code", code.String(), "reason", status.Convert(err).Message())
		}
		return resp, err
	}
}

// changed names what a request has made, changed or removed, as keys and values;
// nil for one that only reads. A backup tells of itself.
func changed(req, resp any) []any {
	switch r := req.(type) {
	case *csi.CreateVolumeRequest:
		v := resp.(*csi.CreateVolumeResponse).GetVolume()
		return []any{"name", r.GetName(), "volumeID", v.GetVolumeId(), "bytes", v.GetCapacityBytes()}
	case *csi.DeleteVolumeRequest:
		return []any{"volumeID", r.GetVolumeId()}
	case *csi.ControllerExpandVolumeRequest:
		return []any{"volumeID", r.GetVolumeId(), "bytes", resp.(*csi.ControllerExpandVolumeResponse).GetCapacityBytes()}
	case *csi.CreateSnapshotRequest:
		if s := resp.(*csi.CreateSnapshotResponse).GetSnapshot(); s.GetReadyToUse() {
			return []any{"name", r.GetName(), "snapshotID", s.GetSnapshotId(), "volumeID", s.GetSourceVolumeId()}
		}
	case *csi.DeleteSnapshotRequest:
		return []any{"snapshotID", r.GetSnapshotId()}
	case *csi.ControllerPublishVolumeRequest:
		return []any{"volumeID", r.GetVolumeId(), "node", r.GetNodeId()}
	case *csi.ControllerUnpublishVolumeRequest:
		return []any{"volumeID", r.GetVolumeId(), "node", r.GetNodeId()}
	case *csi.NodeStageVolumeRequest:
		return []any{"volumeID", r.GetVolumeId(), "path", r.GetStagingTargetPath()}
	case *csi.NodeUnstageVolumeRequest:
		return []any{"volumeID", r.GetVolumeId(), "path", r.GetStagingTargetPath()}
	case *csi.NodePublishVolumeRequest:
		return []any{"volumeID", r.GetVolumeId(), "path", r.GetTargetPath()}
	case *csi.NodeUnpublishVolumeRequest:
		return []any{"volumeID", r.GetVolumeId(), "path", r.GetTargetPath()}
	}
	return nil
}

// measuring records how long each request took and how it ended.
func (d *Driver) measuring(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if d.Metrics == nil {
		return handler(ctx, req)
	}
	start := d.Now()
	resp, err := handler(ctx, req)
	d.Metrics.RecordMetrics(info.FullMethod, err, d.Now().Sub(start))
	return resp, err
}

// tabling turns the errors of the layers below into gRPC codes.
func tabling(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err != nil {
		return nil, toStatus(info.FullMethod, err)
	}
	return resp, nil
}

// telling tells of a snapshot that is not made, on the VolumeSnapshot itself: the
// snapshotter does so on the VolumeSnapshotContent, which is nobody's. For a volume
// the provisioner does, on the claim.
func (d *Driver) telling(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	r, ok := req.(*csi.CreateSnapshotRequest)
	if !ok || err == nil || d.Recorder == nil || backup.Told(err) {
		return resp, err
	}
	switch status.Code(toStatus(info.FullMethod, err)) {
	case codes.Aborted, codes.Canceled, codes.DeadlineExceeded: // it goes on
	default:
		for _, o := range aboutSnapshot(r) {
			d.Recorder.Record(ctx, backup.Refused(o, err, d.Now()))
		}
	}
	return resp, err
}

// locking refuses a request for an object that another request is at work on
// (CSI spec 1.13, "Operation pending for volume").
func (d *Driver) locking(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	release, held := d.busy.TryLock(lockKeys(req)...)
	if held != "" {
		return nil, fmt.Errorf("another request is at work on %s: %w", held, backend.ErrPending)
	}
	defer release()
	return handler(ctx, req)
}

func nameKey(volume string) string { return "volume name " + volume }

// lockKeys maps a request to the objects that it works on. Requests that only
// read have none. A source is not among them: many volumes may be made from one
// snapshot at once, and the backend itself sees to it that a snapshot does not
// go while it is read.
func lockKeys(req any) []string {
	volume := func(id string) string { return "volume " + id }
	switch r := req.(type) {
	case *csi.CreateVolumeRequest:
		return []string{nameKey(r.GetName())}
	case *csi.DeleteVolumeRequest:
		return []string{volume(r.GetVolumeId())}
	case *csi.ControllerExpandVolumeRequest:
		return []string{volume(r.GetVolumeId())}
	case *csi.ControllerPublishVolumeRequest:
		return []string{"attachment " + r.GetVolumeId() + " " + r.GetNodeId()}
	case *csi.ControllerUnpublishVolumeRequest:
		return []string{"attachment " + r.GetVolumeId() + " " + r.GetNodeId()}
	case *csi.CreateSnapshotRequest:
		return []string{"snapshot name " + r.GetName()}
	case *csi.DeleteSnapshotRequest:
		return []string{"snapshot " + r.GetSnapshotId()}
	case *csi.NodeStageVolumeRequest:
		return []string{"path " + r.GetStagingTargetPath()}
	case *csi.NodeUnstageVolumeRequest:
		return []string{"path " + r.GetStagingTargetPath()}
	case *csi.NodePublishVolumeRequest:
		keys := []string{"path " + r.GetTargetPath()}
		if r.GetVolumeCapability().GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
			// Two pods must not both find that they are the first.
			keys = append(keys, "publication of "+r.GetVolumeId())
		}
		return keys
	case *csi.NodeUnpublishVolumeRequest:
		return []string{"path " + r.GetTargetPath()}
	}
	return nil
}
