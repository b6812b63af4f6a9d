package csi

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mount"
)

func TestNodeID(t *testing.T) {
	node := backend.Node{Name: "worker-1", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")}}
	if got := NodeID(node); got != "worker-1,192.0.2.7,2001:db8::7" {
		t.Error(got)
	}
	again, err := ParseNodeID(NodeID(node))
	if err != nil || again.Name != node.Name || len(again.Addresses) != 2 || again.Addresses[1] != node.Addresses[1] {
		t.Error(again, err)
	}
	for _, id := range []string{"", ",192.0.2.7", "a", "a,b", "a,fe80::1%eth0", "a,192.0.2.0/24", "a,192.0.2.7,"} {
		if node, err := ParseNodeID(id); !isNotFound(err) {
			t.Errorf("%q is %v, %v", id, node, err)
		}
	}
}

// TestPublish: the storage system lets in the nodes that a volume is published
// to, at the level that they need.
func TestPublish(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	f.store.Node = ""
	v := f.volume(create("data", writer, nil))
	snap := f.snapshot("snap", v.GetVolumeId())
	ref := f.volume(create("look", reader, contentSource(snap.GetSnapshotId())))
	publish := func(id, node string, mode csi.VolumeCapability_AccessMode_Mode, readOnly bool) (map[string]string, error) {
		resp, err := f.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
			VolumeId: id, NodeId: node, VolumeCapability: cap1(mode), Readonly: readOnly})
		return resp.GetPublishContext(), err
	}
	granted := func(name string, want map[string]bool) {
		t.Helper()
		if diff := cmp.Diff(want, f.store.Granted(consumerPrefix+digest(name))); diff != "" {
			t.Errorf("let in to %s (-want +got):\n%s", name, diff)
		}
	}
	for range 2 {
		if _, err := publish(v.GetVolumeId(), "one,192.0.2.1", reader, false); err != nil {
			t.Fatal(err)
		}
		granted("data", map[string]bool{"one": true})
	}
	if _, err := publish(v.GetVolumeId(), "one,192.0.2.1", writer, false); err != nil {
		t.Fatal(err)
	}
	if _, err := publish(v.GetVolumeId(), "two,192.0.2.2", writer, true); err != nil {
		t.Fatal(err)
	}
	granted("data", map[string]bool{"one": false, "two": true})
	if _, err := publish(ref.GetVolumeId(), "one,192.0.2.1", reader, false); err != nil {
		t.Fatal(err)
	}
	granted("look", map[string]bool{"one": true})

	_, err := publish(ref.GetVolumeId(), "one,192.0.2.1", writer, true)
	code(t, err, codes.FailedPrecondition, "only be read")
	_, err = publish(v.GetVolumeId(), "one,nowhere", writer, false)
	code(t, err, codes.NotFound, "nowhere")
	_, err = publish("mem/unknown", "one,192.0.2.1", writer, false)
	code(t, err, codes.NotFound)
	_, err = publish(v.GetVolumeId(), "", writer, false)
	code(t, err, codes.InvalidArgument)
	_, err = f.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: v.GetVolumeId(), NodeId: "one,"})
	code(t, err, codes.InvalidArgument)

	for _, unpublish := range []struct {
		id, node string
		left     map[string]bool
	}{
		{v.GetVolumeId(), "one,192.0.2.9", map[string]bool{"two": true}}, // its address has changed
		{v.GetVolumeId(), "one,192.0.2.9", map[string]bool{"two": true}},
		{ref.GetVolumeId(), "two", map[string]bool{"two": true}},
		{v.GetVolumeId(), "", map[string]bool{}},
		{"mem/unknown", "one", map[string]bool{}},
		{"nonsense", "one", map[string]bool{}},
	} {
		if _, err := f.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: unpublish.id, NodeId: unpublish.node}); err != nil {
			t.Errorf("unpublish %v: %v", unpublish, err)
		}
		granted("data", unpublish.left)
	}
	granted("look", map[string]bool{"one": true})
}

// TestPublishToMovers: a mover is let in to what its consumer holds, for as long as
// it does, and its handle is of no volume.
func TestPublishToMovers(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	v := f.volume(create("data", writer, nil))
	_, share, _ := strings.Cut(v.GetVolumeId(), "/")
	snap, err := f.backend.CreateSnapshot(ctx, backend.CreateSnapshotRequest{Name: "backup/x", ShareID: share, Role: backend.RoleTemporary})
	if err != nil {
		t.Fatal(err)
	}
	draft, err := f.backend.CreateShare(ctx, backend.CreateShareRequest{Name: "draft", MinSize: 1 << 20, Role: backend.RoleUser, Draft: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		job  backup.Job
		mode csi.VolumeCapability_AccessMode_Mode
	}{
		{backup.Job{Backend: "mem", Snapshot: snap.ID, Consumer: "backup-" + digest("x")}, reader},
		{backup.Job{Backend: "mem", Share: draft.ID, Consumer: "restore-" + digest("x")}, writer},
	} {
		id, target := MoverHandle(test.job), backend.Target{SnapshotID: test.job.Snapshot, ShareID: test.job.Share}
		publish := &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: "here,192.0.2.1", VolumeCapability: cap1(test.mode)}
		stage := &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: filepath.Join(f.dir, "s"), VolumeCapability: cap1(test.mode)}
		refused := func() {
			t.Helper()
			_, err := f.ControllerPublishVolume(ctx, publish)
			code(t, err, codes.NotFound)
			_, err = f.NodeStageVolume(ctx, stage)
			code(t, err, codes.NotFound)
		}
		refused() // nobody holds it
		if _, err := f.backend.Export(ctx, target, test.job.Consumer); err != nil {
			t.Fatal(err)
		}
		if _, err := f.ControllerPublishVolume(ctx, publish); err != nil {
			t.Error(err)
		}
		if len(f.store.Granted(test.job.Consumer)) != 1 {
			t.Errorf("let in: %v", f.store.Granted(test.job.Consumer))
		}
		if _, err := f.NodeStageVolume(ctx, stage); err != nil {
			t.Error(err)
		}
		if _, err := f.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: stage.StagingTargetPath}); err != nil {
			t.Error(err)
		}
		if _, err := f.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: publish.NodeId}); err != nil || len(f.store.Granted(test.job.Consumer)) != 0 {
			t.Errorf("let in after all: %v, %v", f.store.Granted(test.job.Consumer), err)
		}
		// For nothing else.
		_, err := f.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "of it", SourceVolumeId: id})
		code(t, err, codes.NotFound)
		_, err = f.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
		code(t, err, codes.NotFound)
		if _, err := f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
			t.Error(err)
		}
		if held, err := f.backend.ExportOf(ctx, test.job.Consumer); err != nil || held.Target != target {
			t.Errorf("DeleteVolume ended the hold: %v, %v", held, err)
		}
		if err := f.backend.Unexport(ctx, target, test.job.Consumer); err != nil {
			t.Fatal(err)
		}
		refused()
	}
	// A draft is nobody's volume, whatever holds it.
	_, err = f.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: "mem/" + draft.ID, NodeId: "here,", VolumeCapability: cap1(writer)})
	code(t, err, codes.Aborted)
}

// TestNodeAlone: a node that has no backend mounts what the controller has
// published to it, and needs nobody from then on.
func TestNodeAlone(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	v := f.volume(create("data", writer, nil))
	resp, err := f.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
		VolumeId: v.GetVolumeId(), NodeId: "here,", VolumeCapability: cap1(writer)})
	if err != nil {
		t.Fatal(err)
	}
	node := &Driver{Node: true, NodeID: "here", Mounts: mount.New(), StagedDir: filepath.Join(f.dir, "staged"), Now: time.Now}
	staging, target := filepath.Join(f.dir, "staging"), filepath.Join(f.dir, "target")
	stage := &csi.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging, VolumeCapability: cap1(writer)}
	publish := &csi.NodePublishVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging, TargetPath: target, VolumeCapability: cap1(writer)}
	check := func(err error, want codes.Code) {
		t.Helper()
		code(t, toStatus("", err), want)
	}
	_, err = node.NodeStageVolume(ctx, stage)
	check(err, codes.InvalidArgument) // not published
	stage.PublishContext = map[string]string{exportKey: `{"target":{"shareId":"another"},"protocol":"bind","locations":["/"]}`}
	_, err = node.NodeStageVolume(ctx, stage)
	check(err, codes.InvalidArgument)
	stage.PublishContext = resp.GetPublishContext()
	_, err = node.NodePublishVolume(ctx, publish)
	check(err, codes.FailedPrecondition) // not staged
	for range 2 {
		if _, err := node.NodeStageVolume(ctx, stage); err != nil {
			t.Fatal(err)
		}
	}
	// Another process, as after a restart of the node plugin; and no context.
	node = &Driver{Node: true, NodeID: "here", Mounts: mount.New(), StagedDir: node.StagedDir, Now: time.Now}
	if _, err := node.NodePublishVolume(ctx, publish); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(target, "file"), []byte("x"), 0o644); err != nil {
		t.Error(err)
	}
	if _, err := node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: v.GetVolumeId(), VolumePath: target}); err != nil {
		t.Error(err)
	}
	if _, err := node.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: v.GetVolumeId(), VolumePublishPath: target}); err != nil {
		t.Error(err)
	}
	if _, err := node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.GetVolumeId(), TargetPath: target}); err != nil {
		t.Error(err)
	}
	for range 2 {
		if _, err := node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging}); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(node.StagedDir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	_, err = node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: v.GetVolumeId(), VolumePath: target})
	check(err, codes.NotFound)
}

// dying is a node's mounts, of which one is dead until it is mounted again.
type dying struct {
	mount.Interface
	path   string
	mounts int
}

func (d *dying) Prove(ctx context.Context, dir string, src mount.Source, readOnly bool) error {
	if dir == d.path {
		return mount.ErrCorrupted
	}
	return d.Interface.Prove(ctx, dir, src, readOnly)
}

func (d *dying) Mount(ctx context.Context, src mount.Source, dir string, readOnly bool, flags []string) error {
	if dir == d.path {
		d.path = ""
		d.mounts++
	}
	return d.Interface.Mount(ctx, src, dir, readOnly, flags)
}

// TestDeadStage: a volume whose mount on the node has died is mounted again for the
// next workload, read-only if it was, as Kubernetes does not stage it anew while
// another one has it.
func TestDeadStage(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	for name, mode := range map[string]csi.VolumeCapability_AccessMode_Mode{"written": writer, "read": reader} {
		v := f.volume(create(name, writer, nil))
		resp, err := f.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: v.GetVolumeId(), NodeId: "here,", VolumeCapability: cap1(mode)})
		if err != nil {
			t.Fatal(err)
		}
		mounts := &dying{Interface: mount.New()}
		node := &Driver{Node: true, NodeID: "here", Mounts: mounts, StagedDir: filepath.Join(f.dir, "staged"), Now: time.Now}
		staging, target := filepath.Join(f.dir, "staging-"+name), filepath.Join(f.dir, "target-"+name)
		if _, err := node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging,
			VolumeCapability: cap1(mode), PublishContext: resp.GetPublishContext()}); err != nil {
			t.Fatal(err)
		}
		mounts.path = staging
		if _, err := node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging,
			TargetPath: target, VolumeCapability: cap1(mode), PublishContext: resp.GetPublishContext()}); err != nil {
			t.Error(err)
		}
		if mounts.mounts != 1 {
			t.Errorf("%s: mounted again %d times", name, mounts.mounts)
		}
		if err := os.WriteFile(filepath.Join(target, "file"), nil, 0o644); (err == nil) != (mode == writer) {
			t.Errorf("%s: to write into it: %v", name, err)
		}
		for _, dir := range []string{target, staging} {
			if err := mounts.Unmount(ctx, dir); err != nil {
				t.Error(err)
			}
		}
	}
}
