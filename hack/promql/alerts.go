package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
)

// question is rules and what was scraped.
type question struct {
	Rules []struct{ Alert, Expr, For string }
	// Start and Step are in seconds: of the first scrape, since 1970, and between two. The
	// rules are evaluated after each.
	Start, Step int64
	// Series have a value for each scrape, null where they were not there.
	Series []struct {
		Labels map[string]string
		Values []*float64
	}
}

// firing is an alert that fired, from the scrape of one number to before another.
type firing struct {
	Alert       string
	Labels      map[string]string
	From, Until int
}

// answer evaluates the rules as Prometheus does ("Alerting rules" in its manual): an alert
// fires once its expression has had a result with the same labels for as long as `for`
// says, without a gap, and ends with the first evaluation that has none.
func (q question) answer() ([]firing, error) {
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e7, Timeout: time.Minute, LookbackDelta: 5 * time.Minute,
		Parser: parser.NewParser(parser.Options{})})
	defer engine.Close()
	all, scrapes := series{}, 0
	for _, s := range q.Series {
		all = append(all, storage.NewListSeries(labels.FromMap(s.Labels), q.samples(s.Values)))
		scrapes = max(scrapes, len(s.Values))
	}
	fired := []firing{}
	for _, rule := range q.Rules {
		var hold model.Duration
		if rule.For != "" {
			var err error
			if hold, err = model.ParseDuration(rule.For); err != nil {
				return nil, fmt.Errorf("%s: %w", rule.Alert, err)
			}
		}
		since, open := map[string]int{}, map[string]firing{}
		for i := range scrapes + 1 { // after the last, everything ends
			now, have := map[string]bool{}, promql.Vector{}
			if i < scrapes {
				query, err := engine.NewInstantQuery(context.Background(), all, nil, rule.Expr, time.Unix(q.Start+int64(i)*q.Step, 0))
				if err != nil {
					return nil, fmt.Errorf("%s: %w", rule.Alert, err)
				}
				result := query.Exec(context.Background())
				if have, err = result.Vector(); err != nil {
					return nil, fmt.Errorf("%s: %w", rule.Alert, err)
				}
				have = slices.Clone(have)
				query.Close()
			}
			for _, sample := range have {
				of := labels.NewBuilder(sample.Metric).Del(labels.MetricName).Labels()
				id := of.String()
				if now[id] {
					return nil, fmt.Errorf("%s has two results with the labels %s", rule.Alert, id)
				}
				now[id] = true
				if _, pending := since[id]; !pending {
					since[id] = i
				}
				if _, is := open[id]; !is && time.Duration(int64(i-since[id])*q.Step)*time.Second >= time.Duration(hold) {
					open[id] = firing{Alert: rule.Alert, Labels: of.Map(), From: i}
				}
			}
			for id := range since {
				if f, is := open[id]; is && !now[id] {
					f.Until = i
					fired = append(fired, f)
					delete(open, id)
				}
				if !now[id] {
					delete(since, id)
				}
			}
		}
	}
	return fired, nil
}

// samples marks the end of a series as Prometheus does, by a stale value.
func (q question) samples(values []*float64) (all []chunks.Sample) {
	for i, v := range values {
		at := (q.Start + int64(i)*q.Step) * 1000
		switch {
		case v != nil:
			all = append(all, sample{at, *v})
		case i > 0 && values[i-1] != nil:
			all = append(all, sample{at, math.Float64frombits(value.StaleNaN)})
		}
	}
	return all
}

type sample struct {
	at    int64 // in milliseconds since 1970
	value float64
}

func (s sample) ST() int64                     { return 0 }
func (s sample) T() int64                      { return s.at }
func (s sample) F() float64                    { return s.value }
func (s sample) H() *histogram.Histogram       { return nil }
func (s sample) FH() *histogram.FloatHistogram { return nil }
func (s sample) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (s sample) Copy() chunks.Sample           { return s }

// series are all that there are, and their own storage.
type series []storage.Series

func (s series) Querier(int64, int64) (storage.Querier, error) { return querier{s}, nil }

type querier struct{ all series }

func (q querier) Select(_ context.Context, _ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
	found := set{at: -1}
	for _, s := range q.all {
		if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(s.Labels().Get(m.Name)) }) {
			found.series = append(found.series, s)
		}
	}
	return &found
}

func (q querier) Close() error { return nil }

func (q querier) LabelValues(context.Context, string, *storage.LabelHints, ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return nil, nil, errors.ErrUnsupported
}

func (q querier) LabelNames(context.Context, *storage.LabelHints, ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return nil, nil, errors.ErrUnsupported
}

type set struct {
	series
	at int
}

func (s *set) Next() bool                        { s.at++; return s.at < len(s.series) }
func (s *set) At() storage.Series                { return s.series[s.at] }
func (s *set) Err() error                        { return nil }
func (s *set) Warnings() annotations.Annotations { return nil }
