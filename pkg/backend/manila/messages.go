package manila

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/abaca-csi/abaca/pkg/backend"
)

// message is what Manila tells a user about something that has failed.
type message struct {
	Action  string `json:"action_id"`
	Detail  string `json:"detail_id"`
	Level   string `json:"message_level"`
	Text    string `json:"user_message"`
	Created stamp  `json:"created_at"`
}

// clockSkew is how far Manila's clocks may be from ours.
const clockSkew = time.Minute

// complaint returns the newest error message about an object that is of the actions
// and not from before a time; empty when there is none, or it cannot be had: it only
// explains.
func (b *Backend) complaint(ctx context.Context, id string, since time.Time, actions ...string) message {
	all, _ := listing[message](ctx, b, "messages?limit=20&sort_key=created_at&sort_dir=desc&resource_id="+url.QueryEscape(id), "messages")
	newest := message{}
	for _, m := range all {
		if m.Level == "ERROR" && slices.Contains(actions, m.Action) && m.Created.After(since.Add(-clockSkew)) && !m.Created.Before(newest.Created.Time) {
			newest = m
		}
	}
	return newest
}

// The actions that messages are of (manila/message/message_field.py).
var (
	creating  = []string{"001", "002"} // allocate host, create
	deleting  = []string{"003", "007"} // delete access rules, delete
	extending = []string{"008"}
	ruling    = []string{"003", "010"} // delete, update access rules
)

// A detail is what a user message's detail_id means for the request that led to
// it (manila/message/message_field.py), and what can be done about it.
type detail struct {
	kind error
	hint string
}

var details = map[string]detail{
	"002": {backend.ErrExhausted, "no back end can take the share"},
	"003": {backend.ErrInvalid, "the share type wants no share network: remove shareNetworkID from the class"},
	"004": {backend.ErrExhausted, "no share server could be had for the share network"},
	"005": {backend.ErrUnavailable, "the share has no active replica: an administrator has to look"},
	"006": {backend.ErrUnavailable, "the share has no active replica: an administrator has to look"},
	"007": {backend.ErrExhausted, "no back end of the availability zone can take the share"},
	"008": {backend.ErrInvalid, "no back end has what the share type's extra specs ask for"},
	"009": {backend.ErrExhausted, "no back end has room for the share"},
	"010": {backend.ErrExhausted, "no back end can take the share"},
	"011": {backend.ErrExhausted, "no back end can take the share"},
	"012": {backend.ErrExhausted, "no back end can take the share"},
	"013": {backend.ErrExhausted, "no back end can take the share: all have been tried"},
	"014": {backend.ErrInvalid, "no back end has the replication that the share type asks for"},
	"015": {backend.ErrUnsupported, "the back end could not extend the share: an administrator has to look"},
	"016": {backend.ErrExhausted, "no back end can make a share from the snapshot"},
	"017": {backend.ErrUnavailable, "the back end could not make the share from the snapshot"},
	"018": {backend.ErrInvalid, "more is stored in the share than the size that was asked for"},
	"019": {backend.ErrUnsupported, "the back end could not shrink the share: an administrator has to look"},
	"020": {backend.ErrInvalid, "the back end does not allow the client"},
	"021": {backend.ErrUnsupported, "the back end does not know this kind or level of access"},
	"022": {backend.ErrUnsupported, "a security service of the share network fails"},
	"023": {backend.ErrUnsupported, "a security service of the share network fails"},
	"024": {backend.ErrInvalid, "there is no default share type: name one with the parameter type"},
	"025": {backend.ErrInvalid, "the share network has no security service"},
	"026": {backend.ErrUnsupported, "a share that is handed over must have no access rules"},
	"027": {backend.ErrExhausted, "the quota of ports in Neutron is used up"},
	"028": {backend.ErrUnavailable, "the back end is not ready yet"},
	"033": {backend.ErrExhausted, "the subnet of the share network has no free address"},
}

// why is the error of an object that Manila could not make or change.
func why(what string, m message) error {
	d, ok := details[strings.TrimSpace(m.Detail)]
	if !ok {
		d = detail{backend.ErrUnavailable, "see `openstack share message list`"}
	}
	text := m.Text
	if text == "" {
		text = "Manila gives no reason"
	}
	return fmt.Errorf("%w: %s: %s (%s)", d.kind, what, oneLine(text), d.hint)
}
