package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"google.golang.org/grpc"
)

// rivalModule is manila-csi; it is built as its authors build it.
const rivalModule, rivalVersion = "k8s.io/cloud-provider-openstack", "v1.36.0"

// cloud is the Manila that the drivers work on, which they reach by way of
// proxies that count.
type cloud struct {
	o       cloudOptions
	auth    gophercloud.AuthOptions
	region  string
	client  *gophercloud.ServiceClient // past the proxies
	every   time.Duration
	proxies *proxies
}

// dialCloud signs in and sets the proxies up.
func dialCloud(ctx context.Context, o cloudOptions, every time.Duration) (*cloud, error) {
	auth, endpoint, tls, err := clouds.Parse(clouds.WithCloudName(o.name), clouds.WithLocations(o.file))
	if err != nil {
		return nil, err
	}
	if auth.Password == "" {
		return nil, errors.New("the comparison needs a cloud with a user name and a password")
	}
	auth.AllowReauth = true
	provider, err := config.NewProviderClient(ctx, auth, config.WithTLSConfig(tls))
	if err != nil {
		return nil, err
	}
	c := &cloud{o: o, auth: auth, region: endpoint.Region, every: every}
	if c.client, err = openstack.NewSharedFileSystemV2(provider, endpoint); err != nil {
		return nil, err
	}
	c.client.Microversion = "2.65"
	c.proxies, err = newProxies(auth.IdentityEndpoint, c.client.Endpoint)
	return c, err
}

func (c *cloud) close() { c.proxies.close() }

func (c *cloud) do(ctx context.Context, method, path string, body, into any) error {
	var raw json.RawMessage
	o := &gophercloud.RequestOpts{JSONBody: body, OkCodes: []int{http.StatusOK, http.StatusAccepted}}
	if into != nil {
		o.JSONResponse = &raw
	}
	if _, err := c.client.Request(ctx, method, c.client.ServiceURL(path), o); err != nil || into == nil {
		return err
	}
	return json.Unmarshal(raw, into)
}

// look waits until the cloud is to be looked at again.
func (c *cloud) look(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(c.every):
		return nil
	}
}

// writeConfig writes what Abaca is configured with.
func (c *cloud) writeConfig(dir string) error {
	entry := map[string]any{"clouds": map[string]any{"bench": map[string]any{"region_name": c.region, "auth": map[string]any{
		"auth_url": c.proxies.identity, "username": c.auth.Username, "password": c.auth.Password, "project_name": c.auth.TenantName,
		"project_id": c.auth.TenantID, "user_domain_name": c.domain(), "project_domain_name": c.domain()}}}}
	text, err := json.Marshal(entry) // which is YAML
	if err != nil {
		return err
	}
	config := fmt.Sprintf("backends:\n- name: manila\n  manila: {clouds: %q, cloud: bench, instance: bench}\n", filepath.Join(dir, "clouds.yaml"))
	return errors.Join(os.WriteFile(filepath.Join(dir, "clouds.yaml"), text, 0o600), os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(config), 0o600))
}

func (c *cloud) domain() string {
	if c.auth.DomainName != "" {
		return c.auth.DomainName
	}
	return "Default"
}

func (c *cloud) abaca(dir, bin string) contender {
	return contender{name: "Abaca", ours: true, parameters: map[string]string{"type": c.o.shareType}, start: func(ctx context.Context) (*plugin, error) {
		return startPlugin(ctx, filepath.Join(dir, "abaca.sock"), filepath.Join(dir, "abaca.log"), filepath.Join(bin, "abaca"), "controller",
			"--endpoint", "unix://"+filepath.Join(dir, "abaca.sock"), "--config", filepath.Join(dir, "config.yaml"), "--node-id", "bench",
			"--state-dir", filepath.Join(dir, "state"))
	}}
}

func (c *cloud) rival(dir, program string) contender {
	secrets := map[string]string{"os-authURL": c.proxies.identity, "os-region": c.region, "os-userName": c.auth.Username, "os-password": c.auth.Password,
		"os-domainName": c.domain(), "os-projectDomainName": c.domain()}
	for name, value := range map[string]string{"os-projectName": c.auth.TenantName, "os-projectID": c.auth.TenantID} {
		if value != "" {
			secrets[name] = value
		}
	}
	socket := filepath.Join(dir, "rival.sock")
	return contender{name: "manila-csi", secrets: secrets, parameters: map[string]string{"type": c.o.shareType}, start: func(ctx context.Context) (*plugin, error) {
		partner := filepath.Join(dir, "partner.sock")
		if err := servePartner(ctx, partner); err != nil {
			return nil, err
		}
		return startPlugin(ctx, socket, filepath.Join(dir, "rival.log"), program, "--endpoint=unix://"+socket, "--share-protocol-selector=CEPHFS",
			"--fwdendpoint=unix://"+partner, "--provide-node-service=false")
	}}
}

// partner stands for the driver that manila-csi hands its mounts to. Only its
// health is asked for where nothing is mounted.
type partner struct {
	csi.UnimplementedIdentityServer
}

func (partner) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

// servePartner serves one until ctx ends, or the whole program.
func servePartner(ctx context.Context, socket string) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	csi.RegisterIdentityServer(server, partner{})
	go func() { _ = server.Serve(listener) }()
	context.AfterFunc(ctx, server.Stop)
	return nil
}

// buildRival builds manila-csi once, from its module with that module's own
// replacements, so it cannot be a dependency of ours.
func buildRival(ctx context.Context, bin string) (program string, err error) {
	if program, err = filepath.Abs(filepath.Join(bin, "manila-csi-plugin-"+rivalVersion)); err != nil {
		return "", err
	}
	if _, err := os.Stat(program); !errors.Is(err, fs.ErrNotExist) {
		return program, err
	}
	say("building manila-csi %s (about 2 CPU minutes, once)", rivalVersion)
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", rivalModule+"@"+rivalVersion)
	text, err := cmd.Output()
	var module struct{ Dir, Error string }
	if jerr := json.Unmarshal(text, &module); err != nil || jerr != nil || module.Error != "" {
		return "", fmt.Errorf("%s: %w %s", cmd, errors.Join(err, jerr), module.Error)
	}
	dir, err := os.MkdirTemp("", "manila-csi-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.CopyFS(filepath.Join(dir, "src"), os.DirFS(module.Dir)); err != nil {
		return "", err
	}
	cmd = exec.CommandContext(ctx, "go", "build", "-o", program, "./cmd/manila-csi-plugin")
	cmd.Dir = filepath.Join(dir, "src")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", cmd, err, bytes.TrimSpace(out))
	}
	return program, nil
}

// proxies stand before Keystone and Manila and count what is asked.
type proxies struct {
	identity         string // where Keystone is
	servers          []*httptest.Server
	manila, keystone atomic.Int64
}

// newProxies makes a proxy for each of two URLs, or one if they are of one host.
// In what the cloud answers, its own addresses become the proxies'.
func newProxies(identity, manila string) (*proxies, error) {
	p := &proxies{}
	var replace []string
	at := map[string]string{}
	for _, text := range []string{identity, manila} {
		u, err := url.Parse(text)
		if err != nil {
			return nil, err
		}
		base := u.Scheme + "://" + u.Host
		if at[base] != "" {
			continue
		}
		server := httptest.NewUnstartedServer(nil)
		server.Config.Handler = &httputil.ReverseProxy{
			Rewrite: func(r *httputil.ProxyRequest) {
				r.SetURL(&url.URL{Scheme: u.Scheme, Host: u.Host})
				r.Out.Header.Del("Accept-Encoding")
				if strings.HasPrefix(r.In.URL.Path, "/v3") || text == identity && base != "" && !strings.HasPrefix(r.In.URL.Path, "/v2") {
					p.keystone.Add(1)
				} else {
					p.manila.Add(1)
				}
			},
			ErrorLog: log.New(io.Discard, "", 0), // a call that ends at its limit
			ModifyResponse: func(r *http.Response) error {
				body, err := io.ReadAll(r.Body)
				if err != nil {
					return err
				}
				body = []byte(strings.NewReplacer(replace...).Replace(string(body)))
				r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
				r.Header.Set("Content-Length", fmt.Sprint(len(body)))
				return nil
			},
		}
		server.Start()
		p.servers = append(p.servers, server)
		at[base] = server.URL
		replace = append(replace, base, server.URL)
		if text == identity {
			p.identity = server.URL + strings.TrimSuffix(u.Path, "/")
		}
	}
	return p, nil
}

func (p *proxies) reset() { p.manila.Store(0); p.keystone.Store(0) }

func (p *proxies) counts() (manila, keystone int) {
	return int(p.manila.Load()), int(p.keystone.Load())
}

func (p *proxies) close() {
	for _, s := range p.servers {
		s.Close()
	}
}
