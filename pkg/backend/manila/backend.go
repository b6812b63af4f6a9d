// Package manila serves shares of OpenStack Manila (API v2).
//
// Nothing that the next call needs is kept in memory: what a share is to Abaca is
// written into its metadata, in the create call itself, and found again by it.
// Names are not unique in Manila, so they identify nothing; see identity.go.
package manila

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// Options say which cloud to use, and how.
type Options struct {
	// CloudsFile is a clouds.yaml, Cloud the name of the cloud in it. It may hold
	// a password, an application credential or a trust, a CA and a client
	// certificate; gophercloud reads it.
	CloudsFile, Cloud string
	// Instance tells the shares of several drivers in one project apart; empty is
	// "abaca".
	Instance string
	// Keys is where the keys of CephX ids are put, for the nodes.
	Keys Keys
	Now  func() time.Time
	// Observe is told of each request to Manila's API: the method and the path, with
	// {id} for what names one object, the HTTP status, 0 if none came, and how long
	// it took. Nil for nobody.
	Observe func(call string, status int, took time.Duration)
	// Poll is how long to wait before the first look at what Manila is doing; 0 is
	// 300 ms. Later looks are further apart.
	Poll time.Duration
}

// Keys is an access-key store.
type Keys interface {
	// Put keeps the key of an id; Delete drops it. What is not there is nil.
	Put(ctx context.Context, id, key string) error
	Delete(ctx context.Context, id string) error
}

// The minor microversions of API v2 that something needs.
const (
	least             = 45 // access rules as objects, which have states
	sinceGroups       = 55 // share groups, no longer experimental
	sinceHints        = 65 // affinity
	sinceSnapMetadata = 73
	sinceSnapCount    = 79 // how many snapshots there are, with a listing; shares: 42
	sinceLocks        = 81 // resource locks
	sinceLevels       = 88 // a rule's level can be changed
	known             = 89 // the newest that was tried
)

// Backend implements backend.Backend, CapacityReporter, Parameterized, Granter
// and Sweeper.
type Backend struct {
	o       Options
	client  *gophercloud.ServiceClient
	minor   int // the microversion that every request is made with
	project string

	busy  keyed
	polls poller
	paces paces

	lately   lately
	decided  names // the holds that this process has seen decided
	readless names // the share types whose back ends know no rules that only read

	mu        sync.Mutex
	locations map[string]cached // by share
	types     []shareType
	typesAt   time.Time
}

var (
	_ backend.Backend          = (*Backend)(nil)
	_ backend.CapacityReporter = (*Backend)(nil)
	_ backend.Parameterized    = (*Backend)(nil)
	_ backend.Granter          = (*Backend)(nil)
	_ backend.Sweeper          = (*Backend)(nil)
)

// Open signs in and finds out what the cloud can do. ErrAuth when it refuses the
// credentials, ErrInvalid when the configuration or the cloud cannot be used,
// ErrUnavailable when it does not answer.
func Open(ctx context.Context, o Options) (*Backend, error) {
	if o.Instance == "" {
		o.Instance = "abaca"
	}
	if o.Poll == 0 {
		o.Poll = 300 * time.Millisecond
	}
	if len(o.Instance) > 32 || strings.ContainsAny(o.Instance, "'\"\\{}") {
		return nil, fmt.Errorf("%w: instance %q must be at most 32 bytes without quotes and braces", backend.ErrInvalid, o.Instance)
	}
	auth, endpoint, tls, err := clouds.Parse(clouds.WithCloudName(o.Cloud), clouds.WithLocations(o.CloudsFile))
	if err != nil {
		return nil, fmt.Errorf("%w: cloud %q of %s: %w", backend.ErrInvalid, o.Cloud, o.CloudsFile, err)
	}
	auth.AllowReauth = true
	provider, err := config.NewProviderClient(ctx, auth, config.WithTLSConfig(tls))
	if err != nil {
		return nil, signingIn(ctx, auth.IdentityEndpoint, err)
	}
	b := &Backend{o: o, locations: map[string]cached{}}
	if result, ok := provider.GetAuthResult().(tokens.CreateResult); ok {
		if p, err := result.ExtractProject(); err == nil && p != nil {
			b.project = p.ID
		}
	}
	if b.project == "" {
		return nil, fmt.Errorf("%w: cloud %q: the credentials are not of one project; name it in %s (project_name)", backend.ErrInvalid, o.Cloud, o.CloudsFile)
	}
	if b.client, err = openstack.NewSharedFileSystemV2(provider, endpoint); err != nil { // a token of no project has no catalog
		return nil, fmt.Errorf("%w: the catalog of %s has no service of type sharev2 in region %q: %w",
			backend.ErrInvalid, auth.IdentityEndpoint, endpoint.Region, err)
	}
	if b.minor, err = b.negotiate(ctx); err != nil {
		return nil, err
	}
	b.client.Microversion = fmt.Sprint("2.", b.minor)
	if _, err := b.shareTypes(ctx, 0); err != nil {
		return nil, fmt.Errorf("cloud %q: the share types cannot be listed; may this user use Manila? %w", o.Cloud, err)
	}
	return b, nil
}

// signingIn says why there is no token, without what was sent for one.
func signingIn(ctx context.Context, at string, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case gophercloud.ResponseCodeIs(err, http.StatusUnauthorized):
		return fmt.Errorf("%w: %s refuses the credentials", backend.ErrAuth, at)
	case gophercloud.ResponseCodeIs(err, http.StatusForbidden), gophercloud.ResponseCodeIs(err, http.StatusNotFound):
		return fmt.Errorf("%w: %s: %s", backend.ErrInvalid, at, oneLine(err.Error()))
	}
	return fmt.Errorf("%w: sign in at %s: %s", backend.ErrUnavailable, at, oneLine(err.Error()))
}

// negotiate returns the newest minor microversion that both sides know.
func (b *Backend) negotiate(ctx context.Context) (int, error) {
	// The list of versions is at the root of the endpoint, which may have a path
	// and a project of its own behind the version.
	root, _, _ := strings.Cut(b.client.Endpoint, "/v2")
	var answer struct {
		Versions []struct {
			Version string
		}
	}
	// Some versions answer "multiple choices".
	if err := b.send(ctx, http.MethodGet, root+"/", nil, &answer, http.StatusOK, http.StatusMultipleChoices); err != nil {
		return 0, fmt.Errorf("ask %s/ for its versions: %w", root, err)
	}
	for _, v := range answer.Versions {
		major, minor, _ := strings.Cut(v.Version, ".")
		n, err := strconv.Atoi(minor)
		if major != "2" || err != nil {
			continue
		}
		if n < least {
			return 0, fmt.Errorf("%w: Manila speaks microversions up to 2.%d, and 2.%d is needed", backend.ErrInvalid, n, least)
		}
		return min(n, known), nil
	}
	return 0, fmt.Errorf("%w: %s/ lists no version 2 of the Manila API", backend.ErrInvalid, root)
}

// keyed is a lock for each name, in this process. It is only there to save work:
// what two processes do at once ends well too.
type keyed struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

func (k *keyed) lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		if k.held == nil {
			k.held = map[string]chan struct{}{}
		}
		other, taken := k.held[name]
		if !taken {
			mine := make(chan struct{})
			k.held[name] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, name)
				k.mu.Unlock()
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, late(ctx)
		case <-other:
		}
	}
}

// late is the error of a call whose time has ended: ErrPending, as the work goes
// on; but a caller that has gone is told so.
func late(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return backend.ErrPending
}

// deadlineMargin is what must be left of a caller's time for a request that is sent
// again.
const deadlineMargin = 100 * time.Millisecond

// gib is Manila's unit of sizes, in bytes.
const gib = 1 << 30

// Parameters implements backend.Parameterized.
func (b *Backend) Parameters() []string {
	return slices.Sorted(maps.Keys(parameters))
}

// Capacity implements backend.CapacityReporter: what the project's quota leaves.
// Manila tells a project nothing of its back ends.
func (b *Backend) Capacity(ctx context.Context) (backend.Capacity, error) {
	type quota struct {
		Limit    int64
		Used     int64 `json:"in_use"`
		Reserved int64
	}
	var answer struct {
		Set struct {
			Gigabytes quota
			PerShare  quota `json:"per_share_gigabytes"`
		} `json:"quota_set"`
	}
	answer.Set.Gigabytes.Limit, answer.Set.PerShare.Limit = -1, -1 // what is not there has none
	if err := b.get(ctx, "quota-sets/"+b.project+"/detail", &answer); err != nil {
		return backend.Capacity{}, fmt.Errorf("ask for the quota: %w", err)
	}
	const unlimited = 1 << 60
	c := backend.Capacity{Available: unlimited, MaxShareSize: unlimited, MinShareSize: gib}
	if q := answer.Set.Gigabytes; q.Limit >= 0 {
		c.Available = max(0, q.Limit-q.Used-max(0, q.Reserved)) * gib
		c.MaxShareSize = q.Limit * gib
	}
	if limit := answer.Set.PerShare.Limit; limit >= 0 {
		c.MaxShareSize = min(c.MaxShareSize, limit*gib)
	}
	return c, nil
}

// pageOf returns the page behind after of objects in the order of their keys.
func pageOf[T any](all []T, key func(T) string, after string, limit int) (page []T, more bool) {
	slices.SortFunc(all, func(x, y T) int { return strings.Compare(key(x), key(y)) })
	from := 0
	for from < len(all) && after != "" && key(all[from]) <= after {
		from++
	}
	all = all[from:]
	if limit > 0 && len(all) > limit {
		return all[:limit], true
	}
	return all, false
}

// wrap says what was being done.
func wrap(err *error, format string, args ...any) {
	if *err != nil {
		*err = fmt.Errorf(format+": %w", append(args, *err)...)
	}
}
