"""Snapshots that arrive at a URL: copied whole and once, or refused with everything as it was."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from jobs import ingest as ingest_module
from jobs import sources
from jobs.ingest import ingest_source
from jobs.settings import Settings
from jobs.sources import SourceError, arrived, receive
from tests.jobs.test_ingest import FEBRUARY, JANUARY, NOW, USERS, state
from tests.jobs.test_ingest import simulate as simulated

Files = dict[str, bytes]
FILES: Files = {"2024-01-31/users.csv": b"january\n" * 50, "2024-02-29/users.csv": b"february\n", "2024-02-29/labels.csv": b"x"}  # fmt: skip


class Web:
    """A server that gives out `files`, and what was asked of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: Files = {}
        self.etags = True
        self.claims: int | None = None  # a Content-Length that is not true
        self.slow = 0.0
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """GET with ETag, and what pyarrow needs of S3's protocol: HEAD and ListObjectsV2."""

    web: Web

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if "list-type" in parse_qs(parts.query):
            self._list(unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True))
            return
        path = unquote(parts.path)
        data = self.web.files.get(path)
        self.web.asked.append(f"{self.command} {path}")
        time.sleep(self.web.slow)
        if data is None:
            self.send_error(404)
            return
        etag = f'"{hash(data)}"' if self.web.etags else None
        if etag and self.headers.get("If-None-Match") == etag:
            self.send_response(304)
            self.end_headers()
            return
        begin, end = 0, len(data) - 1
        if "Range" in self.headers:
            begin, end = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[begin : end + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(self.web.claims or len(part)))
        self.send_header("Last-Modified", formatdate(1_700_000_000, usegmt=True))
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        keys = [path.removeprefix(f"/{bucket}/") for path in self.web.files if path.startswith(f"/{bucket}/{prefix}")]
        rows = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.web.files[f'/{bucket}/{key}'])}</Size>"
            f"<LastModified>2024-03-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for key in sorted(keys)
        )
        body = (
            f"<?xml version='1.0'?><ListBucketResult><Name>{bucket}</Name><Prefix>{prefix}</Prefix>"
            f"<KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""


@pytest.fixture
def web() -> Iterator[Web]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Web(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("OneHandler", (Handler,), {"web": found})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


def zipped(files: Files, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as packed:
        for name, data in files.items():
            packed.writestr(zipfile.ZipInfo(name), data, kind)  # all of 1980
    return buffer.getvalue()


def tarred(files: Files, **changes: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            packed.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def contents(folder: Path) -> Files:
    """What the job would see of it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def bring(source: str, home: Path) -> Files:
    with arrived(source, home) as folder:
        return contents(folder)


def test_a_folder_is_used_where_it_is(tmp_path: Path) -> None:
    with arrived(str(tmp_path / "incoming"), tmp_path / "home") as folder:
        assert folder == tmp_path / "incoming"
    assert not (tmp_path / "home").exists()


# --- archives ---------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Files], bytes]] = {"months.zip": zipped, "months.tar.gz": tarred, "months.tgz": tarred}


@pytest.mark.parametrize("name", KINDS)
def test_an_archive_is_copied_once(name: str, web: Web, tmp_path: Path) -> None:
    web.files[f"/a/{name}"] = KINDS[name]({**FILES, "README.txt": b"about", "__MACOSX/x": b"", "2024-02-29/.x": b"",
                                           "2024-02-29/deep/x.csv": b""})  # fmt: skip
    source = f"{web.url}/a/{name}?signature=hunter2"

    assert bring(source, tmp_path) == FILES
    before = state(tmp_path)
    assert bring(source, tmp_path) == FILES

    assert state(tmp_path) == before
    assert len(web.asked) == 2


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_of_another_archive_only_what_differs_has_another_time(
    name: str, etags: bool, web: Web, tmp_path: Path
) -> None:
    """A correction of the same length in an archive whose times say nothing; the months that are as they were stay so."""
    web.etags = etags
    web.files[f"/{name}"] = KINDS[name](FILES)
    with arrived(f"{web.url}/{name}", tmp_path) as folder:
        before = state(folder)
    time.sleep(0.01)
    changed = {**FILES, "2024-02-29/labels.csv": b"y", "2024-03-31/users.csv": b"march"}
    del changed["2024-01-31/users.csv"]
    web.files[f"/{name}"] = KINDS[name](changed)

    with arrived(f"{web.url}/{name}", tmp_path) as folder:
        assert contents(folder) == changed
        after = state(folder)

    kept = str(folder / "2024-02-29/users.csv")
    assert after[kept] == before[kept]
    assert after[str(folder / "2024-02-29/labels.csv")][1] != before[str(folder / "2024-02-29/labels.csv")][1]


def zip_with_link() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        link = zipfile.ZipInfo("2024-01-31/users.csv")
        link.external_attr = 0o120777 << 16
        packed.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def damaged(data: bytes) -> bytes:
    return data[: len(data) // 3] + b"\x00\x01\x02" + data[len(data) // 3 + 3 :]


NOISE = {"2024-01-31/users.csv": random.Random(0).randbytes(3_000)}
BIG = {"2024-01-31/users.csv": bytes(3_000_000)}
WRONG: dict[str, tuple[str, bytes, str]] = {
    "zip-half": (".zip", zipped(FILES)[:-30], "not a zip file"),
    "zip-damaged": (".zip", damaged(zipped(NOISE, zipfile.ZIP_STORED)), "Bad CRC-32"),
    "zip-traversal": (".zip", zipped({**FILES, "2024-01-31/../../../x": b""}), "outside the folder"),
    "zip-absolute": (".zip", zipped({**FILES, "/tmp/x": b""}), "outside the folder"),  # noqa: S108
    "zip-backslash": (".zip", zipped({**FILES, "..\\..\\x": b""}), "outside the folder"),
    "zip-link": (".zip", zip_with_link(), "neither a file nor a folder"),
    "zip-bomb": (".zip", zipped(BIG), "more than"),
    "zip-bomb-elsewhere": (".zip", zipped({**FILES, "other/x": bytes(3_000_000)}), "more than"),
    "zip-liar": (".zip", zipped(BIG).replace((3_000_000).to_bytes(4, "little"), (9).to_bytes(4, "little")), "Bad CRC-32"),
    "zip-many": (".zip", zipped({f"2024-01-31/{i}.csv": b"" for i in range(30)}), "more than 20 files"),
    "zip-page": (".zip", b"<html>Sign in</html>", "not a zip file"),
    "zip-no-day": (".zip", zipped({f"months/{name}": data for name, data in FILES.items()}), "top, found months"),
    "tar-half": (".tar.gz", tarred(NOISE)[:-1_000], "ended before"),
    "tar-no-end": (".tar.gz", tarred(NOISE)[:-8], "ended before"),
    "tar-damaged": (".tar.gz", damaged(tarred(NOISE)), "CRC check failed|zlib error"),
    "tar-traversal": (".tar.gz", tarred({**FILES, "../x": b""}), "outside the folder"),
    "tar-absolute": (".tar.gz", tarred({**FILES, "/tmp/x": b""}), "outside the folder"),  # noqa: S108
    "tar-link": (".tar.gz", tarred({"2024-01-31/users.csv": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "neither"),
    "tar-device": (".tar.gz", tarred({"2024-01-31/users.csv": b""}, type=tarfile.CHRTYPE), "neither"),
    "tar-bomb": (".tar.gz", tarred(BIG), "more than"),
    "tar-bomb-elsewhere": (".tar.gz", tarred({**FILES, "other/x": bytes(3_000_000)}), "more than"),
    "tar-bomb-behind": (".tar.gz", tarred(FILES) + gzip.compress(bytes(9_000_000)), "more than"),
    "tar-twice": (".tar.gz", gzip.compress(gzip.decompress(tarred(FILES))[:-9_216] * 2), "File exists"),
    "tar-page": (".tar.gz", b"<html>Sign in</html>", "Not a gzipped file"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_archive_is_refused_and_nothing_changes(
    wrong: str, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, data, says = WRONG[wrong]
    pack = zipped if suffix == ".zip" else tarred
    home = tmp_path / "a" / "b" / "home"
    web.files[f"/m{suffix}"] = pack(FILES)
    source = f"{web.url}/m{suffix}?signature=hunter2"
    bring(source, home)
    before = state(tmp_path)
    monkeypatch.setattr(sources, "MAX_BYTES", 1_000_000)
    monkeypatch.setattr(sources, "MAX_FILES", 20)
    web.files[f"/m{suffix}"] = data

    with pytest.raises(SourceError, match=says) as refused:
        bring(source, home)

    assert state(tmp_path) == before
    assert str(refused.value).startswith(f"{web.url}/m{suffix}: ")
    assert "hunter2" not in str(refused.value)


def test_half_a_download_is_refused(web: Web, tmp_path: Path) -> None:
    """Though it is a whole archive: what the server promised has not come."""
    data = web.files["/m.zip"] = zipped(FILES)
    web.claims = len(data) + 100

    with pytest.raises(SourceError, match=f"ends after {len(data):,} of {len(data) + 100:,} bytes"):
        bring(f"{web.url}/m.zip", tmp_path)
    assert contents(tmp_path) == {}


def test_too_large_a_download_is_not_begun(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    web.files["/m.zip"] = zipped(FILES)

    with pytest.raises(SourceError, match=r"it has \d+ bytes; at most 100"):
        bring(f"{web.url}/m.zip", tmp_path)


def test_a_server_that_does_not_answer_is_given_up(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CALL_SECONDS", 0.3)
    web.files["/m.zip"] = zipped(FILES)
    web.slow = 3.0

    started = time.monotonic()
    with pytest.raises(SourceError, match=r"timed out|no answer within"):
        bring(f"{web.url}/m.zip", tmp_path)
    assert time.monotonic() - started < 2


def test_a_copy_that_takes_for_ever_is_given_up(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TOTAL_SECONDS", -1.0)
    web.files["/m.zip"] = zipped(FILES)
    with pytest.raises(SourceError, match="is not copied after"):
        bring(f"{web.url}/m.zip", tmp_path)


@pytest.mark.parametrize(
    ("path", "says"),
    [("/not/there.zip", "404"), ("/m .zip?signature=hunter2 x", "control characters")],
)
def test_what_the_server_or_the_library_says_is_told_without_the_query(
    path: str, says: str, web: Web, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says) as refused:
        bring(web.url + path, tmp_path)
    assert "hunter2" not in str(refused.value)


def test_one_job_copies_at_a_time_and_leaves_nothing_of_a_killed_one(web: Web, tmp_path: Path) -> None:
    web.files["/m.zip"] = zipped(FILES)
    (tmp_path / "incoming-cache" / ".new-killed").mkdir(parents=True)
    (tmp_path / "incoming-cache" / "of-another-source").mkdir()

    with (
        arrived(f"{web.url}/m.zip", tmp_path) as folder,
        pytest.raises(SourceError, match="is being copied by another job"),
    ):
        bring(f"{web.url}/m.zip", tmp_path)

    assert {path.name for path in (tmp_path / "incoming-cache").iterdir()} == {".lock", folder.name}


# --- trees ------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "the tree"
    for name, data in {**FILES, "README.txt": b"", "2024-02-29/.hidden": b"", "2024-02-29/deep/x.csv": b""}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_of_a_tree_only_what_is_new_is_read(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source, home = tree.as_uri(), tmp_path / "home"
    assert bring(source, home) == FILES
    (tree / "2024-01-31" / "users.csv").unlink()
    (tree / "2024-02-29" / "labels.csv").write_bytes(b"y")
    changed = {"2024-02-29/users.csv": FILES["2024-02-29/users.csv"], "2024-02-29/labels.csv": b"y"}

    assert bring(source, home) == changed
    assert bring(source, home) == changed

    said = [message for message in caplog.messages if message.startswith("source=")]
    assert [message.rsplit("=", 1)[1] for message in said] == ["3", "1", "0"]
    assert [m for m in caplog.messages if "skipped" in m] == [
        f"README.txt in file://{tree.as_posix().replace(' ', '%20')} is skipped: expected folders named YYYY-MM-DD"
    ] * 3


def test_a_tree_that_is_too_large_leaves_the_copy_as_it_was(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(tree.as_uri(), tmp_path / "home")
    before = state(tmp_path / "home")
    (tree / "2024-01-31" / "users.csv").write_bytes(b"other")
    monkeypatch.setattr(sources, "MAX_FILES", 1)

    with pytest.raises(SourceError, match="more than 1 files"):
        bring(tree.as_uri(), tmp_path / "home")
    assert state(tmp_path / "home") == before


def test_a_tree_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"file:///nowhere/at/all: .*/nowhere/at/all"):
        bring("file:///nowhere/at/all", tmp_path)


def test_a_file_that_grows_or_shrinks_meanwhile_is_refused(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = sources._Copy.count

    def then_change(self: Any, size: int) -> None:
        count(self, size)
        (tree / "2024-01-31" / "users.csv").write_bytes(b"short")

    monkeypatch.setattr(sources._Copy, "count", then_change)
    with pytest.raises(SourceError, match=r"users\.csv ends after 5 of 400 bytes"):
        bring(tree.as_uri(), tmp_path / "home")


@pytest.fixture
def bucket(web: Web, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket's prefix on the server of this test."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    web.files |= {f"/bucket/in/{name}": data for name, data in FILES.items()}
    web.files |= {"/bucket/in/readme": b"", "/bucket/other/2024-01-31/users.csv": b""}
    return f"s3://bucket/in?region=eu-west-1&scheme=http&endpoint_override={web.url.removeprefix('http://')}"


def test_a_bucket_is_copied_over_s3s_protocol(bucket: str, web: Web, tmp_path: Path) -> None:
    assert bring(bucket, tmp_path) == FILES
    read = len(web.asked)
    assert bring(bucket, tmp_path) == FILES
    assert [asked for asked in web.asked[read:] if asked.endswith(".csv")] == [], "nothing is read again"
    web.files["/bucket/in/2024-03-31/users.csv"] = b"march"
    assert bring(bucket, tmp_path) == {**FILES, "2024-03-31/users.csv": b"march"}


def test_keys_that_lead_elsewhere_are_refused(bucket: str, web: Web, tmp_path: Path) -> None:
    web.files["/bucket/in/2024-01-31/../../x.csv"] = b""
    with pytest.raises(SourceError, match="outside the folder"):
        bring(bucket, tmp_path)


def test_a_bucket_that_hangs_is_given_up(
    bucket: str, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CALL_SECONDS", 0.5)
    web.slow = 4.0
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"s3://bucket/in: no answer within 0\.5 s"):
        bring(bucket, tmp_path)
    assert time.monotonic() - started < 3


# --- ingestion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "file", "s3"])
def test_what_arrived_at_a_url_is_ingested_once(
    kind: str, web: Web, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered = tmp_path / "delivered"
    simulated(delivered, users=USERS, months=2, start=JANUARY, seed=3)
    files = contents(delivered)
    for name in FILES:
        del web.files[f"/bucket/in/{name}"]
    web.files |= {f"/bucket/in/{name}": data for name, data in files.items()}
    web.files |= {"/m.zip": zipped(files), "/m.tar.gz": tarred(files)}
    source = {"file": delivered.as_uri(), "s3": bucket}.get(kind, f"{web.url}/m.{kind}")
    settings = Settings(home=tmp_path / "home", snapshots_source=source)

    assert [(r.day, r.result) for r in ingest_source(settings, now=NOW)] == [
        (JANUARY, "ingested"), (FEBRUARY, "ingested"),
    ]  # fmt: skip
    monkeypatch.setattr(ingest_module, "read_as_text", None)  # nothing is read again
    assert ingest_source(settings, now=NOW) == []
    if kind == "zip":  # fetched anew, but with the same in it
        shutil.rmtree(delivered)
        web.etags = False
        web.files["/m.zip"] = zipped(dict(reversed(files.items())))
        assert ingest_source(settings, now=NOW) == []


# --- sent by somebody ------------------------------------------------------------------------------------


def sent(**files: bytes) -> io.BytesIO:
    """A .tar.gz as `kubectl churn put` sends it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return io.BytesIO(packed.getvalue())


def test_what_is_sent_replaces_its_day_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "2024-01-31").mkdir()
    (tmp_path / "2024-01-31" / "users.csv").write_text("january")
    assert receive(sent(**{"2024-02-29/users.csv": b"old", "2024-02-29/gone.csv": b"x"}), tmp_path) == ["2024-02-29"]

    assert receive(sent(**{"2024-02-29/users.csv": b"new", "notes.txt": b"skipped"}), tmp_path) == ["2024-02-29"]

    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"2024-01-31/users.csv": "january", "2024-02-29/users.csv": "new"}


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        pytest.param(io.BytesIO(b"no archive"), "no whole .tar.gz", id="no-archive"),
        pytest.param(
            io.BytesIO(sent(**{"2024-02-29/users.csv": b"x" * 9000}).getvalue()[:-20]), "no whole .tar.gz", id="half"
        ),
        pytest.param(
            sent(**{"january/users.csv": b"x"}), "YYYY-MM-DD at the top of what was sent, found january", id="no-day"
        ),
        pytest.param(sent(**{"../2024-02-29/users.csv": b"x"}), "outside the folder", id="elsewhere"),
        pytest.param(sent(), "found nothing", id="empty"),
    ],
)
def test_what_is_not_whole_changes_nothing(tmp_path: Path, archive: io.BytesIO, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        receive(archive, tmp_path)

    assert list(tmp_path.iterdir()) == []
