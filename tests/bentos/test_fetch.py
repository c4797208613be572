"""The init container: the bento it leaves behind, and what its end tells the kubelet and promotion."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bentos.churn import archive, fetch
from jobs.database import bentos, connect
from tests.bentos.serving_process import eventually
from tests.bentos.test_archive import tar_of
from tests.conftest import REPOSITORY
from tests.stores import Server, free_port
from tests.test_postgres import bring_back, fresh_database

TAG = "churn:v1-aaaaaaaa"
COMMAND = [sys.executable, "-m", "bentos.churn.fetch"]


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of ours, empty."""
    if request.param == "sqlite":
        connect(f"sqlite:///{tmp_path}/churn.db")
        yield f"sqlite:///{tmp_path}/churn.db"
        return
    with fresh_database(request.getfixturevalue("postgres_server")) as url:
        connect(url)
        yield url


def store(url: str, **changes: Any) -> str:
    """Put a bento into the database; its checksum."""
    data = tar_of()
    digest = hashlib.sha256(data).hexdigest()
    row = {"tag": TAG, "model_version": 1, "run_id": "run-1", "sha256": digest, "archive": data,
           "built_at": datetime(2024, 3, 1, tzinfo=UTC), **changes}  # fmt: skip
    with connect(url).begin() as connection:
        connection.execute(bentos.insert().values(**row))
    return digest


def environment(tmp_path: Path, url: str, tag: str = TAG) -> dict[str, str]:
    """The variables of the pod, with a termination log such as the kubelet makes."""
    (tmp_path / "termination-log").touch()
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CHURN_", "PG"))},
        "CHURN_BENTO_TAG": tag,
        "CHURN_DATABASE_URL": url,
        "CHURN_BENTO_DIR": str(tmp_path / "bento" / "served"),
        "CHURN_TERMINATION_LOG": str(tmp_path / "termination-log"),
    }


def run(environ: dict[str, str], code: str = "") -> subprocess.CompletedProcess[str]:
    """The init container's process to its end; with `code`, that runs before it."""
    command = [sys.executable, "-c", f"import sys\nfrom bentos.churn import fetch\n{code}\nsys.exit(fetch.main())"]
    return subprocess.run(
        command if code else COMMAND, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=90, check=False
    )  # fmt: skip


@contextlib.contextmanager
def running(environ: dict[str, str], log: Path, *before: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process, killed at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen([*before, *COMMAND], cwd=REPOSITORY, env=environ, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def message(tmp_path: Path) -> str:
    """What promotion reads from the pod's status."""
    return (tmp_path / "termination-log").read_text()


def test_the_bento_is_where_the_service_is_started_from(url: str, tmp_path: Path) -> None:
    digest = store(url)

    done = run(environment(tmp_path, url))

    assert done.returncode == 0, done.stderr
    assert archive.is_complete(tmp_path / "bento" / "served", digest)
    assert [path.name for path in (tmp_path / "bento").iterdir()] == ["served"]
    assert message(tmp_path) == ""
    assert run(environment(tmp_path, url)).returncode == 0, "again, as after a restart of the node"


def test_a_bento_that_is_not_there_is_4(url: str, tmp_path: Path) -> None:
    done = run(environment(tmp_path, url))

    assert done.returncode == 4
    assert message(tmp_path) == f"the database has no bento '{TAG}'"
    assert done.stderr.splitlines() == [message(tmp_path)]


def test_a_bento_that_is_refused_is_3(url: str, tmp_path: Path) -> None:
    store(url, sha256="0" * 64)

    done = run(environment(tmp_path, url))

    assert done.returncode == 3
    assert message(tmp_path).startswith(f"bento {TAG} was refused: the archive has sha256 ")
    assert message(tmp_path) in done.stderr
    assert not (tmp_path / "bento" / "served").exists()


SOON = "fetch.RETRY_SECONDS = 1.0"


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_database_that_does_not_answer_is_1(kind: str, tmp_path: Path) -> None:
    """It is asked again before that; nothing says the password."""
    away = {
        "sqlite": f"sqlite:///{tmp_path}/not/there.db",
        "postgres": f"postgresql+psycopg://churn:hunter2@127.0.0.1:{free_port()}/churn",
    }

    done = run(environment(tmp_path, away[kind]), SOON)

    assert done.returncode == 1
    assert done.stderr.count("is asked for again in") == 1
    assert message(tmp_path).startswith(f"bento {TAG} could not be fetched in ")
    assert "\n" not in message(tmp_path)
    assert "hunter2" not in done.stderr + message(tmp_path)


def test_a_database_without_our_tables_is_1(postgres_server: Server, tmp_path: Path) -> None:
    """Or in another schema: no fault of the model."""
    with fresh_database(postgres_server) as url:
        done = run(environment(tmp_path, url), SOON)

    assert done.returncode == 1
    assert 'relation "bentos" does not exist' in message(tmp_path)


def test_a_full_disk_is_1(url: str, tmp_path: Path) -> None:
    store(url)
    (tmp_path / "bento").touch()  # as good as: nothing can be written there

    assert run(environment(tmp_path, url), SOON).returncode == 1


def test_a_database_that_comes_back_is_waited_for(mortal: Server, tmp_path: Path) -> None:
    with fresh_database(mortal) as url:
        digest = store(url)
        mortal.stop()
        log = tmp_path / "log"
        try:
            with running(environment(tmp_path, url), log) as process:
                eventually(lambda: "is asked for again" in log.read_text())
                bring_back(mortal)
                assert process.wait(20) == 0
        finally:
            if mortal.process.poll() is not None:  # type: ignore[union-attr]
                bring_back(mortal)
    assert archive.is_complete(tmp_path / "bento" / "served", digest)


@pytest.fixture
def mortal() -> Iterator[Server]:
    """A server of this test's own."""
    from tests import stores

    with stores.postgres() as server:
        yield server


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"CHURN_DATABASE_URL": None}, "CHURN_DATABASE_URL is not set; expected the URL"),
        ({"CHURN_DATABASE_URL": " "}, "CHURN_DATABASE_URL is empty; expected the URL"),
        ({"CHURN_DATABASE_URL": "mysql://u:hunter2@db/churn"}, "mysql:// is no database we know"),
        ({"CHURN_DATABASE_URL": "postgresql://u:hun%zzter2@db/churn"}, "the database's URL cannot be read"),
        ({"CHURN_BENTO_DIR": None, "CHURN_DATABASE_URL": ""}, ". CHURN_BENTO_DIR is not set; expected the folder"),
        ({"CHURN_BENTO_TAG": None}, "CHURN_BENTO_TAG is not set; expected the tag to fetch, or empty"),
        ({"CHURN_BENTO_TAG": "", "CHURN_BENTO_DIR": ""}, "CHURN_BENTO_DIR is empty"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(" ", "-")[:40],
)
def test_a_wrong_environment_is_2(changes: dict[str, str | None], says: str, tmp_path: Path) -> None:
    """Before the first promotion, too."""
    environ = {**environment(tmp_path, f"sqlite:///{tmp_path}/churn.db"), **changes}

    done = run({name: value for name, value in environ.items() if value is not None})

    assert done.returncode == 2
    assert says in message(tmp_path)
    assert done.stderr.splitlines() == [message(tmp_path)]
    assert "ter2" not in done.stderr


def test_outside_of_kubernetes_no_termination_log_is_made(tmp_path: Path) -> None:
    environ = environment(tmp_path, "")
    (tmp_path / "termination-log").unlink()

    assert run(environ).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_before_the_first_promotion_it_waits_and_says_so(tmp_path: Path) -> None:
    code = "fetch.SAY_AGAIN_SECONDS = 0.2; import threading, os; threading.Timer(0.7, lambda: os.kill(os.getpid(), 15)).start()"

    done = run(environment(tmp_path, "sqlite:////nowhere/churn.db", tag=""), code)

    assert done.returncode == 143
    assert 3 <= len(done.stderr.splitlines()) <= 5
    for line in done.stderr.splitlines():
        assert "no model was promoted yet" in line
        assert "so this pod waits; the first promotion replaces it" in line


def ends_at_once(process: subprocess.Popen[bytes], pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(10) == 143
    assert time.monotonic() - started < 1


def test_waiting_ends_at_once_though_it_is_process_1(tmp_path: Path) -> None:
    """The kernel keeps from process 1 what it has no handler for, but SIGKILL."""
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace of processes can be made here")
    log = tmp_path / "log"
    with running(environment(tmp_path, "sqlite:////n/churn.db", tag=""), log, unshare, "--pid", "--fork", "--kill-child") as process:  # fmt: skip
        eventually(lambda: "so this pod waits" in log.read_text())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        assert "NSpid:" in (status := Path(f"/proc/{children[0]}/status").read_text())
        assert next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == "1"
        ends_at_once(process, int(children[0]))


def test_it_ends_at_once_while_the_database_does_not_answer(tmp_path: Path) -> None:
    """The listener takes the connection and says nothing."""
    import socket

    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://churn@127.0.0.1:{silent.getsockname()[1]}/churn"
        with running(environment(tmp_path, url), log) as process:
            silent.settimeout(10)
            connection, _ = silent.accept()
            ends_at_once(process, process.pid)
            connection.close()


BLOCKED = """
import ctypes, os, threading
lock, libc = (ctypes.c_byte * 64)(), ctypes.CDLL(None)
fetch.archive.fetch = lambda *_: [libc.pthread_mutex_lock(lock) for _ in range(2)]
threading.Timer(0.5, os.kill, (os.getpid(), 15)).start()
threading.Timer(20, os._exit, (99,)).start()
"""


def test_it_ends_at_once_while_a_call_blocks_that_no_signal_interrupts(tmp_path: Path) -> None:
    """As the look-up of the database's name does."""
    assert run(environment(tmp_path, "sqlite:////n/churn.db"), BLOCKED).returncode == 143


HEAVY = ("bentoml", "numpy", "onnxruntime", "tenacity", "sqlalchemy", "pandas", "pyarrow", "sklearn", "mlflow", "feast")


def test_it_needs_nothing_heavy() -> None:
    code = f"import sys, bentos.churn.fetch; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_a_message_fits_the_termination_log() -> None:
    assert len(str(fetch.Fault(1, "word \n" * 5_000)).encode()) < 4_096
