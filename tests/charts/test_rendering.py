"""What holds for every object, whatever is turned on: both Helms, labels, selectors, references."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.charts.rendering import (
    CHART,
    CI,
    NAMESPACE,
    Chart,
    Object,
    Refused,
    find_helm,
    name_of,
    of_kind,
    one,
    parse,
    pods,
)

NAME, INSTANCE, COMPONENT = (f"app.kubernetes.io/{key}" for key in ("name", "instance", "component"))
STANDARD = {NAME, INSTANCE, COMPONENT, "helm.sh/chart"} | {
    f"app.kubernetes.io/{key}" for key in ("part-of", "version", "managed-by")
}


def ours(objects: list[Object]) -> list[Object]:
    """All but those of extraObjects, which only `openshift` has."""
    return [obj for obj in objects if name_of(obj) != "ConfigMap/churn-notes"]


@pytest.fixture(params=[3, 4], ids=["helm 3", "helm 4"])
def helm(request: pytest.FixtureRequest) -> Path:
    """Each Helm that is here."""
    found = find_helm(request.param)
    if found is None:
        pytest.skip(f"no Helm {request.param} on the PATH, nor one that `make node-build` made")
    return found


def test_there_is_a_file_a_feature() -> None:
    assert {"dev", "existing-secret", "external-stores", "ingress", "httproute", "autoscaling"} <= set(CI)


def test_helm_3_and_helm_4_render_the_same(chart: Chart, ci: str) -> None:
    """Generated passwords apart."""

    def without_secrets(helm: int) -> dict[str, Object]:
        program = find_helm(helm)
        if program is None:
            pytest.skip(f"no Helm {helm} on the PATH, nor one that `make node-build` made")
        found = {name_of(obj): obj for obj in parse(chart.text(ci, helm=program))}
        for name, obj in found.items():
            if name.startswith("Secret/"):
                obj["data"] = sorted(obj["data"])
        return found

    assert without_secrets(3) == without_secrets(4)


def test_lint(chart: Chart, ci: str, helm: Path) -> None:
    file: list[str | Path] = [] if ci == "default" else ["-f", CHART / "ci" / f"{ci}-values.yaml"]
    done = chart.run("lint", "--strict", CHART, *file, helm=helm)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", ["existing-secret", "external-stores"])
def test_given_existing_secrets_it_renders_the_same_bytes_twice(chart: Chart, file: str, helm: Path) -> None:
    assert chart.text(file, helm=helm) == chart.text(file, helm=helm)


def test_without_lookup_only_the_secret_is_new_each_time(chart: Chart) -> None:
    """No checksum of a password is in a pod template, or GitOps would restart everything at each sync."""
    first, second = (chart.objects() for _ in range(2))
    differing = [name_of(a) for a, b in zip(first, second, strict=True) if a != b]
    assert differing == ["Secret/churn"]


@pytest.mark.parametrize(
    ("version", "taken"), [("1.27.0", True), ("1.31.5-gke.1068000", True), ("1.36.3", True), ("1.26.9", False)]
)
def test_kubernetes_versions(chart: Chart, version: str, taken: bool) -> None:
    """The suffix of a vendor's build does not make it older."""
    try:
        chart.text(arguments=["--kube-version", version])
    except Refused as error:
        assert not taken, error
        assert "incompatible" in str(error)
    else:
        assert taken


def test_no_object_comes_twice(objects: list[Object]) -> None:
    names = [name_of(obj) for obj in objects]
    assert sorted(set(names)) == sorted(names)


def test_every_object_has_the_standard_labels(objects: list[Object]) -> None:
    wrong = {
        name_of(obj): sorted(STANDARD - set(obj["metadata"].get("labels", {})))
        for obj in ours(objects)
        if not set(obj["metadata"].get("labels", {})) >= STANDARD
    }
    assert not wrong


def test_every_object_says_whose_it_is(objects: list[Object]) -> None:
    for obj in ours(objects):
        labels = obj["metadata"]["labels"]
        assert (labels[NAME], labels[INSTANCE]) == ("churn", "churn"), name_of(obj)
        assert obj["metadata"]["namespace"] == NAMESPACE, name_of(obj)
        assert obj["metadata"]["name"].startswith("churn") or obj["kind"] == "CronJob", name_of(obj)


def test_names_and_labels_are_not_too_long(chart: Chart) -> None:
    """Of the longest release name: names and labels have at most 63 characters, a CronJob's name 52."""
    for obj in chart.objects(release="c" * 40, values="jobs: {namePrefix: " + "p" * 30 + "}"):
        name, labels = obj["metadata"]["name"], obj["metadata"]["labels"]
        assert len(name) <= (52 if obj["kind"] == "CronJob" else 63), name_of(obj)
        assert all(len(value) <= 63 for value in labels.values()), name_of(obj)


SELECTORS: dict[str, Callable[[Object], dict[str, str]]] = {
    "Deployment": lambda spec: spec["selector"]["matchLabels"],
    "Service": lambda spec: spec["selector"],
    "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
    "ServiceMonitor": lambda spec: spec["selector"]["matchLabels"],
}


def test_selectors_carry_name_instance_and_component_only(objects: list[Object]) -> None:
    for obj in of_kind(objects, *SELECTORS):
        assert set(SELECTORS[obj["kind"]](obj["spec"])) == {NAME, INSTANCE, COMPONENT}, name_of(obj)
    for pod in pods(objects):
        for spread in pod.spec.get("topologySpreadConstraints", ()):
            assert set(spread["labelSelector"]["matchLabels"]) == {NAME, INSTANCE, COMPONENT}, pod.owner
    for policy in of_kind(objects, "NetworkPolicy"):
        assert set(policy["spec"]["podSelector"]["matchLabels"]) <= {NAME, INSTANCE, COMPONENT}, name_of(policy)


def test_selectors_stay_for_ever(chart: Chart) -> None:
    """They cannot be changed on the cluster: no label of theirs follows a version, a name or a value, but nameOverride."""
    values = "{fullnameOverride: other, images: {jobs: {tag: '2'}}, serving: {podLabels: {team: x}}}"
    before, after = chart.objects(), chart.objects(values=values)
    for kind in ("Deployment", "Service"):
        assert [SELECTORS[kind](obj["spec"]) for obj in of_kind(before, kind)] == [
            SELECTORS[kind](obj["spec"]) for obj in of_kind(after, kind)
        ]


def test_each_selector_finds_the_pods_of_its_own_component(objects: list[Object]) -> None:
    """And no other pod, a Job's least of all."""
    for obj in of_kind(objects, "Deployment", "Service", "PodDisruptionBudget"):
        selector = SELECTORS[obj["kind"]](obj["spec"])
        found = {pod.owner for pod in pods(objects) if selector.items() <= pod.labels.items()}
        wanted = obj["metadata"]["name"]
        assert found == {f"Deployment/{wanted}"}, name_of(obj)
    for obj in of_kind(objects, "ServiceMonitor"):
        found = {
            name_of(service)
            for service in of_kind(objects, "Service")
            if SELECTORS["ServiceMonitor"](obj["spec"]).items() <= service["metadata"]["labels"].items()
        }
        assert found == {"Service/churn"}
        ports = {port["name"] for port in one(objects, "Service/churn")["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in obj["spec"]["endpoints"]} <= ports


def _lists(value: Any, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _lists(item, f"{path}.{key}")
    elif isinstance(value, list):
        yield path, value
        for index, item in enumerate(value):
            yield from _lists(item, f"{path}[{index}]")


# lists that server-side apply (Helm 4) merges by a key, and refuses if it comes twice
MERGE_KEYS = {
    "env": "name", "ports": ("name", "port", "containerPort", "protocol"), "volumes": "name", "volumeMounts": "mountPath",
    "containers": "name", "initContainers": "name", "imagePullSecrets": "name",
}  # fmt: skip


def test_no_list_has_an_entry_twice(objects: list[Object]) -> None:
    wrong = []
    for obj in objects:
        for path, items in _lists(obj):
            keys = MERGE_KEYS.get(path.rsplit(".", 1)[-1])
            if not keys or not all(isinstance(item, dict) for item in items):
                continue
            found = [tuple(item.get(key) for key in ([keys] if isinstance(keys, str) else keys)) for item in items]
            if len(set(found)) != len(found):
                wrong.append(f"{name_of(obj)}{path}: {found}")
    assert not wrong


def test_config_is_text(objects: list[Object]) -> None:
    """The API server refuses a ConfigMap with a number or a boolean in it, and an annotation or variable likewise."""
    wrong = []
    for obj in objects:
        for place in ("labels", "annotations"):
            wrong += [
                f"{name_of(obj)}: {k}" for k, v in obj["metadata"].get(place, {}).items() if not isinstance(v, str)
            ]
        if obj["kind"] in ("ConfigMap", "Secret"):
            wrong += [f"{name_of(obj)}: {k}" for k, v in obj["data"].items() if not isinstance(v, str)]
    for pod in pods(objects):
        wrong += [f"{pod.owner}: {k}" for k, v in pod.metadata.get("annotations", {}).items() if not isinstance(v, str)]
        for container in pod.containers:
            env = [entry for entry in container.get("env", ()) if "valueFrom" not in entry]
            wrong += [f"{pod.owner}: {e['name']}" for e in env if not isinstance(e.get("value", ""), str)]
            words = [*container.get("command", ()), *container.get("args", ())]
            wrong += [f"{pod.owner}: {word!r}" for word in words if not isinstance(word, str)]
    assert not wrong


def test_large_numbers_stay_whole(chart: Chart) -> None:
    """Helm's YAML numbers are floating point: in a text a million must not become 1e+06, which no job takes for a number."""
    objects = chart.objects(
        values="""
        simulate: {users: 2000000}
        serving: {maxConcurrency: 1000000, spool: {size: 100Gi}}
        jobs: {drift: {driftMinRows: 1000000, driftMinLogged: 3000000}, retrain: {seed: 20240229}}
        gate: {bootstrapSamples: 1000000}
        """
    )
    config = one(objects, "ConfigMap/churn")["data"] | one(objects, "ConfigMap/churn-serving")["data"]
    texts = list(config.values()) + [
        entry["value"] for pod in pods(objects) for c in pod.containers for entry in c["env"] if "value" in entry
    ]
    assert not [text for text in texts if re.search(r"\de\+\d", text)]
    assert {"2000000", "1000000", "3000000", "20240229", str(50 * 2**30)} <= set(texts)


# What the values files take for granted: made by others, before the release.
ELSEWHERE = {
    "api-keys": {"Secret/churn-api-keys"},
    "existing-secret": {"Secret/churn-credentials"},
    "external-stores": {"Secret/churn-postgres-urls", "Secret/churn-redis-url"},
    "openshift": {
        "PersistentVolumeClaim/mlflow", "PersistentVolumeClaim/postgres", "PersistentVolumeClaim/valkey",
        "PersistentVolumeClaim/churn-data", "Secret/s3-credentials", "Secret/registry-credentials",
    },
}  # fmt: skip


def test_what_pods_refer_to_is_there(objects: list[Object], ci: str) -> None:
    """Or is one of those that the values name: a ConfigMap misspelt would keep its pods from starting."""
    named = set()
    for pod in pods(objects):
        named.add(f"ServiceAccount/{pod.spec['serviceAccountName']}")
        named |= {f"Secret/{secret['name']}" for secret in pod.spec.get("imagePullSecrets", ())}
        for volume in pod.spec["volumes"]:
            if "configMap" in volume:
                named.add(f"ConfigMap/{volume['configMap']['name']}")
            if "secret" in volume:
                named.add(f"Secret/{volume['secret']['secretName']}")
            if "persistentVolumeClaim" in volume:
                named.add(f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}")
        for container in pod.containers:
            for source in container.get("envFrom", ()):
                named |= {f"{kind[0].upper()}{kind[1:-3]}/{ref['name']}" for kind, ref in source.items()}
            for entry in container.get("env", ()):
                if "secretKeyRef" in entry.get("valueFrom", {}):
                    named.add(f"Secret/{entry['valueFrom']['secretKeyRef']['name']}")
    assert named - {name_of(obj) for obj in objects} == ELSEWHERE.get(ci, set())


def test_every_key_of_the_secret_is_there(objects: list[Object]) -> None:
    secrets = {obj["metadata"]["name"]: obj["data"] for obj in of_kind(objects, "Secret")}
    wrong = [
        f"{pod.owner}: {ref['key']}"
        for pod in pods(objects)
        for container in pod.containers
        for entry in container.get("env", ())
        if (ref := entry.get("valueFrom", {}).get("secretKeyRef"))
        and ref["name"] in secrets
        and ref["key"] not in secrets[ref["name"]]
    ]
    assert not wrong


def test_volumes_are_mounted_and_mounts_have_volumes(objects: list[Object]) -> None:
    for pod in pods(objects):
        volumes = {volume["name"] for volume in pod.spec["volumes"]}
        mounts = {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}
        assert volumes == mounts, pod.owner


def test_what_outlives_the_release_is_kept(objects: list[Object]) -> None:
    for obj in objects:
        kept = obj["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
        assert kept == (obj["kind"] in ("PersistentVolumeClaim", "Secret")), name_of(obj)


def test_nothing_is_a_hook_but_the_test(objects: list[Object]) -> None:
    """`--wait` waits before post-install hooks run: what serving needs may not come from one."""
    hooks = {name_of(obj) for obj in objects if "helm.sh/hook" in obj["metadata"].get("annotations", {})}
    assert hooks == {"Pod/churn-test"}


def test_two_releases_share_no_name(chart: Chart) -> None:
    """With another name, and another prefix in the same namespace."""
    first = {name_of(obj) for obj in chart.objects()}
    second = {name_of(obj) for obj in chart.objects(release="other", values="jobs: {namePrefix: other-}")}
    assert not first & second


def test_extra_objects_may_hold_templates(chart: Chart) -> None:
    values = """
    extraObjects:
      - {apiVersion: v1, kind: ConfigMap, metadata: {name: '{{ .Release.Name }}-a'}, data: {x: '{{ .Values.jobs.timeZone }}'}}
      - |
        apiVersion: v1
        kind: ConfigMap
        metadata: {name: {{ include "churn.fullname" . }}-b}
    """
    objects = chart.objects(values=values)
    assert one(objects, "ConfigMap/churn-a")["data"] == {"x": "Etc/UTC"}
    one(objects, "ConfigMap/churn-b")


def test_as_a_dependency_of_another_chart(chart: Chart, tmp_path: Path) -> None:
    """`global` values of the parent are not refused, and names are those of the parent's release."""
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "churn").symlink_to(CHART)
    (tmp_path / "Chart.yaml").write_text("{apiVersion: v2, name: parent, version: 1.0.0}")
    (tmp_path / "values.yaml").write_text("{global: {team: growth}, churn: {serving: {replicas: 2}}}")
    done = chart.run("template", "parent", tmp_path)
    assert done.returncode == 0, done.stderr
    assert one(parse(done.stdout), "Deployment/parent")["spec"]["replicas"] == 2


def test_rendering_leaves_the_session_s_objects_alone(rendered: Callable[[str], list[Object]], chart: Chart) -> None:
    """What tests share is what Helm renders."""
    assert copy.deepcopy(rendered("existing-secret")) == chart.objects("existing-secret")
