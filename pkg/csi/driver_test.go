package csi

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	"github.com/kubernetes-csi/csi-lib-utils/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/fault"
	"github.com/abaca-csi/abaca/pkg/backend/memory"
	"github.com/abaca-csi/abaca/pkg/mount"
)

// A fixture is a driver over the fake backend, served on a real socket with all
// interceptors on.
type fixture struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient

	t       *testing.T
	driver  *Driver
	store   *memory.Store
	backend *fault.Backend
	conn    *grpc.ClientConn
	dir     string
	log     *journal
}

type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) write(prefix, args string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, prefix+args)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines, "\n")
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	dir, err := os.MkdirTemp("", "abaca-csi-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"store", "staged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	store := memory.NewStore(filepath.Join(dir, "store"))
	store.Node = "here"
	f := &fixture{t: t, dir: dir, store: store, backend: fault.Wrap(store.Open()), log: &journal{}}
	f.driver = &Driver{
		Version: "test", Controller: true, Node: true, NodeID: "here",
		Backends: map[string]backend.Backend{"mem": f.backend}, DefaultBackend: "mem",
		Mounts: mount.New(), StagedDir: filepath.Join(dir, "staged"), Metrics: metrics.NewCSIMetricsManagerForPlugin(DriverName), Now: time.Now,
	}
	socket := filepath.Join(dir, "csi.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	log := funcr.New(f.log.write, funcr.Options{Verbosity: 4})
	go func() { served <- f.driver.Serve(klog.NewContext(ctx, logr.Logger(log)), listener, time.Second) }()
	if f.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	f.IdentityClient, f.ControllerClient, f.NodeClient = csi.NewIdentityClient(f.conn), csi.NewControllerClient(f.conn), csi.NewNodeClient(f.conn)
	t.Cleanup(func() {
		f.conn.Close()
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		below, _ := f.driver.Mounts.Below(dir)
		for _, p := range below {
			_ = f.driver.Mounts.Unmount(context.Background(), p)
		}
		os.RemoveAll(dir)
	})
	return f
}

func cap1(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}}
}

const (
	writer = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	reader = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
)

func create(name string, mode csi.VolumeCapability_AccessMode_Mode, source *csi.VolumeContentSource) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{cap1(mode)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 24}, VolumeContentSource: source}
}

func (f *fixture) volume(req *csi.CreateVolumeRequest) *csi.Volume {
	f.t.Helper()
	resp, err := f.CreateVolume(context.Background(), req)
	if err != nil {
		f.t.Fatalf("create volume %q: %v", req.GetName(), err)
	}
	return resp.GetVolume()
}

func (f *fixture) snapshot(name, volume string) *csi.Snapshot {
	f.t.Helper()
	resp, err := f.CreateSnapshot(context.Background(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
	if err != nil {
		f.t.Fatalf("create snapshot %q: %v", name, err)
	}
	return resp.GetSnapshot()
}

func code(t *testing.T, err error, want codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("code %v, want %v: %v", status.Code(err), want, err)
	}
	for _, w := range words {
		if !strings.Contains(fmt.Sprint(err), w) {
			t.Errorf("the error does not speak of %q: %v", w, err)
		}
	}
}

func TestSnapshotVolumes(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	v := f.volume(create("data", writer, nil))
	snap := f.snapshot("snap", v.GetVolumeId())
	source := contentSource(snap.GetSnapshotId())

	ref := f.volume(create("look", reader, source))
	if again := f.volume(create("look", reader, source)); !proto.Equal(ref, again) {
		t.Errorf("the second answer is %v, the first %v", again, ref)
	}
	big := create("big", reader, source)
	big.CapacityRange.RequiredBytes = 1 << 30
	if got := f.volume(big).GetCapacityBytes(); got != 1<<30 {
		t.Errorf("a claim of 1 GiB on a snapshot of 16 MiB gets %d bytes; an orchestrator refuses that", got)
	}
	// The hold.
	_, err := f.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snap.GetSnapshotId()})
	code(t, err, codes.FailedPrecondition, "handles begin with "+snap.GetSnapshotId()+"#")

	// Nothing that writes.
	_, err = f.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: ref.GetVolumeId(), CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 31}})
	code(t, err, codes.FailedPrecondition)
	_, err = f.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "of a reference", SourceVolumeId: ref.GetVolumeId()})
	code(t, err, codes.InvalidArgument)
	_, err = f.CreateVolume(ctx, create("clone", writer, contentSource(ref.GetVolumeId())))
	code(t, err, codes.InvalidArgument)
	resp, err := f.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: ref.GetVolumeId(), VolumeCapabilities: []*csi.VolumeCapability{cap1(reader), cap1(writer)}})
	if err != nil || resp.GetConfirmed() != nil || resp.GetMessage() == "" {
		t.Errorf("a writer mode is confirmed: %v, %v", resp, err)
	}
	stage := &csi.NodeStageVolumeRequest{VolumeId: ref.GetVolumeId(), StagingTargetPath: filepath.Join(f.dir, "s"), VolumeCapability: cap1(writer)}
	_, err = f.NodeStageVolume(ctx, stage)
	code(t, err, codes.FailedPrecondition)
	publish := &csi.NodePublishVolumeRequest{VolumeId: ref.GetVolumeId(), StagingTargetPath: filepath.Join(f.dir, "s"), TargetPath: filepath.Join(f.dir, "t"), VolumeCapability: cap1(writer)}
	_, err = f.NodePublishVolume(ctx, publish)
	code(t, err, codes.FailedPrecondition)

	// One name is one thing.
	other := f.snapshot("other", v.GetVolumeId())
	_, err = f.CreateVolume(ctx, create("look", reader, contentSource(other.GetSnapshotId())))
	code(t, err, codes.AlreadyExists)
	_, err = f.CreateVolume(ctx, create("look", writer, source))
	code(t, err, codes.AlreadyExists)
	_, err = f.CreateVolume(ctx, create("data", reader, source))
	code(t, err, codes.AlreadyExists)
	if _, err := f.backend.ShareNamed(ctx, "look"); err == nil {
		t.Error("the refused request has left a share")
	}

	for range 2 {
		if _, err := f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: ref.GetVolumeId()}); err != nil {
			t.Error(err)
		}
	}
	bigID := Volume{Backend: "mem", Snapshot: strings.TrimPrefix(snap.GetSnapshotId(), "mem/@"), Consumer: consumerPrefix + digest("big")}
	if _, err := f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: bigID.String()}); err != nil {
		t.Error(err)
	}
	if _, err := f.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snap.GetSnapshotId()}); err != nil {
		t.Errorf("nobody holds it any more: %v", err)
	}
}

func TestReadOnlyViewOfALiveVolume(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	v := f.volume(create("data", writer, nil))
	view := f.volume(create("view", reader, contentSource(v.GetVolumeId())))
	if again := f.volume(create("view", reader, contentSource(v.GetVolumeId()))); again.GetVolumeId() != view.GetVolumeId() {
		t.Errorf("two views: %s and %s", view.GetVolumeId(), again.GetVolumeId())
	}
	// The snapshot below it is nobody else's.
	list, err := f.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil || len(list.GetEntries()) != 0 {
		t.Errorf("listed to users: %v, %v", list, err)
	}
	h, err := ParseVolume(view.GetVolumeId())
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.CreateVolume(ctx, create("thief", reader, contentSource(Snapshot{Backend: h.Backend, Snapshot: h.Snapshot}.String())))
	code(t, err, codes.NotFound)
	if _, err := f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: view.GetVolumeId()}); err != nil {
		t.Fatal(err)
	}
	if n := f.count(); n != "1 shares, 0 snapshots, 0 exports" {
		t.Errorf("left behind: %s", n)
	}
}

// What is refused leaves nothing, and what is wanted elsewhere is not made.
func TestRefusedRequestsLeaveNothing(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	v := f.volume(create("data", writer, nil))
	before := f.count()
	for _, mode := range []csi.VolumeCapability_AccessMode_Mode{reader, writer} {
		small := create("small", mode, contentSource(v.GetVolumeId()))
		small.CapacityRange = &csi.CapacityRange{LimitBytes: 1 << 20}
		_, err := f.CreateVolume(ctx, small)
		code(t, err, codes.OutOfRange)
		taken := create("data", mode, contentSource(v.GetVolumeId()))
		_, err = f.CreateVolume(ctx, taken)
		code(t, err, codes.AlreadyExists)
	}
	for node, want := range map[string]codes.Code{"elsewhere": codes.ResourceExhausted, "here": codes.OK} {
		req := create("at-"+node, writer, nil)
		f.backend.On("Capacity").Fail(backend.ErrAuth) // which nobody needs to know
		req.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{TopologyKey: node}}}}
		resp, err := f.CreateVolume(ctx, req)
		code(t, err, want)
		if err == nil {
			if at := resp.GetVolume().GetAccessibleTopology(); len(at) != 1 || at[0].GetSegments()[TopologyKey] != "here" {
				t.Errorf("it can be reached at %v", at)
			}
			if _, err := f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: resp.GetVolume().GetVolumeId()}); err != nil {
				t.Error(err)
			}
		}
	}
	if after := f.count(); after != before {
		t.Errorf("there is %s, and before there was %s", after, before)
	}
}

// A view answers again after its source has gone.
func TestViewOutlivesItsSource(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	v := f.volume(create("data", writer, nil))
	view := f.volume(create("view", reader, contentSource(v.GetVolumeId())))
	if _, err := f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.GetVolumeId()}); err != nil {
		t.Fatal(err)
	}
	if again := f.volume(create("view", reader, contentSource(v.GetVolumeId()))); again.GetVolumeId() != view.GetVolumeId() {
		t.Errorf("it became %s, and was %s", again.GetVolumeId(), view.GetVolumeId())
	}
}

// choosy is a backend whose snapshots are shown in no color but their share's.
type choosy struct{ *fault.Backend }

func (choosy) Parameters() []string { return []string{"color"} }

func (choosy) CheckReference(_ context.Context, shareID string, p map[string]string) error {
	if shareID == "" || p["color"] != "" {
		return fmt.Errorf("share %q has another color: %w", shareID, backend.ErrInvalid)
	}
	return nil
}

// TestClassOfReference: a class that says otherwise than the share of a snapshot is
// refused where the snapshot is only referred to, and nothing is left behind.
func TestClassOfReference(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	f.driver.Backends["mem"] = choosy{f.backend}
	v := f.volume(create("data", writer, nil))
	s := f.snapshot("cut", v.GetVolumeId())
	for _, source := range []string{v.GetVolumeId(), s.GetSnapshotId()} {
		req := create("view of "+source, reader, contentSource(source))
		req.Parameters = map[string]string{"color": "red"}
		_, err := f.CreateVolume(ctx, req)
		code(t, err, codes.InvalidArgument, "another color")
		if n := f.count(); n != "1 shares, 1 snapshots, 0 exports" {
			t.Errorf("left behind: %s", n)
		}
		req.Parameters = nil
		_, err = f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: f.volume(req).GetVolumeId()})
		if err != nil {
			t.Error(err)
		}
	}
}

func TestCloneLeavesNoSnapshot(t *testing.T) {
	f := newFixture(t)
	v := f.volume(create("data", writer, nil))
	f.volume(create("clone", writer, contentSource(v.GetVolumeId())))
	f.volume(create("clone", writer, contentSource(v.GetVolumeId())))
	if n := f.count(); n != "2 shares, 0 snapshots, 0 exports" {
		t.Errorf("left behind: %s", n)
	}
}

// count says what there is on the backend.
func (f *fixture) count() string {
	ctx := context.Background()
	shares, _, _ := f.backend.ListShares(ctx, "", 0)
	snapshots, _, _ := f.backend.ListSnapshots(ctx, "", 0)
	exports, _, _ := f.backend.ListExports(ctx, "", 0)
	return fmt.Sprintf("%d shares, %d snapshots, %d exports", len(shares), len(snapshots), len(exports))
}

// A lost answer at any call to the backend must not make two of anything: the
// same request again ends as if nothing had happened.
func TestLostAnswers(t *testing.T) {
	requests := func(f *fixture) []func() error {
		ctx := context.Background()
		var snap *csi.Snapshot
		var made []*csi.Volume
		volume := func(req func() *csi.CreateVolumeRequest) func() error {
			return func() error {
				resp, err := f.CreateVolume(ctx, req())
				if err == nil {
					made = append(made, resp.GetVolume())
				}
				return err
			}
		}
		return []func() error{
			volume(func() *csi.CreateVolumeRequest { return create("a", writer, nil) }),
			func() error {
				resp, err := f.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: made[0].GetVolumeId()})
				snap = resp.GetSnapshot()
				return err
			},
			volume(func() *csi.CreateVolumeRequest {
				return create("ref", reader, contentSource(snap.GetSnapshotId()))
			}),
			volume(func() *csi.CreateVolumeRequest {
				return create("clone", writer, contentSource(snap.GetSnapshotId()))
			}),
			volume(func() *csi.CreateVolumeRequest {
				return create("view", reader, contentSource(made[0].GetVolumeId()))
			}),
			volume(func() *csi.CreateVolumeRequest {
				return create("copy", writer, contentSource(made[0].GetVolumeId()))
			}),
			func() error {
				for _, v := range made {
					if _, err := f.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.GetVolumeId()}); err != nil {
						return err
					}
				}
				return nil
			},
			func() error {
				_, err := f.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snap.GetSnapshotId()})
				return err
			},
		}
	}
	for _, method := range []string{"CreateShare", "CreateSnapshot", "Export", "Unexport", "DeleteShare", "DeleteSnapshot", "ShareNamed", "Snapshot", "ExportOf"} {
		for nth := 1; nth <= 8; nth++ {
			for _, after := range []bool{false, true} {
				f := newFixture(t)
				lost := f.backend.On(method).Nth(nth)
				if after {
					lost.FailAfter(fmt.Errorf("answer lost: %w", backend.ErrUnavailable))
				} else {
					lost.Fail(fmt.Errorf("call lost: %w", backend.ErrUnavailable))
				}
				for i, request := range requests(f) {
					err := request()
					if err != nil {
						if status.Code(err) != codes.Unavailable {
							t.Errorf("%s %d: request %d: %v", method, nth, i, err)
						}
						err = request()
					}
					if err != nil {
						t.Fatalf("%s %d (after its effect: %t): request %d again: %v", method, nth, after, i, err)
					}
				}
				if n := f.count(); n != "0 shares, 0 snapshots, 0 exports" {
					t.Errorf("%s %d (after its effect: %t): left behind: %s", method, nth, after, n)
				}
			}
		}
	}
}

// TestFinalErrors: after an answer that ends the request nobody may call again,
// so what was begun for it is undone. One that does not is gone on with.
func TestFinalErrors(t *testing.T) {
	for kind, stays := range map[error]bool{
		backend.ErrInvalid: false, backend.ErrExhausted: false, backend.ErrConflict: false, backend.ErrUnsupported: false,
		backend.ErrNotFound: false, backend.ErrAuth: true, backend.ErrPending: true, backend.ErrUnavailable: true,
	} {
		f, ctx := newFixture(t), context.Background()
		f.driver.Backups, _ = newEngine(f.driver.Backends)
		v := f.volume(create("data", writer, nil))
		save := &csi.CreateSnapshotRequest{Name: "saved", SourceVolumeId: v.GetVolumeId(), Parameters: map[string]string{"type": "backup", "repository": "offsite"}}
		var saved *csi.CreateSnapshotResponse
		for range 2 {
			var err error
			if saved, err = f.CreateSnapshot(ctx, save); err != nil {
				t.Fatal(err)
			}
		}
		for name, c := range map[string]struct {
			method string
			req    *csi.CreateVolumeRequest
		}{
			"view":    {"Export", create("view", reader, contentSource(v.GetVolumeId()))},
			"clone":   {"CreateShare", create("clone", writer, contentSource(v.GetVolumeId()))},
			"restore": {"Export", create("restored", writer, contentSource(saved.GetSnapshot().GetSnapshotId()))},
		} {
			before := f.count()
			f.backend.On(c.method).Fail(fmt.Errorf("no: %w", kind))
			if _, err := f.CreateVolume(ctx, c.req); err == nil {
				t.Fatalf("%s, %v: no error", name, kind)
			}
			if left := f.count(); (left != before) != stays {
				t.Errorf("%s, %v: %s before, and %s after it", name, kind, before, left)
			}
			if stays {
				continue
			}
			// As long as something is left, the orchestrator is to call again.
			undo := map[string]string{"view": "DeleteSnapshot", "clone": "DeleteSnapshot", "restore": "DeleteShare"}[name]
			f.backend.On(c.method).Fail(fmt.Errorf("no: %w", kind))
			f.backend.On(undo).Fail(fmt.Errorf("held: %w", backend.ErrAuth))
			_, err := f.CreateVolume(ctx, c.req)
			code(t, err, codes.Aborted, "no: ", "held: ")
			f.backend.On(c.method).Fail(fmt.Errorf("no: %w", kind))
			if _, err := f.CreateVolume(ctx, c.req); !final(err) {
				t.Errorf("%s, %v: once nothing is left: %v", name, kind, err)
			}
			if left := f.count(); left != before {
				t.Errorf("%s, %v: %s before, and %s after all", name, kind, before, left)
			}
		}
	}
}

func TestParameters(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	for _, c := range []struct {
		key, value string
		words      []string
	}{
		{"bakend", "mem", []string{`"bakend"`, `"backend"`}},
		{"backend", "other", []string{`"other"`, "mem"}},
		{"type", "x", []string{`"type"`}},
	} {
		req := create("x", writer, nil)
		req.Parameters = map[string]string{c.key: c.value}
		_, err := f.CreateVolume(ctx, req)
		code(t, err, codes.InvalidArgument, c.words...)
	}
	v := f.volume(create("data", writer, nil))
	for _, c := range []struct {
		params map[string]string
		words  []string
	}{
		{map[string]string{"typ": "backup"}, []string{`"typ"`, `"type"`}},
		{map[string]string{"type": "tape"}, []string{"tape", "snapshot or backup"}},
		{map[string]string{"type": "backup"}, []string{"repository"}},
		{map[string]string{"type": "snapshot", "repository": "r"}, []string{"repository", "backup"}},
		{map[string]string{"repository": "r"}, []string{"repository", "backup"}},
		{map[string]string{"type": "backup", "repository": "../x"}, []string{"../x"}},
		{map[string]string{"exclude": "*.tmp"}, []string{"exclude", "backup"}},
		{map[string]string{"type": "backup", "repository": "r", "exclude": "# notes\n*.tmp\n a/[ \n"}, []string{"exclude", `"a/["`}},
		{map[string]string{"type": "backup", "repository": "r", "allowPartial": "maybe"}, []string{"allowPartial", "maybe"}},
		{map[string]string{"type": "backup", "repository": "r"}, []string{"--repositories"}},
	} {
		_, err := f.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId(), Parameters: c.params})
		code(t, err, codes.InvalidArgument, c.words...)
	}
	ok := create("ok", writer, nil)
	ok.Parameters = map[string]string{"csi.storage.k8s.io/pvc/name": "n", "csi.storage.k8s.io/pvc/namespace": "ns", "backend": "mem"}
	f.volume(ok)
}

func TestSizes(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	for _, c := range []struct {
		required, limit int64
		want            codes.Code
	}{
		{0, 0, codes.OK}, {-1, 0, codes.InvalidArgument}, {0, -1, codes.InvalidArgument}, {2 << 20, 1 << 20, codes.InvalidArgument},
		{1 << 20, 1 << 20, codes.OK}, {0, 1 << 24, codes.OK}, {1 << 62, 0, codes.ResourceExhausted},
	} {
		req := create(fmt.Sprintf("%d-%d", c.required, c.limit), writer, nil)
		req.CapacityRange = &csi.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit}
		resp, err := f.CreateVolume(ctx, req)
		code(t, err, c.want)
		if got := resp.GetVolume().GetCapacityBytes(); err == nil && (got < max(c.required, 1) || c.limit > 0 && got > c.limit) {
			t.Errorf("%d to %d bytes: got %d", c.required, c.limit, got)
		}
	}
	v := f.volume(create("data", writer, nil))
	small := create("small", writer, contentSource(f.snapshot("s", v.GetVolumeId()).GetSnapshotId()))
	small.CapacityRange = &csi.CapacityRange{LimitBytes: 1 << 20}
	_, err := f.CreateVolume(ctx, small)
	code(t, err, codes.OutOfRange)
}

func TestBusyObjectsAreAborted(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	f.backend.On("CreateShare").Delay(2 * time.Second)
	first := make(chan error, 1)
	go func() {
		_, err := f.CreateVolume(ctx, create("x", writer, nil))
		first <- err
	}()
	for f.backend.Calls("CreateShare") == 0 {
		time.Sleep(time.Millisecond)
	}
	_, err := f.CreateVolume(ctx, create("x", writer, nil))
	code(t, err, codes.Aborted)
	if _, err := f.CreateVolume(ctx, create("y", writer, nil)); err != nil {
		t.Errorf("another volume had to wait: %v", err)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
}

// panicking is a backend that panics.
type panicking struct{ backend.Backend }

func (panicking) CreateShare(context.Context, backend.CreateShareRequest) (*backend.Share, error) {
	panic("a defect")
}

func TestPanicsAreAnswered(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	f.driver.Backends["mem"] = panicking{f.backend}
	_, err := f.CreateVolume(ctx, create("x", writer, nil))
	code(t, err, codes.Internal, "defect")
	f.driver.Backends["mem"] = f.backend
	if _, err := f.CreateVolume(ctx, create("x", writer, nil)); err != nil {
		t.Errorf("after the panic: %v", err)
	}
	if !strings.Contains(f.log.String(), "a defect") {
		t.Error("the panic is not in the log")
	}
}

func TestSecretsAreStrippedFromTheLog(t *testing.T) {
	f := newFixture(t)
	req := create("x", writer, nil)
	req.Secrets = map[string]string{"password": "hunter2"}
	f.volume(req)
	log := f.log.String()
	if strings.Contains(log, "hunter2") || !strings.Contains(log, "***stripped***") {
		t.Errorf("log:\n%s", log)
	}
	if !strings.Contains(log, `"msg"="Request done" "method"="CreateVolume" "name"="x" "volumeID"="mem/`) {
		t.Errorf("the log does not say what was made:\n%s", log)
	}
}

// populated returns a request with every field set: sensible values where there
// are some, so that a handler is not done at the first check.
func populated(f *fixture, m proto.Message, volume, snapshot string) {
	var fill func(m protoreflect.Message, depth int)
	value := func(fd protoreflect.FieldDescriptor) protoreflect.Value {
		switch {
		case fd.Kind() == protoreflect.StringKind:
			switch fd.Name() {
			case "volume_id", "source_volume_id":
				return protoreflect.ValueOfString(volume)
			case "snapshot_id":
				return protoreflect.ValueOfString(snapshot)
			case "staging_target_path", "target_path", "volume_path", "volume_publish_path":
				return protoreflect.ValueOfString(filepath.Join(f.dir, "node", string(fd.Name())))
			}
			return protoreflect.ValueOfString("x")
		case fd.Kind() == protoreflect.EnumKind:
			return protoreflect.ValueOfEnum(5)
		case fd.Kind() == protoreflect.BoolKind:
			return protoreflect.ValueOfBool(true)
		case fd.Kind() == protoreflect.Int32Kind:
			return protoreflect.ValueOfInt32(1)
		}
		return protoreflect.ValueOfInt64(1 << 24)
	}
	fill = func(m protoreflect.Message, depth int) {
		fds := m.Descriptor().Fields()
		for i := range fds.Len() {
			fd := fds.Get(i)
			if oneof := fd.ContainingOneof(); oneof != nil && m.WhichOneof(oneof) != nil {
				continue
			}
			switch {
			case fd.IsMap() || fd.Name() == "secrets":
			case fd.IsList() && fd.Message() != nil:
				fill(m.Mutable(fd).List().AppendMutable().Message(), depth+1)
			case fd.IsList():
				m.Mutable(fd).List().Append(value(fd))
			case fd.Message() != nil:
				fill(m.Mutable(fd).Message(), depth+1)
			case fd.Kind() != protoreflect.DoubleKind && fd.Kind() != protoreflect.BytesKind:
				m.Set(fd, value(fd))
			}
		}
		if vc, ok := m.Interface().(*csi.VolumeCapability); ok {
			vc.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}
		}
	}
	fill(m.ProtoReflect(), 0)
}

// withoutParts calls do with copies of a message, each lacking one part, at any
// depth.
func withoutParts(m proto.Message, do func(proto.Message, string)) {
	var walk func(path string, get func(proto.Message) protoreflect.Message)
	walk = func(path string, get func(proto.Message) protoreflect.Message) {
		fds := get(m).Descriptor().Fields()
		for i := range fds.Len() {
			fd := fds.Get(i)
			if !get(m).Has(fd) {
				continue
			}
			name := path + "." + string(fd.Name())
			less := proto.Clone(m)
			get(less).Clear(fd)
			do(less, name)
			if fd.Message() == nil || fd.IsMap() {
				continue
			}
			walk(name, func(m proto.Message) protoreflect.Message {
				if fd.IsList() {
					return get(m).Mutable(fd).List().Get(0).Message()
				}
				return get(m).Mutable(fd).Message()
			})
		}
	}
	walk("", func(m proto.Message) protoreflect.Message { return m.ProtoReflect() })
}

// TestMissingParts sends every RPC its request with every single part missing,
// and an empty one: no request may make the driver panic.
func TestMissingParts(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	sent := 0
	for _, service := range []string{"csi.v1.Identity", "csi.v1.Controller", "csi.v1.Node"} {
		methods := csi.File_csi_proto.Services().ByName(protoreflect.FullName(service).Name()).Methods()
		for i := range methods.Len() {
			method := methods.Get(i)
			call := func(req proto.Message, without string) {
				sent++
				ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				defer cancel()
				resp := newMessage(t, method.Output())
				err := f.conn.Invoke(ctx, fmt.Sprintf("/%s/%s", service, method.Name()), req, resp)
				if status.Code(err) == codes.Internal {
					t.Errorf("%s without %s: %v", method.Name(), without, err)
				}
			}
			volume := f.volume(create("v-"+string(method.Name()), writer, nil)).GetVolumeId()
			snapshot := f.snapshot("s-"+string(method.Name()), volume).GetSnapshotId()
			req := newMessage(t, method.Input())
			call(req, "anything")
			populated(f, req, volume, snapshot)
			call(req, "nothing")
			withoutParts(req, call)
		}
	}
	t.Logf("%d requests", sent)
}

func newMessage(t *testing.T, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	all := csi.File_csi_proto.Messages()
	if all.ByName(d.Name()) == nil {
		t.Fatalf("no message %s", d.Name())
	}
	return messageTypes[d.FullName()].New().Interface()
}

// FuzzRequests feeds arbitrary bytes as the request of every RPC, to a driver
// that has a volume, a snapshot, a snapshot volume and a backup.
func FuzzRequests(f *testing.F) {
	for i := range requestTypes {
		f.Add(i, []byte{})
		f.Add(i, []byte("\n\x01x\x12\x00\x1a\x00"))
	}
	_, known := fuzzed(f)
	for _, req := range known {
		b, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(slices.IndexFunc(requestTypes, func(t protoreflect.MessageType) bool {
			return t.Descriptor() == req.ProtoReflect().Descriptor()
		}), b)
	}
	f.Fuzz(func(t *testing.T, i int, b []byte) {
		kind := requestTypes[(i%len(requestTypes)+len(requestTypes))%len(requestTypes)]
		req := kind.New().Interface()
		if proto.Unmarshal(b, req) != nil {
			return
		}
		d, _ := fuzzed(t)
		dispatch(d, req) // a panic fails
		lockKeys(req)
	})
}

// fuzzed returns a driver with something of each kind, and requests that speak
// of it.
func fuzzed(t testing.TB) (*Driver, []proto.Message) {
	backends := map[string]backend.Backend{"mem": memory.NewStore("").Open()}
	engine, _ := newEngine(backends)
	d := &Driver{Controller: true, Node: true, NodeID: "here", Backends: backends, Backups: engine,
		DefaultBackend: "mem", Mounts: noMounts{}, StagedDir: t.TempDir(), Now: time.Now}
	ctx := context.Background()
	v, err := d.CreateVolume(ctx, create("data", writer, nil))
	if err != nil {
		t.Fatal(err)
	}
	volume := v.GetVolume().GetVolumeId()
	cut := &csi.CreateSnapshotRequest{Name: "cut", SourceVolumeId: volume}
	snap, err := d.CreateSnapshot(ctx, cut)
	if err != nil {
		t.Fatal(err)
	}
	save := &csi.CreateSnapshotRequest{Name: "saved", SourceVolumeId: volume, Parameters: map[string]string{"type": "backup", "repository": "offsite"}}
	saved, err := d.CreateSnapshot(ctx, save)
	if err == nil {
		saved, err = d.CreateSnapshot(ctx, save)
	}
	if err != nil || !saved.GetSnapshot().GetReadyToUse() {
		t.Fatal(saved, err)
	}
	reading := create("look", reader, contentSource(snap.GetSnapshot().GetSnapshotId()))
	ref, err := d.CreateVolume(ctx, reading)
	if err != nil {
		t.Fatal(err)
	}
	return d, []proto.Message{
		reading, create("view", reader, contentSource(volume)), create("clone", writer, contentSource(volume)),
		create("restored", writer, contentSource(saved.GetSnapshot().GetSnapshotId())), cut, save,
		&csi.DeleteSnapshotRequest{SnapshotId: saved.GetSnapshot().GetSnapshotId()},
		&csi.DeleteSnapshotRequest{SnapshotId: snap.GetSnapshot().GetSnapshotId()},
		&csi.ListSnapshotsRequest{SnapshotId: saved.GetSnapshot().GetSnapshotId()},
		&csi.GetSnapshotRequest{SnapshotId: saved.GetSnapshot().GetSnapshotId()},
		&csi.DeleteVolumeRequest{VolumeId: volume}, &csi.DeleteVolumeRequest{VolumeId: ref.GetVolume().GetVolumeId()},
		&csi.ControllerPublishVolumeRequest{VolumeId: volume, NodeId: "here,192.0.2.1", VolumeCapability: cap1(writer)},
		&csi.ControllerUnpublishVolumeRequest{VolumeId: volume, NodeId: "here"},
		&csi.NodeStageVolumeRequest{VolumeId: volume, StagingTargetPath: "/s", VolumeCapability: cap1(writer)},
		&csi.NodePublishVolumeRequest{VolumeId: ref.GetVolume().GetVolumeId(), StagingTargetPath: "/s", TargetPath: "/t", VolumeCapability: cap1(reader)},
		&csi.NodeGetVolumeStatsRequest{VolumeId: volume, VolumePath: "/t"},
	}
}

// noMounts lets the fuzzer name any path without harm.
type noMounts struct{ mount.Interface }

func (noMounts) Mount(context.Context, mount.Source, string, bool, []string) error { return nil }
func (noMounts) Bind(context.Context, string, string, bool) error                  { return nil }
func (noMounts) Unmount(context.Context, string) error                             { return nil }
func (noMounts) Prove(context.Context, string, mount.Source, bool) error           { return nil }
func (noMounts) Check(context.Context, string) error                               { return nil }
func (noMounts) Stats(context.Context, string) (mount.Stats, error)                { return mount.Stats{}, nil }
func (noMounts) Places(string) ([]string, error)                                   { return nil, nil }

var (
	messageTypes = map[protoreflect.FullName]protoreflect.MessageType{}
	requestTypes []protoreflect.MessageType
)

func init() {
	for _, m := range []proto.Message{
		&csi.GetPluginInfoRequest{}, &csi.GetPluginCapabilitiesRequest{}, &csi.ProbeRequest{},
		&csi.CreateVolumeRequest{}, &csi.DeleteVolumeRequest{}, &csi.ControllerPublishVolumeRequest{}, &csi.ControllerUnpublishVolumeRequest{},
		&csi.ValidateVolumeCapabilitiesRequest{}, &csi.ListVolumesRequest{}, &csi.ControllerListVolumeHealthRequest{}, &csi.ControllerGetVolumeHealthRequest{},
		&csi.GetCapacityRequest{}, &csi.ControllerGetCapabilitiesRequest{}, &csi.CreateSnapshotRequest{}, &csi.DeleteSnapshotRequest{},
		&csi.ListSnapshotsRequest{}, &csi.GetSnapshotRequest{}, &csi.ControllerExpandVolumeRequest{}, &csi.ControllerGetVolumeRequest{},
		&csi.ControllerModifyVolumeRequest{}, &csi.NodeStageVolumeRequest{}, &csi.NodeUnstageVolumeRequest{}, &csi.NodePublishVolumeRequest{},
		&csi.NodeUnpublishVolumeRequest{}, &csi.NodeGetVolumeStatsRequest{}, &csi.NodeGetVolumeHealthRequest{}, &csi.NodeGetStorageHealthRequest{},
		&csi.NodeExpandVolumeRequest{}, &csi.NodeGetCapabilitiesRequest{}, &csi.NodeGetInfoRequest{},
	} {
		requestTypes = append(requestTypes, m.ProtoReflect().Type())
	}
	for _, m := range []proto.Message{
		&csi.GetPluginInfoResponse{}, &csi.GetPluginCapabilitiesResponse{}, &csi.ProbeResponse{},
		&csi.CreateVolumeResponse{}, &csi.DeleteVolumeResponse{}, &csi.ControllerPublishVolumeResponse{}, &csi.ControllerUnpublishVolumeResponse{},
		&csi.ValidateVolumeCapabilitiesResponse{}, &csi.ListVolumesResponse{}, &csi.ControllerListVolumeHealthResponse{}, &csi.ControllerGetVolumeHealthResponse{},
		&csi.GetCapacityResponse{}, &csi.ControllerGetCapabilitiesResponse{}, &csi.CreateSnapshotResponse{}, &csi.DeleteSnapshotResponse{},
		&csi.ListSnapshotsResponse{}, &csi.GetSnapshotResponse{}, &csi.ControllerExpandVolumeResponse{}, &csi.ControllerGetVolumeResponse{},
		&csi.ControllerModifyVolumeResponse{}, &csi.NodeStageVolumeResponse{}, &csi.NodeUnstageVolumeResponse{}, &csi.NodePublishVolumeResponse{},
		&csi.NodeUnpublishVolumeResponse{}, &csi.NodeGetVolumeStatsResponse{}, &csi.NodeGetVolumeHealthResponse{}, &csi.NodeGetStorageHealthResponse{},
		&csi.NodeExpandVolumeResponse{}, &csi.NodeGetCapabilitiesResponse{}, &csi.NodeGetInfoResponse{},
	} {
		messageTypes[m.ProtoReflect().Descriptor().FullName()] = m.ProtoReflect().Type()
	}
	for _, m := range requestTypes {
		messageTypes[m.Descriptor().FullName()] = m
	}
}

// dispatch calls the handler of a request.
func dispatch(d *Driver, req proto.Message) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	switch r := req.(type) {
	case *csi.CreateVolumeRequest:
		d.CreateVolume(ctx, r)
	case *csi.DeleteVolumeRequest:
		d.DeleteVolume(ctx, r)
	case *csi.ControllerPublishVolumeRequest:
		d.ControllerPublishVolume(ctx, r)
	case *csi.ControllerUnpublishVolumeRequest:
		d.ControllerUnpublishVolume(ctx, r)
	case *csi.ValidateVolumeCapabilitiesRequest:
		d.ValidateVolumeCapabilities(ctx, r)
	case *csi.ListVolumesRequest:
		d.ListVolumes(ctx, r)
	case *csi.ControllerListVolumeHealthRequest:
		d.ControllerListVolumeHealth(ctx, r)
	case *csi.ControllerGetVolumeHealthRequest:
		d.ControllerGetVolumeHealth(ctx, r)
	case *csi.GetCapacityRequest:
		d.GetCapacity(ctx, r)
	case *csi.CreateSnapshotRequest:
		d.CreateSnapshot(ctx, r)
	case *csi.DeleteSnapshotRequest:
		d.DeleteSnapshot(ctx, r)
	case *csi.ListSnapshotsRequest:
		d.ListSnapshots(ctx, r)
	case *csi.GetSnapshotRequest:
		d.GetSnapshot(ctx, r)
	case *csi.ControllerExpandVolumeRequest:
		d.ControllerExpandVolume(ctx, r)
	case *csi.ControllerGetVolumeRequest:
		d.ControllerGetVolume(ctx, r)
	case *csi.NodeStageVolumeRequest:
		d.NodeStageVolume(ctx, r)
	case *csi.NodeUnstageVolumeRequest:
		d.NodeUnstageVolume(ctx, r)
	case *csi.NodePublishVolumeRequest:
		d.NodePublishVolume(ctx, r)
	case *csi.NodeUnpublishVolumeRequest:
		d.NodeUnpublishVolume(ctx, r)
	case *csi.NodeGetVolumeStatsRequest:
		d.NodeGetVolumeStats(ctx, r)
	case *csi.NodeGetVolumeHealthRequest:
		d.NodeGetVolumeHealth(ctx, r)
	}
}

func TestDescriptionOfAVolume(t *testing.T) {
	share := &backend.Share{Name: "pvc-1", Size: 5, Description: map[string]string{
		describeClaim: "ns/data", describeModes: "A,B", describeClass: `{"backend":"mem"}`}}
	b, err := json.Marshal(describeVolume(Volume{Backend: "mem", Share: "s"}, share))
	want := `{"version":1,"driver":"abaca-csi.github.io","volume":"mem/s","name":"pvc-1","claim":"ns/data","sizeBytes":5,"accessModes":["A","B"],"parameters":{"backend":"mem"}}`
	if err != nil || string(b) != want {
		t.Errorf("volume.json is\n%s, want\n%s (%v)", b, want, err)
	}
}
