"""Train the next candidate, judge it against the champion on users neither has seen, and register it.

The newest snapshot whose labels are known is trained on, never a later one, whatever files lie in the folder.
Users of the holdout are never trained on, in any month: a forest that saw a user's earlier month would look
better than it is. Nothing is registered twice for the same data and settings.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from bentos.churn import packaging
from jobs import database, dataset, evaluation, gate, provenance
from jobs.candidates import Selection, select
from jobs.failpoints import failpoint
from jobs.lease import Held, lease
from jobs.registry import CANDIDATE, ModelRefused, ModelVersion, Registry, TrainingRun
from jobs.settings import Settings
from jobs.snapshots import Snapshots

if TYPE_CHECKING:
    import sqlalchemy as sa

    from jobs.dataset import Feature, TrainingSet

log = logging.getLogger(__name__)

GOLDEN_ROWS = 50  # reproduced by every process before it is ready

# settings that make another model or another verdict of the same data
TRAINING_SETTINGS = (
    "seed",
    "holdout_salt",
    "holdout_share",
    "training_snapshots",
    "candidates",
    "calibration",
    "threshold",
    "top_k_share",
    "promotion_delta",
    "bootstrap_samples",
    "first_auc_floor",
    "min_class_rows",
    "slice_floor",
    "slice_min_positives",
)


@dataclass(frozen=True)
class RetrainResult:
    """What came of it; `waiting_for_labels`, `unchanged` and `held` (another works) are success."""

    result: Literal["registered", "unchanged", "waiting_for_labels", "held", "dry_run"]
    reason: str
    as_of: datetime
    trained_on: tuple[date, ...] = ()
    version: int | None = None
    gate: Literal["passed", "refused"] | None = None
    algorithm: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    known_at: datetime | None = None  # waiting_for_labels: until when


def retrain(
    settings: Settings,
    *,
    as_of: datetime,
    wanted_by: str = "person",
    reason: str = "asked for by hand",
    dry_run: bool = False,
) -> RetrainResult:
    """Train and register a candidate as of an instant; raises if there is no snapshot or a store does not answer.

    One at a time: while another works the result is `held`. Kept in table `retrains`, a wish that must wait for
    labels included.
    """
    if dry_run:
        return _retrain(settings, None, as_of=as_of)
    try:
        with lease(settings, "retrain"):
            engine = database.connect(settings.database)
            table = database.retrains
            with engine.begin() as connection:
                killed = table.update().where(table.c.result.is_(None))  # nobody else works: we hold the lease
                connection.execute(killed.values(result="failed", detail="killed", finished_at=datetime.now(UTC)))
                row = connection.execute(
                    table.insert().values(as_of=as_of, wanted_by=wanted_by, reason=reason)
                ).inserted_primary_key
            try:
                result = _retrain(settings, engine, as_of=as_of)
            except Exception as error:
                _note(engine, row, result="failed", detail=str(error))
                raise
            _note(
                engine,
                row,
                result=result.result,
                detail=result.reason,
                version=result.version,
                known_at=result.known_at,
            )
            return result
    except Held as held:
        return RetrainResult("held", str(held), as_of)


def _note(engine: sa.Engine, row: Any, **values: Any) -> None:
    table = database.retrains
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == row[0]).values(**values, finished_at=datetime.now(UTC)))


def _retrain(settings: Settings, engine: sa.Engine | None, *, as_of: datetime) -> RetrainResult:
    """The work itself; without an engine a dry run, which writes nothing."""
    snapshots = Snapshots(settings.snapshots)
    snapshots.recover()
    newest = snapshots.newest(as_of)
    if newest is None:
        raise LookupError(
            f"no snapshot on or before {as_of:%Y-%m-%d} was ingested; `churn ingest DIR --as-of DATE` takes one"
        )
    registry = Registry(settings)
    champion = registry.production()
    days = dataset.training_days(settings, as_of)
    settings_fingerprint = _settings_fingerprint(settings)
    stale_settings = champion is not None and champion.tags.get("settings_fingerprint") != settings_fingerprint
    if not days or (champion and champion.trained_as_of >= days[-1] and not stale_settings):
        return _waiting(settings, as_of, newest, days)

    for day in days:
        snapshots.check(day)
    training = dataset.training_set(settings, days)
    fingerprint = training.fingerprint
    same = _same_version(registry, engine, fingerprint, settings_fingerprint)
    champion_number = "" if champion is None else str(champion.version)
    if same is not None and same.tags.get("champion") == champion_number:
        if engine is not None:
            _name(registry, engine, same)
        reason = f"version {same.version} has the same data and settings{_allowed_by(same)}"
        return RetrainResult("unchanged", reason, as_of, days, same.version, "passed" if same.passed else "refused")

    log.info("training on %s: %d rows", ", ".join(map(str, days)), len(training.features))
    candidate = fit(settings, training, dataset.features(settings))
    verdict, champion_scores = _judge(settings, registry, engine, candidate, champion)
    status: Literal["passed", "refused"] = "passed" if verdict.passed else "refused"
    log.info("gate=%s: %s", status, verdict.reason)
    metrics = {
        **evaluation.figures(candidate.target, candidate.scores, candidate.selection.threshold),
        **verdict.metrics,
    }
    if engine is None:
        return RetrainResult("dry_run", verdict.reason, as_of, days, None, status, candidate.selection.name, metrics)
    if same is not None:  # the champion is another than it was judged against: the verdict is renewed, the model is not
        judged = {"gate": status, "gate_reason": verdict.reason[:4900], "champion": champion_number}
        judged["champion_auc"] = str(verdict.metrics.get("champion_auc", ""))
        provenance.record_gate(engine, same, status)
        registry.set_tags(same.version, judged)
        _name(registry, engine, same)
        anew = f"judged anew: {verdict.reason}{_allowed_by(same)}"
        reason = f"version {same.version} has the same data and settings, {anew}"
        return RetrainResult("unchanged", reason, as_of, days, same.version, status, candidate.selection.name, metrics)
    run = _training_run(
        settings,
        as_of,
        training,
        candidate,
        verdict,
        champion,
        champion_scores,
        metrics,
        fingerprint,
        settings_fingerprint,
    )
    failpoint("retrain.trained")
    logged = registry.log_training(run)
    provenance.record_training(engine, run, logged)
    failpoint("retrain.recorded")
    created = registry.register(logged, run.version_tags)
    failpoint("retrain.registered")
    provenance.record_version(engine, created)
    registry.set_alias(CANDIDATE, created.version)
    return RetrainResult(
        "registered", verdict.reason, as_of, days, created.version, status, candidate.selection.name, metrics
    )


def _same_version(registry: Registry, engine: sa.Engine | None, data: str, settings: str) -> ModelVersion | None:
    """The newest version that was trained on the same data with the same settings, and is still what it was."""
    for version in registry.versions():
        if (version.tags.get("data_fingerprint"), version.tags.get("settings_fingerprint")) == (data, settings):
            changed = "" if engine is None else provenance.what_changed(engine, registry, version)
            if not changed:
                return version
            log.warning("version %d is trained anew: %s", version.version, changed)
    return None


def _allowed_by(version: ModelVersion) -> str:
    """What has to be said of a version that passed and still is not promoted unasked."""
    if not (version.passed and version.spent):
        return ""
    return f"; it is not promoted again ({version.spent}) unless `churn approve {version.version}` allows it"


def _name(registry: Registry, engine: sa.Engine, version: ModelVersion) -> None:
    """Give the alias `candidate` to a version that was registered by a job killed before it could."""
    provenance.record_version(engine, version)
    named = registry.aliases().get(CANDIDATE)
    if not version.spent and (named is None or named < version.version):
        registry.set_alias(CANDIDATE, version.version)


def _waiting(settings: Settings, as_of: datetime, newest: date, days: Sequence[date]) -> RetrainResult:
    later = [day for day in Snapshots(settings.snapshots).days() if not days or day > days[-1]]
    later = [day for day in later if day <= newest]
    if not later:
        reason = f"production was trained on {newest}, the newest snapshot; the next one and its labels are waited for"
        return RetrainResult("waiting_for_labels", reason, as_of, tuple(days))
    until = dataset.known_at(settings, later[0])
    arrived = "" if until > as_of else "; they should be known, but have not arrived"
    reason = f"labels of {later[0]} are known on {until:%Y-%m-%d}{arrived}"
    return RetrainResult("waiting_for_labels", reason, as_of, tuple(days), known_at=until)


@dataclass(frozen=True)
class Candidate:
    """A fitted model with its scores on the holdout rows of the newest snapshot of its training window."""

    day: date
    selection: Selection
    plan: list[dict[str, Any]]  # the features with resolved defaults, as the bento carries them
    frame: pd.DataFrame  # the holdout rows, defaults filled in
    target: np.ndarray
    scores: np.ndarray


def resolve(plan: Sequence[Feature], defaults: dict[str, float]) -> list[dict[str, Any]]:
    """The features as plain dicts, each with the number that stands in for a missing value (or None)."""
    return [{**asdict(feature), "default": defaults.get(feature.name)} for feature in plan]


def fill(frame: pd.DataFrame, plan: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The frame with the plan's columns, missing values replaced by their defaults."""
    names = [feature["name"] for feature in plan]
    return frame[names].fillna({f["name"]: f["default"] for f in plan if f["default"] is not None})


def complete(frame: pd.DataFrame, plan: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The filled rows that lack nothing the model cannot do without."""
    return fill(frame, plan).dropna()


def fit(settings: Settings, training: TrainingSet, features: Sequence[Feature]) -> Candidate:
    """Choose and fit the best candidate on the users outside the holdout, and score the holdout."""
    held_out = dataset.in_holdout(training.features.index, salt=settings.holdout_salt, share=settings.holdout_share)
    plan = resolve(features, dataset.defaults(features, training.features[~held_out]))
    frame = fill(training.features, plan)
    selection = select(
        settings.candidates,
        features,
        frame[~held_out],
        training.labels[~held_out],
        seed=settings.seed,
        calibration=settings.calibration,
        threshold=settings.threshold,
        top_k_share=settings.top_k_share,
    )
    newest = held_out.copy()
    newest[: len(frame) - training.rows[-1]] = False
    holdout = frame[newest]
    return Candidate(
        training.days[-1],
        selection,
        plan,
        holdout,
        training.labels[newest].to_numpy(),
        selection.model.predict_proba(holdout)[:, 1],
    )


def _judge(
    settings: Settings,
    registry: Registry,
    engine: sa.Engine | None,
    candidate: Candidate,
    champion: ModelVersion | None,
) -> tuple[gate.Verdict, np.ndarray | None]:
    scores = None
    if champion is not None:
        if engine is not None and (changed := provenance.what_changed(engine, registry, champion)):
            raise ModelRefused(f"a candidate cannot be compared with the champion: {changed}")
        theirs = (champion.tags.get("holdout_salt"), champion.tags.get("holdout_share"))
        ours = (settings.holdout_salt, str(settings.holdout_share))
        if theirs != ours:
            reason = (
                f"holdout differs: the champion's salt and share are {theirs}, ours {ours}; users may have been seen"
            )
            return gate.Verdict(False, reason), None
        plan = json.loads(registry.artifact(champion.run_id, "features.json").read_text())
        lacking = {f["name"] for f in plan} - set(candidate.frame.columns)
        if lacking:
            return gate.Verdict(
                False, f"the champion needs {sorted(lacking)}, which the feature service no longer has"
            ), None
        scores = registry.load_model(champion).predict_proba(fill(candidate.frame, plan))[:, 1]
    users = Snapshots(settings.snapshots).read("users", candidate.day)
    slices = evaluation.slice_masks(users.reindex(candidate.frame.index))
    rules = gate.GateRules(**{name: getattr(settings, name) for name in gate.GateRules.__dataclass_fields__})
    verdict = gate.judge(
        candidate.target,
        candidate.scores,
        scores,
        threshold=candidate.selection.threshold,
        slices=slices,
        rules=rules,
    )
    return verdict, scores


def _training_run(
    settings: Settings,
    as_of: datetime,
    training: TrainingSet,
    candidate: Candidate,
    verdict: gate.Verdict,
    champion: ModelVersion | None,
    champion_scores: np.ndarray | None,
    metrics: dict[str, float],
    fingerprint: str,
    settings_fingerprint: str,
) -> TrainingRun:
    selection = candidate.selection
    day = training.days[-1]
    reference = dataset.feature_frame(settings, day)
    scores = {"candidate": candidate.scores} | ({} if champion_scores is None else {"champion": champion_scores})
    importance = evaluation.permutation_importance(
        selection.model, candidate.frame, candidate.target, seed=settings.seed
    )
    rows = complete(reference, candidate.plan)
    golden = packaging.spread(rows, selection.model.predict_proba(rows)[:, 1], GOLDEN_ROWS)
    version_tags = {
        "gate": "passed" if verdict.passed else "refused",
        "gate_reason": verdict.reason[:4900],
        "as_of": as_of.astimezone(UTC).isoformat(),
        "trained_as_of": day.isoformat(),
        "algorithm": selection.name,
        "threshold": repr(selection.threshold),
        "holdout_salt": settings.holdout_salt,
        "holdout_share": str(settings.holdout_share),
        "data_fingerprint": fingerprint,
        "settings_fingerprint": settings_fingerprint,
        "feature_service": dataset.FEATURE_SERVICE,
        "auc": repr(metrics["auc"]),
        "champion": "" if champion is None else str(champion.version),
    }
    parameters: dict[str, object] = {name: getattr(settings, name) for name in TRAINING_SETTINGS}
    parameters |= {
        "algorithm": selection.name,
        "decision_threshold": selection.threshold,
        "as_of": as_of.isoformat(),
        "trained_on": ",".join(map(str, training.days)),
        "feature_service": dataset.FEATURE_SERVICE,
        "data_fingerprint": fingerprint,
        "git_revision": git_revision(),
        "rows": len(training.features),
        "rows_without_required": training.without_required,
    }
    logged = {key: value for key, value in metrics.items() if np.isfinite(value)}
    logged |= {f"cv_auc/{name}": value for name, value in selection.auc_by_candidate.items()}
    for slice_name, figures in verdict.slices.items():
        logged |= {f"slice/{slice_name}/{key}": value for key, value in figures.items() if np.isfinite(value)}
    files = {
        "features.json": evaluation.as_json(candidate.plan),
        "gate.json": evaluation.as_json(asdict(verdict)),
        "reliability.json": evaluation.as_json(evaluation.reliability_bins(candidate.target, candidate.scores)),
        "importance.json": evaluation.as_json(importance),
        "reference.parquet": _parquet(reference),
        "golden.parquet": _parquet(golden),
        "requirements.lock": "\n".join(sorted(f"{d.name}=={d.version}" for d in metadata.distributions())).encode(),
        **evaluation.plots(candidate.target, scores, selection.threshold, importance),
    }
    return TrainingRun(parameters, logged, files, selection.model, candidate.frame, version_tags, f"retrain-{day}")


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def _settings_fingerprint(settings: Settings) -> str:
    values = {name: getattr(settings, name) for name in TRAINING_SETTINGS} | {
        "scikit-learn": metadata.version("scikit-learn"),
        "features": [asdict(feature) for feature in dataset.features(settings)],
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def git_revision() -> str:
    """The checkout's commit, with + if it was changed; the installed version where there is no checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return metadata.version("churn")
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return metadata.version("churn")
    return revision.stdout.strip()
