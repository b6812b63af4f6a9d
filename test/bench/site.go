package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/backend/local"
	"github.com/abaca-csi/abaca/pkg/backup/inprocess"
	"github.com/abaca-csi/abaca/pkg/mount"
)

const (
	nodeID   = "bench"
	password = "correct horse"
)

// site is a directory with all that a run has, and the driver that works in it.
type site struct {
	dir     string
	size    int64              // of the btrfs image, which is sparse
	cloud   cloudOptions       // where shares are, if it has a file
	*plugin                    // once it is started
	volumes map[string]*volume // those that are mounted, by handle
	web     string             // where the driver tells its status
}

// newSite makes a site with copies of the programs, so that a build that goes
// on beside the run does not change what is measured.
func newSite(ctx context.Context, bin string, size int64, cloud cloudOptions) (*site, error) {
	dir, err := os.MkdirTemp("", "abaca-bench-")
	if err != nil {
		return nil, err
	}
	s := &site{dir: dir, size: size, cloud: cloud, volumes: map[string]*volume{}}
	for _, d := range []string{"repositories", "bin"} {
		err = errors.Join(err, os.Mkdir(s.path(d), 0o700))
	}
	for _, p := range []string{"abaca", "restic"} {
		if err == nil {
			err = copyProgram(filepath.Join(bin, p), s.path("bin", p))
		}
	}
	if err == nil {
		err = noRace(s.path("bin", "abaca"))
	}
	if err == nil {
		config := fmt.Sprintf("backends:\n- name: local\n  local: {path: %q, size: %d}\n", s.path("backend"), size)
		if cloud.file != "" {
			// The name of the directory is nobody else's.
			config = fmt.Sprintf("backends:\n- name: manila\n  manila: {clouds: %q, cloud: %q, instance: %q}\n", cloud.file, cloud.name, filepath.Base(dir))
		}
		err = os.WriteFile(s.path("config.yaml"), []byte(config), 0o600)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, ctx.Err()
}

func (s *site) path(elem ...string) string { return filepath.Join(append([]string{s.dir}, elem...)...) }

func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("%w: run `make build` first", err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// noRace refuses a program that is slow on purpose.
func noRace(program string) error {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return err
	}
	for _, s := range info.Settings {
		if s.Key == "-race" && s.Value == "true" {
			return errors.New("abaca is built with the race detector: run `make build`")
		}
	}
	return nil
}

// start starts the driver and waits until it serves.
func (s *site) start(ctx context.Context) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	s.web = "http://" + port
	s.plugin, err = startPlugin(ctx, s.path("csi.sock"), s.path("log"), s.path("bin", "abaca"), "standalone", "--endpoint", "unix://"+s.path("csi.sock"),
		"--config", s.path("config.yaml"), "--repositories", s.path("repositories"), "--node-id", nodeID, "--http-endpoint", port, "--state-dir", s.path("state"))
	return err
}

// addRepository configures a repository.
func (s *site) addRepository(name, location string) error {
	dir := s.path("repositories", name)
	err := os.Mkdir(dir, 0o700)
	for file, text := range map[string]string{"RESTIC_REPOSITORY": location, "RESTIC_PASSWORD": password} {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file), []byte(text+"\n"), 0o600)
		}
	}
	return err
}

// settle waits until nothing that was done before is still being worked on: the
// kernel drops deleted snapshots and writes dirty pages in the background. It
// comes before everything that is measured, for both sides alike.
func (s *site) settle(ctx context.Context) error {
	if s.cloud.file != "" {
		return s.sync(s.dir)
	}
	image := s.path("backend", "mnt")
	if out, err := exec.CommandContext(ctx, "btrfs", "subvolume", "sync", image).CombinedOutput(); err != nil {
		return fmt.Errorf("btrfs subvolume sync: %w: %s", err, bytes.TrimSpace(out))
	}
	return s.sync(image, s.dir) // the image lies in the other
}

func (s *site) sync(dirs ...string) error {
	for _, dir := range dirs {
		f, err := os.Open(dir)
		if err != nil {
			return err
		}
		err = unix.Syncfs(int(f.Fd()))
		f.Close()
		if err != nil {
			return fmt.Errorf("syncfs %s: %w", dir, err)
		}
	}
	return nil
}

// clean takes down all that a run, wherever it ended, can have left.
func (s *site) clean(ctx context.Context) error {
	var errs []error
	if s.plugin != nil {
		for _, v := range s.volumes {
			errs = append(errs, s.unpublish(ctx, v))
		}
		if s.cloud.file != "" {
			errs = append(errs, s.removeAll(ctx))
		}
		errs = append(errs, s.stop())
		// Movers outlive a driver, so that the next one finds them.
		movers := &inprocess.Runner{Dir: s.path("state", "movers"), Now: time.Now}
		jobs, err := movers.Jobs(ctx)
		errs = append(errs, err)
		for _, j := range jobs {
			errs = append(errs, movers.Remove(ctx, j.Job.Task.ID))
		}
		errs = append(errs, s.detach(ctx))
	}
	left, err := mount.New().Below(s.dir)
	if errs = append(errs, err); err == nil && len(left) == 0 {
		errs = append(errs, os.RemoveAll(s.dir))
	} else {
		errs = append(errs, fmt.Errorf("still mounted: %s", strings.Join(left, ", ")))
	}
	return errors.Join(errs...)
}

// detach unmounts the image, which a driver leaves mounted by design.
func (s *site) detach(ctx context.Context) error {
	mounts := mount.New()
	left, err := mounts.Below(s.path("node"))
	for _, at := range left {
		err = errors.Join(err, mounts.Unmount(ctx, at))
	}
	if s.cloud.file != "" {
		return err
	}
	if _, serr := os.Stat(s.path("backend", "mnt")); serr != nil {
		return err // it did not come so far
	}
	b, oerr := local.Open(ctx, local.Options{Path: s.path("backend"), Size: s.size, Node: nodeID})
	if oerr != nil {
		return errors.Join(err, oerr)
	}
	// A mount namespace that somebody else has just made has our mounts too.
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		if derr := b.Detach(ctx); derr == nil || ctx.Err() != nil || time.Now().After(until) {
			return errors.Join(err, derr)
		}
	}
}

// removeAll deletes what is left in a cloud, where nothing goes with the site.
func (s *site) removeAll(ctx context.Context) error {
	snapshots, err := s.controller.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		return err
	}
	volumes, err := s.controller.ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil {
		return err
	}
	for _, v := range volumes.GetEntries() { // before the snapshots that some of them hold
		err = errors.Join(err, s.deleteVolume(ctx, &volume{id: v.GetVolume().GetVolumeId()}))
	}
	for _, e := range snapshots.GetEntries() {
		_, derr := again(ctx, func() (*csi.DeleteSnapshotResponse, error) {
			return s.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: e.GetSnapshot().GetSnapshotId()})
		})
		err = errors.Join(err, derr)
	}
	return err
}

// machine describes where the figures come from.
func machine() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	var info unix.Sysinfo_t
	_ = unix.Sysinfo(&info)
	return fmt.Sprintf("%d cores (%s), %d GiB of memory, Linux %s, %s", runtime.NumCPU(), runtime.GOARCH,
		(uint64(info.Totalram)*uint64(info.Unit)+1<<29)>>30, unix.ByteSliceToString(u.Release[:]), runtime.Version())
}
