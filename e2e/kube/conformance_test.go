package kube

import (
	"encoding/xml"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
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
	driver, err := filepath.Abs("testdata/driver.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// Most of a test is waiting, so several run at a time. That with any data source
	// needs images of populators, which are not at hand, and one test looks for
	// unused volumes in /var/lib/kubelet, whatever the kubelet's directory.
	const skip = `\[Disruptive\]|\[Feature:Windows\]|any volume data source|should not mount / map unused volumes`
	parts := []string{`External.Storage.*\] (subPath|volume-expand)`, `External.Storage.*\] (multiVolume|topology|read-write-once-pod)`,
		`External.Storage.*\] (provisioning|ephemeral)`}
	runs := map[string]string{"External.Storage": skip + "|" + strings.Join(parts, "|")}
	for _, part := range parts {
		runs[part] = skip
	}
	if focus := os.Getenv("ABACA_KUBE_FOCUS"); focus != "" {
		runs = map[string]string{focus: skip}
	}
	var reports []string
	var all sync.WaitGroup
	for focus, skip := range runs {
		report, log := filepath.Join(t.TempDir(), "report.xml"), filepath.Join(c.dir, "log", fmt.Sprintf("conformance-%d", len(reports)))
		reports = append(reports, report)
		all.Go(func() {
			cmd := exec.Command(program, "-kubeconfig", os.Getenv("KUBECONFIG"), "-storage.testdriver", driver, "-provider", "local", "-num-nodes=1", "-kubelet-root-dir", filepath.Join(c.dir, "cluster/kubelet"),
				"-ginkgo.focus", focus, "-ginkgo.skip", skip, "-ginkgo.timeout", "1h", "-ginkgo.no-color", "-ginkgo.junit-report", report)
			f, err := os.Create(log)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			cmd.Stdout, cmd.Stderr = f, f
			if err := cmd.Run(); err != nil {
				t.Errorf("%s: %v; see %s", focus, err, log)
			}
		})
	}
	all.Wait()
	table, err := summary(reports)
	if err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + table)
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}

// suiteOf is the test pattern and the suite in the name of a test.
var suiteOf = regexp.MustCompile(`\[Testpattern: [^\]]*\](?: \[[^\]]*\])* ([a-zA-Z-]+)`)

// summary is a table of the suites in reports of JUnit's form. What was not asked
// for is not in it.
func summary(reports []string) (string, error) {
	type count struct {
		passed, failed, skipped int
		bad                     []string
	}
	suites := map[string]*count{}
	for _, report := range reports {
		var doc struct {
			Cases []struct {
				Name    string `xml:"name,attr"`
				Status  string `xml:"status,attr"`
				Skipped struct {
					Message string `xml:"message,attr"`
				} `xml:"skipped"`
			} `xml:"testsuite>testcase"`
		}
		text, err := os.ReadFile(report)
		if err == nil {
			err = xml.Unmarshal(text, &doc)
		}
		if err != nil {
			return "", err
		}
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
				s.bad = append(s.bad, one.Name)
			}
		}
	}
	var b strings.Builder
	b.WriteString("| suite of tests | passed | failed | not for this driver |\n| --- | --- | --- | --- |\n")
	names := slices.Sorted(maps.Keys(suites))
	for _, name := range names {
		fmt.Fprintf(&b, "| %s | %d | %d | %d |\n", name, suites[name].passed, suites[name].failed, suites[name].skipped)
	}
	for _, name := range names {
		for _, bad := range suites[name].bad {
			fmt.Fprintf(&b, "failed: %s\n", bad)
		}
	}
	return b.String(), nil
}
