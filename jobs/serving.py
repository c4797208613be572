"""What serves, as promotion sees it: the served tag that is wanted, and how far the pods have come.

Two implementations: a Deployment (`jobs.cluster`), and here, for one machine, two files below `home/serving`:
`desired.json`, written by `LocalServing.set_served_tag`, and `status.json`, written by `churn serve`
(`jobs.supervisor`), which does what the kubelet does. Nothing heavy is imported: `promote` looks each minute.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from jobs.settings import Settings

log = logging.getLogger(__name__)

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # pods and Services are behind no proxy

REFUSALS = ("golden", "sha256", "digest")  # words of /readyz that no other start of a bento will mend
WRONG_SETTING = "CHURN_"  # in it where the environment is at fault: any bento would say so
LOCK_FOR = 10.0  # seconds to wait for another writer of desired.json; it holds the lock for milliseconds


@dataclass(frozen=True)
class Pod:
    """One process, or Kubernetes pod, that serves one bento for its whole life."""

    name: str
    address: str  # http://127.0.0.1:41231, empty if it has none yet
    bento_tag: str
    ready: bool
    message: str  # what it waits for, or why it is not ready


@dataclass(frozen=True)
class Rollout:
    """How far what serves has come towards the served tag that is wanted."""

    served_tag: str | None
    pods: tuple[Pod, ...]
    running: bool  # somebody serves at all; False: no `churn serve`, or scaled to zero
    settled: bool  # there are pods, all of them ready and of the wanted tag
    failure: str | None  # why pods of the wanted tag will never be ready; None while they may
    worlds_fault: bool = False  # the failure is not the bento's: an image that cannot be pulled, a quota
    template: int = 0  # changes when anybody changes the pod template; 0 where there is none


def detail(body: bytes) -> str:
    """The sentence in an error of the service, or the beginning of whatever else it is."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["detail"])
    return body.decode("utf-8", "replace").strip()[:300]


class ServedTagChanged(Exception):
    """The served tag is not what the caller believed; somebody else has written it."""

    def __init__(self, expected: str | None, found: str | None) -> None:
        super().__init__(f"served tag is {found}; expected {expected}")
        self.found = found


class StaleFence(Exception):
    """A later promotion has written the served tag: this one is over, or its database is an old copy."""

    def __init__(self, fence: int, found: int) -> None:
        super().__init__(f"served tag was written with fence number {found}; {fence} is lower")
        self.found = found


class Serving(Protocol):
    """What promotion needs of the thing that serves."""

    @property
    def url(self) -> str:
        """Where clients ask, such as http://127.0.0.1:3000."""

    def served_tag(self) -> str | None:
        """The tag that is wanted; what the pods serve meanwhile is in `rollout`."""

    def fence(self) -> int:
        """The number stored with the tag by the last write, 0 if there was none."""

    def set_served_tag(self, *, old: str | None, new: str | None, fence: int, soak: timedelta) -> None:
        """Want `new` if `old` is wanted now; or else raise ServedTagChanged or StaleFence, changing nothing.

        None is nothing, as before the first model.

        `soak`: how long a new pod must stay up beside the old ones before they go.
        """

    def rollout(self) -> Rollout:
        """How far it has come."""

    def tags_in_use(self) -> set[str]:
        """Tags whose archives somebody may still start a pod from."""

    def tell(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Tell the operator what happened, in a word and a sentence, where the platform has a place for it."""


def serving_of(settings: Settings) -> Serving:
    """What serves in this size: a Deployment, or this machine."""
    if settings.deployment:
        from jobs.cluster import KubernetesServing

        return KubernetesServing(settings)
    return LocalServing(settings)


@dataclass(frozen=True)
class Desired:
    """What desired.json says. `generation` counts its writes: each is a new attempt, even at one tag."""

    tag: str | None = None
    fence: int = 0
    soak: float = 0.0
    generation: int = 0
    written_at: str = ""


@dataclass(frozen=True)
class Status:
    """What status.json says: the supervisor's view, of the write of desired.json that it is working on."""

    pid: int
    host: str
    port: int
    generation: int
    settled: bool
    failure: str | None
    pods: tuple[Pod, ...]


class LocalServing:
    """The Serving of one machine: files, between whoever promotes and `churn serve`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.folder = settings.home.resolve() / "serving"

    @property
    def url(self) -> str:
        status = self.status()
        host = status.host if status else self._settings.serve_host
        port = status.port if status else self._settings.serve_port
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  listening there is reached here
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def served_tag(self) -> str | None:
        return self.desired().tag

    def fence(self) -> int:
        return self.desired().fence

    def set_served_tag(self, *, old: str | None, new: str | None, fence: int, soak: timedelta) -> None:
        if new is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*:[A-Za-z0-9][A-Za-z0-9._-]*", new):
            raise ValueError(f"bento tag is {new!r}; expected something like churn:v7-1a2b3c4d")
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "desired.lock"):
            now = self.desired()
            if now.tag != old:
                raise ServedTagChanged(old, now.tag)
            if fence < now.fence:
                raise StaleFence(fence, now.fence)
            written_at = datetime.now(UTC).isoformat(timespec="milliseconds")
            wanted = Desired(new, fence, soak.total_seconds(), now.generation + 1, written_at)
            write_json(self.folder / "desired.json", asdict(wanted))

    def rollout(self) -> Rollout:
        desired, status = self.desired(), self.status()
        if status is None:
            return Rollout(desired.tag, (), running=False, settled=False, failure=None)
        seen = status.generation == desired.generation
        settled, failure = (status.settled, status.failure) if seen else (False, None)
        return Rollout(desired.tag, status.pods, running=True, settled=settled, failure=failure)

    def tags_in_use(self) -> set[str]:
        return {pod.bento_tag for pod in self.rollout().pods}

    def tell(self, reason: str, message: str, *, warning: bool = False) -> None:
        log.debug("%s: %s", reason, message)  # who calls has logged it, and nobody else looks here

    def desired(self) -> Desired:
        """What is wanted, by the last write."""
        path = self.folder / "desired.json"
        found = _read_json(path)
        try:
            return Desired(**found) if found else Desired()
        except TypeError as error:
            raise RuntimeError(f"{path} is not what set_served_tag writes: {error}; remove it") from None

    def status(self) -> Status | None:
        """What the running supervisor last wrote, None if none runs (a killed one leaves its file behind)."""
        found = _read_json(self.folder / "status.json")
        if not found or not _is_locked(self.folder / "supervisor.lock"):
            return None
        return Status(**{**found, "pods": tuple(Pod(**pod) for pod in found["pods"])})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a file as a whole: readers see the old text or the new, also after a power cut."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RuntimeError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RuntimeError(f"{path} holds {type(found).__name__}; expected an object")
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        end = time.monotonic() + LOCK_FOR
        while not try_lock(file.fileno()):
            if time.monotonic() > end:
                raise TimeoutError(f"{path} has been locked by another process for {LOCK_FOR:.0f} s")
            time.sleep(0.02)
        yield


def try_lock(fd: int, how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file without waiting; it is free again when the file is closed or its process is gone."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    """Whether a supervisor lives. Asking locks for an instant, which a supervisor that starts sits out."""
    try:
        with path.open() as file:
            return not try_lock(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
