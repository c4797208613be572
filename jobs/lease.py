"""One holder at a time: a file lock here, which the kernel frees when its holder is gone; a Lease on a cluster."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.serving import try_lock
from jobs.settings import Settings


class Held(Exception):
    """Another holds the lease; the message says who."""


@contextmanager
def lease(settings: Settings, name: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the release's lease of that name for the block, after waiting up to `wait` seconds; raises Held.

    The work itself holds it, so that a Job made by hand counts, whatever CronJob it was made from.
    """
    if settings.deployment:
        from jobs import cluster

        held = cluster.lease(settings, name, wait=wait)
    else:
        held = file_lease(lock_file(settings, name), wait=wait)
    with held:
        yield


def is_held(settings: Settings, name: str) -> bool | None:
    """Whether somebody works under that lease; None if nobody here knows. Asking holds a file's for an instant."""
    if settings.deployment:
        from jobs import cluster

        return cluster.holder(settings, name) is not None
    try:
        with lock_file(settings, name).open() as file:
            return not try_lock(file.fileno(), fcntl.LOCK_SH)
    except OSError:
        return None


def lock_file(settings: Settings, name: str) -> Path:
    """The file that is locked on one machine."""
    return settings.home.resolve() / f"churn-{name}.lock"


@contextmanager
def file_lease(path: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a file's lock for the block, after waiting up to `wait` seconds; raises Held, which names the holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        end = time.monotonic() + wait
        while not try_lock(file.fileno()):
            if time.monotonic() >= end:
                file.seek(0)
                raise Held(f"{path.stem} is held by {file.read().strip() or 'another process'}")
            time.sleep(0.05)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
