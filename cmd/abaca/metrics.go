package main

import (
	"fmt"
	"net/http"
	"runtime"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/abaca-csi/abaca/pkg/csi"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// calls counts the requests to the APIs of storage systems, and their time.
type calls struct{ *prometheus.HistogramVec }

func newCalls() calls {
	return calls{prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "abaca_backend_call_seconds",
		Help:    "How long requests to the API of a storage system took, by their HTTP status; 0: no answer.",
		Buckets: []float64{.05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
	}, []string{"backend", "call", "status"})}
}

// of is the observer of one backend.
func (c calls) of(backend string) func(call string, status int, took time.Duration) {
	return func(call string, status int, took time.Duration) {
		c.WithLabelValues(backend, call, strconv.Itoa(status)).Observe(took.Seconds())
	}
}

// handler serves what is for people and their tools: metrics, status, and whether it
// serves and is ready.
// Every metric is in docs/monitoring.md, which a test compares.
func handler(d *csi.Driver, backends calls, ready http.Handler) http.Handler {
	mux := http.NewServeMux()
	registry := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{Name: "abaca_build_info", Help: "What runs here; the value is 1.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version(), "restic": restic.PinnedVersion}})
	build.Set(1)
	registry.MustRegister(build, backends)
	if d.Backups != nil {
		registry.MustRegister(d.Backups)
		mux.HandleFunc("GET /status", statusOf(d.Backups))
	}
	d.Metrics.WithAdditionalRegistry(registry)
	d.Metrics.RegisterToServer(mux, "/metrics")
	mux.Handle("GET /readyz", ready)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	return mux
}

// metricsOf serves the metrics of all that a handler has, and nothing else.
func metricsOf(all http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", all)
	return mux
}
