package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/manila"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/backup/inprocess"
	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/pkg/keys"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// bound shows the exports of a simulated cloud as what they are on this machine:
// directories. All else is the Manila backend.
type bound struct {
	*manila.Backend
	cloud *fakemanila.Server
}

func (b bound) bind(x *backend.Export, err error) (*backend.Export, error) {
	if err != nil {
		return nil, err
	}
	tree := b.cloud.Tree(filepath.Base(x.Locations[0]))
	if x.Path != "" {
		found, err := filepath.Glob(filepath.Join(tree, x.Path))
		if err != nil || len(found) != 1 {
			return nil, fmt.Errorf("%w: %s below %s: %v, %v", backend.ErrUnavailable, x.Path, tree, found, err)
		}
		tree = found[0]
	}
	bound := *x
	bound.Protocol, bound.Locations, bound.Path, bound.User, bound.Options = "bind", []string{tree}, "", "", nil
	return &bound, nil
}

func (b bound) Export(ctx context.Context, t backend.Target, consumer string) (*backend.Export, error) {
	return b.bind(b.Backend.Export(ctx, t, consumer))
}

func (b bound) Grant(ctx context.Context, consumer string, node backend.Node, readOnly bool) (*backend.Export, error) {
	return b.bind(b.Backend.Grant(ctx, consumer, node, readOnly))
}

func (b bound) ExportOf(ctx context.Context, consumer string) (*backend.Export, error) {
	return b.bind(b.Backend.ExportOf(ctx, consumer))
}

// newCloudSite is a site whose driver works on a simulated Manila, which takes its
// time for everything. The driver is in this process; its movers are not.
func newCloudSite(t *testing.T) (*site, *driver, *fakemanila.Server) {
	t.Helper()
	s := newSite(t)
	cloud := fakemanila.New(fakemanila.Options{Dir: s.path("cloud"),
		Delay: func() time.Duration { return time.Duration(rand.IntN(300)) * time.Millisecond }})
	t.Cleanup(cloud.Close)
	s.write("clouds.yaml", cloud.Clouds())
	for _, dir := range []string{"staged", "cache", "seen", "movers"} {
		if err := os.MkdirAll(s.path("state", dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return s, s.cloudDriver(cloud), cloud
}

// cloudDriver is one more driver over the same cloud and state.
func (s *site) cloudDriver(cloud *fakemanila.Server) *driver {
	t := s.t
	t.Helper()
	ctx, cancel := context.WithCancel(klog.NewContext(context.Background(), klog.Background()))
	store, err := keys.Open(s.path("state", "keys"))
	if err != nil {
		t.Fatal(err)
	}
	opened, err := manila.Open(ctx, manila.Options{CloudsFile: s.path("clouds.yaml"), Cloud: "fake", Keys: store, Now: time.Now, Poll: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	backends := map[string]backend.Backend{"manila": bound{opened, cloud}}
	repositories := backup.Directory{Path: s.repositories, Program: restic, CacheDir: s.path("state", "cache"), SeenDir: s.path("state", "seen")}
	d := &csi.Driver{
		Version: "test", Controller: true, Node: true, NodeID: nodeID, Backends: backends, DefaultBackend: "manila",
		Mounts: mount.New(), StagedDir: s.path("state", "staged"), Now: time.Now,
		Backups: &backup.Engine{
			Backends: backends, Repositories: repositories, Now: time.Now, Tick: 100 * time.Millisecond,
			Node: backend.Node{Name: nodeID},
			Runner: &inprocess.Runner{Dir: s.path("state", "movers"), Repositories: repositories, Now: time.Now,
				Command: []string{program, "mover"}, Keys: store.Path()},
		},
	}
	socket := s.path(fmt.Sprintf("csi-%d.sock", time.Now().UnixNano()))
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		go d.Backups.Run(ctx)
		_ = d.Serve(ctx, listener, time.Second)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return s.connect(socket)
}

// TestManilaSanity runs csi-sanity on a Manila that is simulated, with random
// delays and real mounts.
func TestManilaSanity(t *testing.T) {
	s, d, cloud := newCloudSite(t)
	s.sanity("", "snapshot", d.socket, 1<<30)
	if left := cloud.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left in the cloud: %s", left)
	}
}

// TestManilaMainJob is the main job on it.
func TestManilaMainJob(t *testing.T) {
	s, d, cloud := newCloudSite(t)
	d.mainJob()
	for range 100 {
		if cloud.Counts() == "0 shares, 0 snapshots, 0 rules" {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if left := cloud.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left in the cloud: %s", left)
	}
	if left, _ := os.ReadDir(s.path("state", "keys")); len(left) > 0 {
		t.Errorf("left in the key store: %v", left)
	}
}

// mainJob mounts a snapshot in place, makes a backup and restores it.
func (d *driver) mainJob() {
	t := d.site.t
	t.Helper()
	data := d.volume(volumeRequest("data", writers))
	live := d.publish(data, writers)
	put(t, live, "file", "old\n")
	snap := d.snapshot(snapshotRequest("snap", data.GetVolumeId()))
	put(t, live, "file", "new\n")
	ref := d.volume(fromSnapshot(volumeRequest("ref", readers), snap.GetSnapshotId()))
	dir := d.publish(ref, readers)
	if got := get(t, dir, "file"); got != "old\n" {
		t.Errorf("the snapshot holds %q", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o644); err == nil {
		t.Error("the snapshot volume can be written")
	}
	if _, err := d.DeleteSnapshot(d.ctx(), &spec.DeleteSnapshotRequest{SnapshotId: snap.GetSnapshotId()}); err == nil {
		t.Error("a snapshot that is held was deleted")
	}
	saved := d.snapshot(backupRequest("saved", data.GetVolumeId()))
	restored := d.volume(fromSnapshot(volumeRequest("restored", writers), saved.GetSnapshotId()))
	if got := get(t, d.publish(restored, writers), "file"); got != "new\n" {
		t.Errorf("the restored volume holds %q", got)
	}
	d.unpublish(data)
	d.deleteVolume(data.GetVolumeId()) // before its snapshot
	if got := get(t, dir, "file"); got != "old\n" {
		t.Errorf("without its share the snapshot holds %q", got)
	}
	for _, v := range []*spec.Volume{ref, restored} {
		d.unpublish(v)
		d.deleteVolume(v.GetVolumeId())
	}
	d.deleteSnapshot(snap.GetSnapshotId())
	d.deleteSnapshot(saved.GetSnapshotId())
}

// TestManilaMany makes many volumes at once, and leaves nothing of them. How many
// is in ABACA_E2E_MANY.
func TestManilaMany(t *testing.T) {
	s, d, cloud := newCloudSite(t)
	d.many(howMany(t, 16))
	if left := cloud.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left in the cloud: %s", left)
	}
	if left, _ := os.ReadDir(s.path("state", "keys")); len(left) > 0 {
		t.Errorf("left in the key store: %v", left)
	}
	backups, err := d.ListSnapshots(d.ctx(), &spec.ListSnapshotsRequest{})
	if err != nil || len(backups.GetEntries()) > 0 {
		t.Errorf("left in the repository: %v, %v", backups, err)
	}
}

// TestManilaTwoControllers has two controllers do the same at once, as when one
// has not noticed yet that it is no longer the leader. Each object is there once,
// and in the end none.
func TestManilaTwoControllers(t *testing.T) {
	s, one, cloud := newCloudSite(t)
	both := []*driver{one, s.cloudDriver(cloud)}
	// same has both do something, and wants the same answer.
	same := func(what string, do func(d *driver) string) string {
		t.Helper()
		answers := make([]string, len(both))
		var wg sync.WaitGroup
		for i, d := range both {
			wg.Go(func() { answers[i] = do(d) })
		}
		wg.Wait()
		if answers[0] != answers[1] || t.Failed() {
			t.Fatalf("%s: %q and %q", what, answers[0], answers[1])
		}
		return answers[0]
	}
	published := func(d *driver, id string, mode spec.VolumeCapability_AccessMode_Mode) string {
		resp, err := d.ControllerPublishVolume(d.ctx(), &spec.ControllerPublishVolumeRequest{VolumeId: id, NodeId: nodeID + ",", VolumeCapability: capability(mode)})
		if err != nil {
			t.Errorf("publish %s: %v", id, err)
		}
		return fmt.Sprint(resp.GetPublishContext())
	}
	for round := range 2 {
		name := func(kind string) string { return fmt.Sprintf("%s-%d", kind, round) }
		data := same("volume", func(d *driver) string { return d.volume(volumeRequest(name("data"), writers)).GetVolumeId() })
		same("publish", func(d *driver) string { return published(d, data, writers) })
		snap := same("snapshot", func(d *driver) string { return d.snapshot(snapshotRequest(name("snap"), data)).GetSnapshotId() })
		view := same("view", func(d *driver) string {
			return d.volume(fromSnapshot(volumeRequest(name("view"), readers), snap)).GetVolumeId()
		})
		same("publish the view", func(d *driver) string { return published(d, view, readers) })
		saved := same("backup", func(d *driver) string { return d.snapshot(backupRequest(name("saved"), data)).GetSnapshotId() })
		restored := same("restore", func(d *driver) string {
			return d.volume(fromSnapshot(volumeRequest(name("restored"), writers), saved)).GetVolumeId()
		})
		for _, id := range []string{data, view} {
			same("unpublish", func(d *driver) string {
				return fmt.Sprint(errOf(d.ControllerUnpublishVolume(d.ctx(), &spec.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: nodeID + ","})))
			})
		}
		for _, id := range []string{data, view, restored} {
			same("delete volume", func(d *driver) string {
				return d.untilDone(func() error { return errOf(d.DeleteVolume(d.ctx(), &spec.DeleteVolumeRequest{VolumeId: id})) })
			})
		}
		for _, id := range []string{snap, saved} {
			same("delete snapshot", func(d *driver) string {
				return d.untilDone(func() error { return errOf(d.DeleteSnapshot(d.ctx(), &spec.DeleteSnapshotRequest{SnapshotId: id})) })
			})
		}
	}
	if left := cloud.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left in the cloud: %s", left)
	}
	if left, _ := os.ReadDir(s.path("state", "keys")); len(left) > 0 {
		t.Errorf("left in the key store: %v", left)
	}
}

// untilDone repeats a call as an orchestrator does, and returns how it ends.
func (d *driver) untilDone(call func() error) string {
	for {
		err := call()
		if err == nil || !retryable(err) {
			return fmt.Sprint(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func howMany(t *testing.T, usually int) int {
	t.Helper()
	text := os.Getenv("ABACA_E2E_MANY")
	if text == "" {
		return usually
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("ABACA_E2E_MANY is %q", text)
	}
	return n
}

// many has eight users do all that there is with n volumes: made, mounted, written
// to, snapshotted, looked at, backed up and deleted.
func (d *driver) many(n int) {
	t := d.site.t
	t.Helper()
	numbers := make(chan int)
	var users sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for i := range numbers {
				text := fmt.Sprintf("volume %d\n", i)
				v := d.volume(volumeRequest(fmt.Sprintf("many-%d", i), writers))
				put(t, d.publish(v, writers), "file", text)
				snap := d.snapshot(snapshotRequest(fmt.Sprintf("many-%d", i), v.GetVolumeId()))
				view := d.volume(fromSnapshot(volumeRequest(fmt.Sprintf("view-%d", i), readers), snap.GetSnapshotId()))
				if got := get(t, d.publish(view, readers), "file"); got != text {
					t.Errorf("the snapshot of volume %d holds %q", i, got)
				}
				d.unpublish(view)
				saved := d.snapshot(backupRequest(fmt.Sprintf("saved-%d", i), v.GetVolumeId()))
				d.unpublish(v)
				d.deleteVolume(v.GetVolumeId())
				d.deleteVolume(view.GetVolumeId())
				d.deleteSnapshot(snap.GetSnapshotId())
				d.deleteSnapshot(saved.GetSnapshotId())
			}
		})
	}
	for i := range n {
		numbers <- i
		if t.Failed() {
			break
		}
	}
	close(numbers)
	users.Wait()
}

// TestNodeWithoutCredentials: a node that knows nothing of the cloud mounts what is
// published to it, and nothing else.
func TestNodeWithoutCredentials(t *testing.T) {
	s, controller, _ := newCloudSite(t)
	socket := s.path("node.sock")
	node := s.launch(exec.Command(program, "node", "--endpoint", "unix://"+socket, "--node-id", nodeID, "--node-address", "192.0.2.7,2001:db8::7",
		"--state-dir", s.path("node-state")), socket)
	info, err := node.NodeGetInfo(node.ctx(), &spec.NodeGetInfoRequest{})
	if err != nil || info.GetNodeId() != nodeID+",192.0.2.7,2001:db8::7" {
		t.Fatalf("%v, %v", info, err)
	}
	v := controller.volume(volumeRequest("data", writers))
	staging, target := s.path("staging"), s.path("target")
	stage := &spec.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging, VolumeCapability: capability(writers)}
	_, err = node.NodeStageVolume(node.ctx(), stage)
	wantCode(t, err, codes.InvalidArgument, "published")
	published, err := controller.ControllerPublishVolume(controller.ctx(), &spec.ControllerPublishVolumeRequest{
		VolumeId: v.GetVolumeId(), NodeId: info.GetNodeId(), VolumeCapability: capability(writers)})
	if err != nil {
		t.Fatal(err)
	}
	stage.PublishContext = published.GetPublishContext()
	if _, err := node.NodeStageVolume(node.ctx(), stage); err != nil {
		t.Fatal(err)
	}
	if _, err := node.NodePublishVolume(node.ctx(), &spec.NodePublishVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging,
		TargetPath: target, VolumeCapability: capability(writers), PublishContext: stage.PublishContext}); err != nil {
		t.Fatal(err)
	}
	put(t, target, "file", "x")
	for _, err := range []error{
		errOf(node.NodeUnpublishVolume(node.ctx(), &spec.NodeUnpublishVolumeRequest{VolumeId: v.GetVolumeId(), TargetPath: target})),
		errOf(node.NodeUnstageVolume(node.ctx(), &spec.NodeUnstageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging})),
		errOf(controller.ControllerUnpublishVolume(controller.ctx(), &spec.ControllerUnpublishVolumeRequest{VolumeId: v.GetVolumeId(), NodeId: info.GetNodeId()})),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(s.path("state", "keys")); len(left) > 0 {
		t.Errorf("nobody mounts it, and there are keys: %v", left)
	}
	controller.deleteVolume(v.GetVolumeId())
}

func errOf[T any](_ T, err error) error { return err }
