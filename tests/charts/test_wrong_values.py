"""Wrong values are refused when the chart is rendered; the message names the key, and for a contradiction the remedy.

What only the cluster knows (a Secret that is missing, a release that is there) is in test_api_server.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.charts.rendering import CHART, Chart

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
    ]
]

ALL = [*TYPOS, *TYPES, *DURATIONS_AND_DAYS, *SCHEDULES, *CONTRADICTIONS, *SOURCES]


def test_the_table_is_long_enough() -> None:
    assert len(ALL) >= 100
    assert len({values for values, _, _ in ALL}) == len(ALL)


@pytest.mark.parametrize(("values", "key", "said"), ALL, ids=[values for values, _, _ in ALL])
def test_is_refused_and_the_message_names_the_key(chart: Chart, values: str, key: str, said: str) -> None:
    done = chart.run("template", "churn", chart.folder, "-f", "-", values=values)
    assert done.returncode, f"{values} is taken"
    named = key in done.stderr or f"at '/{key.replace('.', '/')}'" in done.stderr
    assert named, f"{key} is not named in:\n{done.stderr}"
    assert said in done.stderr
    assert "hunter2" not in done.stderr, "a password is not repeated"


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
            place = "/".join(["", *(path[:-1] if kind == "misspelt" else path)])
            about = [line for line in lines if re.search(f"at '{place}(/0|/a)?':", line)]
            if not any(re.search(said, line) for line in about):
                taken.append(f"{kind}: {'.'.join(path)}: {value!r}: {about}")
    count = sum(len(wrong) for wrong in kinds.values())
    print(f"\n36 wrong values: {count - len(taken)} refused of {count}, and a table of {len(ALL)}")
    assert taken == []
    assert count >= 800


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
    "jobs: {drift: {schedule: '0 3 * * 0'}}",
    "asOf: 2024-02-29",
    "asOf: '2000-02-29'",
    "snapshots: {source: /data/incoming/}",
    "snapshots: {source: '/data/in coming..'}",
    "snapshots: {source: 'https://example.com/s.tar.gz?X-Sig=a@b'}",
    "snapshots: {source: 'gs://bucket'}",
    "serving: {replicas: 0, pdb: {enabled: false}}",
    "serving: {replicas: 3, pdb: {minAvailable: 2}}",
    "serving: {replicas: 4, pdb: {minAvailable: 50%}}",
    "serving: {pdb: {maxUnavailable: 50%}}",
    "serving: {autoscaling: {enabled: true}, pdb: {minAvailable: 1}}",
    "serving: {resources: {}}",
    "serving: {resources: {requests: {cpu: 0.5, memory: 1G}}}",
    "promotion: {promotionSoak: 0s}",
    "promotion: {promotionSoak: 20m}",
    "{promotion: {promotionDeadline: 08m, promotionSoak: 090s}, jobs: {promote: {activeDeadlineSeconds: 2000}}}",
    "promotion: {promotionMode: 'off'}",
    "gate: {sliceFloor: '-0.05'}",
    "{mlflow: {enabled: false}, externalMlflow: {url: 'http://mlflow:5000/path'}}",
    "ingress: {host: '*.example.com'}",
    "global: {anything: [goes]}",
]


@pytest.mark.parametrize("values", TAKEN)
def test_is_taken(chart: Chart, values: str) -> None:
    """Or a rule would refuse what is right."""
    chart.text(values=values)
