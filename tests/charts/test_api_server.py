"""A real API server's word on every object: it takes them, in a namespace that enforces Pod Security `restricted`.

Nothing runs: objects are sent as dry runs, but for ServiceAccounts and Roles, which do nothing by themselves.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.charts.rendering import CI, Chart, Object, Refused, find_helm, name_of, of_kind, one, parse, pods
from tests.cluster.commands import Cluster, find_cluster, wait_until

pytestmark = pytest.mark.cluster

RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
HELMS = [pytest.param(major, id=f"helm {major}") for major in (3, 4)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The test node, or the context that CONTEXT names; no image has to be there."""
    found, reason = find_cluster(tmp_path_factory.mktemp("helm"))
    if found is None:
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of our own; it goes away at the end."""
    name = f"chart-{secrets.token_hex(4)}"
    labels = {**RESTRICTED, "churn.test/purpose": "charts"}
    made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(made))
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def accounts(cluster: Cluster, namespace: str, chart: Chart) -> list[Object]:
    """ServiceAccounts and Roles, really made: a pod of an account that is not there is refused, dry run or not."""
    wanted = of_kind(parse(chart.text(namespace=namespace)), "ServiceAccount", "Role", "RoleBinding")
    for obj in wanted:
        obj["metadata"]["annotations"] = owned_by("churn", namespace)
    cluster.kubectl("apply", "-f", "-", stdin=as_yaml(wanted))

    def its_certificate() -> bool:
        found = cluster.kubectl(
            "-n", namespace, "get", "configmap", "kube-root-ca.crt", "--ignore-not-found", "-o", "name"
        )
        return bool(found)

    wait_until("the namespace is what the chart takes for a cluster that answers", its_certificate, within=30)
    return wanted


def owned_by(release: str, namespace: str) -> dict[str, str]:
    """What Helm writes to its objects, without which it does not take them for its own."""
    return {"meta.helm.sh/release-name": release, "meta.helm.sh/release-namespace": namespace}


def as_yaml(objects: list[Object]) -> str:
    """For kubectl's standard input."""
    return yaml.safe_dump_all(objects)


def known(cluster: Cluster, objects: list[Object]) -> list[Object]:
    """Those of kinds this cluster has; the Gateway API and the Prometheus operator are not on every one."""
    versions = set(cluster.kubectl("api-versions").split())
    return [obj for obj in objects if obj["apiVersion"] in versions]


@pytest.mark.parametrize(
    ("ci", "way"),
    [*((ci, "--server-side") for ci in CI), ("default", "--server-side=false"), ("dev", "--server-side=false")],
)
def test_every_object_is_taken(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart, ci: str, way: str
) -> None:
    """By server-side apply, as Helm 4 does it and which is the stricter one; some by Helm 3's way too. Without a warning."""
    text = chart.text(ci, namespace=namespace)  # as Helm wrote it: 1e+06 has to be a number to them
    unknown = {obj["apiVersion"] for obj in parse(text)} - set(cluster.kubectl("api-versions").split())
    if unknown:
        text = as_yaml(known(cluster, parse(text)))
    done = cluster.run(
        ["kubectl", f"--context={cluster.context}", "-n", namespace, "apply", way, "--dry-run=server",
         "--validate=strict", "-o", "name", "-f", "-"],
        stdin=text, timeout=120,
    )  # fmt: skip
    warned = [line for line in done.stderr.splitlines() if "last-applied-configuration" not in line]  # of `accounts`
    assert not warned
    assert len(done.stdout.split()) == len(parse(text))
    if unknown:
        pytest.skip(f"taken, but for those that this cluster does not know: {', '.join(sorted(unknown))}")


@pytest.mark.parametrize("ci", CI)
def test_every_pod_is_taken_under_restricted(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart, ci: str
) -> None:
    """Of a Deployment or a Job that makes wrong pods the API server only warns: the pods themselves are refused."""
    made = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"pod-{number}", "namespace": namespace, "labels": pod.labels},
            "spec": {**pod.spec, "restartPolicy": pod.spec.get("restartPolicy", "Always")},
        }
        for number, pod in enumerate(pods(parse(chart.text(ci, namespace=namespace))))
    ]
    assert len(made) >= 8
    said = cluster.kubectl("create", "--dry-run=server", "-o", "name", "-f", "-", stdin=as_yaml(made), timeout=120)
    assert len(said.split()) == len(made)


def test_a_pod_that_is_not_restricted_is_refused(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart
) -> None:
    """Or the test above would prove nothing."""
    objects = parse(
        chart.text(values="containerSecurityContext: {allowPrivilegeEscalation: true}", namespace=namespace)
    )
    (pod,) = pods([one(objects, "Deployment/churn")])
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": namespace}, "spec": pod.spec}
    done = cluster.run(
        ["kubectl", f"--context={cluster.context}", "create", "--dry-run=server", "-f", "-"],
        stdin=json.dumps(made), check=False,
    )  # fmt: skip
    assert done.returncode
    assert 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false' in done.stderr


EVERYTHING = """
serving:
  replicas: 2
  probes: {startup: {initialDelaySeconds: 1}}
  extraEnv: [{name: A, value: b}]
  nodeSelector: {a: b}
  tolerations: [{key: a, operator: Exists}]
  affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: []}}
  podAnnotations: {a: "1"}
  podLabels: {a: "1"}
  service: {type: LoadBalancer, annotations: {a: b}}
  resources: {requests: {cpu: 0.1, memory: 1G}, limits: {memory: 1.5Gi}}
jobs:
  timeZone: America/New_York
  defaults:
    ttlSecondsAfterFinished: 2592000
    activeDeadlineSeconds: 1000000
    startingDeadlineSeconds: 1000000
    args: [--json]
  extraEnv: [{name: A, valueFrom: {secretKeyRef: {name: s, key: k, optional: true}}}]
  affinity: {podAffinity: {preferredDuringSchedulingIgnoredDuringExecution: []}}
  podAnnotations: {sidecar.istio.io/inject: "false"}
bootstrap: {resources: {limits: {memory: 1Gi}}}
mlflow: {persistence: {storageClass: "-", size: 1073741824}, envFrom: [{secretRef: {name: s, optional: true}}]}
postgres: {args: [-c, shared_buffers=256MB], priorityClassName: ""}
networkPolicy: {extraEgress: [{to: [{ipBlock: {cidr: 10.1.0.0/16}}], ports: [{port: 3128}]}]}
podSecurityContext: {supplementalGroups: [2000]}
serviceAccount: {annotations: {a: b}}
ingress: {annotations: {a: b}, host: "*.example.com"}
metrics: {serviceMonitor: {enabled: true}, prometheusRule: {enabled: true}, dashboards: {enabled: true}}
"""


def test_values_that_no_file_of_ci_has_are_taken(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart
) -> None:
    """Large numbers and odd quantities among them."""
    objects = chart.text(values=EVERYTHING, namespace=namespace)
    kinds = known(cluster, parse(objects))
    text = objects if len(kinds) == len(parse(objects)) else as_yaml(kinds)
    cluster.kubectl(
        "-n", namespace, "apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text, timeout=120
    )
    job = one(kinds, "CronJob/drift")
    taken: Any = json.loads(
        cluster.kubectl("-n", namespace, "apply", "--dry-run=server", "-o", "json", "-f", "-", stdin=as_yaml([job]))
    )
    assert taken["spec"]["jobTemplate"]["spec"]["ttlSecondsAfterFinished"] == 2592000


@pytest.mark.parametrize(
    "schedule", ["0 3,15 1-7/2 JAN-MAR ?", "@daily", "*/5 * * * MON-FRI", "0 0 * * SUN", "59 23 31 12 6"]
)
def test_a_schedule_that_the_chart_takes_is_taken(
    cluster: Cluster, namespace: str, chart: Chart, schedule: str
) -> None:
    objects = parse(chart.text(values=f"jobs: {{drift: {{schedule: '{schedule}'}}}}", namespace=namespace))
    cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=as_yaml([one(objects, "CronJob/drift")]))


# ---- what the API server lets a component do ----------------------------------------------------------------

RIGHTS = [
    ("promote", "patch", "deployments.apps/churn", True),
    ("promote", "patch", "deployments.apps/churn-mlflow", False),
    ("promote", "update", "deployments.apps/churn", False),
    ("promote", "watch", "pods", True),
    ("promote", "delete", "pods", False),
    ("promote", "update", "leases.coordination.k8s.io/churn-promote", True),
    ("promote", "update", "leases.coordination.k8s.io/churn-drift", False),
    ("promote", "get", "secrets/churn", False),
    ("promote", "create", "jobs.batch", False),
    ("drift", "create", "jobs.batch", True),
    ("drift", "delete", "jobs.batch", False),
    ("drift", "get", "cronjobs.batch/retrain", True),
    ("drift", "get", "cronjobs.batch/promote", False),
    ("drift", "patch", "deployments.apps/churn", False),
    ("retrain", "create", "jobs.batch", False),
    ("retrain", "create", "events.events.k8s.io", True),
    ("bootstrap", "patch", "deployments.apps/churn", True),
    ("bootstrap", "create", "pods", False),
    ("score", "get", "pods", False),
    ("serving", "get", "configmaps", False),
    ("mlflow", "get", "secrets", False),
]


@pytest.mark.parametrize(("component", "verb", "what", "may"), RIGHTS, ids=[f"{r[0]} {r[1]} {r[2]}" for r in RIGHTS])
def test_what_a_component_may_do(
    cluster: Cluster, namespace: str, accounts: list[Object], component: str, verb: str, what: str, may: bool
) -> None:
    who = f"--as=system:serviceaccount:{namespace}:churn-{component}"
    said = cluster.kubectl("-n", namespace, "auth", "can-i", verb, what, who, check=False).strip()
    assert said == ("yes" if may else "no")


# ---- what the chart looks up --------------------------------------------------------------------------------


@pytest.fixture
def secret(cluster: Cluster, namespace: str) -> Iterator[str]:
    """The name of a Secret in the namespace, which is removed; make it yourself."""
    name = f"secret-{secrets.token_hex(3)}"
    yield name
    cluster.kubectl("-n", namespace, "delete", "secret", name, "--ignore-not-found")


def install(
    chart: Chart, cluster: Cluster, namespace: str, values: str, *, major: int, release: str = "churn"
) -> list[Object]:
    """What `helm install` would make, looked up on the cluster; Refused with what it said."""
    helm = find_helm(major)
    if helm is None:
        pytest.skip(f"no Helm {major} on the PATH, nor one that `make node-build` made")
    done = chart.run(
        "template", release, chart.folder, "--namespace", namespace, "--dry-run=server", "-f", "-",
        f"--kube-context={cluster.context}", values=values, helm=helm, kubeconfig=cluster.kubeconfig,
    )  # fmt: skip
    if done.returncode:
        raise Refused(done.stderr)
    return parse(done.stdout)


@pytest.mark.parametrize("major", HELMS)
def test_a_generated_secret_is_kept(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart, major: int
) -> None:
    """By an install under the same name, keys of others included; what is missing is added. A password thrown away would lock us out of its volume."""
    release = f"keep-{secrets.token_hex(3)}"
    labels = {"app.kubernetes.io/managed-by": "Helm"}
    metadata = {"name": release, "labels": labels, "annotations": owned_by(release, namespace)}
    left = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "stringData": {"churn-password": "kept", "mine": "x"},
    }
    cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(left))
    try:
        objects = install(chart, cluster, namespace, "{}", major=major, release=release)
    finally:
        cluster.kubectl("-n", namespace, "delete", "secret", release)
    data = {k: base64.b64decode(v).decode() for k, v in one(objects, f"Secret/{release}")["data"].items()}
    assert data["churn-password"] == "kept"
    assert data["mine"] == "x"
    assert data["database-url"] == f"postgresql+psycopg://churn:kept@{release}-postgres:5432/churn"
    assert len(data["feast-password"]) == 32


@pytest.mark.parametrize("major", HELMS)
def test_a_secret_that_is_missing_is_told_with_the_remedy(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart, secret: str, major: int
) -> None:
    values = f"existingSecret: {secret}"
    with pytest.raises(Refused, match=f"there is no Secret {secret} in namespace {namespace}") as error:
        install(chart, cluster, namespace, values, major=major)
    assert f"kubectl -n {namespace} create secret generic {secret} --from-literal=" in str(error.value)

    cluster.kubectl("-n", namespace, "create", "secret", "generic", secret, "--from-literal=database-url=x")
    with pytest.raises(Refused, match=f"Secret {secret} in namespace {namespace} lacks ") as error:
        install(chart, cluster, namespace, values, major=major)
    lacking = str(error.value).split(" lacks ")[1].split(". ")[0].split(", ")
    assert "database-url" not in lacking

    cluster.kubectl(
        "-n", namespace, "patch", "secret", secret, "-p", json.dumps({"stringData": dict.fromkeys(lacking, "x")})
    )
    objects = install(chart, cluster, namespace, values, major=major)
    assert of_kind(objects, "Secret") == []


def test_keys_of_external_stores_are_looked_for(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart, secret: str
) -> None:
    """By the names that the values give them, and only those that are needed."""
    values = f"""
    postgres: {{enabled: false}}
    externalPostgres: {{existingSecret: {secret}, keys: {{databaseUrl: url, servingDatabaseUrl: url}}}}
    valkey: {{enabled: false}}
    externalRedis: {{existingSecret: {secret}, urlKey: redis}}
    mlflow: {{enabled: false}}
    externalMlflow: {{url: 'https://mlflow.example.com'}}
    """
    cluster.kubectl("-n", namespace, "create", "secret", "generic", secret, "--from-literal=other=x")
    major = 3 if find_helm(3) else 4
    with pytest.raises(Refused) as error:
        install(chart, cluster, namespace, values, major=major)
    lacking = str(error.value).split(" lacks ")[1].split(". ")[0].split(", ")
    assert set(lacking) == {"url", "feast-registry-url", "redis"}


@pytest.mark.parametrize("major", HELMS)
def test_keys_and_the_token_of_probes_are_looked_for(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart, secret: str, major: int
) -> None:
    values = f"serving: {{apiKeys: {{existingSecret: {secret}}}}}"
    with pytest.raises(Refused, match=f"no Secret {secret} with a key in it in namespace {namespace}, which serving"):
        install(chart, cluster, namespace, values, major=major)
    cluster.kubectl("-n", namespace, "create", "secret", "generic", secret, f"--from-literal=shop={'x' * 32}")
    install(chart, cluster, namespace, values, major=major)
    cluster.kubectl("-n", namespace, "create", "secret", "generic", f"{secret}-own", "--from-literal=database-url=x")
    try:
        with pytest.raises(Refused, match=f"Secret {secret}-own in namespace {namespace} lacks .*probe-token"):
            install(chart, cluster, namespace, f"{{existingSecret: {secret}-own, {values}}}", major=major)
    finally:
        cluster.kubectl("-n", namespace, "delete", "secret", f"{secret}-own")


def test_a_second_release_in_a_namespace_needs_a_prefix(
    cluster: Cluster, namespace: str, accounts: list[Object], chart: Chart
) -> None:
    """Helm's own word for it would not say which value to set."""
    job = one(parse(chart.text(namespace=namespace)), "CronJob/promote")
    job["metadata"]["annotations"] = {"meta.helm.sh/release-name": "first"}
    job["spec"]["suspend"] = True
    major = 3 if find_helm(3) else 4
    cluster.kubectl("create", "-f", "-", stdin=as_yaml([job]))
    try:
        with pytest.raises(Refused, match=r"release first in namespace .* Set jobs\.namePrefix, such as second-"):
            install(chart, cluster, namespace, "{}", major=major, release="second")
        install(chart, cluster, namespace, "jobs: {namePrefix: second-}", major=major, release="second")
        install(chart, cluster, namespace, "{}", major=major, release="first")
    finally:
        cluster.kubectl("-n", namespace, "delete", "cronjob", "promote")


def test_dry_runs_left_nothing(cluster: Cluster, namespace: str, accounts: list[Object]) -> None:
    """The last test of this module."""
    found = cluster.kubectl("-n", namespace, "get", "deployments,jobs,cronjobs,pods,pvc,services,secrets", "-o", "name")
    assert found.split() == []
    assert {name_of(obj).split("/")[0] for obj in accounts} == {"ServiceAccount", "Role", "RoleBinding"}
