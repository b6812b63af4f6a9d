package csi

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"regexp"
	"strings"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// Handles are the ids that the orchestrator keeps for us. They say all that is
// needed to find the object again, within 128 bytes (CSI spec 1.13, "Size
// Limits"):
//
//	a share                <backend>/<share>
//	a snapshot volume      <backend>/@<snapshot>#<consumer>
//	a snapshot             <backend>/@<snapshot>
//	a backup               backup/<repository>/<backup>
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
	// Share is set for a share; Snapshot and Consumer for a snapshot volume.
	Share              string
	Snapshot, Consumer string
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
	repository  = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
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
	name, rest, ok := strings.Cut(id, "/")
	v := Volume{Backend: name, Share: rest}
	if ref, is := strings.CutPrefix(rest, "@"); is {
		v.Share = ""
		v.Snapshot, v.Consumer, _ = strings.Cut(ref, "#")
		ok = ok && objectID.MatchString(v.Snapshot) && consumer.MatchString(v.Consumer)
	} else {
		ok = ok && objectID.MatchString(v.Share)
	}
	if !ok || len(id) > maxHandle || !ValidBackendName(name) {
		return Volume{}, fmt.Errorf("%.140q is not the id of a volume of this driver: %w", id, backend.ErrNotFound)
	}
	return v, nil
}

// ParseSnapshot reads the handle of a snapshot or backup. What is not one of
// ours is backend.ErrNotFound.
func ParseSnapshot(id string) (Snapshot, error) {
	name, rest, ok := strings.Cut(id, "/")
	s := Snapshot{}
	if name == backupsPrefix {
		s.Repository, s.Backup, _ = strings.Cut(rest, "/")
		ok = ok && repository.MatchString(s.Repository) && backupID.MatchString(s.Backup)
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
