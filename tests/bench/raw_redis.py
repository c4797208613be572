"""One connection to Redis and nothing on top: commands go out as they come, hiredis reads the replies."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import hiredis


class HashLayout(NamedTuple):
    """Where Feast keeps a user: one hash, a field for each feature and one for each view's timestamp."""

    before: bytes  # of the key: what comes before the user's id and its length
    behind: bytes
    fields: tuple[bytes, ...]  # the features in the model's order, then the timestamps

    @classmethod
    def of(cls, project: str, features: list[dict[str, Any]]) -> HashLayout:
        """As Feast itself says."""
        from feast.infra.online_stores.helpers import _mmh3, _redis_key
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        key = _redis_key(project, EntityKey(join_keys=["user_id"], entity_values=[Value(string_val="?")]), 3)
        views = dict.fromkeys(feature["view"] for feature in features)
        fields = [_mmh3(f"{f['view']}:{f['name']}") for f in features] + [f"_ts:{view}".encode() for view in views]
        behind = project.encode()
        return cls(key[: -len(behind) - 5], behind, tuple(fields))

    def save(self, path: Path) -> None:
        """Write it down for a process that has no Feast."""
        path.write_text(json.dumps([self.before.hex(), self.behind.hex(), [field.hex() for field in self.fields]]))

    @classmethod
    def load(cls, path: Path) -> HashLayout:
        """What `save` wrote."""
        before, behind, fields = json.loads(path.read_text())
        return cls(bytes.fromhex(before), bytes.fromhex(behind), tuple(map(bytes.fromhex, fields)))

    def key(self, user_id: str) -> bytes:
        """The key of a user's hash."""
        encoded = user_id.encode()
        return b"%b%b%b%b" % (self.before, struct.pack("<I", len(encoded)), encoded, self.behind)

    def hmget(self, user_id: str) -> bytes:
        """The command that reads all of it."""
        return hiredis.pack_command((b"HMGET", self.key(user_id), *self.fields))


class RawRedis(asyncio.Protocol):
    """Replies come in the order of the commands, so a queue of futures is all there is to it."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(reply)

    def command(self, packed: bytes) -> asyncio.Future[Any]:
        """The reply to come."""
        future = self._loop.create_future()
        self._waiting.append(future)
        self._transport.write(packed)
        return future

    def close(self) -> None:
        """End the connection."""
        self._transport.close()


async def connect(url: str) -> RawRedis:
    """A connection to redis://host:port/…"""
    parts = urlsplit(url)
    _, protocol = await asyncio.get_running_loop().create_connection(RawRedis, parts.hostname, parts.port)
    return protocol
