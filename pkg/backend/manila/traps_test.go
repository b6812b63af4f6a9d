package manila

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

func ok[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func request(name string) backend.CreateShareRequest {
	return backend.CreateShareRequest{Name: name, MinSize: gib, Role: backend.RoleUser}
}

func slow() time.Duration { return time.Duration(rand.IntN(4)) * time.Millisecond }

// TestCutAtEveryRequest breaks every call off before and after each request that
// changes something, as kill -9 does, and has another process repeat it. There
// must be one object, and in the end nothing.
func TestCutAtEveryRequest(t *testing.T) {
	type ground struct {
		share    *backend.Share
		snapshot *backend.Snapshot
	}
	for _, op := range []struct {
		name string
		typ  string
		do   func(context.Context, *Backend, ground) error
	}{
		{"create share", "", func(ctx context.Context, b *Backend, _ ground) error {
			return errOf(b.CreateShare(ctx, request("new")))
		}},
		{"clone, larger", "", func(ctx context.Context, b *Backend, g ground) error {
			req := request("new")
			req.FromSnapshot, req.MinSize = g.snapshot.ID, 3*gib
			return errOf(b.CreateShare(ctx, req))
		}},
		{"create snapshot", "", func(ctx context.Context, b *Backend, g ground) error {
			return errOf(b.CreateSnapshot(ctx, backend.CreateSnapshotRequest{Name: "new", ShareID: g.share.ID, Role: backend.RoleUser}))
		}},
		{"expand", "", func(ctx context.Context, b *Backend, g ground) error {
			return errOf(b.ExpandShare(ctx, g.share.ID, 2*gib))
		}},
		{"export share", "", func(ctx context.Context, b *Backend, g ground) error {
			return errOf(b.Export(ctx, backend.Target{ShareID: g.share.ID}, "one"))
		}},
		{"export snapshot by its directory", "", func(ctx context.Context, b *Backend, g ground) error {
			return errOf(b.Export(ctx, backend.Target{SnapshotID: g.snapshot.ID}, "one"))
		}},
		{"export snapshot by the API", "mountable", func(ctx context.Context, b *Backend, g ground) error {
			return errOf(b.Export(ctx, backend.Target{SnapshotID: g.snapshot.ID}, "one"))
		}},
		{"export snapshot by a copy", "nfs", func(ctx context.Context, b *Backend, g ground) error {
			return errOf(b.Export(ctx, backend.Target{SnapshotID: g.snapshot.ID}, "one"))
		}},
		{"grant", "", func(ctx context.Context, b *Backend, g ground) error {
			return errOf(b.Grant(ctx, "held-share", node1, true))
		}},
		{"grant by address", "mountable", func(ctx context.Context, b *Backend, g ground) error {
			return errOf(b.Grant(ctx, "held-share", node1, false))
		}},
		{"revoke", "", func(ctx context.Context, b *Backend, g ground) error { return b.Revoke(ctx, "held-share", node2.Name) }},
		{"revoke by address", "mountable", func(ctx context.Context, b *Backend, g ground) error {
			return b.Revoke(ctx, "held-snapshot", node1.Name)
		}},
		{"unexport share", "", func(ctx context.Context, b *Backend, g ground) error {
			return b.Unexport(ctx, backend.Target{ShareID: g.share.ID}, "held-share")
		}},
		{"unexport snapshot", "", func(ctx context.Context, b *Backend, g ground) error {
			return b.Unexport(ctx, backend.Target{SnapshotID: g.snapshot.ID}, "held-snapshot")
		}},
		{"unexport copy", "nfs", func(ctx context.Context, b *Backend, g ground) error {
			return b.Unexport(ctx, backend.Target{SnapshotID: g.snapshot.ID}, "held-snapshot")
		}},
		{"delete share", "", func(ctx context.Context, b *Backend, g ground) error {
			if err := errors.Join(b.Unexport(ctx, backend.Target{SnapshotID: g.snapshot.ID}, "held-snapshot"), b.DeleteSnapshot(ctx, g.snapshot.ID)); err != nil {
				return err
			}
			return b.DeleteShare(ctx, g.share.ID)
		}},
		{"delete share with snapshots", "", func(ctx context.Context, b *Backend, g ground) error { return b.DeleteShare(ctx, g.share.ID) }},
		{"delete snapshot, then the share that waits for it", "", func(ctx context.Context, b *Backend, g ground) error {
			if err := b.Unexport(ctx, backend.Target{SnapshotID: g.snapshot.ID}, "held-snapshot"); err != nil {
				return err
			}
			if err := b.DeleteShare(ctx, g.share.ID); err != nil {
				return err
			}
			return b.DeleteSnapshot(ctx, g.snapshot.ID)
		}},
		{"fill a draft", "", func(ctx context.Context, b *Backend, g ground) error {
			req := request("new")
			req.Draft = true
			draft, err := b.CreateShare(ctx, req)
			if err == nil {
				err = b.CommitShare(ctx, draft.ID)
			}
			if err != nil {
				return err
			}
			if now, err := b.Share(ctx, draft.ID); err != nil || now.Draft {
				return fmt.Errorf("%+v, %w", now, err)
			}
			return nil
		}},
		{"sweep", "", func(ctx context.Context, b *Backend, g ground) error {
			if err := b.DeleteShare(ctx, g.share.ID); err != nil {
				return err
			}
			if s, err := b.getSnapshot(ctx, g.snapshot.ID); err == nil { // by other hands
				if err := b.removeSnapshot(ctx, s); err != nil {
					return err
				}
			}
			if waiting, err := b.Sweep(ctx); err != nil || len(waiting) > 0 {
				return fmt.Errorf("waiting: %q, %w", waiting, err)
			}
			return nil
		}},
	} {
		t.Run(op.name, func(t *testing.T) {
			t.Parallel()
			points := 0
			for n := 1; n > 0; n++ {
				for _, after := range []bool{false, true} {
					c := newCloud(t, fakemanila.Options{Delay: slow, MaxLimit: 1 + n%3})
					b := c.open()
					req := request("data")
					if op.typ != "" {
						req.Parameters = map[string]string{"type": "mountable", "protocol": "NFS"}
					}
					if op.typ == "nfs" {
						req.MinSize = 2 * gib
						c.onlyCopies()
					}
					g := ground{}
					g.share = ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
					g.snapshot = ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: g.share.ID, Role: backend.RoleUser}))
					ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: g.share.ID}, "held-share"))
					ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{SnapshotID: g.snapshot.ID}, "held-snapshot"))
					ok[*backend.Export](t)(b.Grant(t.Context(), "held-share", node2, false))
					ok[*backend.Export](t)(b.Grant(t.Context(), "held-snapshot", node1, true))

					ctx, cancel := context.WithCancel(t.Context())
					struck := false
					c.Strike(func(change int, now bool) bool {
						if change == n && now == after {
							struck = true
							cancel() // nothing more comes of the process
						}
						return struck
					})
					err := op.do(ctx, b, g)
					cancel()
					c.Strike(nil)
					if !struck {
						if err != nil {
							t.Fatalf("without a cut: %v", err)
						}
						n = -1
						break
					}
					points++
					for try := 0; ; try++ {
						if err = op.do(t.Context(), c.open(), g); err == nil || try > 50 || !errors.Is(err, backend.ErrPending) && !errors.Is(err, backend.ErrUnavailable) {
							break
						}
					}
					if err != nil {
						t.Fatalf("cut at change %d, after it: %v: the repeated call: %v", n, after, err)
					}
					takeDown(t, c, fmt.Sprintf("cut at change %d, after it: %v", n, after))
				}
			}
			if points < 2 {
				t.Errorf("cut at %d points only", points)
			}
			t.Logf("cut at %d points", points)
		})
	}
}

func errOf[T any](_ T, err error) error { return err }

// takeDown removes by the contract's calls all that there is, and wants nothing to
// be left in the cloud.
func takeDown(t *testing.T, c *cloud, when string) {
	t.Helper()
	ctx, b := t.Context(), c.open()
	exports, _, err := b.ListExports(ctx, "", 0)
	for _, x := range exports {
		err = errors.Join(err, b.Unexport(ctx, x.Target, x.Consumer))
	}
	snapshots, _, serr := b.ListSnapshots(ctx, "", 0)
	err = errors.Join(err, serr)
	names := map[string]int{}
	for _, s := range snapshots {
		names["snapshot "+s.Name]++
		err = errors.Join(err, b.DeleteSnapshot(ctx, s.ID))
	}
	shares, _, serr := b.ListShares(ctx, "", 0)
	err = errors.Join(err, serr)
	for _, s := range shares {
		names["share "+s.Name]++
		err = errors.Join(err, b.DeleteShare(ctx, s.ID))
	}
	for name, n := range names {
		if n > 1 {
			t.Errorf("%s: %d of %s", when, n, name)
		}
	}
	if left := c.Counts(); err != nil || left != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("%s: left behind: %s, %v", when, left, err)
	}
	if len(c.keys.keys) > 0 {
		t.Errorf("%s: keys of %v are left", when, slices.Collect(maps.Keys(c.keys.keys)))
	}
}

// TestFailedShares: a share that Manila could not make is removed, and the answer
// says why, in a way that tells an orchestrator what to do.
func TestFailedShares(t *testing.T) {
	for detail, kind := range map[string]error{
		"001": backend.ErrUnavailable, "002": backend.ErrExhausted, "003": backend.ErrInvalid, "004": backend.ErrExhausted,
		"005": backend.ErrUnavailable, "006": backend.ErrUnavailable, "007": backend.ErrExhausted, "008": backend.ErrInvalid,
		"009": backend.ErrExhausted, "010": backend.ErrExhausted, "011": backend.ErrExhausted, "012": backend.ErrExhausted,
		"013": backend.ErrExhausted, "014": backend.ErrInvalid, "015": backend.ErrUnsupported, "016": backend.ErrExhausted,
		"017": backend.ErrUnavailable, "018": backend.ErrInvalid, "019": backend.ErrUnsupported, "020": backend.ErrInvalid,
		"021": backend.ErrUnsupported, "022": backend.ErrUnsupported, "023": backend.ErrUnsupported, "024": backend.ErrInvalid,
		"025": backend.ErrInvalid, "026": backend.ErrUnsupported, "027": backend.ErrExhausted, "028": backend.ErrUnavailable,
		"033": backend.ErrExhausted, "999": backend.ErrUnavailable,
	} {
		// It is being made for as long as it takes to fail it.
		var failed atomic.Bool
		c := newCloud(t, fakemanila.Options{Delay: func() time.Duration {
			if failed.Load() {
				return 0
			}
			return time.Hour
		}})
		b := c.open()
		go func() {
			share := func(do func(*fakemanila.Share)) (id string) {
				c.Alter(func(objects fakemanila.Objects) {
					for i, s := range objects.Shares {
						id = i
						do(s)
					}
				})
				return id
			}
			id := ""
			for ; id == ""; time.Sleep(time.Millisecond) {
				id = share(func(*fakemanila.Share) {})
			}
			c.Say(id, detail, "create: it was not to be")
			failed.Store(true)
			share(func(s *fakemanila.Share) { s.Status = "error" })
		}()
		_, err := b.CreateShare(t.Context(), request("data"))
		if !errors.Is(err, kind) || detail != "999" && !strings.Contains(err.Error(), "it was not to be") {
			t.Errorf("detail %s: %v, want %v", detail, err, kind)
		}
		if left := c.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
			t.Errorf("detail %s: left behind: %s", detail, left)
		}
	}
}

// TestFailedCut: a snapshot that Manila could not cut goes, with its reason, and the next
// call cuts another one.
func TestFailedCut(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	c.Strike(func(change int, after bool) bool {
		if change == 1 && after {
			id := ""
			c.snapshots(func(all map[string]*fakemanila.Snapshot) {
				for id = range all {
					all[id].Status = "error"
				}
			})
			c.Say(id, "007", "create: it was not to be")
		}
		return false
	})
	req := backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID}
	if _, err := b.CreateSnapshot(t.Context(), req); !errors.Is(err, backend.ErrExhausted) || !strings.Contains(err.Error(), "it was not to be") {
		t.Errorf("%v", err)
	}
	if left := c.Counts(); left != "1 shares, 0 snapshots, 0 rules" {
		t.Errorf("left behind: %s", left)
	}
	c.Strike(nil)
	ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), req))
}

// TestSoftlyDeleted: a share in Manila's recycle bin is none: its name is free, and who
// deletes it again has nothing to do.
func TestSoftlyDeleted(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	binned := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	c.Alter(func(objects fakemanila.Objects) { objects.Shares[binned.ID].Deleted = true })
	for what, err := range map[string]error{
		"get": errOf(b.Share(t.Context(), binned.ID)), "find": errOf(b.ShareNamed(t.Context(), "data")), "expand": errOf(b.ExpandShare(t.Context(), binned.ID, 2*gib)),
		"export": errOf(b.Export(t.Context(), backend.Target{ShareID: binned.ID}, "one")),
	} {
		if !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := b.DeleteShare(t.Context(), binned.ID); err != nil {
		t.Error(err)
	}
	if again := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data"))); again.ID == binned.ID {
		t.Errorf("%+v", again)
	}
}

// saysNo has Manila refuse a method, as it says it.
func saysNo(method string, status int, message string) fakemanila.Fault {
	return fakemanila.Fault{Method: method, Status: status, Times: 1 << 30, Text: fmt.Sprintf(`{"refused": {"code": %d, "message": %q}}`, status, message)}
}

// TestRefusals: what Manila refuses, in the terms of the contract.
func TestRefusals(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Gigabytes: 10, PerShare: 5})
	b := c.open()
	with := func(name string, parameters map[string]string) backend.CreateShareRequest {
		req := request(name)
		req.Parameters = parameters
		return req
	}
	large, larger, between := request("a"), request("a"), request("a")
	large.MinSize, larger.MinSize, between.MinSize, between.MaxSize = 6*gib, 60*gib, gib+1, gib+2
	for name, test := range map[string]struct {
		req   backend.CreateShareRequest
		kind  error
		words string
	}{
		"more than one share may have": {large, backend.ErrExhausted, "limit 5"},
		"more than the quota":          {larger, backend.ErrExhausted, "larger"},
		"between two sizes":            {between, backend.ErrInvalid, "whole GiB"},
		"no such type":                 {with("a", map[string]string{"type": "gold"}), backend.ErrInvalid, "cephfs, cephfs-nosnap"},
		"a type that nothing serves":   {with("a", map[string]string{"type": "nowhere"}), backend.ErrInvalid, "extra specs"},
		"a wrong protocol":             {with("a", map[string]string{"protocol": "FTP"}), backend.ErrInvalid, "CEPHFS, NFS or CIFS"},
		"two zones":                    {with("a", map[string]string{"availability": "az-one", "autoTopology": "true"}), backend.ErrInvalid, "contradict"},
		"no network":                   {with("a", map[string]string{"access": "everybody"}), backend.ErrInvalid, "192.0.2.0/24"},
		"no client":                    {with("a", map[string]string{"access": " ,"}), backend.ErrInvalid, "names nothing"},
		"metadata of ours":             {with("a", map[string]string{"appendShareMetadata": `{"abaca.id":"x"}`}), backend.ErrInvalid, "abaca.id"},
		"metadata that is no object":   {with("a", map[string]string{"appendShareMetadata": "x"}), backend.ErrInvalid, "JSON"},
		"a directory outside":          {with("a", map[string]string{"snapshotDirectory": "../{id}"}), backend.ErrInvalid, "relative"},
		"a directory that is no path":  {with("a", map[string]string{"snapshotDirectory": ".snapshot//{id}"}), backend.ErrInvalid, "relative"},
		"a malformed pattern":          {with("a", map[string]string{"snapshotDirectory": ".snapshot/[{id}"}), backend.ErrInvalid, "relative"},
		"a name that no driver gives":  {with("a", map[string]string{"snapshotDirectory": ".snapshot/{name}"}), backend.ErrInvalid, "{instance_}"},
	} {
		_, err := b.CreateShare(t.Context(), test.req)
		if !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.words) {
			t.Errorf("%s: %v, want %v with %q", name, err, test.kind, test.words)
		}
		if left := c.Counts(); left != "0 shares, 0 snapshots, 0 rules" {
			t.Errorf("%s: left behind: %s", name, left)
		}
	}
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	if _, err := b.ExpandShare(t.Context(), share.ID, 50*gib); !errors.Is(err, backend.ErrExhausted) { // 403 of the real one
		t.Errorf("expand beyond the quota: %v", err)
	}
	c.Lock(share.ID, "audit until May")
	if err := b.DeleteShare(t.Context(), share.ID); !errors.Is(err, backend.ErrInUse) || !strings.Contains(err.Error(), "lock-"+share.ID+" (audit until May)") {
		t.Errorf("delete what is locked: %v", err)
	}
	c.Lock(share.ID, "")
	denied := "Policy doesn't allow this to be performed."
	for what, test := range map[string]struct {
		fault fakemanila.Fault
		call  func() error
		kind  error
		words string
	}{
		"it has backups":    {saysNo("DELETE", 403, "Invalid share: Share still has 2 dependent backups."), func() error { return b.DeleteShare(t.Context(), share.ID) }, backend.ErrInUse, "2 dependent backups"},
		"it has replicas":   {saysNo("DELETE", 409, "Share has replicas. Remove the replicas before deleting the share."), func() error { return b.DeleteShare(t.Context(), share.ID) }, backend.ErrInUse, "has replicas"},
		"it may not delete": {saysNo("DELETE", 403, denied), func() error { return b.DeleteShare(t.Context(), share.ID) }, backend.ErrAuth, denied},
		"it may not extend": {saysNo("POST", 403, denied), func() error { return errOf(b.ExpandShare(t.Context(), share.ID, 2*gib)) }, backend.ErrAuth, denied},
		"it may not snapshot": {saysNo("POST", 403, denied), func() error {
			return errOf(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "x", ShareID: share.ID}))
		}, backend.ErrAuth, denied},
	} {
		c.Add(test.fault)
		if err := test.call(); !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.words) {
			t.Errorf("%s: %v, want %v with %q", what, err, test.kind, test.words)
		}
		c.Mend()
	}
	plain := ok[*backend.Share](t)(b.CreateShare(t.Context(), with("plain", map[string]string{"type": "cephfs-nosnap"})))
	if _, err := b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "x", ShareID: plain.ID, Role: backend.RoleUser}); !errors.Is(err, backend.ErrUnsupported) || plain.Can.Snapshot {
		t.Errorf("a snapshot of what has none: %v, %+v", err, plain.Can)
	}
	nfs := ok[*backend.Share](t)(b.CreateShare(t.Context(), with("nfs", map[string]string{"type": "mountable", "protocol": "NFS"})))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: nfs.ID}, "one"))
	if _, err := b.Grant(t.Context(), "one", nodeOf("bare"), false); !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), `"access"`) {
		t.Errorf("let in a node that has no address: %v", err)
	}
	c.Alter(func(objects fakemanila.Objects) {
		for _, r := range objects.Rules {
			t.Errorf("a rule that nobody asked for: %+v", r)
		}
	})
}

// TestClone: a clone that is asked for larger than its snapshot has the size on
// the storage too.
func TestClone(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	snap := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
	req := request("clone")
	req.FromSnapshot, req.MinSize = snap.ID, 4*gib
	clone := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
	c.Alter(func(objects fakemanila.Objects) {
		if s := objects.Shares[clone.ID]; clone.Size != 4*gib || s.Size != 4 || s.Quota != 4 {
			t.Errorf("the clone has %d bytes, Manila says %d GiB, and the storage %d", clone.Size, s.Size, s.Quota)
		}
	})
}

// TestCloneTooLarge: a clone that can never have its size is none.
func TestCloneTooLarge(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Gigabytes: 10})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	req := request("clone")
	req.FromSnapshot = ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser})).ID
	req.MinSize = 50 * gib
	if _, err := b.CreateShare(t.Context(), req); !errors.Is(err, backend.ErrExhausted) {
		t.Errorf("a clone beyond the quota: %v", err)
	}
	if left := c.Counts(); left != "1 shares, 1 snapshots, 0 rules" {
		t.Errorf("there is %s", left)
	}
}

// TestSnapshotDirectory: a snapshot is looked for by the name that the back end's
// driver gives it; where that cannot be known, nothing is held, and the error says
// who has to do what.
func TestSnapshotDirectory(t *testing.T) {
	for pattern, name := range map[string]func(*fakemanila.Snapshot) string{
		".snapshot/share_snapshot_{instance_}": func(s *fakemanila.Snapshot) string {
			return ".snapshot/share_snapshot_" + strings.ReplaceAll(s.Instance, "-", "_")
		},
		".snapshot/share-snapshot-{instance}": func(s *fakemanila.Snapshot) string { return ".snapshot/share-snapshot-" + s.Instance },
		".snap/_{id}_*":                       func(s *fakemanila.Snapshot) string { return ".snap/_" + s.ID + "_*" },
	} {
		for _, shown := range []bool{true, false} {
			c := newCloud(t, fakemanila.Options{Instances: shown})
			b := c.open()
			req := request("data")
			req.Parameters = map[string]string{"type": "cephfs", "protocol": "NFS", "snapshotDirectory": pattern}
			share := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
			snap := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "a[*]/b", ShareID: share.ID, Role: backend.RoleUser}))
			x, err := b.Export(t.Context(), backend.Target{SnapshotID: snap.ID}, "one")
			want := ""
			c.Alter(func(objects fakemanila.Objects) {
				want = name(objects.Snapshots[snap.ID])
			})
			if shown || strings.Contains(pattern, placeID) {
				if err != nil || x.Path != want {
					t.Errorf("%s: %+v, %v, want %s", pattern, x, err, want)
				}
				continue
			}
			if !errors.Is(err, backend.ErrUnsupported) || !strings.Contains(err.Error(), "share_snapshot_instance:index") {
				t.Errorf("%s, which this user does not see: %v", pattern, err)
			}
			if err := b.DeleteSnapshot(t.Context(), snap.ID); err != nil {
				t.Errorf("it is held all the same: %v", err)
			}
		}
	}
}

// TestTwoDeletions: a deletion that withdraws leaves the mark of another one whose
// request is on its way, so that nobody holds what is deleted.
func TestTwoDeletions(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	one, two, three := c.open(), c.open(), c.open()
	share := ok[*backend.Share](t)(one.CreateShare(t.Context(), request("data")))
	snap := ok[*backend.Snapshot](t)(one.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
	marked := func() (found bool) {
		c.Alter(func(objects fakemanila.Objects) {
			for key := range objects.Shares[share.ID].Metadata {
				found = found || strings.HasPrefix(key, prefixDeleting)
			}
		})
		return found
	}
	c.Add(fakemanila.Fault{Method: "DELETE", Path: "/snapshots/", Delay: 2 * time.Second})
	var group sync.WaitGroup
	var deleted, exported error
	group.Go(func() { deleted = one.DeleteSnapshot(t.Context(), snap.ID) })
	for !marked() {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond) // it has looked, and its request is on its way
	c.Add(fakemanila.Fault{Method: "POST", Path: "/metadata", Body: prefixDeleting, Delay: 300 * time.Millisecond})
	c.Add(fakemanila.Fault{Method: "DELETE", Path: "/metadata/" + prefixHold, Delay: 600 * time.Millisecond})
	group.Go(func() { _ = three.DeleteSnapshot(t.Context(), snap.ID) })
	time.Sleep(100 * time.Millisecond)
	group.Go(func() { _, exported = two.Export(t.Context(), backend.Target{SnapshotID: snap.ID}, "reader") })
	group.Wait()
	if _, err := one.Snapshot(t.Context(), snap.ID); (err == nil) != (exported == nil) || (err != nil) != (deleted == nil) {
		t.Errorf("deleting: %v, exporting: %v, and looking for it: %v", deleted, exported, err)
	}
}

// TestStrangers: what this driver has not made is neither seen nor touched, and
// another instance's is a stranger's.
func TestStrangers(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	o := c.options()
	o.Instance = "other"
	other := ok[*Backend](t)(Open(t.Context(), o))
	if _, err := other.Share(t.Context(), share.ID); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("another instance sees it: %v", err)
	}
	if err := other.DeleteShare(t.Context(), share.ID); err != nil {
		t.Error(err)
	}
	all, _, err := other.ListShares(t.Context(), "", 0)
	if err != nil || len(all) > 0 {
		t.Errorf("another instance lists %v, %v", all, err)
	}
	if _, err := b.Share(t.Context(), share.ID); err != nil {
		t.Errorf("another instance has deleted it: %v", err)
	}
	mine := ok[*backend.Share](t)(other.CreateShare(t.Context(), request("data"))) // the same name
	if mine.ID == share.ID {
		t.Error("two instances have one share")
	}
}

// TestTokens: one token serves many calls, and is renewed once it has ended.
func TestTokens(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	signedIn := func() (n int) {
		for _, r := range c.Requests() {
			if strings.HasPrefix(r.Path, "/v3") {
				n++
			}
		}
		return n
	}
	if n := signedIn(); n != 1 {
		t.Errorf("signed in %d times to open", n)
	}
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			if _, err := b.CreateShare(t.Context(), request(fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if n := signedIn(); n != 0 {
		t.Errorf("signed in %d times more for 8 shares", n)
	}
	c.ExpireTokens()
	if _, _, err := b.ListShares(t.Context(), "", 0); err != nil {
		t.Error(err)
	}
	if n := signedIn(); n != 1 {
		t.Errorf("signed in %d times when the token had ended", n)
	}
	o := c.options()
	o.Cloud = "app"
	ok[*Backend](t)(Open(t.Context(), o))
	c.rewrite(fakemanila.Password, "wrong")
	if _, err := Open(t.Context(), c.options()); !errors.Is(err, backend.ErrAuth) || strings.Contains(err.Error(), "wrong") {
		t.Errorf("a wrong password: %v", err)
	}
}

// TestUnwell: a cloud that asks for patience, breaks connections, or
// answers what is no answer.
func TestUnwell(t *testing.T) {
	for name, test := range map[string]struct {
		fault fakemanila.Fault
		want  error // nil: it gets over it
	}{
		"429 with Retry-After": {fakemanila.Fault{Path: "/shares", Status: http.StatusTooManyRequests, Times: 2, Header: map[string]string{"Retry-After": "1"}}, nil},
		"503 of a listing":     {fakemanila.Fault{Method: "GET", Path: "/shares", Status: 503, Times: 2}, nil},
		"503 of a creation":    {fakemanila.Fault{Method: "POST", Path: "/shares", Status: 503}, backend.ErrPending},
		"500 of a creation":    {fakemanila.Fault{Method: "POST", Path: "/shares", Status: 500}, backend.ErrPending},
		"cut, nothing made":    {fakemanila.Fault{Method: "POST", Path: "/shares", Cut: true}, backend.ErrPending},
		"cut, all made":        {fakemanila.Fault{Method: "POST", Path: "/shares", Cut: true, After: true}, backend.ErrPending},
		"a page instead":       {fakemanila.Fault{Method: "GET", Path: "/shares", Status: 200, Text: "<html>Welcome</html>"}, backend.ErrUnavailable},
		"a proxy's 404":        {fakemanila.Fault{Method: "GET", Path: "/shares", Status: 404, Text: "<html>no such page</html>"}, backend.ErrUnavailable},
		"a proxy's 502":        {fakemanila.Fault{Method: "GET", Path: "/shares", Status: 502, Text: "<html>Bad Gateway</html>"}, backend.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCloud(t, fakemanila.Options{})
			b := c.open()
			c.Add(test.fault)
			begun := time.Now()
			_, err := b.CreateShare(t.Context(), request("data"))
			if after, _ := strconv.Atoi(test.fault.Header["Retry-After"]); time.Since(begun) < time.Duration(after*test.fault.Times)*time.Second {
				t.Errorf("asked again after %s", time.Since(begun))
			}
			if test.want == nil && err != nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("not one line: %q", err)
			}
			ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
			if left := c.Counts(); !strings.HasPrefix(left, "1 shares") {
				t.Errorf("there is %s", left)
			}
		})
	}
	// Down altogether.
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	c.Close()
	if _, err := b.Share(t.Context(), "x"); !errors.Is(err, backend.ErrUnavailable) {
		t.Errorf("a cloud that is down: %v", err)
	}
	old := newCloud(t, fakemanila.Options{Microversion: "2.37"})
	if _, err := Open(t.Context(), old.options()); !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), "2.45") {
		t.Errorf("an old cloud: %v", err)
	}
}

// TestOldMessages: a message of long ago, or about something else, is not the reason
// of what fails now.
func TestOldMessages(t *testing.T) {
	var stuck atomic.Bool
	c := newCloud(t, fakemanila.Options{Delay: func() time.Duration {
		if stuck.Load() {
			return time.Hour
		}
		return 0
	}})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: share.ID}, "one"))
	c.Say(share.ID, "021", "update access rules: the level is not supported")
	c.Age(time.Hour)
	c.Say(share.ID, "015", "extend: the back end could not")
	stuck.Store(true)
	go func() {
		for done := false; !done && t.Context().Err() == nil; time.Sleep(time.Millisecond) {
			c.Alter(func(objects fakemanila.Objects) {
				for _, r := range objects.Rules {
					r.State, done = "error", true
				}
			})
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // for the rule, which does not go either
	defer cancel()
	if _, err := b.Grant(ctx, "one", node1, true); !errors.Is(err, backend.ErrUnavailable) || !strings.Contains(err.Error(), "no reason") {
		t.Errorf("a rule in error: %v", err)
	}
}

// TestBehindOurBack: what others do to a share.
func TestBehindOurBack(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	set := func(change func(*fakemanila.Share)) {
		c.Alter(func(objects fakemanila.Objects) {
			change(objects.Shares[share.ID])
		})
	}
	for _, status := range []string{"migrating", "ensuring", "backup_creating", "something_new"} {
		set(func(s *fakemanila.Share) { s.Status = status })
		if got, err := b.Share(t.Context(), share.ID); err != nil || got.Problem != "" {
			t.Errorf("%s: %+v, %v", status, got, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := b.CreateSnapshot(ctx, backend.CreateSnapshotRequest{Name: status, ShareID: share.ID, Role: backend.RoleUser})
		cancel()
		if !errors.Is(err, backend.ErrUnavailable) || !strings.Contains(err.Error(), status) {
			t.Errorf("snapshot while %s: %v", status, err)
		}
	}
	set(func(s *fakemanila.Share) { s.Status = "error" })
	if got, err := b.Share(t.Context(), share.ID); err != nil || !strings.Contains(got.Problem, "error") {
		t.Errorf("error: %+v, %v", got, err)
	}
	set(func(s *fakemanila.Share) { s.Status, s.Size = "available", 7 })
	if got, err := b.Share(t.Context(), share.ID); err != nil || got.Size != 7*gib {
		t.Errorf("extended by others: %+v, %v", got, err)
	}
	set(func(s *fakemanila.Share) { s.Status = "error_deleting" })
	if err := b.DeleteShare(t.Context(), share.ID); !errors.Is(err, backend.ErrUnavailable) || !strings.Contains(err.Error(), "administrator") {
		t.Errorf("a share that cannot be deleted: %v", err)
	}
	set(func(s *fakemanila.Share) { s.Status = "error" })
	if err := b.DeleteShare(t.Context(), share.ID); err != nil {
		t.Errorf("and again: %v", err)
	}
	gone := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("gone")))
	c.Alter(func(objects fakemanila.Objects) {
		delete(objects.Shares, gone.ID)
	})
	if err := b.DeleteShare(t.Context(), gone.ID); err != nil {
		t.Error(err)
	}
	if _, err := b.Share(t.Context(), gone.ID); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("deleted by others: %v", err)
	}
}

// TestOneDeletionAtATime: of two DELETEs of one share at once, a real Manila takes both,
// and has the share in the state error_deleting then.
func TestOneDeletionAtATime(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	var deleting, most atomic.Int64
	c.Strike(func(_ int, after bool) bool {
		if after {
			deleting.Add(-1)
			return false
		}
		most.Store(max(most.Load(), deleting.Add(1)))
		time.Sleep(20 * time.Millisecond)
		return false
	})
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if err := b.DeleteShare(t.Context(), share.ID); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if most.Load() != 1 {
		t.Errorf("%d at once", most.Load())
	}
}

// TestMetadataTries: Manila's database may fail to write the metadata of one share for
// several at once.
func TestMetadataTries(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Delay: slow})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	c.Add(fakemanila.Fault{Method: "POST", Path: "/metadata", Status: 500, Times: 2})
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: share.ID}, "writer"))
}

// TestRules: one id a consumer and level; a rule that fails goes, and says why.
func TestRules(t *testing.T) {
	var hours atomic.Int64
	c := newCloud(t, fakemanila.Options{Delay: func() time.Duration { return slow() + time.Duration(hours.Load())*time.Hour }})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	snap := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: share.ID}, "writer"))
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{SnapshotID: snap.ID}, "reader"))
	if len(c.keys.keys) > 0 {
		t.Errorf("nobody mounts it, and there are keys of %v", slices.Collect(maps.Keys(c.keys.keys)))
	}
	rw := ok[*backend.Export](t)(b.Grant(t.Context(), "writer", node1, false))
	ro := ok[*backend.Export](t)(b.Grant(t.Context(), "reader", node1, false)) // it is a snapshot all the same
	if rw.User == ro.User || c.keys.keys[rw.User] == "" || c.keys.keys[ro.User] == "" {
		t.Errorf("users %q and %q, keys of %v", rw.User, ro.User, slices.Collect(maps.Keys(c.keys.keys)))
	}
	if !ro.ReadOnly || ro.Path != ".snap/_"+snap.ID+"_*" || ro.Way != wayDirectory || !slices.Contains(ro.Options, "fs=cephfs") {
		t.Errorf("export of the snapshot: %+v", ro)
	}
	levels := map[string]string{}
	c.Alter(func(objects fakemanila.Objects) {
		for _, r := range objects.Rules {
			levels[r.To] = r.Level
		}
	})
	if levels[rw.User] != "rw" || levels[ro.User] != "ro" || len(levels) != 2 {
		t.Errorf("levels: %v", levels)
	}
	// Rules that do not come into effect: nothing does for an hour.
	hours.Store(1)
	failing := b.user("failing")
	go func() {
		for done := false; !done && t.Context().Err() == nil; time.Sleep(time.Millisecond) {
			c.Alter(func(objects fakemanila.Objects) {
				for _, r := range objects.Rules {
					if r.To == failing {
						r.State, done = "error", true
					}
				}
			})
		}
	}()
	c.Say(share.ID, "021", "update access rules: the level is not supported")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // for the rule, which does not go either
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: share.ID}, "failing"))
	_, err := b.Grant(ctx, "failing", node1, false)
	cancel()
	if !errors.Is(err, backend.ErrUnsupported) || !strings.Contains(err.Error(), "not supported") {
		t.Errorf("a rule in error: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: share.ID}, "stuck"))
	_, err = b.Grant(ctx, "stuck", node1, false)
	cancel()
	if !notYet(err) {
		t.Errorf("a rule that stays queued: %v", err)
	}
}

// TestClassOfSource: a clone has type and protocol of its source, and a snapshot is
// mounted as its share's class says; a class that says otherwise is refused.
func TestClassOfSource(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	req := request("data")
	req.Parameters = map[string]string{"type": "mountable", "protocol": "NFS", "access": "192.0.2.7,192.0.2.8"}
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
	req = request("clone")
	req.FromSnapshot = ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser})).ID
	for _, test := range []struct {
		clone  bool
		class  map[string]string
		refuse string
	}{
		{true, map[string]string{"type": "cephfs", "protocol": "NFS"}, `"mountable"`},
		{true, map[string]string{"type": "gold"}, `"gold"`},
		{true, map[string]string{"type": "mountable", "protocol": "CIFS"}, "NFS"},
		{true, map[string]string{"type": "mountable", "protocol": "nfs", "access": "192.0.2.9"}, ""},
		{false, nil, ""},
		{false, map[string]string{"type": "cephfs", "autoTopology": "true", "access": ""}, ""}, // of what is made
		{false, map[string]string{"access": "192.0.2.8/32, 192.0.2.7"}, ""},
		{false, map[string]string{"access": "node"}, "192.0.2.7,192.0.2.8"},
		{false, map[string]string{"access": "everybody"}, "192.0.2.0/24"},
		{false, map[string]string{"snapshotDirectory": ".snapshot/{id}"}, "snapshotDirectory"},
		{false, map[string]string{"cephfs-mounter": "FUSE"}, "kernel, fuse"},
	} {
		var err error
		if req.Parameters = test.class; test.clone {
			_, err = b.CreateShare(t.Context(), req)
		} else {
			err = b.CheckReference(t.Context(), share.ID, test.class)
		}
		if (err == nil) != (test.refuse == "") || err != nil && (!errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), test.refuse)) {
			t.Errorf("%+v: %v", test, err)
		}
	}
}

// TestZones: a zone that is full is not the end while there is another one, and a
// clone is not made where it is not wanted.
func TestZones(t *testing.T) {
	full := map[string]bool{"az-one": true}
	c := newCloud(t, fakemanila.Options{Delay: slow, Full: func(zone string) bool { return full[zone] }})
	b := c.open()
	in := func(name string, zones ...string) backend.CreateShareRequest {
		req := request(name)
		req.Zones, req.Parameters = zones, map[string]string{"autoTopology": "true"}
		return req
	}
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), in("data", "az-one", "az-two")))
	if share.Zone != "az-two" {
		t.Errorf("made in %q", share.Zone)
	}
	if again := ok[*backend.Share](t)(b.CreateShare(t.Context(), in("data", "az-one", "az-two"))); again.ID != share.ID {
		t.Errorf("made twice: %s and %s", share.ID, again.ID)
	}
	full["az-two"] = true
	if _, err := b.CreateShare(t.Context(), in("more", "az-two", "az-one", "az-two")); !errors.Is(err, backend.ErrExhausted) {
		t.Errorf("where there is room in no zone: %v", err)
	}
	snap := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}))
	clone := in("clone", "az-one")
	clone.FromSnapshot, full["az-two"] = snap.ID, false
	if _, err := b.CreateShare(t.Context(), clone); !errors.Is(err, backend.ErrExhausted) || !strings.Contains(err.Error(), "az-two") {
		t.Errorf("a clone in another zone than its source: %v", err)
	}
	if left := c.Counts(); left != "1 shares, 1 snapshots, 0 rules" {
		t.Errorf("there is %s", left)
	}
	clone.Zones = append(clone.Zones, "az-two")
	if made := ok[*backend.Share](t)(b.CreateShare(t.Context(), clone)); made.Zone != "az-two" {
		t.Errorf("the clone is in %q", made.Zone)
	}
}

// TestParameters: a class reaches Manila.
func TestParameters(t *testing.T) {
	c := newCloud(t, fakemanila.Options{Administrator: true}) // who is shown more than may be mounted
	b := c.open()
	req := request("data")
	req.Zones = []string{"az-two", "az-one"}
	req.Parameters = map[string]string{"autoTopology": "true", "appendShareMetadata": `{"team":"storage"}`, "cephfs-mounter": "fuse"}
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), req))
	x := ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: share.ID}, "one"))
	if share.Zone != "az-two" || !slices.Contains(x.Options, "mounter=fuse") {
		t.Errorf("%+v, %+v", share, x)
	}
	c.Alter(func(objects fakemanila.Objects) {
		if s := objects.Shares[share.ID]; s.Metadata["team"] != "storage" || s.Zone != "az-two" {
			t.Errorf("%+v", s)
		}
	})
	nfs := request("nfs")
	nfs.Parameters = map[string]string{"type": "mountable", "protocol": "NFS", "access": "192.0.2.7"}
	served := ok[*backend.Share](t)(b.CreateShare(t.Context(), nfs))
	x = ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: served.ID}, "two"))
	if x.Protocol != "nfs" || len(x.Locations) != 2 || !strings.HasPrefix(x.Locations[0], "127.0.0.1:/") || strings.Contains(fmt.Sprint(x.Locations), "admin") {
		t.Errorf("%+v", x)
	}
	near := request("near")
	near.Parameters = map[string]string{"type": "mountable", "protocol": "NFS", "exportNetworks": "198.51.100.0/24, 2001:db8::/64"}
	many := ok[*backend.Share](t)(b.CreateShare(t.Context(), near))
	c.Alter(func(objects fakemanila.Objects) {
		objects.Shares[many.ID].Locations = []fakemanila.Location{{Path: "192.0.2.9:/x", Preferred: true}, {Path: "[2001:db8::9]:/x"}, {Path: "nas.example.org:/x"},
			{Path: "198.51.100.7:/x"}, {Path: "198.51.100.9:/x", Preferred: true}, {Path: "198.51.100.8:/x", Admin: true}}
	})
	x = ok[*backend.Export](t)(b.Export(t.Context(), backend.Target{ShareID: many.ID}, "three"))
	if want := []string{"198.51.100.9:/x", "198.51.100.7:/x", "[2001:db8::9]:/x", "192.0.2.9:/x", "nas.example.org:/x"}; !slices.Equal(x.Locations, want) {
		t.Errorf("locations %q, want %q", x.Locations, want)
	}
	clone := request("clone")
	clone.FromSnapshot = ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: "near", ShareID: many.ID})).ID
	copied, err := b.getShare(t.Context(), ok[*backend.Share](t)(b.CreateShare(t.Context(), clone)).ID)
	if err != nil {
		t.Fatal(err)
	}
	if got := copied.class("exportNetworks"); got != near.Parameters["exportNetworks"] {
		t.Errorf("a clone has the networks %q", got)
	}
	near.Parameters["exportNetworks"] = "198.51.100.7/24"
	if _, err := b.CreateShare(t.Context(), near); err != nil { // it is there
		t.Error(err)
	}
	near.Name = "far"
	if _, err := b.CreateShare(t.Context(), near); !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), `"exportNetworks": "198.51.100.7/24" is in the network 198.51.100.0/24`) {
		t.Errorf("a network that is none: %v", err)
	}
	grouped := request("grouped")
	grouped.Note = "claim team-ü/data " + strings.Repeat("x", 300)
	grouped.Parameters = map[string]string{"type": "mountable", "protocol": "CIFS", "groupID": "a-group", "availability": "az-two", "shareNetworkID": "a-network",
		"affinity": "one-share", "antiAffinity": "another"}
	member := ok[*backend.Share](t)(b.CreateShare(t.Context(), grouped))
	c.Alter(func(objects fakemanila.Objects) {
		s := objects.Shares[member.ID]
		if s.Group != "a-group" || s.Protocol != "CIFS" || !strings.HasPrefix(s.Description, "claim team-?/data xxx") || s.Zone != "az-two" || s.Network != "a-network" || s.Hints["same_host"] != "one-share" || s.Hints["different_host"] != "another" {
			t.Errorf("%+v", s)
		}
	})
	for parameter, highest := range map[string]string{"groupID": "2.54", "affinity": "2.64", "antiAffinity": "2.64"} {
		old := request("old")
		old.Parameters = map[string]string{parameter: "x"}
		if _, err := newCloud(t, fakemanila.Options{Microversion: highest}).open().CreateShare(t.Context(), old); !errors.Is(err, backend.ErrUnsupported) || !strings.Contains(err.Error(), parameter) {
			t.Errorf("%s with %s: %v", parameter, highest, err)
		}
	}
	if err := b.DeleteShare(t.Context(), member.ID); err != nil {
		t.Error(err)
	}
}
