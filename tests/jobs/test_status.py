"""`churn status` when something is wrong: each fault is an entry in `problems`, and the rest is shown."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.database import connect, retrains
from jobs.history import History
from jobs.lease import lease
from jobs.registry import ModelVersion, Registry
from jobs.serving import Pod, Rollout
from jobs.settings import Settings
from jobs.status import lines, status
from tests.jobs.conftest import settings_for

NOW = datetime(2024, 3, 1, tzinfo=UTC)
ONE, TWO = "churn:v1-aaaaaaaa", "churn:v2-bbbbbbbb"


class FakeServing:
    """What serves, as it is said to be."""

    url = "http://127.0.0.1:3000"

    def __init__(
        self, wanted: str | None, *ready: str, running: bool = True, failure: str | None = None, fence: int = 0
    ) -> None:
        self.fence = lambda: fence
        self.served_tag = lambda: wanted
        pods = tuple(Pod(tag.replace(":", "-"), self.url, tag, True, "") for tag in ready)
        self.found = Rollout(wanted, pods, running, settled=bool(ready), failure=failure)

    def rollout(self) -> Rollout:
        return self.found

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"status has no business with {name}")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path / "home")


@pytest.fixture
def production(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The registry's aliases, to be changed: version 1 is in production."""
    aliases = {"production": 1}
    monkeypatch.setattr(Registry, "aliases", lambda _: aliases)
    monkeypatch.setattr(Registry, "version", lambda _, number: ModelVersion(number, "", ""))
    return aliases


def promoted(
    settings: Settings, version: int, tag: str, *, closed: bool = True, result: str = "promoted", now: datetime = NOW
) -> None:
    """A promotion on record."""
    history = History(connect(settings.database))
    row = history.open(
        now=now, action="promote", from_version=None, from_tag=None, to_version=version, to_tag=tag, reason="", by="ada"
    )
    if closed:
        history.close(row, now=now, result=result, reason="better")


def problems(found: dict[str, Any]) -> list[str]:
    """Those that are not about the online store, which is empty in these homes."""
    return [problem for problem in found["problems"] if "`churn materialize`" not in problem]


def shown(found: dict[str, Any], key: str) -> str:
    return next(value for name, value in lines(found) if name == key)


def shape(found: dict[str, Any]) -> set[str]:
    return (
        set(found) | {f"serving.{key}" for key in found["serving"]} | {f"predictions.{k}" for k in found["predictions"]}
    )


@contextmanager
def closed_port() -> Iterator[int]:
    """A port on which nobody answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server.getsockname()[1]


# --- stores that do not answer --------------------


def test_a_database_that_is_away_is_a_problem(settings: Settings, production: dict[str, int]) -> None:
    """The rest is shown, under the same keys, and no password."""
    well = status(settings, FakeServing(ONE, ONE))
    with closed_port() as port:
        away = settings.model_copy(update={"database_url": f"postgresql://churn:hunter2@127.0.0.1:{port}/churn"})
        found = status(away, FakeServing(ONE, ONE))

    assert shape(found) == shape(well)
    assert (found["production"], found["served_tag"], found["serving"]["running"]) == (1, ONE, True)
    for key in ("pinned", "promoting", "drift", "retrain", "last_promotion", "previous_tag"):
        assert found[key] is None
    assert found["predictions"] == {"rows": None}
    (problem,) = problems(found)
    assert "the database cannot be read" in problem
    assert "CHURN_DATABASE_URL" in problem
    assert "hunter2" not in json.dumps(found)
    assert shown(found, "predictions") == "unknown"
    assert shown(found, "serving now").startswith(f"{ONE} at ")


def test_a_damaged_database_is_a_problem(settings: Settings) -> None:
    settings.home.mkdir(parents=True)
    (settings.home / "churn.db").write_text("this is no database " * 500)

    assert any("the database cannot be read" in problem for problem in status(settings)["problems"])


def test_a_registry_that_is_away_is_a_problem(settings: Settings) -> None:
    promoted(settings, 1, ONE)
    with closed_port() as port:
        away = settings.model_copy(update={"mlflow_url": f"http://127.0.0.1:{port}"})
        found = status(away, FakeServing(ONE, ONE))

    assert (found["production"], found["candidate"], found["previous"]) == (None, None, None)
    assert found["last_promotion"]["to"] == 1
    (problem,) = problems(found)
    assert problem.startswith("the model registry cannot be read (MLflow did not answer")
    assert "CHURN_MLFLOW_URL" in problem


@pytest.mark.parametrize(
    ("scheme", "says"), [("redis", "the online store cannot be read"), ("sqlite", "`churn materialize`")]
)
def test_an_online_store_without_features_is_a_problem(settings: Settings, scheme: str, says: str) -> None:
    with closed_port() as port:
        url = f"redis://:hunter2@127.0.0.1:{port}" if scheme == "redis" else ""
        found = status(settings.model_copy(update={"online_store_url": url}))

    assert found["features_as_of"] is None
    (problem,) = found["problems"]
    assert says in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"tag": "churn:v1", "colour": "blue"}'], ids=["cut", "list", "foreign"]
)
def test_a_damaged_desired_json_is_a_problem(settings: Settings, content: str) -> None:
    serving = settings.home / "serving"
    serving.mkdir(parents=True)
    well = status(settings)
    (serving / "desired.json").write_text(content)
    found = status(settings)

    assert shape(found) == shape(well)
    assert (found["served_tag"], found["wanted_tag"]) == (None, None)
    assert found["serving"] == {"url": None, "running": None, "settled": None, "pods": []}
    (problem,) = problems(found)
    assert "desired.json" in problem
    assert "`churn promote`" in problem
    assert shown(found, "serving now") == "unknown"


def test_an_unreadable_desired_json_is_a_problem(settings: Settings) -> None:
    (settings.home / "serving" / "desired.json").mkdir(parents=True)

    (problem,) = problems(status(settings))
    assert "Is a directory" in problem


# --- what serves --------------------


def test_the_wanted_tag_is_served_on_record_though_nothing_runs(settings: Settings, production: dict[str, int]) -> None:
    """Machines read what should serve, people read that nothing does."""
    promoted(settings, 1, ONE)
    found = status(settings, FakeServing(ONE, running=False))

    assert (found["served_tag"], found["wanted_tag"]) == (ONE, ONE)
    assert shown(found, "serving now") == f"nothing (wanted: {ONE})"
    assert problems(found) == ["nothing serves; `churn serve` does"]


def test_nothing_serves_as_long_as_no_pod_is_ready(settings: Settings) -> None:
    serving = FakeServing(ONE, ONE)
    serving.found = replace(serving.found, pods=(replace(serving.found.pods[0], ready=False),), settled=False)

    assert shown(status(settings, serving), "serving now") == f"nothing (wanted: {ONE})"


def test_before_the_first_model_nothing_serves_and_nothing_is_wrong(settings: Settings) -> None:
    found = status(settings)

    assert shown(found, "serving now") == "nothing"
    assert problems(found) == []


def test_what_answers_is_shown_while_another_is_wanted(settings: Settings) -> None:
    found = status(settings, FakeServing(TWO, ONE))

    assert (found["served_tag"], found["wanted_tag"]) == (ONE, TWO)
    assert shown(found, "serving now") == f"{ONE} at {FakeServing.url}, 1/1 ready"


# --- alias, record and served tag --------------------


def test_nothing_is_wrong_when_they_agree(settings: Settings, production: dict[str, int]) -> None:
    promoted(settings, 1, ONE)

    assert problems(status(settings, FakeServing(ONE, ONE))) == []


@pytest.mark.parametrize(
    ("alias", "wanted", "says"),
    [
        (2, ONE, f"alias production points to version 2, what should serve is {ONE}"),
        (None, ONE, "alias production points to no version"),
        (1, TWO, f"the served tag is {TWO}, the record of promotions says {ONE}"),
        (1, None, f"the served tag is empty, the record of promotions says {ONE}"),
    ],
    ids=["alias moved", "alias gone", "tag changed", "tag gone"],
)
def test_a_disagreement_is_a_problem(
    settings: Settings, production: dict[str, int], alias: int | None, wanted: str | None, says: str
) -> None:
    promoted(settings, 1, ONE)
    production.clear()
    if alias:
        production["production"] = alias

    (problem,) = problems(status(settings, FakeServing(wanted, ONE)))
    assert problem.startswith(says)
    assert problem.endswith("`churn promote` settles it")


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("churn_log_failing_seconds 7.0\nchurn_log_quarantined_total 0.0\n", []),
        (
            "churn_log_backlog_bytes 2048.0\nchurn_log_failing_seconds 71.2\n",
            ["churn-v1-aaaaaaaa: the database has taken no predictions for 71 s; 2 KiB wait in its spool"],
        ),
        ("churn_log_quarantined_total 3.0\n", ["churn-v1-aaaaaaaa: 3 damaged or refused records are in `quarantine`"]),
        ("no metrics at all", []),
    ],
    ids=["a moment", "away", "quarantine", "garbage"],
)
def test_what_a_pod_says_of_the_log_is_a_problem(
    settings: Settings, production: dict[str, int], page: str, says: list[str]
) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    promoted(settings, 1, ONE)
    serving = FakeServing(ONE, ONE)
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        (pod,) = serving.found.pods
        pod = replace(pod, address=f"http://127.0.0.1:{server.server_port}")
        serving.found = replace(serving.found, pods=(pod,))
        found = problems(status(settings, serving))
        server.shutdown()

    assert len(found) == len(says)
    for problem, beginning in zip(found, says, strict=True):
        assert problem.startswith(beginning)


def test_another_database_is_not_settled_by_promote(settings: Settings, production: dict[str, int]) -> None:
    promoted(settings, 1, ONE)

    (problem,) = problems(status(settings, FakeServing(TWO, TWO, fence=7)))
    assert problem.startswith(f"the database knows promotions up to 1, but {TWO} was written by promotion 7")
    assert "`churn adopt`" in problem


def test_another_registry_is_not_settled_by_promote(
    settings: Settings, production: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(settings, 1, ONE)
    production.clear()
    monkeypatch.setattr(Registry, "version", lambda *_: None)

    (problem,) = problems(status(settings, FakeServing(ONE, ONE)))
    assert problem.startswith(f"the model registry does not have version 1 of the run that serves as {ONE};")
    assert "CHURN_MLFLOW_URL" in problem


@pytest.mark.parametrize(("age", "said"), [(timedelta(hours=1), 1), (timedelta(days=8), 0)], ids=["today", "long ago"])
def test_a_promotion_that_was_undone_is_a_problem_for_a_week(
    settings: Settings, production: dict[str, int], age: timedelta, said: int
) -> None:
    promoted(settings, 1, ONE)
    promoted(settings, 2, TWO, result="failed", now=datetime.now(UTC) - age)
    found = status(settings, FakeServing(ONE, ONE))

    assert problems(found) == ["the last promotion (version 2) failed and was undone: better"] * said
    assert found["last_promotion"]["result"] == "failed"


def test_a_promotion_that_nobody_works_on_is_a_problem(settings: Settings, production: dict[str, int]) -> None:
    promoted(settings, 1, ONE, closed=False)
    with lease(settings, "promote"):
        assert problems(status(settings, FakeServing(ONE, ONE))) == []

    (problem,) = problems(status(settings, FakeServing(ONE, ONE)))
    assert problem == "promotion 1 was left open; `churn promote` finishes or undoes it"


def test_an_alias_set_before_any_promotion_is_a_problem(settings: Settings, production: dict[str, int]) -> None:
    (problem,) = problems(status(settings, FakeServing(None)))
    assert "version 1, what should serve is nothing" in problem


def test_a_promotion_under_way_is_no_disagreement(settings: Settings, production: dict[str, int]) -> None:
    promoted(settings, 1, ONE)
    promoted(settings, 2, TWO, closed=False)
    production["production"] = 2
    found = status(settings, FakeServing(ONE, ONE))

    assert problems(found) == []
    assert found["promoting"]["to"] == 2


# --- retraining --------------------


def retraining(settings: Settings, **values: object) -> None:
    """A retraining on record, without a result if none is given."""
    with connect(settings.database).begin() as connection:
        connection.execute(retrains.insert().values(as_of=NOW, wanted_by="drift", reason="stalls", **values))


def test_a_retraining_is_under_way_while_its_lease_is_held(settings: Settings) -> None:
    with lease(settings, "retrain"):
        retraining(settings)
        found = status(settings)

    assert found["retrain"]["result"] is None
    assert shown(found, "retrain") == "under way"
    assert problems(found) == []


def test_a_retraining_without_result_whose_lease_is_free_was_killed(settings: Settings) -> None:
    with lease(settings, "retrain"):
        retraining(settings)
    found = status(settings)

    assert found["retrain"]["result"] == "killed"
    assert shown(found, "retrain") == "killed"
    assert problems(found) == ["the last retraining (2024-03-01) was killed; `churn retrain` begins anew"]
    with lease(settings, "retrain"):
        pass  # asking has left it free


def test_nothing_is_said_of_a_retraining_on_another_machine(settings: Settings) -> None:
    """Without the lease's file, nobody here knows."""
    retraining(settings)

    assert shown(status(settings), "retrain") == "under way"
    assert not (settings.home / "churn-retrain.lock").exists()


def test_a_retraining_that_ended_is_not_doubted(settings: Settings) -> None:
    with lease(settings, "retrain"):
        retraining(settings, result="failed", detail="no disk")

    assert shown(status(settings), "retrain") == "failed: no disk"


@pytest.mark.parametrize(("mode", "waits"), [("manual", True), ("auto", False)])
def test_who_must_decide_is_told_what_waits(promotable: Callable[..., Settings], mode: str, waits: bool) -> None:
    found = status(promotable(promotion_mode=mode))

    said = "version 2 passed the gate and waits for `churn approve 2`"
    assert (("waiting", said) in lines(found)) == waits
    assert found["waiting"] == (said if waits else None)
