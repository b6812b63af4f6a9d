package manila

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// The calls of the API. gophercloud signs in, renews the token and sends; its
// types of shares and snapshots lack much of what is needed here (metadata of
// snapshots, mount_snapshot_support, access_rules_status, is_soft_deleted).

// share is a share as the API describes it.
type share struct {
	made
	Protocol    string `json:"share_proto"`
	TypeName    string `json:"share_type_name"`
	Zone        string `json:"availability_zone"`
	SnapshotID  string `json:"snapshot_id"`
	Group       string `json:"share_group_id"`
	Size        int64  `json:"size"` // GiB
	Snapshots   bool   `json:"snapshot_support"`
	Clones      bool   `json:"create_share_from_snapshot_support"`
	Mountable   bool   `json:"mount_snapshot_support"`
	SoftDeleted bool   `json:"is_soft_deleted"`
}

// snapshot is a snapshot as the API describes it.
type snapshot struct {
	made
	Description string `json:"description"`
	ShareID     string `json:"share_id"`
	Size        int64  `json:"size"` // GiB
}

// rule is an access rule of a share or of a snapshot.
type rule struct {
	ID    string `json:"id"`
	Type  string `json:"access_type"`
	To    string `json:"access_to"` // as client writes it
	Level string `json:"access_level"`
	State string `json:"state"`
	Key   string `json:"access_key"`
	// Metadata is that of shares' rules alone.
	Metadata map[string]string `json:"metadata"`
}

type shareType struct {
	ID      string         `json:"id"`
	Name    string         `json:"name"`
	Default bool           `json:"is_default"`
	Specs   map[string]any `json:"extra_specs"`
}

// stamp is a time as Manila writes it: UTC, and not saying so.
type stamp struct{ time.Time }

func (t *stamp) UnmarshalJSON(b []byte) (err error) {
	var text string
	if err := json.Unmarshal(b, &text); err != nil || text == "" {
		return err
	}
	t.Time, err = time.Parse("2006-01-02T15:04:05.999999999", strings.TrimSuffix(text, "Z"))
	return err
}

func (b *Backend) getShare(ctx context.Context, id string) (*share, error) {
	var answer struct{ Share *share }
	if err := b.get(ctx, "shares/"+url.PathEscape(id), &answer); err != nil {
		return nil, err
	}
	if answer.Share == nil || answer.Share.ID != id {
		return nil, errStrange
	}
	b.lately.saw(b.o.Now(), answer.Share)
	return answer.Share, nil
}

func (b *Backend) getSnapshot(ctx context.Context, id string) (*snapshot, error) {
	var answer struct{ Snapshot *snapshot }
	if err := b.get(ctx, "snapshots/"+url.PathEscape(id), &answer); err != nil {
		return nil, err
	}
	if answer.Snapshot == nil || answer.Snapshot.ID != id {
		return nil, errStrange
	}
	b.identify(answer.Snapshot)
	return answer.Snapshot, nil
}

// errStrange is an answer that cannot be.
var errStrange = fmt.Errorf("%w: Manila's answer makes no sense", backend.ErrUnavailable)

// listShares returns the shares that have all the metadata, of every page.
func (b *Backend) listShares(ctx context.Context, metadata map[string]string) ([]*share, error) {
	return pages(ctx, b, "shares/detail", url.Values{"metadata": {filter(metadata)}}, "shares", true, func(s *share) string { return s.ID })
}

func (b *Backend) listSnapshots(ctx context.Context, q url.Values) ([]*snapshot, error) {
	all, err := pages(ctx, b, "snapshots/detail", q, "snapshots", b.minor >= sinceSnapCount, func(s *snapshot) string { return s.ID })
	for _, s := range all {
		b.identify(s)
	}
	return all, err
}

// filter writes metadata as Manila's filters want it: a Python dictionary.
func filter(metadata map[string]string) string {
	var parts []string
	for k, v := range metadata {
		parts = append(parts, "'"+k+"': '"+v+"'")
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

const (
	// pageLimit is how many objects are asked for at once; Manila's default maximum.
	pageLimit = 1000
	// leastLimit is what no cloud's maximum (osapi_max_limit) is below.
	leastLimit = 100
)

// pages reads a listing to its end, in the order of ids. Manila may give fewer
// objects at once than it is asked for, and names no next page then; so it is asked
// how many there are, where counted says that it can tell. Otherwise the end is an
// empty page, or one below leastLimit.
func pages[T any](ctx context.Context, b *Backend, path string, q url.Values, key string, counted bool, id func(*T) string) ([]*T, error) {
	q.Set("limit", strconv.Itoa(pageLimit))
	q.Set("sort_key", "id")
	q.Set("sort_dir", "asc")
	if counted {
		q.Set("with_count", "true")
	}
	var all []*T
	seen := map[string]bool{}
	for offset, total := 0, 0; ; {
		q.Set("offset", strconv.Itoa(offset))
		answer := map[string]json.RawMessage{}
		if err := b.get(ctx, path+"?"+q.Encode(), &answer); err != nil {
			return nil, err
		}
		var page []*T
		count := 0
		if json.Unmarshal(answer[key], &page) != nil || counted && json.Unmarshal(answer["count"], &count) != nil {
			return nil, errStrange
		}
		for _, o := range page {
			if o != nil && !seen[id(o)] {
				seen[id(o)] = true
				all = append(all, o)
			}
		}
		fewer := total - count
		if total = count; fewer > 0 && counted {
			offset = max(0, offset-fewer) // what comes behind those that have gone has moved up
			continue
		}
		// A share with several replicas takes up the room of several, and counts once.
		offset += len(page)
		if len(page) == 0 || counted && offset >= total && len(all) >= total || !counted && len(page) < leastLimit {
			return all, nil
		}
	}
}

// metadataTries is how often metadata are written that Manila fails to write.
const metadataTries = 4

// setMetadata adds metadata to a share or a snapshot. Of a share Manila writes all that
// it has read a moment before, so of several at once one would undo the other; this
// process writes one after the other, and what other processes do see hold.go.
func (b *Backend) setMetadata(ctx context.Context, of string, metadata map[string]string) error {
	unlock, err := b.busy.lock(ctx, "metadata of "+of)
	if err != nil {
		return err
	}
	defer unlock()
	for try := 1; ; try++ {
		err := b.post(ctx, of+"/metadata", map[string]any{"metadata": metadata}, nil) // PUT would drop the others
		// Of some at once, Manila's database may take one alone (seen with 2025.1).
		if !refusal(err).says(http.StatusInternalServerError, "") || try == metadataTries {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Duration(try) * 100 * time.Millisecond):
		}
	}
}

func (b *Backend) dropMetadata(ctx context.Context, of, key string) error {
	unlock, err := b.busy.lock(ctx, "metadata of "+of)
	if err != nil {
		return err
	}
	defer unlock()
	err = b.delete(ctx, of+"/metadata/"+url.PathEscape(key))
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	return err
}

// listing returns the objects under a key of an answer.
func listing[T any](ctx context.Context, b *Backend, path, key string) ([]T, error) {
	var answer map[string]json.RawMessage
	var all []T
	err := b.get(ctx, path, &answer)
	if err == nil && answer[key] != nil && json.Unmarshal(answer[key], &all) != nil {
		err = errStrange
	}
	return all, err
}

// rulesOn returns the rules of a share or snapshot, with their clients written in one
// way, whoever wrote them.
func (b *Backend) rulesOn(ctx context.Context, at side) ([]rule, error) {
	path, key := "share-access-rules?share_id="+url.QueryEscape(at.id), "access_list"
	if at.snapshot {
		path, key = at.path()+"/access-list", "snapshot_access_list"
	}
	all, err := listing[rule](ctx, b, path, key)
	if !at.snapshot && refusal(err).says(http.StatusBadRequest, "") {
		return nil, nil // of a share that is gone
	}
	for i := range all {
		if all[i].Type == "ip" {
			all[i].To = client(all[i].To)
		}
	}
	return all, err
}

// exportPath is one export location.
type exportPath struct {
	Path      string `json:"path"`
	Preferred bool   `json:"preferred"`
	Admin     bool   `json:"is_admin_only"`
}

func (b *Backend) exportPaths(ctx context.Context, share string) ([]exportPath, error) {
	return listing[exportPath](ctx, b, "shares/"+url.PathEscape(share)+"/export_locations", "export_locations")
}

func (b *Backend) snapshotPaths(ctx context.Context, snapshot string) ([]exportPath, error) {
	return listing[exportPath](ctx, b, "snapshots/"+url.PathEscape(snapshot)+"/export-locations", "share_snapshot_export_locations")
}

// instanceOf returns the id of a snapshot's instance, which Manila shows to
// administrators, and to whom its policy names. ErrUnsupported to others, and where
// there are several, of replicas.
func (b *Backend) instanceOf(ctx context.Context, snapshot string) (string, error) {
	all, err := listing[struct{ ID string }](ctx, b, "snapshot-instances?snapshot_id="+url.QueryEscape(snapshot), "snapshot_instances")
	switch refused := refusal(err); {
	case refused.says(http.StatusForbidden, ""):
		return "", fmt.Errorf("%w: the parameter \"snapshotDirectory\" of the share's class has the id of the snapshot's instance in it, and Manila's policy "+
			"(share_snapshot_instance:index) does not show that to this user: %w", backend.ErrUnsupported, withoutKind(refused))
	case err != nil:
		return "", err
	case len(all) == 0:
		return "", backend.ErrNotFound
	case len(all) > 1:
		return "", fmt.Errorf("%w: the snapshot has %d instances, and it is not known which of them gives its directory the name", backend.ErrUnsupported, len(all))
	case !validID(all[0].ID):
		return "", errStrange
	}
	return all[0].ID, nil
}

// typesAge is how long the share types are taken to be what they were.
const typesAge = time.Minute

// shareTypes returns them as they were at most so long ago.
func (b *Backend) shareTypes(ctx context.Context, age time.Duration) ([]shareType, error) {
	b.mu.Lock()
	types, at := b.types, b.typesAt
	b.mu.Unlock()
	if types != nil && b.o.Now().Sub(at) < age {
		return types, nil
	}
	types, err := listing[shareType](ctx, b, "types", "share_types")
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.types, b.typesAt = types, b.o.Now()
	return types, nil
}

func (b *Backend) url(path string) string { return b.client.ServiceURL(path) }

func (b *Backend) get(ctx context.Context, path string, into any) error {
	return b.send(ctx, http.MethodGet, b.url(path), nil, into, http.StatusOK)
}

func (b *Backend) post(ctx context.Context, path string, body, into any) error {
	return b.send(ctx, http.MethodPost, b.url(path), body, into, http.StatusOK, http.StatusCreated, http.StatusAccepted)
}

func (b *Backend) put(ctx context.Context, path string, body any) error {
	return b.send(ctx, http.MethodPut, b.url(path), body, nil, http.StatusOK, http.StatusAccepted)
}

func (b *Backend) delete(ctx context.Context, path string) error {
	return b.send(ctx, http.MethodDelete, b.url(path), nil, nil, http.StatusOK, http.StatusAccepted, http.StatusNoContent)
}

// retries bounds how often a request is sent again that Manila has put off.
const retries = 3

// send makes one request. What was put off is sent again when Manila says, if the
// caller has so much time.
func (b *Backend) send(ctx context.Context, method, url string, body, into any, ok ...int) error {
	for try := 1; ; try++ {
		// Decoded here, as JSON that does not fit is trouble of the cloud's too.
		var raw json.RawMessage
		o := &gophercloud.RequestOpts{JSONBody: body, OkCodes: ok}
		if into != nil {
			o.JSONResponse = &raw
		}
		began := b.o.Now()
		answer, err := b.client.Request(ctx, method, url, o)
		b.observe(method, url, began, answer, err)
		if err == nil && into != nil {
			if json.Unmarshal(raw, into) != nil {
				return fmt.Errorf("%w (%s %s)", errStrange, method, b.short(url))
			}
		}
		if err == nil {
			return nil
		}
		e := b.classify(ctx, method, url, err)
		refused := refusal(e)
		if refused == nil || try > retries || !refused.putOff(method) {
			return e
		}
		wait := max(refused.after, 200*time.Millisecond<<try)
		if end, limited := ctx.Deadline(); limited && b.o.Now().Add(wait).After(end.Add(-deadlineMargin)) {
			return e
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// observe tells who wants to know of a request that has ended.
func (b *Backend) observe(method, url string, began time.Time, answer *http.Response, err error) {
	if b.o.Observe == nil {
		return
	}
	status := 0
	var refused gophercloud.ErrUnexpectedResponseCode
	var again *gophercloud.ErrUnableToReauthenticate
	switch {
	case answer != nil:
		status = answer.StatusCode
	case errors.As(err, &refused):
		status = refused.Actual
	case errors.As(err, &again): // the token was refused, and no new one is given
		status = http.StatusUnauthorized
	}
	// Collections and names take turns; there are a few of the former.
	steps := strings.Split(b.short(url), "/")
	for i := 1; i < len(steps); i += 2 {
		if steps[i] != "detail" {
			steps[i] = "{id}"
		}
	}
	path := strings.Join(steps, "/")
	if !strings.HasPrefix(url, b.client.Endpoint) {
		path = "versions" // of the API, which are at its root
	}
	b.o.Observe(method+" "+path, status, b.o.Now().Sub(began))
}

// short is a URL without what is the same in all.
func (b *Backend) short(url string) string {
	path, _, _ := strings.Cut(strings.TrimPrefix(url, b.client.Endpoint), "?")
	return path
}

// apiError is a request that Manila refused.
type apiError struct {
	status  int
	message string // Manila's own
	request string // OpenStack's request id, for its operators
	what    string // method and path
	after   time.Duration
	kind    error
}

func (e *apiError) Error() string {
	s := fmt.Sprintf("%v: %s: %s (HTTP %d", e.kind, e.what, e.message, e.status)
	if e.request != "" {
		s += ", " + e.request
	}
	return s + ")"
}

func (e *apiError) Unwrap() error { return e.kind }

// refusal returns what Manila has refused; nil if an error is something else.
func refusal(err error) *apiError {
	e, _ := errors.AsType[*apiError](err)
	return e
}

// says compares a status, and looks for a text in the message. No refusal says
// anything.
func (e *apiError) says(status int, text string) bool {
	return e != nil && e.status == status && strings.Contains(e.message, text)
}

// denied says whether it is the caller who may not do that. Of much that cannot be done
// now Manila says 403 too.
func (e *apiError) denied() bool { return e.says(http.StatusForbidden, "Policy doesn't allow") }

// withoutKind is a refusal that the caller knows how to classify.
func withoutKind(e *apiError) *apiError {
	copied := *e
	copied.kind = errRefused
	return &copied
}

var errRefused = errors.New("refused")

// putOff says whether the request has had no effect and may have one in a moment:
// 429, 503 where nothing would have changed, and 401 while Keystone does not answer.
func (e *apiError) putOff(method string) bool {
	switch e.status {
	case http.StatusTooManyRequests:
		return true
	case http.StatusServiceUnavailable:
		return method == http.MethodGet
	}
	return e.status == http.StatusUnauthorized && e.kind == backend.ErrUnavailable
}

// kinds are what a refusal means if the call knows nothing better. What is not
// here is the cloud's own trouble.
var kinds = map[int]error{
	http.StatusBadRequest: backend.ErrInvalid, http.StatusUnauthorized: backend.ErrAuth, http.StatusForbidden: backend.ErrAuth,
	http.StatusNotFound: backend.ErrNotFound, http.StatusNotAcceptable: backend.ErrUnsupported, http.StatusConflict: backend.ErrPending,
	http.StatusRequestEntityTooLarge: backend.ErrExhausted,
}

func (b *Backend) classify(ctx context.Context, method, url string, err error) error {
	what := method + " " + b.short(url)
	var refused gophercloud.ErrUnexpectedResponseCode
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", what, ctx.Err())
	case errors.As(err, &refused):
	default:
		var again *gophercloud.ErrUnableToReauthenticate
		if errors.As(err, &again) {
			e := &apiError{status: http.StatusUnauthorized, what: what, message: "the token has ended, and Keystone refuses the credentials", kind: backend.ErrAuth}
			// One call renews it for all, in its own time, which may have ended.
			if cause := again.ErrReauth; !gophercloud.ResponseCodeIs(cause, http.StatusUnauthorized) && !gophercloud.ResponseCodeIs(cause, http.StatusForbidden) {
				e.message, e.kind = "the token has ended, and Keystone gives no new one: "+oneLine(cause.Error()), backend.ErrUnavailable
			}
			return e
		}
		return fmt.Errorf("%w: %s: %s", backend.ErrUnavailable, what, oneLine(err.Error()))
	}
	e := &apiError{status: refused.Actual, what: what, kind: kinds[refused.Actual],
		request: refused.ResponseHeader.Get("X-OpenStack-Request-ID")}
	if e.kind == nil {
		e.kind = backend.ErrUnavailable
	}
	if seconds, err := strconv.Atoi(refused.ResponseHeader.Get("Retry-After")); err == nil && seconds >= 0 {
		e.after = time.Duration(seconds) * time.Second
	}
	var fault map[string]struct{ Message string }
	if json.Unmarshal(refused.Body, &fault) == nil {
		for _, f := range fault {
			e.message = oneLine(f.Message)
		}
	} else if e.status == http.StatusNotFound {
		// A proxy's page, or a path that this Manila does not have: no word of the
		// object.
		e.kind = backend.ErrUnavailable
	}
	if e.message == "" {
		e.message = http.StatusText(e.status)
	}
	return e
}

// oneLine makes a message of others fit into ours.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 500 {
		s = strings.ToValidUTF8(s[:500], "") + "..."
	}
	return s
}
