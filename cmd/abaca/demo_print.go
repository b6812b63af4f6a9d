package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/restic"
	"github.com/abaca-csi/abaca/test/tree"
)

// quietEvery is how often a pipe gets a line of progress.
const quietEvery = 3 * time.Second

// demoPrinter writes for people: with a progress bar and colour on a terminal,
// plain lines elsewhere.
type demoPrinter struct {
	mu       sync.Mutex
	w        io.Writer
	terminal bool
	colour   bool // https://no-color.org
	width    int
	total    int // steps
	number   int // of the step that runs
	drawn    bool
	lastLine time.Time // of progress
}

func newDemoPrinter(w io.Writer) *demoPrinter {
	p := &demoPrinter{w: w, width: 80}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.terminal = os.Getenv("TERM") != "dumb"
		p.colour = p.terminal && os.Getenv("NO_COLOR") == ""
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 20 {
			p.width = width
		}
	}
	return p
}

// ANSI colours that can be read on dark and light ground.
const (
	bold  = "1"
	green = "32"
	red   = "31"
	faint = "2"
)

func (p *demoPrinter) paint(code, text string) string {
	if !p.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (p *demoPrinter) begin(title string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.number++
	p.lastLine = time.Now()
	count := fmt.Sprintf("%d", p.number)
	if p.total > 0 {
		count = fmt.Sprintf("%2d/%d", p.number, p.total)
	}
	fmt.Fprintf(p.w, "%s  %s\n", p.paint(faint, count), p.paint(bold, title))
}

func (p *demoPrinter) end(s demoStep) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
	if s.Error == "" && s.Result != "" {
		fmt.Fprintf(p.w, "       %s\n", s.Result)
	}
}

func (p *demoPrinter) failed(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
	for i, line := range strings.Split(err.Error(), "\n") {
		mark := "       "
		if i == 0 {
			mark = p.paint(red, "FAILED ")
		}
		fmt.Fprintln(p.w, mark+line)
	}
}

// note writes lines that belong to the running step.
func (p *demoPrinter) note(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
	for line := range strings.SplitSeq(text, "\n") {
		fmt.Fprintln(p.w, strings.TrimRight("       "+line, " "))
	}
}

func (p *demoPrinter) wipe() {
	if p.drawn {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.drawn = false
	}
}

func (p *demoPrinter) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
}

// waiting shows the driver's own words about work that goes on. On a terminal
// the progress bar says the same.
func (p *demoPrinter) waiting(message string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.terminal || time.Since(p.lastLine) < quietEvery {
		return
	}
	p.lastLine = time.Now()
	fmt.Fprintf(p.w, "       %s\n", message)
}

func (p *demoPrinter) progress(at restic.Progress) {
	if at.BytesTotal <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	text := []string{
		fmt.Sprintf("%3d %%", at.Percent()),
		fmt.Sprintf("  %s of %s", backup.Bytes(at.BytesDone), backup.Bytes(at.BytesTotal)),
		fmt.Sprintf(", %s of %s files", demoCount(at.FilesDone), demoCount(at.FilesTotal)),
	}
	if at.Rate >= 1 {
		text = append(text, fmt.Sprintf(", %s/s", backup.Bytes(int64(at.Rate))))
	}
	if p.terminal {
		fmt.Fprint(p.w, "\r"+p.paint(green, progressLine(float64(at.Percent())/100, text, p.width-1))+"\x1b[K")
		p.drawn = true
		return
	}
	if time.Since(p.lastLine) >= quietEvery {
		p.lastLine = time.Now()
		fmt.Fprintf(p.w, "       %s\n", strings.Join(text, ""))
	}
}

// progressLine is a bar and as many of the texts as there is room for beside it,
// in at most width columns. The bar has 10 to 30.
func progressLine(done float64, texts []string, width int) string {
	const around = len("       []  ")
	for len(texts) > 1 && around+10+utf8.RuneCountInString(strings.Join(texts, "")) > width {
		texts = texts[:len(texts)-1]
	}
	text := strings.Join(texts, "")
	bar := min(30, width-around-utf8.RuneCountInString(text))
	if bar <= 0 {
		return text
	}
	full := int(done * float64(bar))
	return "       [" + strings.Repeat("#", full) + strings.Repeat("-", bar-full) + "]  " + text
}

// table ends the run with what each step took.
func (p *demoPrinter) table(steps []demoStep, all time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rows := [][2]string{{"step", "took"}}
	results := []string{"result"}
	verdict := "all went well"
	for _, s := range steps {
		result := s.Result
		switch s.Error {
		case "":
		case errInterrupted.Error():
			result, verdict = s.Error, s.Error
		default:
			result, verdict = "FAILED", "FAILED"
		}
		rows = append(rows, [2]string{s.Name, demoDuration(s.Seconds)})
		results = append(results, result)
	}
	rows = append(rows, [2]string{"all", demoDuration(all.Seconds())})
	results = append(results, verdict)

	var first, second int
	for _, r := range rows {
		first, second = max(first, len(r[0])), max(second, len(r[1]))
	}
	fmt.Fprintln(p.w)
	for i, r := range rows {
		line := fmt.Sprintf("%-*s  %*s  %s", first, r[0], second, r[1], results[i])
		switch {
		case i == 0:
			line = p.paint(bold, line)
		case results[i] == "FAILED", results[i] == errInterrupted.Error():
			line = p.paint(red, line)
		case i == len(rows)-1:
			line = p.paint(green, line)
		}
		fmt.Fprintln(p.w, line)
	}
}

func writeDemoJSON(w io.Writer, d *demo, err error) error {
	report := struct {
		OK         bool       `json:"ok"`
		Error      string     `json:"error,omitempty"`
		Seconds    float64    `json:"seconds"`
		Steps      []demoStep `json:"steps"`
		Repository string     `json:"repository,omitempty"` // where --keep has left it
	}{OK: err == nil, Seconds: time.Since(d.begun).Seconds(), Steps: d.steps}
	if err != nil {
		report.Error = err.Error()
	}
	if d.keep && exists(d.repositoryDir()) {
		report.Repository = d.repositoryDir()
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(report)
}

// demoDuration has the unit that a person would choose.
func demoDuration(seconds float64) string {
	switch {
	case seconds < 0.9995:
		return fmt.Sprintf("%.0f ms", seconds*1000)
	case seconds < 119.95:
		return fmt.Sprintf("%.1f s", seconds)
	}
	return fmt.Sprintf("%.0f min %02.0f s", math.Floor(math.Round(seconds)/60), math.Mod(math.Round(seconds), 60))
}

// demoCount groups the digits of a number by thousands.
func demoCount[N int | int64](n N) string {
	digits := strconv.FormatInt(int64(n), 10)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

func demoTree(s tree.Size) string {
	return fmt.Sprintf("%s files, %s", demoCount(s.Files), backup.Bytes(s.Bytes))
}
