"""Wrong values are refused when the chart is rendered; the message names the key, and for a contradiction the remedy.

What only the cluster knows (a Secret that is missing, a release that is there) is in test_api_server.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml

from tests.charts.rendering import CHART, Chart, find_helm

UNKNOWN = "additional properties {!r} not allowed"


def unknown(key: str) -> str:
    """What is said of a key that nobody knows."""
    return UNKNOWN.format(key)


# values · the key that the message has to name · what else it has to say
Case = tuple[str, str, str]

TYPOS: list[Case] = [
    ("servings: {replicas: 2}", "", unknown("servings")),
    ("replicas: 2", "", unknown("replicas")),
    ("image: {tag: v1}", "", unknown("image")),
    ("existingsecret: x", "", unknown("existingsecret")),
    ("images: {job: {tag: v1}}", "images", unknown("job")),
    ("images: {jobs: {name: x}}", "images.jobs", unknown("name")),
    ("images: {pullpolicy: Always}", "images", unknown("pullpolicy")),
    ("snapshots: {url: 's3://b/p'}", "snapshots", unknown("url")),
    ("simulate: {user: 5000}", "simulate", unknown("user")),
    ("serving: {replica: 2}", "serving", unknown("replica")),
    ("serving: {minReadySeconds: 5}", "serving", unknown("minReadySeconds")),
    ("serving: {env: []}", "serving", unknown("env")),
    ("serving: {autoscaling: {min: 2}}", "serving.autoscaling", unknown("min")),
    ("serving: {pdb: {minavailable: 1}}", "serving.pdb", unknown("minavailable")),
    ("serving: {probes: {ready: {}}}", "serving.probes", unknown("ready")),
    ("serving: {probes: {readiness: {path: /x}}}", "serving.probes.readiness", unknown("path")),
    ("serving: {resources: {request: {cpu: 1}}}", "serving.resources", unknown("request")),
    ("serving: {spool: {limit: 1Gi}}", "serving.spool", unknown("limit")),
    ("serving: {service: {port: 80}}", "serving.service", unknown("port")),
    ("serving: {extraEnv: [{name: A, val: b}]}", "serving.extraEnv.0", unknown("val")),
    ("ingress: {hosts: [a]}", "ingress", unknown("hosts")),
    ("httpRoute: {hostname: a}", "httpRoute", unknown("hostname")),
    ("jobs: {retrains: {}}", "jobs", unknown("retrains")),
    ("jobs: {defaults: {schedule: '0 1 * * *'}}", "jobs.defaults", unknown("schedule")),
    ("jobs: {drift: {threshold: 0.5}}", "jobs.drift", unknown("threshold")),
    ("jobs: {retrain: {holdout: 0.2}}", "jobs.retrain", unknown("holdout")),
    ("jobs: {promote: {mode: auto}}", "jobs.promote", unknown("mode")),
    ("jobs: {materialize: {source: x}}", "jobs.materialize", unknown("source")),
    ("jobs: {score: {share: 0.1}}", "jobs.score", unknown("share")),
    ("bootstrap: {enabled: false}", "bootstrap", unknown("enabled")),
    ("gate: {delta: 0.01}", "gate", unknown("delta")),
    ("promotion: {mode: manual}", "promotion", unknown("mode")),
    ("mlflow: {persistence: {storage: 1Gi}}", "mlflow.persistence", unknown("storage")),
    ("externalMlflow: {uri: x}", "externalMlflow", unknown("uri")),
    ("postgres: {password: x}", "postgres", unknown("password")),
    ("externalPostgres: {url: x}", "externalPostgres", unknown("url")),
    ("externalPostgres: {keys: {database: x}}", "externalPostgres.keys", unknown("database")),
    ("valkey: {maxmemory: 1gb}", "valkey", unknown("maxmemory")),
    ("externalRedis: {key: x}", "externalRedis", unknown("key")),
    ("data: {persistence: {accessModes: []}}", "data.persistence", unknown("accessModes")),
    ("networkPolicy: {egress: []}", "networkPolicy", unknown("egress")),
    ("metrics: {enabled: true}", "metrics", unknown("enabled")),
    ("metrics: {serviceMonitor: {scrapeInterval: 1m}}", "metrics.serviceMonitor", unknown("scrapeInterval")),
    ("serviceAccount: {create: false}", "serviceAccount", unknown("create")),
]

TYPES: list[Case] = [
    ("serving: {replicas: many}", "serving.replicas", "want integer"),
    ("serving: {replicas: '2'}", "serving.replicas", "want integer"),
    ("serving: {replicas: 1.5}", "serving.replicas", "want integer"),
    ("serving: {replicas: -1}", "serving.replicas", ""),
    ("serving: {drainSeconds: 5s}", "serving.drainSeconds", "want integer"),
    ("serving: {drainSeconds: 601}", "serving.drainSeconds", "600"),
    ("serving: {maxConcurrency: 0}", "serving.maxConcurrency", ""),
    ("serving: {topologySpread: always}", "serving.topologySpread", "DoNotSchedule"),
    ("serving: {nodeSelector: {gpu: true}}", "serving.nodeSelector.gpu", "want string"),
    ("serving: {tolerations: {key: a}}", "serving.tolerations", "want array"),
    ("serving: {podAnnotations: {a: 1}}", "serving.podAnnotations.a", "want string"),
    ("serving: {podLabels: [a]}", "serving.podLabels", "want object"),
    ("serving: {extraEnv: {A: b}}", "serving.extraEnv", "want array"),
    ("serving: {extraEnv: [{value: b}]}", "serving.extraEnv.0", "'name'"),
    ("serving: {extraEnv: [{name: A, value: 1}]}", "serving.extraEnv.0.value", "want string"),
    ("serving: {resources: {requests: {cpu: lots}}}", "serving.resources.requests.cpu", "does not match"),
    ("serving: {resources: {limits: {memory: 512MB}}}", "serving.resources.limits.memory", "does not match"),
    ("serving: {spool: {size: 512}}", "serving.spool.size", "want string"),
    ("serving: {spool: {size: 512M}}", "serving.spool.size", "does not match"),
    ("serving: {spool: {fsync: always}}", "serving.spool.fsync", "'batch'"),
    ("serving: {service: {type: ExternalName}}", "serving.service.type", "'LoadBalancer'"),
    ("serving: {probes: {startup: {periodSeconds: 0}}}", "serving.probes.startup.periodSeconds", ""),
    ("serving: {pdb: {maxUnavailable: half}}", "serving.pdb.maxUnavailable", "does not match"),
    ("serving: {autoscaling: {enabled: 'yes'}}", "serving.autoscaling.enabled", "want boolean"),
    ("serving: {autoscaling: {targetCPU: fast}}", "serving.autoscaling.targetCPU", "does not match"),
    ("images: {pullPolicy: Sometimes}", "images.pullPolicy", "'IfNotPresent'"),
    ("images: {pullSecrets: [{name: a}]}", "images.pullSecrets.0", "want string"),
    ("images: {jobs: {tag: 17}}", "images.jobs.tag", "want string"),
    ("images: {jobs: {digest: sha256:abc}}", "images.jobs.digest", "does not match"),
    ("images: {jobs: {repository: ''}}", "images.jobs.repository", "does not match"),
    ("snapshots: {source: [a]}", "snapshots.source", "want string"),
    ("snapshots: {maxMissingShare: 5}", "snapshots.maxMissingShare", ""),
    ("snapshots: {maxMissingShare: 5%}", "snapshots.maxMissingShare", "does not match"),
    ("simulate: {users: 10}", "simulate.users", "1,000"),
    ("simulate: {months: 0}", "simulate.months", ""),
    ("ingress: {enabled: 1}", "ingress.enabled", "want boolean"),
    ("ingress: {host: 'https://churn.example.com'}", "ingress.host", "does not match"),
    ("ingress: {host: Churn.example.com}", "ingress.host", "does not match"),
    ("ingress: {tls: true}", "ingress.tls", "want array"),
    ("jobs: {namePrefix: EU_}", "jobs.namePrefix", "does not match"),
    ("jobs: {timeZone: ''}", "jobs.timeZone", "does not match"),
    ("jobs: {timeZone: 'Europe Berlin'}", "jobs.timeZone", "does not match"),
    ("jobs: {logLevel: verbose}", "jobs.logLevel", "'DEBUG'"),
    ("jobs: {defaults: {backoffLimit: 11}}", "jobs.defaults.backoffLimit", "10"),
    ("jobs: {defaults: {suspend: 'no'}}", "jobs.defaults.suspend", "want boolean"),
    ("jobs: {defaults: {ttlSecondsAfterFinished: 0}}", "jobs.defaults.ttlSecondsAfterFinished", "60"),
    ("jobs: {defaults: {startingDeadlineSeconds: 5}}", "jobs.defaults.startingDeadlineSeconds", "10"),
    ("jobs: {drift: {args: --dry-run}}", "jobs.drift.args", "want array"),
    ("jobs: {drift: {suspend: maybe}}", "jobs.drift.suspend", "want boolean"),
    ("jobs: {drift: {driftShare: half}}", "jobs.drift.driftShare", "does not match"),
    ("jobs: {drift: {driftShare: 2}}", "jobs.drift.driftShare", ""),
    ("jobs: {drift: {driftThreshold: 0}}", "jobs.drift.driftThreshold", ""),
    ("jobs: {drift: {driftMinRows: 1}}", "jobs.drift.driftMinRows", "30"),
    ("jobs: {retrain: {candidates: []}}", "jobs.retrain.candidates", ""),
    ("jobs: {retrain: {candidates: [xgboost]}}", "jobs.retrain.candidates.0", "'gradient_boosting'"),
    ("jobs: {retrain: {holdoutShare: 1}}", "jobs.retrain.holdoutShare", ""),
    ("jobs: {retrain: {holdoutShare: 0}}", "jobs.retrain.holdoutShare", ""),
    ("jobs: {retrain: {calibration: isotonic}}", "jobs.retrain.calibration", "'sigmoid'"),
    ("jobs: {retrain: {threshold: 0.5}}", "jobs.retrain.threshold", "'top_k'"),
    ("jobs: {retrain: {seed: x}}", "jobs.retrain.seed", "want integer"),
    ("jobs: {score: {scoreCallShare: 0}}", "jobs.score.scoreCallShare", ""),
    ("jobs: {featureStore: {project: churn}}", "jobs.featureStore", "want string"),
    ("gate: {promotionDelta: -0.1}", "gate.promotionDelta", ""),
    ("gate: {bootstrapSamples: 10}", "gate.bootstrapSamples", "100"),
    ("gate: {sliceFloor: 0.05}", "gate.sliceFloor", ""),
    ("promotion: {promotionMode: always}", "promotion.promotionMode", "'manual'"),
    ("promotion: {promotionMode: off}", "promotion.promotionMode", "'off'"),  # YAML's off is false
    ("promotion: {bentosKept: 1}", "promotion.bentosKept", "2"),
    ("mlflow: {replicas: 0}", "mlflow.replicas", ""),
    ("mlflow: {artifactsDestination: /mnt/mlflow}", "mlflow.artifactsDestination", "does not match"),
    ("postgres: {persistence: {size: big}}", "postgres.persistence.size", "does not match"),
    ("externalPostgres: {port: https}", "externalPostgres.port", "want integer"),
    ("externalPostgres: {servingRole: 'churn; DROP'}", "externalPostgres.servingRole", "does not match"),
    ("externalRedis: {port: 70000}", "externalRedis.port", "65,535"),
    ("valkey: {maxMemory: 256Mi}", "valkey.maxMemory", "does not match"),
    ("valkey: {appendOnly: 'yes'}", "valkey.appendOnly", "want boolean"),
    ("data: {persistence: {accessMode: ReadOnlyMany}}", "data.persistence.accessMode", "'ReadWriteMany'"),
    ("networkPolicy: {extraEgress: {to: []}}", "networkPolicy.extraEgress", "want array"),
    ("metrics: {prometheusRule: {runbookUrl: wiki}}", "metrics.prometheusRule.runbookUrl", "does not match"),
    ("metrics: {serviceMonitor: {interval: 30}}", "metrics.serviceMonitor.interval", "want string"),
    ("fixedIds: 10001", "fixedIds", "want boolean"),
    ("extraObjects: {kind: ConfigMap}", "extraObjects", "want array"),
    ("existingSecret: Churn_Secret", "existingSecret", "does not match"),
    ("nameOverride: Churn", "nameOverride", "does not match"),
    ("clusterDomain: .cluster.local", "clusterDomain", "does not match"),
]

DURATIONS_AND_DAYS: list[Case] = [
    (f"{group}: {{{key}: {value}}}", f"{group}.{key}", said)
    for group, key, value, said in [
        ("snapshots", "labelHorizon", "30", "want string"),
        ("snapshots", "labelHorizon", "12h", "does not match"),
        ("snapshots", "labelHorizon", "0d", "does not match"),
        ("snapshots", "labelHorizon", "'30 days'", "does not match"),
        ("snapshots", "labelHorizon", "99999999999d", "does not match"),
        ("serving", "staleAfter", "45", "want string"),
        ("serving", "staleAfter", "1w", "does not match"),
        ("serving", "staleAfter", "99999999999d", "does not match"),
        ("promotion", "promotionDeadline", "3 m", "does not match"),
        ("promotion", "promotionDeadline", "1h30m", "does not match"),
        ("promotion", "promotionSoak", "1.5m", "does not match"),
        ("promotion", "promotionSoak", "-1s", "does not match"),
    ]
] + [
    ("jobs: {retrain: {featureTtl: forever}}", "jobs.retrain.featureTtl", "does not match"),
    ("jobs: {drift: {retrainCooldown: 7}}", "jobs.drift.retrainCooldown", "want string"),
    ("jobs: {drift: {predictionsKept: 29d}}", "jobs.drift.predictionsKept", "does not match"),
    ("jobs: {drift: {retrainCooldown: 99999999999d}}", "jobs.drift.retrainCooldown", "does not match"),
    ("asOf: yesterday", "asOf", "does not match"),
    ("asOf: 29.02.2024", "asOf", "does not match"),
    ("asOf: 2024-02-29T12:00:00Z", "asOf", "does not match"),
    ("asOf: 2024-13-01", "asOf", "does not match"),
    ("asOf: 2024-02-30", "asOf", "is no day of the calendar"),
    ("asOf: 2023-02-29", "asOf", "is no day of the calendar"),
    ("asOf: 20240229", "asOf", "want string"),
]

SCHEDULES: list[Case] = [
    (f"jobs: {{{job}: {{schedule: '{schedule}'}}}}", f"jobs.{job}.schedule", said)
    for job, schedule, said in [
        ("drift", "often", 'is "often"; expected five fields'),
        ("drift", "0 3 * *", "expected five fields"),
        ("drift", "0 0 3 * * *", "expected five fields"),
        ("promote", "60 * * * *", "expected five fields"),
        ("promote", "* 24 * * *", "expected five fields"),
        ("promote", "* * 0 * *", "expected five fields"),
        ("promote", "* * * 13 *", "expected five fields"),
        ("retrain", "0 6 * * 8", "expected five fields"),
        ("retrain", "*/0 * * * *", "expected five fields"),
        ("retrain", "a b c d e", "expected five fields"),
        ("materialize", "@fortnightly", "or @daily"),
        ("materialize", "0 2 * * *;", "expected five fields"),
        ("materialize", "", ""),
        ("score", "TZ=Europe/Berlin 0 5 * * *", "The time zone is jobs.timeZone"),
    ]
]

CONTRADICTIONS: list[Case] = [
    (
        "{ingress: {enabled: true}, httpRoute: {enabled: true, parentRefs: [{name: public}]}}",
        "httpRoute.enabled", "Set ingress.enabled to false",
    ),
    ("{ingress: {enabled: false}, httpRoute: {enabled: true}}", "httpRoute.parentRefs", "Set it, such as [{name: public"),
    ("{serving: {replicas: 3, autoscaling: {enabled: true}}}", "serving.replicas", "Set serving.autoscaling.minReplicas instead"),
    (
        "{serving: {autoscaling: {enabled: true, minReplicas: 4, maxReplicas: 3}}}",
        "serving.autoscaling.minReplicas", "Raise the latter",
    ),
    ("mlflow: {replicas: 2}", "mlflow.replicas", "set mlflow.enabled to false and externalMlflow.url"),
    ("postgres: {replicas: 2}", "postgres.replicas", "set postgres.enabled to false and externalPostgres.existingSecret"),
    ("valkey: {replicas: 3}", "valkey.replicas", "set valkey.enabled to false and externalRedis.existingSecret"),
    ("serving: {pdb: {minAvailable: 1}}", "serving.pdb.minAvailable", "keep serving.pdb.maxUnavailable at 1, or run more pods"),
    ("serving: {replicas: 3, pdb: {minAvailable: 3}}", "serving.pdb.minAvailable", "is 3 of 3 pods"),
    ("serving: {replicas: 3, pdb: {minAvailable: 100%}}", "serving.pdb.minAvailable", "or run more pods"),
    ("serving: {pdb: {maxUnavailable: 0}}", "serving.pdb.maxUnavailable", "Set it to 1"),
    ("serving: {pdb: {maxUnavailable: 0%}}", "serving.pdb.maxUnavailable", "Set it to 1"),
    ("serving: {pdb: {minAvailable: 50%}}", "serving.pdb.minAvailable", "is 50% of 1 pods"),  # rounded up
    ("serving: {replicas: 2, pdb: {minAvailable: 60%}}", "serving.pdb.minAvailable", "or run more pods"),
    ("serving: {podAnnotations: {churn/bento-tag: 'churn:v1-0'}}", "serving.podAnnotations", "kubectl churn rollback --to N"),
    ("serving: {podAnnotations: {churn/fence: '1'}}", "serving.podAnnotations", "belongs to promotion"),
    ("jobs: {drift: {driftK: 3, driftN: 2}}", "jobs.drift.driftK", "Raise driftN"),
    ("promotion: {promotionSoak: 21m}", "promotion.promotionSoak", "expected at most 20m"),
    (
        "promotion: {promotionDeadline: 30m}",
        "jobs.promote.activeDeadlineSeconds", "before promotion.promotionDeadline (30m)",
    ),
    ("jobs: {promote: {activeDeadlineSeconds: 120}}", "jobs.promote.activeDeadlineSeconds", "Raise it, or lower these"),
    ("mlflow: {enabled: false}", "externalMlflow.url", "expected such as https://mlflow.example.com"),
    (
        "{mlflow: {enabled: false}, externalMlflow: {url: mlflow.example.com}}",
        "externalMlflow.url", "expected such as https://mlflow.example.com",
    ),
    (
        "{mlflow: {enabled: false}, externalMlflow: {url: 'https://me:hunter2@mlflow.example.com'}}",
        "externalMlflow.url", "without user or password",
    ),
    (
        "externalMlflow: {url: 'https://mlflow.example.com'}",
        "externalMlflow.url", "Set mlflow.enabled to false to use yours, or remove the url",
    ),
    ("postgres: {enabled: false}", "externalPostgres.existingSecret", "Make one with keys database-url, serving-database-url"),
    ("externalPostgres: {existingSecret: urls}", "externalPostgres.existingSecret", "Set postgres.enabled to false to use yours"),
    ("valkey: {enabled: false}", "externalRedis.existingSecret", "Make one with key online-store-url"),
    ("externalRedis: {existingSecret: url}", "externalRedis.existingSecret", "Set valkey.enabled to false to use yours"),
    (
        "{postgres: {enabled: false}, externalPostgres: {existingSecret: a}, valkey: {enabled: false}, "
        "externalRedis: {existingSecret: b}, serving: {apiKeys: {existingSecret: c}}}",
        "serving.apiKeys.existingSecret", "Make one with key probe-token",
    ),
    (
        "{existingSecret: all, serving: {apiKeys: {existingSecret: all}}}",
        "serving.apiKeys.existingSecret is all", "Make a Secret of its own",
    ),
    ("promotion: {replayRequests: 50}", "promotion.replayRequests", "minimum: got 50, want 100"),
    ("serving: {apiKeys: {existingSecret: Keys!}}", "serving.apiKeys.existingSecret", "does not match"),
    ("serving: {apiKeys: [abc]}", "serving.apiKeys", "got array, want object"),
    ("fullnameOverride: Churn!", "fullnameOverride", "a-z, 0-9 and -"),
    (f"fullnameOverride: {'c' * 41}", "fullnameOverride", "at most 40 characters"),
]  # fmt: skip

SOURCES: list[Case] = [
    (f"snapshots: {{source: '{source}'}}", "snapshots.source", said)
    for source, said in [
        ("incoming", "such as /data/incoming"),
        ("/mnt/snapshots", "expected a folder below /data"),
        ("/data", "expected a folder below /data"),
        ("/data/", "expected a folder below /data"),
        ("/data/../etc", "expected a folder below /data"),
        ("/data/in/..", "expected a folder below /data"),
        ("/database/incoming", "expected a folder below /data"),
        ("ftp://example.com/s.zip", "https://, http://, s3:// or gs://"),
        ("file:///data/incoming", "or a folder below /data"),
        ("ftp://me:hunter2@example.com/s.zip", "or a folder below /data"),
        ("s3://", "s3:// or gs://"),
        ("s3:///prefix", "s3:// or gs://"),
        ("https://example.com/snapshots", "expected an archive: .zip, .tar.gz or .tgz"),
        ("https://example.com/snapshots.tar", "expected an archive"),
        ("https://me:hunter2@example.com/s.zip", "Give credentials by jobs.extraEnv"),
        ("s3://key:hunter2@bucket/prefix", "serviceAccount.annotations"),
        ("s3://key@bucket/prefix", "serviceAccount.annotations"),
        ("https://me:hunter2 @example.com/s.zip", "Give credentials by jobs.extraEnv"),
        ("https://me:hunter2%@example.com:port/s.zip", "Give credentials by jobs.extraEnv"),
        ("https://exa mple.com/s.zip", "of which no host or path can be read"),
        ("https://example.com:port/s.zip", "of which no host or path can be read"),
        ("s3://bucket/100%", "of which no host or path can be read"),
    ]
]

TOO_MUCH: list[Case] = [
    (
        f"{group}: {{resources: {{requests: {{{resource}: {request}}}, limits: {{{resource}: {limit}}}}}}}",
        f"{group}.resources.requests.{resource}", f"is {request}, above {group}.resources.limits.{resource} ({limit})",
    )
    for group, resource, request, limit in [
        ("serving", "cpu", "500m", "0.4"),
        ("serving", "memory", "1Gi", "1023Mi"),
        ("serving", "ephemeral-storage", "2Gi", "1.5Gi"),
        ("mlflow", "memory", "1000000000", "900M"),
        ("mlflow", "cpu", "2", "1500m"),
        ("postgres", "memory", "2Gi", "2G"),
        ("valkey", "cpu", "0.2", "100m"),
        ("valkey", "memory", "1000000000", "0.5G"),
        ("bootstrap", "memory", "4Gi", "4095Mi"),
    ]
] + [
    (
        "serving: {resources: {requests: {memory: 1Gi}}}",
        "serving.resources.requests.memory", "is 1Gi, above serving.resources.limits.memory (512Mi)",
    ),
    ("serving: {resources: {limits: {memory: 0}}}", "serving.resources.requests.memory", "Lower the request or raise the limit"),
    ("serving: {resources: {limits: {cpu: 50m}}}", "serving.resources.requests.cpu", "is 100m, above"),
    ("jobs: {promote: {resources: {limits: {memory: 100Mi}}}}", "jobs.promote.resources.requests.memory", "is 128Mi, above"),
    ("jobs: {defaults: {resources: {requests: {memory: 3Gi}}}}", "jobs.defaults.resources.requests.memory", "(2Gi)"),
    (
        "jobs: {drift: {resources: {requests: {memory: 2Ti}, limits: {memory: 2e12}}}}",
        "jobs.drift.resources.requests.memory", "above jobs.drift.resources.limits.memory (2000000000000)",
    ),
    (
        "jobs: {score: {resources: {requests: {cpu: 1e0}, limits: {cpu: 999m}}}}",
        "jobs.score.resources.requests.cpu", "Lower the request or raise the limit",
    ),
    (
        "jobs: {retrain: {resources: {requests: {nvidia.com/gpu: 1}}}}",
        "jobs.retrain.resources.limits.nvidia.com/gpu", "has to be as much as the request (1)",
    ),
    (
        "jobs: {retrain: {resources: {requests: {nvidia.com/gpu: 1}, limits: {nvidia.com/gpu: 2}}}}",
        "jobs.retrain.resources.limits.nvidia.com/gpu", "has to be as much as the request (1)",
    ),
    ("serving: {resources: {requests: {cpu: 100}}}", "serving.resources.requests.cpu", "such as 500m, which is half of one"),
    ("serving: {resources: {requests: {cpu: 500, memory: 320Mi}}}", "serving.resources.requests.cpu", "is 500 cores"),
    ("serving: {resources: {limits: {memory: 512}}}", "serving.resources.limits.memory", "is 512, which is less than 1Mi"),
    ("mlflow: {resources: {limits: {memory: 1024k}}}", "mlflow.resources.limits.memory", "expected a unit, such as 512Mi"),
    ("jobs: {defaults: {resources: {requests: {memory: '512'}}}}", "jobs.defaults.resources.requests.memory", "such as 512Mi"),
    ("serving: {resources: {limits: {memory: 512m}}}", "serving.resources.limits.memory", "does not match"),
    ("serving: {resources: {limits: {memory: 0.5}}}", "serving.resources.limits.memory", "got number, want"),
    ("serving: {resources: {requests: {cpu: 100Mi}}}", "serving.resources.requests.cpu", "does not match"),
    ("serving: {resources: {requests: {cpu: -1}}}", "serving.resources.requests.cpu", "minimum"),
    ("serving: {resources: {limits: {mem: 1Gi}}}", "serving.resources.limits", unknown("mem")),
    ("valkey: {maxMemory: 512mb}", "valkey.maxMemory", "raise valkey.resources.limits.memory to twice it, 1024Mi"),
    ("valkey: {maxMemory: 1gb}", "valkey.maxMemory", "is 1gb, but valkey.resources.limits.memory is 512Mi"),
    ("valkey: {maxMemory: 500mb}", "valkey.maxMemory", "at least a quarter more"),
    ("valkey: {maxMemory: 419431kb}", "valkey.maxMemory", "at least a quarter more"),
    ("valkey: {resources: {limits: {memory: 256M}}}", "valkey.maxMemory", "or lower valkey.maxMemory"),
    (
        "valkey: {maxMemory: 2gb, resources: {limits: {memory: 4Gi}}}",
        "valkey.persistence.size", "is 1Gi, less than valkey.maxMemory (2gb)",
    ),
    ("valkey: {persistence: {size: 200M}}", "valkey.persistence.size", "or set valkey.appendOnly to false"),
    ("postgres: {args: [-c, shared_buffers=512MB]}", "postgres.args", "raise postgres.resources.limits.memory"),
    ("postgres: {args: ['-cshared_buffers=2GB']}", "postgres.args", "shared_buffers=2GB"),
    (
        "serving: {spool: {size: 10Gi}, resources: {limits: {ephemeral-storage: 4Gi}}}",
        "serving.resources.limits.ephemeral-storage", "half of serving.spool.size (10Gi)",
    ),
    ("serving: {autoscaling: {enabled: true, targetCPU: 600}}", "serving.autoscaling.targetCPU", "a pod uses one core at most"),
    ("serving: {autoscaling: {enabled: true, targetCPU: 1001m}}", "serving.autoscaling.targetCPU", "expected such as 600m"),
    (
        "serving: {resources: {limits: {cpu: 500m}}, autoscaling: {enabled: true}}",
        "serving.autoscaling.targetCPU", "is 600m, which pods never reach: serving.resources.limits.cpu is 500m",
    ),
    ("serving: {autoscaling: {targetCPU: 0}}", "serving.autoscaling.targetCPU", "exclusiveMinimum"),
    ("serving: {autoscaling: {targetCPU: 0m}}", "serving.autoscaling.targetCPU", "does not match"),
    ("serving: {autoscaling: {targetCPU: 600Mi}}", "serving.autoscaling.targetCPU", "does not match"),
]  # fmt: skip

SIZES: list[Case] = [
    (f"{group}: {{persistence: {{size: {size}}}}}", f"{group}.persistence.size", said)
    for group, size, said in [
        *((group, size, "does not match") for group in ("mlflow", "postgres", "valkey", "data") for size in ("0Gi", "'0'")),
        *((group, size, "exclusiveMinimum") for group in ("mlflow", "postgres", "valkey", "data") for size in ("0", "-5")),
        ("data", "0.0Ti", "does not match"),
        ("data", "0e3", "exclusiveMinimum"),  # YAML's number
        ("data", "-5Gi", "does not match"),
        ("data", "5GB", "does not match"),
        ("data", "5 Gi", "does not match"),
        ("data", "500m", "does not match"),
        ("data", "''", "does not match"),
        ("data", "2.5", "got number, want"),
        ("data", "5", "is 5, which is less than 1Mi; expected a unit, such as 5Gi"),
        ("postgres", "'20'", "which is less than 1Mi"),
        ("mlflow", "10Ki", "which is less than 1Mi"),
        ("valkey", "1k", "which is less than 1Mi"),
    ]
] + [
    (f"serving: {{spool: {{size: {size}}}}}", "serving.spool.size", "does not match")
    for size in ("0Mi", "0Gi", "''", "-1Gi", "99Ki", "0.5Gi")
] + [
    ("{postgres: {persistence: {existingClaim: a}}, valkey: {persistence: {existingClaim: a}}}", "postgres.persistence.existingClaim", "are both a"),
    ("{data: {persistence: {existingClaim: a}}, postgres: {persistence: {existingClaim: a}}}", "data.persistence.existingClaim", "a claim of its own"),
]  # fmt: skip

ENVIRONMENT: list[Case] = [
    (f"{group}: {{extraEnv: {entries}}}", key.replace("GROUP", group), said)
    for group in ("serving", "jobs", "mlflow")
    for entries, key, said in [
        (
            "[{name: A, value: b, valueFrom: {secretKeyRef: {name: s, key: k}}}]",
            "GROUP.extraEnv", "gives A both value and valueFrom; keep one of them",
        ),
        ("[{name: A, value: b}, {name: A, value: c}]", "GROUP.extraEnv", "sets A twice; keep one of them"),
        ("[{valueFrom: {secretKeyRef: {name: s, key: k}}}]", "GROUP.extraEnv.0", "'name'"),
        ("[{name: '', value: b}]", "GROUP.extraEnv.0.name", "does not match"),
        ("[{name: 'A=b'}]", "GROUP.extraEnv.0.name", "does not match"),
        ("[{name: 1A, value: b}]", "GROUP.extraEnv.0.name", "does not match"),
        ("[A=b]", "GROUP.extraEnv.0", "want object"),
        ("[{name: A, valueFrom: {}}]", "GROUP.extraEnv.0.valueFrom", "minProperties"),
        ("[{name: A, valueFrom: {secretRef: {name: s}}}]", "GROUP.extraEnv.0.valueFrom", unknown("secretRef")),
        ("[{name: A, valueFrom: {secretKeyRef: s}}]", "GROUP.extraEnv.0.valueFrom.secretKeyRef", "want object"),
        ("[{name: A, valueFrom: {secretKeyRef: {name: s}}}]", "GROUP.extraEnv.0.valueFrom.secretKeyRef", "'key'"),
        ("[{name: A, valueFrom: {secretKeyRef: {key: k}}}]", "GROUP.extraEnv.0.valueFrom.secretKeyRef", "'name'"),
        (
            "[{name: A, valueFrom: {configMapKeyRef: {name: My_Map, key: k}}}]",
            "GROUP.extraEnv.0.valueFrom.configMapKeyRef.name", "does not match",
        ),
        (
            "[{name: A, valueFrom: {fieldRef: {fieldPath: spec.node}}}]",
            "GROUP.extraEnv.0.valueFrom.fieldRef.fieldPath", "does not match",
        ),
        (
            "[{name: A, valueFrom: {secretKeyRef: {name: s, key: k}, configMapKeyRef: {name: c, key: k}}}]",
            "GROUP.extraEnv.0.valueFrom", "maxProperties",
        ),
    ]
] + [
    ("serving: {extraEnv: [{name: CHURN_BENTO_DIR, value: /bento}]}", "serving.extraEnv", "CHURN_BENTO_DIR"),
    ("jobs: {extraEnv: [{name: CHURN_DEPLOYMENT, value: other}]}", "jobs.extraEnv", "set fullnameOverride instead"),
    ("jobs: {extraEnv: [{name: CHURN_CRONJOB_PREFIX, value: eu-}]}", "jobs.extraEnv", "set jobs.namePrefix instead"),
    ("mlflow: {envFrom: [{secretRef: s3-credentials}]}", "mlflow.envFrom.0.secretRef", "want object"),
    ("mlflow: {envFrom: [{secretref: {name: s}}]}", "mlflow.envFrom.0", unknown("secretref")),
    ("mlflow: {envFrom: [{prefix: A_}]}", "mlflow.envFrom.0", "'secretRef'"),
    ("mlflow: {envFrom: [{secretRef: {name: S3_Credentials}}]}", "mlflow.envFrom.0.secretRef.name", "does not match"),
]  # fmt: skip

HOST = "ingress: {host: churn.example.com, "
ROUTE = "{ingress: {enabled: false}, httpRoute: {enabled: true, "
ROUTES: list[Case] = [
    ("ingress: {tls: [{host: [churn.example.com], secretName: churn-tls}]}", "ingress.tls.0", unknown("host")),
    ("ingress: {tls: [{hosts: [churn.example.com], secretname: churn-tls}]}", "ingress.tls.0", unknown("secretname")),
    ("ingress: {tls: [{hosts: churn.example.com, secretName: churn-tls}]}", "ingress.tls.0.hosts", "want array"),
    ("ingress: {tls: [{hosts: ['https://churn.example.com']}]}", "ingress.tls.0.hosts.0", "does not match"),
    ("ingress: {tls: [{hosts: ['']}]}", "ingress.tls.0.hosts.0", "does not match"),
    ("ingress: {tls: [{hosts: [churn_1.example.com]}]}", "ingress.tls.0.hosts.0", "does not match"),
    ("ingress: {tls: [{hosts: ['churn.example.com:443']}]}", "ingress.tls.0.hosts.0", "does not match"),
    ("ingress: {tls: [{secretName: Churn_TLS}]}", "ingress.tls.0.secretName", "does not match"),
    ("ingress: {tls: [{secretName: ''}]}", "ingress.tls.0.secretName", "does not match"),
    ("ingress: {tls: [{}]}", "ingress.tls.0", "minProperties"),
    ("ingress: {tls: [churn-tls]}", "ingress.tls.0", "want object"),
    (HOST + "tls: [{hosts: [chrun.example.com], secretName: churn-tls}]}", "ingress.tls", "add churn.example.com to the hosts"),
    (HOST + "tls: [{hosts: ['*.churn.example.com'], secretName: churn-tls}]}", "ingress.tls", "none of its hosts is ingress.host"),
    (HOST + "tls: [{hosts: ['*.com'], secretName: churn-tls}]}", "ingress.tls", "none of its hosts is ingress.host"),
    ("ingress: {host: '*.example.com', tls: [{hosts: [churn.example.com]}]}", "ingress.tls", "*.example.com"),
    (
        HOST + "annotations: {cert-manager.io/cluster-issuer: le}, tls: [{hosts: [churn.example.com]}]}",
        "ingress.tls", "no secretName, in which cert-manager would keep the certificate",
    ),
    (
        HOST + "annotations: {cert-manager.io/issuer: le}, tls: [{secretName: churn-tls}]}",
        "ingress.tls", "no hosts, for which cert-manager would ask",
    ),
    (HOST + "annotations: {kubernetes.io/tls-acme: 'true'}, tls: [{secretName: churn-tls}]}", "ingress.tls", "such as [{hosts:"),
    (HOST + "annotations: {nginx.ingress.kubernetes.io/ssl redirect: 'true'}}", "ingress.annotations", unknown("nginx.ingress.kubernetes.io/ssl redirect")),
    (HOST + "annotations: {kubernetes.io/tls-acme: true}}", "ingress.annotations", "want string"),
    ("ingress: {host: churn..example.com}", "ingress.host", "does not match"),
    ("ingress: {host: -churn.example.com}", "ingress.host", "does not match"),
    ("ingress: {host: 10.0.0.1}", "ingress.host", "does not match"),
    ("ingress: {host: '*'}", "ingress.host", "does not match"),
    ("ingress: {host: churn.example.com/predict}", "ingress.host", "does not match"),
    ("ingress: {className: '*.nginx'}", "ingress.className", "does not match"),
    ("ingress: {className: nginx.}", "ingress.className", "does not match"),
    (ROUTE + "parentRefs: [public]}}", "httpRoute.parentRefs.0", "want object"),
    (ROUTE + "parentRefs: [{namespace: gateways}]}}", "httpRoute.parentRefs.0", "'name'"),
    (ROUTE + "parentRefs: [{name: ''}]}}", "httpRoute.parentRefs.0.name", "does not match"),
    (ROUTE + "parentRefs: [{name: Public_Gateway}]}}", "httpRoute.parentRefs.0.name", "does not match"),
    (ROUTE + "parentRefs: [{name: public, gateway: x}]}}", "httpRoute.parentRefs.0", unknown("gateway")),
    (ROUTE + "parentRefs: [{name: public, section: https}]}}", "httpRoute.parentRefs.0", unknown("section")),
    (ROUTE + "parentRefs: [{name: public, port: https}]}}", "httpRoute.parentRefs.0.port", "want integer"),
    (ROUTE + "parentRefs: [{name: public, port: 0}]}}", "httpRoute.parentRefs.0.port", "minimum"),
    (ROUTE + "parentRefs: [{name: public, namespace: a.b}]}}", "httpRoute.parentRefs.0.namespace", "does not match"),
    (ROUTE + "parentRefs: [{name: public}, {name: public}]}}", "httpRoute.parentRefs", "equal"),
    (ROUTE + "parentRefs: [{name: public}], hostnames: ['https://churn.example.com']}}", "httpRoute.hostnames.0", "does not match"),
    (ROUTE + "parentRefs: [{name: public}], hostnames: [10.0.0.1]}}", "httpRoute.hostnames.0", "does not match"),
    (ROUTE + "parentRefs: [{name: public}], hostnames: ['']}}", "httpRoute.hostnames.0", "does not match"),
    (ROUTE + "parentRefs: [{name: public}], hostnames: churn.example.com}}", "httpRoute.hostnames", "want array"),
    ("networkPolicy: {extraEgress: [{port: 3128}]}", "networkPolicy.extraEgress.0", unknown("port")),  # would allow everything
    ("networkPolicy: {extraEgress: [{}]}", "networkPolicy.extraEgress.0", "minProperties"),
    ("networkPolicy: {extraEgress: [{to: [{cidr: 10.1.0.0/16}]}]}", "networkPolicy.extraEgress.0.to.0", unknown("cidr")),
    ("networkPolicy: {extraEgress: [{to: [{ipBlock: {cidr: 10.1.0.0}}]}]}", "networkPolicy.extraEgress.0.to.0.ipBlock.cidr", "does not"),
    ("networkPolicy: {extraEgress: [{to: [{ipBlock: {cidr: 10.1.0.0/33}}]}]}", "networkPolicy.extraEgress.0.to.0.ipBlock.cidr", "does"),
    ("networkPolicy: {extraEgress: [{ports: [3128]}]}", "networkPolicy.extraEgress.0.ports.0", "want object"),
    ("networkPolicy: {extraEgress: [{ports: [{port: 70000}]}]}", "networkPolicy.extraEgress.0.ports.0.port", "maximum"),
    ("networkPolicy: {extraEgress: [{ports: [{port: 53, protocol: udp}]}]}", "networkPolicy.extraEgress.0.ports.0.protocol", "'UDP'"),
]  # fmt: skip

MONDAY: list[Case] = [
    ("serving: {replicas: 3, pdb: {minAvailable: 150%}}", "serving.pdb.minAvailable", "does not match"),
    ("serving: {pdb: {maxUnavailable: 00%}}", "serving.pdb.maxUnavailable", "does not match"),
    ("serving: {pdb: {maxUnavailable: 101%}}", "serving.pdb.maxUnavailable", "does not match"),
    ("images: {jobs: {repository: 'registry.example.com/churn-jobs:1.0'}}", "images.jobs.repository", "does not match"),
    ("images: {postgres: {repository: 'postgres:17'}}", "images.postgres.repository", "does not match"),
    ("images: {valkey: {repository: valkey/}}", "images.valkey.repository", "does not match"),
    ("images: {serving: {repository: 'https://registry.example.com/x'}}", "images.serving.repository", "does not match"),
    ("images: {serving: {tag: ':1.0'}}", "images.serving.tag", "does not match"),
    ("images: {serving: {tag: -dev}}", "images.serving.tag", "does not match"),
    ("images: {registry: 'https://registry.example.com'}", "images.registry", "does not match"),
    ("images: {registry: registry.example.com//ml}", "images.registry", "does not match"),
    ("images: {registry: 'registry.example.com/ml:1.0'}", "images.registry", "does not match"),
    (
        "images: {registry: mirror.example.com, jobs: {repository: 'localhost:5000/churn-jobs'}}",
        "images.jobs.repository", "leave images.registry empty",
    ),
    ("images: {pullSecrets: [My_Secret]}", "images.pullSecrets.0", "does not match"),
    ("existingSecret: churn..secret", "existingSecret", "does not match"),
    ("mlflow: {persistence: {existingClaim: mlflow-}}", "mlflow.persistence.existingClaim", "does not match"),
    ("data: {persistence: {storageClass: .nfs}}", "data.persistence.storageClass", "does not match"),
    ("serving: {priorityClassName: High_Priority}", "serving.priorityClassName", "does not match"),
    ("clusterDomain: cluster..local", "clusterDomain", "does not match"),
    ("asOf: 0000-01-01", "asOf", "does not match"),  # no year of Python's
    ("jobs: {timeZone: Europe/Berln}", "jobs.timeZone", "a name of the tz database, such as Europe/Berlin"),
    ("jobs: {timeZone: CEST}", "jobs.timeZone", "is CEST, which is no time zone"),
    ("jobs: {timeZone: UTC+2}", "jobs.timeZone", "is UTC+2, which is no time zone"),
    ("jobs: {timeZone: Local}", "jobs.timeZone", "is Local"),
    ("jobs: {drift: {schedule: '@every 5'}}", "jobs.drift.schedule", "expected five fields"),
    ("jobs: {drift: {schedule: '@every h'}}", "jobs.drift.schedule", "expected five fields"),
    ("jobs: {drift: {schedule: '0 22-6 * * *'}}", "jobs.drift.schedule", "expected five fields"),
    ("jobs: {drift: {schedule: '0 3 * * MOO'}}", "jobs.drift.schedule", "expected five fields"),
    ("jobs: {drift: {schedule: '0 MON * * *'}}", "jobs.drift.schedule", "expected five fields"),
    ("jobs: {drift: {schedule: '0 3 * MON *'}}", "jobs.drift.schedule", "expected five fields"),
    ("jobs: {drift: {schedule: '0 3 * * FRI-TUE'}}", "jobs.drift.schedule", "expected five fields"),
    ("jobs: {retrain: {schedule: '0 6 30 2 *'}}", "jobs.retrain.schedule", "a day that never comes"),
    ("jobs: {retrain: {schedule: '0 6 31 4,JUN *'}}", "jobs.retrain.schedule", "a day that never comes"),
    ("serving: {staleAfter: 0d}", "serving.staleAfter", "does not match"),
    ("jobs: {retrain: {featureTtl: 0s}}", "jobs.retrain.featureTtl", "does not match"),
    ("promotion: {promotionDeadline: 00m}", "promotion.promotionDeadline", "does not match"),
    ("metrics: {serviceMonitor: {interval: 0s}}", "metrics.serviceMonitor.interval", "does not match"),
    ("metrics: {prometheusRule: {alertLabels: {my-team: growth}}}", "metrics.prometheusRule.alertLabels", unknown("my-team")),
    ("gate: {promotionDelta: 1}", "gate.promotionDelta", "exclusiveMaximum"),
    ("gate: {firstAucFloor: 1}", "gate.firstAucFloor", "exclusiveMaximum"),
    ("gate: {promotionDelta: '1.0'}", "gate.promotionDelta", "does not match"),
    ("simulate: {users: 1500}", "simulate.users", "lower gate.minClassRows"),
    ("gate: {minClassRows: 500}", "gate.minClassRows", "Raise simulate.users"),
    ("jobs: {defaults: {args: [--as-of, 2024-02-29]}}", "jobs.defaults.args", "promote knows no day"),
    ("jobs: {promote: {args: ['--as-of=2024-02-29']}}", "jobs.promote.args", "Set asOf"),
    ("jobs: {drift: {args: ['--as-of 2024-02-29']}}", "jobs.drift.args", 'expected [\"--as-of\", \"2024-02-29\"]'),
    ("jobs: {score: {args: [score, --dry-run]}}", "jobs.score.args", "begins with an option, such as --dry-run"),
    ("postgres: {args: ['-c max_connections=50']}", "postgres.args", 'expected [\"-c\", \"max_connections=50\"]'),
    ("postgres: {args: [max_connections=50]}", "postgres.args", 'expected [\"-c\", \"max_connections=50\"]'),
    ("postgres: {args: [-c]}", "postgres.args", "ends with -c"),
    ("jobs: {featureStore: 'project: [churn'}", "jobs.featureStore", "is no YAML"),
    ("jobs: {featureStore: feature_store.yaml}", "jobs.featureStore", "--set-file jobs.featureStore=FILE"),
    ("jobs: {featureStore: 'provider: local'}", "jobs.featureStore", "such as project: ${feast_project}"),
    ("mlflow: {artifactsDestination: 's3:///mlflow'}", "mlflow.artifactsDestination", "names no bucket"),
    ("mlflow: {artifactsDestination: 's3://key:hunter2@bucket'}", "mlflow.artifactsDestination", "credentials by mlflow.envFrom"),
    ("networkPolicy: {extraEgress: [{ports: [{port: 100, endPort: 50}]}]}", "networkPolicy.extraEgress", "an endPort that is not below it"),
    ("networkPolicy: {extraEgress: [{ports: [{endPort: 50}]}]}", "networkPolicy.extraEgress", "a port that is a number"),
    ("networkPolicy: {extraEgress: [{ports: [{port: dns, endPort: 50}]}]}", "networkPolicy.extraEgress", "a port that is a number"),
    ("serving: {pdb: {maxUnavailable: null}}", "serving.pdb.maxUnavailable", "or nothing"),
    ("serving:", "", "missing property 'serving'"),
    ("serving: {pdb: {minAvailable: }}", "serving.pdb", "missing property 'minAvailable'"),
    ("networkPolicy: {enabled: }", "networkPolicy", "missing property 'enabled'"),  # would be off
    ("serving: {nodeSelector: {disk type: ssd}}", "serving.nodeSelector", unknown("disk type")),
    ("serving: {nodeSelector: {disktype: solid state}}", "serving.nodeSelector.disktype", "does not match"),
    ("jobs: {podLabels: {team: 'growth!'}}", "jobs.podLabels.team", "does not match"),
    ("jobs: {podAnnotations: {'a b': c}}", "jobs.podAnnotations", unknown("a b")),
    ("serviceAccount: {annotations: {eks.amazonaws.com/: x}}", "serviceAccount.annotations", unknown("eks.amazonaws.com/")),
    ("serving: {tolerations: [{key: a, op: Exists}]}", "serving.tolerations.0", unknown("op")),
    ("jobs: {tolerations: [{key: a, operator: exists}]}", "jobs.tolerations.0.operator", "'Exists'"),
    ("mlflow: {tolerations: [{key: a, operator: Equal, value: true}]}", "mlflow.tolerations.0.value", "want string"),
    ("postgres: {tolerations: [{key: a, effect: NoSchedul}]}", "postgres.tolerations.0.effect", "'NoSchedule'"),
    ("valkey: {tolerations: [{key: a, operator: Exists, value: b}]}", "valkey.tolerations", "remove the value"),
    ("serving: {tolerations: [{value: b}]}", "serving.tolerations", "needs a key"),
    ("jobs: {tolerations: [{key: a, operator: Exists, tolerationSeconds: 5}]}", "jobs.tolerations", "set effect: NoExecute"),
    ("podSecurityContext: {runAsUser: 0}", "podSecurityContext.runAsUser", "runAsNonRoot to false"),
    ("containerSecurityContext: {runAsUser: 0}", "containerSecurityContext.runAsUser", "runAsNonRoot to false"),
    ("containerSecurityContext: {privileged: true}", "containerSecurityContext.privileged", "allowPrivilegeEscalation to true"),
    ("mlflow: {extraAllowedHosts: ['https://mlflow.example.com']}", "mlflow.extraAllowedHosts.0", "does not match"),
    ("mlflow: {extraAllowedHosts: ['a.example.com,b.example.com']}", "mlflow.extraAllowedHosts.0", "does not match"),
    (
        "{mlflow: {enabled: false}, externalMlflow: {url: 'http://mlflow example.com'}}",
        "externalMlflow.url", "expected such as https://mlflow.example.com",
    ),
    (
        "{mlflow: {enabled: false}, externalMlflow: {url: 'http://mlflow:port/'}}",
        "externalMlflow.url", "expected such as https://mlflow.example.com",
    ),
    (
        "{mlflow: {enabled: false}, externalMlflow: {url: 'http://me:hunter2 @mlflow:5000/'}}",
        "externalMlflow.url", "without user or password",
    ),
    ("extraObjects: [{kind: ConfigMap, metadata: {name: a}}]", "extraObjects.0", "'apiVersion'"),
    ("extraObjects: [{apiVersion: v1, metadata: {name: a}}]", "extraObjects.0", "'kind'"),
]  # fmt: skip

ALL = [
    *TYPOS, *TYPES, *DURATIONS_AND_DAYS, *SCHEDULES, *CONTRADICTIONS, *SOURCES, *TOO_MUCH, *SIZES, *ENVIRONMENT, *ROUTES, *MONDAY,
]  # fmt: skip


def test_the_table_is_long_enough() -> None:
    assert len(ALL) >= 350
    assert len({values for values, _, _ in ALL}) == len(ALL)


@pytest.mark.parametrize(("values", "key", "said"), ALL, ids=[values for values, _, _ in ALL])
def test_is_refused_and_the_message_names_the_key(chart: Chart, values: str, key: str, said: str) -> None:
    done = chart.run("template", "churn", chart.folder, "-f", "-", values=values)
    assert done.returncode, f"{values} is taken"
    named = key in done.stderr or f"at '/{key.replace('.', '/')}'" in done.stderr
    assert named, f"{key} is not named in:\n{done.stderr}"
    assert said in done.stderr
    assert "hunter2" not in done.stderr, "a password is not repeated"


@pytest.mark.parametrize("major", [3, 4], ids=["helm 3", "helm 4"])
def test_each_helm_refuses_and_takes_the_same(chart: Chart, major: int) -> None:
    """The tests beside this one ask one of them."""
    helm = find_helm(major)
    if helm is None or helm == chart.helm:
        pytest.skip(f"no Helm {major}, or the one that is asked anyway")

    def returncode(values: str) -> int:
        return chart.run("template", "churn", chart.folder, "-f", "-", values=values, helm=helm).returncode

    with ThreadPoolExecutor(2) as two:
        refused = [values for values, code in zip(TAKEN, two.map(returncode, TAKEN), strict=True) if code]
        wrong = [values for values, _, _ in ALL]
        taken = [values for values, code in zip(wrong, two.map(returncode, wrong), strict=True) if not code]
    assert (taken, refused) == ([], [])


# ---- every key, every form -------------------------------------------------------------------------------

Schema = dict[str, Any]
Path = tuple[str, ...]
SCHEMA: Schema = json.loads((CHART / "values.schema.json").read_text())


def resolved(node: Schema) -> Schema:
    """A part of the schema with what it refers to."""
    for part in [*node.get("allOf", ()), node]:
        if "$ref" in part:
            found: Any = SCHEMA
            for name in part["$ref"].split("/")[1:]:
                found = found[name]
            node = {**resolved(found), **node}
    return node


def keys(node: Schema, path: Path = ()) -> Iterator[tuple[Path, Schema]]:
    """Every key there is, with what the schema says of it."""
    for name, child in resolved(node).get("properties", {}).items():
        yield (*path, name), resolved(child)
        yield from keys(child, (*path, name))


KEYS = list(keys(SCHEMA))
TEXT = "no such value!"
FORM = r"does not match pattern|value must be one of|got string, want"


def wrong_values() -> Iterator[tuple[str, Path, object, str]]:
    """What is wrong, the key, its value, and what has to be said of it: that it is unknown, or what would be right."""
    for path, node in [((), SCHEMA), *KEYS]:
        for name in node.get("required", ()):  # `key:` without a value takes the default away
            yield f"nothing {len(path)}", (*path, name), None, f"missing propert(y|ies) .*'{name}'"
    for path, node in KEYS:
        kinds = node.get("type", "enum")
        misspelt = path[-1] + path[-1][-1]
        yield "misspelt", (*path[:-1], misspelt), 1, f"additional properties .*'{re.escape(misspelt)}'.* not allowed"
        if kinds != "array":
            yield f"a list {len(path)}", path, [1], r"value must be one of|got array, want \w"
        if "pattern" in node or kinds not in ("string", ["string"]):
            yield f"a text {len(path)}", path, TEXT, FORM
        for bound, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
            if bound in node:
                yield bound, path, node[bound] + step, f"{bound}: got .*, want"
        if "minLength" in node:
            yield "empty", path, "", "minLength: got 0, want"
        if kinds == "array":
            yield "a list in it", path, [[1]], "value must be one of|got array, want"
        if isinstance(node.get("additionalProperties"), dict):
            yield "a list in it", path, {"a": [1]}, "got array, want"


def at_once(wrong: list[tuple[Path, object]]) -> str:
    """Values with all of these in them."""
    values: dict[str, Any] = {}
    for path, value in wrong:
        group = values
        for name in path[:-1]:
            group = group.setdefault(name, {})
        group[path[-1]] = value
    return yaml.safe_dump(values)


def test_every_key_misspelt_and_every_form_broken_is_refused(chart: Chart) -> None:
    """By the dozen, as Helm names all that the schema refuses: each has to be in the message, at its place."""
    kinds: dict[str, list[tuple[Path, object, str]]] = {}
    for kind, path, value, said in wrong_values():
        kinds.setdefault(kind, []).append((path, value, said))
    taken = []
    for kind, wrong in kinds.items():
        done = chart.run("template", "churn", chart.folder, "-f", "-", values=at_once([(p, v) for p, v, _ in wrong]))
        assert done.returncode, kind
        lines = done.stderr.splitlines()
        for path, value, said in wrong:
            place = "/".join(["", *(path[:-1] if kind == "misspelt" or kind.startswith("nothing") else path)])
            about = [line for line in lines if re.search(f"at '{place}(/0|/a)?':", line)]
            if not any(re.search(said, line) for line in about):
                taken.append(f"{kind}: {'.'.join(path)}: {value!r}: {about}")
    count = sum(len(wrong) for wrong in kinds.values())
    print(f"\n36 wrong values: {count - len(taken)} refused of {count}, and a table of {len(ALL)}")
    assert taken == []
    assert count >= 1400


def test_everything_that_contradicts_is_said_at_once(chart: Chart) -> None:
    values = "{postgres: {replicas: 2}, valkey: {enabled: false}, jobs: {drift: {schedule: often}}}"
    done = chart.run("template", "churn", chart.folder, "-f", "-", values=values)
    for key in ("postgres.replicas", "externalRedis.existingSecret", "jobs.drift.schedule"):
        assert f"\n- {key}" in done.stderr or key in done.stderr, done.stderr


@pytest.mark.parametrize("release", ["1churn", "churn.eu", "c" * 41, "churn-"])
def test_a_release_name_that_cannot_become_a_name_is_refused(chart: Chart, release: str) -> None:
    done = chart.run("template", release, chart.folder)
    assert done.returncode
    if "Choose another release name" not in done.stderr:
        assert "release name" in done.stderr, "Helm's own word"


TAKEN = [
    "jobs: {drift: {schedule: '*/5 * * * *'}}",
    "jobs: {drift: {schedule: '0 3 * * 1-5'}}",
    "jobs: {drift: {schedule: '0 3 * * MON'}}",
    "jobs: {drift: {schedule: '0 3,15 1-7/2 JAN-MAR ?'}}",
    "jobs: {drift: {schedule: '@hourly'}}",
    "jobs: {drift: {schedule: '*/05 08 09 08-010 *'}}",
    "jobs: {drift: {schedule: '0 3 * * 0'}}",
    "asOf: 2024-02-29",
    "asOf: '2000-02-29'",
    "snapshots: {source: /data/incoming/}",
    "snapshots: {source: '/data/in coming..'}",
    "snapshots: {source: 'https://example.com/s.tar.gz?X-Sig=a@b'}",
    "snapshots: {source: 'gs://bucket'}",
    "snapshots: {source: 's3://bucket/in%20coming/my folder'}",
    "snapshots: {source: 'http://[fd00::1]:8080/s.zip'}",
    "{mlflow: {enabled: false}, externalMlflow: {url: 'http://[fd00::1]:5000'}}",
    "serving: {replicas: 0, pdb: {enabled: false}}",
    "serving: {replicas: 3, pdb: {minAvailable: 2}}",
    "serving: {replicas: 4, pdb: {minAvailable: 50%}}",
    "serving: {pdb: {maxUnavailable: 50%}}",
    "serving: {autoscaling: {enabled: true}, pdb: {minAvailable: 1}}",
    "serving: {resources: {}}",
    "serving: {resources: {requests: {cpu: 0.5, memory: 0.5G}}}",
    "promotion: {promotionSoak: 0s}",
    "promotion: {promotionSoak: 20m}",
    "{promotion: {promotionDeadline: 08m, promotionSoak: 090s}, jobs: {promote: {activeDeadlineSeconds: 2000}}}",
    "promotion: {promotionMode: 'off'}",
    "gate: {sliceFloor: '-0.05'}",
    "{mlflow: {enabled: false}, externalMlflow: {url: 'http://mlflow:5000/path'}}",
    "ingress: {host: '*.example.com'}",
    "serving: {resources: {requests: {cpu: 1, memory: 1024Mi}, limits: {cpu: 1000m, memory: 1Gi}}}",
    "serving: {resources: {requests: {cpu: .5, memory: 1e9}, limits: {cpu: 5e-1, memory: 1G}}}",
    "serving: {resources: {requests: {memory: 0}, limits: {memory: '1e9'}}}",
    "serving: {resources: {limits: {memory: null}}}",
    "serving: {resources: {requests: {memory: 4Gi}, limits: {memory: null}}}",
    "jobs: {retrain: {resources: {requests: {nvidia.com/gpu: 1}, limits: {nvidia.com/gpu: 1}}}}",
    "jobs: {retrain: {resources: {limits: {nvidia.com/gpu: 1}}}}",
    "jobs: {materialize: {resources: {requests: {memory: 4Gi}}}}",  # without the limit of jobs.defaults
    "{mlflow: {enabled: false, resources: {requests: {memory: 4Gi}}}, externalMlflow: {url: 'https://mlflow.example.com'}}",
    "valkey: {maxMemory: 409mb}",
    "valkey: {maxMemory: 1gb, resources: {limits: {memory: 1.25Gi}}}",
    "valkey: {maxMemory: 1gb, resources: {limits: {memory: null}}}",
    "valkey: {maxMemory: 2gb, resources: {limits: {memory: 4Gi}}, appendOnly: false}",
    "valkey: {maxMemory: 2gb, resources: {limits: {memory: 4Gi}}, persistence: {existingClaim: large}}",
    "postgres: {args: [-c, shared_buffers=256MB, -c, max_connections=50]}",
    "postgres: {args: [postgres, -c, shared_buffers=16384]}",
    "serving: {spool: {size: 600Ki}}",
    "{serving: {resources: null}, jobs: {defaults: {resources: null}}, mlflow: {resources: null}, valkey: {resources: null}}",
    "serving: {replicas: null}",  # for an autoscaler of somebody else's
    "serving: {replicas: 3, pdb: {maxUnavailable: null, minAvailable: 2}}",
    "jobs: {defaults: {ttlSecondsAfterFinished: null}}",
    "mlflow: {artifactsDestination: 'wasbs://container@account.blob.core.windows.net/mlflow'}",
    "serving: {spool: {size: 10Gi}, resources: {limits: {ephemeral-storage: 8Gi}}}",
    "serving: {autoscaling: {enabled: true, targetCPU: 1}, resources: {limits: {cpu: 2}}}",
    "serving: {autoscaling: {targetCPU: 1500m}}",  # without autoscaling nobody reads it
    "data: {persistence: {size: 0.5Gi}}",
    "data: {persistence: {size: 10000000000}}",
    "data: {persistence: {size: 1, existingClaim: mine}}",
    "{data: {persistence: {existingClaim: a}}, mlflow: {persistence: {existingClaim: a}}}",
    "serving: {extraEnv: [{name: A}]}",
    "serving: {extraEnv: [{name: A, value: ''}, {name: B, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]}",
    "jobs: {extraEnv: [{name: A, valueFrom: {secretKeyRef: {name: s, key: k.txt, optional: true}}}]}",
    "jobs: {extraEnv: [{name: CHURN_LOG_LEVEL, value: DEBUG}]}",
    "mlflow: {envFrom: [{prefix: AWS_, configMapRef: {name: c, optional: true}}]}",
    "ingress: {tls: [{hosts: [churn.example.com], secretName: churn-tls}]}",
    "ingress: {host: churn.example.com, tls: [{hosts: [churn.example.com]}]}",  # the controller's own certificate
    "ingress: {host: churn.example.com, tls: [{hosts: ['*.example.com'], secretName: wildcard}]}",
    "ingress: {host: churn.example.com, tls: [{secretName: churn-tls}]}",
    "ingress: {host: churn.example.com, tls: [{hosts: [www.example.com, churn.example.com], secretName: both}]}",
    "ingress: {host: churn}",
    "ingress: {host: xn--nderung-5wa.example.com}",
    "{ingress: {enabled: false}, httpRoute: {enabled: true, parentRefs: [{name: a, sectionName: x}, {name: a, port: 8443}]}}",
    "{ingress: {enabled: false}, httpRoute: {enabled: true, parentRefs: [{name: a}], hostnames: ['*.example.com']}}",
    "networkPolicy: {extraEgress: [{to: [{namespaceSelector: {}, podSelector: {matchLabels: {a: b}}}]}]}",
    "networkPolicy: {extraEgress: [{to: [{ipBlock: {cidr: 'fd00::/8', except: ['fd00:1::/32']}}], ports: [{port: dns, protocol: UDP}]}]}",
    "networkPolicy: {extraEgress: [{ports: [{port: 8000, endPort: 8100}]}]}",
    "images: {registry: 'localhost:5000/ml/', jobs: {repository: team/churn-jobs}}",
    "images: {registry: mirror.example.com, postgres: {repository: docker.io/library/postgres}}",
    "images: {jobs: {repository: 'localhost:5000/churn__jobs'}}",
    "jobs: {timeZone: Europe/Berlin}",
    "jobs: {timeZone: America/Argentina/Buenos_Aires}",
    "jobs: {timeZone: UTC}",
    "jobs: {timeZone: Etc/GMT+5}",
    "jobs: {drift: {schedule: '@every 1h30m'}}",
    "jobs: {drift: {schedule: '0 3 29 2 *'}}",
    "jobs: {drift: {schedule: '0 3 31 2 MON'}}",  # a Monday does
    "jobs: {drift: {schedule: '0 3 31 4,5 *'}}",
    "jobs: {drift: {schedule: '0 3 * jan-Mar sun'}}",
    "jobs: {drift: {args: [--as-of, 2024-02-29, --dry-run]}}",
    "jobs: {retrain: {args: [--reason, by the calendar]}}",
    "{simulate: {users: 1000}, gate: {minClassRows: 20}}",
    "{simulate: {users: 1000}, snapshots: {source: /data/incoming}}",
    "serving: {tolerations: [{operator: Exists}, {key: a, value: b}, {key: c, operator: Exists, effect: NoSchedule}]}",
    "podSecurityContext: {runAsUser: 0, runAsNonRoot: false}",
    "{podSecurityContext: {runAsUser: 0}, containerSecurityContext: {runAsUser: 1000}}",
    "serving: {nodeSelector: {node-role.kubernetes.io/worker: ''}}",
    "ingress: {annotations: {nginx.ingress.kubernetes.io/proxy-body-size: 1m}}",
    "mlflow: {extraAllowedHosts: ['mlflow.example.com:8443', '*.example.com']}",
    'extraObjects: ["{{ if false }}a{{ end }}", {apiVersion: v1, kind: Secret, metadata: {name: a}}]',
    "global: {anything: [goes]}",
]


@pytest.mark.parametrize("values", TAKEN)
def test_is_taken(chart: Chart, values: str) -> None:
    """Or a rule would refuse what is right."""
    chart.text(values=values)
