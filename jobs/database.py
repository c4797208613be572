"""Our own tables: what was predicted, promoted, packaged, scored, found drifting, and wished for.

SQLAlchemy Core, on SQLite or Postgres. Alembic makes and upgrades the tables; it is imported only when the
stored revision differs from `REVISION`, because `promote` opens the database every minute.
The service writes `predictions` itself, without SQLAlchemy: see `bentos.churn.shipper`.
"""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import (
    Boolean,
    Column,
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

REVISION = "0001"

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
    Column("decision", String(16), nullable=False),  # retrain, none, cooldown, waiting, pinned
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


def connect(url: str) -> sa.Engine:
    """An engine on our tables, made or upgraded first if need be; raises if the database is newer than this code."""
    engine = _engine(url)
    with engine.connect() as connection:
        try:
            stored = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        except sa.exc.DatabaseError:
            stored = None
    if stored != REVISION:
        if stored is not None and stored > REVISION:
            raise RuntimeError(
                f"{redact(url)} has revision {stored}, this release knows {REVISION}; use a newer release"
            )
        upgrade(url)
    return engine


@functools.lru_cache(maxsize=8)
def _engine(url: str) -> sa.Engine:
    parsed = sa.engine.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 5})
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": 30})

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")  # readers and the shipper do not wait for each other
        connection.execute("PRAGMA foreign_keys=ON")

    return engine


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the tables to a revision, with Alembic."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    command.upgrade(config, revision)


def redact(url: str) -> str:
    """The URL without its password, fit for a log."""
    return sa.engine.make_url(url).render_as_string(hide_password=True)
