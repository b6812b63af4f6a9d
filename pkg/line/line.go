// Package line makes single lines of texts that somebody else wrote.
package line

import (
	"strings"
	"unicode"
)

// One makes one line without control characters of a text, or returns other if
// there is nothing in it.
func One(text, other string) string {
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }), " ")
	if text == "" {
		return other
	}
	return text
}
