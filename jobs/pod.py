"""One bento's process on one machine: started, asked whether it is ready, started again when it dies.

What the kubelet does for a pod. Processes carry a mark in their environment by which they are found even when
orphaned (a BentoML worker has a session of its own), and the kernel ends them if the supervisor is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from jobs.serving import REFUSALS, Pod, detail

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between looks at desired.json and at the processes
PROBE = 1.0  # seconds between questions to a process that is ready
UNANSWERED = 30.0  # seconds without an answer to /readyz after which a process is taken for dead
UNREADY = 5.0  # seconds a process may answer that it is not ready before it is started again
GRACE = 30.0  # seconds, after draining, for requests under way and the log's backlog
MARK = "CHURN_POD"

Command = Callable[[Path, int], list[str]]


class LocalPod:
    """One tag's process: started, asked whether it is ready, started again when it dies, until stopped."""

    def __init__(self, tag: str, folder: Path, command: Command, serving: Path, env: dict[str, str]) -> None:
        self.tag, self.folder = tag, folder
        self.ready = False
        self.stopping = False
        self.crashes = 0
        self.refusal: str | None = None  # what it says that starting it again cannot mend
        self.message = "starting"
        self.port: int | None = None  # set from the first readiness to the end of a process
        (serving / "logs").mkdir(exist_ok=True)
        names = (f"{plain(tag)}-{number}" for number in itertools.count(1))
        self.name = next(name for name in names if not (serving / "logs" / f"{name}.log").exists())
        self.log = serving / "logs" / f"{self.name}.log"
        self.log.touch()
        self._command = command
        self._place = serving / "run" / self.name
        self._env = {
            **env,
            "BENTOML_HOME": str(serving / "bentoml"),
            "PROMETHEUS_MULTIPROC_DIR": str(self._place / "prometheus"),
            "TMPDIR": str(self._place / "tmp"),
            MARK: str(self._place),
        }
        self._drain = float(env["CHURN_DRAIN_SECONDS"])
        self._process: asyncio.subprocess.Process | None = None
        self._keeping = asyncio.create_task(self._keep())

    def view(self) -> Pod:
        """What others may know of it."""
        address = f"http://127.0.0.1:{self.port}" if self.port else ""
        return Pod(self.name, address, self.tag, self.ready, self.message)

    async def _keep(self) -> None:
        while True:
            began = time.monotonic()
            try:
                died = await self._live()
            except Exception as error:  # whatever it was, this task must go on: nobody else restarts the process
                died = f"cannot be started or asked: {error!r}"
            self.ready, self.port = False, None
            await self._kill()
            lived = time.monotonic() - began
            self.crashes = self.crashes + 1 if lived < 60 else 1
            pause = min(30.0, 0.1 * 4 ** (self.crashes - 1))
            self.message = f"{died}; its log ends: {last_line(self.log)}"
            log.warning("pod=%s tag=%s %s; again in %.1f s", self.name, self.tag, self.message, pause)
            await asyncio.sleep(pause)

    async def _live(self) -> str:
        """Start a process and stay with it to its death; returns what it died of."""
        port = _free_port()
        shutil.rmtree(self._place, ignore_errors=True)
        self.refusal = None
        for folder in (self._place / "prometheus", self._place / "tmp"):
            folder.mkdir(parents=True)
        with self.log.open("ab") as output:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command(self.folder, port), env=self._env, cwd=self._place, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, preexec_fn=_end_with_parent(),
            )  # fmt: skip
        log.info("pod=%s tag=%s pid=%d port=%d starting", self.name, self.tag, process.pid, port)
        ends = [asyncio.create_task(self._death(process)), asyncio.create_task(self._silence(port))]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for end in ends:
                end.cancel()

    async def _death(self, process: asyncio.subprocess.Process) -> str:
        return f"ended with code {await process.wait()}"

    async def _silence(self, port: int) -> str:
        """Ask whether the process is ready, until it has not answered at all for too long."""
        began = heard = time.monotonic()
        patience = 10 * UNANSWERED
        limits = httpx.Limits(max_keepalive_connections=0)  # a kept one would hold up the process's end
        address = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=address, timeout=5, limits=limits, trust_env=False) as client:
            while time.monotonic() - heard < patience:
                try:
                    self.ready = await self._ask(client)
                    heard, patience = time.monotonic(), UNANSWERED
                except (httpx.HTTPError, ValueError) as error:
                    began, self.ready = time.monotonic(), False
                    self.message = f"/readyz does not answer ({type(error).__name__})"
                if self.ready:
                    self.port = port
                elif not self.port and time.monotonic() - began > UNREADY:
                    return self.message  # what it could not load it will not load; another start may
                await asyncio.sleep(PROBE if self.ready else POLL)
        return f"has not answered /readyz for {patience:.0f} s"

    async def _ask(self, client: httpx.AsyncClient) -> bool:
        answer = await client.get("/readyz")
        if answer.status_code != 200:
            reason = detail(answer.content)
            self.message = f"/readyz says {answer.status_code}: {reason}"
            if any(word in reason for word in REFUSALS):  # what else it says may pass
                self.refusal = self.message
            return False
        if not self.port:  # it is asked once who it is; a process cannot become another
            tag = (await client.get("/info")).json().get("bento_tag")
            if tag != self.tag:
                self.refusal = self.message = f"/info says it is {tag}; expected {self.tag}"
                return False
        self.message = ""
        return True

    async def stop(self, *, drain: bool = True) -> None:
        """End the process, which finishes what it has if that takes no longer than draining and a grace."""
        self.stopping, self.ready, self.message = True, False, "ending"
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        process = self._process
        if drain and process and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self._drain + GRACE)
            except TimeoutError:
                log.warning("pod=%s still runs %.0f s after SIGTERM; killed", self.name, self._drain + GRACE)
        await self._kill()
        shutil.rmtree(self._place, ignore_errors=True)

    async def _kill(self) -> None:
        """Leave no process of this pod, orphans included."""
        await kill(self._place)
        if self._process:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 10)


def _end_with_parent() -> Callable[[], None]:
    """What a child does before it becomes another program: ask for SIGTERM when its parent is gone."""
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def ask() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return ask


def marked(place: Path) -> set[int]:
    """The living processes of a pod, or of all pods of a folder."""
    mark, below = f"{MARK}={place}".encode(), f"{MARK}={place}/".encode()
    return {
        int(environ.parent.name)
        for environ in Path("/proc").glob("[0-9]*/environ")
        if any(variable == mark or variable.startswith(below) for variable in _read(environ).split(b"\0"))
    }


async def kill(place: Path) -> None:
    """Leave no process of a pod."""
    end = time.monotonic() + 10
    while left := marked(place):  # also those born meanwhile
        if time.monotonic() > end:
            log.error("pod=%s processes %s do not end after SIGKILL", place.name, sorted(left))
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.02)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # gone, or another user's


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def plain(tag: str) -> str:
    return tag.replace(":", "-")


def last_line(path: Path) -> str:
    lines = [line for line in _read(path)[-4096:].decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "(empty)"
