package csi

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/abaca-csi/abaca/pkg/backend"
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
	if err := save("one"); err != nil { // which is there already
		t.Error(err)
	}
}
