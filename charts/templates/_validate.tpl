{{/* churn.validate: refuses values that contradict each other or the cluster, all at once, each with its remedy. Unknown keys,
     types and forms are the schema's (values.schema.json). Used by validate.yaml. */}}
{{- define "churn.validate" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}

{{- $name := include "churn.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$" $name) -}}
{{- $wrong = append $wrong (printf "the release is called %q; it becomes the name of Services, Jobs and a model: expected a-z, 0-9 and -, a letter first, at most 40 characters. Choose another release name, or set fullnameOverride." $name) -}}
{{- end -}}

{{- if and $v.ingress.enabled $v.httpRoute.enabled -}}
{{- $wrong = append $wrong "ingress.enabled and httpRoute.enabled are both true; one of them publishes the service. Set ingress.enabled to false to keep the HTTPRoute." -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- $wrong = append $wrong "httpRoute.enabled is true, but httpRoute.parentRefs names no Gateway. Set it, such as [{name: public, namespace: gateways}]." -}}
{{- end -}}

{{- $instead := dict "mlflow" "mlflow.enabled to false and externalMlflow.url" "postgres" "postgres.enabled to false and externalPostgres.existingSecret" "valkey" "valkey.enabled to false and externalRedis.existingSecret" -}}
{{- range $store, $remedy := $instead -}}
{{- if gt (int (get $v $store).replicas) 1 -}}
{{- $wrong = append $wrong (printf "%s.replicas is %v, but its volume has a single writer. Leave it at 1; for more, run your own and set %s." $store (get $v $store).replicas $remedy) -}}
{{- end -}}
{{- end -}}

{{- $auto := $v.serving.autoscaling -}}
{{- if and $auto.enabled (ne (int $v.serving.replicas) 1) -}}
{{- $wrong = append $wrong (printf "serving.replicas is %v, but serving.autoscaling.enabled gives the number of pods to the autoscaler. Set serving.autoscaling.minReplicas instead and remove serving.replicas." $v.serving.replicas) -}}
{{- end -}}
{{- if and $auto.enabled (gt (int $auto.minReplicas) (int $auto.maxReplicas)) -}}
{{- $wrong = append $wrong (printf "serving.autoscaling.minReplicas (%v) is more than serving.autoscaling.maxReplicas (%v). Raise the latter." $auto.minReplicas $auto.maxReplicas) -}}
{{- end -}}
{{- $pods := ternary (int $auto.minReplicas) (int $v.serving.replicas) $auto.enabled -}}
{{- $pdb := $v.serving.pdb -}}
{{- if $pdb.enabled -}}
{{- $stay := toString $pdb.minAvailable -}}
{{- /* Kubernetes rounds a percentage up. */ -}}
{{- $staying := ternary (ceil (divf (mulf (trimSuffix "%" $stay | float64) $pods) 100)) ($stay | float64) (hasSuffix "%" $stay) | int -}}
{{- if and (ne $stay "") (ge $staying $pods) -}}
{{- $wrong = append $wrong (printf "serving.pdb.minAvailable is %s of %d pods: no node with one of them could ever be drained. Leave it empty and keep serving.pdb.maxUnavailable at 1, or run more pods (serving.replicas)." $stay $pods) -}}
{{- else if and (eq $stay "") (has (toString $pdb.maxUnavailable) (list "0" "0%")) -}}
{{- $wrong = append $wrong "serving.pdb.maxUnavailable is 0: no node with a pod of the service could ever be drained. Set it to 1." -}}
{{- end -}}
{{- end -}}

{{- range $key := list "churn/bento-tag" "churn/fence" -}}
{{- if hasKey $v.serving.podAnnotations $key -}}
{{- $wrong = append $wrong (printf "serving.podAnnotations has %s, which belongs to promotion: an upgrade would put it back. Remove it, and choose what is served by kubectl churn rollback --to N." $key) -}}
{{- end -}}
{{- end -}}

{{- range $job := list "materialize" "drift" "retrain" "promote" "score" -}}
{{- $schedule := (get $v.jobs $job).schedule -}}
{{- if not (include "churn.isCron" $schedule) -}}
{{- $wrong = append $wrong (printf "jobs.%s.schedule is %q; expected five fields - minute, hour, day, month, weekday - such as \"0 3 * * *\" for three o'clock each day, or @daily. The time zone is jobs.timeZone." $job $schedule) -}}
{{- end -}}
{{- end -}}
{{- if gt (int $v.jobs.drift.driftK) (int $v.jobs.drift.driftN) -}}
{{- $wrong = append $wrong (printf "jobs.drift.driftK (%v) is more than jobs.drift.driftN (%v): so many of the last snapshots can never have drifted. Raise driftN." $v.jobs.drift.driftK $v.jobs.drift.driftN) -}}
{{- end -}}

{{- if and $v.asOf (ne $v.asOf (toDate "2006-01-02" $v.asOf | date "2006-01-02")) -}}
{{- $wrong = append $wrong (printf "asOf is %s, which is no day of the calendar; expected such as 2024-02-29." $v.asOf) -}}
{{- end -}}

{{- $soak := include "churn.seconds" $v.promotion.promotionSoak | int -}}
{{- if gt $soak 1200 -}}
{{- $wrong = append $wrong (printf "promotion.promotionSoak is %s; expected at most 20m: after half an hour Kubernetes calls the rollout failed." $v.promotion.promotionSoak) -}}
{{- end -}}
{{- $limit := (include "churn.job" (list . "promote") | fromYaml).activeDeadlineSeconds | int -}}
{{- if ge (add (include "churn.seconds" $v.promotion.promotionDeadline) $soak) $limit -}}
{{- $wrong = append $wrong (printf "jobs.promote.activeDeadlineSeconds is %d: promotion would be stopped before promotion.promotionDeadline (%s) and promotion.promotionSoak (%s) are over. Raise it, or lower these." $limit $v.promotion.promotionDeadline $v.promotion.promotionSoak) -}}
{{- end -}}

{{- $source := $v.snapshots.source -}}
{{- if contains "://" $source -}}
{{- if not (regexMatch "^(https?|s3|gs)://[^/]" $source) -}}
{{- $wrong = append $wrong (printf "snapshots.source is %q; expected a URL that begins with https://, http://, s3:// or gs://, or a folder below /data." (regexReplaceAll "//.*@" $source "//***@")) -}}
{{- else if (urlParse $source).userinfo -}}
{{- $wrong = append $wrong "snapshots.source holds a user or password, which everybody could read in a ConfigMap. Give credentials by jobs.extraEnv from a Secret, or by serviceAccount.annotations." -}}
{{- else if and (hasPrefix "http" $source) (not (regexMatch "\\.(zip|tar\\.gz|tgz)$" (urlParse $source).path)) -}}
{{- $wrong = append $wrong (printf "snapshots.source is %q; expected an archive: .zip, .tar.gz or .tgz." $source) -}}
{{- end -}}
{{- else if and $source (or (not (regexMatch "^/data/[^/]" $source)) (contains "/../" (print $source "/"))) -}}
{{- $wrong = append $wrong (printf "snapshots.source is %q; expected a folder below /data, where jobs mount the data volume, such as /data/incoming, or a URL (https://, s3://, gs://)." $source) -}}
{{- end -}}

{{- if $v.mlflow.enabled -}}
{{- if $v.externalMlflow.url -}}
{{- $wrong = append $wrong "externalMlflow.url is set, but mlflow.enabled is true. Set mlflow.enabled to false to use yours, or remove the url." -}}
{{- end -}}
{{- else if not (regexMatch "^https?://[^/@]+(/|$)" $v.externalMlflow.url) -}}
{{- $wrong = append $wrong (printf "mlflow.enabled is false, and externalMlflow.url is %q; expected such as https://mlflow.example.com, without user or password." (regexReplaceAll "//.*@" $v.externalMlflow.url "//***@")) -}}
{{- end -}}
{{- if and $v.postgres.enabled $v.externalPostgres.existingSecret -}}
{{- $wrong = append $wrong "externalPostgres.existingSecret is set, but postgres.enabled is true. Set postgres.enabled to false to use yours, or remove the Secret's name." -}}
{{- else if not (or $v.postgres.enabled $v.externalPostgres.existingSecret) -}}
{{- $wrong = append $wrong "postgres.enabled is false, and externalPostgres.existingSecret names no Secret with the URLs of yours. Make one with keys database-url, serving-database-url, feast-registry-url and mlflow-backend-url, and set it." -}}
{{- end -}}
{{- if and $v.valkey.enabled $v.externalRedis.existingSecret -}}
{{- $wrong = append $wrong "externalRedis.existingSecret is set, but valkey.enabled is true. Set valkey.enabled to false to use yours, or remove the Secret's name." -}}
{{- else if not (or $v.valkey.enabled $v.externalRedis.existingSecret) -}}
{{- $wrong = append $wrong "valkey.enabled is false, and externalRedis.existingSecret names no Secret with the URL of yours. Make one with key online-store-url, and set it." -}}
{{- end -}}

{{- $asked := $v.serving.apiKeys.existingSecret -}}
{{- if and $asked (not (or $v.existingSecret $v.postgres.enabled $v.valkey.enabled)) -}}
{{- $wrong = append $wrong "serving.apiKeys.existingSecret is set, but no Secret holds the token with which promotion asks the service. Make one with key probe-token, 16 random characters or more, and set existingSecret." -}}
{{- end -}}
{{- if and $asked (has $asked (list ($v.existingSecret | default (include "churn.fullname" .)) $v.externalPostgres.existingSecret $v.externalRedis.existingSecret)) -}}
{{- $wrong = append $wrong (printf "serving.apiKeys.existingSecret is %s, the Secret of passwords and URLs: each of them would be a key for /predict, in every serving pod. Make a Secret of its own: kubectl -n %s create secret generic api-keys --from-literal=CALLER=$(openssl rand -hex 32)." $asked .Release.Namespace) -}}
{{- end -}}

{{- $owner := dig "metadata" "annotations" "meta.helm.sh/release-name" "" (lookup "batch/v1" "CronJob" .Release.Namespace (print $v.jobs.namePrefix "promote")) -}}
{{- if and $owner (ne $owner .Release.Name) -}}
{{- $wrong = append $wrong (printf "release %s in namespace %s has CronJobs of these names already. Set jobs.namePrefix, such as %s-, or choose another namespace." $owner .Release.Namespace .Release.Name) -}}
{{- end -}}

{{- /* Secrets that must be there before us. Only where the API answers: each namespace has this ConfigMap. */ -}}
{{- if and (not $wrong) (lookup "v1" "ConfigMap" .Release.Namespace "kube-root-ca.crt") -}}
{{- $keys := list "database-url" "serving-database-url" "feast-registry-url" "online-store-url" -}}
{{- if $v.mlflow.enabled }}{{ $keys = append $keys "mlflow-backend-url" }}{{ end -}}
{{- range splitList "," (include "churn.secretKeys" .) }}{{ if . }}{{ $keys = append $keys . }}{{ end }}{{ end -}}
{{- if and $asked $v.existingSecret }}{{ $keys = append $keys "probe-token" }}{{ end -}}
{{- $missing := dict -}}
{{- range uniq $keys -}}
{{- $ref := include "churn.secret" (list $ .) | fromYaml -}}
{{- if or $v.existingSecret (ne $ref.name $name) -}}
{{- if not (hasKey ((lookup "v1" "Secret" $.Release.Namespace $ref.name).data | default dict) $ref.key) -}}
{{- $_ := set $missing $ref.name (append (get $missing $ref.name | default list) $ref.key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $secret, $lacks := $missing -}}
{{- if lookup "v1" "Secret" $.Release.Namespace $secret -}}
{{- $wrong = append $wrong (printf "Secret %s in namespace %s lacks %s. Add what is missing." $secret $.Release.Namespace (join ", " $lacks)) -}}
{{- else -}}
{{- $wrong = append $wrong (printf "there is no Secret %s in namespace %s, which existingSecret, externalPostgres.existingSecret or externalRedis.existingSecret names. Make it first: kubectl -n %s create secret generic %s --from-literal=…, with keys %s." $secret $.Release.Namespace $.Release.Namespace $secret (join ", " $lacks)) -}}
{{- end -}}
{{- end -}}
{{- if and $asked (not (lookup "v1" "Secret" .Release.Namespace $asked).data) -}}
{{- $wrong = append $wrong (printf "there is no Secret %s with a key in it in namespace %s, which serving.apiKeys.existingSecret names. Make it first: kubectl -n %s create secret generic %s --from-literal=CALLER=$(openssl rand -hex 32)." $asked .Release.Namespace .Release.Namespace $asked) -}}
{{- end -}}
{{- end -}}

{{- if $wrong -}}
{{- fail (printf "\n\n- %s\n" (join "\n- " $wrong)) -}}
{{- end -}}
{{- end }}

{{/* churn.seconds: 3m as a number of seconds. Used by churn.validate. */}}
{{- define "churn.seconds" -}}
{{- $unit := regexFind "[smhd]$" . -}}
{{- mul (trimSuffix $unit .) (get (dict "s" 1 "m" 60 "h" 3600 "d" 86400) $unit) -}}
{{- end }}

{{/* churn.isCron: "yes" if text is a schedule Kubernetes takes. Used by churn.validate. */}}
{{- define "churn.isCron" -}}
{{- if regexMatch "^@(hourly|daily|midnight|weekly|monthly|yearly|annually|every [0-9hms]+)$" . -}}
yes
{{- else if regexMatch "^\\S+ +\\S+ +\\S+ +\\S+ +\\S+$" . -}}
{{- $ok := true -}}
{{- $fields := regexSplit " +" . -1 -}}
{{- range $i, $most := list 59 23 31 12 6 -}}
{{- $least := index (list 0 0 1 1 0) $i -}}
{{- range splitList "," (index $fields $i) -}}
{{- $value := regexFind "^(\\*|\\?|([0-9]+|[A-Za-z]{3})(-([0-9]+|[A-Za-z]{3}))?)(/[1-9][0-9]*)?$" . -}}
{{- if not $value }}{{ $ok = false }}{{ end -}}
{{- range regexFindAll "[0-9]+" (regexReplaceAll "/[0-9]+$" $value "") -1 -}}
{{- if or (gt (int .) $most) (lt (int .) $least) }}{{ $ok = false }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $ok }}yes{{ end -}}
{{- end -}}
{{- end }}
