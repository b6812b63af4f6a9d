package backendtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/memory"
)

// brokenEnv selects the mutant that a re-executed test binary runs the suite on.
const brokenEnv = "ABACA_BACKENDTEST_BROKEN"

// The mutants are the mistakes that a backend is likely to make. Each embeds a
// good one and breaks one promise.
var mutants = []struct {
	name   string
	broken func(store *memory.Store) (open func() backend.Backend)
	fails  []string // the subtests that are run, all of which must fail
}{
	{"forgets everything", func(store *memory.Store) func() backend.Backend {
		return func() backend.Backend { return memory.NewStore("").Open() }
	}, []string{"create", "reopen"}},

	{"forgets holds", func(store *memory.Store) func() backend.Backend {
		return func() backend.Backend {
			return &forgetsHolds{Backend: store.Open(), held: map[string]*backend.Export{}}
		}
	}, []string{"hold"}},

	{"creates twice", always(func(b backend.Backend) backend.Backend { return createsTwice{b} }),
		[]string{"create", "again", "concurrency/one_share"}},

	{"ignores descriptions", always(func(b backend.Backend) backend.Backend { return ignoresDescriptions{b} }),
		[]string{"conflict/description_changed", "conflict/no_description"}},

	{"ignores holds", always(func(b backend.Backend) backend.Backend { return ignoresHolds{b} }),
		[]string{"hold", "concurrency/export_or_delete"}},

	{"looks before it deletes", always(func(b backend.Backend) backend.Backend { return looksFirst{b} }),
		[]string{"concurrency/export_or_delete"}},

	{"pages by offset", always(func(b backend.Backend) backend.Backend { return pagesByOffset{b} }),
		[]string{"page/shares"}},

	{"says more too often", always(func(b backend.Backend) backend.Backend { return saysMore{b} }),
		[]string{"page/snapshots"}},

	{"ignores contexts", always(func(b backend.Backend) backend.Backend { return ignoresContexts{b} }),
		[]string{"cancel"}},

	{"fails on a broken-off call", always(func(b backend.Backend) backend.Backend { return breaksOff{b} }),
		[]string{"interrupt"}},

	{"hides what it has begun", always(func(b backend.Backend) backend.Backend { return hidesBegun{b} }),
		[]string{"begun"}},

	{"cuts names", always(func(b backend.Backend) backend.Backend { return cutsNames{b} }),
		[]string{"names"}},

	{"cleans ids", always(func(b backend.Backend) backend.Backend { return cleansIDs{b} }),
		[]string{"ids"}},

	{"sizes snapshots anew", always(func(b backend.Backend) backend.Backend { return sizesAnew{b} }),
		[]string{"snapshot"}},

	{"wants the share again", always(func(b backend.Backend) backend.Backend { return wantsShare{b} }),
		[]string{"snapshot"}},

	{"two sentinels", always(func(b backend.Backend) backend.Backend { return twoSentinels{b} }),
		[]string{"create", "delete"}},

	{"bare sentinel", always(func(b backend.Backend) backend.Backend { return bareSentinel{b} }),
		[]string{"create", "delete"}},

	{"commits drafts", always(func(b backend.Backend) backend.Backend { return commitsDrafts{b} }),
		[]string{"draft"}},

	{"moves holds", always(func(b backend.Backend) backend.Backend { return movesHolds{b} }),
		[]string{"export", "hold", "concurrency/one_consumer_of_two_shares"}},

	{"rounds down", always(func(b backend.Backend) backend.Backend { return roundsDown{b} }),
		[]string{"size/odd_floor"}},

	{"shrinks", always(func(b backend.Backend) backend.Backend { return shrinks{b} }),
		[]string{"expand"}},

	{"hands out its own", always(func(b backend.Backend) backend.Backend {
		return handsOut{b, map[string]*backend.Share{}}
	}), []string{"aliasing"}},

	{"promises too much", func(store *memory.Store) func() backend.Backend {
		store.Can = backend.Abilities{Snapshot: true}
		return func() backend.Backend { return promises{store.Open()} }
	}, []string{"abilities"}},

	{"deletes snapshots with the share", always(func(b backend.Backend) backend.Backend { return deletesAll{b} }),
		[]string{"independence", "snapshot", "contents"}},

	{"needs the source of a clone", always(func(b backend.Backend) backend.Backend { return needsSource{b} }),
		[]string{"clone"}},

	{"shows the share in a snapshot", always(func(b backend.Backend) backend.Backend { return showsShare{b} }),
		[]string{"contents"}},

	{"lets nodes in to what nobody holds", always(func(b backend.Backend) backend.Backend { return letsIn{b} }),
		[]string{"grant"}},

	{"reports nonsense", always(func(b backend.Backend) backend.Backend { return nonsense{b} }),
		[]string{"capacity", "usage"}},
}

// always is a mutant that keeps its mistake in every process.
func always(wrap func(backend.Backend) backend.Backend) func(*memory.Store) func() backend.Backend {
	return func(store *memory.Store) func() backend.Backend {
		return func() backend.Backend { return wrap(store.Open()) }
	}
}

// TestMutant is not a test of its own: TestBroken runs it in a process where
// it is to fail.
func TestMutant(t *testing.T) {
	name, ok := os.LookupEnv(brokenEnv)
	if !ok {
		return
	}
	for _, mutant := range mutants {
		if mutant.name == name {
			Run(t, Harness{
				ShareSize: 1 << 20,
				New: func(t *testing.T) func() backend.Backend {
					return mutant.broken(memory.NewStore(t.TempDir()))
				},
				Write: func(t *testing.T, e *backend.Export, file, content string) {
					if err := os.WriteFile(filepath.Join(e.Locations[0], file), []byte(content), 0o666); err != nil {
						t.Fatal(err)
					}
				},
				Read: func(t *testing.T, e *backend.Export, file string) string {
					content, _ := os.ReadFile(filepath.Join(e.Locations[0], file))
					return string(content)
				},
			})
		}
	}
}

// TestBroken: the suite can fail, and says where. A subtest cannot fail
// without its parent, hence the other process.
func TestBroken(t *testing.T) {
	for _, mutant := range mutants {
		t.Run(mutant.name, func(t *testing.T) {
			var topics []string
			for _, name := range mutant.fails {
				topic, _, _ := strings.Cut(name, "/")
				topics = append(topics, topic)
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.timeout=60s",
				"-test.run=^TestMutant$/^("+strings.Join(topics, "|")+")$")
			cmd.Env = append(os.Environ(), brokenEnv+"="+mutant.name)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Fatalf("the suite ended with %v, want exit code 1:\n%s", err, out)
			}
			for _, name := range mutant.fails {
				if !strings.Contains(string(out), "--- FAIL: TestMutant/"+name+" (") {
					t.Errorf("%s did not fail:\n%s", name, out)
				}
			}
		})
	}
}

// TestEveryTopicCanFail keeps a topic from being added without a mutant.
func TestEveryTopicCanFail(t *testing.T) {
	fails := map[string]bool{}
	for _, mutant := range mutants {
		for _, name := range mutant.fails {
			topic, _, _ := strings.Cut(name, "/")
			fails[topic] = true
		}
	}
	for _, test := range tests {
		if !fails[test.name] {
			t.Errorf("no mutant fails in %s", test.name)
		}
	}
}

type letsIn struct{ backend.Backend }

func (b letsIn) Grant(_ context.Context, consumer string, _ backend.Node, _ bool) (*backend.Export, error) {
	return &backend.Export{Consumer: consumer}, nil
}

func (b letsIn) Revoke(context.Context, string, string) error { return nil }

type createsTwice struct{ backend.Backend }

var serial struct {
	sync.Mutex
	n int
}

func (b createsTwice) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	serial.Lock()
	serial.n++
	n := serial.n
	serial.Unlock()
	if old, err := b.ShareNamed(ctx, req.Name); err == nil && n%2 == 0 {
		return old, nil
	}
	name := req.Name
	req.Name = fmt.Sprintf("%s %d", name, n)
	share, err := b.Backend.CreateShare(ctx, req)
	if err == nil {
		share.Name = name
	}
	return share, err
}

type ignoresDescriptions struct{ backend.Backend }

func (b ignoresDescriptions) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	if old, err := b.ShareNamed(ctx, req.Name); err == nil {
		req.Description = old.Description
	}
	return b.Backend.CreateShare(ctx, req)
}

type commitsDrafts struct{ backend.Backend }

func (b commitsDrafts) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	share, err := b.Backend.CreateShare(ctx, req)
	if err == nil && share.Draft && !req.Draft {
		err = b.CommitShare(ctx, share.ID)
		share.Draft = false
	}
	return share, err
}

type roundsDown struct{ backend.Backend }

func (b roundsDown) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	if req.MinSize > 0 && req.MaxSize == 0 {
		req.MinSize = req.MinSize >> 20 << 20
	}
	return b.Backend.CreateShare(ctx, req)
}

type cutsNames struct{ backend.Backend }

func (b cutsNames) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	req.Name = req.Name[:min(len(req.Name), 255)]
	return b.Backend.CreateShare(ctx, req)
}

type cleansIDs struct{ backend.Backend }

func (b cleansIDs) DeleteShare(ctx context.Context, id string) error {
	return b.Backend.DeleteShare(ctx, filepath.Base(id))
}

type ignoresHolds struct{ backend.Backend }

func (b ignoresHolds) DeleteSnapshot(ctx context.Context, id string) error {
	for {
		err := b.Backend.DeleteSnapshot(ctx, id)
		if !errors.Is(err, backend.ErrInUse) {
			return err
		}
		exports, _, err := b.ListExports(ctx, "", 0)
		if err != nil {
			return err
		}
		for _, e := range exports {
			if e.Target.SnapshotID == id {
				if err := b.Unexport(ctx, e.Target, e.Consumer); err != nil {
					return err
				}
			}
		}
	}
}

// looksFirst checks the holds, and deletes without the lock that would keep
// them from changing in between.
type looksFirst struct{ backend.Backend }

func (b looksFirst) DeleteSnapshot(ctx context.Context, id string) error {
	exports, _, err := b.ListExports(ctx, "", 0)
	if err != nil {
		return err
	}
	for _, e := range exports {
		if e.Target.SnapshotID == id {
			return b.Backend.DeleteSnapshot(ctx, id)
		}
	}
	time.Sleep(time.Millisecond)
	return ignoresHolds(b).DeleteSnapshot(ctx, id)
}

// forgetsHolds keeps them where the process can find them, and no other.
type forgetsHolds struct {
	backend.Backend
	mu   sync.Mutex
	held map[string]*backend.Export
}

func (b *forgetsHolds) Export(ctx context.Context, target backend.Target, consumer string) (*backend.Export, error) {
	e, err := b.Backend.Export(ctx, target, consumer)
	if err != nil || target.SnapshotID == "" {
		return e, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held[consumer] = e
	return e, b.Backend.Unexport(ctx, target, consumer)
}

func (b *forgetsHolds) DeleteSnapshot(ctx context.Context, id string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.held {
		if e.Target.SnapshotID == id {
			return fmt.Errorf("delete snapshot: %w", backend.ErrInUse)
		}
	}
	return b.Backend.DeleteSnapshot(ctx, id)
}

func (b *forgetsHolds) Unexport(ctx context.Context, target backend.Target, consumer string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.held[consumer]; e != nil && e.Target == target {
		delete(b.held, consumer)
	}
	return b.Backend.Unexport(ctx, target, consumer)
}

type movesHolds struct{ backend.Backend }

func (b movesHolds) Export(ctx context.Context, target backend.Target, consumer string) (*backend.Export, error) {
	for {
		e, err := b.Backend.Export(ctx, target, consumer)
		if !errors.Is(err, backend.ErrConflict) {
			return e, err
		}
		exports, _, err := b.ListExports(ctx, "", 0)
		if err != nil {
			return nil, err
		}
		for _, e := range exports {
			if e.Consumer == consumer {
				if err := b.Unexport(ctx, e.Target, consumer); err != nil {
					return nil, err
				}
			}
		}
	}
}

// pagesByOffset resumes at the place where the last page ended, not behind the
// object that it ended with.
type pagesByOffset struct{ backend.Backend }

func (b pagesByOffset) ListShares(ctx context.Context, after string, limit int) ([]*backend.Share, bool, error) {
	all, _, err := b.Backend.ListShares(ctx, "", 0)
	start := 1 + slices.IndexFunc(all, func(s *backend.Share) bool { return s.ID == after })
	all = all[start:]
	if limit > 0 && len(all) > limit {
		return all[:limit], true, err
	}
	return all, false, err
}

type saysMore struct{ backend.Backend }

func (b saysMore) ListSnapshots(ctx context.Context, after string, limit int) ([]*backend.Snapshot, bool, error) {
	list, _, err := b.Backend.ListSnapshots(ctx, after, limit)
	return list, limit > 0 && len(list) == limit, err
}

type ignoresContexts struct{ backend.Backend }

func (b ignoresContexts) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	return b.Backend.CreateShare(context.WithoutCancel(ctx), req)
}

// breaksOff leaves the name to half an object when its time is up.
type breaksOff struct{ backend.Backend }

func (b breaksOff) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	if _, err := b.ShareNamed(ctx, req.Name); errors.Is(err, backend.ErrNotFound) {
		half := req
		half.Role = "half"
		share, err := b.Backend.CreateShare(ctx, half)
		if err != nil {
			return nil, err
		}
		time.Sleep(time.Millisecond)
		if err := b.DeleteShare(ctx, share.ID); err != nil {
			return nil, err
		}
	}
	return b.Backend.CreateShare(ctx, req)
}

// hidesBegun needs time for a share, and says nothing of it meanwhile.
type hidesBegun struct{ backend.Backend }

func (b hidesBegun) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	if end, hasty := ctx.Deadline(); hasty && time.Until(end) < time.Millisecond {
		return nil, fmt.Errorf("create share: %w", backend.ErrPending)
	}
	return b.Backend.CreateShare(ctx, req)
}

func (b hidesBegun) ShareNamed(ctx context.Context, name string) (*backend.Share, error) {
	share, err := b.Backend.ShareNamed(ctx, name)
	if errors.Is(err, backend.ErrNotFound) {
		err = fmt.Errorf("share named %q: %w", name, backend.ErrPending)
	}
	return share, err
}

type sizesAnew struct{ backend.Backend }

func (b sizesAnew) CreateSnapshot(ctx context.Context, req backend.CreateSnapshotRequest) (*backend.Snapshot, error) {
	snapshot, err := b.Backend.CreateSnapshot(ctx, req)
	if share, err := b.Share(ctx, req.ShareID); err == nil && snapshot != nil {
		snapshot.Size = share.Size
	}
	return snapshot, err
}

type wantsShare struct{ backend.Backend }

func (b wantsShare) CreateSnapshot(ctx context.Context, req backend.CreateSnapshotRequest) (*backend.Snapshot, error) {
	if _, err := b.Share(ctx, req.ShareID); err != nil {
		return nil, err
	}
	return b.Backend.CreateSnapshot(ctx, req)
}

type twoSentinels struct{ backend.Backend }

func (b twoSentinels) ShareNamed(ctx context.Context, name string) (*backend.Share, error) {
	share, err := b.Backend.ShareNamed(ctx, name)
	if err != nil {
		err = fmt.Errorf("%w: %w", backend.ErrUnavailable, err)
	}
	return share, err
}

type bareSentinel struct{ backend.Backend }

func (b bareSentinel) ShareNamed(ctx context.Context, name string) (*backend.Share, error) {
	share, err := b.Backend.ShareNamed(ctx, name)
	if errors.Is(err, backend.ErrNotFound) {
		err = backend.ErrNotFound
	}
	return share, err
}

type shrinks struct{ backend.Backend }

func (b shrinks) ExpandShare(ctx context.Context, id string, size int64) (*backend.Share, error) {
	share, err := b.Backend.ExpandShare(ctx, id, size)
	if err == nil {
		share.Size = max(size, 1)
	}
	return share, err
}

type handsOut struct {
	backend.Backend
	own map[string]*backend.Share
}

func (b handsOut) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	share, err := b.Backend.CreateShare(ctx, req)
	if err == nil {
		b.own[share.ID] = share
	}
	return share, err
}

func (b handsOut) ListShares(ctx context.Context, after string, limit int) ([]*backend.Share, bool, error) {
	list, more, err := b.Backend.ListShares(ctx, after, limit)
	for i := range list {
		list[i] = b.own[list[i].ID]
	}
	return list, more, err
}

type promises struct{ backend.Backend }

func (b promises) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	share, err := b.Backend.CreateShare(ctx, req)
	if err == nil {
		share.Can.Clone = true
	}
	return share, err
}

type deletesAll struct{ backend.Backend }

func (b deletesAll) DeleteShare(ctx context.Context, id string) error {
	snapshots, _, err := b.ListSnapshots(ctx, "", 0)
	for _, snapshot := range snapshots {
		if snapshot.ShareID == id {
			err = errors.Join(err, ignoresHolds(b).DeleteSnapshot(ctx, snapshot.ID))
		}
	}
	return errors.Join(err, b.Backend.DeleteShare(ctx, id))
}

type needsSource struct{ backend.Backend }

func (b needsSource) DeleteSnapshot(ctx context.Context, id string) error {
	shares, _, _ := b.ListShares(ctx, "", 0)
	for _, share := range shares {
		if share.FromSnapshot == id {
			return fmt.Errorf("delete snapshot: %w", backend.ErrInUse)
		}
	}
	return b.Backend.DeleteSnapshot(ctx, id)
}

type showsShare struct{ backend.Backend }

func (b showsShare) Export(ctx context.Context, target backend.Target, consumer string) (*backend.Export, error) {
	e, err := b.Backend.Export(ctx, target, consumer)
	if snapshot, err := b.Snapshot(ctx, target.SnapshotID); err == nil && e != nil {
		e.Locations[0] = filepath.Join(filepath.Dir(e.Locations[0]), snapshot.ShareID)
	}
	return e, err
}

type nonsense struct{ backend.Backend }

func (nonsense) Capacity(context.Context) (backend.Capacity, error) { return backend.Capacity{}, nil }

func (nonsense) Usage(context.Context, backend.Target) (backend.Usage, error) {
	return backend.Usage{}, nil
}
