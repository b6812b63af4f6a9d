package manila

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

const keystone = "/v3/auth/tokens"

// unwelcome is Keystone's answer to credentials that it does not take.
var unwelcome = fakemanila.Fault{Path: keystone, Status: http.StatusUnauthorized, Text: `{"error":{"code":401,"message":"no"}}`}

// unsure says whether an error of a creation lets an orchestrator call again before
// it forgets the object.
func unsure(err error) bool {
	return errors.Is(err, backend.ErrPending) || errors.Is(err, backend.ErrUnavailable) || errors.Is(err, backend.ErrAuth) || errors.Is(err, context.DeadlineExceeded)
}

// TestRenewal: the token ends at each request of a creation, and Keystone does not
// answer for a moment or for long, or takes the credentials no more. Nothing is
// left behind when it does again.
func TestRenewal(t *testing.T) {
	for name, test := range map[string]struct {
		fault fakemanila.Fault
		over  bool // it gets over it
	}{
		"503 once":  {fakemanila.Fault{Path: keystone, Status: 503}, true},
		"503":       {fakemanila.Fault{Path: keystone, Status: 503, Times: 1 << 30}, false},
		"cut":       {fakemanila.Fault{Path: keystone, Cut: true, Times: 1 << 30}, false},
		"401 a day": {func() fakemanila.Fault { f := unwelcome; f.Times = 1 << 30; return f }(), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			snapshot := backend.CreateSnapshotRequest{Name: "new", Role: backend.RoleUser}
			for what, create := range map[string]func(context.Context, *Backend) error{
				"share":    func(ctx context.Context, b *Backend) error { return errOf(b.CreateShare(ctx, request("new"))) },
				"snapshot": func(ctx context.Context, b *Backend) error { return errOf(b.CreateSnapshot(ctx, snapshot)) },
			} {
				for n := 0; ; n++ {
					c := newCloud(t, fakemanila.Options{Delay: slow})
					b := c.open()
					snapshot.ShareID = ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data"))).ID
					c.Requests()
					c.Add(fakemanila.Fault{Path: "/v2/", Skip: n, Expire: true})
					c.Add(test.fault)
					limit := 500 * time.Millisecond
					if test.over {
						limit = time.Minute
					}
					ctx, cancel := context.WithTimeout(t.Context(), limit)
					err := create(ctx, b)
					cancel()
					hit := false
					for _, r := range c.Requests() {
						hit = hit || strings.HasPrefix(r.Path, "/v3") || r.Code == http.StatusUnauthorized
					}
					if !hit {
						break
					}
					if test.over && err != nil || !test.over && (err == nil || !unsure(err)) {
						t.Errorf("%s, request %d: %v", what, n, err)
					}
					if refused := errors.Is(err, backend.ErrAuth); refused && name != "401 a day" {
						t.Errorf("%s, request %d: Keystone has refused nothing: %v", what, n, err)
					}
					c.Mend()
					if err := create(t.Context(), b); err != nil {
						t.Errorf("%s, request %d, and again: %v", what, n, err)
					}
					takeDown(t, c, fmt.Sprintf("%s, request %d", what, n))
				}
			}
		})
	}
}

// TestRenewalForOthers: a call whose time ends while it renews the token takes no
// other call with it.
func TestRenewalForOthers(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	c.ExpireTokens()
	// It is told so first, and the others while it waits for Keystone.
	c.Add(fakemanila.Fault{Path: "/shares/detail", Delay: 100 * time.Millisecond})
	c.Add(fakemanila.Fault{Path: "/shares/detail", Delay: 150 * time.Millisecond, Times: 4})
	c.Add(fakemanila.Fault{Path: keystone, Delay: 300 * time.Millisecond, Times: 1 << 30})
	var group sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	group.Go(func() {
		if _, err := b.CreateShare(ctx, request("hurried")); !errors.Is(err, backend.ErrPending) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without time: %v", err)
		}
	})
	time.Sleep(20 * time.Millisecond)
	for i := range 4 {
		group.Go(func() {
			if _, err := b.CreateShare(t.Context(), request(fmt.Sprint(i))); err != nil {
				t.Errorf("with time: %v", err)
			}
		})
	}
	group.Wait()
}
