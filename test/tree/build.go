// Package tree makes file trees to try backups on, changes a part of them, and
// compares two trees in everything that a restore must bring back.
package tree

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options says what Build makes.
type Options struct {
	// Source is the directory that is copied; empty for the Go source tree of
	// the toolchain that is installed.
	Source string
	// Files, if not 0, makes that many small files instead of a copy.
	Files int
}

// Size is how much a tree holds. A hard link counts once.
type Size struct {
	Files int   // regular files
	Dirs  int   // directories, the root not counted
	Other int   // symbolic links, fifos, devices
	Bytes int64 // of the regular files, holes included
}

// Build fills dir, which exists, and returns when all is in place. Modes and
// modification times are those of the source.
func Build(ctx context.Context, dir string, o Options) error {
	if o.Files > 0 {
		return synthesize(ctx, dir, o.Files)
	}
	source := o.Source
	if source == "" {
		out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
		if err != nil {
			return fmt.Errorf("find the Go source tree with go env GOROOT: %w", err)
		}
		source = filepath.Join(strings.TrimSpace(string(out)), "src")
	}
	return copyTree(ctx, source, dir)
}

func copyTree(ctx context.Context, from, to string) error {
	type dirTime struct {
		path string
		time time.Time
	}
	var dirs []dirTime
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case path == from:
			return nil
		case d.IsDir():
			dirs = append(dirs, dirTime{target, info.ModTime()})
			if err := os.Mkdir(target, 0o700); err != nil {
				return err
			}
			return os.Chmod(target, info.Mode())
		case d.Type() == fs.ModeSymlink:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if err := os.Symlink(link, target); err != nil {
				return err
			}
			return setTime(target, info.ModTime())
		case d.Type().IsRegular():
			return copyFile(path, target, info)
		}
		return fmt.Errorf("copy %q: not a file, directory or link", path)
	})
	if err != nil {
		return fmt.Errorf("copy %q to %q: %w", from, to, err)
	}
	for _, d := range slices.Backward(dirs) { // a directory after what it holds
		if err := setTime(d.path, d.time); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string, info fs.FileInfo) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Chmod(info.Mode())
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = setTime(to, info.ModTime())
	}
	return err
}

// setTime sets the modification time of path itself, a symbolic link too.
func setTime(path string, at time.Time) error {
	ts := unix.NsecToTimespec(at.UnixNano())
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}

// synthesize makes n files of up to 16 KiB, a hundred a directory, the same
// bytes each time.
func synthesize(ctx context.Context, dir string, n int) error {
	random := rand.New(rand.NewPCG(1, uint64(n)))
	buf := make([]byte, 16<<10)
	at := dir
	for i := range n {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i%100 == 0 {
			at = filepath.Join(dir, fmt.Sprintf("d%02d", i/10000), fmt.Sprintf("d%04d", i/100))
			if err := os.MkdirAll(at, 0o755); err != nil {
				return err
			}
		}
		// Half of it compresses, as source code does.
		b := buf[:random.IntN(len(buf))]
		fill(random, b[:len(b)/2])
		if err := os.WriteFile(filepath.Join(at, fmt.Sprintf("f%06d", i)), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// fill is several times faster than crypto/rand; nothing here is secret.
func fill(random *rand.Rand, b []byte) {
	for len(b) >= 8 {
		v := random.Uint64()
		b[0], b[1], b[2], b[3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
		b[4], b[5], b[6], b[7] = byte(v>>32), byte(v>>40), byte(v>>48), byte(v>>56)
		b = b[8:]
	}
	for i := range b {
		b[i] = byte(random.Uint32())
	}
}

// Measure walks dir and says how much it holds.
func Measure(dir string) (Size, error) {
	var s Size
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			s.Dirs++
		case unix.S_IFREG:
			if st.Nlink > 1 && seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
			s.Files++
			s.Bytes += st.Size
		default:
			s.Other++
		}
		return nil
	})
	return s, err
}
