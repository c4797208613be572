"""The jobs' part of Kubernetes, through its own client, against a small API server that fails as the real one does."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs import cluster
from jobs.cluster import Api, ClusterError, KubernetesServing, lease, start_job
from jobs.lease import Held, is_held
from jobs.lease import lease as any_lease
from jobs.serving import ServedTagChanged, StaleFence, serving_of
from jobs.settings import Settings
from tests.jobs.kubernetes_api import KubernetesApi, Object, until

DEPLOYMENTS, PODS, LEASES, JOBS = "apps/v1/deployments", "v1/pods", "coordination.k8s.io/v1/leases", "batch/v1/jobs"
LABELS = {"app.kubernetes.io/name": "churn", "app.kubernetes.io/component": "serving"}
OLD, NEW = "churn:v1-aa", "churn:v2-bb"
NO_SOAK = timedelta()


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """An API server with the Deployment that the chart makes, and a kubeconfig that leads there."""
    with KubernetesApi() as api:
        api.put(DEPLOYMENTS, deployment())
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        monkeypatch.setattr(cluster, "_ACCOUNT", tmp_path / "no-account")
        yield api


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, deployment="churn")


@pytest.fixture
def serving(kubernetes: KubernetesApi, settings: Settings) -> KubernetesServing:
    return KubernetesServing(settings)


def deployment(
    tag: str | None = None, *, fence: int = 1, replicas: int = 2, others: dict[str, str] | None = None
) -> Object:
    """What the chart renders, with a served tag that promotion wrote, if any; all its pods are as wanted."""
    promoted = {} if tag is None else {"churn/bento-tag": tag, "churn/fence": str(fence)}
    counts = dict.fromkeys(("updatedReplicas", "replicas", "availableReplicas"), replicas)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "churn", "uid": "uid-of-the-deployment"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": LABELS},
            "template": {"metadata": {"labels": LABELS, "annotations": {**(others or {}), **promoted}}},
        },
        "status": {"observedGeneration": 1, **counts},
    }


def pod(name: str, tag: str = NEW, *, ready: bool = False, ip: str = "10.1.2.3", **status: Any) -> Object:
    """A serving pod whose containers run, unless `status` says otherwise."""
    running = {"name": "serving", "ready": ready, "restartCount": 0, "state": {"running": {}}}
    found = {
        "phase": "Running",
        "podIP": ip,
        "conditions": [{"type": "Ready", "status": str(ready)}],
        "containerStatuses": [running],
        **status,
    }
    return {"metadata": {"name": name, "labels": LABELS, "annotations": {"churn/bento-tag": tag}}, "status": found}


def fetch(state: Object, last: Object | None = None) -> dict[str, Any]:
    """The status of a pod whose init container is in a state."""
    container = {"name": "fetch", "restartCount": 1, "state": state, "lastState": last or {}}
    waiting = {"name": "serving", "restartCount": 0, "state": {"waiting": {"reason": "PodInitializing"}}}
    return {"phase": "Pending", "initContainerStatuses": [container], "containerStatuses": [waiting]}


def ended(code: int, message: str = "", reason: str = "Error") -> Object:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def annotated(kubernetes: KubernetesApi) -> dict[str, str]:
    found = kubernetes.get(DEPLOYMENTS, "churn")
    assert found is not None
    annotations: dict[str, str] = found["spec"]["template"]["metadata"].get("annotations", {})
    return annotations


def annotate(**written: str) -> Callable[[Object], None]:
    """Somebody else's change of the pod template's annotations."""

    def change(found: Object) -> None:
        names = {key.replace("__", "/").replace("_", "-"): value for key, value in written.items()}
        found["spec"]["template"]["metadata"].setdefault("annotations", {}).update(names)

    return change


# --- the way to the API server ------------------------------------------------------------------------------


def test_the_token_of_a_kubeconfig_is_sent(kubernetes: KubernetesApi) -> None:
    Api().find(DEPLOYMENTS, "churn")

    assert kubernetes.requests[-1].headers["authorization"].lower() == "bearer token-of-a-test"


def test_the_namespace_is_the_contexts(kubernetes: KubernetesApi) -> None:
    assert Api().namespace == "churn-test"


def test_a_deployment_is_chosen_by_its_setting_alone(kubernetes: KubernetesApi, settings: Settings) -> None:
    assert isinstance(serving_of(settings), KubernetesServing)
    assert kubernetes.requests == []  # connected at the first question


def test_without_any_configuration_it_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ACCOUNT", tmp_path / "no-account")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))

    with pytest.raises(ClusterError, match=r"reading KUBECONFIG or .*missing failed"):
        Api()


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """A pod's surroundings: token, CA and namespace as files, and the API server's address in the environment."""
    folder, key = tmp_path / "account", tmp_path / "key.pem"
    folder.mkdir()
    certify = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    certify += ["-days", "1", "-subj", "/CN=kubernetes", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*certify, "-keyout", key, "-out", folder / "ca.crt"], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "ca.crt", key)
    with KubernetesApi(namespace="a-pods-own", tls=tls) as api:
        api.put(DEPLOYMENTS, deployment())
        (folder / "token").write_text("token-of-a-test")
        (folder / "namespace").write_text("a-pods-own")
        host, port = api.host.split(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        monkeypatch.setattr(cluster, "_ACCOUNT", folder)
        yield api


def test_a_pod_asks_as_its_service_account(account: KubernetesApi, settings: Settings) -> None:
    api = Api()

    assert api.find(DEPLOYMENTS, "churn") is not None
    assert api.namespace == "a-pods-own"
    assert account.requests[-1].headers["authorization"].lower() == "bearer token-of-a-test"


@pytest.fixture
def minutes_later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the client thinks that its token is old: it trusts one for a minute."""
    from kubernetes.config import incluster_config

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(minutes=2)

    clock = type("Clock", (), {"datetime": Later, "timedelta": timedelta})
    return lambda: monkeypatch.setattr(incluster_config, "datetime", clock)


def test_a_token_that_was_rotated_is_read_again(
    account: KubernetesApi, tmp_path: Path, minutes_later: Callable[[], None]
) -> None:
    """The kubelet replaces the file every hour or so; a bootstrap may take longer."""
    api = Api()
    account.token = f"{account.token}-rotated"
    (tmp_path / "account/token").write_text(account.token)
    minutes_later()

    assert api.find(DEPLOYMENTS, "churn") is not None


def test_a_token_file_that_is_empty_for_a_moment_is_a_cluster_error(
    account: KubernetesApi, tmp_path: Path, minutes_later: Callable[[], None]
) -> None:
    """The thread that renews a Lease survives only these."""
    api = Api()
    (tmp_path / "account/token").write_text("")
    minutes_later()

    with pytest.raises(ClusterError, match="Token file exists but empty"):
        api("POST", LEASES, body={})


def test_a_pod_does_not_ask_its_api_server_through_a_proxy(
    account: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)

    assert Api().find(DEPLOYMENTS, "churn") is not None


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}, {"status": 429}], ids=["503", "dropped", "429"])
def test_a_question_is_asked_again(kubernetes: KubernetesApi, serving: KubernetesServing, fault: Any) -> None:
    """A control plane that is upgraded must not undo a promotion that only watches."""
    kubernetes.put(DEPLOYMENTS, deployment(OLD))
    kubernetes.fail("GET", times=1, **fault)

    assert serving.served_tag() == OLD


def test_a_write_is_not_repeated(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    """It may have been carried out: who wrote looks first."""
    kubernetes.fail("PATCH", drop=True, done=True, times=1)

    with pytest.raises(ClusterError, match=r"PATCH apps/v1/deployments churn failed \(no answer\)"):
        serving.set_served_tag(old=None, new=NEW, fence=1, soak=NO_SOAK)

    assert len(kubernetes.asked("PATCH")) == 1


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_an_api_server_that_never_answers_is_left_in_time(kubernetes: KubernetesApi, method: str) -> None:
    """urllib3 alone would ask four times, and wait as long for each."""
    api = Api()
    kubernetes.fail(method, delay=60)
    begun = time.monotonic()

    with pytest.raises(ClusterError, match=f"{method} .*no answer"):
        api(method, DEPLOYMENTS, "churn", {} if method == "PUT" else None, timeout=0.3)

    assert time.monotonic() - begun < 3
    assert len(kubernetes.asked(method)) == 1


def test_a_connection_that_died_silently_is_replaced(kubernetes: KubernetesApi) -> None:
    """A load balancer forgot it: nothing comes back, and nothing is refused."""
    kubernetes.fail("GET", delay=60, times=1)

    assert Api().find(DEPLOYMENTS, "churn", timeout=2.5) is not None


def test_what_is_no_json_is_a_cluster_error(kubernetes: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer's page; the thread that renews a Lease survives only cluster errors."""
    api = Api()
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "<html>sorry</html>")

    with pytest.raises(ClusterError, match="no JSON: <html>sorry</html>"):
        api("GET", DEPLOYMENTS, "churn", timeout=0.5)


def test_a_refusal_says_what_was_asked_and_answered(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    kubernetes.fail("GET", status=403)

    with pytest.raises(ClusterError, match=r"GET apps/v1/deployments churn failed \(403\): the test says 403"):
        serving.served_tag()


# --- the served tag -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [{}, {"checksum/config": "ab12"}], ids=["no annotations", "the chart's"])
def test_the_first_tag(kubernetes: KubernetesApi, serving: KubernetesServing, others: dict[str, str]) -> None:
    kubernetes.put(DEPLOYMENTS, deployment(others=others))

    serving.set_served_tag(old=None, new=NEW, fence=3, soak=timedelta(seconds=90))

    assert annotated(kubernetes) == {**others, "churn/bento-tag": NEW, "churn/fence": "3"}
    assert kubernetes.get(DEPLOYMENTS, "churn")["spec"]["minReadySeconds"] == 90  # type: ignore[index]
    assert (serving.served_tag(), serving.fence()) == (NEW, 3)


def test_a_template_without_a_map_of_annotations(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    kubernetes.edit(DEPLOYMENTS, "churn", lambda d: d["spec"]["template"]["metadata"].pop("annotations"))
    assert (serving.served_tag(), serving.fence()) == (None, 0)

    serving.set_served_tag(old=None, new=NEW, fence=1, soak=NO_SOAK)

    assert serving.served_tag() == NEW


def test_the_next_tag_leaves_everything_else(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    others = {"checksum/config": "ab12", "kubectl.kubernetes.io/restartedAt": "2026-01-01T00:00:00Z"}
    kubernetes.put(DEPLOYMENTS, deployment(OLD, fence=3, others=others))

    serving.set_served_tag(old=OLD, new=NEW, fence=4, soak=NO_SOAK)

    assert annotated(kubernetes) == {**others, "churn/bento-tag": NEW, "churn/fence": "4"}


def test_promotion_writes_under_its_own_name(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    """So that Helm 4 sees fields of another manager, and leaves them."""
    serving.set_served_tag(old=None, new=NEW, fence=1, soak=NO_SOAK)

    (patch,) = kubernetes.asked("PATCH")
    assert patch.query == {"fieldManager": "churn-promote"}
    assert patch.headers["content-type"] == "application/json-patch+json"


def test_none_takes_the_tag_away(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    kubernetes.put(DEPLOYMENTS, deployment(OLD, others={"checksum/config": "ab12"}))

    serving.set_served_tag(old=OLD, new=None, fence=2, soak=NO_SOAK)

    assert annotated(kubernetes) == {"checksum/config": "ab12", "churn/fence": "2"}
    assert (serving.served_tag(), serving.fence()) == (None, 2)


def test_a_tag_that_somebody_else_changed_is_not_overwritten(
    kubernetes: KubernetesApi, serving: KubernetesServing
) -> None:
    kubernetes.put(DEPLOYMENTS, deployment("churn:v9-zz"))

    with pytest.raises(ServedTagChanged, match=f"served tag is churn:v9-zz; expected {OLD}"):
        serving.set_served_tag(old=OLD, new=NEW, fence=2, soak=NO_SOAK)

    assert kubernetes.asked("PATCH") == []


def test_a_lower_fence_is_refused_and_an_equal_one_taken(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    kubernetes.put(DEPLOYMENTS, deployment(OLD, fence=5))
    with pytest.raises(StaleFence, match="fence number 5; 4 is lower"):
        serving.set_served_tag(old=OLD, new=NEW, fence=4, soak=NO_SOAK)
    assert serving.served_tag() == OLD

    serving.set_served_tag(old=OLD, new=NEW, fence=5, soak=NO_SOAK)

    assert serving.served_tag() == NEW


@pytest.mark.parametrize("tag", [None, OLD], ids=["first", "next"])
def test_a_rollouts_own_writes_do_not_get_in_the_way(
    kubernetes: KubernetesApi, serving: KubernetesServing, tag: str | None
) -> None:
    """The Deployment controller writes its status, and so a new resourceVersion, at any moment."""
    kubernetes.put(DEPLOYMENTS, deployment(tag))
    seen = iter(range(100))

    def write_status() -> None:
        kubernetes.edit(DEPLOYMENTS, "churn", lambda d: d["status"].update(unavailableReplicas=next(seen)))

    kubernetes.fail("PATCH", before=write_status, times=5)

    serving.set_served_tag(old=tag, new=NEW, fence=2, soak=NO_SOAK)

    assert serving.served_tag() == NEW


@pytest.mark.parametrize("tag", [None, OLD], ids=["first", "next"])
def test_a_writer_who_comes_between_look_and_patch_wins(
    kubernetes: KubernetesApi, serving: KubernetesServing, tag: str | None
) -> None:
    kubernetes.put(DEPLOYMENTS, deployment(tag))
    theirs = annotate(churn__bento_tag="churn:v9-zz")
    kubernetes.fail("PATCH", before=lambda: kubernetes.edit(DEPLOYMENTS, "churn", theirs), times=1)

    with pytest.raises(ServedTagChanged):
        serving.set_served_tag(old=tag, new=NEW, fence=2, soak=NO_SOAK)

    assert serving.served_tag() == "churn:v9-zz"


def test_a_higher_fence_that_comes_between_look_and_patch_wins(
    kubernetes: KubernetesApi, serving: KubernetesServing
) -> None:
    """A newer promotion put the tag back: the older must not write over it."""
    kubernetes.put(DEPLOYMENTS, deployment(OLD, fence=1))
    theirs = annotate(churn__fence="7")
    kubernetes.fail("PATCH", before=lambda: kubernetes.edit(DEPLOYMENTS, "churn", theirs), times=1)

    with pytest.raises(StaleFence):
        serving.set_served_tag(old=OLD, new=NEW, fence=2, soak=NO_SOAK)

    assert annotated(kubernetes) == {"churn/bento-tag": OLD, "churn/fence": "7"}


def test_of_many_writers_with_the_same_belief_one_wins(kubernetes: KubernetesApi, settings: Settings) -> None:
    start = threading.Barrier(6)

    def write(number: int) -> str | None:
        serving = KubernetesServing(settings, Api())
        start.wait()
        try:
            serving.set_served_tag(old=None, new=f"churn:v{number}-aa", fence=1, soak=NO_SOAK)
        except ServedTagChanged:
            return None
        return f"churn:v{number}-aa"

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        won = [tag for tag in pool.map(write, range(6)) if tag]

    assert won == [annotated(kubernetes)["churn/bento-tag"]]


def test_a_patch_that_is_refused_for_ever_says_why(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    kubernetes.fail("PATCH", status=422)

    with pytest.raises(ClusterError, match="the test says 422"):
        serving.set_served_tag(old=None, new=NEW, fence=1, soak=NO_SOAK)


def test_a_deployment_that_is_missing_is_named(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    kubernetes.delete(DEPLOYMENTS, "churn")

    with pytest.raises(ClusterError, match=r"GET apps/v1/deployments churn failed \(404\)"):
        serving.served_tag()


# --- how far the pods have come -----------------------------------------------------------------------------


@pytest.fixture
def rolled_out(kubernetes: KubernetesApi) -> KubernetesApi:
    """Two ready pods of the wanted tag."""
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    for name in ("churn-1", "churn-2"):
        kubernetes.put(PODS, pod(name, ready=True))
    return kubernetes


def test_a_rollout_is_settled_when_every_pod_is_as_wanted(
    rolled_out: KubernetesApi, serving: KubernetesServing
) -> None:
    rollout = serving.rollout()

    assert (rollout.settled, rollout.running, rollout.failure, rollout.served_tag) == (True, True, None, NEW)
    assert {found.address for found in rollout.pods} == {"http://10.1.2.3:3000"}
    assert rollout.template


def pods_of(kind: str) -> Callable[[KubernetesApi], object]:
    """A change after which the rollout has not settled."""
    return {
        "observed": lambda api: api.edit(DEPLOYMENTS, "churn", lambda d: d["metadata"].update(generation=2)),
        "old pod": lambda api: api.put(PODS, pod("churn-0", OLD, ready=True)),
        "unready": lambda api: api.put(PODS, pod("churn-2", ready=False, ip="")),
        "surge": lambda api: api.edit(DEPLOYMENTS, "churn", lambda d: d["status"].update(replicas=3)),
        "soaking": lambda api: api.edit(DEPLOYMENTS, "churn", lambda d: d["status"].update(availableReplicas=1)),
        "template": lambda api: api.edit(DEPLOYMENTS, "churn", lambda d: d["status"].update(updatedReplicas=1)),
        "no pods": lambda api: [api.delete(PODS, name) for name in ("churn-1", "churn-2")],
        "no status": lambda api: api.edit(DEPLOYMENTS, "churn", lambda d: d.pop("status")),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["observed", "old pod", "unready", "surge", "soaking", "template", "no pods", "no status"]
)
def test_a_rollout_is_not_settled(rolled_out: KubernetesApi, serving: KubernetesServing, kind: str) -> None:
    pods_of(kind)(rolled_out)

    rollout = serving.rollout()

    assert (rollout.settled, rollout.running, rollout.failure) == (False, True, None)


def test_pods_that_terminate_do_not_count(rolled_out: KubernetesApi, serving: KubernetesServing) -> None:
    """They drain for as long as half a minute, and take no new request."""
    ends = pod("churn-0", OLD, ready=True)
    ends["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    rolled_out.put(PODS, ends)

    assert serving.rollout().settled


def test_an_evicted_pod_does_not_count(rolled_out: KubernetesApi, serving: KubernetesServing) -> None:
    """It stays as an object, Failed, until somebody deletes it; another pod has taken its place."""
    rolled_out.put(PODS, pod("churn-0", phase="Failed", reason="Evicted", containerStatuses=[], podIP=""))

    assert serving.rollout().settled


def test_pods_of_others_do_not_count(rolled_out: KubernetesApi, serving: KubernetesServing) -> None:
    other = pod("mlflow-1", "none")
    other["metadata"]["labels"] = {"app.kubernetes.io/name": "churn", "app.kubernetes.io/component": "mlflow"}
    rolled_out.put(PODS, other)

    assert len(serving.rollout().pods) == 2


def test_scaled_to_zero_nothing_runs(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    kubernetes.put(DEPLOYMENTS, deployment(NEW, replicas=0))

    rollout = serving.rollout()

    assert (rollout.running, rollout.settled, rollout.failure) == (False, False, None)


def test_an_address_of_ipv6_is_a_url(rolled_out: KubernetesApi, serving: KubernetesServing) -> None:
    rolled_out.put(PODS, pod("churn-1", ready=True, ip="fd00::7"))

    assert "http://[fd00::7]:3000" in {found.address for found in serving.rollout().pods}


def test_a_pod_in_which_only_a_sidecar_runs_cannot_be_asked(
    rolled_out: KubernetesApi, serving: KubernetesServing
) -> None:
    sidecar = {"name": "istio-proxy", "restartCount": 0, "state": {"running": {}}}
    rolled_out.put(PODS, pod("churn-1", containerStatuses=[{**CRASHED, "restartCount": 0}, sidecar]))

    assert {found.name: found.address for found in serving.rollout().pods}["churn-1"] == ""


def test_a_change_of_the_template_by_anybody_is_seen(rolled_out: KubernetesApi, serving: KubernetesServing) -> None:
    before = serving.rollout().template
    rolled_out.edit(DEPLOYMENTS, "churn", annotate(checksum__config="other"))

    assert serving.rollout().template != before


WAITING_FETCH = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s"}}
PULL = {"waiting": {"reason": "ImagePullBackOff", "message": "registry.example/churn-serving:1 not found"}}
CRASHED = {"name": "serving", "restartCount": 2, "state": WAITING_FETCH, "lastState": ended(1, "no such file")}
ONCE = {**CRASHED, "restartCount": 1}
AGAIN_UP = {**CRASHED, "state": {"running": {}}}


@pytest.mark.parametrize(
    ("status", "failure", "worlds_fault"),
    [
        pytest.param(fetch(ended(3, "hash differs")), "new: its archive was refused: Error, exit code 3: hash differs", False, id="archive refused"),
        pytest.param(fetch(WAITING_FETCH, ended(4, "no row")), "new: its archive is not in the database: Error, exit code 4: no row", False, id="archive missing"),
        pytest.param(fetch(WAITING_FETCH, ended(1, "no route")), None, False, id="fetch cannot reach the database"),
        pytest.param(fetch({"running": {}}), None, False, id="fetch runs"),
        pytest.param(fetch(PULL), "new: ImagePullBackOff registry.example/churn-serving:1 not found", True, id="image"),
        pytest.param({"containerStatuses": [CRASHED]}, "new crashes: Error, exit code 1: no such file", False, id="crashes"),
        pytest.param({"containerStatuses": [AGAIN_UP], "podIP": ""}, "new crashes: Error, exit code 1: no such file", False, id="crashes, up again"),
        pytest.param({"containerStatuses": [ONCE]}, None, False, id="crashed once"),
        pytest.param({"phase": "Pending", "containerStatuses": [], "podIP": ""}, None, False, id="not scheduled"),
        pytest.param({}, None, False, id="nobody listens yet"),
    ],
)  # fmt: skip
def test_why_the_wanted_pods_will_not_be_ready(
    kubernetes: KubernetesApi,
    serving: KubernetesServing,
    monkeypatch: pytest.MonkeyPatch,
    status: Any,
    failure: str | None,
    worlds_fault: bool,
) -> None:
    monkeypatch.setattr(cluster, "PORT", closed_port())
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    kubernetes.put(PODS, pod("old", OLD, ready=True))
    kubernetes.put(PODS, pod("new", **{"ip": "127.0.0.1", **status}))

    rollout = serving.rollout()

    assert (rollout.failure, rollout.worlds_fault, rollout.settled) == (failure, worlds_fault, False)


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def test_a_pod_of_another_tag_is_not_the_wanted_ones_failure(
    kubernetes: KubernetesApi, serving: KubernetesServing
) -> None:
    """Going back from a broken model, its pods crash on beside the good ones."""
    kubernetes.put(DEPLOYMENTS, deployment(OLD))
    kubernetes.put(PODS, pod("broken", NEW, containerStatuses=[CRASHED]))

    assert serving.rollout().failure is None


def test_a_pod_that_is_ready_has_not_failed(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    """Its node was restarted twice last year; now somebody adds a pod beside it."""
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    kubernetes.edit(DEPLOYMENTS, "churn", lambda d: d["status"].update(availableReplicas=1))
    restarted = {**CRASHED, "restartCount": 5, "state": {"running": {}}}
    kubernetes.put(PODS, pod("churn-1", ready=True, containerStatuses=[restarted]))

    rollout = serving.rollout()

    assert (rollout.settled, rollout.failure) == (False, None)


def test_pods_that_cannot_be_made_are_the_worlds_fault(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    quota = {"type": "ReplicaFailure", "status": "True", "message": 'pods "churn-x" is forbidden: exceeded quota'}
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    kubernetes.edit(DEPLOYMENTS, "churn", lambda d: d["status"].update(conditions=[quota]))

    rollout = serving.rollout()

    assert rollout.failure == 'pods "churn-x" is forbidden: exceeded quota'
    assert rollout.worlds_fault


def test_before_the_first_tag_pods_wait_and_nothing_has_failed(
    kubernetes: KubernetesApi, serving: KubernetesServing
) -> None:
    kubernetes.put(PODS, pod("new", tag="", **fetch(ended(3, "no tag"))))

    rollout = serving.rollout()

    assert (rollout.served_tag, rollout.failure, rollout.settled) == (None, None, False)


def test_a_pod_says_what_it_waits_for(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    unscheduled = [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]
    kubernetes.put(PODS, pod("a", conditions=unscheduled, containerStatuses=[], podIP=""))
    kubernetes.put(PODS, pod("b", podIP="", **fetch({"running": {}})))
    kubernetes.put(PODS, pod("c", podIP="", **fetch(WAITING_FETCH, ended(1))))

    said = {found.name: found.message for found in serving.rollout().pods}

    assert said == {
        "a": "0/3 nodes are available",
        "b": "fetch runs, not ready yet",
        "c": "fetch: CrashLoopBackOff back-off 20s",
    }


@pytest.fixture
def readyz(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bytes], None]]:
    """A pod's own server, on the port where pods are asked; call it with what /readyz says."""
    answer = (503, b"")

    class Pod(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer[0]:
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(answer[1])))
                self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_: object) -> None:
            pass

    def say(status: int, body: bytes) -> None:
        nonlocal answer
        answer = (status, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pod)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(cluster, "PORT", server.server_address[1])
    yield say
    server.shutdown()
    server.server_close()


REFUSAL = json.dumps({"error": "not_ready", "detail": "golden rows differ by 0.2, at most 1e-06 is allowed"}).encode()


@pytest.mark.parametrize("proxy", [False, True], ids=["direct", "http_proxy set"])
def test_golden_rows_that_differ_are_the_models_fault(
    kubernetes: KubernetesApi,
    serving: KubernetesServing,
    readyz: Callable[[int, bytes], None],
    monkeypatch: pytest.MonkeyPatch,
    proxy: bool,
) -> None:
    if proxy:  # pods are inside
        monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first call
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
        monkeypatch.setenv("no_proxy", kubernetes.host)
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    kubernetes.put(PODS, pod("new", ip="127.0.0.1"))
    readyz(503, REFUSAL)

    rollout = serving.rollout()

    assert rollout.failure == "new: /readyz says 503: golden rows differ by 0.2, at most 1e-06 is allowed"
    assert not rollout.worlds_fault


def test_a_wrong_setting_is_the_worlds_fault(
    kubernetes: KubernetesApi, serving: KubernetesServing, readyz: Callable[[int, bytes], None]
) -> None:
    """A Secret of API keys that cannot be used: the version that is on its way is not to blame."""
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    kubernetes.put(PODS, pod("new", ip="127.0.0.1"))
    readyz(503, json.dumps({"detail": "CHURN_API_KEYS_DIR is /etc/churn/keys, which is empty"}).encode())

    rollout = serving.rollout()

    assert rollout.failure == "new: /readyz says 503: CHURN_API_KEYS_DIR is /etc/churn/keys, which is empty"
    assert rollout.worlds_fault


def test_what_may_pass_is_told_and_is_no_failure(
    kubernetes: KubernetesApi, serving: KubernetesServing, readyz: Callable[[int, bytes], None]
) -> None:
    """The reason is there when patience ends: a feature that is not materialized yet, or not any more."""
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    kubernetes.put(PODS, pod("new", ip="127.0.0.1"))
    readyz(503, b'{"detail": "a row of usage online lacks watch_hours"}')

    rollout = serving.rollout()

    assert rollout.failure is None
    assert [seen.message for seen in rollout.pods] == ["/readyz says 503: a row of usage online lacks watch_hours"]


def test_words_of_the_kubelet_are_not_the_pods(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    """Its first try to pull an image names a digest, too."""
    waits = {"waiting": {"reason": "ErrImagePull", "message": "digest of sha256:0 is not found"}}
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    kubernetes.put(PODS, pod("new", ip="127.0.0.1", containerStatuses=[{"name": "fetch", "state": waits}]))

    assert serving.rollout().failure is None


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"{}"), (503, b'{"detail": "the process is about to stop"}'), (503, b"\xff"), (0, b"golden\r\n\r\n")],
    ids=["ready in this moment", "stops", "no JSON", "no HTTP"],
)
def test_another_word_of_a_pod_is_no_failure(
    kubernetes: KubernetesApi,
    serving: KubernetesServing,
    readyz: Callable[[int, bytes], None],
    status: int,
    body: bytes,
) -> None:
    kubernetes.put(DEPLOYMENTS, deployment(NEW))
    kubernetes.put(PODS, pod("new", ip="127.0.0.1"))
    readyz(status, body)

    assert serving.rollout().failure is None


def test_tags_in_use_are_those_one_can_undo_to(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    for number, tag in enumerate(({"churn/bento-tag": OLD}, {"churn/bento-tag": NEW}, {}, None)):
        template = {"metadata": {} if tag is None else {"annotations": tag}}
        metadata = {"name": f"churn-{number}", "labels": LABELS}
        kubernetes.put("apps/v1/replicasets", {"metadata": metadata, "spec": {"template": template}})

    assert serving.tags_in_use() == {OLD, NEW}


# --- telling, and starting jobs -----------------------------------------------------------------------------


def test_an_event_is_about_the_deployment(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    serving.tell("Promoted", "version 1 → 2")

    (event,) = kubernetes.all("v1/events")
    about = event["involvedObject"]
    assert (about["kind"], about["name"], about["uid"]) == ("Deployment", "churn", "uid-of-the-deployment")
    assert (event["reason"], event["message"], event["type"]) == ("Promoted", "version 1 → 2", "Normal")
    assert event["metadata"]["name"].startswith("churn.")


def test_a_long_event_is_cut_to_what_is_taken(kubernetes: KubernetesApi, serving: KubernetesServing) -> None:
    """The API server's 1024 characters are bytes."""
    serving.tell("PromotionFailed", "×" * 2000, warning=True)

    (event,) = kubernetes.all("v1/events")
    assert event["message"] == "×" * 500
    assert event["type"] == "Warning"


@pytest.mark.parametrize("what", ["POST", "GET"])
@pytest.mark.parametrize("fault", [{"status": 403}, {"drop": True}], ids=["forbidden", "away"])
def test_telling_never_raises(
    kubernetes: KubernetesApi, serving: KubernetesServing, monkeypatch: pytest.MonkeyPatch, what: str, fault: Any
) -> None:
    monkeypatch.setattr(cluster, "TIMEOUT", 0.5)
    kubernetes.fail(what, **fault)

    serving.tell("Promoted", "version 1 → 2")

    assert kubernetes.all("v1/events") == []


def cronjob(name: str = "retrain") -> Object:
    container = {"name": "retrain", "image": "churn-jobs", "args": ["retrain"]}
    template = {
        "metadata": {"labels": {"app.kubernetes.io/component": "retrain"}, "annotations": {"team": "growth"}},
        "spec": {"template": {"spec": {"containers": [container]}}, "backoffLimit": 0},
    }
    return {"metadata": {"name": name, "uid": f"uid-of-{name}"}, "spec": {"jobTemplate": template}}


def test_a_job_is_made_as_kubectl_makes_it(kubernetes: KubernetesApi, settings: Settings) -> None:
    kubernetes.put("batch/v1/cronjobs", cronjob())

    name = start_job(settings, "retrain", ["--reason", "drift"], why="drift_share 0.3")

    job = kubernetes.get(JOBS, name)
    assert job is not None
    assert name.startswith("retrain-")
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == ["retrain", "--reason", "drift"]
    assert job["spec"]["backoffLimit"] == 0
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("CronJob", "retrain", "uid-of-retrain")
    assert job["metadata"]["labels"] == {"app.kubernetes.io/component": "retrain"}
    assert job["metadata"]["annotations"] == {"team": "growth", "churn/started-because": "drift_share 0.3"}
    assert [event["reason"] for event in kubernetes.all("v1/events")] == ["RetrainStarted"]


def test_the_cronjob_is_left_as_it_was(kubernetes: KubernetesApi, settings: Settings) -> None:
    before = kubernetes.put("batch/v1/cronjobs", cronjob())

    start_job(settings, "retrain", ["--reason", "drift"], why="drift")

    assert kubernetes.get("batch/v1/cronjobs", "retrain") == before


def test_the_prefix_of_the_cronjobs_is_a_setting(kubernetes: KubernetesApi, tmp_path: Path) -> None:
    kubernetes.put("batch/v1/cronjobs", cronjob("acme-retrain"))
    settings = Settings(home=tmp_path, deployment="churn", cronjob_prefix="acme-")

    assert start_job(settings, "retrain", [], why="drift").startswith("acme-retrain-")


@pytest.mark.parametrize(
    "status",
    [None, {}, {"active": 1}, {"conditions": [{"type": "Complete", "status": "False"}]}],
    ids=["just made", "no pod yet", "active", "not complete"],
)
def test_a_job_at_work_is_not_joined_by_a_second(
    kubernetes: KubernetesApi, settings: Settings, status: Object | None
) -> None:
    kubernetes.put("batch/v1/cronjobs", cronjob())
    first = start_job(settings, "retrain", [], why="drift")
    kubernetes.edit(JOBS, first, lambda job: job.update({} if status is None else {"status": status}))

    assert start_job(settings, "retrain", [], why="drift again") == first
    assert len(kubernetes.all(JOBS)) == 1


@pytest.mark.parametrize("how", ["Complete", "Failed"])
def test_after_one_that_has_ended_comes_another(kubernetes: KubernetesApi, settings: Settings, how: str) -> None:
    kubernetes.put("batch/v1/cronjobs", cronjob())
    first = start_job(settings, "retrain", [], why="drift")
    kubernetes.edit(JOBS, first, lambda job: job.update(status={"conditions": [{"type": how, "status": "True"}]}))

    assert start_job(settings, "retrain", [], why="drift again") != first


def test_a_job_of_another_cronjob_is_none_of_ours(kubernetes: KubernetesApi, settings: Settings) -> None:
    kubernetes.put("batch/v1/cronjobs", cronjob())
    owner = {"kind": "CronJob", "name": "promote", "uid": "uid-of-promote"}
    kubernetes.put(JOBS, {"metadata": {"name": "promote-1", "ownerReferences": [owner]}, "status": {"active": 1}})

    assert start_job(settings, "retrain", [], why="drift") != "promote-1"


def test_a_job_counts_though_its_event_is_refused(kubernetes: KubernetesApi, settings: Settings) -> None:
    kubernetes.put("batch/v1/cronjobs", cronjob())
    kubernetes.fail("POST .*/events", status=403)

    assert kubernetes.get(JOBS, start_job(settings, "retrain", [], why="drift"))


# --- leases -------------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that pass in a second and are renewed ten times in it."""
    monkeypatch.setattr(cluster, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(cluster, "RENEW", 0.1)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why holders ended their process; here only the thread that says so ends."""
    said: list[str] = []

    def end(held: cluster._Lease, why: str) -> None:
        if not held._done.is_set():
            held._done.set()
            said.append(why)

    monkeypatch.setattr(cluster._Lease, "_end", end)
    return said


def holder_of(kubernetes: KubernetesApi, name: str = "churn-promote") -> str | None:
    found = kubernetes.get(LEASES, name)
    return None if found is None else str(found["spec"]["holderIdentity"])


def held_by(kubernetes: KubernetesApi, holder: str) -> None:
    """A Lease that somebody left, or still has."""
    spec = {"holderIdentity": holder, "leaseTransitions": 3, "renewTime": "2026-01-01T00:00:00.000000Z"}
    kubernetes.put(LEASES, {"metadata": {"name": "churn-promote", "labels": {"team": "growth"}}, "spec": spec})


def test_a_lease_names_its_holder_and_belongs_to_the_deployment(kubernetes: KubernetesApi, settings: Settings) -> None:
    with lease(settings, "promote"):
        found = kubernetes.get(LEASES, "churn-promote")
        assert found is not None
        assert socket.gethostname() in found["spec"]["holderIdentity"]
        assert cluster.holder(settings, "promote") == found["spec"]["holderIdentity"]
        assert found["metadata"]["ownerReferences"][0]["uid"] == "uid-of-the-deployment"
        assert found["spec"]["leaseDurationSeconds"] == 15
        assert is_held(settings, "promote")
    assert holder_of(kubernetes) == ""
    assert not is_held(settings, "promote")


def test_in_a_pod_the_holder_is_the_pod(account: KubernetesApi, settings: Settings) -> None:
    account.put(PODS, pod(socket.gethostname()))

    with lease(settings, "promote"):
        assert (holder_of(account) or "").startswith(f"{socket.gethostname()}/")


@pytest.mark.parametrize("status", [404, 403], ids=["no pod of that name", "not allowed to ask"])
def test_a_holder_that_is_no_pod_says_so(kubernetes: KubernetesApi, settings: Settings, status: int) -> None:
    """A laptop, or a pod on its node's network: others must not take the missing pod for the holder's end."""
    kubernetes.fail("GET .*/pods/", status=status)

    with lease(settings, "promote"):
        assert (holder_of(kubernetes) or "").startswith(f"outside:{socket.gethostname()}/")


def test_a_lease_is_released_when_the_work_raises(kubernetes: KubernetesApi, settings: Settings) -> None:
    with pytest.raises(ZeroDivisionError), any_lease(settings, "promote"):
        raise ZeroDivisionError

    assert holder_of(kubernetes) == ""


def test_a_second_one_is_told_who_holds_it(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str]
) -> None:
    with (
        lease(settings, "promote"),
        pytest.raises(Held, match=f"churn-promote is held by outside:{socket.gethostname()}/{os.getpid()}-"),
        any_lease(settings, "promote"),
    ):
        pass
    assert ends == []


def test_leases_of_other_names_are_free(kubernetes: KubernetesApi, settings: Settings) -> None:
    with lease(settings, "promote"), lease(settings, "retrain"):
        pass


def test_one_that_waits_gets_it_when_it_is_released(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str]
) -> None:
    taken = threading.Event()

    def second() -> None:
        with lease(settings, "promote", wait=20):
            taken.set()

    with lease(settings, "promote"):
        waits = threading.Thread(target=second)
        waits.start()
        asked = len(kubernetes.asked("GET .*/leases"))
        until(lambda: len(kubernetes.asked("GET .*/leases")) > asked + 20)
        assert not taken.is_set()
    assert taken.wait(5)
    waits.join()
    assert ends == []


@pytest.mark.parametrize("phase", [None, "Succeeded", "Failed"])
def test_a_holder_whose_pod_is_gone_is_succeeded_at_once(
    kubernetes: KubernetesApi, settings: Settings, phase: str | None
) -> None:
    held_by(kubernetes, "promote-77-x/1-aa")
    if phase:
        kubernetes.put(PODS, pod("promote-77-x", phase=phase))
    begun = time.monotonic()

    with lease(settings, "promote"):
        assert time.monotonic() - begun < 5
        found = kubernetes.get(LEASES, "churn-promote")
        assert found is not None
        assert found["spec"]["leaseTransitions"] == 4
        assert found["metadata"]["labels"] == {"team": "growth"}  # nothing of it is lost


def test_a_holder_whose_pod_runs_is_left_until_it_shows_no_life(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str]
) -> None:
    held_by(kubernetes, "promote-77-x/1-aa")
    kubernetes.put(PODS, pod("promote-77-x"))
    begun = time.monotonic()

    with lease(settings, "promote"):
        assert 1 < time.monotonic() - begun < 5


@pytest.mark.parametrize("holder", ["promote-77-x/1-aa", "outside:laptop/4711-aa"], ids=["403 on pods", "no pod"])
def test_a_holder_one_cannot_ask_about_is_watched(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str], holder: str
) -> None:
    """Not finding a pod of a laptop's name does not mean that nobody works there."""
    held_by(kubernetes, holder)
    kubernetes.fail("GET .*/pods/", status=403)
    begun = time.monotonic()

    with lease(settings, "promote"):
        assert 1 < time.monotonic() - begun < 5


def test_a_holder_that_renews_is_left_for_good(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str]
) -> None:
    with lease(settings, "promote"):
        for _ in range(3):
            with pytest.raises(Held), lease(settings, "promote", wait=0.5):
                pass
    assert ends == []


@pytest.mark.parametrize("held", [False, True], ids=["free", "stale"])
def test_taking_ends_though_every_write_meets_another(
    kubernetes: KubernetesApi, settings: Settings, brief: None, held: bool
) -> None:
    if held:
        held_by(kubernetes, "promote-77-x/1-aa")
    kubernetes.fail("(POST|PUT) .*/leases", status=409)
    begun = time.monotonic()

    with pytest.raises(Held, match="churn-promote is held by"), lease(settings, "promote"):
        pass

    assert time.monotonic() - begun < 5
    assert len(kubernetes.asked("(POST|PUT) .*/leases")) < 30  # and it does not spin


def test_of_many_who_want_it_one_has_it(
    kubernetes: KubernetesApi, settings: Settings, monkeypatch: pytest.MonkeyPatch, ends: list[str]
) -> None:
    """In each round one works, and the others wait, or give up."""
    monkeypatch.setattr(cluster, "RENEW", 0.1)
    inside, most, worked = 0, 0, 0
    guard, start = threading.Lock(), threading.Barrier(6)

    def work(_: int) -> None:
        nonlocal inside, most, worked
        api = Api()
        start.wait()
        with lease(settings, "promote", wait=30, api=api):
            with guard:
                inside, worked = inside + 1, worked + 1
                most = max(most, inside)
            asked = len(kubernetes.requests)
            until(lambda: len(kubernetes.requests) > asked + 8)  # others try meanwhile
            with guard:
                inside -= 1

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))

    assert (most, worked, inside) == (1, 6, 0)
    assert ends == []


def test_without_the_deployment_a_lease_has_no_owner(kubernetes: KubernetesApi, settings: Settings) -> None:
    kubernetes.delete(DEPLOYMENTS, "churn")

    with lease(settings, "promote"):
        assert "ownerReferences" not in kubernetes.get(LEASES, "churn-promote")["metadata"]  # type: ignore[index]


def test_who_may_not_read_the_deployment_may_still_hold_a_lease(kubernetes: KubernetesApi, settings: Settings) -> None:
    kubernetes.fail("GET .*/deployments", status=403)

    with lease(settings, "promote"):
        assert holder_of(kubernetes)


def test_who_may_not_make_leases_is_told(kubernetes: KubernetesApi, settings: Settings) -> None:
    kubernetes.fail("POST .*/leases", status=403)

    with pytest.raises(ClusterError, match=r"POST coordination.k8s.io/v1/leases failed \(403\)"):
        lease(settings, "promote").__enter__()


def test_an_api_server_that_is_away_for_less_than_the_lease_is_survived(
    kubernetes: KubernetesApi, settings: Settings, monkeypatch: pytest.MonkeyPatch, ends: list[str]
) -> None:
    monkeypatch.setattr(cluster, "LEASE_SECONDS", 6.0)
    monkeypatch.setattr(cluster, "RENEW", 0.1)
    with lease(settings, "promote"):
        away = kubernetes.fail("leases", drop=True)
        until(lambda: len(kubernetes.asked("GET .*/leases")) > 5)
        before = kubernetes.get(LEASES, "churn-promote")
        away.times = 0
        until(lambda: kubernetes.get(LEASES, "churn-promote") != before)
    assert ends == []


@pytest.mark.parametrize(
    "fault",
    [{"drop": True}, {"delay": 60}, {"status": 500}, {"status": 403}],
    ids=["away", "hangs", "broken", "forbidden"],
)
def test_a_holder_that_cannot_renew_ends_before_another_may_take_it(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str], fault: Any
) -> None:
    """A call that hangs must not keep it at work: the other counts from the last write it saw."""
    held = cluster._Lease(Api(), "churn-promote", None)
    held.take(0)
    held.renew_until_done()
    kubernetes.fail("leases", **fault)

    until(lambda: ends, seconds=5)

    assert time.monotonic() - held._renewed < 1.0 + 1.5  # LEASE_SECONDS, and room for a busy machine
    assert ends == ["churn-promote could not be renewed for 1 s"]


def test_time_counts_from_before_a_slow_write(kubernetes: KubernetesApi, settings: Settings) -> None:
    """Others may have seen it as soon as it was sent."""
    kubernetes.fail("POST .*/leases", delay=1, done=True, times=1)
    held = cluster._Lease(Api(), "churn-promote", None)

    held.take(0)

    assert time.monotonic() - held._renewed >= 1
    assert held._left() <= cluster.LEASE_SECONDS - cluster.RENEW - 1  # it ends before others may take it


def test_a_lease_deleted_while_held_is_made_again(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str]
) -> None:
    with lease(settings, "promote"):
        mine = holder_of(kubernetes)
        kubernetes.delete(LEASES, "churn-promote")
        assert until(lambda: holder_of(kubernetes)) == mine
    assert (ends, holder_of(kubernetes)) == ([], "")


def test_of_two_after_a_deletion_the_first_ends(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str]
) -> None:
    """Somebody else makes it in the moment in which the holder would."""
    with lease(settings, "promote"):
        theirs = {"metadata": {"name": "churn-promote"}, "spec": {"holderIdentity": "other/1"}}
        kubernetes.fail("POST .*/leases", before=lambda: kubernetes.put(LEASES, theirs), times=1)
        kubernetes.delete(LEASES, "churn-promote")
        until(lambda: ends)
    assert ends == ["churn-promote was taken by other/1"]
    assert holder_of(kubernetes) == "other/1"


def test_releasing_leaves_another_holder_alone(kubernetes: KubernetesApi, settings: Settings, ends: list[str]) -> None:
    with lease(settings, "promote"):
        kubernetes.edit(LEASES, "churn-promote", lambda found: found["spec"].update(holderIdentity="other/1"))

    assert holder_of(kubernetes) == "other/1"


def test_a_renewal_under_way_does_not_take_it_back(
    kubernetes: KubernetesApi, settings: Settings, monkeypatch: pytest.MonkeyPatch, ends: list[str]
) -> None:
    monkeypatch.setattr(cluster, "RENEW", 0.1)
    with lease(settings, "promote"):
        kubernetes.fail("PUT .*/leases", delay=0.5, times=1)
        until(lambda: kubernetes.asked("PUT .*/leases"))

    assert holder_of(kubernetes) == ""
    assert not [thread for thread in threading.enumerate() if "churn-promote" in thread.name]


def test_an_api_server_that_is_away_does_not_fail_what_was_done(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str]
) -> None:
    with lease(settings, "promote"):
        kubernetes.fail("leases", drop=True)


HOLDER = """
import sys
from jobs import cluster
from jobs.settings import Settings
cluster.LEASE_SECONDS, cluster.RENEW = 1.0, 0.1
with cluster.lease(Settings(deployment="churn"), "promote"):
    print("held", flush=True)
    sys.stdin.read()
print("released", flush=True)
"""


@pytest.mark.parametrize("how", ["stolen", "deleted and taken", "away", "hangs"])
def test_a_process_that_lost_its_lease_ends(kubernetes: KubernetesApi, how: str) -> None:
    """Even one that is stuck in something else: nobody works without the lease."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        if how == "stolen":
            kubernetes.edit(LEASES, "churn-promote", lambda found: found["spec"].update(holderIdentity="other/1"))
        elif how == "deleted and taken":
            held_by(kubernetes, "other/1")
        else:
            kubernetes.fail("leases", **({"drop": True} if how == "away" else {"delay": 60}))
        said, error = process.stdout.read(), process.stderr.read() if process.stderr else ""

        assert (process.wait(20), said) == (1, "")
    assert "this process ends" in error


def test_a_process_that_was_killed_is_succeeded(
    kubernetes: KubernetesApi, settings: Settings, brief: None, ends: list[str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()

    with lease(settings, "promote"):
        assert f"/{os.getpid()}-" in (holder_of(kubernetes) or "")


# --- cheap --------------------------------------------------------------------------------------------------


def test_importing_it_is_cheap() -> None:
    """`promote` looks every minute; the client alone is more than the rest, and its typed models far more."""
    heavy = ("kubernetes", "sqlalchemy", "httpx", "pandas", "mlflow")
    code = f"import sys, jobs.cluster; print([m for m in {heavy} if m in sys.modules])"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert found.strip() == "[]"


def test_looking_loads_no_typed_models(kubernetes: KubernetesApi) -> None:
    code = (
        "import sys; from jobs.cluster import KubernetesServing; from jobs.settings import Settings\n"
        "print(KubernetesServing(Settings(deployment='churn')).served_tag())\n"
        "print(sum(name.startswith('kubernetes.client.models.') for name in sys.modules))"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert found.split() == ["None", "0"]


def test_an_instant_is_written_as_kubernetes_reads_it(kubernetes: KubernetesApi, settings: Settings) -> None:
    """MicroTime: six digits and Z."""
    with lease(settings, "promote"):
        found = kubernetes.get(LEASES, "churn-promote")
    assert found is not None
    written = datetime.strptime(found["spec"]["renewTime"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60
