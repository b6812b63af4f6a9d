// Package layers tests the rules between the packages: who may import whom,
// and where the clock and other programs are wired in (docs/design, "Layers").
package layers

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/abaca-csi/abaca/"

// ours says which other packages of this module a package may import, itself
// or through others. A package that is not listed is a decision to be made: it
// goes where its layer is.
var ours = map[string][]string{
	// Small tools that know nothing of shares.
	"pkg/busy":    {},
	"pkg/keys":    {"pkg/record"},
	"pkg/event":   {},
	"pkg/line":    {},
	"pkg/nearest": {},
	"pkg/once":    {},
	"pkg/record":  {},

	"pkg/backend":             {},
	"pkg/backend/backendtest": {"pkg/backend"},
	"pkg/backend/fault":       {"pkg/backend"},
	"pkg/backend/memory":      {"pkg/backend"},
	"pkg/backend/local":       {"pkg/backend"},
	"pkg/backend/manila":      {"pkg/backend"},
	"pkg/mount":               {"pkg/nearest"},
	"pkg/restic":              {"pkg/nearest", "pkg/record"},

	"pkg/schedule":      {"pkg/line", "pkg/nearest"},
	"pkg/schedule/kube": {"pkg/event", "pkg/line", "pkg/nearest", "pkg/schedule"},

	"pkg/mover":            {"pkg/mount", "pkg/nearest", "pkg/record", "pkg/restic"},
	"pkg/maintain":         {"pkg/line", "pkg/mount", "pkg/mover", "pkg/nearest", "pkg/record", "pkg/restic"},
	"pkg/backup":           {"pkg/backend", "pkg/busy", "pkg/line", "pkg/maintain", "pkg/mount", "pkg/mover", "pkg/nearest", "pkg/once", "pkg/record", "pkg/restic"},
	"pkg/backup/inprocess": {"pkg/backend", "pkg/backup", "pkg/busy", "pkg/line", "pkg/maintain", "pkg/mount", "pkg/mover", "pkg/nearest", "pkg/once", "pkg/record", "pkg/restic"},
	"pkg/csi":              {"pkg/backend", "pkg/backup", "pkg/busy", "pkg/line", "pkg/maintain", "pkg/mount", "pkg/mover", "pkg/nearest", "pkg/once", "pkg/record", "pkg/restic"},
	"pkg/backup/kube":      {"pkg/backend", "pkg/backup", "pkg/busy", "pkg/event", "pkg/line", "pkg/maintain", "pkg/mount", "pkg/mover", "pkg/nearest", "pkg/once", "pkg/record", "pkg/restic"},
}

// theirs says which packages of others a layer must be free of, itself and
// through others. The longest matching entry of except wins over the ban.
var theirs = []struct {
	layer  string // a package and all below it
	banned []string
	except []string
	why    string
	but    string // a package of the layer that may
}{
	{"pkg/backend", []string{"google.golang.org/grpc", "k8s.io", "sigs.k8s.io"}, nil, "a backend knows neither gRPC nor Kubernetes", ""},
	{"pkg/restic", []string{"google.golang.org/grpc", "k8s.io", "sigs.k8s.io", "github.com/restic/restic"}, nil, "restic is a program that is run, not a library", ""},
	{"pkg/mount", []string{"google.golang.org/grpc", "k8s.io", "sigs.k8s.io"}, []string{"k8s.io/mount-utils", "k8s.io/klog", "k8s.io/utils"}, "mounts know neither gRPC nor Kubernetes, but for mount-utils", ""},
	{"pkg/mover", []string{"google.golang.org/grpc", "k8s.io", "sigs.k8s.io"}, []string{"k8s.io/mount-utils", "k8s.io/klog", "k8s.io/utils"}, "a mover needs no orchestrator", ""},
	{"pkg/backup", []string{"google.golang.org/grpc", "k8s.io", "sigs.k8s.io"}, []string{"k8s.io/mount-utils", "k8s.io/klog", "k8s.io/utils"}, "backups need no orchestrator; client-go stays in backup/kube", "pkg/backup/kube"},
	{"pkg/csi", []string{"k8s.io/client-go", "k8s.io/api"}, nil, "the driver works without Kubernetes", ""},
	{"pkg/backend/local", []string{"github.com/gophercloud"}, nil, "gophercloud stays in backend/manila", ""},
	{"pkg/maintain", []string{"google.golang.org/grpc", "k8s.io", "sigs.k8s.io"}, []string{"k8s.io/mount-utils", "k8s.io/klog", "k8s.io/utils"}, "maintenance is of any repository, and needs no orchestrator", ""},
}

// codes are the packages that only pkg/csi, and cmd as a client, may import.
var codes = []string{"google.golang.org/grpc/codes", "google.golang.org/grpc/status"}

// wired lists where product code may ask for the time, sleep or run a program,
// by file and call. Everywhere else they are fields. An entry that is no longer
// needed is an error too.
var wired = map[string]map[string]string{
	"pkg/backend/memory/memory.go":   {"time.Now": "the default of a field"},
	"pkg/backend/local/image.go":     {"exec.CommandContext": "the one function that runs mkfs, losetup and btrfs"},
	"pkg/restic/run.go":              {"exec.CommandContext": "asks a program for its version, before there is a Repository"},
	"pkg/restic/repository.go":       {"exec.CommandContext": "the default of a field"},
	"pkg/mount/mounter.go":           {"exec.CommandContext": "the default of a field", "time.Until": "a context's deadline is in real time"},
	"pkg/backup/inprocess/runner.go": {"exec.Command": "the mover process outlives the request that starts it"},
	"cmd/abaca/serve.go":             {"time.Now": "wired into the driver, the engine and the runner"},
	"cmd/abaca/mover.go":             {"time.Now": "wired into the mover"},
	"cmd/abaca/schedule.go":          {"time.Now": "wired into the run"},
	"cmd/abaca/maintain.go":          {"time.Now": "wired into the run"},
}

// watched are the calls that wired is about.
var watched = map[string][]string{
	"time":    {"Now", "Since", "Until", "Sleep"},
	"os/exec": {"Command", "CommandContext"},
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

// packages are the packages of the module without their tests, by path in it.
func packages(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-buildvcs=false", "-e", "-json=ImportPath,Imports,Deps", module+"...")
	cmd.Dir = root(t)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	found := map[string]pkg{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("decode go list: %v", err)
		}
		found[strings.TrimPrefix(p.ImportPath, module)] = p
	}
	for _, must := range []string{"pkg/backend", "pkg/mount", "pkg/restic", "pkg/mover"} {
		if _, ok := found[must]; !ok {
			t.Fatalf("go list does not know %s: the test looks at the wrong module", must)
		}
	}
	return found
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// within says that path is layer or below it.
func within(path, layer string) bool {
	return path == layer || strings.HasPrefix(path, layer+"/")
}

func TestImports(t *testing.T) {
	for _, problem := range checkImports(packages(t)) {
		t.Error(problem)
	}
}

func checkImports(all map[string]pkg) (problems []string) {
	complain := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	for _, path := range slices.Sorted(maps.Keys(all)) {
		p := all[path]
		isPkg := within(path, "pkg")
		allowed, known := ours[path]
		if isPkg && !known {
			complain("%s is in no layer: say in the table ours what it may import", path)
		}
		for _, dep := range p.Deps {
			if own, ok := strings.CutPrefix(dep, module); ok && isPkg && known && !slices.Contains(allowed, own) {
				complain("%s depends on %s, which is not below it", path, own)
			}
			for _, rule := range theirs {
				if within(path, rule.layer) && path != rule.but && matches(dep, rule.banned) && !matches(dep, rule.except) {
					complain("%s depends on %s: %s", path, dep, rule.why)
				}
			}
		}
		for _, imp := range p.Imports {
			if slices.Contains(codes, imp) && isPkg && path != "pkg/csi" {
				complain("%s imports %s: only pkg/csi knows gRPC codes", path, imp)
			}
		}
	}
	return problems
}

func matches(dep string, layers []string) bool {
	return slices.ContainsFunc(layers, func(l string) bool { return within(dep, l) })
}

func TestClockAndPrograms(t *testing.T) {
	found := map[string]map[string]bool{}
	dir := root(t)
	for _, top := range []string{"pkg", "cmd"} {
		err := filepath.WalkDir(filepath.Join(dir, top), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			name, err := filepath.Rel(dir, path)
			if err != nil {
				return err
			}
			// What serves tests, and the demonstration, are not the product.
			if within(name, "pkg/backend/backendtest") || strings.HasPrefix(name, "cmd/abaca/demo") {
				return nil
			}
			calls, err := watchedCalls(path)
			if err != nil {
				return err
			}
			for call, at := range calls {
				if found[name] == nil {
					found[name] = map[string]bool{}
				}
				found[name][call] = true
				if wired[name][call] == "" {
					t.Errorf("%s:%d: %s: take it as a field, or say in the table wired why not", name, at, call)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, calls := range wired {
		for call := range calls {
			if !found[name][call] {
				t.Errorf("%s no longer has %s: remove it from the table wired", name, call)
			}
		}
	}
}

// watchedCalls returns the watched functions that a file mentions, with the
// line of the first mention.
func watchedCalls(path string) (map[string]int, error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	imported := map[string]string{} // local name to import path
	for _, imp := range file.Imports {
		p, err := strconv.Unquote(imp.Path.Value)
		if err != nil {
			return nil, err
		}
		name := p[strings.LastIndexByte(p, '/')+1:]
		if imp.Name != nil {
			name = imp.Name.Name
		}
		imported[name] = p
	}
	calls := map[string]int{}
	ast.Inspect(file, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		id, ok := sel.X.(*ast.Ident)
		if !ok {
			return true
		}
		p := imported[id.Name]
		if slices.Contains(watched[p], sel.Sel.Name) {
			call := p[strings.LastIndexByte(p, '/')+1:] + "." + sel.Sel.Name
			if calls[call] == 0 {
				calls[call] = set.Position(sel.Pos()).Line
			}
		}
		return true
	})
	return calls, nil
}

// TestRulesBite checks that the rules see what they are there for.
func TestRulesBite(t *testing.T) {
	tests := []struct {
		path string
		p    pkg
		want string
	}{
		{"pkg/backend/local", pkg{Deps: []string{module + "pkg/csi"}}, "pkg/backend/local depends on pkg/csi"},
		{"pkg/backend", pkg{Deps: []string{module + "pkg/busy"}}, "pkg/backend depends on pkg/busy"},
		{"pkg/backup", pkg{Deps: []string{module + "cmd/abaca"}}, "pkg/backup depends on cmd/abaca"},
		{"pkg/csi", pkg{Deps: []string{module + "test/tree"}}, "pkg/csi depends on test/tree"},
		{"pkg/backend/memory", pkg{Deps: []string{"google.golang.org/grpc/status"}}, "knows neither gRPC"},
		{"pkg/mount", pkg{Deps: []string{"k8s.io/apimachinery/pkg/types"}}, "but for mount-utils"},
		{"pkg/restic", pkg{Deps: []string{"k8s.io/klog/v2"}}, "pkg/restic depends on k8s.io/klog/v2"},
		{"pkg/backup", pkg{Imports: []string{"google.golang.org/grpc/codes"}}, "only pkg/csi knows gRPC codes"},
		{"pkg/common", pkg{}, "pkg/common is in no layer"},

		{"pkg/mount", pkg{Deps: []string{"k8s.io/mount-utils", "k8s.io/utils/exec"}}, ""},
		{"pkg/csi", pkg{Deps: []string{module + "pkg/backend"}, Imports: []string{"google.golang.org/grpc/codes"}}, ""},
		{"pkg/backup/inprocess", pkg{Deps: []string{"k8s.io/client-go/kubernetes"}}, "client-go stays in backup/kube"},
		{"pkg/backup/kube", pkg{Deps: []string{"k8s.io/client-go/kubernetes"}}, ""},
		{"pkg/backup/kube", pkg{Deps: []string{module + "pkg/csi"}}, "pkg/backup/kube depends on pkg/csi"},
		{"cmd/abaca", pkg{Deps: []string{module + "test/tree", "k8s.io/client-go/rest"}, Imports: []string{"google.golang.org/grpc/codes"}}, ""},
	}
	for _, tt := range tests {
		got := strings.Join(checkImports(map[string]pkg{tt.path: tt.p}), "\n")
		if !strings.Contains(got, tt.want) || (tt.want == "") != (got == "") {
			t.Errorf("%s with %+v: %q, want %q", tt.path, tt.p, got, tt.want)
		}
	}

	file := filepath.Join(t.TempDir(), "a.go")
	source := "package a\n\nimport (\n\tclock \"time\"\n\t\"os/exec\"\n)\n\nvar now = clock.Now\n\nvar run = exec.Command(\"true\")\n\nvar second = clock.Second\n"
	if err := os.WriteFile(file, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	calls, err := watchedCalls(file)
	if err != nil || !maps.Equal(calls, map[string]int{"time.Now": 8, "exec.Command": 10}) {
		t.Errorf("calls %v, %v", calls, err)
	}
}
