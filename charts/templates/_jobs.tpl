{{/* churn.job (list $ name): a job's values, those of jobs.defaults where it has none of its own. Used by churn.cronjob and NOTES. */}}
{{- define "churn.job" -}}
{{- $ := index . 0 -}}
{{- $job := deepCopy $.Values.jobs.defaults -}}
{{- range $key, $value := get $.Values.jobs (index . 1) }}{{ $_ := set $job $key $value }}{{ end -}}
{{- toYaml $job -}}
{{- end }}

{{/* churn.cronjob (list $ name features...): the whole object. Features: `token` - it speaks to the Kubernetes API;
     `data` - it works on the data volume, others get an empty folder. Used by materialize, drift, retrain, promote, score. */}}
{{- define "churn.cronjob" -}}
{{- $ := index . 0 -}}
{{- $name := index . 1 -}}
{{- $job := include "churn.job" (list $ $name) | fromYaml -}}
apiVersion: batch/v1
kind: CronJob
metadata:
  {{- include "churn.metadata" (list $ $name (printf "%s%s" $.Values.jobs.namePrefix $name)) | nindent 2 }}
spec:
  schedule: {{ $job.schedule | quote }}
  timeZone: {{ $.Values.jobs.timeZone | quote }}
  suspend: {{ $job.suspend }}
  concurrencyPolicy: Forbid
  startingDeadlineSeconds: {{ $job.startingDeadlineSeconds }}
  successfulJobsHistoryLimit: {{ $job.successfulJobsHistoryLimit }}
  failedJobsHistoryLimit: {{ $job.failedJobsHistoryLimit }}
  jobTemplate:
    metadata:
      labels:
        {{- include "churn.selector" (list $ $name) | nindent 8 }}
    spec:
      {{- include "churn.jobSpec" (dict "root" $ "component" $name "job" $job "args" (prepend ($job.args | default list) $name) "token" (has "token" .) "data" (has "data" .)) | nindent 6 }}
{{- end }}

{{/* churn.jobSpec (dict root component job args token data [env] [checksums]): spec of a Job. Used by churn.cronjob and bootstrap;
     Jobs made by hand from a CronJob have all of it too. */}}
{{- define "churn.jobSpec" -}}
{{- with .job -}}
backoffLimit: {{ .backoffLimit }}
activeDeadlineSeconds: {{ .activeDeadlineSeconds }}
{{- with .ttlSecondsAfterFinished }}
ttlSecondsAfterFinished: {{ . }}
{{- end }}
{{- end }}
podFailurePolicy:
  rules:
    # A pod that was evicted or whose node went away has not failed.
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    # Exit code 2: wrong settings, which another try would not mend.
    - action: FailJob
      onExitCodes:
        containerName: {{ .component }}
        operator: In
        values: [2]
template:
  metadata:
    {{- include "churn.podMetadata" (merge (dict "values" .root.Values.jobs) .) | nindent 4 }}
  spec:
    {{- include "churn.jobPod" . | nindent 4 }}
{{- end }}

{{/* churn.jobPod (dict root component job args token data [env]): spec of a pod that runs `churn …`. Used by churn.jobSpec and the test. */}}
{{- define "churn.jobPod" -}}
{{- $ := .root -}}
{{- include "churn.pod" (merge (dict "values" $.Values.jobs) .) }}
restartPolicy: Never
containers:
  - name: {{ .component }}
    {{- include "churn.image" (list $ "jobs") | nindent 4 }}
    args: {{ toJson .args }}
    envFrom:
      - configMapRef:
          name: {{ include "churn.fullname" $ }}
    {{- $stores := include "churn.secretEnv" (list $ (dict "CHURN_DATABASE_URL" "database-url" "CHURN_FEAST_REGISTRY_URL" "feast-registry-url" "CHURN_ONLINE_STORE_URL" "online-store-url")) | fromYamlArray }}
    {{- $asks := has .component (list "promote" "bootstrap" "test") | ternary (include "churn.probeToken" $ | fromYamlArray) (list) }}
    env:
      {{- include "churn.env" (dict "env" (concat $stores $asks (.env | default list)) "extra" $.Values.jobs.extraEnv "at" "jobs.extraEnv") | nindent 6 }}
    resources:
      {{- toYaml .job.resources | nindent 6 }}
    {{- include "churn.container" $ | nindent 4 }}
    volumeMounts:
      - name: data
        mountPath: /data
      - name: tmp
        mountPath: /tmp
      {{- if $.Values.jobs.featureStore }}
      - name: feast
        mountPath: /etc/churn
      {{- end }}
volumes:
  - name: data
    {{- if .data }}
    persistentVolumeClaim:
      claimName: {{ include "churn.claimName" (list $ "data" $.Values.data.persistence) }}
    {{- else }}
    emptyDir: {}
    {{- end }}
  - name: tmp
    emptyDir: {}
  {{- if $.Values.jobs.featureStore }}
  - name: feast
    configMap:
      name: {{ include "churn.fullname" $ }}-feast
  {{- end }}
{{- end }}

{{/* churn.settings: which values are settings of the jobs (jobs/settings.py): the key in camel case is the variable
     CHURN_<KEY>. Used by the ConfigMap. */}}
{{- define "churn.settings" -}}
snapshots: [labelHorizon, maxMissingShare]
serving: [staleAfter]
jobs.retrain: [featureTtl, seed, holdoutSalt, holdoutShare, trainingSnapshots, candidates, calibration, threshold, topKShare]
gate: [promotionDelta, bootstrapSamples, firstAucFloor, minClassRows, sliceFloor, sliceMinPositives]
jobs.drift: [driftShare, driftThreshold, driftMinRows, driftMinLogged, driftK, driftN, championFloor, retrainCooldown, retrainBudget, retrainBreaker, predictionsKept]
promotion: [promotionMode, promotionDeadline, promotionSoak, replayRequests, replayMaxFlipped, replayMaxShift, canaryMaxFailed, canaryMaxSlowdown, rebuildOnCodeChange, bentosKept]
jobs.score: [scoreCallShare]
{{- end }}
