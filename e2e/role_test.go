package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/local"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/backup/inprocess"
	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/pkg/mount"
	resticpkg "github.com/abaca-csi/abaca/pkg/restic"
)

const (
	// roleVariable makes this test program play a part in a test of another
	// process.
	roleVariable = "ABACA_E2E_ROLE"
	// killVariable says at which point a mortal controller kills itself.
	killVariable = "ABACA_E2E_KILL"
)

// mortal starts a controller and node that kills itself with SIGKILL at the
// n-th point after it was armed with its first change: a point lies before and
// after every call that changes something on the backend, in a repository, or
// among the movers. 0 is never.
func (s *site) mortal(n int) *driver {
	s.t.Helper()
	socket := s.path(fmt.Sprintf("csi-%d.sock", time.Now().UnixNano()))
	cmd := commandOf(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"=controller", killVariable+"="+strconv.Itoa(n),
		"ABACA_E2E_SOCKET="+socket, "ABACA_E2E_DIR="+s.dir, "ABACA_E2E_PROGRAM="+program, "ABACA_E2E_RESTIC="+restic)
	return s.launch(cmd, socket)
}

func play(role string) int {
	if role != "controller" {
		fmt.Fprintln(os.Stderr, "unknown role", role)
		return 2
	}
	if err := controller(); err != nil {
		fmt.Fprintln(os.Stderr, "controller:", err)
		return 1
	}
	return 0
}

// controller is `abaca standalone`, put together with points to die at.
func controller() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx = klog.NewContext(ctx, klog.Background())
	dir := os.Getenv("ABACA_E2E_DIR")
	at, err := strconv.Atoi(os.Getenv(killVariable))
	if err != nil {
		return err
	}
	var passed atomic.Int64
	point := func() {
		if passed.Add(1) == int64(at) {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // nothing may happen before it arrives
		}
	}
	opened, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "backend"), Size: imageSize, Node: nodeID})
	if err != nil {
		return err
	}
	defer opened.Close()
	state := filepath.Join(dir, "backend", "state")
	repositories := backup.Directory{Path: filepath.Join(dir, "repositories"), Program: os.Getenv("ABACA_E2E_RESTIC"), CacheDir: filepath.Join(state, "cache"), SeenDir: filepath.Join(state, "repositories")}
	for _, d := range []string{repositories.CacheDir, repositories.SeenDir, filepath.Join(state, "movers"), filepath.Join(state, "staged")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	backends := map[string]backend.Backend{"local": mortalBackend{opened, point}}
	d := &csi.Driver{
		Version: "test", Controller: true, Node: true, NodeID: nodeID, Backends: backends, DefaultBackend: "local",
		Mounts: mount.New(), StagedDir: filepath.Join(state, "staged"), Now: time.Now,
		Backups: &backup.Engine{
			Backends: backends, Repositories: mortalRepositories{repositories, point}, Now: time.Now, Tick: 100 * time.Millisecond,
			Runner: mortalRunner{&inprocess.Runner{Dir: filepath.Join(state, "movers"), Repositories: repositories, Now: time.Now,
				Command: []string{os.Getenv("ABACA_E2E_PROGRAM"), "mover"}}, point},
		},
	}
	listener, err := net.Listen("unix", os.Getenv("ABACA_E2E_SOCKET"))
	if err != nil {
		return err
	}
	go d.Backups.Run(ctx)
	return d.Serve(ctx, listener, time.Second)
}

type mortalBackend struct {
	backend.Backend
	point func()
}

func (m mortalBackend) around() func() { m.point(); return m.point }

func (m mortalBackend) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	defer m.around()()
	return m.Backend.CreateShare(ctx, req)
}

func (m mortalBackend) CommitShare(ctx context.Context, id string) error {
	defer m.around()()
	return m.Backend.CommitShare(ctx, id)
}

func (m mortalBackend) ExpandShare(ctx context.Context, id string, size int64) (*backend.Share, error) {
	defer m.around()()
	return m.Backend.ExpandShare(ctx, id, size)
}

func (m mortalBackend) DeleteShare(ctx context.Context, id string) error {
	defer m.around()()
	return m.Backend.DeleteShare(ctx, id)
}

func (m mortalBackend) CreateSnapshot(ctx context.Context, req backend.CreateSnapshotRequest) (*backend.Snapshot, error) {
	defer m.around()()
	return m.Backend.CreateSnapshot(ctx, req)
}

func (m mortalBackend) DeleteSnapshot(ctx context.Context, id string) error {
	defer m.around()()
	return m.Backend.DeleteSnapshot(ctx, id)
}

func (m mortalBackend) Export(ctx context.Context, target backend.Target, consumer string) (*backend.Export, error) {
	defer m.around()()
	return m.Backend.Export(ctx, target, consumer)
}

func (m mortalBackend) Unexport(ctx context.Context, target backend.Target, consumer string) error {
	defer m.around()()
	return m.Backend.Unexport(ctx, target, consumer)
}

type mortalRunner struct {
	backup.Runner
	point func()
}

func (m mortalRunner) around() func() { m.point(); return m.point }

func (m mortalRunner) Start(ctx context.Context, job backup.Job, may func(context.Context) error) error {
	defer m.around()()
	return m.Runner.Start(ctx, job, may)
}

func (m mortalRunner) Stop(ctx context.Context, id string) error {
	defer m.around()()
	return m.Runner.Stop(ctx, id)
}

func (m mortalRunner) Remove(ctx context.Context, id string) error {
	defer m.around()()
	return m.Runner.Remove(ctx, id)
}

type mortalRepositories struct {
	backup.Repositories
	point func()
}

func (m mortalRepositories) Open(ctx context.Context, name string) (resticpkg.Client, error) {
	c, err := m.Repositories.Open(ctx, name)
	return mortalClient{c, m.point}, err
}

type mortalClient struct {
	resticpkg.Client
	point func()
}

func (m mortalClient) Forget(ctx context.Context, wait time.Duration, ids ...string) error {
	m.point()
	defer m.point()
	return m.Client.Forget(ctx, wait, ids...)
}
