package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
)

const (
	// defaultSize is what a request without a size gets.
	defaultSize = 1 << 30
	// maxName is more than any orchestrator uses and any storage system must
	// take (CSI spec 1.13, "Size Limits": 128 bytes, and more at will).
	maxName = 1024
)

// The entries of backend.Share.Description: what is needed to describe the
// volume again from the share alone.
const (
	describeSource = "source" // the handle it was made from
	describeClaim  = "claim"
	describeModes  = "accessModes" // comma-separated
	describeClass  = "parameters"  // JSON
)

// creation is a CreateVolume request that has been read and found sound.
type creation struct {
	class
	name        string
	min, max    int64  // bytes; max 0: no bound
	readOnly    bool   // only *_READER_ONLY modes
	source      string // handle, or empty
	description map[string]string
	requisite   []*csi.Topology
	zones       []string // where it is wanted, the best first
}

// consumer is the name under which the volume holds what it is made of.
func (c creation) consumer() string { return consumerOf(c.name) }

// CreateVolume makes a share, or a reference to a snapshot. Its forms are those
// of the table in the README.
func (d *Driver) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	c, err := d.readCreation(req)
	if err != nil {
		return nil, err
	}
	if err := c.reachable(); err != nil {
		return nil, err
	}
	snapshotID := req.GetVolumeContentSource().GetSnapshot().GetSnapshotId()
	volumeID := req.GetVolumeContentSource().GetVolume().GetVolumeId()
	switch {
	case snapshotID != "":
		return d.createFromSnapshot(ctx, c, snapshotID)
	case volumeID != "":
		return d.createFromVolume(ctx, c, volumeID)
	case req.GetVolumeContentSource() != nil:
		return nil, fmt.Errorf("the volume content source names neither a snapshot nor a volume: %w", backend.ErrInvalid)
	case c.readOnly:
		return nil, fmt.Errorf("a volume that can only be read needs a source, a snapshot or a volume: %w", backend.ErrInvalid)
	}
	return d.createEmpty(ctx, c)
}

func (d *Driver) readCreation(req *csi.CreateVolumeRequest) (creation, error) {
	wanted := req.GetAccessibilityRequirements()
	c := creation{name: req.GetName(), requisite: wanted.GetRequisite()}
	for _, t := range slices.Concat(wanted.GetPreferred(), wanted.GetRequisite()) {
		if zone := t.GetSegments()[ZoneKey]; zone != "" && !slices.Contains(c.zones, zone) {
			c.zones = append(c.zones, zone)
		}
	}
	if err := checkName(c.name); err != nil {
		return c, err
	}
	var err error
	if c.readOnly, err = readerOnly(req.GetVolumeCapabilities()); err != nil {
		return c, err
	}
	if c.class, err = d.readClass(req.GetParameters()); err != nil {
		return c, err
	}
	if len(req.GetMutableParameters()) > 0 {
		return c, fmt.Errorf("volumes have no mutable parameters: %w", backend.ErrInvalid)
	}
	if c.min, c.max, err = sizes(req.GetCapacityRange()); err != nil {
		return c, err
	}
	parameters, err := json.Marshal(req.GetParameters())
	if err != nil {
		return c, err
	}
	var modes []string
	for _, vc := range req.GetVolumeCapabilities() {
		modes = append(modes, vc.GetAccessMode().GetMode().String())
	}
	c.description = map[string]string{
		describeClaim: c.claim, describeModes: strings.Join(modes, ","), describeClass: string(parameters)}
	return c, nil
}

func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("the name is missing: %w", backend.ErrInvalid)
	case len(name) > maxName:
		return fmt.Errorf("the name has %d bytes, more than %d: %w", len(name), maxName, backend.ErrInvalid)
	}
	return nil
}

// readerOnly says whether all the capabilities only read. Mounted file trees in
// any access mode are what there is.
func readerOnly(caps []*csi.VolumeCapability) (bool, error) {
	if len(caps) == 0 {
		return false, fmt.Errorf("the volume capabilities are missing: %w", backend.ErrInvalid)
	}
	readers := 0
	for _, vc := range caps {
		if vc.GetBlock() != nil {
			return false, fmt.Errorf("shares are file trees, not block devices: %w", backend.ErrInvalid)
		}
		if vc.GetMount() == nil {
			return false, fmt.Errorf("a volume capability has no access type: %w", backend.ErrInvalid)
		}
		if reads(vc) {
			readers++
		} else if vc.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_UNKNOWN {
			return false, fmt.Errorf("a volume capability has no access mode: %w", backend.ErrInvalid)
		}
	}
	return readers == len(caps), nil
}

func reads(vc *csi.VolumeCapability) bool {
	switch vc.GetAccessMode().GetMode() {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY, csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:
		return true
	}
	return false
}

// sizes returns the range of sizes that a request allows, in bytes; 0 is no
// bound.
func sizes(r *csi.CapacityRange) (least, most int64, err error) {
	least, most = r.GetRequiredBytes(), r.GetLimitBytes()
	switch {
	case least < 0 || most < 0:
		return 0, 0, fmt.Errorf("a size is negative: %w", backend.ErrInvalid)
	case most > 0 && most < least:
		return 0, 0, fmt.Errorf("the size limit of %d bytes is below the required %d: %w", most, least, backend.ErrInvalid)
	}
	return least, most, nil
}

func rangeText(least, most int64) string {
	switch {
	case most == 0:
		return fmt.Sprintf("at least %d", least)
	case most == least:
		return fmt.Sprint(most)
	}
	return fmt.Sprintf("%d to %d", least, most)
}

// holding raises the least size to what the source needs. A request asks for at
// least so many bytes, so more is right as long as its limit allows it.
func (c *creation) holding(source string, size int64) error {
	if c.max > 0 && size > c.max {
		return fmt.Errorf("the %s is of a volume of %d bytes, more than the limit of %d: %w", source, size, c.max, errRange)
	}
	c.min = max(c.min, size)
	return nil
}

// createEmpty makes a share with nothing in it.
func (d *Driver) createEmpty(ctx context.Context, c creation) (*csi.CreateVolumeResponse, error) {
	if c.min == 0 {
		if c.min = defaultSize; c.max > 0 {
			c.min = min(c.min, c.max)
		}
	}
	share, err := c.makeShare(ctx, backend.CreateShareRequest{})
	if err != nil {
		return nil, err
	}
	return answerShare(c, share), nil
}

// existing returns the share that bears the volume's name, or nil. One that an
// earlier call has begun it finishes, whatever has become of the source since: after
// a final answer nobody would find it. When that fails it returns the share too.
func (c creation) existing(ctx context.Context) (*backend.Share, error) {
	share, err := c.backend.ShareNamed(ctx, c.name)
	begun := errors.Is(err, backend.ErrPending) && share != nil
	switch {
	case isNotFound(err):
		return nil, nil
	case err != nil && !begun:
		return nil, err
	case share.Description[describeSource] != c.source:
		return nil, fmt.Errorf("volume %q exists, made from %q and not from %q: %w",
			c.name, share.Description[describeSource], c.source, backend.ErrConflict)
	case share.Size < c.min || c.max > 0 && share.Size > c.max:
		return nil, fmt.Errorf("volume %q exists with %d bytes, and asked for are %s: %w", c.name, share.Size, rangeText(c.min, c.max), backend.ErrConflict)
	case share.Role != backend.RoleUser:
		return nil, fmt.Errorf("share %q exists and is not a volume: %w", c.name, backend.ErrConflict)
	case begun:
		c.min = share.Size // which its source may have asked for
		finished, err := c.makeShare(ctx, backend.CreateShareRequest{FromSnapshot: share.FromSnapshot, Draft: share.Draft})
		if err != nil {
			return share, err
		}
		share = finished
	}
	return share, nil
}

func (c creation) makeShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	// A share could not be exported for a name that a snapshot volume has.
	held, err := c.backend.ExportOf(ctx, c.consumer())
	if err == nil && held.Target.SnapshotID != "" {
		return nil, fmt.Errorf("volume %q exists and refers to a snapshot: %w", c.name, backend.ErrConflict)
	}
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return nil, err
	}
	req.Name, req.MinSize, req.MaxSize, req.Role = c.name, c.min, c.max, backend.RoleUser
	req.Parameters, req.Zones = c.parameters, c.zones
	req.Description = maps.Clone(c.description)
	req.Description[describeSource] = c.source
	if c.claim != "" {
		req.Note = "claim " + c.claim
	}
	return c.backend.CreateShare(ctx, req)
}

// answerShare describes the volume that a share is. It is exported when a node
// is to mount it.
func answerShare(c creation, share *backend.Share) *csi.CreateVolumeResponse {
	return answer(c, Volume{Backend: c.backendName, Share: share.ID}, share.Size, topology(share.Node, share.Zone), "")
}

func answer(c creation, v Volume, size int64, where []*csi.Topology, way string) *csi.CreateVolumeResponse {
	volume := &csi.Volume{VolumeId: v.String(), CapacityBytes: size, AccessibleTopology: where, VolumeContext: wayContext(way)}
	if c.source != "" {
		volume.ContentSource = contentSource(c.source)
	}
	return &csi.CreateVolumeResponse{Volume: volume}
}

// wayContext tells people how a snapshot is shown. Nobody reads it back.
func wayContext(way string) map[string]string {
	if way == "" {
		return nil
	}
	return map[string]string{"snapshotWay": way}
}

// topology says where a volume can be used: on one node, in one zone, or
// anywhere.
func topology(node, zone string) []*csi.Topology {
	switch {
	case node != "":
		return []*csi.Topology{{Segments: map[string]string{TopologyKey: node}}}
	case zone != "":
		return []*csi.Topology{{Segments: map[string]string{ZoneKey: zone}}}
	}
	return nil
}

// reachable checks, before anything is made, that one of the places where the
// volume is wanted can reach the backend.
func (c creation) reachable() error {
	bound, ok := c.backend.(backend.Bound)
	if !ok || bound.OnlyNode() == "" || len(c.requisite) == 0 {
		return nil
	}
	for _, t := range c.requisite {
		if at, ok := t.GetSegments()[TopologyKey]; !ok || at == bound.OnlyNode() {
			return nil
		}
	}
	return fmt.Errorf("the backend serves node %q, which is not among those that the volume is wanted on: %w", bound.OnlyNode(), backend.ErrExhausted)
}

// contentSource puts a source's handle back into the request's terms.
func contentSource(handle string) *csi.VolumeContentSource {
	if _, err := ParseSnapshot(handle); err == nil {
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: handle}}}
	}
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: handle}}}
}

// sourceBackend returns the backend that has the source, and sees to it that
// the volume is made there.
func (d *Driver) sourceBackend(c *creation, name string) error {
	b := d.Backends[name]
	if b == nil {
		return fmt.Errorf("the source is on backend %q, which is not configured: %w", name, backend.ErrNotFound)
	}
	c.backendName, c.backend = name, b
	return nil
}

func (d *Driver) createFromSnapshot(ctx context.Context, c creation, id string) (*csi.CreateVolumeResponse, error) {
	c.source = id
	s, err := ParseSnapshot(id)
	if err != nil {
		return nil, err
	}
	if s.Backed() {
		return d.createFromBackup(ctx, c, s)
	}
	if err := d.sourceBackend(&c, s.Backend); err != nil {
		return nil, err
	}
	if c.readOnly {
		snapshot, err := userSnapshot(ctx, c.backend, s)
		if err != nil {
			return nil, err
		}
		return d.createReference(ctx, c, snapshot)
	}
	share, err := c.existing(ctx)
	if err != nil {
		return nil, err
	}
	if share == nil {
		snapshot, err := userSnapshot(ctx, c.backend, s)
		if err != nil {
			return nil, err
		}
		if err := c.holding("snapshot", snapshot.Size); err != nil {
			return nil, err
		}
		if share, err = c.makeShare(ctx, backend.CreateShareRequest{FromSnapshot: s.Snapshot}); err != nil {
			return nil, err
		}
	}
	return answerShare(c, share), nil
}

// createReference makes a snapshot volume: nothing but a durable hold on the
// snapshot. It has no size of its own, so it has whatever size is asked for and
// an orchestrator never finds it too small.
func (d *Driver) createReference(ctx context.Context, c creation, snapshot *backend.Snapshot) (*csi.CreateVolumeResponse, error) {
	if err := c.holding("snapshot", snapshot.Size); err != nil {
		return nil, err
	}
	share, err := c.backend.ShareNamed(ctx, c.name)
	if share != nil {
		return nil, fmt.Errorf("volume %q exists and is a share of its own: %w", c.name, backend.ErrConflict)
	}
	if !isNotFound(err) {
		return nil, err
	}
	if p, ok := c.backend.(backend.Parameterized); ok {
		if err := p.CheckReference(ctx, snapshot.ShareID, c.parameters); err != nil {
			return nil, err
		}
	}
	export, err := c.backend.Export(ctx, backend.Target{SnapshotID: snapshot.ID}, c.consumer())
	if err != nil {
		return nil, fmt.Errorf("hold snapshot %s for volume %q: %w", snapshot.ID, c.name, err)
	}
	klog.FromContext(ctx).V(1).Info("Snapshot is shown", "name", c.name, "snapshotID", snapshot.ID, "way", export.Way)
	return answer(c, Volume{Backend: c.backendName, Snapshot: snapshot.ID, Consumer: c.consumer()}, c.min, topology(export.Node, snapshot.Zone), export.Way), nil
}

// createFromVolume goes by way of a temporary snapshot: a snapshot volume keeps
// it for its own lifetime, a clone drops it as soon as it is made.
func (d *Driver) createFromVolume(ctx context.Context, c creation, id string) (*csi.CreateVolumeResponse, error) {
	c.source = id
	v, err := ParseVolume(id)
	if err != nil {
		return nil, err
	}
	if v.Referring() {
		return nil, fmt.Errorf("%s refers to a snapshot; make the volume from that snapshot: %w", id, backend.ErrUnsupported)
	}
	if err := d.sourceBackend(&c, v.Backend); err != nil {
		return nil, err
	}
	temporary := backend.CreateSnapshotRequest{Name: temporaryName(c.name), ShareID: v.Share, Role: backend.RoleTemporary}
	if c.readOnly {
		return d.createView(ctx, c, v, temporary)
	}
	share, err := c.existing(ctx)
	if err != nil && share != nil {
		return nil, c.abandon(ctx, err, share.FromSnapshot)
	}
	if err != nil {
		return nil, err
	}
	if share == nil {
		source, err := sourceShare(ctx, c.backend, v)
		if err == nil && source != nil {
			err = c.holding("source", source.Size) // before a snapshot is cut
		}
		if err != nil {
			return nil, err
		}
		snapshot, err := c.backend.CreateSnapshot(ctx, temporary)
		if err != nil {
			return nil, err
		}
		if err = c.holding("source", snapshot.Size); err == nil {
			share, err = c.makeShare(ctx, backend.CreateShareRequest{FromSnapshot: snapshot.ID})
		}
		if err != nil {
			return nil, c.abandon(ctx, err, snapshot.ID)
		}
	}
	// Also when the clone was there already: the last call may have ended here.
	if err := c.backend.DeleteSnapshot(ctx, share.FromSnapshot); err != nil {
		return nil, err
	}
	return answerShare(c, share), nil
}

// temporaryName names the snapshot that is cut for one volume alone.
func temporaryName(volume string) string { return "volume/" + volume }

// abandon removes the snapshot that was cut for a volume that will not be: after
// an answer that is final nobody may call again.
func (c creation) abandon(ctx context.Context, err error, snapshot string) error {
	if !final(err) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
	defer cancel()
	return undone(err, c.backend.DeleteSnapshot(ctx, snapshot))
}

// undone is what a request is answered that has failed for good, if left is why what
// was begun for it may still be there: as long as it may, no answer is final, or the
// claim could go and leave it behind.
func undone(err, left error) error {
	if left == nil {
		return err
	}
	return fmt.Errorf("%s; and what was begun for it may still be there: %s: %w", err, left, backend.ErrPending)
}

// cleanUpTimeout bounds what is still done for a request that has failed.
const cleanUpTimeout = 30 * time.Second

// createView refers to a fresh snapshot of a volume. What exists already is
// found first, since the volume may have gone by now.
func (d *Driver) createView(ctx context.Context, c creation, v Volume, temporary backend.CreateSnapshotRequest) (*csi.CreateVolumeResponse, error) {
	held, err := c.backend.ExportOf(ctx, c.consumer())
	if err == nil && held.Target.SnapshotID != "" {
		snapshot, err := c.backend.Snapshot(ctx, held.Target.SnapshotID)
		if err != nil {
			return nil, err
		}
		if snapshot.Name != temporary.Name || snapshot.ShareID != v.Share {
			return nil, fmt.Errorf("volume %q exists and is not a view of %s: %w", c.name, v, backend.ErrConflict)
		}
		return d.createReference(ctx, c, snapshot)
	}
	if err != nil && !isNotFound(err) {
		return nil, err
	}
	if _, err := sourceShare(ctx, c.backend, v); err != nil {
		return nil, err
	}
	snapshot, err := c.backend.CreateSnapshot(ctx, temporary)
	if err != nil {
		return nil, err
	}
	resp, err := d.createReference(ctx, c, snapshot)
	if err != nil {
		return nil, c.abandon(ctx, err, snapshot.ID)
	}
	return resp, nil
}

// userShare returns a share that is a volume. One that is still being filled is
// ErrPending; what Abaca made for its own use is nobody's business. With these
// errors it returns the share too.
func userShare(ctx context.Context, b backend.Backend, v Volume) (*backend.Share, error) {
	share, err := b.Share(ctx, v.Share)
	switch {
	case err != nil:
		return nil, err
	case share.Role != backend.RoleUser:
		return share, fmt.Errorf("volume %s: %w", v, backend.ErrNotFound)
	case share.Draft:
		return share, fmt.Errorf("volume %s is still being restored: %w", v, backend.ErrPending)
	}
	return share, nil
}

// sourceShare is userShare for what a snapshot is cut of: nil when it has gone, which
// is no obstacle to what was made of it before.
func sourceShare(ctx context.Context, b backend.Backend, v Volume) (*backend.Share, error) {
	share, err := userShare(ctx, b, v)
	if isNotFound(err) && share == nil {
		return nil, nil
	}
	return share, err
}

// DeleteVolume removes a share, or ends a reference and the snapshot that was
// cut for it alone. What is not one of ours is gone already.
func (d *Driver) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID
	}
	v, err := ParseVolume(req.GetVolumeId())
	if err != nil {
		return &csi.DeleteVolumeResponse{}, nil
	}
	b, err := d.backendOf(v.Backend)
	if err != nil {
		return nil, err
	}
	if v.Referring() {
		err = deleteReference(ctx, b, v)
	} else {
		err = d.deleteShare(ctx, b, v.Share)
	}
	if err != nil {
		return nil, fmt.Errorf("delete volume %s: %w", v, err)
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func deleteReference(ctx context.Context, b backend.Backend, v Volume) error {
	if err := b.Unexport(ctx, v.Target(), v.Consumer); err != nil {
		return err
	}
	snapshot, err := b.Snapshot(ctx, v.Snapshot)
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	// Only what was cut for this very volume.
	if name, ok := strings.CutPrefix(snapshot.Name, temporaryName("")); ok && snapshot.Role == backend.RoleTemporary &&
		v.Consumer == consumerOf(name) {
		return b.DeleteSnapshot(ctx, v.Snapshot)
	}
	return nil
}

func (d *Driver) deleteShare(ctx context.Context, b backend.Backend, id string) error {
	share, err := b.Share(ctx, id)
	if errors.Is(err, backend.ErrNotFound) {
		return b.DeleteShare(ctx, id) // there may be remains
	}
	if err != nil {
		return err
	}
	// A request that still makes it would start again what is ended here.
	release, held := d.busy.TryLock(nameKey(share.Name))
	if held != "" {
		return fmt.Errorf("another request is at work on %s: %w", held, backend.ErrPending)
	}
	defer release()
	if d.Backups != nil {
		// A restore that still fills it; its record goes before the share does,
		// so that nobody starts it again.
		if err := d.Backups.EndRestore(ctx, restoreID(share)); err != nil {
			return err
		}
	}
	return b.DeleteShare(ctx, id)
}

var errNoVolumeID = fmt.Errorf("the volume id is missing: %w", backend.ErrInvalid)

// ControllerExpandVolume raises the size of a share, in use or not.
func (d *Driver) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	v, b, err := d.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if v.Referring() {
		return nil, fmt.Errorf("%s refers to a snapshot and cannot grow: %w", v, backend.ErrUnsupported)
	}
	if req.GetCapacityRange() == nil {
		return nil, fmt.Errorf("the capacity range is missing: %w", backend.ErrInvalid)
	}
	least, most, err := sizes(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	share, err := userShare(ctx, b, v)
	if err != nil {
		return nil, err
	}
	if most > 0 && share.Size > most {
		return nil, fmt.Errorf("volume %s has %d bytes, more than the limit of %d, and volumes do not shrink: %w", v, share.Size, most, errRange)
	}
	if share, err = b.ExpandShare(ctx, v.Share, least); err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: share.Size}, nil
}

// volume returns the backend of a volume that a request names.
func (d *Driver) volume(id string) (Volume, backend.Backend, error) {
	if id == "" {
		return Volume{}, nil, errNoVolumeID
	}
	v, err := ParseVolume(id)
	if err != nil {
		return v, nil, err
	}
	b, err := d.backendOf(v.Backend)
	return v, b, err
}

// ValidateVolumeCapabilities confirms what the volume can really be used for.
func (d *Driver) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	v, b, err := d.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("the volume capabilities are missing: %w", backend.ErrInvalid)
	}
	if _, err := d.describe(ctx, b, v); err != nil {
		return nil, err
	}
	resp := &csi.ValidateVolumeCapabilitiesResponse{}
	for _, vc := range req.GetVolumeCapabilities() {
		if _, err := readerOnly([]*csi.VolumeCapability{vc}); err != nil {
			resp.Message = err.Error()
			return resp, nil
		}
		if v.Referring() && !reads(vc) {
			resp.Message = "the volume refers to a snapshot and can only be read: access mode " + vc.GetAccessMode().GetMode().String()
			return resp, nil
		}
	}
	resp.Confirmed = &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: req.GetVolumeContext(), VolumeCapabilities: req.GetVolumeCapabilities(), Parameters: req.GetParameters()}
	return resp, nil
}
