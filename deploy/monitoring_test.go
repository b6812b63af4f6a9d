package deploy

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

const withMonitoring = `
backends: [{name: l, local: {node: n1}}]
repositories: [{name: offsite, secretName: offsite}]
storageClasses: [{name: fast}, {name: slow}]
node: {metrics: {enabled: true}}
networkPolicy: {metricsFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]}
monitoring:
  serviceMonitor: {enabled: true, interval: 1m, labels: {release: prometheus}}
  rules: {enabled: true, labels: {release: prometheus}, backupAgeHours: 30, maintenanceAgeDays: 8, shareFreeRatio: 0.05}
  dashboard: {enabled: true, labels: {grafana_dashboard: "1"}}
`

// rule is one of a PrometheusRule.
type rule struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

// monitored is what is rendered, for those who watch.
type monitored struct {
	Kind     string
	Metadata struct {
		Name   string
		Labels map[string]string
	}
	Spec struct {
		Groups    []struct{ Rules []rule }
		Selector  any
		Endpoints []struct{ Port, Interval string }
		Ports     []struct{ Name string }
	}
	Data map[string]string
}

func renderMonitoring(t *testing.T, values string) (all []monitored) {
	t.Helper()
	out, err := helm(t, values)
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range regexp.MustCompile(`(?m)^---\s*$`).Split(out, -1) {
		var m monitored
		if strings.Contains(doc, "templates/monitoring.yaml") {
			if err := yaml.Unmarshal([]byte(doc), &m); err != nil {
				t.Fatalf("%v in\n%s", err, doc)
			}
			all = append(all, m)
		}
	}
	return all
}

// dashboard is what a test wants to know of Grafana's JSON.
type dashboard struct {
	Templating struct{ List []struct{ Name string } }
	Panels     []struct {
		ID      int
		Title   string
		Type    string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ Expr string }
	}
}

// TestMonitoring: what is watched is what is there.
func TestMonitoring(t *testing.T) {
	kinds := map[string]int{}
	var rules []rule
	var board dashboard
	for _, m := range renderMonitoring(t, withMonitoring) {
		kinds[m.Kind]++
		switch m.Kind {
		case "ServiceMonitor":
			if m.Metadata.Labels["release"] != "prometheus" || m.Spec.Endpoints[0].Port != "metrics" || m.Spec.Endpoints[0].Interval != "1m" {
				t.Errorf("%+v", m)
			}
		case "Service":
			if m.Spec.Ports[0].Name != "metrics" {
				t.Errorf("%+v", m)
			}
		case "PrometheusRule":
			rules = m.Spec.Groups[0].Rules
		case "ConfigMap":
			if err := json.Unmarshal([]byte(m.Data["abaca.json"]), &board); err != nil || m.Metadata.Labels["grafana_dashboard"] != "1" {
				t.Fatal(err, m.Metadata)
			}
		}
	}
	if want := map[string]int{"Service": 2, "ServiceMonitor": 2, "PrometheusRule": 1, "ConfigMap": 1}; !maps.Equal(kinds, want) {
		t.Fatalf("%v, want %v", kinds, want)
	}
	if off := renderMonitoring(t, "backends: [{name: l, local: {node: n1}}]"); len(off) > 0 {
		t.Errorf("%d objects though all is off", len(off))
	}
	if _, err := helm(t, "backends: [{name: m, manila: {cloud: c, cloudsSecret: s, instance: i}}]\ncontroller: {metrics: {enabled: false}}\nmonitoring: {serviceMonitor: {enabled: true}}"); err == nil || !strings.Contains(err.Error(), "controller.metrics") {
		t.Errorf("metrics that are not there are watched: %v", err)
	}

	// Each alert says what to do, and nothing is said of one that is not there.
	docs := read(t, "../docs/monitoring.md")
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^### (\S+)$`).FindAllStringSubmatch(docs, -1) {
		documented[m[1]] = true
	}
	var exprs []string
	for _, r := range rules {
		if !documented[r.Alert] || r.Labels["severity"] == "" || !strings.Contains(r.Annotations["summary"], " ") {
			t.Errorf("%s: documented: %v; %v %v", r.Alert, documented[r.Alert], r.Labels, r.Annotations)
		}
		delete(documented, r.Alert)
		exprs = append(exprs, r.Expr)
	}
	for alert := range documented {
		t.Errorf("docs/monitoring.md has an alert that is not there: %s", alert)
	}
	all := strings.Join(exprs, "\n")
	for _, value := range []string{"> 108000", "> 691200", "< 0.05", `storageclass=~"fast|slow"`} {
		if !strings.Contains(all, value) {
			t.Errorf("no rule has %s", value)
		}
	}

	taken := map[[2]int]string{}
	for _, p := range board.Panels {
		if len(p.Targets) == 0 || p.Title == "" || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %+v", p)
		}
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Errorf("panel %s lies over %s", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		for _, target := range p.Targets {
			exprs = append(exprs, target.Expr)
		}
	}
	parses(t, exprs)

	// Every metric is documented; that the documented ones are served is a test of
	// cmd/abaca. Those of others are named here.
	others := []string{"up", "kube_persistentvolumeclaim_info", "kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}
	for _, expr := range exprs {
		for _, name := range regexp.MustCompile(`\b(abaca|csi|kube|kubelet)_[a-z_]+\b`).FindAllString(expr, -1) {
			name = regexp.MustCompile(`_seconds_(count|sum|bucket)$`).ReplaceAllString(name, "_seconds")
			if !strings.Contains(docs, "| `"+name+"` |") && !slices.Contains(others, name) {
				t.Errorf("%s is not in docs/monitoring.md, but in %s", name, expr)
			}
		}
	}
}

// promql is the program with Prometheus' own code.
func promql(t *testing.T) string {
	t.Helper()
	program, err := filepath.Abs("../bin/promql")
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		t.Fatalf("bin/promql is missing: run make bin/promql: %v", err)
	}
	return program
}

// parses hands expressions to Prometheus' own parser.
func parses(t *testing.T, exprs []string) {
	t.Helper()
	program := promql(t)
	for i, expr := range exprs { // Grafana's variables
		exprs[i] = strings.ReplaceAll(expr, "$repository", ".*")
	}
	text, err := json.Marshal(exprs)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	cmd = exec.Command(program)
	cmd.Stdin = strings.NewReader(`["sum by (a (b)"]`)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "parse error") {
		t.Errorf("the parser takes nonsense: %s", out)
	}
}
