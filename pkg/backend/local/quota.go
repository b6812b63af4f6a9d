package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// setUpQuota turns quotas on. On a file system that is new this takes an
// instant; on one that holds data the kernel counts in the background, and
// Usage does not know until it has.
func (b *Backend) setUpQuota(ctx context.Context) error {
	if b.qgroupFile("mode") == "squota" {
		return fmt.Errorf("%w: the file system has simple quotas, which do not count what a clone refers to: "+
			"turn them off with \"btrfs quota disable\"", backend.ErrInvalid)
	}
	if err := enableQuota(b.fs); err != nil {
		return err
	}
	b.settleQuota()
	for range 20 { // 1 second
		if !rescanRunning(b.fs) {
			break
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// settleQuota has the kernel count again if it has lost count, as it does when
// it drops a large subvolume (qgroups/drop_subtree_threshold). That happens in
// the background some time after the deletion, so every reader looks.
func (b *Backend) settleQuota() (settled bool) {
	if b.qgroupFile("inconsistent") != "1" {
		return true
	}
	startRescan(b.fs) // EINPROGRESS: one is running
	return false
}

// sweepQgroups removes the quota groups of subvolumes that are gone, which
// kernels before 6.11 keep for ever.
func (b *Backend) sweepQgroups() {
	groups, _ := filepath.Glob(filepath.Join(b.sysfs, "qgroups", "0_*"))
	for _, group := range groups {
		id, err := strconv.ParseUint(strings.TrimPrefix(filepath.Base(group), "0_"), 10, 64)
		if err != nil || id < firstFree {
			continue
		}
		if roots, err := searchRoots(b.fs, id, rootItem); err == nil && len(roots) == 0 {
			destroyQgroup(b.fs, id)
		}
	}
}

// restoreLimits sets the quota of each share again that does not have it: no
// fsync covers quotas, so that a power failure can take a new one back, and
// "btrfs quota disable" forgets them all.
func (b *Backend) restoreLimits(ctx context.Context) {
	ids, _ := b.keys(shares, "")
	for _, id := range ids {
		b.unlessBusy(shares.subvolume(id), func() {
			var m shareMeta
			if err := b.load(ctx, shares, id, &m); err != nil {
				return
			}
			info, err := subvolumeAt(b.fs, shares.subvolume(id))
			if err == nil && b.qgroupFile(fmt.Sprintf("0_%d/max_referenced", info.id)) != strconv.FormatInt(m.Size, 10) {
				limitQgroup(b.fs, info.id, m.Size)
			}
		})
	}
}

// Usage implements backend.UsageReporter. The bytes are those of the last
// commit of the file system (every 30 seconds, and at sync), with the tree that
// the files hang on. They are unknown while the kernel is counting anew; inodes
// are never counted.
func (b *Backend) Usage(ctx context.Context, target backend.Target) (_ backend.Usage, err error) {
	k, id := kindOf(target)
	defer wrap(&err, "usage of %s", k.subvolume(id))
	unknown := backend.Usage{UsedBytes: -1, UsedInodes: -1}
	if err := b.load(ctx, k, id, &struct{}{}); err != nil {
		return unknown, err
	}
	info, err := subvolumeAt(b.fs, k.subvolume(id))
	if errors.Is(err, unix.ENOENT) || !b.settleQuota() {
		return unknown, nil
	}
	if err != nil {
		return unknown, err
	}
	used, err := strconv.ParseInt(b.qgroupFile(fmt.Sprintf("0_%d/referenced", info.id)), 10, 64)
	if err != nil {
		return unknown, nil
	}
	return backend.Usage{UsedBytes: used, UsedInodes: -1}, nil
}

// qgroupFile returns the contents of a file below qgroups in sysfs, empty if
// there is none: quotas are off, or the kernel does not have it.
func (b *Backend) qgroupFile(name string) string {
	data, err := os.ReadFile(filepath.Join(b.sysfs, "qgroups", name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}
