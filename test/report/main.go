// Command report runs `go test -json` and prints what `go test` would: a line
// a package, and the output of the tests that fail. At the end it compares the
// skipped tests with a list and counts.
//
//	report [-skips FILE] [-limit DURATION] -- [go test arguments]
//
// The last line is "N passed, N failed, N skipped". The exit code is 0 only if
// tests ran, none failed, everything was built, and no test was skipped that
// the list does not name.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

func main() {
	skips := flag.String("skips", "", "`file` of the tests that may be skipped")
	limit := flag.Duration("limit", 0, "stop everything after this time (0: never)")
	flag.Parse()
	os.Exit(run(flag.Args(), *skips, *limit, os.Stdout))
}

// sharedWriter is written by the report and by the go command's stderr.
type sharedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *sharedWriter) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(b)
}

func run(args []string, skipsFile string, limit time.Duration, w io.Writer) int {
	out := &sharedWriter{w: w}
	allowed := skipList{}
	if skipsFile != "" {
		f, err := os.Open(skipsFile)
		if err == nil {
			allowed, err = parseSkips(f)
			f.Close()
		}
		if err != nil {
			fmt.Fprintf(out, "report: read the list of skips: %v\n", err)
			return 1
		}
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, fmt.Errorf("stopped after %v", limit))
		defer cancel()
	}

	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = out
	// A process group of its own, so that a stop reaches the tests too and not
	// only the go command.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = 20 * time.Second
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintf(out, "report: start go test: %v\n", err)
		return 1
	}
	stopKill := context.AfterFunc(ctx, func() {
		// What SIGINT does not end, SIGKILL does.
		time.Sleep(10 * time.Second)
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	})
	defer stopKill()

	r := newReport(out)
	lines := bufio.NewReader(stdout)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			r.line(line)
		}
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	r.end()
	if cause := context.Cause(ctx); cause != nil {
		if errors.Is(cause, context.Canceled) {
			cause = errors.New("stopped by a signal")
		}
		r.problem("%v", cause)
	} else if err != nil && r.failed == 0 {
		r.problem("go test: %v", err)
	}
	return r.close(allowed)
}
