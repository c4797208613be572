"""`churn serve`: what the Deployment and the kubelet do on Kubernetes, for one machine.

Watches the served tag that `jobs.serving` keeps, runs `bentos.churn.serve` for it, and listens where clients
ask (`jobs.balancer`). A new tag's process is started beside the old one and gets new connections once it is
ready and says that it serves that tag; then the old one is told to end, and finishes what it has. One that
does not become ready is given up, the old one never notices, and the rollout says why. A process that dies is
started again.

Nothing outlives the supervisor: processes carry a mark in their environment by which they are found even when
orphaned (a BentoML worker has a session of its own), and the kernel ends them if the supervisor is killed.
One process per tag: this size has no replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from bentos.churn import archive
from jobs.balancer import Balancer, Target
from jobs.pod import GRACE, POLL, Command, LocalPod, kill, last_line, marked, plain
from jobs.serving import Desired, LocalServing, Pod, Status, try_lock, write_json
from jobs.settings import Settings, load_settings

log = logging.getLogger(__name__)

ATTEMPTS = 3  # a new tag's process may crash this often before the tag is given up
DRAIN = 2  # seconds; enough here, where new connections go elsewhere at once: kept ones are told to close
RETRY = 30.0  # seconds until a tag that was given up is tried again, if nothing else serves
KEPT = 2  # extracted bentos kept beside those in use
LOGS = 20  # logs kept

Fetch = Callable[[str, str, Path], Path]


class AlreadyServing(Exception):
    """Another supervisor serves this home."""


def serve_command(folder: Path, port: int) -> list[str]:
    """The command that serves an extracted bento."""
    return [sys.executable, "-m", "bentos.churn.serve", str(folder), "--port", str(port)]


def serve(
    settings: Settings,
    *,
    until: Callable[[], bool] | None = None,
    command: Command = serve_command,
    fetch: Fetch = archive.fetch,
) -> None:
    """Serve the wanted tag in the foreground until SIGTERM, Ctrl-C or `until`; a second signal does not wait.

    Raises AlreadyServing, and OSError if the port is taken. `command` and `fetch` say how a tag is started.
    """
    asyncio.run(_Supervisor(settings, command, fetch).run(until or (lambda: False)))


class _Supervisor:
    def __init__(self, settings: Settings, command: Command, fetch: Fetch) -> None:
        self._settings = settings
        self._serving = LocalServing(settings)
        self._folder = self._serving.folder
        self._command, self._fetch = command, fetch
        self._env = _service_environment(settings, self._folder)
        self._desired = Desired(generation=-1)
        self._front: LocalPod | None = None  # gets new connections
        self._pods: list[LocalPod] = []
        self._rolling: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._failure: str | None = None
        self._fetching = ""
        self._written: Status | None = None
        self._port = 0
        self._signals = 0
        self._over = False
        self._said: dict[str, float] = {}

    async def run(self, until: Callable[[], bool]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "supervisor.lock").open("a") as lock:
            await self._lock(lock.fileno())
            balancer = Balancer(self._target)
            self._port = await balancer.listen(self._settings.serve_host, self._settings.serve_port)
            self._listen_to_signals()
            run = self._folder / "run"
            self._in_background(self._bury([*run.iterdir()] if run.exists() else []))
            try:
                self._look()
                log.info("listening on %s served_tag=%s", self._serving.url, self._desired.tag)
                while not until() and not self._signals:
                    self._look()
                    await asyncio.sleep(POLL)
            finally:
                balancer.close()
                await self._end()
                await balancer.flush()
                (self._folder / "status.json").unlink(missing_ok=True)
        log.info("result=stopped")

    async def _lock(self, fd: int) -> None:
        for _ in range(20):  # one that only asks holds the lock for an instant
            if try_lock(fd):
                return
            await asyncio.sleep(0.05)
        status = self._serving.status()
        who = f"pid {status.pid} on port {status.port}" if status else "another process that is just starting"
        raise AlreadyServing(f"{self._folder} is served by {who}; stop that one first")

    def _listen_to_signals(self) -> None:
        def count() -> None:
            self._signals += 1

        with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: `until` ends it
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, count)

    def _target(self) -> Target:
        if self._front and self._front.port:
            return Target(self._front.port)
        if self._desired.tag is None:
            return Target(None, "no_model", "no model has been promoted yet: `churn promote`", wait=False)
        pod = self._front or next((pod for pod in self._pods if not pod.stopping), None)
        why = pod.message if pod else self._failure or self._fetching
        given_up = self._failure is not None and not self._front
        return Target(None, "not_ready", f"{self._desired.tag} is not ready: {why}", wait=not given_up)

    def _look(self) -> None:
        """Begin to roll out what is wanted, if that is new."""
        try:
            desired = self._serving.desired()
        except (OSError, RuntimeError) as error:  # what serves must not end for that
            self._say("desired", f"served tag cannot be read, stays {self._desired.tag}: {error}")
            desired = self._desired
        if desired == Desired() and self._desired.tag:
            self._say("gone", f"desired.json is gone; {self._desired.tag} stays until `churn promote` writes it again")
            desired = self._desired
        if desired != self._desired:
            log.info("served_tag %s -> %s fence=%d", self._desired.tag, desired.tag, desired.fence)
            self._desired, self._failure, self._fetching = desired, None, "its archive is being fetched"
            if self._rolling:
                self._rolling.cancel()
            self._rolling = asyncio.create_task(self._roll_out(desired)) if desired.tag else None
            if not desired.tag:
                self._front = None
                for pod in self._pods:
                    self._stop(pod)
        if self._rolling and self._rolling.done() and not self._rolling.cancelled():
            self._rolling.result()  # a fault of this module ends it, rather than serving on deaf
        self._tell()

    def _tell(self) -> None:
        """Write down how far it has come, if that is news."""
        tag = self._desired.tag
        pods = [pod.view() for pod in self._pods]
        if tag and not self._failure and tag not in [pod.bento_tag for pod in pods]:
            pods.append(Pod(plain(tag), "", tag, ready=False, message=self._fetching))
        status = Status(
            os.getpid(), self._settings.serve_host, self._port, self._desired.generation, self._settled(),
            self._failure, tuple(pods),
        )  # fmt: skip
        if status != self._written:
            try:
                write_json(self._folder / "status.json", asdict(status))
                self._written = status
            except OSError as error:  # a full disk
                self._say("status", f"status cannot be written: {error}")

    def _say(self, kind: str, fault: str) -> None:
        """Log a fault that is met at each look once a minute; the words may differ each time, its kind does not."""
        if time.monotonic() - self._said.get(kind, -60.0) >= 60:
            self._said[kind] = time.monotonic()
            log.error("%s", fault)

    def _settled(self) -> bool:
        if not self._pods or not self._rolling or not self._rolling.done():
            return False
        return all(pod.ready and pod.tag == self._desired.tag for pod in self._pods)

    async def _roll_out(self, desired: Desired) -> None:
        """Bring the wanted tag to the front and end the others; if that fails, say why and touch nothing."""
        assert desired.tag  # noqa: S101
        began = time.monotonic()
        while True:
            for pod in self._pods:
                if pod is not self._front and pod.tag != desired.tag:
                    self._stop(pod)
            try:
                pod = await self._bring(desired.tag, desired.soak)
            except _GivenUp as error:
                self._failure = str(error)
                log.error("served_tag %s is given up: %s", desired.tag, error)
            else:
                break
            if self._front:
                return  # it serves on; the next write of desired.json tries again
            await asyncio.sleep(RETRY)
        self._failure = None
        for other in self._pods:
            if other is not pod:
                self._stop(other)
        log.info("served_tag=%s pod=%s in front after %.1f s", pod.tag, pod.name, time.monotonic() - began)

    async def _bring(self, tag: str, soak: float) -> LocalPod:
        """A pod of the tag that is in front, ready, and was so for the soak if another was kept beside it."""
        old = self._front
        pod = next((p for p in self._pods if p.tag == tag and not p.stopping), None) or await self._start(tag)
        try:
            await self._until_ready(pod)
            while pod is not old:
                self._front, since, crashes = pod, time.monotonic(), pod.crashes
                while old and pod.crashes == crashes and time.monotonic() - since < soak:
                    await asyncio.sleep(POLL)
                if pod.crashes == crashes:
                    break
                self._front = old  # which has been kept for this
                await self._until_ready(pod)
        except _GivenUp:
            if pod is not old:
                self._front = old
                self._stop(pod)
            raise
        return pod

    async def _until_ready(self, pod: LocalPod) -> None:
        end = time.monotonic() + self._settings.promotion_deadline.total_seconds()
        while not pod.ready:
            if pod.refusal:
                raise _GivenUp(pod.refusal)
            if pod.crashes >= ATTEMPTS and pod is not self._front:
                raise _GivenUp(f"crashed {pod.crashes} times: {pod.message}")
            if time.monotonic() > end:
                raise _GivenUp(f"not ready within {self._settings.promotion_deadline}: {pod.message}")
            await asyncio.sleep(POLL / 2)

    async def _start(self, tag: str) -> LocalPod:
        """A pod of the tag. Database or disk may be away: that is tried until it works, the tag is not at fault."""
        folder = self._folder / "bentos" / plain(tag)
        for pause in itertools.chain((0.5, 1, 2, 5), itertools.repeat(10)):
            try:
                await asyncio.to_thread(self._fetch, self._settings.database, tag, folder)
                os.utime(folder)  # the last used are kept
                pod = LocalPod(tag, folder, self._command, self._folder, self._env)
            except (archive.ArchiveError, archive.BentoNotFound) as error:
                raise _GivenUp(str(error)) from None
            except Exception as error:  # what can be wrong with a database has no common base
                self._fetching = f"its archive cannot be fetched: {error}"
                log.warning("tag=%s %s; again in %.1f s", tag, self._fetching, pause)
                await asyncio.sleep(pause)
            else:
                self._pods.append(pod)
                return pod
        raise AssertionError("unreachable")

    def _stop(self, pod: LocalPod) -> None:
        if pod.stopping:
            return
        pod.stopping = True

        async def end() -> None:
            await pod.stop(drain=pod.port is not None)
            self._pods.remove(pod)
            log.info("pod=%s tag=%s ended", pod.name, pod.tag)
            await asyncio.to_thread(self._tidy, {path for p in self._pods for path in (p.folder, p.log)})

        self._in_background(end())

    def _in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _bury(self, places: Iterable[Path]) -> None:
        """End what a killed supervisor left. The kernel has told it to already; this waits, and insists."""
        end = time.monotonic() + float(self._env["CHURN_DRAIN_SECONDS"]) + GRACE
        for place in places:
            while marked(place) and time.monotonic() < end and not self._over:
                await asyncio.sleep(POLL)
            await kill(place)
            shutil.rmtree(place, ignore_errors=True)

    def _tidy(self, used: set[Path]) -> None:
        """Drop extracted bentos and logs of long ago."""
        for folder, kept in (("bentos", KEPT), ("logs", LOGS)):
            rest = [path for path in (self._folder / folder).glob("[!.]*") if path not in used]
            for path in sorted(rest, key=lambda path: path.stat().st_mtime, reverse=True)[kept:]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    async def _end(self) -> None:
        """Stop everything, draining; a second signal kills."""
        self._over = True
        if self._rolling:
            self._rolling.cancel()
        for pod in self._pods:
            self._stop(pod)
        asked = self._signals
        while self._ending:
            self._tell()
            if self._signals > max(asked, 1):
                for pod in self._pods:
                    await kill(self._folder / "run" / pod.name)
            await asyncio.sleep(POLL)


class _GivenUp(Exception):
    """Why a tag will not be served."""


def _service_environment(settings: Settings, folder: Path) -> dict[str, str]:
    """What the service is told. Its spool and its draining may be set from outside."""
    own = {
        "CHURN_DATABASE_URL": settings.database,
        "CHURN_ONLINE_STORE_URL": settings.online_store,
        "CHURN_RELEASE": settings.release,
        "CHURN_STALE_AFTER": _duration(settings.stale_after),
        "BENTOML_DO_NOT_TRACK": "true",
        **({"CHURN_SERVE_AS_OF": settings.serve_as_of.isoformat()} if settings.serve_as_of else {}),
    }
    defaults = {"CHURN_SPOOL_DIR": str(folder / "spool"), "CHURN_DRAIN_SECONDS": str(DRAIN)}
    return {**defaults, **os.environ, **own}


def _duration(value: timedelta) -> str:
    """Such as 45d: in the largest unit that is exact, because seconds may have too many digits for a reader."""
    seconds = round(value.total_seconds())
    unit, length = next((u, n) for u, n in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)) if seconds % n == 0)
    return f"{seconds // length}{unit}"


class SupervisorProcess:
    """`churn serve` in a process of its own, which outlives a terminal; stopped at the end of a `with`."""

    def __init__(self, settings: Settings, process: subprocess.Popen[bytes], output: Path) -> None:
        self.serving, self.process, self.output = LocalServing(settings), process, output
        self.pid = process.pid

    @property
    def url(self) -> str:
        """Where clients ask."""
        return self.serving.url

    def stop(self, within: float = DRAIN + GRACE + 10) -> None:
        """Ask it to end, wait, and assert that nothing of it is left."""
        self.process.terminate()
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        left = marked(self.serving.folder / "run")
        if code or left:
            raise RuntimeError(f"ended with code {code}, left {sorted(left)}: {last_line(self.output)}")

    def __enter__(self) -> SupervisorProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()


def start_supervisor(
    settings: Settings, env: Mapping[str, str] | None = None, argv: Iterable[str] = ("-m", "jobs.supervisor")
) -> SupervisorProcess:
    """Start `churn serve` in the background and wait until it listens; its log is serving/supervisor.log."""
    serving = LocalServing(settings)
    serving.folder.mkdir(parents=True, exist_ok=True)
    output = serving.folder / "supervisor.log"
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *argv], env={**os.environ, **as_environment(settings), **(env or {})},
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 30
    while (status := serving.status()) is None or status.pid != process.pid:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RuntimeError(f"supervisor does not listen (code {process.poll()}): {last_line(output)}")
        time.sleep(0.05)
    return SupervisorProcess(settings, process, output)


def stop_supervisor(settings: Settings, within: float = DRAIN + GRACE + 10) -> int | None:
    """Ask the supervisor of this home to end and wait until it has; its pid, None if none runs."""
    serving = LocalServing(settings)
    if (status := serving.status()) is None:
        return None
    os.kill(status.pid, signal.SIGTERM)
    end = time.monotonic() + within
    while serving.status() is not None:
        if time.monotonic() > end:
            raise TimeoutError(f"supervisor {status.pid} still runs {within:.0f} s after SIGTERM")
        time.sleep(0.05)
    return status.pid


def as_environment(settings: Settings) -> dict[str, str]:
    """The settings as variables, for another process that shall have the same."""

    def text(value: object) -> str:
        if isinstance(value, timedelta):
            return _duration(value)
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        return json.dumps(value) if isinstance(value, tuple) else str(value)

    values = {f"CHURN_{name.upper()}": text(value) for name, value in settings if value is not None}
    return {**values, "CHURN_HOME": str(settings.home.resolve())}


def main() -> None:
    """`python -m jobs.supervisor`: what `churn serve` does, without the command line's imports."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every probe
    serve(load_settings())


if __name__ == "__main__":
    main()
