"""Distances and the rules around Evidently, on small frames, on resamples and on the sample."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from feature_repo.columns import FEATURE_TABLES
from jobs.drift_report import SCORE, SchemaMismatch, against, compare, logged_frame, realised_performance


@dataclass(frozen=True)
class Feature:
    name: str
    kind: str


ROWS = 3000
FEATURES = [
    Feature("fee", "float"),
    Feature("stalls", "int"),
    Feature("paperless", "bool"),
    Feature("plan", "category"),
]


def frame(rows: int = ROWS, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "fee": random.normal(60, 20, rows),
            "stalls": random.poisson(1.5, rows).astype("float64"),
            "paperless": random.integers(0, 2, rows).astype("float64"),
            "plan": random.choice(["month", "year"], rows).astype(object),
        }
    )


def compared(current: pd.DataFrame, reference: pd.DataFrame | None = None, **options):
    reference = frame() if reference is None else reference
    return compare(reference, current, FEATURES, **{"threshold": 0.1, "min_rows": 1000} | options)


def column(comparison, name: str):
    return next(c for c in comparison.columns if c.name == name)


def normed_wasserstein(reference: np.ndarray, current: np.ndarray) -> float:
    """Area between the two distribution functions, over the reference's standard deviation."""
    everything = np.sort(np.concatenate([reference, current]))
    below = [np.searchsorted(np.sort(v), everything[:-1], "right") / len(v) for v in (reference, current)]
    area = np.sum(np.abs(below[0] - below[1]) * np.diff(everything))
    return float(area / max(reference.std(), 0.001))


# --- distances ------------------------------------------------------------------------------------------


def test_equal_distributions_do_not_drift():
    result = compared(frame(seed=1))

    assert result.drifted == ()
    assert result.share == 0
    assert {c.name: c.method for c in result.columns} == {
        "fee": "wasserstein", "stalls": "wasserstein", "paperless": "jensenshannon", "plan": "jensenshannon",
    }  # fmt: skip


def test_a_shifted_number_drifts_and_says_by_how_much():
    result = compared(frame().assign(fee=lambda f: f.fee + 10))

    assert [c.name for c in result.drifted] == ["fee"]
    assert column(result, "fee").distance == pytest.approx(0.5, abs=0.01)
    assert "≥ 0.1" in column(result, "fee").reason
    assert result.share == 0.25


def test_a_new_category_drifts():
    current = frame()
    current.loc[: ROWS // 5, "plan"] = "week"

    assert [c.name for c in compared(current).drifted] == ["plan"]


def test_a_boolean_that_turns_drifts():
    assert [c.name for c in compared(frame().assign(paperless=1.0)).drifted] == ["paperless"]


def test_a_distance_on_the_threshold_has_drifted():
    distance = column(compared(frame(seed=1)), "fee").distance

    assert column(compared(frame(seed=1), threshold=distance), "fee").drifted
    assert not column(compared(frame(seed=1), threshold=np.nextafter(distance, 1)), "fee").drifted


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.2049, "0.205 ≥ 0.1"), (0.1, "0.1 ≥ 0.1"), (0.0999996, "0.0999996 < 0.1"), (0.0, "0 < 0.1")],
)
def test_the_sentence_about_a_distance_is_true_as_written(value, text):
    assert against(value, 0.1) == text


def test_large_frames_are_sampled_and_missing_shares_are_not():
    current = frame().assign(fee=lambda f: f.fee.mask(f.index < 30))
    result = compared(current, cap=2000)

    assert json.loads(result.json)["sampled_to"] == 2000
    assert column(result, "fee").missing_current == 0.01
    assert result.json == compared(current, cap=2000).json


# --- constants, missing values, infinities ---------------------------------------------------------------


def test_a_constant_that_stays_has_distance_zero():
    constant = frame().assign(stalls=4.0)

    assert column(compared(constant, constant), "stalls").distance == 0
    assert not column(compared(constant, constant), "stalls").drifted


@pytest.mark.parametrize(("changed", "drifted"), [(0.05, False), (0.1, True), (1.0, True)])
def test_a_former_constant_is_judged_by_the_share_of_other_values(changed, drifted):
    current = frame().assign(stalls=4.0)
    current.loc[: round(ROWS * changed) - 1, "stalls"] = 5.0
    found = column(compared(current, frame().assign(stalls=4.0)), "stalls")

    assert (found.method, found.distance, found.drifted) == ("constant", changed, drifted)
    assert found.reason.startswith("was always 4, share of other values")


def test_a_number_that_became_constant_is_measured():
    assert column(compared(frame().assign(stalls=0.0)), "stalls").drifted


def test_a_constant_category_that_stays_does_not_drift():
    constant = frame().assign(plan="month", paperless=1.0)

    assert compared(constant, constant).drifted == ()


@pytest.mark.parametrize("name", ["fee", "stalls", "paperless", "plan"])
def test_a_column_whose_values_all_went_missing_has_drifted(name):
    current = frame()
    current[name] = None if name == "plan" else np.nan
    found = column(compared(current), name)

    assert (found.drifted, found.distance, found.method) == (True, None, "missing")
    assert found.reason == "all values missing, were 0 % in the reference"


@pytest.mark.parametrize("name", ["fee", "plan"])
def test_a_column_that_never_had_values_has_not_drifted(name):
    empty = frame()
    empty[name] = None if name == "plan" else np.nan
    found = column(compared(empty, empty), name)

    assert (found.drifted, found.distance) == (False, None)


def test_a_column_that_had_no_values_and_now_has_has_drifted():
    found = column(compared(frame(), frame().assign(fee=np.nan)), "fee")

    assert (found.drifted, found.method) == (True, "missing")
    assert found.reason == "missing 100 % → 0 %: changed by 1 ≥ 0.1"


@pytest.mark.parametrize(("missing", "drifted"), [(0.05, False), (0.2, True)])
@pytest.mark.parametrize("name", ["fee", "plan"])
def test_a_missing_rate_that_changes_by_the_threshold_is_drift(name, missing, drifted):
    """Missing at random: the values that remain have not moved."""
    current = frame()
    gone = np.random.default_rng(5).permutation(ROWS)[: round(ROWS * missing)]
    current.loc[gone, name] = None if name == "plan" else np.nan
    found = column(compared(current), name)

    assert found.missing_current == pytest.approx(missing)
    assert found.drifted is drifted
    assert found.distance < 0.1


def test_infinite_values_count_as_missing():
    current = frame().assign(fee=lambda f: f.fee.mask(f.index < 30, np.inf).mask(f.index > ROWS - 31, -np.inf))

    assert column(compared(current), "fee").missing_current == pytest.approx(0.02)
    assert compared(current).drifted == ()


def test_a_column_with_few_values_is_not_judged():
    reference = frame().assign(fee=lambda f: f.fee.where(f.index < 50))
    current = frame(seed=1).assign(fee=lambda f: f.fee.where(f.index < 40) + 100)
    found = column(compared(current, reference), "fee")

    assert (found.drifted, found.distance) == (False, None)
    assert found.reason == "not judged: 40 current values, expected at least 1000"


# --- rows and schema -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 30, 999])
def test_frames_below_the_minimum_are_not_judged(rows):
    result = compared(frame(rows).assign(fee=1e6))

    assert result.not_judged == f"not judged: {rows} current rows, expected at least 1000"
    assert (result.columns, result.drifted, result.share) == ((), (), 0)
    assert b"not judged" in result.html
    assert json.loads(result.json)["not_judged"]


def test_a_small_reference_is_not_judged():
    assert compared(frame(), frame(10)).not_judged == "not judged: 10 reference rows, expected at least 1000"


WRONG = [
    pytest.param(lambda f: f.drop(columns="fee"), "fee", "no such column", id="missing column"),
    pytest.param(lambda f: f.assign(fee=f.fee.astype(str)), "fee", "object", id="number as text"),
    pytest.param(lambda f: f.assign(paperless=f.paperless.astype(object)), "paperless", "object", id="bool as object"),
    pytest.param(lambda f: f.assign(plan=f.plan.eq("year")), "plan", "bool", id="category as bool"),
    pytest.param(lambda f: f.assign(plan=1.5), "plan", "float64", id="category as number"),
    pytest.param(lambda f: f.assign(plan=f.plan.where(f.index > 0, 3)), "plan", "mixed", id="mixed category"),
]


@pytest.mark.parametrize("side", ["reference", "current"])
@pytest.mark.parametrize(("spoil", "name", "found"), WRONG)
def test_a_wrong_schema_is_named_before_anything_is_measured(side, spoil, name, found):
    frames = {"reference": frame(), "current": frame(), side: spoil(frame())}

    with pytest.raises(
        SchemaMismatch, match=f"column {name} of the {side} frame: found .*{found}.*, expected"
    ) as error:
        compare(frames["reference"], frames["current"], FEATURES, threshold=0.1)

    assert error.value.column == name


def test_an_empty_frame_with_a_wrong_schema_is_refused_too():
    with pytest.raises(SchemaMismatch, match="found no such column"):
        compared(pd.DataFrame())


def test_other_columns_are_ignored():
    assert compared(frame(seed=1).assign(colour="red")).json == compared(frame(seed=1)).json


# --- reports ---------------------------------------------------------------------------------------------


def test_the_reports_hold_the_judgement_and_the_same_json_each_time():
    current = frame().assign(fee=lambda f: f.fee + 10)
    result, again = compared(current, title="<March>"), compared(current, title="<March>")

    found = json.loads(result.json)
    assert found["rows"] == {"reference": ROWS, "current": ROWS}
    assert [c["name"] for c in found["columns"] if c["drifted"]] == ["fee"]
    assert result.json == again.json
    page = result.html.decode()
    assert "&lt;March&gt;" in page
    assert f"<td>fee</td><td>drifted</td><td>{column(result, 'fee').reason}</td>" in page
    assert "drawDashboard" in page  # Evidently's own part


def test_evidently_does_not_phone_home():
    compared(frame())

    assert os.environ["DO_NOT_TRACK"] == "1"


# --- how often it is right -------------------------------------------------------------------------------


def shapes(random: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    return {
        "normal": random.normal(60, 20, rows),
        "poisson": random.poisson(1.5, rows).astype("float64"),
        "skewed": random.exponential(10, rows),
        "rare": random.binomial(1, 0.02, rows).astype("float64"),
    }


def test_our_numpy_distance_is_evidentlys():
    """What the next test counts with is what the job measures with."""
    features = [Feature(name, "float") for name in ("normal", "poisson", "skewed", "rare")]
    reference = pd.DataFrame(shapes(np.random.default_rng(1), 7000))
    current = pd.DataFrame(shapes(np.random.default_rng(2), 5000)) * 1.1
    result = compare(reference, current, features, threshold=0.1)

    for found in result.columns:
        assert found.distance == pytest.approx(
            normed_wasserstein(reference[found.name].to_numpy(), current[found.name].to_numpy()), abs=1e-9
        )


@pytest.mark.parametrize(("rows", "alarms_allowed"), [(1000, 0.10), (1400, 0.02), (5000, 0.0)])
def test_half_a_standard_deviation_is_found_and_nothing_is_nothing(rows, alarms_allowed):
    """200 runs without drift: alarms in any of four columns; with a shift of 0.5 σ in one: found in 95 % or more."""
    reference = shapes(np.random.default_rng(0), 7000)
    alarms = found = 0
    for seed in range(200):
        current = shapes(np.random.default_rng(1000 + seed), rows)
        alarms += any(normed_wasserstein(reference[name], current[name]) >= 0.1 for name in current)
        shifted = current["normal"] + 0.5 * reference["normal"].std()
        found += normed_wasserstein(reference["normal"], shifted) >= 0.1

    assert alarms / 200 <= alarms_allowed
    assert found / 200 >= 0.95


# --- the prediction log ----------------------------------------------------------------------------------


def test_logged_rows_become_a_frame_like_the_reference():
    rows = [
        ('{"fee": 9.5, "stalls": 2, "paperless": true, "plan": "year"}', 0.25),
        ('{"fee": null, "stalls": "many", "paperless": 0, "plan": 3, "more": 1}', 0.5),
        ("{}", 0.75),
    ]
    found = logged_frame(rows, FEATURES)

    assert found.fee.tolist()[0] == 9.5
    assert found.paperless.tolist()[:2] == [1.0, 0.0]
    assert found.plan.tolist() == ["year", None, None]
    assert found[SCORE].tolist() == [0.25, 0.5, 0.75]
    assert found.isna().sum().to_dict() == {"fee": 2, "stalls": 2, "paperless": 1, "plan": 2, SCORE: 0}
    assert compare(frame(), found, FEATURES, threshold=0.1).not_judged


# --- realised performance --------------------------------------------------------------------------------


def realised(rows: int, *, held_out_share: float = 0.2, churn: float = 0.25, noise: float = 0.0):
    random = np.random.default_rng(0)
    target = random.random(rows) < churn
    scores = np.where(random.random(rows) < noise, random.random(rows), np.where(target, 0.8, 0.1))
    held_out = random.random(rows) < held_out_share
    return realised_performance(date(2024, 2, 29), target, scores, held_out, threshold=0.5, min_class_rows=100)


def test_users_never_trained_on_decide_and_all_are_reported_beside():
    result = realised(5000, noise=0.5)

    assert result.users == "holdout"
    assert result.auc == result.holdout["auc"] != result.everyone["auc"]
    assert set(result.holdout) >= {"rows", "positives", "auc", "f1", "brier", "brier_skill"}
    assert sum(b["rows"] for b in result.bins) == result.holdout["rows"]


def test_all_users_decide_where_the_holdout_is_too_small():
    result = realised(1000)

    assert (result.users, result.auc) == ("all", 1.0)
    assert result.reason.startswith("all users, which may flatter the model: the holdout has")


@pytest.mark.parametrize("churn", [0.0, 0.02, 1.0])
def test_too_few_of_a_class_are_not_judged(churn):
    result = realised(2000, churn=churn)

    assert (result.users, result.auc, result.figures) == ("none", None, {})
    assert "expected at least 100 of each" in result.reason


def test_scores_that_are_no_numbers_are_not_judged():
    target, held_out = np.ones(3, dtype=bool), np.zeros(3, dtype=bool)
    result = realised_performance(
        date(2024, 2, 29), target, np.array([0.1, np.nan, np.inf]), held_out, threshold=0.5, min_class_rows=1
    )

    assert result.reason == "not judged: 2 scores are NaN or infinite"


# --- the sample ------------------------------------------------------------------------------------------


def sample_folder() -> Path:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "streamflow"
    return Path(os.environ.get("CHURN_SAMPLE", beside))


@pytest.fixture(scope="module")
def sample_months() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both months' features, straight from the CSV files, in the types of a feature frame."""
    folder = sample_folder()
    if not folder.is_dir():
        pytest.skip("the sample is not here; CHURN_SAMPLE names its folder")
    months = []
    for month in ("month_000", "month_001"):
        tables = [pd.read_csv(folder / month / f"{t.name}.csv", index_col="user_id") for t in FEATURE_TABLES]
        joined = pd.concat(tables, axis=1)
        for feature in (c for t in FEATURE_TABLES for c in t.columns):
            if feature.kind == "category":
                text = joined[feature.name].map(
                    lambda v: v if isinstance(v, str) else str(v).lower(), na_action="ignore"
                )
                joined[feature.name] = text.astype(object).where(text.notna(), feature.null_category)
            else:
                joined[feature.name] = joined[feature.name].astype("float64")
        months.append(joined.sort_index())
    return months[0], months[1]


def test_the_samples_second_month_drifts_in_exactly_one_column(sample_months):
    features = [column for t in FEATURE_TABLES for column in t.columns]
    result = compare(*sample_months, features, threshold=0.1)

    assert [c.name for c in result.drifted] == ["rebuffer_events_7d"]
    assert result.share == 1 / 16
    distances = {c.name: c.distance for c in result.columns}
    assert distances.pop("rebuffer_events_7d") == pytest.approx(0.205, abs=0.001)
    assert distances.pop("support_tickets_90d") == pytest.approx(0.093, abs=0.001)
    assert distances.pop("watch_hours_30d") == pytest.approx(0.089, abs=0.001)
    assert distances.pop("failed_payments_90d") == pytest.approx(0.074, abs=0.001)
    assert max(distances.values()) <= 0.01


def test_a_thousand_of_the_same_users_rarely_alarm(sample_months):
    """100 draws of 1,000 rows from the reference itself: an alarm in any numeric column in at most one of ten."""
    numbers = sample_months[0].select_dtypes("float64").dropna(axis=1)
    alarms = 0
    for seed in range(100):
        drawn = numbers.sample(1000, replace=True, random_state=seed)
        alarms += any(normed_wasserstein(numbers[n].to_numpy(), drawn[n].to_numpy()) >= 0.1 for n in numbers)

    assert alarms <= 10
