"""What runs on SQLite elsewhere, on a real Postgres: the way of predictions into the log, bentos out of it, Feast.

`fresh_database` and `sessions` are for tests of other rooms, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import psycopg
import psycopg.sql
import pytest
import sqlalchemy as sa

from bentos.churn import archive, shipper
from bentos.churn.archive import ArchiveError, BentoNotFound
from bentos.churn.database import cut_after, open_postgres
from bentos.churn.shipper import PostgresLog, Shipper, open_log
from bentos.churn.spool import Spool
from jobs.database import (
    _MIGRATION_LOCK,
    DatabaseError,
    _engine,
    bentos,
    connect,
    ensure_schema,
    grant_serving,
    predictions,
)
from tests import stores
from tests.bentos.serving_process import eventually
from tests.bentos.test_archive import tar_of
from tests.bentos.test_spool import ids, quarantined, record
from tests.conftest import REPOSITORY
from tests.stores import Server


def driver_url(url: str) -> str:
    """The URL as psycopg takes it."""
    return url.replace("+psycopg", "", 1)


def admin(url: str) -> Any:
    """A connection of the test's own, in autocommit mode."""
    return psycopg.connect(driver_url(url), autocommit=True, connect_timeout=5, application_name="test")


@contextlib.contextmanager
def fresh_database(server: Server) -> Iterator[str]:
    """A database of one test's own; whoever is still connected at the end is disconnected."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with admin(server.url) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = server.url.rsplit("/", 1)[0] + f"/{name}"
    try:
        yield url
    finally:
        _engine(url).dispose()
        with eventually(lambda: _let_in(server), what="PostgreSQL lets us in") as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _let_in(server: Server) -> Any:
    with contextlib.suppress(psycopg.OperationalError):
        return admin(server.url)
    return None


class Session(NamedTuple):
    """A row of pg_stat_activity."""

    pid: int
    state: str
    waits_for: str | None


def sessions(url: str, application: str, *, end: bool = False) -> list[Session]:
    """The sessions of `churn-jobs` or `churn-serving` in that database; with `end` the server ends them."""
    query = (
        "SELECT pid, state, wait_event_type FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = %s"
    )
    with admin(url) as connection:
        found = [Session(*row) for row in connection.execute(query, (application,))]
        for session in found if end else []:
            connection.execute("SELECT pg_terminate_backend(%s, 5000)", (session.pid,))
    return found


def logged(url: str) -> list[str]:
    """The predictions in the log."""
    with admin(url) as connection:
        return [key for (key,) in connection.execute("SELECT prediction_id FROM predictions ORDER BY 1")]


@pytest.fixture(scope="module")
def shared(postgres_server: Server) -> Iterator[str]:
    """A database with our tables."""
    with fresh_database(postgres_server) as url:
        connect(url)
        yield url


@pytest.fixture
def url(shared: str) -> str:
    """The same, with nothing in them, and nobody connected."""
    sessions(shared, "churn-serving", end=True)
    with admin(shared) as connection:
        connection.execute("TRUNCATE predictions, bentos")
    return shared


@pytest.fixture(scope="module")
def mortal() -> Iterator[Server]:
    """A server for tests that take it away."""
    with stores.postgres() as server:
        yield server


@pytest.fixture
def mortal_url(mortal: Server) -> Iterator[str]:
    with fresh_database(mortal) as url:
        connect(url)
        yield url


def bring_back(server: Server) -> None:
    """Start a server again: after a kill its children take a moment to notice, and no other may start before."""

    def started() -> bool:
        try:
            server.start()
        except AssertionError:
            return False
        return True

    eventually(started, what="PostgreSQL starts again")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def spool_at(root: Path) -> Spool:
    return Spool(root, max_bytes=2**22)


# --- rows -------------------------------------------------------------------------------------------------


def test_rows_are_as_the_jobs_read_them(root: Path, url: str, tmp_path: Path) -> None:
    """Column by column what SQLite gives, too."""
    both = url, f"sqlite:///{tmp_path}/churn.db"
    rows = [
        record(1, churn=True, user_id=None, churn_probability=0.1 + 0.2, threshold=1e-300),
        record(
            2,
            user_id="Zoë ☂ 😀 \\ \t \n %s \x7f",
            features='{"a": "\\u0000\\\\"}',
            features_as_of="2024-02-29",
            predicted_at="2024-03-01T22:59:59.123456+00:00",
        ),
    ]
    found = []
    for database in both:
        spool = spool_at(root / str(len(found)))
        connect(database)
        spool.append(rows)
        Shipper(spool, open_log(database)).ship_once()
        with connect(database).connect() as connection:
            query = sa.select(predictions).order_by(predictions.c.prediction_id)
            found.append([dict(row) for row in connection.execute(query).mappings()])

    assert found[0] == found[1]
    assert found[0][0]["churn"] is True
    assert found[0][0]["churn_probability"] == 0.1 + 0.2
    sent = json.loads(rows[1])
    assert (found[0][1]["user_id"], found[0][1]["features"]) == (sent["user_id"], sent["features"])


def test_shipping_again_adds_nothing(root: Path, url: str) -> None:
    """A crash between the commit and the removal of the segment; and the same record twice in one batch."""
    for _ in range(2):
        spool = spool_at(root)
        spool.append([record(1), record(2), record(1)])
        Shipper(spool, open_log(url)).ship_once()

    assert logged(url) == ids(1, 2)
    assert quarantined(root) == []


@pytest.mark.parametrize(
    "poison",
    [
        {"user_id": "a\0b"},
        {"user_id": "\ud800"},
        {"user_id": "x" * 129},
        {"source": "too long a source"},
        {"prediction_id": None},
        {"request_id": None},
        {"churn_probability": [1]},
        {"churn_probability": {"a": 1}},
        {"churn_probability": float("nan")},
        {"model_version": 2**70},
        {"predicted_at": "yesterday, perhaps"},
        {"churn": "maybe"},
    ],
    ids=lambda poison: "-".join(f"{key}={value!r:.20}" for key, value in poison.items()),
)
def test_a_row_the_database_refuses_is_kept_aside(
    root: Path, url: str, poison: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, in a line that does not repeat the row."""
    spool = spool_at(root)
    spool.append([record(1), record(2, **poison), record(3)])
    spool.append([record(4)])
    under_test = Shipper(spool, open_log(url))

    under_test.ship_once()

    assert logged(url) == ids(1, 3, 4)
    assert under_test.quarantined == 1
    assert [kept.read_bytes() for kept in quarantined(root)] == [record(2, **poison)]
    assert not list(spool.segments())
    (said,) = caplog.messages
    assert said.endswith("; kept in quarantine")
    assert "\n" not in said
    assert "u2" not in said


def test_among_many_only_the_refused_are_kept_aside(root: Path, url: str) -> None:
    bad = {137, 138, 999}
    spool = spool_at(root)
    spool.append([record(i, **({"user_id": "a\0b"} if i in bad else {})) for i in range(1_200)])
    under_test = Shipper(spool, open_log(url))

    under_test.ship_once()

    assert logged(url) == ids(*(i for i in range(1_200) if i not in bad))
    assert under_test.quarantined == len(quarantined(root)) == len(bad)


# --- outages ----------------------------------------------------------------------------------------------


def waits(root: Path, *, segments: int = 1) -> None:
    """Nothing was given up: all of it waits in the spool."""
    assert quarantined(root) == []
    assert len(list(root.glob("worker-*/*.seg"))) == segments


def test_a_read_only_server_is_an_outage(root: Path, url: str) -> None:
    """A standby, or a primary that is being replaced."""
    name = url.rsplit("/", 1)[1]
    spool = spool_at(root)
    spool.append([record(1), record(2)])
    under_test = Shipper(spool, open_log(url))
    with admin(url) as connection:
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            under_test.ship_once()
        waits(root)
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")

    under_test.ship_once()

    assert logged(url) == ids(1, 2)


@pytest.mark.parametrize(
    ("take", "give"),
    [
        ("ALTER TABLE predictions RENAME TO away", "ALTER TABLE away RENAME TO predictions"),
        ("ALTER TABLE predictions RENAME stale TO away", "ALTER TABLE predictions RENAME away TO stale"),
    ],
    ids=["table", "column"],
)
def test_a_table_of_another_release_is_an_outage(root: Path, url: str, take: str, give: str) -> None:
    spool = spool_at(root)
    spool.append([record(1)])
    under_test = Shipper(spool, open_log(url))
    with admin(url) as connection:
        connection.execute(take)
        with pytest.raises(psycopg.ProgrammingError):
            under_test.ship_once()
        waits(root)
        connection.execute(give)

    under_test.ship_once()

    assert logged(url) == ids(1)


def test_a_statement_that_hangs_is_given_up(root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody locked the table."""
    monkeypatch.setattr(shipper, "STATEMENT_SECONDS", 0.2)
    spool = spool_at(root)
    spool.append([record(1)])
    under_test = Shipper(spool, open_log(url))
    with admin(url) as other, other.transaction():
        other.execute("SET LOCAL idle_in_transaction_session_timeout = '10s'")  # else a failure would wait for ever
        other.execute("LOCK TABLE predictions")
        with pytest.raises(psycopg.errors.QueryCanceled):
            under_test.ship_once()
        waits(root)

    under_test.ship_once()

    assert logged(url) == ids(1)


def test_a_server_that_hangs_is_given_up(root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the connection and answers nothing, as a proxy does with nobody behind it."""
    monkeypatch.setattr(shipper, "STATEMENT_SECONDS", 0.3)
    spool = spool_at(root)
    under_test = Shipper(spool, open_log(url))
    spool.append([record(1)])
    under_test.ship_once()
    (session,) = sessions(url, "churn-serving")
    os.kill(session.pid, signal.SIGSTOP)
    end = threading.Timer(10, os.kill, (session.pid, signal.SIGCONT))  # else a failure would wait for ever
    end.start()
    try:
        spool.append([record(2)])
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="did not answer within"):
            under_test.ship_once()
        assert time.monotonic() - started < 5
        waits(root)
        under_test.ship_once()  # on a new connection
        assert logged(url) == ids(1, 2)
    finally:
        end.cancel()
        os.kill(session.pid, signal.SIGCONT)
    eventually(lambda: session.pid not in [s.pid for s in sessions(url, "churn-serving")])
    assert logged(url) == ids(1, 2)


def test_the_watch_over_a_call_ends_with_it(url: str) -> None:
    with open_postgres(driver_url(url)) as connection:
        before = threading.active_count()
        for _ in range(3):
            with cut_after(connection, 30):
                connection.execute("SELECT 1")
        eventually(lambda: threading.active_count() == before)
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with cut_after(connection, 30):
            connection.execute("SELECT 1")
        assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


def test_a_connection_that_the_server_ended_is_replaced(root: Path, url: str) -> None:
    spool = spool_at(root)
    under_test = Shipper(spool, open_log(url))
    under_test.start()
    spool.append([record(1)])
    eventually(lambda: logged(url) == ids(1))
    sessions(url, "churn-serving", end=True)

    spool.append([record(2)])

    eventually(lambda: logged(url) == ids(1, 2))
    assert under_test.drain(10)
    assert list(root.glob("worker-*")) == []


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "stopped"])
def test_a_server_that_goes_and_comes_back_misses_nothing(
    root: Path, mortal: Server, mortal_url: str, kill: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spool = spool_at(root)
    under_test = Shipper(spool, open_log(mortal_url.replace("//churn@", "//churn:secret@")))
    under_test.start()
    written = threading.Event()

    def write() -> None:
        for i in range(3_000):
            spool.append([record(i)])
            written.wait(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    eventually(lambda: under_test.shipped > 200, every=0.001)
    if not kill:
        mortal.process.send_signal(signal.SIGINT)  # type: ignore[union-attr]  # PostgreSQL's "fast"
    mortal.stop(kill=kill)
    eventually(lambda: under_test.failing_since is not None)
    bring_back(mortal)
    writer.join(30)
    eventually(lambda: spool.backlog_bytes == 0, seconds=20)

    assert logged(mortal_url) == ids(*range(3_000))
    assert under_test.drain(10)
    assert under_test.quarantined == 0
    assert [m for m in caplog.messages if "wait in the spool" in m or "again" in m]
    assert "secret" not in caplog.text


SHIP = """
import sys
from pathlib import Path
from bentos.churn.shipper import Shipper, open_log
from bentos.churn.spool import Spool
from tests.bentos.test_spool import record
spool = Spool(Path(sys.argv[1]), max_bytes=2**22)
spool.append([record(i) for i in range(500)])
Shipper(spool, open_log(sys.argv[2])).ship_once()
"""


@pytest.mark.parametrize("ghost", [True, False], ids=["its-session-goes-on", "its-session-ends"])
def test_what_a_shipper_sent_when_it_was_killed_arrives_once(root: Path, url: str, ghost: bool) -> None:
    """Killed while the batch is with the server and not committed. The server may still commit it afterwards."""
    with admin(url) as other:
        with other.transaction():
            other.execute("LOCK TABLE predictions IN SHARE MODE")  # the insert is held back in its middle
            process = subprocess.Popen([sys.executable, "-c", SHIP, str(root), url], cwd=REPOSITORY)
            try:
                eventually(lambda: [s for s in sessions(url, "churn-serving") if s.waits_for == "Lock"])
            finally:
                process.kill()
                process.wait(10)
            if not ghost:
                sessions(url, "churn-serving", end=True)
        if ghost:
            eventually(lambda: not sessions(url, "churn-serving"))
    assert len(logged(url)) == (500 if ghost else 0)
    spool = spool_at(root)
    spool.append([record(999)])

    Shipper(spool, open_log(url)).ship_once()

    assert logged(url) == ids(*range(500), 999)
    assert quarantined(root) == []


def test_a_url_that_cannot_be_read_is_not_repeated(root: Path) -> None:
    spool = spool_at(root)
    spool.append([record(1)])
    for url in (
        "postgresql://churn:sec%zzret@host/db",
        "postgresql://churn:s@ecret@host/db",
        "postgresql://a:secret@h?x=1",
    ):
        with pytest.raises(ValueError, match="URL cannot be read") as caught:
            PostgresLog(url).insert([])
        assert "ret" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


# --- bentos -----------------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def store(url: str, **changes: object) -> bytes:
    """A bento in the database, with every byte there is."""
    info = archive.tarfile.TarInfo("src/bytes")
    info.size = 256 * 2000
    data = tar_of((info, bytes(range(256)) * 2000))
    row = {"tag": "churn:v1-aaaaaaaa", "model_version": 1, "run_id": "run-1", "sha256": sha256(data), "archive": data,
           "built_at": datetime(2024, 3, 1, tzinfo=UTC), **changes}  # fmt: skip
    with connect(url).begin() as connection:
        connection.execute(bentos.insert().values(**row))
    return data


def test_a_bento_is_fetched(url: str, tmp_path: Path) -> None:
    data = store(url)

    folder = archive.fetch(url, "churn:v1-aaaaaaaa", tmp_path / "bentos" / "one")

    assert archive.is_complete(folder, sha256(data))
    assert (folder / "src" / "bytes").read_bytes() == bytes(range(256)) * 2000


def test_a_bento_that_is_not_there_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(BentoNotFound, match="churn:v9-00000000"):
        archive.fetch(url, "churn:v9-00000000", tmp_path / "one")


def test_a_bento_that_is_not_what_was_stored_is_refused(url: str, tmp_path: Path) -> None:
    store(url, sha256="0" * 64)

    with pytest.raises(ArchiveError, match="sha256"):
        archive.fetch(url, "churn:v1-aaaaaaaa", tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_fetching_from_a_server_that_hangs_comes_to_an_end(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(url)
    monkeypatch.setattr(archive, "READ_SECONDS", 0.2)
    with admin(url) as other, other.transaction():
        other.execute("SET LOCAL idle_in_transaction_session_timeout = '10s'")  # else a failure would wait for ever
        other.execute("LOCK TABLE bentos")
        with pytest.raises(TimeoutError, match="did not answer within"):
            archive.fetch(url, "churn:v1-aaaaaaaa", tmp_path / "one")
    assert not (tmp_path / "one").exists()


# --- Feast ------------------------------------------------------------------------------------------------


def test_feast_keeps_its_registry_in_postgres(postgres_server: Server, tmp_path: Path) -> None:
    """Definitions are applied once; frames are those of a registry in SQLite."""
    from jobs import dataset
    from jobs.ingest import ingest
    from jobs.simulate import simulate
    from tests.jobs.conftest import FIRST, settings_for

    simulate(tmp_path / "simulated", users=200, months=1, start=FIRST, seed=1)
    with fresh_database(postgres_server) as url:
        settings = settings_for(tmp_path / "home", feast_registry_url=url)
        ingest(settings, tmp_path / "simulated" / FIRST.isoformat(), as_of=FIRST, now=datetime.now(UTC))
        with pytest.MonkeyPatch.context() as patch:
            applied = []
            apply = dataset.apply
            patch.setattr(dataset, "apply", lambda *given: (applied.append(given), apply(*given)))

            plan = dataset.features(settings)
            frame = dataset.feature_frame(settings, FIRST)

        assert len(applied) == 1
        with admin(url) as connection:
            stored = connection.execute("SELECT feature_view_name FROM feature_views ORDER BY 1").fetchall()
    in_sqlite = settings_for(tmp_path / "home")
    assert len(plan) == 16
    assert plan == dataset.features(in_sqlite)
    assert len(frame) == 200
    assert frame.equals(dataset.feature_frame(in_sqlite, FIRST))
    assert [name for (name,) in stored] == sorted({feature.view for feature in plan})


# --- schemas and roles ------------------------------------------------------------------------------------


def schemas(url: str) -> dict[str, set[str]]:
    """The schemas of a database, with their tables; seen without PGOPTIONS."""
    query = (
        "SELECT nspname, coalesce(array_agg(relname) FILTER (WHERE relkind = 'r'), '{}') "
        "FROM pg_namespace LEFT JOIN pg_class ON relnamespace = pg_namespace.oid "
        "WHERE nspname !~ '^pg_|information_schema' GROUP BY 1"
    )
    with psycopg.connect(driver_url(url), options="") as connection:
        return {schema: set(tables) for schema, tables in connection.execute(query)}


OURS = {*predictions.metadata.tables, "alembic_version"}


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Says where this process looks from now on, as the chart does to a pod."""
    yield lambda path: (_engine.cache_clear(), monkeypatch.setenv("PGOPTIONS", f"-c search_path={path}"))
    _engine.cache_clear()


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("churn", "churn"),
        ("Churn", "churn"),
        ("release_b,public", "release_b"),
        ('"my_""Own",\\ public', 'my_"Own'),
        ("public", "public"),
        ('"$user",public', "public"),
        ("$user,public", "public"),
    ],
)
def test_everything_lives_in_the_first_schema_of_the_path(
    path: str, schema: str, postgres_server: Server, search: Any
) -> None:
    """Though another release has its tables in `public`."""
    with fresh_database(postgres_server) as url:
        if schema != "public":
            connect(url)
        search(path)
        for _ in range(2):
            connect(url)

        assert schemas(url) == {"public": OURS, schema: OURS}


def test_without_pgoptions_everything_lives_in_public(postgres_server: Server) -> None:
    with fresh_database(postgres_server) as url:
        ensure_schema(url)
        connect(url)
        assert schemas(url) == {"public": OURS}


@pytest.mark.parametrize("options", ["-c%20lock_timeout%3D7s", "-c%20search_path%3Dother%20-c%20lock_timeout%3D7s"])
def test_options_of_the_url_are_added_to_pgoptions(
    options: str, root: Path, postgres_server: Server, search: Any
) -> None:
    """libpq alone would take one or the other; what the URL says comes last, and so wins."""
    schema = "other" if "other" in options else "churn"
    with fresh_database(postgres_server) as plain:
        url = f"{plain}?options={options}"
        search("churn")
        try:
            with connect(url).connect() as connection:
                assert connection.exec_driver_sql("SHOW lock_timeout").scalar() == "7s"
                assert connection.exec_driver_sql("SELECT current_schema()").scalar() == schema
            with open_postgres(url) as session:
                found = session.execute("SELECT current_schema(), current_setting('lock_timeout')").fetchone()
                assert found == (schema, "7s")
        finally:
            _engine(url).dispose()
        assert schemas(plain) == {"public": set(), schema: OURS}


SCHEMA_COMERS = """
import os, sys
from alembic import command, config, runtime
from jobs.database import connect, ensure_schema, metadata
hold, release = os.pipe()
comers = []
for number in range(6):
    comer = os.fork()
    if comer == 0:
        os.close(release)
        os.read(hold, 1)  # all go on when the parent lets go of the other end
        (ensure_schema if number % 2 else connect)(sys.argv[1])
        os._exit(0)
    comers.append(comer)
os.close(release)
sys.exit(sum(os.waitpid(comer, 0)[1] != 0 for comer in comers))
"""


def test_of_processes_that_come_at_once_one_makes_the_schema(postgres_server: Server) -> None:
    with fresh_database(postgres_server) as url:
        done = subprocess.run(
            [sys.executable, "-c", SCHEMA_COMERS, url], cwd=REPOSITORY, text=True, capture_output=True, timeout=60,
            check=False, env={**os.environ, "PGOPTIONS": "-c search_path=churn"},
        )  # fmt: skip

        assert done.returncode == 0, done.stderr
        assert schemas(url) == {"public": set(), "churn": OURS}


@pytest.mark.parametrize("come", [ensure_schema, connect])
def test_who_comes_while_the_schema_is_being_made_waits_for_it(come: Any, postgres_server: Server, search: Any) -> None:
    with fresh_database(postgres_server) as url:
        search("churn")
        with admin(url) as other, ThreadPoolExecutor(1) as pool:
            with other.transaction():
                other.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
                other.execute("CREATE SCHEMA churn")
                coming = pool.submit(come, url)
                eventually(lambda: [s for s in sessions(url, "churn-jobs") if s.waits_for == "Lock"])
            coming.result(20)


@contextlib.contextmanager
def new_role(url: str, name: str = "") -> Iterator[str]:
    """A role that may connect to this database, which nobody else may, and nothing more."""
    role, database = name or f"role_{uuid.uuid4().hex[:8]}", url.rsplit("/", 1)[1]
    quoted = psycopg.sql.Identifier(role).as_string()
    with admin(url) as connection:
        connection.execute(f"CREATE ROLE {quoted} LOGIN PASSWORD 'x'")
        connection.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
        connection.execute(f"GRANT CONNECT ON DATABASE {database} TO {quoted}")
    try:
        yield role
    finally:
        with admin(url) as connection:
            connection.execute(f"DROP OWNED BY {quoted}; DROP ROLE {quoted}")


def as_role(url: str, role: str) -> str:
    """The URL for that role."""
    return url.replace("//churn@", f"//{quote(role, safe='')}@")


def test_the_serving_role_may_do_what_serving_does_and_no_more(
    root: Path, postgres_server: Server, search: Any
) -> None:
    """Two releases share a database: each role has what the chart gives it, through the real shipper and fetch."""
    with fresh_database(postgres_server) as url:
        search("other")
        store(url)
        search("churn")
        data = store(url)
        with new_role(url) as role:
            limited = as_role(url, role)
            for _ in range(2):
                grant_serving(url, role)

            spool = spool_at(root)
            spool.append([record(1), record(2, user_id="a\0b"), record(1)])
            under_test = Shipper(spool, open_log(limited))
            under_test.ship_once()
            under_test._log.close()

            assert logged(url) == ids(1)
            assert under_test.quarantined == 1
            assert archive.is_complete(archive.fetch(limited, "churn:v1-aaaaaaaa", root / "bento"), sha256(data))
            with admin(limited) as connection:
                for statement in (
                    "SELECT 1 FROM predictions",
                    "DELETE FROM predictions",
                    "INSERT INTO bentos SELECT * FROM bentos",
                    "DELETE FROM bentos",
                    "SELECT 1 FROM promotions",
                    "SELECT 1 FROM alembic_version",
                    "SELECT 1 FROM other.bentos",
                    "CREATE TABLE mine (id int)",
                    "CREATE SCHEMA mine",
                ):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        connection.execute(statement)


def test_the_name_of_a_role_is_quoted(postgres_server: Server) -> None:
    with fresh_database(postgres_server) as url:
        connect(url)
        with new_role(url, 'x"; DROP TABLE bentos; -- 100%') as role:
            grant_serving(url, role)
            with admin(as_role(url, role)) as connection:
                assert connection.execute("SELECT tag FROM bentos").fetchall() == []


def test_a_role_that_is_not_there_is_said(url: str) -> None:
    with pytest.raises(DatabaseError, match=r"CHURN_SERVING_ROLE is 'nobody'; .* has no such role"):
        grant_serving(url, "nobody")


def test_rights_that_are_not_ours_to_give_are_said_unless_they_are_there(postgres_server: Server) -> None:
    """The tables belong to someone else, who may have granted them already."""
    with fresh_database(postgres_server) as url:
        connect(url)
        with new_role(url) as role, new_role(url) as other:
            with pytest.raises(DatabaseError, match="permission denied for table predictions"):
                grant_serving(as_role(url, other), role)
            with admin(url) as connection:
                connection.execute(f"GRANT INSERT ON predictions TO {other} WITH GRANT OPTION")
                connection.execute(f"GRANT SELECT ON bentos TO {other}")
            with pytest.raises(DatabaseError, match=r"does not let us grant SELECT on public\.bentos"):
                grant_serving(as_role(url, other), role)

            grant_serving(url, role)
            grant_serving(as_role(url, other), role)
            _engine(as_role(url, other)).dispose()
