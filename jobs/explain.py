"""Where a prediction came from: the bento, who promoted it and why, the training behind it, the features and their age.

Everything is on record already: the prediction log has the features as the model saw them, table `promotions` says
since when a bento served, the registry has the version's training and gate. Where the registry does not answer, or has
forgotten the version, table `models` tells what `retrain` recorded there. Which feature moved the score how far is
not said: that is another question.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobs.database import connect, predictions, promotions
from jobs.history import GOOD
from jobs.package import bento_of, version_of
from jobs.provenance import record_of, record_of_version
from jobs.registry import Registry, RegistryError
from jobs.settings import Settings

TRAINING = ("trained_as_of", "algorithm", "data_fingerprint", "gate", "gate_reason")  # tags of a version


class UnknownRequest(LookupError):
    """No prediction of that id is in the log."""


@dataclass(frozen=True)
class Explanation:
    """One prediction with all that is known of its origin."""

    prediction: dict[str, Any]  # the row of the log, its features apart
    features: dict[str, Any]
    features_age_days: float | None  # when it was made; None: the features came with the request
    promotion: dict[str, Any] | None  # what made this bento the served one; None: older than the record
    training: dict[str, str]
    training_missing: str  # why the registry has no part in `training`; empty: it has


def explain(settings: Settings, request: str) -> list[Explanation]:
    """One explanation for each user of a request, or the one of a prediction_id; raises UnknownRequest.

    Rows reach the log within a second or two of the answer, later while the database was away.
    """
    engine = connect(settings.database)
    table = predictions.c
    query = sa.select(predictions).where(sa.or_(table.request_id == request, table.prediction_id == request))
    with engine.connect() as connection:
        rows = [dict(row._mapping) for row in connection.execute(query.order_by(table.prediction_id))]
        if not rows:
            raise UnknownRequest(
                f"{request!r} is no request_id and no prediction_id in the log of {settings.release}; "
                "what was answered just now, or while the database was away, comes a little later"
            )
        promoted = {row["bento_tag"]: _promotion(connection, row["bento_tag"], row["predicted_at"]) for row in rows}
    trained = {row["bento_tag"]: _training(settings, engine, row["model_version"], row["bento_tag"]) for row in rows}
    return [_explained(row, promoted[row["bento_tag"]], *trained[row["bento_tag"]]) for row in rows]


def _promotion(connection: sa.Connection, tag: str, at: datetime) -> dict[str, Any] | None:
    """The newest promotion to the tag that was opened before; its pods answer before it is closed."""
    table = promotions.c
    query = sa.select(promotions).where(table.to_tag == tag, table.opened_at <= at).order_by(table.id.desc())
    found = [dict(row._mapping) for row in connection.execute(query)]
    good = [row for row in found if row["result"] in (*GOOD, None)]
    return next(iter(good or found), None)


def _training(settings: Settings, engine: sa.Engine, number: int, tag: str) -> tuple[dict[str, str], str]:
    try:
        version = version_of(engine, Registry(settings), number, tag)
        missing = f"the model registry has no version {number} of that run"
    except RegistryError as error:
        version, missing = None, str(error)
    if version is not None:
        return {"run_id": version.run_id, **{key: version.tags[key] for key in TRAINING if key in version.tags}}, ""
    stored = bento_of(engine, tag)  # a number may come again, in another registry
    recorded = record_of(engine, stored.run_id) if stored else record_of_version(engine, number)
    if recorded is None:
        return {}, missing
    return {name: str(getattr(recorded, name)) for name in ("run_id", *TRAINING) if hasattr(recorded, name)}, missing


def _explained(
    row: dict[str, Any], promotion: dict[str, Any] | None, training: dict[str, str], missing: str
) -> Explanation:
    features = json.loads(row.pop("features"))
    age = None
    if row["features_as_of"]:
        age = (row["predicted_at"] - datetime.fromisoformat(row["features_as_of"])).total_seconds() / 86400
    return Explanation(row, features, age, promotion, training, missing)


def lines(found: Explanation) -> list[tuple[str, str]]:
    """The same for people."""
    row, promotion, training = found.prediction, found.promotion, found.training
    decision = "churn" if row["churn"] else "stays"
    shown = [
        (
            "prediction",
            f"{row['prediction_id']} of request {row['request_id']}, {row['predicted_at']:%Y-%m-%d %H:%M:%S} UTC",
        ),
        ("user", f"{row['user_id'] or 'none: the features came with the request'} (asked by: {row['source']})"),
        ("score", f"{row['churn_probability']:.6f}, threshold {row['threshold']:.6f}: {decision}"),
        ("served by", f"{row['bento_tag']}, model version {row['model_version']}"),
    ]
    if promotion:
        when = f"{promotion['opened_at']:%Y-%m-%d %H:%M:%S} UTC"
        shown.append(("promoted", f"{when} by {promotion['by']} ({promotion['action']}): {promotion['reason']}"))
    else:
        shown.append(("promoted", "no promotion of it is on record"))
    if training:
        day, how = training.get("trained_as_of", "?"), training.get("algorithm", "a model")
        shown.append(("trained", f"{how} on the snapshot of {day}, data {training.get('data_fingerprint', '?')[:12]}"))
        judged = [training.get("gate", "?"), training.get("gate_reason")]
        shown.append(("gate", ": ".join(filter(None, judged))))
    if found.training_missing:
        shown.append(("algorithm, gate reason" if training else "trained", f"not known: {found.training_missing}"))
    if found.features_age_days is not None:
        stale = ", stale" if row["stale"] else ""
        shown.append(("features as of", f"{row['features_as_of']}, {found.features_age_days:.1f} days old then{stale}"))
    return shown + [(f"  {name}", str(value)) for name, value in found.features.items()]
