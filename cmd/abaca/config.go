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

// backendConfig is one backend, of one kind; the first is the default of a class.
type backendConfig struct {
	Name   string
	Local  *localConfig
	Manila *manilaConfig
}

// manilaConfig is OpenStack Manila.
type manilaConfig struct {
	// Clouds is a clouds.yaml, and Cloud the name of the cloud in it.
	Clouds, Cloud string
	// Instance tells the shares of several drivers in one project apart.
	Instance string
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
	m, err := fields(where, b, "name", "local", "manila")
	if err != nil {
		return out, err
	}
	if err := json.Unmarshal(m["name"], &out.Name); err != nil || !csi.ValidBackendName(out.Name) {
		return out, fmt.Errorf("%s.name must be 1 to 24 lower-case letters, digits and '-', begin with a letter, and not be \"backup\"", where)
	}
	switch {
	case (m["local"] == nil) == (m["manila"] == nil):
		return out, fmt.Errorf("%s must say what kind of backend it is: either local or manila", where)
	case m["local"] != nil:
		out.Local, err = parseLocal(where+".local", m["local"])
	default:
		out.Manila, err = parseManila(where+".manila", m["manila"])
	}
	return out, err
}

func parseLocal(where string, b []byte) (*localConfig, error) {
	m, err := fields(where, b, "path", "size")
	if err != nil {
		return nil, err
	}
	c := &localConfig{}
	if err := json.Unmarshal(m["path"], &c.Path); err != nil || !filepath.IsAbs(c.Path) {
		return nil, fmt.Errorf("%s.path must be an absolute path", where)
	}
	if m["size"] != nil {
		var q resource.Quantity
		if err := json.Unmarshal(m["size"], &q); err != nil || q.Value() <= 0 {
			return nil, fmt.Errorf("%s.size is %s, but must be a size such as 10Gi", where, m["size"])
		}
		c.Size = q.Value()
	}
	return c, nil
}

func parseManila(where string, b []byte) (*manilaConfig, error) {
	m, err := fields(where, b, "clouds", "cloud", "instance")
	if err != nil {
		return nil, err
	}
	c := &manilaConfig{}
	if err := json.Unmarshal(m["clouds"], &c.Clouds); err != nil || !filepath.IsAbs(c.Clouds) {
		return nil, fmt.Errorf("%s.clouds must be the absolute path of a clouds.yaml", where)
	}
	if err := json.Unmarshal(m["cloud"], &c.Cloud); err != nil || c.Cloud == "" {
		return nil, fmt.Errorf("%s.cloud must be the name of a cloud in %s", where, c.Clouds)
	}
	if m["instance"] != nil {
		if err := json.Unmarshal(m["instance"], &c.Instance); err != nil || c.Instance == "" {
			return nil, fmt.Errorf("%s.instance must be a name", where)
		}
	}
	return c, nil
}
