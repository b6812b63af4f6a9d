package fakemanila

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Rule is an access rule of a share or of a snapshot.
type Rule struct {
	ID, ShareID, SnapshotID, Type, To, Level, State, Key string

	Metadata map[string]string
	Created  time.Time
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
	out := []any{}
	for _, r := range slices.SortedFunc(maps.Values(c.rules), func(a, b *Rule) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) }) {
		if r.ShareID == share && r.SnapshotID == "" {
			out = append(out, describeRule(r))
		}
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
