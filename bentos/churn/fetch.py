"""The init container of a serving pod: puts the bento of this pod's tag where the service is started from.

`python -m bentos.churn.fetch` reads CHURN_BENTO_TAG, CHURN_DATABASE_URL and CHURN_BENTO_DIR. Before the first
promotion the tag is empty: it waits until it is ended, because promotion replaces the pod.

What went wrong is told by the exit code, and by one sentence on stderr and in the container's termination log;
promotion reads both from the pod's status:

    1  the world: the database did not answer in time, the disk is full, …; the kubelet starts us again
    2  the environment is wrong
    3  the archive was refused
    4  the database has no such bento

Not part of a bento, and not of the digest of its code.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bentos.churn import archive
from bentos.churn.archive import ArchiveError, BentoNotFound
from bentos.churn.database import is_sqlite

log = logging.getLogger("churn.fetch")

WORLD, ENVIRONMENT, REFUSED, NOT_FOUND = 1, 2, 3, 4  # exit codes
RETRY_SECONDS = 60.0  # no attempt begins later than this
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0
SAY_AGAIN_SECONDS = 60.0
TERMINATION_LOG = "/dev/termination-log"  # the kubelet makes it
MAX_MESSAGE = 1_000  # characters; Kubernetes keeps 4,096 bytes


class Fault(Exception):
    """Why there is no bento, in one sentence, and the exit code that tells whose fault it is."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(" ".join(message.split())[:MAX_MESSAGE])


def main() -> int:
    """The exit code; SIGTERM ends the process at any moment."""
    signal.signal(signal.SIGTERM, _end)  # as PID 1 we would not notice it without a handler
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        tag, url, folder = read_environment(os.environ)
        if not tag:
            _wait()
        # in a thread: this one answers signals, also while looking up the database's name blocks the other
        ThreadPoolExecutor(1).submit(fetch, url, tag, folder).result()
    except Fault as fault:
        sys.stderr.write(f"{fault}\n")
        _leave_message(str(fault))
        return fault.code
    return 0


def read_environment(environ: Mapping[str, str]) -> tuple[str, str, Path]:
    """Tag (or empty text), the database's URL and the folder to make, or a Fault that names what is wrong."""
    wrong = [
        f"{name} is {'empty' if name in environ else 'not set'}; expected {expected}"
        for name, expected in (
            ("CHURN_DATABASE_URL", "the URL of the database that holds the bentos"),
            ("CHURN_BENTO_DIR", "the folder to make, such as /bento/served"),
        )
        if not environ.get(name, "").strip()
    ]
    if "CHURN_BENTO_TAG" not in environ:
        wrong.append("CHURN_BENTO_TAG is not set; expected the tag to fetch, or empty before the first promotion")
    url = environ.get("CHURN_DATABASE_URL", "").strip()
    try:
        if url:
            is_sqlite(url)
    except ValueError as error:
        wrong.append(f"CHURN_DATABASE_URL: {error}")
    if wrong:
        raise Fault(ENVIRONMENT, ". ".join(wrong))
    return environ["CHURN_BENTO_TAG"].strip(), url, Path(environ["CHURN_BENTO_DIR"].strip())


def fetch(url: str, tag: str, folder: Path) -> None:
    """Make `folder` the extracted bento of this tag, asking again while the database does not answer."""
    begun = time.monotonic()
    pause = PAUSE_SECONDS
    while True:
        try:
            archive.fetch(url, tag, folder)
        except ArchiveError as error:
            raise Fault(REFUSED, f"bento {tag} was refused: {error}") from error
        except BentoNotFound as error:
            raise Fault(NOT_FOUND, str(error.args[0])) from error
        except ValueError as error:
            raise Fault(ENVIRONMENT, f"CHURN_DATABASE_URL: {error}") from error
        except Exception as error:
            if time.monotonic() + pause > begun + RETRY_SECONDS:
                raise Fault(
                    WORLD,
                    f"bento {tag} could not be fetched in {time.monotonic() - begun:.0f} s: {error or repr(error)}",
                ) from error
            log.warning("bento %s is asked for again in %g s: %s", tag, pause, " ".join(str(error).split()))
        else:
            log.info("bento %s is in %s after %.1f s", tag, folder, time.monotonic() - begun)
            return
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _wait() -> NoReturn:
    while True:
        log.info(
            "no model was promoted yet (the pod template has no annotation churn/bento-tag), so this pod waits; "
            "the first promotion replaces it"
        )
        time.sleep(SAY_AGAIN_SECONDS)


def _end(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)  # at once: a thread may wait for the database, and the pod's folder goes with the pod


def _leave_message(message: str) -> None:
    try:
        with Path(os.environ.get("CHURN_TERMINATION_LOG") or TERMINATION_LOG).open("r+") as file:  # not made if absent
            file.write(message)
            file.truncate()
    except OSError as error:
        log.debug("no termination log: %s", error)


if __name__ == "__main__":
    sys.exit(main())
