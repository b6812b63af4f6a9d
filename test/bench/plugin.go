package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// plugin is a CSI driver that runs, as a process of its own.
type plugin struct {
	name  string
	log   string // file
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
	conn  *grpc.ClientConn

	identity   csi.IdentityClient
	controller csi.ControllerClient
	node       csi.NodeClient
}

// startPlugin starts a driver and waits until it serves. If it does not, it is
// returned all the same, to be stopped.
func startPlugin(ctx context.Context, socket, log, program string, args ...string) (*plugin, error) {
	p := &plugin{name: filepath.Base(program), log: log, cmd: exec.Command(program, args...), ended: make(chan struct{})}
	// A file and not a pipe, which movers inherit and keep open.
	file, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	p.cmd.Stdout, p.cmd.Stderr = file, file
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the terminal's Ctrl-C is for the bench
	if p.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, err
	}
	p.identity, p.controller, p.node = csi.NewIdentityClient(p.conn), csi.NewControllerClient(p.conn), csi.NewNodeClient(p.conn)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	for until := time.Now().Add(time.Minute); ; {
		if _, err = p.identity.Probe(ctx, &csi.ProbeRequest{}); err == nil {
			return p, nil
		}
		p.conn.ResetConnectBackoff()
		select {
		case <-p.ended:
			return p, fmt.Errorf("%s ended at once\n%s", p.name, p.lastLog())
		case <-ctx.Done():
			return p, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(until) {
			return p, fmt.Errorf("%s does not answer: %w\n%s", p.name, err, p.lastLog())
		}
	}
}

// attaches says whether a volume is published to a node before it can be staged
// there.
func (p *plugin) attaches(ctx context.Context) (bool, error) {
	resp, err := p.controller.ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{})
	for _, c := range resp.GetCapabilities() {
		if c.GetRpc().GetType() == csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME {
			return true, nil
		}
	}
	return false, err
}

func (p *plugin) stop() error {
	p.conn.Close()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(30 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.ended
		return fmt.Errorf("%s did not end by itself and was killed", p.name)
	}
}

// lastLog is the end of the driver's log.
func (p *plugin) lastLog() string {
	b, err := os.ReadFile(p.log)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return errors.Join(errors.New(strings.Join(lines[max(0, len(lines)-10):], "\n")), err).Error()
}
