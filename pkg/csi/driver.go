package csi

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/metrics"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/busy"
	"github.com/abaca-csi/abaca/pkg/mount"
)

const (
	// DriverName is the name that a StorageClass calls its provisioner.
	DriverName = "abaca-csi.github.io"
	// TopologyKey is the label of the node that a share is bound to, where its
	// backend serves one node only.
	TopologyKey = DriverName + "/node"
	// ZoneKey is the label of the zone that a share is bound to, where its
	// backend has zones.
	ZoneKey = DriverName + "/zone"
)

// Driver serves the Identity service, and the Controller and Node services as
// it is told. Its fields are set before Register.
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer

	Version string
	// Controller and Node say which services are served.
	Controller, Node bool
	// Addresses are what storage systems see this node by, Zone the zone that it
	// is in or empty; for the Node service.
	NodeID    string // the node's name
	Addresses []netip.Addr
	Zone      string
	Backends  map[string]backend.Backend
	// DefaultBackend serves the classes that name none.
	DefaultBackend string
	// Backups may be nil: then no repository is configured.
	Backups *backup.Engine
	// Claims looks up the claim that a volume was made for; nil without Kubernetes.
	Claims func(ctx context.Context, namespace, name string) (Claim, error)
	// MarkPartial says on the object of a backup that it lacks files, before it is ready;
	// nil says so nowhere. What is gone needs no mark.
	MarkPartial func(context.Context, backup.Object) error
	// Recorder is told of requests for snapshots that fail; nil for nobody.
	Recorder backup.Recorder
	Mounts   mount.Interface
	// StagedDir is where the Node service keeps what it needs to know of the
	// volumes that are staged.
	StagedDir string
	Metrics   metrics.CSIMetricsManager
	Now       func() time.Time

	busy busy.Set
}

// Serve answers on the listener until ctx ends; then it lets the requests that
// are in hand finish for at most grace.
func (d *Driver) Serve(ctx context.Context, listener net.Listener, grace time.Duration) error {
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(d.interceptors(klog.FromContext(ctx))...))
	csi.RegisterIdentityServer(server, d)
	if d.Controller {
		csi.RegisterControllerServer(server, d)
	}
	if d.Node {
		csi.RegisterNodeServer(server, d)
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-ctx.Done():
		case <-done:
			return
		}
		hard := time.AfterFunc(grace, server.Stop)
		defer hard.Stop()
		server.GracefulStop()
	}()
	return server.Serve(listener)
}

// backend returns the backend of a class or handle; empty is the default.
func (d *Driver) backend(name string) (string, backend.Backend, error) {
	if name == "" {
		name = d.DefaultBackend
	}
	if b := d.Backends[name]; b != nil {
		return name, b, nil
	}
	return "", nil, fmt.Errorf("backend %q is not configured (known: %s)", name,
		strings.Join(slices.Sorted(maps.Keys(d.Backends)), ", "))
}

// backendOf returns the backend of an object that exists, or did. One that has
// gone from the configuration is no reason to think that the object has gone.
func (d *Driver) backendOf(name string) (backend.Backend, error) {
	_, b, err := d.backend(name)
	if err != nil {
		return nil, fmt.Errorf("%w: put it back into the configuration: %w", err, backend.ErrInUse)
	}
	return b, nil
}

// engine returns the backup engine. ErrInvalid when there is none.
func (d *Driver) engine() (*backup.Engine, error) {
	if d.Backups == nil {
		return nil, fmt.Errorf("no repositories are configured; see the flag --repositories: %w", backend.ErrInvalid)
	}
	return d.Backups, nil
}
