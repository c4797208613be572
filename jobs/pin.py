"""What people say to promotion: roll back, pin, unpin, approve. Each is a record first, then a promotion.

A pin is written before anything moves, so that a promotion under way sees it within a second and yields.
It works from the stored archives, also while the model registry is down.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import sqlalchemy as sa

from jobs import provenance
from jobs.database import bentos, connect
from jobs.failpoints import failpoint
from jobs.history import GOOD, History, Pin
from jobs.lease import lease
from jobs.package import bento_of, ensure_bento, expected_tag, note_lost, version_of
from jobs.promote import Promoter, PromoteResult, PromotionFailed, _ModelFault, _WorldFault, ask
from jobs.registry import CANDIDATE, PRODUCTION, SPENT_TAGS, Registry, RegistryError
from jobs.serving import Serving, serving_of
from jobs.settings import Settings

log = logging.getLogger(__name__)

LEASE_WAIT = 60.0  # seconds for a promotion under way to yield


class NothingToDo(LookupError):
    """There is no version that this could be done with; says what there is."""


def rollback(
    settings: Settings,
    *,
    to: int | str | None = None,
    reason: str,
    by: str,
    serving: Serving | None = None,
    dry_run: bool = False,
) -> PromoteResult:
    """Serve an earlier version (default: the one served before), and stay with it until unpinned.

    `to`: its number, for the newest of its bentos, or a bento's tag. Raises NothingToDo if that is not stored.
    """
    engine = connect(settings.database)
    tag, version = _stored(engine, to) if to is not None else _before(engine)
    if dry_run:
        return PromoteResult("dry_run", f"would pin version {version} ({tag}): {reason}", tag, None, version)
    result = _pin(settings, engine, version, tag, reason, by, serving)
    if result.result == "idle" and result.served_tag == tag:
        return replace(result, reason=f"version {version} is served already; {result.reason}")
    return result


def pin(settings: Settings, *, reason: str, by: str, serving: Serving | None = None) -> PromoteResult:
    """Stay with what is served now, whatever passes the gate."""
    engine = connect(settings.database)
    last = History(engine).last(good=True)
    if last is None or last.to_tag is None:
        raise NothingToDo("nothing is served yet, so there is nothing to pin")
    return _pin(settings, engine, last.to_version, last.to_tag, reason, by, serving)


def _pin(
    settings: Settings,
    engine: sa.Engine,
    version: int,
    tag: str,
    reason: str,
    by: str,
    serving: Serving | None,
) -> PromoteResult:
    History(engine).set_pin(Pin(version, tag, reason, by, datetime.now(UTC)))
    failpoint("pin.recorded")
    try:
        result = Promoter(settings, serving, by=by).run(wait=LEASE_WAIT)
    except Exception as error:
        if History(engine).pin() is None:  # the bento's fault: it cannot be pinned
            raise
        stays = f"{tag} stays pinned: the next `churn promote` tries again, `churn unpin` takes it back"
        raise PromotionFailed(f"{error}; {stays}", interrupted=True) from error
    if result.result == "held":
        return replace(result, reason=f"{tag} is pinned; the promotion under way will follow it ({result.reason})")
    return result


def unpin(settings: Settings, *, serving: Serving | None = None) -> Pin | None:
    """End the pin; promotion goes on with the next candidate. Returns the pin that ended, None if there was none.

    If the model registry was down when the pin was made, its alias has to follow first: otherwise it would be taken for
    moved by a hand. Raises RegistryError if that is still so.
    """
    history = History(connect(settings.database))
    found, last = history.pin(), history.last(good=True)
    if found is not None and last is not None and last.to_tag == found.bento_tag:
        try:
            follows = Registry(settings).aliases().get(PRODUCTION) == found.version
        except RegistryError as error:
            raise RegistryError(f"{error}; the pin stays until alias {PRODUCTION} is known to follow it") from error
        if not follows:
            Promoter(settings, serving, by=found.by).run(wait=LEASE_WAIT)
            production = Registry(settings).aliases().get(PRODUCTION)
            if production not in (None, found.version):
                wrong = f"alias {PRODUCTION} names version {production}, which would serve without the pin"
                remedy = f"remove the alias in the model registry, or `churn rollback --to {production}`"
                raise NothingToDo(f"{wrong}: {remedy}")
    if found is not None:
        history.clear_pin(found)
    newer = history.pin()
    if newer is not None:
        raise NothingToDo(f"{newer.bento_tag} was pinned by {newer.by} meanwhile, and stays so")
    return found


def approve(settings: Settings, version: int, *, by: str, reason: str) -> None:
    """Let a version that passed the gate be promoted, also one that was rolled back or failed before.

    One that `churn retrain` did not register is recorded as it is now, so that it may be packaged.
    """
    registry = Registry(settings)
    found = registry.version(version)
    if found is None:
        there = ", ".join(str(known.version) for known in reversed(registry.versions())) or "none"
        raise NothingToDo(f"model {settings.release} has no version {version}; there are {there}")
    engine = connect(settings.database)
    last = History(engine).last(good=True)
    serves = last is not None and last.to_version == version == registry.aliases().get(PRODUCTION)
    if last is not None and serves and version_of(engine, registry, version, last.to_tag) is not None:
        raise NothingToDo(f"version {version} is in production already")
    by_whom = f"approve by {by}: {reason}" if reason else f"approve by {by}"
    if provenance.record_as_it_is(engine, registry, found, by=by_whom):
        log.warning("version %d was not registered by `churn retrain`; it is recorded as it is now", version)
    if not found.passed:
        raise NothingToDo(
            f"the gate refused version {version}: {found.tags.get('gate_reason')}; to serve it all the same, "
            "move the alias production in the model registry"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    registry.set_tags(
        version,
        {**dict.fromkeys(SPENT_TAGS), "approved_by": by, "approved_at": now, "approved_reason": reason},
    )
    registry.set_alias(CANDIDATE, version)


def adopt(settings: Settings, *, by: str, serving: Serving | None = None) -> str:
    """Go on from what serves, when the database was restored from a backup older than that; returns the tag.

    A registry that was restored with it may lack the version, or have given its number to another run: the tag then
    serves on without an alias, until `churn approve` replaces it. A pin of the backup ends unless it is on that tag.
    """
    engine, serving = connect(settings.database), serving or serving_of(settings)
    history = History(engine)
    tag = serving.served_tag()
    if tag is None or serving.fence() <= history.newest_id():
        raise NothingToDo(f"the database knows what serves ({tag}); there is nothing to adopt")
    version = int(tag.split(":v", 1)[1].split("-", 1)[0])
    registry = Registry(settings)
    found, stored = registry.version(version), bento_of(engine, tag)
    run = stored.run_id if stored is not None else _run_of(serving, tag)
    if found is not None and run is not None and found.run_id != run:
        found = None
    if found is None and run is None:
        lacks = f"the model registry has no version {version}, which serves as {tag}"
        raise NothingToDo(f"{lacks}, and no pod says of which run it is: restore it as well, or let a pod serve")
    with lease(settings, "promote", wait=LEASE_WAIT):
        open_row = history.open_row()
        if open_row is not None:
            history.close(
                open_row, now=datetime.now(UTC), result="interrupted", reason="left open in a restored backup"
            )
        pinned = history.pin()
        if pinned is not None and pinned.bento_tag != tag:
            history.clear_pin(pinned)
        if found is not None:
            provenance.record_as_it_is(engine, registry, found, by=f"adopt by {by}")
            registry.set_alias(PRODUCTION, version)
        else:
            log.warning("the model registry does not have version %d of run %s: no alias names it", version, run)
            registry.drop_alias(PRODUCTION)
        if stored is None:
            if found is not None and expected_tag(found) == tag:
                ensure_bento(settings, engine, registry, found)
            else:
                note_lost(engine, tag, version, found.run_id if found is not None else str(run))
                log.warning("the archive of %s is lost: running pods serve on, a new one would not get ready", tag)
        history.adopt(fence=serving.fence(), now=datetime.now(UTC), version=version, tag=tag,
                      reason="adopted after a restore", by=by)  # fmt: skip
    return tag


def _run_of(serving: Serving, tag: str) -> str | None:
    """The run of what serves, as a pod of that tag says; None if none answers."""
    for pod in serving.rollout().pods:
        if not (pod.ready and pod.address and pod.bento_tag == tag):
            continue
        with suppress(_WorldFault, _ModelFault):  # the next one may answer
            told = ask(f"{pod.address}/info")
            if told.get("bento_tag") == tag and told.get("run_id"):
                return str(told["run_id"])
    return None


def _stored(engine: sa.Engine, wanted: int | str) -> tuple[str, int]:
    query = sa.select(bentos.c.tag, bentos.c.model_version).order_by(bentos.c.built_at.desc())
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    for tag, version in rows:  # newest first
        if str(wanted) in (tag, str(version)):
            return tag, version
    there = ", ".join(map(str, sorted({version for _, version in rows}))) or "none"
    if not str(wanted).isdigit():
        tags = ", ".join(tag for tag, _ in rows) or "none"
        raise NothingToDo(f"no bento {wanted} is stored; there are {tags}")
    raise NothingToDo(
        f"no bento of version {wanted} is stored; there are {there}; "
        f"`churn approve {wanted}`, then `churn promote`, packages and serves it if it passed the gate"
    )


def _before(engine: sa.Engine) -> tuple[str, int]:
    """What was served before the current version was promoted; rollbacks in between do not count, so twice is once.

    While a promotion is under way that is what it wants to replace; while a rollback is, what that goes back to.
    """
    history = History(engine)
    open_row = history.open_row()
    if open_row is not None and open_row.action == "pin" and open_row.to_tag:
        return open_row.to_tag, open_row.to_version
    if open_row is not None and open_row.from_tag and open_row.from_version and open_row.from_tag != open_row.to_tag:
        return open_row.from_tag, open_row.from_version
    rows = [row for row in history.rows(limit=500) if row.result in GOOD and row.action != "pin"]
    last = history.last(good=True)
    version = last.to_version if last else None
    for row in rows:  # newest first
        if row.to_version == version and row.from_version not in (None, version):
            version = row.from_version
            if row.from_tag and bento_of(engine, row.from_tag):
                return row.from_tag, row.from_version
    raise NothingToDo(
        "no other version was served before; `churn rollback --to N` names a stored one, or the tag of another bento"
    )
