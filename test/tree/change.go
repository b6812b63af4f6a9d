package tree

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Changed is what Change has done, in files and in bytes of their contents. A
// renamed file has the old contents, but a backup reads it again.
type Changed struct {
	Modified, Deleted, Renamed                int
	ModifiedBytes, DeletedBytes, RenamedBytes int64
}

// changeLimit keeps the big file out of Change, so that a fraction of the files
// is about that fraction of the bytes.
const changeLimit = 16 << 20

// Change modifies the contents of a fraction of the regular files below dir, at
// least one, and deletes and renames a quarter as many each. The same seed
// on the same tree does the same. Files with hard links are left alone.
func Change(dir string, fraction float64, seed uint64) (Changed, error) {
	var c Changed
	type file struct {
		path string
		size int64
	}
	var files []file
	total := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		total++
		if st.Nlink == 1 && st.Size <= changeLimit {
			files = append(files, file{path, st.Size})
		}
		return nil
	})
	if err != nil {
		return c, fmt.Errorf("change %q: %w", dir, err)
	}
	modify := max(1, int(float64(total)*fraction+0.5))
	few := max(1, modify/4)
	if modify+2*few > len(files) {
		return c, fmt.Errorf("change %q: %d files are too few to change %d", dir, len(files), modify+2*few)
	}

	random := rand.New(rand.NewPCG(seed, 0))
	random.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	for i, f := range files[:modify+2*few] {
		switch {
		case i < modify:
			var size int64
			if size, err = modifyFile(f.path, f.size, random); err == nil {
				c.Modified++
				c.ModifiedBytes += size
			}
		case i < modify+few:
			if err = os.Remove(f.path); err == nil {
				c.Deleted++
				c.DeletedBytes += f.size
			}
		default:
			to := filepath.Join(filepath.Dir(f.path), fmt.Sprintf("renamed-%d-%d", seed, i))
			if err = os.Rename(f.path, to); err == nil {
				c.Renamed++
				c.RenamedBytes += f.size
			}
		}
		if err != nil {
			return c, fmt.Errorf("change %q: %w", dir, err)
		}
	}
	return c, nil
}

// modifyFile appends to a file, overwrites a part of it or cuts it, and returns
// its new size.
func modifyFile(path string, size int64, random *rand.Rand) (int64, error) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, 16+random.IntN(500))
	fill(random, b)
	at := size // append
	switch random.IntN(3) {
	case 0: // overwrite
		if size > 0 {
			at = random.Int64N(size)
		}
	case 1: // cut, and write something else
		at = size / 2
		if err := f.Truncate(at); err != nil {
			return 0, err
		}
		size = at
	}
	if _, err := f.WriteAt(b, at); err != nil {
		return 0, err
	}
	return max(size, at+int64(len(b))), f.Close()
}
