// Package backend is the contract between Abaca and a storage system that
// serves shares: mountable file trees, their snapshots, and the references
// that hold a snapshot while somebody reads it.
//
// The rules below hold for every method of every implementation.
// Package backendtest checks them.
//
//   - Idempotent. Creating twice with one name and compatible arguments returns
//     the same object. Deleting what is gone returns nil.
//   - Durable. When a method returns nil, its effect survives kill -9 of this
//     process. What the next call needs is never only in memory.
//   - Waiting. Work that the storage system finishes later is awaited until ctx
//     ends; then the method returns [ErrPending] and calling it again resumes.
//   - Errors wrap exactly one of the sentinels in errors.go, or the context's
//     error. They are written for people, say what was being done, and never
//     hold a secret.
//   - Concurrency. Every method may be called from any goroutine, and from
//     several processes over one storage system at once.
package backend

import (
	"context"
	"net/netip"
	"time"
)

// Backend is a storage system that serves shares.
type Backend interface {
	// CreateShare makes a share, empty or with the contents of a snapshot.
	// The name is the identity: a second call with the same name returns the
	// first share if its size lies within the requested range and source and
	// role are the same, else ErrConflict. ErrExhausted when the storage system
	// has no room, ErrNotFound when the source snapshot does not exist,
	// ErrInvalid when MinSize cannot hold the source or is out of range. A clone
	// does not hold its source: the snapshot may go, and the repeated call still
	// returns the share. After ErrPending, ErrUnavailable, ErrAuth or the context's
	// error there may be a share that only the repeated call finishes; any other
	// error leaves none behind.
	CreateShare(ctx context.Context, req CreateShareRequest) (*Share, error)

	// Share returns one share. ErrNotFound when there is none.
	Share(ctx context.Context, id string) (*Share, error)

	// ShareNamed returns the share that CreateShare made under a name. ErrNotFound
	// when there is none. ErrPending when one was begun that only the repeated call
	// finishes; then it returns that share too, as it is to be.
	ShareNamed(ctx context.Context, name string) (*Share, error)

	// CommitShare makes a draft an ordinary share: it sets Draft to false.
	// Committing what is committed is nil. ErrNotFound when there is none.
	CommitShare(ctx context.Context, id string) error

	// ExpandShare raises the size of a share to at least size bytes, while it
	// is in use. A size at or below the present one changes nothing.
	ExpandShare(ctx context.Context, id string, size int64) (*Share, error)

	// DeleteShare removes a share, its contents and its exports. Its snapshots
	// live on. ErrInUse where the backend can tell that the share is mounted.
	DeleteShare(ctx context.Context, id string) error

	// CreateSnapshot cuts a read-only point-in-time image of a share. The name
	// is the identity: a second call with the same name, share and role returns
	// the first snapshot, else it is ErrConflict. A repeated call
	// succeeds even when the share has been deleted in between.
	CreateSnapshot(ctx context.Context, req CreateSnapshotRequest) (*Snapshot, error)

	// Snapshot returns one snapshot. ErrNotFound when there is none.
	Snapshot(ctx context.Context, id string) (*Snapshot, error)

	// DeleteSnapshot removes a snapshot. ErrInUse while a consumer holds an
	// export of it.
	DeleteSnapshot(ctx context.Context, id string) error

	// Export gives consumer what a node needs to mount the target. The export
	// of a snapshot is read-only and is a durable reference: the snapshot
	// cannot be deleted until the consumer has called Unexport. Consumer is the
	// caller's name for one use, at most 64 bytes of [a-z0-9-]; it holds one
	// target: ErrConflict when it holds another one already. Exporting again
	// what the consumer holds returns the same. ErrNotFound when the target
	// does not exist. Drafts are exported too: something has to fill them.
	// After an error other than ErrPending and ErrUnavailable it holds nothing
	// that it did not hold before.
	Export(ctx context.Context, target Target, consumer string) (*Export, error)

	// Unexport ends what Export began. A consumer that does not hold the target
	// is nil, also when the target is gone.
	Unexport(ctx context.Context, target Target, consumer string) error

	// ExportOf returns what a consumer holds. ErrNotFound when it holds nothing.
	ExportOf(ctx context.Context, consumer string) (*Export, error)

	// The listings return objects in a stable order that depends on nothing but
	// the objects' ids, at most limit of them (0: no limit), and start behind
	// the id after (empty: at the beginning). Objects that come or go between
	// two calls neither repeat nor hide others. more says that the next page
	// is not empty.
	ListShares(ctx context.Context, after string, limit int) (shares []*Share, more bool, err error)
	ListSnapshots(ctx context.Context, after string, limit int) (snapshots []*Snapshot, more bool, err error)
	// ListExports is ordered by consumer, and after is a consumer. It says who
	// holds what, Consumer and Target; all else may be missing.
	ListExports(ctx context.Context, after string, limit int) (exports []*Export, more bool, err error)
}

// CapacityReporter is a backend that knows how much room it has.
type CapacityReporter interface {
	// Capacity returns the bytes that shares can still be given, and the
	// largest size that one share can have.
	Capacity(ctx context.Context) (Capacity, error)
}

// Bound is a backend that may serve one node alone.
type Bound interface {
	// OnlyNode returns the only node that the backend serves, Capacity.Node, without
	// asking anybody; empty for any node.
	OnlyNode() string
}

// Usage is what is stored in a share or snapshot, in bytes and inodes, as the
// storage system accounts for it. A negative number is unknown.
type Usage struct {
	UsedBytes, UsedInodes int64
}

// UsageReporter is a backend whose shares have a usage that statfs(2) on a
// mounted share would not tell.
type UsageReporter interface {
	// Usage returns ErrNotFound when the target does not exist.
	Usage(ctx context.Context, target Target) (Usage, error)
}

// Parameterized is a backend whose shares differ in more than their size.
type Parameterized interface {
	// Parameters returns the names that CreateShareRequest.Parameters may hold.
	// ErrInvalid from CreateShare says which value is wrong.
	Parameters() []string
	// CheckReference checks the parameters with which something is to refer to a
	// snapshot of a share: it is mounted as the share's own say. ErrInvalid says
	// which value is wrong, or says otherwise.
	CheckReference(ctx context.Context, shareID string, parameters map[string]string) error
}

// Node is a machine that mounts exports, as the storage system sees it.
type Node struct {
	Name      string
	Addresses []netip.Addr
}

// Granter is a backend that has to be told of each node that mounts an export
// before it lets the node in.
type Granter interface {
	// Grant lets a node mount what the consumer holds, and returns the export, as
	// this node is to mount it, when it can. The grant lasts until Revoke, Unexport
	// or DeleteShare, none of which it holds up: it is no mount. Granting again is
	// nil; a writer's grant after a reader's raises the level. Where a storage
	// system knows one level for a node and a share, the highest one that any
	// consumer's grant needs is in effect, or a higher one that was needed before;
	// a level that cannot be had takes nothing from whoever needs less. ErrNotFound
	// when the consumer holds nothing; ErrInvalid when the node has no address that
	// the storage system could know it by.
	Grant(ctx context.Context, consumer string, node Node, readOnly bool) (*Export, error)
	// Revoke ends the grant of one node, or of all if the name is empty. What is
	// not granted, or held, is nil.
	Revoke(ctx context.Context, consumer, node string) error
}

// Role says why an object exists, and with it who may see and remove it.
type Role string

const (
	// RoleUser is an object that a user asked for: a volume or a snapshot.
	RoleUser Role = "user"
	// RoleTemporary is an object that Abaca made for its own use, as the
	// snapshot below a running backup. It is not listed to users, and goes when
	// the use ends.
	RoleTemporary Role = "temporary"
)

// Sweeper is a backend that puts off what cannot be done yet.
type Sweeper interface {
	// Sweep does what was put off and can be done by now. It is called now and
	// then, by several processes too. waiting is what cannot be done yet, and why,
	// a sentence each, which stays as it is while nothing changes.
	Sweep(ctx context.Context) (waiting []string, err error)
}

// CreateShareRequest asks for a share.
type CreateShareRequest struct {
	// Name is arbitrary text of at least one byte.
	Name string
	// MinSize and MaxSize bound the size in bytes. MaxSize 0 is no bound. The
	// backend may round MinSize up to what it can serve, within the bounds;
	// 0 is the least that it serves.
	MinSize, MaxSize int64
	// FromSnapshot is the id of the snapshot whose contents the share gets, or
	// empty.
	FromSnapshot string
	// Draft makes a share that is not to be used until CommitShare: it is
	// being filled. Two requests may differ in it and mean the same share.
	Draft bool
	Role  Role
	// Parameters choose among what the storage system offers; see Parameterized.
	// They count when the share is made and are not part of its identity.
	Parameters map[string]string
	// Zones are where the share is wanted, the preferred first; empty for
	// anywhere. A backend without zones ignores them.
	Zones []string
	// Description is kept with the share and returned in Share. Two requests
	// that differ in it are in conflict.
	Description map[string]string
	// Note is a line for people who look at the storage system itself. A backend may
	// shorten it, or have no place for it; it is no part of the share's identity.
	Note string
}

// CreateSnapshotRequest asks for a snapshot.
type CreateSnapshotRequest struct {
	Name    string
	ShareID string
	Role    Role
}

// Share is a mountable file tree.
type Share struct {
	// ID is unique within the backend: 1 to 48 bytes of [a-zA-Z0-9_-].
	ID   string
	Name string
	// Size is the most that can be written into the share, in bytes.
	Size int64
	// Node and Zone are the only ones on which the share can be used; empty for any.
	Node, Zone string
	// CreatedAt is the storage system's time, and never changes.
	CreatedAt    time.Time
	FromSnapshot string
	Draft        bool
	Role         Role
	Description  map[string]string
	Can          Abilities
	// Problem is empty for a healthy share, else a sentence for a person.
	Problem string
}

// Abilities says what can be done with one share. It is data on the share,
// not of the backend: on OpenStack Manila it depends on the share type.
type Abilities struct {
	Snapshot      bool // snapshots can be cut
	Clone         bool // a share can be made from its snapshots
	MountSnapshot bool // its snapshots can be exported in place, without a copy
}

// Snapshot is a read-only point-in-time image of a share.
type Snapshot struct {
	ID      string // as Share.ID
	Name    string
	ShareID string
	// Size is the size of the share when the snapshot was cut, in bytes.
	Size      int64
	Zone      string // as Share.Zone
	CreatedAt time.Time
	Role      Role
}

// Target names what is exported: exactly one of the fields is set.
type Target struct {
	ShareID    string
	SnapshotID string
}

// Export is what a node needs to mount a share or a snapshot. It carries no
// secret and is at most 4 KiB as JSON (CSI spec 1.13, "Size Limits").
type Export struct {
	Target   Target `json:"target"`
	Consumer string `json:"consumer"`
	ReadOnly bool   `json:"readOnly"`
	// Protocol is how a node mounts it: "bind", later "nfs", "cephfs", "cifs".
	Protocol string `json:"protocol"`
	// Locations are the places at which the one tree is served, the preferred
	// first; a node mounts one that it can reach. For "bind" it is an absolute
	// path on the node that holds the storage.
	Locations []string `json:"locations"`
	// Path is the directory below the location that the export is; a node shows
	// nothing above it. Empty for all of it. Its elements are patterns of
	// path.Match, and exactly one directory matches.
	Path string `json:"path,omitempty"`
	// Options are mount options that the backend demands.
	Options []string `json:"options,omitempty"`
	// User is the name under which the storage system knows whoever mounts the
	// export, empty where there is none. The key that goes with it is kept where
	// nodes find it by this name, and nowhere else.
	User string `json:"user,omitempty"`
	// Node is the only node that can mount the export; empty for any node.
	Node string `json:"node,omitempty"`
	// Renumbered says that files which have not changed may have other inode
	// numbers and change times here than in the snapshot before.
	Renumbered bool `json:"renumbered,omitempty"`
	// Way says how the storage system shows a snapshot, for people; empty where
	// there is one way.
	Way string `json:"way,omitempty"`
}

// Capacity is what a backend has left, in bytes.
type Capacity struct {
	Available, MaxShareSize, MinShareSize int64
	// Node is the only node that the backend serves; empty for any node.
	Node string
}
