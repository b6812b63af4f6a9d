package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const maxIdle = 60 << 20

// measureMemory looks at the driver before it has done anything, and at it and
// its mover during a first backup of the big tree.
func measureMemory(ctx context.Context, b *bench) error {
	idle := make([]int64, b.runs)
	for i := range b.runs {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		var err error
		if idle[i], err = resident(b.cmd.Process.Pid); err != nil {
			return err
		}
	}
	v, err := b.bigTree(ctx)
	if err != nil {
		return err
	}
	if err := b.addRepository("memory", b.path("repository-memory")); err != nil {
		return err
	}
	watching, stop := context.WithCancel(ctx)
	seen := make(chan [2]int64)
	go func() { seen <- peaks(watching, b.cmd.Process.Pid) }()
	_, _, err = b.backUp(ctx, "memory", "memory", v)
	stop()
	peak := <-seen
	if err != nil {
		return err
	}
	for _, dir := range []string{b.path("repositories", "memory"), b.path("repository-memory")} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	t := b.table("memory", "Resident memory of abaca standalone (VmRSS)", "when", "driver", "mover", "both")
	t.row("at most 60 MiB", slices.Max(idle) <= maxIdle, "idle after the start", mibText(slices.Max(idle)), "-", mibText(slices.Max(idle)))
	t.plainRow(fmt.Sprintf("most during the first backup of %d files", b.files), mibText(peak[0]), mibText(peak[1]), mibText(peak[0]+peak[1]))
	t.notes = append(t.notes, "Looked at every second while idle and every 50 ms during the backup; restic, a child of the mover, is not in it.")
	return nil
}

// peaks returns the most memory that the driver and its mover had until ctx
// ended.
func peaks(ctx context.Context, driver int) (most [2]int64) {
	for ctx.Err() == nil {
		if n, err := resident(driver); err == nil {
			most[0] = max(most[0], n)
		}
		for _, pid := range movers(driver) {
			if n, err := resident(pid); err == nil {
				most[1] = max(most[1], n)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
	return most
}

// resident is the resident memory of a process in bytes.
func resident(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "\nVmRSS:")
	line, _, _ := strings.Cut(rest, "\n")
	kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(line, " kB")), 10, 64)
	return kib << 10, err
}

// movers are the children of the driver that move: `abaca mover ...`.
func movers(driver int) []int {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	var pids []int
	for _, f := range files {
		stat, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		// proc(5): the name, in parentheses, may hold anything.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) < 2 || string(fields[1]) != strconv.Itoa(driver) {
			continue
		}
		dir := filepath.Dir(f)
		args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if argv := bytes.Split(args, []byte{0}); len(argv) > 1 && string(argv[1]) == "mover" {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			pids = append(pids, pid)
		}
	}
	return pids
}
