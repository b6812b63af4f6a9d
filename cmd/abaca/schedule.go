package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"
	_ "time/tzdata" // the image has no zones

	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/abaca-csi/abaca/pkg/schedule"
	"github.com/abaca-csi/abaca/pkg/schedule/kube"
)

// scheduleOptions are the flags of schedule.
type scheduleOptions struct {
	selector, schedule, namespace, zone, output string
	claims, tiers                               []string
	timeout                                     time.Duration
	parallel                                    int
	dryRun                                      bool
}

// newScheduleCommand is what a CronJob runs.
func newScheduleCommand() *cobra.Command {
	o := scheduleOptions{}
	cmd := &cobra.Command{
		Use: "schedule", Short: "Make a VolumeSnapshot of each claim and tier, and drop those that no rule keeps (run by a CronJob)", Args: cobra.NoArgs,
		Example: `  abaca schedule --selector app=shop --tier class=abaca-snapshot,keep-last=24 --tier class=abaca-backup,keep-daily=7,keep-weekly=5
  abaca schedule --schedule nightly --pvc data --tier class=abaca-backup,keep-daily=7 --dry-run   # by hand, over KUBECONFIG`,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	f := cmd.Flags()
	f.StringVar(&o.selector, "selector", "", "the claims of the namespace by label; this or --pvc is required")
	f.StringArrayVar(&o.claims, "pvc", nil, "a claim by `name`, instead of --selector; may be repeated")
	f.StringArrayVar(&o.tiers, "tier", nil, "what is made of each claim, and what is kept: class=NAME,keep-daily=7,... ; may be repeated (required)")
	f.StringVar(&o.schedule, "schedule", "", "the name of the schedule (default: the CronJob of the Job that this runs in)")
	f.StringVar(&o.namespace, "namespace", "", "the namespace (default: that of the pod, or of the kubeconfig)")
	f.DurationVar(&o.timeout, "timeout", schedule.DefaultTimeout, "how long to wait for all of them")
	f.IntVar(&o.parallel, "parallel", schedule.DefaultParallel, "how many are made at once")
	f.StringVar(&o.zone, "time-zone", "UTC", "the `zone` in which days and weeks are counted, such as Europe/Berlin")
	f.BoolVar(&o.dryRun, "dry-run", false, "change nothing, and say what would be made, kept and dropped")
	f.StringVarP(&o.output, "output", "o", "", "output format: json")
	return cmd
}

func (o scheduleOptions) run(cmd *cobra.Command) error {
	ctx := cmd.Context()
	if err := checkOutput(o.output); err != nil {
		return err
	}
	// What is wrong with the schedule is told on the CronJob too, so the cluster
	// comes first.
	run, wrong := o.options()
	cluster, err := o.cluster()
	if err != nil {
		return cmp.Or(wrong, err)
	}
	owner, err := who(ctx, cluster, &run)
	if err != nil {
		return cmp.Or(wrong, err)
	}
	result, err := schedule.Result{}, wrong
	if wrong == nil {
		result, err = schedule.Run(ctx, cluster, run)
	}
	if owner != nil && !o.dryRun {
		reason, text := schedule.News(result, err)
		if err := cluster.Tell(ctx, *owner, reason, text, run.At, run.Now()); err != nil {
			klog.FromContext(ctx).Error(err, "Event is not written", "object", owner.Kind+" "+owner.Name, "reason", reason)
		}
	}
	if err != nil && (wrong != nil || ctx.Err() == nil) {
		return err
	}
	return conclude(cmd, o.output, result, err)
}

// options are what the flags say. schedule.ErrInvalid if that cannot be.
func (o scheduleOptions) options() (schedule.Options, error) {
	run := schedule.Options{Schedule: o.schedule, Claims: schedule.Selection{Selector: o.selector, Names: o.claims},
		Timeout: o.timeout, Parallel: o.parallel, DryRun: o.dryRun, Now: time.Now}
	if _, err := labels.Parse(o.selector); err != nil {
		return run, fmt.Errorf("%w: --selector: %w", schedule.ErrInvalid, err)
	}
	var err error
	if run.Tiers, err = schedule.ParseTiers(o.tiers); err != nil {
		return run, fmt.Errorf("%w: %w", schedule.ErrInvalid, err)
	}
	if run.Location, err = time.LoadLocation(o.zone); err != nil {
		return run, fmt.Errorf("%w: --time-zone: %w", schedule.ErrInvalid, err)
	}
	return run, nil
}

// cluster is the one that this runs in, or else that of the kubeconfig.
func (o scheduleOptions) cluster() (*kube.Namespace, error) {
	loading := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(clientcmd.NewDefaultClientConfigLoadingRules(), nil)
	config, err := loading.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, errors.New("no cluster: this runs in no pod, and there is no kubeconfig (KUBECONFIG names one)")
	}
	if err != nil {
		return nil, fmt.Errorf("no cluster: %w", err)
	}
	// client-go's own 5 in a second are less than --parallel snapshots are looked at.
	config.QPS, config.Burst = 50, 100
	n := &kube.Namespace{Name: o.namespace}
	if n.Name == "" {
		if n.Name, _, err = loading.Namespace(); err != nil {
			return nil, err
		}
	}
	if n.Core, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	n.Snapshots, err = snapshots.NewForConfig(config)
	return n, err
}

// who says for which schedule and time this runs, and whom its events are of: its
// Job knows. By hand, outside of a cluster, it is now, and of nobody.
func who(ctx context.Context, cluster *kube.Namespace, run *schedule.Options) (*corev1.ObjectReference, error) {
	pod := os.Getenv("POD_NAME")
	if pod == "" && os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		pod, _ = os.Hostname()
	}
	if pod == "" {
		if run.Schedule == "" {
			return nil, errors.New("this does not run in a pod: say with --schedule which schedule it is for")
		}
		run.At = run.Now()
		return nil, nil
	}
	job, err := cluster.Job(ctx, pod)
	if err != nil {
		return nil, fmt.Errorf("find out which Job this is (POD_NAME says which pod): %w", err)
	}
	about := &corev1.ObjectReference{APIVersion: "batch/v1", Kind: "Job", Namespace: job.Namespace, Name: job.Name, UID: job.UID}
	if owner := metav1.GetControllerOf(job); owner != nil && owner.Kind == "CronJob" {
		about.Kind, about.Name, about.UID = owner.Kind, owner.Name, owner.UID
	}
	run.Schedule = cmp.Or(run.Schedule, about.Name)
	run.At, err = schedule.ScheduledTime(job.Annotations, job.CreationTimestamp.Time)
	return about, err
}
