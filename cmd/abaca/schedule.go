package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
	_ "time/tzdata" // the image has no zones

	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

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
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	f := cmd.Flags()
	f.StringVar(&o.selector, "selector", "", "the claims of the namespace by label")
	f.StringArrayVar(&o.claims, "pvc", nil, "a claim by `name`; may be repeated")
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
	if _, err := labels.Parse(o.selector); err != nil {
		return fmt.Errorf("--selector: %w", err)
	}
	tiers, err := schedule.ParseTiers(o.tiers)
	if err != nil {
		return err
	}
	zone, err := time.LoadLocation(o.zone)
	if err != nil {
		return fmt.Errorf("--time-zone: %w", err)
	}
	run := schedule.Options{Schedule: o.schedule, Claims: schedule.Selection{Selector: o.selector, Names: o.claims}, Tiers: tiers,
		Timeout: o.timeout, Parallel: o.parallel, Location: zone, DryRun: o.dryRun, Now: time.Now}
	cluster, err := o.cluster()
	if err != nil {
		return err
	}
	if err := who(ctx, cluster, &run); err != nil {
		return err
	}
	result, err := schedule.Run(ctx, cluster, run)
	if err != nil && ctx.Err() == nil {
		return err
	}
	return conclude(cmd, o.output, result, err)
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

// who says for which schedule and time this runs: its Job knows. By hand, outside
// of a cluster, it is now.
func who(ctx context.Context, cluster *kube.Namespace, run *schedule.Options) error {
	pod := os.Getenv("POD_NAME")
	if pod == "" && os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		pod, _ = os.Hostname()
	}
	if pod == "" {
		if run.Schedule == "" {
			return errors.New("this does not run in a pod: say with --schedule which schedule it is for")
		}
		run.At = run.Now()
		return nil
	}
	job, err := cluster.Job(ctx, pod)
	if err != nil {
		return fmt.Errorf("find out which Job this is (POD_NAME says which pod): %w", err)
	}
	if owner := metav1.GetControllerOf(job); owner != nil && owner.Kind == "CronJob" && run.Schedule == "" {
		run.Schedule = owner.Name
	}
	if run.Schedule == "" {
		run.Schedule = job.Name
	}
	run.At, err = schedule.ScheduledTime(job.Annotations, job.CreationTimestamp.Time)
	return err
}
