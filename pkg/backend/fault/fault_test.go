package fault_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backend/backendtest"
	"github.com/abaca-csi/abaca/pkg/backend/fault"
	"github.com/abaca-csi/abaca/pkg/backend/memory"
)

const size = 1 << 20

var errInjected = fmt.Errorf("injected: %w", backend.ErrUnavailable)

func newStore() *memory.Store {
	store := memory.NewStore("")
	store.Now = func() time.Time { return time.Unix(1, 0) }
	return store
}

func TestConformanceWithoutFaults(t *testing.T) {
	backendtest.Run(t, backendtest.Harness{
		ShareSize: size,
		New: func(t *testing.T) func() backend.Backend {
			store := newStore()
			return func() backend.Backend { return fault.Wrap(store.Open()) }
		},
	})
}

// TestLostAnswer: whichever call of a life loses its answer, or is not made,
// the life goes on as if nothing had happened once the call is repeated.
func TestLostAnswer(t *testing.T) {
	inject := map[string]func(*fault.Fault){
		"Fail":      func(f *fault.Fault) { f.Fail(errInjected) },
		"FailAfter": func(f *fault.Fault) { f.FailAfter(errInjected) },
	}
	script := backendtest.Script(size)
	for how, inject := range inject {
		for broken := range script {
			t.Run(fmt.Sprintf("%s/%d-%s", how, broken, script[broken].Method), func(t *testing.T) {
				want := live(t, -1, nil)
				got := live(t, broken, inject)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("state after each step (-without +with the fault):\n%s", diff)
				}
			})
		}
	}
}

// live plays the script with a fault in one of its steps, and returns what
// there is after each step.
func live(t *testing.T, broken int, inject func(*fault.Fault)) (states []any) {
	b := fault.Wrap(newStore().Open())
	for i, step := range backendtest.Script(size) {
		if i == broken {
			inject(b.On(step.Method))
			if err := step.Call(t.Context(), b); !errors.Is(err, errInjected) {
				t.Fatalf("%s with a fault: %v", step.Method, err)
			}
		}
		if err := step.Call(t.Context(), b); err != nil {
			t.Fatalf("%s: %v", step.Method, err)
		}
		shares, _, _ := b.ListShares(t.Context(), "", 0)
		snapshots, _, _ := b.ListSnapshots(t.Context(), "", 0)
		exports, _, _ := b.ListExports(t.Context(), "", 0)
		states = append(states, shares, snapshots, exports)
	}
	return states
}

// TestScriptCallsEveryMethod keeps TestLostAnswer whole when the contract grows.
func TestScriptCallsEveryMethod(t *testing.T) {
	var want, got []string
	for i := range reflect.TypeFor[backend.Backend]().NumMethod() {
		want = append(want, reflect.TypeFor[backend.Backend]().Method(i).Name)
	}
	for _, step := range backendtest.Script(size) {
		got = append(got, step.Method)
	}
	slices.Sort(got)
	if diff := cmp.Diff(want, slices.Compact(got)); diff != "" {
		t.Errorf("methods (-contract +script):\n%s", diff)
	}
}

func TestFaults(t *testing.T) {
	for _, test := range []struct {
		name   string
		inject func(*fault.Fault)
		want   string // F: failed, .: went through; by call
	}{
		{"next", func(f *fault.Fault) { f.Fail(errInjected) }, "F..."},
		{"third", func(f *fault.Fault) { f.Nth(3).Fail(errInjected) }, "..F."},
		{"two from the second", func(f *fault.Fault) { f.Nth(2).Repeat(2).Fail(errInjected) }, ".FF."},
		{"after", func(f *fault.Fault) { f.Repeat(9).FailAfter(errInjected) }, "FFFF"},
		{"none", func(f *fault.Fault) {}, "...."},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := fault.Wrap(newStore().Open())
			test.inject(b.On("Capacity"))
			b.On("Usage").Repeat(100).Fail(errInjected) // another method's
			var got string
			for range test.want {
				if _, err := b.Capacity(t.Context()); err == nil {
					got += "."
				} else if errors.Is(err, errInjected) {
					got += "F"
				}
			}
			if got != test.want || b.Calls("Capacity") != len(test.want) || b.Calls("Usage") != 0 {
				t.Errorf("got %s in %d calls, want %s", got, b.Calls("Capacity"), test.want)
			}
		})
	}
}

func TestDelay(t *testing.T) {
	b := fault.Wrap(newStore().Open())
	b.On("ListShares").Delay(time.Hour)
	b.On("ListShares").Nth(2).Delay(time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, _, err := b.ListShares(ctx, "", 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("delayed beyond the deadline: %v", err)
	}
	if _, _, err := b.ListShares(t.Context(), "", 0); err != nil {
		t.Errorf("delayed a little: %v", err)
	}
}

func TestMisspelt(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a fault for a method that no backend has")
		}
	}()
	fault.Wrap(newStore().Open()).On("CreateVolume")
}

func TestUnsupportedByInner(t *testing.T) {
	plain := struct{ backend.Backend }{newStore().Open()}
	_, err := fault.Wrap(plain).Capacity(t.Context())
	_, err2 := fault.Wrap(plain).Usage(t.Context(), backend.Target{ShareID: "x"})
	if !errors.Is(err, backend.ErrUnsupported) || !errors.Is(err2, backend.ErrUnsupported) {
		t.Errorf("got %v and %v, want ErrUnsupported", err, err2)
	}
}
