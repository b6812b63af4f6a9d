package keys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

// Secret keeps keys in one Secret of a cluster, which is there already: an entry a
// user. Whoever uses it needs the verbs get and patch on this one Secret, and a
// node only get, so that it can read nothing else of the namespace. A Secret
// holds 1 MiB, which is about 10,000 keys of CephX.
type Secret struct {
	Client          kubernetes.Interface
	Namespace, Name string
}

// ErrNotFound: there is no key of the user.
var ErrNotFound = errors.New("there is no such key")

func (s *Secret) String() string { return "Secret " + s.Namespace + "/" + s.Name }

// Put keeps the key of a user, in the place of one that was there. No error holds
// a key.
func (s *Secret) Put(ctx context.Context, id, key string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("keep a key: %q cannot be the name of one", id)
	}
	if old, err := s.Key(ctx, id); err == nil && old == key {
		return nil
	}
	bytes := []byte(key)
	if err := s.patch(ctx, id, &bytes); err != nil {
		return fmt.Errorf("keep the key of %s: %w", id, err)
	}
	return nil
}

// Delete removes the key of a user. One that is not there is nil.
func (s *Secret) Delete(ctx context.Context, id string) error {
	if !validID.MatchString(id) {
		return nil
	}
	if err := s.patch(ctx, id, nil); err != nil {
		return fmt.Errorf("remove the key of %s: %w", id, err)
	}
	return nil
}

// patch sets one entry and leaves the others, whoever writes them meanwhile.
func (s *Secret) patch(ctx context.Context, id string, value *[]byte) error {
	patch, err := json.Marshal(map[string]any{"data": map[string]*[]byte{id: value}})
	if err != nil {
		return err
	}
	_, err = s.Client.CoreV1().Secrets(s.Namespace).Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	switch {
	case apierrors.IsInvalid(err), apierrors.IsRequestEntityTooLargeError(err):
		return fmt.Errorf("the %s is full: %s", s, apierrors.ReasonForError(err)) // not its text, which may quote
	case err != nil:
		return fmt.Errorf("%s: %w", s, err)
	}
	return nil
}

// Key returns the key of a user.
func (s *Secret) Key(ctx context.Context, id string) (string, error) {
	secret, err := s.Client.CoreV1().Secrets(s.Namespace).Get(ctx, s.Name, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("%s: %w", s, err)
	}
	key, ok := secret.Data[id]
	if !ok {
		return "", fmt.Errorf("%s, %s: %w", s, id, ErrNotFound)
	}
	return string(key), nil
}
