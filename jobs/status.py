"""One truthful page: what answers now, what is being tried, and what each job found last."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import sqlalchemy as sa

from jobs.database import connect, drift_checks, predictions, retrains
from jobs.history import History
from jobs.registry import CANDIDATE, PREVIOUS, PRODUCTION, Registry, RegistryError
from jobs.serving import LocalServing, Serving
from jobs.settings import Settings
from jobs.snapshots import Snapshots


def status(settings: Settings, serving: Serving | None = None) -> dict[str, Any]:
    """Everything `churn status` shows, as plain values; a store that does not answer becomes an entry in `problems`."""
    serving = serving or LocalServing(settings)
    engine = connect(settings.database)
    history = History(engine)
    pin, last, good = history.pin(), history.last(), history.last(good=True)
    problems: list[str] = []
    try:
        aliases = Registry(settings).aliases()
    except RegistryError as error:
        aliases = {}
        problems.append(str(error))
    rollout = serving.rollout()
    open_row = history.open_row()
    with engine.connect() as connection:
        check = connection.execute(sa.select(drift_checks).order_by(drift_checks.c.id.desc()).limit(1)).first()
        training = connection.execute(sa.select(retrains).order_by(retrains.c.id.desc()).limit(1)).first()
        rows = connection.execute(sa.select(sa.func.count()).select_from(predictions)).scalar_one()
    if rollout.failure:
        problems.append(f"{rollout.served_tag} cannot serve: {rollout.failure}")
    if rollout.served_tag and not rollout.running:
        problems.append("nothing serves; `churn serve` does")
    if last is not None and last.result in ("failed", "interrupted"):
        problems.append(f"the last promotion (version {last.to_version}) {last.result}: {last.reason}")
    served = [pod.bento_tag for pod in rollout.pods if pod.ready]
    return {
        "production": aliases.get(PRODUCTION),
        "candidate": aliases.get(CANDIDATE),
        "previous": aliases.get(PREVIOUS),
        "served_tag": served[0] if served else rollout.served_tag,
        "wanted_tag": rollout.served_tag,
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
            "url": serving.url,
            "running": rollout.running,
            "settled": rollout.settled,
            "pods": [
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
        "features_as_of": _online_as_of(settings, problems),
        "snapshots": [day.isoformat() for day in Snapshots(settings.snapshots).days()],
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
            "result": training.result,
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
        "predictions": {"rows": rows},
        "problems": problems,
    }


def _online_as_of(settings: Settings, problems: list[str]) -> str | None:
    """The instant the online store was materialized to: the sentinel's, read as the service reads it, without Feast."""
    from bentos.churn.model import Feature, Plan
    from bentos.churn.online import SENTINEL, StoreDown, StoreEmpty, open_store
    from feature_repo.columns import FEATURE_TABLES, view_name

    plan = Plan([Feature(c.name, view_name(t.name), "float") for t in FEATURE_TABLES for c in t.columns])
    store = open_store(settings.online_store, settings.feast_project, plan)
    try:
        found = asyncio.run(store.read([SENTINEL]))[0]
    except (StoreDown, StoreEmpty) as error:
        problems.append(f"no features online ({error}); `churn materialize` fills the store")
        return None
    finally:
        store.close()
    return None if found is None else min(found.timestamps.values()).isoformat()


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people: what answers now first, problems with their remedy last."""
    serving, pin, drift = found["serving"], found["pinned"], found["drift"]
    last, training = found["last_promotion"], found["retrain"]
    ready = sum(pod["ready"] for pod in serving["pods"])
    versions = [f"{alias} {found[alias] or '-'}" for alias in ("production", "previous", "candidate")]
    newest = ", ".join(found["snapshots"][-3:]) or "none"
    shown = [
        (
            "serving now",
            f"{found['served_tag'] or 'nothing'} at {serving['url']}, {ready}/{len(serving['pods'])} ready",
        ),
        ("versions", ", ".join(versions)),
    ]
    if pin:
        shown.append(("pinned", f"{pin['bento_tag']} by {pin['by']}: {pin['reason']} (`churn unpin` ends it)"))
    if found["promoting"]:
        shown.append(("promoting", f"version {found['promoting']['to']} since {found['promoting']['since']}"))
    if last:
        shown.append(("last promotion", f"{last['result']} {last['from'] or '-'} -> {last['to']}: {last['reason']}"))
    shown.append(("features", f"online as of {found['features_as_of'] or 'never'}; snapshots {newest}"))
    if drift:
        auc = "" if drift["realised_auc"] is None else f", realised AUC {drift['realised_auc']:.3f}"
        shown.append(("drift", f"share {drift['share']:.4g}{auc}; {drift['decision']}: {drift['reason']}"))
    if training:
        shown.append(("retrain", f"{training['result'] or 'under way'}: {training['reason'] or ''}"))
    shown.append(("predictions", f"{found['predictions']['rows']} logged"))
    return shown + [("problem", problem) for problem in found["problems"]]
