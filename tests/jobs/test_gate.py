"""The gate's rules, each by a case that would pass but for that rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from jobs import gate
from jobs.gate import GateRules, judge, should_promote

RULES = GateRules(bootstrap_samples=400)


def rows(size: int = 2000, rate: float = 0.25, seed: int = 0) -> tuple[np.ndarray, np.random.Generator]:
    random = np.random.default_rng(seed)
    return random.random(size) < rate, random


def scores(target: np.ndarray, signal: float, random: np.random.Generator) -> np.ndarray:
    return 1 / (1 + np.exp(-(random.normal(size=len(target)) + signal * (target - 0.5) - 1)))


def verdict(candidate: np.ndarray, champion: np.ndarray | None, target: np.ndarray, **changes: object) -> gate.Verdict:
    threshold = float(np.quantile(candidate[np.isfinite(candidate)], 0.7))
    arguments = {"threshold": threshold, "slices": {}, "rules": RULES, **changes}
    return judge(target, candidate, champion, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("new", "old", "delta", "expected"),
    [
        (0.80, None, 0.01, True),
        (0.30, None, 0.01, True),
        (0.81, 0.80, 0.01, True),
        (0.8099, 0.80, 0.01, False),
        (0.80, 0.80, 0.0, True),
        (0.79, 0.80, 0.0, False),
        (math.nan, None, 0.01, False),
        (math.nan, 0.5, 0.01, False),
        (0.9, math.nan, 0.01, False),
    ],
)
def test_should_promote(new: float, old: float | None, delta: float, expected: bool) -> None:
    assert should_promote(new, old, delta) is expected


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=200))
def test_auc_equals_scikit_learns(drawn: list[tuple[bool, int]]) -> None:
    """With ties, which small integers make plenty of; without one of the classes it is NaN."""
    target = np.array([label for label, _ in drawn])
    values = np.array([value for _, value in drawn], dtype=float)
    if target.all() or not target.any():
        assert math.isnan(gate.auc(target, values))
    else:
        assert gate.auc(target, values) == pytest.approx(roc_auc_score(target, values))


def test_f1_equals_scikit_learns() -> None:
    target, random = rows()
    called = random.random(len(target)) < 0.3
    assert gate.f1(target, called) == pytest.approx(f1_score(target, called))


def test_bootstrap_resamples_are_paired_and_seeded() -> None:
    """The same scores twice give the same AUC in each resample; the same seed the same resamples."""
    target, random = rows(400)
    values = scores(target, 1.0, random)
    resampled = gate.bootstrap_auc(target, values, values, samples=200, seed=3)
    assert (resampled[:, 0] == resampled[:, 1]).all()
    assert (gate.bootstrap_auc(target, values, samples=200, seed=3)[:, 0] == resampled[:, 0]).all()
    assert resampled[:, 0].std() > 0


def test_bootstrap_error_is_that_of_hanley_and_mcneil() -> None:
    """The spread of resampled AUCs is within 25 % of the analytic standard error (Hanley & McNeil 1982)."""
    target, random = rows(1400)
    values = scores(target, 1.2, random)
    area = gate.auc(target, values)
    positives, negatives = int(target.sum()), int((~target).sum())
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    expected = math.sqrt(variance / (positives * negatives))
    assert gate.bootstrap_auc(target, values, samples=800, seed=0)[:, 0].std() == pytest.approx(expected, rel=0.25)


def test_better_candidate_passes() -> None:
    target, random = rows()
    found = verdict(scores(target, 1.6, random), scores(target, 0.2, random), target)
    assert found.passed, found.reason
    assert found.metrics["auc_difference_lower"] > 0


def test_first_model_needs_no_champion() -> None:
    target, random = rows()
    assert verdict(scores(target, 1.0, random), None, target).passed


def test_first_model_that_knows_nothing_is_refused() -> None:
    target, random = rows()
    found = verdict(scores(target, 0.0, random), None, target)
    assert not found.passed
    assert "lower bound of AUC" in found.reason


def test_difference_that_may_be_chance_is_refused() -> None:
    """Two equally good, independent models on few rows: sometimes better by delta, never surely."""
    for seed in range(30):
        target, random = rows(600, seed=seed)
        candidate, champion = scores(target, 1.0, random), scores(target, 1.0, random)
        if gate.auc(target, candidate) - gate.auc(target, champion) >= RULES.promotion_delta:
            break
    else:
        raise AssertionError("no seed gave a lucky candidate")
    found = verdict(candidate, champion, target)
    assert not found.passed
    assert "may be chance" in found.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("whose", ["candidate", "champion"])
def test_scores_that_are_no_numbers_are_refused(bad: float, whose: str) -> None:
    target, random = rows()
    values = {"candidate": scores(target, 2.0, random), "champion": scores(target, 0.0, random)}
    values[whose][7] = bad
    found = verdict(values["candidate"], values["champion"], target)
    assert not found.passed
    assert f"the {whose} scores 1 users NaN or infinite" in found.reason


@pytest.mark.parametrize("rate", [0.01, 0.99], ids=["few positives", "few negatives"])
def test_too_few_of_a_class_are_refused(rate: float) -> None:
    target, random = rows(2000, rate)
    found = verdict(scores(target, 2.0, random), None, target)
    assert not found.passed
    assert "expected at least 100 of each" in found.reason


def test_f1_must_beat_calling_everyone() -> None:
    target, random = rows()
    found = verdict(scores(target, 1.6, random), None, target, threshold=0.0)
    assert not found.passed
    assert "calling everyone" in found.reason


def test_slice_that_surely_got_worse_is_refused() -> None:
    target, random = rows(4000)
    candidate, champion = scores(target, 2.0, random), scores(target, 1.0, random)
    mask = np.arange(len(target)) < 1200
    candidate[mask] = scores(target, 0.0, random)[mask]
    found = verdict(candidate, champion, target, slices={"user_is_senior/true": mask})
    assert not found.passed
    assert "slice user_is_senior/true is surely worse" in found.reason


def test_small_slice_is_reported_and_not_judged() -> None:
    target, random = rows(4000)
    candidate, champion = scores(target, 2.0, random), scores(target, 1.0, random)
    mask = np.arange(len(target)) < 100
    candidate[mask] = scores(target, -3.0, random)[mask]
    found = verdict(candidate, champion, target, slices={"small": mask})
    assert found.passed, found.reason
    assert found.slices["small"]["positives"] < RULES.slice_min_positives
    assert "auc_difference_upper" not in found.slices["small"]
