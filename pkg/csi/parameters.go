package csi

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/nearest"
)

// The parameters of a StorageClass and a VolumeSnapshotClass. What the
// orchestrator adds by itself begins with its prefix and is read where we know
// it (external-provisioner and external-snapshotter, --extra-create-metadata).
const (
	orchestratorPrefix   = "csi.storage.k8s.io/"
	claimNameKey         = orchestratorPrefix + "pvc/name"
	claimNamespaceKey    = orchestratorPrefix + "pvc/namespace"
	snapshotNameKey      = orchestratorPrefix + "volumesnapshot/name"
	snapshotNamespaceKey = orchestratorPrefix + "volumesnapshot/namespace"

	backendKey      = "backend"
	typeKey         = "type"
	repositoryKey   = "repository"
	allowPartialKey = "allowPartial"
	allowEmptyKey   = "allowEmpty"
	excludeKey      = "exclude"

	// ownRepository is the repository of the VolumeSnapshot's own namespace. No
	// repository that an administrator names can be called so.
	ownRepository = "@namespace"
)

// class is what a StorageClass says.
type class struct {
	backendName string
	backend     backend.Backend
	parameters  map[string]string // the backend's own
	claim       string            // namespace/name of the claim, or empty
}

func (d *Driver) readClass(params map[string]string) (class, error) {
	var c class
	var err error
	if c.backendName, c.backend, err = d.backend(params[backendKey]); err != nil {
		return c, fmt.Errorf("parameter %q: %w: %w", backendKey, err, backend.ErrInvalid)
	}
	known := []string{backendKey}
	if p, ok := c.backend.(backend.Parameterized); ok {
		known = append(known, p.Parameters()...)
	}
	if err := onlyKnown(params, known...); err != nil {
		return c, err
	}
	if name, ns := params[claimNameKey], params[claimNamespaceKey]; name != "" && ns != "" {
		c.claim = ns + "/" + name
	}
	c.parameters = maps.Clone(params)
	maps.DeleteFunc(c.parameters, func(k, _ string) bool { return k == backendKey || strings.HasPrefix(k, orchestratorPrefix) })
	return c, nil
}

// backupKeys go with type: backup.
var backupKeys = []string{repositoryKey, allowPartialKey, allowEmptyKey, excludeKey}

// snapshotParameters are what a VolumeSnapshotClass may hold.
type snapshotParameters struct {
	backup       bool
	repository   string
	allowPartial bool
	allowEmpty   bool
	exclude      []string
}

func parseSnapshotClass(params map[string]string) (snapshotParameters, error) {
	var p snapshotParameters
	if err := onlyKnown(params, append([]string{typeKey}, backupKeys...)...); err != nil {
		return p, err
	}
	switch t := params[typeKey]; t {
	case "", "snapshot":
		for _, k := range backupKeys {
			if _, ok := params[k]; ok {
				return p, fmt.Errorf("parameter %q goes with type: backup: %w", k, backend.ErrInvalid)
			}
		}
		return p, nil
	case "backup":
		p.backup = true
	default:
		return p, fmt.Errorf("parameter %q is %q, but must be snapshot or backup: %w", typeKey, t, backend.ErrInvalid)
	}
	if p.repository = params[repositoryKey]; p.repository == "" {
		return p, fmt.Errorf("type: backup needs parameter %q, the name of a repository: %w", repositoryKey, backend.ErrInvalid)
	}
	if p.repository == ownRepository {
		if !namespace.MatchString(params[snapshotNamespaceKey]) {
			return p, fmt.Errorf("parameter %q is %s, which needs the namespace of the VolumeSnapshot: csi-snapshotter adds it as %s if it has --extra-create-metadata: %w",
				repositoryKey, ownRepository, snapshotNamespaceKey, backend.ErrInvalid)
		}
		p.repository = backup.OfNamespace(params[snapshotNamespaceKey])
	} else if !repository.MatchString(p.repository) {
		return p, fmt.Errorf("parameter %q: %q is not a repository's name (lower-case letters, digits, '.', '_', '-'), nor @namespace: %w",
			repositoryKey, p.repository, backend.ErrInvalid)
	}
	var err error
	if p.allowPartial, err = flag(params, allowPartialKey); err != nil {
		return p, err
	}
	if p.allowEmpty, err = flag(params, allowEmptyKey); err != nil {
		return p, err
	}
	p.exclude = lines(params[excludeKey])
	if err := mover.CheckExclude(p.exclude); err != nil {
		return p, fmt.Errorf("parameter %q: %w: %w", excludeKey, err, backend.ErrInvalid)
	}
	return p, nil
}

// lines are those of a text that say something.
func lines(text string) []string {
	var all []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			all = append(all, line)
		}
	}
	return all
}

func flag(params map[string]string, key string) (bool, error) {
	v, ok := params[key]
	if !ok {
		return false, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, fmt.Errorf("parameter %q is %q, but must be \"true\" or \"false\": %w", key, v, backend.ErrInvalid)
	}
	return b, nil
}

// onlyKnown refuses a key that is neither known nor the orchestrator's.
func onlyKnown(params map[string]string, known ...string) error {
	for _, k := range slices.Sorted(maps.Keys(params)) {
		if !slices.Contains(known, k) && !strings.HasPrefix(k, orchestratorPrefix) {
			return fmt.Errorf("unknown parameter %q%s: %w", k, nearest.Hint(k, known), backend.ErrInvalid)
		}
	}
	return nil
}
