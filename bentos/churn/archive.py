"""Take a bento's archive out of the database and extract it, believing nothing it says about itself.

The checksum recorded when the bento was stored is checked before a byte is read as tar. Links, devices,
names that leave the folder and archives beyond the limits are refused; what was extracted gets its name
only when it is complete, so that a folder of that name can be served.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from bentos.churn.database import cut_after, is_sqlite, open_postgres, open_sqlite, sqlite_path

MAX_MEMBERS = 2_000
MAX_BYTES = 2**30
MAX_HEADER = 2**16
READ_SECONDS = 60.0  # for one answer of the database
REQUIRED = (
    "bento.yaml",
    "src/bentos/churn/service.py",
    "src/model/model.onnx",
    "src/model/model.json",
    "src/model/golden.json",
)

_XZ = b"\xfd7zXZ\x00"
_MARK = ".sha256"  # written last: the folder is complete, and this is what it was made from


class ArchiveError(ValueError):
    """The archive is not the one that was stored, or not one of ours."""


class BentoNotFound(LookupError):
    """The database has no bento of this tag."""


def extract(archive: bytes | Path, sha256: str, dest: Path) -> Path:
    """`dest`, holding the extracted bento. One that is there already and complete is used again."""
    if is_complete(dest, sha256):
        return dest
    data = archive if isinstance(archive, bytes) else archive.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ArchiveError(f"the archive has sha256 {found}, expected {sha256}")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}-", dir=dest.parent) as scratch:
        fresh = Path(scratch) / "bento"
        fresh.mkdir()
        _unpack(data, fresh)
        (fresh / _MARK).write_text(sha256)
        if dest.exists() and not is_complete(dest, sha256):
            dest.rename(Path(scratch) / "old")
        try:
            fresh.rename(dest)
        except OSError:  # somebody else was faster
            if not is_complete(dest, sha256):
                raise
    return dest


def is_complete(folder: Path, sha256: str) -> bool:
    """Whether `folder` was extracted, to the end, from the archive with this checksum."""
    with contextlib.suppress(OSError):
        return (folder / _MARK).read_text() == sha256 and all((folder / name).is_file() for name in REQUIRED)
    return False


def _unpack(data: bytes, folder: Path) -> None:
    try:
        source: Any = _Decompressed(data) if data.startswith(_XZ) else io.BytesIO(data)
        with tarfile.open(fileobj=source, mode="r|", tarinfo=_Member) as tar:
            size = 0
            for count, member in enumerate(tar, 1):
                _check(member)
                size += member.size
                if count > MAX_MEMBERS or size > MAX_BYTES:
                    raise ArchiveError(f"the archive has more than {MAX_MEMBERS:,} members or {MAX_BYTES:,} bytes")
                _write(tar, member, folder)
        while source.read(tarfile.RECORDSIZE):  # what follows the last member counts, too
            pass
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno:  # a full disk does not make it a bad archive
            raise
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"the archive cannot be read: {error}") from None
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise ArchiveError(f"the archive has no {', '.join(missing)}")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """A folder or a file with its bytes, and nothing else a tar could ask for: no owner, no mode, no time.

    tarfile's own filter "data" is not in Python 3.11 before 3.11.4, which Debian 12 has.
    """
    path = folder / member.name
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None  # noqa: S101  a regular file has content
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)


class _Member(tarfile.TarInfo):
    """A header that is not longer than a name needs: tarfile reads long ones whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if not (self.isreg() or self.isdir()) and self.size > MAX_HEADER:
            raise ArchiveError(f"the archive has a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


class _Decompressed:
    """The tar in a `.bento`, which is compressed by xz, read in pieces; never more than the limit is made of it."""

    def __init__(self, data: bytes) -> None:
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**27)
        self._data = data
        self._made = 0

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end."""
        piece = b""
        while not piece and not self._decompressor.eof:
            if self._decompressor.needs_input and not self._data:
                raise ArchiveError("the archive ends too early")
            piece = self._decompressor.decompress(self._data, max_length=size)
            self._data = b""
        self._made += len(piece)
        if self._made > MAX_BYTES:
            raise ArchiveError(f"the archive has more than {MAX_BYTES:,} bytes")
        return piece


def _check(member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise ArchiveError(f"{member.name!r} would be written outside the folder")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ArchiveError(f"{member.name!r} is neither a file nor a folder")


def fetch(database_url: str, tag: str, dest: Path) -> Path:
    """`dest`, holding the bento of this tag out of table `bentos`; raises BentoNotFound or ArchiveError."""
    read = _read_sqlite if is_sqlite(database_url) else _read_postgres
    row = read(database_url, "SELECT sha256 FROM bentos WHERE tag = ?", tag)
    if row is None:
        raise BentoNotFound(f"the database has no bento {tag!r}")
    sha256 = str(row[0])
    if is_complete(dest, sha256):
        return dest
    row = read(database_url, "SELECT archive FROM bentos WHERE tag = ?", tag)
    if row is None:
        raise BentoNotFound(f"bento {tag!r} was deleted from the database while it was being fetched")
    return extract(bytes(row[0]), sha256, dest)


def _read_sqlite(url: str, query: str, tag: str) -> tuple[Any, ...] | None:
    with contextlib.closing(open_sqlite(sqlite_path(url), mode="rw", timeout=10)) as connection:
        return connection.execute(query, (tag,)).fetchone()  # type: ignore[no-any-return]


def _read_postgres(url: str, query: str, tag: str) -> tuple[Any, ...] | None:
    with open_postgres(url) as connection, cut_after(connection, READ_SECONDS):
        return connection.execute(query.replace("?", "%s"), (tag,)).fetchone()  # type: ignore[no-any-return]
