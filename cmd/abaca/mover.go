package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/abaca-csi/abaca/pkg/backup/inprocess"
	"github.com/abaca-csi/abaca/pkg/backup/kube"
	"github.com/abaca-csi/abaca/pkg/mount"
)

// newMoverCommand is what a runner starts for each backup and restore.
func newMoverCommand() *cobra.Command {
	var a inprocess.Args
	cmd := &cobra.Command{
		Use: "mover", Short: "Carry one snapshot to a repository, or a backup into a share (started by the controller)", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.Record == "" {
				return kube.Move(cmd.Context(), kube.Args{Repository: a.Repository, Restic: a.Restic, Cache: a.Cache},
					mount.New(mount.Options{Placed: true}), time.Now)
			}
			reader, err := keyReader(a.Keys, nil)
			if err != nil {
				return err
			}
			reader.Tied = true
			return inprocess.Move(cmd.Context(), a, mount.New(reader), time.Now)
		},
	}
	f := cmd.Flags()
	f.StringVar(&a.Record, "record", "", "the directory with the mover's record; empty in a Job, whose source is mounted already")
	f.StringVar(&a.Repository, "repository", "", "the folder with the repository's configuration")
	f.StringVar(&a.Restic, "restic", "restic", "the restic program")
	f.StringVar(&a.Cache, "cache", "", "the directory for restic's cache")
	f.StringVar(&a.Seen, "seen", "", "the directory that remembers which repositories were there")
	f.StringVar(&a.Keys, "keys", "", keysHelp+"; empty for nowhere")
	must(cmd, "repository", "cache")
	return cmd
}
