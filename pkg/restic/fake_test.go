package restic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fake returns a repository whose restic program is a shell script, in
// which $1 is the sub-command.
func fake(t *testing.T, env map[string]string, script string) *Repository {
	t.Helper()
	program := filepath.Join(t.TempDir(), "restic")
	if err := os.WriteFile(program, []byte("#!/bin/sh\nall=\"$*\"\nshift 2 # --json --no-cache\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{"RESTIC_REPOSITORY": "/nowhere", "RESTIC_PASSWORD": "geheim"}
	for k, v := range env {
		all[k] = v
	}
	r, err := Open(Config{Program: program, Env: all})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestExitCodes(t *testing.T) {
	for _, test := range []struct {
		script string
		want   error
		code   int
		text   string
	}{
		{script: `exit 0`},
		{`exit 1`, ErrFailed, 1, "restic failed"},
		{`echo 'panic: oh' >&2; exit 2`, ErrFailed, 2, "panic: oh"},
		{`exit 3`, ErrFailed, 3, ""}, // the command is init
		{`printf '%s\n' '{"message_type":"exit_error","code":10,"message":"Fatal: a\nb"}' >&2; exit 10`, ErrNoRepository, 10, ": a; b (check RESTIC_REPOSITORY"},
		{`exit 11`, ErrLocked, 11, "stale after 30 minutes"},
		{`exit 12`, ErrWrongPassword, 12, "key RESTIC_PASSWORD"},
		{`exit 130`, ErrInterrupted, 130, ""},
		{`exit 77`, ErrFailed, 77, ""},
		{`kill -9 $$`, ErrInterrupted, -1, "memory limit"},
		{`printf '%s\n' '{"message_type":"exit_error","code":1,"message":"oh\nmain.f\n\t/a/b.go:3\nmain.g"}' >&2; exit 1`, ErrFailed, 1, "restic init: restic failed: oh"},
		{`echo 'dial tcp: lookup x: no such host' >&2; exit 1`, ErrFailed, 1, "DNS"},
		{`echo 'dial tcp: connection refused' >&2; exit 1`, ErrFailed, 1, "network policies"},
		{`echo 'open /srv: read-only file system' >&2; exit 1`, ErrFailed, 1, "cannot be written"},
		{`echo 'open /srv: permission denied' >&2; exit 1`, ErrFailed, 1, "who may"},
		{`echo 'write /srv: no space left on device' >&2; exit 1`, ErrFailed, 1, "free space"},
	} {
		t.Run(test.script, func(t *testing.T) {
			err := fake(t, nil, test.script).Init(t.Context())
			if test.want == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var e *Error
			if !errors.As(err, &e) || !errors.Is(err, test.want) || e.ExitCode != test.code || !strings.Contains(err.Error(), test.text) {
				t.Errorf("%v, want %v with code %d and %q", err, test.want, test.code, test.text)
			}
			for _, other := range []error{ErrNoRepository, ErrLocked, ErrWrongPassword, ErrIncomplete, ErrInterrupted, ErrFailed} {
				if other != test.want && errors.Is(err, other) {
					t.Errorf("%v is %v too", err, other)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("not one line: %q", err)
			}
			if e.NoSpace() != strings.Contains(test.script, "no space") {
				t.Errorf("NoSpace %v", e.NoSpace())
			}
		})
	}
}

// Output that restic would never produce ends as an error, not as a success.
func TestNonsense(t *testing.T) {
	for _, script := range []string{``, `echo '{"message_type":"summary"}x'`, `echo '{'`, `echo '[]'`, `head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2`} {
		r := fake(t, nil, script)
		if _, err := r.Backup(t.Context(), BackupRequest{Dir: "/"}, nil); !errors.Is(err, ErrFailed) {
			t.Errorf("%q: backup: %v", script, err)
		}
		if _, err := r.Restore(t.Context(), RestoreRequest{Dir: "/", SnapshotID: strings.Repeat("a", 64)}, nil); !errors.Is(err, ErrFailed) {
			t.Errorf("%q: restore: %v", script, err)
		}
	}
	if _, err := fake(t, nil, `echo '{"message_type":"error","item":"/tmp/x","error":{"message":"bad"}}' >&2; exit 3`).Backup(t.Context(), BackupRequest{Dir: "/tmp"}, nil); !errors.Is(err, ErrIncomplete) {
		t.Errorf("incomplete without a summary: %v", err)
	}
	r := fake(t, nil, `exit 0`)
	r.config.Program = "/nonexistent"
	var e *Error
	if err := r.Init(t.Context()); !errors.Is(err, ErrFailed) || !errors.As(err, &e) || e.ExitCode != -1 {
		t.Errorf("missing program: %v", err)
	}
}

func TestItems(t *testing.T) {
	dir := t.TempDir()
	r := fake(t, nil, `i=0
while [ $i -lt 8 ]; do printf '%s\n' '{"message_type":"error","item":"'$PWD/data/f$i'","error":{"message":"read \u001b[31m\u000a'$PWD': permission denied"}}' >&2; i=$((i+1)); done
echo '{"message_type":"exit_error","code":3,"message":"Warning: at least one source file could not be read"}' >&2
echo '{"message_type":"summary","snapshot_id":"abc","total_files_processed":5}'
exit 3`)
	summary, err := r.Backup(t.Context(), BackupRequest{Dir: dir}, nil)
	var e *Error
	if !errors.As(err, &e) || !errors.Is(err, ErrIncomplete) || summary == nil || summary.SnapshotID != "abc" {
		t.Fatal(summary, err)
	}
	if diff := cmp.Diff([]string{"data/f0", "data/f1", "data/f2", "data/f3", "data/f4"}, e.Paths); diff != "" {
		t.Error(diff)
	}
	if strings.Contains(e.Hint, "repository") || strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("%q", err)
	}
	if !strings.Contains(e.Message, "data/f0: read") || !strings.Contains(e.Message, "and 7 more") {
		t.Error(e.Message)
	}
}

// Restic gets what it needs and nothing else of our own environment.
func TestEnvironment(t *testing.T) {
	t.Setenv("AWS_SECRET_ACCESS_KEY", "the controller's")
	t.Setenv("OS_PASSWORD", "the controller's")
	t.Setenv("PWD", "/")
	out := filepath.Join(t.TempDir(), "env")
	r := fake(t, map[string]string{"AWS_ACCESS_KEY_ID": "id"}, `tr '\0' '\n' </proc/$$/environ >`+out)
	if err := r.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for line := range strings.Lines(string(data)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		got[k] = v
	}
	want := map[string]string{
		"LC_ALL": "C", "TZ": "UTC", "HOME": "/nonexistent", "PATH": os.Getenv("PATH"), "TMPDIR": os.TempDir(),
		"RESTIC_PROGRESS_FPS": "2", "RESTIC_FEATURES": "device-id-for-hardlinks=true",
		"RESTIC_REPOSITORY": "/nowhere", "RESTIC_PASSWORD": "geheim", "AWS_ACCESS_KEY_ID": "id",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Whatever restic prints, no secret is in an error.
func TestSecrets(t *testing.T) {
	secrets := map[string]string{
		"RESTIC_PASSWORD":       `p&ss "word" ü%/`,
		"AWS_SECRET_ACCESS_KEY": "aws+secret/key==",
		"AZURE_ACCOUNT_SAS":     "?sv=2020&sig=abc%2Fdef",
		"OS_AUTH_TOKEN":         "multi\nline-token",
		"HTTPS_PROXY":           "http://proxyuser:pr0xy@proxy:3128",
		"RESTIC_REPOSITORY":     "rest:https://user:t%40ken@host/repo",
	}
	hidden := []string{
		`p&ss "word"`, `p&ss \"word\"`, "p%26ss", "aws+secret", "aws%2Bsecret", "sig=abc", "line-token",
		"pr0xy@", "t%40ken", "t@ken", "user:t",
	}
	for _, script := range []string{
		`env >&2; exit 1`,
		`printf '%s\n' '{"message_type":"exit_error","code":1,"message":"p&ss \"word\" ü%/ and p&ss \\\"word\\\" ü%/"}' >&2; exit 1`,
		`printf '%s\n' '{"message_type":"error","item":"/p&ss \"word\" ü%/","error":{"message":"Get \"https://user:t%40ken@host/?k=aws%2Bsecret%2Fkey%3D%3D\" t@ken"}}' >&2; exit 1`,
		`echo 'p%26ss+%22word%22+%C3%BC%25%2F p%26ss%20%22word%22%20%C3%BC%25%2F' >&2; kill -9 $$`,
		`echo "bad: $AWS_SECRET_ACCESS_KEY $AZURE_ACCOUNT_SAS" >&2; exec sleep 100`,
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err := fake(t, secrets, script).Init(ctx)
		cancel()
		var e *Error
		if !errors.As(err, &e) {
			t.Fatal(err)
		}
		text := fmt.Sprintf("%s %v %+v %#v", err, err, *e, *e)
		for _, s := range hidden {
			if strings.Contains(text, s) {
				t.Errorf("%s: %q is in %s", script, s, text)
			}
		}
		if !strings.Contains(err.Error(), "***") {
			t.Errorf("%s: nothing was removed: %v", script, err)
		}
	}
	// A login name of ssh is not a secret.
	r := fake(t, map[string]string{"RESTIC_REPOSITORY": "sftp://backup@host/repo"}, `echo no backup here >&2; exit 1`)
	if err := r.Init(t.Context()); !strings.Contains(err.Error(), "no backup here") {
		t.Error(err)
	}
}

func TestArguments(t *testing.T) {
	out := filepath.Join(t.TempDir(), "args")
	r := fake(t, nil, `echo "$all $(pwd)" >`+out+`
case $1 in
snapshots) echo '[{"id":"new","time":"2026-02-01T00:00:00Z"},{"id":"old","time":"2026-01-01T00:00:00Z","summary":{"total_files_processed":7}}]';;
find) echo '[{"snapshot":"a"},{"snapshot":"b"},{"snapshot":"a"}]';;
*) echo '{"message_type":"summary","snapshot_id":"x","total_size":7}';;
esac`)
	id := strings.Repeat("0f", 32)
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))
	for _, test := range []struct {
		call func(ctx context.Context) error
		want string
	}{
		{r.Init, "--json --no-cache init --repository-version=2 /"},
		{r.Unlock, "--json --no-cache unlock /"},
		{r.RepairIndex, "--json --no-cache repair index /"},
		{func(ctx context.Context) error { return r.Check(ctx, CheckRequest{}) }, "--json --no-cache check --retry-lock=0s --no-lock /"},
		{func(ctx context.Context) error {
			return r.Check(ctx, CheckRequest{Part: 3, Parts: 16, Exclusive: true, RetryLock: time.Minute})
		}, "--json --no-cache check --retry-lock=1m0s --read-data-subset=3/16 /"},
		{func(ctx context.Context) error { return r.Prune(ctx, PruneRequest{}) }, "--json --no-cache prune --retry-lock=0s /"},
		{func(ctx context.Context) error {
			return r.Prune(ctx, PruneRequest{MaxUnused: "1%", MaxRepackSize: "1G", RetryLock: time.Second})
		}, "--json --no-cache prune --retry-lock=1s --max-unused=1% --max-repack-size=1G /"},
		{func(ctx context.Context) error {
			size, err := r.Size(ctx)
			if size != 7 {
				t.Error(size)
			}
			return err
		}, "--json --no-cache stats --mode=raw-data --no-lock /"},
		{func(ctx context.Context) error {
			users, err := r.Users(ctx, id)
			if strings.Join(users, " ") != "a b" {
				t.Error(users)
			}
			return err
		}, "--json --no-cache find --no-lock --pack " + id + " /"},
		{func(ctx context.Context) error {
			_, err := r.Dump(ctx, id, "/x")
			return err
		}, "--json --no-cache dump --no-lock " + id + " /x /"},
		{func(ctx context.Context) error { return r.Forget(ctx, time.Minute, id) }, "--json --no-cache forget --retry-lock=1m0s " + id + " /"},
		{func(ctx context.Context) error {
			_, err := r.Backup(ctx, BackupRequest{Dir: "/tmp", Targets: []string{"data", "-x"}, Host: "ns/claim", Tags: []string{"a=1", "b=2"}, Time: at, RetryLock: time.Second}, nil)
			return err
		}, "--json --no-cache backup --host=ns/claim --retry-lock=1s --tag=a=1 --tag=b=2 --time=2026-01-02 02:04:05 --force -- data -x /tmp"},
		{func(ctx context.Context) error {
			_, err := r.Backup(ctx, BackupRequest{Dir: "/", Host: "h", Parent: id}, nil)
			return err
		}, "--json --no-cache backup --host=h --retry-lock=0s --parent=" + id + " -- /"},
		{func(ctx context.Context) error {
			_, err := r.Backup(ctx, BackupRequest{Dir: "/", Host: "h", Parent: id, IgnoreInode: true}, nil)
			return err
		}, "--json --no-cache backup --host=h --retry-lock=0s --parent=" + id + " --ignore-inode -- /"},
		{func(ctx context.Context) error {
			_, err := r.Restore(ctx, RestoreRequest{SnapshotID: id, Dir: "/tmp"}, nil)
			return err
		}, "--json --no-cache restore --target=/tmp --sparse --verify --retry-lock=0s " + id + " /tmp"},
		{func(ctx context.Context) error {
			list, err := r.Snapshots(ctx, "a", "b")
			if len(list) != 2 || list[0].ID != "old" || list[0].Summary.TotalFiles != 7 || list[1].Summary != nil {
				t.Errorf("not oldest first: %+v", list)
			}
			return err
		}, "--json --no-cache snapshots --no-lock --tag=a,b /"},
	} {
		if err := test.call(t.Context()); err != nil {
			t.Errorf("%s: %v", test.want, err)
		}
		got, _ := os.ReadFile(out)
		if diff := cmp.Diff(test.want, strings.TrimSpace(string(got))); diff != "" {
			t.Error(diff)
		}
	}

	os.Remove(out)
	if err := r.Forget(t.Context(), 0); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"latest", "", id[:8], "--unsafe-allow-remove-all"} {
		if err := r.Forget(t.Context(), 0, id, bad); err == nil {
			t.Errorf("forgot %q", bad)
		}
		if _, err := r.Restore(t.Context(), RestoreRequest{SnapshotID: bad, Dir: "/"}, nil); err == nil {
			t.Errorf("restored %q", bad)
		}
	}
	if _, err := r.Backup(t.Context(), BackupRequest{Dir: "/", Tags: []string{"a,b"}}, nil); err == nil {
		t.Error("a comma in a tag")
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("restic was started")
	}
}

func TestProgress(t *testing.T) {
	r := fake(t, nil, `echo '{"message_type":"status","seconds_elapsed":4,"total_files":9,"files_done":3,"total_bytes":1000,"bytes_done":400}'
echo '{"message_type":"status","seconds_elapsed":2,"total_files":9,"files_restored":3,"total_bytes":1000,"bytes_restored":400}'
echo '{"message_type":"status"}'
printf '{"message_type":"summary","total_files":9,"files_restored":7,"files_skipped":2,"total_bytes":5,"bytes_restored":4,"bytes_skipped":1}'`)
	var got []Progress
	summary, err := r.Restore(t.Context(), RestoreRequest{SnapshotID: strings.Repeat("a", 64), Dir: "/"}, func(p Progress) { got = append(got, p) })
	if err != nil {
		t.Fatal(err)
	}
	want := []Progress{{400, 1000, 3, 9, 100, ""}, {400, 1000, 3, 9, 200, ""}, {}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(&RestoreSummary{9, 7, 5, 4, 2, 1}, summary); diff != "" {
		t.Error(diff)
	}
}

// TestTrouble: what restic complains of is told until it moves on.
func TestTrouble(t *testing.T) {
	r := fake(t, nil, `status() { echo '{"message_type":"status","total_bytes":1000,"bytes_done":'$1'}'; sleep 0.2; }
status 400
echo 'Save(<data/5f>) returned error, retrying after 1.08s: 500 No room' >&2; sleep 0.2
status 400
status 500
echo '{"message_type":"summary","snapshot_id":"x"}'`)
	var got []string
	if _, err := r.Backup(t.Context(), BackupRequest{Dir: "/"}, func(p Progress) { got = append(got, p.Trouble) }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"", "Save(<data/5f>) failed: 500 No room", "Save(<data/5f>) failed: 500 No room", ""}, got); diff != "" {
		t.Error(diff)
	}
	// Before it has opened the repository, it says nothing else.
	r = fake(t, nil, `echo 'Load(<config/>) returned error, retrying after 1.08s: connection refused' >&2; exit 1`)
	got = nil
	_, err := r.Backup(t.Context(), BackupRequest{Dir: "/"}, func(p Progress) { got = append(got, p.Trouble) })
	if diff := cmp.Diff([]string{"Load(<config/>) failed: connection refused"}, got); err == nil || diff != "" {
		t.Error(err, diff)
	}
}

// A cancelled call asks restic to end first, and leaves no process.
func TestCancel(t *testing.T) {
	dir := t.TempDir()
	r := fake(t, nil, `trap 'echo asked >`+dir+`/asked; exit 130' INT; echo $$ >`+dir+`/pid; while :; do sleep 0.05; done`)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for {
			if data, err := os.ReadFile(dir + "/pid"); err == nil && len(data) > 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
	}()
	err := r.Init(ctx)
	if !errors.Is(err, ErrInterrupted) || !errors.Is(err, context.Canceled) || errors.Is(err, ErrFailed) {
		t.Error(err)
	}
	if _, err := os.Stat(dir + "/asked"); err != nil {
		t.Error("restic was not asked to end")
	}
	var pid int
	data, _ := os.ReadFile(dir + "/pid")
	fmt.Sscan(string(data), &pid)
	if err := syscall.Kill(pid, 0); err != syscall.ESRCH {
		t.Errorf("process %d: %v", pid, err)
	}
	if err := r.Init(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("already cancelled: %v", err)
	}
}

// A lock on an extra file lasts as long as the restic process.
func TestExtraFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	r := fake(t, nil, `readlink /proc/$$/fd/3 >&2; exit 1`)
	r.config.ExtraFiles = []*os.File{f}
	if err := r.Init(t.Context()); !strings.Contains(err.Error(), path) {
		t.Error(err)
	}
}

func TestVersionMismatch(t *testing.T) {
	r := fake(t, nil, `echo '{"message_type":"version","version":"0.12.0"}'`)
	err := CheckVersion(t.Context(), r.config.Program)
	if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "0.12.0") || !strings.Contains(err.Error(), PinnedVersion) {
		t.Error(err)
	}
	for _, program := range []string{"/nonexistent", "/bin/true", "/bin/false"} {
		if err := CheckVersion(t.Context(), program); !errors.Is(err, ErrVersion) {
			t.Errorf("%s: %v", program, err)
		}
	}
}
