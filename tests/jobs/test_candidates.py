"""Thresholds, and the choice among candidates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from jobs.candidates import f1_threshold, pipeline, top_k_threshold


def in_float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(float)


@given(st.lists(st.tuples(st.booleans(), st.floats(0.01, 0.99)), min_size=3, max_size=80))
def test_f1_threshold_is_the_best_cut_and_lies_between_scores(drawn: list[tuple[bool, float]]) -> None:
    target = np.array([label for label, _ in drawn])
    values = in_float32(np.array([value for _, value in drawn]))
    if not target.any() or len(np.unique(values)) < 2:
        return
    cut = f1_threshold(values, target)
    best = max(f1_score(target, values >= other, zero_division=0) for other in np.unique(values))
    assert f1_score(target, values >= cut, zero_division=0) == pytest.approx(best)
    assert cut not in values


def test_threshold_is_the_midpoint_of_two_neighbouring_scores() -> None:
    values = np.array([0.1, 0.2, 0.6, 0.7])
    target = np.array([False, False, True, True])
    assert f1_threshold(values, target) == pytest.approx(0.4)


def test_top_k_calls_that_share() -> None:
    values = np.linspace(0, 1, 1000)
    assert (values >= top_k_threshold(values, 0.1)).mean() == pytest.approx(0.1, abs=0.002)


def test_scores_that_are_all_equal_call_everyone() -> None:
    values = np.full(10, 0.25)
    assert (values >= f1_threshold(values, np.arange(10) < 3)).all()


def test_unknown_candidate_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected dummy, logistic_regression, random_forest or gradient_boosting"):
        pipeline("xgboost", [], seed=0)
