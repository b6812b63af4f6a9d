package kube

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"regexp"

	"github.com/abaca-csi/abaca/pkg/backup"
)

// What is written into a cluster, and read from it again.
const (
	// Mover is the label of all objects of a mover; its value is the job's id.
	Mover = "abaca-csi.github.io/mover"
	// Attempt is the label of the objects of one attempt; its value is their name.
	Attempt = "abaca-csi.github.io/mover-attempt"
	// Controller is the label of the ConfigMaps that say under which host names
	// controllers, and pods of maintenance, lock repositories.
	Controller = "abaca-csi.github.io/controller"
	// Maintains is the label of the pods of maintenance; its value is the repository.
	Maintains = "abaca-csi.github.io/maintains"
	// Limit and LimitEach are annotations of the PodTemplate: how many movers run
	// at a time, in all and for each repository.
	Limit     = "abaca-csi.github.io/movers"
	LimitEach = "abaca-csi.github.io/movers-per-repository"
	// Repository, with the name of one behind it, is an annotation of the
	// PodTemplate that names the Secret of the repository.
	Repository = "repository.abaca-csi.github.io/"
	// Namespaces is an annotation of the PodTemplate: the namespaces that may have
	// a repository of their own, separated by commas.
	Namespaces = "abaca-csi.github.io/repository-namespaces"

	// prefix begins the names of all objects of movers.
	prefix = "abaca-mover-"
	// recordKey is the entry of a record's ConfigMap.
	recordKey = "record.json"
)

// jobID leaves room for what is put around it in the names of a Job and its pods.
var jobID = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)

// recordName names the ConfigMap that is the record of a job.
func recordName(id string) string { return prefix + id }

// makerName names the ConfigMap that says which attempt may make a repository.
func makerName(repository string) string {
	sum := sha256.Sum256([]byte(repository))
	return "abaca-repository-" + hex.EncodeToString(sum[:8])
}

// attemptName names the objects of an attempt that is made of a job and the version
// of its record. Two controllers that do so make the same, and nobody makes it
// again later: whoever removes an attempt, however slowly, removes no other.
func attemptName(job backup.Job, version string) (string, error) {
	text, err := json.Marshal(job)
	sum := sha256.Sum256(append(text, version...))
	return prefix + job.Task.ID + "-" + hex.EncodeToString(sum[:4]), err
}
