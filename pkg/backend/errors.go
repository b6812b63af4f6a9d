package backend

import "errors"

// The sentinels that errors of this package's contract wrap. Callers test them
// with errors.Is; package csi turns them into gRPC codes.
var (
	// ErrInvalid: the request can never succeed as it is.
	ErrInvalid = errors.New("invalid request")
	// ErrNotFound: the object does not exist.
	ErrNotFound = errors.New("not found")
	// ErrConflict: the name is taken by an object that does not fit the request.
	ErrConflict = errors.New("already exists and does not fit")
	// ErrInUse: somebody still holds the object.
	ErrInUse = errors.New("in use")
	// ErrExhausted: no room, no quota, or no place that fits.
	ErrExhausted = errors.New("out of room")
	// ErrUnsupported: this share or storage system cannot do that.
	ErrUnsupported = errors.New("not supported")
	// ErrPending: the work goes on; call again to see how it ends.
	ErrPending = errors.New("still in progress")
	// ErrUnavailable: the storage system cannot be reached or is not ready.
	ErrUnavailable = errors.New("unavailable")
	// ErrAuth: the storage system refused the credentials.
	ErrAuth = errors.New("not authorised")
)
