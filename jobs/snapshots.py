"""The store of ingested snapshots: one folder a day, one Parquet file a table.

    snapshots/2024-01-31/subscriptions.parquet, usage_agg_30d.parquet, …, snapshot.json
    snapshots.staging/     what is being written or replaced; absent when nothing is pending
    snapshots.lock         held (flock) while something changes

A day is replaced as a whole or not at all. It is written beside the store, marked complete by a rename,
and then takes the old one's place by two more; whoever is killed in between leaves names from which
`recover` knows whether to finish or to undo. Every file of a table has the same schema, so that Feast
can read all days at once (`glob`).

Knowingly simple: readers take no lock. Between the two renames, microseconds apart, a day that is being
corrected is absent; jobs that read run after ingestion, not during it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime
from datetime import time as clock_time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from feature_repo.columns import ENTITY, TABLES, Column, Table

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

log = logging.getLogger(__name__)

TIMESTAMP = "event_timestamp"
RECORD = "snapshot.json"
LABELS = "labels"

Written = Literal["written", "replaced", "unchanged"]


class SnapshotDamaged(RuntimeError):
    """A snapshot's files changed since it was ingested, by a disk or a hand; says which."""


class StoreLocked(TimeoutError):
    """Another process is changing the store, and did not finish while we waited."""


def instant(day: date) -> datetime:
    """The instant a snapshot of that day stands for: its last second, UTC."""
    return datetime.combine(day, clock_time(23, 59, 59), tzinfo=UTC)


def fingerprint_of(tables: Mapping[str, pd.DataFrame], day: date) -> str:
    """Sha256 of what the tables hold, whatever order or file they came in."""
    return _fingerprint({name: _to_arrow(TABLES[name], frame, day) for name, frame in tables.items()})


class Snapshots:
    """The snapshots below `root`. Constructing it touches nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = root.with_name(f"{root.name}.staging")
        self._lock_path = root.with_name(f"{root.name}.lock")
        self._depth = 0

    # --- reading ----------------------------------------------------------------------------------------

    def days(self) -> list[date]:
        """Days of which there is a snapshot, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(day for path in self.root.iterdir() if (day := as_day(path.name)) and path.is_dir())

    def newest(self, as_of: datetime) -> date | None:
        """The newest snapshot that already stands at `as_of`, or None."""
        return max((day for day in self.days() if instant(day) <= as_of), default=None)

    def tables(self, day: date) -> list[str]:
        """Names of the tables that a day has, in the order of feature_repo.columns."""
        return [name for name in TABLES if self._file(day, name).is_file()]

    def has_labels(self, day: date) -> bool:
        """Whether the labels of that day have arrived."""
        return self._file(day, LABELS).is_file()

    def read(self, table: str, day: date) -> pd.DataFrame:
        """One table of a day by `user_id`, sorted; nullable dtypes, and datetime64 for dates."""
        import pandas as pd
        import pyarrow as pa

        dtypes = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype(), pa.string(): pd.StringDtype()}
        frame: pd.DataFrame = (
            self._arrow(day, table).drop_columns([TIMESTAMP]).to_pandas(types_mapper=dtypes.get, date_as_object=False)
        )
        for column in TABLES[table].columns:
            if column.kind == "date":
                frame[column.name] = frame[column.name].astype("datetime64[s]")
        return frame.astype({ENTITY: object}).set_index(ENTITY)

    def report(self, day: date) -> dict[str, Any]:
        """What was recorded when the day was ingested: rows, fingerprint, warnings, ingested_at, source."""
        try:
            record: dict[str, Any] = json.loads((self._folder(day) / RECORD).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return record

    def fingerprint(self, day: date) -> str:
        """Sha256 of what the day's tables hold; another Parquet writer or compression does not change it."""
        names = self.tables(day)
        if not names:
            raise FileNotFoundError(self._no_snapshot(day))
        return _fingerprint({name: self._arrow(day, name) for name in names})

    def check(self, day: date) -> None:
        """Raise SnapshotDamaged if the day's tables do not hold what was ingested."""
        recorded = self.report(day).get("fingerprint")
        if recorded is not None and recorded != (found := self.fingerprint(day)):
            raise SnapshotDamaged(
                f"snapshot {day} is not what was ingested: its fingerprint is {found[:12]}…, recorded was "
                f"{str(recorded)[:12]}…; `churn ingest DIR --as-of {day}` puts it back"
            )

    def holds(self, day: date, tables: Mapping[str, pd.DataFrame]) -> bool:
        """Whether the day has these tables with exactly this content; it may have others beside them."""
        return self._holds(day, {name: _to_arrow(TABLES[name], frame, day) for name, frame in tables.items()})

    def glob(self, table: str) -> str:
        """The pattern of a table's files over all days, as DuckDB and Feast read it."""
        return f"{self.root}/*/{table}.parquet"

    # --- changing ---------------------------------------------------------------------------------------

    def write(self, day: date, tables: Mapping[str, pd.DataFrame], report: Mapping[str, Any]) -> Written:
        """Make `tables` the snapshot of that day, all of them or, killed half-way, none.

        Frames have `user_id` as index or column. `report` is kept in snapshot.json, with the rows and
        the fingerprint. Content that is there already is not written again, nor is its record.
        """
        arrow = {name: _to_arrow(TABLES[name], frame, day) for name, frame in tables.items()}
        fingerprint = _fingerprint(arrow)
        with self.lock():
            existed = self._folder(day).is_dir()
            if existed and set(self.tables(day)) == set(arrow) and self._holds(day, arrow):
                return "unchanged"
            rows = {name: table.num_rows for name, table in arrow.items()}
            self._stage(day, arrow, {"rows": rows, "fingerprint": fingerprint, **report})
            self._swap(day)
            self._tidy()
        return "replaced" if existed else "written"

    def recover(self) -> None:
        """Finish or undo what a killed process left; nothing to do costs one look at the disk."""
        if self._depth == 0 and self._staging.exists():
            with self.lock():
                pass  # taking the lock recovers

    @contextmanager
    def lock(self, wait: float = 60.0) -> Iterator[None]:
        """Keep others from changing the store; StoreLocked names the holder after `wait` seconds."""
        if self._depth:
            yield
            return
        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock_path.open("a+", encoding="utf-8") as handle:
            self._acquire(handle, wait)
            self._depth += 1
            try:
                handle.truncate(0)
                handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
                handle.flush()
                self._finish_pending()
                yield
            finally:
                self._depth -= 1
                handle.truncate(0)  # the lock itself goes with the handle, also when we are killed

    # --- how it is done ---------------------------------------------------------------------------------

    def _folder(self, day: date) -> Path:
        return self.root / day.isoformat()

    def _file(self, day: date, table: str) -> Path:
        return self._folder(day) / f"{table}.parquet"

    def _staged(self, day: date, state: Literal["partial", "complete", "replaced", "trash"]) -> Path:
        return self._staging / f"{day.isoformat()}.{state}"

    def _no_snapshot(self, day: date) -> str:
        days = self.days()
        there = f"there are {len(days)}, the newest of {days[-1]}" if days else "there is none"
        return f"no snapshot of {day} in {self.root}; {there}"

    def _arrow(self, day: date, table: str) -> pa.Table:
        import pyarrow.parquet as pq

        if not self._folder(day).is_dir():
            raise FileNotFoundError(self._no_snapshot(day))
        path = self._file(day, table)
        if not path.is_file():
            raise FileNotFoundError(f"snapshot {day} has no {table}; it has {', '.join(self.tables(day))}")
        return pq.ParquetFile(path).read()

    def _holds(self, day: date, tables: Mapping[str, pa.Table]) -> bool:
        import pyarrow as pa

        if not set(tables) <= set(self.tables(day)):
            return False
        try:
            return all(self._arrow(day, name).equals(table) for name, table in tables.items())
        except (OSError, pa.ArrowException) as error:  # damaged: what arrives now replaces it
            log.warning("snapshot %s cannot be read and is written anew: %s", day, error)
            return False

    @staticmethod
    def _acquire(handle: IO[str], wait: float) -> None:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    handle.seek(0)
                    holder = handle.read() or "another process"
                    raise StoreLocked(
                        f"{handle.name} is held by {holder}, still after {wait:g} s; try again later"
                    ) from None
                time.sleep(0.05)

    def _stage(self, day: date, tables: Mapping[str, pa.Table], record: Mapping[str, Any]) -> None:
        import pyarrow.parquet as pq

        partial = self._staged(day, "partial")
        partial.mkdir(parents=True)
        for name, table in tables.items():
            pq.write_table(table, partial / f"{name}.parquet")
        (partial / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True, default=str) + "\n", "utf-8")
        for path in sorted(partial.iterdir()):
            _sync(path)
        _sync(partial)
        partial.rename(self._staged(day, "complete"))
        _sync(self._staging)

    def _swap(self, day: date) -> None:
        """Bring the complete folder in; each step may be the last, `_finish_pending` goes on from there."""
        folder, replaced, trash = self._folder(day), self._staged(day, "replaced"), self._staged(day, "trash")
        self.root.mkdir(exist_ok=True)
        if folder.exists():
            folder.rename(replaced)
        self._staged(day, "complete").rename(folder)
        _sync(self.root)
        _sync(self._staging)
        if replaced.exists():
            replaced.rename(trash)  # half-deleted, it must not look like something to put back
            shutil.rmtree(trash)

    def _finish_pending(self) -> None:
        if not self._staging.is_dir():
            return
        for path in sorted(self._staging.iterdir()):
            if path.suffix in {".partial", ".trash"}:
                shutil.rmtree(path)
        for day in sorted({day for path in self._staging.iterdir() if (day := as_day(path.stem))}):
            if self._staged(day, "complete").exists():
                log.warning("finishing the interrupted write of snapshot %s", day)
                self._swap(day)
            elif self._folder(day).exists():
                shutil.rmtree(self._staged(day, "replaced"))
            else:
                self._staged(day, "replaced").rename(self._folder(day))
        self._tidy()

    def _tidy(self) -> None:
        if self._staging.is_dir() and not any(self._staging.iterdir()):
            self._staging.rmdir()


def as_day(text: str) -> date | None:
    """The day that a folder named YYYY-MM-DD stands for; None for any other name."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        return None
    return day if day.isoformat() == text else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _arrow_type(column: Column) -> Any:
    import pyarrow as pa

    return {
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "category": pa.string(),
        "date": pa.date32(),
    }[column.kind]


def _to_arrow(table: Table, frame: pd.DataFrame, day: date) -> pa.Table:
    """The frame in the one schema that all days of this table share, sorted by user."""
    import pyarrow as pa

    if ENTITY in frame.columns:
        frame = frame.set_index(ENTITY)
    frame = frame.sort_index()
    names = [column.name for column in table.columns]
    if set(frame.columns) != set(names):
        raise ValueError(f"{table.name} has columns {sorted(frame.columns)}; expected {sorted(names)}")
    arrays = {ENTITY: pa.array(frame.index.astype(str), type=pa.string())}
    for column in table.columns:
        values = pa.Array.from_pandas(frame[column.name])
        arrays[column.name] = values.cast(_arrow_type(column))
    moment = pa.scalar(instant(day), type=pa.timestamp("us", tz="UTC"))
    arrays[TIMESTAMP] = pa.repeat(moment, len(frame))
    fields = [pa.field(name, array.type, nullable=True) for name, array in arrays.items()]
    return pa.Table.from_arrays(list(arrays.values()), schema=pa.schema(fields))


def _fingerprint(tables: Mapping[str, pa.Table]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tables):
        table = tables[name]
        digest.update(f"\n{name} {table.num_rows}".encode())
        for column in table.column_names:
            values = table.column(column).combine_chunks()
            digest.update(f"\n{column} {values.type} ".encode())
            for part in _canonical(values):
                digest.update(part)
    return digest.hexdigest()


def _canonical(values: Any) -> Iterator[bytes]:
    """Bytes that depend on the values alone: which are null, then the others."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    yield np.packbits(pc.is_null(values).to_numpy(zero_copy_only=False)).tobytes()
    kept = pc.drop_null(values)
    if pa.types.is_string(kept.type):
        kept = kept.cast(pa.large_binary())
        yield pc.binary_length(kept).to_numpy(zero_copy_only=False).tobytes()
        yield b"".join(kept.to_pylist())
    elif pa.types.is_floating(kept.type):
        yield kept.to_numpy(zero_copy_only=False).tobytes()
    elif pa.types.is_date(kept.type):
        yield kept.cast(pa.int32()).to_numpy(zero_copy_only=False).tobytes()
    else:  # int, bool, timestamp
        yield kept.cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes()
