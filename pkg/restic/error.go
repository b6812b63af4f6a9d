package restic

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"unicode"
)

// kinds is restic's table of exit codes (restic manual, "Exit codes"); what is
// not in it is ErrFailed. Code 3 is added for backup alone: of forget it says
// that a snapshot could not be removed.
var kinds = map[int]error{
	10:  ErrNoRepository,
	11:  ErrLocked,
	12:  ErrWrongPassword,
	130: ErrInterrupted,
}

// Error returns one line.
func (e *Error) Error() string {
	s := "restic " + e.Command + ": " + e.Message
	if !strings.Contains(e.Message, e.kind.Error()) {
		s = strings.TrimSuffix("restic "+e.Command+": "+e.kind.Error()+": "+e.Message, ": ")
	}
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

// Unwrap returns the sentinel, and the context's error if that ended the run.
func (e *Error) Unwrap() []error {
	if e.cause != nil {
		return []error{e.kind, e.cause}
	}
	return []error{e.kind}
}

// NoSpace says that the run failed for want of space: in the repository, in the
// target of a restore, or in the directory for temporary files.
//
// Restic's exit code does not tell (it is 1), so this looks for the system's
// words for ENOSPC and EDQUOT in what restic said. It decides how a failure is
// presented and never whether there was one.
func (e *Error) NoSpace() bool { return e.noSpace }

// withoutRetry removes from a complaint what is only about restic's next try.
func withoutRetry(line string) string {
	if before, after, ok := strings.Cut(line, " returned error, retrying after "); ok {
		if _, reason, ok := strings.Cut(after, ": "); ok {
			return before + " failed: " + reason
		}
	}
	return line
}

const noSpaceHint = "free space or enlarge: the target of a restore; else the repository, or the mover's temporary and cache directories"

// hints are what to look at, by what the system or the repository's server
// said. As with NoSpace, nothing else depends on the words.
var hints = []struct{ words, hint string }{
	{syscall.ENOSPC.Error(), noSpaceHint},
	{syscall.EDQUOT.Error(), noSpaceHint},
	{"507 Insufficient Storage", noSpaceHint},
	{"no such host", "check the host name in RESTIC_REPOSITORY and the DNS of the mover"},
	{syscall.ECONNREFUSED.Error(), "check the host and port in RESTIC_REPOSITORY, and the network policies around the mover"},
	{syscall.EROFS.Error(), "the repository cannot be written"},
	{syscall.EACCES.Error(), "check who may read and write the repository"},
	{"certificate", "check RESTIC_CACERT"},
	{"401 Unauthorized", "check RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD"},
	{"403 Forbidden", "check what the credentials allow; a server that only lets append removes nothing"},
	{"Access Denied", "check the access key, and what it may do to the bucket"},
}

var kindHints = map[error]string{
	ErrNoRepository:  "check RESTIC_REPOSITORY; the first backup makes the repository",
	ErrWrongPassword: "check the key RESTIC_PASSWORD of the repository's Secret or folder",
	ErrDamaged:       "keep a copy of the repository before anything is repaired: https://restic.readthedocs.io/en/stable/077_troubleshooting.html",
	ErrLocked:        "another process uses the repository; the lock of one that died is stale after 30 minutes",
}

// complaints is what restic said on its standard error, without secrets.
type complaints struct {
	exit    string   // the final message
	tail    []string // the last lines that are not JSON
	first   string   // the first item that failed, and why
	items   int      // how many failed
	paths   []string // the first of them
	hint    string
	noSpace bool
	noise   bool // anything at all
}

// add takes one line, and returns it as a person may read it; empty if it is for
// programs.
func (c *complaints) add(line string, redact *strings.Replacer, dir string) (plainly string) {
	var m struct {
		Type    string `json:"message_type"`
		Message string // of a check's errors too, which have no item
		Item    string
		Error   struct{ Message string }
	}
	isJSON := json.Unmarshal([]byte(line), &m) == nil && m.Type != ""
	text := redact.Replace(line)
	switch {
	case strings.TrimSpace(line) == "":
		return ""
	case isJSON && m.Type == "exit_error":
		text = redact.Replace(m.Message)
		c.exit = oneLine(text)
	case isJSON && m.Type == "error":
		// Archiver and verifier name absolute paths, the restorer "/data/...".
		item := strings.TrimPrefix(strings.TrimPrefix(m.Item, dir), "/")
		item, text = redact.Replace(item), redact.Replace(cmp.Or(m.Error.Message, m.Message))
		if c.items++; c.items == 1 {
			c.first = strings.TrimPrefix(item+": ", ": ") + oneLine(text)
		}
		if len(c.paths) < maxPaths && item != "" && !slices.Contains(c.paths, item) {
			c.paths = append(c.paths, item)
		}
	case !isJSON:
		plainly = printable(withoutRetry(strings.TrimSpace(text)))
		c.tail = append(c.tail, plainly)
		c.tail = c.tail[max(0, len(c.tail)-maxTail):]
	}
	c.noise = true
	for _, h := range hints {
		// Of a file of the volume, access rights say nothing about the repository.
		full := h.hint == noSpaceHint
		if strings.Contains(text, h.words) && (full || m.Type != "error") {
			c.noSpace = c.noSpace || full
			if c.hint == "" || full {
				c.hint = h.hint
			}
		}
	}
	return plainly
}

const (
	maxPaths = 5
	maxTail  = 5
)

// ended says how a run of command ended that did not end well. cause is the
// context's error, or why the program could not be run to its end.
func (c *complaints) ended(command string, code int, cause error) *Error {
	e := &Error{
		Command: command, ExitCode: code, Paths: c.paths, Hint: c.hint,
		kind: kinds[code], cause: cause, noSpace: c.noSpace,
	}
	switch {
	case code < 0:
		e.kind = ErrInterrupted
	case code == 3 && command == "backup":
		e.kind = ErrIncomplete
	case code == 1 && command == "check" && c.items > 0:
		e.kind = ErrDamaged
	case e.kind == nil:
		e.kind = ErrFailed
	}
	if h := kindHints[e.kind]; h != "" {
		e.Hint = h
	}
	var words []string
	switch {
	case cause != nil:
		words = append(words, cause.Error())
		words = append(words, c.tail[max(0, len(c.tail)-1):]...)
	case c.exit != "":
		words = append(words, c.exit)
	default:
		words = append(words, c.tail...)
	}
	if c.items > 0 {
		words = append(words, c.first)
	}
	if c.items > 1 {
		words = append(words, fmt.Sprintf("and %d more", c.items-1))
	}
	e.Message = printable(strings.Join(words, "; "))
	return e
}

// printable keeps what names of files can hold from a terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, text)
}

// oneLine makes a message one line, without the stack trace that restic adds
// to an error that it did not expect, and not longer than a log line should be.
func oneLine(message string) string {
	message, _, traced := strings.Cut(message, "\n\t")
	lines := strings.Split(strings.TrimSpace(message), "\n")
	if traced && len(lines) > 1 {
		lines = lines[:len(lines)-1] // the function of the first frame
	}
	message = strings.ReplaceAll(strings.Join(lines, "; "), "Fatal: ", "")
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "") + "..."
	}
	return message
}

const maxMessage = 1000
