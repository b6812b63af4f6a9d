// Command client is the smallest CSI client that is of use: it makes a volume,
// mounts it at a path, writes a file, takes a backup and removes all but that.
//
//	client ENDPOINT PATH [REPOSITORY]
//
// ENDPOINT is the --endpoint of `abaca standalone`, REPOSITORY the name of a
// repository folder, "offsite" if it is not given.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: client ENDPOINT PATH [REPOSITORY]")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], append(os.Args, "offsite")[3]); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
}

func run(endpoint, path, repository string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	controller, node := csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	access := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER},
	}
	made, err := controller.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: "example", VolumeCapabilities: []*csi.VolumeCapability{access},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 100 << 20}})
	if err != nil {
		return err
	}
	volume, staging := made.GetVolume().GetVolumeId(), path+".staging"
	if _, err := node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: volume, StagingTargetPath: staging, VolumeCapability: access}); err != nil {
		return err
	}
	if _, err := node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: volume, StagingTargetPath: staging, TargetPath: path, VolumeCapability: access}); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(path, "hello"), []byte("world\n"), 0o644); err != nil {
		return err
	}
	// The same request again, until it is ready: that is how CSI waits.
	for ready := false; !ready; time.Sleep(time.Second) {
		backup, err := controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "example backup", SourceVolumeId: volume,
			Parameters: map[string]string{"type": "backup", "repository": repository}})
		if code := status.Code(err); err != nil && code != codes.Aborted && code != codes.Unavailable {
			return err
		}
		if ready = backup.GetSnapshot().GetReadyToUse(); ready {
			fmt.Println(backup.GetSnapshot().GetSnapshotId())
		}
	}
	if _, err := node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: volume, TargetPath: path}); err != nil {
		return err
	}
	if _, err := node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: volume, StagingTargetPath: staging}); err != nil {
		return err
	}
	_, err = controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: volume})
	return err
}
