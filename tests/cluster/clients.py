"""People who ask /predict all the time, through the ingress, and a check that every answer they got was logged once."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.cluster.commands import wait_until

PAUSE = 0.05  # seconds between two requests of one client: some 15 a second, three of them leave a CPU to the cluster
TIMEOUT = 10.0


class Reply(NamedTuple):
    """One request: what came of it, when it was sent (monotonic), and how long it took."""

    request_id: str
    sent_at: float
    seconds: float
    status: int  # 0: no answer
    bento_tag: str
    model_version: int
    score: float
    error: str = ""

    @property
    def at(self) -> datetime:
        """When it was sent, by the clock that logs and promotions go by."""
        return datetime.fromtimestamp(time.time() - time.monotonic() + self.sent_at, UTC)


@dataclass(frozen=True)
class Pace:
    """How fast answers came."""

    answers: int
    p50: float  # seconds
    p99: float

    @classmethod
    def of(cls, replies: Iterable[Reply]) -> Pace:
        """That of those which were answered."""
        seconds = sorted(reply.seconds for reply in replies if reply.status == 200)
        assert seconds, "nobody was answered"
        p50, p99 = (seconds[math.ceil(share * len(seconds)) - 1] for share in (0.50, 0.99))
        return cls(len(seconds), p50, p99)

    def __str__(self) -> str:
        return f"p50 {self.p50 * 1000:.1f} ms, p99 {self.p99 * 1000:.1f} ms of {self.answers:,} answers"


@dataclass(frozen=True)
class Address:
    """Where a release is reached: the ingress controller, and the name it knows the release by."""

    ingress: str
    host: str

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.ingress).netloc, timeout=TIMEOUT)

    def ask(
        self, user: str, request_id: str, connection: http.client.HTTPConnection | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and body of one /predict about a user; without a connection on a new one."""
        return self.post({"user_id": user}, request_id, connection)

    def post(
        self, question: object, request_id: str, connection: http.client.HTTPConnection | None = None
    ) -> tuple[int, dict[str, Any]]:
        """The same with a body of one's own."""
        ours = connection or self.connection()
        headers = {"Host": self.host, "Content-Type": "application/json", "X-Request-ID": request_id}
        if connection is None:
            headers["Connection"] = "close"
        try:
            ours.request("POST", "/predict", json.dumps(question), headers)
            answer = ours.getresponse()
            data = answer.read()
        finally:
            if connection is None:
                ours.close()
        try:
            body = json.loads(data)
        except ValueError:
            body = {"error": data.decode("utf-8", "replace")[:200]}
        return answer.status, body


class Clients:
    """Threads that ask from entering the block to leaving it; every other one keeps its connection.

    `again`: what failed is asked once more after so many seconds, under an id of its own, and only that counts.

    with Clients(address, users) as clients:
        ...
    clients.check_none_failed()
    """

    def __init__(self, address: Address, users: Sequence[str], *, count: int = 3, again: float | None = None) -> None:
        assert users, "clients need somebody to ask about"
        self.again, self.repeated = again, 0
        self.address, self.users = address, list(users)
        self.run = f"clients-{secrets.token_hex(4)}"
        self.replies: list[Reply] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        wait_until("the first answers to clients", lambda: self.answered, within=30)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None:  # what changed last has clients too
            enough = len(self.replies) + 10 * len(self._threads)
            wait_until("some more replies to clients", lambda: len(self.replies) >= enough, within=60)
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * TIMEOUT)

    def _ask(self, number: int) -> None:
        kept = self.address.connection() if number % 2 == 0 else None
        for count in itertools.count():
            if self._stop.wait(PAUSE):
                break
            user = self.users[(number * 97 + count) % len(self.users)]
            reply = self._reply(user, f"{self.run}-{number}-{count}", kept)
            if reply.status != 200 and self.again is not None:
                self.repeated += 1
                self._stop.wait(self.again)
                reply = self._reply(user, f"{reply.request_id}-again", kept)
            self.replies.append(reply)
        if kept is not None:
            kept.close()

    def _reply(self, user: str, request_id: str, kept: http.client.HTTPConnection | None) -> Reply:
        began, status, body, error = time.monotonic(), 0, dict[str, Any](), ""
        try:
            status, body = self.address.ask(user, request_id, kept)
        except (OSError, http.client.HTTPException) as problem:
            error = f"{type(problem).__name__}: {problem}"
            if kept is not None:
                kept.close()
        if status != 200:
            error = error or json.dumps({key: value for key, value in body.items() if key != "request_id"})[:300]
        tag, version = str(body.get("bento_tag", "")), int(body.get("model_version", 0))
        score, took = float(body.get("churn_probability", "nan")), time.monotonic() - began
        return Reply(request_id, began, took, status, tag, version, score, error)

    @property
    def answered(self) -> list[Reply]:
        """Those that were answered 200."""
        return [reply for reply in list(self.replies) if reply.status == 200]

    @property
    def failed(self) -> list[Reply]:
        """All others; only users that exist are asked for, so none is meant to be refused."""
        return [reply for reply in list(self.replies) if reply.status != 200]

    def check_none_failed(self) -> None:
        """Fail if any did, with the first few of them."""
        if self.failed:
            raise AssertionError(str(self))

    @property
    def versions(self) -> list[int]:
        """Model versions in the order in which they first answered."""
        return in_order(reply.model_version for reply in self.answered)

    @property
    def tags(self) -> list[str]:
        """Bento tags in the order in which they first answered."""
        return in_order(reply.bento_tag for reply in self.answered)

    @property
    def longest(self) -> float:
        """Seconds of the slowest request."""
        return max((reply.seconds for reply in self.replies), default=0.0)

    def __str__(self) -> str:
        kinds: dict[str, list[Reply]] = {}
        for reply in self.failed:
            kinds.setdefault(f"{reply.status} {reply.error}", []).append(reply)
        failures = "; ".join(
            f"{len(found)} × {kind}, the first at {clock(found[0])} after {found[0].seconds:.1f} s, the last at {clock(found[-1])}"
            for kind, found in kinds.items()
        )
        return (
            f"{len(self.replies)} sent, {len(self.failed)} failed{f' ({failures})' if failures else ''}, "
            f"versions {self.versions}, the longest took {self.longest * 1000:.0f} ms"
        )


def clock(reply: Reply) -> str:
    """When it was sent, as logs and events have it."""
    return f"{reply.at:%H:%M:%S}"


def in_order(found: Iterable[Any]) -> list[Any]:
    """Without repetitions."""
    return list(dict.fromkeys(found))


def check_logged_once(clients: Clients, log: dict[str, Counter[tuple[str, int]]]) -> None:
    """Fail unless every answered request is in the prediction log exactly once, with the tag and version it was
    answered by. `log`: request id → how often each (tag, version) was logged for it."""
    missing = [r.request_id for r in clients.answered if r.request_id not in log]
    assert not missing, f"{len(missing)} of {len(clients.answered)} answers are not in the log, such as {missing[:5]}"
    twice = {name: dict(found) for name, found in log.items() if found.total() != 1}
    assert not twice, f"{len(twice)} requests are in the log more than once, such as {dict(list(twice.items())[:5])}"
    other = [r for r in clients.answered if (r.bento_tag, r.model_version) not in log[r.request_id]]
    assert not other, (
        f"{len(other)} answers were logged by another model, such as {other[0]}: {log[other[0].request_id]}"
    )
