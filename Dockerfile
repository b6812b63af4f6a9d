# Both binaries, from the versions that go.mod pins.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download github.com/restic/restic
ENV CGO_ENABLED=0
# A layer of its own: restic changes with its pin only.
RUN go build -trimpath -o /out/restic github.com/restic/restic/cmd/restic
COPY . .
ARG VERSION=dev
RUN go build -trimpath -buildvcs=false -ldflags "-X main.version=$VERSION" -o /out/abaca ./cmd/abaca

FROM debian:bookworm-slim
# btrfs-progs      the embedded backend
# mount            mount, umount, losetup: bind mounts and the backend's image
# kmod             modprobe, for a node whose btrfs, loop or nfs is a module
# nfs-common       mount.nfs                    (Manila: NFS)
# ceph-common      mount.ceph, the kernel client (Manila: CephFS)
# ceph-fuse        CephFS on kernels without it  (Manila: CephFS)
# cifs-utils       mount.cifs                   (Manila: CIFS)
# fuse3            fusermount3: backup volumes are served by restic mount
# openssh-client   ssh: restic's sftp repositories
# ca-certificates  TLS: restic's S3, REST, Azure, GCS, B2 and Swift repositories
# tini             PID 1: reaps mount helpers that outlive their call
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      btrfs-progs mount kmod nfs-common ceph-common ceph-fuse cifs-utils fuse3 openssh-client ca-certificates tini \
 && rm -rf /var/lib/apt/lists/*
COPY LICENSE /usr/share/doc/abaca/
COPY --from=build /out/abaca /out/restic /usr/local/bin/
# Root: mounting needs CAP_SYS_ADMIN, and owners are kept in backups.
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/abaca"]
