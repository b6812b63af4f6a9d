// Registrar stands in for two programs that go with every CSI driver and that
// the Go module proxy does not serve: node-driver-registrar and livenessprobe.
// It is also the pause program of a pod. The first argument says which:
//
//	registrar register  makes the driver known to the kubelet
//	registrar probe     answers /healthz by the driver's Probe
//	registrar pause     waits to be ended
//
// The flags are those of the real ones, as far as a chart sets them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	commands := map[string]func(context.Context, []string) error{
		"register": register,
		"probe":    probe,
		"pause":    func(ctx context.Context, _ []string) error { <-ctx.Done(); return nil },
	}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		log.Fatal("usage: registrar register|probe|pause [flags]")
	}
	if err := commands[os.Args[1]](ctx, os.Args[2:]); err != nil {
		log.Fatal(err)
	}
}

// flags has what both have in common.
func flags(name string) (f *flag.FlagSet, address *string, timeout *time.Duration) {
	f = flag.NewFlagSet(name, flag.ExitOnError)
	address = f.String("csi-address", "/run/csi/socket", "the `socket` of the driver")
	f.Int("v", 0, "ignored")
	f.String("http-endpoint", "", "`address` of /healthz; without one, register serves none")
	return f, address, f.Duration(map[string]string{"register": "timeout", "probe": "probe-timeout"}[name], time.Second, "of a call of the driver")
}

// register serves the kubelet's registration API until the kubelet says no.
func register(ctx context.Context, args []string) error {
	f, address, timeout := flags("register")
	path := f.String("kubelet-registration-path", "", "the `socket` of the driver, as the kubelet sees it")
	dir := f.String("plugin-registration-path", "/registration", "the `directory` that the kubelet watches")
	f.Parse(args)
	conn, err := dial(*address)
	if err != nil {
		return err
	}
	info := &csi.GetPluginInfoResponse{}
	for info.Name == "" {
		call, cancel := context.WithTimeout(ctx, *timeout)
		got, err := csi.NewIdentityClient(conn).GetPluginInfo(call, &csi.GetPluginInfoRequest{})
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			info = got
		default:
			log.Print("driver: ", err)
			time.Sleep(time.Second)
		}
	}

	socket := filepath.Join(*dir, info.Name+"-reg.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	s := &registrar{
		info:    &registration.PluginInfo{Type: registration.CSIPlugin, Name: info.Name, Endpoint: *path, SupportedVersions: []string{"1.0.0"}},
		refused: make(chan error, 1),
	}
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, s)
	go server.Serve(l)
	defer server.Stop() // removes the socket
	if endpoint := f.Lookup("http-endpoint").Value.String(); endpoint != "" {
		go func() { s.refused <- http.ListenAndServe(endpoint, ok{}) }()
	}
	log.Printf("%s is offered at %s", info.Name, socket)
	select {
	case err := <-s.refused:
		return err
	case <-ctx.Done():
		return nil
	}
}

// registrar is what the kubelet asks.
type registrar struct {
	registration.UnimplementedRegistrationServer
	info    *registration.PluginInfo
	refused chan error
}

func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return r.info, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if s.PluginRegistered {
		log.Printf("the kubelet has registered %s", r.info.Name)
	} else {
		r.refused <- fmt.Errorf("the kubelet does not register %s: %s", r.info.Name, s.Error)
	}
	return &registration.RegistrationStatusResponse{}, nil
}

// ok answers that all is well.
type ok struct{}

func (ok) ServeHTTP(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }

// probe serves /healthz.
func probe(ctx context.Context, args []string) error {
	f, address, timeout := flags("probe")
	port := f.Int("health-port", 9808, "of /healthz, where no http-endpoint is given")
	f.Parse(args)
	conn, err := dial(*address)
	if err != nil {
		return err
	}
	endpoint := f.Lookup("http-endpoint").Value.String()
	if endpoint == "" {
		endpoint = fmt.Sprintf(":%d", *port)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		call, cancel := context.WithTimeout(r.Context(), *timeout)
		defer cancel()
		got, err := csi.NewIdentityClient(conn).Probe(call, &csi.ProbeRequest{})
		if err == nil && got.Ready != nil && !got.Ready.Value {
			err = errors.New("the driver is not ready")
		}
		if err != nil {
			log.Print("probe: ", err)
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		ok{}.ServeHTTP(w, r)
	})
	server := &http.Server{Addr: endpoint, Handler: mux}
	context.AfterFunc(ctx, func() { server.Close() })
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// dial does not wait for the driver: the calls do not either.
func dial(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
}
