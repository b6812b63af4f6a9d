// Command mutations breaks the code once for each promise, without touching the
// tree, and sees whether the tests that keep the promise go red.
//
//	mutations [-only WORD]
//
// The exit code is 0 only if every mutation was found. It needs root, and
// bin/restic.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
)

// mutation is one way to break a promise (docs/design, "Promises"): the text old
// in file becomes new, and a test of pkg must fail.
type mutation struct {
	promise, file, old, new, pkg, test string
}

var mutations = []mutation{
	{"1 a snapshot volume cannot be written", "pkg/csi/node.go",
		"readOnly: readOnly || v.Referring() || reads(vc),", "readOnly: readOnly,", "./e2e", "TestSnapshotVolumeCannotBeWritten"},
	{"2 only the right read-only mount is backed up", "pkg/mover/run.go",
		"err := m.Mounts.Prove(ctx, filepath.Join(m.Dir, dataName), m.task.Source, readOnly)", "err := error(nil)", "./pkg/mover", "TestFlow"},
	{"2 a source that goes away is noticed", "pkg/mover/run.go",
		"return errors.Join(err, m.forget(ctx, summary.SnapshotID))\n\t\t}\n\t}\n\tif errors.Is", "_ = err\n\t\t}\n\t}\n\tif errors.Is", "./pkg/mover", "TestFlow"},
	{"2 an emptied volume is refused", "pkg/mover/run.go",
		"if b.AllowEmpty || parent.Files <= 1 {", "if true {", "./e2e", "TestEmptiedVolume"},
	{"3 a volume is bound only when it is restored", "pkg/csi/restore.go",
		"if st.Phase != backup.Succeeded {", "if false {", "./pkg/csi", "TestVolumeIsBoundWhenItIsRestored"},
	{"3 what is restored is verified", "pkg/restic/repository.go",
		`"--sparse", "--verify",`, `"--sparse",`, "./pkg/restic", "TestArguments"},
	{"4 what a dead mover has left is not a backup", "pkg/mover/run.go",
		"if err := m.forget(ctx, found.doubtful...); err != nil {", "if false {", "./pkg/mover", "TestFlow"},
	{"4 a restore is found again by its draft", "pkg/csi/restore.go",
		"if share != nil && !share.Draft {", "if share != nil {", "./pkg/csi", "TestVolumeIsBoundWhenItIsRestored"},
	{"4 what was begun is finished though its source has gone", "pkg/csi/volumes.go",
		"case isNotFound(err):\n\t\treturn nil, nil", "case err != nil:\n\t\treturn nil, nil", "./pkg/csi", "TestSourceGone"},
	{"5 an unchanged volume is not read", "pkg/restic/repository.go",
		`parent = "--parent=" + req.Parent`, `parent = "--force"`, "./e2e", "TestUnchangedBackupIsCheap"},
	{"5 inode numbers that do not last are not compared", "pkg/mover/run.go",
		"m.task.Source.Renumbers(),", "false,", "./pkg/mover", "TestRequest"},
	{"6 no secret in an error", "pkg/restic/error.go",
		"text := redact.Replace(line)", "text := line", "./pkg/restic", "TestSecrets"},
	{"6 no secret in the log", "pkg/csi/interceptors.go",
		`"request", protosanitizer.StripSecrets(req).String()`, `"request", fmt.Sprint(req)`, "./pkg/csi", "TestSecretsAreStrippedFromTheLog"},
	{"7 a publish context names nothing to a controller", "pkg/csi/staged.go",
		"!ok || d.Controller {", "!ok {", "./e2e", "TestForgedNames"},
	{"7 what Abaca made for itself is no source", "pkg/csi/volumes.go",
		"if isNotFound(err) && share == nil {", "if isNotFound(err) {", "./e2e", "TestForgedNames"},
	{"7 a handle's consumer must hold the snapshot", "pkg/csi/staged.go",
		"if err == nil && export.Target != v.Target() {", "if false {", "./e2e", "TestForgedNames"},
	{"7 a restic snapshot of somebody else is no backup", "pkg/mover/run.go",
		"return filepath.Base(p) == dataName })", "return true })", "./pkg/mover", "TestFlow"},
	{"9 a stale lock is removed", "pkg/restic/lock.go",
		"if err := c.Unlock(ctx); err != nil {\n\t\t\treturn err\n\t\t}\n\t\terr = do", "err = do", "./pkg/mover", "TestFlow"},
	{"9 a live lock is waited for", "pkg/restic/lock.go",
		"wait -= lockRound {", "wait = 0 {", "./pkg/restic", "TestAwaitLock"},
	{"10 plain restic finds the description", "pkg/mover/run.go",
		"[]string{dataName, descriptionName},", "[]string{dataName},", "./pkg/mover", "TestRequest"},
	{"a vanished repository is not made anew", "pkg/restic/run.go",
		"r.seen.before(e)", "_ = r.seen.before", "./e2e", "TestVanishedRepository"},
	{"a mounted share is not deleted", "pkg/backend/local/share.go",
		"if len(places) > 0 {", "if false {", "./pkg/backend/local", "TestDeleteMounted"},
	{"a held snapshot is not deleted", "pkg/backend/local/snapshot.go",
		"if err != nil || len(holders) == 0 {", "if true {", "./pkg/backend/local", "TestConformance"},
	{"what a killed Grant has left goes", "pkg/backend/manila/hold.go",
		"s.holdOf(g.consumer).name == \"\" })", "false })", "./pkg/backend/manila", "TestKilledGrant"},
	{"a node that was let in stays in", "pkg/backend/manila/access.go",
		"return s.granted(g) && !s.leaving(g, after)", "return s.granted(g)", "./pkg/backend/manila", "TestGrantMeetsRevoke"},
	{"nobody is in who was revoked meanwhile", "pkg/backend/manila/access.go",
		"return s.granted(g) && !s.leaving(g, after)", "return !s.leaving(g, after)", "./pkg/backend/manila", "TestRevokeMeetsItsGrant"},
	{"a rule that was lost is nobody's who was revoked meanwhile", "pkg/backend/manila/access.go",
		"case err == nil && !anew:", "case err == nil && (anew || !anew):", "./pkg/backend/manila", "TestLostRule"},
	{"of two that revoke the same, each is waited for", "pkg/backend/manila/access.go",
		"prefixLeaving + g.name + \".\" + mark", "prefixLeaving + g.name + \".\"", "./pkg/backend/manila", "TestRevokeMeetsItsLike"},
	{"what has come back holds nobody up, and goes", "pkg/backend/manila/hold.go",
		"if end, _ := s.ended(nameOf(mark)); !end.IsZero() {", "if false {", "./pkg/backend/manila", "TestOldEntries"},
	{"nobody is let in to what goes", "pkg/backend/manila/access.go",
		"return h.live() && ", "return ", "./pkg/backend/manila", "TestGrantMeetsUnexport"},
	{"nobody is let in to a share that was deleted", "pkg/backend/manila/access.go",
		"(h.what != holdsShare || !s.deferred() && s.Status != \"deleting\")", "true", "./pkg/backend/manila", "TestGrantMeetsDeleteShare"},
	{"what has ended stays ended, whoever writes an old entry again", "pkg/backend/manila/hold.go",
		"if at.After(since) {", "if false {", "./pkg/backend/manila", "TestWrittenMeanwhile"},
	{"nobody counts on a hold that may be withdrawn", "pkg/backend/manila/hold.go",
		"if !mine.live() || mine.since.After(b.o.Now().Add(-adoptAge)) {", "if !mine.live() {", "./pkg/backend/manila", "TestHoldOfAnother"},
	{"what another process has ended is held no more", "pkg/backend/manila/hold.go",
		"if listed || s.holdOf(consumer).name != \"\" {", "if listed {", "./pkg/backend/manila", "TestConformance/.*/export"},
	{"a node is let in to what the consumer holds now", "pkg/backend/manila/access.go",
		"|| now.target(consumer) != x.Target)", ")", "./pkg/backend/manila", "TestConformance/.*/grant"},
	{"what was granted meanwhile stays", "pkg/backend/manila/access.go",
		"return !leaves(g) })", "return false })", "./pkg/backend/manila", "TestNodes"},
	{"what is held again is not deleted", "pkg/backend/manila/snapshot.go",
		"if err == nil && len(names) == 0 {\n\t\t\terr = b.endUnexport", "if err == nil {\n\t\t\terr = b.endUnexport", "./pkg/backend/manila", "TestKilledUnexport"},
	{"what a killed call has left takes no node out", "pkg/backend/manila/export.go",
		"if err == nil && old && s.holdOf", "if err == nil && false && s.holdOf", "./pkg/backend/manila", "TestKilledUnexport"},
	{"a hold that is not found ends", "pkg/backend/manila/export.go",
		"all = []*share{s}", "all = nil", "./pkg/backend/manila", "TestUnlistedHold"},
	{"a copy that came too late goes", "pkg/backend/manila/export.go",
		"if err != nil || now.holdOf(consumer).live() && now.target(consumer) == target {", "if err != nil || now != nil {", "./pkg/backend/manila", "TestCopyMeetsUnexport"},
	{"a level that a share type lacks is asked for once", "pkg/backend/manila/rules.go",
		"if b.readless.has(at.typeName) {", "if false {", "./pkg/backend/manila", "TestNoReaders"},
	{"a class's networks come before what Manila prefers", "pkg/backend/manila/export.go",
		"cmp.Compare(distance(x.Path, networks), distance(y.Path, networks))", "cmp.Compare(len(networks), len(networks))", "./pkg/backend/manila", "TestParameters"},
	{"a share has a size that its type allows", "pkg/backend/manila/share.go",
		"return max(size, least), nil", "return size, nil", "./pkg/backend/manila", "TestSizesOfType"},
	{"an access rule goes with the last that needs it", "pkg/backend/manila/rules.go",
		"func(n access) bool { return n.to == to }); i >= 0 {", "func(n access) bool { return n.to == to }); i >= len(needed) {", "./pkg/backend/manila", "TestNodes"},
	{"a rule that cannot be raised stays the reader's", "pkg/backend/manila/rules.go",
		"errors.As(err, &refused) && slices.Contains(needed, ro) {", "errors.As(err, &refused) && false {", "./pkg/backend/manila", "TestFailedRaise"},
	{"a key that is needed again stays", "pkg/backend/manila/access.go",
		"if b.o.Now().Sub(begun) > leavingTime { // somebody may have", "if false { // somebody may have", "./pkg/backend/manila", "TestLongDenial"},
	{"a schedule takes nobody's snapshot for its own", "pkg/schedule/run.go",
		"case s.Series != e.series || !s.Scheduled.Equal(r.At):", "case false:", "./pkg/schedule", "TestFaults"},
	{"a schedule drops only what it made", "pkg/schedule/run.go",
		"|| s.Name != e.series.Name(s.Scheduled) ", "", "./pkg/schedule", "TestRetentionIsOfTheScheduleOnly"},
	{"a failure keeps all of its claim", "pkg/schedule/run.go",
		"return !e.Status.Good() })", "return false })", "./pkg/schedule", "TestFailureKeepsTheClaim"},
	{"the newest good snapshot stays", "pkg/schedule/retention.go",
		"if len(good[0].Reasons) == 0 {", "if false {", "./pkg/schedule", "TestNewestGoodStays"},
	{"the newest complete backup stays", "pkg/schedule/retention.go",
		"func(c *Choice) bool { return c.State == Ready })", "func(*Choice) bool { return false })", "./pkg/schedule", "TestPartialBackup"},
	{"a backup that lacks files is never taken for whole", "pkg/mover/run.go",
		"err = m.mark(ctx, b)", "err = nil", "./pkg/mover", "TestFlow"},
	{"a schedule's exit code is the truth", "pkg/schedule/result.go",
		"case bad > 0:", "case false:", "./pkg/schedule", "TestResult"},
	{"every byte is read in time", "pkg/maintain/coverage.go",
		"any = any || c[i].Before(horizon)", "any = c[i].Before(horizon)", "./pkg/maintain", "TestEveryByteIsReadInTime"},
	{"a part that was read is what restic has read", "pkg/maintain/coverage.go",
		"int(bits.Reverse8(uint8(b.first))) + 1", "int(bits.Reverse8(uint8(b.first)))&^1 + 1", "./pkg/maintain", "TestSubset"},
	{"damage is looked at twice", "pkg/maintain/run.go",
		"req.Exclusive, r.suspect = true, true", "req.Exclusive, r.suspect = false, true", "./pkg/maintain", "TestRun"},
	{"damage is not forgotten before it is repaired", "pkg/maintain/run.go",
		"r.record.Read.read(blocks[i], never)", "_ = never", "./pkg/maintain", "TestRecord"},
	{"a damaged repository is not pruned", "pkg/maintain/run.go",
		"case errors.Is(damage, restic.ErrDamaged):\n\t\t\t\te.Status", "case false:\n\t\t\t\te.Status", "./pkg/maintain", "TestRun"},
	{"what may be damaged is not pruned", "pkg/maintain/run.go",
		"case r.suspect:", "case false:", "./pkg/maintain", "TestRun"},
	{"what was damaged is not pruned before a check finds nothing", "pkg/maintain/run.go",
		`case r.record.Damaged != "":`, "case false:", "./pkg/maintain", "TestKnownDamageIsNotPruned"},
	{"7 a claim is believed of its own volume", "pkg/csi/claims.go",
		"err == nil && c.Volume != volume", "false", "./pkg/csi", "TestClaims"},
	{"a restore waits for no backup", "pkg/backup/kube/queue.go",
		"kind{t.Restore != nil,", "kind{false,", "./pkg/backup/kube", "TestNext"},
	{"one stuck job keeps no other", "pkg/backup/run.go",
		"context.WithTimeout(ctx, lookTimeout) // the others", "context.WithTimeout(ctx, time.Hour) // the others", "./pkg/backup", "TestOneStuckJobKeepsNoOther"},
	{"what fails for good leaves nothing", "pkg/csi/restore.go",
		"if err != nil && final(err) {", "if false {", "./pkg/csi", "TestFinalErrors"},
	{"what may have been damaged is not pruned, and its record not replaced", "pkg/maintain/run.go",
		"if r.record, err = Latest(working, repo, snapshots); err != nil {", "if r.record, err = Latest(working, repo, snapshots); false {", "./pkg/maintain", "TestUnreadRecord"},
	{"a backup that fails again and again is told", "pkg/backup/metrics.go",
		"return n > 2 || n == 2 && !st.Job.Task.Recover", "return n < 0", "./deploy", "TestAlerts"},
	{"a repository that cannot be reached is told after a restart too", "pkg/backup/listing.go",
		"e.up[repository] = err == nil", "e.up[repository] = true", "./deploy", "TestAlerts"},
	{"maintenance's exit code is the truth", "pkg/maintain/result.go",
		"has[ExitDamaged] = true", "has[ExitFailed] = true", "./pkg/maintain", "TestRun"},
	{"new backups are held back", "pkg/mover/run.go",
		"if until.IsZero() {", "if true {", "./pkg/mover", "TestHeldBack"},
	{"a hold ends with the run", "pkg/mover/mover.go",
		"\t\tuntil = time.Time{}\n", "", "./pkg/mover", "TestHeldBack"},
	{"1 a mover of a backup cannot write", "pkg/backup/kube/make.go",
		"readOnly, mode := job.Task.Backup != nil,", "readOnly, mode := false,", "./pkg/backup/kube", "TestObjects"},
	{"4 of one job there is one mover", "pkg/backup/kube/record.go",
		"ResourceVersion: rec.version},", "},", "./pkg/backup/kube", "TestOneMoverOnly|TestMay"},
	{"4 a pod that is not gone may write", "pkg/backup/kube/runner.go",
		"if len(pods.Items) > 0 {", "if false {", "./pkg/backup/kube", "TestLife"},
	{"4 a success stays one until its record goes", "pkg/backup/kube/runner.go",
		"rec, err := r.end(ctx, id, false)", "rec, err := r.end(ctx, id, true)", "./pkg/backup/kube", "TestRemovalKeepsASuccess"},
	{"4 whoever is slow removes no later mover", "pkg/backup/kube/names.go",
		"append(text, version...)", "append([]byte(job.Task.ID), text[:0]...)", "./pkg/backup/kube", "TestSlowRemoval"},
	{"4 what was made and not recorded goes", "pkg/backup/kube/queue.go",
		"orphans[o.Name] = true", "_ = o.Name", "./pkg/backup/kube", "TestSweep"},
	{"7 what a mover uses is no volume", "pkg/csi/handle.go",
		`if err == nil && v.Consumer != "" && !consumer.MatchString(v.Consumer) {`, "if false {", "./pkg/csi", "TestPublishToMovers"},
	{"9 a dead mover's lock is removed", "pkg/backup/kube/runner.go",
		"rec.Unlocked || !rec.abrupt() {", "true {", "./pkg/backup/kube", "TestLostNode"},
	{"9 only the locks of the dead are removed", "pkg/restic/repository.go",
		"return there.Unlock(ctx)", "_, err := there.run(ctx, \"/\", ignore, \"unlock\", \"--remove-all\")\n\treturn err", "./pkg/restic", "TestUnlockHost"},
	{"a share keeps its export while it is mounted", "pkg/backup/engine.go",
		"if err := e.Runner.Release(ctx, job.Task.ID); err != nil {", "if err := error(nil); err != nil {", "./pkg/backup", "TestReleaseComesFirst"},
	{"a backup is compared with the one that was answered just before", "pkg/backup/engine.go",
		"e.learn(st.backup())\n\t\t\te.wake()", "e.wake()", "./pkg/backup", "TestNextBackupComesAtOnce"},
	{"a backup that was deleted meanwhile is not learned", "pkg/backup/view.go",
		"st.Result.Backup != nil && forgotten == e.forgotten {", "st.Result.Backup != nil && forgotten >= 0 {", "./pkg/backup", "TestForgottenMeanwhile"},
	{"namespaces take turns", "pkg/backup/kube/queue.go",
		"turn[e.rec] = turns[e.tenant()]", "turn[e.rec] = 0", "./pkg/backup/kube", "TestNext"},
	{"one mover makes a repository", "pkg/backup/kube/queue.go",
		"(task.Made || !making[task.Repository])", "true", "./pkg/backup/kube", "TestNext"},
	{"a mover makes no repository anew that was there", "pkg/mover/run.go",
		"errors.Is(err, restic.ErrNoRepository) && m.task.Made {", "false {", "./pkg/mover", "TestFlow"},
	{"what is made twice goes, also when it is made late", "pkg/backend/manila/twins.go",
		"case found[0].it().ID != m.ID && own:", "case false:", "./pkg/backend/manila", "TestLateTwin"},
	{"who counts has not been returned by another call before", "pkg/backend/manila/twins.go",
		"case m.ready():", "case false:", "./pkg/backend/manila", "TestLateTwin"},
	{"what another call has chosen is not removed", "pkg/backend/manila/twins.go",
		"case err == nil && now.it().ready():", "case false:", "./pkg/backend/manila", "TestOwnTwin"},
	{"a snapshot that is not finished is none", "pkg/backend/manila/snapshot.go",
		"s.ready() && s.Status", "s.Status", "./pkg/backend/manila", "TestUnfinishedSnapshot"},
	{"the key of a share that is deleted goes", "pkg/backend/manila/deletion.go",
		"return b.dropKeysOf(ctx, s)", "return nil", "./pkg/backend/manila", "TestKeysOfTheDeleted"},
	{"the key of another share stays", "pkg/backend/manila/deletion.go",
		"(other == nil || other.ID == s.ID)", "(other == nil || other != nil)", "./pkg/backend/manila", "TestKeysOfTheDeleted"},
	{"of a share there is one deletion at a time", "pkg/backend/manila/deletion.go",
		"unlock, err := b.busy.lock(ctx, path)", "unlock, err := func() {}, error(nil)", "./pkg/backend/manila", "TestOneDeletionAtATime"},
	{"one name is one backup", "pkg/backup/listing.go",
		"if b.ID == req.ID {", "if false {", "./pkg/backup", "TestOneNameInTwoRepositories"},
	{"a namespace's repository is believed of itself only", "pkg/backup/listing.go",
		`if repository == req.Repository || Owner(repository) != "" {`, "if repository == req.Repository {", "./pkg/backup", "TestForgedBackups"},
	{"one namespace's server keeps no request of others waiting", "pkg/backup/listing.go",
		"Owner(repository) != \"\"; {", "false; {", "./pkg/backup", "TestOneAnswerAtATime"},
	{"a namespace's repository holds up no other", "pkg/backup/kube/queue.go",
		`backup.Owner(t.Repository) != ""} }`, `backup.Owner(t.Repository) == "."} }`, "./pkg/backup/kube", "TestNext"},
	{"who names a repository gains no file of the driver's", "pkg/restic/env.go",
		"case k == files, k == inline:", "case k == files && k == inline:", "./pkg/restic", "TestForeignEnv"},
	{"who names a repository gains no credentials of the machine", "pkg/restic/env.go",
		"range needs {", "range needs[:0] {", "./pkg/restic", "TestForeignEnv"},
	{"only those listed have a repository of their own", "pkg/backup/kube/repositories.go",
		"listed := slices.Contains(namespaces(template), namespace)", "listed := true", "./pkg/backup/kube", "TestOwn"},
	{"an event is told once", "pkg/event/event.go",
		"e.Reason, e.Subject}", "e.Reason, e.Subject, e.Last.String()}", "./pkg/event", "TestPut"},
	{"locks of a controller that lives stay", "pkg/backup/kube/controllers.go",
		"if !hosts[host] && host != \"\" {", "if host != \"\" {", "./pkg/backup/kube", "TestInherit"},
}

func main() {
	only := flag.String("only", "", "run the mutations whose line holds this `word`")
	flag.Parse()
	missed := 0
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, m := range mutations {
		line := strings.Join([]string{m.promise, m.file, m.test}, "\t")
		if !strings.Contains(line, *only) {
			continue
		}
		found, err := m.run()
		verdict := "red"
		switch {
		case err != nil:
			verdict = "NOT RUN: " + err.Error()
		case !found:
			verdict = "STAYED GREEN"
		}
		if verdict != "red" {
			missed++
		}
		fmt.Fprintf(w, "%s\t%s\n", line, verdict)
		w.Flush()
	}
	if missed > 0 {
		fmt.Fprintf(os.Stderr, "mutations: %d are not found\n", missed)
		os.Exit(1)
	}
}

// run says whether the test fails with the mutation, and only with it.
func (m mutation) run() (bool, error) {
	text, err := os.ReadFile(m.file)
	if err != nil {
		return false, err
	}
	if n := strings.Count(string(text), m.old); n == 0 {
		return false, fmt.Errorf("%s has no %q", m.file, m.old)
	}
	dir, err := os.MkdirTemp("", "abaca-mutation-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	mutant, overlay := filepath.Join(dir, "mutant.go"), filepath.Join(dir, "overlay.json")
	original, err := filepath.Abs(m.file)
	if err != nil {
		return false, err
	}
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{original: mutant}})
	if err != nil {
		return false, err
	}
	if err := os.WriteFile(overlay, replace, 0o600); err != nil {
		return false, err
	}
	if err := os.WriteFile(mutant, []byte(strings.ReplaceAll(string(text), m.old, m.new)), 0o600); err != nil {
		return false, err
	}
	// By the environment, so that it reaches what a test builds too. Vet would
	// complain of a mutant's remains.
	env := append(os.Environ(), "GOFLAGS="+os.Getenv("GOFLAGS")+" -overlay="+overlay)
	build := exec.Command("go", "test", "-vet=off", "-run=^$", m.pkg)
	build.Env = env
	if out, err := build.CombinedOutput(); err != nil {
		return false, fmt.Errorf("the mutant does not build: %s", out)
	}
	cmd := exec.Command("go", "test", "-vet=off", "-count=1", "-timeout=10m", "-run=^("+strings.ReplaceAll(m.test, "/", ")$/^(")+")$", m.pkg)
	cmd.Env = env
	out, err := cmd.CombinedOutput()
	if err == nil && strings.Contains(string(out), "no tests to run") {
		return false, fmt.Errorf("there is no %s in %s", m.test, m.pkg)
	}
	return err != nil, nil
}
