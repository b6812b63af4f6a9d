package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

const (
	// maxGrowth is what still counts as flat: room for noise, and far from what
	// 500,000 times the files would cost.
	maxGrowth = 1.25
	// mountsEach is how many mounts of one size make one measurement: a single
	// one takes milliseconds, which is too few to compare.
	mountsEach = 10
)

// measureMount shows that the time until a snapshot is mounted does not depend
// on how much it holds.
func measureMount(ctx context.Context, b *bench) error {
	sizes := []int{1, b.most / 50, b.most}
	volumes, snapshots := make([]*volume, len(sizes)), make([]string, len(sizes))
	for i, n := range sizes {
		say("making %d empty files", n)
		v, err := b.mounted(ctx, fmt.Sprintf("flat-%d", n), 4<<30)
		if err != nil {
			return err
		}
		if err := emptyFiles(ctx, v.dir, n); err != nil {
			return err
		}
		volumes[i] = v
	}
	if err := b.settle(ctx); err != nil {
		return err
	}
	cuts, mounts := make([][]time.Duration, len(sizes)), make([][]time.Duration, len(sizes))
	for run := range b.runs {
		for i := range sizes {
			if run%2 == 1 { // there and back
				i = len(sizes) - 1 - i
			}
			begun := time.Now()
			id, err := b.createSnapshot(ctx, fmt.Sprintf("flat-%d-%d", sizes[i], run), volumes[i])
			if err != nil {
				return err
			}
			cuts[i], snapshots[i] = append(cuts[i], time.Since(begun)), id
		}
		sum := make([]time.Duration, len(sizes))
		for k := range mountsEach {
			for i := range sizes {
				if (run+k)%2 == 1 {
					i = len(sizes) - 1 - i
				}
				took, err := b.mountOnce(ctx, fmt.Sprintf("flat-%d-%d-%d", sizes[i], run, k), snapshots[i])
				if err != nil {
					return err
				}
				sum[i] += took
			}
		}
		for i := range sizes {
			mounts[i] = append(mounts[i], sum[i]/mountsEach)
		}
		for _, id := range snapshots {
			if _, err := b.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
				return err
			}
		}
		if err := b.settle(ctx); err != nil {
			return err
		}
	}
	t := b.table("mount", "Time until a snapshot is mounted, by the number of files in it",
		"files", "CreateSnapshot", "CreateVolume, stage and publish", "ratio to 1 file", "ratios")
	for i, n := range sizes {
		ratios := make([]float64, b.runs)
		for k := range b.runs {
			ratios[k] = mounts[i][k].Seconds() / mounts[0][k].Seconds()
		}
		cells := []string{fmt.Sprint(n), durationText(median(cuts[i])), durationText(median(mounts[i])), ratioText(median(ratios)), spread(ratios, ratioText)}
		if i == 0 {
			t.plainRow(cells...)
		} else {
			t.row(fmt.Sprintf("flat (at most %.2f)", maxGrowth), median(ratios) <= maxGrowth, cells...)
		}
	}
	t.notes = append(t.notes, fmt.Sprintf("Medians of %d runs; each is the mean of %d read-only snapshot volumes of each size, in turn.", b.runs, mountsEach))
	return nil
}

// mountOnce measures one snapshot volume from its CreateVolume to its mount.
func (b *bench) mountOnce(ctx context.Context, name, snapshot string) (time.Duration, error) {
	begun := time.Now()
	v, err := b.createVolume(ctx, name, 0, snapshot)
	if err == nil {
		err = b.publish(ctx, v)
	}
	took := time.Since(begun)
	if err == nil {
		err = b.unpublish(ctx, v)
	}
	if err == nil {
		err = b.deleteVolume(ctx, v)
	}
	return took, err
}

// emptyFiles makes n files, a thousand a directory.
func emptyFiles(ctx context.Context, dir string, n int) error {
	return each(ctx, (n+999)/1000, 4, func(ctx context.Context, d int) error {
		at := filepath.Join(dir, fmt.Sprintf("d%04d", d))
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		for i := d * 1000; i < min(n, (d+1)*1000); i++ {
			f, err := os.Create(filepath.Join(at, fmt.Sprintf("f%06d", i)))
			if err != nil {
				return err
			}
			f.Close()
		}
		return ctx.Err()
	})
}
