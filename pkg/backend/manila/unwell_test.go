package manila

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// TestSlowerThanTheCall: an answer takes longer than the caller has time, before the
// request has its effect or after it. The call ends with its time, and the repeated
// one finds what was made.
func TestSlowerThanTheCall(t *testing.T) {
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprint("after it: ", after), func(t *testing.T) {
			t.Parallel()
			n := 0
			for ; ; n++ {
				c := newCloud(t, fakemanila.Options{Delay: slow})
				b := c.open()
				c.Requests()
				c.Add(fakemanila.Fault{Path: "/v2/", Skip: n, Delay: time.Minute, After: after})
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				begun := time.Now()
				_, err := b.CreateShare(ctx, request("data"))
				cancel()
				if err == nil {
					break
				}
				if took := time.Since(begun); took > 30*time.Second || !errors.Is(err, backend.ErrPending) && !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("request %d: after %s: %v", n, took, err)
				}
				ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
				takeDown(t, c, fmt.Sprint("request ", n))
			}
			if n < 4 {
				t.Errorf("of %d requests only", n)
			}
		})
	}
}

// TestMicroversion: a cloud that refuses the microversion that it lists, from the
// start or at one of its servers.
func TestMicroversion(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Microversion: "2.60", Claimed: "2.89"})
	if _, err := Open(t.Context(), c.options()); !errors.Is(err, backend.ErrUnsupported) || !strings.Contains(err.Error(), "maximum is 2.60") {
		t.Errorf("open: %v", err)
	}
	refusal := fakemanila.Fault{Status: http.StatusNotAcceptable, Text: `{"computeFault":{"code":406,"message":"Version 2.89 is not supported by the API."}}`}
	for n := 0; ; n++ {
		c := newCloud(t, fakemanila.Options{Delay: slow})
		b := c.open()
		// The call before has made a share, and does not know.
		c.Add(fakemanila.Fault{Method: "POST", Path: "/shares", Cut: true, After: true})
		if _, err := b.CreateShare(t.Context(), request("data")); !errors.Is(err, backend.ErrPending) {
			t.Fatal(err)
		}
		f := refusal
		f.Path, f.Skip = "/v2/", n
		c.Add(f)
		_, err := b.CreateShare(t.Context(), request("data"))
		if err == nil {
			break
		}
		if !unsure(err) {
			t.Errorf("request %d: %v", n, err)
		}
		ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
		takeDown(t, c, fmt.Sprint("request ", n))
	}
}

// TestTypeChanged: what a share can do was decided when it was made.
func TestTypeChanged(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	old := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("old")))
	c.Alter(func(objects fakemanila.Objects) {
		for _, typ := range objects.Types {
			clear(typ.Specs)
		}
	})
	cut := backend.CreateSnapshotRequest{Name: "cut", ShareID: old.ID, Role: backend.RoleUser}
	snapshot := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), cut))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "one"))
	clone := request("clone")
	clone.FromSnapshot = snapshot.ID
	copied := ok[*backend.Share](t)(b.CreateShare(t.Context(), clone))
	if now := ok[*backend.Share](t)(b.Share(t.Context(), old.ID)); !now.Can.Snapshot || copied.Can.Snapshot {
		t.Errorf("the old one can do %+v, and the new one %+v", now.Can, copied.Can)
	}
	cut.Name, cut.ShareID = "never", copied.ID
	if _, err := b.CreateSnapshot(t.Context(), cut); !errors.Is(err, backend.ErrUnsupported) {
		t.Errorf("a snapshot of the new one: %v", err)
	}
}

// TestSnapshotsAlone: shares of a type that has snapshots and cannot make shares from them.
// On CephFS they are mounted all the same; elsewhere nothing shows them, and that is said.
func TestSnapshotsAlone(t *testing.T) {
	for protocol, mounted := range map[string]bool{"CEPHFS": true, "NFS": false} {
		c := newCloud(t, fakemanila.Options{Protocol: protocol})
		c.Alter(func(objects fakemanila.Objects) {
			for _, typ := range objects.Types {
				typ.Specs = map[string]any{"snapshot_support": "True"}
			}
		})
		b := c.open()
		req := request("data")
		req.Parameters = map[string]string{"protocol": protocol}
		share := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
		if want := (backend.Abilities{Snapshot: true, MountSnapshot: mounted}); share.Can != want {
			t.Errorf("%s: can %+v, want %+v", protocol, share.Can, want)
		}
		snapshot := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
		clone := request("clone")
		clone.FromSnapshot = snapshot.ID
		if _, err := b.CreateShare(t.Context(), clone); !errors.Is(err, backend.ErrUnsupported) || !strings.Contains(err.Error(), "create_share_from_snapshot_support") {
			t.Errorf("%s: clone: %v", protocol, err)
		}
		x, err := b.Export(t.Context(), backend.Target{SnapshotID: snapshot.ID}, "one")
		switch {
		case mounted && (err != nil || x.Way != wayDirectory):
			t.Errorf("%s: %+v, %v", protocol, x, err)
		case !mounted && (!errors.Is(err, backend.ErrUnsupported) || !strings.Contains(err.Error(), "cannot be mounted")):
			t.Errorf("%s: %+v, %v", protocol, x, err)
		}
	}
}

// TestSizesOfType: a share has a size that its type and its request allow.
func TestSizesOfType(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	c.Alter(func(objects fakemanila.Objects) {
		for _, typ := range objects.Types {
			typ.Specs = map[string]any{"provisioning:min_share_size": "5", "provisioning:max_share_size": "10"}
		}
	})
	b := c.open()
	for _, test := range []struct{ least, most, size int64 }{{1, 0, 5}, {1, 5, 5}, {7, 0, 7}, {10, 20, 10}, {1, 4, 0}, {11, 20, 0}} {
		req := request(fmt.Sprint(test))
		req.MinSize, req.MaxSize = test.least*gib, test.most*gib
		for range 2 { // and again
			share, err := b.CreateShare(t.Context(), req)
			if test.size == 0 && (!errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), `of the type "cephfs" have at`)) || test.size > 0 && (err != nil || share.Size != test.size*gib) {
				t.Errorf("%+v: %+v, %v", test, share, err)
			}
		}
	}
}
