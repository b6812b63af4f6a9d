package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/fake"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	ktesting "k8s.io/client-go/testing"

	"github.com/abaca-csi/abaca/pkg/schedule"
)

func claim(name string, phase corev1.PersistentVolumeClaimPhase) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{"app": "shop"}},
		Status: corev1.PersistentVolumeClaimStatus{Phase: phase}}
}

// namespace has two claims that are bound and one that is not. Its snapshots have
// the UID uid-NAME, and are ready at once unless the class is "fails".
func namespace() *Namespace {
	//lint:ignore SA1019 this client has no other one
	n := &Namespace{Name: "shop", Snapshots: snapshots.NewSimpleClientset(), Core: fake.NewClientset(
		claim("data", corev1.ClaimBound), claim("web", corev1.ClaimBound), claim("loose", corev1.ClaimPending))}
	n.Snapshots.(*snapshots.Clientset).PrependReactor("create", "volumesnapshots", func(a ktesting.Action) (bool, runtime.Object, error) {
		s := a.(ktesting.CreateAction).GetObject().(*snapshotv1.VolumeSnapshot)
		ready, message := true, "the repository refuses the password"
		s.UID, s.Status = types.UID("uid-"+s.Name), &snapshotv1.VolumeSnapshotStatus{ReadyToUse: &ready}
		if *s.Spec.VolumeSnapshotClassName == "fails" {
			s.Status = &snapshotv1.VolumeSnapshotStatus{Error: &snapshotv1.VolumeSnapshotError{Message: &message}}
		}
		return false, nil, nil // and the tracker goes on
	})
	return n
}

func (n *Namespace) names(t *testing.T) []string {
	t.Helper()
	list, err := n.Snapshots.SnapshotV1().VolumeSnapshots("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range list.Items {
		names = append(names, s.Name)
	}
	return names
}

func TestRun(t *testing.T) {
	n := namespace()
	tiers, err := schedule.ParseTiers([]string{"class=quick,keep-last=2"})
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 4, 12, 1, 0, 0, 0, time.UTC)
	run := func(at time.Time) schedule.Result {
		t.Helper()
		r, err := schedule.Run(t.Context(), n, schedule.Options{Schedule: "nightly", At: at, Claims: schedule.Selection{Names: []string{"data", "web"}},
			Tiers: tiers, Timeout: 5 * time.Second, Now: func() time.Time { return at.Add(time.Minute) }})
		if err != nil || r.ExitCode() != 0 {
			var text bytes.Buffer
			_ = r.Table(&text)
			t.Fatalf("%v\n%s", err, &text)
		}
		return r
	}
	run(at)
	run(at) // the Job is tried again
	if got := n.names(t); len(got) != 2 || got[0] != "nightly-data-quick-20260412t0100z" {
		t.Errorf("after one run: %v", got)
	}
	for day := range 3 {
		run(at.AddDate(0, 0, day+1))
	}
	if got := strings.Join(n.names(t), " "); strings.Count(got, " ") != 3 || strings.Contains(got, "20260412") || !strings.Contains(got, "nightly-web-quick-20260415t0100z") {
		t.Errorf("kept: %s", got)
	}
	made, err := n.Get(t.Context(), "nightly-web-quick-20260415t0100z")
	if err != nil || made.State != schedule.Ready || made.Claim != "web" || made.Tier != "quick" || made.UID != "uid-"+made.Name {
		t.Errorf("%+v, %v", made, err)
	}
}

func TestFailed(t *testing.T) {
	n := namespace()
	s, err := n.Create(t.Context(), schedule.Snapshot{Name: "x", Series: schedule.Series{Schedule: "nightly", Claim: "data", Tier: "fails"}, Scheduled: time.Unix(1e9, 0)})
	if err != nil || s.State != schedule.Failed || !s.Retried || !strings.Contains(s.Message, "password") {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := n.Create(t.Context(), s); !errors.Is(err, schedule.ErrExists) {
		t.Errorf("made twice: %v", err)
	}
}

// TestGoesOn: a backup that runs keeps the error of a call that has passed, and is
// pending all the same.
func TestGoesOn(t *testing.T) {
	const frame = `Failed to check and update snapshot content: failed to take snapshot of the volume local/x: "rpc error: code = %s desc = ..."`
	for _, test := range []struct {
		begun bool
		code  string
		want  schedule.State
	}{
		{true, "Unavailable", schedule.Pending}, {true, "Aborted", schedule.Pending}, {true, "InvalidArgument", schedule.Pending},
		{true, "FailedPrecondition", schedule.Failed},
		{false, "Unavailable", schedule.Failed}, {false, "InvalidArgument", schedule.Failed}, {false, "FailedPrecondition", schedule.Failed},
		{false, "Aborted", schedule.Pending}, {false, "DeadlineExceeded", schedule.Pending},
	} {
		message, no := fmt.Sprintf(frame, test.code), false
		v := &snapshotv1.VolumeSnapshot{Status: &snapshotv1.VolumeSnapshotStatus{ReadyToUse: &no, Error: &snapshotv1.VolumeSnapshotError{Message: &message}}}
		if test.begun {
			v.Status.CreationTime = &metav1.Time{Time: time.Unix(1e9, 0)}
		}
		if s := read(v); s.State != test.want || s.Message != message || s.Retried != (test.want == schedule.Failed) {
			t.Errorf("%+v: %+v", test, s)
		}
	}
}

// TestPartial: what the driver has said of a backup that lacks files is seen, once it is ready.
func TestPartial(t *testing.T) {
	yes, no := true, false
	for _, test := range []struct {
		ready *bool
		value string
		want  schedule.State
	}{{&yes, "true", schedule.Partial}, {&yes, "", schedule.Ready}, {&no, "true", schedule.Pending}} {
		v := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{schedule.PartialKey: test.value}},
			Status: &snapshotv1.VolumeSnapshotStatus{ReadyToUse: test.ready}}
		if s := read(v); s.State != test.want {
			t.Errorf("%v, %q: %s", *test.ready, test.value, s.State)
		}
	}
}

func TestClaims(t *testing.T) {
	n := namespace()
	for _, which := range []schedule.Selection{{Selector: "app=shop"}, {Names: []string{"data", "loose", "web", "nowhere"}}} {
		got, err := n.Claims(t.Context(), which)
		if err != nil || len(got) != 3 {
			t.Fatalf("%+v: %+v, %v", which, got, err)
		}
		for _, c := range got {
			if (c.Problem != "") != (c.Name == "loose") {
				t.Errorf("%+v", c)
			}
		}
	}
}

// TestWhatItIsOf: what a snapshot is of is in its spec. Labels and annotations can
// be copied to another one.
func TestWhatItIsOf(t *testing.T) {
	series, at, other := schedule.Series{Schedule: "nightly", Claim: "data", Tier: "quick"}, time.Unix(1e9, 0).UTC(), "other"
	v := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: series.Labels(), Annotations: series.Annotations(at)},
		Spec: snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &other}}}
	if s := read(v); s.Claim != "other" || s.Tier != "" || s.Schedule != "nightly" || !s.Scheduled.Equal(at) {
		t.Errorf("%+v", s)
	}
	if s := read(&snapshotv1.VolumeSnapshot{}); s.Series != (schedule.Series{}) || s.State != schedule.Pending {
		t.Errorf("%+v", s)
	}
}

func TestKinds(t *testing.T) {
	what := schema.GroupResource{Resource: "volumesnapshots"}
	for _, c := range []struct{ err, want error }{
		{apierrors.NewNotFound(what, "x"), schedule.ErrNotFound},
		{apierrors.NewAlreadyExists(what, "x"), schedule.ErrExists},
		{apierrors.NewServiceUnavailable("x"), schedule.ErrUnavailable},
		{apierrors.NewTooManyRequests("x", 1), schedule.ErrUnavailable},
		{apierrors.NewInternalError(errors.New("x")), schedule.ErrUnavailable},
		{&net.OpError{Op: "dial", Err: errors.New("refused")}, schedule.ErrUnavailable},
		{context.DeadlineExceeded, context.DeadlineExceeded},
	} {
		if got := kind(c.err); !errors.Is(got, c.want) {
			t.Errorf("%v is %v", c.err, got)
		}
	}
	if got := kind(apierrors.NewForbidden(what, "x", errors.New("no"))); errors.Is(got, schedule.ErrUnavailable) || !apierrors.IsForbidden(got) {
		t.Errorf("forbidden is %v", got)
	}
}

// TestDelete: it is deleted by its UID, and another one that has its name by now is
// not.
func TestDelete(t *testing.T) {
	n := namespace()
	var uid types.UID
	n.Snapshots.(*snapshots.Clientset).PrependReactor("delete", "volumesnapshots", func(a ktesting.Action) (bool, runtime.Object, error) {
		uid = *a.(ktesting.DeleteActionImpl).DeleteOptions.Preconditions.UID
		return true, nil, apierrors.NewConflict(schema.GroupResource{Resource: "volumesnapshots"}, "x", errors.New("the UID in the precondition"))
	})
	if err := n.Delete(t.Context(), schedule.Snapshot{Name: "x", UID: "old"}); !errors.Is(err, schedule.ErrNotFound) || uid != "old" {
		t.Errorf("%v, UID %q", err, uid)
	}
}

func TestJob(t *testing.T) {
	yes := true
	owned := func(name, kind, by string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: "shop", Name: name, OwnerReferences: []metav1.OwnerReference{{Kind: kind, Name: by, Controller: &yes}}}
	}
	n := &Namespace{Name: "shop", Core: fake.NewClientset(
		&corev1.Pod{ObjectMeta: owned("pod", "Job", "job")}, &batchv1.Job{ObjectMeta: owned("job", "CronJob", "nightly")},
		&corev1.Pod{ObjectMeta: owned("web", "ReplicaSet", "web")})}
	job, err := n.Job(t.Context(), "pod")
	if err != nil || metav1.GetControllerOf(job).Name != "nightly" {
		t.Errorf("%v, %v", job, err)
	}
	for _, pod := range []string{"web", "nowhere"} {
		if _, err := n.Job(t.Context(), pod); !errors.Is(err, schedule.ErrNotFound) {
			t.Errorf("%s: %v", pod, err)
		}
	}
}

// TestTell: one event of a run, however often it is tried.
func TestTell(t *testing.T) {
	n, at := namespace(), time.Date(2026, 4, 12, 1, 0, 0, 0, time.UTC)
	about := corev1.ObjectReference{APIVersion: "batch/v1", Kind: "CronJob", Namespace: "shop", Name: "nightly", UID: "u"}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for try := range 2 {
		if err := n.Tell(ended, about, schedule.ScheduleFailed, "two\nlines", at, at.Add(time.Duration(try)*time.Minute)); err != nil {
			t.Error(err)
		}
	}
	if err := n.Tell(ended, about, schedule.ScheduleFinished, "well", at.Add(time.Hour), at.Add(time.Hour)); err != nil {
		t.Error(err)
	}
	list, err := n.Core.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 2 {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	for _, e := range list.Items {
		if e.InvolvedObject != about || (e.Type == corev1.EventTypeWarning) != (e.Message == "two lines") {
			t.Errorf("%+v", e)
		}
	}
}
