package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
)

// The tests here run on a real Manila, whose default share type must be CephFS,
// with real mounts: `make e2e-manila`.

// realCloud is a site whose driver works on it. When the test ends, nothing must
// be left there.
func realCloud(t *testing.T) (*site, *driver) {
	t.Helper()
	file, name := os.Getenv("ABACA_MANILA_CLOUDS"), os.Getenv("ABACA_MANILA_CLOUD")
	if file == "" {
		t.Skip("needs a Manila: ABACA_MANILA_CLOUDS and ABACA_MANILA_CLOUD name it")
	}
	s := newSite(t)
	instance := filepath.Base(s.dir)
	s.write("config.yaml", fmt.Sprintf("backends:\n- name: manila\n  manila: {clouds: %q, cloud: %q, instance: %q}\n", file, name, instance))
	t.Cleanup(func() {
		for _, kind := range []string{"shares", "snapshots"} {
			if left, err := count(file, name, kind, instance); err != nil || left > 0 {
				t.Errorf("left in the cloud: %d %s, %v", left, kind, err)
			}
		}
		if left, _ := os.ReadDir(s.path("state", "keys")); len(left) > 0 {
			t.Errorf("left in the key store: %v", left)
		}
	})
	return s, s.start("--state-dir", s.path("state"))
}

// count asks the cloud itself what there is of a driver's. What is being deleted
// gets some time for it.
func count(file, name, kind, instance string) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	auth, endpoint, tls, err := clouds.Parse(clouds.WithCloudName(name), clouds.WithLocations(file))
	if err != nil {
		return 0, err
	}
	provider, err := config.NewProviderClient(ctx, auth, config.WithTLSConfig(tls))
	if err != nil {
		return 0, err
	}
	client, err := openstack.NewSharedFileSystemV2(provider, endpoint)
	if err != nil {
		return 0, err
	}
	client.Microversion = "2.73"
	q := url.Values{"metadata": {"{'abaca.instance': '" + instance + "'}"}}
	for {
		var raw json.RawMessage
		if _, err := client.Request(ctx, http.MethodGet, client.ServiceURL(kind, "detail")+"?"+q.Encode(), &gophercloud.RequestOpts{JSONResponse: &raw}); err != nil {
			return 0, err
		}
		var answer map[string][]struct{ Status string }
		if err := json.Unmarshal(raw, &answer); err != nil {
			return 0, err
		}
		going := 0
		for _, o := range answer[kind] {
			if o.Status == "deleting" {
				going++
			}
		}
		if going == 0 || ctx.Err() != nil {
			return len(answer[kind]), nil
		}
		time.Sleep(time.Second)
	}
}

func TestRealSanity(t *testing.T) {
	s, d := realCloud(t)
	s.sanity("", "snapshot", d.socket, 1<<30)
}

func TestRealMainJob(t *testing.T) {
	_, d := realCloud(t)
	d.mainJob()
}

func TestRealMany(t *testing.T) {
	_, d := realCloud(t)
	d.many(howMany(t, 16))
}
