package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/abaca-csi/abaca/pkg/maintain"
)

// maintainOptions are the flags of maintain.
type maintainOptions struct {
	maintain.Options
	repositories, cache, output string
	restic                      string
	anyRestic                   bool
	noCheck, noPrune            bool
}

// newMaintainCommand is what a repository's CronJob runs.
func newMaintainCommand() *cobra.Command {
	o := maintainOptions{}
	cmd := &cobra.Command{
		Use: "maintain", Short: "Check a repository, a part of all bytes at a time, and prune it (run by a CronJob)", Args: cobra.NoArgs,
		Example: "  abaca maintain --repositories /etc/abaca/repositories --repository offsite --cache /var/cache/abaca",
		RunE:    func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	f := cmd.Flags()
	f.StringVar(&o.repositories, "repositories", "", "the directory with one folder for each restic repository")
	f.StringVar(&o.Repository, "repository", "", "the `name` of the repository")
	must(cmd, "repositories", "repository")
	f.StringVar(&o.cache, "cache", "", "the directory for restic's cache, which may be that of others; empty for none, which is slow")
	f.IntVar(&o.ReadDays, "read-data-days", maintain.DefaultReadDays, "in how many `days` every byte is read; 0 for never")
	f.BoolVar(&o.noCheck, "no-check", false, "do not check")
	f.BoolVar(&o.noPrune, "no-prune", false, "do not prune")
	f.StringVar(&o.MaxUnused, "max-unused", "", "how `much` that nobody refers to may stay, such as 5%, 10G or unlimited (default: restic's, 5%)")
	f.StringVar(&o.MaxRepackSize, "max-repack-size", "", "how `much` a prune may rewrite at once, such as 50G (default: no limit)")
	f.DurationVar(&o.LockWait, "lock-wait", maintain.DefaultLockWait, "how long to wait for the repository, and to hold new backups back meanwhile")
	f.DurationVar(&o.Timeout, "timeout", maintain.DefaultTimeout, "how long all of it may take")
	f.BoolVar(&o.DryRun, "dry-run", false, "change nothing, and say what would be done")
	f.StringVarP(&o.output, "output", "o", "", "output format: json")
	resticFlags(f, &o.restic, &o.anyRestic)
	return cmd
}

func (o maintainOptions) run(cmd *cobra.Command) error {
	ctx := cmd.Context()
	if err := checkOutput(o.output); err != nil {
		return err
	}
	o.Check, o.Prune, o.Now = !o.noCheck, !o.noPrune, time.Now
	if err := o.Validate(); err != nil {
		return err
	}
	program, err := findRestic(ctx, o.restic, o.anyRestic)
	if err != nil {
		return err
	}
	repositories, err := repositoriesIn(o.repositories, program)
	if err != nil {
		return err
	}
	repositories.CacheDir = o.cache
	repository, err := repositories.Open(ctx, o.Repository)
	if err != nil {
		return err
	}
	watcher := newWatcher(ctx, cmd.ErrOrStderr())
	o.Step = watcher.step
	result, err := maintain.Run(ctx, repository, o.Options)
	watcher.end()
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("repository %q: %w", o.Repository, err)
	}
	return conclude(cmd, o.output, result, err)
}

// watcher shows on a terminal what is being done, and for how long already;
// elsewhere nothing.
type watcher struct {
	mu      sync.Mutex
	w       io.Writer
	what    string
	seconds int
	stop    context.CancelFunc
}

func newWatcher(ctx context.Context, w io.Writer) *watcher {
	ctx, cancel := context.WithCancel(ctx)
	p := &watcher{w: w, stop: cancel}
	if f, ok := w.(*os.File); !ok || !term.IsTerminal(int(f.Fd())) || os.Getenv("TERM") == "dumb" {
		p.w = io.Discard
	}
	go func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.show(func() { p.seconds++ })
			case <-ctx.Done():
				return
			}
		}
	}()
	return p
}

func (p *watcher) step(what string) { p.show(func() { p.what, p.seconds = what, 0 }) }

func (p *watcher) show(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if change(); p.what != "" {
		fmt.Fprintf(p.w, "\r\x1b[K%s %s", p.what, time.Duration(p.seconds)*time.Second)
	}
}

func (p *watcher) end() {
	p.stop()
	p.step("")
	fmt.Fprint(p.w, "\r\x1b[K")
}
