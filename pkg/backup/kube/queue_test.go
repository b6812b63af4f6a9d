package kube

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
)

func TestNext(t *testing.T) {
	// An entry is NAMESPACE/ID@REPOSITORY, with + if it runs, ! if its repository
	// may not be there yet; a restore has no namespace. They were asked for in
	// this order.
	for _, test := range []struct {
		queue string
		limit int
		each  int
		want  string
	}{
		{"", 2, 2, ""},
		{"a/1@r a/2@r a/3@r", 2, 9, "1 2"},
		{"a/1@r+ a/2@r", 1, 9, ""},
		// Whoever has little goes before whoever has much.
		{"a/1@r a/2@r a/3@r b/4@r", 2, 9, "1 4"},
		{"a/1@r+ a/2@r b/3@r", 2, 9, "3"},
		{"a/1@r+ a/2@r /3@r", 2, 9, "3 2"},
		// A full repository holds nobody else up.
		{"a/1@r+ a/2@r a/3@s", 9, 1, "3"},
		{"a/1@r a/2@r a/3@s", 9, 1, "1 3"},
		// Restores wait for no backup.
		{"a/1@r+ a/2@r+ a/3@r /4@r /5@r", 2, 2, "4 5"},
		{"a/1@r+ /2@r+ /3@r /4@s a/5@r", 2, 1, "4"},
		// One makes the repository, and the others come then.
		{"a/1@r! b/2@r! c/3@s!", 9, 9, "1 3"},
		{"a/1@r!+ b/2@r! c/3@r", 9, 9, "3"},
	} {
		var queue []entry
		for i, text := range strings.Fields(test.queue) {
			bare := strings.TrimRight(text, "+!")
			name, repository, _ := strings.Cut(bare, "@")
			host, id, _ := strings.Cut(name, "/")
			task := mover.Task{ID: id, Repository: repository, Made: !strings.Contains(text, "!")}
			if task.Backup = (&mover.Backup{Host: host + "/claim"}); host == "" {
				task.Backup, task.Restore = nil, &mover.Restore{}
			}
			queue = append(queue, entry{&record{Job: backup.Job{Task: task}, Started: time.Unix(int64(i), 0)}, strings.Contains(text, "+")})
		}
		var got []string
		for _, rec := range next(queue, test.limit, test.each) {
			got = append(got, rec.Job.Task.ID)
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("of %s, %d and %d: %v, want %s", test.queue, test.limit, test.each, got, test.want)
		}
	}
}

// TestAdmit: limits are the template's, and hold whoever starts.
func TestAdmit(t *testing.T) {
	c := newCluster(t)
	for i := range 3 {
		for _, repository := range []string{"offsite", "near.by"} {
			j := job(fmt.Sprint(repository[:1], i))
			j.Task.Repository = repository
			if err := c.runner().Start(t.Context(), j, wanted); err != nil {
				t.Fatal(err)
			}
		}
	}
	if run := c.jobs(); len(run) != 2 || run[0].Labels[Mover] != "n0" || run[1].Labels[Mover] != "o0" {
		t.Fatalf("%d Jobs run", len(run))
	}
	if err := c.runner().Remove(t.Context(), "n0"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.runner().admit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if run := c.jobs(); len(run) != 2 || run[0].Labels[Mover] != "n1" || run[1].Labels[Mover] != "o0" {
		t.Errorf("%d Jobs run", len(run))
	}
}
