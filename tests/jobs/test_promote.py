"""Deciding is a table; doing survives being killed after every step and undoes what went wrong."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobs import failpoints
from jobs.database import bentos, connect
from jobs.history import History, Pin, Promotion
from jobs.lease import lease
from jobs.package import bento_of, is_whole
from jobs.pin import NothingToDo, _run_of, adopt, approve, pin, rollback, unpin
from jobs.promote import Idle, Promoter, PromotionFailed, Want, World, _ModelFault, _WorldFault, decide, promote
from jobs.registry import CANDIDATE, PREVIOUS, PRODUCTION, ModelVersion, Registry, RegistryError
from jobs.serving import LocalServing, Pod, Rollout
from jobs.settings import Settings
from jobs.status import status
from jobs.supervisor import as_environment
from tests.jobs.conftest import SECOND_KNOWN, Trained

NOW = datetime(2024, 3, 1, 12, tzinfo=UTC)
TAG_1, TAG_2 = "churn:v1-aaaaaaaa", "churn:v2-bbbbbbbb"


def row(version: int, tag: str) -> Promotion:
    return Promotion(version, NOW, NOW, "promote", None, None, version, tag, "promoted", "better", "promote")


def version(number: int, **tags: str) -> ModelVersion:
    champion = "" if number == 1 else "1"
    return ModelVersion(
        number, f"run{number}", "", {"gate": "passed", "gate_reason": "better", "champion": champion, **tags}
    )


SETTLED = World(
    mode="auto",
    pin=None,
    aliases={PRODUCTION: 1},
    served_tag=TAG_1,
    served_version=1,
    last=row(1, TAG_1),
    candidate=None,
    expected_tag=TAG_1,
    rebuild_on_code_change=True,
    registered=True,
    retry_at={},
    failed_rebuild=None,
    held_against="1 1000 0.2 0.1",
    now=NOW,
)
WITH_CANDIDATE = replace(SETTLED, aliases={PRODUCTION: 1, CANDIDATE: 2}, candidate=version(2))
EMPTY = replace(SETTLED, aliases={}, served_tag=None, served_version=None, last=None, expected_tag=None)
FIRST = replace(EMPTY, aliases={CANDIDATE: 1}, candidate=version(1))
PIN = Pin(1, TAG_1, "doubts", "ada", NOW)
TAKEN_BACK = replace(row(1, "churn:v1-older"), action="pin", from_version=1, from_tag=TAG_1)


@pytest.mark.parametrize(
    ("world", "action", "to"),
    [
        pytest.param(WITH_CANDIDATE, "promote", 2, id="a candidate that passed"),
        pytest.param(FIRST, "promote", 1, id="the first model"),
        pytest.param(replace(FIRST, mode="manual"), "promote", 1, id="the first model in mode manual"),
        pytest.param(replace(FIRST, mode="dryRun"), "promote", 1, id="the first model in mode dryRun"),
        pytest.param(
            replace(WITH_CANDIDATE, mode="manual", candidate=version(2, approved_by="ada")), "promote", 2, id="approved"
        ),
        pytest.param(replace(WITH_CANDIDATE, retry_at={2: NOW}), "promote", 2, id="interrupted, and its time has come"),
        pytest.param(replace(SETTLED, aliases={PRODUCTION: 3}), "follow", 3, id="the alias was moved by a hand"),
        pytest.param(replace(EMPTY, aliases={PRODUCTION: 3}), "follow", 3, id="the alias was set before any promotion"),
        pytest.param(replace(SETTLED, mode="off", aliases={PRODUCTION: 3}), "follow", 3, id="alias moved, mode off"),
        pytest.param(
            replace(SETTLED, served_tag=TAG_2, served_version=2), "pin", 2, id="the tag was changed by a hand"
        ),
        pytest.param(
            replace(SETTLED, served_tag=TAG_2, served_version=None), "restore", 1, id="to one that is unknown"
        ),
        pytest.param(replace(SETTLED, served_tag=None), "restore", 1, id="the served tag is gone"),
        pytest.param(replace(SETTLED, aliases={}), "restore", 1, id="the alias is gone"),
        pytest.param(replace(SETTLED, expected_tag="churn:v1-cccccccc"), "rebuild", 1, id="new serving code"),
        pytest.param(replace(SETTLED, pin=replace(PIN, bento_tag=TAG_2, version=2)), "pin", 2, id="a pin on another"),
        pytest.param(replace(SETTLED, pin=PIN, aliases={PRODUCTION: 2}), "pin", 1, id="the alias follows the pin"),
        pytest.param(
            replace(SETTLED, aliases={CANDIDATE: 1}, candidate=version(1, approved_by="ada"), registered=False),
            "promote",
            1,
            id="another registry, and a person wants its model",
        ),
    ],
)
def test_wanted(world: World, action: str, to: int) -> None:
    found = decide(world)
    assert isinstance(found, Want), found
    assert (found.action, found.version) == (action, to)


@pytest.mark.parametrize(
    ("world", "says"),
    [
        pytest.param(SETTLED, "no candidate", id="settled"),
        pytest.param(EMPTY, "`churn retrain` trains one", id="no model yet"),
        pytest.param(replace(FIRST, mode="off"), "mode off", id="the first model in mode off"),
        pytest.param(
            replace(WITH_CANDIDATE, candidate=version(2, gate="refused", gate_reason="worse")), "worse", id="refused"
        ),
        pytest.param(replace(WITH_CANDIDATE, mode="manual"), "waits for `churn approve 2`", id="not approved"),
        pytest.param(replace(WITH_CANDIDATE, mode="dryRun"), "mode dryRun", id="dryRun"),
        pytest.param(replace(WITH_CANDIDATE, mode="off"), "mode off", id="off"),
        pytest.param(
            replace(WITH_CANDIDATE, candidate=version(2, promoted_at="x")), "not tried again", id="promoted before"
        ),
        pytest.param(
            replace(WITH_CANDIDATE, candidate=version(2, rolled_back="x")), "not tried again", id="rolled back"
        ),
        pytest.param(
            replace(WITH_CANDIDATE, candidate=version(2, promotion_failed="x")),
            "`churn approve 2` allows",
            id="failed before",
        ),
        pytest.param(
            replace(WITH_CANDIDATE, retry_at={2: NOW + timedelta(minutes=2)}), "next try at 12:02:00", id="interrupted"
        ),
        pytest.param(
            replace(SETTLED, aliases={PRODUCTION: 3}, retry_at={3: NOW + timedelta(minutes=2)}),
            "next try",
            id="hand, interrupted",
        ),
        pytest.param(replace(WITH_CANDIDATE, pin=PIN), "pinned to", id="pinned"),
        pytest.param(
            replace(SETTLED, pin=replace(PIN, bento_tag=TAG_2, version=2), retry_at={2: NOW + timedelta(minutes=2)}),
            "but that was interrupted; next try at 12:02:00",
            id="pinned, interrupted",
        ),
        pytest.param(
            replace(SETTLED, pin=PIN, aliases={}, registered=False), "pinned to", id="pinned, version deleted"
        ),
        pytest.param(
            replace(SETTLED, aliases={}, registered=False), "deleted from the model registry", id="version deleted"
        ),
        pytest.param(
            replace(SETTLED, aliases={CANDIDATE: 1}, candidate=version(1), registered=False),
            "or that is another one; churn:v1-aaaaaaaa serves on; `churn approve N`",
            id="another registry has begun again",
        ),
        pytest.param(
            replace(WITH_CANDIDATE, candidate=version(2, champion="7")),
            "judged against version 7",
            id="another champion",
        ),
        pytest.param(
            replace(SETTLED, expected_tag="churn:v1-cccccccc", rebuild_on_code_change=False),
            "no candidate",
            id="no rebuild",
        ),
        pytest.param(
            replace(SETTLED, expected_tag="churn:v1-cccccccc", failed_rebuild="churn:v1-cccccccc"),
            "no candidate",
            id="rebuild failed",
        ),
        pytest.param(
            replace(SETTLED, aliases={}, retry_at={1: NOW + timedelta(minutes=2)}),
            "alias production is gone, and putting it back was interrupted; next try at 12:02:00",
            id="alias gone, a registry that cannot be written",
        ),
        pytest.param(
            replace(SETTLED, last=TAKEN_BACK, served_tag=TAKEN_BACK.to_tag), "no candidate", id="rebuild taken back"
        ),
        pytest.param(
            replace(SETTLED, aliases={PRODUCTION: 7}, registered=False, alias_recorded=False),
            "names version 7, which was not made here",
            id="another installation's registry",
        ),
    ],
)
def test_nothing_wanted(world: World, says: str) -> None:
    found = decide(world)
    assert isinstance(found, Idle), found
    assert says in found.reason


def state(settings: Settings) -> tuple[object, ...]:
    """What must agree: aliases, served tag, the last row, and that none is open."""
    history = History(connect(settings.database))
    last = history.last(good=True)
    assert history.open_row() is None
    assert last is not None
    aliases = Registry(settings).aliases()
    assert (aliases[PRODUCTION], LocalServing(settings).served_tag()) == (last.to_version, last.to_tag)
    return last.to_version, last.to_tag, aliases


def newest(settings: Settings) -> Promotion:
    """The newest promotion, however it ended."""
    return History(connect(settings.database)).rows(limit=1)[0]


def raising(error: Exception) -> Callable[..., None]:
    """A step that fails."""

    def fault(*_: object) -> None:
        raise error

    return fault


Copy = Callable[..., Settings]


def test_promotes_the_candidate_and_then_does_nothing(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    assert promote(settings, dry_run=True).result == "dry_run"
    assert promote(settings).to_version == 2
    assert state(settings) == (2, trained.second_tag, {PRODUCTION: 2, PREVIOUS: 1})
    tags = Registry(settings).version(2).tags  # type: ignore[union-attr]
    assert tags["bento_tag"] == trained.second_tag
    assert {"promoted_at", "served_since"} <= set(tags)
    rows = len(History(connect(settings.database)).rows())
    assert promote(settings).result == "idle"
    assert len(History(connect(settings.database)).rows()) == rows


STEPS = [step for step in failpoints.STEPS if step.startswith("promote.")]


def churn(settings: Settings, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        env={**os.environ, **as_environment(settings), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("promote.settled", "promote.probed")])
def test_killed_after_a_step_the_next_run_ends_it(promotable: Copy, trained: Trained, step: str) -> None:
    """One row per promotion, alias and served tag equal, whatever the step. (Steps that need pods: test_loop.)"""
    settings = promotable()
    killed = churn(settings, "promote", CHURN_FAILPOINT=f"{step}=exit")
    assert killed.returncode == 137, killed.stderr
    again = promote(settings)
    assert again.result == ("idle" if step == "promote.closed" else "promoted")
    assert state(settings) == (2, trained.second_tag, {PRODUCTION: 2, PREVIOUS: 1})
    assert [r.to_version for r in History(connect(settings.database)).rows()] == [2, 1]


@pytest.mark.parametrize("step", [step for step in failpoints.STEPS if step.startswith("undo.")])
def test_killed_while_it_undoes_the_next_run_ends_it(promotable: Copy, trained: Trained, step: str) -> None:
    """The row is still open, so the promotion is tried again: one row, and alias and served tag agree."""
    settings = promotable()
    killed = churn(settings, "promote", CHURN_FAILPOINT=f"promote.patched=raise,{step}=exit")
    assert killed.returncode == 137, killed.stderr
    assert promote(settings).result == "promoted"
    assert state(settings) == (2, trained.second_tag, {PRODUCTION: 2, PREVIOUS: 1})
    assert [r.to_version for r in History(connect(settings.database)).rows()] == [2, 1]


@pytest.mark.parametrize("step", [step for step in failpoints.STEPS if step.startswith("pin.")])
def test_rollback_killed_is_ended_by_promote(promotable: Copy, trained: Trained, step: str) -> None:
    """It is a record first: what was pinned serves after the next run, and stays."""
    settings = promotable()
    promote(settings)
    killed = churn(settings, "rollback", "--reason", "doubts", CHURN_FAILPOINT=f"{step}=exit")
    assert killed.returncode == 137, killed.stderr
    assert promote(settings).result == "rolled_back"
    assert state(settings)[:2] == (1, trained.first_tag)
    assert "pinned to" in promote(settings).reason


def test_alias_moved_by_a_hand_is_followed(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    promote(settings)
    Registry(settings).set_alias(PRODUCTION, 1)
    assert promote(settings).to_version == 1
    assert state(settings)[:2] == (1, trained.first_tag)
    assert "rolled_back" in Registry(settings).version(2).tags  # type: ignore[union-attr]
    assert promote(settings).result == "idle"


def test_alias_moved_to_a_version_that_does_not_exist(promotable: Copy, trained: Trained) -> None:
    """The served tag stays, the alias is put back, and the reason is in the history."""
    settings = promotable(promotion_mode="off")
    with sqlite3.connect(settings.home / "mlflow.db") as connection:
        connection.execute("UPDATE registered_model_aliases SET version = 99 WHERE alias = 'production'")
    with pytest.raises(PromotionFailed, match="registry has no version 99"):
        promote(settings)
    assert state(settings)[:2] == (1, trained.first_tag)
    last = History(connect(settings.database)).last()
    assert last is not None and (last.result, last.to_version) == ("failed", 99)


def test_model_that_changed_in_the_registry_is_refused(promotable: Copy, trained: Trained) -> None:
    """One byte of the registered file differs, and the bento is not built yet: nothing changes, and it is marked."""
    settings = promotable()
    engine = connect(settings.database)
    with engine.begin() as connection:
        connection.execute(bentos.delete().where(bentos.c.tag == trained.second_tag))
    registry = Registry(settings)
    registry.set_tags(2, {"model_sha256": "0" * 64})
    with pytest.raises(PromotionFailed, match="tag model_sha256 is 000000000000…, recorded was"):
        promote(settings)
    assert state(settings) == (1, trained.first_tag, {PRODUCTION: 1, CANDIDATE: 2})
    assert "sha256" in registry.version(2).tags["promotion_failed"]  # type: ignore[union-attr]
    assert "not tried again" in promote(settings).reason


def test_rollback_stays_until_unpinned_and_what_was_left_does_not_return(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    promote(settings)
    assert rollback(settings, reason="doubts", by="ada", dry_run=True).result == "dry_run"
    result = rollback(settings, reason="doubts", by="ada")
    assert (result.result, result.to_version) == ("rolled_back", 1)
    assert state(settings)[:2] == (1, trained.first_tag)
    with pytest.raises(NothingToDo, match="no other version was served before"):
        rollback(settings, reason="twice is once", by="ada")
    approve(settings, 2, by="bob", reason="it was the data")
    assert "pinned" in promote(settings).reason
    ended = unpin(settings)
    assert ended is not None and ended.reason == "doubts"
    assert promote(settings).to_version == 2, "approved after the rollback, free since unpin"
    assert unpin(settings) is None


def test_rollback_works_while_the_registry_is_down(promotable: Copy, trained: Trained) -> None:
    """Aliases follow when it answers again."""
    settings = promotable()
    promote(settings)
    down = promotable(mlflow_url="http://127.0.0.1:9")
    assert rollback(down, reason="doubts", by="ada").result == "rolled_back"
    assert LocalServing(settings).served_tag() == trained.first_tag
    assert Registry(settings).aliases()[PRODUCTION] == 2
    assert promote(settings).result == "rolled_back"
    assert state(settings)[:2] == (1, trained.first_tag)


def test_registry_down_changes_nothing_and_says_so(promotable: Copy, trained: Trained) -> None:
    down = promotable(mlflow_url="http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="MLflow did not answer"):
        promote(down)
    assert state(promotable())[:2] == (1, trained.first_tag)


def test_rollback_ends_a_promotion_that_was_killed_while_the_registry_is_down(
    promotable: Copy, trained: Trained
) -> None:
    settings = promotable()
    assert churn(settings, "promote", CHURN_FAILPOINT="promote.patched=exit").returncode == 137
    down = promotable(mlflow_url="http://127.0.0.1:9")
    assert rollback(down, reason="doubts", by="ada").to_version == 1
    assert LocalServing(settings).served_tag() == trained.first_tag
    promote(settings)
    assert state(settings)[:2] == (1, trained.first_tag)


def test_another_registry_that_begins_again_promotes_nothing_by_itself(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its version 1 is another run than the one that serves, judged against nobody."""
    from jobs.retrain import retrain

    settings = promotable()
    begun = promotable(mlflow_url=f"sqlite:///{settings.home}/another.db", candidates=("logistic_regression",))
    Registry(begun).client.create_registered_model(begun.release)
    assert retrain(begun, as_of=SECOND_KNOWN).version == 1

    assert "that is another one" in promote(begun).reason
    assert LocalServing(begun).served_tag() == trained.first_tag
    Registry(begun).set_alias(PRODUCTION, 1)
    assert [
        p for p in status(begun)["problems"] if p.startswith("the model registry does not have version 1 of the run")
    ]
    Registry(begun).drop_alias(PRODUCTION)
    approve(begun, 1, by="ada", reason="the old registry is lost")
    with monkeypatch.context() as busy:
        busy.setattr(Promoter, "_watch", raising(_WorldFault("no room for a pod")))
        with pytest.raises(PromotionFailed, match="no room for a pod"):
            promote(begun)
    assert Registry(begun).aliases() == {CANDIDATE: 1}
    assert "was interrupted; next try" in promote(begun).reason
    monkeypatch.setattr(Promoter, "_retry_at", lambda *_: {})
    assert promote(begun).result == "promoted"
    assert LocalServing(begun).served_tag() not in (trained.first_tag, trained.second_tag)


def test_a_stored_archive_that_is_damaged_is_built_again_or_the_way_out_is_named(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the code that built it; other code makes another bento, which is not what was asked for."""
    settings = promotable()
    engine = connect(settings.database)
    promote(settings)
    with engine.begin() as connection:
        connection.execute(bentos.update().where(bentos.c.tag == trained.first_tag).values(archive=b"damaged"))
    with monkeypatch.context() as other_code:
        other_code.setattr("jobs.promote.expected_tag", lambda _: "churn:v1-cccccccc")
        with pytest.raises(
            PromotionFailed, match=f"archive of {trained.first_tag} is gone or damaged; to serve version"
        ):
            rollback(settings, reason="doubts", by="ada")
    assert state(settings)[:2] == (2, trained.second_tag)
    assert rollback(settings, reason="doubts", by="ada").result == "rolled_back"
    assert state(settings)[:2] == (1, trained.first_tag)
    assert is_whole(engine, trained.first_tag)


def test_unpin_waits_for_the_alias_that_could_not_follow_a_rollback(promotable: Copy, trained: Trained) -> None:
    """It would be taken for moved by a hand, and what was rolled back would return."""
    settings = promotable()
    promote(settings)
    down = promotable(mlflow_url="http://127.0.0.1:9")
    rollback(down, reason="doubts", by="ada")
    with pytest.raises(RegistryError, match=r"did not answer.*; the pin stays until alias production"):
        unpin(down)
    assert unpin(settings) is not None
    assert state(settings)[:2] == (1, trained.first_tag)
    assert promote(settings).result == "idle"
    assert "rolled_back" in Registry(settings).version(2).tags  # type: ignore[union-attr]


def test_a_registry_that_is_not_there_is_not_an_empty_one(promotable: Copy, trained: Trained) -> None:
    """A volume that is not mounted: nothing is made in its place, and nothing is taken for deleted."""
    settings = promotable()
    (settings.home / "mlflow.db").rename(settings.home / "away.db")
    with pytest.raises(RegistryError, match=r"mlflow\.db is not there, though models were registered in it"):
        promote(settings)
    assert rollback(settings, to=2, reason="doubts", by="ada").result == "rolled_back"
    assert not (settings.home / "mlflow.db").exists()


def test_a_deleted_version_can_be_rolled_back_to(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its archive is stored: the registry is not needed, and nothing is tried again each minute."""
    settings = promotable()
    promote(settings)
    registry = Registry(settings)
    registry.drop_alias(PREVIOUS)
    registry.client.delete_model_version(settings.release, "1")
    with monkeypatch.context() as broken:
        broken.setattr(Promoter, "_watch", raising(_ModelFault("it crashes")))
        with pytest.raises(PromotionFailed, match="it crashes"):
            rollback(settings, reason="doubts", by="ada")
    assert state(settings) == (2, trained.second_tag, {PRODUCTION: 2})
    assert rollback(settings, reason="doubts", by="ada").to_version == 1
    assert LocalServing(settings).served_tag() == trained.first_tag
    assert promote(settings).result == "idle"
    unpin(settings)  # what was left does not return, though no alias can name what serves
    assert "deleted from the model registry" in promote(settings).reason
    assert LocalServing(settings).served_tag() == trained.first_tag


def test_a_promotion_from_a_deleted_version_that_fails_is_closed(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alias cannot be put back to a version that is gone: none names what serves then, and nothing is tried again."""
    settings = promotable()
    Registry(settings).client.delete_model_version(settings.release, "1")
    approve(settings, 2, by="ada", reason="")
    with monkeypatch.context() as broken:
        broken.setattr(Promoter, "_watch", raising(_ModelFault("it crashes")))
        with pytest.raises(PromotionFailed, match="it crashes"):
            promote(settings)
    assert PRODUCTION not in Registry(settings).aliases()
    assert "deleted from the model registry" in promote(settings).reason
    assert LocalServing(settings).served_tag() == trained.first_tag
    assert newest(settings).result == "failed"


def test_a_rollback_that_was_taken_back_before_it_was_done_is_undone(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    promote(settings)
    assert churn(settings, "rollback", "--reason", "doubts", CHURN_FAILPOINT="promote.patched=exit").returncode == 137
    assert LocalServing(settings).served_tag() == trained.first_tag
    unpin(settings)
    assert promote(settings).result == "idle"
    assert state(settings)[:2] == (2, trained.second_tag)
    assert newest(settings).reason == f"the pin on {trained.first_tag} was taken back before it served everywhere"
    version = Registry(settings).version(2)
    assert version is not None and "rolled_back" not in version.tags


def test_an_alias_moved_by_a_hand_has_precedence_over_a_tag_changed_by_a_hand(
    promotable: Copy, trained: Trained
) -> None:
    settings = promotable()
    serving = LocalServing(settings)
    serving.set_served_tag(old=trained.first_tag, new="churn:v1-cccccccc", fence=1, soak=timedelta(0))
    Registry(settings).set_alias(PRODUCTION, 2)
    assert promote(settings).result == "promoted"
    assert state(settings)[:2] == (2, trained.second_tag)


def test_pods_that_came_after_the_rollout_are_not_asked_before_they_are_ready(
    promotable: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An autoscaler's, or one that is moved just now: no reason to undo what serves."""
    here, coming = Pod("a", "http://127.0.0.1:9", TAG_1, True, ""), Pod("b", "", TAG_1, False, "ContainerCreating")
    promoter = Promoter(promotable())
    monkeypatch.setattr("jobs.promote.ask", lambda url: {"bento_tag": TAG_1})
    golden = {"bento_tag": TAG_1, "churn_probability": 0.5}
    monkeypatch.setattr("jobs.promote.ask_golden", lambda *_: (golden, 0.5))
    monkeypatch.setattr(LocalServing, "url", "http://127.0.0.1:9")
    for pods in ((here, coming), (coming, here)):
        found = Rollout(TAG_1, pods, running=True, settled=False, failure=None)
        monkeypatch.setattr(promoter.serving, "rollout", lambda found=found: found)
        promoter._ask_all(TAG_1)
    monkeypatch.setattr(promoter.serving, "rollout", lambda: Rollout(TAG_1, (coming,), True, False, None))
    with pytest.raises(_WorldFault, match="no pod is ready any more"):
        promoter._ask_all(TAG_1)


def test_what_is_done_is_done_though_nobody_can_be_told(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = promotable()
    monkeypatch.setattr(LocalServing, "tell", raising(ConnectionError("the API server is away")))
    assert promote(settings).result == "promoted"
    assert state(settings)[:2] == (2, trained.second_tag)


def test_the_production_version_is_deleted_and_serves_on(promotable: Copy, trained: Trained) -> None:
    settings = promotable(promotion_mode="off")
    Registry(settings).client.delete_model_version(settings.release, "1")
    assert "deleted from the model registry" in promote(settings).reason
    assert LocalServing(settings).served_tag() == trained.first_tag


@pytest.mark.parametrize("step", ["_to_tag", "_set_aliases", "_set_served_tag", "_watch", "_probe"])
def test_whatever_a_step_raises_nothing_stays_half_done(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A fault nobody thought of: undone, tried again later, and a rollback works meanwhile."""
    settings = promotable()
    monkeypatch.setattr(Promoter, step, raising(KeyError("something")))
    with pytest.raises(PromotionFailed, match="interrupted"):
        promote(settings)
    monkeypatch.undo()
    assert state(settings) == (1, trained.first_tag, {PRODUCTION: 1, CANDIDATE: 2})
    assert "next try at" in promote(settings).reason
    assert pin(settings, reason="calm", by="ada").result == "idle"


def test_a_model_that_cannot_be_converted_is_refused_and_blocks_nothing(promotable: Copy, trained: Trained) -> None:
    """The dummy baseline has no ONNX; its alias is moved by a hand."""
    from jobs.retrain import retrain

    settings = promotable(candidates=("dummy",))
    assert retrain(settings, as_of=SECOND_KNOWN).version == 3
    Registry(settings).set_alias(PRODUCTION, 3)
    with pytest.raises(PromotionFailed, match="version 3 cannot be packaged"):
        promote(settings)
    assert state(settings)[:2] == (1, trained.first_tag)
    assert promote(settings).result in ("idle", "promoted")


def test_second_rollback_target_is_named(promotable: Copy) -> None:
    settings = promotable()
    with pytest.raises(NothingToDo, match="no other version was served before"):
        rollback(settings, reason="", by="ada")
    with pytest.raises(NothingToDo, match="no bento of version 7 is stored; there are 1, 2"):
        rollback(settings, to=7, reason="", by="ada")


def test_a_rollback_that_is_interrupted_is_tried_again_with_backoff(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each minute, and at once if somebody rolls back again."""
    settings = promotable()
    promote(settings)
    monkeypatch.setenv("CHURN_FAILPOINT", "promote.patched=raise")
    for _ in range(2):
        with pytest.raises(PromotionFailed, match=f"interrupted.*; {trained.first_tag} stays pinned: .*`churn unpin`"):
            rollback(settings, reason="doubts", by="ada")
    assert "but that was interrupted; next try at" in promote(settings).reason
    assert LocalServing(settings).served_tag() == trained.second_tag
    monkeypatch.delenv("CHURN_FAILPOINT")
    assert rollback(settings, reason="doubts still", by="ada").result == "rolled_back"
    assert state(settings)[:2] == (1, trained.first_tag)


def test_two_who_roll_back_at_once_want_the_same(promotable: Copy, trained: Trained) -> None:
    """The second finds the first one's promotion under way, or left behind, and does not go forward again."""
    settings = promotable()
    promote(settings)
    assert churn(settings, "rollback", CHURN_FAILPOINT="promote.patched=exit").returncode == 137
    assert rollback(settings, reason="again", by="bob").to_version == 1
    assert state(settings)[:2] == (1, trained.first_tag)


def test_a_rebuilt_bento_is_taken_back_by_its_tag(promotable: Copy, trained: Trained) -> None:
    """The version's number means the newest of its bentos."""
    settings = promotable(promotion_mode="off")
    engine = connect(settings.database)
    with engine.begin() as connection:
        (stored,) = connection.execute(sa.select(bentos).where(bentos.c.tag == trained.first_tag)).mappings()
        older = {**stored, "tag": "churn:v1-0ld0ld00", "built_at": stored["built_at"] - timedelta(days=1)}
        connection.execute(bentos.insert().values(**older))
    with pytest.raises(NothingToDo, match=f"no bento churn:v1-x is stored; there are .*{trained.first_tag}"):
        rollback(settings, to="churn:v1-x", reason="", by="ada")
    assert rollback(settings, to="1", reason="", by="ada").served_tag == trained.first_tag
    assert rollback(settings, to="churn:v1-0ld0ld00", reason="slow", by="ada").served_tag == "churn:v1-0ld0ld00"
    assert state(settings)[:2] == (1, "churn:v1-0ld0ld00")


def test_an_attempt_of_tomorrow_is_not_waited_for(promotable: Copy, trained: Trained) -> None:
    """The clock of the job that was interrupted was ahead."""
    settings = promotable()
    history = History(connect(settings.database))
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    row = history.open(now=tomorrow, action="promote", from_version=1, from_tag=trained.first_tag, to_version=2,
                       to_tag=trained.second_tag, reason="", by="promote")  # fmt: skip
    history.close(row, now=tomorrow, result="interrupted", reason="Postgres went away")
    assert promote(settings).result == "promoted"


def test_pin_holds_a_candidate_back(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    assert pin(settings, reason="audit", by="ada").result == "idle"
    assert "pinned" in promote(settings).reason
    unpin(settings)
    assert promote(settings).to_version == 2


def test_another_holder_is_named_and_is_success(promotable: Copy) -> None:
    settings = promotable()
    with lease(settings, "promote"):
        result = promote(settings)
    assert (result.result, str(os.getpid()) in result.reason) == ("held", True)


def test_served_tag_changed_by_a_hand_is_pinned(promotable: Copy, trained: Trained) -> None:
    settings = promotable(promotion_mode="off")
    serving = LocalServing(settings)
    serving.set_served_tag(old=trained.first_tag, new=trained.second_tag, fence=serving.fence(), soak=timedelta(0))
    assert promote(settings).to_version == 2
    found = History(connect(settings.database)).pin()
    assert found is not None and found.bento_tag == trained.second_tag
    assert state(settings)[:2] == (2, trained.second_tag)


def test_a_database_older_than_what_serves_is_refused_until_adopted(promotable: Copy, trained: Trained) -> None:
    """A restored backup does not know the promotion that wrote the served tag: nothing moves until a person says so."""
    settings = promotable()
    with closing(sqlite3.connect(settings.home / "churn.db")) as now, closing(sqlite3.connect(":memory:")) as backup:
        now.backup(backup)
        promote(settings)
        backup.backup(now)
    with pytest.raises(PromotionFailed, match=r"knows promotions up to 1, but churn:v2-.* was written by promotion 2"):
        promote(settings)
    with connect(settings.database).begin() as connection:  # one built since is in no backup
        connection.execute(bentos.delete().where(bentos.c.tag == trained.second_tag))
    History(connect(settings.database)).set_pin(Pin(1, trained.first_tag, "of old", "ada", NOW))
    assert adopt(settings, by="ada") == trained.second_tag
    assert is_whole(connect(settings.database), trained.second_tag)
    assert promote(settings).result == "idle"
    assert state(settings)[:2] == (2, trained.second_tag)
    with pytest.raises(NothingToDo, match="nothing to adopt"):
        adopt(settings, by="ada")


def test_the_run_of_what_serves_is_asked_of_the_pods_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pods = tuple(Pod(name, f"http://{name}", TAG_1, name != "starting", "") for name in ("starting", "away", "here"))

    def ask(url: str) -> dict[str, str]:
        if url != "http://here/info":
            raise _WorldFault(f"{url} did not answer")
        return {"bento_tag": TAG_1, "run_id": "run1"}

    monkeypatch.setattr("jobs.pin.ask", ask)
    monkeypatch.setattr(LocalServing, "rollout", lambda _: Rollout(TAG_1, pods, True, False, None))
    serving = LocalServing.__new__(LocalServing)
    assert (_run_of(serving, TAG_1), _run_of(serving, TAG_2)) == ("run1", None)


def test_what_is_adopted_is_not_taken_for_another_run_that_got_its_number(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry was restored, too, and has given the number anew: that model was never judged as what serves."""
    settings = promotable()
    LocalServing(settings).set_served_tag(old=trained.first_tag, new="churn:v2-cccccccc", fence=7, soak=timedelta(0))
    with pytest.raises(PromotionFailed, match="was written by promotion 7"):
        promote(settings)
    monkeypatch.setattr("jobs.pin._run_of", lambda *_: "another-run")
    assert adopt(settings, by="ada") == "churn:v2-cccccccc"
    assert "`churn approve N` replaces it" in promote(settings).reason
    assert PRODUCTION not in Registry(settings).aliases()
    approve(settings, 2, by="ada", reason="")
    assert promote(settings).result == "promoted"
    assert state(settings)[:2] == (2, trained.second_tag)


def test_approve_leaves_the_candidate_alone_if_there_is_nothing_to_approve(promotable: Copy) -> None:
    settings = promotable()
    with pytest.raises(NothingToDo, match="version 1 is in production already"):
        approve(settings, 1, by="ada", reason="")
    with pytest.raises(NothingToDo, match="has no version 7; there are 1, 2"):
        approve(settings, 7, by="ada", reason="")
    assert Registry(settings).aliases() == {PRODUCTION: 1, CANDIDATE: 2}


def test_approve_refuses_what_the_gate_refused(promotable: Copy) -> None:
    settings = promotable()
    Registry(settings).set_tags(2, {"gate": "refused", "gate_reason": "worse"})
    with pytest.raises(NothingToDo, match="the gate refused version 2: worse"):
        approve(settings, 2, by="ada", reason="")


def test_old_archives_are_deleted_but_not_those_in_use(promotable: Copy, trained: Trained) -> None:
    settings = promotable(bentos_kept=2)
    engine = connect(settings.database)
    with engine.begin() as connection:
        for number in range(5):
            connection.execute(
                bentos.insert().values(
                    tag=f"churn:v{number}-00000000",
                    model_version=number,
                    run_id="",
                    sha256="",
                    archive=b"",
                    built_at=NOW - timedelta(days=1000 - number),
                )
            )
    promote(settings)
    assert bento_of(engine, trained.first_tag)
    assert bento_of(engine, trained.second_tag)
    assert not bento_of(engine, "churn:v0-00000000")


def test_looking_imports_nothing_heavy(promotable: Copy) -> None:
    """Which is what keeps `churn promote`, run each minute, under a second of CPU."""
    settings = promotable(promotion_mode="off")
    code = (
        "import sys, time; sys.argv = ['churn', 'promote']\n"
        "from jobs.cli import app\n"
        "try: app()\n"
        "except SystemExit as e: assert not e.code, e\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'mlflow', 'feast', 'bentoml', 'sklearn', 'pandas', 'evidently', 'numpy', 'alembic'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **as_environment(settings)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_folder_of_the_home_may_hold_spaces(tmp_path: Path) -> None:
    from tests.jobs.conftest import settings_for

    settings = settings_for(tmp_path / "a home with spaces")
    assert "no model yet" in promote(settings).reason
