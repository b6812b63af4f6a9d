package deploy

import (
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/abaca-csi/abaca/pkg/backup/kube"
)

const withJobs = `
backends: [{name: l, local: {node: n1}}]
imagePullSecrets: [{name: pull}]
repositories:
- {name: offsite, secretName: offsite}
- {name: near.by, secretName: nearby, maintenance: {schedule: "@weekly", readDataDays: 90}}
- {name: ` + "a-name-that-is-as-long-as-the-name-of-a-repository-may-be-at-mo" + `, secretName: long}
maintenance: {maxUnused: 10%, maxRepackSize: 50G, timeZone: Europe/Berlin, nodeSelector: {a: b}, podAnnotations: {a: b}, tolerations: [{operator: Exists}],
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]}}}}
schedules:
- {name: nightly, namespace: shop, schedule: 0 1 * * *, selector: "app in (web, data)", tiers: ["class=abaca-backup,keep-daily=7", "class=abaca-snapshot,keep-last=24"], timeout: 90m, timeZone: Europe/Berlin}
- {name: nightly, namespace: bank, schedule: "@hourly", claims: [data, log], tiers: ["class=abaca-backup,keep-last=1"], suspend: true}
`

// restricted checks a pod that may do nothing to its node.
func restricted(t *testing.T, name string, spec corev1.PodSpec) {
	t.Helper()
	checkPod(t, name, spec)
	for _, c := range spec.Containers {
		if c.SecurityContext.RunAsNonRoot == nil || !*c.SecurityContext.RunAsNonRoot || spec.HostNetwork || spec.HostPID {
			t.Errorf("%s/%s is not restricted", name, c.Name)
		}
	}
	for _, v := range spec.Volumes {
		if v.HostPath != nil {
			t.Errorf("%s has the node's %s", name, v.HostPath.Path)
		}
	}
}

// takes checks that the program knows every flag of a command line.
func takes(t *testing.T, args []string) {
	t.Helper()
	help, err := exec.Command(build(t), args[0], "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, arg := range args[1:] {
		flag, _, _ := strings.Cut(arg, "=")
		if !regexp.MustCompile(`(?m)^ +(-\w, )?` + flag + ` `).Match(help) {
			t.Errorf("abaca %s has no flag %s", args[0], flag)
		}
	}
}

// TestMaintenance: each repository has a CronJob, with its Secret and no rights.
func TestMaintenance(t *testing.T) {
	all := render(t, withJobs)
	found := map[string]batchv1.CronJob{}
	for _, j := range of[*batchv1.CronJob](all) {
		if repository := j.Annotations["abaca-csi.github.io/repository"]; repository != "" {
			found[repository] = *j
		}
	}
	if len(found) != 3 {
		t.Fatalf("%d CronJobs", len(found))
	}
	names := map[string]bool{}
	for repository, j := range found {
		spec := j.Spec.JobTemplate.Spec.Template.Spec
		if problems := validation.IsDNS1123Label(j.Name); len(problems) > 0 || len(j.Name) > 52 || names[j.Name] {
			t.Errorf("%s: name %q: %v", repository, j.Name, problems)
		}
		names[j.Name] = true
		restricted(t, j.Name, spec)
		if got := j.Spec.JobTemplate.Spec.Template.Labels[kube.Maintains]; got != repository {
			t.Errorf("%s: its pods say that they maintain %q", j.Name, got)
		}
		args := spec.Containers[0].Args
		if !slices.Contains(args, "--repository="+repository) || j.Namespace != namespace || j.Spec.ConcurrencyPolicy != batchv1.ForbidConcurrent {
			t.Errorf("%s: %v", repository, args)
		}
		takes(t, args)
		if rules := j.Spec.JobTemplate.Spec.PodFailurePolicy.Rules; *rules[0].OnExitCodes.ContainerName != spec.Containers[0].Name ||
			!slices.Equal(rules[0].OnExitCodes.Values, []int32{4, 11}) {
			t.Errorf("%s: %+v", repository, rules)
		}
		if token := spec.AutomountServiceAccountToken; token == nil || *token {
			t.Errorf("%s has a token", repository)
		}
		secret := ""
		for _, v := range spec.Volumes {
			if v.Secret != nil {
				secret = v.Secret.SecretName
				if *v.Secret.DefaultMode != 0o440 || *spec.SecurityContext.FSGroup != *spec.Containers[0].SecurityContext.RunAsGroup {
					t.Errorf("%s: it cannot read its Secret, or others can", repository)
				}
			}
		}
		if want := map[string]string{"offsite": "offsite", "near.by": "nearby"}[repository]; want != "" && secret != want {
			t.Errorf("%s has Secret %s", repository, secret)
		}
	}
	if j := found["near.by"]; j.Spec.Schedule != "@weekly" || !slices.Contains(j.Spec.JobTemplate.Spec.Template.Spec.Containers[0].Args, "--read-data-days=90") {
		t.Errorf("it has no schedule of its own: %+v", j.Spec)
	}
	if j := found["offsite"]; j.Spec.Schedule != "30 4 * * *" || *j.Spec.TimeZone != "Europe/Berlin" {
		t.Errorf("%+v", j.Spec)
	}
	for _, b := range append(of[*rbacv1.RoleBinding](all), &rbacv1.RoleBinding{}) {
		for _, s := range b.Subjects {
			if strings.Contains(s.Name, "maintenance") {
				t.Errorf("%s gives rights to maintenance", b.Name)
			}
		}
	}
	for _, off := range []string{"maintenance: {enabled: false}\n", ""} {
		values := off + "backends: [{name: l, local: {node: n1}}]\n"
		if off != "" {
			values += "repositories: [{name: r, secretName: s}]"
		}
		if jobs := of[*batchv1.CronJob](render(t, values)); len(jobs) > 0 {
			t.Errorf("%s: %d CronJobs", values, len(jobs))
		}
	}
}

// TestSchedules: each has what it needs in its own namespace, as the example has
// it, and nothing elsewhere.
func TestSchedules(t *testing.T) {
	var example rbacv1.Role
	for _, r := range of[*rbacv1.Role](decode(t, read(t, "examples/8-schedule.yaml"))) {
		example = *r
	}
	all := render(t, withJobs)
	for _, ns := range []string{"shop", "bank"} {
		jobs, roles, bindings, accounts := 0, 0, 0, 0
		for _, a := range of[*corev1.ServiceAccount](all) {
			if a.Namespace == ns && a.Name == "abaca-schedule-nightly" {
				accounts++
			}
		}
		for _, r := range of[*rbacv1.Role](all) {
			if r.Namespace != ns {
				continue
			}
			roles++
			if len(r.Rules) != len(example.Rules) {
				t.Errorf("%s: %v", ns, r.Rules)
			}
			for i, rule := range r.Rules {
				if want := example.Rules[i]; rule.String() != want.String() {
					t.Errorf("%s: %v, and the example has %v", ns, rule, want)
				}
			}
		}
		for _, b := range of[*rbacv1.RoleBinding](all) {
			if b.Namespace == ns && b.RoleRef.Name == "abaca-schedule-nightly" && len(b.Subjects) == 1 && b.Subjects[0].Namespace == ns && b.Subjects[0].Name == "abaca-schedule-nightly" {
				bindings++
			}
		}
		for _, j := range of[*batchv1.CronJob](all) {
			if j.Namespace != ns {
				continue
			}
			jobs++
			spec := j.Spec.JobTemplate.Spec.Template.Spec
			restricted(t, ns, spec)
			if spec.ServiceAccountName != "abaca-schedule-nightly" || *j.Spec.Suspend != (ns == "bank") {
				t.Errorf("%s: %+v", ns, j.Spec)
			}
			cmd := exec.Command(build(t), spec.Containers[0].Args...)
			cmd.Env = []string{"HOME=" + t.TempDir()}
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "no cluster") {
				t.Errorf("%v: %v: %s", spec.Containers[0].Args, err, out)
			}
		}
		if jobs != 1 || roles != 1 || bindings != 1 || accounts != 1 {
			t.Errorf("%s: %d jobs, %d roles, %d bindings, %d accounts", ns, jobs, roles, bindings, accounts)
		}
	}
	for _, b := range of[*rbacv1.ClusterRoleBinding](all) {
		if strings.Contains(b.Name, "schedule") {
			t.Error(b.Name)
		}
	}
	const local = "backends: [{name: l, local: {node: n1}}]\n"
	for values, word := range map[string]string{
		local + "schedules: [{name: x, namespace: s, schedule: 0 1 * * *, tiers: [class=a]}]":                             "selector",
		local + "schedules: [{name: x, namespace: s, schedule: 0 1 * * *, tiers: [class=a], selector: a=b, claims: [c]}]": "selector",
		local + "schedules: [{name: x, namespace: s, schedule: nightly, tiers: [class=a], selector: a=b}]":                "schedule",
		local + "schedules: [{name: x, namespace: s, schedule: 0 1 * * *, tiers: [], selector: a=b}]":                     "tiers",
		local + "schedules: [{name: x, namespace: s, schedule: 0 1 * * *, tiers: [abaca-backup], selector: a=b}]":         "tiers",
		local + "maintenance: {readDataDays: month}":                                                                      "readDataDays",
		local + "maintenance: {lockWait: 2}":                                                                              "lockWait",
		local + "repositories: [{name: r, secretName: s, maintenance: {enabled: false}}]":                                 "enabled",
		local + "repositories: [{name: r, secretName: s, maintenance: {schedule: daily}}]":                                "schedule",
	} {
		if _, err := helm(t, values); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v; it does not speak of %s", values, err, word)
		}
	}
}
