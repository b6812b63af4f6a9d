package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
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
	listener, err := net.Listen("unix", s.path("csi.sock"))
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
	return s, s.connect(s.path("csi.sock")), cloud
}

// TestManilaSanity runs csi-sanity on a Manila that is simulated, with random
// delays and real mounts.
func TestManilaSanity(t *testing.T) {
	s, _, cloud := newCloudSite(t)
	s.sanity("", "snapshot", s.path("csi.sock"), 1<<30)
	if left := cloud.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("left in the cloud: %s", left)
	}
}

// TestManilaMainJob is the main job on it: a snapshot mounted in place, a backup
// of which the second reads only what has changed, and a restore.
func TestManilaMainJob(t *testing.T) {
	s, d, cloud := newCloudSite(t)
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
