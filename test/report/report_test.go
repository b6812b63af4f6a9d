package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// module writes a module with the given files and makes it the working
// directory.
func module(t *testing.T, files map[string]string) {
	t.Helper()
	dir := t.TempDir()
	files["go.mod"] = "module x\n\ngo 1.26\n"
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	t.Setenv("GOFLAGS", "-buildvcs=false")
}

const header = "package a\n\nimport (\"os\"; \"testing\"; \"time\")\n\nvar _, _ = os.Exit, time.Now\n\n"

func TestReport(t *testing.T) {
	const passes = "func TestOK(t *testing.T) { t.Log(\"of no interest\") }\n"
	tests := []struct {
		name  string
		files map[string]string
		skips string
		limit time.Duration
		code  int
		last  string
		want  []string
		not   []string
	}{{
		name:  "passes",
		files: map[string]string{"a/a_test.go": header + passes, "b/b.go": "package b\n"},
		last:  "1 passed, 0 failed, 0 skipped",
		want:  []string{"ok  \tx/a", "x/b\t[no test files]"},
		not:   []string{"of no interest", "PASS"},
	}, {
		name: "fails in a subtest, which counts once",
		files: map[string]string{"a/a_test.go": header + passes + `
func TestBad(t *testing.T) {
	t.Run("one", func(t *testing.T) { t.Error("boom") })
	t.Run("two", func(t *testing.T) { t.Log("quiet") })
}`},
		code: 1, last: "2 passed, 1 failed, 0 skipped",
		want: []string{"boom", "--- FAIL: TestBad/one", "FAIL\tx/a"},
		not:  []string{"quiet", "of no interest"},
	}, {
		name:  "fails beside its subtests",
		files: map[string]string{"a/a_test.go": header + `func TestBad(t *testing.T) { t.Run("one", func(t *testing.T) {}); t.Error("boom") }`},
		code:  1, last: "1 passed, 1 failed, 0 skipped", want: []string{"boom"},
	}, {
		name:  "does not build",
		files: map[string]string{"a/a_test.go": header + passes, "b/b_test.go": "package b\n\nvar x int = \"s\"\n"},
		code:  1, last: "1 passed, 1 failed, 0 skipped",
		want: []string{"b_test.go:3", "as int value", "FAIL\tx/b [build failed]"},
	}, {
		name:  "panics",
		files: map[string]string{"a/a_test.go": header + passes + "func TestP(t *testing.T) { panic(\"here\") }\nfunc TestZ(t *testing.T) {}\n"},
		code:  1, last: "1 passed, 1 failed, 0 skipped", want: []string{"panic: here", "a_test.go:8"},
	}, {
		name:  "ends outside of its tests",
		files: map[string]string{"a/a_test.go": header + passes + "func TestMain(m *testing.M) { println(\"lost\"); os.Exit(3) }\n"},
		code:  1, last: "0 passed, 1 failed, 0 skipped", want: []string{"lost"},
	}, {
		name:  "no tests",
		files: map[string]string{"a/a.go": "package a\n"},
		code:  1, last: "0 passed, 0 failed, 0 skipped", want: []string{"no test ran"},
	}, {
		name:  "no packages",
		files: map[string]string{"a/a.go": "package a\n\nimport \"x/none\"\n"},
		code:  1, last: "0 passed, 1 failed, 0 skipped", want: []string{"x/none"},
	}, {
		name:  "skip that is not listed",
		files: map[string]string{"a/a_test.go": header + passes + "func TestS(t *testing.T) { t.Skip(\"no moon\") }\n"},
		code:  1, last: "1 passed, 0 failed, 1 skipped", want: []string{"not listed", "x/a TestS: a_test.go:8: no moon"},
	}, {
		name:  "skip that is listed, and one that did not occur",
		files: map[string]string{"a/a_test.go": header + passes + "func TestS(t *testing.T) { t.Run(\"deep\", func(t *testing.T) { t.Skip(\"no moon\") }) }\n"},
		skips: "# comment\n\nx/a TestS/deep needs a moon\nx/a TestOK is odd\nx/other TestT is elsewhere\n",
		last:  "1 passed, 0 failed, 1 skipped",
		want:  []string{"as listed: x/a TestS/deep", "listed as skipped, but was not: x/a TestOK"},
		not:   []string{"TestT"},
	}, {
		name:  "list without a reason",
		files: map[string]string{"a/a_test.go": header + passes},
		skips: "x/a TestOK\n",
		code:  1, last: "report: read the list of skips: line 1: want a package, a test and a reason",
	}, {
		name:  "hangs",
		files: map[string]string{"a/a_test.go": header + passes + "func TestH(t *testing.T) { time.Sleep(time.Hour) }\n"},
		limit: 6 * time.Second,
		code:  1, last: "1 passed, 1 failed, 0 skipped", want: []string{"stopped after 6s"},
	}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			module(t, tt.files)
			skips := ""
			if tt.skips != "" {
				skips = filepath.Join(t.TempDir(), "skips")
				if err := os.WriteFile(skips, []byte(tt.skips), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			var out bytes.Buffer
			if code := run([]string{"./..."}, skips, tt.limit, &out); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			text := strings.TrimSuffix(out.String(), "\n")
			if last := text[strings.LastIndexByte(text, '\n')+1:]; last != tt.last {
				t.Errorf("last line %q, want %q", last, tt.last)
			}
			for _, w := range tt.want {
				if !strings.Contains(text, w) {
					t.Errorf("the output lacks %q", w)
				}
			}
			for _, n := range tt.not {
				if strings.Contains(text, n) {
					t.Errorf("the output holds %q", n)
				}
			}
			if t.Failed() {
				t.Logf("output:\n%s", text)
			}
		})
	}
}
