package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/test/tree"
)

// demoRepository is the name of the demonstration's repository.
const demoRepository = "offsite"

// demoOptions are the flags of demo.
type demoOptions struct {
	dir, size, restic, source, output string
	clouds, cloud, shareType          string
	keep, small                       bool
}

func newDemoCommand() *cobra.Command {
	var o demoOptions
	cmd := &cobra.Command{
		Use: "demo", Short: "Do the main job on real input, and prove it", Args: cobra.NoArgs,
		Long: `Starts abaca standalone and then acts only through its CSI socket and the
mounted paths: a share, a snapshot, a snapshot volume, two backups and a restore
that is compared byte for byte. Needs root. Leaves nothing behind.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.keep, "keep", false, "leave the repository to look at")
	f.StringVar(&o.dir, "dir", "", "the directory to work below (default: the temporary directory with enough room)")
	f.StringVar(&o.size, "size", "8Gi", "the size of the backend's image, a sparse file")
	f.StringVar(&o.source, "source", "", "the tree to copy in (default: the Go source tree of go env GOROOT)")
	f.BoolVar(&o.small, "small", false, "use a small tree that is made up")
	f.StringVar(&o.restic, "restic", defaultRestic(), "the restic program")
	f.StringVar(&o.clouds, "clouds", "", "a clouds.yaml: do it on OpenStack Manila, with an instance of its own, and not on btrfs")
	f.StringVar(&o.cloud, "cloud", "", "the name of the cloud in --clouds")
	f.StringVar(&o.shareType, "type", "", "the share type (default: the cloud's)")
	f.StringVarP(&o.output, "output", "o", "", "format of the closing table: json")
	return cmd
}

func (o demoOptions) run(ctx context.Context, stdout, stderr io.Writer) error {
	var out *demoPrinter
	switch o.output {
	case "":
		out = newDemoPrinter(stdout)
	case "json":
		out = newDemoPrinter(stderr)
	default:
		return fmt.Errorf("output format %q is not known; it is json or nothing", o.output)
	}
	size, err := resource.ParseQuantity(o.size)
	if err != nil || size.Value() < 1<<30 {
		return fmt.Errorf("--size is %q, but must be at least 1Gi", o.size)
	}
	if os.Getuid() != 0 {
		return errors.New("the demonstration needs root, for loop devices and mounts")
	}
	if info, err := os.Stat(o.source); o.source != "" && (err != nil || !info.IsDir()) {
		return fmt.Errorf("--source %s is not a directory", o.source)
	}
	if (o.clouds == "") != (o.cloud == "") {
		return errors.New("--clouds and --cloud go together")
	}
	work, err := o.workDir()
	if err != nil {
		return err
	}
	d := &demo{demoOptions: o, out: out, work: work, imageSize: size.Value(), begun: time.Now()}

	err = d.play(ctx)
	switch {
	case ctx.Err() != nil:
		err = errInterrupted
	case err != nil:
		err = d.blame(err)
	}
	switch {
	case err == errInterrupted:
		out.note("interrupted")
	case err != nil:
		out.failed(err)
		if log := d.serverLog(); log != "" {
			out.note("the last words of abaca standalone:\n" + log)
		}
	}
	out.number = max(out.number, out.total-1) // what was not reached is passed over
	// Also after an interruption, which has ended ctx.
	cleanCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
	defer cancel()
	cleanErr := d.step(cleanCtx, "clean up", "Take everything down again", d.cleanUp)
	if cleanErr != nil {
		out.failed(cleanErr)
	}
	err = errors.Join(err, cleanErr)

	out.table(d.steps, time.Since(d.begun))
	if o.output == "json" {
		if jerr := writeDemoJSON(stdout, d, err); jerr != nil {
			return jerr
		}
	}
	if o.keep {
		d.sayKept()
	}
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	return nil
}

// blame adds to an error that the server has ended, where that is the cause.
func (d *demo) blame(err error) error {
	if d.server == nil {
		return err
	}
	select {
	case <-d.server.ended:
		return fmt.Errorf("%w; abaca standalone has ended: %w", err, d.server.err)
	case <-time.After(500 * time.Millisecond): // a call fails before the end is seen
		return err
	}
}

// workDir makes a fresh directory where there is enough room.
func (o demoOptions) workDir() (string, error) {
	need := int64(3 << 30)
	if o.small {
		need = 512 << 20
	}
	candidates := []string{os.TempDir(), "/var/tmp"}
	if o.dir != "" {
		if err := os.MkdirAll(o.dir, 0o755); err != nil {
			return "", err
		}
		candidates = []string{o.dir}
	}
	for _, c := range candidates {
		var fs unix.Statfs_t
		if err := unix.Statfs(c, &fs); err != nil || int64(fs.Bavail)*fs.Bsize < need {
			continue
		}
		work, err := os.MkdirTemp(c, "abaca-demo-")
		if err != nil {
			return "", err
		}
		if work, err = filepath.Abs(work); err == nil {
			work, err = filepath.EvalSymlinks(work) // as mountinfo shows it
		}
		return work, err
	}
	return "", fmt.Errorf("%s has less than the %s that are needed: name another place with --dir", strings.Join(candidates, " and "), backup.Bytes(need))
}

// demo is one run.
type demo struct {
	demoOptions
	out       *demoPrinter
	work      string
	imageSize int64
	begun     time.Time
	steps     []demoStep

	server   *demoServer
	volumes  []*demoVolume // that may be mounted
	password string
}

// demoStep is what a step took and what came of it.
type demoStep struct {
	Name    string           `json:"name"`
	Seconds float64          `json:"seconds"`
	Result  string           `json:"result,omitempty"`
	Numbers map[string]int64 `json:"numbers,omitempty"`
	Error   string           `json:"error,omitempty"`
}

// step runs one step and notes how long it took. title is what is shown while
// it runs.
func (d *demo) step(ctx context.Context, name, title string, run func(context.Context, *demoStep) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.out.begin(title)
	s := demoStep{Name: name}
	start := time.Now()
	err := run(ctx, &s)
	s.Seconds = time.Since(start).Seconds()
	switch {
	case err != nil && ctx.Err() != nil:
		err, s.Error = errInterrupted, errInterrupted.Error()
	case err != nil:
		err = fmt.Errorf("%s: %w", name, err)
		s.Error = err.Error()
	}
	d.out.end(s)
	d.steps = append(d.steps, s)
	return err
}

// where says what the demonstration is on.
func (d *demo) where() string {
	if d.clouds != "" {
		return "OpenStack Manila, cloud " + d.cloud
	}
	return "a fresh btrfs image in " + d.work
}

// play is the demonstration.
func (d *demo) play(ctx context.Context) error {
	var (
		share, live, restored   *demoVolume
		snapshot, first, second demoSnapshot
		before, after           tree.Size
		changed                 tree.Changed
	)
	type step struct {
		name, title string
		run         func(context.Context, *demoStep) error
	}
	steps := []step{
		{"start", "Start abaca standalone on " + d.where(), func(ctx context.Context, s *demoStep) (err error) {
			if d.server, err = d.startServer(ctx); err != nil {
				return err
			}
			// The server's end is the demonstration's end too.
			s.Result, err = d.server.describe(ctx)
			return err
		}},
		{"share", "Create a share and mount it, read-write for many", func(ctx context.Context, s *demoStep) (err error) {
			share, err = d.createVolume(ctx, "data", d.imageSize/4, demoWriter, "")
			if err != nil {
				return err
			}
			s.Result = fmt.Sprintf("%s, volume %s", backup.Bytes(share.size), share.id)
			return d.mountVolume(ctx, share)
		}},
		{"copy", "Copy the tree in, and files that backups like to lose", func(ctx context.Context, s *demoStep) (err error) {
			o, big := tree.Options{Source: d.source}, int64(tree.BigFile)
			if d.small {
				o.Files, big = 2000, 8<<20
			}
			if err := tree.Build(ctx, share.target, o); err != nil {
				return err
			}
			if err := tree.Odd(ctx, filepath.Join(share.target, "odd"), big); err != nil {
				return err
			}
			if before, err = tree.Measure(share.target); err != nil {
				return err
			}
			s.Result = demoTree(before)
			s.Numbers = map[string]int64{"files": int64(before.Files), "bytes": before.Bytes}
			return syncTree(share.target) // part of the copy, not of the snapshot
		}},
		{"snapshot", "Cut a snapshot", func(ctx context.Context, s *demoStep) (err error) {
			snapshot, err = d.createSnapshot(ctx, share, "instant", nil)
			if err == nil && !snapshot.ready {
				err = errors.New("it is not ready at once")
			}
			s.Result = "snapshot " + snapshot.id
			return err
		}},
		{"snapshot volume", "Mount the snapshot in place, and try to write to it", func(ctx context.Context, s *demoStep) (err error) {
			live, err = d.createVolume(ctx, "frozen", d.imageSize/4, demoReader, snapshot.id)
			if err != nil {
				return err
			}
			if err := d.mountVolume(ctx, live); err != nil {
				return err
			}
			size, err := tree.Measure(live.target)
			if err != nil {
				return err
			}
			if size != before {
				return fmt.Errorf("the snapshot volume holds %+v, the share %+v", size, before)
			}
			s.Result = demoTree(size) + "; writing is refused: " + unix.EROFS.Error()
			return refusesWrites(live.target)
		}},
		{"first backup", "Back the share up to a fresh repository", func(ctx context.Context, s *demoStep) (err error) {
			var summary demoSummary
			first, summary, err = d.backUp(ctx, share, "first")
			if err != nil {
				return err
			}
			s.Result = fmt.Sprintf("%s read, %s stored", backup.Bytes(summary.TotalBytes), backup.Bytes(summary.DataAddedPacked))
			s.Numbers = summary.numbers()
			return nil
		}},
		{"change", "Change 1 % of the files, delete some, rename some", func(_ context.Context, s *demoStep) (err error) {
			changed, err = tree.Change(share.target, 0.01, 1)
			if err != nil {
				return err
			}
			after, err = tree.Measure(share.target)
			s.Result = fmt.Sprintf("%s modified, %s deleted, %s renamed", demoCount(changed.Modified), demoCount(changed.Deleted), demoCount(changed.Renamed))
			s.Numbers = map[string]int64{
				"modified": int64(changed.Modified), "modifiedBytes": changed.ModifiedBytes,
				"deleted": int64(changed.Deleted), "renamed": int64(changed.Renamed), "renamedBytes": changed.RenamedBytes,
			}
			return err
		}},
		{"second backup", "Back it up again: only what changed is read", func(ctx context.Context, s *demoStep) (err error) {
			var summary demoSummary
			second, summary, err = d.backUp(ctx, share, "second")
			if err != nil {
				return err
			}
			read, touched := summary.FilesNew+summary.FilesChanged, changed.ModifiedBytes+changed.RenamedBytes
			s.Result = fmt.Sprintf("%s of %s files read (%s of %s), %s stored", demoCount(read), demoCount(after.Files),
				backup.Bytes(touched), backup.Bytes(after.Bytes), backup.Bytes(summary.DataAddedPacked))
			s.Numbers = summary.numbers()
			s.Numbers["changedFileBytes"] = touched
			// One more than what was changed: volume.json, Abaca's own.
			if most := int64(changed.Modified+changed.Renamed) + 1; read > most {
				return fmt.Errorf("restic read %d files, though no more than %d had changed", read, most)
			}
			return nil
		}},
		{"restore", "Restore the second backup into a new volume, and verify it", func(ctx context.Context, s *demoStep) (err error) {
			restored, err = d.restore(ctx, "restored", share.size, second.id)
			if err != nil {
				return err
			}
			s.Result = fmt.Sprintf("%s, volume %s", backup.Bytes(after.Bytes), restored.id)
			return d.mountVolume(ctx, restored)
		}},
		{"compare", "Compare it with the share: contents, owners, modes, times, xattrs, ACLs, links, holes", func(ctx context.Context, s *demoStep) error {
			differences, err := tree.Compare(ctx, share.target, restored.target)
			if err != nil {
				return err
			}
			if d.clouds != "" {
				before := len(differences)
				differences = slices.DeleteFunc(differences, func(diff tree.Difference) bool {
					return diff.What == "time" && ownTime(filepath.Join(restored.target, diff.Path))
				})
				if n := before - len(differences); n > 0 {
					d.out.note(fmt.Sprintf("%d times are CephFS's own, of directories or in the future", n))
				}
			}
			for i, diff := range differences {
				if i == 20 {
					d.out.note(fmt.Sprintf("and %d more", len(differences)-i))
					break
				}
				d.out.note(diff.String())
			}
			if len(differences) > 0 {
				return fmt.Errorf("the restored volume differs in %d things", len(differences))
			}
			s.Result = "no difference in " + demoTree(after)
			return nil
		}},
		{"plain restic", "List and check the repository with plain restic, without Abaca", func(ctx context.Context, s *demoStep) (err error) {
			s.Result, err = d.plainRestic(ctx, first, second)
			return err
		}},
	}
	d.out.total = len(steps) + 1 // and the clean up
	for _, s := range steps {
		if err := d.step(ctx, s.name, s.title, s.run); err != nil {
			return err
		}
	}
	return nil
}

// ownTime says whether CephFS decides about the time of a file (docs/manila.md): it
// gathers those of directories later, and moves none backwards that is in the
// future.
func ownTime(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && (info.IsDir() || info.ModTime().After(time.Now()))
}

// syncTree waits until what was written is on the disk.
func syncTree(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(f.Fd())))
}

// refusesWrites tries to change a read-only tree in every way that the demo
// tree offers. Each must fail with EROFS.
func refusesWrites(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		return fmt.Errorf("the volume cannot be read, or is empty: %v", err)
	}
	old := filepath.Join(dir, entries[0].Name())
	tries := map[string]error{
		"create a file":      os.WriteFile(filepath.Join(dir, "written"), []byte("x"), 0o600),
		"make a directory":   os.Mkdir(filepath.Join(dir, "made"), 0o700),
		"rename an entry":    os.Rename(old, old+"-renamed"),
		"change a mode":      os.Chmod(old, 0o777),
		"change an owner":    os.Lchown(old, 1, 1),
		"set an attribute":   unix.Setxattr(old, "user.written", []byte("x"), 0),
		"change a timestamp": os.Chtimes(old, time.Unix(0, 0), time.Unix(0, 0)),
	}
	for what, err := range tries {
		if !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("to %s must be refused as %q, but: %v", what, unix.EROFS.Error(), err)
		}
	}
	return nil
}

// writeRepository configures the repository: a folder with restic's own
// variables as files.
func (d *demo) writeRepository() error {
	d.password = rand.Text()
	folder := filepath.Join(d.work, "repositories", demoRepository)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	for name, value := range map[string]string{"RESTIC_REPOSITORY": d.repositoryDir(), "RESTIC_PASSWORD": d.password} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(value), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) repositoryDir() string { return filepath.Join(d.work, "repository") }
func (d *demo) passwordFile() string {
	return filepath.Join(d.work, "repositories", demoRepository, "RESTIC_PASSWORD")
}

// sayKept tells how to look at what --keep has left.
func (d *demo) sayKept() {
	if !exists(d.repositoryDir()) {
		return
	}
	d.out.note(fmt.Sprintf(`The repository is kept. Look at it with plain restic:

  export RESTIC_REPOSITORY=%s RESTIC_PASSWORD_FILE=%s
  %s snapshots
  %s ls latest

Remove it with: rm -r %s`, d.repositoryDir(), d.passwordFile(), d.restic, d.restic, d.work))
}

// removeWork removes the directory, or with --keep all of it but the repository
// and its password.
func (d *demo) removeWork() error {
	if !d.keep || !exists(d.repositoryDir()) {
		return os.RemoveAll(d.work)
	}
	entries, err := os.ReadDir(d.work)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.Contains([]string{"repository", "repositories"}, e.Name()) {
			if err := os.RemoveAll(filepath.Join(d.work, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
