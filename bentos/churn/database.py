"""The two databases the service speaks to without SQLAlchemy: SQLite, and Postgres by psycopg."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

# TCP notices a black hole within these, also one that opens while a connection is idle
POSTGRES_PARAMETERS = {
    "connect_timeout": "5",
    "tcp_user_timeout": "10000",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
}


def is_sqlite(url: str) -> bool:
    """Whether the URL names an SQLite file; raises ValueError for a database nobody here speaks to."""
    found = re.match(r"([a-z0-9+]+)://", url)
    scheme = found[1] if found else ""
    if scheme == "sqlite":
        return True
    if scheme in ("postgresql", "postgresql+psycopg"):
        return False
    wrong = f"{scheme}://" if found else "what has no ://"  # the rest may hold a password
    raise ValueError(f"{wrong} is no database we know; expected sqlite:/// or postgresql+psycopg://")


def sqlite_path(url: str) -> Path:
    """The file of an URL such as `sqlite:////data/churn.db`."""
    return Path(unquote(url.removeprefix("sqlite:///").split("?", 1)[0]))


def open_sqlite(path: Path, *, mode: str, timeout: float) -> sqlite3.Connection:
    """A connection in autocommit mode to a file that must exist."""
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def with_pgoptions(asked: Mapping[str, Any]) -> dict[str, Any]:
    """These parameters of a connection, `options` with what PGOPTIONS says before them.

    libpq would take no notice of PGOPTIONS, and the tables would be those of another schema.
    """
    both = (os.environ.get("PGOPTIONS", ""), str(asked.get("options") or ""))
    return {**asked, "options": " ".join(filter(None, both))} if all(both) else dict(asked)


def open_postgres(url: str) -> Any:
    """A psycopg connection in autocommit mode; what is in the URL comes before `POSTGRES_PARAMETERS`."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        asked = conninfo_to_dict("postgresql://" + url.split("://", 1)[1])
    except psycopg.ProgrammingError:
        asked = {"host": "@"}
    if "@" in str(asked.get("host", "")):  # the driver's own words would repeat a part of the password
        raise ValueError(
            "the database's URL cannot be read; expected postgresql+psycopg://user:password@host:5432/database, "
            "special characters of the password as in https://en.wikipedia.org/wiki/Percent-encoding"
        )
    return psycopg.connect(
        autocommit=True,
        prepare_threshold=None,  # poolers between us and the server do not know prepared statements
        **{**POSTGRES_PARAMETERS, "application_name": "churn-serving", **with_pgoptions(asked)},
    )


@contextlib.contextmanager
def cut_after(connection: Any, seconds: float) -> Iterator[None]:
    """End a psycopg connection when the block takes longer, so that the call that waits on it raises TimeoutError.

    The driver has no such limit, and the server's own statement_timeout does not help when it hangs itself
    or a proxy keeps the connection open with nobody behind it.
    """
    end = socket.socket(fileno=os.dup(connection.fileno()))  # ours: theirs may be another's by then

    late = threading.Event()

    def cut() -> None:
        late.set()
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if late.is_set():
            raise TimeoutError(f"the database did not answer within {seconds:g} s") from None
        raise
    finally:
        timer.cancel()
        end.close()
