"""What is decided of which figures, and what a check leaves behind: one row, one run, at most one retraining."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from jobs import database
from jobs.drift import (
    Check,
    DriftResult,
    Inputs,
    Labelled,
    ModelFeature,
    Wish,
    _logged_rows,
    _read_state,
    check_drift,
    conclude,
    decide,
    finding_of,
    measure,
    metrics_of,
)
from jobs.drift_report import ColumnDrift
from jobs.registry import ModelVersion, Registry
from jobs.retrain import retrain
from jobs.settings import Settings
from jobs.snapshots import instant
from tests.jobs.conftest import FIRST_KNOWN, settings_for

JAN, FEB, MAR, APR = date(2024, 1, 31), date(2024, 2, 29), date(2024, 3, 31), date(2024, 4, 30)
AS_OF = datetime(2024, 4, 30, 23, 59, 59, tzinfo=UTC)
NOW = datetime(2024, 5, 1, 3, tzinfo=UTC)
DAY = timedelta(days=1)


# --- deciding ---------------------------------------------------------------------------------------------


def check(drift: bool, snapshot: date = APR, version: int = 1) -> Check:
    return Check(snapshot, version, drift, "stalls drifted" if drift else "no column of 16 drifted")


def wish(known_at: datetime | None, labels_here: bool = True) -> Wish:
    return Wish(AS_OF - 31 * DAY, "stalls drifted", known_at, labels_here)


TABLE = {
    "nothing": (check(False), {}, "none"),
    "drift": (check(True), {}, "retrain"),
    "drift once, twice of three wanted": (check(True), {"k": 2, "n": 3}, "none"),
    "drift in two of three": (
        check(True),
        {"k": 2, "n": 3, "history": [check(False, MAR), check(True, FEB)]},
        "retrain",
    ),
    "drift in two, but one too long ago": (
        check(True),
        {"k": 2, "n": 2, "history": [check(False, MAR), check(True, FEB)]},
        "none",
    ),
    "the same snapshot twice counts once": (
        check(True),
        {"k": 2, "n": 2, "history": [check(True), check(True)]},
        "none",
    ),
    "an earlier snapshot twice counts once": (
        check(False),
        {"k": 2, "n": 3, "history": [check(True, MAR), check(True, MAR)]},
        "none",
    ),
    "the later check of a snapshot counts": (
        check(True),
        {"k": 2, "n": 2, "history": [check(False, MAR), check(True, MAR)]},
        "none",
    ),
    "another version's drift does not count": (
        check(True),
        {"k": 2, "n": 2, "history": [check(True, MAR, version=2)]},
        "none",
    ),
    "a later snapshot does not count": (check(True, MAR), {"k": 2, "n": 2, "history": [check(True, APR)]}, "none"),
    "AUC below its floor": (check(False), {"realised_auc": 0.5499}, "retrain"),
    "AUC on its floor": (check(False), {"realised_auc": 0.55}, "none"),
    "cooldown": (check(True), {"last_retrain": AS_OF - 6 * DAY}, "cooldown"),
    "cooldown for AUC too": (check(False), {"realised_auc": 0.4, "last_retrain": AS_OF}, "cooldown"),
    "cooldown just over": (check(True), {"last_retrain": AS_OF - 7 * DAY}, "retrain"),
    "cooldown forced": (check(True), {"last_retrain": AS_OF, "force": True}, "retrain"),
    "budget spent": (check(True), {"last_retrain": AS_OF - 2 * DAY, "cooldown": DAY, "recent": 2}, "cooldown"),
    "budget not spent": (check(True), {"last_retrain": AS_OF - 2 * DAY, "cooldown": DAY, "recent": 1}, "retrain"),
    "budget forced": (check(True), {"recent": 9, "force": True}, "retrain"),
    "three candidates failed": (check(True), {"failed": 3}, "stopped"),
    "two candidates failed": (check(True), {"failed": 2}, "retrain"),
    "three failed, forced": (check(True), {"failed": 3, "force": True}, "retrain"),
    "three failed, a wish": (check(True), {"failed": 3, "wish": wish(AS_OF)}, "retrain"),
    "nothing, forced": (check(False), {"force": True}, "none"),
    "wish before its labels": (check(True), {"wish": wish(AS_OF + DAY)}, "waiting"),
    "wish without drift any more": (check(False), {"wish": wish(AS_OF + DAY)}, "waiting"),
    "wish whose labels are late": (check(True), {"wish": wish(AS_OF, labels_here=False)}, "waiting"),
    "wish for a snapshot to come": (check(True), {"wish": wish(None, labels_here=False)}, "waiting"),
    "wish that can be granted": (check(False), {"wish": wish(AS_OF)}, "retrain"),
    "wish whose snapshot has come": (check(False), {"wish": wish(None)}, "retrain"),
    "wish does not wait for the cooldown": (check(True), {"wish": wish(AS_OF), "last_retrain": AS_OF}, "retrain"),
    "pinned": (check(True), {"pinned": "churn:v1-a is pinned"}, "pinned"),
    "pinned, forced": (check(True), {"pinned": "churn:v1-a is pinned", "force": True}, "pinned"),
    "pinned, with a wish": (check(False), {"pinned": "churn:v1-a is pinned", "wish": wish(AS_OF)}, "pinned"),
    "pinned, nothing to report": (check(False), {"pinned": "churn:v1-a is pinned"}, "none"),
}


@pytest.mark.parametrize(("found", "known", "expected"), TABLE.values(), ids=TABLE)
def test_decisions(found, known, expected):
    known = {"history": (), **known}
    decision = decide(found, known.pop("history"), as_of=AS_OF, **known)

    assert decision.decision == expected
    assert decision.reason


REASONS = {
    "drift": (check(True), {}, "stalls drifted; 1 of last 1 snapshot"),
    "not often enough": (check(True), {"k": 2, "n": 3, "history": [check(False, MAR)]},
                         "stalls drifted; 1 of last 2 snapshots, expected 2 of 3"),
    "AUC": (check(False), {"realised_auc": 0.481}, "realised AUC 0.481 is below champion_floor 0.55"),
    "AUC close by": (check(False), {"realised_auc": 0.549999}, "realised AUC 0.549999 is below champion_floor 0.55"),
    "both": (check(True), {"realised_auc": 0.5},
             "stalls drifted; 1 of last 1 snapshot; realised AUC 0.5 is below champion_floor 0.55"),
    "cooldown": (check(True), {"last_retrain": AS_OF - DAY},
                 "retrained as of 2024-04-29, not again before 2024-05-06: stalls drifted; 1 of last 1 snapshot"),
    "budget": (check(True), {"recent": 2}, "2 retrainings in the last 7 days, retrain_budget is 2: stalls drifted; "
               "1 of last 1 snapshot"),
    "breaker": (check(True), {"failed": 4}, "the last 4 candidates came to nothing; look at them, then `churn drift "
                "--force`, `churn retrain` or `churn approve N`: stalls drifted; 1 of last 1 snapshot"),
    "waiting": (check(True), {"wish": wish(AS_OF + DAY)},
                "labels are known on 2024-05-01; retraining wished for on 2024-03-30 (stalls drifted)"),
    "late": (check(True), {"wish": wish(AS_OF, labels_here=False)},
             "new labels, known since 2024-04-30, have not arrived; "
             "retraining wished for on 2024-03-30 (stalls drifted)"),
    "granted, and the champion fails": (check(True), {"wish": wish(AS_OF), "realised_auc": 0.489},
                "the labels have arrived; retraining wished for on 2024-03-30 (stalls drifted); "
                "realised AUC 0.489 is below champion_floor 0.55"),
    "granted": (check(True), {"wish": wish(AS_OF)},
                "the labels have arrived; retraining wished for on 2024-03-30 (stalls drifted)"),
    "pinned": (check(True), {"pinned": "churn:v1-a is pinned (rollback)"},
               "only reported, as churn:v1-a is pinned (rollback): stalls drifted; 1 of last 1 snapshot"),
}  # fmt: skip


@pytest.mark.parametrize(("found", "known", "expected"), REASONS.values(), ids=REASONS)
def test_reasons_are_sentences(found, known, expected):
    known = {"history": (), **known}

    assert decide(found, known.pop("history"), as_of=AS_OF, **known).reason == expected


def test_dataset_drift_starts_at_drift_share():
    """Five drifted columns of ten are dataset drift when drift_share is 0.5."""
    result = DriftResult(drifted_columns=tuple("abcde"), columns=10, drift_share=0.5)

    assert result.dataset_drift
    assert not replace(result, drifted_columns=tuple("abcd")).dataset_drift


def test_no_drifted_column_is_no_drift_even_at_share_zero():
    assert not DriftResult(columns=16, drift_share=0.0).dataset_drift
    assert not DriftResult(drift_share=0.0).dataset_drift


def test_the_finding_names_columns_and_share():
    def column(name: str, drifted: bool, distance: float | None = 0.0) -> ColumnDrift:
        return ColumnDrift(name, "wasserstein", distance, drifted, "0.205 ≥ 0.1", 0.0, 0.0)

    calm = [column(f"c{i}", False) for i in range(15)]
    assert finding_of([column("rebuffer_events_7d", True), *calm], 0.02) == (
        "rebuffer_events_7d drifted (0.205 ≥ 0.1): 1 of 16 columns, share 0.0625 ≥ 0.02"
    )
    assert finding_of([*calm, column("x", False, None)], 0.02) == "no column of 16 drifted, 1 not judged"
    many = finding_of([column(f"d{i}", True) for i in range(5)], 0.02)
    assert many.endswith("d2 drifted (0.205 ≥ 0.1) and 2 more: 5 of 5 columns, share 1 ≥ 0.02")


def test_deciding_imports_nothing_heavy():
    heavy = ("pandas", "evidently", "mlflow", "sqlalchemy")
    code = f"import sys, jobs.drift; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert found.stdout.strip() == "[]"


# --- a check, on small frames, with a real database and MLflow --------------------------------------------

FEATURES = (
    ModelFeature("fee", "float", None),
    ModelFeature("stalls", "int", None),
    ModelFeature("hours", "float", 12.0),
    ModelFeature("plan", "category", None),
)
VERSION = ModelVersion(1, "run", "source", {"trained_as_of": JAN.isoformat()})


@pytest.fixture(scope="module")
def mlflow_home(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow")  # making its schema takes seconds, once


@pytest.fixture
def settings(tmp_path, mlflow_home) -> Settings:
    return Settings(home=tmp_path, mlflow_url=f"sqlite:///{mlflow_home}/mlflow.db", drift_min_logged=1000)


def frame(seed: int = 0, stalls: float = 1.5, rows: int = 2000) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    columns = {
        "fee": random.normal(60, 20, rows),
        "stalls": random.poisson(stalls, rows).astype("float64"),
        "hours": np.where(random.random(rows) < 0.5, np.nan, random.normal(12, 4, rows)),
        "plan": random.choice(["month", "year"], rows).astype(object),
    }
    return pd.DataFrame(columns, index=pd.Index([f"u{i:04}" for i in range(rows)], name="user_id"))


def by_fee(users: pd.DataFrame) -> np.ndarray:
    """A model that calls those who pay much; a missing value would be an error."""
    assert users.notna().all().all()
    return 1 / (1 + np.exp(-(users["fee"].to_numpy() - 60) / 20))


def inputs(**changes) -> Inputs:
    values = {
        "version": VERSION, "as_of": AS_OF, "snapshot": APR, "features": FEATURES, "reference": frame(),
        "current": frame(1, stalls=3.0), "labelled": None, "logged": [], "logged_count": 0,
    }  # fmt: skip
    return Inputs(**(values | changes))


def checked(settings: Settings, found: Inputs, started: list[str], **options) -> DriftResult:
    measured = measure(settings, found, lambda: (by_fee, 0.5))
    options = {"now": NOW, "start_retrain": started.append} | options
    return conclude(settings, Registry(settings), measured, **options)


def artifact(settings: Settings, result: DriftResult, path: str) -> str:
    registry = Registry(settings)  # what it downloads goes with it
    return registry.artifact(result.run_id or "", path).read_text("utf-8")


def rows_of(settings: Settings, table: sa.Table) -> list[sa.Row]:
    with database.connect(settings.database).connect() as connection:
        return list(connection.execute(sa.select(table).order_by(table.c.id)))


def add(settings: Settings, table: sa.Table, **values) -> None:
    with database.connect(settings.database).begin() as connection:
        connection.execute(table.insert().values(**values))


def test_drift_is_reported_noted_and_starts_one_retraining(settings):
    started: list[str] = []
    result = checked(settings, inputs(), started)

    assert result.drifted_columns == ("stalls",)
    assert (result.columns, result.share, result.dataset_drift, result.decision) == (4, 0.25, True, "retrain")
    assert started == [result.reason]
    [row] = rows_of(settings, database.drift_checks)
    assert (row.as_of, row.snapshot, row.model_version) == (AS_OF, instant(APR), 1)
    assert (row.share, json.loads(row.drifted_columns), row.dataset_drift) == (0.25, ["stalls"], True)
    assert (row.decision, row.reason, row.run_id, row.checked_at) == ("retrain", result.reason, result.run_id, NOW)
    run = Registry(settings).client.get_run(result.run_id)
    assert run.data.tags["decision"] == "retrain"
    assert run.data.metrics["share"] == 0.25
    assert run.data.metrics["distance_stalls"] > 0.1
    figures = json.loads(artifact(settings, result, "drift.json"))
    assert figures["drifted_columns"] == ["stalls"]
    assert "stalls drifted" in artifact(settings, result, "drift.html")


def test_the_same_check_again_leaves_one_row_and_one_run(settings):
    first = checked(settings, inputs(), [])
    again = checked(settings, inputs(), [], now=NOW + DAY)

    [row] = rows_of(settings, database.drift_checks)
    assert row.run_id == first.run_id == again.run_id
    assert row.checked_at == NOW + DAY


def test_the_same_check_with_other_figures_logs_them(settings):
    first = checked(settings, inputs(), [])
    again = checked(settings, inputs(current=frame(1)), [])

    assert again.run_id != first.run_id
    [row] = rows_of(settings, database.drift_checks)
    assert (row.run_id, row.dataset_drift, row.decision) == (again.run_id, False, "none")


def test_a_check_killed_before_the_retraining_decides_the_same_again(settings):
    def killed(reason: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked(settings, inputs(), [], start_retrain=killed)
    started: list[str] = []
    checked(settings, inputs(), started)

    assert len(started) == 1
    assert len(rows_of(settings, database.drift_checks)) == 1


def test_a_dry_run_decides_and_leaves_nothing(settings):
    started: list[str] = []
    result = checked(settings, inputs(), started, dry_run=True)

    assert (result.decision, result.run_id, started) == ("retrain", None, [])
    assert rows_of(settings, database.drift_checks) == []


def test_without_a_way_to_retrain_it_only_reports(settings):
    assert checked(settings, inputs(), [], start_retrain=None).decision == "retrain"


def test_a_missing_feature_is_named(settings):
    with pytest.raises(ValueError, match="column fee of the current frame: found no such column"):
        measure(settings, inputs(current=frame().drop(columns="fee")), lambda: (by_fee, 0.5))


def test_few_users_are_not_judged(settings):
    result = checked(settings, inputs(current=frame(rows=999, stalls=9)), [])

    assert (result.decision, result.share, result.columns) == ("none", 0, 4)
    assert result.reason == "not judged: 999 current rows, expected at least 1000"


@pytest.mark.parametrize(
    ("snapshot", "reason"),
    [(JAN, "the newest snapshot is the one the model was trained on (2024-01-31)"),
     (date(2023, 12, 31),
      "the newest snapshot (2023-12-31) is older than the one the model was trained on (2024-01-31)")],
)  # fmt: skip
def test_the_models_own_snapshot_is_not_compared(settings, snapshot, reason):
    result = checked(settings, inputs(current=None, snapshot=snapshot), [])

    assert (result.decision, result.dataset_drift, result.reason) == ("none", False, reason)


def test_k_of_n_counts_earlier_snapshots_of_this_version(settings):
    settings = settings.model_copy(update={"drift_k": 2, "drift_n": 2})
    started: list[str] = []
    march = instant(MAR)

    assert checked(settings, inputs(as_of=march, snapshot=MAR), started).decision == "none"
    assert checked(settings, inputs(as_of=march + DAY, snapshot=MAR), started).decision == "none"
    assert checked(settings, inputs(), started).decision == "retrain"
    assert started[0].endswith("2 of last 2 snapshots")


def test_checks_later_than_as_of_are_not_looked_at(settings):
    """March was found drifting only in May, when its rows had been corrected."""
    settings = settings.model_copy(update={"drift_k": 2, "drift_n": 2})
    checked(settings, inputs(as_of=AS_OF + DAY, snapshot=MAR), [])

    assert checked(settings, inputs(), []).decision == "none"
    assert checked(settings, inputs(as_of=AS_OF + 2 * DAY), []).decision == "retrain"


def test_a_pin_only_reports(settings):
    add(settings, database.pins, id=1, version=1, bento_tag="churn:v1-a", reason="rollback", by="me", pinned_at=NOW)
    started: list[str] = []
    result = checked(settings, inputs(), started)

    assert (result.decision, started) == ("pinned", [])
    assert rows_of(settings, database.drift_checks)[0].dataset_drift


def retrained(settings: Settings, **values) -> None:
    row = {"as_of": AS_OF - DAY, "wanted_by": "drift", "reason": "stalls drifted", "result": "registered"} | values
    add(settings, database.retrains, **row)


@pytest.mark.parametrize(
    ("values", "decision"),
    [
        ({}, "cooldown"),
        ({"result": "unchanged"}, "cooldown"),
        ({"result": "failed"}, "retrain"),
        ({"result": None}, "retrain"),
        ({"wanted_by": "person"}, "retrain"),
        ({"as_of": AS_OF - 7 * DAY}, "retrain"),
        ({"as_of": AS_OF + DAY}, "retrain"),
    ],
    ids=["trained", "unchanged", "failed", "killed", "by a person", "long ago", "later than as_of"],
)
def test_the_cooldown_counts_drifts_own_retrainings_that_trained(settings, values, decision):
    retrained(settings, **values)

    assert checked(settings, inputs(), []).decision == decision


def waiting(settings: Settings, known: date = MAR) -> None:
    retrained(settings, as_of=instant(MAR), result="waiting_for_labels", known_at=instant(known) + 30 * DAY)


def test_a_kept_wish_waits_for_its_date(settings):
    waiting(settings, known=APR)
    result = checked(settings, inputs(current=frame(1)), [])

    assert result.decision == "waiting"
    assert "labels are known on 2024-05-30" in result.reason


def test_a_wish_whose_labels_did_not_come_waits_on(settings):
    """The date is reached, and the store of snapshots has no labels."""
    waiting(settings)

    assert "have not arrived" in checked(settings, inputs(), []).reason


def test_a_wish_is_granted_when_its_labels_have_come(settings):
    waiting(settings)
    labels = settings.snapshots / MAR.isoformat() / "labels.parquet"
    labels.parent.mkdir(parents=True)
    labels.touch()
    started: list[str] = []
    result = checked(settings, inputs(current=frame(1)), started)

    assert (result.dataset_drift, result.decision) == (False, "retrain")
    assert started == ["the labels have arrived; retraining wished for on 2024-03-31 (stalls drifted)"]


@pytest.mark.parametrize("result", ["registered", "unchanged"])
def test_a_wish_ends_with_the_next_training_whoever_wanted_it(settings, result):
    waiting(settings)
    retrained(settings, result=result, wanted_by="person")

    assert checked(settings, inputs(current=frame(1)), []).decision == "none"


def test_a_wish_ends_when_production_has_learned_from_that_snapshot(settings):
    waiting(settings)
    version = replace(VERSION, tags={"trained_as_of": MAR.isoformat()})

    assert _read_state(settings, version, DriftResult(as_of=AS_OF, snapshot=APR)).wish is None


def test_a_failed_retraining_keeps_the_wish(settings):
    waiting(settings, known=APR)
    retrained(settings, result="failed")

    assert checked(settings, inputs(), []).decision == "waiting"


# --- labels that came ------------------------------------------------------------------------------------


def labelled(good: bool) -> Labelled:
    users = frame(2)
    churned = by_fee(users[["fee"]]) > 0.5
    random = np.random.default_rng(3)
    target = churned if good else random.random(len(users)) < 0.3
    known = pd.Series(target, index=users.index)[10:]  # ten users' labels are missing
    return Labelled(MAR, users, known, np.arange(len(users)) % 4 == 0)


def test_a_champion_that_fails_on_new_labels_is_retrained(settings):
    started: list[str] = []
    result = checked(settings, inputs(current=frame(1), labelled=labelled(good=False)), started)

    assert (result.dataset_drift, result.decision) == (False, "retrain")
    assert result.realised is not None
    assert (result.realised.users, result.realised.snapshot) == ("holdout", MAR)
    assert result.realised_auc == pytest.approx(0.5, abs=0.05)
    assert (result.realised.holdout["rows"], result.realised.everyone["rows"]) == (497, 1990)
    assert started[0].startswith("realised AUC 0.")
    assert rows_of(settings, database.drift_checks)[0].realised_auc == result.realised_auc
    assert metrics_of(result)["realised_auc"] == result.realised_auc
    assert metrics_of(result)["realised_all_auc"] == result.realised.everyone["auc"]


def test_a_champion_that_does_well_stays(settings):
    result = checked(settings, inputs(current=frame(1), labelled=labelled(good=True)), [], dry_run=True)

    assert (result.realised_auc, result.decision) == (1.0, "none")


# --- the prediction log ----------------------------------------------------------------------------------


def predicted(settings: Settings, users: pd.DataFrame, **changes) -> None:
    scores = by_fee(users[["fee"]])
    values = {
        "request_id": "r", "source": "client", "predicted_at": NOW - DAY, "bento_tag": "churn:v1-a", "model_version": 1,
        "churn": False, "threshold": 0.5, "stale": False,
    } | changes  # fmt: skip
    with database.connect(settings.database).begin() as connection:
        connection.execute(database.predictions.insert(), [
            {**values, "prediction_id": f"{changes}{user}"[-32:], "user_id": user, "churn_probability": float(score),
             "features": json.dumps({k: None if pd.isna(v) else v for k, v in row.items()})}
            for (user, row), score in zip(users.iterrows(), scores, strict=True)
        ])  # fmt: skip


def with_log(settings: Settings, **changes) -> Inputs:
    rows, count = _logged_rows(settings, 1, NOW - 30 * DAY, settings.drift_min_logged)
    return inputs(logged=rows, logged_count=count, **changes)


def test_logged_inputs_and_scores_are_reported_and_start_nothing(settings):
    """Clients ask about those who pay more; the snapshot has not moved."""
    predicted(settings, frame(4).assign(fee=lambda f: f.fee + 20).fillna({"hours": 12.0}))
    started: list[str] = []
    result = checked(settings, with_log(settings, current=frame(1)), started)

    assert (result.decision, result.dataset_drift, started) == ("none", False, [])
    assert [c.name for c in result.logged if c.drifted] == ["fee", "churn_probability"]
    metrics = Registry(settings).client.get_run(result.run_id).data.metrics
    assert metrics["logged_rows"] == 2000
    assert metrics["logged_share"] == pytest.approx(0.4)
    assert metrics["logged_distance_fee"] > 0.9
    assert "What clients asked" in artifact(settings, result, "logged.html")


def test_defaults_in_the_log_are_not_drift(settings):
    """Half of the reference has no hours; the model saw the default, and that is what the log holds."""
    predicted(settings, frame(4).fillna({"hours": 12.0}))
    result = checked(settings, with_log(settings, current=frame(1)), [], dry_run=True)

    assert [c.name for c in result.logged if c.drifted] == []


def test_few_logged_rows_are_not_judged(settings):
    predicted(settings, frame(rows=999))
    result = checked(settings, with_log(settings), [], dry_run=True)

    assert (result.logged, result.logged_reason) == ((), "not judged (999 of 1000 logged predictions)")


@pytest.mark.parametrize(
    "changes",
    [{"source": "probe"}, {"source": "score"}, {"model_version": 2}, {"predicted_at": NOW - 31 * DAY}],
    ids=["probes", "bulk scores", "another version", "long ago"],
)
def test_only_what_clients_asked_of_this_version_lately_is_read(settings, changes):
    predicted(settings, frame(rows=20), **changes)
    predicted(settings, frame(rows=3))

    assert _logged_rows(settings, 1, NOW - 30 * DAY, 1)[1] == 3


# --- nothing to do ---------------------------------------------------------------------------------------


def test_without_a_production_model_there_is_nothing_to_compare(settings):
    result = check_drift(settings, as_of=AS_OF, now=NOW, start_retrain=None)

    reason = "nothing to compare with: no production model, and no labels to train one on"
    assert (result.decision, result.reason) == ("none", reason)
    assert json.dumps(result.as_json())


# --- before the first model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("as_of", "decision", "said"),
    [
        pytest.param(instant(date(2024, 2, 15)), "waiting", "labels are known on 2024-03-01", id="too-early"),
        pytest.param(FIRST_KNOWN, "retrain", "no model yet", id="labels-known"),
    ],
)
def test_the_first_model_is_trained_when_labels_are_known(
    home: Path, as_of: datetime, decision: str, said: str
) -> None:
    """Bootstrap found nothing to learn from, and nobody else looks each day."""
    started: list[str] = []

    result = check_drift(settings_for(home), as_of=as_of, now=as_of, start_retrain=started.append)

    assert (result.decision, said in result.reason) == (decision, True), result.reason
    assert len(started) == (decision == "retrain")


def test_a_candidate_that_waits_is_not_trained_again(home: Path) -> None:
    settings = settings_for(home)
    retrain(settings, as_of=FIRST_KNOWN)
    started: list[str] = []

    result = check_drift(settings, as_of=FIRST_KNOWN, now=FIRST_KNOWN, start_retrain=started.append)

    assert (result.decision, started) == ("none", [])
    assert "candidate 1 is there" in result.reason
