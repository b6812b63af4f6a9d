package manila

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// parameters are those of a StorageClass, by name, with whether they count after
// the share is made and so are kept with it. docs/manila.md describes them.
var parameters = map[string]bool{
	"type":                false, // name or id of a share type
	"protocol":            false, // CEPHFS, NFS or CIFS
	"shareNetworkID":      false,
	"groupID":             false, // share group
	"availability":        false, // zone
	"autoTopology":        true,  // "true": the zone that the volume is wanted in
	"appendShareMetadata": false, // JSON object of strings
	"affinity":            false, // share ids, separated by commas
	"antiAffinity":        false,
	"access":              true, // who may mount NFS and CIFS: "node", or addresses and networks, separated by commas
	"exportNetworks":      true, // which export locations of NFS and CIFS shares come first: addresses and networks, separated by commas
	"snapshotDirectory":   true, // where a server shows snapshots below a share's export: patterns, with a placeholder
	"cephfs-mounter":      true, // kernel or fuse
}

// class reads the parameters. ErrInvalid says which value is wrong.
func class(p map[string]string) (keep map[string]string, err error) {
	keep = map[string]string{}
	for name, value := range p {
		lasting, ok := parameters[name]
		if !ok {
			return nil, fmt.Errorf("%w: unknown parameter %q", backend.ErrInvalid, name)
		}
		if lasting {
			keep[name] = value
		}
	}
	oneOf := func(name string, values ...string) {
		if v := p[name]; v != "" && err == nil && !slices.Contains(values, v) {
			err = fmt.Errorf("%w: parameter %q is %q, but must be one of %s", backend.ErrInvalid, name, v, strings.Join(values, ", "))
		}
	}
	oneOf("autoTopology", "true", "false")
	oneOf("cephfs-mounter", "kernel", "fuse")
	if v := strings.ToUpper(p["protocol"]); v != "" && !slices.Contains([]string{"CEPHFS", "NFS", "CIFS"}, v) {
		err = fmt.Errorf("%w: parameter \"protocol\" is %q, but must be CEPHFS, NFS or CIFS", backend.ErrInvalid, p["protocol"])
	}
	if err != nil {
		return nil, err
	}
	if p["availability"] != "" && p["autoTopology"] == "true" {
		return nil, fmt.Errorf("%w: parameters \"availability\" and \"autoTopology\" contradict each other", backend.ErrInvalid)
	}
	for _, name := range []string{"access", "exportNetworks"} {
		if name == "access" && p[name] == accessNode {
			continue
		}
		if _, err := networks(name, p[name]); err != nil {
			return nil, err
		}
	}
	if _, err := extraMetadata(p["appendShareMetadata"]); err != nil {
		return nil, err
	}
	if d := p["snapshotDirectory"]; d != "" {
		_, malformed := path.Match(d, "")
		named := slices.ContainsFunc(placeholders, func(p string) bool { return strings.Contains(d, p) })
		if malformed != nil || !named || !filepath.IsLocal(d) || path.Clean(d) != d {
			return nil, fmt.Errorf("%w: parameter \"snapshotDirectory\" is %q, but must be a relative path with %s in it, such as .snapshot/share_snapshot_{instance_}",
				backend.ErrInvalid, d, strings.Join(placeholders, " or "))
		}
	}
	return keep, nil
}

// The placeholders of the parameter snapshotDirectory. Manila gives its drivers
// the id of a snapshot's instance, which is not the snapshot's, to name it by
// (create_snapshot of manila/share/manager.py); CephFS's alone takes the latter.
// None knows the name that a user gives.
const (
	placeID         = "{id}"
	placeInstance   = "{instance}"
	placeUnderlined = "{instance_}" // with _ for -
)

var placeholders = []string{placeID, placeInstance, placeUnderlined}

const (
	// accessNode is the value of the parameter access, and its default, that lets
	// the nodes in that mount, and nobody else.
	accessNode = "node"
	// maxNetworks is how long a list of addresses and networks may be.
	maxNetworks = 600
)

// client writes an address or a network in one way, as Manila compares them: a
// network of one address is that address. What is neither is as it was.
func client(to string) string {
	if a, err := netip.ParseAddr(to); err == nil {
		return a.Unmap().String()
	}
	p, err := netip.ParsePrefix(to)
	switch {
	case err != nil:
		return to
	case p.IsSingleIP():
		return client(p.Addr().String())
	}
	return p.String()
}

// networks reads a parameter that is a list of addresses and networks, each once.
func networks(parameter, list string) ([]string, error) {
	if len(list) > maxNetworks {
		return nil, fmt.Errorf("%w: parameter %q is longer than %d characters: name networks in the place of addresses", backend.ErrInvalid, parameter, maxNetworks)
	}
	var all []string
	for c := range strings.SplitSeq(list, ",") {
		if c = strings.TrimSpace(c); c == "" {
			continue
		}
		if _, err := netip.ParseAddr(c); err != nil {
			p, err := netip.ParsePrefix(c)
			if err != nil {
				return nil, fmt.Errorf("%w: parameter %q: %q is neither an IP address nor a network such as 192.0.2.0/24", backend.ErrInvalid, parameter, c)
			}
			if p != p.Masked() { // which Manila refuses
				return nil, fmt.Errorf("%w: parameter %q: %q is in the network %s; name that, or the address alone", backend.ErrInvalid, parameter, c, p.Masked())
			}
		}
		if c = client(c); !slices.Contains(all, c) {
			all = append(all, c)
		}
	}
	if list != "" && len(all) == 0 {
		return nil, fmt.Errorf("%w: parameter %q is %q, and names nothing: leave it out", backend.ErrInvalid, parameter, list)
	}
	return all, nil
}

func extraMetadata(text string) (map[string]string, error) {
	if text == "" {
		return nil, nil
	}
	var m map[string]string
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		return nil, fmt.Errorf("%w: parameter \"appendShareMetadata\" must be a JSON object of strings: %w", backend.ErrInvalid, err)
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if k == "" || len(k) > 255 || m[k] == "" || len(m[k]) > 1023 || strings.HasPrefix(k, "abaca.") || strings.HasPrefix(k, "__") {
			return nil, fmt.Errorf("%w: parameter \"appendShareMetadata\": %q is not a key that can be set", backend.ErrInvalid, k)
		}
	}
	return m, nil
}

// CheckReference implements backend.Parameterized.
func (b *Backend) CheckReference(ctx context.Context, shareID string, p map[string]string) error {
	keep, err := class(p)
	delete(keep, "autoTopology") // a snapshot is where it is
	maps.DeleteFunc(keep, func(_, value string) bool { return value == "" })
	if err != nil || len(keep) == 0 {
		return err
	}
	s, err := b.lateShare(ctx, shareID)
	if err != nil {
		return fmt.Errorf("share %q: %w", shareID, err)
	}
	spelled := func(name, value string) string {
		if name != "access" {
			return value
		}
		if value == "" || value == accessNode {
			return accessNode
		}
		all, _ := networks(name, value)
		slices.Sort(all)
		return strings.Join(all, ",")
	}
	for _, name := range slices.Sorted(maps.Keys(keep)) {
		if has := spelled(name, s.class(name)); spelled(name, keep[name]) != has {
			return fmt.Errorf("%w: parameter %q is %q, but a snapshot is mounted as its share is, whose class says %q: leave it out of the class, or name a class that agrees",
				backend.ErrInvalid, name, keep[name], has)
		}
	}
	return nil
}
