package manila

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/backendtest"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// store is an access-key store in memory.
type store struct {
	mu   sync.Mutex
	keys map[string]string
}

func (s *store) Put(_ context.Context, id, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[id] = key
	return nil
}

func (s *store) Delete(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.keys, id)
	return nil
}

// cloud is a simulated cloud, and what opens it.
type cloud struct {
	*fakemanila.Server
	t    *testing.T
	file string
	keys *store
}

func newCloud(t *testing.T, o fakemanila.Options) *cloud {
	t.Helper()
	c := &cloud{fakemanila.New(o), t, filepath.Join(t.TempDir(), "clouds.yaml"), &store{keys: map[string]string{}}}
	t.Cleanup(c.Close)
	if err := os.WriteFile(c.file, []byte(c.Clouds()), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *cloud) options() Options {
	return Options{CloudsFile: c.file, Cloud: "fake", Keys: c.keys, Now: time.Now, Poll: 5 * time.Millisecond}
}

func (c *cloud) open() *Backend {
	c.t.Helper()
	b, err := Open(context.Background(), c.options())
	if err != nil {
		c.t.Fatal(err)
	}
	return b
}

// TestConformance runs the contract's suite against the simulator: as it is now,
// with listings of few at once, and as an old cloud that has no metadata of snapshots.
func TestConformance(t *testing.T) {
	for name, o := range map[string]fakemanila.Options{
		"cephfs": {}, "pages": {MaxLimit: 2}, "2.60": {Microversion: "2.60"},
	} {
		t.Run(name, func(t *testing.T) {
			var clouds sync.Map // by the storage's test
			backendtest.Run(t, backendtest.Harness{
				ShareSize: gib,
				New: func(t *testing.T) func() backend.Backend {
					o := o
					o.Dir = t.TempDir()
					o.Delay = func() time.Duration { return time.Duration(rand.IntN(15)) * time.Millisecond }
					c := newCloud(t, o)
					clouds.Store(t.Name(), c)
					return func() backend.Backend { return c.open() }
				},
				Write: func(t *testing.T, e *backend.Export, file, content string) {
					if err := os.WriteFile(filepath.Join(treeOf(t, &clouds, e), file), []byte(content), 0o644); err != nil {
						t.Fatal(err)
					}
				},
				Read: func(t *testing.T, e *backend.Export, file string) string {
					b, err := os.ReadFile(filepath.Join(treeOf(t, &clouds, e), file))
					if err != nil && !errors.Is(err, fs.ErrNotExist) {
						t.Fatal(err)
					}
					return string(b)
				},
			})
		})
	}
}

// treeOf is the directory that a node would see.
func treeOf(t *testing.T, clouds *sync.Map, e *backend.Export) string {
	t.Helper()
	for name := t.Name(); ; name = filepath.Dir(name) {
		v, ok := clouds.Load(name)
		if !ok && name != "." {
			continue
		}
		if !ok {
			t.Fatalf("there is no cloud for %s", t.Name())
		}
		tree := v.(*cloud).Tree(filepath.Base(e.Locations[0]))
		if e.Path == "" {
			return tree
		}
		found, err := filepath.Glob(filepath.Join(tree, e.Path))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s below %s: %v, %v", e.Path, tree, found, err)
		}
		return found[0]
	}
}

// TestRealConformance runs the suite against a real Manila, contents apart:
//
//	ABACA_MANILA_CLOUDS=clouds.yaml ABACA_MANILA_CLOUD=name go test -run TestRealConformance ./pkg/backend/manila
//
// with shares of the class that ABACA_MANILA_CLASS gives, as parameters: "type=dummy protocol=NFS".
func TestRealConformance(t *testing.T) {
	file, cloud := os.Getenv("ABACA_MANILA_CLOUDS"), os.Getenv("ABACA_MANILA_CLOUD")
	if file == "" {
		t.Skip("needs a Manila: ABACA_MANILA_CLOUDS and ABACA_MANILA_CLOUD name it")
	}
	parameters := map[string]string{}
	for p := range strings.FieldsSeq(os.Getenv("ABACA_MANILA_CLASS")) {
		name, value, _ := strings.Cut(p, "=")
		parameters[name] = value
	}
	backendtest.Run(t, backendtest.Harness{
		ShareSize: gib,
		Slow:      true,
		New: func(t *testing.T) func() backend.Backend {
			keys := &store{keys: map[string]string{}}
			o := Options{CloudsFile: file, Cloud: cloud, Instance: "test-" + digest(t.Name(), time.Now().String())[:12], Keys: keys, Now: time.Now, Poll: 300 * time.Millisecond}
			open := func() backend.Backend {
				b, err := Open(context.Background(), o)
				if err != nil {
					t.Fatal(err)
				}
				return ofClass{b, parameters}
			}
			t.Cleanup(func() {
				if err := removeAll(open().(ofClass).Backend); err != nil {
					t.Errorf("left behind: %v", err)
				}
			})
			return open
		},
	})
}

// TestRealSignIn makes a share and deletes it as each of the clouds in the clouds.yaml that
// TestRealConformance uses: they sign in by a password, an application credential with
// access rules, a trust.
func TestRealSignIn(t *testing.T) {
	file := os.Getenv("ABACA_MANILA_CLOUDS")
	if file == "" {
		t.Skip("needs a Manila: ABACA_MANILA_CLOUDS names a clouds.yaml")
	}
	var all struct {
		Clouds map[string]struct{} `json:"clouds"`
	}
	if err := yaml.Unmarshal(ok[[]byte](t)(os.ReadFile(file)), &all); err != nil || len(all.Clouds) == 0 {
		t.Fatalf("%s: %d clouds, %v", file, len(all.Clouds), err)
	}
	for cloud := range all.Clouds {
		t.Run(cloud, func(t *testing.T) {
			b := ok[*Backend](t)(Open(t.Context(), Options{CloudsFile: file, Cloud: cloud, Instance: "test-" + digest(t.Name(), time.Now().String())[:12], Now: time.Now}))
			t.Cleanup(func() {
				if err := removeAll(b); err != nil {
					t.Errorf("left behind: %v", err)
				}
			})
			ok[*backend.Share](t)(b.CreateShare(t.Context(), request("data")))
		})
	}
}

// ofClass makes shares with the parameters of a class.
type ofClass struct {
	*Backend
	parameters map[string]string
}

func (c ofClass) CreateShare(ctx context.Context, req backend.CreateShareRequest) (*backend.Share, error) {
	req.Parameters = c.parameters
	return c.Backend.CreateShare(ctx, req)
}

// removeAll takes down all that an instance has.
func removeAll(b *Backend) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	all, err := b.ours(ctx)
	if err != nil {
		return err
	}
	for _, s := range all {
		cut, err := b.snapshotsOf(ctx, s.ID)
		if err != nil {
			return err
		}
		for _, sn := range cut {
			if err := b.removeSnapshot(ctx, sn); err != nil {
				return err
			}
		}
		if err := b.removeShare(ctx, s); err != nil {
			return err
		}
	}
	return nil
}
