package csi

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// pageSize is how many objects are read from a backend at a time.
const pageSize = 500

// A stream is one ordered listing of many that make up an answer. page returns
// the objects behind a position; an object that is not for this answer has no
// item but still moves the position.
type stream[T any] struct {
	key  string // begins a token; no stream's key is a prefix of another's
	page func(ctx context.Context, after string, limit int) (items []placed[T], more bool, err error)
}

type placed[T any] struct {
	position string
	item     *T // nil: passed over
}

// list goes through the streams from where the token says and collects up to
// most items (0: all). A token names the last object returned, so it stays
// valid whatever comes and goes.
func list[T any](ctx context.Context, streams []stream[T], token string, most int32) (items []*T, next string, err error) {
	first, after := 0, ""
	if token != "" {
		first = slices.IndexFunc(streams, func(s stream[T]) bool { return strings.HasPrefix(token, s.key) })
		if first < 0 {
			return nil, "", fmt.Errorf("%.80q: %w", token, errToken)
		}
		after = token[len(streams[first].key):]
	}
	last := token
	for _, s := range streams[first:] {
		for more := true; more; {
			var page []placed[T]
			if page, more, err = s.page(ctx, after, pageSize); err != nil {
				return nil, "", err
			}
			for _, p := range page {
				after = p.position
				if p.item == nil {
					continue
				}
				if most > 0 && len(items) == int(most) {
					return items, last, nil // only now is it known that there is a next page
				}
				items, last = append(items, p.item), s.key+p.position
			}
		}
		after = ""
	}
	return items, "", nil
}

func checkEntries(n int32) error {
	if n < 0 {
		return fmt.Errorf("max_entries is negative: %w", backend.ErrInvalid)
	}
	return nil
}

// volumes are the shares and the snapshot volumes of every backend.
func (d *Driver) volumes() []stream[state] {
	var out []stream[state]
	for _, name := range slices.Sorted(maps.Keys(d.Backends)) {
		b := d.Backends[name]
		out = append(out, stream[state]{key: name + "/share/", page: func(ctx context.Context, after string, limit int) ([]placed[state], bool, error) {
			shares, more, err := b.ListShares(ctx, after, limit)
			page := make([]placed[state], len(shares))
			for i, share := range shares {
				page[i].position = share.ID
				if share.Role == backend.RoleUser && !share.Draft {
					s := describeShareVolume(Volume{Backend: name, Share: share.ID}, share)
					page[i].item = &s
				}
			}
			return page, more, err
		}}, stream[state]{key: name + "/reference/", page: func(ctx context.Context, after string, limit int) ([]placed[state], bool, error) {
			exports, more, err := b.ListExports(ctx, after, limit)
			page := make([]placed[state], len(exports))
			for i, export := range exports {
				page[i].position = export.Consumer
				if export.Target.SnapshotID == "" || !consumer.MatchString(export.Consumer) {
					continue
				}
				snapshot, err := b.Snapshot(ctx, export.Target.SnapshotID)
				if err != nil {
					continue // it went between the two looks
				}
				s := describeReference(Volume{Backend: name, Snapshot: snapshot.ID, Consumer: export.Consumer}, snapshot)
				page[i].item = &s
			}
			return page, more, err
		}})
	}
	return out
}

// ListVolumes lists what CreateVolume has made.
func (d *Driver) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	if err := checkEntries(req.GetMaxEntries()); err != nil {
		return nil, err
	}
	found, next, err := list(ctx, d.volumes(), req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{NextToken: next}
	for _, s := range found {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{Volume: s.volume})
	}
	return resp, nil
}

// ControllerListVolumeHealth lists the volumes that something is wrong with.
func (d *Driver) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	if err := checkEntries(req.GetMaxEntries()); err != nil {
		return nil, err
	}
	streams := d.volumes()
	for i, all := range streams {
		streams[i].page = func(ctx context.Context, after string, limit int) ([]placed[state], bool, error) {
			page, more, err := all.page(ctx, after, limit)
			for i := range page {
				if page[i].item != nil && page[i].item.problem == "" {
					page[i].item = nil
				}
			}
			return page, more, err
		}
	}
	found, next, err := list(ctx, streams, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ControllerListVolumeHealthResponse{NextToken: next}
	for _, s := range found {
		resp.Entries = append(resp.Entries, s.health())
	}
	return resp, nil
}

// snapshots are the snapshots of every backend, and the backups.
func (d *Driver) snapshots() []stream[csi.Snapshot] {
	var out []stream[csi.Snapshot]
	for _, name := range slices.Sorted(maps.Keys(d.Backends)) {
		b := d.Backends[name]
		out = append(out, stream[csi.Snapshot]{key: name + "/snapshot/", page: func(ctx context.Context, after string, limit int) ([]placed[csi.Snapshot], bool, error) {
			snapshots, more, err := b.ListSnapshots(ctx, after, limit)
			page := make([]placed[csi.Snapshot], len(snapshots))
			for i, s := range snapshots {
				page[i].position = s.ID
				if s.Role == backend.RoleUser {
					page[i].item = describeSnapshot(name, s)
				}
			}
			return page, more, err
		}})
	}
	if d.Backups == nil {
		return out
	}
	return append(out, stream[csi.Snapshot]{key: backupsPrefix + "/", page: func(ctx context.Context, after string, limit int) ([]placed[csi.Snapshot], bool, error) {
		backups, err := d.Backups.List(ctx)
		var page []placed[csi.Snapshot]
		for _, b := range backups {
			item := describeBackup(b)
			if _, err := ParseSnapshot(item.GetSnapshotId()); err != nil {
				continue // somebody else's tag: no request can name it
			}
			// Repository and id are ordered in pairs, and '/' is in neither.
			if position := b.Repository + "/" + b.ID; after == "" || lessPair(after, position) {
				page = append(page, placed[csi.Snapshot]{position, item})
			}
		}
		return page, false, err
	}})
}

func lessPair(a, b string) bool {
	repoA, idA, _ := strings.Cut(a, "/")
	repoB, idB, _ := strings.Cut(b, "/")
	return repoA < repoB || repoA == repoB && idA < idB
}

// ListSnapshots lists snapshots and backups, all of them or those of one
// volume, or the one with an id.
func (d *Driver) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	if err := checkEntries(req.GetMaxEntries()); err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{}
	source := req.GetSourceVolumeId()
	if id := req.GetSnapshotId(); id != "" {
		s, err := d.snapshot(ctx, id)
		if err != nil && !isNotFound(err) {
			return nil, err
		}
		if err == nil && (source == "" || s.GetSourceVolumeId() == source) {
			resp.Entries = []*csi.ListSnapshotsResponse_Entry{{Snapshot: s}}
		}
		return resp, nil
	}
	streams := d.snapshots()
	if source != "" {
		for i, all := range streams {
			streams[i].page = func(ctx context.Context, after string, limit int) ([]placed[csi.Snapshot], bool, error) {
				page, more, err := all.page(ctx, after, limit)
				for i := range page {
					if page[i].item.GetSourceVolumeId() != source {
						page[i].item = nil
					}
				}
				return page, more, err
			}
		}
	}
	found, next, err := list(ctx, streams, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp.NextToken = next
	for _, s := range found {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s})
	}
	return resp, nil
}
