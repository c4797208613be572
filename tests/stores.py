"""Real PostgreSQL and Redis servers in small: on free ports, with data folders of their own, ended with the test.

Debian's packages postgresql and redis-server have the programs; where they are missing, tests skip and say so.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

START_SECONDS = 30.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A running server process: `url`, and `stop`, `start` for tests that take it away."""

    def __init__(self, command: Sequence[str], port: int, url: str, log: Path, user: str | None = None) -> None:
        self.command, self.port, self.url, self.log, self.user = command, port, url, log, user
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=output, user=self.user)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"{self.command[0]} does not listen: {self.log.read_text()[-2000:]}") from None
                time.sleep(0.05)
            else:
                return

    def stop(self, *, kill: bool = False) -> None:
        """End it, by its process id, and wait until it is gone."""
        if self.process is None or self.process.poll() is not None:
            return
        if kill:
            self.process.kill()
        else:
            self.process.send_signal(signal.SIGINT)  # PostgreSQL waits for every client on SIGTERM
        self.process.wait(timeout=30)


@contextmanager
def redis(folder: Path) -> Iterator[Server]:
    """A Redis server that keeps its data below `folder`: redis://127.0.0.1:<port>/0."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("no redis-server here: apt-get install redis-server")
    port = free_port()
    command = [
        program,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    server = Server(command, port, f"redis://127.0.0.1:{port}/0", folder / "redis.log")
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parent.parent.name))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    return Path(on_path).resolve().parent


@contextmanager
def postgres() -> Iterator[Server]:
    """A PostgreSQL server with an empty database: postgresql+psycopg://churn@127.0.0.1:<port>/churn.

    It refuses to run as root, so there it runs as Debian's user `postgres`, in a folder of that user.
    """
    programs = _postgres_programs()
    user = None
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user = "postgres"
    folder = Path(tempfile.mkdtemp(prefix="churn-postgres-"))
    if user:
        shutil.chown(folder, user, user)
    data = folder / "data"
    port = free_port()
    initdb = [str(programs / "initdb"), "-D", str(data), "-U", "churn", "--auth", "trust", "--no-sync", "-E", "UTF8"]
    try:
        done = subprocess.run(initdb, user=user, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        options = ["-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-c", "fsync=off"]
        log = folder / "server.log"
        log.touch()
        command = [str(programs / "postgres"), "-D", str(data), *options]
        server = Server(command, port, f"postgresql+psycopg://churn@127.0.0.1:{port}/churn", log, user)
        server.start()
        try:
            _create_database(port)
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _create_database(port: int) -> None:
    import psycopg

    end = time.monotonic() + START_SECONDS
    while True:
        try:
            with psycopg.connect(f"postgresql://churn@127.0.0.1:{port}/postgres", autocommit=True) as connection:
                connection.execute("CREATE DATABASE churn")
            return
        except psycopg.OperationalError as error:  # it listens before it lets anybody in
            if time.monotonic() > end:
                raise AssertionError(f"PostgreSQL lets nobody in: {error}") from None
            time.sleep(0.1)
