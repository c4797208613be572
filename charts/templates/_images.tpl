{{/* churn.image (list $ name): address and pull policy of a container's image; used by every container. */}}
{{- define "churn.image" -}}
{{- $ := index . 0 -}}
{{- $image := get $.Values.images (index . 1) -}}
{{- $registry := $.Values.images.registry | trimSuffix "/" -}}
{{- $address := ternary (printf "%s/%s" $registry $image.repository) $image.repository (ne $registry "") -}}
{{- if $image.digest -}}
image: {{ printf "%s@%s" $address $image.digest | quote }}
{{- else -}}
image: {{ printf "%s:%s" $address ($image.tag | default $.Chart.AppVersion) | quote }}
{{- end }}
imagePullPolicy: {{ $.Values.images.pullPolicy }}
{{- end }}
