package main

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	callers  = 32
	callsPer = 4 // of each caller in one run
)

// measureRate has many callers make volumes, and then a snapshot of each.
func measureRate(ctx context.Context, b *bench) error {
	volumeRates, snapshotRates := make([]float64, b.runs), make([]float64, b.runs)
	for run := range b.runs {
		if err := b.settle(ctx); err != nil {
			return err
		}
		made := make([]*volume, callers*callsPer)
		var err error
		if volumeRates[run], err = rate(ctx, func(ctx context.Context, i int) (err error) {
			made[i], err = b.createVolume(ctx, fmt.Sprintf("rate-%d-%d", run, i), 16<<20, "")
			return err
		}); err != nil {
			return err
		}
		if snapshotRates[run], err = rate(ctx, func(ctx context.Context, i int) error {
			_, err := b.createSnapshot(ctx, fmt.Sprintf("rate-%d-%d", run, i), made[i])
			return err
		}); err != nil {
			return err
		}
		say("run %d of %d: %.0f volumes and %.0f snapshots a second", run+1, b.runs, volumeRates[run], snapshotRates[run])
	}
	t := b.table("rate", fmt.Sprintf("Calls a second with %d callers", callers), "call", "a second", "range")
	show := func(r float64) string { return fmt.Sprintf("%.0f", r) }
	t.plainRow("CreateVolume", show(median(volumeRates)), spread(volumeRates, show))
	t.plainRow("CreateSnapshot", show(median(snapshotRates)), spread(snapshotRates, show))
	t.notes = append(t.notes, fmt.Sprintf("Medians of %d runs of %d volumes, and one snapshot of each; all stay until the end.", b.runs, callers*callsPer))
	return nil
}

// rate calls with all callers at once, and returns the calls a second.
func rate(ctx context.Context, call func(ctx context.Context, i int) error) (float64, error) {
	begun := time.Now()
	err := each(ctx, callers*callsPer, callers, call)
	return callers * callsPer / time.Since(begun).Seconds(), err
}

// each calls do with 0 to n-1 from a number of goroutines, and returns the first
// error, after which no more calls begin.
func each(ctx context.Context, n, workers int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	numbers := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range numbers {
				if err := do(ctx, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	for i := 0; i < n && ctx.Err() == nil; i++ {
		select {
		case numbers <- i:
		case <-ctx.Done():
		}
	}
	close(numbers)
	wg.Wait()
	return context.Cause(ctx)
}
