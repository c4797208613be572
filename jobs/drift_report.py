"""Measure how far each feature has moved, with Evidently, and how well the champion did; as HTML and JSON.

The methods are pinned, because Evidently's own choice changes at 1,000 rows: normed Wasserstein distance
for numbers, integers included, and Jensen-Shannon distance for categories and booleans. A column has
drifted when its distance reaches the threshold (>=).

Evidently raises on what real data brings (empty frames, columns without values, changed types), and its
figure is meaningless on few rows or against a constant. Those are answered here first, each by a stated
rule:

- An infinite value counts as missing.
- Fewer than `min_rows` rows on either side: nothing is judged. Fewer values than that in one column: that
  column is not.
- The share of missing values changed by the threshold or more: drifted, whatever the distance. (The total
  variation distance of "is missing" is exactly that change.)
- All values missing now, and not in the reference: drifted.
- A number that was constant in the reference: the distance's norm, the standard deviation, is 0. Its
  distance is the share of rows that now hold another value.

Left simple: columns are looked at one by one, so a changed relation between two of them goes unseen; frames
above `cap` rows are sampled, seeded, for the distance (missing shares are of all rows).

Realised performance is judged on users of the holdout, whom the champion was never trained on. Where these
are too few, all users are taken: having met them can only flatter the champion, so a low figure still says
something.
"""

from __future__ import annotations

import html
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any, Final, Literal, Protocol

import numpy as np
import pandas as pd
from pandas.api import types

from jobs import evaluation

log = logging.getLogger(__name__)

WASSERSTEIN: Final = "wasserstein"  # Evidently's names
JENSEN_SHANNON: Final = "jensenshannon"

Method = Literal["wasserstein", "jensenshannon", "constant", "missing", "none"]


class Watched(Protocol):
    """What is asked of a feature here: its name and kind. `jobs.dataset.Feature` is one."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...


class SchemaMismatch(ValueError):
    """A frame lacks a feature, or has it in another type than the feature service says."""

    def __init__(self, frame: str, column: str, found: str, expected: str) -> None:
        super().__init__(f"column {column} of the {frame} frame: found {found}, expected {expected}")
        self.frame, self.column, self.found, self.expected = frame, column, found, expected


@dataclass(frozen=True)
class ColumnDrift:
    """One column's judgement. `distance` is None where none could be measured; `reason` then says why."""

    name: str
    method: Method
    distance: float | None
    drifted: bool
    reason: str
    missing_reference: float
    missing_current: float


@dataclass(frozen=True)
class Comparison:
    """Reference against current, column by column; `not_judged` says why there are none, else it is empty."""

    columns: tuple[ColumnDrift, ...]
    rows_reference: int
    rows_current: int
    threshold: float
    not_judged: str
    html: bytes
    json: bytes

    @property
    def drifted(self) -> tuple[ColumnDrift, ...]:
        """The columns that have drifted, in the features' order."""
        return tuple(column for column in self.columns if column.drifted)

    @property
    def share(self) -> float:
        """Drifted columns among all looked at; those that could not be judged count as not drifted."""
        return len(self.drifted) / len(self.columns) if self.columns else 0.0


def compare(
    reference: pd.DataFrame,
    current: pd.DataFrame,
    features: Sequence[Watched],
    *,
    threshold: float,
    min_rows: int = 1000,
    cap: int = 100_000,
    seed: int = 0,
    title: str = "Drift",
) -> Comparison:
    """Compare the features of two frames as `jobs.dataset.feature_frame` makes them; others are ignored.

    Raises SchemaMismatch before anything is measured. The same frames give the same JSON, byte for byte.
    """
    threshold = float(threshold)  # numpy's would make numpy's booleans, which JSON does not know
    for name, frame in (("reference", reference), ("current", current)):
        check_schema(frame, features, name)
    before, now = _finite(reference, features), _finite(current, features)
    not_judged = _too_few(len(before), len(now), min_rows)
    columns: tuple[ColumnDrift, ...] = ()
    page: str | None = None
    if not not_judged:
        plan = {feature.name: _by_rule(before, now, feature, threshold, min_rows) for feature in features}
        measured = [feature for feature in features if plan[feature.name] is None]
        distances, page = _evidently(_sample(before, cap, seed), _sample(now, cap, seed + 1), measured, threshold)
        columns = tuple(
            plan[feature.name] or _by_distance(before, now, feature, distances[feature.name], threshold)
            for feature in features
        )
    content = {
        "rows": {"reference": len(before), "current": len(now)},
        "sampled_to": cap if max(len(before), len(now)) > cap else None,
        "threshold": threshold,
        "not_judged": not_judged,
        "columns": [asdict(column) for column in columns],
    }
    rows = [
        [
            c.name,
            "drifted" if c.drifted else "",
            c.reason,
            c.method,
            _percent(c.missing_reference),
            _percent(c.missing_current),
        ]
        for c in columns
    ]
    heading = ["column", "", "why", "method", "missing, reference", "missing, current"]
    note = not_judged or f"{len(before)} reference rows, {len(now)} current rows, threshold {threshold}"
    return Comparison(
        columns,
        len(before),
        len(now),
        threshold,
        not_judged,
        with_summary(page, title, table(note, heading, rows)),
        dump(content),
    )


def check_schema(frame: pd.DataFrame, features: Sequence[Watched], name: str) -> None:
    """Raise SchemaMismatch for the first feature that `frame` lacks or holds in the wrong type."""
    for feature in features:
        expected = "text (object of str, None for missing)" if feature.kind == "category" else "numbers (float64)"
        if feature.name not in frame.columns:
            raise SchemaMismatch(name, feature.name, "no such column", expected)
        values = frame[feature.name]
        if not isinstance(values, pd.Series):
            raise SchemaMismatch(name, feature.name, "the column twice", expected)
        if feature.kind != "category":
            right = types.is_numeric_dtype(values.dtype) and not types.is_complex_dtype(values.dtype)
        else:
            inferred = types.infer_dtype(values, skipna=True)
            right = inferred in ("string", "empty") and not isinstance(values.dtype, pd.CategoricalDtype)
            if not right and values.dtype == object:
                raise SchemaMismatch(name, feature.name, f"object of {inferred}", expected)
        if not right:
            raise SchemaMismatch(name, feature.name, str(values.dtype), expected)


def _finite(frame: pd.DataFrame, features: Sequence[Watched]) -> pd.DataFrame:
    """The features alone, infinities as missing, booleans as the words Evidently shall count; no index."""
    columns: dict[str, Any] = {}
    for feature in features:
        values = frame[feature.name]
        if feature.kind == "category":
            columns[feature.name] = values.astype(object).where(values.notna(), None).to_numpy()
            continue
        numbers = values.to_numpy(dtype="float64", na_value=np.nan).copy()
        numbers[~np.isfinite(numbers)] = np.nan
        if feature.kind == "bool":
            words = np.where(numbers == 0, "false", np.where(numbers == 1, "true", numbers.astype(str)))
            words = words.astype(object)
            words[np.isnan(numbers)] = None
            columns[feature.name] = words
        else:
            columns[feature.name] = numbers
    return pd.DataFrame(columns, index=pd.RangeIndex(len(frame)))


def _too_few(reference: int, current: int, min_rows: int) -> str:
    for name, rows in (("current", current), ("reference", reference)):
        if rows < min_rows:
            return f"not judged: {rows} {name} rows, expected at least {min_rows}"
    return ""


@dataclass(frozen=True)
class Realised:
    """How the champion did on a snapshot whose labels have come; `users` says whose figures decide."""

    snapshot: date
    users: Literal["holdout", "all", "none"]
    reason: str  # why these users, or why there are no figures
    holdout: dict[str, float] = field(default_factory=dict)
    everyone: dict[str, float] = field(default_factory=dict)
    bins: list[dict[str, float]] = field(default_factory=list)  # calibration, of the deciding users

    @property
    def figures(self) -> dict[str, float]:
        """The figures that decide; empty when not judged."""
        return {"holdout": self.holdout, "all": self.everyone, "none": {}}[self.users]

    @property
    def auc(self) -> float | None:
        """The AUC that decides, or None when not judged."""
        return self.figures.get("auc")


def realised_performance(
    snapshot: date,
    target: np.ndarray,
    scores: np.ndarray,
    held_out: np.ndarray,
    *,
    threshold: float,
    min_class_rows: int,
) -> Realised:
    """AUC, F1, Brier and calibration of scores against labels that have come; arrays are of the same users.

    `target` and `held_out` are bool. Fewer than `min_class_rows` churners or stayers are not judged.
    """
    target, held_out = target.astype(bool), held_out.astype(bool)
    odd = int((~np.isfinite(scores)).sum())
    if odd:
        return Realised(snapshot, "none", f"not judged: {odd} scores are NaN or infinite")

    def judged(mask: np.ndarray) -> dict[str, float]:
        churned, stayed = int(target[mask].sum()), int((~target[mask]).sum())
        if min(churned, stayed) < min_class_rows:
            return {}
        rows = {"rows": float(churned + stayed), "positives": float(churned)}
        return rows | evaluation.figures(target[mask], scores[mask], threshold)

    everyone = np.ones_like(target)
    of_holdout, of_all = judged(held_out), judged(everyone)
    if of_holdout:
        bins = evaluation.reliability_bins(target[held_out], scores[held_out])
        return Realised(snapshot, "holdout", "users the model was never trained on", of_holdout, of_all, bins)
    counts = f"{int(target[held_out].sum())} churners and {int((~target[held_out]).sum())} others"
    if of_all:
        expected = f"expected at least {min_class_rows} of each"
        reason = f"all users, which may flatter the model: the holdout has {counts}, {expected}"
        return Realised(snapshot, "all", reason, {}, of_all, evaluation.reliability_bins(target, scores))
    counts = f"{int(target.sum())} churners and {int((~target).sum())} others"
    return Realised(snapshot, "none", f"not judged: {counts}, expected at least {min_class_rows} of each")


SCORE = "churn_probability"


@dataclass(frozen=True)
class ScoreColumn:
    """The model's score, watched like a feature where predictions are compared."""

    name: str = SCORE
    kind: str = "float"


def logged_frame(rows: Iterable[tuple[str, float]], features: Sequence[Watched]) -> pd.DataFrame:
    """The prediction log's rows (`features` as JSON, score) as a frame like the reference's, and the score.

    A value that is not of its feature's kind counts as missing, and so shows in the report.
    """
    inputs, scores = [], []
    for text, score in rows:
        inputs.append(json.loads(text))
        scores.append(score)
    raw = pd.DataFrame(inputs, columns=[feature.name for feature in features], dtype=object)
    columns: dict[str, Any] = {}
    for feature in features:
        values = raw[feature.name]
        if feature.kind == "category":
            columns[feature.name] = values.where(values.map(lambda value: isinstance(value, str)), None)
        else:
            columns[feature.name] = pd.to_numeric(values, errors="coerce").astype("float64")
    return pd.DataFrame(columns, index=raw.index).assign(**{SCORE: np.array(scores, dtype="float64")})


def _by_rule(
    before: pd.DataFrame, now: pd.DataFrame, feature: Watched, threshold: float, min_rows: int
) -> ColumnDrift | None:
    """The judgement of a column that Evidently cannot be asked about; None: ask Evidently."""
    values, new = before[feature.name].dropna(), now[feature.name].dropna()
    gone_before, gone_now = _missing(before, now, feature)

    def judged(method: Method, distance: float | None, drifted: bool, reason: str) -> ColumnDrift:
        if not drifted and abs(gone_now - gone_before) >= threshold:
            method, drifted, reason = "missing", True, _missing_changed(gone_before, gone_now, threshold)
        return ColumnDrift(feature.name, method, distance, drifted, reason, gone_before, gone_now)

    if values.empty and new.empty:
        return judged("none", None, False, "no values, then and now")
    if new.empty:
        reason = f"all values missing, were {_percent(gone_before)} in the reference"
        return judged("missing", None, True, reason)
    if min(len(values), len(new)) < min_rows:
        side, count = ("reference", len(values)) if len(values) < len(new) else ("current", len(new))
        return judged("none", None, False, f"not judged: {count} {side} values, expected at least {min_rows}")
    if feature.kind in ("int", "float") and values.min() == values.max():
        constant = float(values.iloc[0])
        other = float((new != constant).mean())
        reason = f"was always {constant:g}, share of other values {against(other, threshold)}"
        return judged("constant", other, other >= threshold, reason)
    return None


def _by_distance(
    before: pd.DataFrame, now: pd.DataFrame, feature: Watched, distance: float, threshold: float
) -> ColumnDrift:
    gone_before, gone_now = _missing(before, now, feature)
    method: Method = _method(feature)
    drifted, reason = distance >= threshold, against(distance, threshold)
    if not drifted and abs(gone_now - gone_before) >= threshold:
        method, drifted, reason = "missing", True, _missing_changed(gone_before, gone_now, threshold)
    return ColumnDrift(feature.name, method, distance, drifted, reason, gone_before, gone_now)


def _missing(before: pd.DataFrame, now: pd.DataFrame, feature: Watched) -> tuple[float, float]:
    return float(before[feature.name].isna().mean()), float(now[feature.name].isna().mean())


def _missing_changed(before: float, now: float, threshold: float) -> str:
    return f"missing {_percent(before)} → {_percent(now)}: changed by {against(abs(now - before), threshold)}"


def against(value: float, limit: float) -> str:
    """`0.205 ≥ 0.1`, with as many digits as it takes for the sentence to be true."""
    text = ""
    for digits in (3, 6, 17):
        text = f"{value:.{digits}g}"
        if (float(text) >= limit) == (value >= limit):
            break
    return f"{text} {'≥' if value >= limit else '<'} {limit:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _method(feature: Watched) -> Literal["wasserstein", "jensenshannon"]:
    return WASSERSTEIN if feature.kind in ("int", "float") else JENSEN_SHANNON


def _sample(frame: pd.DataFrame, cap: int, seed: int) -> pd.DataFrame:
    return frame if len(frame) <= cap else frame.sample(cap, random_state=seed).reset_index(drop=True)


def _evidently(
    before: pd.DataFrame, now: pd.DataFrame, features: Sequence[Watched], threshold: float
) -> tuple[dict[str, float], str | None]:
    """Distances by column and the HTML page, from Evidently; nothing to measure, no page.

    Normed Wasserstein: the area between the two distribution functions (Vallender 1974) over the reference's
    standard deviation (`ddof` 0, at least 0.001). Jensen-Shannon: the square root of the divergence with
    natural logarithm (Endres & Schindelin 2003), at most sqrt(ln 2) = 0.83.
    """
    if not features:
        return {}, None
    os.environ["DO_NOT_TRACK"] = "1"  # Evidently looks at import
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    names = [feature.name for feature in features]
    # without a definition, integers with few values become categories
    definition = DataDefinition(
        numerical_columns=[f.name for f in features if _method(f) == WASSERSTEIN],
        categorical_columns=[f.name for f in features if _method(f) == JENSEN_SHANNON],
    )
    report = Report([ValueDrift(column=f.name, method=_method(f), threshold=threshold) for f in features])
    with np.errstate(all="ignore"):  # correlations of constant columns, for plots only
        snapshot = report.run(
            Dataset.from_pandas(now[names], data_definition=definition),  # current comes first
            Dataset.from_pandas(before[names], data_definition=definition),
        )
    measured = {metric["config"]["column"]: float(metric["value"]) for metric in snapshot.dict()["metrics"]}
    odd = [name for name in names if not np.isfinite(measured.get(name, np.nan))]
    if odd:
        raise RuntimeError(f"Evidently measured no distance for {', '.join(odd)}")
    return measured, str(snapshot.get_html_str(as_iframe=False))


def table(note: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A note and a table as HTML; everything is escaped."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = cells("th", heading) + "".join(cells("td", row) for row in rows) if rows else ""
    return f"<p>{html.escape(note)}</p><table>{body}</table>"


def with_summary(page: str | None, title: str, summary: str) -> bytes:
    """Evidently's page with our summary above it, or the summary as a page of its own."""
    style = (
        "<style>.churn{font:14px sans-serif;margin:1.5em}.churn table{border-collapse:collapse}"
        ".churn td,.churn th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}</style>"
    )
    block = f"{style}<div class='churn'><h1>{html.escape(title)}</h1>{summary}</div>"
    if page is None:
        head = "<!DOCTYPE html><html lang='en'><head><meta charset='UTF-8'></head>"
        return f"{head}<body>{block}</body></html>".encode()
    head, found, rest = page.partition("<body>")
    return f"{head}{found}{block}{rest}".encode() if found else page.encode()


def dump(content: Mapping[str, Any]) -> bytes:
    """JSON that is the same for the same content: sorted keys, no NaN, no clock."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
