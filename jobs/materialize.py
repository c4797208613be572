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

from feature_repo.columns import ENTITY, POPULATION
from jobs import dataset
from jobs.settings import Settings
from jobs.snapshots import Snapshots, instant

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger(__name__)

SENTINEL = "__sentinel__"
SAMPLE = 200  # users read back
DAY = timedelta(days=1)


@dataclass(frozen=True)
class MaterializeResult:
    """What was written: `start` (exclusive) to `as_of`; `full` if the online store had lost its data."""

    result: Literal["materialized", "newer_online", "dry_run"]
    reason: str
    snapshot: date
    start: datetime
    users: int
    full: bool
    compared: int = 0


class OnlineMismatch(RuntimeError):
    """The online store does not hold what was written to it."""


def materialize(settings: Settings, *, as_of: datetime, dry_run: bool = False) -> MaterializeResult:
    """Write every user's newest features up to `as_of` to the online store; running it again changes nothing.

    The window begins after the instant the store already holds, and always includes the newest snapshot, so that
    corrected data replaces the old. Raises LookupError without a snapshot, OnlineMismatch if what is read back
    differs from what was written.
    """
    snapshots = Snapshots(settings.snapshots)
    snapshots.recover()
    day = snapshots.newest(as_of)
    if day is None:
        raise LookupError(
            f"no snapshot on or before {as_of:%Y-%m-%d} was ingested; `churn ingest DIR --as-of DATE` takes one"
        )
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
    log.info("materializing (%s, %s]: %d users, full=%s", start, end, users, full)
    for begin, until in _windows(snapshots, start, end):
        with contextlib.redirect_stdout(io.StringIO()):  # Feast prints; our standard output is for people and --json
            store.materialize(start_date=begin + timedelta(seconds=1), end_date=until)
    _write_sentinel(store, end)
    compared = read_back(settings, store, day)
    return MaterializeResult("materialized", reason, day, start, users, full, compared)


def _let_readers_read(settings: Settings) -> None:
    """SQLite: put the file into WAL mode, so that the service reads while this writes."""
    if settings.online_store.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(settings.online_store.removeprefix("sqlite:///"))) as connection:
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
    found = _read_online(store, users, timestamps=False)
    order = pd.Index(found[ENTITY])
    online = dataset.canonical(pd.DataFrame({f.name: found[f.name] for f in plan}, index=order), plan).loc[users]
    for feature in plan:
        left, right = offline[feature.name], online[feature.name]
        differs = (left != right) & ~(left.isna() & right.isna())
        if differs.any():
            user = str(differs.idxmax())
            raise OnlineMismatch(
                f"{feature.name} of user {user} is {right[user]!r} online and {left[user]!r} offline; "
                f"{int(differs.sum())} of {len(users)} users differ"
            )
    return len(users)
