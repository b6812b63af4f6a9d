package fakemanila

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Tree is the directory with the contents of a share.
func (s *Server) Tree(share string) string { return filepath.Join(s.o.Dir, share) }

// SnapshotTree is the directory with those of a snapshot, where CephFS has it.
func (s *Server) SnapshotTree(share, snapshot string) string {
	return filepath.Join(s.Tree(share), ".snap", "_"+snapshot+"_1099511627776")
}

// copyTree makes to a copy of from, without its snapshots; empty if from is.
func copyTree(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil || from == "" {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	args := []string{"-a", "--reflink=auto", "--"}
	for _, e := range entries {
		if e.Name() != ".snap" {
			args = append(args, filepath.Join(from, e.Name()))
		}
	}
	if len(args) == 3 {
		return nil
	}
	if out, err := exec.Command("cp", append(args, to)...).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
