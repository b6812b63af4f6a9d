//go:build linux

package mount

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// key returns the key of a user of the storage system. No error quotes it.
func (m *Mounter) key(ctx context.Context, user string) (string, error) {
	if m.own.Key != nil {
		key, err := m.own.Key(ctx, user)
		if err != nil {
			return "", fmt.Errorf("key of user %q: %w", user, err)
		}
		return checkKey(key, "what the key store has for user "+user)
	}
	if m.own.Keys == "" {
		return "", fmt.Errorf("user %q of the storage system has a key, and this process has no directory of keys: %w", user, ErrInvalid)
	}
	dir, err := os.Stat(m.own.Keys)
	if err != nil {
		return "", fmt.Errorf("open the directory of keys: %w", err)
	}
	if mode := dir.Mode(); !mode.IsDir() || mode.Perm()&0o077 != 0 {
		return "", fmt.Errorf("the directory of keys %s has mode %v and must be a directory of mode 0700: %w", m.own.Keys, mode, ErrInvalid)
	}
	text, err := secret(filepath.Join(m.own.Keys, user))
	if err != nil {
		return "", fmt.Errorf("key of user %q: %w", user, err)
	}
	return checkKey(text, "the file "+filepath.Join(m.own.Keys, user))
}

func checkKey(text, where string) (string, error) {
	key := strings.TrimSpace(text)
	if _, err := base64.StdEncoding.DecodeString(key); err != nil || key == "" {
		return "", fmt.Errorf("%s does not hold a key, as `ceph auth print-key` prints it, and nothing else: %w", where, ErrInvalid)
	}
	return key, nil
}

// secret reads a small file that nobody but its owner may read.
func secret(file string) (string, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if mode := info.Mode(); !mode.IsRegular() || mode.Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s has mode %v and must be a file of mode 0600, which others cannot read: %w", file, mode, ErrInvalid)
	}
	text := make([]byte, 4096)
	n, err := f.Read(text)
	if err != nil {
		return "", fmt.Errorf("%s is empty or cannot be read: %w", file, err)
	}
	return string(text[:n]), nil
}
