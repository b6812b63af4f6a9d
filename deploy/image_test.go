package deploy

import (
	"os"
	"os/exec"
	"path"
	"regexp"
	"strings"
	"testing"
)

// TestImageContext: what the Dockerfile copies and compiles is let in by
// .dockerignore, and its compiler is the one that go.mod asks for.
func TestImageContext(t *testing.T) {
	read := func(name string) string {
		b, err := os.ReadFile(path.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	var let []string
	for line := range strings.Lines(read(".dockerignore")) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "!"); ok {
			let = append(let, name)
		}
	}
	dockerfile := read("Dockerfile")
	var wanted []string
	for _, copied := range regexp.MustCompile(`(?m)^COPY ([^-.].*) \S+$`).FindAllStringSubmatch(dockerfile, -1) {
		wanted = append(wanted, strings.Fields(copied[1])...)
	}
	list := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{if .Main}}{{$.ImportPath}}{{end}}{{end}}", "./cmd/abaca")
	list.Dir = ".."
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range strings.FieldsSeq(string(out)) {
		wanted = append(wanted, strings.TrimPrefix(pkg, "github.com/abaca-csi/abaca/"))
	}
	if len(wanted) < 10 {
		t.Fatalf("the image is made of %v only", wanted)
	}
	for _, name := range wanted {
		in := false
		for _, dir := range let {
			in = in || name == dir || strings.HasPrefix(name, dir+"/")
		}
		if !in {
			t.Errorf("the image needs %s, which .dockerignore keeps out", name)
		}
	}
	has := regexp.MustCompile(`FROM golang:(\d+\.\d+)`).FindStringSubmatch(dockerfile)
	asks := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(read("go.mod"))
	if has == nil || asks == nil || has[1] != asks[1] {
		t.Errorf("the image is compiled by Go %v, and go.mod asks for %v", has, asks)
	}
}
