package keys

import (
	"errors"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func TestSecret(t *testing.T) {
	client := fake.NewClientset(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "abaca", Name: "keys"},
		Data: map[string][]byte{"theirs": []byte("stays")}})
	s := &Secret{Client: client, Namespace: "abaca", Name: "keys"}
	ctx := t.Context()
	if _, err := s.Key(ctx, "abaca-1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a key that is not there: %v", err)
	}
	for _, key := range []string{"secret", "secret", "another"} {
		if err := s.Put(ctx, "abaca-1", key); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Key(ctx, "abaca-1"); err != nil || got != key {
			t.Errorf("got %q, %v", got, err)
		}
	}
	var users sync.WaitGroup
	for _, id := range []string{"a", "b", "c", "d"} {
		users.Go(func() {
			if err := s.Put(ctx, id, "key of "+id); err != nil {
				t.Error(err)
			}
		})
	}
	users.Wait()
	for range 2 {
		if err := s.Delete(ctx, "abaca-1"); err != nil {
			t.Error(err)
		}
	}
	left, err := client.CoreV1().Secrets("abaca").Get(ctx, "keys", metav1.GetOptions{})
	if err != nil || len(left.Data) != 5 || string(left.Data["theirs"]) != "stays" || string(left.Data["d"]) != "key of d" {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := s.Put(ctx, "../x", "secret"); err == nil {
		t.Error("a name that is a path")
	}
	gone := &Secret{Client: client, Namespace: "abaca", Name: "nowhere"}
	if err := gone.Put(ctx, "a", "k"); err == nil {
		t.Error("kept in a Secret that is not there")
	}
}
