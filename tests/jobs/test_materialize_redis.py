"""The same store's life on Redis: filled, again after it was wiped or halved, corrected data for a day that is there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

import jobs.materialize
from bentos.churn.model import Feature, Plan
from bentos.churn.online import UserFeatures, open_store
from bentos.churn.redis_store import decode_instant
from feature_repo.columns import FEATURE_TABLES, POPULATION, view_name
from jobs import dataset
from jobs.materialize import SENTINEL, OnlineMismatch, materialize, online_as_of
from jobs.settings import Settings
from jobs.snapshots import Snapshots, instant
from tests import stores
from tests.jobs.conftest import FIRST, SECOND, settings_for

DB = 3
USERS = 400  # of each snapshot: a materialization of all takes seconds


@pytest.fixture
def admin(redis_server: stores.Server) -> Iterator[redis_py.Redis]:
    """Somebody with a general client, in an empty database."""
    with redis_py.Redis(port=redis_server.port, db=DB) as client:
        client.flushdb()
        yield client
        client.flushdb()


@pytest.fixture
def settings(home: Path, redis_server: stores.Server, admin: redis_py.Redis) -> Settings:
    """Settings of a home with two small snapshots, and features in Redis."""
    settings = settings_for(home, online_store_url=f"redis://127.0.0.1:{redis_server.port}/{DB}")
    snapshots = Snapshots(settings.snapshots)
    for day in (FIRST, SECOND):
        tables = {name: snapshots.read(name, day) for name in snapshots.tables(day)}
        kept = tables[POPULATION].index[:USERS]
        snapshots.write(day, {name: table[table.index.isin(kept)] for name, table in tables.items()}, {})
    return settings


def online_rows(admin: redis_py.Redis) -> dict[bytes, dict[bytes, bytes]]:
    """Everything in the database."""
    return {key: admin.hgetall(key) for key in admin.scan_iter(count=1000)}


def correct(settings: Settings, user: str, fee: float) -> None:
    """Write the second snapshot anew, with another fee for a user."""
    snapshots = Snapshots(settings.snapshots)
    tables = {name: snapshots.read(name, SECOND) for name in snapshots.tables(SECOND)}
    tables[POPULATION].loc[user, "monthly_fee"] = fee
    snapshots.write(SECOND, tables, {})


def served(settings: Settings, user: str) -> UserFeatures | None:
    """What the service would read of a user."""
    plan = Plan([Feature(c.name, view_name(t.name), "float") for t in FEATURE_TABLES for c in t.columns])
    store = open_store(settings.online_store, settings.feast_project, plan)
    return asyncio.run(store.read([user]))[0]


def test_the_story_of_a_store(settings: Settings, admin: redis_py.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """One store through a month's life, because each materialization costs seconds."""
    second = instant(SECOND)
    dry = materialize(settings, as_of=instant(FIRST), dry_run=True)
    assert (dry.result, dry.full) == ("dry_run", True)
    assert admin.dbsize() == 0

    first = materialize(settings, as_of=instant(FIRST))
    assert (first.result, first.full, first.users, first.compared) == ("materialized", True, USERS, 200)
    assert admin.dbsize() == USERS + 1, "one hash a user, and the sentinel's"

    found = materialize(settings, as_of=second)
    assert (found.full, found.start) == (False, instant(FIRST)), "the window begins where the store ends"

    user = str(Snapshots(settings.snapshots).read(POPULATION, SECOND).index[0])
    correct(settings, user, 77.25)
    with monkeypatch.context() as patch:
        real = dataset.online_store
        patch.setattr(dataset, "online_store", lambda url: {**real(url), "skip_dedup": False})
        patch.setattr("jobs.materialize.SAMPLE", USERS)
        # Feast drops rows of an instant that is there; a store that does not hold what was written is found out
        with pytest.raises(OnlineMismatch, match=r"monthly_fee of user .*77.25.* offline; 1 of 400 users differ"):
            materialize(settings, as_of=second)
    assert not materialize(settings, as_of=second).full
    features = served(settings, user)
    assert features is not None
    assert features.values["monthly_fee"] == 77.25, "corrected data for the same instant replaces the old"
    assert set(features.ages.timestamps.values()) == {second}

    rows = online_rows(admin)
    assert materialize(settings, as_of=second).result == "materialized"
    assert online_rows(admin) == rows, "running it twice changes nothing"
    assert materialize(settings, as_of=instant(FIRST)).result == "newer_online"
    assert online_rows(admin) == rows, "an older snapshot does not replace a newer one"
    assert not materialize(settings, as_of=second, dry_run=True).full

    sentinel = next(key for key in rows if SENTINEL.encode() in key)
    stamp = rows[sentinel][b"_ts:support_agg_90d"]
    admin.hdel(sentinel, "_ts:support_agg_90d")
    assert materialize(settings, as_of=second, dry_run=True).full, "a view whose sentinel is gone was wiped"
    admin.hset(sentinel, "_ts:support_agg_90d", stamp)
    admin.delete(*[key for key in sorted(rows) if key != sentinel][::2])
    assert materialize(settings, as_of=second, dry_run=True).full, "half of the keys are gone"

    admin.flushdb()
    assert online_as_of(dataset.feature_store(settings)) is None
    assert materialize(settings, as_of=second).full
    assert online_rows(admin) == rows, "a wiped store is filled again"


def test_a_damaged_row_is_written_again_with_what_older_months_hold_of_it(
    settings: Settings, admin: redis_py.Redis
) -> None:
    """One user whom no sample has, and of whom one view has no row in the newest month."""
    snapshots = Snapshots(settings.snapshots)
    sample = jobs.materialize._sample(snapshots, SECOND)
    both = snapshots.read(POPULATION, SECOND).index.intersection(snapshots.read(POPULATION, FIRST).index)
    user = next(user for user in both if user not in sample)
    tables = {name: snapshots.read(name, SECOND) for name in snapshots.tables(SECOND)}
    gap = next(table.name for table in FEATURE_TABLES if table.name != POPULATION and user in tables[table.name].index)
    snapshots.write(SECOND, {**tables, gap: tables[gap].drop(user)}, {})
    materialize(settings, as_of=instant(FIRST))
    materialize(settings, as_of=instant(SECOND))
    rows = online_rows(admin)
    key = next(key for key in rows if str(user).encode() in key)
    assert decode_instant(rows[key][f"_ts:{view_name(gap)}".encode()]) == instant(FIRST)
    admin.set(key, "x")

    assert materialize(settings, as_of=instant(SECOND)).full
    assert online_rows(admin) == rows


def test_damaged_rows_are_written_again(
    settings: Settings, admin: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of another type, values that are cut off, the sentinel's too. What is whole does not change meanwhile."""
    second = instant(SECOND)
    materialize(settings, as_of=second)
    rows = online_rows(admin)
    for number, key in enumerate(sorted(rows)):
        if number % 3 == 0:
            admin.set(key, "x")
        elif number % 3 == 1 or SENTINEL.encode() in key:
            for name, value in rows[key].items():
                admin.hset(key, name, value[:-1])
    whole = {key for key, row in rows.items() if admin.type(key) == b"hash" and admin.hgetall(key) == row}
    assert len(whole) > 100
    real, writes = jobs.materialize._write, []

    def write(*arguments: Any) -> None:
        real(*arguments)
        writes.append({key for key in whole if admin.hgetall(key) == rows[key]})

    monkeypatch.setattr(jobs.materialize, "_write", write)

    assert materialize(settings, as_of=second).full
    assert online_rows(admin) == rows
    assert writes[-2:] == [whole, whole], "January is not written over February"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://valkey", {"host": "valkey", "port": "6379", "db": 0}),
        ("redis://:1e5@valkey:6380/2", {"host": "valkey", "port": "6380", "db": 2, "password": "1e5"}),
        ("redis://:true@v", {"host": "v", "port": "6379", "db": 0, "password": "true"}),
        (
            "rediss://me:a%2Cb%3D%22c%5C@v?ssl_ca_certs=/ca,1.pem",
            {"host": "v", "port": "6379", "db": 0, "username": "me", "password": 'a,b="c\\', "ssl": True,
             "ssl_ca_certs": "/ca,1.pem"},
        ),
    ],
)  # fmt: skip
def test_feast_reads_from_its_connection_string_what_the_url_says(url: str, expected: dict[str, object]) -> None:
    """Commas, quotes, and passwords that look like numbers survive Feast's way of reading."""
    from feast.infra.online_stores.redis import RedisOnlineStore

    section = dataset.online_store(url)
    (node,), options = RedisOnlineStore._parse_connection_string(section["connection_string"])

    timeouts = {name: options.pop(name) for name in ("socket_timeout", "socket_connect_timeout")}
    assert {**node, **options} == expected
    assert all(timeouts.values())
    assert section["skip_dedup"] is True


def test_a_file_of_your_own_is_used(tmp_path: Path) -> None:
    """`feature_store_yaml` stays a setting, and may use the URL's section or have its own."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "project: ${feast_project}\nprovider: local\nregistry: {registry_type: sql, path: ${feast_registry}}\n"
        "offline_store: {type: duckdb}\nonline_store: {type: redis, connection_string: 'elsewhere:6379'}\n"
        "entity_key_serialization_version: 3\n"
    )
    settings = settings_for(tmp_path, feature_store_yaml=mine)

    store = dataset.feature_store(settings)

    assert store.config.online_store.connection_string == "elsewhere:6379"
    assert store.config.project == "churn"


def test_other_stores_are_named_in_the_refusal() -> None:
    with pytest.raises(ValueError, match="mysql:// is no online store"):
        dataset.online_store("mysql://me:secret@host/db")
