"""The online store holds the newest snapshot, again after it was wiped, and corrected data replaces the old."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from feature_repo.columns import POPULATION
from jobs import dataset
from jobs.materialize import SENTINEL, OnlineMismatch, materialize, online_as_of
from jobs.retrain import retrain
from jobs.settings import Settings
from jobs.snapshots import SnapshotDamaged, Snapshots, instant
from tests.jobs.conftest import FIRST, FIRST_KNOWN, SECOND, settings_for


def online_rows(settings: Settings) -> dict[str, list[tuple[object, ...]]]:
    """All rows of the online store, by table."""
    with closing(sqlite3.connect(settings.online_store.removeprefix("sqlite:///"))) as connection:
        names = [n for (n,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        query = 'SELECT entity_key, feature_name, value, event_ts FROM "{}" ORDER BY 1, 2'
        return {name: connection.execute(query.format(name)).fetchall() for name in names}


def execute(settings: Settings, sql: str) -> None:
    with closing(sqlite3.connect(settings.online_store.removeprefix("sqlite:///"))) as connection:
        connection.execute(sql)
        connection.commit()


def monthly_fee(settings: Settings, user: str) -> float:
    store = dataset.feature_store(settings)
    found = store.get_online_features(["subscriptions_profile:monthly_fee"], [{"user_id": user}]).to_dict()
    return float(found["monthly_fee"][0])


def watch_hours(settings: Settings, user: str) -> float | None:
    store = dataset.feature_store(settings)
    found = store.get_online_features(["usage_agg_30d:watch_hours_30d"], [{"user_id": user}]).to_dict()
    value: float | None = found["watch_hours_30d"][0]
    return value


def test_a_skipped_month_leaves_older_rows_online(home: Path) -> None:
    """Users absent from the newest usage table keep their row of two months before: stale, and no mismatch."""
    from datetime import date

    settings = settings_for(home)
    materialize(settings, as_of=instant(FIRST))
    snapshots = Snapshots(settings.snapshots)
    tables = {name: snapshots.read(name, SECOND) for name in snapshots.tables(SECOND) if name != "labels"}
    tables["usage_agg_30d"] = tables["usage_agg_30d"].iloc[1500:]
    snapshots.write(date(2024, 3, 31), tables, {})
    shutil.rmtree(snapshots.root / SECOND.isoformat())
    found = materialize(settings, as_of=instant(date(2024, 3, 31)))
    assert found.result == "materialized"


@pytest.mark.parametrize("job", [materialize, retrain])
def test_a_snapshot_that_changed_since_it_was_ingested_is_refused(home: Path, job: Callable[..., object]) -> None:
    """A disk's fault is not a correction: nothing is taken out of the online store, and nothing is trained."""
    settings = settings_for(home)
    path = settings.snapshots / str(FIRST) / "usage_agg_30d.parquet"
    pd.read_parquet(path).iloc[1:].to_parquet(path)
    with pytest.raises(SnapshotDamaged, match=f"snapshot {FIRST} is not what was ingested.*`churn ingest DIR --as-of"):
        job(settings, as_of=FIRST_KNOWN if job is retrain else instant(FIRST))


def test_the_story_of_a_store(home: Path) -> None:
    """One store through a month's life, because each materialization costs seconds."""
    settings = settings_for(home)
    first = materialize(settings, as_of=instant(FIRST))
    assert (first.result, first.full, first.users, first.compared) == ("materialized", True, 3000, 200)

    second = materialize(settings, as_of=instant(SECOND))
    assert (second.full, second.start) == (False, instant(FIRST)), "the window begins where the store ends"
    rows = online_rows(settings)
    again = materialize(settings, as_of=instant(SECOND))
    assert again.result == "materialized"
    assert online_rows(settings) == rows, "running it twice changes nothing"

    older = materialize(settings, as_of=instant(FIRST))
    assert older.result == "newer_online"
    assert online_rows(settings) == rows, "an older snapshot does not replace a newer one"

    snapshots = Snapshots(settings.snapshots)
    user = str(snapshots.read(POPULATION, SECOND).index[0])
    tables = {name: snapshots.read(name, SECOND) for name in snapshots.tables(SECOND)}
    tables[POPULATION].loc[user, "monthly_fee"] = 77.25
    snapshots.write(SECOND, tables, {})
    materialize(settings, as_of=instant(SECOND))
    assert monthly_fee(settings, user) == 77.25, "corrected data for the same day replaces the old"

    gone, *others = tables["usage_agg_30d"].index[:100]
    tables["usage_agg_30d"] = tables["usage_agg_30d"].drop(index=[gone, *others])
    snapshots.write(SECOND, tables, {})
    materialize(settings, as_of=instant(SECOND))
    before = snapshots.read("usage_agg_30d", FIRST)["watch_hours_30d"].get(gone)
    assert watch_hours(settings, str(gone)) == before, (
        "what a correction takes out is forgotten, the month before stays"
    )

    execute(settings, f"DELETE FROM {settings.feast_project}_subscriptions_profile WHERE rowid % 2")
    halved = materialize(settings, as_of=instant(SECOND))
    assert halved.full, "half of the keys are gone: everything is written again"

    Path(settings.online_store.removeprefix("sqlite:///")).unlink()
    wiped = materialize(settings, as_of=instant(SECOND))
    assert wiped.full
    assert monthly_fee(settings, user) == 77.25, "a wiped store is filled again"
    assert online_as_of(dataset.feature_store(settings)) == instant(SECOND)


def test_dry_run_writes_nothing(home: Path) -> None:
    settings = settings_for(home)
    found = materialize(settings, as_of=instant(SECOND), dry_run=True)
    assert (found.result, found.full) == ("dry_run", True)
    assert online_as_of(dataset.feature_store(settings)) is None


def test_a_difference_between_online_and_offline_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value online than was written: named with its user, feature and both values."""
    settings = settings_for(home)
    truth = dataset.feature_frame

    def other(settings: Settings, day: object) -> object:
        return truth(settings, day).assign(monthly_fee=1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset, "feature_frame", other)
    with pytest.raises(OnlineMismatch, match=r"monthly_fee of user .* online and .*1\.0.* offline; 200 of 200"):
        materialize(settings, as_of=instant(SECOND))


def test_without_a_snapshot_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no snapshot on or before 2024-01-31 was ingested; `churn ingest"):
        materialize(settings_for(tmp_path), as_of=instant(FIRST))


def test_the_sentinel_is_no_user() -> None:
    """Ingest refuses ids that begin with two underscores, so that no user can be taken for the sentinel."""
    assert SENTINEL.startswith("__")
