"""Clients as a service meets them: many at once, steady ones, and some who promise more than they send.

Each is one process with one thread that waits on all its connections, so that a client takes a tenth of a core
and the times are the service's. An answer's time is taken when the client wakes up, for all answers that are
there by then; what arrives while it reads them waits for its next look, and that wait is in its figure.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import resource
import select
import socket
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

BATCH = 64  # answers read at one look
ANSWER_SECONDS = 20.0
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


class Exchange(NamedTuple):
    """One request: when it was due, by time.monotonic(), the seconds until all of its answer was there, the answer."""

    due: float
    seconds: float
    answer: bytes  # empty: the connection was closed instead

    @property
    def status(self) -> int:
        """The answer's; 0 if there was none."""
        return int(self.answer[9:12] or 0)

    @property
    def request_id(self) -> str:
        """What its header X-Request-ID says."""
        return self.answer.partition(b"\r\nx-request-id: ")[2].partition(b"\r\n")[0].decode()


def post(body: bytes, *headers: str, kind: str = "application/json", method: str = "POST") -> bytes:
    """A whole request to /predict."""
    lines = [f"{method} /predict HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    if kind:
        lines.append(f"Content-Type: {kind}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def look_up(user: str) -> bytes:
    """A good request."""
    return post(json.dumps({"user_id": user}).encode())


def is_whole(answer: bytes) -> bool:
    """Whether all that the answer announces is there."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(found) and len(body) >= int(length or 0)


def converse(port: int, parts: Iterable[bytes]) -> bytes:
    """Send all of it, or as much as is taken, and read one answer; empty if the connection was closed without."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while not is_whole(answer) and (received := connection.recv(65536)):
                answer += received
        return answer


def allow_many_files() -> None:
    """As many open connections as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Connections:
    """Many connections, each with one request on its way at most, behind one epoll."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._received: dict[int, bytes] = {}

    def __enter__(self) -> _Connections:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._sockets.values():
            opened.close()
        self._epoll.close()

    def open(self) -> int:
        """Open one more; its number."""
        opened = socket.create_connection(("127.0.0.1", self._port), timeout=ANSWER_SECONDS)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = opened.fileno()
        self._sockets[number] = opened
        self._epoll.register(number, select.EPOLLIN)
        return number

    def ready(self, count: int) -> list[int]:
        """Open so many, each used once: the service has let them all in."""
        numbers = [self.open() for _ in range(count)]
        for number in numbers:
            self.send(number, LIVEZ)
        waiting = set(numbers)
        end = time.monotonic() + ANSWER_SECONDS
        while waiting:
            now, answers = self.answers(1.0)
            assert now < end, f"{len(waiting)} of {count} connections had no answer"
            waiting -= {number for number, answer in answers if answer}
        return numbers

    def send(self, number: int, data: bytes) -> None:
        """Send a request; that it could not be sent shows as an answer that is empty."""
        self._received[number] = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sockets[number].sendall(data)

    def close(self, number: int) -> None:
        """Close one, which the service has closed too."""
        self._sockets.pop(number).close()  # epoll forgets it by itself

    def answers(self, seconds: float) -> tuple[float, list[tuple[int, bytes]]]:
        """When the client woke up, `seconds` from now at most, and who had an answer by then; empty: it was closed."""
        events = self._epoll.poll(max(0.0, seconds), BATCH)
        now = time.monotonic()
        whole = []
        for number, _ in events:
            data = b""
            with contextlib.suppress(ConnectionResetError):
                data = self._sockets[number].recv(65536)
            answer = self._received[number] = self._received.get(number, b"") + data
            if not data or is_whole(answer):
                whole.append((number, answer if data else b""))
        return now, whole


def hammer(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> list[Exchange]:
    """On every connection one request after the other, the next when the last is answered, whatever the answer is.

    `seconds` are without the time to open the connections.
    """
    done: list[Exchange] = []
    sent: dict[int, float] = {}
    with _Connections(port) as opened:

        def ask(number: int) -> None:
            sent[number] = time.monotonic()
            opened.send(number, requests[(len(done) + number) % len(requests)])

        for number in opened.ready(connections):
            ask(number)
        end = time.monotonic() + seconds
        while sent:  # also what was asked just before the end is waited for
            now, answers = opened.answers(ANSWER_SECONDS)
            if not answers and now > end + ANSWER_SECONDS:
                raise AssertionError(f"{len(sent)} requests of {connections} clients were never answered")
            for number, answer in answers:
                done.append(Exchange(sent[number], now - sent.pop(number), answer))
                if not answer:
                    opened.close(number)
                if now < end:
                    ask(number if answer else opened.open())
    return done


@contextlib.contextmanager
def probing(port: int, every: float) -> Iterator[list[float]]:
    """As a kubelet does: GET /readyz on a connection of its own; in the list the seconds each took, inf if refused."""
    ended = threading.Event()
    found: list[float] = []

    def probe() -> None:
        while not ended.wait(every):
            begun = time.monotonic()
            answer = converse(port, [b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"])
            found.append(time.monotonic() - begun if answer[9:12] == b"200" else math.inf)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join(ANSWER_SECONDS)


def stroll(port: int, requests: Sequence[bytes], per_second: float, seconds: float) -> list[Exchange]:
    """Requests at a constant rate, whether or not earlier ones were answered; their time counts from when they were due."""
    done: list[Exchange] = []
    due: dict[int, float] = {}
    free: list[int] = []
    begun = time.monotonic()
    count = round(per_second * seconds)
    asked = 0
    with _Connections(port) as opened:
        while asked < count or due:
            moment = begun + asked / per_second if asked < count else begun + seconds + ANSWER_SECONDS
            now, answers = opened.answers(moment - time.monotonic())
            for number, answer in answers:
                if number not in due:  # it was kept open for nothing long enough
                    free.remove(number)
                else:
                    done.append(Exchange(due[number], now - due.pop(number), answer))
                if answer:
                    free.append(number)
                else:
                    opened.close(number)
            if now >= moment:
                if asked == count:
                    raise AssertionError(f"{len(due)} of {count} requests were never answered")
                number = free.pop() if free else opened.open()
                due[number] = moment
                opened.send(number, requests[asked % len(requests)])
                asked += 1
    return done


# --- a crowd ----------------------------------------------------------------------------------------------


class Crowd(NamedTuple):
    """What became of those who only take up room."""

    open: float  # connections that the service's process had at once, in the mean
    reopened: int  # connections in place of those that the service had closed
    statuses: dict[int, int]  # of the half-sent


@contextlib.contextmanager
def crowd(port: int, worker: int, half: bytes, *, halves: int, idle: int) -> Iterator[list[Crowd]]:
    """`halves` connections that send `half` and no more, `idle` ones that send nothing or nothing more.

    What the service closes is opened again at once. They are there when the body of `with` begins, and what became
    of them is in the list when it has ended.
    """
    context = multiprocessing.get_context("spawn")  # a process of its own: a thread would take its time from ours
    ours, theirs = context.Pipe()
    process = context.Process(target=_crowd, args=(theirs, port, worker, half, halves, idle), daemon=True)
    process.start()
    found: list[Crowd] = []
    try:
        assert ours.poll(ANSWER_SECONDS), "the crowd is not complete"
        ours.recv()
        yield found
        ours.send("end")
        assert ours.poll(ANSWER_SECONDS), "the crowd does not go"
        found.append(ours.recv())
    finally:
        process.terminate()
        process.join(ANSWER_SECONDS)


def _crowd(asked: Connection[Any, Any], port: int, worker: int, half: bytes, halves: int, idle: int) -> None:
    allow_many_files()
    sends: dict[int, bytes] = {}
    statuses: dict[int, int] = {}
    reopened, next_look = 0, 0.0
    looks: list[int] = []
    with _Connections(port) as opened:

        def come(data: bytes) -> None:
            number = opened.open()
            sends[number] = data
            if data:
                opened.send(number, data)

        for i in range(max(halves, idle)):  # in a second, so that they are not all closed at the same moment
            if i < halves:
                come(half)
            if i < idle:
                come(LIVEZ if i % 2 else b"")
            time.sleep(1 / max(halves, idle))
        asked.send("there")
        while not asked.poll():
            now, answers = opened.answers(0.1)
            for number, answer in answers:
                if answer:
                    if sends[number] is half:
                        status = int(answer[9:12])
                        statuses[status] = statuses.get(status, 0) + 1
                else:
                    opened.close(number)
                    come(sends.pop(number))
                    reopened += 1
            if now > next_look:
                next_look = now + 0.5
                looks.append(_sockets(worker))
    asked.send(Crowd(statistics.mean(looks), reopened, statuses))


def _sockets(pid: int) -> int:
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count
