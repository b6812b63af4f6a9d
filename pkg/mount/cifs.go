//go:build linux

package mount

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// cifs is SMB by the kernel, which needs mount.cifs. A location is //host/share
// or \\host\share. Options are those of mount.cifs(8); who signs in is said in
// a file that nobody else can read, by credentials=, or by Kerberos, sec=krb5;
// otherwise it is a guest.
type cifs struct{}

var cifsWords = grammar{
	known: strings.Fields(`
		vers= credentials= guest domain= uid= gid= forceuid noforceuid forcegid noforcegid cruid= file_mode= dir_mode=
		port= sec= seal sign hard soft cache= actimeo= acregmax= acdirmax= closetimeo= rsize= wsize= bsize=
		serverino noserverino perm noperm dynperm nodynperm brl nobrl mfsymlinks nomfsymlinks iocharset= mapchars nomapchars mapposix nomapposix
		unix nounix posixpaths noposixpaths nodfs nostrictsync strictsync user_xattr nouser_xattr acl noacl cifsacl nocifsacl idsfromsid modefromsid
		multichannel nomultichannel max_channels= resilienthandles noresilienthandles persistenthandles nopersistenthandles
		handlecache nohandlecache handletimeout= nolease max_credits= echo_interval= sharesock nosharesock nosparse nodelete
		nocase esize= compress rdma fsc context= fscontext= defcontext= rootcontext=`),
	same: map[string]string{"_netdev": "", "defaults": "", "cred": "credentials", "dom": "domain", "workgroup": "domain",
		"linux": "unix", "posix": "unix", "nolinux": "nounix", "noposix": "nounix", "ignorecase": "nocase"},
	apart: [][]string{{"hard", "soft"}, {"guest", "credentials"}},
	secret: map[string]string{
		"password": inFile, "pass": inFile, "password2": inFile, "username": inFile, "user": inFile,
		"ip": "the location says where the server is", "addr": "the location says where the server is",
	},
}

const inFile = "everybody could read it; write it to a file and name that by credentials="

func (cifs) options(readOnly bool, src Source, flags []string) (options, error) {
	o, err := wish(cifsWords, readOnly, src, flags)
	if err != nil {
		return o, err
	}
	if !strings.HasPrefix(o.value("sec"), "krb5") {
		o.usual("guest", "credentials") // or mount.cifs asks for a password
	}
	if o.immutable {
		o.usual("actimeo=3600", "acregmax", "acdirmax", "cache")
		// Of a file with hard links only one name can be open with a lease, which
		// names the file: Samba refuses the second (EINVAL). What cannot change is
		// cached without.
		o.usual("nolease")
		o.usual("cache=loose")
	}
	return o, nil
}

func (cifs) find(_ context.Context, m *Mounter, src Source) (origin, error) {
	return onNetwork(m, src, parseCIFS)
}

type cifsLocation struct{ host, text string }

func parseCIFS(text string) (cifsLocation, error) {
	bare, ok := strings.CutPrefix(strings.ReplaceAll(text, `\`, "/"), "//")
	host, share, also := strings.Cut(strings.TrimRight(bare, "/"), "/")
	if !ok || !also || share == "" || share[0] == '.' || strings.ContainsAny(share, "/,\n") {
		return cifsLocation{}, fmt.Errorf("%q is neither //host/share nor \\\\host\\share (a directory in it is no part of the location): %w", text, ErrInvalid)
	}
	host, err := hostOf(host)
	if err != nil {
		return cifsLocation{}, fmt.Errorf("location %q: %w", text, err)
	}
	return cifsLocation{host: host, text: "//" + host + "/" + share}, nil
}

func (l cifsLocation) String() string { return l.text }

// below trusts the source in mountinfo, which the kernel shows as it was given;
// superblocks of different sources are never shared.
func (l cifsLocation) below(e *mountinfo.Info) (string, bool) {
	if e.FSType != "cifs" && e.FSType != "smb3" {
		return "", false
	}
	return under(strings.TrimRight(e.Source, "/")+e.Root, l.text)
}

func (l cifsLocation) mount(ctx context.Context, m *Mounter, dir string, o options) error {
	if file := o.value("credentials"); file != "" {
		if _, err := secret(file); err != nil {
			return fmt.Errorf("credentials: %w", err)
		}
	}
	if err := m.reach(ctx, l.host, cmp.Or(o.value("port"), "445")); err != nil {
		return err
	}
	return m.program(ctx, l.text, dir, "cifs", append(o.basic(), o.fs...))
}
