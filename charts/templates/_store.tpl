{{/* churn.store (list $ component uid [checksums]): a Deployment's beginning for a store with one writer, up to its containers: never two
     pods on one volume. Used by mlflow, postgres, valkey. */}}
{{- define "churn.store" -}}
{{- $ := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := get $.Values $component -}}
{{- $checksums := dict }}{{ if gt (len .) 3 }}{{ $checksums = index . 3 }}{{ end -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "churn.metadata" (list $ $component) | nindent 2 }}
spec:
  replicas: 1
  revisionHistoryLimit: 3
  strategy:
    type: Recreate
  selector:
    matchLabels:
      {{- include "churn.selector" (list $ $component) | nindent 6 }}
  template:
    metadata:
      {{- include "churn.podMetadata" (dict "root" $ "component" $component "values" $values "checksums" $checksums) | nindent 6 }}
    spec:
      {{- include "churn.pod" (dict "root" $ "component" $component "values" $values "uid" (index . 2)) | nindent 6 }}
      terminationGracePeriodSeconds: 60
      volumes:
        - name: {{ $component }}
          persistentVolumeClaim:
            claimName: {{ include "churn.claimName" (list $ $component $values.persistence) }}
        - name: tmp
          emptyDir: {}
{{- end }}
