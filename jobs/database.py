"""Our own tables: what was predicted, promoted, registered, packaged, scored, found drifting, and wished for.

SQLAlchemy Core, on SQLite or Postgres. Alembic makes and upgrades the tables; it is imported only when the
stored revision differs from `REVISION`, because `promote` opens the database every minute.
The service writes `predictions` itself, without SQLAlchemy: see `bentos.churn.shipper`.

On Postgres all of it lives in the first schema of the connection's search_path, which is made if need be: with
`PGOPTIONS="-c search_path=churn"`, which every pod of the chart has, releases share a database without meeting.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import (
    Boolean,
    Column,
    Date,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.types import TypeDecorator

from bentos.churn.database import POSTGRES_PARAMETERS, is_sqlite, with_pgoptions

REVISION = "0002"
LOCK_SECONDS = 30  # for another process to finish writing (SQLite) or migrating
STATEMENT_SECONDS = 300  # Postgres ends a statement of a job after this

metadata = MetaData()


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC: `timestamptz` on Postgres, on SQLite text that sorts.

    The text is `datetime.isoformat(timespec="microseconds")`: `2024-02-29T23:59:59.000000+00:00`.
    """

    impl = String(32)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(sa.DateTime(timezone=True) if dialect.name == "postgresql" else String(32))

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; expected an aware datetime")
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.isoformat(timespec="microseconds")

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return (datetime.fromisoformat(value) if isinstance(value, str) else value).astimezone(UTC)


predictions = Table(
    "predictions",
    metadata,
    Column("prediction_id", String(32), primary_key=True),
    Column("request_id", String(128), nullable=False, index=True),
    Column("user_id", String(128), index=True),
    Column("source", String(8), nullable=False),  # client, score or probe
    Column("predicted_at", UTCDateTime, nullable=False, index=True),
    Column("bento_tag", String(128), nullable=False),
    Column("model_version", Integer, nullable=False),
    Column("churn_probability", Float, nullable=False),
    Column("churn", Boolean, nullable=False),
    Column("threshold", Float, nullable=False),
    Column("features_as_of", String(32)),  # null: the features came with the request
    Column("stale", Boolean, nullable=False),
    Column("features", Text, nullable=False),  # JSON, as the model saw them
)

promotions = Table(
    "promotions",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),  # also the fence number
    Column("opened_at", UTCDateTime, nullable=False),
    Column("closed_at", UTCDateTime),  # null: open
    Column("action", String(16), nullable=False),  # promote, rollback, follow, pin, unpin, rebuild
    Column("from_version", Integer),
    Column("from_tag", String(128)),
    Column("to_version", Integer),
    Column("to_tag", String(128)),
    Column("result", String(16)),  # promoted, rolled_back, failed, interrupted
    Column("reason", Text, nullable=False),
    Column("by", String(64), nullable=False),
)
# at most one row is open
Index(
    "promotions_one_open",
    sa.literal_column("(closed_at IS NULL)"),
    unique=True,
    sqlite_where=promotions.c.closed_at.is_(None),
    postgresql_where=promotions.c.closed_at.is_(None),
    _table=promotions,
)

pins = Table(
    "pins",
    metadata,
    Column("id", Integer, primary_key=True),  # one row: 1
    Column("version", Integer, nullable=False),
    Column("bento_tag", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("by", String(64), nullable=False),
    Column("pinned_at", UTCDateTime, nullable=False),
)

bentos = Table(
    "bentos",
    metadata,
    Column("tag", String(128), primary_key=True),
    Column("model_version", Integer, nullable=False),
    Column("run_id", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("archive", LargeBinary, nullable=False),
    Column("built_at", UTCDateTime, nullable=False),
    Column("onnx_sha256", String(64)),  # these three are null where a release before 0002 built it
    Column("model_sha256", String(64)),
    Column("code_digest", String(64)),
)

models = Table(
    "models",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("version", Integer),  # null: not registered yet, or the job was killed before it could note the number
    Column("model_sha256", String(64), nullable=False),
    Column("artifacts", Text, nullable=False),  # JSON: path in the run -> sha256
    Column("data_fingerprint", String(64), nullable=False),
    Column("settings_fingerprint", String(64), nullable=False),
    Column("trained_as_of", Date, nullable=False),
    Column("trained_on", Text, nullable=False),  # days, with commas between; empty: not known
    Column("threshold", Float, nullable=False),
    Column("gate", String(8), nullable=False),
    Column("recorded_by", Text, nullable=False),
    Column("recorded_at", UTCDateTime, nullable=False),
)

scores = Table(
    "scores",
    metadata,
    Column("as_of", UTCDateTime, primary_key=True),
    Column("user_id", String(128), primary_key=True),
    Column("bento_tag", String(128), nullable=False),
    Column("model_version", Integer, nullable=False),
    Column("churn_probability", Float, nullable=False),
    Column("churn", Boolean, nullable=False),
)

drift_checks = Table(
    "drift_checks",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("as_of", UTCDateTime, nullable=False),  # the instant reasoned about
    Column("snapshot", UTCDateTime, nullable=False),  # the current snapshot
    Column("model_version", Integer, nullable=False),
    Column("share", Float, nullable=False),
    Column("drifted_columns", Text, nullable=False),  # JSON list
    Column("dataset_drift", Boolean, nullable=False),
    Column("realised_auc", Float),
    Column("decision", String(16), nullable=False),  # retrain, none, cooldown, waiting, pinned, stopped
    Column("reason", Text, nullable=False),
    Column("run_id", String(64)),
    Column("checked_at", UTCDateTime, nullable=False),
)

retrains = Table(
    "retrains",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("as_of", UTCDateTime, nullable=False),
    Column("wanted_by", String(64), nullable=False),  # drift, or a person
    Column("reason", Text, nullable=False),
    Column("result", String(24)),  # null: wanted or under way; registered, unchanged, waiting_for_labels, failed
    Column("detail", Text),
    Column("version", Integer),
    Column("known_at", UTCDateTime),  # waiting_for_labels: until when
    Column("drift_check", Integer, ForeignKey("drift_checks.id")),
    Column("finished_at", UTCDateTime),
)


class DatabaseError(RuntimeError):
    """The database did not let us work with it, or is not one of ours; names it, without its password."""


def connect(url: str) -> sa.Engine:
    """An engine on our tables, made or upgraded first if need be; raises DatabaseError.

    A database that is newer than this code is refused, and so is one that another program keeps its tables in.
    """
    engine = _engine(url)
    stored = _revision(engine)
    if stored != REVISION:
        if stored is not None and not re.fullmatch(r"\d{4}", stored):
            raise DatabaseError(f"{redact(url)} holds the tables of another program (at its revision {stored})")
        if stored is not None and stored > REVISION:
            raise DatabaseError(
                f"{redact(url)} has revision {stored}, this release knows {REVISION}; use a newer release"
            )
        upgrade(url)
    return engine


def _revision(engine: sa.Engine) -> str | None:
    """The revision of the tables that are there; None if there are none."""
    try:
        with engine.connect() as connection:  # which rolls back, however this ends
            schema = _asked_schema(connection)
            table = f"{_quoted(connection, schema)}.alembic_version" if schema else "alembic_version"
            stored: str | None = connection.exec_driver_sql(f"SELECT version_num FROM {table}").scalar()  # noqa: S608
            return stored
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == "42P01" or "no such table" in str(error.orig):
            return None
        raise _unusable(engine.url, error) from error


def _unusable(url: sa.URL, error: sa.exc.DBAPIError) -> DatabaseError:
    said = " ".join(str(error.orig).split())
    return DatabaseError(f"{url.render_as_string(hide_password=True)} cannot be used: {said}")


@functools.lru_cache(maxsize=8)
def _engine(url: str) -> sa.Engine:
    parsed = _parsed(url)
    if parsed.get_backend_name() != "sqlite":
        engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=_postgres_arguments(parsed))
        sa.event.listen(engine, "connect", _limit_statements)
        return engine
    _make_file(parsed)
    engine = sa.create_engine(parsed, connect_args={"timeout": LOCK_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.execute(
            "PRAGMA journal_mode=WAL"
        )  # also a file that somebody else made: readers and the shipper do not wait for each other
        connection.execute("PRAGMA foreign_keys=ON")

    return engine


def _parsed(url: str) -> sa.URL:
    if not is_sqlite(url):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        parsed = sa.engine.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        parsed = None
    if parsed is None or "@" in (parsed.host or ""):  # the libraries' own words may repeat a part of the password
        raise DatabaseError(
            "the database's URL cannot be read; expected postgresql+psycopg://user:password@host:5432/database, "
            "special characters of the password as in https://en.wikipedia.org/wiki/Percent-encoding"
        ) from None
    return parsed


def _make_file(url: sa.URL) -> None:
    """A new SQLite file appears with its journal mode set: SQLite does not wait for others when it changes that."""
    path = Path(url.database or ":memory:")
    if str(path) == ":memory:" or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        with contextlib.closing(sqlite3.connect(new)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):  # another was faster
            os.link(new, path)


def _postgres_arguments(url: sa.URL) -> dict[str, Any]:
    arguments = {**POSTGRES_PARAMETERS, "application_name": "churn-jobs"}
    missing = {name: value for name, value in arguments.items() if name not in url.query}
    return {**missing, **with_pgoptions({name: url.query[name] for name in url.query if name == "options"})}


def _limit_statements(connection: Any, _: Any) -> None:
    connection.autocommit = True
    connection.execute(f"SET statement_timeout = '{STATEMENT_SECONDS}s'")
    connection.autocommit = False


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the tables to a revision, with Alembic; of several processes at once one does, the others wait."""
    from alembic import command

    _migrate(url, command.upgrade, revision)


def downgrade(url: str, revision: str) -> None:
    """Bring the tables back to an earlier revision; `base` drops them, with everything in them."""
    from alembic import command

    _migrate(url, command.downgrade, revision)


def _migrate(url: str, command: Callable[[Any, str], None], revision: str) -> None:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    ensure_schema(url)
    with _transaction(url) as connection:  # Alembic reads the stored revision when nobody else migrates
        schema = _asked_schema(connection)
        if schema:  # and not what another release has in a later entry of search_path
            connection.exec_driver_sql(f"SET LOCAL search_path TO {_quoted(connection, schema)}")
        config.attributes["connection"] = connection
        command(config, revision)


@contextlib.contextmanager
def _transaction(url: str) -> Iterator[sa.Connection]:
    """One transaction on a connection of its own, in which no other process migrates this database."""
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        _make_file(parsed)
        # isolation_level: else Python begins a transaction when it sees fit, which is not before DDL
        engine = sa.create_engine(
            parsed, poolclass=sa.NullPool, connect_args={"timeout": LOCK_SECONDS, "isolation_level": None}
        )
        lock = ["BEGIN IMMEDIATE"]
    else:
        engine = sa.create_engine(parsed, poolclass=sa.NullPool, connect_args=_postgres_arguments(parsed))
        lock = [f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'", f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"]
    try:
        with engine.begin() as connection:
            for statement in lock:
                connection.exec_driver_sql(statement)
            yield connection
    except sa.exc.DBAPIError as error:
        raise _unusable(parsed, error) from error


_MIGRATION_LOCK = zlib.crc32(b"churn migrations")


def ensure_schema(url: str) -> None:
    """Make the first schema of the connection's search_path if it is not there; on SQLite there is none to make."""
    if is_sqlite(url):
        return
    exists = sa.text("SELECT 1 FROM pg_namespace WHERE nspname = :schema")
    with _transaction(url) as connection:
        schema = _asked_schema(connection)
        if schema and connection.execute(exists, {"schema": schema}).first() is None:
            connection.exec_driver_sql(f"CREATE SCHEMA {_quoted(connection, schema)}")


def _asked_schema(connection: sa.Connection) -> str | None:
    """The first entry of search_path; None if that is `"$user"`, as it is where nothing was asked for."""
    if connection.dialect.name == "sqlite":
        return None
    path = str(connection.exec_driver_sql("SHOW search_path").scalar())
    found = re.match(r'\s*(?:"((?:[^"]|"")*)"|([^\s",]+))', path)
    if not found:
        return None
    schema = found[2].lower() if found[1] is None else found[1].replace('""', '"')
    return None if schema in ("", "$user") else schema


def _quoted(connection: sa.Connection, name: str) -> str:
    quoted: str = connection.dialect.identifier_preparer.quote_identifier(name)
    return quoted


# what bentos.churn.shipper and bentos.churn.archive do, and no more
_SERVING_MAY = (("predictions", "INSERT"), ("bentos", "SELECT"))


def grant_serving(url: str, role: str) -> None:
    """Let the service's database role insert predictions and read bentos; what it may already is not granted again.

    The role may connect to the database: that is for whoever made it to say. Raises DatabaseError if there is no
    such role, or if the rights are not ours to give.
    """
    if is_sqlite(url):
        raise DatabaseError(f"{redact(url)} knows no roles; CHURN_SERVING_ROLE is for PostgreSQL")
    with _transaction(url) as connection:
        if connection.execute(sa.text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}).first() is None:
            raise DatabaseError(
                f"CHURN_SERVING_ROLE is {role!r}; {redact(url)} has no such role, expected one that may connect"
            )
        schema = str(connection.exec_driver_sql("SELECT current_schema()").scalar())
        _grant(connection, role, "USAGE", schema)
        for table, right in _SERVING_MAY:
            _grant(connection, role, right, schema, table)


def _grant(connection: sa.Connection, role: str, right: str, schema: str, table: str | None = None) -> None:
    if table is None:
        may, name = (
            sa.text("SELECT has_schema_privilege(:role, :schema, :right)"),
            f"SCHEMA {_quoted(connection, schema)}",
        )
    else:
        may = sa.text("SELECT has_table_privilege(:role, quote_ident(:schema) || '.' || quote_ident(:table), :right)")
        name = f"TABLE {_quoted(connection, schema)}.{table}"
    asked = {"role": role, "right": right, "schema": schema, **({"table": table} if table else {})}
    if connection.execute(may, asked).scalar():
        return
    connection.exec_driver_sql(f"GRANT {right} ON {name} TO {_quoted(connection, role)}")
    if not connection.execute(may, asked).scalar():  # the server only warns of that
        raise DatabaseError(f"the database does not let us grant {right} on {schema}{f'.{table}' if table else ''}")


def ping(url: str) -> None:
    """Raise DatabaseError if the database does not answer; tables are not needed."""
    try:
        with _engine(url).connect() as connection:
            connection.execute(sa.text("SELECT 1"))
    except sa.exc.DBAPIError as error:
        raise _unusable(_parsed(url), error) from error


def await_answer(url: str, seconds: float) -> None:
    """Return when the database answers; raises what it says after so many seconds. Servers restart."""
    end = time.monotonic() + seconds
    while True:
        try:
            return ping(url)
        except DatabaseError:
            if time.monotonic() > end:
                raise
        time.sleep(1)


def redact(url: str) -> str:
    """The URL without its password, fit for a log."""
    return _parsed(url).render_as_string(hide_password=True)
