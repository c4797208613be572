"""What a candidate would have answered: shares, shift, and who has to wait for it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from bentos.churn.model import Scorer
from jobs import pin
from jobs.database import connect, drift_checks, predictions
from jobs.package import extracted
from jobs.promote import promote
from jobs.registry import Registry
from jobs.replay import ENOUGH, Replay, compare, replay
from jobs.settings import Settings
from jobs.status import status
from tests.jobs.conftest import SECOND, Trained

Copy = Callable[..., Settings]


def rows_of(settings: Settings, count: int) -> list[dict[str, Any]]:
    """Features of real users, as the log has them."""
    from jobs import dataset

    frame = dataset.feature_frame(settings, SECOND).dropna().head(count)
    found: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return found


def log(settings: Settings, rows: list[dict[str, Any]], *, source: str = "client") -> None:
    values = [
        {
            "prediction_id": secrets.token_hex(16), "request_id": "r", "source": source, "predicted_at": datetime.now(UTC),
            "bento_tag": "churn:v1-00000000", "model_version": 1, "churn_probability": 0.5, "churn": False,
            "threshold": 0.5, "stale": False, "features": json.dumps(row),
        }
        for row in rows
    ]  # fmt: skip
    with connect(settings.database).begin() as connection:
        connection.execute(predictions.insert(), values)


def realised(settings: Settings, auc: float) -> None:
    now = datetime.now(UTC)
    with connect(settings.database).begin() as connection:
        connection.execute(
            drift_checks.insert().values(
                as_of=now, snapshot=now, model_version=1, share=0.0, drifted_columns="[]", dataset_drift=False,
                realised_auc=auc, decision="none", reason="", checked_at=now,
            )
        )  # fmt: skip


def test_a_model_beside_itself_changes_nothing(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    log(settings, rows_of(settings, 300))

    found = replay(settings, connect(settings.database), trained.first_tag, trained.first_tag)

    assert found == Replay(300)
    assert found.objections(settings) == []


def test_what_changes_is_counted(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    rows = rows_of(settings, 300)
    served, candidate = (Scorer(extracted(settings, tag)) for tag in (trained.first_tag, trained.second_tag))
    rows[0]["contract_type"] = None  # neither can answer that
    del rows[1]["monthly_fee"]

    found = compare(rows, served, candidate)

    was, would = (
        [bool(scorer.score(np.array([scorer.encode(row)], np.float32))[0] >= scorer.threshold) for row in rows[2:]]
        for scorer in (served, candidate)
    )
    to_churn = sum(new and not old for old, new in zip(was, would, strict=True))
    to_stay = sum(old and not new for old, new in zip(was, would, strict=True))
    assert (found.to_churn, found.to_stay, found.refused) == (to_churn, to_stay, 0)
    assert found.flipped == pytest.approx((to_churn + to_stay) / 298)
    assert 0 < found.shift < 1
    assert f"{to_churn} would become churn, {to_stay} cease to be" in str(found)


def test_requests_that_only_the_candidate_cannot_answer_count_as_decided_otherwise(
    promotable: Copy, trained: Trained
) -> None:
    settings = promotable()
    rows = rows_of(settings, 200)
    served, candidate = (Scorer(extracted(settings, trained.first_tag)) for _ in range(2))
    for row in rows[:50]:
        del row["ticket_avg_resolution_hrs_90d"]
    served_encode = served.encode

    def without_default(row: dict[str, Any]) -> list[float]:
        if "ticket_avg_resolution_hrs_90d" not in row:
            from bentos.churn.model import MissingFeatures

            raise MissingFeatures(["ticket_avg_resolution_hrs_90d"])
        return served_encode(row)

    candidate.encode = without_default  # type: ignore[assignment, method-assign]

    found = compare(rows, served, candidate)

    assert (found.refused, found.flipped) == (50, 0.25)
    assert "50 could not be answered" in str(found)


def test_a_few_requests_say_nothing(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    log(settings, rows_of(settings, ENOUGH - 1))
    log(settings, rows_of(settings, ENOUGH), source="probe")

    found = replay(settings, connect(settings.database), trained.first_tag, trained.second_tag)

    assert found == Replay(ENOUGH - 1)
    assert "too few" in str(found)


def test_a_candidate_that_would_decide_much_otherwise_waits_for_a_person(promotable: Copy, trained: Trained) -> None:
    settings = promotable(replay_max_flipped=0.01)
    log(settings, rows_of(settings, 300))
    realised(settings, 0.8)

    result = promote(settings)

    assert result.result == "idle"
    assert "candidate 2 waits for `churn approve 2`: of 300 logged requests" in result.reason
    assert "above replay_max_flipped, 1.0%" in result.reason
    assert result.served_tag == trained.first_tag
    assert Registry(settings).aliases() == {"production": 1, "candidate": 2}
    assert "waits for `churn approve 2`: of 300 logged" in status(settings)["waiting"]
    assert promote(settings).reason == result.reason, "it is not built or compared again"

    pin.approve(settings, 2, by="me", reason="they said yes")

    assert promote(settings).to_version == 2


@pytest.mark.parametrize("looser", [{"replay_max_flipped": 1, "replay_max_shift": 1}, {"replay_requests": 0}])
def test_what_is_held_is_looked_at_again_when_the_settings_change(
    promotable: Copy, trained: Trained, looser: dict[str, Any]
) -> None:
    settings = promotable(replay_max_flipped=0.01)
    log(settings, rows_of(settings, 300))
    realised(settings, 0.8)
    assert promote(settings).result == "idle"

    settings = settings.model_copy(update=looser)

    assert status(settings)["waiting"] is None
    assert promote(settings).to_version == 2


def test_a_dry_run_says_what_would_be_held_and_changes_nothing(promotable: Copy, trained: Trained) -> None:
    settings = promotable(replay_max_flipped=0.01)
    log(settings, rows_of(settings, 300))
    realised(settings, 0.8)

    result = promote(settings, dry_run=True)

    assert result.reason.startswith("would wait for `churn approve 2`: of 300 logged requests")
    version = Registry(settings).version(2)
    assert version is not None
    assert "held_by_replay" not in version.tags


@pytest.mark.parametrize("known", ["labels", "gate"])
def test_the_successor_of_a_model_that_guesses_does_not_wait(promotable: Copy, trained: Trained, known: str) -> None:
    """By the AUC that labels have shown, or, while drift has not seen them, by what the gate has measured."""
    settings = promotable(replay_max_flipped=0.01, champion_floor=0.55 if known == "labels" else 0.99)
    log(settings, rows_of(settings, 300))
    if known == "labels":
        realised(settings, 0.49)

    assert promote(settings).to_version == 2


def test_no_requests_wanted_none_replayed(promotable: Copy) -> None:
    settings = promotable(replay_requests=0, replay_max_flipped=0, replay_max_shift=0)
    with connect(settings.database).connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(predictions)).scalar() == 0

    assert promote(settings).to_version == 2
