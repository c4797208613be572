"""The estimators that compete, and how the best is chosen, calibrated and given a threshold.

Every pipeline begins with `encode`, which turns the feature frame into numbers in the feature service's
order; what follows it converts to ONNX with one float32 input. Trees get unscaled columns: a scaler before
trees breaks float32 parity by 0.05 (skl2onnx 1.20). Classes are not weighted, because weights spoil calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from jobs.dataset import Feature

log = logging.getLogger(__name__)

FOLDS = 5


def encoder(plan: Sequence[Feature]) -> Any:
    """The first step: categories to their index in the plan, numbers and booleans as they are, order kept."""
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import OrdinalEncoder

    runs: list[tuple[str, list[Feature]]] = []  # neighbours of one sort share a transformer
    for feature in plan:
        sort = "category" if feature.kind == "category" else "number"
        if runs and runs[-1][0] == sort:
            runs[-1][1].append(feature)
        else:
            runs.append((sort, [feature]))
    transformers = [
        (
            f"{sort}_{index}",
            OrdinalEncoder(categories=[list(f.categories or ()) for f in run]) if sort == "category" else "passthrough",
            [f.name for f in run],
        )
        for index, (sort, run) in enumerate(runs)
    ]
    return ColumnTransformer(transformers, verbose_feature_names_out=False)


def pipeline(name: str, plan: Sequence[Feature], *, seed: int) -> Pipeline:
    """An unfitted pipeline of that name: dummy, logistic_regression, random_forest or gradient_boosting."""
    from sklearn.compose import ColumnTransformer
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    steps: list[tuple[str, Any]] = [("encode", encoder(plan))]
    if name == "dummy":
        steps.append(("model", DummyClassifier(strategy="prior")))
    elif name == "logistic_regression":
        categories = [i for i, f in enumerate(plan) if f.kind == "category"]
        numbers = [i for i, f in enumerate(plan) if f.kind != "category"]
        codes = [list(range(len(plan[i].categories or ()))) for i in categories]
        one_hot = OneHotEncoder(categories=codes, sparse_output=False)
        steps.append(
            (
                "scale",
                ColumnTransformer([("one_hot", one_hot, categories), ("scaler", StandardScaler(), numbers)]),
            )
        )
        steps.append(("model", LogisticRegression(max_iter=2000, random_state=seed)))
    elif name == "random_forest":
        forest = RandomForestClassifier(n_estimators=200, min_samples_leaf=10, n_jobs=2, random_state=seed)
        steps.append(("model", forest))
    elif name == "gradient_boosting":
        boosting = GradientBoostingClassifier(
            n_estimators=150, max_depth=3, learning_rate=0.06, subsample=0.8, random_state=seed
        )
        steps.append(("model", boosting))
    else:
        raise ValueError(
            f"no candidate {name!r}; expected dummy, logistic_regression, random_forest or gradient_boosting"
        )
    return Pipeline(steps)


@dataclass(frozen=True)
class Selection:
    """The winner of cross-validation, fitted on all training rows, and how each candidate did (mean AUC)."""

    name: str
    model: Pipeline
    auc_by_candidate: dict[str, float]
    threshold: float


def select(
    names: Sequence[str],
    plan: Sequence[Feature],
    frame: pd.DataFrame,
    target: pd.Series,
    *,
    seed: int,
    calibration: str,
    threshold: str,
    top_k_share: float,
) -> Selection:
    """Cross-validate the candidates, grouped by user, and fit the best on all rows.

    The threshold is chosen on the winner's out-of-fold scores, so on rows its fold's model did not see.
    """
    out_of_fold = {name: _out_of_fold(name, plan, frame, target, seed=seed, calibration=calibration) for name in names}
    aucs = {name: float(np.mean(fold_aucs)) for name, (_, fold_aucs) in out_of_fold.items()}
    best = max(aucs, key=lambda name: aucs[name])
    log.info("cross-validation auc: %s; best=%s", {k: round(v, 4) for k, v in aucs.items()}, best)
    scores = out_of_fold[best][0]
    cut = f1_threshold(scores, target.to_numpy()) if threshold == "f1" else top_k_threshold(scores, top_k_share)
    return Selection(best, _fit(best, plan, frame, target, seed=seed, calibration=calibration), aucs, cut)


def _fit(
    name: str, plan: Sequence[Feature], frame: pd.DataFrame, target: pd.Series, *, seed: int, calibration: str
) -> Pipeline:
    model = pipeline(name, plan, seed=seed)
    if calibration == "sigmoid":
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.pipeline import Pipeline

        encode, *rest = model.steps
        inner = Pipeline(rest) if len(rest) > 1 else rest[0][1]
        model = Pipeline([encode, ("model", CalibratedClassifierCV(inner, method="sigmoid", cv=FOLDS))])
    return model.fit(frame, target.to_numpy())


def _out_of_fold(
    name: str, plan: Sequence[Feature], frame: pd.DataFrame, target: pd.Series, *, seed: int, calibration: str
) -> tuple[np.ndarray, list[float]]:
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    y = target.to_numpy()
    scores = np.zeros(len(frame))
    aucs = []
    for train, test in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(frame, y, groups=frame.index):
        model = _fit(name, plan, frame.iloc[train], target.iloc[train], seed=seed, calibration=calibration)
        scores[test] = model.predict_proba(frame.iloc[test])[:, 1]
        aucs.append(float(roc_auc_score(y[test], scores[test])))
    return scores, aucs


def f1_threshold(scores: np.ndarray, target: np.ndarray) -> float:
    """The cut with the best F1, midway between two neighbouring distinct float32 scores.

    A cut that equals a score would flip users by float32 noise. Scores are rounded to float32, as ONNX gives them.
    """
    scores = scores.astype(np.float32)
    values = np.unique(scores).astype(float)
    if len(values) < 2:  # nothing to cut: everyone is called, as F1 without information wants
        return float(values[0]) / 2
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(float)
    hits = np.cumsum(target[order])
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # last row of each distinct score
    f1 = 2 * hits[last] / (last + 1 + target.sum())
    return _below(values, float(ranked[last[int(np.argmax(f1))]]))


def top_k_threshold(scores: np.ndarray, share: float) -> float:
    """The cut that calls about `share` of the users, midway between two neighbouring distinct float32 scores."""
    values = np.unique(np.float32(scores)).astype(float)
    return _below(values, float(np.float32(np.quantile(scores, 1 - share, method="higher"))))


def _below(values: np.ndarray, lowest_called: float) -> float:
    position = int(np.searchsorted(values, lowest_called))
    lower = values[position - 1] if position else 0.0
    return float((lower + values[position]) / 2)
