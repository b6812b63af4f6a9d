package backup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/restic"
)

// Repositories are the repositories that backups go to: an administrator's, and those
// of namespaces ([OfNamespace]) where there is an orchestrator that has some.
type Repositories interface {
	// Names returns the names in a stable order.
	Names(ctx context.Context) ([]string, error)
	// Open returns backend.ErrNotFound for a name that is not there, with the
	// names that are; backend.ErrInvalid for a configuration that is wrong; and
	// ErrAbandoned for a repository whose namespace is gone or going.
	Open(ctx context.Context, name string) (restic.Client, error)
}

// ErrAbandoned: with its namespace, a repository has lost whoever could say how it is
// entered. It may hold backups still.
var ErrAbandoned = errors.New("its namespace is gone")

const (
	ownMark = "@" // is in no administrator's name
	// SecretName is the Secret in a namespace that is its own repository, as a folder
	// of [Directory] is one, but read by [restic.ForeignEnv].
	SecretName = "abaca-repository"
)

// OfNamespace is the name of the repository that is a namespace's own.
func OfNamespace(namespace string) string { return ownMark + namespace }

// Owner is the namespace whose own a repository is; empty for an administrator's.
func Owner(repository string) string {
	namespace, ok := strings.CutPrefix(repository, ownMark)
	if !ok {
		return ""
	}
	return namespace
}

// Title is a repository in a message: what a person has to look at.
func Title(repository string) string {
	if namespace := Owner(repository); namespace != "" {
		return fmt.Sprintf("repository %q (Secret %s/%s)", repository, namespace, SecretName)
	}
	return fmt.Sprintf("repository %q", repository)
}

// Apart is the directory for what is kept of a repository: its own below dir if it is
// a namespace's, which can call a repository what another is called, and otherwise dir.
func Apart(dir, repository string) string {
	if Owner(repository) == "" {
		return dir
	}
	return filepath.Join(dir, repository)
}

// Directory is a directory with one folder for each repository, whose files are
// named as restic's environment variables and hold their values.
type Directory struct {
	Path string
	// Program is the restic program, CacheDir where it keeps its cache, and
	// SeenDir where it is remembered which repositories were there.
	Program, CacheDir, SeenDir string
}

// repositoryName keeps a handle with a repository in it within 128 bytes, and
// out of the file system's special names.
var repositoryName = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// Names returns the folders, in the order of their names.
func (d Directory) Names(context.Context) ([]string, error) {
	entries, err := os.ReadDir(d.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list repositories: %w", err)
	}
	var names []string
	for _, e := range entries {
		// A folder may be a link, as in a Kubernetes volume.
		info, err := os.Stat(filepath.Join(d.Path, e.Name()))
		if err == nil && info.IsDir() && repositoryName.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Folder returns the folder of a repository.
func (d Directory) Folder(ctx context.Context, name string) (string, error) {
	names, err := d.Names(ctx)
	if err != nil {
		return "", err
	}
	for _, n := range names {
		if n == name {
			return filepath.Join(d.Path, name), nil
		}
	}
	hint := "none is configured"
	if len(names) > 0 {
		hint = "known are " + strings.Join(names, ", ")
	}
	return "", fmt.Errorf("repository %q: %w (%s)", name, backend.ErrNotFound, hint)
}

// Open returns a client with the configuration as it is on disk now.
func (d Directory) Open(ctx context.Context, name string) (restic.Client, error) {
	folder, err := d.Folder(ctx, name)
	if err != nil {
		return nil, err
	}
	repo, err := OpenFolder(folder, restic.Config{Program: d.Program, CacheDir: d.CacheDir, SeenDir: d.SeenDir})
	if err != nil {
		return nil, fmt.Errorf("repository %q: %w: %w", name, backend.ErrInvalid, err)
	}
	return repo, nil
}

// OpenFolder opens the repository that is configured in one folder.
func OpenFolder(folder string, c restic.Config) (*restic.Repository, error) {
	env, err := restic.LoadEnv(folder)
	if err != nil {
		return nil, err
	}
	c.Env = env
	return restic.Open(c)
}
