package backup

import (
	"context"
	"maps"
	"slices"
	"time"
)

// view is what was seen of all jobs at once. Nobody changes it.
type view struct {
	at   time.Time
	jobs []*Status
}

// jobs returns all jobs, as they were seen no longer ago than age.
func (e *Engine) jobs(ctx context.Context, age time.Duration) ([]*Status, error) {
	e.mu.Lock()
	last, forgotten := e.last, e.forgotten
	e.mu.Unlock()
	now := e.Now()
	if now.Sub(last.at) < age {
		return last.jobs, nil
	}
	jobs, err := e.Runner.Jobs(ctx)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.last.at.Before(now) && forgotten == e.forgotten {
		e.last = view{now, jobs}
	}
	return jobs, nil
}

// viewAge is how old a view may be for those who do not decide by it: Run makes one
// in each tick.
func (e *Engine) viewAge() time.Duration { return 2 * e.Tick }

// seenRunning returns a job that Run has just seen running, nil if it has not.
func (e *Engine) seenRunning(id string) *Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.Now().Sub(e.last.at) >= e.viewAge() {
		return nil
	}
	i := slices.IndexFunc(e.last.jobs, func(st *Status) bool { return st.Job.Task.ID == id && st.Phase == Running })
	if i < 0 {
		return nil
	}
	return e.last.jobs[i]
}

// saw remembers of which backups there are records.
func (e *Engine) saw(jobs []*Status) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.Now()
	maps.DeleteFunc(e.sawAt, func(_ string, at time.Time) bool { return now.Sub(at) > sawAge })
	if e.sawAt == nil {
		e.sawAt = map[string]time.Time{}
	}
	for _, st := range jobs {
		if st.Job.Task.Backup != nil {
			e.sawAt[st.Job.Task.ID] = now
		}
	}
}

// hasSeen says whether there was a record of a backup within sawAge.
func (e *Engine) hasSeen(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ok := e.sawAt[id]
	return ok
}

// learnEnded adds what movers have made and nobody has looked at yet, so that
// the next backup of a volume is compared with it. What ends in between, the mover
// sees in the repository. What is forgotten in between stays forgotten.
func (e *Engine) learnEnded(ctx context.Context) error {
	e.mu.Lock()
	forgotten := e.forgotten
	e.mu.Unlock()
	jobs, err := e.jobs(ctx, e.viewAge())
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, st := range jobs {
		if st.Phase == Succeeded && st.Result.Backup != nil && forgotten == e.forgotten {
			e.learnLocked(st.backup())
		}
	}
	return err
}
