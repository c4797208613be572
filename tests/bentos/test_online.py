"""Features read from Feast's online store: the same as its SDK reads, and never a guess."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import struct
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bentos.churn import online as online_module
from bentos.churn.model import Plan
from bentos.churn.online import (
    READ_SECONDS,
    OnlineStore,
    StoreDown,
    StoreEmpty,
    UserFeatures,
    decode_timestamp,
    decode_value,
    entity_key,
    open_store,
)
from tests.bentos.conftest import AS_OF, NO_PAYMENTS, NO_USAGE, OLD, FeastStore


@pytest.fixture
def copy(online: FeastStore, tmp_path: Path) -> Path:
    """The store's file, to be broken."""
    return Path(shutil.copy(online.path, tmp_path / "online.db"))


@pytest.fixture
def store(copy: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnlineStore]:
    """It answers when it can: what is tested is what it says, but for the one test of when it gives up."""
    monkeypatch.setattr(online_module, "READ_SECONDS", 30.0)
    opened = open_store(f"sqlite:///{copy}", "churn", plan)
    yield opened
    opened.close()


def read(store: OnlineStore, *users: str) -> list[UserFeatures | None]:
    return asyncio.run(store.read(users))


def execute(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_same_values_and_timestamps_as_feast(online: FeastStore, store: OnlineStore, plan: Plan) -> None:
    """1,000 users, nulls, absent rows, an unknown user: every value, its type, and when it was true."""
    users = [*online.users, "nobody"]
    references = [f"{feature.view}:{feature.name}" for feature in plan.features]
    answer = online.sdk.get_online_features(references, [{"user_id": user} for user in users])
    expected = answer.to_dict(include_event_timestamps=True)

    found = read(store, *users)

    assert len(found) == 1001
    assert found[-1] is None
    nulls = 0
    for i, (user, features) in enumerate(zip(online.users, found[:-1], strict=True)):
        assert features is not None
        for feature in plan.features:
            value = features.values[feature.name]
            assert value == expected[feature.name][i], (user, feature.name)
            assert type(value) is type(expected[feature.name][i])
            nulls += value is None
            stamp = expected[f"{feature.name}__ts"][i]
            at = features.ages.timestamps.get(feature.view)
            assert (at.timestamp() if at else 0) == stamp
    assert nulls > 100
    assert {type(v) for f in found[:-1] if f for v in f.values.values()} == {int, float, bool, str, type(None)}


def test_a_user_that_is_asked_for_twice_is_answered_twice(store: OnlineStore) -> None:
    first, unknown, second = read(store, "u-0001", "nobody", "u-0001")

    assert first == second
    assert unknown is None


def test_absent_rows_are_nulls_of_their_view_alone(store: OnlineStore) -> None:
    no_payments, no_usage = read(store, NO_PAYMENTS, NO_USAGE)

    assert no_payments is not None
    assert no_usage is not None
    assert no_payments.values["failed_payments_90d"] is None
    assert "payments_agg_90d" not in no_payments.ages.timestamps
    assert no_usage.values["skips_7d"] is None
    assert no_usage.values["monthly_fee"] is not None


def test_timestamps_are_per_view(store: OnlineStore) -> None:
    (user,) = read(store, OLD)

    assert user is not None
    assert user.ages.timestamps["support_agg_90d"] == AS_OF
    assert (AS_OF - user.ages.timestamps["usage_agg_30d"]).days == 60


def test_unknown_users_of_an_unfilled_store_are_not_unknown(copy: Path, store: OnlineStore) -> None:
    execute(copy, *(f"DELETE FROM {table}" for table in tables(copy)))

    with pytest.raises(StoreEmpty, match="materialize"):
        read(store, "u-0001")


def test_a_wiped_view_is_not_filled_with_defaults(copy: Path, store: OnlineStore) -> None:
    """failed_payments_90d has a default; all of its view gone is another matter than one user without a row."""
    execute(copy, "DELETE FROM churn_payments_agg_90d")

    with pytest.raises(StoreEmpty, match="payments_agg_90d"):
        read(store, "u-0001")


def test_probe_tells_full_from_empty(copy: Path, store: OnlineStore) -> None:
    asyncio.run(store.probe())
    execute(copy, "DELETE FROM churn_support_agg_90d")

    with pytest.raises(StoreEmpty, match="support_agg_90d"):
        asyncio.run(store.probe())


def tables(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'churn_%'")
        return [name for (name,) in names]


def test_a_missing_file_is_down_until_it_is_back(copy: Path, store: OnlineStore, online: FeastStore) -> None:
    assert read(store, "u-0001")[0] is not None
    copy.unlink()
    with pytest.raises(StoreDown, match="No such file"):
        read(store, "u-0001")
    shutil.copy(online.path, copy)

    assert read(store, "u-0001")[0] is not None


def test_a_file_put_in_its_place_is_read(copy: Path, store: OnlineStore, tmp_path: Path) -> None:
    before = read(store, "u-0001")[0]
    other = Path(shutil.copy(copy, tmp_path / "other.db"))
    execute(other, "DELETE FROM churn_support_agg_90d WHERE event_ts IS NOT NULL AND entity_key != "
                   f"x'{entity_key('__sentinel__').hex()}'")  # fmt: skip
    other.replace(copy)

    after = read(store, "u-0001")[0]

    assert before is not None
    assert after is not None
    assert "support_agg_90d" in before.ages.timestamps
    assert "support_agg_90d" not in after.ages.timestamps


def test_a_missing_table_is_down(copy: Path, store: OnlineStore) -> None:
    execute(copy, "DROP TABLE churn_usage_agg_30d")

    with pytest.raises(StoreDown, match="no such table"):
        read(store, "u-0001")


def test_no_database_at_all_is_down(copy: Path, store: OnlineStore) -> None:
    copy.write_bytes(b"this is not a database" * 1000)

    with pytest.raises(StoreDown, match="not a database"):
        read(store, "u-0001")


def test_a_lock_is_waited_for_300_ms(copy: Path, store: OnlineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_module, "READ_SECONDS", READ_SECONDS)
    read(store, "u-0001")
    with contextlib.closing(sqlite3.connect(copy)) as writer:
        writer.execute("PRAGMA locking_mode = EXCLUSIVE")
        writer.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        with pytest.raises(StoreDown, match="locked"):
            read(store, "u-0001")
        waited = time.monotonic() - started
        writer.rollback()

    assert READ_SECONDS * 0.8 < waited < READ_SECONDS + 0.5
    assert read(store, "u-0001")[0] is not None


@pytest.mark.parametrize(
    "value",
    [b"\x21\x05", b"\x20", b"\x20\xff", b"\x12\x05abc", b"\x12\x02\xff\xfe", b"\x2a\x01a", b"\x38\x07",
     b"\x20\x01\x20\x02", b"\x5a\x00", b"\x00", b"\x20" + b"\xff" * 12, b"\x29\x00\x00"],
    ids=["wire", "no-number", "cut-number", "cut-text", "bad-utf8", "cut-list", "bool-7", "two-values", "list",
         "zero", "eleven-bytes", "cut-double"],
)  # fmt: skip
def test_damaged_values_are_never_read(copy: Path, store: OnlineStore, value: bytes) -> None:
    key = entity_key("u-0001").hex()
    execute(copy, f"UPDATE churn_usage_agg_30d SET value = x'{value.hex()}' WHERE entity_key = x'{key}'")

    with pytest.raises(StoreDown, match="no value of a feature"):
        read(store, "u-0001")
    assert read(store, "u-0002")[0] is not None


def test_values_of_every_type_in_feast_encoding() -> None:
    from feast.protos.feast.types.Value_pb2 import Value

    for value in (0, 1, -1, 2**40, -(2**63), 2**63 - 1):
        assert decode_value(Value(int64_val=value).SerializeToString()) == value
    for number in (0.0, -1.5, 1e300):
        assert decode_value(Value(double_val=number).SerializeToString()) == number
    assert decode_value(Value(float_val=0.5).SerializeToString()) == 0.5
    assert decode_value(Value(int32_val=-7).SerializeToString()) == -7
    assert decode_value(Value(bool_val=False).SerializeToString()) is False
    assert decode_value(Value(bool_val=True).SerializeToString()) is True
    assert decode_value(Value(string_val="x" * 300).SerializeToString()) == "x" * 300
    assert decode_value(Value(string_val="").SerializeToString()) == ""
    assert decode_value(Value().SerializeToString()) is None
    assert decode_value(Value(null_val=0).SerializeToString()) is None


def test_keys_are_feasts() -> None:
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    for user in ("a", "7590-VHVEG", "Zoë ☂", "x" * 128):
        key = EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)])
        assert entity_key(user) == serialize_entity_key(key, entity_key_serialization_version=3)
    assert struct.unpack_from("<I", entity_key("a"))[0] == 1


@pytest.mark.parametrize("stored", ["2024-02-29T23:59:59", "2024-02-29 23:59:59", "2024-03-01T00:59:59+01:00"])
def test_timestamps_in_text(stored: str) -> None:
    assert decode_timestamp(stored) == datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)


def test_a_timestamp_that_is_none_is_down() -> None:
    with pytest.raises(StoreDown, match="yesterday"):
        decode_timestamp("yesterday")


def test_other_stores_are_named_in_the_refusal(plan: Plan) -> None:
    with pytest.raises(ValueError, match="mysql"):
        open_store("mysql://host/db", "churn", plan)
