package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/test/cloud"
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
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := cloud.Await(ctx, file, name, instance, "0 shares, 0 snapshots, 0 rules"); err != nil {
			t.Error(err)
		}
		if left, _ := os.ReadDir(s.path("state", "keys")); len(left) > 0 {
			t.Errorf("left in the key store: %v", left)
		}
	})
	return s, s.start("--state-dir", s.path("state"))
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
