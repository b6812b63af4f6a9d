package manila

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// TestLateTwin: two processes make an object for one name, and the request of one
// has its effect when the other has answered already, mostly within the same second.
// Both answer with the same, and nothing else is there.
func TestLateTwin(t *testing.T) {
	for _, version := range []string{"2.89", "2.60"} {
		for what, body := range map[string]string{"share": `"share_proto"`, "snapshot": `"snapshot":`} {
			t.Run(version+" "+what, func(t *testing.T) {
				t.Parallel()
				c := newCloud(t, fakemanila.Options{Microversion: version})
				early, late := c.open(), c.open()
				data := ok[*backend.Share](t)(early.CreateShare(t.Context(), request("data")))
				create := func(b *Backend, name string) (string, error) {
					if what == "share" {
						s, err := b.CreateShare(t.Context(), request(name))
						if err != nil {
							return "", err
						}
						return s.ID, nil
					}
					s, err := b.CreateSnapshot(t.Context(), backend.CreateSnapshotRequest{Name: name, ShareID: data.ID, Role: backend.RoleUser})
					if err != nil {
						return "", err
					}
					return s.ID, nil
				}
				for round := range 8 { // the ids are random
					name := fmt.Sprint("new", round)
					c.Requests()
					c.Add(fakemanila.Fault{Method: "POST", Body: body, Delay: 500 * time.Millisecond})
					var group sync.WaitGroup
					var second string
					var serr error
					group.Go(func() { second, serr = create(late, name) })
					for len(c.Requests()) == 0 { // it has looked
						time.Sleep(time.Millisecond)
					}
					time.Sleep(30 * time.Millisecond)
					first, err := create(early, name)
					group.Wait()
					if err != nil || serr != nil || first != second {
						t.Fatalf("%s and %s, %v, %v", first, second, err, serr)
					}
					want := fmt.Sprintf("%d shares, %d snapshots, 0 rules", 1, round+1)
					if what == "share" {
						want = fmt.Sprintf("%d shares, 0 snapshots, 0 rules", round+2)
					}
					if got := c.Counts(); got != want {
						t.Fatalf("there is %s, want %s", got, want)
					}
				}
			})
		}
	}
}

// TestTwinOfTheDead: what a process has made that is gone is removed by the call
// that makes the object again, once nobody can choose it, or that deletes it.
func TestTwinOfTheDead(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	cut := backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}
	snapshot := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), cut))
	// twins are there of both, and they were made so long ago.
	twins := func(ago time.Duration) {
		c.Alter(func(objects fakemanila.Objects) {
			s, sn := *objects.Shares[share.ID], *objects.Snapshots[snapshot.ID]
			s.ID, s.Metadata, sn.ID, sn.Metadata = "twin", maps.Clone(s.Metadata), "twin", maps.Clone(sn.Metadata)
			delete(s.Metadata, keyReady)
			delete(sn.Metadata, keyReady)
			objects.Shares["twin"], objects.Snapshots["twin"] = &s, &sn
			objects.Shares[share.ID].Created, objects.Snapshots[snapshot.ID].Created = time.Now().Add(-ago), time.Now().Add(-ago)
		})
	}
	again := func(want string) {
		t.Helper()
		if s := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data"))); s.ID != share.ID {
			t.Errorf("share %s, and it was %s", s.ID, share.ID)
		}
		if s := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), cut)); s.ID != snapshot.ID {
			t.Errorf("snapshot %s, and it was %s", s.ID, snapshot.ID)
		}
		if got := c.Counts(); got != want {
			t.Errorf("there is %s, want %s", got, want)
		}
	}
	twins(time.Second)
	again("2 shares, 2 snapshots, 0 rules")
	twins(time.Hour)
	again("1 shares, 1 snapshots, 0 rules")
	twins(time.Second)
	if err := errors.Join(b.DeleteSnapshot(t.Context(), snapshot.ID), b.DeleteShare(t.Context(), share.ID)); err != nil {
		t.Error(err)
	}
	if got := c.Counts(); got != "0 shares, 0 snapshots, 0 rules" {
		t.Errorf("there is %s", got)
	}
}

// TestFailedLater: a snapshot that somebody has is not removed because it has failed
// since.
func TestFailedLater(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	cut := backend.CreateSnapshotRequest{Name: "cut", ShareID: share.ID, Role: backend.RoleUser}
	snapshot := ok[*backend.Snapshot](t)(b.CreateSnapshot(t.Context(), cut))
	c.Alter(func(objects fakemanila.Objects) {
		objects.Snapshots[snapshot.ID].Status = "error"
	})
	if _, err := b.CreateSnapshot(t.Context(), cut); !errors.Is(err, backend.ErrUnavailable) || !strings.Contains(err.Error(), "administrator") {
		t.Errorf("again: %v", err)
	}
	if got := c.Counts(); got != "1 shares, 1 snapshots, 0 rules" {
		t.Errorf("there is %s", got)
	}
}

// TestOwnTwin: a call does not remove what it has made itself when another one has chosen it.
func TestOwnTwin(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	object := func(id string) *share {
		return &share{made: made{ID: id, Status: "available", Metadata: map[string]string{}}}
	}
	removed := 0
	on := calls[*share]{
		seen: func(context.Context, string, time.Duration) (sight[*share], error) {
			return sight[*share]{time.Now(), []*share{object("another"), object("own")}}, nil
		},
		get: func(context.Context, string) (*share, error) {
			s := object("own")
			s.Metadata[keyReady] = "true"
			return s, nil
		},
		remove: func(context.Context, *share) error { removed++; return nil },
	}
	if err := settleTwins(t.Context(), b, on, object("own"), true, sight[*share]{}); !errors.Is(err, errAgain) || removed > 0 {
		t.Errorf("removed %d times, %v", removed, err)
	}
}
