package fakemanila

import (
	"maps"
	"slices"
	"strings"
	"time"
)

type message struct {
	id, resource, level, detail, action, text string
	created                                   time.Time
}

// actions are what a message can be about (manila/message/message_field.py); its text
// begins with that.
var actions = map[string]string{"allocate host": "001", "create": "002", "delete access rules": "003", "delete": "007", "extend": "008", "update access rules": "010"}

func (s *Server) say(resource, detail, text string) {
	action, _, _ := strings.Cut(text, ":")
	s.messages = append(s.messages, &message{newID(), resource, "ERROR", detail, actions[action], text, now()})
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
		if c.asks("resource_id", m.resource) {
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

func lockID(share string) string { return "lock-" + share }

func (c *call) listLocks() answer {
	out := []any{}
	for id, reason := range c.locks {
		if c.asks("resource_id", id) {
			out = append(out, map[string]any{"id": lockID(id), "resource_id": id, "resource_type": "share", "resource_action": "delete", "lock_reason": reason})
		}
	}
	return answer{200, map[string]any{"resource_locks": out}}
}
