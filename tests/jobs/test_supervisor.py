"""`churn serve`: a supervisor in a process of its own, stand-ins for bentos, then two real bentos.

A stand-in is an HTTP server in a process of its own that answers what a bento answers, and misbehaves as its
archive says. What a test asks of the supervisor it asks through `LocalServing` and the address clients use.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest

from bentos.churn.archive import ArchiveError, BentoNotFound
from jobs.balancer import Balancer, Target
from jobs.pod import MARK
from jobs.serving import LocalServing, Rollout
from jobs.settings import Settings
from jobs.supervisor import SupervisorProcess, as_environment, serve, start_supervisor, stop_supervisor
from tests.broken_bentos import changed, wrong_golden

if TYPE_CHECKING:
    from bentos.churn.packaging import Built

log = logging.getLogger(__name__)
V1, V2, V3 = "churn:v1-aa", "churn:v2-bb", "churn:v3-cc"
T = TypeVar("T")
STAND_IN = ("-c", "from tests.jobs.test_supervisor import serve_stand_ins; serve_stand_ins()")


# --- stand-ins: what the supervisor's process runs instead of bentos --------------------------------------


def serve_stand_ins() -> None:
    """A supervisor whose archives are JSON files that say how to behave."""
    from jobs.settings import load_settings

    settings = load_settings()

    def fetch(_: str, tag: str, dest: Path) -> Path:
        archive = settings.home / f"{tag}.json"
        if not archive.exists():
            raise BentoNotFound(f"the database has no bento {tag!r}")
        if "torn" in archive.read_text():
            raise ArchiveError("the archive has sha256 00, expected 11")
        json.loads(archive.read_text())  # one that is no JSON stands for a database that is away
        dest.mkdir(parents=True, exist_ok=True)
        (dest / "behave.json").write_text(archive.read_text())
        return dest

    code = f"import sys\n{inspect.getsource(stand_in)}\nstand_in(*sys.argv[1:])"  # without this file's imports
    serve(settings, fetch=fetch, command=lambda folder, port: [sys.executable, "-c", code, str(folder), str(port)])


def stand_in(folder: str, port: str) -> None:
    """Answer as a bento does; `behave.json` may ask for one of the ways to fail."""
    import json
    import os
    import signal
    import threading
    import time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from pathlib import Path

    behave = json.loads((Path(folder) / "behave.json").read_text())
    if "crash" in behave:
        sys.exit(3)
    draining = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 0.5  # an idle connection is closed after this

        def do_GET(self) -> None:
            if self.path == "/readyz":
                refusal = behave.get("not_ready") or ("draining" if draining.is_set() else None)
                return self.answer(503 if refusal else 200, {"error": "not_ready", "detail": refusal})
            if self.path == "/slow":
                draining.wait(20)
            return self.answer(200, {"bento_tag": behave["tag"], "pid": os.getpid()})

        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if draining.is_set():
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = False  # the end waits for answers under way

    server = Server(("127.0.0.1", int(port)), Handler)

    def drain() -> None:
        draining.set()
        time.sleep(float(os.environ["CHURN_DRAIN_SECONDS"]))
        server.shutdown()

    def end(*_: object) -> None:
        if "deaf" not in behave:
            threading.Thread(target=drain).start()

    signal.signal(signal.SIGTERM, end)
    server.serve_forever(poll_interval=0.05)
    server.server_close()


# --- what tests do ----------------------------------------------------------------------------------------


def eventually(look: Callable[[], T], holds: Callable[[T], object], within: float = 20) -> T:
    """What `look` gives once it holds; fails with what it saw last."""
    end = time.monotonic() + within
    while True:
        seen = look()
        if holds(seen):
            return seen
        assert time.monotonic() < end, f"not within {within} s; last seen: {seen}"
        time.sleep(0.02)


class Home:
    """One machine's folder, with archives of stand-ins."""

    def __init__(self, path: Path, **changes: object) -> None:
        self.path = path
        self.settings = Settings(home=path, serve_port=0, promotion_deadline="15s", **changes)  # type: ignore[arg-type]
        self.serving = LocalServing(self.settings)
        self.started: list[SupervisorProcess] = []
        self._fence = 0

    def archive(self, tag: str, /, **behave: object) -> None:
        (self.path / f"{tag}.json").write_text(json.dumps({"tag": tag, **behave}))

    def want(self, tag: str, soak: float = 0) -> None:
        self._fence += 1
        self.serving.set_served_tag(
            old=self.serving.served_tag(), new=tag, fence=self._fence, soak=timedelta(seconds=soak)
        )

    def settled(self, tag: str) -> Rollout:
        return eventually(self.serving.rollout, lambda r: r.settled and r.served_tag == tag)

    def failed(self) -> str:
        rollout = eventually(self.serving.rollout, lambda r: r.failure)
        assert rollout.failure and not rollout.settled
        return rollout.failure

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.serving.url}/info", timeout=20).json()
        return found

    def tags(self) -> list[str]:
        return [pod.bento_tag for pod in self.serving.rollout().pods]

    def processes(self) -> dict[int, str]:
        """The living processes that serve this home, orphans included."""
        mark = f"{MARK}={self.path}/".encode()
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes():
                    found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found

    def supervise(self, argv: tuple[str, ...], drain: float) -> SupervisorProcess:
        env = {"CHURN_DRAIN_SECONDS": str(drain), "PYTHONPATH": str(Path(__file__).parents[2])}
        self.started.append(start_supervisor(self.settings, env, argv=argv))
        return self.started[-1]

    def clean_up(self) -> None:
        """Leave nothing behind, also after a test that failed."""
        for supervisor in self.started:
            supervisor.process.kill()
            supervisor.process.wait()
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.clean_up()


@pytest.fixture
def home(empty: Home) -> Home:
    """A home with three tags that can be served."""
    for tag in (V1, V2, V3):
        empty.archive(tag)
    return empty


def supervise(home: Home) -> SupervisorProcess:
    return home.supervise(STAND_IN, drain=0.3)


class Client:
    """Asks without a pause until it is told to stop, and counts what comes back."""

    def __init__(self, url: str, *, keep_alive: bool, ask: Callable[[httpx.Client], httpx.Response]) -> None:
        self.answers: Counter[str] = Counter()
        self.order: list[str] = []
        self.failures: list[str] = []
        self.stop = threading.Event()
        self._url, self._keep_alive, self._ask = url, keep_alive, ask
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        limits = httpx.Limits(max_keepalive_connections=None if self._keep_alive else 0)
        with httpx.Client(base_url=self._url, timeout=20, limits=limits, trust_env=False) as client:
            while not self.stop.is_set():
                try:
                    answer = self._ask(client)
                    answer.raise_for_status()
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                else:
                    tag = answer.json()["bento_tag"]
                    self.answers[tag] += 1
                    if self.order[-1:] != [tag]:
                        self.order.append(tag)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(30)


@contextmanager
def clients(url: str, ask: Callable[[httpx.Client], httpx.Response]) -> Iterator[tuple[Client, Client]]:
    """One that keeps its connection, one with a connection for each request."""
    with Client(url, keep_alive=True, ask=ask) as first, Client(url, keep_alive=False, ask=ask) as second:
        yield first, second


def ask_info(client: httpx.Client) -> httpx.Response:
    return client.get("/info")


# --- before there is a model ------------------------------------------------------------------------------


def test_without_a_model_requests_are_told_so(home: Home) -> None:
    with supervise(home):
        answer = httpx.post(f"{home.serving.url}/predict", json={"user_id": "a"}, headers={"X-Request-ID": "r-1"})
        rollout = home.serving.rollout()

    assert answer.status_code == 503
    assert answer.json()["error"] == "no_model"
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "r-1"
    assert (rollout.running, rollout.settled, rollout.pods) == (True, False, ())


def test_a_body_larger_than_the_socket_takes_does_not_cost_the_client_its_answer(home: Home) -> None:
    with supervise(home):
        answer = httpx.post(f"{home.serving.url}/predict", content=b"x" * 3_000_000)

    assert answer.json()["error"] == "no_model"


def test_the_first_model_is_served_when_it_comes(home: Home) -> None:
    """A request that arrives while it starts waits for it."""
    with supervise(home):
        home.want(V1)
        eventually(home.serving.rollout, lambda r: r.pods)

        assert home.info()["bento_tag"] == V1

        (pod,) = home.settled(V1).pods
        assert (pod.bento_tag, pod.ready, pod.message) == (V1, True, "")
        assert httpx.get(f"{pod.address}/info").json()["bento_tag"] == V1


# --- a new tag --------------------------------------------------------------------------------------------


def test_a_switch_costs_no_request(home: Home) -> None:
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        with clients(home.serving.url, ask_info) as asking:
            for tag in (V2, V1):
                home.want(tag)
                home.settled(tag)
                before = [client.answers.total() for client in asking]
                eventually(
                    lambda b=before: [c.answers.total() - n for c, n in zip(asking, b, strict=True)],  # type: ignore[misc]
                    lambda more: min(more) > 20,
                )

    assert [client.failures for client in asking] == [[], []]
    assert [client.order for client in asking] == [[V1, V2, V1]] * 2


def test_a_request_under_way_is_finished_by_the_process_that_has_it(home: Home) -> None:
    """It is answered by the old process when that is told to end, long after the new one is in front."""
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        answers: list[httpx.Response] = []
        slow = threading.Thread(target=lambda: answers.append(httpx.get(f"{home.serving.url}/slow", timeout=30)))
        slow.start()
        home.want(V2)
        home.settled(V2)
        slow.join(20)

    assert [answer.json()["bento_tag"] for answer in answers] == [V1]


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        ({"crash": True}, "crashed 3 times: ended with code 3"),
        ({"not_ready": "golden rows differ by 0.5"}, "golden rows differ by 0.5"),
        ({"tag": "churn:v9-99"}, "/info says it is churn:v9-99; expected churn:v2-bb"),
        ({"torn": True}, "the archive has sha256 00, expected 11"),
    ],
    ids=["crashes", "golden rows differ", "is another", "archive refused"],
)
def test_a_bad_tag_is_given_up_and_the_old_one_never_notices(home: Home, behave: dict[str, Any], reason: str) -> None:
    home.archive(V2, **behave)
    home.want(V1)
    with supervise(home):
        pid = (home.settled(V1), home.info()["pid"])[1]
        with clients(home.serving.url, ask_info) as asking:
            home.want(V2)
            assert reason in home.failed()
            eventually(home.tags, lambda tags: tags == [V1])
            assert home.info()["pid"] == pid

            home.want(V1)
            home.settled(V1)
            assert home.info()["pid"] == pid  # back at once: nothing had to start

    assert [client.failures for client in asking] == [[], []]
    assert [client.order for client in asking] == [[V1], [V1]]


def test_a_tag_that_does_not_become_ready_fails_at_the_deadline(home: Home) -> None:
    home.settings = home.settings.model_copy(update={"promotion_deadline": timedelta(seconds=10)})
    home.archive(V1, not_ready="warming up")
    home.want(V1)
    with supervise(home):
        failure = home.failed()

        answer = httpx.get(f"{home.serving.url}/info", timeout=20)

    assert "not ready within 0:00:10" in failure and "warming up" in failure
    assert (answer.status_code, answer.json()["error"]) == (503, "not_ready")
    assert "warming up" in answer.json()["detail"]


def test_a_failed_tag_is_tried_again_when_it_is_written_again(home: Home) -> None:
    home.archive(V2, crash=True)
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        home.want(V2)
        home.failed()
        home.archive(V2)

        home.want(V2)

        home.settled(V2)
        assert home.info()["bento_tag"] == V2


def test_a_wish_changed_in_the_middle_is_followed(home: Home) -> None:
    home.archive(V2, not_ready="warming up")
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        home.want(V2)
        eventually(home.tags, lambda tags: tags == [V1, V2])

        home.want(V3)

        home.settled(V3)
        eventually(home.tags, lambda tags: tags == [V3])


def test_the_soak_keeps_the_old_process(home: Home) -> None:
    """Going back during the soak needs no start: the old process is still there."""
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        pid = home.info()["pid"]
        home.want(V2, soak=60)
        eventually(home.info, lambda info: info["bento_tag"] == V2)
        rollout = eventually(home.serving.rollout, lambda rollout: all(pod.ready for pod in rollout.pods))
        assert [pod.bento_tag for pod in rollout.pods] == [V1, V2]
        assert not rollout.settled

        home.want(V1)

        home.settled(V1)
        assert home.info()["pid"] == pid


def test_a_new_process_that_crashes_in_its_soak_gives_way_to_the_old(home: Home) -> None:
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        home.want(V2, soak=60)
        for _ in range(3):
            info = eventually(home.info, lambda info: info["bento_tag"] == V2)
            os.kill(info["pid"], signal.SIGKILL)
            eventually(home.info, lambda info: info["bento_tag"] == V1)

        assert "crashed 3 times" in home.failed()
        eventually(home.tags, lambda tags: tags == [V1])


def test_old_extracted_bentos_go(home: Home) -> None:
    tags = [f"churn:v{n}-aa" for n in range(1, 5)]
    with supervise(home):
        for tag in tags:
            home.archive(tag)
            home.want(tag)
            home.settled(tag)

        kept = {tag.replace(":", "-") for tag in tags[-3:]}
        eventually(lambda: {path.name for path in (home.serving.folder / "bentos").iterdir()}, lambda f: f == kept)


def test_a_database_that_is_away_is_waited_for_and_nobody_blamed(home: Home) -> None:
    """The tag may still come: no failure, and the old one serves."""
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        (home.path / f"{V2}.json").write_text("not yet")
        home.want(V2)
        rollout = eventually(home.serving.rollout, lambda r: "cannot be fetched" in r.pods[-1].message)
        assert (rollout.pods[-1].bento_tag, rollout.failure, home.info()["bento_tag"]) == (V2, None, V1)

        home.archive(V2)

        home.settled(V2)


def test_a_broken_wish_changes_nothing(home: Home) -> None:
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        desired = home.serving.folder / "desired.json"
        good = desired.read_text()
        desired.write_text("{")
        log_file = home.serving.folder / "supervisor.log"
        eventually(log_file.read_text, lambda text: f"stays {V1}" in text)
        assert home.info()["bento_tag"] == V1
        desired.write_text(good)

        home.want(V2)

        home.settled(V2)


def test_a_wish_that_is_gone_changes_nothing(home: Home) -> None:
    """Status says to remove one that is damaged; the next write counts from 1 again."""
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        (home.serving.folder / "desired.json").unlink()
        log_file = home.serving.folder / "supervisor.log"
        eventually(log_file.read_text, lambda text: f"is gone; {V1} stays" in text)
        assert home.info()["bento_tag"] == V1

        home.want(V2)

        home.settled(V2)


# --- bad days ---------------------------------------------------------------------------------------------


def test_a_killed_process_is_started_again_and_new_connections_wait_for_it(home: Home) -> None:
    home.want(V1)
    with supervise(home):
        home.settled(V1)
        pid = home.info()["pid"]

        os.kill(pid, signal.SIGKILL)

        assert home.info()["pid"] != pid  # asked at once
        home.settled(V1)
        assert len(home.processes()) == 1


def test_a_killed_supervisor_leaves_no_process_and_the_next_one_serves(home: Home) -> None:
    home.want(V1)
    supervisor = supervise(home)
    home.settled(V1)
    assert home.processes()

    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.process.wait(10)

    assert not home.serving.rollout().running
    eventually(home.processes, lambda left: not left)
    with supervise(home):
        home.settled(V1)


def test_what_a_killed_supervisor_left_is_ended_by_the_next(home: Home) -> None:
    """A process that does not heed the kernel's SIGTERM lives on until somebody insists."""
    home.archive(V1, deaf=True)
    home.want(V1)
    supervisor = supervise(home)
    home.settled(V1)
    left = set(home.processes())
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.process.wait(10)
    home.archive(V2)
    home.want(V2)

    with supervise(home):
        home.settled(V2)
        assert left & set(home.processes())

    assert not home.processes()


def test_sigterm_ends_everything_after_the_requests_under_way(home: Home) -> None:
    home.want(V1)
    supervisor = supervise(home)
    home.settled(V1)
    with socket.create_connection(("127.0.0.1", int(home.serving.url.rpartition(":")[2])), timeout=20) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: httpx.get(f"{home.serving.url}/info").status_code, lambda status: status == 200)

        supervisor.stop()

        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    assert supervisor.process.returncode == 0
    assert not home.processes()
    assert not (home.serving.folder / "status.json").exists()


def test_a_second_signal_does_not_wait(home: Home) -> None:
    home.archive(V1, deaf=True)
    home.want(V1)
    supervisor = supervise(home)
    home.settled(V1)

    supervisor.process.send_signal(signal.SIGINT)
    eventually(home.serving.status, lambda status: status is None or not status.pods[0].ready)
    supervisor.process.send_signal(signal.SIGINT)

    assert supervisor.process.wait(5) == 0
    assert not home.processes()


def test_a_second_supervisor_names_the_first(home: Home) -> None:
    with supervise(home) as first:
        port = home.serving.url.rpartition(":")[2]

        with pytest.raises(RuntimeError, match=rf"is served by pid {first.pid} on port {port}; stop that one first"):
            supervise(home)


def test_a_running_supervisor_can_be_stopped_by_its_folder(home: Home) -> None:
    supervisor = supervise(home)

    assert stop_supervisor(home.settings) == supervisor.pid
    assert stop_supervisor(home.settings) is None
    supervisor.process.wait(10)


def test_settings_reach_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path, serve_as_of="2024-02-29", stale_after="90m", candidates=("dummy",))

    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)

    assert Settings() == settings


# --- the balancer -----------------------------------------------------------------------------------------


def through_a_balancer(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
    ask: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
) -> Any:
    """What `ask` returns when it speaks to `serve` through a balancer."""

    async def run() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        balancer = Balancer(lambda: Target(port))
        reader, writer = await asyncio.open_connection("127.0.0.1", await balancer.listen("127.0.0.1", 0))
        try:
            return await asyncio.wait_for(ask(reader, writer), 20)
        finally:
            writer.close()
            balancer.close()
            server.close()

    return asyncio.run(run())


def test_what_a_client_says_before_its_end_is_answered_after_it() -> None:
    """A half-closed connection still carries the answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])
        writer.close()

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"abc" * 1_000_000)
        writer.write_eof()
        return await reader.read()

    assert through_a_balancer(serve, ask) == b"cba" * 1_000_000


def test_a_process_is_not_read_faster_than_its_client_reads() -> None:
    sent = 0

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < 200 * 2**20:
            writer.write(b"x" * 2**16)
            await writer.drain()
            sent += 2**16

    async def ask(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> int:
        await reader.read(1)
        seen = -1
        while seen != sent:  # until nothing moves any more
            seen = sent
            await asyncio.sleep(0.3)
        return seen

    assert through_a_balancer(serve, ask) < 50 * 2**20


def test_the_end_of_a_process_ends_its_client_after_the_last_byte() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * 5_000_000)
        writer.close()

    async def ask(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> int:
        return len(await reader.read())

    assert through_a_balancer(serve, ask) == 5_000_000


def test_a_connection_waits_for_a_process_and_then_no_longer() -> None:
    async def run() -> bytes:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            balancer = Balancer(lambda: Target(unused.getsockname()[1]), connect_for=0.2)
            reader, writer = await asyncio.open_connection("127.0.0.1", await balancer.listen("127.0.0.1", 0))
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return await asyncio.wait_for(reader.read(), 10)

    answer = asyncio.run(run())

    assert answer.startswith(b"HTTP/1.1 503 ") and b'"error": "not_ready"' in answer


# --- real bentos ------------------------------------------------------------------------------------------

COLUMNS = ("tenure_months", "monthly_fee")
FEATURES = [
    {"name": name, "view": "subscriptions_profile", "kind": "float", "categories": None, "null_category": None,
     "default": None, "low": 0.0, "high": 1000.0, "description": ""}
    for name in COLUMNS
]  # fmt: skip


def tiny_bento(version: int) -> Built:
    """Two columns and a logistic regression; each version has its own coefficients."""
    import numpy as np
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline

    from bentos.churn.packaging import build

    rng = np.random.default_rng(version)
    frame = pd.DataFrame(rng.uniform(0, 100, (300, 2)), columns=list(COLUMNS))
    target = (frame["tenure_months"] + rng.normal(0, 20, 300) < 40).astype(int)
    encode = ColumnTransformer([("numbers", "passthrough", list(COLUMNS))])
    pipeline = Pipeline([("encode", encode), ("model", LogisticRegression(max_iter=2000))]).fit(frame, target)
    return build(
        pipeline, version=version, run_id=f"run{version}", model_sha256=f"{version:064x}",
        trained_as_of=date(2024, 1, 31), threshold=0.5, features=FEATURES, reference=frame, golden_rows=20,
    )  # fmt: skip


def with_wrong_golden_rows(bento: Built, tag: str) -> Built:
    """The same bento under another tag, with the right checksum, but its first golden score is another."""
    archive = changed(
        bento.archive,
        {
            "src/model/golden.json": wrong_golden,
            "src/model/model.json": lambda data: json.dumps(json.loads(data) | {"bento_tag": tag}).encode(),
        },
    )
    return replace(bento, tag=tag, archive=archive, sha256=hashlib.sha256(archive).hexdigest())


@pytest.fixture(scope="module")
def bentos() -> dict[int, Built]:
    """Versions 1 and 2, and 3, whose golden rows are wrong."""
    first, second = tiny_bento(1), tiny_bento(2)
    return {1: first, 2: second, 3: with_wrong_golden_rows(second, "churn:v3-badbadba")}


@pytest.fixture
def real(empty: Home, bentos: dict[int, Built]) -> Home:
    from sqlalchemy import insert

    from jobs import database

    rows = [
        {"tag": bento.tag, "model_version": version, "run_id": f"run{version}", "sha256": bento.sha256,
         "archive": bento.archive, "built_at": datetime(2024, 3, 1, tzinfo=UTC)}
        for version, bento in bentos.items()
    ]  # fmt: skip
    with database.connect(empty.settings.database).begin() as connection:
        connection.execute(insert(database.bentos), rows)
    return empty


def ask_predict(client: httpx.Client) -> httpx.Response:
    return client.post("/predict", json={"features": {"tenure_months": 12.0, "monthly_fee": 30.0}})


def test_real_bentos_are_switched_refused_and_started_again(real: Home, bentos: dict[int, Built]) -> None:
    """The whole life of a home: first model, promotion under load, a bad bento, kills at two depths, the end."""
    first, second, bad = (bentos[version].tag for version in (1, 2, 3))
    real.want(first)
    supervisor = real.supervise(("-m", "jobs.supervisor"), drain=1)
    real.settled(first)
    with clients(real.serving.url, ask_predict) as asking:
        eventually(lambda: [client.answers[first] for client in asking], lambda seen: min(seen) > 20)
        began = time.monotonic()
        real.want(second)
        eventually(lambda: [client.answers[second] for client in asking], lambda seen: min(seen) > 20)
        log.info("answers %.1f s after it was wanted", time.monotonic() - began)
        real.settled(second)
        log.info("settled %.1f s after it was wanted", time.monotonic() - began)

        real.want(bad)
        assert "golden rows differ by 0.1" in real.failed()
        eventually(real.tags, lambda tags: tags == [second])
        real.want(second)
        real.settled(second)
    assert [client.failures for client in asking] == [[], []]
    assert [client.order for client in asking] == [[first, second]] * 2

    (worker,) = [pid for pid, command in real.processes().items() if "_bentoml_impl.worker" in command]
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    eventually(real.processes, lambda alive: worker not in alive)
    with Client(real.serving.url, keep_alive=True, ask=ask_predict) as again:
        eventually(lambda: again.answers[second], lambda seen: seen > 0)
        log.info("answers %.1f s after its worker was killed", time.monotonic() - killed)
        assert len(real.settled(second).pods) == 1
    assert again.order == [second]

    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.process.wait(10)
    eventually(real.processes, lambda left: not left)
    answered = sum(client.answers.total() for client in (*asking, again))
    with sqlite3.connect(real.path / "churn.db") as database:
        assert database.execute("SELECT count(*) FROM predictions").fetchone() == (answered,)
