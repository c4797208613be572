"""The life of the process: killed at any moment, told to stop, orphaned. No answer is lost, no request refused."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.bentos import serving_process
from tests.bentos.conftest import FeastStore
from tests.bentos.serving_process import eventually

REQUESTS = 2_000
CLIENTS = 4


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def logged(database: str) -> list[str]:
    with contextlib.closing(sqlite3.connect(database.removeprefix("sqlite:///"), timeout=10)) as connection:
        return [prediction_id for (prediction_id,) in connection.execute("SELECT prediction_id FROM predictions")]


@pytest.fixture
def own(online: FeastStore, database: str, tmp_path: Path) -> dict[str, str]:
    return serving_process.environment(database=database, online_store=online.url, spool=tmp_path / "spool")


class Client(threading.Thread):
    """Asks until its share is answered, on one connection for as long as that lives; keeps what was answered."""

    def __init__(self, ports: list[int], count: int) -> None:
        super().__init__(daemon=True)
        self.ports, self.count = ports, count  # the last port is the one to ask
        self.answered: list[str] = []
        self.retries = 0
        self.wrong: list[int] = []

    def run(self) -> None:
        connection: http.client.HTTPConnection | None = None
        end = time.monotonic() + 90
        while len(self.answered) < self.count and time.monotonic() < end:
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", self.ports[-1], timeout=3)
                body = json.dumps({"user_id": f"u-{len(self.answered) % 900 + 20:04}"}).encode()
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                with connection.getresponse() as response:
                    answer = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError):
                self.retries += 1
                if connection is not None:
                    connection.close()
                connection = None
                time.sleep(0.02)
                continue
            if connection.sock is None:  # the service said: close
                connection = None
            if response.status == 200:
                self.answered.append(answer["prediction_id"])
            else:
                self.wrong.append(response.status)
        if connection is not None:
            connection.close()


def test_no_answer_is_lost_when_the_worker_is_killed(bento: Path, own: dict[str, str], database: str) -> None:
    """kill -9 at random moments of 2,000 requests; the next process ships what the dead one had answered."""
    chance = random.Random(6)
    moments = sorted(chance.sample(range(100, REQUESTS - 100), 3))
    ports: list[int] = []
    clients = [Client(ports, REQUESTS // CLIENTS) for _ in range(CLIENTS)]

    def answered() -> int:
        return sum(len(client.answered) for client in clients)

    for moment in [*moments, REQUESTS]:
        with serving_process.start(bento, own) as service:
            ports.append(service.port)
            if len(ports) == 1:
                for client in clients:
                    client.start()
            eventually(lambda moment=moment: answered() >= moment, seconds=60, every=0.001)  # type: ignore[misc]
            if moment < REQUESTS:
                worker = service.worker()
                assert worker is not None
                os.kill(worker, signal.SIGKILL)
                os.kill(service.pid, signal.SIGKILL)
    for client in clients:
        client.join(30)

    acknowledged = [prediction_id for client in clients for prediction_id in client.answered]
    rows = logged(database)
    assert len(acknowledged) == REQUESTS
    assert set(acknowledged) - set(rows) == set()
    assert len(rows) == len(set(rows))
    assert len(rows) - REQUESTS <= CLIENTS * len(moments)  # what was in flight at a kill
    assert sum(client.retries for client in clients) >= len(moments)


def test_stopping_refuses_no_request(bento: Path, own: dict[str, str], database: str) -> None:
    """SIGTERM under load: while the listener is open everything is answered, then clients have gone elsewhere."""
    with (
        serving_process.start(bento, {**own, "CHURN_DRAIN_SECONDS": "3"}) as old,
        serving_process.start(bento, own) as new,
    ):
        ports = [old.port]
        clients = [Client(ports, 10**6) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        eventually(lambda: all(len(client.answered) > 50 for client in clients))
        worker = old.worker()
        assert worker is not None

        old.process.terminate()
        ready = eventually(lambda: old.get("/readyz").status == 503 and old.get("/readyz"))
        during = old.post({"user_id": "u-0001"})
        enough = [len(client.answered) + 150 for client in clients]  # on new connections, each closed by its answer
        eventually(lambda: all(len(c.answered) >= n for c, n in zip(clients, enough, strict=True)), every=0.001)
        ports.append(new.port)  # what a balancer does when it sees that
        eventually(lambda: not alive(worker), seconds=15)
        for client in clients:
            client.count = len(client.answered) + 20
        for client in clients:
            client.join(20)

        assert (during.status, during.headers["connection"]) == (200, "close")
        assert ready.headers["connection"] == "close"
        assert old.process.wait(15) == 0
        assert [client.wrong for client in clients] == [[]] * CLIENTS
        assert [client.retries for client in clients] == [0] * CLIENTS
        assert "every prediction is in the database" in old.log
    rows = logged(database)
    acknowledged = {prediction_id for client in clients for prediction_id in client.answered}
    assert acknowledged <= set(rows)
    assert len(rows) == len(set(rows))


def test_draining_takes_as_long_as_it_is_told(bento: Path, own: dict[str, str]) -> None:
    with serving_process.start(bento, {**own, "CHURN_DRAIN_SECONDS": "1.5"}) as service:
        started = time.monotonic()
        service.process.terminate()
        assert eventually(lambda: not service.is_ready())
        assert service.post({"user_id": "u-0001"}).status == 200
        assert service.process.wait(15) == 0

    assert 1.5 <= time.monotonic() - started < 8


def test_the_whole_group_may_be_told_to_stop(bento: Path, own: dict[str, str]) -> None:
    """Ctrl-C, or a supervisor: the worker is told by its parent, and once."""
    with serving_process.start(bento, own) as service:
        os.killpg(service.pid, signal.SIGTERM)
        assert service.process.wait(15) == 0
        assert service.log.count("SIGTERM: no longer ready") == 1


def test_who_comes_too_late_is_refused_not_kept_waiting(bento: Path, own: dict[str, str], tmp_path: Path) -> None:
    """The database is away, so the process lives on to wait for it, with the listener closed."""
    with serving_process.start(bento, {**own, "CHURN_DATABASE_URL": f"sqlite:///{tmp_path}/never.db"}) as service:
        service.post({"user_id": "u-0001"})
        worker = service.worker()
        assert worker is not None
        service.process.terminate()

        def refused() -> bool:
            try:
                service.get("/livez")
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
            return False

        eventually(refused, seconds=5)

        assert alive(worker)
        os.kill(worker, signal.SIGKILL)


def test_a_second_ctrl_c_does_not_wait(bento: Path, own: dict[str, str]) -> None:
    with serving_process.start(bento, {**own, "CHURN_DRAIN_SECONDS": "60"}) as service:
        worker = service.worker()
        assert worker is not None
        service.process.send_signal(signal.SIGINT)
        assert eventually(lambda: not service.is_ready())
        service.process.send_signal(signal.SIGINT)

        assert service.process.wait(5) == 1
        assert not alive(worker)


def test_a_second_sigterm_cuts_nothing_short(bento: Path, own: dict[str, str], database: str) -> None:
    with serving_process.start(bento, own) as service:
        answer = service.post({"user_id": "u-0001"}).json()
        service.process.terminate()
        assert eventually(lambda: not service.is_ready())
        service.process.terminate()

        assert service.process.wait(15) == 0
        assert "every prediction is in the database" in service.log
    assert logged(database) == [answer["prediction_id"]]


def test_a_killed_worker_is_followed_by_another(bento: Path, own: dict[str, str], database: str) -> None:
    """Who comes in between waits in the queue of the socket and is answered: no retry, no other port."""
    with serving_process.start(bento, own) as service:
        asked = []
        for _ in range(3):
            worker = service.worker()
            assert worker is not None
            os.kill(worker, signal.SIGKILL)
            eventually(lambda killed=worker: not alive(killed))  # type: ignore[misc]
            reply = service.post({"user_id": "u-0001"})
            assert reply.status == 200
            asked.append(reply.json()["prediction_id"])
            assert service.worker() != worker
        eventually(lambda: sorted(logged(database)) == sorted(asked))
        assert service.log.count("the worker was killed by signal 9; another starts") == 3
        assert b"churn_worker_restarts_total 3.0\n" in service.get("/metrics").body


def test_a_worker_that_ends_by_itself_ends_the_service(bento: Path, own: dict[str, str], tmp_path: Path) -> None:
    """Another one would do the same: whoever runs the service is to see it end."""
    broken = Path(shutil.copytree(bento, tmp_path / "broken"))
    with (broken / "src" / "bentos" / "churn" / "service.py").open("a") as file:
        file.write("\nraise SystemExit('broken build')\n")
    with serving_process.start(broken, own, wait=False) as service:
        assert service.process.wait(15) == 1
        assert "broken build\nthe worker ended with exit code 1" in service.log


def test_a_worker_that_somebody_ends_is_not_replaced(bento: Path, own: dict[str, str]) -> None:
    """It has shut the socket down, as it should."""
    with serving_process.start(bento, own) as service:
        worker = service.worker()
        assert worker is not None
        os.kill(worker, signal.SIGTERM)

        assert service.process.wait(15) == 1
        assert "the worker ended with exit code -15" in service.log


def test_a_port_that_is_taken(bento: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "bentos.churn.serve", str(bento), "--port", str(port)],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"127.0.0.1:{port}: Address already in use\n")


def test_the_worker_s_parent_is_small() -> None:
    """It lives as long as the pod and needs nothing of BentoML."""
    look = "import bentos.churn.serve, sys; print(*(m for m in sys.modules if m.startswith(('bentoml', 'asyncio'))))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == []


def test_the_worker_ends_with_its_parent(bento: Path, own: dict[str, str], database: str) -> None:
    with serving_process.start(bento, own) as service:
        worker = service.worker()
        answer = service.post({"user_id": "u-0001"}).json()
        assert worker is not None
        os.kill(service.pid, signal.SIGKILL)

        eventually(lambda: not alive(worker), seconds=15)

    assert logged(database) == [answer["prediction_id"]]


def test_a_worker_that_is_still_being_imported_ends_with_its_parent(bento: Path, own: dict[str, str]) -> None:
    with serving_process.start(bento, own, wait=False) as service:
        worker = eventually(service.worker)
        assert worker is not None
        os.kill(service.pid, signal.SIGKILL)

        eventually(lambda: not alive(worker), seconds=30)


def test_a_service_that_starts_beside_another_leaves_its_spool_alone(
    bento: Path, own: dict[str, str], tmp_path: Path, database: str
) -> None:
    """The switch from one bento to the next: both run for a while, on one spool."""
    away = {**own, "CHURN_DATABASE_URL": f"sqlite:///{tmp_path}/never.db"}
    with serving_process.start(bento, away) as first:
        one = first.post({"user_id": "u-0001"}).json()["prediction_id"]
        with serving_process.start(bento, own) as second:
            two = second.post({"user_id": "u-0001"}).json()["prediction_id"]
            eventually(lambda: logged(database) == [two])
            worker = first.worker()
            assert worker is not None
            os.kill(worker, signal.SIGKILL)
            first.process.kill()
            eventually(lambda: sorted(logged(database)) == sorted([one, two]), seconds=15)
