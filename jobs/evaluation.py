"""What is written about a model for people: calibration, curves, slices and plots. Nothing here decides."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jobs.gate import auc, f1

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 10


def reliability_bins(target: np.ndarray, scores: np.ndarray) -> list[dict[str, float]]:
    """Ten bins of equal width: rows, mean score and share that churned; empty bins are left out."""
    index = np.minimum((scores * BINS).astype(int), BINS - 1)
    return [
        {
            "from": b / BINS,
            "rows": int(m.sum()),
            "mean_score": float(scores[m].mean()),
            "churned": float(target[m].mean()),
        }
        for b in range(BINS)
        if (m := index == b).any()
    ]


def figures(target: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """AUC, F1 and its parts at the threshold, Brier score and Brier skill.

    Skill is 1 - Brier / (rate * (1 - rate)): the share of the climatological forecast's error that the model
    removes (Brier 1950; Murphy 1973).
    """
    target = target.astype(bool)
    called = scores > threshold
    rate = float(target.mean())
    brier = float(np.mean((scores - target) ** 2))
    hits = int((called & target).sum())
    return {
        "auc": auc(target, scores),
        "f1": f1(target, called),
        "precision": hits / max(int(called.sum()), 1),
        "recall": hits / max(int(target.sum()), 1),
        "churn_rate": rate,
        "called_share": float(called.mean()),
        "brier": brier,
        "brier_skill": 1 - brier / (rate * (1 - rate)) if 0 < rate < 1 else float("nan"),
    }


def slice_masks(users: pd.DataFrame) -> dict[str, np.ndarray]:
    """A mask for each value of the slicing columns (categories and booleans of `users`), rows in its order."""
    masks = {}
    for column in users.columns:
        if (
            users[column].dtype == "boolean"
            or isinstance(users[column].dtype, pd.StringDtype)
            or users[column].dtype == object
        ):
            values = users[column].astype(str).str.lower()
            for value in sorted(values.unique()):
                if value not in ("<na>", "nan", "none"):
                    masks[f"{column}/{value}"] = (values == value).to_numpy()
    return masks


def permutation_importance(model: Any, frame: pd.DataFrame, target: np.ndarray, *, seed: int) -> dict[str, float]:
    """How much AUC falls when a feature's column is shuffled once (Breiman 2001); largest first."""
    random = np.random.default_rng(seed)
    base = auc(target, model.predict_proba(frame)[:, 1])
    falls = {}
    for name in frame.columns:
        shuffled = frame.assign(**{name: random.permutation(frame[name].to_numpy())})
        falls[name] = base - auc(target, model.predict_proba(shuffled)[:, 1])
    return dict(sorted(falls.items(), key=lambda item: -item[1]))


def plots(
    target: np.ndarray, scores: Mapping[str, np.ndarray], threshold: float, importance: Mapping[str, float]
) -> dict[str, bytes]:
    """PNG files by artifact path: ROC and precision-recall curves, confusion, calibration, feature importance."""
    from matplotlib.figure import Figure
    from sklearn.metrics import precision_recall_curve, roc_curve

    target = target.astype(bool)
    candidate = scores["candidate"]

    curves = Figure(figsize=(9, 4), layout="tight")
    roc, pr = curves.subplots(1, 2)
    for name, values in scores.items():
        false_rate, true_rate, _ = roc_curve(target, values)
        roc.plot(false_rate, true_rate, label=f"{name} {auc(target, values):.3f}")
        precision, recall, _ = precision_recall_curve(target, values)
        pr.plot(recall, precision, label=name)
    roc.plot([0, 1], [0, 1], linewidth=0.5, color="grey")
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC on the holdout")
    pr.axhline(target.mean(), linewidth=0.5, color="grey")
    pr.set(xlabel="recall", ylabel="precision", title="Precision and recall")
    roc.legend()

    confusion = Figure(figsize=(3.6, 3.4), layout="tight")
    axes = confusion.subplots()
    called = candidate > threshold
    table = np.array(
        [
            [(~called & ~target).sum(), (called & ~target).sum()],
            [(~called & target).sum(), (called & target).sum()],
        ]
    )
    axes.imshow(table, cmap="Blues")
    for (row, column), count in np.ndenumerate(table):
        axes.text(
            column,
            row,
            str(count),
            ha="center",
            va="center",
            color="white" if count > table.max() / 2 else "black",
        )
    axes.set(
        xticks=[0, 1],
        xticklabels=["not called", "called"],
        yticks=[0, 1],
        yticklabels=["stayed", "churned"],
        title=f"threshold {threshold:.3f}",
    )

    calibration = Figure(figsize=(4, 4), layout="tight")
    axes = calibration.subplots()
    bins = reliability_bins(target, candidate)
    axes.plot([b["mean_score"] for b in bins], [b["churned"] for b in bins], marker="o")
    axes.plot([0, 1], [0, 1], linewidth=0.5, color="grey")
    axes.set(xlabel="mean score", ylabel="share that churned", title="Calibration")

    bars = Figure(figsize=(6, 4.5), layout="tight")
    axes = bars.subplots()
    names: Sequence[str] = list(importance)[::-1]
    axes.barh(names, [importance[name] for name in names])
    axes.set(xlabel="fall of AUC when shuffled", title="Feature importance")
    return {
        "plots/curves.png": _png(curves),
        "plots/confusion.png": _png(confusion),
        "plots/calibration.png": _png(calibration),
        "plots/importance.png": _png(bars),
    }


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def as_json(value: object) -> bytes:
    """JSON for an artifact, readable and stable."""
    return json.dumps(value, indent=1, sort_keys=True, default=str).encode()
