{{/* churn.pod (dict root component values [token] [data] [uid]): what every pod's spec begins with. `values` are the
     component's own, for scheduling; `token` mounts the API token; `data`: it uses the data volume; `uid`: whose files. */}}
{{- define "churn.pod" -}}
{{- $ := .root -}}
{{- $affinity := deepCopy (.values.affinity | default dict) -}}
{{- if and .data (eq $.Values.data.persistence.accessMode "ReadWriteOnce") -}}
{{- /* Pods that mount a ReadWriteOnce volume keep together. The term matches the pod itself, so that the first one can be placed. */ -}}
{{- $together := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (include "churn.dataLabels" $ | fromYaml)) -}}
{{- $pods := $affinity.podAffinity | default dict -}}
{{- $_ := set $pods "requiredDuringSchedulingIgnoredDuringExecution" (append ($pods.requiredDuringSchedulingIgnoredDuringExecution | default list) $together) -}}
{{- $_ := set $affinity "podAffinity" $pods -}}
{{- end -}}
serviceAccountName: {{ include "churn.fullname" $ }}-{{ .component }}
automountServiceAccountToken: {{ .token | default false }}
# A Service named churn would set CHURN_PORT, one named mlflow MLFLOW_PORT, which MLflow reads as an option.
enableServiceLinks: false
{{- with $.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $uid := .uid | default 10001 }}
{{- $security := dict "runAsNonRoot" true "seccompProfile" (dict "type" "RuntimeDefault") }}
{{- if $.Values.fixedIds }}
{{- $security = merge $security (dict "runAsUser" $uid "runAsGroup" $uid "fsGroup" $uid "fsGroupChangePolicy" "OnRootMismatch") }}
{{- end }}
securityContext:
  {{- toYaml (mergeOverwrite $security (deepCopy $.Values.podSecurityContext)) | nindent 2 }}
{{- end }}

{{/* churn.podMetadata (dict root component values [data] [checksums]): labels and annotations of every pod. */}}
{{- define "churn.podMetadata" -}}
{{- $ours := include "churn.selector" (list .root .component) | fromYaml -}}
{{- if .data }}{{ $ours = merge $ours (include "churn.dataLabels" .root | fromYaml) }}{{ end -}}
labels:
  {{- toYaml (merge $ours (.values.podLabels | default dict)) | nindent 2 }}
{{- with merge (dict) (.checksums | default dict) (.values.podAnnotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* churn.dataLabels: finds the pods of this release that mount the data volume; used by churn.pod. */}}
{{- define "churn.dataLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
churn/data: {{ include "churn.fullname" . | quote }}
{{- end }}

{{/* churn.container: the security context of every container. */}}
{{- define "churn.container" -}}
{{- $security := dict "allowPrivilegeEscalation" false "readOnlyRootFilesystem" true "capabilities" (dict "drop" (list "ALL")) -}}
securityContext:
  {{- toYaml (mergeOverwrite $security (deepCopy .Values.containerSecurityContext)) | nindent 2 }}
{{- end }}

{{/* churn.checksum (list $ file): hash of a ConfigMap's data, so that a change restarts what reads it, a new chart's labels do not. Used by serving, postgres, bootstrap. */}}
{{- define "churn.checksum" -}}
{{- $ := index . 0 -}}
{{- (include (print $.Template.BasePath (index . 1)) $ | fromYaml).data | toJson | sha256sum -}}
{{- end }}

{{/* churn.env (dict env extra at): a container's environment, the chart's and yours; refused when a name comes twice,
     because server-side apply (Helm 4) would refuse it less clearly. Used by every container with extraEnv. */}}
{{- define "churn.env" -}}
{{- $names := list -}}
{{- range concat .env .extra -}}
{{- if has .name $names }}{{ fail (printf "%s sets %s, which the chart sets itself; remove it there and use the value that stands for it (values.yaml)" $.at .name) }}{{ end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- toYaml (concat .env .extra) -}}
{{- end }}
