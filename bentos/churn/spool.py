"""Predictions on disk until the database has them.

Each worker process has a folder of its own under the spool, which it holds locked while it lives; a folder
that can be locked belonged to a process that died, and whoever finds it ships what is in it. A request's
records are one write to the current segment file, before its answer is sent: what the page cache has,
survives the death of the process. Segments are deleted when the database has all their records, so a
crash in between ships some twice, and the primary key of the table drops the second.

A record is a mark, length, checksum and a JSON object, the row of the table. The mark cannot occur in JSON, so that
reading finds the next record behind a damaged one; what is damaged goes to the folder `quarantine`, never silently
away.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import threading
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

SEGMENT_BYTES = 4 * 2**20  # a new segment after this: bounds what is read at once

_MARK = b"\xff\xfePR"
_HEADER = struct.Struct("<4sII")  # mark, length, crc32 of length and payload
_QUARANTINE = "quarantine"


class SpoolFull(RuntimeError):
    """The predictions that wait for the database take all the room they may."""


class SpoolDown(RuntimeError):
    """The spool cannot be written."""


def frame(record: bytes) -> bytes:
    """One record, a JSON object, as it lies in a segment."""
    return _HEADER.pack(_MARK, len(record), _crc(record)) + record


def _crc(payload: bytes) -> int:
    return zlib.crc32(payload, len(payload))


def read_records(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """The whole records in a segment's bytes, in order, and the damaged stretches between or behind them."""
    records: list[bytes] = []
    damaged: list[bytes] = []
    at = bad_from = 0
    while at < len(data):
        record = _record_at(data, at)
        if record is None:
            end = data.find(_MARK, at + 1)
            at = len(data) if end < 0 else end
            continue
        if bad_from < at:
            damaged.append(data[bad_from:at])
        records.append(record)
        at = bad_from = at + _HEADER.size + len(record)
    if bad_from < len(data):
        damaged.append(data[bad_from:])
    return records, damaged


def _record_at(data: bytes, at: int) -> bytes | None:
    begin = at + _HEADER.size
    if len(data) < begin:
        return None
    mark, length, crc = _HEADER.unpack_from(data, at)
    record = data[begin : begin + length]
    return record if mark == _MARK and len(record) == length and _crc(record) == crc else None


class Spool:
    """This process's part of the spool: `append` from the event loop, everything else from the shipper."""

    def __init__(self, root: Path, *, max_bytes: int, fsync: bool = False) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._fsync = fsync
        self._lock = threading.Lock()  # between append and seal
        self._fd = -1
        self._size = 0  # of the current segment
        self._next = 1
        self._own_bytes = 0
        self._other_bytes = 0  # what other processes left or hold, as of the last look
        self._closed = False
        self._adopted: dict[Path, int] = {}  # folder -> descriptor of its lock
        self.appended = 0  # records
        root.mkdir(parents=True, exist_ok=True)
        self.folder, self._folder_lock = _new_folder(root)
        self._current: Path | None = None  # the segment being written, named before it exists
        self.look_around()

    @property
    def backlog_bytes(self) -> int:
        """What waits for the database, of this process and of others that share the spool."""
        return self._own_bytes + self._other_bytes

    def append(self, records: Sequence[bytes]) -> None:
        """Write a request's records, JSON objects; they are safe from the death of this process when this returns."""
        data = b"".join([frame(record) for record in records])
        with self._lock:
            if self._closed:
                raise SpoolDown("the spool is closed")
            if self.backlog_bytes + len(data) > self._max_bytes:
                raise SpoolFull(f"{self.backlog_bytes:,} bytes of predictions wait for the database")
            try:
                self._write(data)
            except OSError as error:
                self._give_up_segment()
                raise SpoolDown(f"the spool cannot be written: {error.strerror}") from None
            self._size += len(data)
            self._own_bytes += len(data)
            self.appended += len(records)
            if self._size >= SEGMENT_BYTES:
                self._seal()

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            self._current = self.folder / f"{self._next:012}.seg"
            self._next += 1
            self._fd = os.open(self._current, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            self._size = 0
        if os.write(self._fd, data) != len(data):
            raise OSError(28, "no space left on device")
        if self._fsync:
            os.fsync(self._fd)

    def _give_up_segment(self) -> None:
        """Take back what a failed write left behind: it was not answered. The next write begins a new segment."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
        self._seal()

    def _seal(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        self._current = None

    def seal(self) -> None:
        """Close the current segment, so that it can be shipped."""
        with self._lock:
            self._seal()

    def stop(self) -> None:
        """No more appends: the last segment is closed."""
        with self._lock:
            self._seal()
            self._closed = True

    def segments(self) -> Iterator[Path]:
        """Closed segments, oldest first: those of the dead before our own."""
        for folder in [*self._adopted, self.folder]:
            for path in sorted(folder.glob("*.seg")):
                if path != self._current:
                    yield path

    def remove(self, segment: Path) -> None:
        """The database has all of this segment."""
        size = segment.stat().st_size
        segment.unlink()
        with self._lock:
            if segment.parent == self.folder:
                self._own_bytes -= size
            else:
                self._other_bytes -= size

    def look_around(self) -> None:
        """Adopt folders whose process died, drop those that are empty, and see how much all of it takes."""
        other = 0
        for folder in self.root.iterdir():
            if folder == self.folder or not folder.is_dir():
                continue
            with contextlib.suppress(FileNotFoundError):  # its owner has just gone, in good order
                if folder.name != _QUARANTINE and folder not in self._adopted:
                    lock = _try_lock(folder)
                    if lock is not None:
                        self._adopted[folder] = lock
                sizes = [path.stat().st_size for path in folder.iterdir()]
                other += sum(sizes)
                if folder in self._adopted:
                    _remove_if_empty(folder)
                    if not folder.exists():
                        os.close(self._adopted.pop(folder))
        self._other_bytes = other

    def quarantine(self, data: bytes, kind: str) -> None:
        """Keep what could not be shipped: `damaged` bytes, or the JSON of a record that was `refused`."""
        folder = self.root / _QUARANTINE
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{uuid.uuid4().hex}"
        temporary.write_bytes(data)
        name = hashlib.sha256(data).hexdigest()[:16]  # the same thing twice is one file
        temporary.rename(folder / f"{name}.{kind}")

    def close(self) -> None:
        """Let go of the folders; empty ones disappear."""
        self.stop()
        for folder, lock in {**self._adopted, self.folder: self._folder_lock}.items():
            _remove_if_empty(folder)
            os.close(lock)
        self._adopted.clear()


def _new_folder(root: Path) -> tuple[Path, int]:
    while True:
        folder = root / f"worker-{uuid.uuid4().hex[:16]}"
        folder.mkdir()
        (folder / "lock").touch()
        lock = _try_lock(folder)
        if lock is not None:  # else another process took the new folder for an orphan's
            return folder, lock


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.glob("*.seg")):
        shutil.rmtree(folder, ignore_errors=True)


def _try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None while its process lives."""
    path = folder / "lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
