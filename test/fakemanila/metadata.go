package fakemanila

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"time"
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
	all := maps.Clone(given)
	switch {
	case c.r.Method == "PUT":
		clear(m)
	case c.share != nil:
		// Manila reads all that a share has, and writes all of it: what others have
		// dropped since comes back, and what they have changed is as it was.
		all = maps.Clone(m)
		maps.Copy(all, given)
		c.meanwhile()
	}
	maps.Copy(m, all)
	return answer{200, map[string]any{"metadata": m}}
}

// meanwhile lets others do something in the middle of a request.
func (c *call) meanwhile() {
	do := c.between
	c.mu.Unlock()
	defer c.mu.Lock()
	if do != nil {
		do()
		return
	}
	time.Sleep(time.Duration(rand.Int64N(int64(2 * time.Millisecond))))
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
