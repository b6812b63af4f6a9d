//go:build linux

package mount

import (
	"cmp"
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// nfs is NFS 3 and 4.x by the kernel, which needs mount.nfs. A location is
// host:/path, where an IPv6 address has brackets. Options are those of nfs(5).
type nfs struct{}

var nfsWords = grammar{
	known: strings.Fields(`
		vers= minorversion= proto= port= mountport= mountproto= mountvers= mounthost= namlen=
		hard soft softerr softreval nosoftreval timeo= retrans= retry= rsize= wsize=
		ac noac acregmin= acregmax= acdirmin= acdirmax= actimeo= cto nocto lookupcache= sharecache nosharecache
		rdirplus nordirplus sec= resvport noresvport fsc nofsc acl noacl lock nolock local_lock= clientaddr=
		migration nomigration nconnect= max_connect= trunkdiscovery notrunkdiscovery xprtsec= rdma tcp udp sync async
		context= fscontext= defcontext= rootcontext=`),
	same:   map[string]string{"nfsvers": "vers", "_netdev": "", "defaults": "", "fg": "", "intr": "", "nointr": ""},
	apart:  [][]string{{"hard", "soft", "softerr"}, {"proto", "tcp", "udp", "rdma"}, {"sync", "async"}},
	secret: map[string]string{"bg": "a mount is finished when success is reported", "addr": "the location says where the server is"},
}

func (nfs) options(readOnly bool, src Source, flags []string) (options, error) {
	o, err := wish(nfsWords, readOnly, src, flags)
	if err != nil {
		return o, err
	}
	// nfs(5): with soft, a server that is slow for a while makes a write fail
	// of which the application has been told that it was done.
	o.usual("hard", "soft", "softerr")
	// nfs(5), "sharecache": two mounts of one server would share options, the
	// first one's, and a snapshot lies in the same file system as its share.
	o.usual("nosharecache", "sharecache")
	// It is for the caller to try again, who has a deadline; mount.nfs would
	// for two minutes.
	o.usual("retry=0")
	if o.immutable {
		o.usual("nocto", "cto")
		o.usual("actimeo=3600", "ac", "noac", "acregmin", "acregmax", "acdirmin", "acdirmax")
		// What cannot change needs no locks but between the processes of this
		// node; without it NFS 3 starts rpc.statd.
		o.usual("nolock", "lock", "local_lock")
	}
	return o, nil
}

func (nfs) find(_ context.Context, m *Mounter, src Source) (origin, error) {
	return onNetwork(m, src, parseNFS)
}

type nfsLocation struct{ host, text string }

func parseNFS(text string) (nfsLocation, error) {
	host, dir, ok := strings.Cut(text, ":/")
	if !ok {
		return nfsLocation{}, fmt.Errorf("%q is not host:/path: %w", text, ErrInvalid)
	}
	host, err := hostOf(host)
	if err != nil {
		return nfsLocation{}, fmt.Errorf("location %q: %w", text, err)
	}
	name := host
	if strings.Contains(host, ":") {
		name = "[" + host + "]"
	}
	return nfsLocation{host: host, text: name + ":" + path.Clean("/"+dir)}, nil
}

func (l nfsLocation) String() string { return l.text }

// below trusts the source in mountinfo because each mount has a superblock of
// its own. The kernel writes the whole path there, and "/" as the root, also of
// a directory that was bound.
func (l nfsLocation) below(e *mountinfo.Info) (string, bool) {
	if e.FSType != "nfs" && e.FSType != "nfs4" || e.Root != "/" {
		return "", false
	}
	return under(e.Source, l.text)
}

func (l nfsLocation) mount(ctx context.Context, m *Mounter, dir string, o options) error {
	if proto := o.value("proto"); (proto == "" || strings.HasPrefix(proto, "tcp")) && !o.has("udp") && !o.has("rdma") {
		if err := m.reach(ctx, l.host, cmp.Or(o.value("port"), "2049")); err != nil {
			return err
		}
	}
	return m.program(ctx, l.text, dir, "nfs", append(o.basic(), o.fs...))
}
