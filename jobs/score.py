"""Score every user with the very bento that serves: into table `scores`, and a CSV of those most worth a call.

Offline features of the newest snapshot are scored, by the ONNX model out of the served archive, so that the
call list and `/predict` agree to the last digit as long as the online store holds the same snapshot.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from bentos.churn.model import Plan, Scorer
from jobs import dataset
from jobs.database import connect, scores
from jobs.history import History
from jobs.package import ensure_bento, extracted
from jobs.registry import ModelVersion, Registry
from jobs.settings import Settings
from jobs.snapshots import Snapshots, instant

log = logging.getLogger(__name__)

CHUNK = 50_000  # users scored and written at a time


@dataclass(frozen=True)
class ScoreResult:
    """How many users were scored, by what, and where the call list is."""

    result: Literal["scored", "nothing_served", "dry_run"]
    reason: str
    as_of: datetime
    snapshot: date | None = None
    users: int = 0
    not_scored: int = 0  # a feature the model cannot do without is missing
    bento_tag: str | None = None
    call_list: Path | None = None


def score(settings: Settings, *, as_of: datetime, dry_run: bool = False) -> ScoreResult:
    """Score the newest snapshot's users; again for the same snapshot replaces its scores.

    Without a served model this is success, with a reason: bulk scores begin with the first promotion.
    """
    engine = connect(settings.database)
    last = History(engine).last(good=True)
    if last is None or last.to_tag is None:
        return ScoreResult("nothing_served", "no model was promoted yet", as_of)
    snapshots = Snapshots(settings.snapshots)
    snapshots.recover()
    day = snapshots.newest(as_of)
    if day is None:
        raise LookupError(f"no snapshot on or before {as_of:%Y-%m-%d} was ingested")
    scorer = Scorer(extracted(settings, last.to_tag))
    frame = dataset.feature_frame(settings, day)
    filled = fill(frame, scorer.plan).dropna()
    not_scored = len(frame) - len(filled)
    if dry_run:
        return ScoreResult(
            "dry_run", f"would score {len(filled)} users", as_of, day, len(filled), not_scored, last.to_tag
        )
    probability = np.concatenate(
        [scorer.score(encode(filled[start : start + CHUNK], scorer.plan)) for start in range(0, len(filled), CHUNK)]
        or [np.empty(0, np.float32)]
    ).astype(float)
    churn = probability >= scorer.threshold
    with engine.begin() as connection:  # all or nothing: readers never see half a snapshot
        connection.execute(scores.delete().where(scores.c.as_of == instant(day)))
        for start in range(0, len(filled), CHUNK):
            part = slice(start, start + CHUNK)
            connection.execute(
                scores.insert(),
                [
                    {
                        "as_of": instant(day),
                        "user_id": user,
                        "bento_tag": last.to_tag,
                        "model_version": scorer.model_version,
                        "churn_probability": p,
                        "churn": c,
                    }
                    for user, p, c in zip(
                        filled.index[part], probability[part].tolist(), churn[part].tolist(), strict=True
                    )
                ],
            )
    call_list = _write_call_list(settings, day, filled.index, probability, scorer.bento_tag)
    if not_scored:
        log.warning("%d of %d users were not scored: a feature without default is missing", not_scored, len(frame))
    return ScoreResult(
        "scored",
        f"{int(churn.sum())} of {len(filled)} users are expected to churn",
        as_of,
        day,
        len(filled),
        not_scored,
        last.to_tag,
        call_list,
    )


def _write_call_list(settings: Settings, day: date, users: pd.Index, probability: np.ndarray, tag: str) -> Path:
    folder = settings.home.resolve() / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"call-list-{day}.csv"
    order = np.lexsort((users.to_numpy(), -probability))[: int(np.ceil(len(users) * settings.score_call_share))]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "churn_probability", "bento_tag"])
        writer.writerows((users[i], f"{probability[i]:.6f}", tag) for i in order)
    temporary.replace(path)
    return path


def fill(frame: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The plan's columns of the frame, missing values replaced by their defaults."""
    return frame[list(plan.names)].fillna({f.name: f.default for f in plan.features if f.default is not None})


def encode(frame: pd.DataFrame, plan: Plan) -> np.ndarray:
    """Complete rows as the float32 matrix the ONNX model takes: what `Plan.encode` does, a column at a time."""
    columns: Sequence[Any] = [
        frame[f.name].map({c: i for i, c in enumerate(f.categories)}) if f.categories else frame[f.name]
        for f in plan.features
    ]
    return np.ascontiguousarray(np.column_stack([c.to_numpy(dtype=np.float32) for c in columns]))


def production_scorer(settings: Settings, version: ModelVersion) -> tuple[Callable[[pd.DataFrame], np.ndarray], float]:
    """The scoring function and threshold of a version's bento, built if need be; it takes complete feature rows."""
    tag = ensure_bento(settings, connect(settings.database), Registry(settings), version)
    scorer = Scorer(extracted(settings, tag))
    return lambda frame: scorer.score(encode(frame, scorer.plan)).astype(float), scorer.threshold
