package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// owned are one administrator's repository, and one of each of some namespaces.
type owned struct {
	*fakeRepository
	own  map[string]*fakeRepository
	err  error // of opening those
	open func(ctx context.Context)
}

func (o *owned) Names(context.Context) ([]string, error) {
	names := []string{"offsite"}
	for name := range o.own {
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

func (o *owned) Open(ctx context.Context, name string) (restic.Client, error) {
	if Owner(name) == "" {
		return o.fakeRepository.Open(ctx, name)
	}
	if o.open != nil {
		o.open(ctx)
	}
	if o.err != nil {
		return nil, fmt.Errorf("%s: %w", Title(name), o.err)
	}
	return o.own[name], nil
}

func newOwned(t *testing.T) (*bench, *owned) {
	b := newBench(t)
	o := &owned{fakeRepository: b.repository, own: map[string]*fakeRepository{"@shop": {}, "@evil": {}}}
	b.Repositories = o
	return b, o
}

func snapshotOf(id, volume, host string) restic.Snapshot {
	return restic.Snapshot{ID: strings.Repeat("e", 64), Host: host, Time: time.Unix(1, 0), Summary: &restic.BackupSummary{},
		Tags: []string{mover.TagBackup + id, mover.TagVolume + volume}}
}

// TestForgedBackups: whoever has a repository can put anything there. It is believed of
// no other repository, and of no other namespace's claims.
func TestForgedBackups(t *testing.T) {
	b, o := newOwned(t)
	o.own["@evil"].snapshots = []restic.Snapshot{snapshotOf("one", "mem/"+b.share.ID, "shop/data"), snapshotOf("two", "mem/x", "evil/data")}
	if all, err := b.List(t.Context()); err != nil || len(all) != 2 {
		t.Fatalf("%v, %v", all, err)
	}
	for _, repository := range []string{"offsite", "@shop"} {
		req := b.request("one")
		req.Repository = repository
		if _, err := b.Backup(t.Context(), req); err != nil {
			t.Errorf("a backup in %s, of a name that stands in another namespace's repository: %v", repository, err)
		}
		b.runner.jobs = map[string]*Status{}
	}
	if _, err := b.Find(t.Context(), "@shop", "two"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("found in another repository: %v", err)
	}
	want := `# HELP abaca_backup_last_files Files in the newest backup of a volume.
# TYPE abaca_backup_last_files gauge
abaca_backup_last_files{claim="evil/data",repository="@evil",volume="mem/x"} 0
`
	if err := testutil.CollectAndCompare(b.Engine, strings.NewReader(want), "abaca_backup_last_files"); err != nil {
		t.Error(err)
	}
}

// TestDeleteOfANamespace: a backup whose Secret is not there is not taken for deleted,
// but for one whose namespace is gone; and either way no mover and no snapshot stays.
func TestDeleteOfANamespace(t *testing.T) {
	b, o := newOwned(t)
	req := b.request("one")
	req.Repository = "@shop"
	if _, err := b.Backup(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	o.err = backend.ErrNotFound
	if err := b.Delete(t.Context(), "@shop", "one"); !errors.Is(err, backend.ErrInUse) || !strings.Contains(err.Error(), "Secret shop/abaca-repository") {
		t.Errorf("without its Secret: %v", err)
	}
	o.err = ErrAbandoned
	if err := b.Delete(t.Context(), "@shop", "one"); err != nil {
		t.Errorf("without its namespace: %v", err)
	}
	if len(b.runner.jobs) != 0 || b.snapshots() != 0 {
		t.Errorf("%d movers, %d snapshots", len(b.runner.jobs), b.snapshots())
	}
	if err := b.Delete(t.Context(), "@shop", "one"); err != nil {
		t.Errorf("again: %v", err)
	}
	// A list knows those that can be asked.
	for _, err := range []error{ErrAbandoned, backend.ErrNotFound} {
		o.err = err
		if _, err := b.List(t.Context()); err != nil {
			t.Error(err)
		}
	}
	o.err = backend.ErrInvalid
	if _, err := b.List(t.Context()); !errors.Is(err, backend.ErrUnavailable) {
		t.Errorf("a list without what cannot be read: %v", err)
	}
}

// TestOneAnswerAtATime: a repository of a namespace that does not answer occupies one
// request and no more, and none of another's.
func TestOneAnswerAtATime(t *testing.T) {
	b, o := newOwned(t)
	asked, answer := make(chan struct{}), make(chan struct{})
	o.open = func(context.Context) { asked <- struct{}{}; <-answer }
	go func() { _, _ = b.Find(t.Context(), "@evil", "one") }()
	<-asked
	o.open = nil
	b.Now = time.Now
	began := time.Now()
	if _, err := b.Find(t.Context(), "@evil", "two"); !errors.Is(err, backend.ErrPending) || !strings.Contains(err.Error(), "Secret evil/abaca-repository") {
		t.Errorf("another request: %v", err)
	}
	if took := time.Since(began); took > 2*turnWait {
		t.Errorf("it was kept for %s", took)
	}
	if _, err := b.Find(t.Context(), "@shop", "two"); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("another namespace: %v", err)
	}
	close(answer)
}

func TestTitle(t *testing.T) {
	for name, want := range map[string]string{"offsite": `repository "offsite"`, "@shop": `repository "@shop" (Secret shop/abaca-repository)`} {
		if got := Title(name); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if Apart("/cache", "offsite") != "/cache" || Apart("/cache", "@shop") != "/cache/@shop" {
		t.Error("what is kept of repositories is not apart")
	}
}

// TestOwnFiles: no number in a namespace's own repository has a mover request more
// memory than there is, or less than none.
func TestOwnFiles(t *testing.T) {
	b, _ := newOwned(t)
	for _, files := range []int64{1 << 62, -1 << 62} {
		for repository, want := range map[string]int64{"offsite": files, "@shop": min(max(files, 0), ownFilesMax)} {
			b.listings = map[string]listing{repository: {backups: []*Backup{{Volume: "v", Files: files}}}}
			if got := b.files(repository); got != want {
				t.Errorf("%s: %d files, want %d", repository, got, want)
			}
		}
	}
}
