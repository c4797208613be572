"""Ask whether users still look like those the production model learned from, and whether it tells them
apart.

Compared are the whole snapshot that the production model was trained on and the whole newest one, feature
by feature (`jobs.drift_report` measures). Retraining starts when enough columns have drifted in k of the
last n snapshots, or when the champion's AUC on labels that have come is below its floor. What clients asked
is compared as well, and only reported: who is asked about is the clients' choice, and a model trained on
everybody would not follow it.

`decide` takes values and does nothing; `check_drift` reads, measures, writes and starts.

Time is `as_of` throughout: the cooldown counts it too, because until it moves there is nothing new to train
on. The prediction log alone is looked back on from `now`, the clock its rows were written by. Knowingly
simple: a wish to retrain that waits for labels is not weighed again, and rows are not weighted by tenure.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from jobs.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import sqlalchemy as sa

    from jobs.drift_report import ColumnDrift, Comparison, Realised
    from jobs.registry import ModelVersion, Registry
    from jobs.snapshots import Snapshots

log = logging.getLogger(__name__)

LOGGED_WINDOW = timedelta(days=30)
LOGGED_CAP = 100_000  # newest rows of the prediction log that are read

BUDGET_DAYS = timedelta(days=7)

Outcome = Literal["retrain", "none", "cooldown", "waiting", "pinned", "stopped"]
Score = Callable[["pd.DataFrame"], "np.ndarray"]


# --- deciding ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What one check found of one snapshot."""

    snapshot: date
    model_version: int
    dataset_drift: bool
    finding: str = ""


@dataclass(frozen=True)
class Wish:
    """A retraining that was started and found no labels to learn from yet."""

    as_of: datetime
    reason: str
    known_at: datetime | None  # None: not even the snapshot has come
    labels_here: bool  # labels the production model was not trained on have come


@dataclass(frozen=True)
class Decision:
    """What to do, and why, in a sentence."""

    decision: Outcome
    reason: str


def decide(
    check: Check,
    history: Sequence[Check] = (),
    *,
    as_of: datetime,
    k: int = 1,
    n: int = 1,
    realised_auc: float | None = None,
    champion_floor: float = 0.55,
    last_retrain: datetime | None = None,
    cooldown: timedelta = timedelta(days=7),
    recent: int = 0,
    budget: int = 2,
    failed: int = 0,
    breaker: int = 3,
    wish: Wish | None = None,
    pinned: str | None = None,
    force: bool = False,
) -> Decision:
    """Whether to retrain now, from values alone.

    `history` is earlier checks, newest first; `last_retrain` the as_of of the last retraining that trained, `recent`
    how many did within the last seven days, `failed` how many candidates in a row came to nothing.
    First that applies: no cause; a pin; a wish that waits, or can be granted; too many that failed, the cooldown and
    the budget, which `force` ends; retrain. A wish passed those when it was made, and does not wait for them again.
    """
    drifted, looked = _of_last(check, history, n)
    of_last = f"{drifted} of last {looked} snapshot{'s' if looked > 1 else ''}"
    causes = [f"{check.finding}; {of_last}"] if drifted >= k else []
    failing = ""
    if realised_auc is not None and realised_auc < champion_floor:
        auc = _digits(realised_auc, champion_floor)
        failing = f"realised AUC {auc} is below champion_floor {champion_floor:g}"
        causes.append(failing)
    cause = "; ".join(causes)
    if not cause and wish is None:
        wanted = f"; {of_last}, expected {k} of {n}" if k > 1 and check.dataset_drift else ""
        return Decision("none", f"{check.finding}{wanted}")
    if pinned is not None:
        return Decision("pinned", f"only reported, as {pinned}: {cause or (wish.reason if wish else '')}")
    if wish is not None:
        return _grant(wish, as_of, failing)
    if failed >= breaker and not force:
        remedy = "look at them, then `churn drift --force`, `churn retrain` or `churn approve N`"
        return Decision("stopped", f"the last {failed} candidates came to nothing; {remedy}: {cause}")
    if last_retrain is not None and as_of - last_retrain < cooldown and not force:
        when, until = f"{last_retrain:%Y-%m-%d}", f"{last_retrain + cooldown:%Y-%m-%d}"
        return Decision("cooldown", f"retrained as of {when}, not again before {until}: {cause}")
    if recent >= budget and not force:
        times = f"{recent} retraining{'s' if recent > 1 else ''}"
        return Decision("cooldown", f"{times} in the last {BUDGET_DAYS.days} days, retrain_budget is {budget}: {cause}")
    return Decision("retrain", cause)


def _of_last(check: Check, history: Sequence[Check], n: int) -> tuple[int, int]:
    """How many of the last n snapshots drifted, of how many; each counts once, by its last check."""
    found = {check.snapshot: check.dataset_drift}
    for earlier in history:
        if earlier.model_version == check.model_version and earlier.snapshot < check.snapshot:
            found.setdefault(earlier.snapshot, earlier.dataset_drift)
    last = [found[day] for day in sorted(found, reverse=True)[:n]]
    return sum(last), len(last)


def _grant(wish: Wish, as_of: datetime, failing: str) -> Decision:
    wished = f"wished for on {wish.as_of:%Y-%m-%d} ({wish.reason})"
    if wish.known_at is not None and as_of < wish.known_at:
        return Decision("waiting", f"labels are known on {wish.known_at:%Y-%m-%d}; retraining {wished}")
    if not wish.labels_here:
        since = f", known since {wish.known_at:%Y-%m-%d}," if wish.known_at else ""
        return Decision("waiting", f"new labels{since} have not arrived; retraining {wished}")
    also = f"; {failing}" if failing else ""
    return Decision("retrain", f"the labels have arrived; retraining {wished}{also}")


def _digits(value: float, limit: float) -> str:
    return next(text for digits in (3, 6, 17) if float(text := f"{value:.{digits}g}") < limit)


# --- what a check found -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DriftResult:
    """What was compared, what came of it, what was decided and why."""

    drifted_columns: tuple[str, ...] = ()
    columns: int = 0
    drift_share: float = 0.02
    as_of: datetime | None = None
    snapshot: date | None = None
    model_version: int | None = None
    comparison: tuple[ColumnDrift, ...] = ()
    finding: str = ""
    realised: Realised | None = None
    realised_reason: str = ""  # why there is none
    logged: tuple[ColumnDrift, ...] = ()
    logged_reason: str = ""
    logged_rows: int = 0
    decision: Outcome = "none"
    reason: str = ""
    run_id: str | None = None
    started: object = field(default=None, compare=False)  # what start_retrain answered

    @property
    def share(self) -> float:
        """The share of columns that have drifted."""
        return len(self.drifted_columns) / self.columns if self.columns else 0.0

    @property
    def dataset_drift(self) -> bool:
        """Whether the share reaches drift_share; without a drifted column never, not even where that is 0."""
        return bool(self.drifted_columns) and self.share >= self.drift_share

    @property
    def realised_auc(self) -> float | None:
        """The champion's AUC on labels that have come, or None."""
        return self.realised.auc if self.realised else None

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        realised = None
        if self.realised:
            realised = {**asdict(self.realised), "snapshot": self.realised.snapshot.isoformat()}
        return {
            "as_of": self.as_of.isoformat() if self.as_of else None,
            "snapshot": self.snapshot.isoformat() if self.snapshot else None,
            "model_version": self.model_version,
            "columns": self.columns,
            "drifted_columns": list(self.drifted_columns),
            "share": self.share,
            "drift_share": self.drift_share,
            "dataset_drift": self.dataset_drift,
            "comparison": [asdict(column) for column in self.comparison],
            "finding": self.finding,
            "realised": realised,
            "realised_auc": self.realised_auc,
            "realised_reason": self.realised_reason,
            "logged": [asdict(column) for column in self.logged],
            "logged_reason": self.logged_reason,
            "logged_rows": self.logged_rows,
            "decision": self.decision,
            "reason": self.reason,
            "run_id": self.run_id,
        }


def finding_of(columns: Sequence[ColumnDrift], drift_share: float) -> str:
    """The comparison in a sentence: `usage drifted (0.205 ≥ 0.1): 1 of 16 columns, share 0.0625 ≥ 0.02`."""
    from jobs.drift_report import against

    drifted = [column for column in columns if column.drifted]
    if not drifted:
        unsure = sum(column.distance is None for column in columns)
        return f"no column of {len(columns)} drifted" + (f", {unsure} not judged" if unsure else "")
    named = ", ".join(f"{column.name} drifted ({column.reason})" for column in drifted[:3])
    more = f" and {len(drifted) - 3} more" if len(drifted) > 3 else ""
    share = against(len(drifted) / len(columns), drift_share)
    plural = "s" if len(columns) > 1 else ""
    return f"{named}{more}: {len(drifted)} of {len(columns)} column{plural}, share {share}"


# --- the job ----------------------------------------------------------------------------------------------


def check_drift(
    settings: Settings,
    *,
    as_of: datetime,
    now: datetime,
    start_retrain: Callable[[str], object] | None,
    score: tuple[Score, float] | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> DriftResult:
    """Compare, report to MLflow, note the check, start retraining if so decided; finding drift is success.

    `score` is the production model's scoring function and threshold, by default that of the version's bento.
    `start_retrain` is called with the reason, at most once, after the check was noted, and keeps table
    `retrains`; None only reports. `force` ends the cooldown, not a pin. `dry_run` reads, measures and
    decides, and changes nothing. The same `as_of` again replaces its check, and logs a run only if figures
    differ.
    """
    from jobs.registry import Registry
    from jobs.snapshots import Snapshots

    registry = Registry(settings)
    version = registry.production()
    nothing = DriftResult(drift_share=settings.drift_share, as_of=as_of)
    snapshots = Snapshots(settings.snapshots)
    snapshots.recover()
    if version is None:
        first = _first_model(settings, registry, snapshots, as_of)
        result = _with(nothing, decision=first.decision, reason=first.reason)
        if first.decision == "retrain" and start_retrain is not None and not dry_run:
            result = _with(result, started=start_retrain(first.reason))
        return _ended(result)
    day = snapshots.newest(as_of)
    if day is None:
        reason = f"nothing to compare: no snapshot on or before {as_of:%Y-%m-%d}"
        return _ended(_with(nothing, model_version=version.version, reason=reason))
    inputs = _read_inputs(settings, registry, version, as_of=as_of, now=now, day=day)
    scorer = functools.cache(lambda: score or _production_scorer(settings, version))
    measured = measure(settings, inputs, scorer)
    return conclude(settings, registry, measured, now=now, start_retrain=start_retrain, dry_run=dry_run, force=force)


def _first_model(settings: Settings, registry: Registry, snapshots: Snapshots, as_of: datetime) -> Decision:
    """Without a production model there is nothing to compare with, but one can be trained once labels are known."""
    from jobs.dataset import known_at
    from jobs.registry import CANDIDATE

    nothing = "nothing to compare with: no production model"
    candidate = registry.aliases().get(CANDIDATE)
    if candidate is not None:
        return Decision("none", f"{nothing}; candidate {candidate} is there")
    labelled = [day for day in snapshots.days() if snapshots.has_labels(day)]
    if any(known_at(settings, day) <= as_of for day in labelled):
        return Decision("retrain", "no model yet, and the labels of a snapshot are known")
    if labelled:
        return Decision("waiting", f"{nothing}; labels are known on {known_at(settings, labelled[0]):%Y-%m-%d}")
    return Decision("none", f"{nothing}, and no labels to train one on")


def conclude(
    settings: Settings,
    registry: Registry,
    measured: Measured,
    *,
    now: datetime,
    start_retrain: Callable[[str], object] | None,
    dry_run: bool = False,
    force: bool = False,
) -> DriftResult:
    """Decide on the figures and act: a run in MLflow, then the check in our table, then the retraining.

    In this order, so that a job killed in between decides the same again, and nothing is counted twice.
    """
    result = measured.result
    assert result.snapshot is not None and result.as_of is not None  # noqa: S101  as measured
    state = _read_state(settings, measured.inputs.version, result)
    decision = decide(
        Check(result.snapshot, measured.inputs.version.version, result.dataset_drift, result.finding),
        state.history,
        as_of=result.as_of,
        k=settings.drift_k,
        n=settings.drift_n,
        realised_auc=result.realised_auc,
        champion_floor=settings.champion_floor,
        last_retrain=state.last_retrain,
        cooldown=settings.retrain_cooldown,
        recent=state.recent,
        budget=settings.retrain_budget,
        failed=_failed_candidates(registry, measured.inputs.version),
        breaker=settings.retrain_breaker,
        wish=state.wish,
        pinned=state.pinned,
        force=force,
    )
    result = _with(result, decision=decision.decision, reason=decision.reason)
    if dry_run:
        return _ended(result)
    result = _with(result, run_id=_log_run(registry, result, reports(measured), state.run_id))
    _note(settings, result, now, state.check_id)
    if decision.decision == "retrain" and start_retrain is not None:
        result = _with(result, started=start_retrain(decision.reason))
    return _ended(result)


def _with(result: DriftResult, **changes: Any) -> DriftResult:
    return replace(result, **changes)


def _ended(result: DriftResult) -> DriftResult:
    log.info(
        "share=%.4g drifted=%s realised_auc=%s decision=%s reason=%s",
        result.share,
        ",".join(result.drifted_columns) or "none",
        result.realised_auc,
        result.decision,
        result.reason,
    )
    return result


def _production_scorer(settings: Settings, version: ModelVersion) -> tuple[Score, float]:
    from jobs.score import production_scorer

    return production_scorer(settings, version)


# --- measuring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFeature:
    """One of the features the model was registered with, whatever the feature service says by now."""

    name: str
    kind: str
    default: float | None  # stands in for a missing value; None: the model cannot do without


@dataclass(frozen=True)
class Labelled:
    """A snapshot whose labels are known and have arrived."""

    snapshot: date
    frame: pd.DataFrame
    labels: pd.Series
    held_out: np.ndarray  # of the rows of frame


@dataclass(frozen=True)
class Inputs:
    """Everything a check measures, read once."""

    version: ModelVersion
    as_of: datetime
    snapshot: date
    features: tuple[ModelFeature, ...]
    reference: pd.DataFrame
    current: pd.DataFrame | None  # None: the snapshot is not later than the model's own
    labelled: Labelled | None
    logged: Sequence[tuple[str, float]]  # inputs as JSON, score
    logged_count: int


@dataclass(frozen=True)
class Measured:
    """The figures, before anything is decided, and the comparisons with their reports."""

    inputs: Inputs
    result: DriftResult
    comparison: Comparison | None
    logged: Comparison | None


def _read_inputs(
    settings: Settings,
    registry: Registry,
    version: ModelVersion,
    *,
    as_of: datetime,
    now: datetime,
    day: date,
) -> Inputs:
    import pandas as pd

    from jobs import dataset
    from jobs.snapshots import Snapshots

    frame = functools.cache(functools.partial(dataset.feature_frame, settings))  # one day is often asked twice
    trained, snapshots = version.trained_as_of, Snapshots(settings.snapshots)
    later = [day for day in snapshots.days() if day > trained and snapshots.has_labels(day)]
    known = [day for day in later if dataset.known_at(settings, day) <= as_of]
    labelled = None
    if known:
        salt = version.tags.get("holdout_salt", settings.holdout_salt)
        share = float(version.tags.get("holdout_share", settings.holdout_share))
        users = frame(known[-1])
        held_out = dataset.in_holdout(users.index, salt=salt, share=share)
        labelled = Labelled(known[-1], users, dataset.labels(settings, known[-1]), held_out)
    plan = json.loads(registry.artifact(version.run_id, "features.json").read_text("utf-8"))
    logged, count = _logged_rows(settings, version.version, now - LOGGED_WINDOW, settings.drift_min_logged)
    return Inputs(
        version=version,
        as_of=as_of,
        snapshot=day,
        features=tuple(ModelFeature(f["name"], f["kind"], f["default"]) for f in plan),
        reference=pd.read_parquet(registry.artifact(version.run_id, "reference.parquet")),
        current=frame(day) if day > trained else None,
        labelled=labelled,
        logged=logged,
        logged_count=count,
    )


def measure(settings: Settings, inputs: Inputs, scorer: Callable[[], tuple[Score, float]]) -> Measured:
    """Compare snapshots, compare the prediction log, and see how the champion did on labels that came.

    `scorer` gives the champion's scoring function and threshold; it is asked only if there are rows to score.
    """
    comparison, finding = _compare(settings, inputs)
    realised, realised_reason = _realise(settings, inputs, scorer)
    logged, logged_reason = _compare_logged(settings, inputs, scorer)
    columns = comparison.columns if comparison else ()
    result = DriftResult(
        drifted_columns=tuple(column.name for column in columns if column.drifted),
        columns=len(inputs.features),
        drift_share=settings.drift_share,
        as_of=inputs.as_of,
        snapshot=inputs.snapshot,
        model_version=inputs.version.version,
        comparison=columns,
        finding=finding,
        realised=realised,
        realised_reason=realised_reason,
        logged=logged.columns if logged else (),
        logged_reason=logged_reason,
        logged_rows=inputs.logged_count,
    )
    return Measured(inputs, result, comparison, logged)


def _compare(settings: Settings, inputs: Inputs) -> tuple[Comparison | None, str]:
    from jobs import drift_report

    day, trained = inputs.snapshot, inputs.version.trained_as_of
    if inputs.current is None:
        if day == trained:
            return None, f"the newest snapshot is the one the model was trained on ({trained})"
        return None, f"the newest snapshot ({day}) is older than the one the model was trained on ({trained})"
    comparison = drift_report.compare(
        inputs.reference,
        inputs.current,
        inputs.features,
        threshold=settings.drift_threshold,
        min_rows=settings.drift_min_rows,
        seed=settings.seed,
        title=f"Columns: {day} against {trained}",
    )
    return comparison, comparison.not_judged or finding_of(comparison.columns, settings.drift_share)


def _realise(
    settings: Settings, inputs: Inputs, scorer: Callable[[], tuple[Score, float]]
) -> tuple[Realised | None, str]:
    from jobs import drift_report

    if inputs.labelled is None:
        trained = inputs.version.trained_as_of
        return None, f"no labels later than the model's own ({trained}) are known and have arrived"
    labelled = inputs.labelled
    score, threshold = scorer()
    frame = _filled(labelled.frame, inputs.features)
    usable = frame.notna().all(axis=1).to_numpy() & frame.index.isin(labelled.labels.index)
    frame = frame[usable]
    realised = drift_report.realised_performance(
        labelled.snapshot,
        labelled.labels.loc[frame.index].to_numpy(dtype=bool),
        score(frame),
        labelled.held_out[usable],
        threshold=threshold,
        min_class_rows=settings.min_class_rows,
    )
    return realised, realised.reason


def _compare_logged(
    settings: Settings, inputs: Inputs, scorer: Callable[[], tuple[Score, float]]
) -> tuple[Comparison | None, str]:
    from jobs import drift_report

    if inputs.logged_count < settings.drift_min_logged:
        return None, f"not judged ({inputs.logged_count} of {settings.drift_min_logged} logged predictions)"
    logged = drift_report.logged_frame(inputs.logged, inputs.features)
    # the log has inputs as the model saw them; with defaults filled in on both sides they compare
    current = _filled(logged, inputs.features).assign(**{drift_report.SCORE: logged[drift_report.SCORE]})
    complete = _filled(inputs.reference, inputs.features).dropna()
    comparison = drift_report.compare(
        complete.assign(**{drift_report.SCORE: scorer()[0](complete)}),
        current,
        [*inputs.features, drift_report.ScoreColumn()],
        threshold=settings.drift_threshold,
        min_rows=settings.drift_min_rows,
        seed=settings.seed,
        title=f"What clients asked of model version {inputs.version.version}, against its reference",
    )
    return comparison, comparison.not_judged or f"{inputs.logged_count} logged predictions"


def _filled(frame: pd.DataFrame, features: Sequence[ModelFeature]) -> pd.DataFrame:
    """The features as the model sees them: defaults in place of missing values."""
    defaults = {f.name: f.default for f in features if f.default is not None}
    return frame[[f.name for f in features]].fillna(defaults)


# --- reports ----------------------------------------------------------------------------------------------


def reports(measured: Measured) -> dict[str, bytes]:
    """By artifact path: all figures in drift.json; drift.html and, if judged, logged.html are for people."""
    from jobs import drift_report

    result = measured.result
    content = result.as_json()
    for later in ("decision", "reason", "run_id"):  # not figures, and not the same when checked again
        del content[later]
    content["rows"] = {
        "reference": len(measured.inputs.reference),
        "current": None if measured.inputs.current is None else len(measured.inputs.current),
    }
    rows = []
    if result.realised:
        for name, figures in (("holdout", result.realised.holdout), ("all", result.realised.everyone)):
            rows += [[name, key, f"{value:.4g}"] for key, value in figures.items()]
        for b in result.realised.bins:
            what = f"mean score → share that churned, {b['rows']:g} users scored from {b['from']:g}"
            rows.append([result.realised.users, what, f"{b['mean_score']:.3f} → {b['churned']:.3f}"])
    on = f" on {result.realised.snapshot}" if result.realised else ""
    note = f"{result.finding}. Logged: {result.logged_reason}. Realised{on}: {result.realised_reason}."
    summary = drift_report.table(note, ["users", "figure", "value"], rows)
    page = measured.comparison.html.decode() if measured.comparison else None
    title = f"Drift as of {result.as_of:%Y-%m-%d}, model version {result.model_version}"
    files = {
        "drift.json": drift_report.dump(content),
        "drift.html": drift_report.with_summary(page, title, summary),
    }
    if measured.logged:
        files["logged.html"] = measured.logged.html
    return files


def metrics_of(result: DriftResult) -> dict[str, float]:
    """The figures as MLflow metrics; those of the prediction log are called logged_*."""
    metrics = {
        "share": result.share,
        "drift_share": result.drift_share,
        "drifted_columns": float(len(result.drifted_columns)),
        "dataset_drift": float(result.dataset_drift),
        "logged_rows": float(result.logged_rows),
    }
    for prefix, columns in (("", result.comparison), ("logged_", result.logged)):
        for column in columns:
            metrics[f"{prefix}missing_{column.name}"] = column.missing_current
            if column.distance is not None:
                metrics[f"{prefix}distance_{column.name}"] = column.distance
    if result.logged:
        metrics["logged_share"] = sum(c.drifted for c in result.logged) / len(result.logged)
    if result.realised:
        metrics |= {f"realised_{key}": value for key, value in result.realised.figures.items()}
        metrics |= {f"realised_all_{key}": value for key, value in result.realised.everyone.items()}
    return metrics


def _log_run(registry: Registry, result: DriftResult, files: Mapping[str, bytes], previous: str | None) -> str:
    """The run with these reports: the earlier one of this check if its figures are the same, or a new one."""
    from jobs.registry import RegistryError

    assert result.as_of is not None  # noqa: S101  a measured result has one
    if previous is not None:
        try:
            if registry.artifact(previous, "drift.json").read_bytes() == files["drift.json"]:
                return previous
        except RegistryError as error:
            log.info("the earlier run of this check is gone, logging it anew: %s", error)
    tags = {
        "model_version": str(result.model_version),
        "snapshot": str(result.snapshot),
        "as_of": result.as_of.astimezone(UTC).isoformat(),
        "drifted_columns": ",".join(result.drifted_columns),
        "dataset_drift": str(result.dataset_drift).lower(),
        "decision": result.decision,
        "reason": result.reason[:4900],
    }
    return registry.log_drift(as_of=result.as_of, metrics=metrics_of(result), tags=tags, files=files)


# --- our tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """What the database knows that bears on the decision."""

    history: tuple[Check, ...]
    last_retrain: datetime | None
    recent: int
    wish: Wish | None
    pinned: str | None
    check_id: int | None  # of the same as_of, snapshot and version
    run_id: str | None


def _read_state(settings: Settings, version: ModelVersion, result: DriftResult) -> _State:
    import sqlalchemy as sa

    from jobs import database
    from jobs.database import drift_checks as checks
    from jobs.history import History
    from jobs.snapshots import instant

    assert result.as_of is not None and result.snapshot is not None  # noqa: S101  a measured result has them
    engine = database.connect(settings.database)
    query = (
        sa.select(checks)
        .where(checks.c.model_version == version.version, checks.c.as_of <= result.as_of)
        .order_by(checks.c.as_of.desc(), checks.c.id.desc())
    )
    with engine.connect() as connection:
        rows = connection.execute(query).all()
        last_retrain, recent, wish = _retrains(connection, settings, version, result.as_of)
    same = next((row for row in rows if row.as_of == result.as_of and row.snapshot == instant(result.snapshot)), None)
    pin = History(engine).pin()
    return _State(
        history=tuple(Check(row.snapshot.date(), row.model_version, row.dataset_drift) for row in rows),
        last_retrain=last_retrain,
        recent=recent,
        wish=wish,
        pinned=f"{pin.bento_tag} is pinned ({pin.reason})" if pin else None,
        check_id=same.id if same else None,
        run_id=same.run_id if same else None,
    )


def _failed_candidates(registry: Registry, production: ModelVersion) -> int:
    """How many of the newest versions in a row, since the one in production, came to nothing."""
    failed = 0
    for version in registry.versions():
        if version.version <= production.version:
            break
        if "approved_by" in version.tags:
            break
        if version.passed and not {"promotion_failed", "rolled_back"} & version.tags.keys():
            break
        failed += 1
    return failed


def _retrains(
    connection: sa.Connection, settings: Settings, version: ModelVersion, as_of: datetime
) -> tuple[datetime | None, int, Wish | None]:
    """The as_of of drift's last retraining that trained, how many did lately, and the wish that is kept, if any."""
    import sqlalchemy as sa

    from jobs import dataset
    from jobs.database import retrains

    answered = retrains.c.result.in_(("registered", "unchanged"))
    trainings = connection.execute(
        sa.select(retrains.c.as_of)
        .where(answered, retrains.c.wanted_by == "drift", retrains.c.as_of <= as_of)
        .order_by(retrains.c.as_of.desc())
        .limit(100)
    ).scalars()
    when = list(trainings)
    last, recent = next(iter(when), None), sum(as_of - day < BUDGET_DAYS for day in when)
    granted = sa.select(sa.func.coalesce(sa.func.max(retrains.c.id), 0)).where(answered).scalar_subquery()
    waiting = connection.execute(
        sa.select(retrains)
        .where(retrains.c.result == "waiting_for_labels", retrains.c.as_of <= as_of, retrains.c.id > granted)
        .order_by(retrains.c.id)
    ).all()
    trained = version.trained_as_of
    # what the model has learned from by now is no longer waited for
    known = dataset.known_at(settings, trained)
    row = next((row for row in waiting if row.known_at is None or known < row.known_at), None)
    if row is None:
        return last, recent, None
    days = dataset.training_days(settings, as_of)
    return last, recent, Wish(row.as_of, row.reason, row.known_at, bool(days) and days[-1] > trained)


def _logged_rows(
    settings: Settings, version: int, since: datetime, at_least: int
) -> tuple[list[tuple[str, float]], int]:
    """What clients asked of this version since then (newest first, capped, none if too few), and how many."""
    import sqlalchemy as sa

    from jobs import database
    from jobs.database import predictions as p

    asked = (p.c.source == "client", p.c.model_version == version, p.c.predicted_at >= since)
    with database.connect(settings.database).connect() as connection:
        count = int(connection.execute(sa.select(sa.func.count()).where(*asked)).scalar_one())
        if count < at_least:
            return [], count
        query = sa.select(p.c.features, p.c.churn_probability).where(*asked)
        query = query.order_by(p.c.predicted_at.desc(), p.c.prediction_id).limit(LOGGED_CAP)
        rows = connection.execute(query).all()
    return [(row.features, row.churn_probability) for row in rows], count


def _note(settings: Settings, result: DriftResult, now: datetime, check_id: int | None) -> None:
    """Keep the check; that of the same as_of, snapshot and version is brought up to date in its place."""
    from jobs import database
    from jobs.database import drift_checks as checks
    from jobs.snapshots import instant

    assert result.snapshot is not None  # noqa: S101  a measured result has one
    values = {
        "as_of": result.as_of,
        "snapshot": instant(result.snapshot),
        "model_version": result.model_version,
        "share": result.share,
        "drifted_columns": json.dumps(result.drifted_columns),
        "dataset_drift": result.dataset_drift,
        "realised_auc": result.realised_auc,
        "decision": result.decision,
        "reason": result.reason,
        "run_id": result.run_id,
        "checked_at": now,
    }
    with database.connect(settings.database).begin() as connection:
        if check_id is None:
            connection.execute(checks.insert().values(**values))
        else:
            connection.execute(checks.update().where(checks.c.id == check_id).values(**values))
