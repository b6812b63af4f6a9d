package kube

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// tenant is a namespace and its ordinary user: the built-in role edit, and all that
// can be done with VolumeSnapshots there.
type tenant struct {
	*cluster
	namespace string
}

const tenantRights = `
{apiVersion: v1, kind: Namespace, metadata: {name: NS}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: user, namespace: NS}}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: edit, namespace: NS},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit}, subjects: [{kind: ServiceAccount, name: user, namespace: NS}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: Role, metadata: {name: snapshots, namespace: NS},
 rules: [{apiGroups: [snapshot.storage.k8s.io], resources: [volumesnapshots], verbs: ["*"]}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: snapshots, namespace: NS},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: snapshots}, subjects: [{kind: ServiceAccount, name: user, namespace: NS}]}
`

func (c *cluster) tenant(namespace string) tenant {
	c.Helper()
	c.apply2(strings.ReplaceAll(tenantRights, "NS", namespace))
	return tenant{c, namespace}
}

// as is kubectl's flags for the user and the namespace.
func (t tenant) as() string {
	return "--as=system:serviceaccount:" + t.namespace + ":user -n " + t.namespace
}

// try runs kubectl as the user, in the namespace unless told otherwise.
func (t tenant) try(stdin, args string) (string, error) {
	return t.cluster.try(stdin, "kubectl", strings.Fields(t.as()+" "+args)...)
}

func (t tenant) kubectl(args string) string {
	t.Helper()
	out, err := t.try("", args)
	if err != nil {
		t.Fatalf("%s: kubectl %s: %v\n%s", t.namespace, args, err, out)
	}
	return out
}

// exec runs a script in a pod.
func (t tenant) exec(pod, script string) string {
	t.Helper()
	return t.run("kubectl", append(strings.Fields(t.as()), "exec", pod, "--", "sh", "-c", script)...)
}

func (t tenant) apply(manifest string) {
	t.Helper()
	if out, err := t.try(manifest, "apply -f -"); err != nil {
		t.Fatalf("%s: %s\n%s", t.namespace, out, manifest)
	}
}

func (t tenant) await(want, args string) {
	t.Helper()
	t.cluster.await(want, "-n "+t.namespace+" "+args)
}

// says waits until the error of a VolumeSnapshot holds a word.
func (t tenant) says(word, snapshot string) {
	t.Helper()
	t.Logf("%s/%s says %q after %s", t.namespace, snapshot, word,
		t.cluster.says(word, "-n "+t.namespace+" get volumesnapshot "+snapshot+" -o jsonpath={.status.error.message}"))
}

// secret makes the Secret of the namespace's own repository anew.
func (t tenant) secret(entries ...string) {
	t.Helper()
	t.kubectl("delete secret abaca-repository --ignore-not-found")
	args := "create secret generic abaca-repository"
	for _, e := range entries {
		args += " --from-literal=" + e
	}
	t.kubectl(args)
}

func claimFrom(name, more string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: %s}, spec: {storageClassName: abaca,
  accessModes: [ReadWriteMany], resources: {requests: {storage: 1Gi}}%s}}`, name, more)
}

func snapshotFrom(name, class, source string) string {
	return fmt.Sprintf(`{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshot, metadata: {name: %s}, spec: {%s, source: {%s}}}`, name, class, source)
}

// podWith is a pod that mounts a volume at /data.
func podWith(name, volume string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: c, image: "busybox:1.37",
  command: [sleep, "3600"], volumeMounts: [{name: data, mountPath: /data}]}], volumes: [{name: data, %s}]}}`, name, volume)
}

func ofClaim(name string) string { return "persistentVolumeClaim: {claimName: " + name + "}" }

const (
	snapshotGroup = "apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot"
	ownClass      = "volumeSnapshotClassName: abaca-backup-own"
	backupClass   = "volumeSnapshotClassName: abaca-backup"
	snapshotClass = "volumeSnapshotClassName: abaca-snapshot"
)

// moved waits until no object of a mover is left, and no copy of a Secret. What a
// controller has made that was killed before it wrote that down goes after five minutes.
func (c *cluster) moved() {
	c.Helper()
	c.awaitFor(7*time.Minute, "", "get configmaps,jobs,pods,pvc,pv,secrets -o name"+ours)
}

func names(dir string) string {
	entries, _ := os.ReadDir(dir)
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return strings.Join(all, " ")
}

// TestTenancy: what one namespace's user tries on another's share, snapshots, backups
// and repository, by every object that such a user may create; and the life of a
// repository that is a namespace's own.
func TestTenancy(t *testing.T) {
	c := start(t)
	bank, shop := c.tenant("bank"), c.tenant("shop")
	t.Cleanup(func() {
		_, _ = c.try("", "kubectl", "delete", "namespace", "bank", "shop", "--ignore-not-found", "--wait=false")
	})
	dir := t.TempDir()
	server := network.REST(t, root+"/bin", dir, "bank", "shop")
	at := func(user string) string { return server.Env["RESTIC_REPOSITORY"] + user + "/" }
	c.install(map[string]any{"repositoryNamespaces": []string{"bank", "shop"}})

	// The victim has everything: a share, a snapshot, a backup in the administrator's
	// repository and one in its own, and a volume that its claim has left behind.
	bank.secret("RESTIC_REPOSITORY="+at("bank"), "RESTIC_PASSWORD=vault", "RESTIC_REST_USERNAME=bank", "RESTIC_REST_PASSWORD=of-bank")
	bank.apply(claimFrom("data", ""))
	bank.apply(claimFrom("left", ""))
	bank.apply(podWith("writer", ofClaim("data")))
	bank.apply(podWith("leaver", ofClaim("left")))
	bank.await("Running", "get pod writer -o jsonpath={.status.phase}")
	bank.await("Running", "get pod leaver -o jsonpath={.status.phase}")
	for _, pod := range []string{"writer", "leaver"} {
		bank.exec(pod, "date >/data/secret-of-the-bank")
	}
	sum := bank.exec("writer", "sha256sum /data/secret-of-the-bank")
	bank.apply(snapshotFrom("snap", snapshotClass, "persistentVolumeClaimName: data"))
	bank.apply(snapshotFrom("saved", backupClass, "persistentVolumeClaimName: data"))
	bank.apply(snapshotFrom("own", ownClass, "persistentVolumeClaimName: data"))
	all := []string{"snap", "saved", "own"}
	content := map[string]string{}
	for _, s := range all {
		bank.await("true", "get volumesnapshot "+s+ready)
		content[s] = bank.kubectl("get volumesnapshot " + s + " -o jsonpath={.status.boundVolumeSnapshotContentName}")
	}
	if handle := c.kubectl("get volumesnapshotcontent " + content["own"] + " -o jsonpath={.status.snapshotHandle}"); !strings.HasPrefix(handle, "backup/@bank/") {
		t.Errorf("the own backup's handle is %s", handle)
	}
	volume := bank.kubectl("get pvc data -o jsonpath={.spec.volumeName}")
	left := bank.kubectl("get pvc left -o jsonpath={.spec.volumeName}")
	handle := c.kubectl("get pv " + volume + " -o jsonpath={.spec.csi.volumeHandle}")
	c.kubectl("patch pv " + left + ` --type=merge -p {"spec":{"persistentVolumeReclaimPolicy":"Retain"}}`)
	bank.kubectl("delete pod leaver --wait")
	bank.kubectl("delete pvc left --wait")
	c.await("Released", "get pv "+left+" -o jsonpath={.status.phase}")
	c.moved()
	state := func() string {
		return strings.Join([]string{
			bank.exec("writer", "sha256sum /data/secret-of-the-bank"), bank.exec("writer", "ls /data"),
			bank.kubectl("get volumesnapshots -o jsonpath={.items[*]['metadata.uid','status.readyToUse','status.boundVolumeSnapshotContentName']}"),
			c.kubectl("get volumesnapshotcontents " + strings.Join([]string{content["snap"], content["saved"], content["own"]}, " ") +
				" -o jsonpath={.items[*]['metadata.uid','spec','status.snapshotHandle']}"),
			c.kubectl("get pv " + volume + " " + left + " -o jsonpath={.items[*]['metadata.uid','spec.claimRef.uid','status.phase']}"),
			names(filepath.Join(dir, "bank/snapshots")), names(c.data("offsite/snapshots")), names(filepath.Join(dir, "bank/keys")),
		}, "\n")
	}
	before := state()

	controller := strings.Fields(c.kubectl("get pods -o jsonpath={.items[0]['metadata.name','status.podIP']} -l app.kubernetes.io/component=controller -n " + namespace))

	// What is refused at once.
	for _, attempt := range []struct{ what, manifest, args string }{
		{"a pod among the movers", podWith("thief", "emptyDir: {}"), "create -f - -n " + namespace},
		{"a mover's record", "", "create configmap abaca-mover-x -n " + namespace},
		{"a Secret of the driver's", "", "create secret generic x -n " + namespace},
		{"reading the administrator's Secret", "", "get secret offsite -n " + namespace},
		{"reading the movers", "", "get pods,configmaps,jobs -n " + namespace},
		{"reading the other's Secret", "", "get secret abaca-repository -n bank"},
		{"deleting the other's backup", "", "delete volumesnapshot own -n bank"},
		{"changing the other's claim", "", "annotate pvc data abaca-csi.github.io/exclude=* -n bank"},
		{"deleting the other's content", "", "delete volumesnapshotcontent " + content["saved"]},
		{"a content of one's own", `{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshotContent, metadata: {name: x}, spec: {deletionPolicy: Retain,
  driver: abaca-csi.github.io, source: {snapshotHandle: "x"}, volumeSnapshotRef: {name: x, namespace: shop}}}`, "create -f -"},
		{"a volume of one's own", fmt.Sprintf(`{apiVersion: v1, kind: PersistentVolume, metadata: {name: x}, spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteMany],
  csi: {driver: abaca-csi.github.io, volumeHandle: %q}}}`, handle), "create -f -"},
		{"a class of snapshots", `{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshotClass, metadata: {name: x}, driver: abaca-csi.github.io, deletionPolicy: Delete,
  parameters: {type: backup, repository: "@bank"}}`, "create -f -"},
		{"freeing a volume that is left", "", "patch pv " + left + ` --type=merge -p {"spec":{"claimRef":null}}`},
		{"asking the controller by the API", "", "get --raw /api/v1/namespaces/" + namespace + "/pods/" + controller[0] + ":29685/proxy/status"},
	} {
		if out, err := shop.try(attempt.manifest, attempt.args); err == nil || !strings.Contains(out, "forbidden") && !strings.Contains(out, "Forbidden") {
			t.Errorf("%s: %v\n%s", attempt.what, err, out)
		}
	}

	// What is taken, and never comes to anything: claims and pods that must not get
	// what they name, and VolumeSnapshots that must not be ready.
	shop.secret("RESTIC_REPOSITORY="+at("bank"), "RESTIC_PASSWORD=vault", "RESTIC_REST_USERNAME=shop", "RESTIC_REST_PASSWORD=of-shop")
	shop.apply(claimFrom("mine", ""))
	shop.apply(strings.Replace(podWith("worker", ofClaim("mine")), "busybox:1.37", "registry.example.org/backup-tools:1", 1)) // which has bash
	shop.await("Running", "get pod worker -o jsonpath={.status.phase}")
	shop.exec("worker", "date >/data/mine")
	// The controller knows of all namespaces, and tells a pod only that it is well, which
	// shows that the pod reaches it.
	from := func(port, path string) string {
		return shop.exec("worker", fmt.Sprintf(`bash -c 'exec 3<>/dev/tcp/%s/%s && printf "GET %s HTTP/1.0\r\n\r\n" >&3 && timeout 10 cat <&3' 2>&1 || true`, controller[1], port, path))
	}
	if out := from("29680", "/healthz"); !strings.HasSuffix(out, "ok") {
		t.Errorf("the pod does not reach the controller, which proves nothing: %s", out)
	}
	for _, port := range []string{"29685", "29681"} {
		for _, path := range []string{"/status", "/metrics"} {
			if out := from(port, path); !strings.Contains(out, "refused") {
				t.Errorf("port %s, %s tells a tenant's pod: %.500s", port, path, out)
			}
		}
	}
	// Without the feature CrossNamespaceVolumeDataSource, Kubernetes drops a source with
	// a namespace; then there is a new volume, of nothing.
	type attempt struct {
		what, kind, name, manifest string
		empty                      bool // or it comes to nothing at all
	}
	attempts := []attempt{
		{"a clone of a claim by its name", "pvc", "a1", claimFrom("a1", ", dataSource: {kind: PersistentVolumeClaim, name: data}"), false},
		{"a clone of a claim of a namespace", "pvc", "a2", claimFrom("a2", ", dataSourceRef: {kind: PersistentVolumeClaim, name: data, namespace: bank}"), true},
		{"a claim of a volume that is bound", "pvc", "a3", claimFrom("a3", ", volumeName: "+volume), false},
		{"a claim of a volume that is released", "pvc", "a4", claimFrom("a4", ", volumeName: "+left), false},
		{"a claim that says it is bound", "pvc", "a5", strings.Replace(claimFrom("a5", ", volumeName: "+volume), "name: a5",
			`name: a5, annotations: {pv.kubernetes.io/bind-completed: "yes", pv.kubernetes.io/bound-by-controller: "yes"}`, 1), false},
		{"a pod of a claim that says it is bound", "pod", "p5", podWith("p5", ofClaim("a5")), false},
		{"a pod with an inline volume", "pod", "p1", podWith("p1", fmt.Sprintf("csi: {driver: abaca-csi.github.io, volumeAttributes: {export: %q, location: %q, shareID: x}}",
			handle, c.data("mnt/shares"))), false},
		{"a backup of a claim by its name", "volumesnapshot", "s1", snapshotFrom("s1", ownClass, "persistentVolumeClaimName: data"), false},
		{"a backup of it where the administrator's are", "volumesnapshot", "s2", snapshotFrom("s2", backupClass, "persistentVolumeClaimName: data"), false},
		{"a backup into the other's repository", "volumesnapshot", "s3", snapshotFrom("s3", ownClass, "persistentVolumeClaimName: mine"), false},
	}
	for i, s := range all {
		attempts = append(attempts,
			attempt{"a restore of " + s + " by its name", "pvc", fmt.Sprint("b", i), claimFrom(fmt.Sprint("b", i), ", dataSource: {"+snapshotGroup+", name: "+s+"}"), false},
			attempt{"a restore of " + s + " of a namespace", "pvc", fmt.Sprint("c", i), claimFrom(fmt.Sprint("c", i), ", dataSourceRef: {"+snapshotGroup+", name: "+s+", namespace: bank}"), true},
			attempt{"an ephemeral volume from " + s, "pod", fmt.Sprint("d", i), podWith(fmt.Sprint("d", i),
				"ephemeral: {volumeClaimTemplate: {spec: {storageClassName: abaca, accessModes: [ReadOnlyMany], resources: {requests: {storage: 1Gi}}, dataSourceRef: {"+snapshotGroup+", name: "+s+", namespace: bank}}}}"), false},
			attempt{"the content of " + s, "volumesnapshot", fmt.Sprint("t", i), snapshotFrom(fmt.Sprint("t", i), ownClass, "volumeSnapshotContentName: "+content[s]), false},
			attempt{"a restore of the content of " + s, "pvc", fmt.Sprint("u", i), claimFrom(fmt.Sprint("u", i), ", dataSource: {"+snapshotGroup+", name: "+fmt.Sprint("t", i)+"}"), false},
		)
	}
	for _, a := range attempts {
		if out, err := shop.try(a.manifest, "create -f -"); err != nil {
			t.Errorf("%s: it is not even taken, and not tried therefore: %s", a.what, out)
		}
	}
	if out, err := shop.try("", `patch pvc a5 --subresource=status --type=merge -p {"status":{"phase":"Bound"}}`); err == nil || !strings.Contains(out, "forbidden") {
		t.Errorf("a claim is made one that is bound: %v\n%s", err, out)
	}
	// Marks of ours on one's own object do nothing to anybody else's: what the name of a
	// mover is on, the driver does not take for its own in another namespace.
	record := c.kubectl("get pv " + volume + " -o jsonpath={.metadata.uid}")
	shop.apply(strings.Replace(claimFrom("left", ""), "name: left", `name: left, labels: {abaca-csi.github.io/mover: "`+record+`", abaca-csi.github.io/schedule: backup},
  annotations: {abaca-csi.github.io/exclude: "/secret-of-the-bank"}`, 1))
	shop.apply(podWith("same-name", ofClaim("left")))
	shop.await("Running", "get pod same-name -o jsonpath={.status.phase}")
	if out := shop.exec("same-name", "ls -A /data"); out != "" {
		t.Errorf("a claim that is called as another namespace's was holds %s", out)
	}
	// A schedule has the rights of its account.
	shop.apply(`{apiVersion: batch/v1, kind: Job, metadata: {name: thief}, spec: {backoffLimit: 0, template: {spec: {restartPolicy: Never, serviceAccountName: user,
  containers: [{name: c, image: "abaca:e2e", args: [schedule, --schedule=x, --namespace=bank, --pvc=data, "--tier=class=abaca-backup,keep-last=1"],
    env: [{name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]}]}}}}`)
	shop.await("Failed", "get job thief -o jsonpath={.status.conditions[?(@.type==\"Failed\")].type}")
	if out := shop.kubectl("logs job/thief"); !strings.Contains(out, "forbidden") {
		t.Errorf("a schedule of the other's claim says %s", out)
	}
	shop.says("Secret shop/abaca-repository", "s3")

	time.Sleep(20 * time.Second) // by then, what is allowed has long come
	for _, a := range attempts {
		field, bad := ".status.phase", map[string]string{"pvc": "Bound", "pod": "Running"}[a.kind]
		if a.kind == "volumesnapshot" {
			field, bad = ".status.readyToUse", "true"
		}
		if a.empty {
			shop.apply(podWith("look-"+a.name, ofClaim(a.name)))
			shop.await("Running", "get pod look-"+a.name+" -o jsonpath={.status.phase}")
			if out := shop.exec("look-"+a.name, "ls -A /data"); out != "" {
				t.Errorf("%s: it holds %s", a.what, out)
			}
			continue
		}
		if got := shop.kubectl("get " + a.kind + " " + a.name + " -o jsonpath={" + field + "}"); got == bad {
			t.Errorf("%s: it is %s", a.what, got)
		}
	}
	if after := state(); after != before {
		t.Errorf("the victim has become\n%s\nand was\n%s", after, before)
	}

	// What a Secret must not say, and where its user sees it.
	for word, entries := range map[string][]string{
		"RESTIC_PASSWORD_COMMAND": {"RESTIC_REPOSITORY=" + at("shop"), "RESTIC_PASSWORD_COMMAND=id"},
		"one of the kinds":        {"RESTIC_REPOSITORY=" + c.data("offsite"), "RESTIC_PASSWORD=horse"},
		"RESTIC_CACERT":           {"RESTIC_REPOSITORY=" + at("shop"), "RESTIC_PASSWORD=x", "RESTIC_CACERT=/etc/shadow"},
		"AWS_ACCESS_KEY_ID":       {"RESTIC_REPOSITORY=s3:http://10.251.0.2/x", "RESTIC_PASSWORD=x"},
	} {
		shop.secret(entries...)
		name := "w" + strings.ToLower(strings.NewReplacer("_", "-", " ", "-").Replace(word))
		shop.apply(snapshotFrom(name, ownClass, "persistentVolumeClaimName: mine"))
		shop.says(word, name)
		if out := shop.kubectl("get volumesnapshot " + name + " -o jsonpath={.status.error.message}"); !strings.Contains(out, "shop/abaca-repository") {
			t.Errorf("it does not name the Secret: %s", out)
		}
	}

	// With a Secret that is right, what waited goes on; each has their own only.
	mine := []string{"RESTIC_REPOSITORY=" + at("shop"), "RESTIC_PASSWORD=shopping", "RESTIC_REST_USERNAME=shop", "RESTIC_REST_PASSWORD=of-shop"}
	shop.secret(mine...)
	shop.await("true", "get volumesnapshot s3"+ready)
	bank.apply(claimFrom("restored", ", dataSource: {"+snapshotGroup+", name: own}"))
	bank.apply(podWith("check", ofClaim("restored")))
	bank.await("Running", "get pod check -o jsonpath={.status.phase}")
	if got := bank.exec("check", "sha256sum /data/secret-of-the-bank"); got != sum {
		t.Errorf("restored from the own repository: %s, want %s", got, sum)
	}
	c.moved()

	// A Secret that is gone is said, and waited for; with another password than the
	// repository's a backup fails for good, as in any repository, and can be deleted.
	shop.kubectl("delete secret abaca-repository")
	shop.apply(snapshotFrom("without", ownClass, "persistentVolumeClaimName: mine"))
	shop.says("Secret shop/abaca-repository", "without")
	shop.secret(mine...)
	shop.await("true", "get volumesnapshot without"+ready)
	shop.secret("RESTIC_REPOSITORY="+at("shop"), "RESTIC_PASSWORD=forgotten", mine[2], mine[3])
	shop.apply(snapshotFrom("locked-out", ownClass, "persistentVolumeClaimName: mine"))
	shop.says("password", "locked-out")
	shop.says("Secret shop/abaca-repository", "locked-out")
	c.kubectl("delete pods -l app.kubernetes.io/component=controller --wait -n " + namespace)
	c.rolledOut()
	shop.secret(mine...)
	shop.kubectl("delete volumesnapshot locked-out --wait --timeout=100s")

	// Its maintenance is the namespace's own, without any right.
	for _, doc := range strings.Split(c.example("9-own-repository.yaml"), "\n---\n") {
		if strings.Contains(doc, "kind: CronJob") {
			shop.apply(strings.ReplaceAll(doc, "ghcr.io/abaca-csi/abaca:dev", "abaca:e2e"))
		}
	}
	if out := shop.job("maintain", "maintained"); !strings.Contains(out, "prune") {
		t.Errorf("maintenance says %s", out)
	}

	// A backup that is deleted is gone from the repository; a namespace that is deleted
	// with backups in it is gone, whatever becomes of them.
	saved := len(strings.Fields(names(filepath.Join(dir, "shop/snapshots"))))
	shop.kubectl("delete volumesnapshot without --wait --timeout=100s")
	if now := len(strings.Fields(names(filepath.Join(dir, "shop/snapshots")))); now != saved-1 {
		t.Errorf("the repository had %d snapshots, and has %d", saved, now)
	}
	bank.kubectl("delete pods --all --wait")
	c.kubectl("delete namespace bank shop --wait --timeout=150s")
	c.kubectl("patch pv " + left + ` --type=merge -p {"spec":{"persistentVolumeReclaimPolicy":"Delete"}}`)
	c.await("", "get volumesnapshotcontents,pv -o name")
	c.moved()
	c.nothingLeft()
	c.run("helm", "uninstall", "abaca", "--namespace", namespace, "--wait")
}
