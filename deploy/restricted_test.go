package deploy

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"

	"github.com/abaca-csi/abaca/test/fakemanila"
)

// TestRestrictedController: with what the chart leaves to a controller of Manila, it
// makes and deletes shares and reads repositories. That it removes locks with that is
// TestUnlockHost in pkg/restic.
func TestRestrictedController(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to give it up")
	}
	const manila = "backends: [{name: m, manila: {cloud: fake, cloudsSecret: s, instance: i}}]\n"
	for values, capability := range map[string]string{manila: "", manila + "repositories: [{name: r, secretName: s}]": "SYS_ADMIN"} {
		all := render(t, values)
		c := pod(all)["controller"].Spec.Containers[0]
		s := c.SecurityContext
		added := ""
		for _, a := range s.Capabilities.Add {
			added += string(a)
		}
		if added != capability || s.Privileged != nil || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || fmt.Sprint(s.Capabilities.Drop) != "[ALL]" ||
			s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s: %+v", values, s)
		}

		cloud := fakemanila.New(fakemanila.Options{})
		t.Cleanup(cloud.Close)
		dir := t.TempDir()
		at := func(path string) string { return filepath.Join(dir, path) }
		write := func(path, text string) {
			if err := os.MkdirAll(filepath.Dir(at(path)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(at(path), []byte(text), 0o400); err != nil {
				t.Fatal(err)
			}
		}
		write("clouds.yaml", cloud.Clouds())
		write("config.yaml", strings.ReplaceAll(of[*corev1.ConfigMap](all)[0].Data["config.yaml"], "/etc/abaca/clouds/m/clouds.yaml", at("clouds.yaml")))
		write("repositories/r/RESTIC_REPOSITORY", at("repository"))
		write("repositories/r/RESTIC_PASSWORD", "x")
		write("tmp/x", "")
		restic, err := filepath.Abs("../bin/restic")
		if err != nil {
			t.Fatal(err)
		}
		init := exec.Command(restic, "init", "--no-cache")
		init.Env = []string{"RESTIC_REPOSITORY=" + at("repository"), "RESTIC_PASSWORD=x"}
		if out, err := init.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}

		// As a container would: the root is read-only, and the volumes are not.
		args := []string{"--mount", "sh", "-ec", `mount --bind "$0" "$0"; mount -o remount,bind,ro /; exec "$@"`, dir,
			"setpriv", "--no-new-privs", "--bounding-set=" + strings.TrimSuffix("-all,+"+strings.ToLower(added), ",+"), build(t)}
		for _, arg := range c.Args {
			flag, _, _ := strings.Cut(arg, "=")
			switch flag {
			case "--keys", "--movers", "--events": // these need a cluster
				continue
			case "--endpoint":
				arg = flag + "=unix://" + at("csi.sock")
			case "--config":
				arg = flag + "=" + at("config.yaml")
			case "--node-id":
				arg = flag + "=n1"
			case "--state-dir":
				arg = flag + "=" + at("state")
			case "--repositories":
				arg = flag + "=" + at("repositories")
			case "--http-endpoint":
				arg = flag + "=127.0.0.1:0"
			}
			args = append(args, arg)
		}
		if capability != "" {
			args = append(args, "--restic="+restic)
		}
		controller := exec.Command("unshare", args...)
		controller.Env = append(os.Environ(), "TMPDIR="+at("tmp"))
		var log strings.Builder
		controller.Stdout, controller.Stderr = &log, &log
		if err := controller.Start(); err != nil {
			t.Fatal(err)
		}
		works := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			conn, err := grpc.NewClient("unix://"+at("csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				return err
			}
			defer conn.Close()
			driver := csipb.NewControllerClient(conn)
			volume, err := driver.CreateVolume(ctx, &csipb.CreateVolumeRequest{Name: "data", CapacityRange: &csipb.CapacityRange{RequiredBytes: 1 << 30},
				Parameters: of[*storagev1.StorageClass](all)[0].Parameters, VolumeCapabilities: []*csipb.VolumeCapability{{
					AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{}},
					AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER}}}}, grpc.WaitForReady(true))
			if err != nil {
				return err
			}
			if capability != "" { // or there are no backups
				if _, err := driver.ListSnapshots(ctx, &csipb.ListSnapshotsRequest{}); err != nil {
					return err
				}
			}
			_, err = driver.DeleteVolume(ctx, &csipb.DeleteVolumeRequest{VolumeId: volume.GetVolume().GetVolumeId()})
			return err
		}()
		if works != nil {
			t.Errorf("%s: %v", values, works)
		}
		_ = controller.Process.Signal(os.Interrupt)
		if err := controller.Wait(); err != nil || works != nil {
			t.Errorf("%v\n%s", err, log.String())
		}
	}
}
