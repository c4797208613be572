"""`serving.apiKeys`: who shows no key is refused, keys are exchanged while clients ask, and no key is written anywhere."""

from __future__ import annotations

import base64
import http.client
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from tests.cluster.clients import Address
from tests.cluster.commands import wait_until
from tests.cluster.faults import fault, names
from tests.cluster.release import CHART, Release

pytestmark = pytest.mark.cluster

VALUES: dict[str, Any] = yaml.safe_load((CHART / "ci" / "api-keys-values.yaml").read_text())
SECRET: str = VALUES["serving"]["apiKeys"]["existingSecret"]
OLD, NEW, SHORT = (f"{name}-{secrets.token_hex(size)}" for name, size in (("old", 16), ("new", 16), ("bad", 4)))
TOLD = 120  # seconds: a kubelet looks at a pod's volumes each 90 at the latest


class Connection(http.client.HTTPConnection):
    """Sends headers of its owner with every request."""

    shown: dict[str, str]

    def endheaders(self, message_body: Any = None, *, encode_chunked: bool = False) -> None:
        for name, value in self.shown.items():
            self.putheader(name, value)
        super().endheaders(message_body, encode_chunked=encode_chunked)


@dataclass(frozen=True)
class Caller(Address):
    """Who shows a key: `shown` may change between two requests."""

    shown: dict[str, str] = field(default_factory=dict)

    def connection(self) -> http.client.HTTPConnection:
        plain = super().connection()
        made = Connection(plain.host, plain.port, timeout=plain.timeout)
        made.shown = self.shown
        return made


def bearer(key: str) -> dict[str, str]:
    """The header that shows it."""
    return {"Authorization": f"Bearer {key}"}


def ask(release: Release, shown: dict[str, str]) -> tuple[int, str, dict[str, Any]]:
    """Status, request id and body of one /predict with these headers."""
    request = f"keys-{secrets.token_hex(6)}"
    caller = Caller(release.address.ingress, release.address.host, shown)
    status, body = caller.ask(release.users()[0], request)
    return status, request, body


def keys_are(release: Release, **keys: str) -> None:
    """Make the Secret, or exchange what is in it."""
    data = {name: base64.b64encode(key.encode()).decode() for name, key in keys.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "data": data}
    release.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(secret))


def until(release: Release, what: str, look: Callable[[], bool]) -> None:
    """Wait for the service to go by what is in the Secret now; a change of a pod makes the kubelet look at once."""

    def looked() -> bool:
        for pod in names(release, "serving"):
            release.kubectl("annotate", "pod", pod, f"churn.test/look={secrets.token_hex(4)}", "--overwrite")
        return look()

    began = time.monotonic()
    wait_until(what, looked, within=TOLD, every=2)
    print(f"  {what}: after {time.monotonic() - began:.1f} s")


def answers(release: Release, shown: dict[str, str]) -> Callable[[], bool]:
    """Whether these headers let one in."""
    return lambda: ask(release, shown)[0] == 200


def log_of(release: Release) -> str:
    """Of the pod that serves."""
    return release.kubectl("logs", *names(release, "serving"), "--all-containers", "--tail=-1")


def pods(release: Release) -> list[tuple[str, int]]:
    """Name and restarts of every pod that serves, those included that are about to go."""
    labels = f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component=serving"
    found = release.get("pods", f"--selector={labels}")["items"]
    return [
        (pod["metadata"]["name"], sum(c["restartCount"] for c in pod["status"].get("containerStatuses", ())))
        for pod in found
    ]


@pytest.fixture(scope="module")
def keyed(installed: Release) -> Iterator[Release]:
    """The release, which asks for keys until these tests are over; its own clients show the old one."""
    assert installed.users()
    keys_are(installed, reporting=OLD)
    installed.upgrade(VALUES)
    wait_until("the pod that asks for no key is gone", lambda: len(pods(installed)) == 1, within=90)
    installed.address = Caller(installed.address.ingress, installed.address.host, bearer(OLD))
    yield installed
    installed.upgrade({"serving": {"apiKeys": {"existingSecret": ""}}})
    installed.kubectl("delete", "secret", SECRET)
    wait_until("nobody is asked for a key", lambda: len(pods(installed)) == 1, within=90)
    assert ask(installed, {})[0] == 200


def test_who_shows_no_key_is_refused_and_not_logged(keyed: Release) -> None:
    """401 without a key, with another's, half of one, or the probe's word without its token; 200 by either header."""
    wrong = [
        {}, bearer(NEW), bearer(OLD[:-1]), bearer(""), {"Authorization": f"Basic {OLD}"}, {"X-API-Key": "reporting"},
        {"X-Churn-Source": "probe"}, {"X-Churn-Source": "probe", "X-Churn-Probe-Token": OLD},
    ]  # fmt: skip
    refused = [ask(keyed, shown) for shown in wrong]
    let_in = [ask(keyed, shown) for shown in (bearer(OLD), {"X-API-Key": OLD})]
    assert [status for status, _, _ in refused] == [401] * len(wrong)
    assert {body["error"] for _, _, body in refused} == {"unauthorized"}
    assert [status for status, _, _ in let_in] == [200, 200]
    asked = {request for _, request, _ in (*refused, *let_in)}
    logged = "SELECT request_id FROM predictions WHERE request_id LIKE 'keys-%'"

    def in_the_log() -> set[str]:
        return {row["request_id"] for row in keyed.rows(logged)} & asked

    wait_until("the last answer is in the log", lambda: let_in[-1][1] in in_the_log(), within=30)
    assert in_the_log() == {request for _, request, _ in let_in}
    print(f"\nrefused {len(refused)} of {len(wrong)}, logged 0 of them")


def test_a_client_that_calls_itself_a_probe_is_logged_as_client(keyed: Release) -> None:
    """With a key, and without the token that only our own jobs have."""
    status, request, _ = ask(keyed, {**bearer(OLD), "X-Churn-Source": "probe"})
    assert status == 200
    query = f"SELECT source FROM predictions WHERE request_id = '{request}'"
    assert wait_until("it is in the log", lambda: keyed.rows(query), within=30) == [{"source": "client"}]


def test_promotion_and_helm_test_need_no_key(keyed: Release) -> None:
    """`helm test`, and a promotion up to its golden request, which is logged as a probe: the alias is put back."""
    done = keyed.helm("helm", "test", keyed.name, timeout=360, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    query = "SELECT count(*) AS n FROM predictions WHERE source = 'probe' AND request_id NOT LIKE 'keys-%'"
    before, (probes,) = keyed.promotions(), keyed.rows(query)
    keyed.mlflow("DELETE", "/api/2.0/mlflow/registered-models/alias", {"name": keyed.name, "alias": "production"})
    keyed.job_from_cronjob("promote")  # or the one of this minute

    def restored() -> bool:
        new = keyed.promotions()[len(before) :]
        return bool(new) and new[-1]["closed_at"] is not None

    wait_until("promotion restores the alias", restored, within=90)
    (row,) = keyed.promotions()[len(before) :]
    assert (row["action"], row["result"]) == ("restore", "promoted"), row
    wait_until("its probe is in the log", lambda: keyed.rows(query)[0]["n"] > probes["n"], within=30)


def test_keys_are_exchanged_while_clients_ask(keyed: Release) -> None:
    """The new one is added, clients move, the old one is removed: no request fails, no pod restarts."""
    assert isinstance(keyed.address, Caller)
    before = pods(keyed)
    with fault(keyed, "40 API keys exchanged") as happened:
        keys_are(keyed, reporting=OLD, reporting_2=NEW)
        until(keyed, "the new key is taken beside the old", answers(keyed, bearer(NEW)))
        asked = len(happened.clients.replies)
        keyed.address.shown.update(bearer(NEW))
        wait_until("clients show the new key", lambda: len(happened.clients.replies) >= asked + 30, within=30)
        keys_are(keyed, reporting_2=NEW)
        happened.mended()
        until(keyed, "the old key is refused", lambda: ask(keyed, bearer(OLD))[0] == 401)
        happened.normal(keyed.served_version(), within=TOLD)
    happened.clients.check_none_failed()
    assert pods(keyed) == before


@pytest.mark.parametrize("key", [SHORT, ""], ids=["too short", "empty"])
def test_a_key_that_cannot_be_used_changes_nothing(keyed: Release, key: str) -> None:
    """The keys that were stay in force, the log says why and which; once it is mended, it says that too."""
    before = pods(keyed)
    keys_are(keyed, reporting_2=NEW)
    until(
        keyed,
        "only the new key is taken",
        lambda: (ask(keyed, bearer(OLD))[0], ask(keyed, bearer(NEW))[0]) == (401, 200),
    )
    earlier = log_of(keyed)
    keys_are(keyed, reporting_2=NEW, dashboard=key)
    sentence = "API keys stay as they were: CHURN_API_KEYS_DIR is /etc/churn/keys, where dashboard cannot be used"
    until(keyed, "the log says so", lambda: log_of(keyed).count(sentence) > earlier.count(sentence))
    assert ask(keyed, bearer(NEW))[0] == 200
    assert ask(keyed, bearer(key))[0] == 401
    keys_are(keyed, reporting_2=NEW, dashboard=OLD)
    until(keyed, "the mended key is taken", answers(keyed, bearer(OLD)))
    assert "API keys are now those of dashboard, reporting_2" in log_of(keyed)
    assert pods(keyed) == before


def test_no_key_is_written_anywhere(keyed: Release) -> None:
    """Neither the keys nor the token of our own jobs: in logs, Events, objects, or what Helm keeps of the release."""
    token = base64.b64decode(keyed.get("secret", keyed.name)["data"]["probe-token"]).decode()
    found = {
        "Events": keyed.kubectl("get", "events", "-o", "yaml"),
        "objects": keyed.kubectl("get", "pods,jobs,cronjobs,deployments,replicasets,configmaps", "-o", "yaml"),
        "`helm get values`": keyed.helm("helm", "get", "values", keyed.name, "--all").stdout,
    }
    for pod in keyed.get("pods")["items"]:
        name = pod["metadata"]["name"]
        found[f"log of {name}"] = keyed.kubectl("logs", name, "--all-containers", "--tail=-1", check=False)
    manifest = {"`helm get manifest`": keyed.helm("helm", "get", "manifest", keyed.name).stdout}
    assert "churn.fetch" in found["objects"] and "ready: bento_tag=" in log_of(keyed), "the right things are looked at"

    def written(where: dict[str, str], *keys: str) -> list[str]:
        forms = [form for key in keys for form in (key, base64.b64encode(key.encode()).decode())]
        return [place for place, text in where.items() if any(form in text for form in forms)]

    assert written(found | manifest, OLD, NEW, SHORT) == []
    assert written(found, token) == []
    assert written({"this": f"Bearer {token}"}, token) == ["this"]
