"""Carries predictions from the spool to the database, in batches, for as long as the process lives.

A batch is inserted whole, with `ON CONFLICT DO NOTHING` on the prediction's id, so that it may be sent again.
A record that the database refuses is found by halving its batch, and put into quarantine; those behind it
go on. Anything else that goes wrong is an outage: the records wait, and it is said once a minute.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from bentos.churn.database import is_sqlite, open_postgres, open_sqlite, sqlite_path
from bentos.churn.spool import Record, Spool, read_records

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


class Refused(ValueError):
    """The database will not take these rows, and would not at another time either."""


class PredictionLog(Protocol):
    """Table `predictions`."""

    def insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert all rows, but those that are there, or none. Raises Refused, or whatever an outage raises."""

    def close(self) -> None:
        """Let go of the connection."""


class SqliteLog:
    """The table in an SQLite file, opened anew for each batch: it may have been replaced."""

    def __init__(self, url: str) -> None:
        self._path = sqlite_path(url)

    def insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """See PredictionLog."""
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
    """The table in Postgres, filled by COPY through a temporary table that has the same columns."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: Any = None

    def insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """See PredictionLog."""
        import psycopg

        if self._connection is None or self._connection.closed:
            self._connection = open_postgres(self._url)
            self._connection.autocommit = True
            self._connection.execute("SET statement_timeout = '20s'")
        columns = ", ".join(COLUMNS)
        try:
            with self._connection.transaction(), self._connection.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE arriving (LIKE predictions) ON COMMIT DROP")
                with cursor.copy(f"COPY arriving ({columns}) FROM STDIN") as copy:
                    for row in rows:
                        copy.write_row(row)
                cursor.execute(
                    f"INSERT INTO predictions ({columns}) SELECT {columns} FROM arriving "  # noqa: S608
                    "ON CONFLICT (prediction_id) DO NOTHING"
                )
        except (psycopg.DataError, psycopg.IntegrityError, UnicodeEncodeError) as error:
            raise Refused(str(error)) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See PredictionLog."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None


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

    def _insert(self, records: list[Record]) -> None:
        try:
            self._log.insert([tuple(record.get(column) for column in COLUMNS) for record in records])
        except Refused as error:
            if len(records) > 1:
                middle = len(records) // 2
                self._insert(records[:middle])
                self._insert(records[middle:])
                return
            self._quarantine(
                json.dumps(records[0]).encode(),
                "refused",
                f"the database refused prediction {records[0].get('prediction_id')}: {error}",
            )

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
