package schedule

import (
	"context"
	"errors"
	"time"
)

// Errors of a Cluster. Every other error is taken for one that trying again
// does not mend.
var (
	// ErrNotFound is an object that is not there.
	ErrNotFound = errors.New("not found")
	// ErrExists is an object of that name that is there already.
	ErrExists = errors.New("exists already")
	// ErrUnavailable is an API that did not answer, or not now. What was asked
	// for may have been done.
	ErrUnavailable = errors.New("unavailable")
)

// Cluster is one namespace of Kubernetes as a run sees it. Its methods make one
// attempt each and may be called from any goroutine. Their answers are those of
// the API, not of a cache.
type Cluster interface {
	// Claims returns the claims that the selection means. Names that are not
	// there are left out.
	Claims(ctx context.Context, which Selection) ([]Claim, error)

	// Create makes a snapshot with the name, series and scheduled time of want:
	// of the claim want.Claim and the class want.Tier, with the labels and
	// annotations of the series. ErrExists if there is one of that name, whoever
	// made it.
	Create(ctx context.Context, want Snapshot) (Snapshot, error)

	// Get returns the snapshot of that name, whoever made it, or ErrNotFound.
	Get(ctx context.Context, name string) (Snapshot, error)

	// List returns the snapshots with the labels of the series. It is whole, or
	// an error.
	List(ctx context.Context, series Series) ([]Snapshot, error)

	// Delete begins to delete the snapshot with the UID of s, and never another
	// one of its name. ErrNotFound if it is gone.
	Delete(ctx context.Context, s Snapshot) error
}

// Selection says which claims: those with a label selector, or those with names.
type Selection struct {
	Selector string
	Names    []string
}

// Claim is a claim of a selection.
type Claim struct {
	Name string
	// Problem says why no snapshot can be made of it, such as that it is not
	// bound; empty if one can.
	Problem string
}

// Snapshot is a VolumeSnapshot.
type Snapshot struct {
	Name, UID string
	// Series and Scheduled are as ReadSeries has them, but that Claim is the
	// claim that it really is of, and Tier its real class. They are zero for
	// what no schedule has made.
	Series
	Scheduled time.Time
	State     State
	// Retried is set if the cluster goes on with a failed snapshot by itself, as
	// the external-snapshotter does, so that it may yet be ready.
	Retried bool
	// Message says why it failed, or what it waits for.
	Message string
	// Deleting is set once somebody has asked for it to be deleted.
	Deleting bool
}
