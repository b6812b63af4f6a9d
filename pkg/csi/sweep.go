package csi

import (
	"context"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
)

const (
	// sweepSoon is when backends are swept first, and again while they wait for
	// something; sweepRarely is when they do not. Each is half as long to one and a
	// half times as long, so that several controllers do not do the same at once.
	sweepSoon   = 3 * time.Minute
	sweepRarely = time.Hour
)

// Sweep has backends do what they have put off, until ctx ends. Several controllers
// may do so at once.
func (d *Driver) Sweep(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	for name, b := range d.Backends {
		s, ok := b.(backend.Sweeper)
		if !ok {
			continue
		}
		all.Go(func() {
			ctx := klog.NewContext(ctx, klog.FromContext(ctx).WithValues("backend", name))
			said := map[string]bool{}
			for pause := sweepSoon; ; {
				select {
				case <-ctx.Done():
					return
				case <-time.After(pause/2 + rand.N(pause)):
				}
				if pause = sweepRarely; sweep(ctx, s, said) {
					pause = sweepSoon
				}
			}
		})
	}
}

// sweep sweeps a backend and says whether there is something to wait for. What was
// said the last time is not said again.
func sweep(ctx context.Context, s backend.Sweeper, said map[string]bool) bool {
	log := klog.FromContext(ctx)
	waiting, err := s.Sweep(ctx)
	if ctx.Err() != nil {
		return false
	}
	before := maps.Clone(said)
	clear(said)
	for _, text := range waiting {
		if said[text] = true; !before[text] {
			log.Info("Something waits", "what", text)
		}
	}
	if err != nil {
		if said[err.Error()] = true; !before[err.Error()] {
			log.Error(err, "Doing what was put off")
		}
	}
	return len(said) > 0
}
