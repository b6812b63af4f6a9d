package kube

import (
	"encoding/xml"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestConformance runs Kubernetes' own tests of storage drivers against what
// testdata/driver.yaml claims, and prints a table of their suites. ABACA_KUBE_FOCUS
// is a pattern of what to run of them.
func TestConformance(t *testing.T) {
	c := start(t)
	program := filepath.Join(c.dir, "bin", "e2e.test")
	if _, err := os.Stat(program); err != nil {
		t.Skip("needs Kubernetes' tests: make e2e-conformance builds them")
	}
	c.install(nil)
	focus := os.Getenv("ABACA_KUBE_FOCUS")
	if focus == "" {
		focus = "External.Storage"
	}
	report := filepath.Join(t.TempDir(), "report.xml")
	driver, err := filepath.Abs("testdata/driver.yaml")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-kubeconfig", os.Getenv("KUBECONFIG"), "-storage.testdriver", driver, "-provider", "local",
		"-ginkgo.focus", focus, "-ginkgo.skip", `\[Disruptive\]|\[Feature:Windows\]`, "-ginkgo.timeout", "3h", "-ginkgo.no-color", "-ginkgo.junit-report", report,
		"-allowed-not-ready-nodes=-1", "-num-nodes=1")
	log, err := os.Create(filepath.Join(c.dir, "log", "conformance"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	failed := cmd.Run()
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("%v, %v; see %s", failed, err, log.Name())
	}
	table, bad, err := summary(text)
	if err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + table)
	for _, name := range bad {
		t.Errorf("failed: %s", name)
	}
	if failed != nil && len(bad) == 0 {
		t.Errorf("%v; see %s", failed, log.Name())
	}
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

// suiteOf is the test pattern and the suite in the name of a test.
var suiteOf = regexp.MustCompile(`\[Testpattern: [^\]]*\](?: \[[^\]]*\])* ([a-zA-Z-]+)`)

// summary is a table of the suites in a report of JUnit's form, and the names of
// the tests that failed. What the suite skips as it was not asked for is not in it.
func summary(report []byte) (table string, failed []string, err error) {
	var doc struct {
		Cases []struct {
			Name    string `xml:"name,attr"`
			Status  string `xml:"status,attr"`
			Skipped struct {
				Message string `xml:"message,attr"`
			} `xml:"skipped"`
		} `xml:"testsuite>testcase"`
	}
	if err := xml.Unmarshal(report, &doc); err != nil {
		return "", nil, err
	}
	type count struct{ passed, failed, skipped int }
	suites := map[string]*count{}
	for _, one := range doc.Cases {
		m := suiteOf.FindStringSubmatch(one.Name)
		if m == nil || one.Status == "skipped" && one.Skipped.Message == "skipped" {
			continue
		}
		if suites[m[1]] == nil {
			suites[m[1]] = &count{}
		}
		switch s := suites[m[1]]; one.Status {
		case "passed":
			s.passed++
		case "skipped":
			s.skipped++
		default:
			s.failed++
			failed = append(failed, one.Name)
		}
	}
	var names []string
	for name := range suites {
		names = append(names, name)
	}
	slices.Sort(names)
	var b strings.Builder
	b.WriteString("| suite | passed | failed | not for this driver |\n| --- | --- | --- | --- |\n")
	for _, name := range names {
		fmt.Fprintf(&b, "| %s | %d | %d | %d |\n", name, suites[name].passed, suites[name].failed, suites[name].skipped)
	}
	return b.String(), failed, nil
}
