package kube

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/restic"
)

// A mover has no token, so how far it is it can only log. Whoever asks is answered
// with what was read last: a node that does not answer holds nobody up.
const (
	// followEvery is how often the logs of movers that run are read, followTime how
	// long that may take, and followAtOnce of how many at once.
	followEvery  = 10 * time.Second
	followTime   = 5 * time.Second
	followAtOnce = 8
	// tailLines and tailBytes bound what is read: more than is logged in a while.
	tailLines = 20
	tailBytes = 64 << 10
	// progressMessage is what a line of a mover's log is found by.
	progressMessage = "Progress"
)

// logProgress logs how far a mover is, with the keys of [restic.Progress] in JSON.
func logProgress(log klog.Logger, p restic.Progress) {
	log.Info(progressMessage, "bytesDone", p.BytesDone, "bytesTotal", p.BytesTotal, "filesDone", p.FilesDone,
		"filesTotal", p.FilesTotal, "bytesPerSecond", int64(p.Rate), "trouble", p.Trouble)
}

// follow reads how far movers are, until ctx ends.
func (r *Runner) follow(ctx context.Context) {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		if err := r.listen(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).V(2).Info("How far movers are is not known", "reason", err.Error())
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// listen reads the logs of all movers that run. What cannot be read is as it was.
func (r *Runner) listen(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, followTime)
	defer cancel()
	pods, err := r.Client.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: Mover, FieldSelector: "status.phase=" + string(corev1.PodRunning)})
	if err != nil {
		return kind(err, "list movers")
	}
	var reading sync.WaitGroup
	places, running := make(chan struct{}, followAtOnce), map[any]bool{}
	for _, p := range pods.Items {
		running[p.UID] = true
		reading.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			if at, ok := r.tail(ctx, p.Name); ok {
				r.heard.Store(p.UID, at)
			}
		})
	}
	reading.Wait()
	r.heard.Range(func(uid, _ any) bool {
		if !running[uid] {
			r.heard.Delete(uid)
		}
		return true
	})
	return nil
}

// tail reads the last that a mover has logged of how far it is.
func (r *Runner) tail(ctx context.Context, pod string) (restic.Progress, bool) {
	log, err := r.Client.CoreV1().Pods(r.Namespace).GetLogs(pod, &corev1.PodLogOptions{Container: container,
		TailLines: new(int64(tailLines)), LimitBytes: new(int64(tailBytes))}).Stream(ctx)
	if err != nil {
		return restic.Progress{}, false
	}
	defer log.Close()
	return lastProgress(log)
}

// lastProgress is what the last line of a log says that speaks of progress.
func lastProgress(log io.Reader) (last restic.Progress, ok bool) {
	lines := bufio.NewScanner(log)
	lines.Buffer(nil, tailBytes)
	for lines.Scan() {
		var line struct {
			Message string `json:"msg"`
			restic.Progress
		}
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Message == progressMessage {
			last, ok = line.Progress, true
		}
	}
	return last, ok
}

// progress is how far a mover is, as far as it was heard of.
func (r *Runner) progress(pod types.UID) restic.Progress {
	if at, ok := r.heard.Load(pod); ok {
		return at.(restic.Progress)
	}
	return restic.Progress{}
}
