package csi

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
)

// TestClaims: labels of the claim are in the description of its backups, and its
// annotation says what they leave out.
func TestClaims(t *testing.T) {
	f, ctx := newFixture(t), context.Background()
	engine, runner := newEngine(f.driver.Backends)
	f.driver.Backups = engine
	answer, failure := Claim{Volume: "data", Labels: map[string]string{"app": "shop"}, Annotations: map[string]string{ExcludeAnnotation: "/cache\n# why\n*.tmp\n"}}, error(nil)
	f.driver.Claims = func(_ context.Context, namespace, name string) (Claim, error) {
		if namespace != "prod" || name != "data" {
			t.Errorf("asked for %s/%s", namespace, name)
		}
		return answer, failure
	}
	made := create("data", writer, nil)
	made.Parameters = map[string]string{claimNamespaceKey: "prod", claimNameKey: "data"}
	v := f.volume(made)
	save := func(name string) error {
		_, err := f.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.GetVolumeId(),
			Parameters: map[string]string{"type": "backup", "repository": "offsite", "exclude": "*.bak"}})
		return err
	}
	task := func(name string) (exclude []string, description string) {
		b := runner.jobs[digest(name)].Job.Task.Backup
		return b.Exclude, string(b.Description)
	}
	if err := save("one"); err != nil {
		t.Fatal(err)
	}
	if exclude, description := task("one"); !slices.Equal(exclude, []string{"*.bak", "/cache", "*.tmp"}) || !strings.Contains(description, `"labels":{"app":"shop"}`) {
		t.Errorf("%q, %s", exclude, description)
	}
	failure = fmt.Errorf("the API server is away: %w", backend.ErrUnavailable)
	code(t, save("two"), codes.Unavailable, "prod/data", "away")
	failure = backend.ErrNotFound // it has been deleted, and its volume lives on
	if err := save("two"); err != nil {
		t.Fatal(err)
	}
	if exclude, _ := task("two"); !slices.Equal(exclude, []string{"*.bak"}) {
		t.Errorf("%q", exclude)
	}
	failure, answer.Volume = nil, "another" // somebody has taken its name
	if err := save("taken"); err != nil {
		t.Fatal(err)
	}
	if exclude, description := task("taken"); !slices.Equal(exclude, []string{"*.bak"}) || strings.Contains(description, "shop") {
		t.Errorf("of another's claim: %q, %s", exclude, description)
	}
	answer.Volume = "data"
	failure, answer.Annotations[ExcludeAnnotation] = nil, "fine\na/["
	code(t, save("three"), codes.InvalidArgument, ExcludeAnnotation, `"a/["`)
	answer.Annotations[ExcludeAnnotation] = strings.Repeat("*.tmp\n", 100) // and one that the class has
	code(t, save("three"), codes.InvalidArgument, ExcludeAnnotation, "101 patterns")
	if err := save("one"); err != nil { // which is there already
		t.Error(err)
	}
}

// recorded is a recorder that remembers.
type recorded struct {
	mu     sync.Mutex
	events []backup.Event
}

func (r *recorded) Record(_ context.Context, e backup.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

func (r *recorded) take() []backup.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.events
	r.events = nil
	return all
}

// TestEvents: a snapshot that is refused is told of on its VolumeSnapshot, and jobs
// know whose they are.
func TestEvents(t *testing.T) {
	f, ctx, told := newFixture(t), context.Background(), &recorded{}
	engine, runner := newEngine(f.driver.Backends)
	f.driver.Backups, f.driver.Recorder = engine, told
	f.driver.Claims = func(context.Context, string, string) (Claim, error) { return Claim{Volume: "data", UID: "u"}, nil }
	made := create("data", writer, nil)
	made.Parameters = map[string]string{claimNamespaceKey: "prod", claimNameKey: "data"}
	v := f.volume(made)
	const uid = "0b5f3c6e-7d4e-4a6c-8f0e-2a1b3c4d5e6f"
	save := func(volume, kind string) (*csi.CreateSnapshotResponse, error) {
		return f.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snapshot-" + uid, SourceVolumeId: volume, Parameters: map[string]string{
			"type": kind, "repository": "offsite", snapshotNameKey: "nightly", snapshotNamespaceKey: "shop"}})
	}
	snapshot := backup.Object{Kind: "VolumeSnapshot", Namespace: "shop", Name: "nightly", UID: uid}
	_, err := save(v.GetVolumeId(), "bakcup")
	code(t, err, codes.InvalidArgument)
	if all := told.take(); len(all) != 1 || all[0].Object != snapshot || all[0].Reason != backup.SnapshotRefused || !strings.Contains(all[0].Text, "bakcup") {
		t.Errorf("%+v", all)
	}
	f.backend.On("CreateSnapshot").Nth(1).Fail(backend.ErrPending)
	_, err = save(v.GetVolumeId(), "backup")
	code(t, err, codes.Aborted)
	s, err := save(v.GetVolumeId(), "backup")
	if all := told.take(); err != nil || len(all) != 0 {
		t.Errorf("what goes well is the engine's to tell: %+v, %v", all, err)
	}
	if about := runner.jobs[digest("snapshot-"+uid)].Job.About; !slices.Equal(about, []backup.Object{snapshot,
		{Kind: "PersistentVolumeClaim", Namespace: "prod", Name: "data", UID: "u"}}) {
		t.Errorf("the backup is about %v", about)
	}
	job := runner.jobs[digest("snapshot-"+uid)]
	ok := *job
	job.Phase, job.Trouble, job.Result.Backup = backup.Running, "no node", nil
	_, err = save(v.GetVolumeId(), "backup")
	code(t, err, codes.Unavailable, "no node")
	if all := told.take(); len(all) != 0 {
		t.Errorf("what goes wrong with a job is the engine's to tell: %+v", all)
	}
	*job = ok
	back := create("pvc-"+uid, writer, nil)
	back.Parameters = map[string]string{claimNamespaceKey: "shop", claimNameKey: "back"}
	back.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: s.GetSnapshot().GetSnapshotId()}}}
	engine.Recorder = told
	f.volume(back)
	if all := told.take(); len(all) == 0 || all[len(all)-1].Reason != backup.RestoreFinished ||
		all[0].Object != (backup.Object{Kind: "PersistentVolumeClaim", Namespace: "shop", Name: "back", UID: uid}) {
		t.Errorf("restore: %+v", all)
	}
}
