"""Bring the newest snapshot's features into the online store, and check by reading some back.

A sentinel user, `__sentinel__`, is written last, with the instant materialized. It lives in the online store
itself, unlike Feast's own watermark, which is in the registry and does not notice a wiped store: whoever finds
no sentinel knows that everything must be written again. Feast's `materialize_incremental` is not used: its first
run on old data loads nothing and says it did.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from bentos.churn.database import sqlite_path
from bentos.churn.online import StoreDown, entity_key
from feature_repo.columns import ENTITY, FEATURE_TABLES, POPULATION, view_name
from jobs import dataset
from jobs.lease import Held, lease
from jobs.settings import Settings
from jobs.snapshots import Snapshots, instant

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger(__name__)

SENTINEL = "__sentinel__"
SAMPLE = 200  # users read back
DAY = timedelta(days=1)
CHUNK = 1000  # users read from the online store at a time


@dataclass(frozen=True)
class MaterializeResult:
    """What was written: `start` (exclusive) to `as_of`; `full` if the online store had lost its data."""

    result: Literal["materialized", "newer_online", "dry_run", "held"]
    reason: str
    snapshot: date | None = None
    start: datetime | None = None
    users: int = 0
    full: bool = False
    compared: int = 0


class OnlineMismatch(RuntimeError):
    """The online store does not hold what was written to it."""


def materialize(settings: Settings, *, as_of: datetime, dry_run: bool = False) -> MaterializeResult:
    """Write every user's newest features up to `as_of` to the online store; running it again changes nothing.

    The window begins after the instant the store already holds, and always includes the newest snapshot, so that
    corrected data replaces the old. Raises LookupError without a snapshot, OnlineMismatch if what is read back
    differs from what was written. While another does it the result is `held`.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from redis.exceptions import ResponseError

    if dry_run:
        return _materialize(settings, as_of=as_of, dry_run=True)
    try:
        with lease(settings, "materialize"):
            try:
                return _materialize(settings, as_of=as_of, dry_run=False)
            except (ResponseError, DecodeError):
                if not _drop_damaged(settings):
                    raise
                return _materialize(settings, as_of=as_of, dry_run=False)
    except Held as held:
        return MaterializeResult("held", str(held))


def _materialize(settings: Settings, *, as_of: datetime, dry_run: bool) -> MaterializeResult:
    snapshots = Snapshots(settings.snapshots)
    snapshots.recover()
    day = snapshots.newest(as_of)
    if day is None:
        raise LookupError(
            f"no snapshot on or before {as_of:%Y-%m-%d} was ingested; `churn ingest DIR --as-of DATE` takes one"
        )
    snapshots.check(day)
    end = instant(day)
    users = len(snapshots.read(POPULATION, day))
    store = dataset.feature_store(settings)
    online = online_as_of(store)
    if online is not None and online > end:
        reason = f"the online store already holds {online:%Y-%m-%d}, which is newer"
        return MaterializeResult("newer_online", reason, day, online, 0, False)
    full = online is None or not _holds_sample(store, snapshots, online)
    start = end - settings.feature_ttl if full or online is None else min(online, end - DAY)
    reason = "the online store was empty or incomplete: everything is written" if full else f"since {start:%Y-%m-%d}"
    if dry_run:
        return MaterializeResult("dry_run", reason, day, start, users, full)
    if online is None:
        dataset.apply(settings, store)
    _let_readers_read(settings)
    if online == end and _forget_removed(settings, store, snapshots, day):
        start = end - settings.feature_ttl  # what was true of them before is written again
    log.info("materializing (%s, %s]: %d users, full=%s", start, end, users, full)
    windows = _windows(snapshots, start, end)
    if settings.online_store.startswith("sqlite"):
        _write(store, windows)
    else:  # the newest first, so that nobody gets what was true before; the older ones then fill gaps, and those alone
        _write(store, windows[-1:])
        older = dataset.feature_store(settings)
        older.config.online_store.skip_dedup = False
        _write(older, windows[:-1])
    _write_sentinel(store, end)
    compared = read_back(settings, store, day)
    return MaterializeResult("materialized", reason, day, start, users, full, compared)


def _write(store: FeatureStore, windows: Sequence[tuple[datetime, datetime]]) -> None:
    for begin, until in windows:
        with contextlib.redirect_stdout(io.StringIO()):  # Feast prints; our standard output is for people and --json
            store.materialize(start_date=begin + timedelta(seconds=1), end_date=until)


def _drop_damaged(settings: Settings) -> int:
    """Delete users' rows in Redis that cannot be read, and which Feast cannot write over either; how many."""
    if settings.online_store.startswith("sqlite"):
        return 0
    from redis import Redis
    from redis.exceptions import ResponseError

    from bentos.churn.redis_store import check_row, row_fields

    plan, snapshots = dataset.features_of(dataset.feature_store(settings)), Snapshots(settings.snapshots)
    fields = row_fields([(feature.view, feature.name) for feature in plan])

    def damaged(row: Any) -> bool:
        if isinstance(row, ResponseError):
            if str(row).startswith("WRONGTYPE"):
                return True
            raise row
        try:
            check_row(row, len(plan))
        except StoreDown:
            return True
        return False

    users = [SENTINEL, *sorted({user for day in snapshots.days() for user in snapshots.read(POPULATION, day).index})]
    count = 0
    with Redis.from_url(settings.online_store, socket_timeout=60) as client:
        for start in range(0, len(users), CHUNK):
            keys = [entity_key(user) + settings.feast_project.encode() for user in users[start : start + CHUNK]]
            with client.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.hmget(key, fields)
                rows = pipeline.execute(raise_on_error=False)
            odd = [key for key, row in zip(keys, rows, strict=True) if damaged(row)]
            count += len(odd)
            if odd:
                client.delete(*odd)
        if count:  # without the sentinel all months are written, not the newest alone
            client.delete(entity_key(SENTINEL) + settings.feast_project.encode())
    log.warning("%d rows of users online were damaged; they are written anew", count)
    return count


def _forget_removed(settings: Settings, store: FeatureStore, snapshots: Snapshots, day: date) -> int:
    """Take rows out of the online store that a corrected snapshot of the same day no longer has; how many."""
    population = snapshots.read(POPULATION, day).index
    plan, count = dataset.features_of(store), 0
    for table in FEATURE_TABLES:
        absent = population.difference(snapshots.read(table.name, day).index).tolist()
        name = next(feature.name for feature in plan if feature.view == view_name(table.name))
        for start in range(0, len(absent), CHUNK):
            users = absent[start : start + CHUNK]
            stamps = _read_online(store, users, timestamps=True)[f"{name}__ts"]
            removed = [u for u, stamp in zip(users, stamps, strict=True) if stamp == instant(day).timestamp()]
            if removed:
                _delete(settings, view_name(table.name), [f.name for f in plan], removed)
                count += len(removed)
    if count:
        log.info("%d rows of %s were taken out by a correction", count, day)
    return count


def _delete(settings: Settings, view: str, features: Sequence[str], users: Sequence[str]) -> None:
    """Feast has no call for this: rows of a view, by its layout, which the service reads as well."""
    url = settings.online_store
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(sqlite_path(url), timeout=30)) as connection, connection:
            sql = f'DELETE FROM "{settings.feast_project}_{view}" WHERE entity_key = ?'  # noqa: S608  our own names
            connection.executemany(sql, [(entity_key(user),) for user in users])
        return
    from redis import Redis

    from bentos.churn.redis_store import field_name

    fields = [*(field_name(view, feature) for feature in features), f"_ts:{view}".encode()]
    with Redis.from_url(url, socket_timeout=60) as client, client.pipeline(transaction=False) as pipeline:
        for user in users:
            pipeline.hdel(entity_key(user) + settings.feast_project.encode(), *fields)
        pipeline.execute()


def _let_readers_read(settings: Settings) -> None:
    """SQLite: put the file into WAL mode, so that the service reads while this writes."""
    if settings.online_store.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(sqlite_path(settings.online_store))) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


def _windows(snapshots: Snapshots, start: datetime, end: datetime) -> list[tuple[datetime, datetime]]:
    """One window a snapshot, because Feast reads a window into memory as a whole."""
    instants = [instant(day) for day in snapshots.days() if start < instant(day) <= end]
    return list(zip([start, *instants[:-1]], instants, strict=True))


def online_as_of(store: FeatureStore) -> datetime | None:
    """The instant that the online store was materialized to; None if it is new, wiped or another."""
    names = [feature.name for feature in dataset.features_of(store)]
    try:
        found = _read_online(store, [SENTINEL], timestamps=True)
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise
    stamps = [found[f"{name}__ts"][0] for name in names]
    return datetime.fromtimestamp(min(stamps), UTC) if all(stamps) else None


def _read_online(store: FeatureStore, users: Sequence[str], *, timestamps: bool) -> dict[str, list[Any]]:
    service = store.get_feature_service(dataset.FEATURE_SERVICE)
    response = store.get_online_features(service, [{ENTITY: user} for user in users])
    found: dict[str, list[Any]] = response.to_dict(include_event_timestamps=timestamps)
    return found


def _write_sentinel(store: FeatureStore, end: datetime) -> None:
    values: dict[str, Any] = {"int": 0, "float": 0.0, "bool": False}  # Feast does not write a row of nulls
    plan = dataset.features_of(store)
    for view in dict.fromkeys(feature.view for feature in plan):
        row = {f.name: [f.categories[0] if f.categories else values[f.kind]] for f in plan if f.view == view}
        frame = pd.DataFrame({ENTITY: [SENTINEL], "event_timestamp": [pd.Timestamp(end)], **row})
        store.write_to_online_store(view, frame)


def _sample(snapshots: Snapshots, day: date) -> list[str]:
    users = list(snapshots.read(POPULATION, day).index)
    return sorted(random.Random(f"{day}").sample(users, min(SAMPLE, len(users))))  # noqa: S311  any users will do


def _holds_sample(store: FeatureStore, snapshots: Snapshots, online: datetime) -> bool:
    """Whether users of the snapshot that was materialized last are still there: half of the keys may be gone."""
    day = online.date()
    if day not in snapshots.days():
        return True
    found = _read_online(store, _sample(snapshots, day), timestamps=False)
    required = [
        feature.name
        for feature in dataset.features_of(store)
        if feature.view == "subscriptions_profile" and feature.kind != "category"
    ]
    return all(value is not None for name in required for value in found[name])


def read_back(settings: Settings, store: FeatureStore, day: date) -> int:
    """Compare a sample of users online with the offline store; returns how many users, raises OnlineMismatch."""
    plan = dataset.features_of(store)
    users = _sample(Snapshots(settings.snapshots), day)
    offline = dataset.feature_frame(settings, day).loc[users]
    found = _read_online(store, users, timestamps=True)
    order = pd.Index(found[ENTITY])
    oldest = (instant(day) - settings.feature_ttl).timestamp()
    outdated = pd.DataFrame({f.name: [t < oldest for t in found[f"{f.name}__ts"]] for f in plan}, index=order).loc[
        users
    ]
    online = dataset.canonical(pd.DataFrame({f.name: found[f.name] for f in plan}, index=order), plan).loc[users]
    for feature in plan:
        left, right = offline[feature.name], online[feature.name]
        differs = (left != right) & ~(left.isna() & right.isna())
        differs &= ~(left.isna() & outdated[feature.name])  # too old for training; online it is there, and stale
        if differs.any():
            user = str(differs.idxmax())
            raise OnlineMismatch(
                f"{feature.name} of user {user} is {right[user]!r} online and {left[user]!r} offline; "
                f"{int(differs.sum())} of {len(users)} users differ"
            )
    return len(users)
