package csi

import (
	"errors"
	"strings"
	"testing"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// TestOwnRepository: a class can say "the VolumeSnapshot's namespace's own", and cannot
// name any namespace's; what it is follows from what csi-snapshotter adds.
func TestOwnRepository(t *testing.T) {
	for _, test := range []struct{ repository, namespace, want, err string }{
		{"@namespace", "shop", "@shop", ""},
		{"@namespace", "namespace", "@namespace", ""},
		{"offsite", "shop", "offsite", ""},
		{"@namespace", "", "", "--extra-create-metadata"},
		{"@namespace", "../shop", "", "--extra-create-metadata"},
		{"@bank", "shop", "", "not a repository's name"},
		{"@", "shop", "", "not a repository's name"},
	} {
		params := map[string]string{typeKey: "backup", repositoryKey: test.repository}
		if test.namespace != "" {
			params[snapshotNamespaceKey] = test.namespace
		}
		p, err := parseSnapshotClass(params)
		if test.err == "" {
			if err != nil || p.repository != test.want {
				t.Errorf("%+v: %q, %v", test, p.repository, err)
			}
		} else if !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), test.err) {
			t.Errorf("%+v: %q, %v", test, p.repository, err)
		}
	}
}
