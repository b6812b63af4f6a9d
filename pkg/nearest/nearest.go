// Package nearest finds what somebody meant who wrote an unknown name.
package nearest

import (
	"fmt"
	"slices"
	"strings"
)

// Hint returns words to put behind an unknown name: the known name that looks
// like it, or else all the known ones.
func Hint(name string, known []string) string {
	best, least := "", len(name)/2+1
	for _, k := range known {
		if d := distance(strings.ToLower(name), strings.ToLower(k)); d < least {
			best, least = k, d
		}
	}
	switch {
	case best != "":
		return fmt.Sprintf(" (did you mean %q?)", best)
	case len(known) == 0:
		return ""
	}
	return " (known: " + strings.Join(slices.Sorted(slices.Values(known)), ", ") + ")"
}

// distance is the number of bytes to insert, delete or replace to get from one
// string to the other (Levenshtein). Inputs of strangers are cut short, so that
// it stays cheap.
func distance(a, b string) int {
	a, b = a[:min(len(a), 64)], b[:min(len(b), 64)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
