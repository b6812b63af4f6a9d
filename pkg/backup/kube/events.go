package kube

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/event"
)

const (
	// eventQueue is how many events wait to be written; what comes when it is full
	// is dropped.
	eventQueue = 1000
	// eventTime bounds one call, and eventTries is how often an API is asked that
	// does not answer.
	eventTime  = 10 * time.Second
	eventTries = 3
)

// Events writes events of a driver to its objects. It needs the verbs create and
// patch on events.
type Events struct {
	client kubernetes.Interface
	driver string
	queue  chan backup.Event
}

var _ backup.Recorder = (*Events)(nil)

// NewEvents returns a recorder that writes while Run does.
func NewEvents(client kubernetes.Interface, driver string) *Events {
	return &Events{client: client, driver: driver, queue: make(chan backup.Event, eventQueue)}
}

// Record implements [backup.Recorder].
func (e *Events) Record(ctx context.Context, news backup.Event) {
	select {
	case e.queue <- news:
	default:
		klog.FromContext(ctx).Info("Event is not written: too many wait", "object", news.Object.String(), "reason", news.Reason)
	}
}

// Run writes events until ctx ends, and then those that wait.
func (e *Events) Run(ctx context.Context) {
	for {
		select {
		case news := <-e.queue:
			e.write(ctx, news)
			continue
		case <-ctx.Done():
		}
		// The last word of a controller that ends.
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), eventTime)
		defer cancel()
		for {
			select {
			case news := <-e.queue:
				e.write(last, news)
			default:
				return
			}
		}
	}
}

func (e *Events) write(ctx context.Context, news backup.Event) {
	var err error
	for try := range eventTries {
		if err = e.put(context.WithoutCancel(ctx), news); err == nil || !passing(err) {
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second << try):
		}
	}
	// A namespace that is on its way out takes none.
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		klog.FromContext(ctx).Error(err, "Event is not written", "object", news.Object.String(), "reason", news.Reason)
	}
}

// passing says that an API may yet take what it has not taken.
func passing(err error) bool {
	return apierrors.ReasonForError(err) == metav1.StatusReasonUnknown || apierrors.IsTimeout(err) || apierrors.IsServerTimeout(err) ||
		apierrors.IsTooManyRequests(err) || apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err)
}

func (e *Events) put(ctx context.Context, news backup.Event) error {
	ctx, cancel := context.WithTimeout(ctx, eventTime)
	defer cancel()
	about := corev1.ObjectReference{APIVersion: "v1", Kind: news.Object.Kind, Namespace: news.Object.Namespace, Name: news.Object.Name,
		UID: types.UID(news.Object.UID)}
	if about.Kind == backup.VolumeSnapshot {
		about.APIVersion = "snapshot.storage.k8s.io/v1"
	}
	return event.Put(ctx, e.client, event.Event{Object: about, Reason: string(news.Reason), Subject: news.Subject, Text: news.Text,
		Warning: news.Reason.Warning(), Count: news.Count, First: news.First, Last: news.Last, Source: e.driver})
}
