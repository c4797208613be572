"""From empty stores to a service that answers: tables, data, features, a first model, its promotion.

What `helm install` waits for. Every step looks first whether it was done, so that an upgrade may run it again,
a killed one goes on, and a release that lives is left as it is. The stores may start at the same time: they are
waited for, with an end.
"""

from __future__ import annotations

import logging
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

from feature_repo.columns import POPULATION
from jobs import database
from jobs.ingest import SIMULATED, ingest, ingest_source, simulated_days
from jobs.materialize import materialize
from jobs.promote import PromotionFailed, promote
from jobs.registry import CANDIDATE, PRODUCTION, Registry
from jobs.retrain import retrain
from jobs.serving import serving_of, write_json
from jobs.settings import Settings
from jobs.simulate import simulate
from jobs.snapshots import Snapshots

log = logging.getLogger(__name__)

STORES_WITHIN = 300.0  # seconds for the stores to answer
SERVES_WITHIN = 480.0  # seconds for the service to answer, once there is a model


@dataclass(frozen=True)
class BootstrapResult:
    """What was found or made: `result` is `serving`, or as long as there is nothing to learn from `no_data` or
    `waiting_for_labels`."""

    result: str
    reason: str
    simulated: bool = False
    served_tag: str | None = None
    example_user: str | None = None  # one that /predict can be asked for


def bootstrap(settings: Settings, *, as_of: datetime, now: datetime) -> BootstrapResult:
    """Bring a release up; run again, it does what is left to do. Raises what the steps raise, and TimeoutError."""
    _await_stores(settings)
    _make_tables(settings)
    simulated = _take_data(settings, as_of=as_of, now=now)
    if Snapshots(settings.snapshots).newest(as_of) is None:
        source = settings.snapshots_source
        return BootstrapResult("no_data", f"no snapshot up to {as_of:%Y-%m-%d} in {source}: nothing to learn from yet")
    materialize(settings, as_of=as_of)
    waiting = _train(settings, as_of=as_of)
    if waiting:
        return BootstrapResult("waiting_for_labels", f"{waiting}; `churn drift` trains the first model then", simulated)
    tag = _serve(settings)
    return BootstrapResult("serving", "the service answers", simulated, tag, _example_user(settings, as_of))


def _await_stores(settings: Settings) -> None:
    """Return when each store answers once; raises TimeoutError, which says what the last one said."""
    stores: dict[str, Callable[[], object]] = {
        "the database": lambda: database.ping(settings.database),
        "Feast's registry": lambda: database.ping(settings.feast_registry),
        "the online store": lambda: _ping_online(settings),
        "MLflow": lambda: _ping_mlflow(settings),
    }
    end = time.monotonic() + STORES_WITHIN
    for name, ask in stores.items():
        _until(f"{name} to answer", ask, end)


def _until(what: str, ask: Callable[[], object], end: float) -> None:
    """Call until it raises nothing; what it raised last is in the TimeoutError."""
    told = ""
    while True:
        try:
            ask()
            return
        except Exception as error:  # each store's driver has exceptions of its own
            said = " ".join(str(error).split())[:300]
            if time.monotonic() > end:
                raise TimeoutError(f"waited too long for {what}: {said}") from error
            if said != told:
                log.info("waiting for %s: %s", what, said)
                told = said
        time.sleep(1)


def _ping_online(settings: Settings) -> None:
    url = settings.online_store
    if url.startswith("sqlite"):
        return
    import redis

    with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
        client.ping()


def _ping_mlflow(settings: Settings) -> None:
    if settings.mlflow.startswith("http"):
        with urllib.request.urlopen(f"{settings.mlflow.rstrip('/')}/health", timeout=5):
            pass
    Registry(settings).aliases()  # /health is green also where the Host header is refused


def _make_tables(settings: Settings) -> None:
    """Our schema and tables, with the service's rights on them, and the schema of Feast's registry."""
    for url in (settings.database, settings.feast_registry):
        database.ensure_schema(url)
    database.connect(settings.database)
    if settings.serving_role:
        database.grant_serving(settings.database, settings.serving_role)


def _take_data(settings: Settings, *, as_of: datetime, now: datetime) -> bool:
    """Ingest what has arrived or, without a source, made-up months; whether they are made up."""
    if settings.snapshots_source:
        ingest_source(settings, now=now)
        return False
    present, planned = Snapshots(settings.snapshots).days(), simulated_days(settings)
    if present and not planned:
        log.info("snapshots are there up to %s", present[-1])
        return False
    if not planned:  # noted first: whatever is there after a kill is known to be made up
        planned = _month_ends(as_of.date(), settings.simulate_months)
        settings.home.mkdir(parents=True, exist_ok=True)
        write_json(settings.home / SIMULATED, {"days": [day.isoformat() for day in planned]})
    missing = [day for day in planned if day not in present]
    if not missing:
        return True
    log.warning("snapshots.source is not set: %d users are made up", settings.simulate_users)
    with tempfile.TemporaryDirectory() as scratch:
        simulate(
            Path(scratch), users=settings.simulate_users, months=len(planned), start=planned[0],
            seed=settings.seed, format="parquet",
        )  # fmt: skip
        for day in missing:
            ingest(settings, Path(scratch) / day.isoformat(), as_of=day, now=now)
    return True


def _month_ends(today: date, months: int) -> list[date]:
    """The last days of the last complete months, oldest first: on 2026-11-21 and for two, 09-30 and 10-31."""
    found, day = list[date](), today + timedelta(days=1)
    while len(found) < months:
        day = day.replace(day=1) - timedelta(days=1)
        found.append(day)
    return found[::-1]


def _example_user(settings: Settings, as_of: datetime) -> str:
    snapshots = Snapshots(settings.snapshots)
    day = snapshots.newest(as_of)
    assert day is not None  # noqa: S101  looked at before
    return str(snapshots.read(POPULATION, day).index[0])


def _train(settings: Settings, *, as_of: datetime) -> str:
    """A first model, if the registry has none in production and no candidate; why not yet, if it is too early."""
    aliases = Registry(settings).aliases()
    if PRODUCTION in aliases or CANDIDATE in aliases:
        log.info("the model registry has %s", aliases)
        return ""
    result = retrain(settings, as_of=as_of, wanted_by="bootstrap", reason="no model yet")
    if result.result == "waiting_for_labels":
        return result.reason
    if result.result not in ("registered", "unchanged", "held") or result.gate == "refused":
        raise RuntimeError(f"no first model: {result.result}: {result.reason}")
    return ""


def _serve(settings: Settings) -> str | None:
    """Promote, and wait until what is served is what should be; the tag. CronJob `promote` may do the work."""
    serving, end, seen = serving_of(settings), time.monotonic() + SERVES_WITHIN, "nothing"
    while True:
        try:
            result = promote(settings, by="bootstrap")
            seen = f"{result.result}: {result.reason}"
            rollout = serving.rollout()
            if result.result != "held" and rollout.served_tag and (rollout.settled or not rollout.running):
                return rollout.served_tag
        except PromotionFailed as error:
            if not error.interrupted:
                raise
            seen = str(error)
        if time.monotonic() > end:
            raise TimeoutError(f"nothing serves after {SERVES_WITHIN:.0f} s; last seen: {seen}")
        log.info("not serving yet: %s", seen)
        time.sleep(2)
