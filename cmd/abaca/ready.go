package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/abaca-csi/abaca/pkg/backup"
)

// lackAge is how long it is told that something has failed. Whoever waits for it asks
// again within a minute or two (the sidecars' --retry-interval-max, and the look for
// controllers that are gone), so by then nobody does, and it may be well.
const lackAge = 5 * time.Minute

// lacks are what the driver asked in vain when it last asked, of what it needs for all
// volumes alike: the APIs of storage systems and of Kubernetes. Nothing is asked for
// its sake. A repository is no such thing: who uses it is told, and others are not
// concerned.
type lacks struct {
	now func() time.Time

	mu sync.Mutex
	of map[string]lack
}

type lack struct {
	why string
	at  time.Time
}

func newLacks(now func() time.Time) *lacks { return &lacks{now: now, of: map[string]lack{}} }

// note remembers how it went; why is empty if well.
func (l *lacks) note(what, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.of, what)
	if why != "" {
		l.of[what] = lack{why, l.now()}
	}
}

// all are what is missing now, a line each.
func (l *lacks) all() (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, what := range slices.Sorted(maps.Keys(l.of)) {
		if one := l.of[what]; l.now().Sub(one.at) < lackAge {
			lines = append(lines, what+" "+one.why)
		}
	}
	return lines
}

// ServeHTTP answers /readyz: "ok", or what is missing and 503.
func (l *lacks) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	lines := l.all()
	if len(lines) > 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
	} else {
		lines = []string{"ok"}
	}
	fmt.Fprintln(w, strings.Join(lines, "\n"))
}

// backend hears of the requests to a storage system as next does.
func (l *lacks) backend(name string, next func(string, int, time.Duration)) func(string, int, time.Duration) {
	return func(call string, status int, took time.Duration) {
		next(call, status, took)
		why := ""
		switch status {
		case 0:
			why = "does not answer"
		case http.StatusUnauthorized:
			why = "refuses the credentials"
		case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			why = fmt.Sprintf("answers %d %s", status, http.StatusText(status))
		}
		l.note("backend "+name, why)
	}
}

// kubernetes hears of the requests to the Kubernetes API.
func (l *lacks) kubernetes(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		const api = "the Kubernetes API"
		answer, err := next.RoundTrip(r)
		if err != nil {
			if r.Context().Err() == nil {
				l.note(api, "does not answer: "+err.Error())
			}
			return answer, err
		}
		l.note(api, "")
		verb, resource, name := asked(r)
		what := api + ": " + verb + " " + resource
		switch {
		case resource == "events" && verb != "list", name == backup.SecretName:
			// In a namespace of users', which they may delete, and the Role with it.
		case answer.StatusCode == http.StatusForbidden, answer.StatusCode == http.StatusUnauthorized:
			l.note(what, "is forbidden")
		case answer.StatusCode == http.StatusNotFound && (resource == "podtemplates" || resource == "secrets"):
			l.note(what, fmt.Sprintf("finds no %q", name))
		case answer.StatusCode < http.StatusBadRequest:
			l.note(what, "")
		}
		return answer, nil
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// asked is what a request to the Kubernetes API asks for, in the words of its roles; the
// name may be empty. Its paths are /api/v1 or /apis/GROUP/VERSION, and then
// [/namespaces/NAMESPACE]/RESOURCE[/NAME[/SUBRESOURCE]].
func asked(r *http.Request) (verb, resource, name string) {
	steps := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	skip := 2
	if steps[0] == "apis" {
		skip = 3
	}
	steps = append(steps[min(skip, len(steps)):], "", "", "", "", "")
	if steps[0] == "namespaces" && steps[2] != "" {
		steps = steps[2:]
	}
	resource, name = steps[0], steps[1]
	if steps[2] != "" {
		resource += "/" + steps[2]
	}
	verb = map[string]string{http.MethodPost: "create", http.MethodPut: "update", http.MethodPatch: "patch", http.MethodDelete: "delete", http.MethodGet: "get"}[r.Method]
	if verb == "get" && name == "" {
		verb = "list"
	}
	return verb, resource, name
}

// newReadyCommand is what a probe runs: the kubelet reaches the pod's address only, and
// shows what this prints.
func newReadyCommand() *cobra.Command {
	var endpoint string
	cmd := &cobra.Command{
		Use: "ready", Short: "Say what the driver beside this lacks, or nothing (run by a probe)", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
			defer cancel()
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+endpoint+"/readyz", nil)
			if err != nil {
				return err
			}
			answer, err := http.DefaultClient.Do(request)
			if err != nil {
				return fmt.Errorf("the driver does not serve: %w", err)
			}
			defer answer.Body.Close()
			text, err := io.ReadAll(io.LimitReader(answer.Body, 1<<16))
			if err == nil && answer.StatusCode != http.StatusOK {
				err = errors.New(strings.TrimSpace(string(text)))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&endpoint, "http-endpoint", "", "that of the driver, such as 127.0.0.1:9090")
	must(cmd, "http-endpoint")
	return cmd
}
