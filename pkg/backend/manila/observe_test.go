package manila

import (
	"errors"
	"regexp"
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
