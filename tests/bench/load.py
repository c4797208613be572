"""Start a service, load it with wrk, and see what it took: time, CPU, memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from tests.stores import free_port

START_SECONDS = 60.0
STOP_SECONDS = 30.0
SETTLE_SECONDS = 0.3  # after a load: what was logged is shipped, and counts

_SCRIPT = Path(__file__).with_name("post.lua")
_TICK = os.sysconf("SC_CLK_TCK")


def wrk() -> str | None:
    """The client, from Debian's package wrk; None if it is not installed."""
    return shutil.which("wrk")


def run_wrk(url: str, users: Path, concurrency: int, seconds: int, host: str = "") -> dict[str, Any]:
    """What one run of wrk counted: requests, latencies in ms, errors by kind. `users` is a file, an id a line."""
    program = wrk()
    assert program is not None
    command = [program, "--threads", "1", "--connections", str(concurrency), "--duration", f"{seconds}s"]
    command += ["--timeout", "30s", "--latency", "--script", str(_SCRIPT), url, "--", str(users), host]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"wrk failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    row: dict[str, Any] = json.loads(lines[-1])
    row["rps"] = row["requests"] / row["seconds"]
    return row


class Process:
    """A service that runs."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.started = time.perf_counter()

    def wait_ready(self) -> float:
        """Seconds from its start until /readyz said 200; to be asked right after the start."""
        end = self.started + START_SECONDS
        while True:
            with suppress(OSError, ValueError), Connection(self.port, timeout=START_SECONDS) as connection:
                if connection.exchange(b"GET /readyz HTTP/1.1\r\nHost: bench\r\n\r\n")[0] == 200:
                    return time.perf_counter() - self.started
            if self.process.poll() is not None or time.perf_counter() > end:
                raise RuntimeError(f"the service is not ready; its log ends:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)

    def memory(self) -> tuple[float, float]:
        """MB: resident sizes added up, and the same with what processes share counted once."""
        rss = pss = 0
        for pid in tree(self.process.pid):
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Rss:"):
                        rss += int(line.split()[1])
                    elif line.startswith("Pss:"):
                        pss += int(line.split()[1])
        return rss / 1024, pss / 1024

    def first_answers(self, users: Sequence[str]) -> tuple[float, float]:
        """Milliseconds of the first answer to /predict, and the median of those behind it, on one connection."""
        with Connection(self.port, timeout=10) as connection:
            times = []
            for user in users:
                began = time.perf_counter()
                status, body = connection.post(user)
                times.append(time.perf_counter() - began)
                if status != 200:
                    raise RuntimeError(f"user {user}: {status} {body[:300]!r}; log:\n{self.log.read_text()[-3000:]}")
        return times[0] * 1e3, statistics.median(times[1:]) * 1e3

    def scores(self, users: Sequence[str]) -> np.ndarray:
        """The probabilities it gives."""
        with Connection(self.port, timeout=10) as connection:
            return np.array([json.loads(connection.post(user)[1])["churn_probability"] for user in users])

    def load(self, users: Path, concurrency: int, seconds: int, stores: Sequence[int] = ()) -> dict[str, Any]:
        """One run of wrk: what it counted, the CPU that the service took for a request, and how busy others were.

        `stores` are processes that serve the service: they are neither part of it nor strangers.
        """
        before = self._cpu(stores)
        row = run_wrk(f"http://127.0.0.1:{self.port}", users, concurrency, seconds)
        if not row["requests"]:
            raise RuntimeError(f"no request was answered in {seconds} s; log:\n{self.log.read_text()[-3000:]}")
        time.sleep(SETTLE_SECONDS)
        service, ours, all_of_it, clock = (b - a for a, b in zip(before, self._cpu(stores), strict=True))
        row["cpu_us"] = service / row["requests"] * 1e6
        row["other_cores"] = max(0.0, all_of_it - ours) / clock
        return row

    def _cpu(self, stores: Sequence[int]) -> tuple[float, float, float, float]:
        """Seconds of CPU so far: the service, all that belongs to the measurement, the machine; then the clock."""
        service = cpu_of(self.process.pid)
        client = resource.getrusage(resource.RUSAGE_CHILDREN)
        ours = service + sum(map(cpu_of, stores)) + client.ru_utime + client.ru_stime
        return service, ours + time.process_time(), _machine_cpu(), time.monotonic()


def tree(root: int) -> list[int]:
    """A process and everything below it, by id."""
    pids, at = [root], 0
    while at < len(pids):
        with suppress(OSError):
            for children in Path(f"/proc/{pids[at]}/task").glob("*/children"):
                pids += [int(pid) for pid in children.read_text().split()]
        at += 1
    return pids


@contextmanager
def on_one_core(*roots: int, apart: Sequence[int] = ()) -> Iterator[None]:
    """This thread, what it starts, and processes with all below them share a core; those `apart` get the others.

    For calls that wait for each other: of client, service and store only one works at a time. On cores of their own
    each would be woken by way of the hypervisor, 30 µs and more that have nothing to do with what is measured. With one
    core there is nothing to share out.
    """
    every = sorted(os.sched_getaffinity(0))
    if len(every) < 2:
        yield
        return
    _put([os.getpid()], every[:1])
    _put([pid for root in roots for pid in tree(root)], every[:1])
    _put([pid for root in apart for pid in tree(root)], every[1:])
    try:
        yield
    finally:
        _put([os.getpid(), *(pid for root in (*roots, *apart) for pid in tree(root))], every)


def _put(pids: Sequence[int], cores: Sequence[int]) -> None:
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(OSError):  # it has just ended
                os.sched_setaffinity(int(thread.name), cores)


def cpu_of(root: int) -> float:
    """Seconds of user and system time so far of a process and everything below it."""
    ticks = 0
    for pid in tree(root):
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICK


def _machine_cpu() -> float:
    """Seconds all cores were busy or taken away, so far."""
    user, nice, system, _idle, _waiting, *rest = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / _TICK


class Connection:
    """A kept connection, as lean as a client in Python can be."""

    def __init__(self, port: int, timeout: float) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        self._socket.sendall(request)
        answer = b""
        while True:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionResetError("closed before the answer's end")
            answer += received
            head, _, body = answer.partition(b"\r\n\r\n")
            if b"\r\n\r\n" in answer:
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                if not lengths or len(body) >= int(lengths[0].split(b":")[1]):
                    return int(head.split(b" ", 2)[1]), body

    def post(self, user: str) -> tuple[int, bytes]:
        """POST /predict."""
        body = json.dumps({"user_id": user}).encode()
        head = "POST /predict HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length:"
        return self.exchange(f"{head} {len(body)}\r\n\r\n".encode() + body)


@contextmanager
def serve(command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None) -> Iterator[Process]:
    """Run a service; `{port}` in its command becomes a free one. Nothing of it is left at the end."""
    with tempfile.TemporaryDirectory(prefix="churn-bench-") as name:
        scratch = Path(name)
        port = free_port()
        log = scratch / "log"
        (scratch / "prometheus").mkdir()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CHURN_") and k != "PYTHONPATH"}
        private = {
            "BENTOML_HOME": str(scratch / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "true",
            "PROMETHEUS_MULTIPROC_DIR": str(scratch / "prometheus"),
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [part.replace("{port}", str(port)) for part in command], env={**inherited, **private, **environment},
                cwd=cwd or scratch, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            yield Process(process, port, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(5)


def uvicorn(application: str) -> list[str]:
    """The command for an ASGI application, with the fast loop and parser and no access log."""
    return [
        sys.executable, "-m", "uvicorn", application, "--host", "127.0.0.1", "--port", "{port}", "--loop", "uvloop",
        "--http", "httptools", "--no-access-log", "--log-level", "warning",
    ]  # fmt: skip
