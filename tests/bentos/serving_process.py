"""A real service on a free port, for tests of several rooms.

with serving_process.start(folder, environment) as service:
    service.post({"user_id": "a"})
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

START_SECONDS = 40.0
STOP_SECONDS = 30.0

T = TypeVar("T")


def eventually(look: Callable[[], T], *, seconds: float = 15.0, every: float = 0.02, what: str = "") -> T:
    """The first true thing that `look` gives; fails with the last one when the time is over."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what or look} did not come true within {seconds} s; last seen: {found!r}")
        time.sleep(every)


class Reply(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Service:
    """A running service: `url`, the process id of the worker's parent, and its log."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log_path = log

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the worker's parent, which is also its process group."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything it has said."""
        return self.log_path.read_text()

    def worker(self) -> int | None:
        """The process id of the worker, None while there is none."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                with contextlib.suppress(OSError):
                    if b"_bentoml_impl.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return child
        return None

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def get(self, path: str) -> Reply:
        """GET."""
        return self.request("GET", path)

    def post(self, document: Any, **headers: str) -> Reply:
        """POST /predict; `x_request_id=` is the header X-Request-ID."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request(
            "POST", "/predict", json.dumps(document).encode(), {"Content-Type": "application/json", **named}
        )

    def is_ready(self) -> bool:
        """Whether /readyz says so."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get("/readyz").status == 200
        return False

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Return when it is ready; fail with its log if it is not in time, or ends."""
        self._wait(self.is_ready, "ready", seconds)

    def wait_answering(self, seconds: float = START_SECONDS) -> None:
        """Return when it answers at all."""

        def answers() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.get("/livez").status == 200
            return False

        self._wait(answers, "alive", seconds)

    def _wait(self, reached: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not reached():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the service is not {what}; its log:\n{self.log}")
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(STOP_SECONDS)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(*, database: str, online_store: str, spool: Path, **settings: str) -> dict[str, str]:
    """The variables of a service; `drain_seconds="2"` is CHURN_DRAIN_SECONDS."""
    return {
        "CHURN_DATABASE_URL": database,
        "CHURN_ONLINE_STORE_URL": online_store,
        "CHURN_SPOOL_DIR": str(spool),
        "CHURN_DRAIN_SECONDS": "0.5",
        **{f"CHURN_{name.upper()}": value for name, value in settings.items()},
    }


@contextlib.contextmanager
def start(folder: Path, settings: Mapping[str, str], *, wait: bool = True) -> Iterator[Service]:
    """An extracted bento, served from an empty folder, this repository not on its path."""
    with tempfile.TemporaryDirectory(prefix="churn-serve-") as scratch:
        port = free_port()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CHURN_") and k != "PYTHONPATH"}
        log = Path(scratch) / "log"
        (Path(scratch) / "cwd").mkdir()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "bentos.churn.serve", str(folder), "--port", str(port)],
                cwd=Path(scratch) / "cwd", stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**inherited, "BENTOML_DO_NOT_TRACK": "true", "BENTOML_HOME": f"{scratch}/home", **settings},
            )  # fmt: skip
        service = Service(process, port, log)
        try:
            if wait:
                service.wait_ready()
            yield service
        finally:
            try:
                service.stop()
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(5)
