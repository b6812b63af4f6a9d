package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mover"
)

// record is what the ConfigMap of a job holds. Every change of it is made on the
// version that was read, so of two controllers that decide at once one has not.
type record struct {
	Job     backup.Job `json:"job"`
	Started time.Time  `json:"started"`
	// Name is that of the attempt's objects, and UID that of its Job, without which
	// nobody lets that run. Without them the job is only claimed: somebody asks
	// whether it is wanted.
	Name string    `json:"name,omitempty"`
	UID  types.UID `json:"uid,omitempty"`
	// Phase is set once the attempt is over, whatever its objects say.
	Phase   backup.Phase `json:"phase,omitempty"`
	Result  mover.Result `json:"result"`
	Trouble string       `json:"trouble,omitempty"`
	Ended   time.Time    `json:"ended"`
	// Unlocked says that no lock of the attempt is left in the repository, if it
	// may have left one.
	Unlocked bool `json:"unlocked,omitempty"`

	version string // of the ConfigMap
}

func (r *record) claimed() bool { return r.UID == "" && r.Phase == "" }

// end makes the attempt one that is over.
func (r *record) end(st *backup.Status) {
	r.Phase, r.Result, r.Trouble, r.Ended = st.Phase, st.Result, st.Trouble, st.Ended
}

// abrupt says that a mover may have ended without removing its lock.
func (r *record) abrupt() bool {
	return r.Phase == backup.Interrupted || r.Result.Reason == mover.ReasonDeleted || r.Result.Reason == mover.ReasonStopped
}

func (r *record) status() *backup.Status {
	return &backup.Status{Job: r.Job, Started: r.Started, Phase: r.Phase, Result: r.Result, Trouble: r.Trouble, Ended: r.Ended}
}

func parseRecord(c *corev1.ConfigMap) (*record, error) {
	r := &record{version: c.ResourceVersion}
	err := json.Unmarshal([]byte(c.Data[recordKey]), r)
	if task := r.Job.Task; err == nil && (recordName(task.ID) != c.Name || (task.Backup == nil) == (task.Restore == nil)) {
		err = errors.New("it has no task, or that of another")
	}
	if err != nil {
		return nil, fmt.Errorf("ConfigMap %s is not a record of a mover, and is left alone; delete it if nobody needs it: %w", c.Name, err)
	}
	return r, nil
}

// read returns the record of a job. backend.ErrNotFound when there is none.
func (r *Runner) read(ctx context.Context, id string) (*record, error) {
	c, err := r.Client.CoreV1().ConfigMaps(r.Namespace).Get(ctx, recordName(id), metav1.GetOptions{})
	if err != nil {
		return nil, kind(err, "record of mover %s", id)
	}
	return parseRecord(c)
}

// write makes a record, or replaces the one that was read. backend.ErrPending when
// somebody else has been faster.
func (r *Runner) write(ctx context.Context, rec *record) error {
	id := rec.Job.Task.ID
	text, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	maps := r.Client.CoreV1().ConfigMaps(r.Namespace)
	c := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: recordName(id), Labels: map[string]string{Mover: id}, ResourceVersion: rec.version},
		Data:       map[string]string{recordKey: string(text)},
	}
	if rec.version == "" {
		c, err = maps.Create(ctx, c, metav1.CreateOptions{})
	} else {
		c, err = maps.Update(ctx, c, metav1.UpdateOptions{})
	}
	if apierrors.IsNotFound(err) {
		err = fmt.Errorf("it has been removed meanwhile: %w", backend.ErrPending)
	}
	if err != nil {
		return kind(err, "record of mover %s", id)
	}
	rec.version = c.ResourceVersion
	return nil
}

// drop removes the record that was read. backend.ErrPending when it has changed.
func (r *Runner) drop(ctx context.Context, rec *record) error {
	id := rec.Job.Task.ID
	err := r.Client.CoreV1().ConfigMaps(r.Namespace).Delete(ctx, recordName(id),
		metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &rec.version}})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return kind(err, "remove record of mover %s", id)
}

// kind puts an error of the Kubernetes API into the terms of package backend.
func kind(err error, format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, backend.ErrPending):
		return fmt.Errorf("%s: %w", what, err)
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%s: %w: %w", what, backend.ErrNotFound, err)
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
		return fmt.Errorf("%s: another controller has been faster: %w: %w", what, backend.ErrPending, err)
	}
	return fmt.Errorf("%s: %w: %w", what, backend.ErrUnavailable, err)
}
