package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.values); got != c.want {
			t.Errorf("median(%v) = %v, want %v", c.values, got, c.want)
		}
	}
}

func TestTableKnowsWhatIsMissed(t *testing.T) {
	tb := &table{header: []string{"what", "target", "met"}}
	tb.plainRow("a")
	tb.row("at most 1", true, "b")
	if tb.missed {
		t.Error("missed, though the only target is met")
	}
	tb.row("at most 1", false, "c")
	tb.row("at most 1", true, "d")
	if !tb.missed {
		t.Error("not missed, though one target is")
	}
}

// TestWriteTables: what stands around the markers stays, what stood between
// them goes, and a file without them is left alone.
func TestWriteTables(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b.md")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tables := []*table{{title: "Speed", command: "go", header: []string{"what", "target", "met"}, rows: [][]string{{"x", "-", "-"}}}}
	write("above\n" + beginMark + "old\n" + endMark + "below\n")
	if err := writeTables(path, tables); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(got)
	if !strings.HasPrefix(text, "above\n"+beginMark) || !strings.HasSuffix(text, endMark+"below\n") ||
		strings.Contains(text, "old") || !strings.Contains(text, "\n| x | - | - |\n") {
		t.Errorf("got\n%s", text)
	}
	write("no marker\n")
	if err := writeTables(path, tables); err == nil {
		t.Error("a file without markers was written")
	}
}
