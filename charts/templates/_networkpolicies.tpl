{{/* churn.networkPolicy (list $ component [from] [to...]): what a component may hear and say beside DNS, which templates/networkpolicy.yaml
     allows everybody. `from`: YAML of its ingress rules; `to`: YAML of its egress rules. Used by every component. */}}
{{- define "churn.networkPolicy" -}}
{{- $ := index . 0 -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "churn.metadata" (list $ (index . 1)) | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "churn.selector" (list $ (index . 1)) | nindent 6 }}
  policyTypes: [Ingress, Egress]
  {{- with index . 2 | trim }}
  ingress:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with index . 3 | trim }}
  egress:
    {{- . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* churn.peers (list $ from|to port component...): a rule with pods of these components. */}}
{{- define "churn.peers" -}}
{{- $ := index . 0 }}
- {{ index . 1 }}:
    - podSelector:
        matchLabels:
          app.kubernetes.io/name: {{ $.Values.nameOverride | default $.Chart.Name }}
          app.kubernetes.io/instance: {{ $.Release.Name }}
        matchExpressions:
          - key: app.kubernetes.io/component
            operator: In
            values: {{ toJson (slice . 3) }}
  ports:
    - port: {{ index . 2 }}
{{- end }}

{{/* churn.to (list port...): a rule to any address on these ports: external stores, the API server (443 behind its Service, 6443 itself, 8443 minikube's, 16443 MicroK8s'). */}}
{{- define "churn.to" }}
- ports:
    {{- range . }}
    - port: {{ . }}
    {{- end }}
{{- end }}

{{/* churn.to.stores (list $ postgres? valkey? mlflow?): rules to the stores, bundled or external. */}}
{{- define "churn.to.stores" -}}
{{- $ := index . 0 -}}
{{- if has "postgres" . }}
{{- if $.Values.postgres.enabled }}{{ include "churn.peers" (list $ "to" 5432 "postgres") }}{{ else }}{{ include "churn.to" (list $.Values.externalPostgres.port) }}{{ end }}
{{- end }}
{{- if has "valkey" . }}
{{- if $.Values.valkey.enabled }}{{ include "churn.peers" (list $ "to" 6379 "valkey") }}{{ else }}{{ include "churn.to" (list $.Values.externalRedis.port) }}{{ end }}
{{- end }}
{{- if has "mlflow" . }}
{{- if $.Values.mlflow.enabled }}{{ include "churn.peers" (list $ "to" 5000 "mlflow") }}{{ else }}{{ include "churn.to" (list (include "churn.port" $.Values.externalMlflow.url | int)) }}{{ end }}
{{- end }}
{{- end }}

{{/* churn.port: the port of a URL, said or implied. */}}
{{- define "churn.port" -}}
{{- $url := urlParse . -}}
{{- $said := regexFind ":[0-9]+$" $url.host -}}
{{- if $said }}{{ trimPrefix ":" $said }}{{ else if eq $url.scheme "http" }}80{{ else }}443{{ end -}}
{{- end }}

{{/* churn.jobs: every component that runs the jobs image. Used by the NetworkPolicies. */}}
{{- define "churn.jobs" -}}
[materialize, drift, retrain, promote, score, bootstrap, test]
{{- end }}
{{/* churn.jobNetworkPolicy (list $ component features...): a job hears nobody, and speaks to the stores and the Service; with
     `token` to the API server too, with `source` to where snapshots come from. Used by every job, bootstrap and the test. */}}
{{- define "churn.jobNetworkPolicy" -}}
{{- $ := index . 0 -}}
{{- if $.Values.networkPolicy.enabled -}}
{{- $to := print (include "churn.to.stores" (list $ "postgres" "valkey" "mlflow")) (include "churn.peers" (list $ "to" 3000 "serving")) -}}
{{- if has "token" . }}{{ $to = print $to (include "churn.to" (list 443 6443 8443 16443)) }}{{ end -}}
{{- if and (has "source" .) (contains "://" $.Values.snapshots.source) }}
{{- $to = print $to (include "churn.to" (list (include "churn.port" $.Values.snapshots.source | int))) }}
{{- end -}}
{{- include "churn.networkPolicy" (list $ (index . 1) "" $to) -}}
{{- end -}}
{{- end }}
