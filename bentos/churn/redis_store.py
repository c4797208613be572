"""Feast's Redis layout, read directly: one HMGET for a user, whatever the number of features and views.

A user is one hash. Its key is Feast's entity key, then the project. In it stand, for every feature, a
serialized value under the murmur hash of `view:feature`, and for every view a timestamp under `_ts:view`. Feast
writes all fields of a view at once, nulls included: where one alone is missing, something else was at work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from math import isfinite

from hiredis import ReplyError

from bentos.churn.model import Cell, Plan
from bentos.churn.online import (
    SENTINEL,
    Ages,
    LayoutMismatch,
    StoreDown,
    StoreEmpty,
    UserFeatures,
    decode_value,
    entity_key,
    read_varint,
)
from bentos.churn.redis_client import ANSWER_SECONDS, Address, RedisClient, Reply, command

LARGE = 64  # users; reads of more take turns, so that none waits for its answer behind the others
TURN_SECONDS = 5.0
USER_SECONDS = 0.002  # that each user of a read adds to the time for it: a pod may have a tenth of a core

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MISMATCH = f"the online store's row of {SENTINEL} is not in the layout of Feast that is read here"
_REMEMBERED = 1024  # values of a column, and timestamps: most are the same for many users

Reading = list[bytes | None]  # one user's values, then timestamps


def murmur(data: bytes) -> int:
    """MurmurHash3 of 32 bits with seed 0, as Feast names fields. https://github.com/aappleby/smhasher"""
    length = len(data)
    mixed = 0
    for at in range(0, length, 4):
        block = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
        mixed ^= ((block << 15 | block >> 17) & 0xFFFFFFFF) * 0x1B873593 & 0xFFFFFFFF
        if at + 4 <= length:
            mixed = ((mixed << 13 | mixed >> 19) & 0xFFFFFFFF) * 5 + 0xE6546B64 & 0xFFFFFFFF
    mixed ^= length
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return mixed ^ mixed >> 16


def field_name(view: str, feature: str) -> bytes:
    """The field of a user's hash that holds a feature."""
    return murmur(f"{view}:{feature}".encode()).to_bytes(4, "little")


def row_fields(features: Sequence[tuple[str, str]]) -> list[bytes]:
    """What a user's row is read by: fields of the features, given by view and name, then of the views' timestamps."""
    views = dict.fromkeys(view for view, _ in features)
    return [field_name(view, name) for view, name in features] + [f"_ts:{view}".encode() for view in views]


def check_row(row: Reading, features: int) -> None:
    """Raise StoreDown if one of the fields, so many features first, holds what Feast does not write."""
    for raw in row[:features]:
        decode_value(raw or b"")
    for raw in row[features:]:
        decode_instant(raw or b"")


def decode_instant(data: bytes) -> datetime:
    """The instant in a serialized `google.protobuf.Timestamp`; StoreDown if it is none."""
    found = {0x08: 0, 0x10: 0}  # seconds, nanoseconds
    try:
        at = 0
        while at < len(data):
            tag = data[at]
            number, at = read_varint(data, at + 1)
            if found[tag]:
                break
            found[tag] = number - 2**64 if number >= 2**63 else number
        else:
            return _EPOCH + timedelta(seconds=found[0x08], microseconds=found[0x10] // 1000)
    except (KeyError, IndexError, OverflowError):
        pass
    raise StoreDown(f"the online store holds {data[:16]!r}, which is no timestamp")


class RedisStore:
    """Feast's Redis online store. What to ask and how to read the answer is settled when the model is loaded."""

    def __init__(self, url: str, project: str, plan: Plan) -> None:
        self._client = RedisClient(Address.from_url(url))
        self._large = asyncio.Lock()
        self._project = project.encode()
        self._plan = plan
        self._known: list[dict[bytes | None, Cell]] = [{} for _ in plan.features]
        self._ages = lru_cache(_REMEMBERED)(self._decode_ages)
        self._views = tuple(dict.fromkeys(feature.view for feature in plan.features))
        fields = row_fields([(f.view, f.name) for f in plan.features])
        self._features = len(plan.features)
        self._size = len(fields)
        head, tail = command(b"HMGET", b"", *fields).split(b"$0\r\n\r\n")
        self._head, self._tail = head + b"$", b"\r\n" + tail
        self._ask_sentinel = self._command(SENTINEL) + command(b"HLEN", self._key(SENTINEL))

    async def read(self, user_ids: Sequence[str]) -> list[UserFeatures | None]:
        """The features of each user, None for an unknown one; raises StoreDown or StoreEmpty."""
        if len(user_ids) <= LARGE:
            return await self._read(user_ids)
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._large.acquire()
        except TimeoutError:
            raise StoreDown(f"too many large look-ups: no turn within {TURN_SECONDS} s") from None
        try:
            return await self._read(user_ids)
        finally:
            self._large.release()

    async def _read(self, user_ids: Sequence[str]) -> list[UserFeatures | None]:
        deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS + len(user_ids) * USER_SECONDS
        rows = await self._client.ask(b"".join([self._command(u) for u in user_ids]), len(user_ids), deadline)
        absent: set[str] = set()
        found = [self._user(self._row(reply), absent) for reply in rows]
        if absent:
            await self._check_sentinel(absent, deadline)
        return found

    async def probe(self) -> None:
        """Return if every view holds the sentinel; raise StoreDown, StoreEmpty or LayoutMismatch if not."""
        await self._check_sentinel(self._views, asyncio.get_running_loop().time() + ANSWER_SECONDS)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _key(self, user_id: str) -> bytes:
        return entity_key(user_id) + self._project

    def _command(self, user_id: str) -> bytes:
        key = self._key(user_id)
        return b"%b%d\r\n%b%b" % (self._head, len(key), key, self._tail)

    def _row(self, reply: Reply) -> Reading:
        if reply.__class__ is not list or len(reply) != self._size:
            raise StoreDown(f"{self._client.address.name}: {reply if isinstance(reply, ReplyError) else 'odd reply'}")
        return reply

    def _user(self, row: Reading, absent: set[str]) -> UserFeatures | None:
        """What a row says; views without one are added to `absent`."""
        if None in row:
            here = self._present(row)
            absent.update(view for view in self._views if view not in here)
            if not here:
                return None
        cells = []
        for at, (known, raw) in enumerate(zip(self._known, row, strict=False)):  # the timestamps follow the values
            cell = known.get(raw)
            cells.append(self._cell(at, raw) if cell is None else cell)
        return UserFeatures(cells, self._ages(*row[self._features :]))

    def _cell(self, at: int, raw: bytes | None) -> Cell:
        """The cell of a feature, remembered unless it is a measurement: those hardly repeat."""
        feature = self._plan.features[at]
        value = None if raw is None else decode_value(raw)
        if feature.kind == "float" and value.__class__ is float and isfinite(value):
            return self._plan.measurement(feature, value)
        cell = self._plan.cell(feature, value)
        if len(self._known[at]) < _REMEMBERED:
            self._known[at][raw] = cell
        return cell

    def _decode_ages(self, *stamps: bytes | None) -> Ages:
        pairs = zip(self._views, stamps, strict=True)
        return Ages.of({view: decode_instant(raw) for view, raw in pairs if raw is not None})

    def _present(self, row: Reading) -> set[str]:
        """The views that the row has all fields of; StoreEmpty if it has some of a view's and not others."""
        stamped = {v for v, raw in zip(self._views, row[self._features :], strict=True) if raw is not None}
        for feature, raw in zip(self._plan.features, row, strict=False):
            if (raw is None) == (feature.view in stamped):
                lacking = feature.name if raw is None else "its timestamp"
                raise StoreEmpty(f"a row of {feature.view} online lacks {lacking}; materialize writes it again")
        return stamped

    async def _check_sentinel(self, views: Collection[str], deadline: float) -> None:
        reply, fields = await self._client.ask(self._ask_sentinel, 2, deadline)
        if isinstance(reply, ReplyError) and str(reply).startswith("WRONGTYPE"):
            raise LayoutMismatch(f"{_MISMATCH}: {reply}")
        row = self._row(reply)
        try:
            here = self._present(row)
            check_row(row, self._features)
        except (StoreDown, StoreEmpty) as error:
            raise LayoutMismatch(f"{_MISMATCH}: {error}") from None
        if not here and isinstance(fields, int) and fields:
            raise LayoutMismatch(f"{_MISMATCH}: {fields} fields, but none of {', '.join(self._views)}")
        wiped = [view for view in self._views if view in views and view not in here]
        if wiped:
            raise StoreEmpty(f"the online store has no rows of {', '.join(wiped)}; materialize fills it again")
