package memory_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/backendtest"
	"github.com/abaca-csi/abaca/pkg/backend/memory"
)

var (
	_ backend.CapacityReporter = memory.NewStore("").Open().(backend.CapacityReporter)
	_ backend.UsageReporter    = memory.NewStore("").Open().(backend.UsageReporter)
)

func TestConformance(t *testing.T) {
	all := backend.Abilities{Snapshot: true, Clone: true, MountSnapshot: true}
	for _, test := range []struct {
		name string
		can  backend.Abilities
		dir  bool
	}{
		{"plain", all, false},
		{"directories", all, true},
		{"no snapshots", backend.Abilities{}, false},
		{"snapshots only", backend.Abilities{Snapshot: true}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := backendtest.Harness{
				ShareSize: 1 << 20,
				New: func(t *testing.T) func() backend.Backend {
					dir := ""
					if test.dir {
						dir = t.TempDir()
					}
					store := memory.NewStore(dir)
					store.Can, store.Node = test.can, "node-1"
					return store.Open
				},
			}
			if test.dir {
				h.Write, h.Read = write, read
			}
			backendtest.Run(t, h)
		})
	}
}

func write(t *testing.T, e *backend.Export, file, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(e.Locations[0], file), []byte(content), 0o666); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, e *backend.Export, file string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(e.Locations[0], file))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(content)
}
