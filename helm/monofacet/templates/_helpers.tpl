{{/* Names and labels. */}}
{{- define "monofacet.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "monofacet.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "monofacet.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "monofacet.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects pods. Not app.kubernetes.io/name: KubeRay has a value of its own for it. */}}
{{- define "monofacet.selector" -}}
app.kubernetes.io/part-of: {{ include "monofacet.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "monofacet.labels" -}}
{{ include "monofacet.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Where Secrets and the bundle are mounted. */}}
{{- define "monofacet.tlsPath" -}}/etc/monofacet/tls{{- end -}}
{{- define "monofacet.clientCAPath" -}}/etc/monofacet/client-ca{{- end -}}
{{- define "monofacet.tokensPath" -}}/etc/monofacet/tokens{{- end -}}
{{- define "monofacet.bundlePath" -}}{{ .Values.bundle.path | default "/bundle" }}{{- end -}}
{{- define "monofacet.drainFile" -}}/tmp/monofacet-drain{{- end -}}

{{/* Pods of a component that are always there. Arguments: root, component. */}}
{{- define "monofacet.fewest" -}}
{{- if eq .component "gateway" -}}
{{- .root.Values.gateway.replicas -}}
{{- else -}}
{{- mul (max 1 (len .root.Values.bundle.paths)) (index .root.Values .component).minReplicas -}}
{{- end -}}
{{- end -}}

{{/* Ports of a gateway's pod. */}}
{{- define "monofacet.grpcPort" -}}9000{{- end -}}
{{- define "monofacet.healthPort" -}}9001{{- end -}}
{{- define "monofacet.metricsPort" -}}9100{{- end -}}
{{- define "monofacet.httpPort" -}}8080{{- end -}}

{{/* The longest that a gateway takes to stop: a test holds the defaults equal to those of the settings. */}}
{{- define "monofacet.stopSeconds" -}}
{{- $linger := ternary .Values.settings.linger_s 1 (hasKey .Values.settings "linger_s") -}}
{{- $drain := ternary .Values.settings.drain_s 30 (hasKey .Values.settings "drain_s") -}}
{{- ceil (addf $linger $drain) -}}
{{- end -}}

{{/* The settings of the server, as the Serve application's arguments. */}}
{{- define "monofacet.settings" -}}
{{- $set := dict
  "host" "0.0.0.0"
  "port" (include "monofacet.grpcPort" . | int)
  "http_port" (include "monofacet.httpPort" . | int)
  "health_port" (include "monofacet.healthPort" . | int)
  "metrics_host" "0.0.0.0"
  "metrics_port" (include "monofacet.metricsPort" . | int)
  "loopback_only" false
  "insecure" .Values.insecure
  "drain_file" (include "monofacet.drainFile" .)
  "log_format" "json"
  "gateway_replicas" .Values.gateway.replicas
  "gateway_resource" "gateway"
  "threads" .Values.encoder.cpus
  "decode_threads" (min 4 .Values.encoder.cpus)
  "encoder_replicas" .Values.encoder.minReplicas
  "encoder_max_replicas" .Values.encoder.maxReplicas
  "encoder_target_ongoing" .Values.encoder.targetOngoing
  "encoder_cpus" .Values.encoder.cpus
  "encoder_gpus" (ternary .Values.encoder.gpus 0 (eq .Values.encoder.device "gpu"))
  "encoder_resource" "encoder"
  "generator" .Values.generator.enabled
-}}
{{- if .Values.generator.enabled -}}
{{- $_ := merge $set (dict
  "generator_replicas" .Values.generator.minReplicas
  "generator_max_replicas" .Values.generator.maxReplicas
  "generator_target_ongoing" .Values.generator.targetOngoing
  "generator_cpus" .Values.generator.cpus
  "generator_threads" .Values.generator.cpus
  "generator_gpus" (ternary .Values.generator.gpus 0 (eq .Values.generator.device "gpu"))
  "generator_resource" "generator")
-}}
{{- end -}}
{{- if .Values.bundle.paths -}}
{{- $_ := set $set "bundles" .Values.bundle.paths -}}
{{- else if or .Values.bundle.path .Values.bundle.existingClaim -}}
{{- $_ := set $set "bundle" (include "monofacet.bundlePath" .) -}}
{{- end -}}
{{- if .Values.tls.secretName -}}
{{- $_ := set $set "tls_certificate" (printf "%s/tls.crt" (include "monofacet.tlsPath" .)) -}}
{{- $_ := set $set "tls_key" (printf "%s/tls.key" (include "monofacet.tlsPath" .)) -}}
{{- end -}}
{{- if .Values.tls.clientCASecretName -}}
{{- $_ := set $set "tls_client_ca" (printf "%s/ca.crt" (include "monofacet.clientCAPath" .)) -}}
{{- end -}}
{{- if .Values.tokens.secretName -}}
{{- $_ := set $set "tokens_file" (printf "%s/%s" (include "monofacet.tokensPath" .) .Values.tokens.key) -}}
{{- end -}}
{{- toYaml (merge $set .Values.settings) -}}
{{- end -}}

{{/* What must be decided before anything is installed. */}}
{{- define "monofacet.check" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "monofacet.fullname" .)) -}}
{{- fail (printf "%q cannot be the name of a Service: set fullnameOverride to letters, digits and dashes that begin with a letter" (include "monofacet.fullname" .)) -}}
{{- end -}}
{{- if and (not .Values.tls.secretName) (not .Values.insecure) -}}
{{- fail "set tls.secretName to a Secret of type kubernetes.io/tls, or insecure=true to serve in plain text" -}}
{{- end -}}
{{- if and .Values.tls.clientCASecretName (not .Values.tls.secretName) -}}
{{- fail "tls.clientCASecretName needs tls.secretName" -}}
{{- end -}}
{{- range $name := list "encoder" "generator" -}}
{{- $group := index $.Values $name -}}
{{- if lt (int $group.maxReplicas) (int $group.minReplicas) -}}
{{- fail (printf "%s.maxReplicas is less than %s.minReplicas" $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "monofacet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/*
A pod of the Ray cluster. Arguments: root, component, values (of the component), device, resources.
KubeRay adds the command, the liveness probe and shared memory; tests/helm/test_kuberay.py lists what it needs.
*/}}
{{- define "monofacet.pod" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "monofacet.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  {{- with .values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  # The autoscaler alone talks to Kubernetes, by an account that KubeRay makes for the head.
  automountServiceAccountToken: {{ eq .component "head" }}
  # Variables such as MONOFACET_PORT=tcp://..., which Kubernetes makes of a Service named monofacet, would be settings.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (include "monofacet.stopSeconds" $root | int) 15 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 1000
    seccompProfile:
      type: RuntimeDefault
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .values.affinity }}
  affinity:
    {{- toYaml .values.affinity | nindent 4 }}
  {{- else if eq .component "gateway" }}
  # Two gateways on one machine would fall together.
  affinity:
    podAntiAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: kubernetes.io/hostname
            labelSelector:
              matchLabels:
                {{- include "monofacet.selector" $root | nindent 16 }}
                app.kubernetes.io/component: gateway
  {{- end }}
  containers:
    - name: ray-{{ .component }}
      image: {{ printf "%s:%s-%s" $root.Values.image.repository ($root.Values.image.tag | default $root.Chart.AppVersion) (ternary "cuda" "cpu" (eq .device "gpu")) | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- $environment := $root.Files.Get "files/environment.yaml" | fromYaml }}
        {{- range $name, $value := ternary $environment.all (merge (dict) $environment.all $environment.replicas) (eq .component "head") }}
        - name: {{ $name }}
          value: {{ $value | quote }}
        {{- end }}
        # Libraries that cache under a home find one that they may write to.
        - {name: HOME, value: /tmp}
      securityContext:
        {{- include "monofacet.containerSecurity" $root | nindent 8 }}
      resources:
        {{- toYaml .resources | nindent 8 }}
      {{- if eq .component "head" }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        # Nothing listens on it here. KubeRay makes the Service whose endpoints it counts from the port of this name,
        # and without it never says Ready.
        - {name: serve, containerPort: {{ include "monofacet.grpcPort" $root }}}
      {{- else if eq .component "gateway" }}
      ports:
        - {name: grpc, containerPort: {{ include "monofacet.grpcPort" $root }}}
        - {name: http, containerPort: {{ include "monofacet.httpPort" $root }}}
        - {name: health, containerPort: {{ include "monofacet.healthPort" $root }}}
        - {name: metrics, containerPort: {{ include "monofacet.metricsPort" $root }}}
      # SERVING only once the models are warm; NOT_SERVING while draining. A port of its own, since probes speak
      # neither TLS nor tokens.
      readinessProbe:
        grpc:
          port: {{ include "monofacet.healthPort" $root }}
        periodSeconds: 2
        failureThreshold: 1
        timeoutSeconds: 2
      lifecycle:
        preStop:
          exec:
            # Calls in flight are finished before Ray is stopped; the health port closes when they are.
            command:
              - bash
              - -c
              - >-
                touch {{ include "monofacet.drainFile" $root }};
                for _ in $(seq {{ include "monofacet.stopSeconds" $root }}); do
                sleep 1; (exec 3<>/dev/tcp/127.0.0.1/{{ include "monofacet.healthPort" $root }}) 2>/dev/null || exit 0;
                done
      {{- else }}
      # KubeRay's own probe would wait for an HTTP proxy, and there is none.
      readinessProbe:
        exec:
          command:
            - bash
            - -c
            - wget --quiet --timeout 2 --output-document - http://localhost:52365/api/local_raylet_healthz | grep --quiet success
        periodSeconds: 5
        timeoutSeconds: 4
      {{- end }}
      {{- if ne .component "gateway" }}
      lifecycle:
        preStop:
          exec:
            # All pods of an old cluster are told to stop at once: what gateways have in flight still needs these.
            command: [sleep, {{ include "monofacet.stopSeconds" $root | quote }}]
      {{- end }}
      volumeMounts:
        # Ray's sessions and logs; the root file system is read-only.
        - {name: tmp, mountPath: /tmp}
        {{- if $root.Values.bundle.existingClaim }}
        - {name: bundle, mountPath: {{ include "monofacet.bundlePath" $root }}, readOnly: true}
        {{- end }}
        {{- if eq .component "gateway" }}
        {{- if $root.Values.tls.secretName }}
        - {name: tls, mountPath: {{ include "monofacet.tlsPath" $root }}, readOnly: true}
        {{- end }}
        {{- if $root.Values.tls.clientCASecretName }}
        - {name: client-ca, mountPath: {{ include "monofacet.clientCAPath" $root }}, readOnly: true}
        {{- end }}
        {{- if $root.Values.tokens.secretName }}
        - {name: tokens, mountPath: {{ include "monofacet.tokensPath" $root }}, readOnly: true}
        {{- end }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if $root.Values.bundle.existingClaim }}
    - name: bundle
      persistentVolumeClaim:
        claimName: {{ $root.Values.bundle.existingClaim }}
        readOnly: true
    {{- end }}
    {{- if eq .component "gateway" }}
    {{- if $root.Values.tls.secretName }}
    - name: tls
      secret:
        secretName: {{ $root.Values.tls.secretName }}
        defaultMode: 0440
    {{- end }}
    {{- if $root.Values.tls.clientCASecretName }}
    - name: client-ca
      secret:
        secretName: {{ $root.Values.tls.clientCASecretName }}
        defaultMode: 0440
    {{- end }}
    {{- if $root.Values.tokens.secretName }}
    - name: tokens
      secret:
        secretName: {{ $root.Values.tokens.secretName }}
        defaultMode: 0440
    {{- end }}
    {{- end }}
{{- end -}}

{{/* A group of pods that each hold one replica of a model. Arguments: root, component. */}}
{{- define "monofacet.modelGroup" -}}
{{- $values := index .root.Values .component -}}
{{- $bundles := max 1 (len .root.Values.bundle.paths) | int -}}
{{- $gpu := eq $values.device "gpu" -}}
{{- $limits := dict "memory" $values.memory -}}
{{- if $gpu }}{{ $_ := set $limits "nvidia.com/gpu" (int $values.gpus) }}{{ end -}}
- groupName: {{ .component }}-{{ $values.device }}
  # So many for each bundle.
  replicas: {{ mul $bundles $values.minReplicas }}
  minReplicas: {{ mul $bundles $values.minReplicas }}
  maxReplicas: {{ mul $bundles $values.maxReplicas }}
  rayStartParams:
    num-cpus: {{ $values.cpus | quote }}
    object-store-memory: {{ include "monofacet.bytes" .root.Values.ray.objectStoreMemory | quote }}
    {{- if $gpu }}
    num-gpus: {{ int $values.gpus | quote }}
    {{- end }}
    # One replica takes the one that each pod has, so replicas and pods grow together.
    resources: {{ include "monofacet.resource" .component }}
  template:
    {{- include "monofacet.pod" (dict
      "root" .root "component" .component "values" $values "device" $values.device
      "resources" (dict "requests" (dict "cpu" $values.cpus "memory" $values.memory) "limits" $limits)
    ) | nindent 4 }}
{{- end -}}

{{/* One of a custom resource, quoted for the shell that runs `ray start`; KubeRay and Ray's autoscaler read it too. */}}
{{- define "monofacet.resource" -}}
{{- printf "'{\"%s\": 1}'" . | quote -}}
{{- end -}}

{{/* Ray wants bytes. Argument: a quantity in Mi or Gi; the schema allows no other. */}}
{{- define "monofacet.bytes" -}}
{{- if hasSuffix "Gi" . -}}
{{- mul (trimSuffix "Gi" . | int64) 1073741824 -}}
{{- else -}}
{{- mul (trimSuffix "Mi" . | int64) 1048576 -}}
{{- end -}}
{{- end -}}
