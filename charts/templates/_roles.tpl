{{/* churn.role (list $ component rules-as-YAML): Role and its binding to the component's ServiceAccount. Used by the jobs that speak to the API. */}}
{{- define "churn.role" -}}
{{- $ := index . 0 -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- include "churn.metadata" (list $ (index . 1)) | nindent 2 }}
rules:
  {{- index . 2 | trim | nindent 2 }}
{{- end }}

{{/* churn.roleBinding (list $ component): binds the Role to the ServiceAccount of the same name. */}}
{{- define "churn.roleBinding" -}}
{{- $ := index . 0 -}}
{{- $name := printf "%s-%s" (include "churn.fullname" $) (index . 1) -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- include "churn.metadata" . | nindent 2 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ $name }}
    namespace: {{ $.Release.Namespace }}
{{- end }}

{{/* churn.rules.job (list $ job...): Leases of these jobs, and Events. A Lease belongs to the Deployment and goes with it; that its holder's pod
     is gone frees it at once. RBAC cannot name an object that is yet to be created. */}}
{{- define "churn.rules.job" -}}
{{- $ := index . 0 }}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames:
    {{- range rest . }}
    - {{ include "churn.fullname" $ }}-{{ . }}
    {{- end }}
  verbs: [get, update, patch, delete]
- apiGroups: [apps]
  resources: [deployments]
  resourceNames: [{{ include "churn.fullname" $ }}]
  verbs: [get]
- apiGroups: [""]
  resources: [pods]
  verbs: [get]
- apiGroups: ["", events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}

{{/* churn.rules.promote: change the one Deployment, by name, and watch its pods. Used by promote and bootstrap. */}}
{{- define "churn.rules.promote" }}
- apiGroups: [apps]
  resources: [deployments]
  resourceNames: [{{ include "churn.fullname" . }}]
  verbs: [patch]
- apiGroups: [apps]
  resources: [replicasets]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# `churn status` says whether a retraining runs
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ include "churn.fullname" . }}-retrain]
  verbs: [get]
{{- end }}

{{/* churn.rules.drift: start the Job of CronJob retrain, and see whether one runs. */}}
{{- define "churn.rules.drift" }}
- apiGroups: [batch]
  resources: [cronjobs]
  resourceNames: [{{ .Values.jobs.namePrefix }}retrain]
  verbs: [get]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [create, get, list]
{{- end }}
