package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// table is what a part has measured. Its last two columns are the target and
// whether it is met.
type table struct {
	title   string
	command string // that repeats it
	notes   []string
	header  []string
	rows    [][]string
	missed  bool
}

// row adds a row that has a target.
func (t *table) row(target string, met bool, cells ...string) {
	verdict := "yes"
	if !met {
		verdict, t.missed = "NO", true
	}
	t.rows = append(t.rows, append(cells, target, verdict))
}

// plainRow adds a row that has none.
func (t *table) plainRow(cells ...string) { t.rows = append(t.rows, append(cells, "-", "-")) }

func (t *table) print(to io.Writer) {
	fmt.Fprintf(to, "\n%s\n  %s\n", t.title, t.command)
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	for _, cells := range append([][]string{t.header}, t.rows...) {
		fmt.Fprintf(w, "  %s\n", strings.Join(cells, "\t"))
	}
	w.Flush()
	for _, n := range t.notes {
		fmt.Fprintf(to, "  %s\n", n)
	}
}

func (t *table) markdown(to io.Writer) {
	fmt.Fprintf(to, "\n### %s\n\n`%s`\n\n", t.title, t.command)
	line := func(cells []string) { fmt.Fprintf(to, "| %s |\n", strings.Join(cells, " | ")) }
	line(t.header)
	line(slices.Repeat([]string{"---"}, len(t.header)))
	for _, cells := range t.rows {
		line(cells)
	}
	for _, n := range t.notes {
		fmt.Fprintf(to, "\n%s\n", n)
	}
}

const (
	beginMark = "<!-- begin: written by go run ./test/bench -out -->\n"
	endMark   = "<!-- end -->\n"
)

// writeTables puts the tables between the markers of a Markdown file.
func writeTables(path string, tables []*table) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, found := strings.Cut(string(text), beginMark)
	_, after, ended := strings.Cut(rest, endMark)
	if !found || !ended {
		return fmt.Errorf("%s lacks the lines %q and %q", path, strings.TrimSpace(beginMark), strings.TrimSpace(endMark))
	}
	var b bytes.Buffer
	b.WriteString(before + beginMark)
	fmt.Fprintf(&b, "\nMeasured on %s on %s.\n", time.Now().UTC().Format("2006-01-02 15:04 UTC"), machine())
	for _, t := range tables {
		t.markdown(&b)
	}
	b.WriteString("\n" + endMark + after)
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// median of at least one value; of an even number, the mean of the middle two.
func median[T ~int64 | ~float64](values []T) T {
	v := slices.Sorted(slices.Values(values))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// spread shows the least and the greatest value.
func spread[T cmp.Ordered](values []T, show func(T) string) string {
	return show(slices.Min(values)) + " to " + show(slices.Max(values))
}

func ratioText(r float64) string { return fmt.Sprintf("%.3f", r) }

// durationText keeps four digits.
func durationText(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

func mibText(bytes int64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
