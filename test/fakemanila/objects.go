package fakemanila

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Share is a share as Manila keeps it.
type Share struct {
	ID, Name, Status, Protocol, Type, Zone, Network, FromSnapshot, Group string

	Size     int // in GiB, as the API tells it
	Quota    int // in GiB, as the storage has it
	Metadata map[string]string
	Created  time.Time
	Deleted  bool // softly
	// Locations are its export paths.
	Locations []Location
	// Specs are the extra specs of its type as they were when it was made.
	Specs map[string]any
}

// Location is one export location.
type Location struct {
	Path             string
	Admin, Preferred bool
}

// Snapshot is a snapshot of a share.
type Snapshot struct {
	ID, Name, Description, ShareID, Status string

	Instance string // the id of its only one
	Size     int
	Metadata map[string]string
	Created  time.Time
}

// Rule is an access rule of a share or of a snapshot.
type Rule struct {
	ID, ShareID, SnapshotID, Type, To, Level, State, Key string

	Metadata map[string]string
	Created  time.Time
}

// Type is a share type.
type Type struct {
	ID, Name string
	Default  bool
	Specs    map[string]any
}

type message struct {
	id, resource, level, detail, action, text string
	created                                   time.Time
}

// actions are what a message can be about (manila/message/message_field.py); its text
// begins with that.
var actions = map[string]string{"allocate host": "001", "create": "002", "delete access rules": "003", "delete": "007", "extend": "008", "update access rules": "010"}

// route is one call of the API, since a minor version.
type route struct {
	method, pattern string
	since           int
	do              func(*call) answer
}

var routes []route

func init() {
	routes = []route{
		{"POST", "shares", 0, (*call).createShare},
		{"GET", "shares", 0, (*call).listShares},
		{"GET", "shares/detail", 0, (*call).listShares},
		{"GET", "shares/*", 0, (*call).getShare},
		{"DELETE", "shares/*", 0, (*call).deleteShare},
		{"GET", "shares/*/export_locations", 9, (*call).shareLocations},
		{"POST", "shares/*/action", 7, (*call).shareAction},
		{"GET", "shares/*/metadata", 0, (*call).getMetadata},
		{"POST", "shares/*/metadata", 0, (*call).setMetadata},
		{"PUT", "shares/*/metadata", 0, (*call).setMetadata},
		{"DELETE", "shares/*/metadata/*", 0, (*call).deleteMetadata},
		{"GET", "share-access-rules", 45, (*call).listRules},
		{"GET", "share-access-rules/*", 45, (*call).getRule},
		{"PUT", "share-access-rules/*", 88, (*call).updateRule},
		{"POST", "snapshots", 0, (*call).createSnapshot},
		{"GET", "snapshots", 0, (*call).listSnapshots},
		{"GET", "snapshots/detail", 0, (*call).listSnapshots},
		{"GET", "snapshots/*", 0, (*call).getSnapshot},
		{"PUT", "snapshots/*", 0, (*call).updateSnapshot},
		{"DELETE", "snapshots/*", 0, (*call).deleteSnapshot},
		{"POST", "snapshots/*/metadata", 73, (*call).setMetadata},
		{"PUT", "snapshots/*/metadata", 73, (*call).setMetadata},
		{"DELETE", "snapshots/*/metadata/*", 73, (*call).deleteMetadata},
		{"GET", "snapshots/*/access-list", 32, (*call).listSnapshotRules},
		{"POST", "snapshots/*/action", 32, (*call).snapshotAction},
		{"GET", "snapshots/*/export-locations", 32, (*call).snapshotLocations},
		{"GET", "snapshot-instances", 19, (*call).listInstances},
		{"GET", "types", 0, (*call).listTypes},
		{"GET", "messages", 37, (*call).listMessages},
		{"GET", "quota-sets/*/detail", 25, (*call).quota},
		{"GET", "availability-zones", 7, (*call).zones},
		{"GET", "resource-locks", 81, (*call).listLocks},
	}
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
		"name": nullable(s.Name), "description": nil, "project_id": project, "snapshot_id": nullable(s.FromSnapshot), "share_network_id": nullable(s.Network), "share_group_id": nullable(s.Group),
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

func metadataOf(v any) map[string]string {
	out := map[string]string{}
	m, _ := v.(map[string]any)
	for k, v := range m {
		out[k] = fmt.Sprint(v)
	}
	return out
}

// badMetadata says what Manila has against some metadata; empty if nothing.
func badMetadata(m map[string]string) string {
	for k, v := range m {
		switch {
		case k == "":
			return "Metadata property key is blank."
		case v == "":
			return "Metadata property value is blank."
		case len(k) > 255:
			return "Metadata property key is greater than 255 characters."
		case len(v) > 1023:
			return "Metadata property value is greater than 1023 characters."
		}
	}
	return ""
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
	s := &Share{ID: newID(), Name: text(req, "name"), Status: "creating", Protocol: strings.ToUpper(text(req, "share_proto")), Type: t.ID,
		Zone: cmp.Or(text(req, "availability_zone"), "az-one"), Network: text(req, "share_network_id"), Group: text(req, "share_group_id"), Size: int(size), Quota: int(size),
		Metadata: metadata, Created: now(), Specs: maps.Clone(t.Specs)}
	if source != nil {
		s.Status, s.FromSnapshot, s.Quota = "creating_from_snapshot", source.ID, source.Size // a defect of the real one
		s.Zone = c.shares[source.ShareID].Zone
	}
	c.shares[s.ID] = s
	answered := c.describe(s)
	c.later(func() {
		if c.shares[s.ID] != s || s.Status == "deleting" {
			return
		}
		if t.Name == "nowhere" {
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
	})
	return answer{200, map[string]any{"share": answered}}
}

func (s *Server) used() (gigabytes int) {
	for _, sh := range s.shares {
		gigabytes += sh.Size
	}
	return gigabytes
}

func (s *Server) say(resource, detail, text string) {
	action, _, _ := strings.Cut(text, ":")
	s.messages = append(s.messages, &message{newID(), resource, "ERROR", detail, actions[action], text, now()})
}

func (c *call) listShares() answer {
	var all []*Share
	q := c.r.URL.Query()
	for _, s := range c.shares {
		if (q.Get("name") == "" || s.Name == q.Get("name")) && c.hasMetadata(s.Metadata) && (q.Get("status") == "" || s.Status == q.Get("status")) {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b *Share) int { return c.order(a.Created, b.Created, a.ID, b.ID) })
	out := make([]any, len(all))
	for i, s := range all {
		if out[i] = any(c.describe(s)); len(c.path) == 1 {
			out[i] = map[string]any{"id": s.ID, "name": nullable(s.Name)}
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
	if reason, ok := c.locks[s.ID]; ok {
		return refuse(403, "Resource lock prevents delete action: %s", reason)
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
		if !l.Admin { // a member does not see the others
			out = append(out, map[string]any{"id": newID(), "path": l.Path, "preferred": l.Preferred})
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

// allow makes a rule.
func (c *call) allow(r *Rule, req map[string]any, status string) answer {
	r.Type, r.To, r.Level = text(req, "access_type"), text(req, "access_to"), cmp.Or(text(req, "access_level"), "rw")
	if status != "available" {
		return refuse(400, "Invalid share: New access rules cannot be applied while the share or any of its replicas or migration copies lacks a valid host or is in an invalid state.")
	}
	if _, ok := network(r.To); r.Type == "ip" && !ok {
		return refuse(400, "%s is no network, or has host bits set", r.To)
	}
	for _, other := range c.rules {
		if other.ShareID == r.ShareID && other.SnapshotID == r.SnapshotID && other.Type == r.Type && sameClient(other, r) {
			return refuse(400, "Share access %s:%s exists.", r.Type, r.To)
		}
	}
	r.ID, r.State, r.Created, r.Metadata = newID(), "queued_to_apply", now(), metadataOf(req["metadata"])
	c.rules[r.ID] = r
	answered := describeRule(r)
	c.later(func() {
		switch s := c.shares[r.ShareID]; {
		case c.rules[r.ID] != r || r.State != "queued_to_apply":
		case r.Type == "cephx" && r.To == "manila", r.Type != "cephx" && s != nil && s.Protocol == "CEPHFS":
			r.State = "error"
			c.say(r.ShareID, "020", "update access rules: The client ID or access type is not allowed.")
		default:
			if c.apply(r); r.State == "active" && r.Type == "cephx" {
				r.Key = "AQ" + strings.ReplaceAll(newID(), "-", "") + "=="
			}
		}
	})
	name := "access"
	if r.SnapshotID != "" {
		name = "snapshot_access"
	}
	return answer{200, map[string]any{name: answered}}
}

// apply has the back end try a rule.
func (c *call) apply(r *Rule) {
	r.State = "active"
	if c.o.Refuse == nil {
		return
	}
	if detail := c.o.Refuse(r.To, r.Level); detail != "" {
		r.State = "error"
		c.say(r.ShareID, detail, "update access rules: The back end refuses it.")
	}
}

// network reads a client as Manila does: without bits behind the mask.
func network(to string) (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(to); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(to)
	return p, err == nil && p == p.Masked()
}

// sameClient compares as Manila does: clients of the type ip as networks, of those
// whose texts begin alike (_check_for_existing_access of manila/db/sqlalchemy/api.py).
func sameClient(old, asked *Rule) bool {
	if asked.Type != "ip" {
		return old.To == asked.To
	}
	begin, _, _ := strings.Cut(asked.To, "/")
	a, _ := network(old.To)
	b, _ := network(asked.To)
	return strings.HasPrefix(old.To, begin) && a == b
}

// unsettled are the states of a share in which its rules stay as they are
// (_any_invalid_share_instance of manila/share/api.py).
var unsettled = []string{"creating", "deleting", "manage_starting", "unmanage_starting", "extending", "shrinking", "migrating", "migrating_to", "restoring", "reverting",
	"server_migrating", "server_migrating_to", "backup_restoring", "backup_creating", "ensuring", "error"}

func (c *call) deny(id string, of func(*Rule) bool) answer {
	r := c.rules[id]
	if r == nil || !of(r) {
		return refuse(404, "The resource could not be found.")
	}
	r.State = "queued_to_deny"
	c.later(func() {
		if c.rules[id] == r && r.State == "queued_to_deny" {
			delete(c.rules, id)
		}
	})
	return answer{202, nil}
}

func describeRule(r *Rule) map[string]any {
	return map[string]any{"id": r.ID, "share_id": r.ShareID, "access_level": r.Level, "access_to": r.To, "access_type": r.Type, "state": r.State,
		"access_key": nullable(r.Key), "created_at": r.Created.UTC().Format(stamp), "updated_at": nil, "metadata": r.Metadata}
}

func (c *call) listRules() answer {
	share := c.r.URL.Query().Get("share_id")
	if c.shares[share] == nil {
		return refuse(400, "Share %s not found.", share)
	}
	return c.rulesOf(share)
}

func (c *call) rulesOf(share string) answer {
	var all []*Rule
	for _, r := range c.rules {
		if r.ShareID == share && r.SnapshotID == "" {
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b *Rule) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	out := []any{}
	for _, r := range all {
		out = append(out, describeRule(r))
	}
	return answer{200, map[string]any{"access_list": out}}
}

func (c *call) getRule() answer {
	if r := c.rules[c.path[1]]; r != nil {
		return answer{200, map[string]any{"access": describeRule(r)}}
	}
	return refuse(404, "Share access rule %s not found.", c.path[1])
}

func (c *call) updateRule() answer {
	r := c.rules[c.path[1]]
	req, _ := c.body["update_access"].(map[string]any)
	level := text(req, "access_level")
	switch {
	case r == nil || r.SnapshotID != "":
		return refuse(404, "Share access rule %s not found.", c.path[1])
	case level != "ro" && level != "rw":
		return refuse(400, "Invalid or unsupported share access level: %s.", level)
	}
	if r.Level != level {
		r.Level, r.State = level, "queued_to_update"
		c.later(func() {
			if c.rules[r.ID] == r && r.State == "queued_to_update" {
				c.apply(r)
			}
		})
	}
	return answer{200, map[string]any{"access": describeRule(r)}}
}

// metadata is that of the share or snapshot of the path.
func (c *call) metadata() map[string]string {
	if c.share != nil {
		return c.share.Metadata
	}
	return c.snapshot.Metadata
}

func (c *call) getMetadata() answer {
	return answer{200, map[string]any{"metadata": c.metadata()}}
}

func (c *call) setMetadata() answer {
	m := c.metadata()
	given := metadataOf(c.body["metadata"])
	if wrong := badMetadata(given); wrong != "" {
		return refuse(400, "%s", wrong)
	}
	if c.r.Method == "PUT" {
		clear(m)
	}
	maps.Copy(m, given)
	return answer{200, map[string]any{"metadata": m}}
}

func (c *call) deleteMetadata() answer {
	m := c.metadata()
	if _, ok := m[c.path[3]]; !ok {
		return refuse(404, "MetadataItemNotFound: Metadata item is not found.")
	}
	delete(m, c.path[3])
	return answer{200, nil}
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
	var all []*Snapshot
	q := c.r.URL.Query()
	for _, s := range c.snapshots {
		if (q.Get("name") == "" || s.Name == q.Get("name")) && (q.Get("share_id") == "" || s.ShareID == q.Get("share_id")) &&
			(!c.since(73) || c.hasMetadata(s.Metadata)) {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b *Snapshot) int { return c.order(a.Created, b.Created, a.ID, b.ID) })
	out := make([]any, len(all))
	for i, s := range all {
		out[i] = any(c.describeSnapshot(s))
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
		if of := c.r.URL.Query().Get("snapshot_id"); of == "" || of == s.ID {
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

func (c *call) listTypes() answer {
	out := []any{}
	for _, t := range c.types {
		specs := map[string]any{"driver_handles_share_servers": "False", "snapshot_support": false, "create_share_from_snapshot_support": false,
			"revert_to_snapshot_support": false, "mount_snapshot_support": false}
		maps.Copy(specs, t.Specs)
		out = append(out, map[string]any{"id": t.ID, "name": t.Name, "extra_specs": specs, "is_default": t.Default, "share_type_access:is_public": true})
	}
	return answer{200, map[string]any{"share_types": out, "volume_types": out}}
}

func (c *call) listMessages() answer {
	out := []any{}
	for _, m := range slices.Backward(c.messages) {
		if id := c.r.URL.Query().Get("resource_id"); id == "" || id == m.resource {
			out = append(out, map[string]any{"id": m.id, "resource_id": m.resource, "resource_type": "SHARE", "message_level": m.level,
				"detail_id": m.detail, "user_message": m.text, "created_at": m.created.UTC().Format(stamp), "action_id": m.action, "project_id": project})
		}
	}
	return c.page("messages", out, never)
}

func (c *call) quota() answer {
	of := func(limit, used int) map[string]any {
		return map[string]any{"limit": limit, "in_use": used, "reserved": 0}
	}
	return answer{200, map[string]any{"quota_set": map[string]any{"id": project, "shares": of(-1, len(c.shares)), "gigabytes": of(c.o.Gigabytes, c.used()),
		"snapshots": of(-1, len(c.snapshots)), "snapshot_gigabytes": of(-1, 0), "per_share_gigabytes": of(c.o.PerShare, 0)}}}
}

func (c *call) zones() answer {
	return answer{200, map[string]any{"availability_zones": []any{map[string]any{"id": newID(), "name": "az-one"}, map[string]any{"id": newID(), "name": "az-two"}}}}
}

func (c *call) listLocks() answer {
	out := []any{}
	for id, reason := range c.locks {
		if want := c.r.URL.Query().Get("resource_id"); want == "" || want == id {
			out = append(out, map[string]any{"id": "lock-" + id, "resource_id": id, "resource_type": "share", "resource_action": "delete", "lock_reason": reason})
		}
	}
	return answer{200, map[string]any{"resource_locks": out}}
}

// Tree is the directory with the contents of a share.
func (s *Server) Tree(share string) string { return filepath.Join(s.o.Dir, share) }

// SnapshotTree is the directory with those of a snapshot, where CephFS has it.
func (s *Server) SnapshotTree(share, snapshot string) string {
	return filepath.Join(s.Tree(share), ".snap", "_"+snapshot+"_1099511627776")
}

// copyTree makes to a copy of from, without its snapshots; empty if from is.
func copyTree(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil || from == "" {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	args := []string{"-a", "--reflink=auto", "--"}
	for _, e := range entries {
		if e.Name() != ".snap" {
			args = append(args, filepath.Join(from, e.Name()))
		}
	}
	if len(args) == 3 {
		return nil
	}
	if out, err := exec.Command("cp", append(args, to)...).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// Counts says what there is, for tests that look for what is left behind.
func (s *Server) Counts() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.advance()
	return fmt.Sprintf("%d shares, %d snapshots, %d rules", len(s.shares), len(s.snapshots), len(s.rules))
}

// Objects are what the cloud has, by id.
type Objects struct {
	Shares    map[string]*Share
	Snapshots map[string]*Snapshot
	Rules     map[string]*Rule
	Types     []*Type
}

// Alter changes what there is behind a client's back.
func (s *Server) Alter(change func(Objects)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.advance()
	change(Objects{s.shares, s.snapshots, s.rules, s.types})
}

// Age makes all messages older.
func (s *Server) Age(by time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.messages {
		m.created = m.created.Add(-by)
	}
}

// Say adds a user message of level ERROR about a share, in Manila's form: the action,
// a colon and the detail.
func (s *Server) Say(share, detail, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.say(share, detail, text)
}

// Lock keeps a share from being deleted, for a reason; an empty one unlocks it.
func (s *Server) Lock(share, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.locks[share] = reason; reason == "" {
		delete(s.locks, share)
	}
}
