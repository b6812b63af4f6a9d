package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/maintain"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// listing is what a repository was last seen to hold.
type listing struct {
	at      time.Time // when it was made
	stale   bool      // something is known to have changed since
	backups []*Backup
	held    time.Time // until when maintenance holds new backups back
	// care is what maintenance has left, read from the snapshot careID; unread says that
	// there is a newer one, which cannot be read.
	care   *maintain.Record
	careID string
	unread bool
}

// Find returns one backup. ErrNotFound when there is none.
func (e *Engine) Find(ctx context.Context, repository, id string) (*Backup, error) {
	st, err := e.Runner.Status(ctx, id)
	if err == nil && st.isBackupIn(repository) {
		return st.backup(), nil
	}
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return nil, err
	}
	for _, age := range []time.Duration{listingAge, 0} {
		var found *Backup
		if found, _, err = e.lookup(ctx, repository, id, "", age); !errors.Is(err, errNoBackup) {
			return found, err
		}
	}
	return nil, fmt.Errorf("backup %s in repository %q: %w", id, repository, err)
}

// List returns the backups of all repositories, and those that are being made,
// ordered by repository and id.
func (e *Engine) List(ctx context.Context) ([]*Backup, error) {
	names, err := e.Repositories.Names(ctx)
	if err != nil {
		return nil, err
	}
	jobs, err := e.Runner.Jobs(ctx)
	if err != nil {
		return nil, err
	}
	type key struct{ repository, id string }
	all := map[key]*Backup{}
	for _, name := range names {
		backups, err := e.list(ctx, name, listingAge)
		if err != nil && unset(name, err) {
			continue
		}
		if err != nil && ctx.Err() == nil {
			// Whatever it is, it is not the request that is wrong; and a listing
			// that lacks backups would be taken for their end.
			return nil, fmt.Errorf("list backups: %w: %s", backend.ErrUnavailable, err)
		}
		if err != nil {
			return nil, err
		}
		for _, b := range backups {
			all[key{name, b.ID}] = b
		}
	}
	for _, st := range jobs {
		if st.Job.Task.Backup == nil {
			continue
		}
		// A job that has not said that all is well outranks what a repository
		// shows: restic keeps a snapshot of an incomplete backup too.
		b := st.backup()
		all[key{b.Repository, b.ID}] = b
	}
	out := make([]*Backup, 0, len(all))
	for _, b := range all {
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b *Backup) int {
		return cmp.Or(cmp.Compare(a.Repository, b.Repository), cmp.Compare(a.ID, b.ID))
	})
	return out, nil
}

// unset says that an error is of a namespace that may have a repository of its own, and
// has none.
func unset(repository string, err error) bool {
	return Owner(repository) != "" && (errors.Is(err, backend.ErrNotFound) || errors.Is(err, ErrAbandoned))
}

var errNoBackup = fmt.Errorf("no such backup: %w", backend.ErrNotFound)

// lookup finds a finished backup in a listing of at most the given age, of which
// it trusts a hit for listingAge only. With errNoBackup it returns the newest
// backup of the volume.
func (e *Engine) lookup(ctx context.Context, repository, id, volume string, age time.Duration) (*Backup, *mover.Parent, error) {
	is := func(b *Backup) bool { return b.ID == id }
	backups, err := e.list(ctx, repository, age)
	if err == nil && slices.ContainsFunc(backups, is) {
		backups, err = e.list(ctx, repository, min(age, listingAge))
	}
	if err != nil {
		return nil, nil, err
	}
	if i := slices.IndexFunc(backups, is); i >= 0 {
		return backups[i], nil, nil
	}
	parent := &mover.Parent{}
	for _, b := range backups {
		if b.Volume == volume && !b.CreatedAt.Before(parent.Time) {
			parent = &mover.Parent{Snapshot: b.Snapshot, Files: b.Files, Time: b.CreatedAt}
		}
	}
	return nil, parent, errNoBackup
}

// list returns the backups in a repository, from a listing of at most the
// given age. A repository that nobody has written to yet has none.
func (e *Engine) list(ctx context.Context, repository string, age time.Duration) (_ []*Backup, err error) {
	e.mu.Lock()
	l, ok := e.listings[repository]
	e.mu.Unlock()
	if ok && !l.stale && e.Now().Sub(l.at) < age {
		return l.backups, nil
	}
	asked := ctx
	defer func() { e.setUp(asked, repository, err) }()
	repo, turn, err := e.open(ctx, repository)
	defer turn()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, repositoryTimeout)
	defer cancel()
	at := e.Now()
	e.mu.Lock()
	e.asking++
	before, forgotten := len(e.learned), e.forgotten
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.asking--; e.asking == 0 {
			e.learned = nil
		}
	}()
	snapshots, err := repo.Snapshots(ctx)
	switch {
	case errors.Is(err, restic.ErrIncomplete):
		// One damaged snapshot must not hide the backups of all volumes.
		klog.FromContext(ctx).Error(err, "Repository holds snapshots that cannot be read", "repository", repository)
	case err != nil && !errors.Is(err, restic.ErrNoRepository):
		return nil, repositoryError(asked, repository, err)
	}
	care, careID, unread := l.care, maintain.LatestID(snapshots), false
	if careID != l.careID {
		read, err := maintain.Latest(ctx, repo, snapshots)
		if unread = err != nil; unread {
			klog.FromContext(ctx).Error(err, "What maintenance has left cannot be read", "repository", repository)
			careID = l.careID // the next listing tries again
		}
		if !unread || care == nil {
			care = read
		}
	}
	backups, partial := make([]*Backup, 0, len(snapshots)), map[string]bool{}
	for _, s := range snapshots {
		if b := fromTags(repository, s); b != nil {
			backups = append(backups, b)
		}
		for _, tag := range s.Tags {
			if id, ok := strings.CutPrefix(tag, mover.TagPartial); ok {
				partial[id] = true
			}
		}
	}
	for _, b := range backups {
		b.Partial = partial[b.ID]
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.listings == nil {
		e.listings = map[string]listing{}
	}
	if forgotten != e.forgotten || e.listings[repository].at.After(at) {
		return backups, nil // it may have what was deleted while restic listed, or lack what a later one has
	}
	for _, b := range e.learned[before:] {
		if b.Repository == repository {
			backups = with(backups, b)
		}
	}
	e.listings[repository] = listing{at: at, backups: backups, held: mover.Held(snapshots, at), care: care, careID: careID, unread: unread}
	return backups, nil
}

// setUp remembers what an attempt to list a repository has come to. One that another
// request kept from being made, or that the caller did not await, says nothing; what is
// no repository has nothing to say either.
func (e *Engine) setUp(ctx context.Context, repository string, err error) {
	if err != nil && (ctx.Err() != nil || errors.Is(err, backend.ErrPending)) {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if errors.Is(err, backend.ErrNotFound) || errors.Is(err, ErrAbandoned) {
		delete(e.up, repository)
		return
	}
	if e.up == nil {
		e.up = map[string]bool{}
	}
	e.up[repository] = err == nil
}

// open opens a repository. The caller has its turn there until it calls turn, which is
// never nil: requests have few workers, which one namespace whose server does not
// answer must not keep from the others. An administrator's has no turns.
func (e *Engine) open(ctx context.Context, repository string) (repo restic.Client, turn func(), err error) {
	turn = func() {}
	for until := e.Now().Add(turnWait); Owner(repository) != ""; {
		release, busy := e.asked.TryLock(repository)
		if busy == "" {
			turn = release
			break
		}
		if e.Now().After(until) || ctx.Err() != nil {
			return nil, turn, fmt.Errorf("%s has not answered another request yet: %w", Title(repository), backend.ErrPending)
		}
		select {
		case <-ctx.Done():
		case <-time.After(turnPoll):
		}
	}
	repo, err = e.Repositories.Open(ctx, repository)
	return repo, turn, err
}

// nowhereElse returns ErrConflict when another repository is known to have a
// backup of that name. What a namespace's own says is believed of that one only.
func (e *Engine) nowhereElse(req Request) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for repository, l := range e.listings {
		if repository == req.Repository || Owner(repository) != "" {
			continue
		}
		for _, b := range l.backups {
			if b.ID == req.ID {
				return fits(b, req)
			}
		}
	}
	return nil
}

func fits(b *Backup, req Request) error {
	if b.Volume != req.Volume || b.Repository != req.Repository {
		return fmt.Errorf("backup %q exists, of volume %q in repository %q: %w",
			req.Name, b.Volume, b.Repository, backend.ErrConflict)
	}
	return nil
}

// forgetOthers drops what is known of repositories that are there no more.
func (e *Engine) forgetOthers(names []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	maps.DeleteFunc(e.listings, func(name string, _ listing) bool { return !slices.Contains(names, name) })
	maps.DeleteFunc(e.up, func(name string, _ bool) bool { return !slices.Contains(names, name) })
}

// held says that maintenance holds new backups back, as the repository was last
// seen. What is seen late only makes maintenance wait for longer.
func (e *Engine) held(repository string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.listings[repository].held.After(e.Now())
}

// Made says whether a repository is known to be there.
func (e *Engine) Made(repository string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.listings[repository].backups) > 0
}

// ownFilesMax is how many files a namespace's own repository is believed to hold: its
// owner can have written any number, and movers request memory by it.
const ownFilesMax = 16 << 20

// files counts the files of the newest backup of each volume.
func (e *Engine) files(repository string) (n int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	newest := map[string]*Backup{}
	for _, b := range e.listings[repository].backups {
		if old := newest[b.Volume]; old == nil || b.CreatedAt.After(old.CreatedAt) {
			newest[b.Volume] = b
		}
	}
	for _, b := range newest {
		n += b.Files
	}
	if Owner(repository) != "" {
		n = min(max(n, 0), ownFilesMax)
	}
	return n
}

// learn adds a backup that has just been made to what is known.
func (e *Engine) learn(b *Backup) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.learnLocked(b)
}

// learnLocked is learn for who holds mu.
func (e *Engine) learnLocked(b *Backup) {
	l, ok := e.listings[b.Repository]
	if slices.ContainsFunc(l.backups, func(o *Backup) bool { return o.ID == b.ID && o.Snapshot == b.Snapshot && o.Partial == b.Partial }) {
		return
	}
	if e.asking > 0 {
		e.learned = append(e.learned, b)
	}
	if ok {
		l.backups = with(l.backups, b)
		e.listings[b.Repository] = l
	}
}

// with is a copy of backups that has b, and no other of its id.
func with(backups []*Backup, b *Backup) []*Backup {
	return append(slices.DeleteFunc(slices.Clone(backups), func(o *Backup) bool { return o.ID == b.ID }), b)
}

// forgetListing makes the next call read the repository again, and the jobs, which
// may have made what has been forgotten. The old listing stays for the metrics.
func (e *Engine) forgetListing(repository string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last = view{}
	e.forgotten++
	if l, ok := e.listings[repository]; ok {
		l.stale = true
		e.listings[repository] = l
	}
}

func describe(job Job) *Backup {
	b := job.Task.Backup
	if b == nil {
		return &Backup{ID: job.Task.ID, Repository: job.Task.Repository}
	}
	return &Backup{ID: b.Backup, Repository: job.Task.Repository, Name: b.Name, Volume: b.Volume, Size: b.Size, CreatedAt: b.Time, Host: b.Host}
}

// fromTags reads a backup from its restic snapshot; nil if it is not one of
// ours.
func fromTags(repository string, s restic.Snapshot) *Backup {
	b := &Backup{Repository: repository, CreatedAt: s.Time.Truncate(time.Second), Ready: true, Snapshot: s.ID, Host: s.Host, Summary: s.Summary}
	if s.Summary != nil {
		b.Files = s.Summary.TotalFiles
	}
	for _, tag := range s.Tags {
		if v, ok := strings.CutPrefix(tag, mover.TagBackup); ok {
			b.ID = v
		} else if v, ok := strings.CutPrefix(tag, mover.TagVolume); ok {
			b.Volume = v
		} else if v, ok := strings.CutPrefix(tag, mover.TagName); ok {
			b.Name, _ = url.QueryUnescape(v) // only shown
		} else if v, ok := strings.CutPrefix(tag, mover.TagSize); ok {
			size, _ := strconv.ParseInt(v, 10, 64)
			b.Size = max(size, 0)
		}
	}
	if b.ID == "" || b.Volume == "" {
		return nil
	}
	return b
}

// repositoryError puts an error of restic into the terms of package backend, but
// for ErrPassword. ctx is the caller's: a time limit of our own is a repository
// that is not there.
func repositoryError(ctx context.Context, repository string, err error) error {
	kind := backend.ErrUnavailable
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", Title(repository), err)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w: %s", Title(repository), kind, err)
	case errors.Is(err, restic.ErrWrongPassword):
		kind = ErrPassword
	case errors.Is(err, restic.ErrConfig):
		kind = backend.ErrInvalid
	case errors.Is(err, restic.ErrLocked):
		kind = backend.ErrPending
	}
	return fmt.Errorf("%s: %w: %w", Title(repository), kind, err)
}
