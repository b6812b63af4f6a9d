package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/restic"
)

func TestDemoUnits(t *testing.T) {
	got := []string{
		backup.Bytes(0), backup.Bytes(1023), backup.Bytes(1024), backup.Bytes(300 << 20), backup.Bytes(1023 << 20), backup.Bytes(5 << 40), backup.Bytes(1 << 60),
		demoDuration(0.0004), demoDuration(0.25), demoDuration(0.9999), demoDuration(12.34), demoDuration(119.99), demoDuration(3601),
		demoCount(0), demoCount(999), demoCount(1000), demoCount(1234567),
	}
	want := []string{
		"0 B", "1023 B", "1.0 KiB", "300.0 MiB", "1.0 GiB", "5.0 TiB", "1048576.0 TiB",
		"0 ms", "250 ms", "1.0 s", "12.3 s", "2 min 00 s", "60 min 01 s",
		"0", "999", "1,000", "1,234,567",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("units (-want +got):\n%s", diff)
	}
}

func TestDemoPrinter(t *testing.T) {
	var b bytes.Buffer
	p := newDemoPrinter(&b)
	p.total = 2
	p.begin("Do it")
	p.progress(restic.Progress{BytesDone: 1, BytesTotal: 2})
	p.waiting("so far")
	p.end(demoStep{Name: "do", Result: "did"})
	p.table([]demoStep{{Name: "do", Seconds: 1.5, Result: "did"}, {Name: "a long name", Seconds: 0.01, Error: "no"}}, 2*time.Second)
	want := ` 1/2  Do it
       did

step          took  result
do           1.5 s  did
a long name  10 ms  FAILED
all          2.0 s  FAILED
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("a pipe gets (-want +got):\n%s", diff)
	}

	b.Reset()
	p.lastLine = time.Now().Add(-quietEvery)
	p.progress(restic.Progress{BytesDone: 3 << 20, BytesTotal: 4 << 20, FilesDone: 1000, FilesTotal: 2000, Rate: 2048})
	p.progress(restic.Progress{BytesDone: 4 << 20, BytesTotal: 4 << 20})
	if got, want := b.String(), "        75 %  3.0 MiB of 4.0 MiB, 1,000 of 2,000 files, 2.0 KiB/s\n"; got != want {
		t.Errorf("progress in a pipe: %q, want %q", got, want)
	}

	b.Reset()
	p.terminal, p.width = true, 100
	p.progress(restic.Progress{BytesDone: 1, BytesTotal: 2})
	p.end(demoStep{})
	if got := b.String(); !strings.Contains(got, "[###############---------------]") || !strings.HasSuffix(got, "\r\x1b[K") {
		t.Errorf("progress on a terminal: %q", got)
	}
	for _, width := range []int{10, 40, 60, 61, 100} {
		b.Reset()
		p.width = width
		p.progress(restic.Progress{BytesDone: 1 << 30, BytesTotal: 2 << 30, FilesTotal: 1e6})
		if line := strings.TrimSuffix(b.String(), "\x1b[K"); len(line) > width {
			t.Errorf("a terminal of %d columns gets %d: %q", width, len(line), line)
		} else if width >= 40 && (!strings.Contains(line, "#####-----") || !strings.Contains(line, "50 %")) {
			t.Errorf("a terminal of %d columns shows no bar: %q", width, line)
		}
	}
}

// buildDemo builds the program, which the demonstration starts again as its
// server, and returns it with the pinned restic.
func buildDemo(t *testing.T) (abaca, program string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("the demonstration mounts: needs root")
	}
	program, err := filepath.Abs("../../bin/restic")
	if err != nil {
		t.Fatal(err)
	}
	if !exists(program) {
		t.Fatalf("%s is missing: run make bin/restic", program)
	}
	abaca = filepath.Join(t.TempDir(), "abaca")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", abaca, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return abaca, program
}

// nothingBelow fails the test when something is left of a run in dir.
func nothingBelow(t *testing.T, dir string) {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left in %s: %v, %v", dir, entries, err)
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(b), dir) {
		t.Errorf("a mount is left below %s: %v\n%s", dir, err, b)
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir) {
			t.Errorf("a loop device is left: %s: %s", f, b)
		}
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range commands {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), dir) {
			t.Errorf("a process is left: %s: %q", f, b)
		}
	}
}

func TestDemo(t *testing.T) {
	abaca, program := buildDemo(t)

	t.Run("whole", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		cmd := exec.CommandContext(t.Context(), abaca, "demo", "--small", "--dir", dir, "--restic", program, "-o", "json", "--keep")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("demo: %v\n%s", err, stderr.String())
		}
		var report struct {
			OK         bool
			Repository string
			Steps      []demoStep
		}
		if err := json.Unmarshal(stdout.Bytes(), &report); err != nil || !report.OK || len(report.Steps) != 12 {
			t.Fatalf("report %+v, %v\n%s", report, err, stdout.String())
		}
		for _, s := range report.Steps {
			if s.Error != "" || s.Result == "" {
				t.Errorf("step %+v", s)
			}
		}
		if !exists(filepath.Join(report.Repository, "config")) {
			t.Errorf("--keep has left no repository at %q", report.Repository)
		}
		if strings.Contains(stderr.String(), "\x1b") {
			t.Errorf("a pipe gets control characters:\n%q", stderr.String())
		}
		if err := os.RemoveAll(filepath.Dir(report.Repository)); err != nil {
			t.Fatal(err)
		}
		nothingBelow(t, dir)
	})

	for _, tt := range []struct {
		name  string
		title string // the step in which it happens
		after time.Duration
		do    func(t *testing.T, cmd *exec.Cmd)
		want  string
		code  int
	}{
		{"Ctrl-C while it starts", "Start abaca standalone", 0, signalTo(syscall.SIGINT), "interrupted", 130},
		{"Ctrl-C in a backup", "Back the share up", 300 * time.Millisecond, signalTo(syscall.SIGINT), "interrupted", 130},
		{"SIGTERM in a restore", "Restore the second", 700 * time.Millisecond, signalTo(syscall.SIGTERM), "interrupted", 130},
		{"the server is killed", "Back the share up", 300 * time.Millisecond, killServer, "abaca standalone has ended: signal: killed", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			cmd := exec.CommandContext(t.Context(), abaca, "demo", "--small", "--dir", dir, "--restic", program)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var all strings.Builder
			happened := false
			for lines := bufio.NewScanner(out); lines.Scan(); {
				all.WriteString(lines.Text() + "\n")
				if !happened && strings.Contains(lines.Text(), tt.title) {
					happened = true
					time.Sleep(tt.after)
					tt.do(t, cmd)
				}
			}
			err = cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != tt.code {
				t.Errorf("it ended with %v, want exit code %d", err, tt.code)
			}
			if !happened || !strings.Contains(stderr.String(), tt.want) {
				t.Errorf("happened: %v; stderr %q lacks %q", happened, stderr.String(), tt.want)
			}
			nothingBelow(t, dir)
			if t.Failed() {
				t.Logf("output:\n%s", all.String())
			}
		})
	}
}

func signalTo(s syscall.Signal) func(*testing.T, *exec.Cmd) {
	return func(t *testing.T, cmd *exec.Cmd) {
		if err := cmd.Process.Signal(s); err != nil {
			t.Error(err)
		}
	}
}

// killServer kills the abaca standalone that a demonstration has started.
func killServer(t *testing.T, cmd *exec.Cmd) {
	dir := ""
	for i, arg := range cmd.Args {
		if arg == "--dir" {
			dir = cmd.Args[i+1]
		}
	}
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Error(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || !strings.Contains(string(b), "\x00standalone\x00") || !strings.Contains(string(b), dir) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err != nil {
			t.Error(err)
		}
		return
	}
	t.Error("there is no server to kill")
}
