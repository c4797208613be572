"""What is kept, and what is deleted, of predictions and scores."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobs import retention
from jobs.database import connect, predictions, scores
from jobs.settings import Settings, SettingsError, load_settings
from tests import stores

NOW = datetime(2026, 11, 21, 9, tzinfo=UTC)
AGES = (0, 89, 90, 91, 400)  # days


def filled(url: str, **changes: object) -> Settings:
    settings = load_settings(database_url=url, **changes)
    with connect(settings.database).begin() as connection:
        for age in AGES:
            at = NOW - timedelta(days=age)
            row = {"bento_tag": "churn:v1-0", "model_version": 1, "churn_probability": 0.5, "churn": True}
            about = {"request_id": "r", "source": "client", "threshold": 0.5, "stale": False, "features": "{}"}
            connection.execute(predictions.insert().values(prediction_id=f"p{age}", predicted_at=at, **row, **about))
            connection.execute(scores.insert().values(as_of=at, user_id="u", **row))
    return settings


def left(settings: Settings) -> tuple[list[str], int]:
    with connect(settings.database).connect() as connection:
        ids = connection.execute(sa.select(predictions.c.prediction_id).order_by(predictions.c.predicted_at.desc()))
        return list(ids.scalars()), connection.execute(sa.select(sa.func.count()).select_from(scores)).scalar_one()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'churn.db'}"
    server: stores.Server = request.getfixturevalue("postgres_server")
    with sa.create_engine(server.url.replace("postgresql://", "postgresql+psycopg://")).begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA IF EXISTS kept CASCADE")
    return f"{server.url}?options=-csearch_path%3Dkept"


def test_what_is_older_goes_and_the_rest_stays(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 1)  # more than one transaction
    settings = filled(url, predictions_kept="90d")

    assert retention.prune(settings, now=NOW) == 4
    assert left(settings) == (["p0", "p89", "p90"], 3)
    assert retention.prune(settings, now=NOW) == 0


def test_nothing_is_deleted_unless_asked_for(url: str) -> None:
    settings = filled(url)

    assert retention.prune(settings, now=NOW) == 0
    assert len(left(settings)[0]) == len(AGES)


def test_less_than_drift_looks_back_on_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"CHURN_PREDICTIONS_KEPT is .*; expected 0d, which is for ever, or at least 30d"
    ):
        load_settings(predictions_kept="29d")
