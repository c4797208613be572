"""What the service may know of its surroundings: environment variables, read once when the worker starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

Fsync = Literal["never", "batch"]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class ConfigError(ValueError):
    """The environment holds a value the service cannot work with; one line per variable."""


@dataclass(frozen=True)
class Config:
    """Each field is the variable `CHURN_<NAME>`."""

    database_url: str  # predictions, bentos
    online_store_url: str
    spool_dir: Path
    release: str = "churn"
    spool_max_bytes: int = 256 * 2**20  # a full spool answers 503
    spool_fsync: Fsync = "never"  # batch: each request's records reach the disk before its answer
    stale_after: timedelta = timedelta(days=45)
    serve_as_of: date | None = None  # features' age is judged on the end of this day; default: now
    drain_seconds: float = 5.0  # after SIGTERM: how long the listener stays open
    max_concurrency: int = 128  # requests under way before more are told to come later
    api_keys_dir: Path | None = None  # a file for each key of /predict; none: everybody may ask
    probe_token: str = field(default="", repr=False)  # shown by the jobs' own requests, instead of a key too

    @property
    def project(self) -> str:
        """Feast allows no dash in a project's name."""
        return self.release.replace("-", "_")

    def now(self) -> datetime:
        """The instant on which the age of features is judged."""
        if self.serve_as_of is None:
            return datetime.now(UTC)
        return datetime.combine(self.serve_as_of, time(23, 59, 59), UTC)


def _required(text: str) -> str:
    if not text:
        raise ValueError("expected a URL such as sqlite:////data/churn.db")
    return text


def _folder(text: str) -> Path:
    if not text:
        raise ValueError("expected a folder that can be written, such as /var/spool/churn")
    return Path(text)


def _keys(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError("expected an absolute path, such as /etc/churn/keys")
    return Path(text)


def _token(text: str) -> str:
    if not re.fullmatch("[!-~]{16,1024}", text):
        raise ValueError("expected 16 to 1,024 visible ASCII characters")
    return text


def _release(text: str) -> str:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?", text):
        raise ValueError("expected a DNS label such as churn: a-z, 0-9 and -, at most 53 characters")
    return text


def _whole(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,15}", text):
        raise ValueError("expected a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text):
        raise ValueError("expected seconds, such as 5 or 0.5")
    return float(text)


def _fsync(text: str) -> Fsync:
    if text not in get_args(Fsync):
        raise ValueError("expected never or batch")
    return text  # type: ignore[return-value]


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not match:
        raise ValueError("expected a number with its unit, such as 45d, 12h, 5m or 10s")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError("expected a date such as 2024-02-29") from None


_READERS: dict[str, Any] = {
    "database_url": _required,
    "online_store_url": _required,
    "spool_dir": _folder,
    "release": _release,
    "spool_max_bytes": _whole,
    "spool_fsync": _fsync,
    "stale_after": _duration,
    "serve_as_of": _day,
    "drain_seconds": _seconds,
    "max_concurrency": _whole,
    "api_keys_dir": _keys,
    "probe_token": _token,
}
_NEEDED = ("database_url", "online_store_url", "spool_dir")


def read_config(environ: Mapping[str, str]) -> Config:
    """The configuration in these environment variables, or ConfigError that names every wrong one."""
    values: dict[str, Any] = {}
    wrong = []
    for name, read in _READERS.items():
        variable = f"CHURN_{name.upper()}"
        text = environ.get(variable, "").strip()
        if not text and name not in _NEEDED:
            continue
        try:
            values[name] = read(text)
        except ValueError as error:
            shown = repr(text)
            if name.endswith("_url") and text:
                shown = "not a valid URL"  # it may hold a password
            elif name == "probe_token":
                shown = "not a usable token"
            wrong.append(f"{variable} is {shown}; {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return Config(**values)
