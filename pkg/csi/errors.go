package csi

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/abaca-csi/abaca/pkg/backend"
	"github.com/abaca-csi/abaca/pkg/backup"
	"github.com/abaca-csi/abaca/pkg/mount"
)

// Errors that belong to the protocol and to no layer below.
var (
	// errRange: no size fits the request (OUT_OF_RANGE).
	errRange = errors.New("impossible size")
	// errToken: a listing cannot go on from the token (ABORTED).
	errToken = errors.New("the starting token is not one of ours")
)

// toCode is the one table from errors to gRPC codes (CSI spec 1.13, "Error
// Scheme", and the tables of the RPCs). The first match counts.
var toCode = []struct {
	err  error
	code codes.Code
}{
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{errRange, codes.OutOfRange},
	{errToken, codes.Aborted},
	{backup.ErrFailed, codes.FailedPrecondition},
	{backend.ErrPending, codes.Aborted},
	{backend.ErrUnavailable, codes.Unavailable},
	{backend.ErrInvalid, codes.InvalidArgument},
	{backend.ErrNotFound, codes.NotFound},
	{errOtherNode, codes.FailedPrecondition},
	{backend.ErrConflict, codes.AlreadyExists},
	{backend.ErrInUse, codes.FailedPrecondition},
	{backend.ErrExhausted, codes.ResourceExhausted},
	{backup.ErrPassword, codes.Unauthenticated},
	{mount.ErrInvalid, codes.InvalidArgument},
	{mount.ErrNoSource, codes.NotFound},
	{mount.ErrOther, codes.AlreadyExists},
	{mount.ErrNotMounted, codes.FailedPrecondition},
	{mount.ErrCorrupted, codes.Unavailable},
}

// toStatus turns an error of a handler into what goes over the wire.
func toStatus(method string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err // of gRPC itself, as Unimplemented
	}
	create := strings.Contains(method, "/Create")
	for _, row := range toCode {
		if errors.Is(err, row.err) {
			return status.Error(row.code, err.Error())
		}
	}
	switch {
	case errors.Is(err, backend.ErrUnsupported) && create:
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, backend.ErrUnsupported):
		return status.Error(codes.FailedPrecondition, err.Error())
	case create:
		// The provisioner takes any code but four for "surely not in progress"
		// and forgets a claim that is deleted then, with the share that may be
		// there (external-provisioner, checkError). So what is not understood
		// is not final, nor is ErrAuth: who may not look does not know what an
		// earlier call has made, and may not remove it either.
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, backend.ErrAuth):
		return status.Error(codes.Unauthenticated, err.Error())
	}
	return status.Error(codes.Internal, err.Error())
}

// final says whether an error of a create ends the request: after it the
// orchestrator may never call again, so that nothing must stay behind.
func final(err error) bool {
	switch status.Code(toStatus("/Create", err)) {
	case codes.OK, codes.Canceled, codes.DeadlineExceeded, codes.Aborted, codes.Unavailable:
		return false
	}
	return true
}
