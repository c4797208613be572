{{/* churn.secret (list $ key): name and key of the Secret that holds one of the stores' passwords or URLs.
     Bundled stores: our Secret or `existingSecret`; external ones: theirs. Used by churn.secretEnv and validation. */}}
{{- define "churn.secret" -}}
{{- $ := index . 0 -}}
{{- $key := index . 1 -}}
{{- $ours := $.Values.existingSecret | default (include "churn.fullname" $) -}}
{{- if and (eq $key "online-store-url") (not $.Values.valkey.enabled) -}}
name: {{ $.Values.externalRedis.existingSecret | quote }}
key: {{ $.Values.externalRedis.urlKey | quote }}
{{- else if and (has $key (list "database-url" "serving-database-url" "feast-registry-url" "mlflow-backend-url")) (not $.Values.postgres.enabled) -}}
name: {{ $.Values.externalPostgres.existingSecret | quote }}
key: {{ get $.Values.externalPostgres.keys (camelcase (replace "-" "_" $key) | untitle) | quote }}
{{- else -}}
name: {{ $ours | quote }}
key: {{ $key }}
{{- end -}}
{{- end }}

{{/* churn.secretEnv (list $ (dict VARIABLE key ...)): environment entries from Secrets, as a YAML list. Used by every component with a store. */}}
{{- define "churn.secretEnv" -}}
{{- $ := index . 0 -}}
{{- range $variable, $key := index . 1 }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      {{- include "churn.secret" (list $ $key) | nindent 6 }}
{{- end }}
{{- end }}

{{/* churn.probeToken: the variable by which the service knows requests of promotion, as a YAML list; empty where no Secret
     of this release could hold it. Used by serving and the jobs that ask. */}}
{{- define "churn.probeToken" -}}
{{- if or .Values.existingSecret .Values.postgres.enabled .Values.valkey.enabled }}
- name: CHURN_PROBE_TOKEN
  valueFrom:
    secretKeyRef:
      {{- include "churn.secret" (list . "probe-token") | nindent 6 }}
      {{- if and .Values.existingSecret (not .Values.serving.apiKeys.existingSecret) }}
      optional: true
      {{- end }}
{{- end }}
{{- end }}

{{/* churn.schema: the PostgreSQL schema of this release, so that two releases on one server do not meet. */}}
{{- define "churn.schema" -}}
{{- include "churn.fullname" . | replace "-" "_" -}}
{{- end }}

{{/* churn.mlflowUrl: where jobs find MLflow; used by the ConfigMap and NOTES. */}}
{{- define "churn.mlflowUrl" -}}
{{- if .Values.mlflow.enabled }}http://{{ include "churn.fullname" . }}-mlflow:5000{{ else }}{{ .Values.externalMlflow.url }}{{ end -}}
{{- end }}

{{/* churn.secretKeys: every key of our own Secret that this release's bundled stores need, comma separated. Used by secret.yaml and validation. */}}
{{- define "churn.secretKeys" -}}
{{- $keys := list -}}
{{- if .Values.postgres.enabled -}}
{{- $keys = concat $keys (list "postgres-password" "mlflow-password" "feast-password" "churn-password" "serving-password" "database-url" "serving-database-url" "feast-registry-url" "mlflow-backend-url") -}}
{{- end -}}
{{- if .Values.valkey.enabled }}{{ $keys = concat $keys (list "valkey-password" "online-store-url") }}{{ end -}}
{{- join "," $keys -}}
{{- end }}
