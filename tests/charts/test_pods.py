"""Every pod, whoever makes it: unprivileged, on a read-only root, with a token only where it speaks to the API."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.charts.rendering import CHART, JOBS, Chart, Object, Pod, name_of, of_kind, one, parse, pods

# The smallest set of rights each component needs; a token for another one is a hole.
SPEAK_TO_THE_API = {"bootstrap", "materialize", "drift", "retrain", "promote"}
IDS = {"postgres": 999, "valkey": 999}  # of the official images; the others' are ours
CPU_BUDGET = 450  # thousandths of a core that the test node gives a release


def test_there_are_pods_of_every_component(objects: list[Object], ci: str) -> None:
    bundled = set() if ci == "external-stores" else {"mlflow", "postgres", "valkey"}
    assert {pod.component for pod in pods(objects)} == {*JOBS, "serving", "bootstrap", "test", *bundled}


def test_pods_are_what_pod_security_restricted_lets_in(objects: list[Object], ci: str) -> None:
    """kubernetes.io/docs/concepts/security/pod-security-standards; the API server's own word is in test_api_server.py."""
    for pod in pods(objects):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True, pod.owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.owner
        kinds = {kind for volume in pod.spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "configMap", "secret"}, pod.owner
        for container in pod.containers:
            where = f"{pod.owner} {container['name']}"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }, where  # fmt: skip
            assert all("hostPort" not in port for port in container.get("ports", ())), where


def test_user_ids_are_numbers(objects: list[Object], ci: str) -> None:
    """`runAsNonRoot` alone refuses an image whose user is a name. Only with fixedIds: false the platform chooses."""
    for pod in pods(objects):
        wanted = None if ci == "openshift" else IDS.get(pod.component, 10001)
        for key in ("runAsUser", "runAsGroup", "fsGroup"):
            assert pod.spec["securityContext"].get(key) == wanted, f"{pod.owner} {key}"
        assert all("runAsUser" not in container["securityContext"] for container in pod.containers), pod.owner


def test_no_service_becomes_a_variable(objects: list[Object]) -> None:
    """A Service `churn` would set CHURN_PORT, one named mlflow MLFLOW_PORT, which MLflow takes for an option."""
    assert [pod.owner for pod in pods(objects) if pod.spec["enableServiceLinks"] is not False] == []


def test_a_token_is_mounted_only_where_the_api_is_spoken_to(objects: list[Object]) -> None:
    with_token = {pod.component for pod in pods(objects) if pod.spec["automountServiceAccountToken"] is not False}
    assert with_token == SPEAK_TO_THE_API
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False, name_of(account)


def test_each_component_has_its_own_service_account(objects: list[Object]) -> None:
    for pod in pods(objects):
        assert pod.spec["serviceAccountName"] == f"churn-{pod.component}"
    assert {f"churn-{pod.component}" for pod in pods(objects)} == {
        account["metadata"]["name"] for account in of_kind(objects, "ServiceAccount")
    }


def test_resources_are_set(objects: list[Object]) -> None:
    """A memory limit for each container, and no CPU limit: one throttled in a request is slow, not cheap."""
    for pod in pods(objects):
        for container in pod.containers:
            resources = container["resources"]
            assert set(resources["requests"]) == {"cpu", "memory"}, f"{pod.owner} {container['name']}"
            assert set(resources["limits"]) == {"memory"}, f"{pod.owner} {container['name']}"


@pytest.mark.parametrize("ci", ["default", "dev"])
def test_a_release_its_surge_pod_and_one_job_fit_into_the_test_node(
    rendered: Callable[[str], list[Object]], ci: str
) -> None:
    objects = rendered(ci)
    lasting = sum(
        pod.cpu * deployment["spec"]["replicas"]
        for deployment in of_kind(objects, "Deployment")
        for pod in pods([deployment])
    )
    (surge,) = [pod.cpu for pod in pods([one(objects, "Deployment/churn")])]
    jobs = {pod.owner: pod.cpu for pod in pods(of_kind(objects, "Job", "CronJob", "Pod"))}
    assert lasting + surge + max(jobs.values()) <= CPU_BUDGET, (lasting, surge, jobs)


def test_a_writable_tmp_under_a_read_only_root(objects: list[Object]) -> None:
    """And HOME there, in every container of ours: libraries write where they are not asked to."""
    for pod in pods(objects):
        folders = {volume["name"] for volume in pod.spec["volumes"] if "emptyDir" in volume}
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert mounts["/tmp"] in folders, pod.owner  # noqa: S108


def test_images_are_what_the_values_say(chart: Chart) -> None:
    values = f"""
    images:
      registry: registry.example.com/ml/
      pullPolicy: Always
      pullSecrets: [a, b]
      jobs: {{tag: v1}}
      serving: {{tag: v1, digest: "sha256:{"a" * 64}"}}
    """
    for pod in pods(chart.objects(values=values)):
        assert pod.spec["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}], pod.owner
        for container in pod.containers:
            assert container["imagePullPolicy"] == "Always"
            wanted = {
                "serving": f"churn-serving@sha256:{'a' * 64}",
                "mlflow": "churn-mlflow:0.1.0",
                "postgres": "postgres:17",
                "valkey": "valkey/valkey:8",
            }.get(pod.component, "churn-jobs:v1")
            assert container["image"] == f"registry.example.com/ml/{wanted}", pod.owner


def test_security_contexts_can_be_laid_over(chart: Chart) -> None:
    values = (
        "{podSecurityContext: {supplementalGroups: [2000], runAsUser: 5}, containerSecurityContext: {runAsUser: 6}}"
    )
    for pod in pods(chart.objects(values=values)):
        assert pod.spec["securityContext"]["supplementalGroups"] == [2000]
        assert pod.spec["securityContext"]["runAsUser"] == 5
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert all(container["securityContext"]["runAsUser"] == 6 for container in pod.containers)


SCHEDULING: dict[str, Any] = {
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    "priorityClassName": "low",
}


@pytest.mark.parametrize("group", ["serving", "jobs", "mlflow", "postgres", "valkey"])
def test_scheduling_reaches_the_pods_of_its_group_and_no_others(chart: Chart, group: str) -> None:
    values = {group: {**SCHEDULING, "podAnnotations": {"team": "growth"}, "podLabels": {"team": "growth"}}}
    for pod in pods(chart.objects(values=json.dumps(values))):
        of_group = pod.component == group or (group == "jobs" and pod.component in {*JOBS, "bootstrap", "test"})
        found = {key: pod.spec.get(key) for key in SCHEDULING}
        if found["affinity"] is not None:
            found["affinity"] = {k: v for k, v in found["affinity"].items() if k != "podAffinity"} or None
        assert found == (SCHEDULING if of_group else dict.fromkeys(SCHEDULING)), pod.owner
        assert (pod.labels.get("team") == "growth") == of_group
        assert (pod.metadata.get("annotations", {}).get("team") == "growth") == of_group


def test_jobs_on_one_volume_keep_together(rendered: Callable[[str], list[Object]]) -> None:
    """A ReadWriteOnce volume is on one node. The term finds its own pod too, or the first one could never be placed."""
    term = "requiredDuringSchedulingIgnoredDuringExecution"
    for ci, together in (("default", True), ("own-data", False)):
        for pod in pods(rendered(ci)):
            on_volume = any(
                v.get("persistentVolumeClaim", {}).get("claimName") == "churn-data" for v in pod.spec["volumes"]
            )
            terms = pod.spec.get("affinity", {}).get("podAffinity", {}).get(term, [])
            assert bool(terms) == (on_volume and together), f"{ci} {pod.owner}"
            for found in terms:
                assert found["topologyKey"] == "kubernetes.io/hostname"
                assert found["labelSelector"]["matchLabels"].items() <= pod.labels.items(), pod.owner


def test_only_pods_on_the_data_volume_are_found_as_such(objects: list[Object]) -> None:
    claims = {"churn-data"}
    for pod in pods(objects):
        named = {v["persistentVolumeClaim"]["claimName"] for v in pod.spec["volumes"] if "persistentVolumeClaim" in v}
        assert ("churn/data" in pod.labels) == bool(claims & named), pod.owner


# ---- serving ------------------------------------------------------------------------------------------------


def _serving(objects: list[Object]) -> tuple[Object, Pod]:
    deployment = one(objects, "Deployment/churn")
    (pod,) = pods([deployment])
    return deployment, pod


def test_what_belongs_to_promotion_is_not_rendered(objects: list[Object]) -> None:
    """An upgrade would put it back (Helm 3) or fail (Helm 4): shared/facts.md, last section."""
    deployment, pod = _serving(objects)
    assert "minReadySeconds" not in deployment["spec"]
    for metadata in (deployment["metadata"], pod.metadata):
        assert not {"churn/bento-tag", "churn/fence"} & set(metadata.get("annotations", {}))
    assert pod.metadata["annotations"], "promotion's JSON patch adds to this map, which has to be there"


def test_serving_rolls_without_a_gap(objects: list[Object]) -> None:
    deployment, pod = _serving(objects)
    assert deployment["spec"]["strategy"] == {
        "type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
    }  # fmt: skip
    assert deployment["spec"]["progressDeadlineSeconds"] == 1800
    drain = int(one(objects, "ConfigMap/churn-serving")["data"]["CHURN_DRAIN_SECONDS"])
    assert pod.spec["terminationGracePeriodSeconds"] == drain + 35
    (container,) = pod.spec["containers"]
    assert "lifecycle" not in container, "the service drains at SIGTERM by itself"


def test_the_number_of_pods_is_the_autoscaler_s_or_ours(rendered: Callable[[str], list[Object]]) -> None:
    assert "replicas" not in one(rendered("autoscaling"), "Deployment/churn")["spec"]
    scaler = one(rendered("autoscaling"), "HorizontalPodAutoscaler/churn")["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "churn"}
    assert one(rendered("high-availability"), "Deployment/churn")["spec"]["replicas"] == 3


def test_probes_ask_what_the_service_answers(objects: list[Object]) -> None:
    _, pod = _serving(objects)
    (container,) = pod.spec["containers"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": 3000}
    asked = {probe: container[f"{probe}Probe"]["httpGet"] for probe in ("startup", "liveness", "readiness")}
    assert asked == {
        "startup": {"path": "/livez", "port": "http"},
        "liveness": {"path": "/livez", "port": "http"},
        "readiness": {"path": "/readyz", "port": "http"},
    }
    assert container["readinessProbe"]["periodSeconds"] == container["readinessProbe"]["timeoutSeconds"] == 2


def test_named_ports_and_backends_exist(objects: list[Object]) -> None:
    services = {}
    for service in of_kind(objects, "Service"):
        (pod,) = [
            p for p in pods(of_kind(objects, "Deployment")) if service["spec"]["selector"].items() <= p.labels.items()
        ]
        ports = {port["name"] for container in pod.containers for port in container.get("ports", ())}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, name_of(service)
        services[service["metadata"]["name"]] = {p["name"]: p["port"] for p in service["spec"]["ports"]}
    for ingress in of_kind(objects, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                assert backend["port"]["name"] in services[backend["name"]]
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert backend["port"] in services[backend["name"]].values()


@pytest.mark.parametrize(
    ("ci", "paths"),
    [
        ("default", ["/predict"]),
        ("ingress", ["/predict", "/docs.json"]),
        ("httproute", ["/predict"]),
    ],
)
def test_only_predict_is_reached_from_outside(
    rendered: Callable[[str], list[Object]], ci: str, paths: list[str]
) -> None:
    """Exactly: /info, /metrics and whatever the service learns to answer stay inside."""
    found = [
        (path["path"], path["pathType"])
        for ingress in of_kind(rendered(ci), "Ingress")
        for rule in ingress["spec"]["rules"]
        for path in rule["http"]["paths"]
    ] + [
        (match["path"]["value"], match["path"]["type"])
        for route in of_kind(rendered(ci), "HTTPRoute")
        for rule in route["spec"]["rules"]
        for match in rule["matches"]
    ]
    assert found == [(path, "Exact") for path in paths]


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ("serving: {drainSeconds: 9}", {"Deployment/churn"}),
        ("serving: {staleAfter: 10d}", {"Deployment/churn", "bootstrap"}),
        ("serving: {apiKeys: {existingSecret: k}}", {"Deployment/churn"}),
        ("asOf: 2024-03-01", {"Deployment/churn", "bootstrap"}),
        ("gate: {promotionDelta: 0.5}", {"bootstrap"}),
        ("simulate: {users: 4000}", {"bootstrap"}),
        ("jobs: {logLevel: DEBUG}", {"bootstrap"}),
        ("jobs: {drift: {schedule: '0 4 * * *'}}", set()),
        ("serving: {replicas: 2}", set()),
        ("metrics: {dashboards: {enabled: true}}", set()),
    ],
)
def test_a_changed_setting_restarts_what_reads_it_and_nothing_else(
    chart: Chart, values: str, changes: set[str]
) -> None:
    """Bootstrap is made anew: whoever mends a wrong setting gets another try."""

    def templates(objects: list[Object]) -> dict[str, Any]:
        lasting = {pod.owner: (pod.metadata, pod.spec) for pod in pods(of_kind(objects, "Deployment"))}
        (job,) = of_kind(objects, "Job")
        return {**lasting, "bootstrap": job["metadata"]["name"]}

    before, after = templates(chart.objects()), templates(chart.objects(values=values))
    assert {name for name in before if before[name] != after[name]} == changes


def test_a_new_version_of_the_chart_restarts_no_store(chart: Chart, tmp_path: Path) -> None:
    """Labels of objects carry the version; pod templates and checksums do not."""
    newer = tmp_path / "charts"
    shutil.copytree(CHART, newer)
    file = newer / "Chart.yaml"
    file.write_text(file.read_text().replace("version: 0.1.0\nappVersion: 0.1.0", "version: 9.9.9\nappVersion: 0.1.0"))
    after = parse(Chart(chart.helm, chart.home, newer).text())
    assert "churn-9.9.9" in {obj["metadata"]["labels"]["helm.sh/chart"] for obj in after}
    kinds = ("Deployment", "Job", "CronJob")
    assert list(pods(of_kind(chart.objects(), *kinds))) == list(pods(of_kind(after, *kinds)))


# ---- stores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["mlflow", "postgres", "valkey"])
def test_a_volume_has_one_writer(rendered: Callable[[str], list[Object]], store: str) -> None:
    spec = one(rendered("default"), f"Deployment/churn-{store}")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}


def test_mlflow_answers_to_each_name_it_is_asked_by(chart: Chart) -> None:
    """Else 403, while its probes stay green; with and without the port, as clients send it."""
    objects = chart.objects(values="{clusterDomain: corp.local, mlflow: {extraAllowedHosts: [mlflow.example.com]}}")
    (pod,) = pods([one(objects, "Deployment/churn-mlflow")])
    (words,) = [c["command"] for c in pod.containers]
    (hosts,) = [
        word.removeprefix("--allowed-hosts=").split(",") for word in words if word.startswith("--allowed-hosts=")
    ]
    names = ["churn-mlflow"] + [f"churn-mlflow.churn-ns{end}" for end in ("", ".svc", ".svc.corp.local")]
    assert {*names, *(f"{name}:5000" for name in names), "localhost", "localhost:*", "mlflow.example.com"} <= set(hosts)
    assert {"--workers=1", "--port=5000", "--serve-artifacts"} <= set(words)
    env = {entry["name"]: entry.get("value") for c in pod.containers for entry in c["env"]}
    assert env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert env["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_valkey_forgets_nobody(rendered: Callable[[str], list[Object]]) -> None:
    (pod,) = pods([one(rendered("default"), "Deployment/churn-valkey")])
    (args,) = [container["args"] for container in pod.containers]
    options = dict(zip(args[1::2], args[2::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--requirepass"] == "$(VALKEY_PASSWORD)"
    assert options["--appendonly"] == "yes"


def test_no_password_is_in_a_pod_template_or_a_config_map(objects: list[Object]) -> None:
    passwords = {
        base64.b64decode(value).decode()
        for secret in of_kind(objects, "Secret")
        for key, value in secret["data"].items()
        if key.endswith(("-password", "-token"))
    }
    text = str([obj for obj in objects if obj["kind"] != "Secret"])
    assert not [password for password in passwords if password in text]


def test_generated_passwords_differ_and_are_in_their_urls(rendered: Callable[[str], list[Object]]) -> None:
    data = {k: base64.b64decode(v).decode() for k, v in one(rendered("default"), "Secret/churn")["data"].items()}
    passwords = {key: value for key, value in data.items() if key.endswith(("-password", "-token"))}
    assert len(set(passwords.values())) == len(passwords) == 7
    assert all(len(value) == 32 and value.isalnum() for value in passwords.values())
    expected = {
        "database-url": f"postgresql+psycopg://churn:{data['churn-password']}@churn-postgres:5432/churn",
        "serving-database-url": f"postgresql+psycopg://churn_serving:{data['serving-password']}@churn-postgres:5432/churn",
        "feast-registry-url": f"postgresql+psycopg://feast:{data['feast-password']}@churn-postgres:5432/feast",
        "mlflow-backend-url": f"postgresql+psycopg://mlflow:{data['mlflow-password']}@churn-postgres:5432/mlflow",
        "online-store-url": f"redis://:{data['valkey-password']}@churn-valkey:6379/0",
    }
    assert {key: value for key, value in data.items() if key not in passwords} == expected


def test_no_component_has_another_s_password(rendered: Callable[[str], list[Object]]) -> None:
    """Serving may read bentos and insert predictions, and is not told how to do more."""
    wanted = {
        "serving": {"serving-database-url", "online-store-url", "probe-token"},
        "mlflow": {"mlflow-backend-url"},
        "valkey": {"valkey-password"},
        "postgres": {f"{role}-password" for role in ("postgres", "mlflow", "feast", "churn", "serving")},
    }
    for pod in pods(rendered("default")):
        keys = {
            entry["valueFrom"]["secretKeyRef"]["key"]
            for container in pod.containers
            for entry in container["env"]
            if "secretKeyRef" in entry.get("valueFrom", {})
        }
        of_jobs = {"database-url", "feast-registry-url", "online-store-url"}
        if pod.component in ("promote", "bootstrap", "test"):  # they ask the service
            of_jobs.add("probe-token")
        assert keys == wanted.get(pod.component, of_jobs), pod.owner


def test_external_stores_leave_nothing_of_ours(rendered: Callable[[str], list[Object]]) -> None:
    objects = rendered("external-stores")
    assert {obj["metadata"]["name"] for obj in of_kind(objects, "Deployment", "Service")} == {"churn"}
    assert [name_of(obj) for obj in of_kind(objects, "PersistentVolumeClaim", "Secret")] == [
        "PersistentVolumeClaim/churn-data"
    ]
