package csi

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/go-logr/logr/funcr"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/once"
)

// waits is a backend that puts off what it is told.
type waits struct {
	waiting []string
	err     error
}

func (w *waits) Sweep(context.Context) ([]string, error) { return w.waiting, w.err }

// TestSweepSaysOnce: what a backend waits for is in the log once, and again when it
// has changed; and while there is something, it is swept often.
func TestSweepSaysOnce(t *testing.T) {
	var log strings.Builder
	ctx := klog.NewContext(t.Context(), funcr.New(func(_, args string) { log.WriteString(args + "\n") }, funcr.Options{}))
	w, said := &waits{}, &once.Said{}
	for _, test := range []struct {
		waiting []string
		err     error
		says    string
	}{
		{nil, nil, ""},
		{[]string{"share one"}, nil, "share one"},
		{[]string{"share one"}, nil, ""},
		{[]string{"share one", "share two"}, nil, "share two"},
		{nil, errors.New("it is locked"), "it is locked"},
		{nil, errors.New("it is locked"), ""},
		{nil, nil, ""},
		{[]string{"share one"}, nil, "share one"},
	} {
		log.Reset()
		w.waiting, w.err = test.waiting, test.err
		if more := sweep(ctx, w, said); more != (len(test.waiting) > 0 || test.err != nil) {
			t.Errorf("%v, %v: again soon: %v", test.waiting, test.err, more)
		}
		if got := log.String(); (got == "") != (test.says == "") || !strings.Contains(got, test.says) || strings.Count(got, "\n") > 1 {
			t.Errorf("%v, %v: it says %q, not %q", test.waiting, test.err, got, test.says)
		}
	}
}
