package csi

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mount"
)

func TestStatusTable(t *testing.T) {
	const create, other = "/csi.v1.Controller/CreateVolume", "/csi.v1.Node/NodeStageVolume"
	for _, c := range []struct {
		method string
		err    error
		want   codes.Code
	}{
		{create, context.Canceled, codes.Canceled},
		{create, context.DeadlineExceeded, codes.DeadlineExceeded},
		{create, backend.ErrPending, codes.Aborted},
		{create, backend.ErrUnavailable, codes.Unavailable},
		{create, backend.ErrInvalid, codes.InvalidArgument},
		{create, backend.ErrUnsupported, codes.InvalidArgument},
		{other, backend.ErrUnsupported, codes.FailedPrecondition},
		{other, backend.ErrNotFound, codes.NotFound},
		{create, backend.ErrConflict, codes.AlreadyExists},
		{other, backend.ErrInUse, codes.FailedPrecondition},
		{create, backend.ErrExhausted, codes.ResourceExhausted},
		{create, backup.ErrPassword, codes.Unauthenticated},
		// Of a create that is not allowed to look it says nothing of what is there.
		{create, backend.ErrAuth, codes.Unavailable},
		{other, backend.ErrAuth, codes.Unauthenticated},
		{create, errRange, codes.OutOfRange},
		{create, backup.ErrFailed, codes.FailedPrecondition},
		{other, mount.ErrOther, codes.AlreadyExists},
		{other, mount.ErrCorrupted, codes.Unavailable},
		// An unknown error of a create must not look final.
		{create, errors.New("the disk made a noise"), codes.Unavailable},
		{other, errors.New("the disk made a noise"), codes.Internal},
		// The deadline outranks what it made go wrong.
		{create, fmt.Errorf("%w: %w", backend.ErrInvalid, context.DeadlineExceeded), codes.DeadlineExceeded},
		{create, status.Error(codes.Unimplemented, "x"), codes.Unimplemented},
	} {
		err := toStatus(c.method, fmt.Errorf("while at it: %w", c.err))
		if _, plain := status.FromError(c.err); plain {
			err = toStatus(c.method, c.err)
		}
		if status.Code(err) != c.want {
			t.Errorf("%s: %v became %v, want %v", c.method, c.err, status.Code(err), c.want)
		}
	}
	if toStatus(create, nil) != nil {
		t.Error("success became an error")
	}
}
