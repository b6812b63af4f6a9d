package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/record"
)

// staged is what a node keeps of a volume from NodeStageVolume until
// NodeUnstageVolume: where it was mounted from. Whatever asks about the mount
// later is answered by it, so that a node needs nobody for that, and the storage
// system may move the export meanwhile.
type staged struct {
	Volume string       `json:"volume"`
	Path   string       `json:"path"`
	Source mount.Source `json:"source"`
}

func (d *Driver) stagedFile(volume, path string) string {
	return filepath.Join(d.StagedDir, digest(volume)+"-"+digest(filepath.Clean(path))+".json")
}

// stagedAt returns the record of a volume at a staging path. ErrNotMounted when
// there is none.
func (d *Driver) stagedAt(volume, path string) (staged, error) {
	var s staged
	err := record.Read(d.stagedFile(volume, path), &s)
	if errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("volume %s is not staged at %s: %w", volume, path, mount.ErrNotMounted)
	}
	return s, err
}

// stagedSources returns the sources of a volume at all its staging paths.
func (d *Driver) stagedSources(volume string) ([]mount.Source, error) {
	files, err := filepath.Glob(filepath.Join(d.StagedDir, digest(volume)+"-*.json"))
	var sources []mount.Source
	for _, file := range files {
		var s staged
		if err := record.Read(file, &s); err != nil {
			return nil, err
		}
		sources = append(sources, s.Source)
	}
	return sources, err
}

func (d *Driver) dropStaged(volume, path string) error {
	if err := os.Remove(d.stagedFile(volume, path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// exportKey is the entry of a publish context that holds the export, as JSON.
const exportKey = "export"

// source returns where a volume is to be mounted from. A process that has the
// backend asks it; a node that is no controller gets the answer in the publish
// context, which only the controller writes. A volume context is not believed: whoever can
// write one could name another's share.
func (d *Driver) source(ctx context.Context, u use, published map[string]string) (mount.Source, error) {
	v, export := u.volume, &backend.Export{}
	var err error
	if b := d.Backends[v.Backend]; b != nil {
		export, err = granted(ctx, b, v, d.self(), u.readOnly)
	} else if text, ok := published[exportKey]; !ok || d.Controller {
		err = fmt.Errorf("backend %q is not configured here, and the publish context has no export; was the volume published to this node? %w", v.Backend, backend.ErrInvalid)
	} else if err = json.Unmarshal([]byte(text), export); err != nil || export.Target != v.Target() {
		err = fmt.Errorf("the publish context is not of volume %s: %w", v, backend.ErrInvalid)
	}
	if err != nil {
		return mount.Source{}, err
	}
	if err := usableOn(v, export, d.NodeID); err != nil {
		return mount.Source{}, err
	}
	return backup.Source(export), nil
}

// granted lets a node in to a volume, where the backend wants to be told, and
// returns its export.
func granted(ctx context.Context, b backend.Backend, v Volume, node backend.Node, readOnly bool) (*backend.Export, error) {
	export, err := exported(ctx, b, v)
	if err != nil {
		return nil, err
	}
	if err := usableOn(v, export, node.Name); err != nil {
		return nil, err
	}
	if g, ok := b.(backend.Granter); ok {
		if export, err = g.Grant(ctx, export.Consumer, node, readOnly); err != nil {
			return nil, fmt.Errorf("let node %s in to volume %s: %w", node.Name, v, err)
		}
	}
	return export, nil
}

// errOtherNode: a volume is bound to a node, and this is another.
var errOtherNode = errors.New("it is on another node")

func usableOn(v Volume, export *backend.Export, node string) error {
	if export.Node != "" && export.Node != node {
		return fmt.Errorf("%s can be used on node %q only, and not on %q: %w", v, export.Node, node, errOtherNode)
	}
	return nil
}

// exported asks the backend for the volume's export as it is now.
func exported(ctx context.Context, b backend.Backend, v Volume) (*backend.Export, error) {
	if v.Consumer != "" {
		return heldExport(ctx, b, v)
	}
	share, err := userShare(ctx, b, v)
	if err != nil {
		return nil, err
	}
	return b.Export(ctx, v.Target(), consumerOf(share.Name))
}

// heldExport returns the export that a handle names by its consumer. ErrNotFound when that
// holds nothing, or something else.
func heldExport(ctx context.Context, b backend.Backend, v Volume) (*backend.Export, error) {
	export, err := b.ExportOf(ctx, v.Consumer)
	if err == nil && export.Target != v.Target() {
		err = backend.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", v, err)
	}
	return export, nil
}
