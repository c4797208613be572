"""One address for clients, whichever process answers: what a Service is on Kubernetes.

Connections are passed on, not requests: each new one goes to the process that serves at that moment and stays
with it until it closes. Bytes are not looked at, so this knows no more HTTP than the one answer it gives when
nobody can. A request under way in a process that is killed is lost, as it is behind a Service.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

CONNECT_FOR = 10.0  # seconds a new connection waits for a process that is being started again
LINGER = 5.0  # seconds to wait for the client's end after the process ended the connection


@dataclass(frozen=True)
class Target:
    """Where new connections go: a process's port, or else why nobody answers, and whether to wait."""

    port: int | None
    error: str = ""
    detail: str = ""
    wait: bool = True


class Balancer:
    """Listens on one address; `target` is asked anew for each connection, and at each attempt of it."""

    def __init__(self, target: Callable[[], Target], connect_for: float = CONNECT_FOR) -> None:
        self._target = target
        self._connect_for = connect_for
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: set[_Client] = set()

    async def listen(self, host: str, port: int) -> int:
        """Begin; returns the port, which matters when 0 was asked for."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Client(self), host, port, backlog=1024)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Take no new connections. Those that are open end when their process ends them."""
        self._server.close()

    async def flush(self) -> None:
        """Wait, though not for ever, until clients have taken what was answered; then drop them."""
        loop = asyncio.get_running_loop()
        end = loop.time() + LINGER
        while loop.time() < end and any(client.transport.get_write_buffer_size() for client in self._clients):
            await asyncio.sleep(0.05)
        for client in self._clients:
            client.transport.close()

    def accept(self, client: _Client) -> None:
        """Find a process for a client that has just connected."""
        self._clients.add(client)
        task = asyncio.get_running_loop().create_task(self._connect(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def leave(self, client: _Client) -> None:
        """Forget a client that has gone."""
        self._clients.discard(client)

    async def _connect(self, client: _Client) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._connect_for
        while not client.transport.is_closing():
            target = self._target()
            if target.port is not None:
                try:
                    await loop.create_connection(lambda: _Process(client), "127.0.0.1", target.port)
                    return
                except OSError:
                    pass  # it died a moment ago, and will be started again
            if loop.time() >= end or not target.wait:
                detail = target.detail or "the process that serves does not answer"
                client.refuse(target.error or "not_ready", detail)
                return
            await asyncio.sleep(0.05)


class _End(asyncio.Protocol):
    """One end of a connection; bytes go to `peer`, and no faster than it takes them."""

    peer: _End | None = None
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.peer and not self.peer.transport.is_closing():
            self.peer.transport.write(data)

    def pause_writing(self) -> None:
        if self.peer:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.peer:
            self.peer.transport.resume_reading()


class _Client(_End):
    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer
        self._refusal: tuple[str, str] | None = None
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()  # until somebody is there to read it
        self._balancer.accept(self)

    def data_received(self, data: bytes) -> None:
        if self._refusal:
            self._answer(data)
        else:
            super().data_received(data)

    def eof_received(self) -> bool:
        """The client has said all it will say; the answer may still be on its way."""
        if self.peer and not self.peer.transport.is_closing():
            self.peer.transport.write_eof()
            return True
        return False  # both have ended: close

    def connection_lost(self, exc: Exception | None) -> None:
        self._balancer.leave(self)
        if self.peer:
            self.peer.transport.abort() if exc else self.peer.transport.close()

    def end(self) -> None:
        """Pass on that the process closed. Closing at once would reset a client that is still writing, and
        with it the answer it has not read yet; so what it still says is dropped until it has closed too."""
        self.peer = None
        if self.transport.is_closing():
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER, self.transport.close)

    def refuse(self, error: str, detail: str) -> None:
        """Answer the first request with 503, once its head has been read, and end."""
        self._refusal = (error, detail)
        if not self.transport.is_closing():
            self.transport.resume_reading()
            asyncio.get_running_loop().call_later(LINGER, self.transport.close)

    def _answer(self, data: bytes) -> None:
        if self._head.endswith(b"\r\n\r\n"):
            return  # answered; this is the request's body
        head, found, _ = (self._head + data).partition(b"\r\n\r\n")
        if len(head) > 65536:
            self.transport.abort()
            return
        self._head = head + found
        if not found:
            return
        assert self._refusal  # noqa: S101
        given = re.search(rb"\r\nx-request-id:[ \t]*([\w.-]{1,128})[ \t]*\r\n", self._head, re.IGNORECASE)
        request_id = given[1].decode() if given else uuid.uuid4().hex
        error, detail = self._refusal
        body = json.dumps({"error": error, "detail": detail, "request_id": request_id}).encode()
        self.transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Retry-After: 1\r\nX-Request-ID: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (request_id.encode(), len(body), body)
        )
        self.transport.write_eof()


class _Process(_End):
    """The end towards the process that serves."""

    def __init__(self, client: _Client) -> None:
        self.peer = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        client = cast(_Client, self.peer)
        if client.transport.is_closing():
            self.transport.close()
            return
        client.peer = self
        client.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        cast(_Client, self.peer).end()
