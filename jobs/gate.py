"""Whether a candidate may go to production: pure functions of scores and labels, on rows neither model has seen.

The gate is the only thing between a bad training run and the users, so every rule says in a sentence why it
passed or refused, and NaN refuses. What it cannot see: a label that is wrong in the same way for both models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


def should_promote(new_auc: float, production_auc: float | None, delta: float = 0.01) -> bool:
    """Whether the candidate's AUC reaches the champion's plus delta; True without a champion; NaN is False."""
    if math.isnan(new_auc) or (production_auc is not None and math.isnan(production_auc)):
        return False
    return production_auc is None or new_auc >= production_auc + delta


def auc(target: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney U, ties count half); NaN if a class is absent or a score NaN."""
    positives = int(target.sum())
    negatives = len(target) - positives
    if not positives or not negatives or np.isnan(scores).any():
        return math.nan
    return float((_midranks(scores)[target].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _midranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def bootstrap_auc(target: np.ndarray, *scores: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """AUCs over stratified resamples of the rows, shape (samples, number of scores); each resample serves all scores.

    Stratified: positives and negatives are drawn apart, so that each resample has both (Efron & Tibshirani 1993,
    chapter 8).
    A resample is counted by weights on the distinct scores, which costs O(distinct) instead of a sort.
    """
    random = np.random.default_rng(seed)
    positive, negative = np.flatnonzero(target), np.flatnonzero(~target)
    codes = [np.unique(s, return_inverse=True)[1] for s in scores]
    sizes = [int(c.max()) + 1 for c in codes]
    result = np.empty((samples, len(scores)))
    for row in range(samples):
        drawn_positive = random.choice(positive, len(positive))
        drawn_negative = random.choice(negative, len(negative))
        for column, (code, size) in enumerate(zip(codes, sizes, strict=True)):
            p = np.bincount(code[drawn_positive], minlength=size)
            n = np.bincount(code[drawn_negative], minlength=size)
            below = np.cumsum(n) - n
            result[row, column] = (p * (below + n / 2)).sum() / (len(positive) * len(negative))
    return result


def f1(target: np.ndarray, called: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 when nobody is called and nobody churned."""
    denominator = called.sum() + target.sum()
    return float(2 * (called & target).sum() / denominator) if denominator else 0.0


@dataclass(frozen=True)
class GateRules:
    """The gate's numbers; each is a setting of the same name."""

    promotion_delta: float = 0.01
    bootstrap_samples: int = 2000
    first_auc_floor: float = 0.55
    min_class_rows: int = 100
    slice_floor: float = -0.05
    slice_min_positives: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Verdict:
    """`passed`, why not (or why), and the figures: AUCs, the difference with its bounds, F1, slices."""

    passed: bool
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)
    slices: dict[str, dict[str, float]] = field(default_factory=dict)


def judge(
    target: np.ndarray,
    candidate: np.ndarray,
    champion: np.ndarray | None,
    *,
    threshold: float,
    slices: Mapping[str, np.ndarray],
    rules: GateRules,
) -> Verdict:
    """Judge the candidate's scores against the champion's (None: no champion) on the same holdout rows.

    `target` is bool, scores are float, both of shape (rows,); `slices` are bool masks by name.
    The lower bound is the 5 % quantile of the bootstrap: one-sided, 95 %.
    """
    target = target.astype(bool)
    positives, negatives = int(target.sum()), int((~target).sum())
    metrics = {"holdout_rows": float(len(target)), "holdout_positives": float(positives)}
    if min(positives, negatives) < rules.min_class_rows:
        return Verdict(
            False,
            f"the holdout has {positives} positives and {negatives} negatives; "
            f"expected at least {rules.min_class_rows} of each",
            metrics,
        )
    for name, scores in (("candidate", candidate), ("champion", champion)):
        if scores is not None and not np.isfinite(scores).all():
            return Verdict(
                False, f"the {name} scores {int((~np.isfinite(scores)).sum())} users NaN or infinite", metrics
            )

    new_auc = auc(target, candidate)
    old_auc = None if champion is None else auc(target, champion)
    called = candidate > threshold
    metrics |= {
        "auc": new_auc,
        "f1": f1(target, called),
        "f1_everyone": f1(target, np.ones_like(target)),
        "called_share": float(called.mean()),
    }
    all_scores = [candidate] if champion is None else [candidate, champion]
    resampled = bootstrap_auc(target, *all_scores, samples=rules.bootstrap_samples, seed=rules.seed)
    reasons = []
    if champion is None or old_auc is None:
        lower = float(np.quantile(resampled[:, 0], 0.05))
        metrics["auc_lower"] = lower
        if not lower > rules.first_auc_floor:
            reasons.append(f"first model: lower bound of AUC {lower:.3f} is not above {rules.first_auc_floor}")
        slice_metrics, _ = _slices(target, candidate, None, slices, rules)
    else:
        difference = resampled[:, 0] - resampled[:, 1]
        lower = float(np.quantile(difference, 0.05))
        metrics |= {
            "champion_auc": old_auc,
            "auc_difference": new_auc - old_auc,
            "auc_difference_lower": lower,
        }
        if not should_promote(new_auc, old_auc, rules.promotion_delta):
            reasons.append(f"AUC {new_auc:.3f} is below the champion's {old_auc:.3f} + {rules.promotion_delta}")
        if not lower > 0:
            reasons.append(f"the difference to the champion may be chance: its lower bound is {lower:.4f}")
        slice_metrics, worse = _slices(target, candidate, champion, slices, rules)
        reasons += [worse] if worse else []
    if not metrics["f1"] > metrics["f1_everyone"]:
        reasons.append(f"F1 {metrics['f1']:.3f} is not above that of calling everyone, {metrics['f1_everyone']:.3f}")
    if reasons:
        return Verdict(False, "; ".join(reasons), metrics, slice_metrics)
    if old_auc is None:
        why = f"first model: AUC {new_auc:.3f}, lower bound {metrics['auc_lower']:.3f} > {rules.first_auc_floor}"
    else:
        least = f"difference at least {metrics['auc_difference_lower']:.3f}"
        why = f"AUC {new_auc:.3f} against the champion's {old_auc:.3f}, {least}"
    return Verdict(True, why, metrics, slice_metrics)


def _slices(
    target: np.ndarray,
    candidate: np.ndarray,
    champion: np.ndarray | None,
    slices: Mapping[str, np.ndarray],
    rules: GateRules,
) -> tuple[dict[str, dict[str, float]], str | None]:
    """Figures of each slice, and the reason to refuse if some are surely worse. Small slices are reported only."""
    result: dict[str, dict[str, float]] = {}
    worse: dict[str, float] = {}
    for name, mask in slices.items():
        rows = target[mask]
        positives = int(rows.sum())
        figures = {"rows": float(len(rows)), "positives": float(positives), "auc": auc(rows, candidate[mask])}
        if champion is not None:
            figures["champion_auc"] = auc(rows, champion[mask])
            if min(positives, len(rows) - positives) >= rules.slice_min_positives:
                samples = max(200, rules.bootstrap_samples // 4)
                resampled = bootstrap_auc(rows, candidate[mask], champion[mask], samples=samples, seed=rules.seed)
                upper = float(np.quantile(resampled[:, 0] - resampled[:, 1], 0.95))
                figures["auc_difference_upper"] = upper
                if upper < rules.slice_floor:
                    worse[name] = upper
        result[name] = figures
    if not worse:
        return result, None
    worst = min(worse, key=lambda name: worse[name])
    others = f" ({len(worse)} slices are)" if len(worse) > 1 else ""
    reason = (
        f"slice {worst} is surely worse than the champion by {-worse[worst]:.3f}, allowed {-rules.slice_floor}{others}"
    )
    return result, reason
