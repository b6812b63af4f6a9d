package fakemanila

import (
	"maps"
	"os"
	"slices"
	"time"
)

// Snapshot is a snapshot of a share.
type Snapshot struct {
	ID, Name, Description, ShareID, Status string

	Instance string // the id of its only one
	Size     int
	Metadata map[string]string
	Created  time.Time
}

func (c *call) describeSnapshot(s *Snapshot) map[string]any {
	out := map[string]any{"id": s.ID, "share_id": s.ShareID, "share_size": s.Size, "created_at": s.Created.UTC().Format(stamp), "status": s.Status,
		"name": nullable(s.Name), "description": nullable(s.Description), "size": s.Size, "project_id": project}
	if share := c.shares[s.ShareID]; share != nil {
		out["share_proto"] = share.Protocol
	}
	if c.since(73) {
		out["metadata"] = s.Metadata
	}
	return out
}

func (c *call) createSnapshot() answer {
	req, _ := c.body["snapshot"].(map[string]any)
	share := c.shares[text(req, "share_id")]
	if share == nil {
		return refuse(404, "Share %s could not be found.", text(req, "share_id"))
	}
	if !truth(share.Specs["snapshot_support"]) {
		return refuse(403, "Snapshots are not supported.")
	}
	if share.Status != "available" {
		return refuse(403, "Invalid share: Source share status must be 'available', but is %s.", share.Status)
	}
	s := &Snapshot{ID: newID(), Instance: newID(), Name: text(req, "name"), Description: text(req, "description"), ShareID: share.ID, Status: "creating", Size: share.Size,
		Metadata: map[string]string{}, Created: now()}
	if c.since(73) {
		s.Metadata = metadataOf(req["metadata"])
	}
	c.snapshots[s.ID] = s
	if c.o.Dir != "" {
		if err := copyTree(c.Tree(share.ID), c.SnapshotTree(share.ID, s.ID)); err != nil {
			return refuse(400, "%v", err)
		}
	}
	answered := c.describeSnapshot(s)
	c.later(func() {
		if s.Status == "creating" {
			s.Status = "available"
		}
	})
	return answer{202, map[string]any{"snapshot": answered}}
}

func (c *call) listSnapshots() answer {
	out := []any{}
	for _, s := range slices.SortedFunc(maps.Values(c.snapshots), func(a, b *Snapshot) int { return c.order(a.Created, b.Created, a.ID, b.ID) }) {
		if c.asks("name", s.Name) && c.asks("share_id", s.ShareID) && (!c.since(73) || c.hasMetadata(s.Metadata)) {
			out = append(out, c.describeSnapshot(s))
		}
	}
	return c.page("snapshots", out, 79)
}

func (c *call) getSnapshot() answer {
	return answer{200, map[string]any{"snapshot": c.describeSnapshot(c.snapshot)}}
}

func (c *call) updateSnapshot() answer {
	req, _ := c.body["snapshot"].(map[string]any)
	if d, ok := req["display_description"].(string); ok {
		c.snapshot.Description = d
	}
	return c.getSnapshot()
}

func (c *call) listInstances() answer {
	if !c.o.Instances {
		return refuse(403, "Policy doesn't allow share_snapshot_instance:index to be performed.")
	}
	out := []any{}
	for _, s := range c.snapshots {
		if c.asks("snapshot_id", s.ID) {
			out = append(out, map[string]any{"id": s.Instance, "snapshot_id": s.ID, "status": s.Status})
		}
	}
	return answer{200, map[string]any{"snapshot_instances": out}}
}

func (c *call) deleteSnapshot() answer {
	s := c.snapshot
	if !slices.Contains([]string{"available", "error"}, s.Status) {
		return refuse(400, "Invalid share snapshot: Share Snapshot status must be one of ('available', 'error').")
	}
	s.Status = "deleting"
	c.later(func() {
		if s.Status != "deleting" {
			return
		}
		delete(c.snapshots, s.ID)
		maps.DeleteFunc(c.rules, func(_ string, r *Rule) bool { return r.SnapshotID == s.ID })
		if c.Server.o.Dir != "" {
			_ = os.RemoveAll(c.SnapshotTree(s.ShareID, s.ID))
		}
	})
	return answer{202, nil}
}

// mountable says whether the snapshot can be mounted.
func (c *call) mountable() bool {
	share := c.shares[c.snapshot.ShareID]
	return share != nil && truth(share.Specs["mount_snapshot_support"])
}

func (c *call) notMountable() answer {
	return refuse(400, "Cannot control access to the snapshot %s since the parent share %s does not support mounting its snapshots.", c.snapshot.ID, c.snapshot.ShareID)
}

func (c *call) listSnapshotRules() answer {
	if !c.mountable() {
		return c.notMountable()
	}
	out := []any{}
	for _, r := range c.rules {
		if r.SnapshotID == c.snapshot.ID {
			out = append(out, map[string]any{"id": r.ID, "access_to": r.To, "access_type": r.Type, "state": r.State})
		}
	}
	return answer{200, map[string]any{"snapshot_access_list": out}}
}

func (c *call) snapshotAction() answer {
	s := c.snapshot
	if !c.mountable() {
		return c.notMountable()
	}
	if req, ok := c.body["allow_access"].(map[string]any); ok {
		return c.allow(&Rule{SnapshotID: s.ID, Level: "ro"}, req, s.Status)
	}
	if req, ok := c.body["deny_access"].(map[string]any); ok {
		if s.Status != "available" {
			return refuse(400, "Invalid share snapshot instance: Access rules cannot be denied while the snapshot or any of its replicas or migration copies lacks a valid host or is not in available state..")
		}
		return c.deny(text(req, "access_id"), func(r *Rule) bool { return r.SnapshotID == s.ID })
	}
	return refuse(400, "There is no such action.")
}

func (c *call) snapshotLocations() answer {
	out := []any{}
	if c.mountable() && c.snapshot.Status == "available" {
		out = append(out, map[string]any{"id": newID(), "path": "127.0.0.1:/snapshots/" + c.snapshot.ID})
	}
	return answer{200, map[string]any{"share_snapshot_export_locations": out}}
}
