// Package e2e tests the program as its users meet it: real gRPC over a unix
// socket, a real kernel, real btrfs, the real restic. It needs root, and
// bin/restic, which `make build` makes.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/abaca-csi/abaca/pkg/backend/local"
	"github.com/abaca-csi/abaca/pkg/mount"
)

const (
	mib = 1 << 20
	// imageSize is the size of each test's btrfs image; it is sparse.
	imageSize = 2 << 30
	nodeID    = "e2e"
)

// program is the abaca that is tested, restic the pinned one.
var program, restic string

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role == "sanity" {
		os.Exit(m.Run())
	} else if role != "" {
		os.Exit(play(role))
	}
	code, err := prepare(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func prepare(m *testing.M) (int, error) {
	var err error
	if restic, err = filepath.Abs("../bin/restic"); err != nil {
		return 0, err
	}
	if _, err := os.Stat(restic); err != nil {
		return 0, fmt.Errorf("%w: run `make build` first", err)
	}
	dir, err := os.MkdirTemp("", "abaca-e2e-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "abaca")
	// With the race detector, whatever this test itself was built with.
	build := exec.Command("go", "build", "-race", "-o", program, "../cmd/abaca")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build abaca: %w\n%s", err, out)
	}
	return m.Run(), nil
}

// A site is what one test has to itself: a btrfs image, repositories, a socket.
type site struct {
	t            *testing.T
	dir          string
	config       string
	repositories string
}

// newSite makes a site with a repository called "offsite". When the test ends,
// it checks that no mount and no loop device is left behind.
func newSite(t *testing.T) *site {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount")
	}
	dir, err := os.MkdirTemp("", "abaca-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, dir: dir, config: filepath.Join(dir, "config.yaml"), repositories: filepath.Join(dir, "repositories")}
	s.write("config.yaml", fmt.Sprintf("backends:\n- name: local\n  local: {path: %s, size: %d}\n", s.path("backend"), imageSize))
	s.repository("offsite", s.path("offsite"))
	t.Cleanup(s.clean)
	return s
}

func (s *site) path(elem ...string) string { return filepath.Join(append([]string{s.dir}, elem...)...) }

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Dir(s.path(name)), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// repository configures a repository.
func (s *site) repository(name, location string) {
	s.write("repositories/"+name+"/RESTIC_REPOSITORY", location+"\n")
	s.write("repositories/"+name+"/RESTIC_PASSWORD", "correct horse\n")
}

func (s *site) clean() {
	mounts := mount.New()
	below, err := mounts.Below(s.dir)
	if err != nil {
		s.t.Error(err)
	}
	image := s.path("backend", "mnt")
	for _, p := range below {
		if p != image {
			s.t.Errorf("left mounted: %s", p)
			_ = mounts.Unmount(context.Background(), p)
		}
	}
	if _, err := os.Stat(image); err == nil {
		b, err := local.Open(context.Background(), local.Options{Path: s.path("backend"), Size: imageSize, Node: nodeID})
		if err == nil {
			err = b.Detach(context.Background())
		}
		if err != nil {
			s.t.Errorf("detach the image: %v", err)
		}
	}
	if below, err := mounts.Below(s.dir); err != nil || len(below) > 0 {
		s.t.Errorf("still mounted: %v (%v)", below, err)
		return // what is mounted must not be removed from under somebody
	}
	if err := os.RemoveAll(s.dir); err != nil {
		s.t.Error(err)
	}
}

// A driver is a running abaca and a client of it.
type driver struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient

	site   *site
	cmd    *exec.Cmd
	socket string
	ended  chan struct{}
	conn   *grpc.ClientConn
	log    logFile
}

// start starts `abaca standalone` and waits until it serves.
func (s *site) start(flags ...string) *driver {
	s.t.Helper()
	socket := s.path(fmt.Sprintf("csi-%d.sock", time.Now().UnixNano()))
	return s.launch(exec.Command(program, append([]string{"standalone", "--endpoint", "unix://" + socket, "--config", s.config,
		"--repositories", s.repositories, "--node-id", nodeID, "--restic", restic}, flags...)...), socket)
}

func (s *site) launch(cmd *exec.Cmd, socket string) *driver {
	s.t.Helper()
	d := &driver{site: s, cmd: cmd, socket: socket, ended: make(chan struct{}), log: logFile(socket + ".log")}
	out, err := os.Create(string(d.log))
	if err != nil {
		s.t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		close(d.ended)
	}()
	s.t.Cleanup(func() {
		d.stop(syscall.SIGTERM)
		if s.t.Failed() {
			s.t.Logf("log of abaca %d:\n%s", cmd.Process.Pid, d.log)
		}
		if strings.Contains(d.log.String(), "DATA RACE") {
			s.t.Errorf("data race in abaca:\n%s", d.log)
		}
	})
	c := s.connect(socket)
	d.conn, d.IdentityClient, d.ControllerClient, d.NodeClient = c.conn, c.IdentityClient, c.ControllerClient, c.NodeClient
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		_, err := d.Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return d
		}
		select {
		case <-d.ended:
			s.t.Fatalf("abaca ended at once:\n%s", d.log)
		case <-ctx.Done():
			s.t.Fatalf("abaca does not answer: %v\n%s", err, d.log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// connect is a client of whatever serves a socket.
func (s *site) connect(socket string) *driver {
	s.t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return &driver{site: s, socket: socket, conn: conn,
		IdentityClient: csi.NewIdentityClient(conn), ControllerClient: csi.NewControllerClient(conn), NodeClient: csi.NewNodeClient(conn)}
}

// stop ends the driver and waits until it is gone.
func (d *driver) stop(sig syscall.Signal) {
	_ = d.cmd.Process.Signal(sig)
	select {
	case <-d.ended:
	case <-time.After(30 * time.Second):
		_ = d.cmd.Process.Kill()
		<-d.ended
		d.site.t.Errorf("abaca did not end within 30 s of %v\n%s", sig, d.log)
	}
}

// logFile is what a driver and its movers write, which is no pipe: that would not be
// at its end before the last mover, and neither would the wait for a driver.
type logFile string

// String returns the end of it.
func (f logFile) String() string {
	b, err := os.ReadFile(string(f))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-64<<10):])
}

// What follows are requests in the words of the tests.

var (
	writers = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	readers = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
)

func capability(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}}
}

func volumeRequest(name string, mode csi.VolumeCapability_AccessMode_Mode) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{capability(mode)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * mib}}
}

func fromSnapshot(req *csi.CreateVolumeRequest, id string) *csi.CreateVolumeRequest {
	req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
	return req
}

func fromVolume(req *csi.CreateVolumeRequest, id string) *csi.CreateVolumeRequest {
	req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
	return req
}

func snapshotRequest(name, volume string) *csi.CreateSnapshotRequest {
	return &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume}
}

func backupRequest(name, volume string) *csi.CreateSnapshotRequest {
	return &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume,
		Parameters: map[string]string{"type": "backup", "repository": "offsite"}}
}

func (d *driver) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	d.site.t.Cleanup(cancel)
	return ctx
}

// retryable says whether an orchestrator would call again.
func retryable(err error) bool {
	switch status.Code(err) {
	case codes.Aborted, codes.Unavailable, codes.DeadlineExceeded:
		return true
	}
	return false
}

// volume creates a volume, calling again while it is pending.
func (d *driver) volume(req *csi.CreateVolumeRequest) *csi.Volume {
	d.site.t.Helper()
	v, err := d.tryVolume(req)
	if err != nil {
		d.site.t.Fatalf("create volume %q: %v", req.GetName(), err)
	}
	return v
}

func (d *driver) tryVolume(req *csi.CreateVolumeRequest) (*csi.Volume, error) {
	ctx := d.ctx()
	for {
		resp, err := d.CreateVolume(ctx, req)
		if err == nil {
			return resp.GetVolume(), nil
		}
		if !retryable(err) || ctx.Err() != nil {
			return nil, err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// snapshot makes a snapshot or backup, calling again until it is ready.
func (d *driver) snapshot(req *csi.CreateSnapshotRequest) *csi.Snapshot {
	d.site.t.Helper()
	s, err := d.trySnapshot(req)
	if err != nil {
		d.site.t.Fatalf("create snapshot %q: %v", req.GetName(), err)
	}
	return s
}

func (d *driver) trySnapshot(req *csi.CreateSnapshotRequest) (*csi.Snapshot, error) {
	ctx := d.ctx()
	for {
		resp, err := d.CreateSnapshot(ctx, req)
		if err == nil && resp.GetSnapshot().GetReadyToUse() {
			return resp.GetSnapshot(), nil
		}
		if err != nil && (!retryable(err) || ctx.Err() != nil) {
			return nil, err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// deleteSnapshot deletes a snapshot or backup, calling again while it is locked.
func (d *driver) deleteSnapshot(id string) {
	d.site.t.Helper()
	ctx := d.ctx()
	for {
		_, err := d.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
		if err == nil {
			return
		}
		if !retryable(err) || ctx.Err() != nil {
			d.site.t.Fatalf("delete snapshot %s: %v", id, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (d *driver) deleteVolume(id string) {
	d.site.t.Helper()
	if _, err := d.DeleteVolume(d.ctx(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
		d.site.t.Fatalf("delete volume %s: %v", id, err)
	}
}

// publish stages and publishes a volume, and returns where.
func (d *driver) publish(v *csi.Volume, mode csi.VolumeCapability_AccessMode_Mode) string {
	d.site.t.Helper()
	name := strings.NewReplacer("/", "_", "#", "_").Replace(v.GetVolumeId())
	staging, target := d.site.path("node", name, "staging"), d.site.path("node", name, "target")
	if err := os.MkdirAll(staging, 0o755); err != nil {
		d.site.t.Fatal(err)
	}
	published, err := d.ControllerPublishVolume(d.ctx(), &csi.ControllerPublishVolumeRequest{VolumeId: v.GetVolumeId(), NodeId: nodeID + ",", VolumeCapability: capability(mode)})
	if err != nil {
		d.site.t.Fatalf("publish to the node: %v", err)
	}
	if _, err := d.NodeStageVolume(d.ctx(), &csi.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging,
		VolumeCapability: capability(mode), VolumeContext: v.GetVolumeContext(), PublishContext: published.GetPublishContext()}); err != nil {
		d.site.t.Fatalf("stage: %v", err)
	}
	if _, err := d.NodePublishVolume(d.ctx(), &csi.NodePublishVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: staging,
		TargetPath: target, VolumeCapability: capability(mode), VolumeContext: v.GetVolumeContext()}); err != nil {
		d.site.t.Fatalf("publish: %v", err)
	}
	return target
}

func (d *driver) unpublish(v *csi.Volume) {
	d.site.t.Helper()
	name := strings.NewReplacer("/", "_", "#", "_").Replace(v.GetVolumeId())
	if _, err := d.NodeUnpublishVolume(d.ctx(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.GetVolumeId(), TargetPath: d.site.path("node", name, "target")}); err != nil {
		d.site.t.Fatalf("unpublish: %v", err)
	}
	if _, err := d.NodeUnstageVolume(d.ctx(), &csi.NodeUnstageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: d.site.path("node", name, "staging")}); err != nil {
		d.site.t.Fatalf("unstage: %v", err)
	}
	if _, err := d.ControllerUnpublishVolume(d.ctx(), &csi.ControllerUnpublishVolumeRequest{VolumeId: v.GetVolumeId(), NodeId: nodeID + ","}); err != nil {
		d.site.t.Fatalf("unpublish from the node: %v", err)
	}
}

// wantCode checks the code of an error, and that its text is for people.
func wantCode(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("code %v, want %v: %v", status.Code(err), code, err)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not speak of %q: %v", w, err)
		}
	}
}

// put writes a file below a published volume.
func put(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, dir, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
