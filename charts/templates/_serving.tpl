{{/* churn.paths: what may be asked from outside; everything else stays inside. Given: the API's description too? Used by Ingress and HTTPRoute. */}}
{{- define "churn.paths" -}}
- /predict
{{- if . }}
- /docs.json
{{- end }}
{{- end }}
{{/* churn.bytes: 512Mi as a number of bytes; used by the serving ConfigMap and the PrometheusRule. */}}
{{- define "churn.bytes" -}}
{{- $unit := regexFind "[KMG]i$" . -}}
{{- $n := trimSuffix $unit . | int64 -}}
{{- mul $n (get (dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824) $unit) -}}
{{- end }}
