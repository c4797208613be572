"""Where a prediction came from, from the log, the record of promotions and the registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobs.database import bentos, connect, models, predictions
from jobs.explain import UnknownRequest, explain, lines
from jobs.promote import promote
from jobs.settings import Settings
from tests.jobs.conftest import FIRST, Trained

Copy = Callable[..., Settings]


def answered(settings: Settings, tag: str, **changes: Any) -> None:
    """An answer in the log, as the service's shipper writes it."""
    row = {
        "prediction_id": "p1",
        "request_id": "r1",
        "user_id": "0001-AAAAA",
        "source": "client",
        "predicted_at": datetime.now(UTC),
        "bento_tag": tag,
        "model_version": int(tag.split(":v")[1].split("-", maxsplit=1)[0]),
        "churn_probability": 0.25,
        "churn": False,
        "threshold": 0.33,
        "features_as_of": (datetime.now(UTC) - timedelta(days=3)).isoformat(),
        "stale": False,
        "features": json.dumps({"contract": "One year", "watch_hours_30d": 12.5}),
    }
    with connect(settings.database).begin() as connection:
        connection.execute(predictions.insert().values({**row, **changes}))


def test_it_names_bento_promotion_training_gate_and_features(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    answered(settings, trained.first_tag)

    (found,) = explain(settings, "r1")

    assert found.prediction["bento_tag"] == trained.first_tag
    assert found.promotion is not None and found.promotion["to_version"] == 1
    assert (found.training["trained_as_of"], found.training["gate"]) == ("2024-01-31", "passed")
    assert found.features == {"contract": "One year", "watch_hours_30d": 12.5}
    assert found.features_age_days == pytest.approx(3, abs=0.01)
    shown = dict(lines(found))
    assert shown["score"] == "0.250000, threshold 0.330000: stays"
    assert " UTC by promote (promote): " in shown["promoted"]
    assert "on the snapshot of 2024-01-31" in shown["trained"]
    assert shown["  contract"] == "One year"


def test_a_prediction_is_explained_by_the_promotion_that_served_it_then(promotable: Copy, trained: Trained) -> None:
    """What serves now says nothing about an answer of yesterday."""
    settings = promotable()
    answered(settings, trained.first_tag)
    promote(settings)
    answered(settings, trained.second_tag, prediction_id="p2", request_id="r2")

    assert [found.promotion and found.promotion["to_version"] for found in explain(settings, "p1")] == [1]
    assert [found.promotion and found.promotion["to_version"] for found in explain(settings, "p2")] == [2]


def test_every_user_of_a_request_is_explained(promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    for number in (2, 1):
        answered(settings, trained.first_tag, prediction_id=f"p{number}", user_id=f"000{number}")

    assert [found.prediction["user_id"] for found in explain(settings, "r1")] == ["0001", "0002"]


def test_without_a_registry_its_part_is_what_retrain_recorded(promotable: Copy, trained: Trained) -> None:
    settings = promotable(mlflow_url="http://127.0.0.1:9")
    answered(settings, trained.first_tag, features_as_of=None, user_id=None)

    (found,) = explain(settings, "r1")

    shown = dict(lines(found))
    recorded = found.training["data_fingerprint"]
    assert shown["trained"] == f"a model on the snapshot of {FIRST:%Y-%m-%d}, data {recorded[:12]}"
    assert len(recorded) == 64
    assert shown["gate"] == "passed"
    assert shown["algorithm, gate reason"].startswith("not known: MLflow did not answer")
    assert "features as of" not in shown
    assert shown["user"].startswith("none: the features came with the request")


def test_a_registry_that_began_again_is_not_asked_about_a_version_of_the_old_one(
    promotable: Copy, trained: Trained
) -> None:
    """Its version 1 is another run: what served here was made of a run that only our own tables know."""
    settings = promotable()
    answered(settings, trained.first_tag)
    with connect(settings.database).begin() as connection:
        (run,) = connection.execute(bentos.select().where(bentos.c.tag == trained.first_tag)).mappings()
        connection.execute(models.update().where(models.c.run_id == run["run_id"]).values(run_id="elsewhere"))
        connection.execute(bentos.update().where(bentos.c.tag == trained.first_tag).values(run_id="elsewhere"))

    (found,) = explain(settings, "r1")

    assert found.training["run_id"] == "elsewhere"
    assert found.training_missing == "the model registry has no version 1 of that run"


def test_without_registry_and_record_the_rest_is_told(promotable: Copy, trained: Trained) -> None:
    settings = promotable(mlflow_url="http://127.0.0.1:9")
    answered(settings, trained.first_tag)
    with connect(settings.database).begin() as connection:
        connection.execute(models.delete())

    (found,) = explain(settings, "r1")

    assert dict(lines(found))["trained"].startswith("not known: MLflow did not answer")


def test_an_unknown_request_says_what_was_looked_for(promotable: Copy) -> None:
    with pytest.raises(UnknownRequest, match="'nobody' is no request_id and no prediction_id in the log of churn"):
        explain(promotable(), "nobody")
