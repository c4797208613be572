"""Promotion with real pods: `churn serve` runs, bentos are real, some of them broken, and a client asks."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from jobs.database import bentos, connect
from jobs.demo import Client
from jobs.history import History
from jobs.pin import rollback
from jobs.promote import PromoteResult, PromotionFailed, promote
from jobs.registry import CANDIDATE, PREVIOUS, PRODUCTION, Registry
from jobs.serving import LocalServing
from jobs.settings import Settings
from jobs.snapshots import Snapshots
from jobs.status import status
from jobs.supervisor import as_environment, start_supervisor
from tests.broken_bentos import BREAKS, WORSE, Change, changed
from tests.conftest import REPOSITORY
from tests.jobs.conftest import SECOND, SECOND_KNOWN, Trained

Copy = Callable[..., Settings]


def rewrite(settings: Settings, tag: str, name: str, change: Change) -> None:
    """Change one file in a stored archive, its checksum with it: what a bad build would have stored."""
    engine = connect(settings.database)
    with engine.begin() as connection:
        old = connection.execute(sa.select(bentos.c.archive).where(bentos.c.tag == tag)).scalar_one()
        archive = changed(old, {name: change})
        sha256 = hashlib.sha256(archive).hexdigest()
        connection.execute(bentos.update().where(bentos.c.tag == tag).values(archive=archive, sha256=sha256))


@contextmanager
def served(settings: Settings) -> Iterator[Client]:
    """`churn serve` with version 1 in front, online features, and a client that asks throughout."""
    from jobs.materialize import materialize

    materialize(settings, as_of=SECOND_KNOWN)
    with start_supervisor(settings, {"CHURN_DRAIN_SECONDS": "1"}) as supervisor:
        until(lambda: LocalServing(settings).rollout().settled, lambda: LocalServing(settings).rollout())
        users = Snapshots(settings.snapshots).read("subscriptions", SECOND).index.tolist()
        with Client(supervisor.url, users) as client:
            until(lambda: client.answers[1] > 20, lambda: client)
            yield client


def until(holds: Callable[[], bool], seen: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s; last seen: {seen()}"
        time.sleep(0.05)


def put_back(settings: Settings, trained: Trained, client: Client) -> None:
    """Version 1 is served, named and asked; no request failed and none was answered by another."""
    assert LocalServing(settings).served_tag() == trained.first_tag
    assert Registry(settings).aliases()[PRODUCTION] == 1
    assert History(connect(settings.database)).open_row() is None
    count = client.answers[1]
    until(lambda: client.answers[1] > count + 20, lambda: client)
    assert (client.failures, client.order) == ([], [1])


@pytest.mark.parametrize("reason", BREAKS)
def test_bad_bento_is_put_back_and_marked(promotable: Copy, trained: Trained, reason: str) -> None:
    settings = promotable(promotion_deadline="15s")
    rewrite(settings, trained.second_tag, *BREAKS[reason])
    with served(settings) as client:
        with pytest.raises(PromotionFailed, match=reason):
            promote(settings)
        put_back(settings, trained, client)
        assert reason in Registry(settings).version(2).tags["promotion_failed"]  # type: ignore[union-attr]
        last = status(settings)["last_promotion"]
        assert (last["result"], last["from"], last["to"]) == ("failed", 1, 2)
        assert reason in last["reason"]
        again = promote(settings)
        assert again.result == "idle", "it is not tried again"


@pytest.mark.parametrize("reason", WORSE)
def test_pods_that_do_worse_while_they_soak_go(promotable: Copy, trained: Trained, reason: str) -> None:
    """Golden rows are right, clients are not served as before: old pods are all still there, and stay."""
    settings = promotable(promotion_soak="60s")
    rewrite(settings, trained.second_tag, "src/bentos/__init__.py", WORSE[reason])
    with served(settings) as client, ExitStack() as others:
        for _ in range(5):
            others.enter_context(Client(client.url, client.users))
        with pytest.raises(PromotionFailed, match=reason):
            promote(settings)
        assert LocalServing(settings).served_tag() == trained.first_tag
        assert Registry(settings).aliases()[PRODUCTION] == 1
        until(lambda: LocalServing(settings).rollout().settled, lambda: LocalServing(settings).rollout())
        assert {pod.bento_tag for pod in LocalServing(settings).rollout().pods} == {trained.first_tag}
        failed, count = len(client.failures), client.answers[1]
        until(lambda: client.answers[1] > count + 20, lambda: client)
        assert len(client.failures) == failed, "none fails when it has gone"
        assert reason in Registry(settings).version(2).tags["promotion_failed"]  # type: ignore[union-attr]


def test_first_model_that_cannot_serve_leaves_nothing(promotable: Copy, trained: Trained) -> None:
    """Without an earlier tag to go back to, the wish is taken back and the alias dropped."""
    settings = promotable()
    engine = connect(settings.database)
    from jobs.database import promotions

    with engine.begin() as connection:
        connection.execute(promotions.delete())
    (settings.home / "serving" / "desired.json").unlink()
    registry = Registry(settings)
    registry.set_tags(1, {"promoted_at": None})
    registry.drop_alias(PRODUCTION)
    registry.set_alias(CANDIDATE, 1)
    rewrite(settings, trained.first_tag, *BREAKS["golden rows differ"])
    with start_supervisor(settings) as supervisor:
        with pytest.raises(PromotionFailed, match="golden rows differ"):
            promote(settings)
        assert LocalServing(settings).served_tag() is None
        assert PRODUCTION not in registry.aliases()
        until(lambda: LocalServing(settings).rollout().pods == (), lambda: LocalServing(settings).rollout())
        assert httpx.get(f"{supervisor.url}/info").status_code == 503


@pytest.mark.parametrize("step", ["promote.patched", "promote.settled", "promote.probed"])
def test_killed_while_pods_change_the_next_run_ends_it(promotable: Copy, trained: Trained, step: str) -> None:
    settings = promotable()
    with served(settings) as client:
        killed = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "promote"],
            env={**os.environ, **as_environment(settings), "CHURN_FAILPOINT": f"{step}=exit"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert killed.returncode == 137, killed.stderr
        assert promote(settings).result == "promoted"
        assert Registry(settings).aliases() == {PRODUCTION: 2, PREVIOUS: 1}
        until(lambda: client.answers[2] > 20, lambda: client)
    assert client.failures == []
    assert (client.order[0], client.order[-1], set(client.order)) == (1, 2, {1, 2})
    assert [row.result for row in History(connect(settings.database)).rows()] == ["promoted", "promoted"]


def test_rollback_in_the_middle_of_a_promotion(promotable: Copy, trained: Trained) -> None:
    """The pin is seen within seconds, the promotion yields, and version 1 never stops answering."""
    settings = promotable(promotion_deadline="120s")
    rewrite(settings, trained.second_tag, *BREAKS["not ready within"])
    results: list[PromoteResult | Exception] = []

    def run() -> None:
        try:
            results.append(promote(settings))
        except Exception as error:
            results.append(error)

    with served(settings) as client:
        promotion = threading.Thread(target=run)
        promotion.start()
        serving = LocalServing(settings)
        until(lambda: serving.served_tag() == trained.second_tag, serving.desired)
        began = time.monotonic()
        result = rollback(settings, reason="doubts", by="ada")
        took = time.monotonic() - began
        promotion.join(timeout=30)
        assert result.to_version == 1 or "pinned" in result.reason
        put_back(settings, trained, client)
    assert took < 15
    assert len(results) == 1 and not isinstance(results[0], Exception), results
    assert "rolled_back" in Registry(settings).version(2).tags, "unpinned, it does not return by itself"  # type: ignore[union-attr]


def test_serving_code_that_changed_is_built_anew(
    promotable: Copy, trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same model version under a new tag, guarded like any promotion."""
    from bentos.churn import packaging

    settings = promotable(promotion_mode="manual")
    code = Path(shutil.copytree(REPOSITORY / "bentos", tmp_path / "bentos")) / "churn"
    with (code / "metrics.py").open("a") as file:
        file.write("\n# a newer release\n")
    monkeypatch.setattr(packaging, "_CODE", code)
    with served(settings) as client:
        result = promote(settings)
        assert (result.result, result.from_version, result.to_version) == ("promoted", 1, 1)
        assert result.served_tag != trained.first_tag
        assert promote(settings).result == "idle"
    assert client.failures == []
