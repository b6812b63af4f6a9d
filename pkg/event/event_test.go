package event

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// TestPut: what is told twice is one event, and what differs in object, reason or
// subject is another.
func TestPut(t *testing.T) {
	client, noon := fake.NewClientset(), time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	long := strings.Repeat("n", 250)
	put := func(change func(*Event)) {
		t.Helper()
		e := Event{Object: corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: "shop", Name: long, UID: "u"},
			Reason: "Late", Subject: "a", Text: "one", Count: 1, First: noon, Last: noon, Source: "driver"}
		change(&e)
		if err := Put(t.Context(), client, e); err != nil {
			t.Error(err)
		}
	}
	put(func(*Event) {})
	put(func(e *Event) { e.Text, e.Count, e.First, e.Last = "two", 2, noon.Add(time.Hour), noon.Add(time.Hour) })
	put(func(e *Event) { e.Object.UID, e.Warning = "v", true })
	put(func(e *Event) { e.Reason = "Later" })
	put(func(e *Event) { e.Subject = "b" })
	list, err := client.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 4 {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	for _, e := range list.Items {
		if len(e.Name) > 253 || !strings.HasPrefix(e.Name, "nnn") || (e.Type == corev1.EventTypeWarning) != (e.InvolvedObject.UID == "v") {
			t.Errorf("%+v", e)
		}
		if e.Message == "two" {
			e.ObjectMeta, e.TypeMeta = metav1.ObjectMeta{}, metav1.TypeMeta{}
			want := corev1.Event{InvolvedObject: e.InvolvedObject, Reason: "Late", Message: "two", Type: corev1.EventTypeNormal, Count: 2,
				FirstTimestamp: metav1.NewTime(noon), LastTimestamp: metav1.NewTime(noon.Add(time.Hour)),
				Source: corev1.EventSource{Component: "driver"}, ReportingController: "driver"}
			if diff := cmp.Diff(want, e); diff != "" {
				t.Errorf("told again (-want +got):\n%s", diff)
			}
		}
	}
}

func TestShorten(t *testing.T) {
	if got := shorten("short"); got != "short" {
		t.Error(got)
	}
	for n := range 4 {
		got := shorten(strings.Repeat("x", n) + strings.Repeat("ü", 1000) + "do this")
		if len(got) > maxText || len(got) < maxText-4 || !utf8.ValidString(got) || !strings.HasSuffix(got, "do this") {
			t.Errorf("%d bytes: %s", len(got), got)
		}
	}
}
