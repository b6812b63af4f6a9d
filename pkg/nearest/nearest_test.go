package nearest

import "testing"

func TestHint(t *testing.T) {
	known := []string{"repository", "type", "allowPartial"}
	for _, c := range []struct{ name, want string }{
		{"repositroy", ` (did you mean "repository"?)`},
		{"allow-partial", ` (did you mean "allowPartial"?)`},
		{"Type", ` (did you mean "type"?)`},
		{"colour", ` (known: allowPartial, repository, type)`},
		{"", ` (known: allowPartial, repository, type)`},
	} {
		if got := Hint(c.name, known); got != c.want {
			t.Errorf("Hint(%q) = %q, want %q", c.name, got, c.want)
		}
	}
	if got := Hint("x", nil); got != "" {
		t.Errorf("nothing is known, yet the hint is %q", got)
	}
}
