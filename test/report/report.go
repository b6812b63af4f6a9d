package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
)

// event is one line of `go test -json` (go doc test2json, go help buildjson).
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
}

// report counts and prints as the events come. A test with subtests counts as
// its subtests; it counts itself only where it fails and none of them does.
type report struct {
	out                     io.Writer
	packages                map[string]*testedPackage
	order                   []*testedPackage // of the unfinished ones
	passed, failed, skipped int
	skips                   []skip
	ran                     map[string]bool // packages that ended
	problems                []string
}

type testedPackage struct {
	path  string
	tests map[string]*test
	names []string // in the order of their start
	lines []outputLine
}

type test struct {
	result string // pass, fail, skip; empty while it runs
	parent bool   // has subtests
}

type outputLine struct{ test, text string }

// skip is a skipped test: its package and name as the list writes them.
type skip struct{ name, reason string }

func newReport(out io.Writer) *report {
	return &report{out: out, packages: map[string]*testedPackage{}, ran: map[string]bool{}}
}

// problem notes what makes the run fail without being a failed test.
func (r *report) problem(format string, args ...any) {
	r.problems = append(r.problems, fmt.Sprintf(format, args...))
}

func (r *report) line(line []byte) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil || e.Action == "" {
		r.out.Write(line)
		return
	}
	switch e.Action {
	case "build-output":
		io.WriteString(r.out, e.Output)
		return
	case "build-fail":
		return
	}

	p := r.packages[e.Package]
	if p == nil {
		p = &testedPackage{path: e.Package, tests: map[string]*test{}}
		r.packages[e.Package] = p
		r.order = append(r.order, p)
	}
	if e.Test != "" && p.tests[e.Test] == nil {
		p.tests[e.Test] = &test{}
		p.names = append(p.names, e.Test)
		for parent, ok := cutLast(e.Test); ok; parent, ok = cutLast(parent) {
			if t := p.tests[parent]; t != nil {
				t.parent = true
			}
		}
	}
	switch e.Action {
	case "output":
		p.lines = append(p.lines, outputLine{e.Test, e.Output})
	case "pass", "fail", "skip":
		if e.Test != "" {
			p.tests[e.Test].result = e.Action
			return
		}
		r.finish(p, e.Action)
	}
}

func cutLast(name string) (string, bool) {
	i := strings.LastIndexByte(name, '/')
	if i < 0 {
		return "", false
	}
	return name[:i], true
}

// finish prints and counts a package whose result is known. A result of "" is
// that of a package that was stopped.
func (r *report) finish(p *testedPackage, result string) {
	delete(r.packages, p.path)
	r.order = slices.DeleteFunc(r.order, func(q *testedPackage) bool { return q == p })
	r.ran[p.path] = true

	failed := 0
	show := map[string]bool{"": true} // what has failed, and all above it
	failedBelow := map[string]bool{}
	for _, name := range slices.Backward(p.names) { // subtests before their parents
		t := p.tests[name]
		switch {
		case t.result == "skip":
			r.skipped++
			r.skips = append(r.skips, skip{p.path + " " + name, skipReason(p.lines, name)})
		case t.result == "pass" && t.parent:
		case t.result == "pass":
			r.passed++
		default: // failed, or never ended
			if !failedBelow[name] {
				failed++
			}
			for at, ok := name, true; ok; at, ok = cutLast(at) {
				show[at] = true
				if at != name {
					failedBelow[at] = true
				}
			}
		}
	}
	if failed == 0 && result != "pass" && result != "skip" {
		failed = 1 // did not build, or ended outside of its tests
	}
	r.failed += failed

	for _, l := range p.lines {
		if !show[l.test] || l.text == "PASS\n" {
			continue
		}
		if strings.HasPrefix(l.text, "=== ") { // RUN, PAUSE, CONT, NAME: the noise of -v
			continue
		}
		io.WriteString(r.out, l.text)
	}
	if result == "" {
		fmt.Fprintf(r.out, "FAIL\t%s [did not end]\n", p.path)
		for _, name := range p.names {
			if p.tests[name].result == "" {
				fmt.Fprintf(r.out, "\tstill running: %s\n", name)
			}
		}
	}
}

// skipReason is what the test printed last before its "--- SKIP" line.
func skipReason(lines []outputLine, name string) string {
	reason := ""
	for _, l := range lines {
		text := strings.TrimSpace(l.text)
		if l.test == name && !strings.HasPrefix(text, "--- ") && !strings.HasPrefix(text, "=== ") {
			reason = text
		}
	}
	return reason
}

// end accounts for the packages that were stopped.
func (r *report) end() {
	for len(r.order) > 0 {
		r.finish(r.order[0], "")
	}
}

// close compares the skips with the list, prints the counts and returns the
// exit code.
func (r *report) close(allowed skipList) int {
	found := map[string]bool{}
	for _, s := range r.skips {
		found[s.name] = true
		if _, ok := allowed[s.name]; ok {
			fmt.Fprintf(r.out, "skipped, as listed: %s: %s\n", s.name, s.reason)
		} else {
			r.problem("skipped, but not listed in the list of skips: %s: %s", s.name, s.reason)
		}
	}
	for _, name := range allowed.names() {
		pkg, _, _ := strings.Cut(name, " ")
		if r.ran[pkg] && !found[name] {
			fmt.Fprintf(r.out, "listed as skipped, but was not: %s\n", name)
		}
	}
	if r.passed+r.failed == 0 {
		r.problem("no test ran")
	}
	for _, p := range r.problems {
		fmt.Fprintf(r.out, "FAIL: %s\n", p)
	}
	fmt.Fprintf(r.out, "%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skipped)
	if r.failed > 0 || len(r.problems) > 0 {
		return 1
	}
	return 0
}

// skipList maps "package test" to the reason why it may be skipped.
type skipList map[string]string

func (l skipList) names() []string {
	names := make([]string, 0, len(l))
	for n := range l {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// parseSkips reads lines of a package, a test and a reason. Empty lines and
// those that start with # are left out.
func parseSkips(in io.Reader) (skipList, error) {
	list := skipList{}
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Fields(line)
		if len(f) < 3 {
			return nil, fmt.Errorf("line %d: want a package, a test and a reason", n)
		}
		list[f[0]+" "+f[1]] = strings.Join(f[2:], " ")
	}
	return list, lines.Err()
}
