package main

import (
	"context"
	"encoding/json"
	"errors"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/fake"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	ktesting "k8s.io/client-go/testing"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/schedule"
)

// TestMarkPartial: of a VolumeSnapshot one annotation is changed, and only of the one
// that is meant. One that has gone needs none.
func TestMarkPartial(t *testing.T) {
	//lint:ignore SA1019 this client has no other one
	client := snapshots.NewSimpleClientset(&snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "one", Annotations: map[string]string{"a": "b"}}})
	mark := markPartial(client)
	one := backup.Object{Kind: backup.VolumeSnapshot, Namespace: "shop", Name: "one"}
	if err := mark(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	got, err := client.SnapshotV1().VolumeSnapshots("shop").Get(t.Context(), "one", metav1.GetOptions{})
	if err != nil || got.Annotations[schedule.PartialKey] != "true" || got.Annotations["a"] != "b" {
		t.Errorf("%v, %v", got, err)
	}
	if err := mark(t.Context(), backup.Object{Namespace: "shop", Name: "gone"}); err != nil {
		t.Error(err)
	}
	what := schema.GroupResource{Resource: "volumesnapshots"}
	for answer, want := range map[error]error{
		apierrors.NewConflict(what, "one", errors.New("the UID in the precondition")): nil,
		apierrors.NewForbidden(what, "one", errors.New("no")):                         backend.ErrUnavailable,
		context.DeadlineExceeded: context.DeadlineExceeded,
	} {
		client.PrependReactor("patch", "volumesnapshots", func(a ktesting.Action) (bool, runtime.Object, error) {
			var patch metav1.PartialObjectMetadata
			if err := json.Unmarshal(a.(ktesting.PatchAction).GetPatch(), &patch); err != nil || patch.UID != "u" {
				t.Errorf("UID %q, %v", patch.UID, err)
			}
			return true, nil, answer
		})
		one.UID = "u"
		if err := mark(t.Context(), one); !errors.Is(err, want) {
			t.Errorf("%v became %v", answer, err)
		}
	}
}
