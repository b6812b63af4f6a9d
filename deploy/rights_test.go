package deploy

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
)

// module is where our packages are.
const module = "github.com/abaca-csi/abaca/"

// verbs are those of the methods of client-go's clients. What is not here, the test asks for.
var verbs = map[string]string{"Get": "get", "List": "list", "Watch": "watch", "Create": "create", "Update": "update", "Patch": "patch", "Apply": "patch",
	"Delete": "delete", "DeleteCollection": "deletecollection"}

// clients is the path of a package of typed clients, and groups the API groups that it
// calls otherwise.
var (
	clients = regexp.MustCompile(`/typed/([a-z]+)/v\d+$`)
	groups  = map[string]string{"core": "", "volumesnapshot": "snapshot.storage.k8s.io"}
)

// called are the rights that packages of ours need: each call of a method of one of
// client-go's typed clients, as "group/resource verb".
func called(t *testing.T, packages ...string) (rights []string) {
	t.Helper()
	for i, p := range packages {
		packages[i] = module + p
	}
	// The types of what they import are in the compiler's own files.
	list := exec.Command("go", append([]string{"list", "-export", "-deps", "-json=ImportPath,Export,Dir,GoFiles"}, packages...)...)
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	type pkg struct {
		ImportPath, Export, Dir string
		GoFiles                 []string
	}
	known := map[string]pkg{}
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		known[p.ImportPath] = p
	}
	files := token.NewFileSet()
	imports := importer.ForCompiler(files, "gc", func(path string) (io.ReadCloser, error) { return os.Open(known[path].Export) })
	for _, name := range packages {
		var parsed []*ast.File
		for _, file := range known[name].GoFiles {
			f, err := parser.ParseFile(files, filepath.Join(known[name].Dir, file), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			parsed = append(parsed, f)
		}
		info := &types.Info{Selections: map[*ast.SelectorExpr]*types.Selection{}}
		if _, err := (&types.Config{Importer: imports}).Check(name, files, parsed, info); err != nil {
			t.Fatal(err)
		}
		for at, s := range info.Selections {
			client, ok := s.Recv().(*types.Named)
			if !ok || client.Obj().Pkg() == nil || !strings.HasSuffix(client.Obj().Name(), "Interface") {
				continue
			}
			group := clients.FindStringSubmatch(client.Obj().Pkg().Path())
			kind := strings.TrimSuffix(client.Obj().Name(), "Interface")
			if group == nil || strings.HasSuffix(kind, "V1") { // which gives clients, and asks nothing
				continue
			}
			of, named := groups[group[1]]
			if !named {
				of = group[1]
			}
			resource, verb := strings.ToLower(kind)+"s", verbs[s.Obj().Name()]
			if s.Obj().Name() == "GetLogs" {
				resource, verb = resource+"/log", "get"
			}
			if verb == "" {
				t.Errorf("%s: what does %s.%s need?", files.Position(at.Pos()), client, s.Obj().Name())
			}
			rights = append(rights, strings.TrimPrefix(of+"/"+resource, "/")+" "+verb)
		}
	}
	slices.Sort(rights)
	return slices.Compact(rights)
}

// granted are the rights of rules, in the same words.
func granted(rules []rbacv1.PolicyRule) (rights []string) {
	for _, r := range rules {
		for _, resource := range r.Resources {
			for _, verb := range r.Verbs {
				rights = append(rights, strings.TrimPrefix(path.Join(r.APIGroups[0], resource), "/")+" "+verb)
			}
		}
	}
	slices.Sort(rights)
	return slices.Compact(rights)
}

// TestRightsAreThoseOfTheCode: our programs may do what their code asks of Kubernetes
// somewhere, and nothing else. What sidecars ask is not ours to read.
func TestRightsAreThoseOfTheCode(t *testing.T) {
	all := render(t, everythingManila+"schedules: [{name: nightly, namespace: shop, schedule: \"0 1 * * *\", selector: a=b, tiers: [\"class=b,keep-last=1\"]}]\n")
	rules := map[string][]rbacv1.PolicyRule{}
	for _, r := range of[*rbacv1.ClusterRole](all) {
		rules[r.Name] = append(rules[r.Name], r.Rules...)
	}
	for _, r := range of[*rbacv1.Role](all) {
		rules[r.Name] = append(rules[r.Name], r.Rules...)
	}
	controller := slices.Concat(rules["abaca-movers"], rules["abaca-events"], rules["abaca-own-repository"], rules["abaca-keys-controller"])
	scheduled := called(t, "pkg/schedule/kube", "pkg/event")
	for _, test := range []struct {
		who       string
		may, does []string
	}{
		{"the controller", granted(controller), called(t, "pkg/backup/kube", "pkg/event", "pkg/keys", "cmd/abaca")},
		{"a schedule of the chart", granted(rules["abaca-schedule-nightly"]), scheduled},
		{"the schedule of the examples", granted(of[*rbacv1.Role](decode(t, read(t, "examples/8-schedule.yaml")))[0].Rules), scheduled},
		{"the node plugin", granted(rules["abaca-keys-node"]), []string{"secrets get"}}, // of pkg/keys, it only reads
	} {
		for _, right := range test.does {
			if !slices.Contains(test.may, right) {
				t.Errorf("%s may not %s, but its code does", test.who, right)
			}
		}
		for _, right := range test.may {
			if !slices.Contains(test.does, right) {
				t.Errorf("%s may %s, and its code nowhere does", test.who, right)
			}
		}
	}
	if len(scheduled) < 5 {
		t.Errorf("too little is found: %v", scheduled)
	}
	// Each package with a client is one of those that were read.
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}} {{join .Imports \" \"}}", module+"pkg/...", module+"cmd/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		name, imports, _ := strings.Cut(line, " ")
		if !slices.ContainsFunc(strings.Fields(imports), func(i string) bool { return i == "k8s.io/client-go/kubernetes" || strings.Contains(i, "/clientset/") }) {
			continue
		}
		if !slices.Contains([]string{"pkg/backup/kube", "pkg/event", "pkg/keys", "pkg/schedule/kube", "cmd/abaca"}, strings.TrimPrefix(name, module)) {
			t.Errorf("%s speaks to Kubernetes, and this test does not read it", name)
		}
	}
}
