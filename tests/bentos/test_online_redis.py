"""Features read from Feast's Redis layout: the same as its SDK reads, in time or not at all, and never a guess."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import redis as redis_py
import uvloop

from bentos.churn import redis_client, redis_store
from bentos.churn.model import Plan
from bentos.churn.online import LayoutMismatch, OnlineStore, StoreDown, StoreEmpty, UserFeatures, entity_key, open_store
from bentos.churn.redis_client import POOL, Address, command
from bentos.churn.redis_store import RedisStore, decode_instant, field_name, murmur
from jobs import dataset
from tests import stores
from tests.bentos import serving_process
from tests.bentos.conftest import AS_OF
from tests.bentos.serving_process import eventually

ANSWER = (
    1.0  # seconds, four times what the service takes: a busy machine may be late by a blink, and is in no hurry here
)
IN_TIME = ANSWER + 0.3  # an answer that the store is down
RECOVERED = 10.0
PROJECT = "churn"
EXPIRED = AS_OF - timedelta(days=60)  # the definitions' ttl is 45 days
PLAYGROUND = 1  # the database that tests may break
A, B, NO_PAYMENTS, NO_USAGE = "u-0001", "u-0002", "u-0003", "u-0004"

VALUES: dict[str, list[Any]] = {
    "int": [0, 1, -1, 127, 128, 300, 2**31, 2**53, -(2**53), 1293],  # Feast takes integers by way of a float
    "float": [0.0, -0.0, 1.5, -1e-300, 1.7976931348623157e308, struct.unpack("<d", b"\r\nab\r\n\r\n")[0], 19.99],
    "bool": [True, False],
    "category": ["", "One year", "Zoë ☂", "a\r\nb", "\r\n", "x" * 300, "true"],
}


@dataclass(frozen=True)
class Filled:
    """A server that Feast wrote 1,000 users and the sentinel to, and Feast's SDK on it."""

    server: stores.Server
    sdk: Any
    users: tuple[str, ...]

    def admin(self, db: int = 0) -> redis_py.Redis:
        """Somebody with a general client."""
        return redis_py.Redis(port=self.server.port, db=db)

    @property
    def playground(self) -> str:
        """URL of the copy that tests may break."""
        return f"redis://127.0.0.1:{self.server.port}/{PLAYGROUND}"


def fill(sdk: Any, plan: Plan, users: list[str]) -> None:
    """Every type with its odd values, nulls anywhere, users without a row in a view, and rows beyond the ttl."""
    rng = random.Random(7)
    for view in dict.fromkeys(f.view for f in plan.features):
        table = pd.DataFrame({"user_id": users})
        stamps = [
            EXPIRED if rng.random() < 0.2 else AS_OF - timedelta(microseconds=rng.choice((0, 0, 250_000)))
            for _ in users
        ]
        table["event_timestamp"] = pd.to_datetime(pd.Series(stamps), utc=True)
        for feature in (f for f in plan.features if f.view == view):
            column = [
                None if rng.random() < 0.1 and user not in (A, B, "__sentinel__") else rng.choice(VALUES[feature.kind])
                for user in users
            ]
            table[feature.name] = pd.Series(column, dtype=object)
        if view == "payments_agg_90d":
            table = table[table["user_id"] != NO_PAYMENTS]
        if view == "usage_agg_30d":
            table = table[table["user_id"] != NO_USAGE]
        sdk.write_to_online_store(view, table)


@pytest.fixture(scope="module")
def filled(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    from feast import FeatureStore, RepoConfig

    from feature_repo.definitions import define

    folder = tmp_path_factory.mktemp("feast-redis")
    with stores.redis(folder) as server:
        config = RepoConfig(
            project=PROJECT,
            provider="local",
            registry={"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db"},
            offline_store={"type": "duckdb"},
            online_store=dataset.online_store(server.url),
            entity_key_serialization_version=3,
        )
        sdk = FeatureStore(config=config)
        sdk.apply(define(lambda table: str(folder / f"{table}.parquet"), ttl=timedelta(days=45)).objects())
        users = [f"u-{i:04}" for i in range(999)] + ["Zoë Ünïcode ☂"]
        fill(sdk, plan, [*users, "__sentinel__"])
        yield Filled(server, sdk, tuple(users))


@pytest.fixture
def playground(filled: Filled) -> Iterator[redis_py.Redis]:
    """A few users and the sentinel, to be broken."""
    with filled.admin() as source, filled.admin(PLAYGROUND) as admin:
        admin.flushdb()
        for user in (A, B, NO_PAYMENTS, NO_USAGE, "__sentinel__"):
            assert source.copy(key(user), key(user), PLAYGROUND)
        yield admin


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """The kind of event loop that serves."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as running:
        yield running


Opener = Callable[[str], OnlineStore]


@pytest.fixture
def opened(plan: Plan, runner: asyncio.Runner) -> Iterator[Opener]:
    """Opens stores, and closes them on their loop."""
    with contextlib.ExitStack() as stack:

        async def close(store: OnlineStore) -> None:
            store.close()

        def opener(url: str) -> OnlineStore:
            store = open_store(url, PROJECT, plan)
            stack.callback(lambda: runner.run(close(store)))
            return store

        yield opener


@pytest.fixture
def read(filled: Filled, playground: redis_py.Redis, opened: Opener, runner: asyncio.Runner) -> Callable[..., Any]:
    """Reads users of the playground."""
    store = opened(filled.playground)
    return lambda *users: runner.run(store.read(users))


def key(user: str) -> bytes:
    return entity_key(user) + PROJECT.encode()


def drop_view(admin: redis_py.Redis, plan: Plan, view: str, *users: str) -> None:
    for user in users:
        admin.hdel(key(user), f"_ts:{view}", *(field_name(view, f.name) for f in plan.features if f.view == view))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise, and what is kept of it here."""
    assert redis_client.ANSWER_SECONDS == 0.2
    for module in (redis_client, redis_store):
        monkeypatch.setattr(module, "ANSWER_SECONDS", ANSWER)


@contextlib.contextmanager
def in_time(limit: float = IN_TIME) -> Iterator[None]:
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took <= limit, f"took {took:.3f} s"


# --- the same as Feast ------------------------------------------------------------------------------------


def test_same_values_and_timestamps_as_feast(
    filled: Filled, plan: Plan, opened: Opener, runner: asyncio.Runner
) -> None:
    """1,000 users at once and an unknown one: every value, its type, and when it was true."""
    users = [*filled.users, "nobody"]
    references = [f"{feature.view}:{feature.name}" for feature in plan.features]
    answer = filled.sdk.get_online_features(references, [{"user_id": user} for user in users])
    expected = answer.to_dict(include_event_timestamps=True)

    found: list[UserFeatures | None] = runner.run(opened(filled.server.url).read(users))

    assert len(found) == 1001
    assert found[-1] is None
    seen = set()
    nulls = expired = fractions = 0
    for i, (user, features) in enumerate(zip(filled.users, found[:-1], strict=True)):
        assert features is not None
        for feature in plan.features:
            value = features.values[feature.name]
            assert value == expected[feature.name][i], (user, feature.name)
            assert type(value) is type(expected[feature.name][i]), (user, feature.name)
            seen.add(value)
            nulls += value is None
            stamp = expected[f"{feature.name}__ts"][i]
            at = features.ages.timestamps.get(feature.view)
            assert (int(at.timestamp()) if at else 0) == int(stamp), (user, feature.view)
            expired += at == EXPIRED
            fractions += at is not None and at.microsecond == 750_000
    assert nulls > 1000
    assert expired > 1000
    assert fractions > 1000
    assert {value for values in VALUES.values() for value in values} < seen


def test_a_row_in_part_is_not_read_as_nulls(playground: redis_py.Redis, plan: Plan, read: Callable[..., Any]) -> None:
    """The SDK would say null, and the default of a feature would stand in for what was lost."""
    playground.hdel(key(A), field_name("payments_agg_90d", "failed_payments_90d"))

    with pytest.raises(StoreEmpty, match="payments_agg_90d online lacks failed_payments_90d; materialize"):
        read(A)
    assert read(B)[0] is not None


def test_a_row_without_its_timestamp_is_not_read(playground: redis_py.Redis, read: Callable[..., Any]) -> None:
    playground.hdel(key(A), "_ts:usage_agg_30d")

    with pytest.raises(StoreEmpty, match="usage_agg_30d online lacks its timestamp"):
        read(A)


def test_absent_rows_are_nulls_of_their_view_alone(read: Callable[..., Any]) -> None:
    no_payments, no_usage, whole = read(NO_PAYMENTS, NO_USAGE, A)

    assert no_payments.values["failed_payments_90d"] is None
    assert "payments_agg_90d" not in no_payments.ages.timestamps
    assert len(no_payments.ages.timestamps) == 3
    assert no_usage.values["skips_7d"] is None
    assert None not in whole.values.values()


def test_timestamps_are_per_view(filled: Filled, runner: asyncio.Runner, opened: Opener) -> None:
    users = runner.run(opened(filled.server.url).read(filled.users[:100]))

    ages = {tuple(at == EXPIRED for at in user.ages.timestamps.values()) for user in users if user}
    assert len(ages) > 5


def test_one_command_for_a_user(filled: Filled, plan: Plan, runner: asyncio.Runner) -> None:
    with filled.admin() as admin:
        store = RedisStore(filled.server.url, PROJECT, plan)
        admin.config_resetstat()
        runner.run(store.read([A]))
        one = admin.info("commandstats")
        runner.run(store.read([u for u in filled.users if u not in (NO_PAYMENTS, NO_USAGE)]))
        many = admin.info("commandstats")
        store.close()

    assert one["cmdstat_hmget"]["calls"] == 1
    assert many["cmdstat_hmget"]["calls"] == 1 + 998


def test_hashes_are_feasts() -> None:
    from feast.infra.online_stores.helpers import _mmh3, _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    for length in range(40):
        text = "usage_agg_30d:wätch_hours_30d☂ and more"[:length]
        assert murmur(text.encode()).to_bytes(4, "little") == _mmh3(text)
    for user in ("a", "Zoë ☂", "x" * 128):
        entity = EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)])
        assert key(user) == _redis_key(PROJECT, entity)


def test_timestamps_are_protobufs() -> None:
    from google.protobuf.timestamp_pb2 import Timestamp

    for at in (
        AS_OF,
        datetime(1969, 7, 20, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        AS_OF.replace(microsecond=7),
    ):
        stamp = Timestamp()
        stamp.FromDatetime(at)
        assert decode_instant(stamp.SerializeToString()) == at


# --- wiped, damaged, another layout -------------------------------------------------------------------------


def test_unknown_is_told_from_wiped(playground: redis_py.Redis, read: Callable[..., Any]) -> None:
    assert read("nobody", A, "nobody") == [None, *read(A), None]
    playground.flushdb()

    with pytest.raises(StoreEmpty, match=r"subscriptions_profile, .*materialize"):
        read("nobody")
    with pytest.raises(StoreEmpty):
        read(A)


def test_a_wiped_view_is_not_filled_with_defaults(
    playground: redis_py.Redis, plan: Plan, read: Callable[..., Any]
) -> None:
    drop_view(playground, plan, "payments_agg_90d", A, B, "__sentinel__")

    with pytest.raises(StoreEmpty, match="no rows of payments_agg_90d; materialize"):
        read(A)


def test_probe_tells_full_from_empty(
    filled: Filled, playground: redis_py.Redis, plan: Plan, opened: Opener, runner: asyncio.Runner
) -> None:
    store = opened(filled.playground)
    runner.run(store.probe())
    drop_view(playground, plan, "support_agg_90d", "__sentinel__")

    with pytest.raises(StoreEmpty, match="no rows of support_agg_90d"):
        runner.run(store.probe())


@pytest.mark.parametrize(
    "value",
    [b"\x21\x05", b"\x20", b"\x20\xff", b"\x12\x05abc", b"\x12\x02\xff\xfe", b"\x38\x07", b"\x5a\x00", b"\x29\x00\x00",
     b"\r\n", b"7", b"\x20\x01\x20\x02"],
    ids=["wire", "no-number", "cut-number", "cut-text", "bad-utf8", "bool-7", "list", "cut-double", "line-end", "text",
         "two-values"],
)  # fmt: skip
def test_damaged_values_are_never_read(playground: redis_py.Redis, read: Callable[..., Any], value: bytes) -> None:
    playground.hset(key(A), field_name("usage_agg_30d", "skips_7d"), value)

    with pytest.raises(StoreDown, match="no value of a feature"):
        read(A)
    with pytest.raises(StoreDown, match="no value of a feature"):
        read(B, A)
    assert read(B)[0] is not None


@pytest.mark.parametrize("value", [b"2024-02-29", b"\x08", b"\x08\x80", b"\x08" + b"\xff" * 9, b"\x08\x01\x08\x02",
                                   b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f"])  # fmt: skip
def test_damaged_timestamps_are_never_read(playground: redis_py.Redis, read: Callable[..., Any], value: bytes) -> None:
    playground.hset(key(A), "_ts:usage_agg_30d", value)

    with pytest.raises(StoreDown, match="no timestamp"):
        read(A)


def test_another_type_of_key_is_down_for_its_user(playground: redis_py.Redis, read: Callable[..., Any]) -> None:
    playground.set(key(A), "once a hash")

    with pytest.raises(StoreDown, match="WRONGTYPE"):
        read(A)
    with pytest.raises(StoreDown, match="WRONGTYPE"):
        read(B, A, B)
    assert read(B)[0] is not None, "the connection is as good as before"


def rename_fields(admin: redis_py.Redis) -> None:
    fields = admin.hgetall(key("__sentinel__"))
    admin.delete(key("__sentinel__"))
    admin.hset(key("__sentinel__"), mapping={b"v2:" + name: value for name, value in fields.items()})


def cut_value(admin: redis_py.Redis) -> None:
    admin.hset(key("__sentinel__"), field_name("usage_agg_30d", "watch_hours_30d"), b"\x29\x00")


def drop_field(admin: redis_py.Redis) -> None:
    admin.hdel(key("__sentinel__"), field_name("usage_agg_30d", "watch_hours_30d"))


def text_timestamp(admin: redis_py.Redis) -> None:
    admin.hset(key("__sentinel__"), "_ts:usage_agg_30d", "2024-02-29")


def as_json(admin: redis_py.Redis) -> None:
    admin.set(key("__sentinel__"), "{}")


@pytest.mark.parametrize("change", [rename_fields, cut_value, drop_field, text_timestamp, as_json])
def test_a_probe_refuses_another_layout(
    filled: Filled,
    playground: redis_py.Redis,
    opened: Opener,
    runner: asyncio.Runner,
    change: Callable[[redis_py.Redis], None],
) -> None:
    change(playground)

    with pytest.raises(LayoutMismatch, match="not in the layout of Feast that is read here"):
        runner.run(opened(filled.playground).probe())


def test_a_service_is_ready_once_another_layout_is_mended(
    bento: Path, filled: Filled, playground: redis_py.Redis, database: str, tmp_path: Path
) -> None:
    drop_field(playground)
    settings = serving_process.environment(database=database, online_store=filled.playground, spool=tmp_path / "spool")
    with serving_process.start(bento, settings, wait=False) as service:
        service.wait_answering()
        refused = service.get("/readyz")
        with filled.admin() as source:
            assert source.copy(key("__sentinel__"), key("__sentinel__"), PLAYGROUND, replace=True)
        service.wait_ready()

    assert refused.status == 503
    assert "usage_agg_30d online lacks watch_hours_30d" in refused.json()["detail"]


def test_another_layout_is_down_and_not_unknown(playground: redis_py.Redis, read: Callable[..., Any]) -> None:
    rename_fields(playground)

    with pytest.raises(StoreDown, match="20 fields, but none of subscriptions_profile"):
        read("nobody")


# --- a server that is away, slow or odd ------------------------------------------------------------------------


@pytest.fixture
def own(filled: Filled, tmp_path: Path) -> Iterator[stores.Server]:
    """A server with a few users, to be stopped."""
    with stores.redis(tmp_path) as server:
        transfer(filled, server)
        yield server


def transfer(filled: Filled, server: stores.Server) -> None:
    with filled.admin() as source, redis_py.Redis(port=server.port) as target:
        for user in (A, B, "__sentinel__"):
            target.restore(key(user), 0, source.dump(key(user)), replace=True)


def back(runner: asyncio.Runner, store: OnlineStore) -> None:
    """Return when user A is read again; fail if it takes longer than it may."""

    def look() -> UserFeatures | None:
        with contextlib.suppress(StoreDown):
            (found,) = runner.run(store.read([A]))
            return found
        return None

    eventually(look, seconds=RECOVERED, what="reading a user")


def test_a_stopped_server_is_down_in_time_and_back_in_time(
    filled: Filled, own: stores.Server, opened: Opener, runner: asyncio.Runner
) -> None:
    store = opened(own.url)
    (before,) = runner.run(store.read([A]))
    own.stop(kill=True)
    for _ in range(3):
        with in_time(), pytest.raises(StoreDown, match=f"127.0.0.1:{own.port}"):
            runner.run(store.read([A]))
    own.start()
    transfer(filled, own)

    back(runner, store)

    assert runner.run(store.read([A])) == [before]


def test_a_server_that_hangs_is_down_in_time_and_back_in_time(
    own: stores.Server, opened: Opener, runner: asyncio.Runner
) -> None:
    store = opened(own.url)
    (a,), (b,) = runner.run(store.read([A])), runner.run(store.read([B]))
    assert own.process is not None
    own.process.send_signal(signal.SIGSTOP)
    try:

        async def crowd() -> list[Any]:
            return await asyncio.gather(*(store.read([A]) for _ in range(50)), return_exceptions=True)

        with in_time():
            found = runner.run(crowd())
        assert {type(answer) for answer in found} == {StoreDown}
        assert "no answer within 1 s" in str(found[0])
    finally:
        own.process.send_signal(signal.SIGCONT)

    back(runner, store)
    assert runner.run(store.read([B])) == [b], "answers that come late are nobody's"
    assert runner.run(store.read([A])) == [a]


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[tuple[int, list[int]]]:
    """A server that does something odd with each connection: its port, and a list that grows with them."""
    seen: list[int] = []
    open_ones = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    seen.append(1)
                    open_ones.append(connection)
                    with contextlib.suppress(OSError):
                        serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1], seen
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    for connection in open_ones:
        connection.close()


def test_a_black_hole_is_down_in_time_and_asked_by_one_at_a_time(
    plan: Plan, opened: Opener, runner: asyncio.Runner
) -> None:
    with listening(lambda _connection: None) as (port, _):
        store = RedisStore(f"redis://127.0.0.1:{port}", PROJECT, plan)
        with in_time(), pytest.raises(StoreDown, match="no answer within"):
            runner.run(store.read([A]))
        with in_time(ANSWER / 2), pytest.raises(StoreDown, match="no answer within"):
            runner.run(store.read([A]))

        async def crowd() -> list[float]:
            async def wait() -> float:
                started = time.monotonic()
                with contextlib.suppress(StoreDown):
                    await store.read([A])
                return time.monotonic() - started

            return await asyncio.gather(*(wait() for _ in range(100)))

        def one_asks() -> bool:
            return sum(took > ANSWER / 2 for took in runner.run(crowd())) == 1

        eventually(one_asks, seconds=RECOVERED, what="one of a hundred asking")
        store.close()


def test_connections_that_are_never_made_are_down_in_time(plan: Plan, runner: asyncio.Runner) -> None:
    """A listener whose queue is full: the kernel drops what asks for a connection."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        store = RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}", PROJECT, plan)

        with in_time(), pytest.raises(StoreDown, match="no answer within"):
            runner.run(store.read([A]))


def test_a_broken_connection_is_not_noticed_by_who_asks(
    filled: Filled, playground: redis_py.Redis, read: Callable[..., Any]
) -> None:
    before = read(A)
    assert playground.client_kill_filter(_type="normal", skipme=True) >= 1

    assert read(A) == before


def test_a_connection_that_breaks_twice_is_down(plan: Plan, runner: asyncio.Runner) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    with listening(hang_up) as (port, seen):
        store = RedisStore(f"redis://127.0.0.1:{port}", PROJECT, plan)
        with in_time(), pytest.raises(StoreDown, match=r"broke|reset"):
            runner.run(store.read([A]))

    assert len(seen) == 2, "tried twice, no more"


def test_a_server_that_hangs_up_behind_the_login_is_down(plan: Plan, runner: asyncio.Runner) -> None:
    """The connection has ended before who opened it can use it."""

    def hang_up(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(b"+OK\r\n")
        connection.close()

    async def ask(store: RedisStore) -> None:
        await asyncio.wait_for(store.read([A, B, A]), 2 * IN_TIME)

    with listening(hang_up) as (port, _):
        for _ in range(20):
            store = RedisStore(f"redis://127.0.0.1:{port}", PROJECT, plan)
            with in_time(), pytest.raises(StoreDown, match=f"127.0.0.1:{port}"):
                runner.run(ask(store))
            store.close()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$3\r\nabcd\r\n", b"+OK\r\n+OK\r\n", b"*1\r\n$-1\r\n", b":x\r\n"]
)
def test_what_is_no_redis_is_down(plan: Plan, runner: asyncio.Runner, answer: bytes) -> None:
    def reply(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(b"+OK\r\n")
        connection.recv(10_000)
        connection.sendall(answer)

    with listening(reply) as (port, _):
        store = RedisStore(f"redis://127.0.0.1:{port}", PROJECT, plan)
        with in_time(), pytest.raises(StoreDown, match=r"no Redis|odd reply"):
            runner.run(store.read([A]))
        store.close()


def test_two_questions_have_the_time_of_one(plan: Plan, runner: asyncio.Runner) -> None:
    """Nothing of the user, said late, and then no word about the sentinel."""
    late = threading.Event()

    def hesitate(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(b"+OK\r\n")
        connection.recv(10_000)
        late.wait(0.6 * ANSWER)
        connection.sendall(b"*20\r\n" + b"$-1\r\n" * 20)

    with listening(hesitate) as (port, seen):
        store = RedisStore(f"redis://127.0.0.1:{port}", PROJECT, plan)
        with in_time(), pytest.raises(StoreDown, match="no answer within"):
            runner.run(store.read([A]))

        def asked_again() -> bool:
            with contextlib.suppress(StoreDown):
                runner.run(store.read([A]))
            return len(seen) == 2

        eventually(asked_again, seconds=RECOVERED, what="another connection: on the first one, answers may come late")
        store.close()


def test_what_came_while_the_process_was_busy_is_an_answer(
    filled: Filled, opened: Opener, runner: asyncio.Runner
) -> None:
    """The time is over before the loop could look; the server was quick all the same."""
    store = opened(filled.server.url)
    runner.run(store.read([A]))

    async def busy() -> UserFeatures | None:
        reading = asyncio.create_task(store.read([A]))
        await asyncio.sleep(0)
        end = time.monotonic() + IN_TIME
        while time.monotonic() < end:
            pass
        return (await reading)[0]

    assert runner.run(busy()) is not None


def test_a_large_read_has_more_time_than_the_single_one_behind_it(
    own: stores.Server, opened: Opener, runner: asyncio.Runner
) -> None:
    store = opened(own.url)
    runner.run(store.read([A]))
    runner.run(asyncio.sleep(IN_TIME))  # nobody watches over the connection any more
    process = own.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)

    async def both() -> list[UserFeatures | None]:
        large = asyncio.create_task(store.read([A, B] * 400))
        await asyncio.sleep(0)
        try:
            with in_time(), pytest.raises(StoreDown, match="no answer within"):
                await store.read([A])
        finally:
            process.send_signal(signal.SIGCONT)
        return await large

    found = runner.run(both())
    assert len(found) == 800
    assert None not in found


def test_an_attempt_that_has_just_failed_is_not_joined(filled: Filled, plan: Plan, runner: asyncio.Runner) -> None:
    """To connect: it is over, and who comes in the same turn of the loop would wait for it for ever."""
    store = RedisStore(filled.server.url, PROJECT, plan)
    runner.run(store.read([A]))

    async def late() -> Any:
        raise TimeoutError

    async def ask() -> UserFeatures | None:
        store._client.close()
        store._client._opening = over = asyncio.create_task(late())
        await asyncio.wait([over])
        return (await store.read([A]))[0]

    assert runner.run(ask()) is not None
    store.close()


def test_everybody_gets_their_own_answer(
    filled: Filled, opened: Opener, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single look-ups and large ones at once over few connections, some of them given up on the way."""
    for module in (redis_client, redis_store):  # whose answer it is, not how soon a busy machine gives it
        monkeypatch.setattr(module, "ANSWER_SECONDS", 30.0)
    store = opened(filled.server.url)
    expected = dict(zip(filled.users, runner.run(store.read(filled.users)), strict=True))

    async def crowd() -> None:
        rng = random.Random(3)
        asked = [rng.sample(filled.users, rng.choice((1, 1, 1, 2, 400))) for _ in range(100)]
        tasks = [asyncio.create_task(store.read(users)) for users in asked]
        await asyncio.sleep(0)
        for task in tasks[::7]:
            task.cancel()
        for users, found in zip(asked, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if not isinstance(found, asyncio.CancelledError):
                assert found == [expected[user] for user in users]

    runner.run(crowd())


def test_a_long_queue_gets_a_companion(own: stores.Server, opened: Opener, runner: asyncio.Runner) -> None:
    store = opened(own.url)

    async def small_beside_large() -> None:
        await asyncio.gather(store.read([A, B] * 400), *(store.read([A]) for _ in range(10)))

    with redis_py.Redis(port=own.port) as admin:

        def connections() -> int:
            runner.run(small_beside_large())
            return len(admin.client_list()) - 1  # its own

        eventually(lambda: connections() >= 2, what="a second connection")
        assert max(connections() for _ in range(10)) <= POOL


# --- passwords and TLS --------------------------------------------------------------------------------------------


def test_passwords(own: stores.Server, opened: Opener, runner: asyncio.Runner) -> None:
    secret = "s3cret:@/é,"  # noqa: S105
    quoted = "s3cret%3A%40%2F%C3%A9%2C"
    with redis_py.Redis(port=own.port) as admin:
        admin.execute_command("ACL", "SETUSER", "reader", "on", f">{secret}", "~*", "+hmget", "+hlen", "+select")
        admin.config_set("requirepass", secret)
        where = f"127.0.0.1:{own.port}"

        (found,) = runner.run(opened(f"redis://:{quoted}@{where}/0").read([A]))
        (named,) = runner.run(opened(f"redis://reader:{quoted}@{where}").read([A]))
        assert found is not None
        assert named == found

        with pytest.raises(StoreDown, match="NOAUTH"):
            runner.run(opened(f"redis://{where}").read([A]))
        with in_time(), pytest.raises(StoreDown, match=r"not let in: WRONGPASS") as refused:
            runner.run(opened(f"redis://:ot%68er-secret@{where}").read([A]))
        assert "secret" not in str(refused.value)
        admin.config_set("requirepass", "")


def test_a_password_that_a_server_repeats_is_not_told(plan: Plan, runner: asyncio.Runner) -> None:
    def repeat(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(b"-ERR unknown command 'AUTH' of s3cret, with args beginning with: 's3cr'\r\n+OK\r\n")

    with listening(repeat) as (port, _):
        store = RedisStore(f"redis://:s3cret@127.0.0.1:{port}", PROJECT, plan)
        with pytest.raises(StoreDown, match=r"unknown command 'AUTH' of \*\*\*, $"):
            runner.run(store.read([A]))
    assert "s3cret" not in repr(Address.from_url("redis://:s3cret@host"))


def test_tls(filled: Filled, plan: Plan, tmp_path: Path, opened: Opener, runner: asyncio.Runner) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=store", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path, check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    with stores.redis(tmp_path) as server:
        transfer(filled, server)
        port = stores.free_port()
        with redis_py.Redis(port=server.port) as admin:
            try:
                admin.execute_command(
                    "CONFIG", "SET", "tls-cert-file", f"{tmp_path}/cert.pem", "tls-key-file", f"{tmp_path}/key.pem",
                    "tls-ca-cert-file", f"{tmp_path}/cert.pem", "tls-auth-clients", "no", "tls-port", port,
                )  # fmt: skip
            except redis_py.ResponseError as error:
                pytest.skip(f"this redis-server has no TLS: {error}")

        (found,) = runner.run(opened(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={tmp_path}/cert.pem").read([A]))
        assert found is not None
        for url, reason in ((f"rediss://127.0.0.1:{port}", "certificate verify failed"),
                            (f"rediss://127.0.0.1:{server.port}", "no answer|SSL|broke")):  # fmt: skip
            store = RedisStore(url, PROJECT, plan)
            with in_time(), pytest.raises(StoreDown, match=reason):
                runner.run(store.read([A]))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://valkey", Address("valkey")),
        ("redis://valkey:6380/2", Address("valkey", 6380, 2)),
        ("redis://:p%40ss@valkey:6379/0", Address("valkey", 6379, 0, "", "p@ss")),
        ("rediss://me:pass@[::1]:7000", Address("::1", 7000, 0, "me", "pass", tls=True)),
        ("rediss://h?ssl_ca_certs=/ca.pem", Address("h", tls=True, ca_file="/ca.pem")),
    ],
)
def test_urls(url: str, expected: Address) -> None:
    assert Address.from_url(url) == expected


@pytest.mark.parametrize(
    "url", ["redis://", "redis://:secret@h:port/0", "redis://:secret@h/zero", "redis://:se#cret@h", "redis://:secret@h?a=1",
            "http://:secret@h", "redis://:secret@h:99999"]
)  # fmt: skip
def test_urls_that_are_none_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(ValueError, match="URL of the online store") as refused:
        Address.from_url(url)
    assert "cret" not in str(refused.value)


# --- the protocol --------------------------------------------------------------------------------------------------


def test_commands_on_the_wire() -> None:
    assert command(b"AUTH", b"\r\n") == b"*2\r\n$4\r\nAUTH\r\n$2\r\n\r\n\r\n"


# --- the service ----------------------------------------------------------------------------------------------------


def test_the_service_answers_without_the_store_and_is_back_with_it(
    own: stores.Server, bento: Path, database: str, plan: Plan, features: list[dict[str, Any]], tmp_path: Path
) -> None:
    raw = {f["name"]: f["categories"][0] if f["categories"] else f["kind"] == "bool" or 5 for f in features}
    settings = serving_process.environment(database=database, online_store=own.url, spool=tmp_path / "spool")
    own.stop()
    with serving_process.start(bento, settings) as service:
        with in_time(IN_TIME + 0.1):
            assert service.post({"user_id": A}).status == 503
        assert service.post({"features": raw}).status == 200
        own.start()
        reply = eventually(
            lambda: (r := service.post({"user_id": A})).json()["error"] == "store_empty" and r,
            seconds=RECOVERED,
            what="reaching the store",
        )
        assert (reply.status, service.is_ready()) == (503, True)


def test_the_service_is_not_ready_on_another_layout(
    filled: Filled, playground: redis_py.Redis, bento: Path, database: str, tmp_path: Path
) -> None:
    rename_fields(playground)
    settings = serving_process.environment(database=database, online_store=filled.playground, spool=tmp_path / "spool")
    with serving_process.start(bento, settings, wait=False) as service:
        service.wait_answering()
        reply = eventually(
            lambda: (r := service.get("/readyz")).json()["detail"] != "the model is being loaded" and r, what="a reason"
        )
        assert reply.status == 503
        assert "not in the layout of Feast" in reply.json()["detail"]
