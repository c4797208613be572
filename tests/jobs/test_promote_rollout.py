"""Promotion against a rollout that a test dictates: whose fault a failure is, how long a new tag soaks, who is told.

The rollout is scripted, all else is real: registry, database, bentos. The Deployment itself is in `test_cluster.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs.database import connect
from jobs.history import History, Pin
from jobs.package import bento_of
from jobs.promote import PromotionFailed, promote
from jobs.registry import CANDIDATE, PRODUCTION, Registry, RegistryError
from jobs.serving import Pod, Rollout
from jobs.settings import Settings
from tests.jobs.conftest import Trained, settings_for

Copy = Callable[..., Settings]


class Scripted:
    """A Serving whose rollouts of a tag are given, the last one again and again; elsewhere nothing serves."""

    url = "http://127.0.0.1:9"

    def __init__(self, tag: str | None, **rollouts: list[Rollout]) -> None:
        self.tag, self.fence_, self.rollouts = tag, 0, rollouts
        self.soaks: list[timedelta] = []
        self.told: list[tuple[str, bool]] = []
        self.in_use: set[str] = set()

    def served_tag(self) -> str | None:
        return self.tag

    def fence(self) -> int:
        return self.fence_

    def set_served_tag(self, *, old: str | None, new: str | None, fence: int, soak: timedelta) -> None:
        assert old == self.tag
        self.tag, self.fence_ = new, fence
        self.soaks.append(soak)

    def rollout(self) -> Rollout:
        version = (self.tag or "").partition(":")[2].partition("-")[0]
        script = self.rollouts.get(version)
        if not script:
            return Rollout(self.tag, (), running=False, settled=False, failure=None)
        found = script[0] if len(script) == 1 else script.pop(0)
        return replace(found, served_tag=self.tag)

    def tags_in_use(self) -> set[str]:
        return self.in_use

    def tell(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.told.append((reason, warning))


def waiting(message: str = "starting", *, template: int = 1) -> Rollout:
    pod = Pod("churn-1", "", "", ready=False, message=message)
    return Rollout("", (pod,), running=True, settled=False, failure=None, template=template)


def failing(trained: Trained, failure: str) -> Rollout:
    """An old pod serves, and new ones of the same bento fail."""
    serves = Pod("churn-0", "", trained.first_tag, ready=True, message="")
    return replace(waiting(), pods=(serves,), failure=failure)


@pytest.fixture
def serving(trained: Trained) -> Scripted:
    return Scripted(trained.first_tag)


def marks(settings: Settings) -> dict[str, str]:
    version = Registry(settings).version(2)
    assert version is not None
    return dict(version.tags)


def test_what_the_world_did_is_not_the_models_fault(promotable: Copy, serving: Scripted, trained: Trained) -> None:
    settings = promotable()
    pull = replace(waiting(), failure="churn-1: ImagePullBackOff", worlds_fault=True)
    serving.rollouts["v2"] = [waiting(), pull]

    with pytest.raises(PromotionFailed, match="ImagePullBackOff") as failed:
        promote(settings, serving=serving)

    assert failed.value.interrupted
    assert (serving.tag, Registry(settings).aliases()) == (trained.first_tag, {PRODUCTION: 1, CANDIDATE: 2})
    assert "promotion_failed" not in marks(settings)
    assert serving.told == [("PromotionInterrupted", True)]
    assert "next try at" in promote(settings, serving=serving).reason


def test_a_bento_that_crashes_is_marked_and_not_tried_again(
    promotable: Copy, serving: Scripted, trained: Trained
) -> None:
    settings = promotable()
    serving.rollouts["v2"] = [waiting(), replace(waiting(), failure="churn-1 crashes: exit code 1")]

    with pytest.raises(PromotionFailed, match="crashes") as failed:
        promote(settings, serving=serving)

    assert not failed.value.interrupted
    assert (serving.tag, Registry(settings).aliases().get(PRODUCTION)) == (trained.first_tag, 1)
    assert "crashes" in marks(settings)["promotion_failed"]
    assert serving.told == [("PromotionFailed", True)]
    assert promote(settings, serving=serving).result == "idle"


def test_a_failure_after_somebody_changed_the_deployment_is_the_worlds(promotable: Copy, serving: Scripted) -> None:
    """An upgrade of the release with a broken image, in the middle of a promotion."""
    settings = promotable()
    serving.rollouts["v2"] = [
        waiting(template=4),
        replace(waiting(template=5), failure="churn-1 crashes: exit code 1"),
    ]

    with pytest.raises(PromotionFailed, match="changed by somebody else meanwhile: churn-1 crashes") as failed:
        promote(settings, serving=serving)

    assert failed.value.interrupted
    assert "promotion_failed" not in marks(settings)


def test_new_pods_that_fail_with_what_serves_already_are_not_the_next_models_fault(
    promotable: Copy, serving: Scripted, trained: Trained
) -> None:
    """An upgrade gave them too little memory: the old ones still serve, and any bento would crash in new ones."""
    settings = promotable()
    serving.rollouts["v1"] = [failing(trained, "churn-1 crashes: OOMKilled")]

    with pytest.raises(PromotionFailed, match=r"new pods fail already with .*OOMKilled") as failed:
        promote(settings, serving=serving)

    assert failed.value.interrupted
    assert (serving.tag, serving.soaks) == (trained.first_tag, [])
    assert "promotion_failed" not in marks(settings)


def test_what_a_person_wants_is_not_held_up_by_pods_that_fail(
    promotable: Copy, serving: Scripted, trained: Trained
) -> None:
    """New pods of what serves crash, and somebody moves the alias: that may be the remedy."""
    settings = promotable()
    serving.rollouts["v1"] = [failing(trained, "churn-1 crashes: exit code 1")]
    Registry(settings).set_alias(PRODUCTION, 2)

    assert promote(settings, serving=serving).to_version == 2
    assert serving.tag == trained.second_tag


@pytest.mark.parametrize("action", ["follow", "pin"])
def test_what_failed_before_and_fails_still_is_no_models_fault(
    promotable: Copy, serving: Scripted, trained: Trained, action: str
) -> None:
    """Too little memory for new pods, whichever bento: a pin stays, a version is not marked, and it is tried again."""
    settings = promotable()
    crash = "churn-1 crashes: OOMKilled"
    serving.rollouts["v1"] = [failing(trained, crash)]
    serving.rollouts["v2"] = [replace(waiting(), failure=crash)]
    history = History(connect(settings.database))
    if action == "pin":
        history.set_pin(Pin(2, trained.second_tag, "doubts", "ada", datetime.now(UTC)))
    else:
        Registry(settings).set_alias(PRODUCTION, 2)

    with pytest.raises(PromotionFailed, match="OOMKilled; they failed before, too") as failed:
        promote(settings, serving=serving)

    assert failed.value.interrupted
    assert serving.tag == trained.first_tag
    assert "promotion_failed" not in marks(settings)
    assert (history.pin() is not None) is (action == "pin")
    assert history.rows()[0].result == "interrupted"


def test_what_failed_once_and_serves_now_is_not_marked_any_more(promotable: Copy, serving: Scripted) -> None:
    settings = promotable()
    Registry(settings).set_tags(2, {"promotion_failed": "crashes"})
    Registry(settings).set_alias(PRODUCTION, 2)  # somebody knows better

    promote(settings, serving=serving)

    assert "promotion_failed" not in marks(settings)


def test_a_registry_lost_at_the_very_end_undoes_nothing(
    promotable: Copy, serving: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The aliases are right and the pods serve; only the note in the registry is missing."""
    settings = promotable()
    real = Registry.set_tags

    def lost(self: Registry, version: int, tags: Mapping[str, str | None]) -> None:
        if "served_since" in tags:
            raise RegistryError("MLflow did not answer")
        real(self, version, tags)

    monkeypatch.setattr(Registry, "set_tags", lost)

    assert promote(settings, serving=serving).result == "promoted"

    assert Registry(settings).aliases()[PRODUCTION] == 2
    assert promote(settings, serving=serving).result == "idle"


def test_a_pod_that_was_never_started_is_not_to_blame(promotable: Copy, serving: Scripted) -> None:
    """A quota, a full node: nobody has seen the model fail."""
    settings = promotable().model_copy(update={"promotion_deadline": timedelta(seconds=1)})
    serving.rollouts["v2"] = [waiting("not scheduled")]

    with pytest.raises(PromotionFailed, match="not ready within 1 s; last seen: churn-1  not scheduled") as failed:
        promote(settings, serving=serving)

    assert failed.value.interrupted


def test_a_new_tag_soaks_and_one_that_served_before_does_not(promotable: Copy, serving: Scripted) -> None:
    settings = promotable(promotion_soak=timedelta(seconds=7))
    assert promote(settings, serving=serving).to_version == 2
    Registry(settings).set_alias(PRODUCTION, 1)
    assert promote(settings, serving=serving).to_version == 1

    assert serving.soaks == [timedelta(seconds=7), timedelta(0)]
    assert serving.told == [("Promoted", False), ("Followed", False)]


def test_archives_that_a_replicaset_names_are_kept(promotable: Copy, serving: Scripted, trained: Trained) -> None:
    settings = promotable(bentos_kept=2)
    engine = connect(settings.database)
    with engine.begin() as connection:
        for number in range(3):  # older than the two in use
            connection.exec_driver_sql(
                "INSERT INTO bentos (tag, model_version, run_id, sha256, archive, built_at) "
                "SELECT ?, model_version, run_id, sha256, archive, ? FROM bentos WHERE tag = ?",
                (f"churn:v0-{number}", f"2020-01-0{number + 1}T00:00:00.000000+00:00", trained.first_tag),
            )
    serving.in_use = {"churn:v0-0"}

    promote(settings, serving=serving)

    assert [bento_of(engine, f"churn:v0-{number}") is not None for number in range(3)] == [True, False, False]


def test_before_the_first_model_a_registry_that_is_away_is_no_failure(promotable: Copy, tmp_path: Path) -> None:
    """`helm install` starts everything at once, and promote runs each minute."""
    nowhere = "http://127.0.0.1:9"
    assert promote(settings_for(tmp_path / "new", mlflow_url=nowhere), serving=Scripted(None)).result == "idle"

    settings = promotable(mlflow_url=nowhere)
    assert History(connect(settings.database)).last() is not None
    with pytest.raises(Exception, match="MLflow did not answer"):
        promote(settings, serving=Scripted(None))
