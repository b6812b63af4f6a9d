package manila

// state is what a status of Manila's means to us (manila/common/constants.py). A
// status that is not known is one that passes.
type state int

const (
	passing state = iota // something is being done to it
	usable               // nothing is
	failed
)

var states = map[string]state{
	"available": usable, "inactive": usable,
	"error": failed, "error_deleting": failed, "extending_error": failed, "shrinking_error": failed,
	"shrinking_possible_data_loss_error": failed, "reverting_error": failed, "manage_error": failed, "unmanage_error": failed,
	"error_deferred_deleting": failed, "manage_error_unmanage_starting": failed, "backup_restoring_error": failed,
}

func stateOf(status string) state { return states[status] }
