package local

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// A kind is a set of objects: the directory of their metadata below meta, and,
// except for exports, that of their subvolumes.
type kind string

const (
	shares    kind = "shares"
	snapshots kind = "snapshots"
	exports   kind = "exports"
)

// What is kept about an object. It is the truth about whether the object
// exists: written last when the object is made, removed first when it goes.
type (
	shareMeta struct {
		Name         string            `json:"name"`
		Size         int64             `json:"size"`
		CreatedAt    time.Time         `json:"createdAt"`
		FromSnapshot string            `json:"fromSnapshot,omitempty"`
		Draft        bool              `json:"draft,omitempty"`
		Role         backend.Role      `json:"role"`
		Description  map[string]string `json:"description,omitempty"`
	}
	snapshotMeta struct {
		Name      string       `json:"name"`
		ShareID   string       `json:"shareID"`
		Size      int64        `json:"size"`
		CreatedAt time.Time    `json:"createdAt"`
		Role      backend.Role `json:"role"`
	}
	exportMeta struct {
		ShareID    string `json:"shareID,omitempty"`
		SnapshotID string `json:"snapshotID,omitempty"`
	}
)

var (
	idPattern       = regexp.MustCompile(`^[a-z2-7]{26}$`)
	consumerPattern = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
)

// idOf derives the id from the name, so that two processes that create the same
// object meet at the same place.
func idOf(name string) string {
	sum := sha256.Sum256([]byte(name))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:])[:26])
}

// valid says whether key can be a file name of ours. Nothing else comes near
// the file system.
func (k kind) valid(key string) bool {
	if k == exports {
		return consumerPattern.MatchString(key)
	}
	return idPattern.MatchString(key)
}

func (k kind) subvolume(id string) string { return path.Join(string(k), id) }
func (k kind) metaDir() string            { return path.Join("meta", string(k)) }
func (k kind) meta(key string) string     { return path.Join(k.metaDir(), key+metaSuffix) }

// tmp is where the holder of the object's lock writes what then becomes meta.
// One name is enough, and what a killed process left is overwritten.
func (k kind) tmp(key string) string { return path.Join(k.metaDir(), key+tmpSuffix) }

const (
	metaSuffix = ".json"
	tmpSuffix  = ".tmp"
)

// load reads the metadata of an object. ErrNotFound when there is none.
func (b *Backend) load(ctx context.Context, k kind, key string, v any) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	noun := strings.TrimSuffix(string(k), "s")
	if !k.valid(key) {
		return fmt.Errorf("%w: there is no %s %q", backend.ErrNotFound, noun, key)
	}
	data, err := b.root.ReadFile(k.meta(key))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: there is no %s %q", backend.ErrNotFound, noun, key)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("read %s: %w", k.meta(key), err)
	}
	return nil
}

// save writes the metadata of an object, whole or not at all.
func (b *Backend) save(k kind, key string, v any) (err error) {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := k.tmp(key)
	defer func() {
		if err != nil {
			b.root.Remove(tmp)
		}
	}()
	f, err := b.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync())
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	crash("save: written")
	if err := b.root.Rename(tmp, k.meta(key)); err != nil {
		return err
	}
	crash("save: renamed")
	return b.syncDir(k.metaDir())
}

// forget removes the metadata of an object, if there is any.
func (b *Backend) forget(k kind, key string) error {
	err := b.root.Remove(k.meta(key))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	crash("forget: removed")
	return errors.Join(err, b.syncDir(k.metaDir()))
}

func (b *Backend) syncDir(name string) error {
	dir, err := b.root.Open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// keys returns the keys of all objects of a kind behind after, in order.
func (b *Backend) keys(k kind, after string) ([]string, error) {
	names, err := b.names(k.metaDir())
	if err != nil {
		return nil, err
	}
	var keys []string
	for _, name := range names {
		if key, ok := strings.CutSuffix(name, metaSuffix); ok && k.valid(key) && key > after {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys) // file names sort differently: "a.json" is behind "a-b.json"
	return keys, nil
}

func (b *Backend) names(dir string) ([]string, error) {
	f, err := b.root.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// page reads one page of a listing with get. It skips what goes in between.
func page[T any](ctx context.Context, b *Backend, k kind, after string, limit int, get func(ctx context.Context, key string) (*T, error)) ([]*T, bool, error) {
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	keys, err := b.keys(k, after)
	if err != nil {
		return nil, false, err
	}
	var found []*T
	for _, key := range keys {
		v, err := get(ctx, key)
		if errors.Is(err, backend.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, false, err
		}
		if limit > 0 && len(found) == limit {
			return found, true, nil
		}
		found = append(found, v)
	}
	return found, false, nil
}

// lock excludes all other work on objects, in this process and in others, until
// unlock is called or the process ends. Keys are locked in one order everywhere,
// so that two callers cannot wait for each other; the exports come last.
//
// The locks are byte ranges of one file: a lock file an object would have to be
// created on a full file system and removed without a race.
func (b *Backend) lock(ctx context.Context, keys ...string) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return b.lockUntil(ctx, keys)
}

// unlessBusy runs work with an object locked, or not at all.
func (b *Backend) unlessBusy(key string, work func()) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if unlock, err := b.lockUntil(ended, []string{key}); err == nil {
		work()
		unlock()
	}
}

func (b *Backend) lockUntil(ctx context.Context, keys []string) (unlock func(), err error) {
	f, err := b.root.OpenFile(lockFile, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	var offsets []int64
	for _, key := range keys {
		sum := sha256.Sum256([]byte(key))
		offsets = append(offsets, int64(binary.BigEndian.Uint64(sum[:])>>2))
	}
	slices.Sort(offsets)
	for _, offset := range offsets {
		if err := lockRange(ctx, f, offset); err != nil {
			f.Close()
			return nil, err
		}
	}
	return func() { f.Close() }, nil
}

const lockFile = "meta/lock"

// lockRange locks one byte of a file for this open file (fcntl(2), "Open file
// description locks"), or returns ErrPending when ctx ends before.
func lockRange(ctx context.Context, f *os.File, offset int64) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 10*time.Millisecond) {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: offset, Len: 1})
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return os.NewSyscallError("lock", err)
		}
		if err := sleep(ctx, wait); err != nil {
			return fmt.Errorf("%w: somebody else is working on it (%v)", backend.ErrPending, err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
