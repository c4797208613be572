"""Simulated months: the same seed writes the same bytes, they hold still unless told to drift, and models learn."""

from __future__ import annotations

import hashlib
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wasserstein_distance
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from feature_repo.columns import FEATURE_TABLES, LABEL, TABLES
from jobs.ingest import SnapshotRefused, ingest
from jobs.settings import Settings
from jobs.simulate import simulate
from jobs.snapshots import Snapshots

START = date(2024, 1, 31)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
USERS = 5000


def read(folder: Path, table: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{table}.csv", index_col="user_id")


def features(folder: Path) -> pd.DataFrame:
    return pd.concat([read(folder, table.name) for table in FEATURE_TABLES], axis=1)


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def distance(reference: pd.Series[Any], current: pd.Series[Any]) -> float:
    """Normed Wasserstein for numbers, total variation for categories."""
    if reference.dtype.kind in "if":
        return float(wasserstein_distance(reference, current) / reference.std())
    shares = [values.astype(str).value_counts(normalize=True) for values in (reference, current)]
    return float(shares[0].sub(shares[1], fill_value=0).abs().sum() / 2)


def distances(reference: Path, current: Path) -> dict[str, float]:
    before, after = features(reference), features(current)
    return {name: distance(before[name], after[name]) for name in before}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A year without drift."""
    return simulate(tmp_path_factory.mktemp("quiet"), users=USERS, months=13, start=START, seed=1)


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Players report more stalls from month 2 on, and other things make users leave."""
    return simulate(
        tmp_path_factory.mktemp("drifted"), users=USERS, months=3, start=START, seed=1,
        feature_drift_month=2, concept_drift_month=2,
    )  # fmt: skip


# --- files ----------------------------------------------------------------------------------------------


def test_months_end_with_their_calendar_month(tmp_path: Path):
    folders = simulate(tmp_path, users=10, months=14, start=date(2023, 12, 31), seed=0)
    assert [f.name for f in folders][:4] == ["2023-12-31", "2024-01-31", "2024-02-29", "2024-03-31"]
    assert folders[-1].name == "2025-01-31"
    assert sorted(p.name for p in folders[0].iterdir()) == sorted(f"{name}.csv" for name in TABLES)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, kind: Any):
    wishes: dict[str, Any] = {
        "users": 200, "months": 2, "start": START, "format": kind, "late_share": 0.02, "missing_share": 0.02,
        "malformed": 3, "feature_drift_month": 1, "concept_drift_month": 1,
    }  # fmt: skip
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        simulate(tmp_path / name, seed=seed, **wishes)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_more_months_or_later_drift_do_not_change_the_months_before(tmp_path: Path):
    simulate(tmp_path / "short", users=200, months=2, start=START, seed=7)
    simulate(tmp_path / "long", users=200, months=5, start=START, seed=7, feature_drift_month=2, concept_drift_month=2)
    short, long = digest(tmp_path / "short"), digest(tmp_path / "long")
    assert len(short) == 12
    assert short.items() < long.items()


def test_what_is_lost_changes_no_other_value(tmp_path: Path):
    (whole,) = simulate(tmp_path / "a", users=200, months=1, start=START, seed=7)
    (holed,) = simulate(tmp_path / "b", users=200, months=1, start=START, seed=7, late_share=0.1, missing_share=0.1)
    for table in FEATURE_TABLES:
        after = read(holed, table.name)
        before = read(whole, table.name).loc[after.index]
        assert ((before == after) | after.isna() | before.isna()).all(axis=None)


def test_an_earlier_call_leaves_nothing_behind(tmp_path: Path):
    simulate(tmp_path, users=20, months=1, start=START, seed=1)
    (folder,) = simulate(tmp_path, users=20, months=1, start=START, seed=1, format="parquet", labels=False)
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{n}.parquet" for n in TABLES if n != "labels")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_is_simulated_is_ingested_without_a_warning(tmp_path: Path, kind: Any):
    folders = simulate(tmp_path / "in", users=500, months=3, start=START, seed=5, format=kind, concept_drift_month=1)
    for folder in folders:
        result = ingest(Settings(home=tmp_path / kind), folder, as_of=date.fromisoformat(folder.name), now=NOW)
        assert (result.result, result.warnings) == ("ingested", ())


def test_csv_and_parquet_are_the_same_snapshot(tmp_path: Path):
    home = Settings(home=tmp_path / "home")
    for kind, expected in (("csv", "ingested"), ("parquet", "unchanged")):
        (folder,) = simulate(tmp_path / kind, users=50, months=1, start=START, seed=5, format=kind)  # type: ignore[arg-type]
        assert ingest(home, folder, as_of=START, now=NOW).result == expected


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"users": 0}, "users is 0; expected 1 or more"),
        ({"months": 0}, "months is 0"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"malformed": -1}, "malformed is -1"),
        ({"malformed": 21}, "more than the 20 users"),
        ({"late_share": 1.0}, "late_share is 1.0; expected a share from 0 to below 1"),
        ({"missing_share": -0.1}, "missing_share is -0.1"),
        ({"format": "xml"}, "format is 'xml'; expected csv or parquet"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_wish_is_said(tmp_path: Path, wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        simulate(tmp_path, **{"users": 20, "months": 1, "start": START, "seed": 0, **wrong})
    assert list(tmp_path.iterdir()) == []


# --- users ----------------------------------------------------------------------------------------------


def test_ids_are_unique_and_those_who_leave_never_return(quiet: list[Path]):
    seen: set[str] = set()
    present: set[str] = set()
    for folder in quiet:
        users = read(folder, "users").index
        assert len(set(users)) == USERS
        arrived = set(users) - present
        assert not arrived & seen
        present, seen = set(users), seen | set(users)
    assert all(users.str.fullmatch(r"\d{4}-[A-Z]{5}"))


def test_users_stay_age_and_pay(quiet: list[Path]):
    before, after = (read(folder, "subscriptions") for folder in quiet[:2])
    both = before.index.intersection(after.index)
    assert 0.02 < 1 - len(both) / USERS < 0.08
    assert (after.loc[both, "months_active"] == before.loc[both, "months_active"] + 1).all()
    assert (after.loc[both, "total_paid"] > before.loc[both, "total_paid"]).all()
    for name in ("contract_type", "net_service", "monthly_fee"):
        assert (after.loc[both, name] == before.loc[both, name]).all()
    assert (after.loc[after.index.difference(both), "months_active"] == 0).all()
    first, second = (read(folder, "users").loc[both] for folder in quiet[:2])
    assert (first == second).all(axis=None)


def test_what_users_do_differs_by_month(quiet: list[Path]):
    before, after = (read(folder, "usage_agg_30d") for folder in quiet[:2])
    both = before.index.intersection(after.index)
    for name in ("skips_7d", "rebuffer_events_7d", "watch_hours_30d"):
        assert (before.loc[both, name] != after.loc[both, name]).mean() > 0.5, name


def test_whoever_is_gone_next_month_had_the_label(quiet: list[Path]):
    labels, later = read(quiet[0], "labels")[LABEL], read(quiet[1], "users").index
    assert labels.loc[labels.index.difference(later)].all()


def test_ranges_are_those_of_the_sample(quiet: list[Path], sample: Path):
    """Means within half a standard deviation of the real ones; the constant column of the sample aside."""
    ours, real = features(quiet[0]), features(sample / "month_000")
    for name in real.columns.drop("avg_session_mins_7d"):
        if real[name].dtype.kind in "if":
            assert abs(ours[name].mean() - real[name].mean()) < 0.5 * real[name].std(), name
            assert ours[name].std() == pytest.approx(real[name].std(), rel=0.5), name
        else:
            assert distance(real[name], ours[name]) < 0.1, name


# --- drift ----------------------------------------------------------------------------------------------


def test_without_drift_no_column_moves(quiet: list[Path]):
    """Neither from one month to the next, nor within a year."""
    pairs = [*pairwise(quiet), *((quiet[0], later) for later in quiet[2:])]
    worst = max((value, name) for pair in pairs for name, value in distances(*pair).items())
    print(f"largest of {len(pairs)} pairs: {worst}")
    assert worst[0] < 0.05


def test_feature_drift_moves_rebuffering_alone(drifted: list[Path]):
    moved = distances(drifted[0], drifted[2])
    print(f"rebuffer_events_7d moved by {moved['rebuffer_events_7d']:.3f}")
    assert 0.2 <= moved.pop("rebuffer_events_7d") <= 0.3
    assert max(moved.values()) < 0.05


# --- models ---------------------------------------------------------------------------------------------

MODELS = {
    "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression()),
    "boosting": lambda: GradientBoostingClassifier(n_estimators=60, random_state=0),
}


def numbers(folder: Path) -> tuple[pd.DataFrame, pd.Series[Any]]:
    words = ["plan_stream_tv", "plan_stream_movies", "contract_type", "net_service"]
    frame = features(folder)
    frame[words] = frame[words].astype(str)
    return pd.get_dummies(frame, columns=words).astype(float), read(folder, "labels")[LABEL]


def held_out(users: pd.Index[Any]) -> np.ndarray[Any, Any]:
    return np.array([int(hashlib.sha256(user.encode()).hexdigest(), 16) % 5 == 0 for user in users])


@pytest.mark.parametrize("name", MODELS)
def test_models_learn_and_concept_drift_breaks_them(drifted: list[Path], name: str):
    (x, y), (x1, y1), (x2, y2) = (numbers(folder) for folder in drifted)
    out, out2 = held_out(x.index), held_out(x2.index)
    old, new = MODELS[name]().fit(x[~out], y[~out]), MODELS[name]().fit(x2[~out2], y2[~out2])

    def auc(model: Any, rows: pd.DataFrame, truth: pd.Series[Any]) -> float:
        return float(roc_auc_score(truth, model.predict_proba(rows)[:, 1]))

    first, later, broken = auc(old, x[out], y[out]), auc(old, x1, y1), auc(old, x2[out2], y2[out2])
    again = auc(new, x2[out2], y2[out2])
    print(f"{name}: first {first:.3f}, next month {later:.3f}, after drift {broken:.3f}, trained anew {again:.3f}")
    assert 0.75 <= first <= 0.9
    assert 0.75 <= later <= 0.9
    assert 0.40 <= broken <= 0.55
    assert again >= 0.7


def test_a_quarter_of_the_users_churn(quiet: list[Path], drifted: list[Path]):
    for folder in [*quiet, *drifted]:
        assert 0.20 < read(folder, "labels")[LABEL].mean() < 0.28


# --- late, missing, malformed ---------------------------------------------------------------------------


def test_late_rows_and_missing_cells_are_warned_of_below_the_share(tmp_path: Path):
    (folder,) = simulate(tmp_path / "in", users=500, months=1, start=START, seed=2, late_share=0.04, missing_share=0.03)
    home = Settings(home=tmp_path / "home")
    result = ingest(home, folder, as_of=START, now=NOW)
    assert result.rows["usage_agg_30d"] == 480
    assert any("20 of 500 users of subscriptions have no row in usage_agg_30d" in w for w in result.warnings)
    assert any("skips_7d: 14 of 480 rows are empty" in w for w in result.warnings)
    assert Snapshots(home.snapshots).read("usage_agg_30d", START)["skips_7d"].isna().sum() == 14


@pytest.mark.parametrize(
    "wish, rule",
    [({"late_share": 0.1}, "absent_rows"), ({"missing_share": 0.1}, "missing_share")],
    ids=["late", "missing"],
)
def test_too_many_late_or_missing_are_refused(tmp_path: Path, wish: dict[str, float], rule: str):
    (folder,) = simulate(tmp_path / "in", users=500, months=1, start=START, seed=2, **wish)  # type: ignore[arg-type]
    with pytest.raises(SnapshotRefused) as refused:
        ingest(Settings(home=tmp_path / "home"), folder, as_of=START, now=NOW)
    assert {finding.rule for finding in refused.value.findings} == {rule}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_every_malformed_cell_is_found(tmp_path: Path, kind: Any, count: int):
    (folder,) = simulate(tmp_path / "in", users=300, months=1, start=START, seed=count, malformed=count, format=kind)
    with pytest.raises(SnapshotRefused) as refused:
        ingest(Settings(home=tmp_path / "home"), folder, as_of=START, now=NOW)
    assert sum(finding.count for finding in refused.value.findings) == count
