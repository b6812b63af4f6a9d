package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestMaintain: the command, over a real repository: what it prints, and with
// which code it ends.
func TestMaintain(t *testing.T) {
	restic, err := filepath.Abs("../../bin/restic")
	if err == nil {
		_, err = os.Stat(restic)
	}
	if err != nil {
		t.Fatalf("no restic program, run make build: %v", err)
	}
	dir := t.TempDir()
	folder, repo, file := filepath.Join(dir, "repositories", "offsite"), filepath.Join(dir, "repo"), filepath.Join(dir, "file")
	if err := errors.Join(os.MkdirAll(folder, 0o700), os.WriteFile(folder+"/RESTIC_REPOSITORY", []byte(repo), 0o600),
		os.WriteFile(folder+"/RESTIC_PASSWORD", []byte("geheim"), 0o600), os.WriteFile(file, bytes.Repeat([]byte("abaca"), 1<<16), 0o600)); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (out, errOut string, code int) {
		t.Helper()
		root := newCommand()
		var stdout, stderr bytes.Buffer
		root.SetOut(&stdout)
		root.SetErr(&stderr)
		root.SetArgs(append([]string{"maintain", "-v=0", "--repositories", filepath.Dir(folder), "--repository", "offsite", "--restic", restic, "--cache", dir + "/cache"}, args...))
		err := root.ExecuteContext(t.Context())
		var exit exitCode
		switch {
		case errors.As(err, &exit):
			code = int(exit)
		case err != nil:
			code = 1
			stderr.WriteString(err.Error())
		}
		return stdout.String(), stderr.String(), code
	}
	plain := func(args ...string) {
		t.Helper()
		cmd := exec.Command(restic, args...)
		cmd.Env = []string{"RESTIC_REPOSITORY=" + repo, "RESTIC_PASSWORD=geheim", "RESTIC_CACHE_DIR=" + dir + "/cache"}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if _, said, code := run(); code != 1 || !strings.Contains(said, "first backup makes the repository") {
		t.Errorf("without a repository: %d: %s", code, said)
	}
	if _, said, code := run("--no-check", "--no-prune"); code != 1 || !strings.Contains(said, "nothing would be done") {
		t.Errorf("%d: %s", code, said)
	}
	if _, said, code := run("--repository", "ofsite"); code != 1 || !strings.Contains(said, "known are offsite") {
		t.Errorf("%d: %s", code, said)
	}
	if _, said, code := run("--repositories", dir+"/none"); code != 1 || !strings.Contains(said, "--repositories "+dir+"/none is not a directory") {
		t.Errorf("%d: %s", code, said)
	}
	plain("init", "-q")
	plain("backup", "-q", "--tag", "abaca.backup=b1", "--tag", "abaca.volume=local/v", "--host", "shop/data", file)
	if out, said, code := run("--dry-run"); code != 0 || !strings.Contains(out, "reads 1/16") || said != "" {
		t.Errorf("dry run: %d: %s%s", code, out, said)
	}
	out, said, code := run("-o", "json")
	var result struct {
		ExitCode int
		Coverage float64
		Size     int64
		Steps    []struct{ Step, Status string }
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil || code != 0 || said != "" || len(result.Steps) != 3 || result.Coverage != 1.0/16 || result.Size == 0 {
		t.Errorf("%v, %d: %s%s", err, code, out, said)
	}
	// All of it in a day: the damage is in what is read now.
	packs, err := filepath.Glob(repo + "/data/*/*")
	if err != nil || len(packs) == 0 {
		t.Fatal(packs, err)
	}
	for _, p := range packs {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := errors.Join(os.Chmod(p, 0o600), os.WriteFile(p, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if out, said, code := run("--read-data-days", "1", "--no-prune"); code != 4 || !strings.Contains(out, "damaged") || said != "" {
		t.Errorf("damage: %d: %s%s", code, out, said)
	}
}
