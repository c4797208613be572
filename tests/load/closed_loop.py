"""Clients that ask as fast as they are answered, and keep every answer; one thread for all of them.

    with closed_loop.Load(port, users, connections=8) as load:
        ...
    load.answers, load.broken, load.refused

`load` of the benchmark counts what came back; here it is known which request each answer belongs to, so that the
log can be held against them. A connection that breaks is opened anew, and asks something else: what happened to
the request under way is not known, and it is kept in `broken`.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from typing import NamedTuple

from tests.bentos.serving_process import Service

ANSWER_SECONDS = 20.0  # a request that takes longer has been forgotten
CONNECT_SECONDS = 5.0
AGAIN_SECONDS = 0.02  # between two tries to connect
FINISH_SECONDS = 30.0


class Answer(NamedTuple):
    """A complete 200."""

    request_id: str
    body: bytes
    at: float  # time.monotonic()


class Broken(NamedTuple):
    """A request whose connection ended before its answer was there."""

    request_id: str
    why: str
    at: float


class Refused(NamedTuple):
    """A complete answer that is none."""

    request_id: str
    status: int
    body: bytes


class _Client:
    """One kept connection."""

    __slots__ = ("received", "request_id", "sent_at", "socket", "try_at")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.request_id = ""  # under way; empty: none
        self.received = b""
        self.sent_at = 0.0
        self.try_at = 0.0  # to connect


class Load(threading.Thread):
    """`connections` clients, from entering the block to its end, where all that is under way is waited for."""

    def __init__(self, port: int, users: Sequence[str], connections: int) -> None:
        super().__init__(daemon=True)
        self.answers: list[Answer] = []
        self.broken: list[Broken] = []
        self.refused: list[Refused] = []
        self.sent = 0
        self.connected = 0  # times
        self.run_id = uuid.uuid4().hex[:8]  # all request ids begin with it
        self.failure: BaseException | None = None
        self._port = port
        self._clients = [_Client() for _ in range(connections)]
        self._by_fd: dict[int, _Client] = {}
        self._epoll = select.epoll()
        self._requests = _requests(users)
        self._finishing = False

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finishing = True
        self.join(FINISH_SECONDS)
        if self.is_alive():
            raise AssertionError(f"requests are still under way after {FINISH_SECONDS:g} s")
        if self.failure is not None:
            raise self.failure

    @property
    def answered(self) -> int:
        """How many complete 200 there are so far; raises what ended the clients."""
        if self.failure is not None:
            raise self.failure
        if self.refused:
            raise AssertionError(f"refused: {self.refused[0]}")
        return len(self.answers)

    def wait(self, answers: int, seconds: float) -> None:
        """Return when there are so many more."""
        enough, end = self.answered + answers, time.monotonic() + seconds
        while self.answered < enough:
            if time.monotonic() > end:
                raise AssertionError(
                    f"expected {enough:,} answers within {seconds:g} s, found {self.answered:,}; {self.sent:,} requests "
                    f"sent, {len(self.broken)} connections broke, {len(self._by_fd)} are open, {self.connected} were"
                )
            time.sleep(0.01)

    def longest_gap(self, since: float = 0.0, until: float = float("inf")) -> float:
        """The longest time in which nobody was answered."""
        times = [answer.at for answer in self.answers if since <= answer.at <= until]
        return max((after - before for before, after in pairwise(times)), default=0.0)

    def run(self) -> None:
        """Everything happens here."""
        try:
            while not self._finishing or any(client.request_id for client in self._clients):
                self._turn()
        except BaseException as failure:
            self.failure = failure
        finally:
            for client in self._clients:
                self._close(client)
            self._epoll.close()

    def _turn(self) -> None:
        now = time.monotonic()
        for client in self._clients:
            if client.socket is None:
                if not self._finishing and now >= client.try_at:
                    self._connect(client, now)
            elif client.request_id and now - client.sent_at > ANSWER_SECONDS:
                self._break(client, f"no answer within {ANSWER_SECONDS:g} s")
        for _ in range(1_000):  # then look at the clock again
            ready = self._epoll.poll(0.01)
            for fd, _event in ready:
                self._receive(self._by_fd[fd])
            if not ready or len(self._by_fd) < len(self._clients):
                return

    def _connect(self, client: _Client, now: float) -> None:
        try:
            client.socket = socket.create_connection(("127.0.0.1", self._port), CONNECT_SECONDS)
        except OSError:
            client.try_at = now + AGAIN_SECONDS
            return
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._by_fd[client.socket.fileno()] = client
        self._epoll.register(client.socket, select.EPOLLIN)
        self.connected += 1
        self._send(client)

    def _send(self, client: _Client) -> None:
        assert client.socket is not None
        before, after = next(self._requests)
        self.sent += 1
        client.request_id = f"{self.run_id}-{self.sent:08}"
        client.sent_at = time.monotonic()
        try:
            client.socket.sendall(before + client.request_id.encode() + after)
        except OSError as error:
            self._break(client, str(error))

    def _receive(self, client: _Client) -> None:
        assert client.socket is not None
        try:
            data = client.socket.recv(65_536)
        except OSError as error:
            self._break(client, str(error))
            return
        if not data:
            self._break(client, "closed")
            return
        client.received += data
        head, end, body = client.received.partition(b"\r\n\r\n")
        if not end:
            return
        status, length, close = _read_head(head)
        if len(body) < length:
            return
        request_id, client.request_id, client.received = client.request_id, "", b""
        if not request_id or len(body) > length:
            raise AssertionError(f"more than was asked for: {head + end + body!r}")
        if status == 200:
            self.answers.append(Answer(request_id, body, time.monotonic()))
        else:
            self.refused.append(Refused(request_id, status, body))
        if close:
            self._close(client)
        elif not self._finishing:
            self._send(client)

    def _break(self, client: _Client, why: str) -> None:
        if client.request_id:
            self.broken.append(Broken(client.request_id, why, time.monotonic()))
        self._close(client)

    def _close(self, client: _Client) -> None:
        client.request_id, client.received = "", b""
        if client.socket is not None:
            self._by_fd.pop(client.socket.fileno(), None)
            client.socket.close()
            client.socket = None


def _requests(users: Sequence[str]) -> Iterator[tuple[bytes, bytes]]:
    """POST /predict for one user after another, without end: what stands before the request's id, and behind it."""
    before = b"POST /predict HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\nX-Request-ID: "
    bodies = [json.dumps({"user_id": user}).encode() for user in users]
    return cycle([(before, b"\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)) for body in bodies])


def _read_head(head: bytes) -> tuple[int, int, bool]:
    """Status, length of the body, and whether the connection ends with it."""
    first, *lines = head.lower().split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines)
    return int(first.split(b" ", 2)[1]), int(headers[b"content-length"]), headers.get(b"connection") == b"close"


def metric(service: Service, name: str) -> float:
    """One number of /metrics that has no labels."""
    page = service.get("/metrics").body.decode()
    (value,) = [line.split()[1] for line in page.splitlines() if line.startswith(f"{name} ")]
    return float(value)
