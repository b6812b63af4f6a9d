package main

import (
	"fmt"
	"strings"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/transport"

	"github.com/abaca-csi/abaca/pkg/backend/manila"
	"github.com/abaca-csi/abaca/pkg/keys"
	"github.com/abaca-csi/abaca/pkg/mount"
)

// keysHelp says what --keys may be.
const keysHelp = "where the access keys of shares are kept: a directory, or secret:NAMESPACE/NAME in the cluster that this runs in"

// openKeys opens the access-key store that --keys names, for those who keep keys.
func openKeys(where string, hear transport.WrapperFunc) (manila.Keys, error) {
	if s, err := keySecret(where, hear); s != nil || err != nil {
		return s, err
	}
	return keys.Open(where)
}

// keyReader is for those who only mount.
func keyReader(where string, hear transport.WrapperFunc) (mount.Options, error) {
	s, err := keySecret(where, hear)
	if s == nil || err != nil {
		return mount.Options{Keys: where}, err
	}
	return mount.Options{Key: s.Key}, nil
}

// keySecret is nil if a directory is named.
func keySecret(where string, hear transport.WrapperFunc) (*keys.Secret, error) {
	text, ok := strings.CutPrefix(where, "secret:")
	if !ok {
		return nil, nil
	}
	namespace, name, ok := strings.Cut(text, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return nil, fmt.Errorf("--keys %s must be a directory or secret:NAMESPACE/NAME", where)
	}
	client, err := inCluster(hear)
	if err != nil {
		return nil, fmt.Errorf("--keys %s: %w", where, err)
	}
	return &keys.Secret{Client: client, Namespace: namespace, Name: name}, nil
}

// inCluster returns a client of the cluster that this runs in. hear gets to know of each
// request, or is nil.
func inCluster(hear transport.WrapperFunc) (kubernetes.Interface, error) {
	config, err := clusterConfig(hear)
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

func clusterConfig(hear transport.WrapperFunc) (*rest.Config, error) {
	config, err := rest.InClusterConfig()
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 50, 100
	config.Wrap(hear)
	return config, nil
}
