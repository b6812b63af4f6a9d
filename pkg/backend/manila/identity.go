package manila

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// The metadata by which Abaca knows what is its own. A key has at most 255
// characters and a value 1023 (Manila's API); longer values are cut into
// numbered ones, and all are percent-encoded, as databases differ in what they
// can hold.
const (
	keyInstance = "abaca.instance" // Options.Instance
	keyID       = "abaca.id"       // digest of instance and name: what filters ask for
	keyRole     = "abaca.role"     // of a snapshot
	keyFilled   = "abaca.filled"   // it is no draft any more
	keyReady    = "abaca.ready"    // its creation has finished; its value is "true"
	keyDeleted  = "abaca.deleted"  // DeleteShare was called, and snapshots are left; its value is "true"
	keyLeft     = "abaca.left"     // since when

	prefixAbout    = "abaca.about."    // of a share, and a number: what never changes; see about
	prefixName     = "abaca.name."     // of a snapshot, and a number
	prefixConsumer = "abaca.consumer." // and a consumer: its value is the instance
	prefixHold     = "abaca.hold."     // and a consumer, a dot, what it holds, a dot, and a name: since when
	prefixEnd      = "abaca.end."      // and the name of what has one, a dot, and since when it is ended
	prefixGrant    = "abaca.grant."    // and a consumer, a dot, a digest of a node, a dot, and a name: since when, and what lets it in
	prefixLeaving  = "abaca.leaving."  // and the name of a grant, a dot, and a name: a call of Revoke, since when, and what it takes away
	prefixDeleting = "abaca.deleting." // and a snapshot, a dot, and a name: a call of DeleteSnapshot, and since when
)

// digest is 26 characters that stand for a text.
func digest(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:26]
}

func (b *Backend) id(name string) string { return digest(b.o.Instance, name) }

const (
	maxValue = 1000
	// blank stands for the empty text, as Manila refuses blank values. It is no
	// percent-encoding of anything.
	blank = "%"
)

// put writes a text under prefix+"0", prefix+"1" and so on.
func put(metadata map[string]string, prefix, text string) {
	if text = url.QueryEscape(text); text == "" {
		text = blank
	}
	cut(metadata, prefix, text)
}

// take reads what put has written.
func take(metadata map[string]string, prefix string) string {
	text, _ := url.QueryUnescape(joined(metadata, prefix)) // empty for blank
	return text
}

// cut writes a text that needs no encoding, and is not empty.
func cut(metadata map[string]string, prefix, text string) {
	for i := 0; len(text) > 0; i++ {
		n := min(len(text), maxValue)
		metadata[prefix+strconv.Itoa(i)], text = text[:n], text[n:]
	}
}

// joined reads what cut has written.
func joined(metadata map[string]string, prefix string) string {
	var all strings.Builder
	for i := 0; ; i++ {
		part, ok := metadata[prefix+strconv.Itoa(i)]
		if !ok {
			return all.String()
		}
		all.WriteString(part)
	}
}

// label is what an operator sees as the name: at most 255 characters.
func label(name string) string {
	if len(name) <= maxLabel && printable(name) == name {
		return name
	}
	return "abaca-" + digest(name)
}

const maxLabel = 255

// printable is what every database can hold of a line, as far as a description may be long.
func printable(line string) string {
	line = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, line)
	return line[:min(len(line), maxLabel)]
}

// about is what a share was made for. It is one text of metadata, as Manila writes all
// entries of a share, one after the other, whenever one is added.
type about struct {
	name, role, source string            // source is the snapshot that it was made from
	draft              bool              // at first
	size               int64             // that was asked for, in GiB
	description, class map[string]string // class has the parameters that count later
}

const (
	aboutDescription = "description."
	aboutClass       = "class."
)

func (a about) write(metadata map[string]string) {
	q := url.Values{"name": {a.name}, "role": {a.role}, "size": {strconv.FormatInt(a.size, 10)}, "draft": {strconv.FormatBool(a.draft)}}
	if a.source != "" {
		q.Set("source", a.source)
	}
	for k, v := range a.description {
		q.Set(aboutDescription+k, v)
	}
	for k, v := range a.class {
		q.Set(aboutClass+k, v)
	}
	cut(metadata, prefixAbout, q.Encode())
}

func (s *share) about() about {
	q, _ := url.ParseQuery(joined(s.Metadata, prefixAbout))
	a := about{name: q.Get("name"), role: q.Get("role"), source: q.Get("source"), draft: q.Get("draft") == "true",
		description: map[string]string{}, class: map[string]string{}}
	a.size, _ = strconv.ParseInt(q.Get("size"), 10, 64)
	for k := range q {
		if name, ok := strings.CutPrefix(k, aboutDescription); ok {
			a.description[name] = q.Get(k)
		} else if name, ok := strings.CutPrefix(k, aboutClass); ok {
			a.class[name] = q.Get(k)
		}
	}
	return a
}

// describe is the metadata of a new share.
func (b *Backend) describe(req backend.CreateShareRequest, size int64, class map[string]string) map[string]string {
	m := map[string]string{keyInstance: b.o.Instance, keyID: b.id(req.Name)}
	about{name: req.Name, role: string(req.Role), source: req.FromSnapshot, draft: req.Draft, size: size, description: req.Description, class: class}.write(m)
	return m
}

func (s *share) class(parameter string) string { return s.about().class[parameter] }

func (s *share) draft() bool { return s.about().draft && s.Metadata[keyFilled] == "" }

func (s *share) deferred() bool { return s.Metadata[keyDeleted] != "" }

// mine says whether the share was made by this driver and has not gone softly.
func (b *Backend) mine(s *share) bool {
	return s.Metadata[keyInstance] == b.o.Instance && !s.SoftDeleted
}

// ours returns the shares of this driver, deferred ones too.
func (b *Backend) ours(ctx context.Context) ([]*share, error) {
	all, err := b.listShares(ctx, map[string]string{keyInstance: b.o.Instance})
	return slices.DeleteFunc(all, func(s *share) bool { return !b.mine(s) }), err
}

// named returns the shares that were made for a name, the one that counts first;
// see sortTwins.
func (b *Backend) named(ctx context.Context, name string) ([]*share, error) {
	return b.sharesOf(ctx, b.id(name))
}

// sharesOf is named for the id of a name.
func (b *Backend) sharesOf(ctx context.Context, id string) ([]*share, error) {
	found, err := b.listShares(ctx, map[string]string{keyID: id})
	return b.counting(found, id), err
}

// counting are those of some shares that were made for the name with an id.
func (b *Backend) counting(all []*share, id string) (found []*share) {
	for _, s := range all {
		if s.Metadata[keyID] == id && b.mine(s) && !s.deferred() && s.Status != "deleting" {
			found = append(found, s.clone())
		}
	}
	sortTwins(found)
	return found
}

// sharesSeen is sharesOf, as they were at most so long ago. While several shares are
// waited for, one listing answers for all.
func (b *Backend) sharesSeen(ctx context.Context, id string, age time.Duration) (sight[*share], error) {
	if age > 0 && b.polls.many() {
		at, all, err := b.listed(ctx, age)
		return sight[*share]{at, b.counting(all, id)}, err
	}
	at := b.o.Now()
	found, err := b.sharesOf(ctx, id)
	return sight[*share]{at, found}, err
}

func (b *Backend) shareCalls() calls[*share] {
	return calls[*share]{b.sharesOf, b.sharesSeen, b.getShare, b.removeShare, func(ctx context.Context, s *share) error {
		return b.setMetadata(ctx, "shares/"+s.ID, map[string]string{keyReady: "true"})
	}}
}

// public is a share in the terms of the contract.
func (b *Backend) public(s *share) *backend.Share {
	is := s.about()
	out := &backend.Share{
		ID: s.ID, Name: is.name, Size: s.Size * gib, CreatedAt: s.Created.Time, FromSnapshot: is.source,
		Draft: s.draft(), Role: backend.Role(is.role), Description: is.description,
		Can: backend.Abilities{Snapshot: s.Snapshots, Clone: s.Snapshots && s.Clones, MountSnapshot: s.wayOf() != ""},
	}
	if is.class["autoTopology"] == "true" {
		out.Zone = s.Zone
	}
	if stateOf(s.Status) == failed {
		out.Problem = fmt.Sprintf("Manila has put the share into the state %s; see `openstack share message list`.", s.Status)
	}
	return out
}

// The identity of a snapshot is in its metadata too, or, before microversion 2.73,
// in its name and description.

func (b *Backend) describeSnapshot(req backend.CreateSnapshotRequest) map[string]string {
	m := map[string]string{keyInstance: b.o.Instance, keyID: b.id(req.Name), keyRole: string(req.Role)}
	put(m, prefixName, req.Name)
	return m
}

func oldSnapshotName(id string) string { return "abaca-" + id }

// identify gives a snapshot of an old cloud the metadata that it should have.
func (b *Backend) identify(s *snapshot) {
	if b.minor < sinceSnapMetadata {
		s.Metadata = map[string]string{}
		q, _ := url.ParseQuery(s.Description)
		for k := range q {
			s.Metadata[k] = q.Get(k)
		}
	}
}

// oldDescription is the metadata as a description.
func oldDescription(m map[string]string) string {
	q := url.Values{}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		q.Set(k, m[k])
	}
	return q.Encode()
}

// snapshotsWith returns the snapshots that were cut for the name with an id, as
// sharesOf does.
func (b *Backend) snapshotsWith(ctx context.Context, id string) ([]*snapshot, error) {
	q := url.Values{"metadata": {filter(map[string]string{keyID: id})}}
	if b.minor < sinceSnapMetadata {
		q = url.Values{"name": {oldSnapshotName(id)}}
	}
	found, err := b.listSnapshots(ctx, q)
	found = slices.DeleteFunc(found, func(s *snapshot) bool {
		return s.Metadata[keyID] != id || s.Metadata[keyInstance] != b.o.Instance || s.Status == "deleting"
	})
	sortTwins(found)
	return found, err
}

func (b *Backend) snapshotsSeen(ctx context.Context, id string, _ time.Duration) (sight[*snapshot], error) {
	at := b.o.Now()
	found, err := b.snapshotsWith(ctx, id)
	return sight[*snapshot]{at, found}, err
}

func (b *Backend) snapshotCalls() calls[*snapshot] {
	return calls[*snapshot]{b.snapshotsWith, b.snapshotsSeen, b.getSnapshot, b.removeSnapshot, func(ctx context.Context, s *snapshot) error {
		if b.minor >= sinceSnapMetadata {
			return b.setMetadata(ctx, "snapshots/"+s.ID, map[string]string{keyReady: "true"})
		}
		m := maps.Clone(s.Metadata)
		m[keyReady] = "true"
		return b.put(ctx, "snapshots/"+s.ID, map[string]any{"snapshot": map[string]any{"display_description": oldDescription(m)}})
	}}
}

func publicSnapshot(s *snapshot) *backend.Snapshot {
	return &backend.Snapshot{ID: s.ID, Name: take(s.Metadata, prefixName), ShareID: s.ShareID, Size: s.Size * gib,
		CreatedAt: s.Created.Time, Role: backend.Role(s.Metadata[keyRole])}
}
