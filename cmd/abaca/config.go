package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"

	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/pkg/nearest"
)

// config is config.yaml. It holds no secret.
type config struct {
	Backends []backendConfig
}

// backendConfig is one backend; the first is the default of a class.
type backendConfig struct {
	Name  string
	Local localConfig
}

// localConfig is the embedded backend.
type localConfig struct {
	// Path is a directory on btrfs; with Size, any directory, and the backend
	// makes an image there.
	Path string
	// Size is the size of the image in bytes, or 0.
	Size int64
}

// fields reads an object whose keys are all known.
func fields(where string, b []byte, known ...string) (map[string]json.RawMessage, error) {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil || m == nil {
		return nil, fmt.Errorf("%s must be an object with the keys %v", where, known)
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if !slices.Contains(known, k) {
			return nil, fmt.Errorf("unknown key %q in %s%s", k, where, nearest.Hint(k, known))
		}
	}
	return m, nil
}

func loadConfig(path string) (*config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	c, err := parseConfig(text)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

func parseConfig(text []byte) (*config, error) {
	b, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return nil, err
	}
	top, err := fields("the file", b, "backends")
	if err != nil {
		return nil, err
	}
	var backends []json.RawMessage
	if err := json.Unmarshal(top["backends"], &backends); err != nil || len(backends) == 0 {
		return nil, fmt.Errorf("backends must be a list of at least one backend")
	}
	c := &config{}
	for i, b := range backends {
		one, err := parseBackend(fmt.Sprintf("backends[%d]", i), b)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(c.Backends, func(o backendConfig) bool { return o.Name == one.Name }) {
			return nil, fmt.Errorf("two backends are called %q", one.Name)
		}
		c.Backends = append(c.Backends, one)
	}
	return c, nil
}

func parseBackend(where string, b []byte) (backendConfig, error) {
	var out backendConfig
	m, err := fields(where, b, "name", "local")
	if err != nil {
		return out, err
	}
	if err := json.Unmarshal(m["name"], &out.Name); err != nil || !csi.ValidBackendName(out.Name) {
		return out, fmt.Errorf("%s.name must be 1 to 24 lower-case letters, digits and '-', begin with a letter, and not be \"backup\"", where)
	}
	if m["local"] == nil {
		return out, fmt.Errorf("%s says not what kind of backend it is; known is local", where)
	}
	local, err := fields(where+".local", m["local"], "path", "size")
	if err != nil {
		return out, err
	}
	if err := json.Unmarshal(local["path"], &out.Local.Path); err != nil || !filepath.IsAbs(out.Local.Path) {
		return out, fmt.Errorf("%s.local.path must be an absolute path", where)
	}
	if local["size"] != nil {
		var q resource.Quantity
		if err := json.Unmarshal(local["size"], &q); err != nil || q.Value() <= 0 {
			return out, fmt.Errorf("%s.local.size is %s, but must be a size such as 10Gi", where, local["size"])
		}
		out.Local.Size = q.Value()
	}
	return out, nil
}
