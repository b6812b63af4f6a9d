package csi

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// newEngine returns a backup engine whose movers end well at once, over the
// repository "offsite" and that of namespace shop.
func newEngine(backends map[string]backend.Backend) (*backup.Engine, *instant) {
	r := &instant{jobs: map[string]*backup.Status{}}
	return &backup.Engine{Backends: backends, Repositories: r, Runner: r, Now: time.Now, Tick: time.Second}, r
}

// instant is a runner, and the repository that it writes to.
type instant struct {
	restic.Client
	mu        sync.Mutex
	jobs      map[string]*backup.Status
	snapshots []restic.Snapshot
	forged    []restic.Snapshot
	slow      bool // restores run until end
	partial   bool // backups lack files
}

// end lets the restores that run end well.
func (r *instant) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.slow = false
	for _, st := range r.jobs {
		st.Phase, st.Ended = backup.Succeeded, time.Now()
	}
}

func (r *instant) Start(ctx context.Context, job backup.Job, may func(context.Context) error) error {
	if err := may(ctx); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	st := &backup.Status{Job: job, Phase: backup.Succeeded, Started: time.Now(), Ended: time.Now()}
	st.Result.Snapshot = fmt.Sprintf("%064x", len(r.snapshots))
	if b := job.Task.Backup; b != nil {
		st.Result.Backup, st.Result.Partial = &restic.BackupSummary{SnapshotID: st.Result.Snapshot}, r.partial
		r.snapshots = append(r.snapshots, restic.Snapshot{ID: st.Result.Snapshot, Time: b.Time,
			Tags: []string{mover.TagBackup + b.Backup, mover.TagVolume + b.Volume, mover.TagSize + fmt.Sprint(b.Size)}})
	}
	if restore := job.Task.Restore; restore != nil && !slices.ContainsFunc(slices.Concat(r.snapshots, r.forged), func(s restic.Snapshot) bool {
		return slices.Contains(s.Tags, mover.TagBackup+restore.Backup)
	}) {
		st.Phase, st.Result.Reason, st.Result.Error = backup.Failed, mover.ReasonNotFound, "there is no such backup"
	} else if r.slow && restore != nil {
		st.Phase, st.Ended = backup.Running, time.Time{}
		st.Progress = restic.Progress{BytesDone: 25, BytesTotal: 100}
	}
	r.jobs[job.Task.ID] = st
	return nil
}

func (r *instant) Status(_ context.Context, id string) (*backup.Status, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if st := r.jobs[id]; st != nil {
		copied := *st
		return &copied, nil
	}
	return nil, backend.ErrNotFound
}

func (r *instant) Jobs(context.Context) (all []*backup.Status, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, st := range r.jobs {
		copied := *st
		all = append(all, &copied)
	}
	return all, nil
}

func (r *instant) Stop(context.Context, string) error { return nil }

func (r *instant) Release(context.Context, string) error { return nil }

func (r *instant) Remove(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.jobs, id)
	return nil
}

func (r *instant) Names(context.Context) ([]string, error) { return []string{"@shop", "offsite"}, nil }

func (r *instant) Open(_ context.Context, name string) (restic.Client, error) {
	switch name {
	case "offsite":
		return r, nil
	case "@shop":
		return shop{r}, nil
	}
	return nil, backend.ErrNotFound
}

// shop is the repository of namespace shop, with what that has written into it.
type shop struct{ *instant }

func (r shop) Snapshots(context.Context, ...string) ([]restic.Snapshot, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.forged), nil
}

func (r *instant) Snapshots(_ context.Context, tags ...string) (found []restic.Snapshot, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.snapshots {
		if !slices.ContainsFunc(tags, func(t string) bool { return !slices.Contains(s.Tags, t) }) {
			found = append(found, s)
		}
	}
	return found, nil
}

func (r *instant) Forget(_ context.Context, _ time.Duration, ids ...string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.snapshots = slices.DeleteFunc(r.snapshots, func(s restic.Snapshot) bool { return slices.Contains(ids, s.ID) })
	return nil
}
