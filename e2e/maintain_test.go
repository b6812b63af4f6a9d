package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TestMaintenanceBesideBackups: maintenance and backups of several volumes, all at
// once and again and again. Nothing fails, what was deleted is pruned, what is
// left is whole, and the driver tells of it.
func TestMaintenanceBesideBackups(t *testing.T) {
	s := newSite(t)
	const address = "127.0.0.1:39472"
	d := s.start("--http-endpoint", address)
	const volumes, rounds = 2, 3
	first := d.volume(volumeRequest("first", writers))
	d.snapshot(backupRequest("first", first.GetVolumeId())) // makes the repository
	var group sync.WaitGroup
	for v := range volumes {
		volume := d.volume(volumeRequest(fmt.Sprint("data", v), writers))
		dir := d.publish(volume, writers)
		defer d.unpublish(volume)
		group.Go(func() {
			for round := range rounds {
				b := make([]byte, 4*mib)
				for i := range b {
					b[i] = byte(i*i>>7 + i>>(round+v))
				}
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(round)), b, 0o644); err != nil {
					t.Error(err)
				}
				d.snapshot(backupRequest(fmt.Sprintf("b-%d-%d", v, round), volume.GetVolumeId()))
			}
		})
	}
	group.Go(func() {
		for range 3 {
			cmd := exec.Command(program, "maintain", "--repositories", s.repositories, "--repository", "offsite", "--restic", restic,
				"--cache", s.path("cache"), "--read-data-days", "1", "-o", "json")
			var stderr strings.Builder
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			var result struct {
				Steps []struct{ Step, Status, Message string }
			}
			if err == nil {
				err = json.Unmarshal(out, &result)
			}
			if err != nil {
				t.Errorf("maintain: %v: %s%s", err, out, stderr.String())
			}
			t.Logf("%+v", result.Steps)
		}
	})
	group.Wait()
	list, err := d.ListSnapshots(d.ctx(), &csi.ListSnapshotsRequest{})
	if err != nil || len(list.GetEntries()) != 1+volumes*rounds {
		t.Errorf("%d backups are listed, %v", len(list.GetEntries()), err)
	}
	for _, e := range list.GetEntries() {
		if !e.GetSnapshot().GetReadyToUse() {
			t.Errorf("%s is not ready", e.GetSnapshot().GetSnapshotId())
		}
	}
	if strings.Contains(d.log.String(), "Backup is not done") || strings.Contains(d.log.String(), "Mover starts again") {
		t.Errorf("a backup failed on the way:\n%s", d.log)
	}
	if out, err := s.restic("check", "--read-data"); err != nil {
		t.Errorf("restic check: %v\n%s", err, out)
	}
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	// The listing that was asked for above is of now, so the record is known.
	text, err := io.ReadAll(resp.Body)
	for _, line := range []string{`abaca_repository_damaged{repository="offsite"} 0`, `abaca_repository_read_ratio{repository="offsite"} 1`,
		fmt.Sprintf(`abaca_repository_backups{repository="offsite"} %d`, 1+volumes*rounds), `abaca_repository_last_prune_timestamp_seconds{repository="offsite"}`} {
		if err != nil || !strings.Contains(string(text), line) {
			t.Errorf("%v: the metrics lack %s", err, line)
		}
	}
}
