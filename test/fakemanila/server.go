// Package fakemanila is a simulator of OpenStack Manila's v2 API, with as much of
// Keystone as a client needs, for fast tests. It keeps state, takes its time for
// what Manila does in the background, refuses what Manila refuses in Manila's
// own form, and fails where a test says so.
//
// What it answers was compared with Manila 20.0.0 (2025.1). Where the two differ,
// this one is wrong.
package fakemanila

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Options say what cloud this is.
type Options struct {
	// Microversion is the highest that the API speaks; empty is 2.89.
	Microversion string
	// Claimed is the one that its list of versions tells; empty is the same.
	Claimed string
	// Delay is how long a transition in the background takes; nil is none.
	Delay func() time.Duration
	// Dir is where the contents of shares are; empty for nowhere.
	Dir string
	// MaxLimit is how many objects a listing has at most (osapi_max_limit); 0 is 1000.
	MaxLimit int
	// Gigabytes and PerShare are quotas; 0 is 1000 and none.
	Gigabytes, PerShare int
	// Protocol is what the shares of the default type speak; empty is CEPHFS.
	Protocol string
	// Listener is where it listens; nil is a port of the loopback.
	Listener net.Listener
	// Refuse returns the detail of the message when the back end cannot let a
	// client in at a level, and empty when it can; nil is always.
	Refuse func(to, level string) string
	// Full says of a zone that no share has room there; nil is of none.
	Full func(zone string) bool
	// Instances lets members see the instances of snapshots, which Manila's own
	// policy shows to administrators alone.
	Instances bool
	// Administrator has the export locations shown that members do not see.
	Administrator bool
	// TLS is how it is spoken to; nil is without.
	TLS *tls.Config
}

// The project's credentials.
const (
	User, Password                     = "csi", "geheim"
	ApplicationCredential, Application = "app-credential", "app-geheim"
	Trustee, Trust                     = "trustee", "trust-of-csi" // with the same password
	project                            = "44e03198ad9544fd8363d938d0dec501"
)

// Server is a running simulator.
type Server struct {
	o    Options
	http *httptest.Server

	mu        sync.Mutex
	tokens    map[string]time.Time // and when they end
	shares    map[string]*Share
	snapshots map[string]*Snapshot
	rules     map[string]*Rule
	types     []*Type
	messages  []*message
	locks     map[string]string // reasons, by share
	pending   []transition
	faults    []*Fault
	changes   int // that were asked for
	strike    func(change int, after bool) bool
	between   func()
	requests  []Request
}

// transition is what happens to an object in the background.
type transition struct {
	due time.Time
	do  func()
}

// New starts a cloud with the share types cephfs (the default), cephfs-nosnap,
// mountable (NFS, whose snapshots can be mounted) and nowhere (which no back end
// serves).
func New(o Options) *Server {
	if o.Microversion == "" {
		o.Microversion = "2.89"
	}
	if o.Claimed == "" {
		o.Claimed = o.Microversion
	}
	if o.Delay == nil {
		o.Delay = func() time.Duration { return 0 }
	}
	if o.Gigabytes == 0 {
		o.Gigabytes = 1000
	}
	if o.MaxLimit == 0 {
		o.MaxLimit = 1000
	}
	if o.PerShare == 0 {
		o.PerShare = -1
	}
	if o.Protocol == "" {
		o.Protocol = "CEPHFS"
	}
	s := &Server{o: o, tokens: map[string]time.Time{}, shares: map[string]*Share{}, snapshots: map[string]*Snapshot{},
		rules: map[string]*Rule{}, locks: map[string]string{}}
	both := map[string]any{"snapshot_support": "True", "create_share_from_snapshot_support": "True"}
	s.types = []*Type{
		{ID: newID(), Name: "cephfs", Default: true, Specs: both},
		{ID: newID(), Name: "cephfs-nosnap", Specs: map[string]any{}},
		{ID: newID(), Name: "mountable", Specs: map[string]any{"snapshot_support": "True", "create_share_from_snapshot_support": "True", "mount_snapshot_support": "True"}},
		{ID: newID(), Name: "nowhere", Specs: both},
	}
	s.http = httptest.NewUnstartedServer(s)
	if o.Listener != nil {
		s.http.Listener.Close()
		s.http.Listener = o.Listener
	}
	if s.http.TLS = o.TLS; o.TLS != nil {
		s.http.StartTLS()
	} else {
		s.http.Start()
	}
	return s
}

// URL is where Keystone is: the auth_url of a clouds.yaml.
func (s *Server) URL() string { return s.http.URL + "/v3" }

// Close ends the cloud.
func (s *Server) Close() { s.http.Close() }

// Clouds is a clouds.yaml with the clouds "fake", "app" and "trust".
func (s *Server) Clouds() string {
	return fmt.Sprintf(`clouds:
  fake:
    auth: {auth_url: %q, username: %s, password: %s, project_name: csi, user_domain_name: Default, project_domain_name: Default}
    region_name: RegionOne
  app:
    auth_type: v3applicationcredential
    auth: {auth_url: %q, application_credential_id: %s, application_credential_secret: %s}
    region_name: RegionOne
  trust:
    auth: {auth_url: %q, username: %s, password: %s, user_domain_name: Default, trust_id: %s}
    region_name: RegionOne
`, s.URL(), User, Password, s.URL(), ApplicationCredential, Application, s.URL(), Trustee, Password, Trust)
}

func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	x := hex.EncodeToString(b[:])
	return x[:8] + "-" + x[8:12] + "-" + x[12:16] + "-" + x[16:20] + "-" + x[20:]
}

// call is one request in the middle of its answer.
type call struct {
	*Server
	r    *http.Request
	body map[string]any
	path []string // behind /v2
	mv   [2]int
	// What the path names, where it begins with shares/* or snapshots/*.
	share    *Share
	snapshot *Snapshot
}

// answer is a status and what goes with it: an object, or nothing.
type answer struct {
	code int
	body any
}

// refuse is an answer in the form of Manila's faults.
func refuse(code int, format string, args ...any) answer {
	kind := map[int]string{400: "badRequest", 401: "unauthorized", 403: "forbidden", 404: "itemNotFound", 406: "computeFault", 409: "conflictingRequest", 413: "overLimit"}[code]
	fault := map[string]any{"code": code, "message": fmt.Sprintf(format, args...)}
	if code == 413 {
		fault["retryAfter"] = "0"
	}
	return answer{code, map[string]any{kind: fault}}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{Server: s, r: r}
	text, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	_ = json.Unmarshal(text, &c.body)
	version := r.Header.Get("X-OpenStack-Manila-API-Version")

	s.mu.Lock()
	fault := s.fault(r, string(text))
	s.mu.Unlock()
	// putOff waits, and says whether the client does too.
	putOff := func(after bool) bool {
		if fault == nil || fault.Delay == 0 || fault.After != after {
			return true
		}
		select {
		case <-r.Context().Done():
			return false
		case <-time.After(fault.Delay):
			return true
		}
	}
	if !putOff(false) {
		return
	}
	if fault != nil && fault.Expire {
		s.ExpireTokens()
	}
	change, strike := 0, (func(int, bool) bool)(nil)
	if r.Method != http.MethodGet && strings.HasPrefix(r.URL.Path, "/v2/") {
		s.mu.Lock()
		s.changes++
		change, strike = s.changes, s.strike
		s.mu.Unlock()
	}
	if strike != nil && strike(change, false) {
		panic(http.ErrAbortHandler)
	}
	var a answer
	switch {
	case fault != nil && fault.Cut && !fault.After:
		panic(http.ErrAbortHandler)
	case fault != nil && fault.Status != 0 && !fault.After:
		a = answer{fault.Status, fault.Text}
	default:
		s.mu.Lock()
		a = c.answer(version)
		if token, ok := a.body.(tokenBody); ok {
			w.Header().Set("X-Subject-Token", token.id)
			a.body = token.body
		}
		if _, page := a.body.(string); a.body != nil && !page { // while nobody changes what it is of
			b, err := json.Marshal(a.body)
			if err != nil {
				panic(err)
			}
			a.body = json.RawMessage(b)
		}
		s.mu.Unlock()
	}
	if strike != nil && strike(change, true) {
		panic(http.ErrAbortHandler)
	}
	if !putOff(true) {
		return
	}
	if fault != nil && fault.After && fault.Cut {
		panic(http.ErrAbortHandler)
	}
	if fault != nil && fault.After && fault.Status != 0 {
		a = answer{fault.Status, fault.Text}
	}
	s.mu.Lock()
	s.requests = append(s.requests, Request{r.Method, r.URL.Path, version, a.code})
	s.mu.Unlock()
	if fault != nil {
		for k, v := range fault.Header {
			w.Header().Set(k, v)
		}
	}
	w.Header().Set("X-OpenStack-Request-ID", "req-"+newID())
	if text, ok := a.body.(string); ok {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(a.code)
		fmt.Fprint(w, text)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(a.code)
	if b, ok := a.body.(json.RawMessage); ok {
		_, _ = w.Write(b)
	}
}

// later lets something happen in the background.
func (s *Server) later(do func()) {
	s.pending = append(s.pending, transition{time.Now().Add(s.o.Delay()), do})
}

// advance lets happen what is due.
func (s *Server) advance() {
	for i := 0; i < len(s.pending); {
		if t := s.pending[i]; !time.Now().Before(t.due) {
			s.pending = slices.Delete(s.pending, i, i+1)
			t.do()
			i = 0
			continue
		}
		i++
	}
}

type tokenBody struct {
	id   string
	body any
}

func (c *call) versions() any {
	return map[string]any{"versions": []any{map[string]any{"id": "v2.0", "status": "CURRENT", "version": c.o.Claimed,
		"min_version": "2.0", "links": []any{map[string]any{"rel": "self", "href": c.http.URL + "/v2/"}}}}}
}

func (c *call) answer(version string) answer {
	c.advance()
	path := strings.Trim(c.r.URL.Path, "/")
	switch {
	case path == "v3/auth/tokens" && c.r.Method == http.MethodPost:
		return c.token()
	case path == "":
		return answer{300, c.versions()}
	}
	rest, ok := strings.CutPrefix(path+"/", "v2/")
	rest = strings.TrimSuffix(rest, "/")
	if !ok {
		return answer{404, "<html>\n <head>\n  <title>404 Not Found</title>\n </head>\n</html>\n"}
	}
	if end, known := c.tokens[c.r.Header.Get("X-Auth-Token")]; !known || time.Now().After(end) {
		return refuse(401, "The request you have made requires authentication.")
	} else if rest == "" {
		return answer{200, c.versions()}
	}
	if version == "" {
		version = "2.0"
	}
	c.mv = parseVersion(version)
	if least, most := [2]int{2, 0}, parseVersion(c.o.Microversion); slices.Compare(c.mv[:], least[:]) < 0 || slices.Compare(c.mv[:], most[:]) > 0 {
		return refuse(406, "Version %s is not supported by the API. Minimum is 2.0 and maximum is %s.", version, c.o.Microversion)
	}
	c.path = strings.Split(rest, "/")
	for _, route := range routes {
		if route.method != c.r.Method || !c.matches(route.pattern) || !c.since(route.since) {
			continue
		}
		if strings.HasPrefix(route.pattern, "shares/*") {
			if c.share = c.shares[c.path[1]]; c.share == nil {
				break
			}
		}
		if strings.HasPrefix(route.pattern, "snapshots/*") {
			if c.snapshot = c.snapshots[c.path[1]]; c.snapshot == nil {
				return refuse(404, "Snapshot %s could not be found.", c.path[1])
			}
		}
		return route.do(c)
	}
	return refuse(404, "The resource could not be found.")
}

func parseVersion(v string) [2]int {
	major, minor, _ := strings.Cut(v, ".")
	a, _ := strconv.Atoi(major)
	b, _ := strconv.Atoi(minor)
	return [2]int{a, b}
}

func (c *call) since(minor int) bool { return c.mv[1] >= minor }

// matches compares the path with a pattern whose elements may be "*".
func (c *call) matches(pattern string) bool {
	elements := strings.Split(pattern, "/")
	return slices.EqualFunc(elements, c.path, func(e, at string) bool { return e == "*" || e == at })
}

// token signs in by password, also of a trustee, or by application credential. Without a
// scope the token is of no project, and has no catalog.
func (c *call) token() answer {
	text, _ := json.Marshal(c.body)
	var req struct {
		Auth struct {
			Identity struct {
				Methods  []string
				Password struct {
					User struct{ Name, Password string }
				}
				App struct{ ID, Secret string } `json:"application_credential"`
			}
			Scope struct {
				Project map[string]any
				Trust   struct{ ID string } `json:"OS-TRUST:trust"`
			}
		}
	}
	if json.Unmarshal(text, &req) != nil {
		return refuse(400, "Expecting to find auth in request.")
	}
	id, scope, scoped := req.Auth.Identity, req.Auth.Scope, true
	switch {
	case slices.Contains(id.Methods, "password") && id.Password.User.Name == User && id.Password.User.Password == Password && scope.Trust.ID == "":
		scoped = scope.Project != nil
	case slices.Contains(id.Methods, "password") && id.Password.User.Name == Trustee && id.Password.User.Password == Password && scope.Trust.ID == Trust:
	case slices.Contains(id.Methods, "application_credential") && id.App.ID == ApplicationCredential && id.App.Secret == Application:
	default:
		return refuse(401, "The request you have made requires authentication.")
	}
	token := newID()
	end := time.Now().Add(time.Hour)
	c.tokens[token] = end
	endpoint := func(url string) map[string]any {
		return map[string]any{"id": newID(), "interface": "public", "region": "RegionOne", "region_id": "RegionOne", "url": url}
	}
	body := map[string]any{
		"expires_at": end.UTC().Format("2006-01-02T15:04:05.000000Z"), "issued_at": time.Now().UTC().Format("2006-01-02T15:04:05.000000Z"),
		"methods": id.Methods, "user": map[string]any{"id": "u1", "name": User, "domain": map[string]any{"id": "default", "name": "Default"}},
	}
	if scoped {
		maps.Copy(body, map[string]any{
			"project": map[string]any{"id": project, "name": "csi", "domain": map[string]any{"id": "default", "name": "Default"}},
			"roles":   []any{map[string]any{"id": "r1", "name": "member"}},
			"catalog": []any{
				map[string]any{"id": newID(), "name": "manila", "type": "share", "endpoints": []any{endpoint(c.http.URL + "/v1/" + project)}},
				map[string]any{"id": newID(), "name": "manilav2", "type": "sharev2", "endpoints": []any{endpoint(c.http.URL + "/v2")}},
			},
		})
	}
	return answer{201, tokenBody{token, map[string]any{"token": body}}}
}

// asks says whether the query wants objects with a value of a field, or does not name
// the field.
func (c *call) asks(field, value string) bool {
	want := c.r.URL.Query().Get(field)
	return want == "" || want == value
}

// page answers with the part of a list that limit and offset ask for, and with how
// many there are if the call, since a minor version, wants to know. A next page is
// named only where the limit was asked for that the page has (manila/api/common.py).
func (c *call) page(name string, all []any, counts int) answer {
	q := c.r.URL.Query()
	body := map[string]any{}
	if c.since(counts) && q.Get("with_count") == "true" {
		body["count"] = len(all)
	}
	if offset, err := strconv.Atoi(q.Get("offset")); err == nil {
		all = all[min(len(all), max(0, offset)):]
	}
	limit, err := strconv.Atoi(q.Get("limit"))
	if err == nil && limit >= 0 {
		all = all[:min(len(all), limit)]
	}
	body[name] = all[:min(len(all), c.o.MaxLimit)]
	if err == nil && limit > 0 && limit == len(body[name].([]any)) {
		body[name+"_links"] = []any{map[string]any{"rel": "next", "href": c.http.URL + "/v2/" + project + "/" + name}}
	}
	return answer{200, body}
}

// never is a minor version that no cloud has.
const never = 1 << 30
