"""One truthful page: what answers now, what is being tried, and what each job found last.

It is looked at when something is wrong, so nothing that is away may keep the rest from being shown.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from http.client import HTTPException
from typing import Any, TypeVar

import sqlalchemy as sa

from bentos.churn.database import sqlite_path
from jobs.database import connect, drift_checks, predictions, retrains
from jobs.history import History, Pin, Promotion, older_database
from jobs.lease import is_held
from jobs.package import version_of
from jobs.registry import CANDIDATE, HELD, HELD_AGAINST, PREVIOUS, PRODUCTION, Registry
from jobs.replay import held_against
from jobs.serving import DIRECT, Pod, Rollout, Serving, serving_of
from jobs.settings import Settings
from jobs.snapshots import Snapshots

log = logging.getLogger(__name__)

T = TypeVar("T")
LOG_LATE = 30.0  # seconds until it is worth a word that the database takes no predictions
SHOWN = timedelta(days=7)  # that a promotion was undone is said as a problem


@dataclass(frozen=True)
class _Tables:
    """What our own tables say; the defaults are what is shown when they cannot be read."""

    pin: Pin | None = None
    last: Promotion | None = None
    good: Promotion | None = None
    open_row: Promotion | None = None
    check: Any = None
    training: Any = None
    predictions: int | None = None


def status(settings: Settings, serving: Serving | None = None) -> dict[str, Any]:
    """Everything `churn status` shows, as plain values; a store that does not answer becomes an entry in `problems`."""
    serving = serving or serving_of(settings)
    problems: list[str] = []
    read = _ask(lambda: _tables(settings), problems, "the database", "start it, or correct CHURN_DATABASE_URL")
    tables = read or _Tables()
    aliases = _ask(
        lambda: Registry(settings).aliases(), problems, "the model registry", "start it, or correct CHURN_MLFLOW_URL"
    )
    rollout = _ask(
        serving.rollout, problems, "the served tag", "remove a desired.json that is damaged, `churn promote` writes it"
    )
    url = None if rollout is None else _ask(lambda: serving.url, problems, "what serves", "restart `churn serve`")
    elsewhere = settings.deployment and not settings.snapshots.exists()
    ask_days: Callable[[], list[date] | None] = (lambda: None) if elsewhere else Snapshots(settings.snapshots).days
    days = _ask(ask_days, problems, "the snapshots", "make the folder readable")
    features_as_of = _online_as_of(settings, problems)
    pin, last, good, open_row, check = tables.pin, tables.last, tables.good, tables.open_row, tables.check
    training = tables.training
    if rollout is not None:
        problems += _of_serving(settings, rollout)
        problems += [problem for pod in rollout.pods if pod.ready for problem in _of_log(pod)]
    if last is not None and last.result in ("failed", "interrupted") and _is_recent(last):
        problems.append(f"the last promotion (version {last.to_version}) {last.result} and was undone: {last.reason}")
    if open_row is not None and _was_left(settings, open_row):
        problems.append(f"promotion {open_row.id} was left open; `churn promote` finishes or undoes it")
    if read is not None and aliases is not None and rollout is not None and open_row is None:
        production, wanted = aliases.get(PRODUCTION), rollout.served_tag
        asked = _ask(
            lambda: _disagreements(settings, serving, production, good, wanted), problems, "a store", "ask once more"
        )
        problems += asked or []
    retraining = None if training is None else training.result
    if training is not None and retraining is None and _was_killed(settings, training.id):
        retraining = "killed"
        problems.append(f"the last retraining ({training.as_of:%Y-%m-%d}) was killed; `churn retrain` begins anew")
    aliases = aliases or {}
    candidate = aliases.get(CANDIDATE) if PRODUCTION in aliases else None
    waiting = (
        None
        if candidate is None
        else _ask(
            lambda: _waits_for_approval(settings, candidate, aliases[PRODUCTION]),
            problems,
            "the candidate",
            "look into the model registry",
        )
    )
    ready = [] if rollout is None else [pod.bento_tag for pod in rollout.pods if pod.ready]
    wanted = None if rollout is None else rollout.served_tag
    return {
        "home": None if settings.deployment else str(settings.home.resolve()),
        "production": aliases.get(PRODUCTION),
        "candidate": aliases.get(CANDIDATE),
        "previous": aliases.get(PREVIOUS),
        "served_tag": ready[0] if ready else wanted,
        "wanted_tag": wanted,
        "waiting": waiting,
        "previous_tag": good.from_tag if good else None,
        "pinned": None
        if pin is None
        else {
            "version": pin.version,
            "bento_tag": pin.bento_tag,
            "reason": pin.reason,
            "by": pin.by,
            "at": pin.pinned_at.isoformat(),
        },
        "serving": {
            "url": url,
            "running": None if rollout is None else rollout.running,
            "settled": None if rollout is None else rollout.settled,
            "pods": []
            if rollout is None
            else [
                {"name": p.name, "bento_tag": p.bento_tag, "ready": p.ready, "message": p.message} for p in rollout.pods
            ],
        },
        "promoting": None
        if open_row is None
        else {
            "action": open_row.action,
            "to": open_row.to_version,
            "tag": open_row.to_tag,
            "since": open_row.opened_at.isoformat(),
        },
        "features_as_of": features_as_of,
        "snapshots": None if days is None else [day.isoformat() for day in days],  # None: not this pod's volume
        "drift": None
        if check is None
        else {
            "as_of": check.as_of.isoformat(),
            "snapshot": check.snapshot.isoformat(),
            "share": check.share,
            "drifted_columns": json.loads(check.drifted_columns),
            "realised_auc": check.realised_auc,
            "decision": check.decision,
            "reason": check.reason,
        },
        "retrain": None
        if training is None
        else {
            "as_of": training.as_of.isoformat(),
            "result": retraining,
            "reason": training.detail,
            "version": training.version,
            "wanted_by": training.wanted_by,
            "known_at": training.known_at and training.known_at.isoformat(),
        },
        "last_promotion": None
        if last is None
        else {
            "result": last.result,
            "reason": last.reason,
            "from": last.from_version,
            "to": last.to_version,
            "action": last.action,
        },
        "predictions": {"rows": tables.predictions},
        "problems": problems,
    }


def _ask(question: Callable[[], T], problems: list[str], what: str, remedy: str) -> T | None:
    """The answer; None and an entry in `problems` if there is none, whatever the reason."""
    try:
        return question()
    except Exception as error:  # drivers and servers have no common base
        log.debug("%s does not answer", what, exc_info=True)
        said = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
        problems.append(f"{what} cannot be read ({said}); {remedy}")
        return None


def _tables(settings: Settings) -> _Tables:
    engine = connect(settings.database)
    history = History(engine)
    with engine.connect() as connection:
        check = connection.execute(sa.select(drift_checks).order_by(drift_checks.c.id.desc()).limit(1)).first()
        training = connection.execute(sa.select(retrains).order_by(retrains.c.id.desc()).limit(1)).first()
        rows = connection.execute(sa.select(sa.func.count()).select_from(predictions)).scalar_one()
    good, last = history.last(good=True), history.last()
    return _Tables(history.pin(), last, good, history.open_row(), check, training, rows)


def _waits_for_approval(settings: Settings, number: int, production: int) -> str | None:
    """That a candidate that passed needs a person's word: in mode manual, or for what the replay has shown."""
    version = Registry(settings).version(number)
    if version is None or not version.passed or "approved_by" in version.tags:
        return None
    if version.tags.get(HELD_AGAINST) == held_against(settings, production):
        return f"version {number} passed the gate and waits for `churn approve {number}`: {version.tags.get(HELD)}"
    if settings.promotion_mode != "manual":
        return None
    return f"version {number} passed the gate and waits for `churn approve {number}`"


def _of_serving(settings: Settings, rollout: Rollout) -> list[str]:
    found = []
    if rollout.failure:
        found.append(f"{rollout.served_tag} cannot serve: {rollout.failure}")
    if rollout.served_tag and not rollout.running:
        remedy = f"Deployment {settings.deployment} has 0 replicas" if settings.deployment else "`churn serve` does"
        found.append(f"nothing serves; {remedy}")
    return found


def _of_log(pod: Pod) -> list[str]:
    """What a pod says of the prediction log at /metrics; nothing if it does not answer, which the rollout knows."""
    try:
        with DIRECT.open(f"{pod.address}/metrics", timeout=2) as answer:
            page = answer.read().decode()
    except (OSError, ValueError, HTTPException):
        return []
    said = dict(re.findall(r"^churn_log_(\w+) (\S+)$", page, re.MULTILINE))
    failing, waiting = float(said.get("failing_seconds", 0)), float(said.get("backlog_bytes", 0))
    found = []
    if failing > LOG_LATE:
        late = f"{pod.name}: the database has taken no predictions for {failing:.0f} s"
        found.append(f"{late}; {waiting / 1024:.0f} KiB wait in its spool, and go there once it does")
    if set_aside := float(said.get("quarantined_total", 0)):
        found.append(
            f"{pod.name}: {set_aside:.0f} damaged or refused records are in `quarantine` of its spool, see its log"
        )
    return found


def _disagreements(
    settings: Settings, serving: Serving, production: int | None, good: Promotion | None, wanted_tag: str | None
) -> list[str]:
    """Where alias, record and served tag differ though no promotion is under way: at most one entry."""
    engine = connect(settings.database)
    if said := older_database(History(engine), serving):
        return [said]
    version, tag = (good.to_version, good.to_tag) if good else (None, None)
    if tag != wanted_tag:
        said = f"the served tag is {wanted_tag or 'empty'}, the record of promotions says {tag or 'nothing'}"
        return [f"{said}; `churn promote` settles it"]
    if version is not None and version_of(engine, Registry(settings), version, tag) is None:
        remedy = "correct CHURN_MLFLOW_URL or CHURN_RELEASE, or let `churn retrain` make another"
        return [f"the model registry does not have version {version} of the run that serves as {tag}; {remedy}"]
    if production != version:
        alias = f"alias {PRODUCTION} points to {f'version {production}' if production else 'no version'}"
        return [f"{alias}, what should serve is {wanted_tag or 'nothing'}; `churn promote` settles it"]
    return []


def _is_recent(row: Promotion) -> bool:
    return row.closed_at is not None and datetime.now(UTC) - row.closed_at < SHOWN


def _was_left(settings: Settings, row: Promotion) -> bool:
    """Whether nobody works on an open promotion: its lease is free, and still it is open."""
    try:
        if is_held(settings, "promote") is not False:
            return False
        still = History(connect(settings.database)).open_row()
    except Exception:  # the cluster or the database does not answer
        return False
    return still is not None and still.id == row.id


def _was_killed(settings: Settings, training: int) -> bool:
    """Whether nobody works on a retraining that has no result: its lease is free, and still it has none.

    Without the lease's file it was begun elsewhere, and nothing is known.
    """
    try:
        if is_held(settings, "retrain") is not False:
            return False
    except Exception:  # the cluster does not answer
        return False
    query = sa.select(retrains.c.result).where(retrains.c.id == training)
    try:
        with connect(settings.database).connect() as connection:
            return connection.execute(query).scalar() is None  # not ended between the first look and the lease
    except Exception:  # the database has gone meanwhile
        return False


def _online_as_of(settings: Settings, problems: list[str]) -> str | None:
    """The instant the online store was materialized to: the sentinel's, read as the service reads it, without Feast."""
    from bentos.churn.model import Feature, Plan
    from bentos.churn.online import SENTINEL, StoreEmpty, UserFeatures, open_store
    from feature_repo.columns import FEATURE_TABLES, view_name

    columns = ((view_name(table.name), column) for table in FEATURE_TABLES for column in table.columns)
    plan = Plan([Feature(c.name, view, c.kind, c.categories) for view, c in columns if c.kind != "date"])

    def read() -> UserFeatures | None:
        url = settings.online_store
        if url.startswith("sqlite:///") and not sqlite_path(url).exists():
            raise StoreEmpty(f"{sqlite_path(url).name} is not there yet")
        store = open_store(url, settings.feast_project, plan)
        try:
            return asyncio.run(store.read([SENTINEL]))[0]
        finally:
            store.close()

    def read_or_empty() -> UserFeatures | None:
        try:
            return read()
        except StoreEmpty as error:
            problems.append(f"no features online ({error}); `churn materialize` fills the store")
            return None

    found = _ask(read_or_empty, problems, "the online store", "start it, or correct CHURN_ONLINE_STORE_URL")
    return None if found is None else found.ages.text


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people: what answers now first, problems with their remedy last."""
    pin, drift = found["pinned"], found["drift"]
    last, training = found["last_promotion"], found["retrain"]
    versions = [f"{alias} {found[alias] or '-'}" for alias in ("production", "previous", "candidate")]
    newest = ", ".join((found["snapshots"] or [])[-3:]) or "none"
    shown = [("home", found["home"])] if found["home"] else []
    shown += [("serving now", _serving_now(found)), ("versions", ", ".join(versions))]
    if pin:
        shown.append(("pinned", f"{pin['bento_tag']} by {pin['by']}: {pin['reason']} (`churn unpin` ends it)"))
    if found["waiting"]:
        shown.append(("waiting", found["waiting"]))
    if found["promoting"]:
        shown.append(("promoting", f"version {found['promoting']['to']} since {found['promoting']['since']}"))
    if last:
        shown.append(("last promotion", f"{last['result']} {last['from'] or '-'} -> {last['to']}: {last['reason']}"))
    have = f"; snapshots {newest}" if found["snapshots"] is not None else ""
    shown.append(("features", f"online as of {found['features_as_of'] or 'never'}{have}"))
    if drift:
        auc = "" if drift["realised_auc"] is None else f", realised AUC {drift['realised_auc']:.3f}"
        shown.append(("drift", f"share {drift['share']:.4g}{auc}; {drift['decision']}: {drift['reason']}"))
    if training:
        reason = f": {training['reason']}" if training["reason"] else ""
        shown.append(("retrain", f"{training['result'] or 'under way'}{reason}"))
    rows = found["predictions"]["rows"]
    shown.append(("predictions", "unknown" if rows is None else f"{rows} logged"))
    return shown + [("problem", problem) for problem in found["problems"]]


def _serving_now(found: dict[str, Any]) -> str:
    serving, wanted = found["serving"], found["wanted_tag"]
    if serving["running"] is None:
        return "unknown"
    ready, pods = sum(pod["ready"] for pod in serving["pods"]), len(serving["pods"])
    if ready:
        return f"{found['served_tag']} at {serving['url']}, {ready}/{pods} ready"
    return f"nothing (wanted: {wanted})" if wanted else "nothing"
