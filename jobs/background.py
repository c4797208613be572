"""What a demo leaves running on this machine beside `churn serve`: MLflow's page. And how all of it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from jobs.serving import write_json
from jobs.settings import Settings

MARK = "CHURN_MLFLOW_PAGE"  # in its environment, so that a pid that was given to another program is not stopped
STOP_SECONDS = 15.0


def start_mlflow_page(settings: Settings) -> str:
    """Start MLflow's server on the runs of this home, for this machine only; its address answers in 10 to 25 s."""
    home = settings.home.resolve()
    port = free_port(5000)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", settings.mlflow, "--workers", "1"]
    environment = {
        **os.environ,
        MARK: str(home),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (home / "mlflow-page.log").open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment, cwd=home, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    write_json(home / "mlflow-page.json", {"pid": process.pid, "address": address})
    return address


def wait_for(address: str, seconds: float = 90.0) -> bool:
    """Whether MLflow's page answers within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{address}/health", timeout=2),
        ):
            return True
        time.sleep(0.2)
    return False


def stop(settings: Settings) -> list[str]:
    """Stop `churn serve` and MLflow's page of this home, if they run; what was stopped."""
    from jobs.supervisor import stop_supervisor

    stopped = []
    pid = stop_supervisor(settings)
    if pid is not None:
        stopped.append(f"churn serve (pid {pid})")
    page = settings.home.resolve() / "mlflow-page.json"
    if page.exists():
        left = _processes(settings.home.resolve())
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        while remaining := _processes(settings.home.resolve()):
            if time.monotonic() > end:
                for number in remaining:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
            time.sleep(0.05)
        if left:
            stopped.append(f"MLflow's page at {json.loads(page.read_text())['address']}")
        page.unlink(missing_ok=True)
    return stopped


def _processes(home: Path) -> list[int]:
    """The living processes of the page, workers included, found by the mark in their environment."""
    mark = f"{MARK}={home}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def free_port(wanted: int) -> int:
    """That port, or any free one where it is taken."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            return int(listener.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")
