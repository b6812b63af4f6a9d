package kube

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/memory"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// Repositories of the cluster hold nothing.
func (c *cluster) Snapshots(context.Context, ...string) ([]restic.Snapshot, error) { return nil, nil }

// TestRequestsOfRestores: what restores cost the Kubernetes API that wait for their turn.
// The driver may ask it 50 times a second, for everything.
func TestRequestsOfRestores(t *testing.T) {
	const (
		restores = 100
		wait     = 5 * time.Second // of a call of the orchestrator's
	)
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		ctx, cancel := context.WithCancel(t.Context())
		runner := c.runner()
		runner.Now = time.Now
		store := memory.NewStore("")
		store.Now = time.Now
		engine := &backup.Engine{Backends: map[string]backend.Backend{"mem": store.Open()}, Repositories: c, Runner: runner, Now: time.Now, Tick: 2 * time.Second}
		runner.Made = engine.Made
		var beside, calls sync.WaitGroup
		beside.Go(func() { engine.Run(ctx) })
		beside.Go(func() { runner.Run(ctx, engine.Tick) })
		time.Sleep(10 * time.Second)
		requests := func(do func()) int {
			c.kill(0)
			do()
			synctest.Wait()
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.calls
		}
		idle := requests(func() { time.Sleep(wait) })
		call := func() {
			for i := range restores {
				calls.Go(func() {
					name := fmt.Sprintf("pvc-%d", i)
					share, err := engine.Backends["mem"].CreateShare(ctx, backend.CreateShareRequest{Name: name, MinSize: 1, Role: backend.RoleUser, Draft: true})
					if err != nil {
						t.Error(err)
						return
					}
					st, err := engine.AwaitRestore(ctx, wait, backup.RestoreRequest{ID: fmt.Sprintf("restore-%d", i), Repository: "offsite", Backup: "b",
						Volume: "mem/" + share.ID, Name: name, Backend: "mem", Share: share.ID, Wanted: wanted})
					if err != nil || st.Phase != backup.Running {
						t.Errorf("%s: %+v, %v", name, st, err)
					}
				})
			}
			calls.Wait()
		}
		begin := requests(call) - idle
		waiting := requests(call) - idle
		t.Logf("idle: %.1f requests a second; to begin: %.1f for each restore; to wait for %s: %.1f for each", float64(idle)/wait.Seconds(),
			float64(begin)/restores, wait, float64(waiting)/restores)
		if begin > 25*restores || waiting > 5*restores {
			t.Error("a hundred of them leave the driver no requests for others")
		}
		if run := c.jobs(); len(run) != 1 {
			t.Errorf("%d restores run", len(run))
		}
		cancel()
		beside.Wait()
	})
}
