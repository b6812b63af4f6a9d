// Package tools is what Kubernetes needs to be tested: `go test -c` of its tests.
package tools

import _ "k8s.io/kubernetes/test/e2e"
