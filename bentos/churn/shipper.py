"""Carries predictions from the spool to the database, in batches, for as long as the process lives.

A batch is inserted whole, with `ON CONFLICT DO NOTHING` on the prediction's id, so that it may be sent again.
A record that the database refuses is found by halving its batch, and put into quarantine; those behind it
go on. Anything else that goes wrong is an outage: the records wait, and it is said once a minute.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from bentos.churn.database import cut_after, is_sqlite, open_postgres, open_sqlite, sqlite_path
from bentos.churn.spool import Spool, read_records

log = logging.getLogger(__name__)

COLUMNS = (
    "prediction_id",
    "request_id",
    "user_id",
    "source",
    "predicted_at",
    "bento_tag",
    "model_version",
    "churn_probability",
    "churn",
    "threshold",
    "features_as_of",
    "stale",
    "features",
)
BATCH = 1_000
PAUSE_SECONDS = 0.2
LOOK_AROUND_SECONDS = 1.0
SAY_AGAIN_SECONDS = 60.0
STATEMENT_SECONDS = 20.0  # Postgres gives up a batch after this, and we give up Postgres somewhat later


class Refused(ValueError):
    """The database will not take these rows, and would not at another time either."""


class PredictionLog(Protocol):
    """Table `predictions`."""

    def insert(self, records: Sequence[bytes]) -> None:
        """Insert all records, but those that are there, or none. Raises Refused, or whatever an outage raises."""

    def close(self) -> None:
        """Let go of the connection."""


class SqliteLog:
    """The table in an SQLite file, opened anew for each batch: it may have been replaced."""

    def __init__(self, url: str) -> None:
        self._path = sqlite_path(url)

    def insert(self, records: Sequence[bytes]) -> None:
        """See PredictionLog."""
        try:
            found = [json.loads(record) for record in records]
            rows = [tuple(record.get(column) for column in COLUMNS) for record in found]
        except (ValueError, AttributeError) as error:
            raise Refused(f"no JSON object: {error}") from None
        with contextlib.closing(open_sqlite(self._path, mode="rw", timeout=5)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(_INSERT_SQLITE, rows)
                connection.execute("COMMIT")
            except (
                sqlite3.IntegrityError,
                sqlite3.DataError,
                sqlite3.ProgrammingError,
                sqlite3.InterfaceError,
                OverflowError,
                UnicodeEncodeError,
            ) as error:
                raise Refused(str(error)) from None

    def close(self) -> None:
        """See PredictionLog."""


_INSERT_SQLITE = (
    f"INSERT INTO predictions ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "  # noqa: S608
    "ON CONFLICT (prediction_id) DO NOTHING"
)


class PostgresLog:
    """The table in Postgres, each batch one statement and so one transaction.

    The records travel as they are, in one JSON text that the server takes apart: it alone decides what it refuses, no
    right is needed but to insert, and hardly anything is done here while the thread that answers waits. COPY is
    faster from some hundred rows on (twice at a thousand), but has no ON CONFLICT: it takes a temporary table, which
    leaves 40 dead rows a batch in the catalogues, five times a second.
    """

    def __init__(self, url: str) -> None:
        import psycopg  # noqa: F401  a tenth of a second that the first requests need not wait for

        self._url = url
        self._connection: Any = None

    def insert(self, records: Sequence[bytes]) -> None:
        """See PredictionLog."""
        import psycopg

        document = (b"[" + b",".join(records) + b"]").decode(errors="replace")
        try:
            connection = self._open()
            with cut_after(connection, STATEMENT_SECONDS * 1.5):
                connection.execute(_INSERT_POSTGRES, (document,))
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            raise Refused(error.diag.message_primary or type(error).__name__) from None  # all of it repeats the row
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        if self._connection is None or self._connection.closed:
            self._connection = open_postgres(self._url)
            with cut_after(self._connection, STATEMENT_SECONDS):
                self._connection.execute(f"SET statement_timeout = {int(STATEMENT_SECONDS * 1000)}")
        return self._connection

    def close(self) -> None:
        """See PredictionLog."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None


_TYPES = {
    "predicted_at": "timestamptz",
    "model_version": "integer",
    "churn_probability": "float8",
    "churn": "boolean",
    "threshold": "float8",
    "stale": "boolean",
}  # the others are text
_ARRIVING = ", ".join(f"{column} {_TYPES.get(column, 'text')}" for column in COLUMNS)
_INSERT_POSTGRES = (
    f"INSERT INTO predictions ({', '.join(COLUMNS)}) "  # noqa: S608
    f"SELECT {', '.join(COLUMNS)} FROM json_to_recordset(%s::json) AS arriving({_ARRIVING}) "
    "ON CONFLICT DO NOTHING"  # without naming the key: that would need the right to select
)


def open_log(url: str) -> PredictionLog:
    """Table `predictions` in the database at this URL; nothing is opened yet."""
    return SqliteLog(url) if is_sqlite(url) else PostgresLog(url)


class Shipper:
    """The thread that empties the spool."""

    def __init__(self, spool: Spool, predictions: PredictionLog) -> None:
        self._spool = spool
        self._log = predictions
        self._wake = threading.Event()
        self._stopping = False
        self._said = -SAY_AGAIN_SECONDS
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self.shipped = 0  # records, replayed ones included
        self.quarantined = 0  # damaged stretches and refused records
        self.failing_since: float | None = None  # monotonic

    def start(self) -> None:
        """Begin to ship."""
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Ship what there is and stop; False if some of it has to wait for the next process."""
        self._spool.stop()
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        if self._thread.is_alive():
            return False  # in the middle of a batch: its folder stays locked until the process is gone
        left = any(True for _ in self._spool.segments())
        self._log.close()
        self._spool.close()
        return not left

    def _run(self) -> None:
        pause = PAUSE_SECONDS
        while True:
            self._wake.wait(pause)
            stopping = self._stopping
            try:
                self.ship_once()
            except Exception as error:
                pause = min(pause * 2, 5.0)
                self._say(error)
                if stopping:
                    self._wake.clear()
                    pause = PAUSE_SECONDS
            else:
                pause = PAUSE_SECONDS
                if self.failing_since is not None:
                    log.info("the database takes predictions again")
                    self.failing_since = None
                if stopping:
                    return

    def ship_once(self) -> None:
        """Ship every record that is in the spool now; raises whatever the outage of the database raised."""
        now = time.monotonic()
        if now - self._looked >= LOOK_AROUND_SECONDS:
            self._looked = now
            self._spool.look_around()
        self._spool.seal()
        for segment in self._spool.segments():
            records, damaged = read_records(segment.read_bytes())
            for start in range(0, len(records), BATCH):
                self._insert(records[start : start + BATCH])
            for data in damaged:
                self._quarantine(data, "damaged", f"{len(data)} bytes of {segment} are no records")
            self._spool.remove(segment)
            self.shipped += len(records)

    def _insert(self, records: list[bytes]) -> None:
        try:
            self._log.insert(records)
        except Refused as error:
            if len(records) > 1:
                middle = len(records) // 2
                self._insert(records[:middle])
                self._insert(records[middle:])
                return
            found = re.search(rb'"prediction_id":\s*"([^"]*)"', records[0])
            name = found[1].decode(errors="replace") if found else "without an id"
            self._quarantine(records[0], "refused", f"the database refused prediction {name}: {error}")

    def _quarantine(self, data: bytes, kind: str, why: str) -> None:
        self._spool.quarantine(data, kind)
        self.quarantined += 1
        log.error("%s; kept in quarantine", why)

    def _say(self, error: Exception) -> None:
        now = time.monotonic()
        if self.failing_since is None:
            self.failing_since = now
        if now - self._said >= SAY_AGAIN_SECONDS:
            self._said = now
            log.warning(
                "predictions wait in the spool, %s bytes: %s",
                f"{self._spool.backlog_bytes:,}",
                " ".join(str(error).split()),
            )
