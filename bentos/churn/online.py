"""Features of users out of Feast's online store, without Feast.

Feast's SDK takes most of a request's time and half of the image, so this reads the store's own layout. A
test compares every value with what the SDK says, for the version of Feast that is pinned.
A store is one class with `read` and `probe`; `open_store` picks it by the URL.

Users and the store can be absent in ways that look alike. The jobs write a row for the user `__sentinel__`
into every feature view: where even that row is missing, the view was wiped, and the answer is
"ask again later", not "unknown user" and not a guess from defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from bentos.churn.database import open_sqlite, sqlite_path
from bentos.churn.model import Cell, Plan, Value

log = logging.getLogger(__name__)

SENTINEL = "__sentinel__"
READ_SECONDS = 0.3

T = TypeVar("T")


class StoreDown(RuntimeError):
    """The online store did not answer, or not with features."""


class StoreEmpty(RuntimeError):
    """The online store answers, but was not filled: materialize has not run, or the data was lost."""


class LayoutMismatch(StoreDown):
    """The online store holds features in another form than the one that is read here."""


class Ages(NamedTuple):
    """When the rows of a user were true."""

    timestamps: Mapping[str, datetime]  # of each view that has one
    oldest: datetime
    text: str  # the oldest, as in ISO 8601

    @classmethod
    def of(cls, timestamps: Mapping[str, datetime]) -> Ages:
        """The ages of at least one row."""
        oldest = min(timestamps.values())
        return cls(timestamps, oldest, oldest.isoformat())


class UserFeatures(NamedTuple):
    """What the store holds of one user."""

    cells: list[Cell]  # one for every feature of the plan
    ages: Ages

    @property
    def values(self) -> dict[str, Value | None]:
        """Every feature of the plan as it is stored; None: null, or no row in its view."""
        return {cell.name: cell.found for cell in self.cells}


class OnlineStore(Protocol):
    """A place that features are read from."""

    async def read(self, user_ids: Sequence[str]) -> list[UserFeatures | None]:
        """The features of each user, None for an unknown one; raises StoreDown or StoreEmpty."""

    async def probe(self) -> None:
        """Return if look-ups can be answered; raise StoreDown, StoreEmpty or LayoutMismatch if not."""

    def close(self) -> None:
        """Let go of connections and threads."""


def open_store(url: str, project: str, plan: Plan) -> OnlineStore:
    """The store at this URL, which is not asked yet; raises ValueError if the URL is none."""
    if url.startswith("sqlite:///"):
        return SqliteStore(sqlite_path(url), project, plan)
    if url.startswith(("redis://", "rediss://")):
        from bentos.churn.redis_store import RedisStore

        return RedisStore(url, project, plan)
    raise ValueError(
        f"{url.split('://', 1)[0]}:// is no online store the service knows; expected sqlite:///, redis:// or rediss://"
    )


# --- Feast's encodings ------------------------------------------------------------------------------------

_STRING = 2  # feast.types.ValueType
_NULL = b"\x98\x01\x00"  # a Value whose null_val is set
_KEY_PREFIX = struct.pack("<III7sI", 1, _STRING, 7, b"user_id", _STRING)


def entity_key(user_id: str) -> bytes:
    """Feast's key of a user (entity_key_serialization_version 3)."""
    encoded = user_id.encode()
    return _KEY_PREFIX + struct.pack("<I", len(encoded)) + encoded


def decode_value(data: bytes) -> Value | None:
    """The value in a serialized `feast.types.Value`; StoreDown if it is none that a feature can have."""
    if not data or data == _NULL:
        return None
    field, wire = data[0] >> 3, data[0] & 7
    if field == 5 and wire == 1 and len(data) == 9:
        return struct.unpack_from("<d", data, 1)[0]  # type: ignore[no-any-return]
    if field == 6 and wire == 5 and len(data) == 5:
        return struct.unpack_from("<f", data, 1)[0]  # type: ignore[no-any-return]
    with contextlib.suppress(IndexError, UnicodeDecodeError):
        number, end = read_varint(data, 1)
        if wire == 0 and end == len(data):
            if field in (3, 4):
                return number - 2**64 if number >= 2**63 else number
            if field == 7 and number in (0, 1):
                return bool(number)
        if field == 2 and wire == 2 and end + number == len(data):
            return data[end:].decode()
    raise StoreDown(f"the online store holds {data[:16]!r}, which is no value of a feature")


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Protobuf's number at a position, and the position behind it; IndexError if it is cut off."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if number >= 2**64:
                break
            return number, at
    raise IndexError("a varint has at most ten bytes")


def decode_timestamp(value: object) -> datetime:
    """When a row was true. Feast stores UTC, either as text or by way of this machine's local time."""
    if isinstance(value, int):
        return datetime.fromtimestamp(value).replace(tzinfo=UTC)  # noqa: DTZ006  as Feast reads it
    with contextlib.suppress(ValueError, TypeError):
        moment = datetime.fromisoformat(value)  # type: ignore[arg-type]
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    raise StoreDown(f"the online store holds the event timestamp {value!r}")


# --- SQLite -----------------------------------------------------------------------------------------------


class SqliteStore:
    """Feast's SQLite online store: a table for each feature view, a row for each user and feature.

    One thread reads, so that a lock held by `materialize` delays look-ups only, and those by 300 ms at
    most. The file is opened anew when another one has taken its place.
    """

    def __init__(self, path: Path, project: str, plan: Plan) -> None:
        self._path = path
        self._views: dict[str, str] = {}
        for feature in plan.features:
            self._views.setdefault(feature.view, f"{project}_{feature.view}".replace('"', '""'))
        self._plan = plan
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="online-store")
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None

    async def read(self, user_ids: Sequence[str]) -> list[UserFeatures | None]:
        """The features of each user, None for an unknown one; raises StoreDown or StoreEmpty."""
        return await self._in_thread(lambda connection: self._read(connection, user_ids))

    async def probe(self) -> None:
        """Return if every view holds the sentinel; raise StoreDown or StoreEmpty if not."""
        await self._in_thread(lambda connection: self._check_sentinel(connection, self._views))

    def close(self) -> None:
        """Close the file, and end the thread when it is done."""
        self._thread.submit(self._disconnect)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, work: Callable[[sqlite3.Connection], T]) -> T:
        deadline = time.monotonic() + READ_SECONDS
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._attempt, work, deadline)
        try:
            return await asyncio.wait_for(running, READ_SECONDS + 0.2)
        except TimeoutError:
            raise StoreDown(f"{self._path.name} gave no answer within {READ_SECONDS} s") from None

    def _attempt(self, work: Callable[[sqlite3.Connection], T], deadline: float) -> T:
        left = deadline - time.monotonic()
        if left <= 0:
            raise StoreDown(f"{self._path.name} gave no answer within {READ_SECONDS} s")
        try:
            connection = self._connect()
            connection.execute(f"PRAGMA busy_timeout = {int(left * 1000)}")
            connection.execute("BEGIN")  # all views as of one moment
            try:
                return work(connection)
            finally:
                connection.execute("ROLLBACK")
        except (sqlite3.Error, OSError, OverflowError) as error:
            self._disconnect()
            raise StoreDown(f"{self._path.name}: {error}") from None
        except StoreDown:
            self._disconnect()
            raise

    def _connect(self) -> sqlite3.Connection:
        about = os.stat(self._path)  # noqa: PTH116  a hundred thousand times an hour
        identity = (about.st_dev, about.st_ino)
        if self._connection is None or identity != self._identity:
            self._disconnect()
            self._connection = open_sqlite(self._path, mode="ro", timeout=READ_SECONDS)
            self._identity = identity
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _read(self, connection: sqlite3.Connection, user_ids: Sequence[str]) -> list[UserFeatures | None]:
        blank: dict[str, Value | None] = dict.fromkeys(self._plan.names)
        found = {entity_key(user_id): (blank.copy(), dict[str, datetime]()) for user_id in user_ids}
        marks = ",".join("?" * len(found))
        incomplete = []
        for view, table in self._views.items():
            rows = connection.execute(
                f'SELECT entity_key, feature_name, value, event_ts FROM "{table}" '  # noqa: S608
                f"WHERE entity_key IN ({marks})",
                tuple(found),
            ).fetchall()
            with_rows = 0
            for key, name, value, event_ts in rows:
                values, timestamps = found[key]
                if name in values:
                    values[name] = decode_value(value)
                if view not in timestamps:
                    timestamps[view] = decode_timestamp(event_ts)
                    with_rows += 1
            if with_rows < len(found):
                incomplete.append(view)
        if incomplete:
            self._check_sentinel(connection, incomplete)
        rows = [found[entity_key(user_id)] for user_id in user_ids]
        return [UserFeatures(self._plan.cells(values), Ages.of(at)) if at else None for values, at in rows]

    def _check_sentinel(self, connection: sqlite3.Connection, views: Iterable[str]) -> None:
        key = entity_key(SENTINEL)
        wiped = [view for view in views if not connection.execute(self._one_row(view), (key,)).fetchone()]
        if wiped:
            raise StoreEmpty(f"the online store has no rows of {', '.join(wiped)}; materialize fills it again")

    def _one_row(self, view: str) -> str:
        return f'SELECT 1 FROM "{self._views[view]}" WHERE entity_key = ? LIMIT 1'  # noqa: S608
