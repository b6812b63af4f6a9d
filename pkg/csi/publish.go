package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// A node's id is its name, a comma, and the addresses that storage systems see it
// by, separated by commas too, so that the controller need not look anything up:
//
//	worker-1,192.0.2.7,2001:db8::7

// NodeID puts a node's id together.
func NodeID(node backend.Node) string {
	var addresses []string
	for _, a := range node.Addresses {
		addresses = append(addresses, a.String())
	}
	return node.Name + "," + strings.Join(addresses, ",")
}

// ParseNodeID takes a node's id apart. What is not one is backend.ErrNotFound.
func ParseNodeID(id string) (backend.Node, error) {
	name, rest, more := strings.Cut(id, ",")
	node := backend.Node{Name: name}
	if name == "" || !more {
		return node, fmt.Errorf("%q is not a node id of this driver's: %w", id, backend.ErrNotFound)
	}
	for more = rest != ""; more; {
		var part string
		part, rest, more = strings.Cut(rest, ",")
		a, err := netip.ParseAddr(part)
		if err != nil || a.Zone() != "" {
			return node, fmt.Errorf("node id %q: %q is not an IP address: %w", id, part, backend.ErrNotFound)
		}
		node.Addresses = append(node.Addresses, a)
	}
	return node, nil
}

// attaches says whether a volume has to be published to a node before it can
// be staged there: a storage system lets in only the nodes that it is told of.
func (d *Driver) attaches() bool {
	for _, b := range d.Backends {
		if _, ok := b.(backend.Granter); ok {
			return true
		}
	}
	return false
}

// ControllerPublishVolume lets a node in, and gives it the export, which holds
// no secret.
func (d *Driver) ControllerPublishVolume(ctx context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID
	}
	if req.GetNodeId() == "" {
		return nil, fmt.Errorf("the node id is missing: %w", backend.ErrInvalid)
	}
	u, err := readUse(req.GetVolumeId(), req.GetVolumeCapability(), req.GetReadonly())
	if err != nil {
		return nil, err
	}
	b, err := d.backendOf(u.volume.Backend)
	if err != nil {
		return nil, err
	}
	node, err := ParseNodeID(req.GetNodeId())
	if err != nil {
		return nil, err
	}
	export, err := granted(ctx, b, u.volume, node, u.readOnly)
	if errors.Is(err, errOtherNode) {
		err = fmt.Errorf("%w: %w", backend.ErrNotFound, err) // for this volume there is no such node
	}
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(export)
	if err != nil {
		return nil, err
	}
	return &csi.ControllerPublishVolumeResponse{PublishContext: map[string]string{exportKey: string(text)}}, nil
}

// ControllerUnpublishVolume ends what ControllerPublishVolume began, for one node
// or for all.
func (d *Driver) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID
	}
	resp := &csi.ControllerUnpublishVolumeResponse{}
	v, err := parsePublished(req.GetVolumeId())
	if err != nil {
		return resp, nil
	}
	b, err := d.backendOf(v.Backend)
	if err != nil {
		return nil, err
	}
	g, ok := b.(backend.Granter)
	if !ok {
		return resp, nil
	}
	name, _, _ := strings.Cut(req.GetNodeId(), ",")
	consumer := v.Consumer
	if consumer == "" {
		share, err := b.Share(ctx, v.Share)
		if isNotFound(err) {
			return resp, nil // DeleteShare ends what was granted, and is repeated until it has
		}
		if err != nil {
			return nil, err
		}
		consumer = consumerOf(share.Name)
	}
	if err := g.Revoke(ctx, consumer, name); err != nil {
		return nil, fmt.Errorf("take volume %s from node %q: %w", v, name, err)
	}
	return resp, nil
}
