package kube

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
)

// ownRepositories are those of a cluster in which namespaces shop and bank may have one.
func (c *cluster) ownRepositories() Repositories {
	c.Helper()
	templates := c.client.CoreV1().PodTemplates("abaca")
	t, err := templates.Get(c.Context(), "mover", metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	t.Annotations[Namespaces] = "shop,bank"
	if _, err := templates.Update(c.Context(), t, metav1.UpdateOptions{}); err != nil {
		c.Fatal(err)
	}
	for _, name := range []string{"shop", "bank", "blog"} {
		c.add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})
	}
	return Repositories{Client: c.client, Namespace: "abaca", Template: "mover", Directory: backup.Directory{
		Path: c.TempDir(), Program: "true", CacheDir: c.TempDir(), SeenDir: c.TempDir()}}
}

func (c *cluster) add(o runtime.Object) {
	c.Helper()
	if err := c.client.Tracker().Add(o); err != nil {
		c.Fatal(err)
	}
}

func ownSecretOf(namespace string, pairs ...string) *corev1.Secret {
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: backup.SecretName, Namespace: namespace}, Data: map[string][]byte{
		"RESTIC_REPOSITORY": []byte("rest:https://rest.example.org/"), "RESTIC_PASSWORD": []byte("horse")}}
	for i := 0; i < len(pairs); i += 2 {
		s.Data[pairs[i]] = []byte(pairs[i+1])
	}
	return s
}

// TestOwn: a namespace's own repository is its Secret, if it may have one, and an error
// says what is wrong with it.
func TestOwn(t *testing.T) {
	c := newCluster(t)
	r, ctx := c.ownRepositories(), t.Context()
	if names, err := r.Names(ctx); err != nil || !slices.Equal(names, []string{"@bank", "@shop"}) {
		t.Errorf("%v, %v", names, err)
	}
	c.add(ownSecretOf("shop"))
	c.add(ownSecretOf("blog"))
	c.add(ownSecretOf("bank", "RESTIC_PASSWORD_COMMAND", "id"))
	for name, test := range map[string]struct {
		err  error
		says string
	}{
		"@shop":   {nil, ""},
		"@blog":   {backend.ErrNotFound, "repositoryNamespaces"},
		"@bank":   {backend.ErrInvalid, "RESTIC_PASSWORD_COMMAND"},
		"@gone":   {backup.ErrAbandoned, "Secret gone/abaca-repository"},
		"offsite": {backend.ErrNotFound, "offsite"},
	} {
		_, err := r.Open(ctx, name)
		if test.err == nil && err != nil || !errors.Is(err, test.err) || err != nil && !strings.Contains(err.Error(), test.says) ||
			err != nil && strings.Contains(err.Error(), "horse") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, dir := range []string{r.CacheDir, r.SeenDir} {
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || entries[0].Name() != "@shop" {
			t.Errorf("what is kept of it is in %v, %v", entries, err)
		}
	}
	secrets := c.client.CoreV1().Secrets("shop")
	if err := secrets.Delete(ctx, backup.SecretName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Open(ctx, "@shop"); !errors.Is(err, backend.ErrNotFound) || !strings.Contains(err.Error(), "make the Secret") {
		t.Errorf("without its Secret: %v", err)
	}
	// With the namespace, its Role goes too.
	forbidden := func(a clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(corev1.Resource("secrets"), backup.SecretName, errors.New("no Role"))
	}
	c.client.PrependReactor("get", "secrets", forbidden)
	if _, err := r.Open(ctx, "@shop"); !errors.Is(err, backend.ErrUnavailable) || !strings.Contains(err.Error(), "Role") {
		t.Errorf("without a Role: %v", err)
	}
	going := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", DeletionTimestamp: &metav1.Time{Time: c.now}, Finalizers: []string{"x"}}}
	if err := c.client.Tracker().Update(corev1.SchemeGroupVersion.WithResource("namespaces"), going, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Open(ctx, "@shop"); !errors.Is(err, backup.ErrAbandoned) {
		t.Errorf("while the namespace goes: %v", err)
	}
}

// TestCopyOfASecret: a mover gets a copy of its namespace's Secret, which goes with its
// Job, whoever is killed when; without the Secret nothing is made.
func TestCopyOfASecret(t *testing.T) {
	c := newCluster(t)
	c.ownRepositories()
	j := job("a")
	j.Task.Repository = "@shop"
	if err := c.runner().Start(t.Context(), j, wanted); !errors.Is(err, backend.ErrNotFound) || !strings.Contains(err.Error(), "shop/abaca-repository") {
		t.Errorf("without the Secret: %v", err)
	}
	c.has(nothing)
	c.add(ownSecretOf("shop"))
	for n := 1; ; n++ {
		c.kill(n)
		err := c.runner().Start(t.Context(), j, wanted)
		c.kill(0)
		c.copies()
		if err == nil {
			break
		}
	}
	if err := c.runner().admit(t.Context()); err != nil {
		t.Fatal(err)
	}
	run := c.jobs()
	if len(run) != 1 {
		t.Fatalf("%d Jobs", len(run))
	}
	volume := run[0].Spec.Template.Spec.Volumes[len(run[0].Spec.Template.Spec.Volumes)-1]
	if c.copies() != 1 || volume.Secret == nil || volume.Secret.SecretName != run[0].Name {
		t.Errorf("the pod has %+v", volume)
	}
}

// copies counts the copies of Secrets, each of which must be owned by a Job that is there.
func (c *cluster) copies() int {
	c.Helper()
	jobs, err1 := c.client.BatchV1().Jobs("abaca").List(c.Context(), metav1.ListOptions{})
	copies, err2 := c.client.CoreV1().Secrets("abaca").List(c.Context(), metav1.ListOptions{})
	if err := errors.Join(err1, err2); err != nil {
		c.Fatal(err)
	}
	owners := map[metav1.OwnerReference]bool{}
	for _, j := range jobs.Items {
		owners[metav1.OwnerReference{APIVersion: "batch/v1", Kind: "Job", Name: j.Name, UID: j.UID}] = true
	}
	for _, s := range copies.Items {
		if len(s.OwnerReferences) != 1 || !owners[s.OwnerReferences[0]] || string(s.Data["RESTIC_PASSWORD"]) != "horse" || s.Labels[Attempt] != s.Name {
			c.Errorf("copy %+v", s)
		}
	}
	return len(copies.Items)
}
