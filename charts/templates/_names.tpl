{{/* churn.fullname: what everything of this release is called or begins with; used everywhere. */}}
{{- define "churn.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end }}

{{/* churn.selector (list $ component): the three labels that find a component's pods; in selectors, which can never change, and on pods. */}}
{{- define "churn.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: {{ $.Values.nameOverride | default $.Chart.Name }}
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* churn.metadata (list $ component [name]): name, namespace and labels of every object. */}}
{{- define "churn.metadata" -}}
{{- $ := index . 0 -}}
{{- $component := index . 1 -}}
{{- $name := printf "%s-%s" (include "churn.fullname" $) $component -}}
name: {{ if gt (len .) 2 }}{{ index . 2 }}{{ else }}{{ $name }}{{ end }}
namespace: {{ $.Release.Namespace }}
labels:
  {{- include "churn.selector" (list $ $component) | nindent 2 }}
  app.kubernetes.io/part-of: churn
  app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ $.Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" $.Chart.Name ($.Chart.Version | replace "+" "_") }}
{{- end }}

{{/* churn.serviceAccount (list $ component): the whole object; each component has its own, so that no Role is shared. */}}
{{- define "churn.serviceAccount" -}}
{{- $ := index . 0 -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "churn.metadata" . | nindent 2 }}
  {{- with $.Values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}

{{/* churn.claim (list $ component persistence): a volume that outlives the release; used by postgres, valkey, mlflow, data. */}}
{{- define "churn.claim" -}}
{{- $volume := index . 2 -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  {{- include "churn.metadata" (slice . 0 2) | nindent 2 }}
  annotations:
    helm.sh/resource-policy: keep
spec:
  accessModes: [{{ $volume.accessMode | default "ReadWriteOnce" }}]
  {{- with $volume.storageClass }}
  storageClassName: {{ if eq . "-" }}""{{ else }}{{ . }}{{ end }}
  {{- end }}
  resources:
    requests:
      storage: {{ $volume.size }}
{{- end }}

{{/* churn.claimName (list $ component persistence): the claim a pod mounts, ours or yours. */}}
{{- define "churn.claimName" -}}
{{- (index . 2).existingClaim | default (printf "%s-%s" (include "churn.fullname" (index . 0)) (index . 1)) -}}
{{- end }}

{{/* churn.text: a value as an environment variable's text; 1000000 stays 1000000, a list is JSON. Used by the ConfigMaps. */}}
{{- define "churn.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}
