"""What happens on a connection before there is a request to judge: uvicorn's protocol, with limits of its own.

The guard is asked when a head is complete. Until then somebody else has to see that it does not grow without
end, that it comes at all, and that what is no HTTP is answered in the one form.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bentos.churn.guard import error

MAX_HEAD = 64 * 2**10  # bytes of one that is not complete; the guard's own limit is lower
HEAD_SECONDS = 5.0

_UPGRADE = re.compile(rb"\r\nu(?=pgrade *:)", re.IGNORECASE)

listener: socket.socket | None = None  # the one that uvicorn accepts from, not blocking


class Protocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _in_head = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The first head is waited for from now on."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_SECONDS, self._late)
        self._let_others_in()

    def _let_others_in(self) -> None:
        """libuv accepts one connection a turn of the loop, and a turn is long when there is much to do."""
        if listener is None or self.config.ssl:
            return
        with contextlib.suppress(OSError):  # nobody waits; or there is no room, which libuv looks after
            while True:
                accepted, _ = listener.accept()
                accepted.setblocking(False)
                task: asyncio.Task[Any] = self.loop.create_task(
                    self.loop.connect_accepted_socket(self._another, accepted)
                )
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    def _another(self) -> Protocol:
        return Protocol(self.config, self.server_state, self.app_state, self.loop)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is waited for any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; a head that grows too large or takes too long ends the connection."""
        if b"pgrade" in data or b"PGRADE" in data:  # to another protocol: we may go on with this one, and do
            data = _UPGRADE.sub(b"\r\nx", data)  # not a byte longer: it may stand in a body, whose length was said
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._end(431, "headers_too_large", f"the head of the request is larger than {MAX_HEAD:,} bytes")
            elif self._timer is None:
                self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is there; the guard sees to the rest."""
        self._in_head = False
        if self._timer is not None:
            self._stop_timer()
        if self.parser.should_upgrade():  # it came in two pieces; the parser takes a body for the next request
            self._end(400, "malformed", "expected a request without the header Upgrade")
            return
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """In the one form."""
        self._end(400, "malformed", "this is not HTTP")

    def _late(self) -> None:
        self._timer = None
        if self._in_head:
            self._end(408, "head_timeout", f"the head did not arrive within {HEAD_SECONDS:g} seconds")
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, status: int, code: str, detail: str) -> None:
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            request_id = os.urandom(16).hex()
            body = error(status, code, detail, request_id).body
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nx-request-id: {request_id}\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + b"connection: close\r\n\r\n" + body)
        if self.cycle is not None and not self.cycle.response_complete:  # nobody waits for its answer any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
