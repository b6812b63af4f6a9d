package fakemanila

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
)

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

// hasMetadata says whether an object has what the query's filter names:
// metadata={'key':'value'}.
func (c *call) hasMetadata(metadata map[string]string) bool {
	filter := c.r.URL.Query().Get("metadata")
	if filter == "" {
		return true
	}
	var want map[string]string
	if json.Unmarshal([]byte(strings.ReplaceAll(filter, "'", `"`)), &want) != nil {
		return false
	}
	for k, v := range want {
		if got, ok := metadata[k]; !ok || got != v {
			return false
		}
	}
	return true
}
