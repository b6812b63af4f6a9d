package csi

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/once"
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
			var said once.Said
			for pause := sweepSoon; ; {
				select {
				case <-ctx.Done():
					return
				case <-time.After(pause/2 + rand.N(pause)):
				}
				if pause = sweepRarely; sweep(ctx, s, &said) {
					pause = sweepSoon
				}
			}
		})
	}
}

// sweep sweeps a backend and says whether there is something to wait for.
func sweep(ctx context.Context, s backend.Sweeper, said *once.Said) bool {
	log := klog.FromContext(ctx)
	waiting, err := s.Sweep(ctx)
	if ctx.Err() != nil {
		return false
	}
	said.Next()
	for _, text := range waiting {
		if said.New(text) {
			log.Info("Something waits", "what", text)
		}
	}
	if err != nil && said.New(err.Error()) {
		log.Error(err, "Doing what was put off")
	}
	return err != nil || len(waiting) > 0
}
