{{- define "lorafleet.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "lorafleet.secret" -}}
{{- .Values.existingSecret | default (include "lorafleet.name" .) -}}
{{- end -}}

{{/* Labels of one service: (dict "root" $ "service" "registry"). */}}
{{- define "lorafleet.selector" -}}
app.kubernetes.io/name: lorafleet
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .service }}
{{- end -}}

{{- define "lorafleet.labels" -}}
{{ include "lorafleet.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{- define "lorafleet.podSecurity" -}}
automountServiceAccountToken: false
# Of a release called lorafleet they would bear our prefix, and services refuse variables that they do not know.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "lorafleet.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* gRPC health on a port: ready once the service says so, alive while the server answers at all. */}}
{{- define "lorafleet.grpcProbes" -}}
startupProbe:
  tcpSocket: {port: grpc}
  periodSeconds: 5
  failureThreshold: 120
readinessProbe:
  grpc: {port: {{ . }}}
  periodSeconds: 5
  timeoutSeconds: 3
livenessProbe:
  tcpSocket: {port: grpc}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{/* One variable from the secret: (dict "root" $ "name" "VARIABLE" "key" "redis-url"). */}}
{{- define "lorafleet.fromSecret" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ include "lorafleet.secret" .root }}, key: {{ .key }}}}
{{- end -}}

{{/* What every service is told: (dict "root" $ "prefix" "LORAFLEET_REGISTRY_" "port" 7101). */}}
{{- define "lorafleet.commonEnv" -}}
- {name: {{ .prefix }}LISTEN, value: "0.0.0.0:{{ .port }}"}
- {name: {{ .prefix }}METRICS_LISTEN, value: "0.0.0.0:9464"}
- {name: {{ .prefix }}INSECURE_BIND, value: "true"}
- {name: {{ .prefix }}GRACE_SECONDS, value: {{ sub (int .root.Values.graceSeconds) 5 | quote }}}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .root.Values.otlpEndpoint | quote }}}
{{ include "lorafleet.fromSecret" (dict "root" .root "name" (printf "%sREDIS_URL" .prefix) "key" "redis-url") }}
{{- end -}}

{{- define "lorafleet.storeEnv" -}}
- {name: {{ .prefix }}STORE_URL, value: {{ required "storeUrl is needed" .root.Values.storeUrl | quote }}}
{{ include "lorafleet.fromSecret" (dict "root" .root "name" (printf "%sSTORE_ACCESS_KEY" .prefix) "key" "store-access-key") }}
{{ include "lorafleet.fromSecret" (dict "root" .root "name" (printf "%sSTORE_SECRET_KEY" .prefix) "key" "store-secret-key") }}
{{- end -}}
