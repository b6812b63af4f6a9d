package csi

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"regexp"
	"strings"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
)

// Handles are the ids that the orchestrator keeps for us. They say all that is
// needed to find the object again, within 128 bytes (CSI spec 1.13, "Size
// Limits"):
//
//	a share                <backend>/<share>
//	a snapshot volume      <backend>/@<snapshot>#<consumer>
//	a snapshot             <backend>/@<snapshot>
//	a backup               backup/<repository>/<backup>
//	one in a namespace's   backup/@<namespace>/<backup>
//	what a mover reads     <backend>/@<snapshot>#backup-<digest>
//	what a mover fills     <backend>/<share>#restore-<digest>
//
// The last two are of no volume: they can be published and staged and nothing
// else, only while the named consumer holds the snapshot or the share, and only
// whoever makes PersistentVolumes can write one.
//
// Names that an orchestrator chooses are arbitrary text of up to 128 bytes and
// more, so what stands for one in a handle is a digest of it.
const (
	maxHandle      = 128
	backupsPrefix  = "backup" // not a backend's name, therefore
	consumerPrefix = "vol-"
)

// Volume is a volume's handle.
type Volume struct {
	Backend string
	// Share is set for a share; Snapshot and Consumer for a snapshot volume. What
	// a mover uses has a Consumer in any case.
	Share              string
	Snapshot, Consumer string
}

// MoverHandle is the handle of what a mover reads or fills.
func MoverHandle(job backup.Job) string {
	return Volume{Backend: job.Backend, Share: job.Share, Snapshot: job.Snapshot, Consumer: job.Consumer}.String()
}

// Snapshot is the handle of what CSI calls a snapshot: one on the storage
// system, or a backup in a repository.
type Snapshot struct {
	Backend, Snapshot  string
	Repository, Backup string
}

var (
	backendName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,22}[a-z0-9]$|^[a-z]$`)
	objectID    = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,48}$`)
	consumer    = regexp.MustCompile(`^vol-[a-z2-7]{26}$`)
	movesFrom   = regexp.MustCompile(`^backup-[a-z2-7]{26}$`)
	movesTo     = regexp.MustCompile(`^restore-[a-z2-7]{26}$`)
	repository  = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	namespace   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	backupID    = regexp.MustCompile(`^[a-z2-7]{26}$`)
)

// ValidBackendName says whether a backend may be called so.
func ValidBackendName(name string) bool {
	return backendName.MatchString(name) && name != backupsPrefix
}

// digest stands for an arbitrary name in a handle: 26 bytes of [a-z2-7].
func digest(name string) string {
	sum := sha256.Sum256([]byte(name))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:26]
}

// consumerOf is the name under which a volume holds what it is made of. A volume's
// name has one, whatever the volume is, and one consumer holds one target: so two
// volumes of one name cannot be two different things.
func consumerOf(volume string) string { return consumerPrefix + digest(volume) }

// Referring says whether the volume is a reference to a snapshot.
func (v Volume) Referring() bool { return v.Snapshot != "" }

// Target is what the volume is made of.
func (v Volume) Target() backend.Target {
	return backend.Target{ShareID: v.Share, SnapshotID: v.Snapshot}
}

func (v Volume) String() string {
	if v.Referring() {
		return v.Backend + "/@" + v.Snapshot + "#" + v.Consumer
	}
	if v.Consumer != "" {
		return v.Backend + "/" + v.Share + "#" + v.Consumer
	}
	return v.Backend + "/" + v.Share
}

// Backed says whether the snapshot is a backup.
func (s Snapshot) Backed() bool { return s.Backup != "" }

func (s Snapshot) String() string {
	if s.Backed() {
		return backupsPrefix + "/" + s.Repository + "/" + s.Backup
	}
	return s.Backend + "/@" + s.Snapshot
}

// ParseVolume reads a volume's handle. What is not one of ours is
// backend.ErrNotFound: no volume has that id.
func ParseVolume(id string) (Volume, error) {
	v, err := parsePublished(id)
	if err == nil && v.Consumer != "" && !consumer.MatchString(v.Consumer) {
		return Volume{}, notOurs(id)
	}
	return v, err
}

// parsePublished reads the handle of a volume, or of what a mover uses.
func parsePublished(id string) (Volume, error) {
	name, rest, ok := strings.Cut(id, "/")
	what, holder, held := strings.Cut(rest, "#")
	v := Volume{Backend: name, Share: what, Consumer: holder}
	if ref, is := strings.CutPrefix(what, "@"); is {
		v.Share, v.Snapshot = "", ref
		ok = ok && objectID.MatchString(ref) && (consumer.MatchString(holder) || movesFrom.MatchString(holder))
	} else {
		ok = ok && objectID.MatchString(what) && (!held || movesTo.MatchString(holder))
	}
	if !ok || len(id) > maxHandle || !ValidBackendName(name) {
		return Volume{}, notOurs(id)
	}
	return v, nil
}

func notOurs(id string) error {
	return fmt.Errorf("%.140q is not the id of a volume of this driver: %w", id, backend.ErrNotFound)
}

// ParseSnapshot reads the handle of a snapshot or backup. What is not one of
// ours is backend.ErrNotFound.
func ParseSnapshot(id string) (Snapshot, error) {
	name, rest, ok := strings.Cut(id, "/")
	s := Snapshot{}
	if name == backupsPrefix {
		s.Repository, s.Backup, _ = strings.Cut(rest, "/")
		ok = ok && (repository.MatchString(s.Repository) || namespace.MatchString(backup.Owner(s.Repository))) && backupID.MatchString(s.Backup)
	} else {
		s.Backend = name
		s.Snapshot, _ = strings.CutPrefix(rest, "@")
		ok = ok && strings.HasPrefix(rest, "@") && objectID.MatchString(s.Snapshot) && ValidBackendName(name)
	}
	if !ok || len(id) > maxHandle {
		return Snapshot{}, fmt.Errorf("%.140q is not the id of a snapshot of this driver: %w", id, backend.ErrNotFound)
	}
	return s, nil
}
