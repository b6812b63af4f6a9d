package manila

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// TestObserve: each request is told of, by what it is for and not by whom it is
// about, with its status.
func TestObserve(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	var mu sync.Mutex
	calls := map[string]map[int]int{}
	o := c.options()
	o.Observe = func(call string, status int, took time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		if calls[call] == nil {
			calls[call] = map[int]int{}
		}
		calls[call][status]++
		if took < 0 {
			t.Errorf("%s took %s", call, took)
		}
	}
	b, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	snapshot := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "x", ShareID: share.ID, Role: backend.RoleUser}))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "one"))
	if err := b.Unexport(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "one"); err != nil {
		t.Error(err)
	}
	if _, err := b.Share(t.Context(), "00000000-0000-4000-8000-000000000000"); err == nil {
		t.Error("there is such a share")
	}
	c.ExpireTokens()
	c.Add(fakemanila.Fault{Path: "/v3/auth/tokens", Status: 401})
	if _, err := b.Share(t.Context(), share.ID); !errors.Is(err, backend.ErrAuth) {
		t.Errorf("credentials that are refused: %v", err)
	}
	c.Close()
	if _, err := b.Share(t.Context(), share.ID); err == nil {
		t.Error("a cloud that is away answers")
	}
	for call := range calls {
		if !regexp.MustCompile(`^(GET|POST|PUT|DELETE) [a-z_-]+(/detail|/\{id\}(/[a-z_-]+(/\{id\})?)?)?$`).MatchString(call) {
			t.Errorf("%q is not one of a few", call)
		}
	}
	if s := calls["GET shares/{id}"]; s[200] == 0 || s[404] == 0 || s[401] == 0 || s[0] == 0 {
		t.Errorf("GET shares/{id}: %v", s)
	}
	if s := calls["POST shares"]; s[200]+s[202] != 1 {
		t.Errorf("POST shares: %v", s)
	}
}

// TestDocumentedCalls: the access rules that are documented for an application
// credential allow all that the driver asks for, and nothing else.
func TestDocumentedCalls(t *testing.T) {
	var mu sync.Mutex
	called, documented := map[string]bool{}, map[string]bool{}
	for _, version := range []string{"2.89", "2.72"} { // before 2.73 snapshots have no metadata
		c := newCloud(t, fakemanila.Options{Microversion: version, Instances: true, Delay: slow})
		o := c.options()
		o.Observe = func(call string, _ int, _ time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			called[call] = true
		}
		b, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		callAll(t, c, b)
	}

	text, err := os.ReadFile("../../../docs/examples/manila-access-rules.json")
	if err != nil {
		t.Fatal(err)
	}
	var rules []struct{ Service, Method, Path string }
	if err := json.Unmarshal(text, &rules); err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if r.Service != "sharev2" {
			t.Errorf("%+v", r)
		}
		path := strings.TrimPrefix(r.Path, "/v2/")
		documented[r.Method+" "+regexp.MustCompile(`\{[a-z]+\}`).ReplaceAllString(path, "{id}")] = true
	}
	delete(called, "GET versions")
	for call := range called {
		if !documented[call] {
			t.Errorf("the rules do not allow %s", call)
		}
	}
	for call := range documented {
		if !called[call] {
			t.Errorf("the rules allow %s, which nobody asks for", call)
		}
	}
}

func errOf2[T any](_ T, _ bool, err error) error { return err }

// callAll asks for all that a driver can ask for.
func callAll(t *testing.T, c *cloud, b *Backend) {
	t.Helper()
	want := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	// Each way in which snapshots are mounted, and a share type that fails.
	for i, parameters := range []map[string]string{
		{}, {"type": "mountable", "protocol": "NFS"}, {"protocol": "NFS", "snapshotDirectory": ".snapshot/{instance}"}, {"type": "nowhere"},
	} {
		req := request(fmt.Sprint("volume ", i))
		req.Parameters = parameters
		share, err := b.CreateShare(t.Context(), req)
		if parameters["type"] == "nowhere" {
			if err == nil {
				t.Error("a share of nowhere")
			}
			continue
		}
		want(err)
		snap := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: req.Name, ShareID: share.ID, Role: backend.RoleUser}))
		clone := request(fmt.Sprint("clone ", i))
		clone.FromSnapshot, clone.MinSize = snap.ID, 2*gib
		want(b.DeleteShare(t.Context(), ok[*backend.Share](t)(b.CreateShare(t.Context(), clone)).ID))
		for consumer, target := range map[string]backend.Target{fmt.Sprint("of-share-", i): {ShareID: share.ID}, fmt.Sprint("of-snapshot-", i): {SnapshotID: snap.ID}} {
			ok[*backend.Export](t)(b.Export(t.Context(), target, consumer))
			for _, readOnly := range []bool{true, false} {
				ok[*backend.Export](t)(b.Grant(t.Context(), consumer, node1, readOnly))
			}
			want(b.Revoke(t.Context(), consumer, node1.Name))
			want(b.Unexport(t.Context(), target, consumer))
		}
		c.Lock(share.ID, "audit")
		want(b.DeleteSnapshot(t.Context(), snap.ID))
		if err := b.DeleteShare(t.Context(), share.ID); err == nil {
			t.Error("a share that is locked is deleted")
		}
		c.Lock(share.ID, "")
		want(b.DeleteShare(t.Context(), share.ID))
	}
	want(errOf(b.Capacity(t.Context())))
	want(errOf(b.Sweep(t.Context())))
	for _, err := range []error{errOf2(b.ListShares(t.Context(), "", 0)), errOf2(b.ListSnapshots(t.Context(), "", 0)), errOf2(b.ListExports(t.Context(), "", 0))} {
		want(err)
	}
}
