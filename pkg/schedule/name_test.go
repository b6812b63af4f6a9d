package schedule

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestName(t *testing.T) {
	one := time.Date(2026, 4, 12, 1, 0, 0, 0, time.UTC)
	long := strings.Repeat("a", 252)
	tests := []struct {
		series Series
		at     time.Time
		want   string
	}{
		{Series{"nightly", "data", "abaca-backup"}, one, "nightly-data-abaca-backup-20260412t0100z"},
		{Series{"nightly", "data-db-0", "abaca-backup"}, one.In(time.FixedZone("", 7200)), "nightly-data-db-0-abaca-backup-20260412t0100z"},
		{Series{"nightly", "data.old", "a"}, one.Add(999 * time.Millisecond), "nightly-data.old-a-20260412t0100z"},
		// A Job made by hand is made at any second.
		{Series{"nightly", "data", "a"}, one.Add(7 * time.Second), "nightly-data-a-20260412t010007z"},
		// Also the digest must not change between versions: by its name, a retry
		// finds what there is. It is sha256("nightly\0aa…\0a") in base32.
		{Series{"nightly", long, "a"}, one, "nightly-" + long[:253-8-11-15] + "-vlnqvs2a53-20260412t0100z"},
	}
	for _, tt := range tests {
		if got := tt.series.Name(tt.at); got != tt.want {
			t.Errorf("%+v at %s: %s, want %s", tt.series, tt.at, got, tt.want)
		}
	}
}

// name makes names that Kubernetes accepts, short and as long as can be.
func (g generator) name() string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	b := make([]byte, 1+g.IntN([]int{3, 20, 70, maxName}[g.IntN(4)]))
	for i := range b {
		b[i] = letters[g.IntN(len(letters))]
		if i > 0 && i < len(b)-1 && g.IntN(4) == 0 {
			b[i] = '-'
			if b[i-1] != '-' && b[i-1] != '.' && g.IntN(2) == 0 {
				b[i] = '.'
			}
		}
		if i > 0 && b[i-1] == '.' && b[i] == '-' {
			b[i] = 'x'
		}
		if i > 0 && b[i-1] == '-' && b[i] == '.' {
			b[i] = 'x'
		}
	}
	return string(b)
}

func TestNameProperties(t *testing.T) {
	label := regexp.MustCompile(`^[a-z0-9]([-._a-z0-9]*[a-z0-9])?$`)
	generate(t, 1500, func(t *testing.T, g generator) {
		s := Series{g.name(), g.name(), g.name()}
		for _, n := range []string{s.Schedule, s.Claim, s.Tier} {
			if err := validName(n); err != nil {
				t.Fatalf("the generator made %q: %v", n, err)
			}
		}
		at := time.Unix(g.Int64N(4e9), 0)
		if g.IntN(2) == 0 {
			at = at.Truncate(time.Minute)
		}
		name := s.Name(at)
		if err := validName(name); err != nil {
			t.Errorf("%+v: %q, %d bytes: %v", s, name, len(name), err)
		}
		if again := s.Name(at.In(time.FixedZone("elsewhere", g.IntN(20000)))); again != name {
			t.Errorf("%+v has two names: %q and %q", s, name, again)
		}
		if other := s.Name(at.Add(time.Duration(1+g.IntN(200)) * time.Second)); other == name {
			t.Errorf("%+v has one name for two times: %q", s, name)
		}
		other := s
		other.Claim += string("abc"[g.IntN(3)])
		if len(other.Claim) <= maxName && other.Name(at) == name {
			t.Errorf("%+v and %+v have one name: %q", s, other, name)
		}
		for key, value := range s.Labels() {
			if len(value) > maxLabel || !label.MatchString(value) {
				t.Errorf("%+v: label %s is %q", s, key, value)
			}
		}
		got, when, ok := ReadSeries(s.Labels(), s.Annotations(at))
		if !ok || got != s || !when.Equal(at) {
			t.Errorf("%+v at %s is read back as %+v, %s, %v", s, at, got, when, ok)
		}
	})
}

func TestReadSeries(t *testing.T) {
	s := Series{"nightly", "data", "abaca-backup"}
	at := time.Date(2026, 4, 12, 1, 0, 0, 0, time.UTC)
	for _, key := range []string{ScheduleKey, ClaimKey, TierKey} {
		labels := s.Labels()
		delete(labels, key)
		if _, _, ok := ReadSeries(labels, s.Annotations(at)); ok {
			t.Errorf("without the label %s it is the schedule's", key)
		}
	}
	for _, key := range []string{ScheduleKey, ClaimKey, TierKey, TimeKey} {
		annotations := s.Annotations(at)
		delete(annotations, key)
		if _, _, ok := ReadSeries(s.Labels(), annotations); ok {
			t.Errorf("without the annotation %s it is the schedule's", key)
		}
	}
	if _, _, ok := ReadSeries(nil, nil); ok {
		t.Error("anything is the schedule's")
	}
}

func TestScheduledTime(t *testing.T) {
	created := time.Date(2026, 4, 12, 1, 0, 3, 0, time.UTC)
	tests := []struct {
		annotations map[string]string
		created     time.Time
		want        string
	}{
		{map[string]string{ScheduledKey: "2026-04-12T03:00:00+02:00"}, created, "2026-04-12T01:00:00Z"},
		{nil, created.In(time.FixedZone("", 3600)).Add(5), "2026-04-12T01:00:03Z"},
		{map[string]string{instantiateKey: "manual", ScheduledKey: "2026-04-11T03:00:00+02:00"}, created, "2026-04-12T01:00:03Z"},
		{map[string]string{ScheduledKey: "tomorrow"}, created, ""},
		{nil, time.Time{}, ""},
	}
	for _, tt := range tests {
		got, err := ScheduledTime(tt.annotations, tt.created)
		if tt.want == "" {
			if err == nil {
				t.Errorf("%v: %s, want an error", tt.annotations, got)
			}
		} else if err != nil || got.Format(time.RFC3339Nano) != tt.want {
			t.Errorf("%v: %s, %v, want %s", tt.annotations, got, err, tt.want)
		}
	}
}
