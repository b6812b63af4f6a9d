package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestRefusedStarts: what is wrong with a command line is said before anything
// is made.
func TestRefusedStarts(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	state := filepath.Join(dir, "state")
	config := write("config.yaml", "backends: [{name: local, local: {path: "+state+", size: 10Ki}}]")
	old := write("restic", "#!/bin/sh\necho restic 0.14.0 compiled with go1.19\n")
	for line, words := range map[string][]string{
		"standalone --endpont x": {`"endpoint"`, "--help"},
		"standlone":              {"standalone"},
		"standalone":             {"required", "endpoint", "config", "node-id"},
		"standalone --endpoint unix:///x --config " + config + " --node-id a/b":                 {"--node-id", "letters"},
		"standalone --endpoint unix:///x --config " + config + " --node-id a --zone -":          {"--zone"},
		"standalone --endpoint unix:///x --config " + config + " --node-id a --restic " + old:   {"0.14.0", "0.19.1", "--any-restic-version"},
		"standalone --endpoint unix:///x --config " + config + " --node-id a --restic /nowhere": {"/nowhere", "--restic"},
		"standalone --endpoint unix:///x --config " + config + " --node-id a":                   {"10Ki", "256Mi"},
		"demo --source " + config: {"--source", "directory"},
		"mover":                   {"required", "repository"},
	} {
		root := newCommand()
		root.SetArgs(strings.Fields(line))
		err := root.ExecuteContext(context.Background())
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("abaca %s: %v; it does not speak of %s", line, err, w)
			}
		}
	}
	if _, err := os.Stat(state); err == nil {
		t.Error("something was made all the same")
	}
}

// TestManilaConfig: what can be wrong about a cloud in the configuration.
func TestManilaConfig(t *testing.T) {
	c, err := parseConfig([]byte("backends: [{name: m, manila: {clouds: /c.yaml, cloud: x}}, {name: l, local: {path: /l}}]"))
	if err != nil || c.Backends[0].Manila.Cloud != "x" || c.Backends[0].Local != nil || c.Backends[1].Local.Path != "/l" {
		t.Errorf("%+v, %v", c, err)
	}
	for text, words := range map[string]string{
		"{name: m}": "either local or manila",
		"{name: m, local: {path: /l}, manila: {clouds: /c, cloud: x}}": "either local or manila",
		"{name: m, manila: {clouds: c.yaml, cloud: x}}":                "absolute path",
		"{name: m, manila: {clouds: /c.yaml}}":                         "name of a cloud",
		"{name: m, manila: {clouds: /c.yaml, cluod: x}}":               `"cloud"`,
		"{name: m, manila: {clouds: /c.yaml, cloud: x, instance: 3}}":  "instance",
	} {
		if _, err := parseConfig([]byte("backends: [" + text + "]")); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v does not speak of %s", text, err, words)
		}
	}
}

// TestRequiredFlagsAreMarked: the help says what must be given.
func TestRequiredFlagsAreMarked(t *testing.T) {
	for _, cmd := range newCommand().Commands() {
		for _, name := range []string{"endpoint", "config", "node-id", "repository"} {
			f := cmd.Flags().Lookup(name)
			if cmd.Name() == "node" && name == "config" {
				continue // it may know no backend
			}
			if f != nil && !strings.HasSuffix(f.Usage, "(required)") {
				t.Errorf("%s --%s: %s", cmd.Name(), name, f.Usage)
			}
		}
	}
}

func TestKeysAreWhereTheyAreSaidToBe(t *testing.T) {
	dir := t.TempDir()
	if _, err := openKeys(dir, nil); err != nil {
		t.Error(err)
	}
	if o, err := keyReader(dir, nil); err != nil || o.Keys != dir || o.Key != nil {
		t.Error(o, err)
	}
	for _, where := range []string{"secret:", "secret:a", "secret:/b", "secret:a/", "secret:a/b/c"} {
		if _, err := keyReader(where, nil); err == nil || !strings.Contains(err.Error(), "NAMESPACE/NAME") {
			t.Errorf("%s: %v", where, err)
		}
	}
	if _, err := openKeys("secret:a/b", nil); err == nil { // this is no pod
		t.Error("opened a Secret without a cluster")
	}
}

// TestSocketMode: only root can connect, or the group that the socket's
// directory was made for.
func TestSocketMode(t *testing.T) {
	for mode, want := range map[os.FileMode]os.FileMode{0o755: 0o600, 0o777: 0o600, os.ModeSetgid | 0o770: 0o660} {
		dir := t.TempDir()
		const group = 65532
		if err := errors.Join(os.Chown(dir, 0, group), os.Chmod(dir, mode)); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "csi.sock")
		l, err := listen(t.Context(), "unix://"+path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		gid := info.Sys().(*syscall.Stat_t).Gid
		if info.Mode().Perm() != want || (gid == group) != (mode&os.ModeSetgid != 0) {
			t.Errorf("in a directory of mode %v: %v, group %d", mode, info.Mode(), gid)
		}
	}
}
