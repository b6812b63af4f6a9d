// Command bench measures Abaca as its users meet it, over the CSI socket, and
// what can be compared it measures side by side in the same run.
//
//	bench [-files N] [-runs N] [-only PARTS] [-out FILE] [-bin DIR]
//	bench -only manila [-clouds FILE -cloud NAME -type TYPE] [-at N,N] [-bin DIR]
//
// It needs root, and bin/abaca and bin/restic. The exit code is 0 only if all
// was measured and every target is met. With a cloud, shares are on its Manila
// in the place of the embedded backend.
//
// The part manila is measured only if it is asked for: it compares Abaca with
// manila-csi, on a simulated cloud or on a real one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// parts are what can be measured, in the order in which it is.
var parts = []struct {
	name    string
	measure func(context.Context, *bench) error
}{
	{"memory", measureMemory}, // first, while the driver has done nothing yet
	{"backup", measureBackup},
	{"mount", measureMount},
	{"rate", measureRate}, // last: it leaves many volumes behind
}

const manilaPart = "manila" // see measureManila

var errMissed = errors.New("a target is missed")

// bench is one run.
type bench struct {
	files, runs int
	most        int // files in the largest tree whose snapshot is mounted
	*site
	tree   *volume // the big tree, once a part has asked for it
	tables []*table
}

func main() {
	files := flag.Int("files", 100_000, "how many `files` the tree has that is backed up")
	runs := flag.Int("runs", 5, "how many `times` each thing is measured")
	only := flag.String("only", "", "the `parts` to measure, separated by commas: "+partNames()+"; or "+manilaPart)
	out := flag.String("out", "", "a Markdown `file` into which the tables go, between its markers")
	bin := flag.String("bin", "bin", "the `directory` with abaca and restic")
	most := flag.Int("most", 500_000, "how many `files` the largest tree has whose snapshot is mounted")
	cloud := cloudOptions{}
	flag.StringVar(&cloud.file, "clouds", "", "a clouds.yaml `file` with a real cloud; empty for a simulated one")
	flag.StringVar(&cloud.name, "cloud", "", "its `name` in that file")
	flag.StringVar(&cloud.shareType, "type", "", "the `share type`, of CephFS shares; empty for the cloud's default")
	flag.StringVar(&cloud.at, "at", "1,8,16", "how many volumes are made at once, in one run after the other")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := error(nil)
	if *only == manilaPart {
		cloud.bin = *bin
		err = measureManila(ctx, cloud)
	} else {
		err = run(ctx, *files, *most, *runs, *only, *out, *bin, cloud)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func partNames() string {
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	return strings.Join(names, ",") // and manilaPart, by itself
}

func run(ctx context.Context, files, most, runs int, only, out, bin string, cloud cloudOptions) (err error) {
	if os.Getuid() != 0 {
		return errors.New("needs root, to mount")
	}
	if files < 100 || most < 100 || runs < 1 || flag.NArg() > 0 {
		return errors.New("at least 100 files and 1 run are needed, and no arguments; see -help")
	}
	if only != "" && out != "" {
		return errors.New("-out writes the tables of all parts: leave -only away")
	}
	wanted := strings.Split(only, ",")
	for _, w := range wanted {
		if w != "" && !slices.Contains(strings.Split(partNames(), ","), w) {
			return fmt.Errorf("there is no part %q: it is one of %s", w, partNames())
		}
	}
	s, err := newSite(ctx, bin, 16<<30+int64(files)*64<<10, cloud)
	if err != nil {
		return err
	}
	defer func() {
		// An interruption ends the measuring, and not this.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
		defer cancel()
		say("cleaning up")
		err = errors.Join(err, s.clean(ctx))
	}()
	b := &bench{files: files, most: most, runs: runs, site: s}
	if err := s.start(ctx); err != nil {
		return err
	}
	for _, p := range parts {
		if only != "" && !slices.Contains(wanted, p.name) {
			continue
		}
		say("%s", p.name)
		if err := p.measure(ctx, b); err != nil {
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			return fmt.Errorf("%s: %w\n%s", p.name, err, s.lastLog())
		}
	}
	missed := false
	for _, t := range b.tables {
		t.print(os.Stdout)
		missed = missed || t.missed
	}
	if out != "" {
		if err := writeTables(out, b.tables); err != nil {
			return err
		}
	}
	if missed {
		return errMissed
	}
	return nil
}

// say tells the person who waits what goes on.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format(time.TimeOnly)+" "+format+"\n", args...)
}

// table begins a table of a part.
func (b *bench) table(part, title string, header ...string) *table {
	command := fmt.Sprintf("go run ./test/bench -only %s -runs %d", part, b.runs)
	if part == "backup" || part == "memory" {
		command += fmt.Sprintf(" -files %d", b.files)
	}
	if part == "mount" && b.most != 500_000 {
		command += fmt.Sprintf(" -most %d", b.most)
	}
	if b.cloud.file != "" {
		title, command = title+", on a real Manila", command+" -clouds FILE -cloud NAME"
	}
	t := &table{title: title, command: command, header: append(header, "target", "met")}
	b.tables = append(b.tables, t)
	return t
}
