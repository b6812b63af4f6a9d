package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/metrics"
	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/local"
	"github.com/abaca-csi/abaca/pkg/backend/manila"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/backup/inprocess"
	"github.com/abaca-csi/abaca/pkg/backup/kube"
	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// serveGrace is how long requests in hand may take to finish after SIGTERM. A
// mover needs none: it goes on, and the next controller finds it.
const serveGrace = 10 * time.Second

// serveOptions are the flags of controller, node and standalone.
type serveOptions struct {
	controller, node bool

	endpoint, httpEndpoint string
	metricsEndpoint        string
	config, repositories   string
	movers                 string
	events                 bool
	nodeID, zone           string
	stateDir, keys         string
	addresses              []string
	restic                 string
	anyRestic, checkRestic bool

	lacks *lacks // what the driver has asked in vain
}

func newServeCommand(name, short string, controller, node bool) *cobra.Command {
	o := serveOptions{controller: controller, node: node}
	cmd := &cobra.Command{Use: name, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		o.checkRestic = o.repositories != "" || cmd.Flags().Changed("restic")
		return o.run(cmd.Context())
	}}
	f := cmd.Flags()
	f.StringVar(&o.endpoint, "endpoint", "", "where the CSI services listen: unix:///path")
	f.StringVar(&o.httpEndpoint, "http-endpoint", "", "where /status, /metrics, /readyz and /healthz listen, such as 127.0.0.1:9090: nobody is asked who they are; empty for nowhere")
	f.StringVar(&o.metricsEndpoint, "metrics-endpoint", "", "where /metrics alone listens, such as :9091; empty for nowhere else")
	if configHelp := "the file with the backends"; controller {
		f.StringVar(&o.config, "config", "", configHelp)
		must(cmd, "config")
	} else {
		f.StringVar(&o.config, "config", "", configHelp+"; empty if all volumes are published by a controller")
	}
	f.StringVar(&o.nodeID, "node-id", "", "the name of this node")
	f.StringSliceVar(&o.addresses, "node-address", nil, "the IP `addresses` by which storage systems see this node, for those that let nodes in by address")
	f.StringVar(&o.zone, "zone", "", "the zone that this node is in, for backends that have zones; empty for none")
	f.StringVar(&o.stateDir, "state-dir", "", "where the records of staged volumes and of movers are kept (default: state below the path of the first local backend, or "+defaultState+")")
	f.StringVar(&o.keys, "keys", "", keysHelp+" (default: keys below the state directory)")
	must(cmd, "endpoint", "node-id")
	if controller {
		f.StringVar(&o.repositories, "repositories", "", "the directory with one folder for each restic repository; empty for no backups")
		f.StringVar(&o.movers, "movers", "", "where movers run: podtemplate:NAMESPACE/NAME for Jobs in the cluster that this runs in; empty for processes of this one's")
		f.BoolVar(&o.events, "events", false, "tell what becomes of backups and restores in events of VolumeSnapshots and claims, and of partial backups in an annotation, in the cluster that this runs in")
		resticFlags(f, &o.restic, &o.anyRestic)
	}
	return cmd
}

func must(cmd *cobra.Command, flags ...string) {
	for _, f := range flags {
		if err := cmd.MarkFlagRequired(f); err != nil {
			panic(err)
		}
		cmd.Flags().Lookup(f).Usage += " (required)"
	}
}

// defaultRestic is the restic beside this program, or else the one in PATH.
func defaultRestic() string {
	if self, err := os.Executable(); err == nil {
		if beside := filepath.Join(filepath.Dir(self), "restic"); exists(beside) {
			return beside
		}
	}
	return "restic"
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (o serveOptions) run(ctx context.Context) error {
	o.lacks = newLacks(time.Now)
	c := &config{}
	if o.config != "" {
		var err error
		if c, err = loadConfig(o.config); err != nil {
			return err
		}
	}
	if err := o.check(ctx); err != nil {
		return err
	}
	addresses, err := o.nodeAddresses()
	if err != nil {
		return err
	}
	if o.stateDir == "" {
		o.stateDir = defaultState
		if i := slices.IndexFunc(c.Backends, func(b backendConfig) bool { return b.Local != nil }); i >= 0 {
			o.stateDir = filepath.Join(c.Backends[i].Local.Path, "state")
		}
	}
	if o.keys == "" {
		o.keys = filepath.Join(o.stateDir, "keys")
	}
	reader, err := keyReader(o.keys, o.lacks.kubernetes)
	if err != nil {
		return err
	}
	driver := &csi.Driver{
		Version: version, Controller: o.controller, Node: o.node, NodeID: o.nodeID, Addresses: addresses, Zone: o.zone,
		Backends: map[string]backend.Backend{},
		Mounts:   mount.New(reader), Metrics: metrics.NewCSIMetricsManagerForPlugin(csi.DriverName), Now: time.Now,
	}
	calls := newCalls()
	for _, b := range c.Backends {
		opened, shut, err := o.backend(ctx, b, calls)
		if err != nil {
			return fmt.Errorf("backend %q: %w", b.Name, err)
		}
		defer shut()
		driver.Backends[b.Name], driver.DefaultBackend = opened, cmp.Or(driver.DefaultBackend, b.Name)
	}
	if driver.StagedDir, err = o.state("staged"); err != nil {
		return err
	}
	var jobs *kube.Runner
	if o.repositories != "" {
		if driver.Backups, jobs, err = o.engine(driver.Backends, backend.Node{Name: o.nodeID, Addresses: addresses}); err != nil {
			return err
		}
		if jobs != nil {
			driver.Claims = claims(jobs.Client)
			driver.Backups.Exists = claimThere(driver.Claims)
		}
	}
	news, events := &backup.News{}, (*kube.Events)(nil)
	if o.events {
		if events, driver.MarkPartial, err = o.tellers(); err != nil {
			return fmt.Errorf("--events: %w", err)
		}
		news.To = events
	}
	driver.Recorder = news
	if driver.Backups != nil {
		driver.Backups.Recorder = news
	}
	listener, err := listen(ctx, o.endpoint)
	if err != nil {
		return err
	}
	defer listener.Close()

	// What runs beside the server ends with it, whichever ends first.
	ctx, cancel := context.WithCancel(ctx)
	var beside sync.WaitGroup
	defer beside.Wait()
	defer cancel()
	if events != nil {
		beside.Go(func() { events.Run(ctx) })
	}
	if driver.Backups != nil {
		beside.Go(func() { driver.Backups.Run(ctx) })
	}
	if o.controller {
		beside.Go(func() { driver.Sweep(ctx) })
	}
	if jobs != nil {
		beside.Go(func() { jobs.Run(ctx, driver.Backups.Tick) })
	}
	all := handler(driver, calls, o.lacks)
	for _, at := range []struct {
		address string
		handler http.Handler
	}{{o.httpEndpoint, all}, {o.metricsEndpoint, metricsOf(all)}} {
		if at.address == "" {
			continue
		}
		web, err := net.Listen("tcp", at.address)
		if err != nil {
			return fmt.Errorf("http endpoint: %w", err)
		}
		server := &http.Server{Handler: at.handler, ReadHeaderTimeout: 10 * time.Second}
		beside.Go(func() { _ = server.Serve(web) })
		context.AfterFunc(ctx, func() { server.Close() })
	}
	klog.FromContext(ctx).Info("Serving", "endpoint", o.endpoint, "version", version, "node", o.nodeID, "httpEndpoint", o.httpEndpoint, "metricsEndpoint", o.metricsEndpoint)
	err = driver.Serve(ctx, listener, serveGrace)
	klog.FromContext(ctx).Info("Ended")
	return err
}

// backend opens a storage system. shut is to be called at the end.
func (o serveOptions) backend(ctx context.Context, b backendConfig, calls calls) (opened backend.Backend, shut func() error, err error) {
	if b.Manila != nil {
		opened, err = o.manila(ctx, b.Manila, o.lacks.backend(b.Name, calls.of(b.Name)))
		return opened, func() error { return nil }, err
	}
	l, err := local.Open(ctx, local.Options{Path: b.Local.Path, Size: b.Local.Size, Node: o.nodeID})
	if err != nil {
		return nil, nil, err
	}
	return l, l.Close, nil
}

// tellers write events, and that a backup is partial, on the objects of the cluster.
func (o serveOptions) tellers() (*kube.Events, func(context.Context, backup.Object) error, error) {
	config, err := clusterConfig(o.lacks.kubernetes)
	if err != nil {
		return nil, nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, nil, err
	}
	marks, err := snapshots.NewForConfig(config)
	return kube.NewEvents(client, csi.DriverName), markPartial(marks), err
}

// defaultState is where records are without a local backend.
const defaultState = "/var/lib/abaca/state"

// manila opens a cloud, with the access-key store that nodes read.
func (o serveOptions) manila(ctx context.Context, c *manilaConfig, observe func(string, int, time.Duration)) (backend.Backend, error) {
	if err := os.MkdirAll(o.stateDir, 0o700); err != nil {
		return nil, err
	}
	store, err := openKeys(o.keys, o.lacks.kubernetes)
	if err != nil {
		return nil, err
	}
	return manila.Open(ctx, manila.Options{CloudsFile: c.Clouds, Cloud: c.Cloud, Instance: c.Instance, Keys: store, Now: time.Now, Observe: observe})
}

func (o serveOptions) nodeAddresses() ([]netip.Addr, error) {
	var all []netip.Addr
	for _, text := range o.addresses {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" || a.IsUnspecified() {
			return nil, fmt.Errorf("--node-address %q is not the IP address of a node", text)
		}
		all = append(all, a)
	}
	return all, nil
}

// labelValue is what a topology segment may be (CSI spec 1.13, "Topology").
var labelValue = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?$`)

// check looks at what can be wrong before anything is made.
func (o *serveOptions) check(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("this needs root, for mounts and loop devices")
	}
	for flag, value := range map[string]string{"node-id": o.nodeID, "zone": o.zone} {
		if !labelValue.MatchString(value) && (value != "" || flag == "node-id") {
			return fmt.Errorf("--%s is %q, but must be 1 to 63 letters, digits, '.', '_' and '-' that begin and end with a letter or digit: it becomes a topology label", flag, value)
		}
	}
	if !o.checkRestic {
		return nil
	}
	var err error
	o.restic, err = findRestic(ctx, o.restic, o.anyRestic)
	return err
}

// findRestic returns the path of a restic program that is the right one.
func findRestic(ctx context.Context, name string, anyVersion bool) (string, error) {
	program, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("the restic program: %w; `make build` makes the right one, the flag --restic names another", err)
	}
	if program, err = filepath.Abs(program); err != nil || anyVersion {
		return program, err
	}
	if err := restic.CheckVersion(ctx, program); err != nil {
		return "", fmt.Errorf("%w (--any-restic-version uses it all the same)", err)
	}
	return program, nil
}

// resticFlags are those of every command that runs restic.
func resticFlags(f *pflag.FlagSet, program *string, anyVersion *bool) {
	f.StringVar(program, "restic", defaultRestic(), "the restic program")
	f.BoolVar(anyVersion, "any-restic-version", false, "use the restic program even if it is not version "+restic.PinnedVersion)
}

// repositoriesIn are those of --repositories, over the restic program.
func repositoriesIn(dir, program string) (backup.Directory, error) {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return backup.Directory{}, fmt.Errorf("--repositories %s is not a directory", dir)
	}
	return backup.Directory{Path: dir, Program: program}, nil
}

// engine sets the backups up: repositories from a directory, movers as Jobs, which
// are then returned too, or as child processes of this program.
func (o serveOptions) engine(backends map[string]backend.Backend, node backend.Node) (*backup.Engine, *kube.Runner, error) {
	repositories, err := repositoriesIn(o.repositories, o.restic)
	if err != nil {
		return nil, nil, err
	}
	if repositories.CacheDir, err = o.state("cache"); err != nil {
		return nil, nil, err
	}
	if repositories.SeenDir, err = o.state("repositories"); err != nil {
		return nil, nil, err
	}
	engine := &backup.Engine{Backends: backends, Repositories: repositories, Now: time.Now, Tick: time.Second}
	if o.movers != "" {
		jobs, err := o.jobs(repositories)
		if err != nil {
			return nil, nil, err
		}
		jobs.Made, engine.Repositories = engine.Made, jobs.Repositories
		engine.Runner, engine.Tick = jobs, 2*time.Second // each look is some requests
		return engine, jobs, nil
	}
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	movers, err := o.state("movers")
	if err != nil {
		return nil, nil, err
	}
	engine.Node = node
	engine.Runner = &inprocess.Runner{Dir: movers, Repositories: repositories, Now: time.Now, Command: []string{self, "mover"}, Keys: o.keys}
	return engine, nil, nil
}

// jobs runs movers as Jobs, of the PodTemplate that --movers names.
func (o serveOptions) jobs(administrators backup.Directory) (*kube.Runner, error) {
	text, ok := strings.CutPrefix(o.movers, "podtemplate:")
	namespace, name, also := strings.Cut(text, "/")
	if !ok || !also || namespace == "" || name == "" || strings.Contains(name, "/") {
		return nil, fmt.Errorf("--movers %s must be podtemplate:NAMESPACE/NAME, or empty", o.movers)
	}
	client, err := inCluster(o.lacks.kubernetes)
	if err != nil {
		return nil, fmt.Errorf("--movers %s: %w", o.movers, err)
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	return &kube.Runner{Client: client, Pod: os.Getenv("POD_NAME"), Host: host, Namespace: namespace, Template: name, Driver: csi.DriverName, ZoneKey: csi.ZoneKey, Handle: csi.MoverHandle,
		Repositories: kube.Repositories{Directory: administrators, Client: client, Namespace: namespace, Template: name}, Now: time.Now}, nil
}

// state makes a directory for one kind of records.
func (o serveOptions) state(name string) (string, error) {
	dir := filepath.Join(o.stateDir, name)
	return dir, os.MkdirAll(dir, 0o700)
}

// listen opens a unix socket, in the place of one that nobody serves any more.
func listen(ctx context.Context, endpoint string) (net.Listener, error) {
	path, ok := strings.CutPrefix(endpoint, "unix://")
	if !ok || !filepath.IsAbs(path) {
		return nil, fmt.Errorf("endpoint %q must be unix:// and an absolute path", endpoint)
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("endpoint %s is there and is not a socket", path)
		}
		if conn, err := new(net.Dialer).DialContext(ctx, "unix", path); err == nil {
			conn.Close()
			return nil, fmt.Errorf("endpoint %s is served by another process", path)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	mode, err := socketMode(filepath.Dir(path))
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// socketMode lets root alone connect: whoever can, can have any volume. A
// directory that hands its group on (setgid), as a pod's fsGroup makes them, was
// made for a group, and that may too.
func socketMode(dir string) (fs.FileMode, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return 0, err
	}
	if info.Mode()&fs.ModeSetgid != 0 {
		return 0o660, nil
	}
	return 0o600, nil
}
