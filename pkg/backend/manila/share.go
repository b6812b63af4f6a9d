package manila

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// CreateShare implements backend.Backend.
//
// A share is made with its identity in the request, so whatever becomes of the
// answer, the next call finds it. Whoever finds it available makes it what was
// asked for and marks it ready; until then it does not exist for anybody else.
func (b *Backend) CreateShare(ctx context.Context, req backend.CreateShareRequest) (_ *backend.Share, err error) {
	defer wrap(&err, "create share %q", req.Name)
	if req.Name == "" || req.MinSize < 0 || req.MaxSize < 0 || req.MaxSize > 0 && req.MaxSize < req.MinSize {
		return nil, fmt.Errorf("%w: name or range of sizes %d to %d", backend.ErrInvalid, req.MinSize, req.MaxSize)
	}
	unlock, err := b.busy.lock(ctx, "share "+req.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for zone := 0; ; {
		tried := ""
		s, err := attempts(func() (*share, error) {
			seen, err := b.sharesSeen(ctx, b.id(req.Name), 0)
			if err != nil {
				return nil, pendingOr(err) // an earlier call may have made one
			}
			kind := "" // it may have been made long ago
			if len(seen.found) == 0 {
				in := req
				in.Zones = req.Zones[min(zone, len(req.Zones)):]
				made, err := b.make(ctx, in)
				if err != nil {
					return nil, err
				}
				seen.found, kind = []*share{made}, "create"
				if req.FromSnapshot != "" {
					kind = "clone"
				}
			}
			tried = seen.found[0].Zone
			return b.finish(ctx, req, seen, kind)
		})
		// The orchestrator may want it in the same zones the next time, and in the same order.
		if errors.Is(err, backend.ErrExhausted) && !errors.Is(err, backend.ErrPending) && choosesZone(req) {
			if next := 1 + slices.Index(req.Zones, tried); next > zone && next < len(req.Zones) {
				zone = next
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		return b.public(s), nil
	}
}

// choosesZone says whether a share is to be made in one of the zones of its request.
func choosesZone(req backend.CreateShareRequest) bool {
	return req.Parameters["autoTopology"] == "true" && len(req.Zones) > 0 && req.FromSnapshot == ""
}

// make asks for a new share.
func (b *Backend) make(ctx context.Context, req backend.CreateShareRequest) (*share, error) {
	keep, err := class(req.Parameters)
	if err != nil {
		return nil, err
	}
	size := sizeOf(req)
	if req.MaxSize > 0 && size*gib > req.MaxSize {
		return nil, fmt.Errorf("%w: Manila makes shares of whole GiB, and none is between %d and %d bytes", backend.ErrInvalid, req.MinSize, req.MaxSize)
	}
	p := req.Parameters
	ask := map[string]any{"name": label(req.Name), "description": printable(req.Note), "size": size}
	if req.FromSnapshot != "" {
		if err := b.likeSource(ctx, req, ask, keep); err != nil {
			return nil, err
		}
	} else {
		t, err := b.shareType(ctx, p["type"])
		if err != nil {
			return nil, err
		}
		if size, err = t.sizeFor(req); err != nil {
			return nil, err
		}
		ask["size"], ask["share_type"], ask["share_proto"] = size, t.ID, strings.ToUpper(cmp.Or(p["protocol"], "CEPHFS"))
	}
	for parameter, since := range map[string]int{"groupID": sinceGroups, "affinity": sinceHints, "antiAffinity": sinceHints} {
		if p[parameter] != "" && b.minor < since {
			return nil, fmt.Errorf("%w: parameter %q needs Manila's microversion 2.%d, and this one speaks 2.%d", backend.ErrUnsupported, parameter, since, b.minor)
		}
	}
	if choosesZone(req) {
		ask["availability_zone"] = req.Zones[0]
	}
	for parameter, field := range map[string]string{"availability": "availability_zone", "shareNetworkID": "share_network_id", "groupID": "share_group_id"} {
		if p[parameter] != "" {
			ask[field] = p[parameter]
		}
	}
	hints := map[string]any{}
	for parameter, hint := range map[string]string{"affinity": "same_host", "antiAffinity": "different_host"} {
		if p[parameter] != "" {
			hints[hint] = p[parameter]
		}
	}
	if len(hints) > 0 {
		ask["scheduler_hints"] = hints
	}
	extra, err := extraMetadata(p["appendShareMetadata"])
	if err != nil {
		return nil, err
	}
	metadata := b.describe(req, size, keep)
	maps.Copy(metadata, extra) // no key is in both
	ask["metadata"] = metadata
	var answer struct{ Share share }
	err = b.post(ctx, "shares", map[string]any{"share": ask}, &answer)
	if err = knownToBe(err, answer.Share.ID); err != nil {
		return nil, err
	}
	made := &answer.Share
	made.Metadata = metadata // who has made it knows what it is for
	return made, nil
}

// knownToBe is the error of a request that makes something, whose answer has an id. It
// is final only if there is nothing.
func knownToBe(err error, id string) error {
	switch refused := refusal(err); {
	case err == nil && validID(id):
		return nil
	case err == nil:
		err = errStrange
	case refused != nil && refused.status < 500:
		return err
	}
	return fmt.Errorf("%w: it is not known whether Manila has made it: %s", backend.ErrPending, err)
}

// sizeOf is the least size that a request allows, in GiB.
func sizeOf(req backend.CreateShareRequest) int64 { return max(1, (req.MinSize+gib-1)/gib) }

// likeSource asks for what a share has from the snapshot that it is made from, and
// keeps what the class does not say otherwise.
func (b *Backend) likeSource(ctx context.Context, req backend.CreateShareRequest, ask map[string]any, keep map[string]string) error {
	p := req.Parameters
	source, parent, err := b.source(ctx, req.FromSnapshot)
	if err != nil {
		return err
	}
	if source.Size > sizeOf(req) {
		return fmt.Errorf("%w: %d bytes cannot hold the source of %d", backend.ErrInvalid, req.MinSize, source.Size*gib)
	}
	if p["autoTopology"] == "true" && len(req.Zones) > 0 && parent.Zone != "" && !slices.Contains(req.Zones, parent.Zone) {
		return fmt.Errorf("%w: a share is made from a snapshot where that is, in zone %s, and wanted in %s", backend.ErrExhausted, parent.Zone, strings.Join(req.Zones, " or "))
	}
	if p["protocol"] != "" && !strings.EqualFold(p["protocol"], parent.Protocol) {
		return fmt.Errorf("%w: parameter \"protocol\" is %q, but a share that is made from a snapshot speaks as its source, %s", backend.ErrInvalid, p["protocol"], parent.Protocol)
	}
	if p["type"] != "" {
		t, err := b.shareType(ctx, p["type"])
		if err != nil {
			return err
		}
		if t.Name != parent.TypeName { // which Manila refuses too
			return fmt.Errorf("%w: parameter \"type\" is %q, but a share that is made from a snapshot has the type of its source, %q", backend.ErrInvalid, p["type"], parent.TypeName)
		}
	}
	// A clone that is asked for larger than its snapshot comes out with the
	// snapshot's quota: it is extended afterwards (seen on CephFS, 2025.1).
	ask["size"], ask["snapshot_id"], ask["share_proto"], ask["share_type"] = source.Size, source.ID, parent.Protocol, parent.TypeName
	for _, name := range []string{"access", "exportNetworks", "snapshotDirectory", "cephfs-mounter"} {
		if _, ok := keep[name]; !ok && parent.class(name) != "" {
			keep[name] = parent.class(name)
		}
	}
	return nil
}

// sizeFor is the least size that a request and the type allow, in GiB. The type's limits are
// those of provision_filter_on_size (manila/share/share_types.py); everybody sees them.
func (t *shareType) sizeFor(req backend.CreateShareRequest) (int64, error) {
	limit := func(spec string) int64 {
		text, _ := t.Specs["provisioning:"+spec].(string)
		n, _ := strconv.ParseInt(text, 10, 64)
		return n
	}
	size, least, most := sizeOf(req), limit("min_share_size"), limit("max_share_size")
	switch {
	case least > size && req.MaxSize > 0 && least*gib > req.MaxSize:
		return 0, fmt.Errorf("%w: shares of the type %q have at least %d GiB, and at most %d bytes are wanted", backend.ErrInvalid, t.Name, least, req.MaxSize)
	case most > 0 && size > most:
		return 0, fmt.Errorf("%w: shares of the type %q have at most %d GiB, and %d are wanted", backend.ErrInvalid, t.Name, most, size)
	}
	return max(size, least), nil
}

// shareType finds a type by name or id; empty is the cloud's default.
func (b *Backend) shareType(ctx context.Context, name string) (*shareType, error) {
	matches := func(t shareType) bool {
		return name == "" && t.Default || name != "" && (t.Name == name || t.ID == name)
	}
	for age := typesAge; ; age = 0 { // it may have been made a moment ago
		types, err := b.shareTypes(ctx, age)
		if err != nil {
			return nil, err
		}
		if i := slices.IndexFunc(types, matches); i >= 0 {
			return &types[i], nil
		}
		if age > 0 {
			continue
		}
		var names []string
		for _, t := range types {
			names = append(names, t.Name)
		}
		if name == "" {
			return nil, fmt.Errorf("%w: the cloud has no default share type: name one with the parameter \"type\" (%s)", backend.ErrInvalid, strings.Join(names, ", "))
		}
		return nil, fmt.Errorf("%w: there is no share type %q (there are %s)", backend.ErrInvalid, name, strings.Join(names, ", "))
	}
}

// finish brings the share that counts, the first that was seen, to its end. Kind is
// that of the work, if this call has just begun it.
func (b *Backend) finish(ctx context.Context, req backend.CreateShareRequest, seen sight[*share], kind string) (s *share, err error) {
	s = seen.found[0]
	if err := b.fits(s, req); err != nil {
		return nil, err
	}
	if s.ready() {
		_, err := dropTwins(ctx, b, b.shareCalls(), seen.found, twinAge)
		return s, err
	}
	if stateOf(s.Status) == passing {
		if s, seen, err = b.awaitShare(ctx, s, kind); err != nil {
			return nil, err
		}
	}
	if stateOf(s.Status) == failed {
		reason := why("Manila could not make the share", b.complaint(ctx, s.ID, time.Time{}, creating...))
		return nil, undone(reason, b.removeShare(ctx, s))
	}
	if s.Size < s.about().size {
		clone := s
		s, err = b.extend(ctx, s, s.about().size)
		for _, final := range []error{backend.ErrExhausted, backend.ErrUnsupported, backend.ErrInvalid} {
			if errors.Is(err, final) { // it will not have the size, so it goes
				now, gerr := b.getShare(ctx, clone.ID)
				if gerr == nil && (now.ready() || now.Size >= clone.about().size) { // by another call it has
					return nil, errAgain
				}
				return nil, undone(err, b.removeShare(ctx, clone))
			}
		}
		if err != nil {
			return nil, pendingOr(err)
		}
		seen = sight[*share]{}
	}
	return s, settleTwins(ctx, b, b.shareCalls(), s, kind != "", seen)
}

// awaitShare is awaitMade for a share.
func (b *Backend) awaitShare(ctx context.Context, s *share, kind string) (*share, sight[*share], error) {
	b.polls.waiting.Add(1)
	defer b.polls.waiting.Add(-1)
	return awaitMade(ctx, b, b.shareCalls(), s, kind)
}

// pendingOr makes the error of a step that will be repeated one that says so: a
// final answer would let an orchestrator forget the share.
func pendingOr(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, backend.ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %s", backend.ErrPending, err)
}

// fits compares a share with a request for one of its name.
func (b *Backend) fits(s *share, req backend.CreateShareRequest) error {
	is := s.about()
	if is.source != req.FromSnapshot || is.role != string(req.Role) || !maps.Equal(is.description, req.Description) {
		return fmt.Errorf("%w: share %s was made for another purpose", backend.ErrConflict, s.ID)
	}
	size := is.size // a clone may not have it yet
	if s.ready() {
		size = s.Size
	}
	if size*gib < req.MinSize || req.MaxSize > 0 && size*gib > req.MaxSize {
		return fmt.Errorf("%w: share %s has %d bytes", backend.ErrConflict, s.ID, size*gib)
	}
	return nil
}

// undone is the error of what has failed, if left is why the rest of it may still be
// there: it is final only when nothing is.
func undone(err, left error) error {
	if left == nil {
		return err
	}
	return fmt.Errorf("%w: %s; and removing it: %s", backend.ErrPending, err, left)
}

// Share implements backend.Backend.
func (b *Backend) Share(ctx context.Context, id string) (_ *backend.Share, err error) {
	defer wrap(&err, "share %q", id)
	s, err := b.findShare(ctx, id)
	if err != nil {
		return nil, err
	}
	return b.public(s), nil
}

// findShare returns a share that is ready and was not deleted.
func (b *Backend) findShare(ctx context.Context, id string) (*share, error) {
	if !validID(id) {
		return nil, backend.ErrNotFound
	}
	return b.usable(b.getShare(ctx, id))
}

// usable is a share if it can be used, else ErrNotFound.
func (b *Backend) usable(s *share, err error) (*share, error) {
	if err == nil && (!b.mine(s) || !s.ready() || s.deferred() || s.Status == "deleting") {
		return nil, backend.ErrNotFound
	}
	return s, err
}

// validID keeps what could not be an id out of a URL.
func validID(id string) bool {
	return len(id) > 0 && len(id) <= 48 && !strings.ContainsFunc(id, func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '-' || r == '_')
	})
}

// ShareNamed implements backend.Backend.
func (b *Backend) ShareNamed(ctx context.Context, name string) (_ *backend.Share, err error) {
	defer wrap(&err, "share named %q", name)
	found, err := b.named(ctx, name)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, backend.ErrNotFound
	}
	share := b.public(found[0])
	if !found[0].ready() {
		share.Size = found[0].about().size * gib
		err = fmt.Errorf("%w: it was begun, and is not finished", backend.ErrPending)
	}
	return share, err
}

// CommitShare implements backend.Backend.
func (b *Backend) CommitShare(ctx context.Context, id string) (err error) {
	defer wrap(&err, "commit share %q", id)
	s, err := b.findShare(ctx, id)
	if err != nil || !s.draft() {
		return err
	}
	return b.setMetadata(ctx, "shares/"+id, map[string]string{keyFilled: "true"})
}

// ExpandShare implements backend.Backend.
func (b *Backend) ExpandShare(ctx context.Context, id string, size int64) (_ *backend.Share, err error) {
	defer wrap(&err, "expand share %q to %d bytes", id, size)
	s, err := b.findShare(ctx, id)
	if err != nil {
		return nil, err
	}
	if want := (size + gib - 1) / gib; s.Size < want {
		if s, err = b.extend(ctx, s, want); err != nil {
			return nil, err
		}
	}
	return b.public(s), nil
}

// extend raises the size of a share, in GiB.
func (b *Backend) extend(ctx context.Context, s *share, size int64) (*share, error) {
	id := s.ID
	for s.Size < size {
		settled, err := b.await(ctx, id, "", func(s *share) bool { return stateOf(s.Status) != passing })
		switch {
		case err != nil:
			return nil, err
		case settled == nil:
			return nil, backend.ErrNotFound
		case stateOf(settled.Status) == failed:
			return nil, why("the share is in the state "+settled.Status, b.complaint(ctx, id, time.Time{}, extending...))
		case settled.Size >= size:
			return settled, nil
		}
		begun := b.o.Now()
		err = b.post(ctx, "shares/"+id+"/action", map[string]any{"extend": map[string]any{"new_size": size}}, nil)
		switch refused := refusal(err); {
		case refused.denied():
			return nil, err
		case refused.says(http.StatusForbidden, ""), refused.says(http.StatusRequestEntityTooLarge, ""):
			return nil, fmt.Errorf("%w: %s", backend.ErrExhausted, refused) // over quota (seen as 403)
		case refused.says(http.StatusBadRequest, "status"): // another process was faster
		case err != nil:
			return nil, err
		}
		if s, err = b.await(ctx, id, "extend", func(s *share) bool { return stateOf(s.Status) != passing }); err != nil {
			return nil, err
		}
		if s == nil {
			return nil, backend.ErrNotFound
		}
		if s.Size < size && stateOf(s.Status) == usable {
			return nil, why("Manila did not extend the share", b.complaint(ctx, id, begun, extending...))
		}
	}
	return s, nil
}

// ListShares implements backend.Backend.
func (b *Backend) ListShares(ctx context.Context, after string, limit int) (_ []*backend.Share, more bool, err error) {
	defer wrap(&err, "list shares")
	all, err := b.ours(ctx)
	if err != nil {
		return nil, false, err
	}
	all = slices.DeleteFunc(all, func(s *share) bool { return !s.ready() || s.deferred() || s.Status == "deleting" })
	page, more := pageOf(all, func(s *share) string { return s.ID }, after, limit)
	out := make([]*backend.Share, len(page))
	for i, s := range page {
		out[i] = b.public(s)
	}
	return out, more, nil
}
