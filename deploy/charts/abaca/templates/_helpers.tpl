{{- define "abaca.name" -}}
{{- if contains "abaca" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-abaca" (.Release.Name | trunc 34 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "abaca.driver" -}}abaca-csi.github.io{{- end }}

{{- define "abaca.labels" -}}
{{ include "abaca.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: abaca
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end }}

{{- define "abaca.selector" -}}
app.kubernetes.io/name: abaca
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "abaca.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* A text as the name of a CronJob: with a digest where it had to be changed. */}}
{{- define "abaca.jobName" -}}
{{- $name := . | replace "." "-" | replace "_" "-" }}
{{- if and (eq $name .) (le (len $name) 52) }}{{ $name }}
{{- else }}{{ printf "%s-%s" ($name | trunc 45 | trimSuffix "-") (sha256sum . | trunc 6) }}{{ end }}
{{- end }}

{{/* "true" if there is a backend of Manila. */}}
{{- define "abaca.manila" -}}
{{- range .Values.backends }}{{ if .manila }}true{{ break }}{{ end }}{{ end }}
{{- end }}

{{/* The node of the embedded backends, or empty. Fails on what no schema can say. */}}
{{- define "abaca.localNode" -}}
{{- $nodes := list }}
{{- range .Values.backends }}{{ if .local }}{{ $nodes = append $nodes .local.node | uniq }}{{ end }}{{ end }}
{{- if and $nodes (include "abaca.manila" .) }}
{{- fail "backends: local and manila together are not possible yet: the nodes of one have no use for the other" }}
{{- end }}
{{- if gt (len $nodes) 1 }}
{{- fail (printf "backends: all local backends must be on one node, but these are on %s" (join ", " $nodes)) }}
{{- end }}
{{- if and $nodes .Values.state.existingClaim }}
{{- fail "state.existingClaim: the state of a local backend is where its volumes are; leave it empty" }}
{{- end }}
{{- first $nodes | default "" }}
{{- end }}

{{- define "abaca.attach" -}}
{{- if kindIs "bool" .Values.csiDriver.attachRequired }}{{ if .Values.csiDriver.attachRequired }}true{{ end }}
{{- if and (not .Values.csiDriver.attachRequired) (include "abaca.manila" .) }}
{{- fail "csiDriver.attachRequired: Manila lets a node in when a volume is attached to it; it must be true or null" }}
{{- end }}
{{- else }}{{ include "abaca.manila" . }}{{ end }}
{{- end }}

{{/* "true" if there are backups: of the administrator's, or of namespaces' own. */}}
{{- define "abaca.backups" -}}
{{- if or .Values.repositories .Values.repositoryNamespaces }}true{{ end }}
{{- end }}

{{- define "abaca.hostNetwork" -}}
{{- if .Values.controller.hostNetwork }}true{{ end }}
{{- end }}

{{/* How many controllers. */}}
{{- define "abaca.replicas" -}}
{{- $n := .Values.controller.replicas }}
{{- $shared := or (not .Values.state.existingClaim) .Values.state.existingClaimShared }}
{{- if kindIs "invalid" $n }}
{{- $n = ternary 2 1 (and (eq (include "abaca.manila" .) "true") (not (include "abaca.hostNetwork" .)) $shared) }}
{{- end }}
{{- if and (gt (int $n) 1) (not $shared) }}
{{- fail "controller.replicas: several on several nodes need a state.existingClaim of ReadWriteMany; set state.existingClaimShared if it is, or replicas to 1" }}
{{- end }}
{{- int $n }}
{{- end }}

{{/* "true" if others may read the controller's metrics. */}}
{{- define "abaca.metrics" -}}
{{- if kindIs "bool" .Values.controller.metrics.enabled }}{{ if .Values.controller.metrics.enabled }}true{{ end }}
{{- else if and .Values.monitoring.serviceMonitor.enabled (not (include "abaca.hostNetwork" .)) }}true{{ end }}
{{- end }}

{{/* The directories of local backends other than state.hostPath, as JSON. */}}
{{- define "abaca.localPaths" -}}
{{- $paths := list }}
{{- range .Values.backends }}{{ if .local }}
{{- $path := .local.path | default $.Values.state.hostPath }}
{{- if ne $path $.Values.state.hostPath }}{{ $paths = append $paths $path | uniq }}{{ end }}
{{- end }}{{ end }}
{{- toJson $paths }}
{{- end }}

{{- define "abaca.config" -}}
backends:
{{- range .Values.backends }}
- name: {{ .name }}
  {{- with .local }}
  local:
    path: {{ .path | default $.Values.state.hostPath | quote }}
    {{- with .size }}
    size: {{ . | quote }}
    {{- end }}
  {{- end }}
  {{- if .manila }}
  manila:
    clouds: /etc/abaca/clouds/{{ .name }}/clouds.yaml
    cloud: {{ .manila.cloud | quote }}
    instance: {{ .manila.instance | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What a container that is no mount helper may do: nothing. */}}
{{- define "abaca.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* The controller's sidecars reach the socket by the pod's group. */}}
{{- define "abaca.unprivileged" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
{{ include "abaca.restricted" . }}
{{- end }}

{{/* Flags of all sidecars that speak to the Kubernetes API. */}}
{{- define "abaca.sidecarArgs" -}}
- --csi-address=/csi/csi.sock
- --kube-api-qps={{ .root.Values.controller.kubeAPI.qps }}
- --kube-api-burst={{ .root.Values.controller.kubeAPI.burst }}
- --timeout={{ .of.timeout }}
- --retry-interval-max={{ .of.retryIntervalMax }}
{{- if gt (include "abaca.replicas" .root | int) 1 }}
- --leader-election
- --leader-election-namespace=$(NAMESPACE)
{{- end }}
- --v=2
{{- end }}

{{- define "abaca.sidecarRest" -}}
{{- if gt (include "abaca.replicas" .root | int) 1 }}
env:
  - name: NAMESPACE
    valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
{{- end }}
volumeMounts:
  - {name: socket, mountPath: /csi}
securityContext: {{- include "abaca.unprivileged" .root | nindent 2 }}
resources: {{- toYaml .root.Values.controller.sidecarResources | nindent 2 }}
{{- end }}

{{/* loopback: the probes go to the node's loopback, and not to an address of its.
ready: where the driver says what it lacks, if anywhere. */}}
{{- define "abaca.probes" -}}
{{- $get := dict "path" "/healthz" "port" "healthz" }}
{{- if .loopback }}{{ $_ := set $get "host" "127.0.0.1" }}{{ end }}
# An embedded backend makes its image first, Manila's signs in.
startupProbe:
  httpGet: {{- toYaml $get | nindent 4 }}
  periodSeconds: 5
  timeoutSeconds: 6
  failureThreshold: 60
livenessProbe:
  httpGet: {{- toYaml $get | nindent 4 }}
  periodSeconds: 20
  timeoutSeconds: 6
  failureThreshold: 6
readinessProbe:
  {{- if .ready }}
  # It prints what is missing, which the kubelet shows. None of that is mended by a new
  # start, so the liveness probe does not ask for it.
  exec: {command: [/usr/local/bin/abaca, ready, "--http-endpoint={{ .ready }}"]}
  periodSeconds: 20
  timeoutSeconds: 10
  {{- else }}
  httpGet: {{- toYaml $get | nindent 4 }}
  periodSeconds: 10
  timeoutSeconds: 6
  {{- end }}
{{- end }}

{{- define "abaca.probeContainer" -}}
- name: liveness-probe
  image: {{ .root.Values.livenessProbe.image }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args:
    - --csi-address=/csi/csi.sock
    - --probe-timeout={{ .root.Values.livenessProbe.timeout }}
    - --http-endpoint={{ if .loopback }}127.0.0.1{{ end }}:{{ .port }}
    - --v=2
  volumeMounts:
    - {name: socket, mountPath: /csi}
  securityContext: {{- .security | nindent 4 }}
  resources: {{- toYaml .resources | nindent 4 }}
{{- end }}

{{/* Only the node that has the data. */}}
{{- define "abaca.localAffinity" -}}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      - matchFields:
          - {key: metadata.name, operator: In, values: [{{ . | quote }}]}
{{- end }}
