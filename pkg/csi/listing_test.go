package csi

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sort"
	"testing"
)

// fakeStream lists the strings of a set in order; those that begin with "-" are
// passed over.
func fakeStream(key string, set *[]string) stream[string] {
	return stream[string]{key: key, page: func(_ context.Context, after string, limit int) ([]placed[string], bool, error) {
		sorted := slices.Sorted(slices.Values(*set))
		sorted = sorted[sort.Search(len(sorted), func(i int) bool { return sorted[i] > after }):]
		more := len(sorted) > limit
		var page []placed[string]
		for _, s := range sorted[:min(limit, len(sorted))] {
			p := placed[string]{position: s}
			if s[0] != '-' {
				p.item = &s
			}
			page = append(page, p)
		}
		return page, more, nil
	}}
}

func TestListGoesThroughAllStreams(t *testing.T) {
	for _, most := range []int32{0, 1, 2, 3, 7, 100} {
		a, b, none := []string{"a1", "a2", "-a3", "a4"}, []string{"b1", "-b2"}, []string{"-x"}
		var got []string
		token := ""
		for range 20 {
			items, next, err := list(context.Background(), []stream[string]{fakeStream("a/", &a), fakeStream("n/", &none), fakeStream("b/", &b)}, token, most)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range items {
				got = append(got, *i)
			}
			if most > 0 && len(items) > int(most) {
				t.Errorf("%d items on a page of %d", len(items), most)
			}
			if token = next; token == "" {
				break
			}
		}
		if want := []string{"a1", "a2", "a4", "b1"}; !slices.Equal(got, want) {
			t.Errorf("pages of %d: %v, want %v", most, got, want)
		}
	}
}

// Tokens stay valid while objects come and go: what was there all the time is
// listed once, what is listed twice was never there twice.
func TestListWhileObjectsComeAndGo(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var steady, set []string
		for i := range 30 {
			name := fmt.Sprintf("s%02d", i)
			if random.IntN(2) == 0 {
				steady = append(steady, name)
			}
			set = append(set, name)
		}
		streams := []stream[string]{fakeStream("x/", &set)}
		seen := map[string]int{}
		for token := ""; ; {
			items, next, err := list(context.Background(), streams, token, 1+random.Int32N(4))
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range items {
				seen[*i]++
			}
			if token = next; token == "" {
				break
			}
			set = slices.DeleteFunc(set, func(s string) bool { return !slices.Contains(steady, s) && random.IntN(8) == 0 })
			set = append(set, fmt.Sprintf("t%02d", random.IntN(100)))
			set = slices.Compact(slices.Sorted(slices.Values(set)))
		}
		for _, s := range steady {
			if seen[s] != 1 {
				t.Fatalf("%s was listed %d times", s, seen[s])
			}
		}
	}
}

func TestListRefusesForeignTokens(t *testing.T) {
	set := []string{"a"}
	if _, _, err := list(context.Background(), []stream[string]{fakeStream("x/", &set)}, "y/a", 1); !errors.Is(err, errToken) {
		t.Errorf("error is %v", err)
	}
}
