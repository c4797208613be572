"""A small client of Redis and Valkey: commands in, replies out, an answer or StoreDown in time.

A general client takes longer over a command than the server and the network together, so this knows just what
the store of features needs; hiredis reads the replies. Commands of many requests share a connection; they are
answered in their order. A connection with a long queue gets a companion, so that a single look-up does not wait
behind one of thousands.
What was sent over a connection that broke is sent once more over another.

While the server is away, one request at a time finds out whether it is back. The others are refused at once,
and do not take the places of requests that need no look-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import hiredis
from hiredis import ReplyError

from bentos.churn.online import StoreDown

ANSWER_SECONDS = 0.2  # of one user, from the question to the answer: connecting, logging in, a second attempt
REST_SECONDS = 0.2  # after a failure, before the next attempt
POOL = 4
CROWDED = 64  # replies a connection owes before it gets a companion

_SCHEMES = {"redis": False, "rediss": True}


@dataclass(frozen=True)
class Address:
    """Where a server is, and how to get in."""

    host: str
    port: int = 6379
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    ca_file: str = ""  # empty: the authorities that this machine trusts

    @classmethod
    def from_url(cls, url: str) -> Address:
        """Read `redis[s]://[user][:password@]host[:port][/db][?ssl_ca_certs=file]`; what is wrong is a ValueError."""
        expected = "redis[s]://[user][:password@]host[:port][/db][?ssl_ca_certs=file]"
        try:
            parts = urlsplit(url)
            query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
            address = cls(
                host=parts.hostname or "",
                port=parts.port or 6379,
                db=int(parts.path.strip("/") or 0),
                username=unquote(parts.username or ""),
                password=unquote(parts.password or ""),
                tls=_SCHEMES[parts.scheme],
                ca_file=query.pop("ssl_ca_certs", ""),
            )
        except (ValueError, KeyError):
            raise ValueError(f"the URL of the online store cannot be read; expected {expected}") from None
        if not address.host or query or parts.fragment:  # a # or ? in a password cuts the URL
            raise ValueError(f"the URL of the online store has no host, or more than expected: {expected}")
        return address

    @property
    def name(self) -> str:
        """For people: no secrets in it."""
        return f"{self.host}:{self.port}"


Reply = bytes | int | ReplyError | list[Any] | None


def command(*words: bytes) -> bytes:
    """A command as it goes over the wire."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class _Call:
    __slots__ = ("count", "deadline", "future", "replies")

    def __init__(self, count: int, deadline: float, future: asyncio.Future[list[Reply]]) -> None:
        self.count = count
        self.deadline = deadline
        self.future = future
        self.replies: list[Reply] = []


class _Connection(asyncio.Protocol):
    """One connection. A call that is not answered in time ends it: what comes later would answer another.

    One timer watches over all calls, since making one takes longer than the rest of a call.
    """

    def __init__(self, on_lost: Callable[[_Connection], None]) -> None:
        self.owed = 0  # replies
        self._on_lost = on_lost
        self._calls: deque[_Call] = deque()
        self._reader = hiredis.Reader()
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = inf  # when the timer goes off
        self._ended = ""  # why

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    async def call(self, commands: bytes, count: int, deadline: float) -> list[Reply]:
        """The replies to `count` commands; TimeoutError after the deadline, ConnectionError if it breaks."""
        if self._ended:
            raise ConnectionError(self._ended)
        loop = asyncio.get_running_loop()
        call = _Call(count, deadline, loop.create_future())
        self._calls.append(call)
        if deadline < self._due:
            self._watch_from(deadline)
        self.owed += count
        self._transport.write(commands)
        return await call.future

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:  # False: the next one is not complete
                call = self._calls[0]
                self.owed -= 1
                call.replies.append(reply)
                if len(call.replies) == call.count:
                    self._calls.popleft()
                    if not call.future.done():
                        call.future.set_result(call.replies)
        except (hiredis.ProtocolError, IndexError) as error:
            self.end(f"what answers is no Redis: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(f"the connection broke{f': {exc}' if exc else ''}")

    def end(self, reason: str) -> None:
        """Close it, and tell everybody who waits."""
        self._ended = self._ended or reason
        self._on_lost(self)
        if self._transport is not None:
            self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        while self._calls:
            call = self._calls.popleft()
            if not call.future.done():
                call.future.set_exception(ConnectionError(reason))

    def _watch_from(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = asyncio.get_running_loop().call_at(due, self._watch)

    def _watch(self) -> None:
        """Look whether a call is overdue, and when to look again."""
        self._timer, self._due = None, inf
        now = asyncio.get_running_loop().time()
        overdue = [call for call in self._calls if call.deadline <= now]
        for call in overdue:
            if not call.future.done():
                call.future.set_exception(TimeoutError())
        if overdue:
            self.end("an earlier command was not answered")
        elif self._calls:
            self._watch_from(min(call.deadline for call in self._calls))


class RedisClient:
    """Up to four connections to one server, opened when they are needed, on the event loop that asks."""

    def __init__(self, address: Address) -> None:
        self.address = address
        login = []
        if address.password:
            words = [address.username, address.password] if address.username else [address.password]
            login.append(command(b"AUTH", *(word.encode() for word in words)))
        # also for database 0: a server that wants a password says so in reply, where a longer command just ends it
        login.append(command(b"SELECT", b"%d" % address.db))
        self._login = b"".join(login)
        self._login_replies = len(login)
        self._tls: ssl.SSLContext | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: list[_Connection] = []
        self._opening: asyncio.Task[_Connection] | None = None
        self._down = ""  # why the last request failed
        self._try_at = 0.0

    async def ask(self, commands: bytes, count: int, deadline: float) -> list[Reply]:
        """The replies to `count` commands; StoreDown if they are not there at the deadline, by the loop's clock."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._forget(loop)
        now = loop.time()
        if self._down:
            if now < self._try_at:
                raise StoreDown(self._down)
            self._try_at = now + ANSWER_SECONDS  # this one finds out; those that come meanwhile are refused
        reason = ""
        for free in (self._free(), None):  # the second attempt takes a connection that was just made
            try:
                connection = free or await self._opened(deadline)
                replies = await connection.call(commands, count, deadline)
            except TimeoutError:
                reason = f"no answer within {deadline - now:.2g} s"
                break
            except OSError as error:
                reason = str(error)
            else:
                self._down = ""
                return replies
        self._down = f"{self.address.name}: {reason}"
        self._try_at = loop.time() + REST_SECONDS
        raise StoreDown(self._down)

    def close(self) -> None:
        """Close all connections; may be called from any thread."""
        with contextlib.suppress(RuntimeError):  # no loop runs here
            if asyncio.get_running_loop() is self._loop:
                return self._close()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._close)
        return None

    def _close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        for connection in [*self._connections]:
            connection.end("the store was closed")

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Connections belong to the loop they were opened on."""
        self._loop = loop
        self._connections = []
        self._opening = None
        self._down = ""

    def _free(self) -> _Connection | None:
        """The connection with the shortest queue."""
        if not self._connections:
            return None
        best = self._connections[0] if len(self._connections) == 1 else min(self._connections, key=_owed)
        if best.owed > CROWDED and len(self._connections) < POOL:
            self._open_soon()
        return best

    async def _opened(self, deadline: float) -> _Connection:
        async with asyncio.timeout_at(deadline):
            while True:
                with contextlib.suppress(TimeoutError):  # of one begun earlier, for another
                    return await asyncio.shield(self._open_soon())

    def _open_soon(self) -> asyncio.Task[_Connection]:
        if self._opening is None or self._opening.done():
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(self._opening_ended)
        return self._opening

    def _opening_ended(self, task: asyncio.Task[_Connection]) -> None:
        if not task.cancelled():
            task.exception()  # who waits for it has it; nobody may

    async def _open(self) -> _Connection:
        address = self.address
        loop = asyncio.get_running_loop()
        if address.tls and self._tls is None:
            self._tls = ssl.create_default_context(cafile=address.ca_file or None)
        async with asyncio.timeout(ANSWER_SECONDS):
            connection = _Connection(self._lost)
            await loop.create_connection(lambda: connection, address.host, address.port, ssl=self._tls)
            try:
                deadline = loop.time() + ANSWER_SECONDS
                for reply in await connection.call(self._login, self._login_replies, deadline):
                    if isinstance(reply, ReplyError):
                        raise ConnectionRefusedError(f"not let in: {self._without_secrets(reply)}")
            except BaseException:
                connection.end("not let in")
                raise
        self._connections.append(connection)
        return connection

    def _without_secrets(self, error: ReplyError) -> str:
        text = str(error).split("with args beginning", 1)[0]  # a server may repeat a command it does not know
        return text.replace(self.address.password, "***") if self.address.password else text

    def _lost(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)


def _owed(connection: _Connection) -> int:
    return connection.owed
