"""Our tables on both databases: made once, whoever comes first; the same rows come back; a way out of every wait."""

from __future__ import annotations

import itertools
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from jobs import database
from jobs.database import DatabaseError, connect, downgrade, metadata, promotions, redact, upgrade
from jobs.history import History, Pin, Promotion
from tests.conftest import REPOSITORY
from tests.stores import Server, free_port
from tests.test_postgres import fresh_database, sessions

NOW = datetime(2024, 3, 1, 12, tzinfo=UTC)
TABLES = sorted([*metadata.tables, "alembic_version"])


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/new/churn.db"


@pytest.fixture
def postgres(postgres_server: Server) -> Iterator[str]:
    with fresh_database(postgres_server) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def engine(url: str) -> sa.Engine:
    return connect(url)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """A database with our tables, of each kind, for tests that only write rows."""
    if request.param == "sqlite":
        yield connect(f"sqlite:///{tmp_path_factory.mktemp('shared')}/churn.db")
        return
    with fresh_database(request.getfixturevalue("postgres_server")) as url:
        yield connect(url)


@pytest.fixture
def history(shared: sa.Engine) -> History:
    """The history, empty."""
    with shared.begin() as connection:
        connection.execute(promotions.delete())
        connection.execute(database.pins.delete())
    return History(shared)


def tables(url: str) -> list[str]:
    return sorted(sa.inspect(database._engine(url)).get_table_names())


# --- migrations -------------------------------------------------------------------------------------------


def test_tables_are_made_at_the_first_connection_and_left_alone_later(url: str) -> None:
    with connect(url).begin() as connection:
        connection.execute(promotions.insert().values(opened_at=NOW, action="promote", reason="", by="me"))

    engine = connect(url)

    assert tables(url) == TABLES
    with engine.connect() as connection:
        assert len(connection.execute(sa.select(promotions)).all()) == 1
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == database.REVISION


COMERS = """
import os, sys
from alembic import command, config, runtime
from jobs.database import connect, metadata
hold, release = os.pipe()
comers = []
for _ in range(4):
    comer = os.fork()
    if comer == 0:
        os.close(release)
        os.read(hold, 1)  # all go on when the parent lets go of the other end
        connect(sys.argv[1])
        os._exit(0)
    comers.append(comer)
os.close(release)
sys.exit(sum(os.waitpid(comer, 0)[1] != 0 for comer in comers))
"""


def test_of_processes_that_come_at_once_one_makes_the_tables(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMERS, url], cwd=REPOSITORY, text=True, capture_output=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert tables(url) == TABLES


def test_threads_that_come_at_once_do_so_too(url: str) -> None:
    errors = at_once(*[lambda: connect(url)] * 4)

    assert errors == []
    assert tables(url) == TABLES


def at_once(*acts: Callable[[], object]) -> list[BaseException]:
    """Run all of them, in threads that begin together; what they raised."""
    barrier = threading.Barrier(len(acts))
    errors: list[BaseException] = []

    def run(act: Callable[[], object]) -> None:
        barrier.wait(10)
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "still running after 60 s"
    return errors


def test_tables_go_and_come_back(url: str) -> None:
    connect(url)

    downgrade(url, "base")

    assert tables(url) == ["alembic_version"]
    connect(url)
    assert tables(url) == TABLES


def test_bentos_of_an_older_release_stay(url: str) -> None:
    """What 0002 adds is null for them, and going back to 0001 keeps them as they were."""
    upgrade(url, "0001")
    old = {
        "tag": "churn:v1-aaaaaaaa",
        "model_version": 1,
        "run_id": "r",
        "sha256": "0" * 64,
        "archive": bytes(range(256)),
    }
    with database._engine(url).begin() as connection:
        names = ", ".join([*old, "built_at"])
        values = ", ".join(f":{name}" for name in old)
        connection.execute(sa.text(f"INSERT INTO bentos ({names}) VALUES ({values}, '{NOW.isoformat()}')"), old)

    with connect(url).connect() as connection:
        found = connection.execute(sa.select(database.bentos)).mappings().one()
    assert {name: found[name] for name in old} == old
    assert (found["onnx_sha256"], found["model_sha256"], found["code_digest"]) == (None, None, None)

    downgrade(url, "0001")

    assert tables(url) == [name for name in TABLES if name != "models"]
    with database._engine(url).connect() as connection:
        row = connection.execute(sa.text("SELECT * FROM bentos")).mappings().one()
    assert {name: row[name] for name in old} == old
    assert set(row) == {*old, "built_at"}
    connect(url)
    assert tables(url) == TABLES


def test_a_migration_that_fails_leaves_nothing_behind(url: str) -> None:
    """`scores` is made last but one: it is in the way, until somebody renames it."""
    engine = database._engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE scores (mine INTEGER)"))
    with pytest.raises(DatabaseError, match="scores"):
        connect(url)
    assert tables(url) == ["scores"]
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE scores RENAME TO my_scores"))

    connect(url)

    assert tables(url) == sorted([*TABLES, "my_scores"])


@pytest.mark.parametrize(
    ("revision", "message"),
    [("9999", "revision 9999, this release knows .*newer release"), ("acf3f17fdcc7", "tables of another program")],
    ids=["newer", "foreign"],
)
def test_what_is_not_ours_is_refused_and_left_as_it_is(url: str, revision: str, message: str) -> None:
    with database._engine(url).begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(sa.text(f"INSERT INTO alembic_version VALUES ('{revision}')"))

    with pytest.raises(DatabaseError, match=message):
        connect(url)

    assert tables(url) == ["alembic_version"]


def test_the_migrations_make_what_the_code_says(engine: sa.Engine) -> None:
    """No difference, also in types and defaults; the index on an expression is seen by the test below."""
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})

        assert compare_metadata(context, metadata) == []


def test_comparing_sees_a_difference(engine: sa.Engine) -> None:
    """The test above could not fail if it compared nothing."""
    with engine.begin() as connection:
        connection.execute(sa.text("DROP INDEX ix_predictions_user_id"))
        connection.execute(sa.text("ALTER TABLE scores ADD COLUMN more INTEGER"))
        context = MigrationContext.configure(connection)

        assert sorted(change[0] for change in compare_metadata(context, metadata)) == ["add_index", "remove_column"]


def test_releases_in_schemas_of_one_database_do_not_meet(postgres: str) -> None:
    with database._engine(postgres).begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA one"))
        connection.execute(sa.text("CREATE SCHEMA two"))
    one, two = (History(connect(f"{postgres}?options=-csearch_path%3D{schema}")) for schema in ("one", "two"))

    opened(one)

    assert one.open_row() is not None
    assert two.open_row() is None
    assert tables(postgres) == []


# --- what the connection is like --------------------------------------------------------------------------


def test_looking_for_the_tables_leaves_no_transaction(postgres: str) -> None:
    engine = database._engine(postgres)

    assert database._revision(engine) is None

    assert [session.state for session in sessions(postgres, "churn-jobs")] == ["idle"]
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT 1")).scalar() == 1


def test_a_connection_that_the_server_ended_is_replaced(postgres: str) -> None:
    engine = connect(postgres)
    before = sessions(postgres, "churn-jobs", end=True)

    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT 1")).scalar() == 1
    assert sessions(postgres, "churn-jobs")[0].pid != before[0].pid


def test_every_wait_of_a_job_has_an_end(postgres: str) -> None:
    with connect(postgres).connect() as connection:
        limits = {
            name: connection.execute(sa.text(f"SHOW {name}")).scalar()
            for name in ("statement_timeout", "tcp_user_timeout", "tcp_keepalives_idle")
        }
        driver = connection.connection.driver_connection
        assert driver is not None
        assert driver.info.get_parameters()["connect_timeout"] == "5"
        assert driver.info.get_parameters()["tcp_user_timeout"] == "10000"
    assert limits["statement_timeout"] == "5min"


def test_migrating_waits_for_another_only_so_long(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process migrates, and does not come to an end."""
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.3)
    with database._transaction(url), pytest.raises(DatabaseError, match="lock"):
        upgrade(url)
    connect(url)


def test_a_server_that_is_away_is_said_in_a_sentence() -> None:
    port = free_port()

    with pytest.raises(DatabaseError) as caught:
        connect(f"postgresql+psycopg://churn:secret@127.0.0.1:{port}/churn")

    message = str(caught.value)
    assert message.startswith(f"postgresql+psycopg://churn:***@127.0.0.1:{port}/churn cannot be used: ")
    assert "Connection refused" in message
    assert "\n" not in message
    assert "secret" not in message


def test_a_server_that_does_not_answer_is_not_waited_for() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(DatabaseError, match="timeout"):
            connect(f"postgresql+psycopg://churn@127.0.0.1:{port}/churn?connect_timeout=2")

    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://churn:sec@ret@host/churn",
        "postgresql+psycopg:/churn:sec@ret",
        "postgresql+psycopg://churn:secret@host:port/churn",
        "churn:sec@ret@host/churn",
        "mysql://churn:sec@ret@host/churn",
        "postgres://churn:sec@ret@host/churn",
    ],
)
def test_a_url_that_cannot_be_read_is_not_repeated(url: str) -> None:
    with pytest.raises((DatabaseError, ValueError)) as caught:
        connect(url)

    error: BaseException | None = caught.value
    assert "postgresql+psycopg://" in str(error)
    while error is not None:
        assert "ret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_the_short_name_of_postgres_will_do(postgres: str) -> None:
    assert connect(postgres.replace("+psycopg", "")).driver == "psycopg"


def test_a_password_is_never_shown() -> None:
    assert redact("postgresql+psycopg://churn:s%40cret@db:5432/churn") == "postgresql+psycopg://churn:***@db:5432/churn"


def test_a_file_that_is_no_database_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "churn.db").write_bytes(b"something else entirely" * 100)

    with pytest.raises(DatabaseError, match=r"churn\.db cannot be used: file is not a database"):
        connect(f"sqlite:///{tmp_path}/churn.db")


def test_a_locked_file_is_not_taken_for_an_empty_one(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(sqlite).dispose()
    database._engine.cache_clear()
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.05)
    with closing(sqlite3.connect(sqlite.removeprefix("sqlite:///"), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("BEGIN EXCLUSIVE")

        with pytest.raises(DatabaseError, match=r"churn\.db cannot be used: database is locked"):
            connect(sqlite)
    database._engine.cache_clear()


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC),
        datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC),
        datetime(2024, 3, 31, 2, 30, tzinfo=timezone(timedelta(hours=5, minutes=45))),
        datetime(1999, 12, 31, 23, 0, tzinfo=timezone(timedelta(hours=-9))),
    ],
    ids=str,
)
def test_an_instant_comes_back_in_utc(history: History, value: datetime) -> None:
    """Whatever the time zone of the session is."""
    if history.engine.name == "postgresql":
        url = history.engine.url.render_as_string(hide_password=False)
        history = History(connect(f"{url}?options=-ctimezone%3DAsia/Tokyo"))

    row = opened(history, now=value)

    assert row.opened_at == value
    assert row.opened_at.tzinfo is UTC
    with history.engine.connect() as connection:
        same = sa.select(promotions.c.id).where(promotions.c.opened_at == value)
        assert connection.execute(same).scalar() == row.id


def test_instants_sort_and_compare(history: History) -> None:
    day = datetime(2024, 2, 29, 12, tzinfo=UTC)
    given = [day, day + timedelta(microseconds=1), day.astimezone(timezone(timedelta(hours=-9))) + timedelta(seconds=1)]
    for value in reversed(given):
        history.close(opened(history, now=value), now=value, result="promoted", reason="")

    with history.engine.connect() as connection:
        found = connection.execute(sa.select(promotions.c.opened_at).order_by(promotions.c.opened_at)).scalars().all()
        later = sa.select(sa.func.count()).where(promotions.c.opened_at > day)
        assert connection.execute(later).scalar() == 2
    assert found == given


def test_an_instant_without_a_zone_is_refused(history: History) -> None:
    with pytest.raises(sa.exc.StatementError, match="no time zone"):
        opened(history, now=datetime(2024, 3, 1))


# --- the history ------------------------------------------------------------------------------------------


def opened(history: History, *, now: datetime = NOW, to: int = 2, tag: str | None = None) -> Promotion:
    return history.open(
        now=now, action="promote", from_version=1, from_tag="churn:v1-aaaaaaaa", to_version=to, to_tag=tag,
        reason="better by 0.1 – naïve ☂", by="promote",
    )  # fmt: skip


def test_a_promotion_is_opened_and_closed(history: History) -> None:
    assert (history.open_row(), history.last(), history.rows()) == (None, None, [])

    row = opened(history)
    assert history.open_row() == row
    assert (row.closed_at, row.to_tag, row.reason) == (None, None, "better by 0.1 – naïve ☂")
    history.set_target(row, "churn:v2-bbbbbbbb")
    history.close(row, now=NOW + timedelta(minutes=1), result="promoted", reason="all new")

    closed = replace(
        row, to_tag="churn:v2-bbbbbbbb", closed_at=NOW + timedelta(minutes=1), result="promoted", reason="all new"
    )
    assert history.open_row() is None
    assert history.last() == history.last(good=True) == closed
    assert history.rows() == [closed]


def test_a_row_is_closed_once(history: History) -> None:
    row = opened(history)
    history.close(row, now=NOW, result="promoted", reason="first")

    history.close(row, now=NOW + timedelta(hours=1), result="failed", reason="second")

    last = history.last()
    assert last is not None and (last.closed_at, last.result, last.reason) == (NOW, "promoted", "first")


def test_a_second_open_promotion_is_refused(history: History) -> None:
    first = opened(history)
    with pytest.raises(sa.exc.IntegrityError):
        opened(history)
    assert [row.id for row in history.rows()] == [first.id]

    history.close(first, now=NOW, result="failed", reason="")
    second = opened(history)

    assert second.id > first.id
    assert history.open_row() == second


def test_of_promotions_opened_at_once_one_is(history: History) -> None:
    errors = at_once(*[lambda: opened(history)] * 4)

    assert [type(error) for error in errors] == [sa.exc.IntegrityError] * 3
    assert len(history.rows()) == 1


def test_the_last_good_one_is_not_always_the_last(history: History) -> None:
    for to, result in ((2, "promoted"), (3, "failed"), (3, "interrupted"), (3, "interrupted")):
        history.close(opened(history, to=to), now=NOW, result=result, reason="")

    last, good = history.last(), history.last(good=True)

    assert last is not None and good is not None
    assert (last.to_version, good.to_version) == (3, 2)
    assert [row.result for row in history.interruptions()] == ["interrupted"] * 2
    assert [row.to_version for row in history.rows(limit=3)] == [3, 3, 3]


def pin(version: int) -> Pin:
    return Pin(version, f"churn:v{version}-aaaaaaaa", "a bad feeling", "me", NOW)


def test_a_pin_takes_the_place_of_another(history: History) -> None:
    assert history.pin() is None
    history.set_pin(pin(1))
    history.set_pin(pin(2))
    assert history.pin() == pin(2)

    history.clear_pin(pin(1))  # of somebody who saw the one before
    assert history.pin() == pin(2)
    history.clear_pin(pin(2))

    assert history.pin() is None


def test_who_pins_at_once_is_not_refused(history: History) -> None:
    for _ in range(5):
        errors = at_once(*(lambda n=n: history.set_pin(pin(n)) for n in range(1, 5)))
        assert errors == []
        assert history.pin() in [pin(n) for n in range(1, 5)]


def test_a_large_archive_comes_back_as_it_was(shared: sa.Engine) -> None:
    data = bytes(itertools.islice(itertools.cycle(range(256)), 3_000_000))
    with shared.begin() as connection:
        connection.execute(
            database.bentos.insert().values(
                tag="churn:v1-aaaaaaaa", model_version=1, run_id="r", sha256="0" * 64, archive=data, built_at=NOW
            )
        )
        assert connection.execute(sa.select(database.bentos.c.archive)).scalar() == data


def test_rows_of_every_table_come_back(shared: sa.Engine) -> None:
    """Types that the two databases treat differently: booleans, floats to the last digit, JSON as text, nulls."""
    check = {
        "as_of": NOW, "snapshot": NOW, "model_version": 2**31 - 1, "share": 0.1 + 0.2, "realised_auc": None,
        "drifted_columns": json.dumps(["naïve", "a\\b"]), "dataset_drift": True, "decision": "waiting",
        "reason": "r" * 5000, "run_id": None, "checked_at": NOW,
    }  # fmt: skip
    retrain = {"as_of": NOW, "wanted_by": "drift", "reason": "", "result": "waiting_for_labels", "known_at": NOW}
    model = {
        "run_id": "r", "version": None, "model_sha256": "a" * 64, "artifacts": "{}", "data_fingerprint": "b" * 64,
        "settings_fingerprint": "c" * 64, "trained_as_of": NOW.date(), "trained_on": "2024-03-01",
        "threshold": 0.1 + 0.2, "gate": "passed", "recorded_by": "retrain", "recorded_at": NOW,
    }  # fmt: skip
    with shared.begin() as connection:
        key = connection.execute(database.drift_checks.insert().values(**check)).inserted_primary_key
        assert key is not None
        connection.execute(database.retrains.insert().values(**retrain, drift_check=key[0]))
        found = connection.execute(sa.select(database.drift_checks)).mappings().one()
        assert {name: found[name] for name in check} == check
        assert found["dataset_drift"] is True
        connection.execute(database.models.insert().values(**model))
        assert dict(connection.execute(sa.select(database.models)).mappings().one()) == model
    with shared.connect() as connection, pytest.raises(sa.exc.IntegrityError):
        connection.execute(database.retrains.insert().values(**retrain, drift_check=12345))
