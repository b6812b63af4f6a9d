package kube

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/abaca-csi/abaca/pkg/backup"
)

func news(reason backup.EventReason, subject, text string, count int) backup.Event {
	at := time.Date(2026, 11, 24, 12, count, 0, 0, time.UTC)
	return backup.Event{Object: backup.Object{Kind: backup.VolumeSnapshot, Namespace: "shop", Name: "nightly", UID: "u"},
		Reason: reason, Subject: subject, Text: text, Count: count, First: at, Last: at}
}

// drain runs a recorder until it has written what it was told.
func drain(e *Events) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	e.Run(ctx)
}

// TestEventsOnce: what several controllers tell, or one after a restart, is one
// event; what is told again is counted.
func TestEventsOnce(t *testing.T) {
	client := fake.NewClientset()
	for _, text := range []string{"first", "second"} {
		e := NewEvents(client, "driver")
		e.Record(t.Context(), news(backup.BackupStarted, "a", "begun", 1))
		e.Record(t.Context(), news(backup.BackupFailed, "a", text, 1))
		e.Record(t.Context(), news(backup.BackupDelayed, "a", text, 1))
		e.Record(t.Context(), news(backup.BackupDelayed, "a", text, 2))
		e.Record(t.Context(), news(backup.BackupDelayed, "b", strings.Repeat("ü", 2000), 1))
		drain(e)
	}
	list, err := client.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 4 {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	for _, e := range list.Items {
		kind := corev1.EventTypeWarning
		if e.Reason == string(backup.BackupStarted) {
			kind = corev1.EventTypeNormal
		}
		if o := e.InvolvedObject; e.Type != kind || o.UID != "u" || o.Kind != "VolumeSnapshot" || o.APIVersion != "snapshot.storage.k8s.io/v1" ||
			e.Source.Component != "driver" || len(e.Message) > 1024 || e.Reason == "" {
			t.Errorf("%+v", e)
		}
		if e.Message == "second" && e.Reason == string(backup.BackupDelayed) && (e.Count != 2 || e.LastTimestamp.Minute() != 2 || e.FirstTimestamp.Minute() != 1) {
			t.Errorf("told again: %+v", e)
		}
	}
}

// TestEventsDoNotBlock: a recorder whose API does not answer takes no time of those
// who tell it, and keeps a bounded number.
func TestEventsDoNotBlock(t *testing.T) {
	client, called := fake.NewClientset(), 0
	client.PrependReactor("*", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
		called++
		return true, nil, errors.New("connection refused")
	})
	e := NewEvents(client, "driver")
	for range 3 * eventQueue {
		e.Record(t.Context(), news(backup.BackupStarted, "a", "begun", 1))
	}
	if len(e.queue) != eventQueue {
		t.Errorf("%d wait", len(e.queue))
	}
	e = NewEvents(client, "driver")
	e.Record(t.Context(), news(backup.BackupStarted, "a", "begun", 1))
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	e.Run(ctx)
	if called != 2 {
		t.Errorf("%d calls in 1.5 s", called)
	}
}
