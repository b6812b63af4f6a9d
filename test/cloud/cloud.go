// Package cloud looks into a real Manila past the driver, for tests that ask what
// is left there.
package cloud

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
)

// Await waits until a Manila has what is wanted of a driver's, in the words of the
// simulator's Counts, such as "1 shares, 0 snapshots, 2 rules": the shares and
// snapshots that bear the instance in their metadata, and the access rules of these.
// The error, when ctx ends, says what it has. File is a clouds.yaml, and name an
// entry in it.
func Await(ctx context.Context, file, name, instance, want string) error {
	auth, endpoint, tls, err := clouds.Parse(clouds.WithCloudName(name), clouds.WithLocations(file))
	if err != nil {
		return err
	}
	provider, err := config.NewProviderClient(ctx, auth, config.WithTLSConfig(tls))
	if err != nil {
		return err
	}
	client, err := openstack.NewSharedFileSystemV2(provider, endpoint)
	if err != nil {
		return err
	}
	client.Microversion = "2.73"
	for got := ""; ; {
		text, err := manila{client}.counts(ctx, instance)
		switch {
		case err == nil && text == want:
			return nil
		case err == nil:
			got = text
		case ctx.Err() == nil:
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("of %s there are %s in Manila, and not %s", instance, got, want)
		case <-time.After(time.Second):
		}
	}
}

type manila struct{ *gophercloud.ServiceClient }

type object struct{ ID string }

func (m manila) counts(ctx context.Context, instance string) (string, error) {
	ours := url.Values{"metadata": {"{'abaca.instance': '" + instance + "'}"}}.Encode()
	shares, err := m.list(ctx, "shares", "shares/detail?"+ours)
	if err != nil {
		return "", err
	}
	snapshots, err := m.list(ctx, "snapshots", "snapshots/detail?"+ours)
	if err != nil {
		return "", err
	}
	rules := 0
	for _, s := range shares {
		of, err := m.list(ctx, "access_list", "share-access-rules?share_id="+s.ID)
		if err != nil {
			return "", err
		}
		rules += len(of)
	}
	for _, s := range snapshots {
		of, err := m.list(ctx, "snapshot_access_list", "snapshots/"+s.ID+"/access-list")
		if err != nil {
			return "", err
		}
		rules += len(of)
	}
	return fmt.Sprintf("%d shares, %d snapshots, %d rules", len(shares), len(snapshots), rules), nil
}

// list returns a list of a Manila's. It is empty of what is gone, and of the rules of a
// snapshot that cannot have any, as its share type does not mount snapshots (400).
func (m manila) list(ctx context.Context, key, path string) ([]object, error) {
	var raw json.RawMessage
	_, err := m.Request(ctx, http.MethodGet, m.ServiceURL(path), &gophercloud.RequestOpts{JSONResponse: &raw})
	if gophercloud.ResponseCodeIs(err, http.StatusNotFound) || key == "snapshot_access_list" && gophercloud.ResponseCodeIs(err, http.StatusBadRequest) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var answer map[string][]object
	if err := json.Unmarshal(raw, &answer); err != nil {
		return nil, fmt.Errorf("GET %s: %w", path, err)
	}
	return answer[key], nil
}
