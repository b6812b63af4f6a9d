package kube

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/abaca-csi/abaca/pkg/restic"
)

// TestListen: what movers log of how far they are is heard, as cmd/abaca has them
// log it. Neither a pod that has no log nor one whose log never ends holds it up.
func TestListen(t *testing.T) {
	var log bytes.Buffer
	l := logr.FromSlogHandler(slog.NewJSONHandler(&log, nil))
	want := restic.Progress{BytesDone: 1, BytesTotal: 4, FilesDone: 2, FilesTotal: 8, Rate: 100, Trouble: "no \"route\""}
	logProgress(l, restic.Progress{BytesDone: 7})
	logProgress(l, want)
	l.Info("Something else", "bytesDone", 9)
	log.WriteString("no JSON\n")

	pods := corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}}
	for _, name := range []string{"well", "silent", "hangs"} {
		pods.Items = append(pods.Items, corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name)}})
	}
	var lost atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/pods"):
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(pods)
		case strings.HasSuffix(r.URL.Path, "/well/log") && !lost.Load():
			if q := r.URL.Query(); q.Get("container") != container || q.Get("tailLines") == "" || q.Get("limitBytes") == "" {
				t.Errorf("asked with %s", r.URL.RawQuery)
			}
			fmt.Fprint(w, log.String())
		case strings.HasSuffix(r.URL.Path, "/hangs/log"):
			<-r.Context().Done()
		default:
			http.Error(w, "no log", http.StatusNotFound)
		}
	}))
	defer server.Close()
	r := newCluster(t).runner()
	r.Client = kubernetes.NewForConfigOrDie(&rest.Config{Host: server.URL})
	for range 2 { // what could be read once stays
		began := time.Now()
		if err := r.listen(t.Context()); err != nil || time.Since(began) > 2*followTime {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		if got := r.progress("well"); got != want {
			t.Errorf("heard %+v, want %+v", got, want)
		}
		if got := r.progress("silent"); got != (restic.Progress{}) {
			t.Errorf("heard %+v of one that says nothing", got)
		}
		lost.Store(true)
	}
	pods.Items = nil
	if err := r.listen(t.Context()); err != nil || r.progress("well") != (restic.Progress{}) {
		t.Errorf("%v; one that is gone is remembered", err)
	}
}
