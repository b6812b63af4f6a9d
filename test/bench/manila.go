package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/abaca-csi/abaca/test/fakemanila"
)

// Both drivers are called as Kubernetes' sidecars call them: each call has a
// limit, and one that fails is repeated after a second, then two, then four.
const (
	firstRetry = time.Second
	patience   = 4 * time.Minute // for one volume
	gib        = 1 << 30
)

// cloudOptions say on which cloud the drivers are compared.
type cloudOptions struct {
	file, name, shareType, at, bin string
}

// step is one thing that is measured: the time that each took, and the requests
// that the cloud had from all of them.
type step struct {
	seconds          []float64 // of those that succeeded
	failed           int
	manila, keystone int
	left             int // shares that were there when all volumes had been deleted
}

// measureManila compares Abaca with manila-csi, and both with what the cloud
// itself needs, in one run.
func measureManila(ctx context.Context, o cloudOptions) (err error) {
	var at []int
	for n := range strings.SplitSeq(o.at, ",") {
		i, err := strconv.Atoi(n)
		if err != nil || i < 1 || i > 64 {
			return fmt.Errorf("-at %s: numbers from 1 to 64 are wanted", o.at)
		}
		at = append(at, i)
	}
	if o.file != "" && o.shareType == "" {
		return errors.New("-type is wanted: manila-csi knows no default share type")
	}
	rival, err := buildRival(ctx, o.bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "abaca-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	where, look := "a real cloud", 250*time.Millisecond
	if o.file == "" {
		where, look = "the simulator, 2 s for each change", 50*time.Millisecond
		fake := fakemanila.New(fakemanila.Options{Delay: func() time.Duration { return 2 * time.Second }})
		defer fake.Close()
		o.file, o.name, o.shareType = filepath.Join(dir, "fake.yaml"), "fake", "cephfs"
		if err := os.WriteFile(o.file, []byte(fake.Clouds()), 0o600); err != nil {
			return err
		}
	}
	cloud, err := dialCloud(ctx, o, look)
	if err != nil {
		return err
	}
	defer cloud.close()
	if err := cloud.writeConfig(dir); err != nil {
		return err
	}
	made := &table{title: "Volumes from CreateVolume to where a node can mount them, on " + where, command: "make bench-manila",
		header: []string{"at once", "limit of a call", "who", "made", "median", "slowest", "requests each", "of them Keystone's", "shares left", "target", "met"}}
	shown := &table{title: "Snapshots from CreateSnapshot to where a node can mount them read-only, on " + where, command: "make bench-manila", header: made.header}
	made.notes = append(made.notes, fmt.Sprintf("A call that failed or timed out is repeated after 1, 2, 4, ... s, for %s in all.", patience),
		"For manila-csi it ends with CreateVolume, which makes the access rule; its node asks the cloud again at each mount, which is not counted. For Abaca it ends with ControllerPublishVolume.")
	shown.notes = append(shown.notes, "manila-csi copies the share; Abaca shows the snapshot itself.")
	defer func() { // what there is, when it is interrupted
		made.print(os.Stdout)
		shown.print(os.Stdout)
	}()
	tag := strconv.FormatInt(time.Now().UnixNano(), 36)
	for _, n := range at {
		for _, limit := range []time.Duration{time.Minute, 10 * time.Second} {
			say("%d at once, calls of %s: the cloud itself", n, limit)
			bare := cloud.itself(ctx, tag, n)
			made.plainRow(bare.cells(n, limit, "the cloud itself")...)
			var theirs, theirSnapshots step
			for _, c := range []contender{cloud.rival(dir, rival), cloud.abaca(dir, o.bin)} {
				say("%d at once, calls of %s: %s", n, limit, c.name)
				volumes, snapshots, err := c.measure(ctx, cloud, fmt.Sprintf("%s-%d-%d", tag, n, int(limit.Seconds())), n, limit)
				if err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
				if !c.ours {
					made.plainRow(volumes.cells(n, limit, c.name)...)
					shown.plainRow(snapshots.cells(n, limit, c.name)...)
					theirs, theirSnapshots = volumes, snapshots
					continue
				}
				made.row("all, the cloud's median + 0.3 s, half of manila-csi's requests, none left",
					volumes.failed == 0 && bare.failed == 0 && volumes.left == 0 && median(volumes.seconds) <= median(bare.seconds)+0.3 && 2*volumes.requestsEach() <= theirs.requestsEach(),
					volumes.cells(n, limit, c.name)...)
				shown.row("all, half of manila-csi's requests", snapshots.failed == 0 && 2*snapshots.requestsEach() <= theirSnapshots.requestsEach(),
					snapshots.cells(n, limit, c.name)...)
			}
		}
	}
	if made.missed || shown.missed {
		return errMissed
	}
	return nil
}

// requestsEach is how many each took that succeeded, those for the others included; infinite if none did.
func (s step) requestsEach() float64 {
	if len(s.seconds) == 0 {
		return math.Inf(1)
	}
	return float64(s.manila+s.keystone) / float64(len(s.seconds))
}

func (s step) cells(n int, limit time.Duration, who string) []string {
	middle, slowest := "-", "-"
	if len(s.seconds) > 0 {
		middle, slowest = fmt.Sprintf("%.2f s", median(s.seconds)), fmt.Sprintf("%.2f s", slices.Max(s.seconds))
	}
	each := func(requests int) string { return fmt.Sprintf("%.1f", float64(requests)/float64(n)) }
	return []string{strconv.Itoa(n), fmt.Sprintf("%.0f s", limit.Seconds()), who, fmt.Sprintf("%d of %d", n-s.failed, n), middle, slowest,
		each(s.manila + s.keystone), each(s.keystone), strconv.Itoa(s.left)}
}

// together does something n times at once, and says how long each took.
func (c *cloud) together(ctx context.Context, n int, do func(ctx context.Context, i int) error) step {
	c.proxies.reset()
	var s step
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			begun := time.Now()
			err := do(ctx, i)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				say("%d: %v", i, err)
				s.failed++
				return
			}
			s.seconds = append(s.seconds, time.Since(begun).Seconds())
		})
	}
	wg.Wait()
	s.manila, s.keystone = c.proxies.counts()
	return s
}

// contender is a driver in the comparison, before it is started.
type contender struct {
	name       string
	ours       bool
	parameters map[string]string
	secrets    map[string]string
	start      func(context.Context) (*plugin, error)
}

// measure starts the driver, and has it make one volume and a snapshot before
// what is measured: it is a driver that has been running.
func (c contender) measure(ctx context.Context, on *cloud, tag string, n int, limit time.Duration) (volumes, snapshots step, err error) {
	p, err := c.start(ctx)
	if p != nil {
		defer func() { err = errors.Join(err, p.stop()) }()
	}
	if err != nil {
		return volumes, snapshots, err
	}
	attach, err := p.attaches(ctx)
	if err != nil {
		return volumes, snapshots, err
	}
	if _, _, err = c.round(ctx, p, on, tag+"-before", 1, time.Minute, attach); err != nil {
		return volumes, snapshots, err
	}
	return c.round(ctx, p, on, tag, n, limit, attach)
}

// round makes n volumes at once, and n snapshots that a node could mount, and
// removes them again.
func (c contender) round(ctx context.Context, p *plugin, on *cloud, tag string, n int, limit time.Duration, attach bool) (volumes, snapshots step, err error) {
	ids, views, cuts := make([]string, n), make([]string, n), make([]string, n)
	defer func() {
		on.together(context.WithoutCancel(ctx), n, func(ctx context.Context, i int) error {
			for _, id := range []string{views[i], cuts[i], ids[i]} {
				if id == "" {
					continue
				}
				_, err := patiently(ctx, time.Minute, func(ctx context.Context) (any, error) {
					if id == cuts[i] {
						return p.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id, Secrets: c.secrets})
					}
					if attach {
						if _, err := p.controller.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: benchNode}); err != nil {
							return nil, err
						}
					}
					return p.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id, Secrets: c.secrets})
				})
				if err != nil {
					return fmt.Errorf("remove %s: %w", id, err)
				}
			}
			return nil
		})
		left, lerr := on.sweep(context.WithoutCancel(ctx), c.name+"-"+tag)
		volumes.left, err = left, errors.Join(err, lerr)
	}()
	volumes = on.together(ctx, n, func(ctx context.Context, i int) error {
		return c.volume(ctx, p, fmt.Sprintf("bench-%s-%s-%d", c.name, tag, i), "", writers, limit, attach, &ids[i])
	})
	snapshots = on.together(ctx, n, func(ctx context.Context, i int) error {
		if ids[i] == "" {
			return errors.New("there is no volume")
		}
		name := fmt.Sprintf("view-%s-%s-%d", c.name, tag, i)
		_, err := patiently(ctx, limit, func(ctx context.Context) (any, error) {
			resp, err := p.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: ids[i], Secrets: c.secrets})
			if err == nil && !resp.GetSnapshot().GetReadyToUse() {
				err = errors.New("not ready yet")
			}
			cuts[i] = resp.GetSnapshot().GetSnapshotId()
			return nil, err
		})
		if err != nil {
			return err
		}
		return c.volume(ctx, p, name, cuts[i], readers, limit, attach, &views[i])
	})
	return volumes, snapshots, nil
}

const benchNode = "bench,192.0.2.7"

// volume makes a volume and, where that is needed, publishes it.
func (c contender) volume(ctx context.Context, p *plugin, name, snapshot string, mode csi.VolumeCapability_AccessMode_Mode, limit time.Duration, attach bool, id *string) error {
	v := &volume{mode: mode}
	req := &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: gib}, Parameters: c.parameters, Secrets: c.secrets,
		VolumeCapabilities: []*csi.VolumeCapability{v.capability()}}
	if snapshot != "" {
		req.VolumeContentSource = snapshotSource(snapshot)
	}
	resp, err := patiently(ctx, limit, func(ctx context.Context) (*csi.CreateVolumeResponse, error) {
		return p.controller.CreateVolume(ctx, req)
	})
	if err != nil {
		return err
	}
	*id = resp.GetVolume().GetVolumeId()
	if !attach {
		return nil
	}
	_, err = patiently(ctx, limit, func(ctx context.Context) (any, error) {
		return p.controller.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: *id, NodeId: benchNode, VolumeCapability: v.capability()})
	})
	return err
}

// patiently repeats a call, as the sidecars do.
func patiently[R any](ctx context.Context, limit time.Duration, call func(context.Context) (R, error)) (R, error) {
	for wait := firstRetry; ; wait *= 2 {
		limited, cancel := context.WithTimeout(ctx, limit)
		r, err := call(limited)
		cancel()
		if err == nil {
			return r, nil
		}
		if strings.Contains(err.Error(), "connection refused") {
			return r, fmt.Errorf("its process has ended: %w", err)
		}
		select {
		case <-ctx.Done():
			return r, fmt.Errorf("gave up: %w", err)
		case <-time.After(wait):
		}
	}
}

// sweep deletes the shares whose names hold a text, and returns how many there
// were. What is being deleted gets some time for it.
func (c *cloud) sweep(ctx context.Context, text string) (int, error) {
	for until := time.Now().Add(time.Minute); ; {
		var all struct {
			Shares []struct{ ID, Name, Status string }
		}
		if err := c.do(ctx, http.MethodGet, "shares/detail", nil, &all); err != nil {
			return 0, err
		}
		left, going := 0, 0
		for _, s := range all.Shares {
			switch {
			case !strings.Contains(s.Name, text):
			case s.Status == "deleting":
				going++
			default:
				left++
			}
		}
		if going == 0 || time.Now().After(until) {
			for _, s := range all.Shares {
				if strings.Contains(s.Name, text) && s.Status != "deleting" {
					_ = c.do(ctx, http.MethodDelete, "shares/"+s.ID, nil, nil) // as far as it goes
				}
			}
			return left, nil
		}
		if err := c.look(ctx); err != nil {
			return left, err
		}
	}
}

var errNotOK = errors.New("the cloud refused")

// itself makes n shares with an access rule each, at once, by nothing but the
// requests that this takes.
func (c *cloud) itself(ctx context.Context, tag string, n int) step {
	ids := make([]string, n)
	s := c.together(ctx, n, func(ctx context.Context, i int) error {
		var share struct{ Share struct{ ID, Status string } }
		ask := map[string]any{"name": fmt.Sprintf("bench-%s-%d", tag, i), "size": 1, "share_proto": "CEPHFS", "share_type": c.o.shareType}
		if err := c.do(ctx, http.MethodPost, "shares", map[string]any{"share": ask}, &share); err != nil {
			return err
		}
		ids[i] = share.Share.ID
		for share.Share.Status != "available" {
			if share.Share.Status == "error" {
				return errNotOK
			}
			if err := c.look(ctx); err != nil {
				return err
			}
			if err := c.do(ctx, http.MethodGet, "shares/"+ids[i], nil, &share); err != nil {
				return err
			}
		}
		rule := map[string]any{"allow_access": map[string]any{"access_type": "cephx", "access_to": fmt.Sprintf("bench%s%d", tag, i), "access_level": "rw"}}
		if err := c.do(ctx, http.MethodPost, "shares/"+ids[i]+"/action", rule, nil); err != nil {
			return err
		}
		for {
			var rules struct {
				List []struct{ State string } `json:"access_list"`
			}
			if err := c.do(ctx, http.MethodGet, "share-access-rules?share_id="+ids[i], nil, &rules); err != nil {
				return err
			}
			if len(rules.List) == 1 && rules.List[0].State == "active" {
				return nil
			}
			if err := c.look(ctx); err != nil {
				return err
			}
		}
	})
	c.together(context.WithoutCancel(ctx), n, func(ctx context.Context, i int) error {
		if ids[i] == "" {
			return nil
		}
		return c.do(ctx, http.MethodDelete, "shares/"+ids[i], nil, nil)
	})
	s.manila, s.keystone = 0, 0 // so many as are looked for
	return s
}
