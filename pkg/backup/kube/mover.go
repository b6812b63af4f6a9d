package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"
	"unicode/utf8"

	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mount"
	"github.com/abaca-csi/abaca/pkg/mover"
	"github.com/abaca-csi/abaca/pkg/restic"
)

const (
	// messageFile is where the kubelet looks for what a container says at its end,
	// and maxMessage how much of it Kubernetes keeps, in bytes.
	messageFile = "/dev/termination-log"
	maxMessage  = 4096
	// progressEvery is how often a mover logs how far it is.
	progressEvery = 10 * time.Second
)

// Args is what a mover is told on its command line.
type Args struct {
	Repository string // the folder of its repository
	Restic     string // the restic program
	Cache      string // restic's cache
}

// Move is the body of a mover: the kubelet has put its source in its place, and its
// task is in the environment. How it ended is the termination message; the error is
// there for the exit code.
func Move(ctx context.Context, a Args, mounts mount.Interface, now func() time.Time) error {
	result := move(ctx, a, mounts, now)
	var failed error
	if result.Error != "" {
		failed = errors.New(result.Error)
	}
	f, err := os.OpenFile(messageFile, os.O_WRONLY|os.O_TRUNC, 0)
	if err == nil {
		_, err = f.Write(message(result))
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		err = fmt.Errorf("say how it ended: %w", err)
	}
	return errors.Join(failed, err)
}

func move(ctx context.Context, a Args, mounts mount.Interface, now func() time.Time) mover.Result {
	var task mover.Task
	if err := json.Unmarshal([]byte(os.Getenv(taskVariable)), &task); err != nil {
		return mover.Result{Error: fmt.Sprintf("%s is no task: %s", taskVariable, err), Reason: mover.ReasonConfig}
	}
	repo, err := backup.OpenFolder(a.Repository, restic.Config{Program: a.Restic, CacheDir: backup.Apart(a.Cache, task.Repository)})
	if err != nil {
		return mover.Result{Error: err.Error(), Reason: mover.ReasonConfig}
	}
	log := klog.FromContext(ctx).WithValues("task", task.ID)
	log.Info("Moving", "kind", backup.Kind(task), "repository", task.Repository, "source", task.Source.String())
	report := mover.Throttled(now, now().Add(progressEvery), progressEvery, func(p restic.Progress) { logProgress(log, p) })
	result := mover.Run(ctx, task, mover.Env{Restic: repo, Mounts: mounts, Now: now, Log: log, Report: report})
	log.Info("Moved", "snapshot", result.Snapshot, "reason", result.Reason, "error", result.Error)
	return result
}

// message is a result as a termination message. What is too long loses its paths
// first, and then the middle of its error.
func message(r mover.Result) []byte {
	for {
		text, err := json.Marshal(r)
		if err != nil {
			return []byte("{}")
		}
		over := len(text) - maxMessage
		switch {
		case over <= 0:
			return text
		case len(r.Incomplete) > 0:
			r.Incomplete = r.Incomplete[:len(r.Incomplete)/2]
		case r.Error == "":
			return text // numbers alone: it cannot be
		default:
			// A byte may take six in JSON, so it may take some rounds.
			keep := max(0, len(r.Error)-max(over/6, 64)) / 2
			r.Error = cut(r.Error[:keep], false) + " … " + cut(r.Error[len(r.Error)-keep:], true)
		}
	}
}

// cut takes what is left of a character off one end of a text.
func cut(text string, front bool) string {
	for i := 0; i < utf8.UTFMax && !utf8.ValidString(text) && text != ""; i++ {
		if front {
			text = text[1:]
		} else {
			text = text[:len(text)-1]
		}
	}
	return text
}
