"""Kubernetes, as far as the jobs need it: the Deployment that serves, Leases, Events, Jobs made from CronJobs.

The only module that speaks to its API. Objects are plain JSON: a few fields of five kinds are read, and typed
models of them would cost `churn promote`, which looks every minute, more than everything else it does.
The served tag is the annotation `churn/bento-tag` of the Deployment's pod template. The chart never renders it,
nor `churn/fence` and `minReadySeconds`, which go with it, so that no upgrade of a release changes what it serves.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import secrets
import socket
import threading
import time
import urllib.error
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.lease import Held
from jobs.serving import DIRECT, REFUSALS, WRONG_SETTING, Pod, Rollout, ServedTagChanged, StaleFence, detail
from jobs.settings import Settings

log = logging.getLogger(__name__)

TAG, FENCE = "churn/bento-tag", "churn/fence"
PORT = 3000  # of a serving pod
MANAGER = "churn-promote"  # field manager: who wrote the served tag
TIMEOUT = 10.0  # seconds for an answer of the API server, questions asked again included
AGAIN = (0, 429, 500, 502, 503, 504)  # no answer, or one that says nothing about the question
TRIES = 10  # of a patch, each refused because something was written between our look and it
LEASE_SECONDS: float = 15  # a holder that has not renewed for so long is gone
PATIENCE = 4  # times as long for Leases that only keep work from being done twice; promotion's is for who waits
RENEW = 3.0  # seconds between renewals; a holder that cannot renew ends so long before the Lease does
MODEL_EXITS = {3: "its archive was refused", 4: "its archive is not in the database"}  # of bentos.churn.fetch
SAYS = "/readyz says"  # begins what a pod says of itself; all else are the kubelet's or the scheduler's words
WORLD_WAITS = ("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")

LEASES = "coordination.k8s.io/v1/leases"
OUTSIDE = "outside:"  # begins the name of a holder that is no pod of this namespace, such as a person's laptop

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TEMPLATE = "/spec/template/metadata/annotations"

Object = dict[str, Any]


class ClusterError(RuntimeError):
    """The API server did not do what was asked; says what, and what it answered."""

    def __init__(self, what: str, status: int, said: str) -> None:
        super().__init__(f"Kubernetes: {what} failed ({status or 'no answer'}): {said}")
        self.status = status


class Api:
    """The API server as this process's ServiceAccount, or kubeconfig, sees it, in one namespace."""

    def __init__(self, namespace: str | None = None) -> None:
        from kubernetes import client, config
        from kubernetes.config.incluster_config import InClusterConfigLoader

        in_cluster = (_ACCOUNT / "token").exists()
        found = client.Configuration()
        try:
            if in_cluster:
                found.proxy = None  # nor is the API server, seen from inside
                loader = InClusterConfigLoader(str(_ACCOUNT / "token"), str(_ACCOUNT / "ca.crt"))  # type: ignore[no-untyped-call]
                loader.load_and_set(found)  # type: ignore[no-untyped-call]
                self.namespace = namespace or (_ACCOUNT / "namespace").read_text().strip()
            else:
                file = os.environ.get("KUBECONFIG") or "~/.kube/config"  # the client reads it when it is imported
                config.load_kube_config(file, client_configuration=found)  # type: ignore[no-untyped-call]
                context = config.list_kube_config_contexts(file)[1]["context"]  # type: ignore[no-untyped-call]
                self.namespace = namespace or context.get("namespace") or "default"
        except (config.ConfigException, OSError) as error:
            where = "the pod's ServiceAccount" if in_cluster else f"KUBECONFIG or {file}"
            raise ClusterError(f"reading {where}", 0, str(error)) from error
        found.retries = False  # theirs ask three times more, each for as long; ours are in __call__
        self._client = client.ApiClient(found)
        self._client.user_agent = "churn"  # in audit logs, and as the manager of fields where none is given

    def path(self, kind: str, name: str = "") -> str:
        """The path of objects of a kind (`apps/v1/deployments`, `v1/pods`) in this namespace, or of one of them."""
        group, _, plural = kind.rpartition("/")
        root = "/api" if group == "v1" else "/apis"
        return f"{root}/{group}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def __call__(
        self, method: str, kind: str, name: str = "", body: Any = None, *, timeout: float = 0, **query: str
    ) -> Object:
        """What the API server answers; raises ClusterError. What only reads is asked again while there is time."""
        end = time.monotonic() + (timeout or TIMEOUT)
        while True:
            left = end - time.monotonic()
            if method == "GET" and left > 2:
                left /= 2  # a connection that died silently answers to nobody; a new one does
            try:
                return self._ask(method, kind, name, body, left, query)
            except ClusterError as error:
                if method != "GET" or error.status not in AGAIN or time.monotonic() + 1 > end:
                    raise
                log.info("%s; asking again", error)
            time.sleep(0.5)

    def _ask(self, method: str, kind: str, name: str, body: Any, timeout: float, query: dict[str, str]) -> Object:
        what = f"{method} {kind} {name}".rstrip()
        content = "application/json-patch+json" if method == "PATCH" else "application/json"
        try:
            asked = self._client.param_serialize(
                method,
                self.path(kind, name),
                query_params=list(query.items()),
                header_params={"Accept": "application/json", **({"Content-Type": content} if body is not None else {})},
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = self._client.call_api(*asked, _request_timeout=timeout)
            data = answer.read()  # type: ignore[no-untyped-call]
        except Exception as error:  # urllib3's: no route, no TLS, no answer in time; a token that cannot be read
            raise ClusterError(what, 0, " ".join(str(error).split())[:300]) from error
        if not 200 <= answer.status < 300:
            raise ClusterError(what, answer.status, _said(data))
        try:
            found: Object = json.loads(data)
        except ValueError as error:
            raise ClusterError(what, 0, f"no JSON: {_said(data)}") from error
        return found

    def find(self, kind: str, name: str, *, timeout: float = 0) -> Object | None:
        """The object, or None if there is none of that name."""
        try:
            return self("GET", kind, name, timeout=timeout)
        except ClusterError as error:
            if error.status == 404:
                return None
            raise


def _said(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["message"])
    return text.strip()[:300]


# --- what serves ------------------------------------------------------------------------------------------


class KubernetesServing:
    """The Serving of a cluster: one Deployment, whose pod template names the served tag."""

    def __init__(self, settings: Settings, api: Api | None = None) -> None:
        self.deployment = settings.deployment
        self.url = settings.serving_url.rstrip("/") or f"http://{settings.deployment}"
        self._api = api

    @cached_property
    def api(self) -> Api:
        """Connected at the first question, so that what only reads the database needs no cluster."""
        return self._api or Api()

    def served_tag(self) -> str | None:
        return _annotations(self._read()).get(TAG)

    def fence(self) -> int:
        return _fence(self._read())

    def set_served_tag(self, *, old: str | None, new: str | None, fence: int, soak: timedelta) -> None:
        for _ in range(TRIES):  # a rollout at work writes the Deployment's status between our look and our patch
            found = self._read()
            annotations = _annotations(found)
            if annotations.get(TAG) != old:
                raise ServedTagChanged(old, annotations.get(TAG))
            if fence < _fence(found):
                raise StaleFence(fence, _fence(found))
            try:
                self.api(
                    "PATCH",
                    "apps/v1/deployments",
                    self.deployment,
                    _patch(found, new, fence, soak),
                    fieldManager=MANAGER,
                )
                return
            except ClusterError as error:
                if error.status not in (409, 422):  # a `test` of the patch did not hold: somebody else wrote
                    raise
                refused = error
        raise refused

    def rollout(self) -> Rollout:
        found = self._read()
        spec, status = found["spec"], found.get("status", {})
        tag, replicas = _annotations(found).get(TAG), spec.get("replicas", 1)
        items = self._pods(spec["selector"]["matchLabels"])
        pods = tuple(_as_it_says(_pod(item), tag) for item in items)
        fresh = [(pod, item) for pod, item in zip(pods, items, strict=True) if pod.bento_tag == tag]
        settled = (
            bool(pods)
            and status.get("observedGeneration", 0) >= found["metadata"]["generation"]
            and all(status.get(count, 0) == replicas for count in ("updatedReplicas", "replicas", "availableReplicas"))
            and all(pod.ready and pod.bento_tag == tag for pod in pods)
        )
        failure, worlds = (None, False) if settled or tag is None else _failure(fresh, status)
        return Rollout(
            tag,
            pods,
            running=replicas > 0,
            settled=settled,
            failure=failure,
            worlds_fault=worlds,
            template=zlib.crc32(json.dumps(spec["template"], sort_keys=True).encode()),
        )

    def tags_in_use(self) -> set[str]:
        """Those of all ReplicaSets: `kubectl rollout undo` may go back to any of them."""
        labels = self._read()["spec"]["selector"]["matchLabels"]
        found = self.api("GET", "apps/v1/replicasets", labelSelector=_selector(labels))["items"]
        return {tag for item in found if (tag := _annotations(item).get(TAG))}

    def tell(self, reason: str, message: str, *, warning: bool = False) -> None:
        """An Event of the Deployment; nothing depends on it, so an API server that refuses it is only logged."""
        try:
            about = self._read()["metadata"]
        except ClusterError as error:
            log.warning("the Event %s was not written: %s", reason, error)
            return
        tell(self.api, "apps/v1", "Deployment", about, reason, message, warning=warning)

    def _read(self) -> Object:
        return self.api("GET", "apps/v1/deployments", self.deployment)

    def _pods(self, labels: dict[str, str]) -> list[Object]:
        """Those that serve or may come to; one that was evicted stays as an object, and another stands in for it."""
        items = self.api("GET", "v1/pods", labelSelector=_selector(labels))["items"]
        return [item for item in items if "deletionTimestamp" not in item["metadata"] and not _has_ended(item)]


def _has_ended(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _selector(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _annotations(found: Object) -> dict[str, str]:
    return found["spec"]["template"]["metadata"].get("annotations") or {}


def _fence(found: Object) -> int:
    value = _annotations(found).get(FENCE, "0")
    return int(value) if value.isdigit() else 0


def _patch(found: Object, new: str | None, fence: int, soak: timedelta) -> list[Object]:
    """A JSON patch that only holds if tag and fence are still what was found."""
    annotations, patch = _annotations(found), list[Object]()
    if not annotations:
        patch.append({"op": "add", "path": _TEMPLATE, "value": {}})
    for key, value in ((TAG, new), (FENCE, str(fence))):
        path = f"{_TEMPLATE}/{key.replace('/', '~1')}"
        if key in annotations:
            patch.append({"op": "test", "path": path, "value": annotations[key]})
        else:  # that it is absent cannot be tested; that nobody wrote anything meanwhile can
            version = found["metadata"]["resourceVersion"]
            patch.append({"op": "test", "path": "/metadata/resourceVersion", "value": version})
        if value is not None:
            patch.append({"op": "add", "path": path, "value": value})
        elif key in annotations:
            patch.append({"op": "remove", "path": path})
    return [*patch, {"op": "add", "path": "/spec/minReadySeconds", "value": int(soak.total_seconds())}]


def _containers(item: Object) -> list[Object]:
    status = item.get("status", {})
    return [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]


def _pod(item: Object) -> Pod:
    status = item.get("status", {})
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))
    runs = any(c["name"] == "serving" and "running" in c.get("state", {}) for c in _containers(item))
    ip = status.get("podIP", "")
    host = f"[{ip}]" if ":" in ip else ip
    return Pod(
        name=item["metadata"]["name"],
        address=f"http://{host}:{PORT}" if ip and runs else "",
        bento_tag=(item["metadata"].get("annotations") or {}).get(TAG, ""),
        ready=ready,
        message="" if ready else _waits_for(item),
    )


def _waits_for(item: Object) -> str:
    """Why a pod is not ready, in the kubelet's and scheduler's words."""
    for container in _containers(item):
        state = container.get("state", {})
        if "waiting" in state and state["waiting"].get("reason") not in ("PodInitializing", None):
            return f"{container['name']}: {state['waiting']['reason']} {state['waiting'].get('message', '')}".strip()
        if "terminated" in state and state["terminated"]["exitCode"] != 0:
            return f"{container['name']}: {_ended(state['terminated'])}"
    for condition in item.get("status", {}).get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] != "True":
            return str(condition.get("message", "not scheduled"))
    running = [c["name"] for c in _containers(item) if "running" in c.get("state", {})]
    return f"{', '.join(running) or 'nothing'} runs, not ready yet"


def _ended(terminated: Object) -> str:
    said = " ".join(str(terminated.get("message", "")).split())[-400:]
    how = f"{terminated.get('reason', 'Error')}, exit code {terminated['exitCode']}"
    return f"{how}: {said}" if said else how


def _failure(pods: list[tuple[Pod, Object]], deployment: Object) -> tuple[str | None, bool]:
    """Why the wanted tag's pods will not be ready, and whether that is the world's fault and not the model's."""
    for pod, item in pods:
        if pod.ready:
            continue  # however often it has restarted, and whatever it said before
        name = pod.name
        for container in _containers(item):
            last = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in WORLD_WAITS:
                return f"{name}: {waiting['reason']} {waiting.get('message', '')}".strip(), True
            if last and last["exitCode"] in MODEL_EXITS and container["name"] == "fetch":
                return f"{name}: {MODEL_EXITS[last['exitCode']]}: {_ended(last)}", False
            if last and container["name"] == "serving" and container.get("restartCount", 0) >= 2:
                return f"{name} crashes: {_ended(last)}", False
        if pod.message.startswith(SAYS) and any(word in pod.message for word in (*REFUSALS, WRONG_SETTING)):
            return f"{name}: {pod.message}", WRONG_SETTING in pod.message
    for condition in deployment.get("conditions", ()):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return str(condition.get("message", "pods cannot be made")), True
    return None, False


def _as_it_says(pod: Pod, tag: str | None) -> Pod:
    """The pod, and if it runs with that tag and is not ready, what it says of that itself."""
    if pod.ready or not pod.address or pod.bento_tag != tag:
        return pod
    with contextlib.suppress(OSError, http.client.HTTPException):  # it is starting
        try:
            DIRECT.open(f"{pod.address}/readyz", timeout=2).close()
        except urllib.error.HTTPError as error:
            return replace(pod, message=f"{SAYS} {error.code}: {detail(error.read(2000))}")
    return pod


# --- telling, and starting jobs ---------------------------------------------------------------------------


def tell(api: Api, version: str, kind: str, about: Object, reason: str, message: str, *, warning: bool) -> None:
    """Write an Event about an object, where the API server lets us."""
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    about = {"apiVersion": version, "kind": kind, **{key: about[key] for key in ("name", "namespace", "uid")}}
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{about['name']}."},
        "involvedObject": about,
        "reason": reason,
        "message": message.encode()[:1000].decode(errors="ignore"),  # the API server counts bytes
        "type": "Warning" if warning else "Normal",
        "eventTime": now,
        "action": reason,
        "reportingComponent": MANAGER,
        "reportingInstance": socket.gethostname(),
    }
    try:
        api("POST", "v1/events", body=event)
    except ClusterError as error:
        log.warning("the Event %s was not written: %s", reason, error)


def start_job(settings: Settings, cronjob: str, args: list[str], *, why: str, api: Api | None = None) -> str:
    """Make a Job from a CronJob, with more arguments; its name. One that is still at work is not joined by a second.

    As `kubectl create job --from` does it: owned by the CronJob, and so deleted with the release.
    """
    api = api or Api()
    name = f"{settings.cronjob_prefix}{cronjob}"
    source = api("GET", "batch/v1/cronjobs", name)
    for job in api("GET", "batch/v1/jobs")["items"]:
        owners = job["metadata"].get("ownerReferences", ())
        ended = any(
            c["type"] in ("Complete", "Failed") and c["status"] == "True"
            for c in job.get("status", {}).get("conditions", ())
        )
        if not ended and any(owner.get("uid") == source["metadata"]["uid"] for owner in owners):
            log.info("Job %s is at work already", job["metadata"]["name"])
            return str(job["metadata"]["name"])
    template = json.loads(json.dumps(source["spec"]["jobTemplate"]))
    container = template["spec"]["template"]["spec"]["containers"][0]
    container["args"] = [*container.get("args", ()), *args]
    owner = {"apiVersion": "batch/v1", "kind": "CronJob", "controller": True, "blockOwnerDeletion": False}
    metadata = template.get("metadata", {})
    body = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{name}-{secrets.token_hex(3)}",
            "labels": metadata.get("labels", {}),
            "annotations": {**metadata.get("annotations", {}), "churn/started-because": why[:1000]},
            "ownerReferences": [{**owner, "name": name, "uid": source["metadata"]["uid"]}],
        },
        "spec": template["spec"],
    }
    made: str = api("POST", "batch/v1/jobs", body=body, fieldManager="churn-drift")["metadata"]["name"]
    log.info("started Job %s: %s", made, why)
    tell(api, "batch/v1", "CronJob", source["metadata"], "RetrainStarted", f"{made}: {why}", warning=False)
    return made


# --- leases -----------------------------------------------------------------------------------------------


class _Lease:
    """One coordination.k8s.io Lease, held by a pod: by its name, until the pod is gone or stops renewing.

    Known and left: somebody who deletes the Lease lets a second holder in until the first looks at it next.
    """

    def __init__(self, api: Api, name: str, owner: Object | None, seconds: float = 0) -> None:
        self.api, self.name, self.owner, self.seconds = api, name, owner, seconds or LEASE_SECONDS
        me = socket.gethostname()
        self.holder = f"{'' if self._pod(me) else OUTSIDE}{me}/{os.getpid()}-{secrets.token_hex(3)}"
        self._done = threading.Event()
        self._renewed = 0.0  # when the last write that held was begun: who waits for us may count from there
        self._threads: list[threading.Thread] = []

    def take(self, wait: float) -> None:
        """Take it, or raise Held. A holder that shows no life for `seconds` of our clock is succeeded."""
        end = time.monotonic() + wait
        seen, since, holder = "", time.monotonic(), ""
        while True:
            found = self._find(end + self.seconds)
            holder = (found or {}).get("spec", {}).get("holderIdentity") or ""
            if found is None or not holder or self._is_gone(holder):
                if self._write(found):
                    return
            elif found["metadata"]["resourceVersion"] != seen:
                if seen and time.monotonic() >= end:  # it renews: it lives
                    raise Held(f"{self.name} is held by {holder}")
                seen, since = found["metadata"]["resourceVersion"], time.monotonic()
            elif time.monotonic() - since > self.seconds:
                log.warning("%s has not renewed %s for %.0f s; taking it", holder, self.name, self.seconds)
                if self._write(found):
                    return
            if time.monotonic() > end + self.seconds + 1:
                raise Held(f"{self.name} is held by {holder or 'another, who was faster each time'}")
            time.sleep(0.2)

    def _find(self, end: float) -> Object | None:
        """The Lease; an API server that does not answer is asked until `end`."""
        while True:
            try:
                return self.api.find(LEASES, self.name)
            except ClusterError as error:
                if error.status not in AGAIN or time.monotonic() > end:
                    raise
                log.warning("%s; asking again", error)

    def _is_gone(self, holder: str) -> bool:
        """Whether the holder's pod has ended. Not a pod, or not allowed to ask: only its renewals tell."""
        if holder.startswith(OUTSIDE):
            return False
        pod = self._pod(holder.split("/", maxsplit=1)[0])
        return pod is not None and (not pod or _has_ended(pod))

    def _pod(self, name: str) -> Object | None:
        """The pod, empty if there is none, None if we are not allowed to ask."""
        try:
            return self.api.find("v1/pods", name) or {}
        except ClusterError as error:
            if error.status == 403:
                return None
            raise

    def _write(self, found: Object | None) -> bool:
        """Write ourselves into it; False if another wrote first."""
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = (found or {}).get("spec", {})
        mine = spec.get("holderIdentity") == self.holder
        spec = {
            "holderIdentity": self.holder,
            "leaseDurationSeconds": max(1, round(self.seconds)),
            "renewTime": now,
            "acquireTime": spec.get("acquireTime", now) if mine else now,
            "leaseTransitions": spec.get("leaseTransitions", 0) + (found is not None and not mine),
        }
        begun = time.monotonic()
        try:
            if found is None:
                metadata: Object = {"name": self.name, **({"ownerReferences": [self.owner]} if self.owner else {})}
                lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
                self.api("POST", LEASES, body=lease, timeout=min(TIMEOUT, self.seconds / 3))
            else:
                self.api("PUT", LEASES, self.name, {**found, "spec": spec}, timeout=min(TIMEOUT, self.seconds / 3))
        except ClusterError as error:
            if error.status == 409 or (error.status == 404 and found is not None):
                return False
            raise
        self._renewed = begun
        return True

    def renew_until_done(self) -> None:
        """Renew in a thread; a process whose Lease was taken ends at once, as another does its work by now."""
        for work in (self._renew, self._watch):
            self._threads.append(threading.Thread(target=work, name=f"{work.__name__} {self.name}", daemon=True))
            self._threads[-1].start()

    def _renew(self) -> None:
        pause = RENEW
        while not self._done.wait(pause):
            pause = RENEW
            try:
                found = self.api.find(LEASES, self.name, timeout=min(TIMEOUT, self.seconds / 3))
                holder = (found or {}).get("spec", {}).get("holderIdentity")
                if found is not None and holder != self.holder:
                    self._end(f"{self.name} was taken by {holder or 'nobody'}")
                if not self._done.is_set() and not self._write(found):
                    pause = RENEW / 10  # somebody wrote it just now: who?
            except ClusterError as error:
                log.warning("%s was not renewed: %s", self.name, error)

    def _watch(self) -> None:
        """End the process before another may take the Lease, whatever the thread that renews it hangs in."""
        while not self._done.wait(max(0.0, self._left())):
            if self._left() <= 0:
                self._end(f"{self.name} could not be renewed for {self.seconds - RENEW:.0f} s")

    def _left(self) -> float:
        return self._renewed + self.seconds - RENEW - time.monotonic()

    def _end(self, why: str) -> None:
        if not self._done.is_set():
            log.error("%s; this process ends, the next run finishes or undoes what it began", why)
            os._exit(1)

    def release(self) -> None:
        """Leave it empty, so that the next holder need not wait; not being able to is no error."""
        self._done.set()
        for thread in self._threads:
            thread.join(self.seconds)  # a renewal under way would take it again
        try:
            found = self.api.find(LEASES, self.name, timeout=min(TIMEOUT, self.seconds / 3))
            if found is not None and found["spec"].get("holderIdentity") == self.holder:
                found["spec"]["holderIdentity"] = ""
                self.api("PUT", LEASES, self.name, found, timeout=min(TIMEOUT, self.seconds / 3))
        except ClusterError as error:
            log.warning("%s was not released: %s", self.name, error)


@contextmanager
def lease(settings: Settings, name: str, *, wait: float = 0.0, api: Api | None = None) -> Iterator[None]:
    """Hold the Lease `<release>-<name>` for the block, renewed by a thread; raises Held, which names the holder.

    It belongs to the Deployment, so that it goes with the release.
    """
    api = api or Api()
    seconds = LEASE_SECONDS if name == "promote" else PATIENCE * LEASE_SECONDS
    held = _Lease(api, f"{settings.release}-{name}", _owner(api, settings.deployment), seconds)
    held.take(wait)
    held.renew_until_done()
    try:
        yield
    finally:
        held.release()


def holder(settings: Settings, name: str, api: Api | None = None) -> str | None:
    """Who holds the Lease, None if nobody does."""
    found = (api or Api()).find(LEASES, f"{settings.release}-{name}")
    return (found or {}).get("spec", {}).get("holderIdentity") or None


def _owner(api: Api, deployment: str) -> Object | None:
    try:
        found = api.find("apps/v1/deployments", deployment)
    except ClusterError as error:
        if error.status == 403:
            return None
        raise
    if found is None:
        return None
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment, "uid": found["metadata"]["uid"]}
