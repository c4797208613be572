"""Archives out of the database: the one that was stored, extracted whole, or not at all."""

from __future__ import annotations

import hashlib
import io
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from bentos.churn import archive, packaging
from bentos.churn.archive import ArchiveError, BentoNotFound
from jobs.database import bentos, connect


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tar_of(*extra: tuple[tarfile.TarInfo, bytes], without: str = "") -> bytes:
    """A tar with every required file, and more."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in archive.REQUIRED:
            if name != without:
                member = tarfile.TarInfo(name)
                member.size = 2
                tar.addfile(member, io.BytesIO(b"{}"))
        for member, content in extra:
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def long_name(size: int) -> bytes:
    """A header that says the next one's name is so long."""
    info = member("x", tarfile.GNUTYPE_LONGNAME, size=size)
    return info.tobuf(tarfile.GNU_FORMAT) + (b"a" * size).ljust(-(-size // 512) * 512, b"\0")


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_an_archive_is_extracted_once(built: packaging.Built, tmp_path: Path) -> None:
    folder = archive.extract(built.archive, built.sha256, tmp_path / "a" / "bento")
    (folder / "note").write_text("still here")

    again = archive.extract(b"not even looked at", built.sha256, tmp_path / "a" / "bento")

    assert again == folder
    assert (again / "note").is_file()
    assert everything(tmp_path / "a").isdisjoint({".bento"})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["bento"]


def test_a_file_is_taken_as_well_as_bytes(built: packaging.Built, tmp_path: Path) -> None:
    (tmp_path / "one.bento").write_bytes(built.archive)

    assert (archive.extract(tmp_path / "one.bento", built.sha256, tmp_path / "bento") / "bento.yaml").is_file()


def test_an_incomplete_folder_is_replaced(built: packaging.Built, tmp_path: Path) -> None:
    (tmp_path / "bento" / "src").mkdir(parents=True)
    (tmp_path / "bento" / "leftover").touch()

    folder = archive.extract(built.archive, built.sha256, tmp_path / "bento")

    assert not (folder / "leftover").exists()
    assert (folder / "src" / "model" / "model.onnx").is_file()


def test_any_flipped_byte_is_refused(built: packaging.Built, tmp_path: Path) -> None:
    for at in range(0, len(built.archive), max(1, len(built.archive) // 50)):
        data = bytearray(built.archive)
        data[at] ^= 0x40
        with pytest.raises(ArchiveError, match="sha256"):
            archive.extract(bytes(data), built.sha256, tmp_path / "bento")

    assert everything(tmp_path) == set()


ABSOLUTE = "/tmp/churn-outside"  # noqa: S108

EVIL: dict[str, Callable[[], bytes]] = {
    "symlink": lambda: tar_of((member("src/link", tarfile.SYMTYPE, "/etc"), b"")),
    "hardlink": lambda: tar_of((member("src/link", tarfile.LNKTYPE, "bento.yaml"), b"")),
    "device": lambda: tar_of((member("src/null", tarfile.CHRTYPE), b"")),
    "fifo": lambda: tar_of((member("src/pipe", tarfile.FIFOTYPE), b"")),
    "parent": lambda: tar_of((member("../outside"), b"")),
    "parent-inside": lambda: tar_of((member("src/../../outside"), b"")),
    "absolute": lambda: tar_of((member(ABSOLUTE), b"")),
    "too-many": lambda: tar_of(*((member(f"src/{i}"), b"") for i in range(archive.MAX_MEMBERS))),
    "not-a-tar": lambda: b"PK\x03\x04" + b"x" * 5_000,
    "empty": lambda: b"",
    "cut": lambda: tar_of((member("src/big", size=50_000), bytes(50_000)))[:20_000],
    "long-header": lambda: long_name(2**20) + tar_of(),
    "many-headers": lambda: long_name(2) * 5_000 + tar_of(),
    "cut-xz": lambda: lzma.compress(tar_of())[:-20],
    "damaged-xz": lambda: lzma.compress(tar_of())[:40] + b"\0" * 40,
    **{f"no-{name}": lambda name=name: tar_of(without=name) for name in archive.REQUIRED},  # type: ignore[misc]
}


@pytest.mark.parametrize("evil", EVIL)
def test_archives_that_are_not_ours_are_refused(evil: str, tmp_path: Path) -> None:
    """Even when someone has put them into the database with their checksum."""
    data = EVIL[evil]()

    with pytest.raises(ArchiveError):
        archive.extract(data, sha256(data), tmp_path / "inner" / "bento")

    assert everything(tmp_path) <= {"inner"}
    assert not Path(ABSOLUTE).exists()


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    data = long_name(2**20) + tar_of()

    with pytest.raises(ArchiveError, match="a header of 1,048,576 bytes"):
        archive.extract(data, sha256(data), tmp_path / "inner" / "bento")


def test_a_bomb_is_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 10_000_000)
    packed = lzma.compress(bytes(50_000_000))
    declared = member("src/big", size=10**9).tobuf() + tar_of()

    for data in (packed, declared):
        with pytest.raises(ArchiveError, match="more than"):
            archive.extract(data, sha256(data), tmp_path / "inner" / "bento")
    assert everything(tmp_path) <= {"inner"}


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """150 KB of xz that would be a gigabyte: what reads it has a pod's memory."""
    bomb = tmp_path / "bomb"
    compressor = lzma.LZMACompressor()
    with bomb.open("wb") as file:
        for _ in range(archive.MAX_BYTES // 2**24 + 1):
            file.write(compressor.compress(bytes(2**24)))
        file.write(compressor.flush())
    code = f"""
from pathlib import Path
from bentos.churn import archive
try:
    archive.extract(Path({str(bomb)!r}), {sha256(bomb.read_bytes())!r}, Path({str(tmp_path / "bento")!r}))
except archive.ArchiveError as error:
    print(error, Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)

    said, peak = done.stdout.split("|")
    assert "the archive has more than 1,073,741,824 bytes" in said
    assert int(peak) < 100_000, "KB"


def test_ten_gigabytes_are_refused_by_their_header(tmp_path: Path) -> None:
    """With the limits as they are, and nothing written."""
    data = member("src/big", size=10 * 2**30).tobuf() + tar_of()

    with pytest.raises(ArchiveError, match="more than 2,000 members or 1,073,741,824 bytes"):
        archive.extract(data, sha256(data), tmp_path / "inner" / "bento")
    assert everything(tmp_path) <= {"inner"}


def store(url: str, built: packaging.Built, **changes: object) -> sa.Engine:
    engine = connect(url)
    row = {"tag": built.tag, "model_version": 1, "run_id": "run-1", "sha256": built.sha256,
           "archive": built.archive, "built_at": datetime(2024, 3, 1, tzinfo=UTC)}  # fmt: skip
    with engine.begin() as connection:
        connection.execute(bentos.insert().values(**{**row, **changes}))
    return engine


def test_fetch_takes_a_bento_out_of_the_database(built: packaging.Built, database: str, tmp_path: Path) -> None:
    store(database, built)

    folder = archive.fetch(database, built.tag, tmp_path / "bentos" / "one")

    assert archive.is_complete(folder, built.sha256)


def test_fetch_names_the_tag_it_does_not_find(database: str, tmp_path: Path) -> None:
    with pytest.raises(BentoNotFound, match="churn:v9-00000000"):
        archive.fetch(database, "churn:v9-00000000", tmp_path / "one")


def test_fetch_refuses_a_damaged_row(built: packaging.Built, database: str, tmp_path: Path) -> None:
    store(database, built, archive=built.archive[:-7])

    with pytest.raises(ArchiveError, match="sha256"):
        archive.fetch(database, built.tag, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_another_archive_of_the_same_tag_is_not_taken_for_the_old_one(
    built: packaging.Built, database: str, tmp_path: Path
) -> None:
    """Archives of one tag differ in their bytes: what was extracted is known by its checksum."""
    archive.extract(built.archive, built.sha256, tmp_path / "one")
    other = tar_of()
    store(database, built, archive=other, sha256=sha256(other))

    folder = archive.fetch(database, built.tag, tmp_path / "one")

    assert archive.is_complete(folder, sha256(other))
