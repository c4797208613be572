{{/* churn.validate: refuses values that contradict each other or the cluster, all at once, each with its remedy. Unknown keys,
     types and forms are the schema's (values.schema.json). Used by validate/first/validate.yaml. */}}
{{- define "churn.validate" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- range $part := list "resources" "volumes" "stores" "pods" "routes" "jobs" -}}
{{- range splitList "\n" (include (print "churn.wrong." $part) $) }}{{ with trim . }}{{ $wrong = append $wrong . }}{{ end }}{{ end -}}
{{- end -}}

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
{{- else if and (eq $stay "") (has (toString $pdb.maxUnavailable) (list "0" "0%" "<nil>")) -}}
{{- $wrong = append $wrong "serving.pdb.maxUnavailable is 0, or nothing: no node with a pod of the service could ever be drained. Set it to 1." -}}
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
{{- else if include "churn.isNever" $schedule -}}
{{- $wrong = append $wrong (printf "jobs.%s.schedule is %q, a day that never comes. Up to 28 every month has it." $job $schedule) -}}
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
{{- else if regexMatch "^[a-z0-9]+://[^/?#]*@" $source -}}
{{- $wrong = append $wrong "snapshots.source holds a user or password, which everybody could read in a ConfigMap. Give credentials by jobs.extraEnv from a Secret, or by serviceAccount.annotations." -}}
{{- else if not (and (regexMatch "^[a-z0-9]+://(\\[[0-9a-fA-F:]+\\]|[^/?#:%\\s]+)(:[0-9]{1,5})?([/?#]|$)" $source) (regexMatch "^([^%]|%[0-9a-fA-F]{2})*$" $source)) -}}
{{- $wrong = append $wrong (printf "snapshots.source is %q, of which no host or path can be read; expected such as https://example.com/snapshots.tar.gz or s3://bucket/prefix." $source) -}}
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
{{- else if not (regexMatch "^https?://(\\[[0-9a-fA-F:]+\\]|[^/@:\\s]+)(:[0-9]{1,5})?(/\\S*)?$" $v.externalMlflow.url) -}}
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
{{- if regexMatch "^@(hourly|daily|midnight|weekly|monthly|yearly|annually|every ([0-9]+[hms])+)$" . -}}
yes
{{- else if regexMatch "^\\S+ +\\S+ +\\S+ +\\S+ +\\S+$" . -}}
{{- $ok := true -}}
{{- $fields := regexSplit " +" . -1 -}}
{{- range $i, $most := list 59 23 31 12 6 -}}
{{- $least := index (list 0 0 1 1 0) $i -}}
{{- $names := index (list list list list (splitList " " "NONE JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC") (splitList " " "SUN MON TUE WED THU FRI SAT")) $i -}}
{{- range splitList "," (index $fields $i) -}}
{{- $value := upper . -}}
{{- range $number, $name := $names }}{{ $value = regexReplaceAll (printf "\\b%s\\b" $name) $value (toString $number) }}{{ end -}}
{{- $value = regexReplaceAll "\\b0+([0-9])" $value "${1}" -}}
{{- $value = regexFind "^(\\*|\\?|[0-9]+(-[0-9]+)?)(/[1-9][0-9]*)?$" $value -}}
{{- if not $value }}{{ $ok = false }}{{ end -}}
{{- $ends := regexFindAll "[0-9]+" (regexReplaceAll "/[0-9]+$" $value "") -1 -}}
{{- range $ends -}}
{{- if or (gt (int .) $most) (lt (int .) $least) (gt (first $ends | int) (int .)) }}{{ $ok = false }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $ok }}yes{{ end -}}
{{- end -}}
{{- end }}

{{/* churn.isNever: "yes" if a schedule is for days that no month of its has, such as 0 6 30 2 *. Used by churn.validate. */}}
{{- define "churn.isNever" -}}
{{- $fields := regexSplit " +" . -1 -}}
{{- if eq (len $fields) 5 -}}
{{- $day := index $fields 2 -}}
{{- if and (regexMatch "^(30|31)(,(30|31))*$" $day) (has (index $fields 4) (list "*" "?")) -}}
{{- $longest := 0 -}}
{{- range splitList "," (index $fields 3 | upper) -}}
{{- $longest = max $longest (ternary 29 (ternary 30 31 (regexMatch "^(0?[469]|11|APR|JUN|SEP|NOV)$" .)) (regexMatch "^(0?2|FEB)$" .)) -}}
{{- end -}}
{{- if lt (int64 $longest) (ternary 30 31 (contains "30" $day) | int64) }}yes{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* churn.quantity: 512Mi, 0.5, 100m, 1e9 as a number of bytes or cores. Used by churn.wrong.*. */}}
{{- define "churn.quantity" -}}
{{- $text := include "churn.text" . -}}
{{- $unit := regexFind "([KMGTPE]i|[mkMGTPE])$" $text -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 -}}
{{- mulf (trimSuffix $unit $text | float64) (get $units $unit) -}}
{{- end }}

{{/* churn.storeBytes: 256mb, 256MB or 16384 (no unit: of 8 kB) as a number of bytes, as Valkey and PostgreSQL count. Used by churn.wrong.stores. */}}
{{- define "churn.storeBytes" -}}
{{- $unit := regexFind "[a-z]*$" (lower .) -}}
{{- mul (regexFind "^[0-9]+" .) (get (dict "" 8192 "kb" 1024 "mb" 1048576 "gb" 1073741824 "tb" 1099511627776) $unit) -}}
{{- end }}

{{/* The rest is churn.validate's, a group of values each: what is wrong with them, a line each, with the remedy. */}}

{{- define "churn.wrong.resources" -}}
{{- $v := .Values -}}
{{- $all := dict "serving" $v.serving "bootstrap" $v.bootstrap -}}
{{- range list "defaults" "materialize" "drift" "retrain" "promote" "score" }}{{ $_ := set $all (print "jobs." .) (get $v.jobs .) }}{{ end -}}
{{- range list "mlflow" "postgres" "valkey" }}{{ if (get $v .).enabled }}{{ $_ := set $all . (get $v .) }}{{ end }}{{ end -}}
{{- range $group, $values := $all -}}
{{- $key := print $group ".resources" -}}
{{- $resources := $values.resources | default dict -}}
{{- $limits := $resources.limits | default dict -}}
{{- range $name, $request := $resources.requests }}
{{- $asked := include "churn.quantity" $request | float64 -}}
{{- $said := include "churn.text" $request -}}
{{- $limit := include "churn.text" (get $limits $name) -}}
{{- if has $name (list "cpu" "memory" "ephemeral-storage") }}
{{- if and (hasKey $limits $name) (gt $asked (include "churn.quantity" $limit | float64)) }}
{{ printf "%s.requests.%s is %s, above %s.limits.%s (%s): Kubernetes refuses such a pod. Lower the request or raise the limit." $key $name $said $key $name $limit }}
{{- end }}
{{- else if or (not (hasKey $limits $name)) (ne $asked (include "churn.quantity" $limit | float64)) }}
{{ printf "%s.limits.%s has to be as much as the request (%s), no more and no less, of what cannot be shared." $key $name $said }}
{{- end }}
{{- /* Training may want a large node for itself; nothing else has a use for so many. */ -}}
{{- if and (eq $name "cpu") (gt $asked (ternary 128.0 32.0 (hasPrefix "jobs." $group))) }}
{{ printf "%s.requests.cpu is %s cores; expected fewer, such as 500m, which is half of one." $key $said }}
{{- end }}
{{- end }}
{{- range $kind, $amounts := $resources }}
{{- $bytes := include "churn.quantity" ($amounts.memory | default 0) | float64 }}
{{- if and (gt $bytes 0.0) (lt $bytes 1048576.0) }}
{{ printf "%s.%s.memory is %s, which is less than 1Mi; expected a unit, such as 512Mi." $key $kind (include "churn.text" $amounts.memory) }}
{{- end }}
{{- end }}
{{- end }}
{{- $spool := $v.serving.spool.size -}}
{{- with (get ($v.serving.resources | default dict) "limits") -}}
{{- $room := get . "ephemeral-storage" -}}
{{- if and $room (lt (include "churn.quantity" $room | float64) (divf (include "churn.quantity" $spool) 2)) }}
{{ printf "serving.resources.limits.ephemeral-storage is %s, less than half of serving.spool.size (%s), which predictions may take: the pod would be evicted, and they be lost. Raise the limit, or lower serving.spool.size." (include "churn.text" $room) $spool }}
{{- end }}
{{- end }}
{{- if $v.serving.autoscaling.enabled -}}
{{- $target := include "churn.text" $v.serving.autoscaling.targetCPU -}}
{{- $limit := dig "limits" "cpu" "" ($v.serving.resources | default dict) -}}
{{- if gt (include "churn.quantity" $target | float64) 1.0 }}
{{ printf "serving.autoscaling.targetCPU is %s, which pods never reach: a pod uses one core at most; expected such as 600m." $target }}
{{- else if and $limit (le (include "churn.quantity" $limit | float64) (include "churn.quantity" $target | float64)) }}
{{ printf "serving.autoscaling.targetCPU is %s, which pods never reach: serving.resources.limits.cpu is %s. Lower the target, or remove the limit." $target (include "churn.text" $limit) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "churn.wrong.volumes" -}}
{{- $v := .Values -}}
{{- $before := list -}}
{{- range $store := list "data" "mlflow" "postgres" "valkey" -}}
{{- $of := get $v $store -}}
{{- if or (eq $store "data") $of.enabled -}}
{{- $claim := $of.persistence.existingClaim -}}
{{- if and (not $claim) (lt (include "churn.quantity" $of.persistence.size | float64) 1048576.0) }}
{{ printf "%s.persistence.size is %s, which is less than 1Mi; expected a unit, such as 5Gi." $store (include "churn.text" $of.persistence.size) }}
{{- end }}
{{- range $other := $before -}}
{{- /* data and mlflow have the same owner and folders that do not meet. */ -}}
{{- if and $claim (ne $store "mlflow") (eq $claim (get $v $other).persistence.existingClaim) }}
{{ printf "%s.persistence.existingClaim and %s.persistence.existingClaim are both %s: their pods run as different users and may be on different nodes. Give each a claim of its own." $other $store $claim }}
{{- end }}
{{- end }}
{{- $before = append $before $store -}}
{{- end }}
{{- end }}
{{- end }}

{{- define "churn.wrong.stores" -}}
{{- $v := .Values -}}
{{- with $v.mlflow }}{{ if and .enabled (regexMatch "^(s3|gs)://(/|$|[^/]*@)" (.artifactsDestination | default "")) }}
{{ print "mlflow.artifactsDestination names no bucket, or holds a user or password; expected such as s3://bucket/mlflow, with credentials by mlflow.envFrom." }}
{{- end }}{{ end }}
{{- with $v.valkey }}{{ if .enabled -}}
{{- $most := include "churn.storeBytes" .maxMemory -}}
{{- $limit := dig "limits" "memory" "" (.resources | default dict) -}}
{{- /* Twice is what it needs while the append-only file is rewritten; buffers and fragmentation alone are a quarter. */ -}}
{{- if and $limit (lt (include "churn.quantity" $limit | float64) (mulf $most 1.25)) }}
{{ printf "valkey.maxMemory is %s, but valkey.resources.limits.memory is %s: the server, which needs at least a quarter more than its data, would be killed before it says that it is full. Rather raise valkey.resources.limits.memory to twice it, %vMi, or lower valkey.maxMemory." .maxMemory (include "churn.text" $limit) (divf (mul $most 2) 1048576 | ceil | int64) }}
{{- end }}
{{- if and .appendOnly (not .persistence.existingClaim) (lt (include "churn.quantity" .persistence.size | float64) (float64 $most)) }}
{{ printf "valkey.persistence.size is %s, less than valkey.maxMemory (%s): what the store holds could not be kept. Raise it to twice valkey.maxMemory, or set valkey.appendOnly to false." (include "churn.text" .persistence.size) .maxMemory }}
{{- end }}
{{- end }}{{ end }}
{{- with $v.postgres }}{{ if .enabled -}}
{{- $before := "" -}}
{{- range .args -}}
{{- $setting := regexReplaceAll "^-c\\s+" . "" -}}
{{- if or (ne . $setting) (and (regexMatch "^[a-z_.]+ *=" .) (ne $before "-c")) }}
{{ printf "postgres.args holds %q; expected [\"-c\", %q]." . $setting }}
{{- end }}
{{- $buffers := regexFind "^(-c|--)?shared_buffers *= *[0-9]+(kB|MB|GB|TB)?$" . | trimPrefix "-c" | trimPrefix "--" -}}
{{- $limit := dig "limits" "memory" "" ($v.postgres.resources | default dict) -}}
{{- if and $buffers $limit (ge (include "churn.storeBytes" (regexFind "[0-9]+[a-zA-Z]*$" $buffers) | float64) (include "churn.quantity" $limit | float64)) }}
{{ printf "postgres.args sets %s, which postgres.resources.limits.memory (%s) has no room for: the server would be killed when it fills them. Lower it, or raise postgres.resources.limits.memory." $buffers (include "churn.text" $limit) }}
{{- end }}
{{- $before = . -}}
{{- end }}
{{- if eq $before "-c" }}
{{ print "postgres.args ends with -c; expected a setting after it, such as [\"-c\", \"shared_buffers=256MB\"]." }}
{{- end }}
{{- end }}{{ end }}
{{- end }}

{{- define "churn.wrong.pods" -}}
{{- $v := .Values -}}
{{- $enabled := list "serving" "jobs" -}}
{{- range list "mlflow" "postgres" "valkey" }}{{ if (get $v .).enabled }}{{ $enabled = append $enabled . }}{{ end }}{{ end -}}
{{- $ours := dict
      "serving CHURN_BENTO_DIR" "but the container's command says where the bento is. Remove it."
      "jobs CHURN_DEPLOYMENT" "but the jobs' Roles are for the chart's. Remove it; set fullnameOverride instead."
      "jobs CHURN_CRONJOB_PREFIX" "but the CronJobs are called by the chart. Remove it; set jobs.namePrefix instead." -}}
{{- range $group := $enabled -}}
{{- $names := list -}}
{{- range $entry := (get $v $group).extraEnv -}}
{{- if and .value .valueFrom }}
{{ printf "%s.extraEnv gives %s both value and valueFrom; keep one of them." $group .name }}
{{- end }}
{{- if has .name $names }}
{{ printf "%s.extraEnv sets %s twice; keep one of them." $group .name }}
{{- end }}
{{- $names = append $names .name -}}
{{- with get $ours (print $group " " .name) }}
{{ printf "%s.extraEnv sets %s, %s" $group $entry.name . }}
{{- end }}
{{- end }}
{{- range (get $v $group).tolerations -}}
{{- $shown := toJson . -}}
{{- if and (eq (.operator | default "") "Exists") .value }}
{{ printf "%s.tolerations has %s, but Exists looks at no value. Choose operator: Equal, or remove the value." $group $shown }}
{{- end }}
{{- if not (or .key (eq (.operator | default "") "Exists")) }}
{{ printf "%s.tolerations has %s, which needs a key; operator: Exists without one tolerates every taint." $group $shown }}
{{- end }}
{{- if and (hasKey . "tolerationSeconds") (ne (.effect | default "") "NoExecute") }}
{{ printf "%s.tolerations has %s, but only NoExecute waits. Choose to set effect: NoExecute, or remove tolerationSeconds." $group $shown }}
{{- end }}
{{- end }}
{{- end }}
{{- $pod := $v.podSecurityContext -}}
{{- $container := $v.containerSecurityContext -}}
{{- $key := ternary "containerSecurityContext" "podSecurityContext" (hasKey $container "runAsUser") -}}
{{- $user := dig "runAsUser" (dig "runAsUser" "" $pod) $container -}}
{{- if and (eq (toString $user) "0") (dig "runAsNonRoot" (dig "runAsNonRoot" true $pod) $container) }}
{{ printf "%s.runAsUser is 0, but pods run with runAsNonRoot: true, and no container would start. Choose another user, or set %s.runAsNonRoot to false." $key $key }}
{{- end }}
{{- if and $container.privileged (not $container.allowPrivilegeEscalation) }}
{{ print "containerSecurityContext.privileged is true without allowPrivilegeEscalation, which Kubernetes refuses. Set containerSecurityContext.allowPrivilegeEscalation to true, or remove privileged." }}
{{- end }}
{{- with $v.images.registry -}}
{{- range $name := list "jobs" "serving" "mlflow" "postgres" "valkey" -}}
{{- $repository := (get $v.images $name).repository -}}
{{- if contains ":" $repository }}
{{ printf "images.%s.repository is %s, with a registry of its own, but images.registry is put before it. Name the image without its registry, or leave images.registry empty." $name $repository }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "churn.wrong.routes" -}}
{{- range .Values.networkPolicy.extraEgress }}{{ range .ports -}}
{{- if and .endPort (or (not (has (kindOf .port) (list "float64" "int64"))) (gt (int .port) (int .endPort))) }}
{{ printf "networkPolicy.extraEgress has ports %s; expected a port that is a number, and an endPort that is not below it." (toJson .) }}
{{- end }}
{{- end }}{{ end }}
{{- with .Values.ingress }}{{ if and .enabled .tls -}}
{{- $host := .host -}}
{{- $found := not $host -}}
{{- $annotations := .annotations -}}
{{- $asks := or (hasKey $annotations "cert-manager.io/cluster-issuer") (hasKey $annotations "cert-manager.io/issuer") (eq (get $annotations "kubernetes.io/tls-acme") "true") -}}
{{- range .tls -}}
{{- if not .hosts }}{{ $found = true }}{{ end -}}
{{- range .hosts -}}
{{- if or (eq . $host) (and (hasPrefix "*." .) (eq (trimPrefix "*" .) (regexReplaceAll "^[^.]+" $host ""))) }}{{ $found = true }}{{ end -}}
{{- end -}}
{{- if and $asks (not .secretName) }}
{{ print "ingress.tls has an entry with no secretName, in which cert-manager would keep the certificate; expected such as [{hosts: [churn.example.com], secretName: churn-tls}]." }}
{{- end }}
{{- if and $asks (not .hosts) }}
{{ print "ingress.tls has an entry with no hosts, for which cert-manager would ask for a certificate; expected such as [{hosts: [churn.example.com], secretName: churn-tls}]." }}
{{- end }}
{{- end }}
{{- if not $found }}
{{ printf "ingress.tls: none of its hosts is ingress.host, %s, which would be answered without TLS or with another's certificate; add %s to the hosts of an entry." $host $host }}
{{- end }}
{{- end }}{{ end }}
{{- end }}

{{- define "churn.wrong.jobs" -}}
{{- $v := .Values -}}
{{- $zone := $v.jobs.timeZone -}}
{{- /* What is unknown is UTC to dateInZone; so is everything on a machine without the tz database. */ -}}
{{- $day := toDate "2006-01-02" "2024-01-15" -}}
{{- $unknown := and (eq (dateInZone "MST" $day $zone) "UTC") (ne (dateInZone "MST" $day "Europe/Berlin") "UTC") (not (regexMatch "^(Etc/)?(UTC|UCT|Universal|Zulu)$" $zone)) -}}
{{- if or $unknown (eq (lower $zone) "local") }}
{{ printf "jobs.timeZone is %s, which is no time zone of CronJobs; expected a name of the tz database, such as Europe/Berlin or Etc/UTC." $zone }}
{{- end }}
{{- range $job := list "defaults" "materialize" "drift" "retrain" "promote" "score" -}}
{{- $args := (get $v.jobs $job).args | default list -}}
{{- if and $args (not (hasPrefix "-" (first $args))) }}
{{ printf "jobs.%s.args is %s; expected that it begins with an option, such as --dry-run: the job's name stands before it already." $job (toJson $args) }}
{{- end }}
{{- range $args -}}
{{- if regexMatch "^--[a-z-]+\\s" . }}
{{ printf "jobs.%s.args holds %q; expected [%q, %q]." $job . (regexFind "^\\S+" .) (regexReplaceAll "^\\S+\\s+" . "") }}
{{- end }}
{{- end }}
{{- end }}
{{- $from := ternary "promote" "defaults" (hasKey $v.jobs.promote "args") -}}
{{- range (get $v.jobs $from).args -}}
{{- if regexMatch "^--as-of\\b" . }}
{{ printf "jobs.%s.args has --as-of, but promote knows no day. Set asOf, or args of the jobs that know one." $from }}
{{- end }}
{{- end }}
{{- with $v.jobs.featureStore -}}
{{- $store := fromYaml . -}}
{{- $error := get $store "Error" | default "" -}}
{{- if or (contains "converting YAML" $error) (regexMatch "^\\S+\\.ya?ml$" .) (not (or $error $store.project)) }}
{{ print "jobs.featureStore is no YAML with a project; expected the text of Feast's feature_store.yaml, such as project: ${feast_project} and so on; a file: --set-file jobs.featureStore=FILE." }}
{{- end }}
{{- end }}
{{- /* A quarter of them churn, jobs/simulate.py; somewhat more by chance. */ -}}
{{- $holdout := mulf $v.simulate.users (float64 $v.jobs.retrain.holdoutShare) -}}
{{- if and (not $v.snapshots.source) (lt (mulf $holdout 0.3) (float64 $v.gate.minClassRows)) }}
{{ printf "simulate.users is %d: some %d churners in the holdout are fewer than gate.minClassRows (%d), and no model would pass. Raise simulate.users, or lower gate.minClassRows." (int $v.simulate.users) (divf $holdout 4 | int) (int $v.gate.minClassRows) }}
{{- end }}
{{- end }}
