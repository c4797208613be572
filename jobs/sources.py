"""Where new snapshots arrive: a folder, or a URL that is copied to a folder below `home` first.

    /data/incoming, incoming          the folder itself
    https://…/months.zip (.tar.gz)    an archive; asked for with the ETag and date of the last one
    s3://bucket/prefix, gs://, file:/// a tree of files, of which those with another size or time are copied

Each has one folder per day at its top (2024-02-29/users.csv). The copy is replaced when the new one is whole, so that
after an error it is as it was. An object store cannot rename a folder: a day that is not complete there is refused
for its missing files, and taken when they have come.

Tested: http and S3's protocol against servers on this machine, the tree also on the local file system; not gs.
Credentials come from the environment, as the AWS and Google libraries read it, and never from the URL.
"""

from __future__ import annotations

import fcntl
import filecmp
import gzip
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import stat
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from jobs.snapshots import as_day

log = logging.getLogger(__name__)

MAX_BYTES = 8 * 1024**3  # of a copy, unpacked
MAX_FILES = 10_000
CALL_SECONDS = 60.0  # for one answer
TOTAL_SECONDS = 3_600.0  # for a copy
CHUNK = 4 * 1024**2

_ABOUT = ".source.json"  # in the copy: what the http server said of it

T = TypeVar("T")


class SourceError(RuntimeError):
    """The source cannot be copied; names it without its query, which may hold a signature."""


@contextmanager
def arrived(source: str, home: Path) -> Iterator[Path]:
    """The folder with what arrived at `source`; a copy is brought up to date, and stays as it is until the end."""
    if "://" not in source:
        yield Path(source)
        return
    cache = home / "incoming-cache"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("a") as handle:  # the lock goes with the handle, also when we are killed
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceError(f"{_shown(source)} is being copied by another job; try again later") from None
        copy = cache / hashlib.sha256(source.encode()).hexdigest()[:16]
        for other in cache.iterdir():  # of another source, or of a process that was killed
            if other.is_dir() and other != copy:
                shutil.rmtree(other)
        try:
            _bring(source, copy)
        except Exception as error:  # the libraries between us and the source have dozens
            said = re.sub(r"\?\S+", "?…", " ".join(str(error or repr(error)).split()))
            raise SourceError(f"{_shown(source)}: {said}") from None
        yield copy


def receive(archive: IO[bytes], folder: Path) -> list[str]:
    """Unpack a .tar.gz of day folders into the folder where snapshots arrive; the days, each whole or not at all.

    How files get from somebody's machine onto the cluster's volume. A day that is there already is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".receiving-", dir=folder) as scratch:
        new = _Copy(Path(scratch) / "new", folder)
        try:
            _untar(archive, new)
        except (OSError, EOFError, tarfile.TarError) as error:
            raise SourceError(f"what was sent is no whole .tar.gz: {error}") from None
        days = sorted(path.name for path in new.folder.iterdir())
        if not days:
            found = ", ".join(sorted(new.skipped)[:5]) or "nothing"
            raise SourceError(f"expected folders named YYYY-MM-DD at the top of what was sent, found {found}")
        for day in days:
            if (folder / day).exists():
                (folder / day).rename(Path(scratch) / day)
            (new.folder / day).rename(folder / day)
    return days


def _bring(source: str, copy: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=copy.parent) as scratch:
        new = _Copy(Path(scratch) / "new", copy)
        if source.startswith("http"):
            if not _download(source, new, Path(scratch) / "archive"):
                return
        else:
            _copy_tree(source, new)
        if new.skipped and not any(new.folder.glob("[0-9]*")):
            raise SourceError(
                f"expected folders named YYYY-MM-DD at its top, found {', '.join(sorted(new.skipped)[:5])}"
            )
        for name in sorted(new.skipped):
            log.warning("%s in %s is skipped: expected folders named YYYY-MM-DD", name, _shown(source))
        if copy.exists():
            copy.rename(Path(scratch) / "old")
        new.folder.rename(copy)
        log.info("source=%s files=%d bytes=%d fetched=%d", _shown(source), new.files, new.size, new.fetched)


class _Copy:
    """A copy that is being made, within the limits; `old` is the one before."""

    def __init__(self, folder: Path, old: Path) -> None:
        self.folder, self.old = folder, old
        self.skipped: set[str] = set()
        self.files = self.size = self.fetched = 0
        self._end = time.monotonic() + TOTAL_SECONDS
        folder.mkdir()

    def place(self, name: str) -> Path | None:
        """Where the file of this name goes, None if it is no file of a day; raises for one that would go elsewhere."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise SourceError(f"{name!r} would be written outside the folder")
        if len(path.parts) != 2 or as_day(path.parts[0]) is None:
            if path.parts and not path.parts[0].startswith((".", "__MACOSX")) and as_day(path.parts[0]) is None:
                self.skipped.add(path.parts[0])
            return None
        if path.parts[1].startswith("."):
            return None
        (self.folder / path.parts[0]).mkdir(exist_ok=True)
        return self.folder / path

    def count(self, size: int) -> None:
        """Raise if a file of this size makes the copy too large."""
        self.files += 1
        self.size += size
        if self.files > MAX_FILES or self.size > MAX_BYTES:
            raise SourceError(f"it has more than {MAX_FILES:,} files or {MAX_BYTES:,} bytes")

    def write(self, read: Callable[[int], bytes], path: Path, size: int | None) -> None:
        """All that `read` gives, which is `size` bytes."""
        got = 0
        with path.open("xb") as file:
            while chunk := read(CHUNK):
                got += file.write(chunk)
                if got > (MAX_BYTES if size is None else size):
                    raise SourceError(f"{path.name} has more than {MAX_BYTES if size is None else size:,} bytes")
                if time.monotonic() > self._end:
                    raise SourceError(f"it is not copied after {TOTAL_SECONDS:g} s")
        if size is not None and got != size:
            raise SourceError(f"{path.name} ends after {got:,} of {size:,} bytes")

    def before(self, path: Path) -> Path:
        """The file of the same name in the copy before, which need not exist."""
        return self.old / path.relative_to(self.folder)


# --- archives by http ---------------------------------------------------------------------------------------


def _download(source: str, new: _Copy, archive: Path) -> bool:
    """Fetch and unpack it; False if it is the one we have."""
    headers = {"User-Agent": "churn", "Accept-Encoding": "identity"}
    with suppress(OSError, ValueError):
        headers |= json.loads((new.old / _ABOUT).read_text())
    try:
        request = urllib.request.Request(source, headers=headers)
        with _within(lambda: urllib.request.urlopen(request, timeout=CALL_SECONDS)) as answer:
            length = answer.headers.get("Content-Length")
            size = int(length) if length else None
            if (size or 0) > MAX_BYTES:
                raise SourceError(f"it has {size:,} bytes; at most {MAX_BYTES:,}")
            new.write(answer.read1, archive, size)  # read would wait for the whole chunk
            said = {
                "If-None-Match": answer.headers.get("ETag"),
                "If-Modified-Since": answer.headers.get("Last-Modified"),
            }
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.NOT_MODIFIED:
            return False
        raise
    (_unzip if urlsplit(source).path.endswith(".zip") else _untar)(archive, new)
    (new.folder / _ABOUT).write_text(json.dumps({name: value for name, value in said.items() if value}))
    return True


def _unzip(archive: Path, new: _Copy) -> None:
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise SourceError(f"{member.filename!r} is neither a file nor a folder")
            if not member.is_dir():
                new.count(member.file_size)
                with packed.open(member) as file:
                    _unpack(new, member.filename, file, member.file_size)


def _untar(archive: Path | IO[bytes], new: _Copy) -> None:
    with gzip.open(archive) as packed:
        limited = _Limited(packed)
        with tarfile.open(fileobj=limited, mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise SourceError(f"{member.name!r} is neither a file nor a folder")
                if member.isreg():
                    new.count(member.size)
                    file = tar.extractfile(member)
                    assert file is not None  # noqa: S101  it is a regular file
                    _unpack(new, member.name.removeprefix("./"), file, member.size)
        while limited.read(CHUNK):  # to the checksum at its end
            pass


class _Limited:
    """A compressed file that ends with an error when it makes more than the limit; what tar skips counts, too."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, MAX_BYTES + MAX_FILES * 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise SourceError(f"it has more than {MAX_BYTES:,} bytes")
        return data


def _unpack(new: _Copy, name: str, file: IO[bytes], size: int) -> None:
    path = new.place(name)
    if path is None:
        return
    new.write(file.read, path, size)
    before = new.before(path)
    if before.is_file() and filecmp.cmp(before, path, shallow=False):  # an archive's times are anything
        os.utime(path, ns=(before.stat().st_atime_ns, before.stat().st_mtime_ns))
    else:
        new.fetched += 1


# --- trees of files ---------------------------------------------------------------------------------------


def _copy_tree(source: str, new: _Copy) -> None:
    from pyarrow import fs

    store, root = _within(lambda: fs.FileSystem.from_uri(source))
    found = _within(lambda: store.get_file_info(fs.FileSelector(root, recursive=True)))
    prefix = f"{root.rstrip('/')}/"
    for info in sorted(found, key=lambda info: str(info.path)):
        path = new.place(info.path.removeprefix(prefix)) if info.type == fs.FileType.File else None
        if path is None:
            continue
        new.count(info.size)
        before = new.before(path)
        if before.is_file() and (before.stat().st_size, before.stat().st_mtime_ns) == (info.size, info.mtime_ns):
            _link(before, path)
            continue
        with _within(lambda info=info: store.open_input_stream(info.path)) as file:  # type: ignore[misc]
            new.write(lambda size, file=file: _within(lambda: file.read(size)), path, info.size)  # type: ignore[misc]
        new.fetched += 1
        if info.mtime_ns is not None:
            os.utime(path, ns=(info.mtime_ns, info.mtime_ns))


def _link(before: Path, path: Path) -> None:
    try:
        path.hardlink_to(before)
    except OSError:  # not every volume has them
        shutil.copy2(before, path)


def _within(call: Callable[[], T]) -> T:
    """What the call returns; TimeoutError if that takes too long, for the libraries' own limits are up to minutes."""
    result: list[T] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(CALL_SECONDS)
    if raised:
        raise raised[0]
    if not result:
        raise TimeoutError(f"no answer within {CALL_SECONDS:g} s")
    return result[0]


def _shown(source: str) -> str:
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
