package manila

import (
	"errors"
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// crowd gives the cloud so many shares like one that is there, and as many
// snapshots of that one.
func (c *cloud) crowd(like string, n int) {
	c.Alter(func(objects fakemanila.Objects) {
		for i := range n {
			s := *objects.Shares[like]
			s.ID, s.Metadata = fmt.Sprintf("crowd-%04d", i), maps.Clone(s.Metadata)
			objects.Shares[s.ID] = &s
			m := map[string]string{keyInstance: "abaca", keyID: s.ID, keyReady: "true"}
			objects.Snapshots["s"+s.ID] = &fakemanila.Snapshot{ID: "s" + s.ID, ShareID: like, Status: "available", Size: 1, Metadata: m,
				Description: oldDescription(m), Created: s.Created}
		}
	})
}

// TestPages: a listing is whole, however few objects Manila gives at once, and
// takes no request more than it must where it can be told how many there are.
func TestPages(t *testing.T) {
	for _, test := range []struct {
		o                 fakemanila.Options
		shares, snapshots int // requests
	}{
		{fakemanila.Options{}, 1, 1},
		{fakemanila.Options{MaxLimit: 100}, 3, 3},
		{fakemanila.Options{MaxLimit: 100, Microversion: "2.60"}, 3, 3},
		{fakemanila.Options{MaxLimit: 125, Microversion: "2.78"}, 3, 3}, // 251 shares, and an empty page
		{fakemanila.Options{MaxLimit: 7}, 36, 36},
	} {
		t.Run(fmt.Sprintf("%s %d", test.o.Microversion, test.o.MaxLimit), func(t *testing.T) {
			c := newCloud(t, test.o)
			b := c.open()
			share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
			c.crowd(share.ID, 250)
			c.Requests()
			shares, _, err := b.ListShares(t.Context(), "", 0)
			if n := len(c.Requests()); err != nil || len(shares) != 251 || n != test.shares {
				t.Errorf("%d shares by %d requests, %v", len(shares), n, err)
			}
			snapshots, _, err := b.ListSnapshots(t.Context(), "", 0)
			if n := len(c.Requests()); err != nil || len(snapshots) != 250 || n != test.snapshots {
				t.Errorf("%d snapshots by %d requests, %v", len(snapshots), n, err)
			}
		})
	}
}

// TestPagesMeanwhile: what is on a later page is not lost when shares of an earlier
// one go between the two.
func TestPagesMeanwhile(t *testing.T) {
	c := newCloud(t, fakemanila.Options{MaxLimit: 100})
	b := c.open()
	share := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	c.crowd(share.ID, 250)
	c.Requests()
	c.Add(fakemanila.Fault{Path: "/shares/detail", Skip: 1, Delay: 500 * time.Millisecond})
	go func() {
		for len(c.Requests()) == 0 {
			time.Sleep(time.Millisecond)
		}
		c.Alter(func(objects fakemanila.Objects) {
			for i := range 60 {
				delete(objects.Shares, fmt.Sprintf("crowd-%04d", i))
			}
		})
	}()
	shares, _, err := b.ListShares(t.Context(), "", 0)
	found := map[string]bool{}
	for _, s := range shares {
		found[s.ID] = true
	}
	for i := 60; i < 250; i++ {
		if id := fmt.Sprintf("crowd-%04d", i); !found[id] {
			t.Errorf("%s is not listed", id)
		}
	}
	if err != nil {
		t.Error(err)
	}
}

// TestNotListed: a share that a listing lacks is not gone.
func TestNotListed(t *testing.T) {
	c := newCloud(t, fakemanila.Options{})
	b := c.open()
	data := ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
	b.polls.waiting.Store(3)
	b.polls.listed, b.polls.shares = time.Now(), nil
	if s, err := b.glance(t.Context(), data.ID, time.Hour); s == nil || err != nil {
		t.Errorf("it is there: %v, %v", s, err)
	}
	if s, err := b.glance(t.Context(), "gone", time.Hour); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("it is gone: %v, %v", s, err)
	}
}
