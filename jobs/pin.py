"""What people say to promotion: roll back, pin, unpin, approve. Each is a record first, then a promotion.

A pin is written before anything moves, so that a promotion under way sees it within a second and yields.
It works from the stored archives, also while the model registry is down.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import sqlalchemy as sa

from jobs.database import bentos, connect
from jobs.history import GOOD, History, Pin
from jobs.package import bento_of
from jobs.promote import SPENT_TAGS, Promoter, PromoteResult
from jobs.registry import CANDIDATE, Registry
from jobs.serving import Serving
from jobs.settings import Settings

LEASE_WAIT = 60.0  # seconds for a promotion under way to yield


class NothingToDo(LookupError):
    """There is no version that this could be done with; says what there is."""


def rollback(
    settings: Settings,
    *,
    to: int | None = None,
    reason: str,
    by: str,
    serving: Serving | None = None,
    dry_run: bool = False,
) -> PromoteResult:
    """Serve an earlier version (default: the one served before), and stay with it until unpinned."""
    engine = connect(settings.database)
    tag, version = _stored(engine, to) if to is not None else _before(engine)
    if dry_run:
        return PromoteResult("dry_run", f"would pin version {version} ({tag}): {reason}", tag, None, version)
    return _pin(settings, engine, version, tag, reason, by, serving)


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
    result = Promoter(settings, serving, by=by).run(wait=LEASE_WAIT)
    if result.result == "held":
        return replace(result, reason=f"{tag} is pinned; the promotion under way will follow it ({result.reason})")
    return result


def unpin(settings: Settings) -> Pin | None:
    """End the pin; promotion goes on with the next candidate. Returns the pin that ended, None if there was none."""
    history = History(connect(settings.database))
    found = history.pin()
    history.clear_pin()
    return found


def approve(settings: Settings, version: int, *, by: str, reason: str) -> None:
    """Let a version that passed the gate be promoted, also one that was rolled back or failed before."""
    registry = Registry(settings)
    found = registry.version(version)
    if found is None:
        raise NothingToDo(f"model {settings.release} has no version {version}")
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


def _stored(engine: sa.Engine, version: int) -> tuple[str, int]:
    query = sa.select(bentos.c.tag).where(bentos.c.model_version == version).order_by(bentos.c.built_at.desc())
    with engine.connect() as connection:
        tag = connection.execute(query).scalars().first()
        stored = (
            connection.execute(sa.select(bentos.c.model_version).distinct().order_by(bentos.c.model_version))
            .scalars()
            .all()
        )
    if tag is None:
        raise NothingToDo(f"no bento of version {version} is stored; there are {', '.join(map(str, stored)) or 'none'}")
    return tag, version


def _before(engine: sa.Engine) -> tuple[str, int]:
    history = History(engine)
    last = history.last(good=True)
    for row in history.rows(limit=200):
        tag = row.to_tag
        if row.result in GOOD and last and tag and row.to_version != last.to_version and bento_of(engine, tag):
            return tag, row.to_version
    raise NothingToDo("no other version was served before; `churn rollback --to N` names a stored one")
