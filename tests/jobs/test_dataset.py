"""Nothing that was not known at an instant may reach a frame or a training set of it."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from feature_repo.columns import FEATURE_TABLES
from jobs import dataset
from jobs.retrain import retrain
from jobs.snapshots import Snapshots, instant
from tests.jobs.conftest import FIRST, FIRST_KNOWN, SECOND, SECOND_KNOWN, settings_for

DAY = timedelta(days=1)


def test_features_are_those_of_the_feature_service_in_the_order_of_the_columns(home: Path) -> None:
    names = [feature.name for feature in dataset.features(settings_for(home))]
    assert names == [column.name for table in FEATURE_TABLES for column in table.columns]
    assert len(names) == 16


def test_every_user_of_the_population_has_a_row(home: Path) -> None:
    """Also one without usage, whose features are missing and not dropped."""
    settings = settings_for(home)
    snapshots = Snapshots(settings.snapshots)
    tables = {name: snapshots.read(name, FIRST) for name in snapshots.tables(FIRST)}
    gone = tables["usage_agg_30d"].index[3]
    tables["usage_agg_30d"] = tables["usage_agg_30d"].drop(index=gone)
    snapshots.write(FIRST, tables, {})
    frame = dataset.feature_frame(settings, FIRST)
    assert len(frame) == 3000
    assert np.isnan(frame.loc[gone, "watch_hours_30d"])
    assert frame.drop(index=gone).notna().all(axis=None)


def test_frame_of_a_snapshot_does_not_see_the_next(home: Path) -> None:
    settings = settings_for(home)
    before = dataset.feature_frame(settings, FIRST)
    expected = from_files(settings.snapshots, FIRST)[before.columns]
    pd.testing.assert_frame_equal(before, expected, check_index_type=False)
    after = dataset.feature_frame(settings, SECOND)
    assert not before["rebuffer_events_7d"].equals(after["rebuffer_events_7d"].reindex(before.index))


def from_files(root: Path, day: date) -> pd.DataFrame:
    """The features of a snapshot read from its files, without Feast."""
    snapshots = Snapshots(root)
    plan = [c for table in FEATURE_TABLES for c in table.columns]
    joined = pd.concat([snapshots.read(table.name, day) for table in FEATURE_TABLES], axis=1)
    columns = {c.name: joined[c.name].astype(object if c.kind == "category" else "float64") for c in plan}
    return pd.DataFrame(columns, index=joined.index)


def test_labels_are_known_a_horizon_after_the_snapshot(home: Path) -> None:
    """Whatever files lie in the folder: the labels of both snapshots are there from the beginning."""
    settings = settings_for(home)
    known = dataset.known_at(settings, FIRST)
    assert known == instant(FIRST + timedelta(days=30))
    assert dataset.training_days(settings, known - timedelta(seconds=1)) == ()
    assert dataset.training_days(settings, known) == (FIRST,)
    assert dataset.training_days(settings, SECOND_KNOWN) == (SECOND,)


def plant_answers(home: Path, planted: date) -> None:
    """Put the labels of the first snapshot into features of the day `planted`."""
    snapshots = Snapshots(settings_for(home).snapshots)
    answers = snapshots.read("labels", FIRST)["churn_label"]
    tables = {name: snapshots.read(name, FIRST) for name in snapshots.tables(FIRST) if name != "labels"}
    tables["payments_agg_90d"]["failed_payments_90d"] = answers.astype("Int64") * 50
    tables["usage_agg_30d"]["watch_hours_30d"] = answers.astype(float) * 500
    snapshots.write(planted, tables, {})


@pytest.mark.parametrize("days_later", [1, 29, 400], ids=["next day", "before the labels", "a year later"])
def test_feature_rows_after_the_snapshot_do_not_reach_training(home: Path, days_later: int) -> None:
    """A planted row that gives the answer away, dated after the snapshot, leaves data and model as they were."""
    settings = settings_for(home)
    clean = dataset.training_set(settings, (FIRST,))
    plant_answers(home, FIRST + days_later * DAY)
    planted = dataset.training_set(settings, (FIRST,))
    assert planted.fingerprint == clean.fingerprint
    pd.testing.assert_frame_equal(planted.features, clean.features)


def test_a_row_at_the_snapshot_would_have_been_seen(home: Path) -> None:
    """The same answers, planted on the day itself, do change the training set: the test above can fail."""
    settings = settings_for(home)
    clean = dataset.training_set(settings, (FIRST,))
    plant_answers(home, FIRST)
    snapshots = Snapshots(settings.snapshots)
    tables = {name: snapshots.read(name, FIRST) for name in snapshots.tables(FIRST)}
    tables["labels"] = pd.DataFrame({"churn_label": clean.labels.astype("boolean")})
    snapshots.write(FIRST, tables, {})
    assert dataset.training_set(settings, (FIRST,)).fingerprint != clean.fingerprint


def test_planted_answers_do_not_change_the_model(home: Path) -> None:
    settings = settings_for(home)
    clean = retrain(settings, as_of=FIRST_KNOWN, dry_run=True)
    plant_answers(home, FIRST + DAY)
    planted = retrain(settings, as_of=FIRST_KNOWN, dry_run=True)
    assert planted.metrics == clean.metrics
    assert clean.metrics["auc"] < 0.95


def test_holdout_is_a_stable_share_of_users() -> None:
    users = [f"u{i}" for i in range(20_000)]
    held_out = dataset.in_holdout(users, salt="churn", share=0.2)
    assert held_out.mean() == pytest.approx(0.2, abs=0.01)
    assert (dataset.in_holdout(reversed(users), salt="churn", share=0.2) == held_out[::-1]).all()
    assert (dataset.in_holdout(users, salt="other", share=0.2) != held_out).any()
    # a smaller share is a part of a larger one: raising the share never releases a user into training
    assert not (dataset.in_holdout(users, salt="churn", share=0.1) & ~held_out).any()
    assert dataset.in_holdout(["7590-VHVEG"], salt="churn", share=0.2).tolist() == [True], "for ever"


def test_defaults_are_stated_or_medians_of_training(home: Path) -> None:
    settings = settings_for(home)
    plan = dataset.features(settings)
    frame = dataset.feature_frame(settings, FIRST)
    found = dataset.defaults(plan, frame)
    assert found["failed_payments_90d"] == 0
    assert found["ticket_avg_resolution_hrs_90d"] == frame["ticket_avg_resolution_hrs_90d"].median()
    assert "monthly_fee" not in found
