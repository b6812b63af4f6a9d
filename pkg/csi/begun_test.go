package csi

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/manila"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// noKeys is an access-key store of a driver that lets nobody in.
type noKeys struct{}

func (noKeys) Put(context.Context, string, string) error { return fmt.Errorf("no key is to be kept") }

func (noKeys) Delete(context.Context, string) error { return nil }

// onCloud has the driver work on a simulated Manila, with backups.
func (f *fixture) onCloud() *fakemanila.Server {
	f.t.Helper()
	cloud := fakemanila.New(fakemanila.Options{})
	f.t.Cleanup(cloud.Close)
	clouds := filepath.Join(f.dir, "clouds.yaml")
	if err := os.WriteFile(clouds, []byte(cloud.Clouds()), 0o600); err != nil {
		f.t.Fatal(err)
	}
	b, err := manila.Open(f.t.Context(), manila.Options{CloudsFile: clouds, Cloud: "fake", Keys: noKeys{}, Now: time.Now, Poll: 5 * time.Millisecond})
	if err != nil {
		f.t.Fatal(err)
	}
	f.driver.Backends["manila"], f.driver.DefaultBackend = b, "manila"
	f.driver.Backups, _ = newEngine(f.driver.Backends)
	return cloud
}

// TestSourceGone: the call that makes a volume is broken off, and its source goes
// before it is repeated. What was begun is finished or removed: once the answer is
// final, the cloud has nothing that no volume refers to.
func TestSourceGone(t *testing.T) {
	for _, test := range []struct {
		source string
		begun  bool   // Manila has taken the request for the share
		detail string // of the message with which it gives up what was begun
		want   codes.Code
	}{
		{"snapshot", false, "", codes.NotFound},
		{"snapshot", true, "", codes.OK},
		{"snapshot", true, "009", codes.ResourceExhausted},
		{"volume", false, "", codes.OK}, // its snapshot was cut
		{"volume", true, "", codes.OK},
		{"volume", true, "009", codes.ResourceExhausted},
		{"backup", false, "", codes.NotFound},
		{"backup", true, "", codes.FailedPrecondition},
		{"backup", true, "009", codes.ResourceExhausted},
	} {
		t.Run(fmt.Sprint(test.source, test.begun, test.detail), func(t *testing.T) {
			f, ctx := newFixture(t), t.Context()
			cloud := f.onCloud()
			volume := f.volume(create("data", writer, nil)).GetVolumeId()
			remove := func(id string) {
				t.Helper()
				var err error
				if _, perr := ParseVolume(id); perr == nil {
					_, err = f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
				} else {
					_, err = f.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
				}
				if err != nil {
					t.Errorf("delete %s: %v", id, err)
				}
			}
			source := volume
			switch test.source {
			case "snapshot":
				source = f.snapshot("cut", volume).GetSnapshotId()
			case "backup":
				source = f.saved(volume)
			}
			req := create("new", writer, contentSource(source))
			cloud.Add(fakemanila.Fault{Method: "POST", Body: `"share_proto"`, Cut: true, After: test.begun})
			_, err := f.CreateVolume(ctx, req)
			code(t, err, codes.Aborted)
			remove(source)
			if test.detail != "" {
				begun := ""
				cloud.Alter(func(objects fakemanila.Objects) {
					for id, s := range objects.Shares {
						if s.Name == "new" {
							begun, s.Status = id, "error"
						}
					}
				})
				cloud.Say(begun, test.detail, "create: there is no room.")
			}
			made, err := f.CreateVolume(ctx, req)
			for err != nil && !final(err) {
				made, err = f.CreateVolume(ctx, req)
			}
			code(t, err, test.want)
			if err == nil {
				remove(made.GetVolume().GetVolumeId())
			}
			remove(volume)
			if left := cloud.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
				t.Errorf("left in the cloud: %s", left)
			}
		})
	}
}

// saved makes a backup of a volume, and returns its handle.
func (f *fixture) saved(volume string) string {
	f.t.Helper()
	for {
		resp, err := f.CreateSnapshot(f.t.Context(), &csi.CreateSnapshotRequest{Name: "saved", SourceVolumeId: volume,
			Parameters: map[string]string{"type": "backup", "repository": "offsite"}})
		if err != nil {
			f.t.Fatal(err)
		}
		if s := resp.GetSnapshot(); s.GetReadyToUse() {
			return s.GetSnapshotId()
		}
	}
}

// begunShare is a backend on which a creation was broken off, and is out of room when
// it goes on.
type begunShare struct {
	backend.Backend
	share *backend.Share
	asked int64
}

func (b *begunShare) ShareNamed(context.Context, string) (*backend.Share, error) {
	return b.share, backend.ErrPending
}

func (b *begunShare) CreateShare(_ context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	b.asked = req.MinSize
	return nil, backend.ErrExhausted
}

// TestBegunKeepsItsSize: what was begun with the size that its source needs goes on
// with that, as it may have to be made again.
func TestBegunKeepsItsSize(t *testing.T) {
	f := newFixture(t)
	source := f.snapshot("cut", f.volume(create("data", writer, nil)).GetVolumeId()).GetSnapshotId()
	b := &begunShare{f.backend, &backend.Share{ID: "x", Name: "new", Size: 1 << 30, Role: backend.RoleUser,
		Description: map[string]string{describeSource: source}}, 0}
	f.driver.Backends["mem"] = b
	_, err := f.CreateVolume(t.Context(), create("new", writer, contentSource(source)))
	code(t, err, codes.ResourceExhausted)
	if b.asked != 1<<30 {
		t.Errorf("%d bytes are asked for", b.asked)
	}
}
