"""The two databases the service speaks to without SQLAlchemy: SQLite, and Postgres by psycopg."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import unquote


def is_sqlite(url: str) -> bool:
    """Whether the URL names an SQLite file; raises ValueError for a database nobody here speaks to."""
    scheme = url.split("://", 1)[0]
    if scheme == "sqlite":
        return True
    if scheme in ("postgresql", "postgresql+psycopg"):
        return False
    raise ValueError(f"{scheme}:// is no database the service knows; expected sqlite:/// or postgresql+psycopg://")


def sqlite_path(url: str) -> Path:
    """The file of an URL such as `sqlite:////data/churn.db`."""
    return Path(unquote(url.removeprefix("sqlite:///").split("?", 1)[0]))


def open_sqlite(path: Path, *, mode: str, timeout: float) -> sqlite3.Connection:
    """A connection in autocommit mode to a file that must exist."""
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def open_postgres(url: str) -> Any:
    """A psycopg connection on which every wait has an end."""
    import psycopg

    return psycopg.connect(
        "postgresql://" + url.split("://", 1)[1],
        connect_timeout=5,
        tcp_user_timeout=10_000,  # a black hole is noticed, too
        application_name="churn-serving",
    )
