// Package csi is the gRPC surface of Abaca: the Identity, Controller and Node
// services of the Container Storage Interface, v1.13. It is the only package
// that knows gRPC codes; package backend knows shares, package backup backups,
// package mount the node.
package csi
