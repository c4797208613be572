"""One holder at a time: a file lock on one machine, freed by the kernel when its holder is gone."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Held(Exception):
    """Another holds the lease; the message says who."""


@contextmanager
def lease(path: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lease for the block, after waiting up to `wait` seconds; raises Held, which names the holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    file.seek(0)
                    raise Held(f"{path.stem} is held by {file.read().strip() or 'another process'}") from None
                time.sleep(0.05)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
