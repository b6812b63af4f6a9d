package e2e

import (
	"os"
	"os/exec"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
)

// sanityVariable hands the parts of the suite to a process of its own each,
// since Ginkgo runs once in a process.
const sanityVariable = "ABACA_E2E_SANITY"

// TestSanity runs csi-sanity over the real socket, with all interceptors on and
// real mounts: all of it with instant snapshots, and the part about snapshots
// again with backups.
func TestSanity(t *testing.T) {
	for _, part := range []struct {
		name  string
		focus string
		class string
	}{
		{"all", "", "snapshot"},
		{"backups", "Snapshot", "backup"},
	} {
		t.Run(part.name, func(t *testing.T) {
			s := newSite(t)
			d := s.start()
			args := []string{"-test.run=^TestSanitySuite$", "-test.v", "-test.timeout=10m"}
			if part.focus != "" {
				args = append(args, "-ginkgo.focus="+part.focus)
			}
			cmd := exec.Command(os.Args[0], args...)
			cmd.Env = append(os.Environ(), roleVariable+"=sanity", sanityVariable+"="+part.class,
				"ABACA_E2E_SOCKET="+d.socket, "ABACA_E2E_DIR="+s.path("sanity"))
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("csi-sanity: %v\n%s", err, out)
			} else {
				t.Logf("%s", out)
			}
		})
	}
}

// TestSanitySuite is the body of each part.
func TestSanitySuite(t *testing.T) {
	class := os.Getenv(sanityVariable)
	if class == "" {
		return // it is TestSanity that is run
	}
	dir := os.Getenv("ABACA_E2E_DIR")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := sanity.NewTestConfig()
	c.Address = "unix://" + os.Getenv("ABACA_E2E_SOCKET")
	c.TargetPath, c.StagingPath = dir+"/target", dir+"/staging"
	c.TestVolumeSize, c.TestVolumeExpandSize = 64*mib, 128*mib
	c.TestSnapshotParameters = map[string]string{"type": class}
	if class == "backup" {
		c.TestSnapshotParameters["repository"] = "offsite"
	}
	sanity.Test(t, c)
}
