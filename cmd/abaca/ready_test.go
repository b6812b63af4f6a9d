package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/metrics"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/abaca-csi/abaca/pkg/backend/manila"
	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/test/fakemanila"
)

// readiness is what the probe of a driver prints, or "" if that is ready.
func readiness(t *testing.T, l *lacks) string {
	t.Helper()
	server := httptest.NewServer(handler(&csi.Driver{Metrics: metrics.NewCSIMetricsManagerForPlugin(csi.DriverName)}, newCalls(), l))
	defer server.Close()
	root := newCommand()
	root.SetArgs([]string{"ready", "--http-endpoint=" + server.Listener.Addr().String()})
	if err := root.ExecuteContext(t.Context()); err != nil {
		return err.Error()
	}
	return ""
}

// TestReadyKnowsTheCloud: what a cloud has answered last says whether the driver is
// ready, until nobody asks any more.
func TestReadyKnowsTheCloud(t *testing.T) {
	now := time.Now()
	l := newLacks(func() time.Time { return now })
	c := fakemanila.New(fakemanila.Options{})
	t.Cleanup(c.Close)
	file := t.TempDir() + "/clouds.yaml"
	store, err := openKeys(t.TempDir(), nil)
	if err = errors.Join(err, os.WriteFile(file, []byte(c.Clouds()), 0o600)); err != nil {
		t.Fatal(err)
	}
	b, err := manila.Open(t.Context(), manila.Options{CloudsFile: file, Cloud: "fake", Keys: store, Now: time.Now,
		Observe: l.backend("m", func(string, int, time.Duration) {})})
	if err != nil {
		t.Fatal(err)
	}
	ask := func() { _, _ = b.Share(t.Context(), "00000000-0000-4000-8000-000000000000") }
	is := func(want string) {
		t.Helper()
		if got := readiness(t, l); got != want {
			t.Errorf("the probe says %q, want %q", got, want)
		}
	}
	is("")
	ask() // there is no such share, and that is an answer
	is("")
	c.ExpireTokens()
	c.Add(fakemanila.Fault{Path: "/v3/auth/tokens", Status: http.StatusUnauthorized, Times: 1})
	ask()
	is("backend m refuses the credentials")
	ask()
	is("")
	c.Add(fakemanila.Fault{Path: "/shares", Status: http.StatusBadGateway, Times: 1})
	ask()
	is("backend m answers 502 Bad Gateway")
	c.Close()
	ask()
	is("backend m does not answer")
	now = now.Add(lackAge)
	is("")
}

// TestReadyKnowsTheCluster: what the Kubernetes API refuses makes a driver that is not
// ready, but for what the users of a namespace bring about by deleting it.
func TestReadyKnowsTheCluster(t *testing.T) {
	l := newLacks(time.Now)
	status := http.StatusOK
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = w.Write([]byte(`{"kind": "Status", "apiVersion": "v1", "status": "Failure"}`))
	}))
	defer api.Close()
	config := &rest.Config{Host: api.URL}
	config.Wrap(l.kubernetes)
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for _, test := range []struct {
		status int
		ask    func()
		want   string
	}{
		{200, func() {}, ""},
		{403, func() { _, _ = client.BatchV1().Jobs("abaca").List(ctx, metav1.ListOptions{}) }, "list jobs is forbidden"},
		{403, func() { _ = client.CoreV1().PersistentVolumes().Delete(ctx, "x", metav1.DeleteOptions{}) }, "delete persistentvolumes is forbidden"},
		{403, func() { _, _ = client.CoreV1().Pods("abaca").GetLogs("x", &corev1.PodLogOptions{}).DoRaw(ctx) }, "get pods/log is forbidden"},
		{404, func() { _, _ = client.CoreV1().PodTemplates("abaca").Get(ctx, "abaca-mover", metav1.GetOptions{}) }, `get podtemplates finds no "abaca-mover"`},
		{404, func() { _, _ = client.CoreV1().Secrets("abaca").Get(ctx, "abaca-keys", metav1.GetOptions{}) }, `get secrets finds no "abaca-keys"`},
		{404, func() { _, _ = client.CoreV1().ConfigMaps("abaca").Get(ctx, "x", metav1.GetOptions{}) }, ""},
		{403, func() { _, _ = client.CoreV1().Events("shop").Create(ctx, &corev1.Event{}, metav1.CreateOptions{}) }, ""},
		{403, func() { _, _ = client.CoreV1().Secrets("shop").Get(ctx, "abaca-repository", metav1.GetOptions{}) }, ""},
	} {
		status = test.status
		test.ask()
		if got := readiness(t, l); !strings.HasSuffix(got, test.want) || got != "" && !strings.HasPrefix(got, "the Kubernetes API: ") || (got == "") != (test.want == "") {
			t.Errorf("%d: %q, want %q", test.status, got, test.want)
		}
		status = http.StatusOK
		test.ask()
		if got := readiness(t, l); got != "" {
			t.Errorf("after it was granted: %q", got)
		}
	}
	api.Close()
	_, _ = client.CoreV1().Namespaces().Get(ctx, "shop", metav1.GetOptions{})
	if got := readiness(t, l); !strings.HasPrefix(got, "the Kubernetes API does not answer") {
		t.Errorf("without an API: %q", got)
	}
}
