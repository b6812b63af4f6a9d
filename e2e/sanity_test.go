package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
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
			s.sanity(part.focus, part.class, s.start().socket, 64*mib)
		})
	}
}

// sanity runs the suite, or the part of it in focus, against a socket.
func (s *site) sanity(focus, class, socket string, size int64) {
	s.t.Helper()
	report := s.path("sanity.json")
	args := []string{"-test.run=^TestSanitySuite$", "-test.v", "-test.timeout=10m", "-ginkgo.json-report=" + report}
	if focus != "" {
		args = append(args, "-ginkgo.focus="+focus)
	}
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), roleVariable+"=sanity", sanityVariable+"="+class,
		"ABACA_E2E_SOCKET="+socket, "ABACA_E2E_DIR="+s.path("sanity"), "ABACA_E2E_SIZE="+strconv.FormatInt(size, 10))
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Errorf("csi-sanity: %v\n%s", err, out)
	}
	checkSkips(s.t, report)
}

// notOurs are the reasons for which csi-sanity may skip: what shares do not have
// by their nature, or Abaca not yet.
var notOurs = []string{
	"Controller Publish, UnpublishVolume not supported", // no attach step
	"ControllerPublishVolume not supported",
	"ControllerPublishVolume.readonly field not supported",
	"ControllerUnpublishVolume not supported",
	"NodeExpandVolume not supported", // shares grow by the controller alone
	"Modify",                         // no mutable parameters
	"ControllerModifyVolume not supported",
	"GroupControllerService not supported",
	"VolumeGroupSnapshots not supported",
	"SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported",
	"NodeGetStorageHealth not supported",
	"testnodevolumeattachlimit not enabled", // a node has no limit
	"No MaxVolumesPerNode",
}

// checkSkips reads Ginkgo's report: nothing that Abaca could support may be
// skipped.
func checkSkips(t *testing.T, report string) {
	t.Helper()
	var suites []struct {
		SpecReports []struct {
			State, LeafNodeText string
			Failure             struct{ Message string }
		}
	}
	b, err := os.ReadFile(report)
	if err == nil {
		err = json.Unmarshal(b, &suites)
	}
	if err != nil || len(suites) != 1 {
		t.Fatalf("csi-sanity's report: %v", err)
	}
	count := map[string]int{}
	for _, spec := range suites[0].SpecReports {
		count[spec.State]++
		why := spec.Failure.Message
		if spec.State == "skipped" && why != "" && !slices.ContainsFunc(notOurs, func(s string) bool { return strings.HasPrefix(why, s) }) {
			t.Errorf("csi-sanity skipped %q: %s", spec.LeafNodeText, why)
		}
	}
	t.Logf("csi-sanity: %v", count)
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
	size, err := strconv.ParseInt(os.Getenv("ABACA_E2E_SIZE"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	c.TestVolumeSize, c.TestVolumeExpandSize = size, 2*size
	c.TestSnapshotParameters = map[string]string{"type": class}
	if class == "backup" {
		c.TestSnapshotParameters["repository"] = "offsite"
	}
	sanity.Test(t, c)
}
