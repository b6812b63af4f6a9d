// Package event writes events of Kubernetes, one for each thing that happens.
//
// client-go's recorders name an event by the time at which it was told, so that two
// processes that see one thing, or one that is started again, make two of it. Here
// the name is that of what has happened.
package event

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

const (
	// maxText is how much of a text is kept, in bytes: what events.k8s.io/v1 allows.
	maxText = 1024
	// maxObject is how much of its object's name is in that of an event.
	maxObject = 200
)

// Event is something that has happened. Those of one object, reason and subject are
// one event.
type Event struct {
	Object corev1.ObjectReference // kubectl describe shows it if the UID is right
	Reason string
	// Subject says what has happened among what may happen to the object for that
	// reason.
	Subject string
	Text    string // for people
	Warning bool
	Count   int
	// First and Last are when it has happened, and when it has for the last time.
	First, Last time.Time
	Source      string // who tells it
}

// Put makes an event; of one that is there, it changes the text, the count and the
// last time. It needs the verbs create and patch on events.
func Put(ctx context.Context, client kubernetes.Interface, e Event) error {
	o := e.object()
	events := client.CoreV1().Events(o.Namespace)
	_, err := events.Create(ctx, o, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	patch, err := json.Marshal(map[string]any{"message": o.Message, "count": o.Count, "lastTimestamp": o.LastTimestamp})
	if err != nil {
		return err
	}
	_, err = events.Patch(ctx, o.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

func (e Event) object() *corev1.Event {
	kind := corev1.EventTypeNormal
	if e.Warning {
		kind = corev1.EventTypeWarning
	}
	sum := sha256.Sum256([]byte(strings.Join([]string{e.Object.Kind, string(e.Object.UID), e.Reason, e.Subject}, "\n")))
	name := strings.TrimRight(e.Object.Name[:min(len(e.Object.Name), maxObject)], ".-") + "." + hex.EncodeToString(sum[:8])
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Name: name, Namespace: e.Object.Namespace},
		InvolvedObject: e.Object, Reason: e.Reason, Message: shorten(e.Text), Type: kind, Count: int32(e.Count),
		FirstTimestamp: metav1.NewTime(e.First), LastTimestamp: metav1.NewTime(e.Last),
		Source: corev1.EventSource{Component: e.Source}, ReportingController: e.Source,
	}
}

// shorten takes the middle out of a text that is too long: its end says what to do.
func shorten(text string) string {
	if len(text) <= maxText {
		return text
	}
	const gap = " … "
	end, begin := (maxText-len(gap))/2, len(text)-(maxText-len(gap))/2
	for !utf8.RuneStart(text[end]) {
		end--
	}
	for !utf8.RuneStart(text[begin]) {
		begin++
	}
	return text[:end] + gap + text[begin:]
}
