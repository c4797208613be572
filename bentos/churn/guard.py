"""Everything a request must pass before it is read as one: the outermost layer, in front of BentoML's own.

Method, path, API key, content type, sizes and the time a body may take are judged here, a request counts as
being under way only when all of it has arrived, and whatever comes back has one form: errors are
`{"error", "detail", "request_id"}`, and every answer carries `X-Request-ID`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, ClassVar, NamedTuple, Protocol

from bentos.churn.keys import PROBE, Callers
from bentos.churn.requests import RequestError

log = logging.getLogger(__name__)

MAX_BODY = 2**20
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 2**10
BODY_SECONDS = 1.0
MAX_HELD = 32 * 2**20  # bytes of bodies that come in parts, all together
ANSWERS_PER_REFUSAL = 2  # under overload, and
SHED_SECONDS = 1.0  # how long a refusal waits for them at most
LINGER_SECONDS = 2.0  # how long, and
LINGER_BYTES = 32 * 2**20  # how much of an unwanted body is read, so that its sender gets to see the answer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

JSON = b"application/json"


class Answer(NamedTuple):
    """An answer before its headers."""

    status: int
    body: bytes
    headers: Headers = ()
    content_type: bytes = JSON


class Api(Protocol):
    """What the guard stands in front of."""

    draining: bool
    max_concurrency: int
    callers: Callers
    pages: dict[str, Callable[[], Answer]]  # what GET answers on the other paths

    async def predict(self, body: bytes, request_id: str, source: str) -> Answer:
        """Answer a complete body; RequestError for one that is not right."""

    def count(self, status: int, seconds: float) -> None:
        """Take note of an answered /predict."""


class _Disconnected(Exception):
    """Nobody waits for the answer."""


def error(status: int, code: str, detail: str, request_id: str, headers: Headers = ()) -> Answer:
    """The one form of an error."""
    body = json.dumps({"error": code, "detail": detail, "request_id": request_id})
    return Answer(status, body.encode(), headers)


class Guard:
    """An ASGI application that answers for `api`, and leaves `app` nothing but the lifespan."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], api: Api) -> None:
        self._app = app
        self._api = api
        self._under_way = self._answered = 0
        self._refused: deque[asyncio.Future[None]] = deque()  # who will be told 429, oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        wire = _Wire(scope["headers"], receive)
        try:
            answer = await self._answer(scope, wire)
        except RequestError as refused:
            answer = error(refused.status, refused.code, refused.detail, wire.request_id, _extra(refused))
        except _Disconnected:
            return
        except Exception:
            log.exception("request %s failed", wire.request_id)
            answer = error(500, "internal", "the service made a mistake; its log says which", wire.request_id)
        if scope["path"] == "/predict":
            self._api.count(answer.status, time.perf_counter() - started)
        await wire.send(send, answer, close=self._api.draining)

    async def _answer(self, scope: Scope, wire: _Wire) -> Answer:
        if wire.header_count > MAX_HEADERS or wire.header_bytes > MAX_HEADER_BYTES:
            raise RequestError(
                431,
                "headers_too_large",
                f"expected at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES:,} bytes together, "
                f"found {wire.header_count} of {wire.header_bytes:,}",
            )
        path, method = scope["path"], scope["method"]
        if path != "/predict":
            page = self._api.pages.get(path)
            if page is None:
                raise RequestError(404, "not_found", "there is nothing at this path; predictions are at /predict")
            if method not in ("GET", "HEAD"):
                raise _method_not_allowed(method, "GET, HEAD")
            return page()
        if method != "POST":
            raise _method_not_allowed(method, "POST")
        if self._api.callers.required or wire.source == PROBE:
            wire.source = self._api.callers.admit(scope["headers"], wire.source)
        if not wire.is_json:
            raise RequestError(415, "unsupported_media_type", "expected Content-Type: application/json")
        body = await wire.body()
        if self._is_full():
            del body  # it is not waited for with a megabyte in hand
            await self._turn()
            raise RequestError(429, "overloaded", f"{self._under_way} requests are under way; try again in a second")
        self._under_way += 1
        try:
            return await self._api.predict(body, wire.request_id, wire.source)
        finally:
            self._under_way -= 1
            self._answered += 1
            if self._answered % ANSWERS_PER_REFUSAL == 0:
                self._next_turn()

    def _is_full(self) -> bool:
        """Whether one more would be too many.

        While others wait for their refusal half as many are let in: as many again are then in the sockets,
        sent and not yet read, and their time counts as well.
        """
        limit = self._api.max_concurrency
        return self._under_way >= (max(1, limit // 2) if self._refused else limit)

    async def _turn(self) -> None:
        """Return when it is this one's turn to be refused: after two answers to others, or after SHED_SECONDS.

        A refusal takes up to half of an answer's time, and who is refused may ask again at once. Ten refusals for
        an answer would make the accepted wait five times as long.
        """
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        timer = loop.call_later(SHED_SECONDS, self._next_turn)  # the oldest's: all wait equally long
        self._refused.append(turn)
        try:
            await turn
        finally:
            timer.cancel()

    def _next_turn(self) -> None:
        while self._refused:
            turn = self._refused.popleft()
            if not turn.done():
                turn.set_result(None)
                return


class _NotAllowed(RequestError):
    """Says what is allowed in the header as well."""

    allow = b""


def _method_not_allowed(method: str, allow: str) -> RequestError:
    refused = _NotAllowed(405, "method_not_allowed", f"expected {allow}, found {method[:20]}")
    refused.allow = allow.encode()
    return refused


def _extra(refused: RequestError) -> Headers:
    if isinstance(refused, _NotAllowed):
        return ((b"allow", refused.allow),)
    if refused.status == 401:
        return ((b"www-authenticate", b"Bearer"),)
    if refused.status in (429, 503):
        return ((b"retry-after", b"1"),)
    return ()


class _Wire:
    """One request as it arrives: its headers in one pass, its body under limits, and the way back."""

    held: ClassVar[int] = 0  # bytes of all requests' bodies that are not complete

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> None:
        self._receive = receive
        self.request_id = ""
        self.source = "client"
        self.is_json = False
        self.header_count = self.header_bytes = 0
        self._length: int | None = None
        self._unread = False  # a body was announced, and not all of it was read
        self._stuck = False  # and waiting for the rest makes no sense
        types = 0
        for name, value in headers:
            self.header_count += 1
            self.header_bytes += len(name) + len(value)
            if name == b"content-type":
                types += 1
                self.is_json = types == 1 and _is_json(value)
            elif name == b"content-length":
                self._length = int(value) if value.isdigit() and len(value) < 19 else MAX_BODY + 1
                self._unread = self._length > 0
            elif name == b"transfer-encoding":
                self._unread = True
            elif name == b"x-request-id":
                if not self.request_id and 1 <= len(value) <= 128 and _is_visible(value):
                    self.request_id = value.decode()
            elif name == b"x-churn-source" and value == b"probe":
                self.source = PROBE  # until `admit` was asked: anybody can say so
        if not self.request_id:
            self.request_id = os.urandom(16).hex()

    async def body(self) -> bytes:
        """All of the body; RequestError if it is too large or too slow."""
        if self._length is not None and self._length > MAX_BODY:
            raise _too_large()
        task = asyncio.current_task()
        timer = asyncio.get_running_loop().call_later(BODY_SECONDS, self._late, task)  # asyncio.timeout costs 5 µs
        held = 0  # what came in the first part is soon gone, or soon counted
        try:
            parts = [await self._next()]
            size = len(parts[0])
            while self._unread and size <= MAX_BODY:
                part = await self._next()
                parts.append(part)
                size += len(part)
                held += len(part)
                _Wire.held += len(part)
                if _Wire.held > MAX_HELD:
                    raise RequestError(429, "overloaded", "too many large bodies arrive at once; try again in a second")
        except asyncio.CancelledError:
            if not self._stuck or (task and task.uncancel()):  # somebody else wants the request to end
                raise
            raise RequestError(408, "body_timeout", f"the body did not arrive within {BODY_SECONDS:g} second") from None
        finally:
            timer.cancel()
            _Wire.held -= held
        if size > MAX_BODY:
            raise _too_large()
        return b"".join(parts)

    def _late(self, task: asyncio.Task[Any] | None) -> None:
        if task is not None:
            self._stuck = True
            task.cancel()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] != "http.request":
            raise _Disconnected
        self._unread = message.get("more_body", False)
        return message.get("body", b"")  # type: ignore[no-any-return]

    async def send(self, send: Send, answer: Answer, *, close: bool) -> None:
        """Send the answer; with `close`, or with a body still on its way, it is the connection's last."""
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", b"%d" % len(answer.body)),
            (b"x-request-id", self.request_id.encode()),
            *answer.headers,
        ]
        if close or self._unread:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if self._unread and not self._stuck:
            await send({"type": "http.response.body", "body": answer.body, "more_body": True})
            await self._linger()
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "http.response.body", "body": answer.body})

    async def _linger(self) -> None:
        """Read on and throw away: closing now would reset the connection under the sender."""
        seen = 0
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread and seen < LINGER_BYTES:
                    seen += len(await self._next())
        except (TimeoutError, _Disconnected):
            pass


def _too_large() -> RequestError:
    return RequestError(413, "too_large", f"expected a body of at most {MAX_BODY:,} bytes")


def _is_json(value: bytes) -> bool:
    if value == JSON:
        return True
    kind, _, parameters = value.lower().partition(b";")
    if kind.strip() != JSON:
        return False
    return parameters.strip().replace(b'"', b"") in (b"", b"charset=utf-8")


def _is_visible(value: bytes) -> bool:
    return all(0x21 <= byte <= 0x7E for byte in value)
