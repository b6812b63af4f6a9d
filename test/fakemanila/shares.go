package fakemanila

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// Share is a share as Manila keeps it.
type Share struct {
	ID, Name, Description, Status, Protocol, Type, Zone, Network, FromSnapshot, Group string

	Size     int // in GiB, as the API tells it
	Quota    int // in GiB, as the storage has it
	Metadata map[string]string
	Created  time.Time
	Deleted  bool // softly
	// Locations are its export paths.
	Locations []Location
	// Hints are what the scheduler was asked to keep to.
	Hints map[string]any
	// Specs are the extra specs of its type as they were when it was made.
	Specs map[string]any
}

// Location is one export location.
type Location struct {
	Path             string
	Admin, Preferred bool
}

// Type is a share type.
type Type struct {
	ID, Name string
	Default  bool
	Specs    map[string]any
}

const stamp = "2006-01-02T15:04:05.000000" // naive, and UTC

// now is when something is made: Manila's database keeps whole seconds.
func now() time.Time { return time.Now().Truncate(time.Second) }

// nullable is what JSON has for a text that is not there.
func nullable(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func truth(v any) bool { return strings.EqualFold(fmt.Sprint(v), "true") }

func (s *Server) typeOf(name string) *Type {
	for _, t := range s.types {
		if name == "" && t.Default || name != "" && (t.Name == name || t.ID == name) {
			return t
		}
	}
	return nil
}

func (c *call) describe(s *Share) map[string]any {
	t := c.typeOf(s.Type)
	out := map[string]any{
		"id": s.ID, "size": s.Size, "availability_zone": nullable(s.Zone), "created_at": s.Created.UTC().Format(stamp), "status": s.Status,
		"name": nullable(s.Name), "description": nullable(s.Description), "project_id": project, "snapshot_id": nullable(s.FromSnapshot), "share_network_id": nullable(s.Network), "share_group_id": nullable(s.Group),
		"share_proto": s.Protocol, "metadata": s.Metadata, "share_type": t.ID, "share_type_name": t.Name, "is_public": false,
		"snapshot_support": truth(s.Specs["snapshot_support"]), "create_share_from_snapshot_support": truth(s.Specs["create_share_from_snapshot_support"]),
		"mount_snapshot_support": truth(s.Specs["mount_snapshot_support"]), "revert_to_snapshot_support": false,
		"access_rules_status": c.rulesStatus(s.ID), "has_replicas": false, "progress": "100%",
	}
	if c.since(69) {
		out["is_soft_deleted"] = s.Deleted
	}
	return out
}

func (s *Server) rulesStatus(share string) string {
	status := "active"
	for _, r := range s.rules {
		switch {
		case r.ShareID != share:
		case r.State == "error":
			return "error"
		case r.State != "active":
			status = "syncing"
		}
	}
	return status
}

func text(m map[string]any, key string) string {
	s, _ := m[key].(string)
	return s
}

func (c *call) createShare() answer {
	req, _ := c.body["share"].(map[string]any)
	size, _ := req["size"].(float64)
	source := c.snapshots[text(req, "snapshot_id")]
	t := c.typeOf(text(req, "share_type"))
	metadata := metadataOf(req["metadata"])
	if wrong := badMetadata(metadata); wrong != "" {
		return refuse(400, "%s", wrong)
	}
	switch {
	case len(text(req, "name")) > 255:
		return refuse(400, "Share name is longer than 255 characters.")
	case len(text(req, "description")) > 255:
		return refuse(400, "Share description is longer than 255 characters.")
	case t == nil:
		return refuse(404, "Share type not found.")
	case text(req, "snapshot_id") != "" && source == nil:
		return refuse(404, "Share snapshot %s could not be found.", text(req, "snapshot_id"))
	case source != nil && source.Status != "available":
		return refuse(400, "Invalid share: Source snapshot status must be 'available'.")
	case source != nil && size == 0:
		size = float64(source.Size)
	case source != nil && size < float64(source.Size):
		return refuse(400, "Invalid input received: Share size '%v' must be equal or greater than snapshot size '%d'", size, source.Size)
	case source == nil && size < 1:
		return refuse(400, "Invalid input received: Share size '%v' must be an integer and greater than 0", size)
	}
	if c.o.PerShare >= 0 && int(size) > c.o.PerShare {
		return refuse(413, "ShareSizeExceedsLimit: Requested share size %d is larger than maximum allowed limit %d.", int(size), c.o.PerShare)
	}
	if c.used()+int(size) > c.o.Gigabytes {
		return refuse(413, "ShareSizeExceedsAvailableQuota: Requested share exceeds allowed project/user or share type gigabytes quota.")
	}
	s := &Share{ID: newID(), Name: text(req, "name"), Description: text(req, "description"), Status: "creating", Protocol: strings.ToUpper(text(req, "share_proto")), Type: t.ID,
		Zone: cmp.Or(text(req, "availability_zone"), "az-one"), Network: text(req, "share_network_id"), Group: text(req, "share_group_id"), Size: int(size), Quota: int(size),
		Metadata: metadata, Created: now(), Specs: maps.Clone(t.Specs)}
	s.Hints, _ = req["scheduler_hints"].(map[string]any)
	if source != nil {
		s.Status, s.FromSnapshot, s.Quota = "creating_from_snapshot", source.ID, source.Size // a defect of the real one
		s.Zone = c.shares[source.ShareID].Zone
	}
	c.shares[s.ID] = s
	answered := c.describe(s)
	c.later(func() { c.finish(s, source) })
	return answer{200, map[string]any{"share": answered}}
}

// finish is what scheduler and back end make of a share; source is the snapshot that
// it is from, or nil.
func (c *call) finish(s *Share, source *Snapshot) {
	if c.shares[s.ID] != s || s.Status == "deleting" {
		return
	}
	if c.typeOf(s.Type).Name == "nowhere" {
		s.Status = "error"
		c.say(s.ID, "008", "allocate host: No storage could be allocated for this share request, Capabilities filter didn't succeed.")
		return
	}
	if full := c.Server.o.Full; full != nil && full(s.Zone) {
		s.Status = "error"
		c.say(s.ID, "009", "allocate host: No storage could be allocated for this share request, Capacity filter didn't succeed.")
		return
	}
	if c.Server.o.Dir != "" {
		from := ""
		if source != nil {
			from = c.SnapshotTree(source.ShareID, source.ID)
		}
		if err := copyTree(from, c.Tree(s.ID)); err != nil {
			s.Status = "error"
			c.say(s.ID, "001", "create: "+err.Error())
			return
		}
	}
	s.Status = "available"
	switch s.Protocol {
	case "CEPHFS":
		s.Locations = []Location{{Path: "127.0.0.1:6789:/volumes/_nogroup/" + s.ID}}
		s.Metadata["__mount_options"] = "fs=cephfs"
	case "CIFS":
		s.Locations = []Location{{Path: `\\127.0.0.1\` + s.ID}}
	default:
		s.Locations = []Location{{Path: "10.9.9.9:/admin/" + s.ID, Admin: true}, {Path: "[fd00::1]:/" + s.ID}, {Path: "127.0.0.1:/" + s.ID, Preferred: true}}
	}
}

func (s *Server) used() (gigabytes int) {
	for _, sh := range s.shares {
		gigabytes += sh.Size
	}
	return gigabytes
}

func (c *call) listShares() answer {
	out := []any{}
	for _, s := range slices.SortedFunc(maps.Values(c.shares), func(a, b *Share) int { return c.order(a.Created, b.Created, a.ID, b.ID) }) {
		switch {
		case !c.asks("name", s.Name) || !c.asks("status", s.Status) || !c.hasMetadata(s.Metadata):
		case len(c.path) == 1:
			out = append(out, map[string]any{"id": s.ID, "name": nullable(s.Name)})
		default:
			out = append(out, c.describe(s))
		}
	}
	return c.page("shares", out, 42)
}

// order is that of a listing: the newest first, or by id.
func (c *call) order(a, b time.Time, aID, bID string) int {
	q := c.r.URL.Query()
	n := cmp.Or(a.Compare(b), -cmp.Compare(aID, bID))
	if q.Get("sort_key") == "id" {
		n = cmp.Compare(aID, bID)
	}
	if q.Get("sort_dir") != "asc" {
		n = -n
	}
	return n
}

func (c *call) getShare() answer {
	return answer{200, map[string]any{"share": c.describe(c.share)}}
}

func (c *call) deleteShare() answer {
	s := c.share
	if s.Group != "" && c.r.URL.Query().Get("share_group_id") == "" {
		return refuse(400, "Must provide 'share_group_id' as a request parameter when deleting a share in a share group.")
	}
	if _, ok := c.locks[s.ID]; ok {
		return refuse(403, "Resource lock/s [%s] prevent delete action.", lockID(s.ID))
	}
	n := 0
	for _, sn := range c.snapshots {
		if sn.ShareID == s.ID {
			n++
		}
	}
	switch {
	case n > 0:
		return refuse(403, "Invalid share: Share still has %d dependent snapshots.", n)
	case !slices.Contains([]string{"available", "error", "inactive"}, s.Status):
		return refuse(403, "Invalid share: Share status must be one of ('available', 'error', 'inactive')")
	}
	s.Status = "deleting"
	c.later(func() {
		if c.shares[s.ID] != s || s.Status != "deleting" {
			return
		}
		delete(c.shares, s.ID)
		maps.DeleteFunc(c.rules, func(_ string, r *Rule) bool { return r.ShareID == s.ID })
		if c.Server.o.Dir != "" {
			_ = os.RemoveAll(c.Tree(s.ID))
		}
	})
	return answer{202, nil}
}

func (c *call) shareLocations() answer {
	out := []any{}
	for _, l := range c.share.Locations {
		location := map[string]any{"id": newID(), "path": l.Path, "preferred": l.Preferred}
		if c.o.Administrator {
			location["is_admin_only"] = l.Admin
		}
		if c.o.Administrator || !l.Admin {
			out = append(out, location)
		}
	}
	return answer{200, map[string]any{"export_locations": out}}
}

func (c *call) shareAction() answer {
	s := c.share
	if req, ok := c.body["allow_access"].(map[string]any); ok {
		return c.allow(&Rule{ShareID: s.ID}, req, s.Status)
	}
	if req, ok := c.body["deny_access"].(map[string]any); ok {
		if slices.Contains(unsettled, s.Status) {
			return refuse(400, "Invalid share: Access rules cannot be denied while the share, any of its replicas or migration copies lacks a valid host or is in an invalid state.")
		}
		return c.deny(text(req, "access_id"), func(r *Rule) bool { return r.ShareID == s.ID })
	}
	if _, ok := c.body["access_list"]; ok && !c.since(45) { // what listRules has replaced
		return c.rulesOf(s.ID)
	}
	if req, ok := c.body["extend"].(map[string]any); ok {
		size, _ := req["new_size"].(float64)
		switch {
		case s.Status != "available":
			return refuse(400, "Invalid share: Share %s status must be 'available' to extend, but current status is: %s.", s.ID, s.Status)
		case int(size) <= s.Size:
			return refuse(400, "Invalid input received: New size for extend must be greater than current size. (current: %d, extended: %d).", s.Size, int(size))
		case c.used()-s.Size+int(size) > c.o.Gigabytes || c.o.PerShare >= 0 && int(size) > c.o.PerShare:
			return refuse(403, "Requested share exceeds allowed project/user or share type gigabytes quota.")
		}
		s.Status = "extending"
		c.later(func() {
			if s.Status == "extending" {
				s.Status, s.Size, s.Quota = "available", int(size), int(size)
			}
		})
		return answer{202, nil}
	}
	return refuse(400, "There is no such action.")
}
