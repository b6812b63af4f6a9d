package csi

import (
	"errors"
	"strings"
	"testing"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
)

func TestHandles(t *testing.T) {
	id, ref := digest("a"), consumerPrefix+digest("b")
	for _, v := range []Volume{
		{Backend: "local", Share: id},
		{Backend: "local", Snapshot: id, Consumer: ref},
		{Backend: "m", Share: "0b4c9c1e-4c8f-4b8e-9d4b-5a5a5a5a5a5a"},
		{Backend: strings.Repeat("m", 24), Snapshot: strings.Repeat("S", 48), Consumer: ref},
	} {
		got, err := ParseVolume(v.String())
		if err != nil || got != v {
			t.Errorf("%s became %+v, %v", v, got, err)
		}
		if len(v.String()) > maxHandle {
			t.Errorf("%s has %d bytes", v, len(v.String()))
		}
	}
	for _, job := range []backup.Job{
		{Backend: "local", Snapshot: id, Consumer: "backup-" + id},
		{Backend: strings.Repeat("m", 24), Share: strings.Repeat("S", 48), Consumer: "restore-" + id},
	} {
		got, err := parsePublished(MoverHandle(job))
		if err != nil || got.Share != job.Share || got.Snapshot != job.Snapshot || got.Consumer != job.Consumer {
			t.Errorf("%s became %+v, %v", MoverHandle(job), got, err)
		}
		if v, err := ParseVolume(MoverHandle(job)); !errors.Is(err, backend.ErrNotFound) || len(MoverHandle(job)) > maxHandle {
			t.Errorf("what a mover uses is volume %+v, %v", v, err)
		}
	}
	for _, s := range []Snapshot{
		{Backend: "local", Snapshot: id},
		{Repository: "offsite", Backup: id},
		{Repository: strings.Repeat("r", 63), Backup: id},
		{Repository: backup.OfNamespace(strings.Repeat("n", 63)), Backup: id},
	} {
		got, err := ParseSnapshot(s.String())
		if err != nil || got != s {
			t.Errorf("%s became %+v, %v", s, got, err)
		}
		if len(s.String()) > maxHandle {
			t.Errorf("%s has %d bytes", s, len(s.String()))
		}
	}
}

func TestForeignHandles(t *testing.T) {
	id, ref := digest("a"), consumerPrefix+digest("b")
	for _, s := range []string{
		"", "/", "local", "local/", "/" + id, "local/../" + id, "local/" + id + "/x", "local/" + id + "\n", "Local/" + id,
		"local/@" + id, "local/@" + id + "#", "local/@" + id + "#x", "local/@#" + ref, "local/@" + id + "#" + ref + "x",
		"local/#" + ref, "backup/" + id, "local/" + strings.Repeat("x", 200), "vol-0123456789abcdef", "loc\x00al/" + id,
		"local/" + id + "#", "local/" + id + "#" + ref, "local/" + id + "#backup-" + id, "local/@" + id + "#restore-" + id,
		"local/@" + id + "#backup-" + id + "x", "local/" + id + "#restore-" + id + "#x", "local/#restore-" + id,
	} {
		if v, err := parsePublished(s); !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("volume %q is %+v, %v", s, v, err)
		}
	}
	for _, s := range []string{
		"", "local/" + id, "local/@", "local/@" + id + "#" + ref, "backup/" + id, "backup//" + id, "backup/r/", "backup/R/" + id,
		"backup/../" + id, "backup/r/" + id + "/", "backup/r/" + strings.ToUpper(id), "backup/@" + id,
		"backup/@/" + id, "backup/@../" + id, "backup/@@shop/" + id, "backup/@shop./" + id, "backup/@Shop/" + id, "backup/@" + strings.Repeat("n", 64) + "/" + id,
	} {
		if v, err := ParseSnapshot(s); !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("snapshot %q is %+v, %v", s, v, err)
		}
	}
}

// What parses is written the same again, and stays within the limit: two
// handles never mean one object.
func FuzzHandles(f *testing.F) {
	id := digest("a")
	for _, s := range []string{"local/" + id, "local/@" + id, "local/@" + id + "#" + consumerPrefix + id, "backup/r/" + id, "backup/@x", "a/b#c", "local/" + id + "#restore-" + id} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := parsePublished(s); err == nil && (v.String() != s || len(s) > maxHandle) {
			t.Errorf("volume %q is written %q", s, v)
		}
		if v, err := ParseSnapshot(s); err == nil && (v.String() != s || len(s) > maxHandle) {
			t.Errorf("snapshot %q is written %q", s, v)
		}
	})
}
