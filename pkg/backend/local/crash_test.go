package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// A child is this test binary, started anew to run one operation and to be
// killed at its n-th crash point.
const (
	childOperation = "ABACA_LOCAL_TEST_OPERATION"
	childPath      = "ABACA_LOCAL_TEST_PATH"
	childSize      = "ABACA_LOCAL_TEST_SIZE"
	childCrash     = "ABACA_LOCAL_TEST_CRASH"
)

func TestMain(m *testing.M) {
	name := os.Getenv(childOperation)
	unix.Umask(0o077) // so that what must be more open says so
	if name == "" {
		os.Exit(m.Run())
	}
	size, _ := strconv.ParseInt(os.Getenv(childSize), 10, 64)
	n, _ := strconv.Atoi(os.Getenv(childCrash))
	die := func(point string) {
		if n--; n == 0 {
			fmt.Print(point)
			unix.Kill(os.Getpid(), unix.SIGKILL)
		}
	}
	if name == "open" {
		crash = die
	}
	b, err := Open(context.Background(), Options{Path: os.Getenv(childPath), Size: size, Node: "node-1"})
	if err == nil {
		crash = die
		err = operations[name](context.Background(), b)
	}
	if err != nil {
		fmt.Fprint(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func child(s *storage, operation string, crash int) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childOperation+"="+operation, childPath+"="+s.Path,
		childSize+"="+fmt.Sprint(s.Size), childCrash+"="+fmt.Sprint(crash))
	return cmd
}

// killed runs an operation in a child that is killed at its n-th crash point;
// the point is empty when there is none.
func (s *storage) killed(operation string, n int) (point string) {
	s.Helper()
	var stderr strings.Builder
	cmd := child(s, operation, n)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil && (out == nil || stderr.Len() > 0) {
		s.Fatalf("child %s: %v: %s", operation, err, &stderr)
	}
	return string(out)
}

var (
	base  = backend.CreateShareRequest{Name: "base", MinSize: 4 * mib, Role: backend.RoleUser, Draft: true}
	cut   = backend.CreateSnapshotRequest{Name: "cut", ShareID: idOf("base"), Role: backend.RoleUser}
	ofCut = backend.Target{SnapshotID: idOf("cut")}
)

// operations work on what resetStorage has made.
var operations = map[string]func(context.Context, *Backend) error{
	"open": func(context.Context, *Backend) error { return nil },
	"create share": func(ctx context.Context, b *Backend) error {
		_, err := b.CreateShare(ctx, backend.CreateShareRequest{Name: "new", MinSize: 4 * mib, Role: backend.RoleUser})
		return err
	},
	"clone": func(ctx context.Context, b *Backend) error {
		_, err := b.CreateShare(ctx, backend.CreateShareRequest{Name: "copy", MinSize: 8 * mib, FromSnapshot: idOf("cut"), Role: backend.RoleUser})
		return err
	},
	"create snapshot": func(ctx context.Context, b *Backend) error {
		_, err := b.CreateSnapshot(ctx, backend.CreateSnapshotRequest{Name: "new", ShareID: idOf("base"), Role: backend.RoleUser})
		return err
	},
	"commit": func(ctx context.Context, b *Backend) error { return b.CommitShare(ctx, idOf("base")) },
	"expand": func(ctx context.Context, b *Backend) error {
		_, err := b.ExpandShare(ctx, idOf("base"), 16*mib)
		return err
	},
	"export": func(ctx context.Context, b *Backend) error {
		_, err := b.Export(ctx, ofCut, "new")
		return err
	},
	"unexport":        func(ctx context.Context, b *Backend) error { return b.Unexport(ctx, ofCut, "reader") },
	"delete share":    func(ctx context.Context, b *Backend) error { return b.DeleteShare(ctx, idOf("base")) },
	"delete snapshot": func(ctx context.Context, b *Backend) error { return b.DeleteSnapshot(ctx, idOf("spare")) },
}

// resetStorage makes a draft "base" with two writers, its snapshots "cut", held
// by "reader", and "spare", and nothing else.
func resetStorage(s *storage, b *Backend) {
	s.Helper()
	ctx := s.Context()
	s.ok(b.Unexport(ctx, ofCut, "reader"))
	s.ok(b.Unexport(ctx, ofCut, "new"))
	for _, name := range []string{"base", "new", "copy"} {
		s.ok(b.DeleteShare(ctx, idOf(name)))
	}
	for _, name := range []string{"cut", "spare", "new"} {
		s.ok(b.DeleteSnapshot(ctx, idOf(name)))
	}
	_, err := b.CreateShare(ctx, base)
	s.ok(err)
	_, err = b.CreateSnapshot(ctx, cut)
	s.ok(err)
	spare := cut
	spare.Name = "spare"
	_, err = b.CreateSnapshot(ctx, spare)
	s.ok(err)
	_, err = b.Export(ctx, ofCut, "reader")
	s.ok(err)
	for _, writer := range []string{"writer-1", "writer-2"} {
		_, err := b.Export(ctx, backend.Target{ShareID: idOf("base")}, writer)
		s.ok(err)
	}
}

// summary is what there is, without what differs from run to run.
func summary(s *storage, b *Backend) string {
	s.Helper()
	var text strings.Builder
	shares, _, err := b.ListShares(s.Context(), "", 0)
	s.ok(err)
	for _, x := range shares {
		info, err := subvolumeAt(b.fs, "shares/"+x.ID)
		s.ok(err)
		limit := b.qgroupFile(fmt.Sprintf("0_%d/max_referenced", info.id))
		fmt.Fprintf(&text, "share %s size=%d limit=%s draft=%t from=%.4s problem=%q\n", x.Name, x.Size, limit, x.Draft, x.FromSnapshot, x.Problem)
	}
	snapshots, _, err := b.ListSnapshots(s.Context(), "", 0)
	s.ok(err)
	for _, x := range snapshots {
		fmt.Fprintf(&text, "snapshot %s size=%d\n", x.Name, x.Size)
	}
	exports, _, err := b.ListExports(s.Context(), "", 0)
	s.ok(err)
	for _, x := range exports {
		fmt.Fprintf(&text, "export %s of %s\n", x.Consumer, x.Target)
	}
	return text.String()
}

// TestKill kills every operation at every step. Whoever comes then, a process
// that was there all the time or a new one, ends in the state that the
// operation has when nobody kills it.
func TestKill(t *testing.T) {
	for name, operation := range operations {
		if name == "open" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			s := newStorage(t, MinImageSize)
			b := s.open()
			resetStorage(s, b)
			s.ok(operation(t.Context(), b))
			want := summary(s, b)
			points := 0
			for n := 1; ; n++ {
				resetStorage(s, b)
				point := s.killed(name, n)
				if point == "" {
					break
				}
				points++
				s.ok(operation(t.Context(), b))
				if got := summary(s, b); got != want {
					t.Errorf("killed at %q, then repeated:\n%s\nwant:\n%s", point, got, want)
				}
				s.audit(b)

				resetStorage(s, b)
				s.killed(name, n)
				again := s.open()
				s.audit(again) // before anybody repeats anything
				s.ok(operation(t.Context(), again))
				if got := summary(s, b); got != want {
					t.Errorf("killed at %q, opened, then repeated:\n%s\nwant:\n%s", point, got, want)
				}
				s.audit(b)
				s.ok(again.Close())
			}
			if points == 0 {
				t.Error("nothing was ever killed")
			}
		})
	}
}

// TestKillOpen kills the making of an image and its growth.
func TestKillOpen(t *testing.T) {
	needKernel(t)
	t.Parallel()
	points := map[string]bool{}
	for n := 1; ; n++ {
		s := &storage{t, Options{Path: filepath.Join(t.TempDir(), "storage"), Size: MinImageSize}}
		t.Cleanup(s.detach)
		point := s.killed("open", n)
		points[point] = true
		b := s.open()
		s.share(b, "data", mib)
		b.Close()
		grown := *s
		grown.Size = 2 * MinImageSize
		for m := 1; grown.killed("open", m) != ""; m++ {
			points["grow"] = true
		}
		b = grown.open()
		if c, err := b.Capacity(t.Context()); err != nil || c.MaxShareSize != grown.Size {
			t.Errorf("killed at %q: grown to %+v, error %v", point, c, err)
		}
		s.audit(b)
		if entries, err := filepath.Glob(filepath.Join(s.Path, "*")); err != nil || len(entries) != 3 {
			t.Errorf("killed at %q: left %q, error %v", point, entries, err)
		}
		s.ok(b.Close())
		s.detach()
		if point == "" {
			break
		}
	}
	if len(points) < 5 {
		t.Errorf("killed at %v only", points)
	}
}

// TestTwoProcesses makes one storage and the same shares in it from several
// processes at once.
func TestTwoProcesses(t *testing.T) {
	s := newStorage(t, MinImageSize)
	var children []*exec.Cmd
	for range 4 {
		cmd := child(s, "create share", 0)
		cmd.Stderr = os.Stderr
		s.ok(cmd.Start())
		children = append(children, cmd)
	}
	var errs []error
	for _, cmd := range children {
		errs = append(errs, cmd.Wait())
	}
	s.ok(errors.Join(errs...))
	b := s.open()
	if list, _, err := b.ListShares(t.Context(), "", 0); err != nil || len(list) != 1 || list[0].Name != "new" {
		t.Errorf("got %v, error %v; want one share", list, err)
	}
	s.audit(b)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	s.ok(err)
	if n := strings.Count(string(mounts), s.Path); n != 1 {
		t.Errorf("mounted %d times", n)
	}

	// Different operations on the same objects.
	resetStorage(s, b)
	children = nil
	for name := range operations {
		if name == "delete share" { // else some of the others find nothing
			continue
		}
		cmd := child(s, name, 0)
		cmd.Stderr = os.Stderr
		s.ok(cmd.Start())
		children = append(children, cmd)
	}
	for _, cmd := range children {
		s.ok(cmd.Wait())
	}
	s.audit(b)
}
