# Abaca. `make` alone lists the targets.

# Git may refuse a tree of another owner, and a build does not depend on it.
VERSION := $(or $(shell git describe --tags --always --dirty 2>/dev/null),dev)
IMAGE   ?= abaca:$(VERSION)
DEMO    ?=

# Without CLOUDS, a Manila of our own.
export ABACA_CACHE ?= /var/cache/abaca
ifeq ($(CLOUDS),)
CLOUDS := $(ABACA_CACHE)/manila/clouds.yaml
CLOUD  ?= lab
TYPE   ?= cephfs
MANILA := manila-up
e2e-manila: CLOUD = lab-restricted
endif

export GOFLAGS := $(strip $(shell go env GOFLAGS 2>/dev/null) -buildvcs=false)
export PATH := $(CURDIR)/bin:$(PATH)

.PHONY: help build test demo demo-manila bench bench-manila lint chart image e2e e2e-manila e2e-nfs manila-up manila-down e2e-faults e2e-kube-manila e2e-conformance kube-up kube-down mutations
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: bin/abaca bin/restic ## build bin/abaca and the pinned bin/restic (2 CPU minutes, once)

test: deps-test bin/restic bin/helm bin/servers bin/promql ## run all tests with the race detector (root; installs what it needs)
	@go build -o bin/report ./test/report
	@bin/report -skips hack/skips.txt -limit $(or $(LIMIT),42m) -- -race -count=1 -p 2 -timeout 40m ./...

demo: deps-demo build ## share, snapshot, backup, change, backup, restore, compare, on the Go source tree (root; DEMO="--keep")
	@bin/abaca demo $(DEMO)

demo-manila: build $(MANILA) ## the same on OpenStack Manila with CephFS (root; its own, or CLOUDS=clouds.yaml CLOUD=name; TYPE=share-type)
	@bin/abaca demo --clouds "$(CLOUDS)" --cloud "$(CLOUD)" --type "$(TYPE)" $(DEMO)

e2e-manila: deps-test bin/restic $(MANILA) ## conformance, csi-sanity and the main job on a real Manila (its own, or CLOUDS=clouds.yaml CLOUD=name; RUN=pattern)
	ABACA_MANILA_CLOUDS="$(abspath $(CLOUDS))" ABACA_MANILA_CLOUD="$(CLOUD)" go test -count=1 -p 1 -timeout 60m -v -run '$(or $(RUN),^TestReal)' ./pkg/backend/manila ./e2e

manila-up: deps-manila-up ## start a real Manila on CephFS here, installed when it is not there yet (root; e2e/manila/README.md)
	@e2e/manila/up

manila-down: ## stop it (WIPE=1: and remove it)
	@e2e/manila/down $(if $(WIPE),--wipe)

bench: deps-demo build ## measure Abaca against plain restic, side by side (root; a while)
	@go run ./test/bench

bench-manila: deps-demo build $(if $(REAL),$(MANILA)) ## the same beside manila-csi: on a simulated Manila, its own (REAL=1) or CLOUDS=… CLOUD=name TYPE=share-type (20 minutes; AT=1,8,16)
	@go run ./test/bench -only manila $(if $(if $(MANILA),$(REAL),1),-clouds "$(CLOUDS)" -cloud "$(CLOUD)" -type "$(TYPE)") $(if $(AT),-at $(AT))

lint: ## gofmt, go vet, staticcheck, go mod tidy: all clean
	@hack/lint

chart: bin/helm ## render deploy/kustomize from the chart (2 minutes for helm, once)
	@bin/helm lint --quiet --values deploy/kustomize/embedded/values.yaml deploy/charts/abaca
	@for k in embedded manila; do \
		bin/helm template abaca deploy/charts/abaca --namespace abaca-system --api-versions snapshot.storage.k8s.io/v1 \
			--values deploy/kustomize/$$k/values.yaml >deploy/kustomize/$$k/abaca.yaml.new && \
		mv deploy/kustomize/$$k/abaca.yaml.new deploy/kustomize/$$k/abaca.yaml || exit 1; \
	done

image: ## build the container image (docker or podman; IMAGE=name:tag)
	@hack/image $(IMAGE) $(VERSION)

mutations: deps-test bin/restic ## break the code once a promise, and see the tests go red (root; a quarter of an hour)
	@go run ./test/mutations

# Built here, run there: to compile in such a machine takes for ever.
e2e-nfs: deps-e2e-nfs bin/restic ## mount NFS, CIFS and CephFS, and back up, with a kernel that can, in User-mode Linux (root; 5 to 10 minutes)
	@go vet -tags servers ./pkg/mount ./pkg/mover
	@CGO_ENABLED=0 go test -c -tags servers -o bin/ ./pkg/mount ./pkg/mover
	@e2e/vm/run -t 240 e2e/vm/servers bin/mount.test -test.v -test.run '^Test(NFS|CIFS)'
	@e2e/vm/run -t 400 e2e/vm/servers env ABACA_RESTIC=bin/restic bin/mover.test -test.v -test.run '^Test(NFS|CIFS)'
	@e2e/vm/run -t 300 e2e/vm/ceph bin/mount.test -test.v -test.run '^TestCephFS$$'

e2e: kube-up bin/servers ## install the chart on a real Kubernetes and do the main job there, with real pods; on a real Manila too, if that is up (RUN=pattern)
	ABACA_KUBE="$(ABACA_CACHE)/kube" go test -count=1 -timeout 90m -v -run '$(or $(RUN),^Test(Examples|MainJob)$$)' ./e2e/kube
	@! kill -0 $$(cut -d' ' -f1 "$(ABACA_CACHE)/manila/pid" 2>/dev/null) 2>/dev/null || $(MAKE) e2e-kube-manila

e2e-faults: ## the same, with upgrades, faults, bad input, and users who try what they may not (about 45 minutes)
	@$(MAKE) e2e RUN='^Test(Examples|MainJob|Upgrade|Kustomize|Movers|Faults|Events|Tenancy)$$$$'

e2e-kube-manila: kube-up manila-up ## the same with CephFS shares of a real Manila, which it starts
	ABACA_KUBE="$(ABACA_CACHE)/kube" ABACA_MANILA_CLOUDS="$(ABACA_CACHE)/manila/clouds.yaml" ABACA_MANILA_CLOUD=lab \
		go test -count=1 -timeout 30m -v -run '^TestManila$$' ./e2e/kube

e2e-conformance: kube-up ## run Kubernetes' own tests of storage drivers there (7 CPU minutes to build, once; FOCUS=pattern)
	@e2e/kube/conformance
	ABACA_KUBE="$(ABACA_CACHE)/kube" ABACA_KUBE_FOCUS="$(FOCUS)" go test -count=1 -timeout 60m -v -run ^TestConformance ./e2e/kube

kube-up: deps-kube-up build ## start a Kubernetes of one node here, with images of this tree (root; e2e/kube/README.md; NODES=2)
	@e2e/kube/up

kube-down: ## stop it (WIPE=1: and remove what was built for it)
	@e2e/kube/down $(if $(WIPE),--wipe)

.PHONY: deps-build deps-test deps-demo deps-e2e-nfs deps-manila-up deps-kube-up bin/abaca bin/restic bin/helm bin/servers bin/promql
deps-build deps-test deps-demo deps-e2e-nfs deps-manila-up deps-kube-up: deps-%:
	@hack/deps $*

bin/abaca: deps-build
	@echo "building bin/abaca $(VERSION)"
	@go build -ldflags '-X main.version=$(VERSION)' -o $@ ./cmd/abaca

bin/restic: deps-build
	@hack/tool . github.com/restic/restic/cmd/restic

# From modules of their own: the driver depends on nothing of them.
bin/helm: deps-build
	@hack/tool hack/helm helm.sh/helm/v4/cmd/helm

bin/servers: deps-build
	@hack/tool hack/servers github.com/restic/rest-server/cmd/rest-server github.com/versity/versitygw/cmd/versitygw

# Prometheus' parser and engine, for the alerts and the dashboard; of a module of its own too.
bin/promql: deps-build
	@go build -C hack/promql -o $(CURDIR)/$@ .
