package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/abaca-csi/abaca/pkg/backend/local"
	"github.com/abaca-csi/abaca/pkg/backup/inprocess"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/restic"
)

const (
	demoWriter = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	demoReader = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	// demoPoll is how often an unfinished call is repeated and progress shown.
	demoPoll = 250 * time.Millisecond
)

// demoServer is abaca standalone as a child process, and connections to it.
type demoServer struct {
	cmd        *exec.Cmd
	ready      bool          // it has answered
	ended      chan struct{} // closed when the process has ended
	err        error         // how, once ended is closed
	conn       *grpc.ClientConn
	identity   csi.IdentityClient
	controller csi.ControllerClient
	node       csi.NodeClient
	status     string // the URL of the status report
}

type demoVolume struct {
	id              string
	size            int64
	context         map[string]string
	mode            csi.VolumeCapability_AccessMode_Mode
	staging, target string
}

type demoSnapshot struct {
	id    string
	ready bool
}

// demoSummary is restic's own account of a backup.
type demoSummary struct{ restic.BackupSummary }

func (s demoSummary) numbers() map[string]int64 {
	return map[string]int64{
		"filesNew": s.FilesNew, "filesChanged": s.FilesChanged, "filesUnmodified": s.FilesUnmodified,
		"bytes": s.TotalBytes, "bytesAdded": s.DataAdded, "bytesStored": s.DataAddedPacked,
	}
}

func (d *demo) startServer(ctx context.Context) (*demoServer, error) {
	socket := filepath.Join(d.work, "csi.sock")
	if len(socket) > 107 { // unix(7), sun_path
		return nil, fmt.Errorf("%s is too long for a socket: name a shorter place with --dir", socket)
	}
	if err := d.writeRepository(); err != nil {
		return nil, err
	}
	config := filepath.Join(d.work, "config.yaml")
	text := fmt.Sprintf("backends:\n- name: local\n  local:\n    path: %q\n    size: %d\n", d.backendDir(), d.imageSize)
	if d.clouds != "" {
		// An instance of its own: whatever it lists is the demonstration's.
		clouds, err := filepath.Abs(d.clouds)
		if err != nil {
			return nil, err
		}
		text = fmt.Sprintf("backends:\n- name: manila\n  manila:\n    clouds: %q\n    cloud: %q\n    instance: demo-%s\n", clouds, d.cloud, strings.ToLower(rand.Text()[:8]))
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	web, err := freePort()
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	log, err := os.Create(d.logFile())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// Not CommandContext: an interruption is followed by calls that clean up.
	cmd := exec.Command(self, "standalone", "--endpoint", "unix://"+socket, "--config", config,
		"--repositories", filepath.Join(d.work, "repositories"), "--node-id", "demo", "--http-endpoint", web, "--restic", d.restic,
		"--state-dir", d.stateDir())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the terminal's Ctrl-C is for the demonstration
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &demoServer{cmd: cmd, ended: make(chan struct{}), status: "http://" + web + "/status"}
	d.server = s // from here on there is something to clean up
	go func() {
		s.err = cmd.Wait()
		close(s.ended)
	}()
	if s.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, err
	}
	s.identity, s.controller, s.node = csi.NewIdentityClient(s.conn), csi.NewControllerClient(s.conn), csi.NewNodeClient(s.conn)
	return s, s.awaitReady(ctx)
}

// freePort is a port of this machine that was free a moment ago.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func (s *demoServer) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		resp, err := s.identity.Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(false))
		if err == nil && (resp.GetReady() == nil || resp.GetReady().GetValue()) {
			s.ready = true
			return nil
		}
		// The socket may not be there yet: connect at once when it is.
		s.conn.ResetConnectBackoff()
		select {
		case <-s.ended:
			return fmt.Errorf("abaca standalone has ended: %w", s.err)
		case <-ctx.Done():
			return fmt.Errorf("abaca standalone does not answer: %w", errors.Join(ctx.Err(), err))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *demoServer) describe(ctx context.Context) (string, error) {
	info, err := s.identity.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %s, restic %s", info.GetName(), info.GetVendorVersion(), restic.PinnedVersion), nil
}

func (v *demoVolume) capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: v.mode},
	}
}

// createVolume makes a volume, from a snapshot unless that is empty. An answer
// that says Aborted means that work goes on, so the call is repeated.
func (d *demo) createVolume(ctx context.Context, name string, size int64, mode csi.VolumeCapability_AccessMode_Mode, snapshot string) (*demoVolume, error) {
	v := &demoVolume{
		mode:    mode,
		staging: filepath.Join(d.work, "node", "staging", name),
		target:  filepath.Join(d.work, "node", "target", name),
	}
	req := &csi.CreateVolumeRequest{
		Name:               name,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{v.capability()},
	}
	if d.shareType != "" {
		req.Parameters = map[string]string{"type": d.shareType}
	}
	if snapshot != "" {
		req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot},
		}}
	}
	resp, err := repeat(ctx, d, func() (*csi.CreateVolumeResponse, error) {
		resp, err := d.server.controller.CreateVolume(ctx, req)
		if status.Code(err) == codes.Aborted {
			d.out.waiting(status.Convert(err).Message())
		}
		return resp, err
	})
	if err != nil {
		return nil, err
	}
	v.id, v.size, v.context = resp.GetVolume().GetVolumeId(), resp.GetVolume().GetCapacityBytes(), resp.GetVolume().GetVolumeContext()
	return v, nil
}

// repeat calls until the answer is not Aborted.
func repeat[R any](ctx context.Context, d *demo, call func() (R, error)) (R, error) {
	for {
		resp, err := call()
		if status.Code(err) != codes.Aborted {
			return resp, plainError(err)
		}
		if err := d.pause(ctx); err != nil {
			return resp, err
		}
	}
}

// pause waits a moment, unless the server or the demonstration ends.
func (d *demo) pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-d.server.ended:
		return fmt.Errorf("abaca standalone has ended: %w", d.server.err)
	case <-time.After(demoPoll):
		return nil
	}
}

// plainError is a gRPC error as a person reads it.
func plainError(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		return fmt.Errorf("%s (%s)", s.Message(), s.Code())
	}
	return err
}

// mountVolume stages and publishes a volume. A snapshot volume is published as
// if it could be written to: that it cannot is not up to the request.
func (d *demo) mountVolume(ctx context.Context, v *demoVolume) error {
	d.volumes = append(d.volumes, v) // before it is mounted
	if err := os.MkdirAll(v.staging, 0o700); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(v.target), 0o700); err != nil {
		return err
	}
	if _, err := d.server.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging, VolumeCapability: v.capability(), VolumeContext: v.context,
	}); err != nil {
		return plainError(err)
	}
	_, err := d.server.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: v.target,
		VolumeCapability: v.capability(), VolumeContext: v.context, Readonly: false,
	})
	return plainError(err)
}

func (d *demo) unmountVolume(ctx context.Context, v *demoVolume) error {
	_, err := d.server.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target})
	if err != nil {
		return plainError(err)
	}
	_, err = d.server.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
	return plainError(err)
}

func (d *demo) createSnapshot(ctx context.Context, of *demoVolume, name string, parameters map[string]string) (demoSnapshot, error) {
	resp, err := repeat(ctx, d, func() (*csi.CreateSnapshotResponse, error) {
		return d.server.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: of.id, Name: name, Parameters: parameters})
	})
	return demoSnapshot{resp.GetSnapshot().GetSnapshotId(), resp.GetSnapshot().GetReadyToUse()}, err
}

// backUp asks for a backup until it is ready.
func (d *demo) backUp(ctx context.Context, of *demoVolume, name string) (demoSnapshot, demoSummary, error) {
	defer d.watch(ctx, "backup", name)()
	for {
		s, err := d.createSnapshot(ctx, of, name, map[string]string{"type": "backup", "repository": demoRepository})
		if err != nil {
			return s, demoSummary{}, err
		}
		if s.ready {
			summary, err := d.summary(ctx, name)
			return s, summary, err
		}
		if err := d.pause(ctx); err != nil {
			return s, demoSummary{}, err
		}
	}
}

// restore asks for a volume from a backup until it is there.
func (d *demo) restore(ctx context.Context, name string, size int64, backup string) (*demoVolume, error) {
	defer d.watch(ctx, "restore", name)()
	return d.createVolume(ctx, name, size, demoWriter, backup)
}

// readStatus asks for what the movers do.
func (d *demo) readStatus(ctx context.Context) (statusReport, error) {
	var report statusReport
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.server.status, nil)
	if err != nil {
		return report, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return report, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return report, fmt.Errorf("%s: %s", d.server.status, resp.Status)
	}
	return report, json.NewDecoder(resp.Body).Decode(&report)
}

// watch shows the progress of a mover until the function that it returns is
// called. CSI has no call for it, so it comes from the status report.
func (d *demo) watch(ctx context.Context, kind, name string) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			report, err := d.readStatus(ctx)
			if err == nil {
				for _, m := range report.Movers {
					if m.Kind == kind && m.Name == name && m.Progress != nil {
						d.out.progress(*m.Progress)
					}
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(demoPoll):
			}
		}
	}()
	return func() {
		cancel()
		<-done
		d.out.clear()
	}
}

// summary is what restic said of a backup that has ended.
func (d *demo) summary(ctx context.Context, name string) (demoSummary, error) {
	report, err := d.readStatus(ctx)
	if err != nil {
		return demoSummary{}, err
	}
	for _, m := range append(report.Finished, report.Movers...) {
		if m.Kind == "backup" && m.Name == name && m.Backup != nil {
			return demoSummary{*m.Backup}, nil
		}
	}
	return demoSummary{}, fmt.Errorf("the status report does not have the backup %q", name)
}

// plainRestic shows the repository without any help of Abaca, and has all of it
// read back.
func (d *demo) plainRestic(ctx context.Context, backups ...demoSnapshot) (string, error) {
	out, err := d.runRestic(ctx, "snapshots", "--compact")
	if err != nil {
		return "", err
	}
	d.out.note(strings.TrimSpace(string(out)))
	if out, err = d.runRestic(ctx, "snapshots", "--json"); err != nil {
		return "", err
	}
	var found []struct{ ID string }
	if err := json.Unmarshal(out, &found); err != nil {
		return "", fmt.Errorf("read restic's list: %w", err)
	}
	if len(found) != len(backups) {
		return "", fmt.Errorf("restic lists %d snapshots, not %d", len(found), len(backups))
	}
	if _, err := d.runRestic(ctx, "check", "--read-data"); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d snapshots listed; every byte read and checked", len(found)), nil
}

func (d *demo) runRestic(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, d.restic, append([]string{"--no-cache"}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "RESTIC_REPOSITORY="+d.repositoryDir(), "RESTIC_PASSWORD_FILE="+d.passwordFile(), "RESTIC_PROGRESS_FPS=0.01")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // restic then removes its lock
	cmd.WaitDelay = 10 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("restic %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// serverLog is the end of the server's log.
func (d *demo) serverLog() string {
	b, err := os.ReadFile(d.logFile())
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}

func (d *demo) backendDir() string { return filepath.Join(d.work, "backend") }
func (d *demo) stateDir() string   { return filepath.Join(d.work, "state") }
func (d *demo) logFile() string    { return filepath.Join(d.work, "standalone.log") }

// cleanUp takes down all that a run, at whatever point it ended, can have left:
// first by CSI, as an orchestrator would, then what is the demonstration's own.
// It goes on after an error, and at last looks whether something is left.
func (d *demo) cleanUp(ctx context.Context, s *demoStep) error {
	var errs []error
	if d.server != nil {
		if d.server.running() && d.server.ready {
			for _, v := range d.volumes {
				errs = append(errs, d.unmountVolume(ctx, v))
			}
			errs = append(errs, d.deleteAll(ctx))
		}
		errs = append(errs, d.server.stop(ctx))
		// Movers outlive a controller, so that the next one finds them. Here
		// there is no next one.
		errs = append(errs, d.stopMovers(ctx), d.unmountRest(ctx), d.detach(ctx))
	}
	errs = append(errs, d.nothingLeft())
	if err := errors.Join(errs...); err != nil {
		return err // the directory stays: something may still be mounted below it
	}
	s.Result = "nothing is mounted, no loop device is left"
	return d.removeWork()
}

// deleteAll deletes every volume and snapshot that the server lists: all are
// the demonstration's, also those whose answer it did not wait for. With --keep
// the finished backups stay.
func (d *demo) deleteAll(ctx context.Context) error {
	var errs []error
	for token := ""; ; {
		resp, err := d.server.controller.ListVolumes(ctx, &csi.ListVolumesRequest{StartingToken: token})
		if err != nil {
			return errors.Join(append(errs, plainError(err))...)
		}
		for _, e := range resp.GetEntries() {
			_, err := repeat(ctx, d, func() (*csi.DeleteVolumeResponse, error) {
				return d.server.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: e.GetVolume().GetVolumeId()})
			})
			errs = append(errs, err)
		}
		if token = resp.GetNextToken(); token == "" {
			break
		}
	}
	for token := ""; ; {
		resp, err := d.server.controller.ListSnapshots(ctx, &csi.ListSnapshotsRequest{StartingToken: token})
		if err != nil {
			return errors.Join(append(errs, plainError(err))...)
		}
		for _, e := range resp.GetEntries() {
			if d.keep && e.GetSnapshot().GetReadyToUse() && strings.HasPrefix(e.GetSnapshot().GetSnapshotId(), "backup/") {
				continue
			}
			_, err := repeat(ctx, d, func() (*csi.DeleteSnapshotResponse, error) {
				return d.server.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: e.GetSnapshot().GetSnapshotId()})
			})
			errs = append(errs, err)
		}
		if token = resp.GetNextToken(); token == "" {
			break
		}
	}
	return errors.Join(errs...)
}

func (s *demoServer) running() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// stop ends the server and waits for it.
func (s *demoServer) stop(ctx context.Context) error {
	if s.conn != nil {
		s.conn.Close()
	}
	if !s.running() {
		return nil // its end is an error of the step that saw it
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.ended:
		if s.err != nil && s.ready { // else it was stopped in the middle of its start
			return fmt.Errorf("abaca standalone ended badly: %w", s.err)
		}
		return nil
	case <-time.After(30 * time.Second):
	case <-ctx.Done():
	}
	_ = s.cmd.Process.Kill()
	<-s.ended
	return errors.New("abaca standalone did not end by itself and was killed")
}

func (d *demo) stopMovers(ctx context.Context) error {
	movers := &inprocess.Runner{Dir: filepath.Join(d.stateDir(), "movers"), Now: time.Now}
	jobs, err := movers.Jobs(ctx)
	for _, job := range jobs {
		err = errors.Join(err, movers.Remove(ctx, job.Job.Task.ID))
	}
	return err
}

// unmountRest takes off what a server that has ended could not.
func (d *demo) unmountRest(ctx context.Context) error {
	m := mount.New()
	left, err := m.Below(filepath.Join(d.work, "node"))
	if err != nil {
		return err
	}
	for _, at := range left {
		err = errors.Join(err, m.Unmount(ctx, at))
	}
	return err
}

// detach unmounts the backend's image, which stays mounted by design, so that
// a restarted driver does not disturb its pods.
func (d *demo) detach(ctx context.Context) error {
	if d.clouds != "" || !exists(d.backendDir()) {
		return nil
	}
	b, err := local.Open(ctx, local.Options{Path: d.backendDir(), Size: d.imageSize, Node: "demo"})
	if err != nil {
		return err
	}
	return b.Detach(ctx)
}

// nothingLeft looks for mounts and loop devices of this run.
func (d *demo) nothingLeft() error {
	left, err := mount.New().Below(d.work)
	if err != nil {
		return err
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), d.work+"/") {
			left = append(left, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(f))))
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, ", "))
	}
	return nil
}
