// Package deploy tests what is installed into Kubernetes: the chart, what is
// rendered from it, and the examples. It needs bin/helm, which `make bin/helm`
// makes, and no cluster.
package deploy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apilabels "k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/yaml"

	"github.com/abaca-csi/abaca/pkg/backup/kube"
	"github.com/abaca-csi/abaca/pkg/csi"
)

const (
	chart     = "charts/abaca"
	namespace = "abaca-system"
	snapshots = "snapshot.storage.k8s.io/v1"
)

// everything switches on what is off by default; with Manila, and without.
const (
	everythingManila = `
backends:
- {name: one, manila: {cloud: a, cloudsSecret: clouds-a, instance: x}}
- {name: two, manila: {cloud: b, cloudsSecret: clouds-b, instance: i}}
repositories: [{name: offsite, secretName: offsite}, {name: near.by, secretName: nearby}]
repositoryNamespaces: [shop, bank]
imagePullSecrets: [{name: pull}]
storageClasses:
- {name: abaca, default: true, backend: two, mountOptions: [noatime], parameters: {protocol: NFS}, annotations: {a: b}, allowVolumeExpansion: false}
snapshotClasses:
- {name: s, type: snapshot, default: true, annotations: {a: b}, deletionPolicy: Retain}
- {name: b, type: backup, repository: near.by, allowPartial: true, allowEmpty: true, exclude: ["*.tmp", "/a, b"]}
state: {existingClaim: state, existingClaimShared: true}
controller: {replicas: 2, hostNetwork: true, metrics: {enabled: true}, nodeSelector: {a: b}, tolerations: [{operator: Exists}], podAnnotations: {a: b}, podLabels: {a: b},
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]}}}}
node: {zone: z, metrics: {enabled: true}, nodeSelector: {a: b}, podAnnotations: {a: b}, podLabels: {a: b}}
movers: {limit: 3, priorityClassName: low, nodeSelector: {a: b}, tolerations: [{operator: Exists}], podAnnotations: {a: b}, podLabels: {a: b}, cache: {existingClaim: c},
  volumes: [{name: more, emptyDir: {}}], volumeMounts: [{name: more, mountPath: /more}]}
`
	everythingLocal = `
backends:
- {name: one, local: {node: n1, size: 10Gi}}
- {name: two, local: {node: n1, path: /srv/abaca}}
repositories: [{name: offsite, secretName: offsite}]
repositoryNamespaces: [shop]
csiDriver: {attachRequired: true, fsGroupPolicy: None}
controller: {metrics: {enabled: true}}
networkPolicy: {metricsFrom: [{namespaceSelector: {matchLabels: {a: b}}}]}
movers: {cache: {hostPath: /var/cache/abaca}}
`
)

// helm renders the chart with values.
func helm(t *testing.T, values string, args ...string) (string, error) {
	t.Helper()
	return run(t, values, "template", args...)
}

// run runs a command of helm over the chart, and returns what it prints.
func run(t *testing.T, values, command string, args ...string) (string, error) {
	t.Helper()
	program, err := filepath.Abs("../bin/helm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%s is missing: run make bin/helm", program)
	}
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, append([]string{command, "abaca", chart, "--namespace", namespace, "--values", file}, args...)...)
	// Neither a cluster nor anybody's settings have a say.
	cmd.Env = append(os.Environ(), "KUBECONFIG=/nonexistent", "HELM_CONFIG_HOME="+t.TempDir(), "HELM_CACHE_HOME="+t.TempDir(), "HELM_DATA_HOME="+t.TempDir())
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%w: %s", err, stderr.String())
	}
	return out.String(), nil
}

func render(t *testing.T, values string) objects {
	t.Helper()
	out, err := helm(t, values, "--api-versions", snapshots)
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, out)
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestRendered: what is committed is what the chart renders.
func TestRendered(t *testing.T) {
	for _, name := range []string{"embedded", "manila"} {
		out, err := helm(t, read(t, "kustomize", name, "values.yaml"), "--api-versions", snapshots)
		if err != nil {
			t.Fatal(err)
		}
		if out != read(t, "kustomize", name, "abaca.yaml") {
			t.Errorf("kustomize/%s/abaca.yaml is not what the chart renders: run make chart, and look at the difference", name)
		}
	}
}

// objects are decoded manifests.
type objects []runtime.Object

var codecs = func() serializer.CodecFactory {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, batchv1.AddToScheme, storagev1.AddToScheme,
		rbacv1.AddToScheme, networkingv1.AddToScheme, policyv1.AddToScheme, snapshotv1.AddToScheme} {
		if err := add(scheme); err != nil {
			panic(err)
		}
	}
	return serializer.NewCodecFactory(scheme, serializer.EnableStrict)
}()

// decode reads manifests as an API server does that warns of nothing: a field that
// its type does not have, or has twice, is an error.
func decode(t *testing.T, text string) objects {
	t.Helper()
	var all objects
	for _, doc := range regexp.MustCompile(`(?m)^---\s*$`).Split(text, -1) {
		var any map[string]any
		if err := yaml.UnmarshalStrict([]byte(doc), &any); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if len(any) == 0 {
			continue
		}
		object, _, err := codecs.UniversalDeserializer().Decode([]byte(doc), nil, nil)
		if err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		all = append(all, object)
	}
	return all
}

func of[T runtime.Object](all objects) (found []T) {
	for _, object := range all {
		if o, ok := object.(T); ok {
			found = append(found, o)
		}
	}
	return found
}

// pod is the pod of the controller or of a node.
func pod(all objects) map[string]corev1.PodTemplateSpec {
	pods := map[string]corev1.PodTemplateSpec{}
	for _, d := range of[*appsv1.Deployment](all) {
		pods["controller"] = d.Spec.Template
	}
	for _, d := range of[*appsv1.DaemonSet](all) {
		pods["node"] = d.Spec.Template
	}
	return pods
}

// variants are the ways to install the chart.
func variants(t *testing.T) map[string]objects {
	return map[string]objects{
		"embedded": decode(t, read(t, "kustomize/embedded/abaca.yaml")), "manila": decode(t, read(t, "kustomize/manila/abaca.yaml")),
		"everything with manila": render(t, everythingManila), "everything local": render(t, everythingLocal),
	}
}

// TestManifests: what Kubernetes finds out only when it runs them.
func TestManifests(t *testing.T) {
	for variant, all := range variants(t) {
		t.Run(variant, func(t *testing.T) {
			accounts, roles := map[string]bool{}, map[string]bool{}
			for _, a := range of[*corev1.ServiceAccount](all) {
				accounts[a.Name] = a.Namespace == namespace
			}
			for _, r := range of[*rbacv1.ClusterRole](all) {
				roles[r.Name] = true
			}
			for _, r := range of[*rbacv1.Role](all) {
				roles[r.Namespace+"/"+r.Name] = true
			}
			for _, b := range of[*rbacv1.RoleBinding](all) {
				if !roles[b.Namespace+"/"+b.RoleRef.Name] || len(b.Subjects) != 1 || !accounts[b.Subjects[0].Name] || b.Subjects[0].Namespace != namespace {
					t.Errorf("binding %s: role %s, subjects %v", b.Name, b.RoleRef.Name, b.Subjects)
				}
			}
			for _, b := range of[*rbacv1.ClusterRoleBinding](all) {
				if !roles[b.RoleRef.Name] || len(b.Subjects) != 1 || !accounts[b.Subjects[0].Name] || b.Subjects[0].Namespace != namespace {
					t.Errorf("binding %s: role %s, subjects %v", b.Name, b.RoleRef.Name, b.Subjects)
				}
			}
			pods := pod(all)
			if len(pods) != 2 {
				t.Fatalf("%d pods", len(pods))
			}
			for name, template := range pods {
				if !accounts[template.Spec.ServiceAccountName] {
					t.Errorf("%s: there is no service account %q", name, template.Spec.ServiceAccountName)
				}
				if template.Spec.PriorityClassName == "" {
					t.Errorf("%s has no priority class", name)
				}
				checkPod(t, name, template.Spec)
			}
			for _, d := range of[*appsv1.Deployment](all) {
				selects(t, d.Name, d.Spec.Selector.MatchLabels, d.Spec.Template.Labels, pods["node"].Labels)
			}
			for _, d := range of[*appsv1.DaemonSet](all) {
				selects(t, d.Name, d.Spec.Selector.MatchLabels, d.Spec.Template.Labels, pods["controller"].Labels)
			}
		})
	}
}

// selects checks that a selector finds the one and not the other.
func selects(t *testing.T, what string, selector, one, other map[string]string) {
	matches := func(labels map[string]string) bool {
		for k, v := range selector {
			if labels[k] != v {
				return false
			}
		}
		return len(selector) > 0
	}
	if !matches(one) || matches(other) {
		t.Errorf("%s: the selector %v is of the wrong pods", what, selector)
	}
}

// checkPod: mounts, variables and ports refer to what is there, and what is not
// privileged is restricted.
func checkPod(t *testing.T, name string, spec corev1.PodSpec) {
	volumes, used := map[string]corev1.Volume{}, map[string]bool{}
	for _, v := range spec.Volumes {
		volumes[v.Name] = v
	}
	ports := map[int32]string{}
	for _, c := range spec.Containers {
		where := name + "/" + c.Name
		paths, env := map[string]bool{}, map[string]bool{}
		for _, m := range c.VolumeMounts {
			used[m.Name] = true
			if _, ok := volumes[m.Name]; !ok || paths[m.MountPath] {
				t.Errorf("%s: mount %s at %s: no such volume, or there is another", where, m.Name, m.MountPath)
			}
			paths[m.MountPath] = true
		}
		for _, e := range c.Env {
			env[e.Name] = true
		}
		for _, arg := range c.Args {
			for _, m := range regexp.MustCompile(`\$\((\w+)\)`).FindAllStringSubmatch(arg, -1) {
				if !env[m[1]] {
					t.Errorf("%s: %s names a variable that is not there", where, arg)
				}
			}
		}
		for _, p := range c.Ports {
			if other := ports[p.ContainerPort]; other != "" {
				t.Errorf("%s: port %d is that of %s", where, p.ContainerPort, other)
			}
			ports[p.ContainerPort] = where
		}
		s := c.SecurityContext
		switch {
		case s == nil:
			t.Errorf("%s has no security context", where)
		case c.Name == "abaca":
			// What a controller of Manila may do is tried by TestRestrictedController.
			local := strings.Contains(fmt.Sprint(spec.Affinity), "metadata.name")
			if (name == "node" || local) != (s.Privileged != nil && *s.Privileged) || c.LivenessProbe == nil || c.StartupProbe == nil || c.ReadinessProbe == nil {
				t.Errorf("%s cannot mount, or has no probe", where)
			}
			if c.TerminationMessagePolicy != corev1.TerminationMessageFallbackToLogsOnError {
				t.Errorf("%s does not say why it does not start", where)
			}
		case s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem ||
			s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 ||
			s.SeccompProfile == nil || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || s.Privileged != nil ||
			(s.RunAsNonRoot == nil || !*s.RunAsNonRoot) && name == "controller":
			t.Errorf("%s is not restricted", where)
		}
		if !strings.Contains(c.Image, ":") || c.Resources.Requests.Memory().IsZero() {
			t.Errorf("%s: image %q, resources %v", where, c.Image, c.Resources)
		}
	}
	for v := range volumes {
		if !used[v] {
			t.Errorf("%s: nobody mounts volume %s", name, v)
		}
	}
	if token := spec.AutomountServiceAccountToken; name == "node" && (token == nil || *token != strings.Contains(fmt.Sprint(spec), "--keys=secret:")) {
		t.Error("a node has a token to read keys with, and for nothing else")
	}
}

// TestWhoConnects: what tells of all namespaces is on the pod's loopback. Metrics are on
// its address if somebody wants them, and then for those alone who were named.
func TestWhoConnects(t *testing.T) {
	const named = "\nnetworkPolicy: {metricsFrom: [{namespaceSelector: {matchLabels: {a: b}}}]}"
	for _, test := range []struct {
		values, metrics string
		closed          []string
	}{
		{"", "", []string{"controller", "maintenance", "mover"}},
		{"networkPolicy: {enabled: false}", "", nil},
		{"controller: {metrics: {enabled: true}}" + named, ":29681", []string{"controller", "maintenance", "mover"}},
		{"monitoring: {serviceMonitor: {enabled: true}}" + named, ":29681", []string{"controller", "maintenance", "mover"}},
		{"controller: {metrics: {enabled: false}}\nnode: {metrics: {enabled: true}}\nmonitoring: {serviceMonitor: {enabled: true}}", "", []string{"controller", "maintenance", "mover"}},
		{"controller: {hostNetwork: true, metrics: {enabled: true}}", ":29681", []string{"maintenance", "mover"}},
	} {
		out, err := helm(t, "backends: [{name: l, local: {node: n1}}]\nrepositories: [{name: r, secretName: s}]\n"+test.values)
		if err != nil {
			t.Fatal(err)
		}
		docs := slices.DeleteFunc(strings.Split(out, "\n---\n"), func(doc string) bool { return strings.Contains(doc, "kind: ServiceMonitor") })
		all := decode(t, strings.Join(docs, "\n---\n"))
		controller := pod(all)["controller"]
		endpoints := map[string]string{}
		for _, arg := range controller.Spec.Containers[0].Args {
			if flag, address, ok := strings.Cut(arg, "="); ok && strings.HasSuffix(flag, "-endpoint") {
				endpoints[flag] = address
			}
		}
		if endpoints["--http-endpoint"] != "127.0.0.1:29685" || endpoints["--metrics-endpoint"] != test.metrics {
			t.Errorf("%s: the controller listens at %v", test.values, endpoints)
		}

		labels := map[string]map[string]string{"controller": controller.Labels, "node": pod(all)["node"].Labels,
			"mover": of[*corev1.PodTemplate](all)[0].Template.Labels, "maintenance": of[*batchv1.CronJob](all)[0].Spec.JobTemplate.Spec.Template.Labels}
		var closed []string
		open := map[string][]networkingv1.NetworkPolicyIngressRule{}
		for _, p := range of[*networkingv1.NetworkPolicy](all) {
			selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
			if err != nil {
				t.Fatal(err)
			}
			for who, l := range labels {
				if selector.Matches(apilabels.Set(l)) {
					closed, open[who] = append(closed, who), append(open[who], p.Spec.Ingress...)
				}
			}
		}
		slices.Sort(closed)
		if closed = slices.Compact(closed); !slices.Equal(closed, test.closed) {
			t.Errorf("%s: policies are of %v, want %v", test.values, closed, test.closed)
		}
		for who, rules := range open {
			if read := who == "controller" && test.metrics != ""; !read && len(rules) > 0 ||
				read && (len(rules) != 1 || len(rules[0].From) != 1 || len(rules[0].Ports) != 1 || rules[0].Ports[0].Port.String() != "metrics") {
				t.Errorf("%s: connects to %s: %+v", test.values, who, rules)
			}
		}
	}
}

// TestReplicas: there are two controllers wherever two can be, apart from each other,
// and what drains nodes leaves one.
func TestReplicas(t *testing.T) {
	const local, manila = "backends: [{name: l, local: {node: n1}}]\n", "backends: [{name: m, manila: {cloud: c, cloudsSecret: s, instance: i}}]\n"
	for values, want := range map[string]int32{
		local:                                1,
		local + "controller: {replicas: 2}":  2,
		manila:                               2,
		manila + "controller: {replicas: 1}": 1,
		manila + "controller: {hostNetwork: true}":                      1,
		manila + "state: {existingClaim: c}":                            1,
		manila + "state: {existingClaim: c, existingClaimShared: true}": 2,
		manila + "state: {existingClaim: c}\ncontroller: {replicas: 1}": 1,
		manila + "controller: {hostNetwork: true, replicas: 3}":         3,
		manila + "controller: {replicas: 0}":                            0,
	} {
		all := render(t, values)
		d := of[*appsv1.Deployment](all)[0]
		if *d.Spec.Replicas != want {
			t.Errorf("%s: %d controllers, want %d", values, *d.Spec.Replicas, want)
		}
		several := want > 1
		elect := slices.Contains(d.Spec.Template.Spec.Containers[1].Args, "--leader-election")
		roles := slices.ContainsFunc(of[*rbacv1.Role](all), func(r *rbacv1.Role) bool { return r.Name == "abaca-leader-election" })
		budgets, spread := of[*policyv1.PodDisruptionBudget](all), d.Spec.Template.Spec.TopologySpreadConstraints
		if elect != several || roles != several || (len(budgets) == 1) != several || (len(spread) == 2) != several {
			t.Errorf("%s: leader election %v with a role %v, %d budgets, %d constraints", values, elect, roles, len(budgets), len(spread))
		}
		for _, b := range budgets {
			selects(t, "budget", b.Spec.Selector.MatchLabels, d.Spec.Template.Labels, pod(all)["node"].Labels)
			if b.Spec.MaxUnavailable.IntValue() != 1 || *b.Spec.UnhealthyPodEvictionPolicy != policyv1.AlwaysAllow {
				t.Errorf("%s: %+v", values, b.Spec)
			}
		}
		for _, s := range spread {
			selects(t, "constraint", s.LabelSelector.MatchLabels, d.Spec.Template.Labels, pod(all)["node"].Labels)
		}
	}
}

// TestMovers: what a mover is like before its Job adds what it moves, and its
// security context.
func TestMovers(t *testing.T) {
	for variant, all := range variants(t) {
		templates := of[*corev1.PodTemplate](all)
		if len(templates) != 1 {
			t.Fatalf("%s: %d PodTemplates", variant, len(templates))
		}
		one := templates[0]
		controller := pod(all)["controller"].Spec.Containers[0]
		if want := "--movers=podtemplate:$(NAMESPACE)/" + one.Name; !slices.Contains(controller.Args, want) || one.Namespace != namespace {
			t.Errorf("%s: the controller is not told %s", variant, want)
		}
		// Each repository of the controller is one of the movers.
		for _, v := range pod(all)["controller"].Spec.Volumes {
			i := slices.IndexFunc(controller.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name })
			if i < 0 {
				continue // of a sidecar
			}
			if name, ok := strings.CutPrefix(controller.VolumeMounts[i].MountPath, "/etc/abaca/repositories/"); ok && one.Annotations[kube.Repository+name] != v.Secret.SecretName {
				t.Errorf("%s: movers have no Secret for repository %s", variant, name)
			}
		}
		for _, limit := range []string{kube.Limit, kube.LimitEach} {
			if n, err := strconv.Atoi(one.Annotations[limit]); err != nil || n < 1 {
				t.Errorf("%s: annotation %s is %q", variant, limit, one.Annotations[limit])
			}
		}
		spec := one.Template.Spec
		if len(spec.Containers) != 1 || spec.Containers[0].Name != "mover" || spec.Containers[0].Image != controller.Image ||
			*spec.AutomountServiceAccountToken || spec.HostNetwork || spec.HostPID || spec.HostIPC || spec.ServiceAccountName == pod(all)["controller"].Spec.ServiceAccountName {
			t.Errorf("%s: %+v", variant, spec)
		}
		selector := spec.TopologySpreadConstraints[0].LabelSelector.MatchLabels
		for name, template := range pod(all) {
			selects(t, "movers beside "+name, selector, one.Template.Labels, template.Labels)
		}
		// It takes its flags, and misses its task only.
		out, err := exec.Command(build(t), append(spec.Containers[0].Args, "--repository=/nonexistent")...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "ABACA_TASK") {
			t.Errorf("%s: abaca %s: %v: %s", variant, strings.Join(spec.Containers[0].Args, " "), err, out)
		}
	}
}

// build builds the program, once.
func build(t *testing.T) string {
	t.Helper()
	if err := built(); err != nil {
		t.Fatal(err)
	}
	return program
}

var (
	program string
	built   = sync.OnceValue(func() error {
		// With the race detector, as the other tests build it.
		out, err := exec.Command("go", "build", "-race", "-ldflags", "-s -w", "-o", program, "../cmd/abaca").CombinedOutput()
		if err != nil {
			return fmt.Errorf("build abaca: %w: %s", err, out)
		}
		return nil
	})
)

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "abaca-deploy-")
	if err != nil {
		panic(err)
	}
	program = filepath.Join(dir, "abaca")
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// TestFlags: the program takes the command lines of the manifests, and the
// configuration.
func TestFlags(t *testing.T) {
	dir, program, helps := t.TempDir(), build(t), map[string][]byte{}
	for _, role := range []string{"controller", "node"} {
		var err error
		if helps[role], err = exec.Command(program, role, "--help").Output(); err != nil {
			t.Fatal(err)
		}
	}
	for variant, all := range variants(t) {
		config := filepath.Join(dir, "config.yaml")
		for _, c := range of[*corev1.ConfigMap](all) {
			if err := os.WriteFile(config, []byte(c.Data["config.yaml"]), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for name, template := range pod(all) {
			for _, c := range template.Spec.Containers {
				if c.Name != "abaca" {
					continue
				}
				if c.Args[0] != name {
					t.Fatalf("%s runs abaca %s", name, c.Args[0])
				}
				// It reads all, and stops at the node's name, which is none.
				args := []string{}
				for _, arg := range c.Args {
					flag, _, _ := strings.Cut(arg, "=")
					if strings.HasPrefix(flag, "-") && !regexp.MustCompile(`(?m)^ +(-\w, )?`+flag+` `).Match(helps[name]) {
						t.Errorf("%s, %s: abaca %s has no flag %s", variant, name, c.Args[0], flag)
					}
					arg = strings.ReplaceAll(arg, "$(NODE_NAME)", "-")
					arg = strings.ReplaceAll(arg, "$(NAMESPACE)", namespace)
					arg = strings.ReplaceAll(arg, "$(HOST_IPS)", "192.0.2.1,2001:db8::1")
					arg = strings.ReplaceAll(arg, "$(NODE_ZONE)", "")
					arg = strings.ReplaceAll(arg, "/etc/abaca/config/config.yaml", config)
					args = append(args, arg)
				}
				out, err := exec.Command(program, args...).CombinedOutput()
				if err == nil || !strings.Contains(string(out), "--node-id") {
					t.Errorf("%s: abaca %s: %v: %s", variant, strings.Join(args, " "), err, out)
				}
				// Readiness asks where the controller listens; a pod that lacks something lives.
				if c.LivenessProbe.HTTPGet == nil || c.StartupProbe.HTTPGet == nil || (c.ReadinessProbe.Exec == nil) != (name == "node") {
					t.Errorf("%s, %s: probes %v %v %v", variant, name, c.LivenessProbe, c.StartupProbe, c.ReadinessProbe)
				}
				if name == "controller" {
					probe := c.ReadinessProbe.Exec.Command
					out, err := exec.Command(program, probe[1:]...).CombinedOutput()
					if !slices.Contains(c.Args, probe[2]) || probe[0] != "/usr/local/bin/abaca" || err == nil || !strings.Contains(string(out), "does not serve") {
						t.Errorf("%s: %v: %v: %s", variant, probe, err, out)
					}
				}
			}
		}
	}
}

// TestScheduleExample: the program takes the command line, and misses only the cluster.
func TestScheduleExample(t *testing.T) {
	jobs := of[*batchv1.CronJob](decode(t, read(t, "examples/8-schedule.yaml")))
	cmd := exec.Command(build(t), jobs[0].Spec.JobTemplate.Spec.Template.Spec.Containers[0].Args...)
	cmd.Env = []string{"HOME=" + t.TempDir()}
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "no cluster") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestRefusedValues: a value that is not known, or cannot work, is refused with its name.
func TestRefusedValues(t *testing.T) {
	const local, manila = "backends: [{name: l, local: {node: n1}}]\n", "backends: [{name: m, manila: {cloud: c, cloudsSecret: s, instance: i}}]\n"
	for values, word := range map[string]string{
		"":                                   "backends",
		local + "replica: 1":                 "replica",
		local + "controller: {replica: 1}":   "replica",
		local + "controller: {replicas: 10}": "replicas",
		local + "movers: {limit: 0}":         "movers/limit",
		local + "controller: {provisioner: {timeout: 10}}":                                                      "timeout",
		local + "node: {zone: a/b}":                                                                             "zone",
		local + "kubeletDir: var/lib":                                                                           "kubeletDir",
		local + "repositories: [{name: '@x', secretName: s}]":                                                   "repositories/0/name",
		local + "repositoryNamespaces: [a/b]":                                                                   "repositoryNamespaces/0",
		local + "repositories: [{name: Off, secretName: s}]":                                                    "repositories/0/name",
		local + "snapshotClasses: [{name: s, type: snapshot, repository: r}]":                                   "repository",
		local + "snapshotClasses: [{name: s, type: backup, repository: r}]":                                     `repository "r"`,
		local + "storageClasses: [{name: s, backend: x}]":                                                       `backend "x"`,
		local + "storageClasses: [{name: s, parameters: {backend: x}}]":                                         "parameters",
		local + "state: {existingClaim: c}":                                                                     "existingClaim",
		manila + "state: {existingClaim: c}\ncontroller: {replicas: 2}":                                         "existingClaimShared",
		local + "controller: {metrics: {enabled: true}}":                                                        "networkPolicy.metricsFrom",
		manila + "monitoring: {serviceMonitor: {enabled: true}}":                                                "networkPolicy.metricsFrom",
		manila + "csiDriver: {attachRequired: false}":                                                           "attachRequired",
		"backends: [{name: backup, local: {node: n1}}]":                                                         "backends/0/name",
		"backends: [{name: m, manila: {cloud: c, cloudsSecret: s}}]":                                            "instance",
		"backends: [{name: l}]":                                                                                 "backends/0",
		"backends: [{name: l, local: {size: 10Gi}}]":                                                            "node",
		"backends: [{name: l, local: {node: n1, size: ten}}]":                                                   "size",
		"backends: [{name: l, local: {node: n1}, manila: {cloud: c, cloudsSecret: s, instance: i}}]":            "backends/0",
		"backends: [{name: l, local: {node: n1}}, {name: m, local: {node: n2}}]":                                "n1, n2",
		"backends: [{name: l, local: {node: n1}}, {name: m, manila: {cloud: c, cloudsSecret: s, instance: i}}]": "together",
		"backends: [{name: m, manila: {cloud: c, cloudsSecret: s, instance: i, password: p}}]":                  "password",
	} {
		if _, err := helm(t, values); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v; it does not speak of %s", values, err, word)
		}
	}
}

// TestSchema: the schema knows each value, describes it, and refuses others.
func TestSchema(t *testing.T) {
	var schema, values map[string]any
	if err := errors.Join(json.Unmarshal([]byte(read(t, chart, "values.schema.json")), &schema),
		yaml.UnmarshalStrict([]byte(read(t, chart, "values.yaml")), &values)); err != nil {
		t.Fatal(err)
	}
	var walk func(where string, schema map[string]any, value any)
	walk = func(where string, schema map[string]any, value any) {
		if where != "" && schema["description"] == nil {
			t.Errorf("%s is not described", where)
		}
		properties, _ := schema["properties"].(map[string]any)
		if extra, ok := schema["additionalProperties"].(map[string]any); properties != nil && schema["additionalProperties"] != false && (!ok || extra["type"] != "string") {
			t.Errorf("%s takes what it does not know", where)
		}
		in, _ := value.(map[string]any)
		for k, p := range properties {
			v, ok := in[k]
			if in != nil && !ok && k != "limits" && k != "global" {
				t.Errorf("%s.%s is not in values.yaml", where, k)
			}
			if p, ok := p.(map[string]any); ok { // or false: refused
				walk(where+"."+k, p, v)
			}
		}
		if items, ok := schema["items"].(map[string]any); ok && items["properties"] != nil {
			walk(where+"[]", items, nil)
		}
	}
	walk("", schema, values)
}

// TestClasses: the classes are those that the driver reads, and without a
// repository or CRDs there are none that could not work.
func TestClasses(t *testing.T) {
	const local = "backends: [{name: l, local: {node: n1}}]\n"
	for _, test := range []struct {
		values string
		args   []string
		want   string
	}{
		{local, nil, "abaca"},
		{local + "storageClasses: [{name: now}, {name: late, volumeBindingMode: WaitForFirstConsumer}]", nil, "late now"},
		{local, []string{"--api-versions", snapshots}, "abaca abaca-snapshot"},
		{local + "repositories: [{name: r, secretName: s}, {name: q, secretName: s}]", []string{"--api-versions", snapshots}, "abaca abaca-backup:r abaca-snapshot"},
		{local + "repositoryNamespaces: [shop]", []string{"--api-versions", snapshots}, "abaca abaca-backup-own:@namespace abaca-snapshot"},
	} {
		out, err := helm(t, test.values, test.args...)
		if err != nil {
			t.Fatal(err)
		}
		all := decode(t, out)
		var names []string
		for _, c := range of[*storagev1.StorageClass](all) {
			if c.Provisioner != csi.DriverName || c.Parameters["backend"] != "l" {
				t.Errorf("class %s: %s %v", c.Name, c.Provisioner, c.Parameters)
			}
			// The scheduler chooses the node of a claim that waits for its first pod.
			var where []corev1.TopologySelectorTerm
			if c.Name == "late" {
				where = []corev1.TopologySelectorTerm{{MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{{Key: csi.TopologyKey, Values: []string{"n1"}}}}}
			}
			if diff := cmp.Diff(where, c.AllowedTopologies); diff != "" {
				t.Errorf("class %s: where its volumes may be (-want +got):\n%s", c.Name, diff)
			}
			names = append(names, c.Name)
		}
		for _, c := range of[*snapshotv1.VolumeSnapshotClass](all) {
			name := c.Name
			if r := c.Parameters["repository"]; r != "" {
				name += ":" + r
			}
			if c.Driver != csi.DriverName || (c.Parameters["type"] == "backup") != (name != c.Name) {
				t.Errorf("class %s: %s %v", c.Name, c.Driver, c.Parameters)
			}
			names = append(names, name)
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != test.want {
			t.Errorf("%s: classes %s, want %s", test.values, got, test.want)
		}
	}
}

// TestDriverObject: Kubernetes attaches where the driver wants it, and only there.
func TestDriverObject(t *testing.T) {
	for variant, all := range variants(t) {
		drivers := of[*storagev1.CSIDriver](all)
		if len(drivers) != 1 || drivers[0].Name != csi.DriverName {
			t.Fatalf("%s: %v", variant, drivers)
		}
		attacher := slices.ContainsFunc(pod(all)["controller"].Spec.Containers, func(c corev1.Container) bool { return c.Name == "csi-attacher" })
		if want := variant != "embedded"; *drivers[0].Spec.AttachRequired != want || attacher != want {
			t.Errorf("%s: attachRequired %v, csi-attacher %v", variant, *drivers[0].Spec.AttachRequired, attacher)
		}
	}
}

// TestRules: the table in the documentation has each rule with its reason, and no other.
func TestRules(t *testing.T) {
	rendered := map[string]bool{}
	add := func(role string, rules []rbacv1.PolicyRule) {
		role = strings.TrimPrefix(role, "abaca-")
		for _, r := range rules {
			resource := strings.TrimPrefix(strings.Join(append([]string{r.APIGroups[0], r.Resources[0]}, r.ResourceNames...), "/"), "/")
			rendered[fmt.Sprintf("%s | %s | %s", role, resource, strings.Join(r.Verbs, ", "))] = true
			if len(r.APIGroups) != 1 || len(r.Resources) != 1 || len(r.NonResourceURLs) > 0 {
				t.Errorf("rule %v of %s is not in the form of the table", r, role)
			}
		}
	}
	all := render(t, everythingManila)
	for _, r := range of[*rbacv1.ClusterRole](all) {
		add(r.Name, r.Rules)
	}
	for _, r := range of[*rbacv1.Role](all) {
		add(r.Name, r.Rules)
	}
	documented := map[string]bool{}
	for _, row := range regexp.MustCompile(`(?m)^\| ([a-z-]+) \| (\S+) \| ([a-z, ]+) \| \S.* \|$`).FindAllStringSubmatch(read(t, "../docs/security.md"), -1) {
		if row[1] != "role" { // the head
			documented[strings.Join(row[1:], " | ")] = true
		}
	}
	for rule := range rendered {
		if !documented[rule] {
			t.Errorf("docs/security.md does not say what this is for: %s", rule)
		}
	}
	for rule := range documented {
		if !rendered[rule] {
			t.Errorf("docs/security.md has a rule that is not there: %s", rule)
		}
	}
}

// TestOwnRepositories: of a namespace that may have a repository the controller may
// read one Secret, and of others none; without such namespaces it may read and make none.
func TestOwnRepositories(t *testing.T) {
	secrets := func(values string) (all []string) {
		objects := render(t, values)
		for _, r := range of[*rbacv1.Role](objects) {
			for _, rule := range r.Rules {
				if slices.Contains(rule.Resources, "secrets") {
					all = append(all, fmt.Sprint(r.Namespace, rule.ResourceNames, rule.Verbs))
				}
			}
		}
		for _, r := range of[*rbacv1.ClusterRole](objects) {
			for _, rule := range r.Rules {
				if slices.Contains(rule.Resources, "secrets") || slices.Contains(rule.Resources, "*") {
					t.Errorf("ClusterRole %s: %v", r.Name, rule)
				}
			}
		}
		for _, p := range of[*corev1.PodTemplate](objects) {
			all = append(all, "named: "+p.Annotations[kube.Namespaces])
		}
		slices.Sort(all)
		return all
	}
	const local = "backends: [{name: l, local: {node: n1}}]\n"
	want := []string{namespace + "[] [create]", "bank[abaca-repository] [get]", "named: shop,bank", "shop[abaca-repository] [get]"}
	if got := secrets(local + "repositoryNamespaces: [shop, bank]"); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := secrets(local + "repositories: [{name: r, secretName: s}]"); !slices.Equal(got, []string{"named: "}) {
		t.Errorf("without: %q", got)
	}
	all := render(t, local+"repositoryNamespaces: [shop]")
	for name, template := range pod(all) {
		checkPod(t, name, template.Spec)
	}
}

// TestExamples: the examples are sound, and of classes that the chart makes.
func TestExamples(t *testing.T) {
	classes := map[string]bool{}
	all := decode(t, read(t, "kustomize/embedded/abaca.yaml"))
	for _, c := range of[*storagev1.StorageClass](all) {
		classes[c.Name] = true
	}
	for _, c := range of[*snapshotv1.VolumeSnapshotClass](append(all, render(t, everythingLocal)...)) {
		classes[c.Name] = true
	}
	files, err := fs.Glob(os.DirFS("examples"), "*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d examples, %v", len(files), err)
	}
	for _, file := range files {
		text := read(t, "examples", file)
		decode(t, text)
		for _, m := range regexp.MustCompile(`(?m)^ *(?:storage|volumeSnapshot)ClassName: (\S+)`).FindAllStringSubmatch(text, -1) {
			if !classes[m[1]] {
				t.Errorf("%s names class %s, which is not among %v", file, m[1], classes)
			}
		}
	}
	for _, dir := range []string{"embedded", "manila"} {
		decode(t, read(t, "kustomize", dir, "namespace.yaml"))
	}
}

// TestReadme: what the README shows is in the examples, to the letter.
func TestReadme(t *testing.T) {
	var examples string
	files, err := filepath.Glob("examples/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		examples += read(t, file)
	}
	// Indentation is that of the place.
	indent := regexp.MustCompile(`(?m)^ +`)
	examples = indent.ReplaceAllString(examples, "")
	shown := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(read(t, "../README.md"), -1)
	kubernetes := 0
	for _, m := range shown {
		if strings.HasPrefix(m[1], "backends:") {
			continue // the configuration of standalone
		}
		if kubernetes++; !strings.Contains(examples, indent.ReplaceAllString(m[1], "")) {
			t.Errorf("no example has\n%s", m[1])
		}
	}
	if kubernetes == 0 {
		t.Error("the README shows no example")
	}
}

// TestKustomizations: what they name is there.
func TestKustomizations(t *testing.T) {
	for _, name := range []string{"embedded", "manila"} {
		dir := filepath.Join("kustomize", name)
		var k struct {
			APIVersion, Kind string
			Resources        []string
			Images           []struct{ Name, NewTag string }
			Patches          []struct {
				Target struct{ Kind string }
				Patch  string
			}
			SecretGenerator []struct {
				Name, Namespace string
				Envs, Files     []string
				Options         struct{ DisableNameSuffixHash bool }
			}
		}
		if err := yaml.UnmarshalStrict([]byte(read(t, dir, "kustomization.yaml")), &k); err != nil {
			t.Fatal(err)
		}
		files, secrets := k.Resources, map[string]bool{}
		for _, s := range k.SecretGenerator {
			files = append(append(files, s.Envs...), s.Files...)
			secrets[s.Name] = s.Namespace == namespace && s.Options.DisableNameSuffixHash
		}
		for _, file := range files {
			read(t, dir, file)
		}
		all := decode(t, read(t, dir, "abaca.yaml"))
		for _, template := range pod(all) {
			for _, v := range template.Spec.Volumes {
				if v.Secret != nil && !secrets[v.Secret.SecretName] {
					t.Errorf("%s: nobody makes Secret %s", name, v.Secret.SecretName)
				}
			}
			if image := template.Spec.Containers[0].Image; !strings.HasPrefix(image, k.Images[0].Name+":") {
				t.Errorf("%s: the image is %s, and %s is replaced", name, image, k.Images[0].Name)
			}
		}
		// at are the values at a path in the objects of a kind.
		at := func(kind, path string) (found []any) {
			for _, doc := range strings.Split(read(t, dir, "abaca.yaml"), "\n---\n") {
				var object map[string]any
				if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
					t.Fatal(err)
				}
				if is, _ := object["kind"].(string); !regexp.MustCompile("^" + kind + "$").MatchString(is) {
					continue
				}
				var here any = object
				for _, step := range strings.Split(path, "/") {
					if list, ok := here.([]any); ok && step == "0" && len(list) > 0 {
						here = list[0]
						continue
					}
					in, _ := here.(map[string]any)
					here = in[step]
				}
				found = append(found, here)
			}
			return found
		}
		for _, p := range k.Patches {
			var ops []struct{ Op, Path, Value string }
			if err := yaml.UnmarshalStrict([]byte(p.Patch), &ops); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]any{ops[0].Value, ops[0].Value}, at(p.Target.Kind, ops[0].Path[1:])); diff != "" {
				t.Errorf("%s: what is patched at %s (-want +got):\n%s", name, ops[0].Path, diff)
			}
		}
	}
}

// TestNotes: what is missing is said, and the next three commands.
func TestNotes(t *testing.T) {
	const local = "backends: [{name: l, local: {node: n1}}]\n"
	for values, words := range map[string][]string{
		local: {"no VolumeSnapshots", "no repository", "node n1"},
		local + "repositories: [{name: r, secretName: my-secret}]": {"Secret my-secret of repository r. Backups to it are refused", "no `schedules`"},
		"backends: [{name: m, manila: {cloud: c, cloudsSecret: my-cloud, instance: i}}]\nnetworkPolicy: {enabled: true}\ncontroller: {hostNetwork: true}": {"Secret my-cloud", "networkPolicy"},
	} {
		out, err := run(t, values, "install", "--dry-run=client")
		if err != nil {
			t.Fatal(err)
		}
		_, notes, _ := strings.Cut(out, "\nNOTES:\n")
		for _, word := range append(words, "rollout status", "csinode", "kubectl apply") {
			if !strings.Contains(notes, word) {
				t.Errorf("the notes of %s do not speak of %s:\n%s", values, word, notes)
			}
		}
	}
}

// TestZone: a node plugin learns the zone of its node, unless the values say it; with
// the embedded backend there is none.
func TestZone(t *testing.T) {
	const manila = "backends: [{name: m, manila: {cloud: c, cloudsSecret: s, instance: i}}]\n"
	for values, want := range map[string]string{
		manila: "--zone=$(NODE_ZONE)", manila + "node: {zone: z}": "--zone=z", "backends: [{name: l, local: {node: n1}}]": ""} {
		got := ""
		for _, d := range of[*appsv1.DaemonSet](render(t, values)) {
			for _, arg := range d.Spec.Template.Spec.Containers[0].Args {
				if strings.HasPrefix(arg, "--zone") {
					got = arg
				}
			}
		}
		if got != want {
			t.Errorf("%s: %q, want %q", values, got, want)
		}
	}
}

// TestUpdateStrategy: with OnDelete an upgrade leaves the node plugin's pods, and what
// ceph-fuse serves in them.
func TestUpdateStrategy(t *testing.T) {
	const local = "backends: [{name: l, local: {node: n1}}]\n"
	for values, want := range map[string]appsv1.DaemonSetUpdateStrategyType{local: appsv1.RollingUpdateDaemonSetStrategyType,
		local + "node: {updateStrategy: OnDelete}": appsv1.OnDeleteDaemonSetStrategyType} {
		for _, d := range of[*appsv1.DaemonSet](render(t, values)) {
			if got := d.Spec.UpdateStrategy; got.Type != want || (got.RollingUpdate != nil) != (want == appsv1.RollingUpdateDaemonSetStrategyType) {
				t.Errorf("%s: %+v, want %s", values, got, want)
			}
		}
	}
}
