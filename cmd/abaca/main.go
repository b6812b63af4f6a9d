// Abaca is a CSI driver for shared file systems with backup built in.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"text/tabwriter"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/pkg/nearest"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// version is set when the program is built.
var version = "dev"

// errInterrupted is a command that was asked to end and did so.
var errInterrupted = errors.New("interrupted")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// `restic unlock` sends it to the process that a lock names, to see whether
	// it lives; a number that has been used again may be ours.
	signal.Ignore(syscall.SIGHUP)
	if err := newCommand().ExecuteContext(ctx); err != nil {
		var code exitCode
		if errors.As(err, &code) {
			os.Exit(int(code))
		}
		fmt.Fprintln(os.Stderr, "abaca:", err)
		if errors.Is(err, errInterrupted) {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

// exitCode is a command that has said on its output what went wrong.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

// checkOutput refuses what -o cannot be.
func checkOutput(format string) error {
	if format != "" && format != "json" {
		return fmt.Errorf("output format %q is not known; it is json or nothing", format)
	}
	return nil
}

// jobResult is what a command that a CronJob runs has done.
type jobResult interface {
	Table(io.Writer) error
	JSON(io.Writer) error
	ExitCode() int
}

// conclude writes what a run did, in the output format, and returns how the
// command ends: err is that the run was ended before everything was done.
func conclude(cmd *cobra.Command, format string, r jobResult, err error) error {
	show := r.Table
	if format == "json" {
		show = r.JSON
	}
	if perr := show(cmd.OutOrStdout()); perr != nil {
		return perr
	}
	if err != nil {
		return errInterrupted
	}
	if code := r.ExitCode(); code != 0 {
		return exitCode(code)
	}
	return nil
}

func newCommand() *cobra.Command {
	var verbosity int
	root := &cobra.Command{
		Use:   "abaca",
		Short: "A CSI driver for shared file systems with backup built in",
		Long: `A CSI driver for shared file systems with backup built in.

demo shows what it does, on this machine, and standalone serves one. In
Kubernetes the chart runs controller, node, mover and ready, and CronJobs run
schedule and maintain.`,
		SilenceErrors: true, SilenceUsage: true,
		PersistentPreRun: func(cmd *cobra.Command, _ []string) {
			cmd.SetContext(klog.NewContext(cmd.Context(), setLogger(os.Stderr, verbosity)))
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if !errors.As(err, &unknown) {
			return err
		}
		var known []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { known = append(known, f.Name) })
		return fmt.Errorf("%w%s; %s --help has them all", err, nearest.Hint(unknown.GetSpecifiedName(), known), cmd.CommandPath())
	})
	root.PersistentFlags().IntVarP(&verbosity, "verbosity", "v", 1, "how much to log: 1 what happens, 2 what is not done yet, 4 every request")
	root.AddCommand(
		newServeCommand("standalone", "Serve controller, node and movers behind one socket", true, true),
		newServeCommand("controller", "Serve the controller, and run movers", true, false),
		newServeCommand("node", "Serve the node", false, true),
		newMoverCommand(), newScheduleCommand(), newMaintainCommand(), newReadyCommand(), newDemoCommand(), newVersionCommand(),
	)
	return root
}

// setLogger makes one stream of JSON lines of what we, csi-lib-utils and
// mount-utils log.
func setLogger(w io.Writer, verbosity int) klog.Logger {
	// logr's V-levels are slog's levels below zero.
	handler := slog.NewJSONHandler(w, &slog.HandlerOptions{Level: slog.Level(-verbosity)})
	log := logr.FromSlogHandler(handler)
	klog.SetLogger(log)
	return log
}

func newVersionCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "version", Short: "Say what this is", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			v := []struct{ key, value string }{
				{"driver", csi.DriverName}, {"version", version}, {"csi", "1.13.0"}, {"restic", restic.PinnedVersion},
				{"go", runtime.Version()}, {"platform", runtime.GOOS + "/" + runtime.GOARCH},
			}
			if output == "" {
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
				for _, kv := range v {
					fmt.Fprintf(w, "%s\t%s\n", kv.key, kv.value)
				}
				return w.Flush()
			}
			m := map[string]string{}
			for _, kv := range v {
				m[kv.key] = kv.value
			}
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(m)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "output format: json")
	return cmd
}
