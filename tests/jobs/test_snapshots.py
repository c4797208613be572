"""The store of snapshots: what is read back, and that a day is there as a whole or not at all."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

from feature_repo.columns import TABLES
from jobs.snapshots import Snapshots, StoreLocked, fingerprint_of, instant

JANUARY, FEBRUARY = date(2024, 1, 31), date(2024, 2, 29)
TABLE = "support_agg_90d"


def tables(users: int = 12, tickets: int = 1) -> dict[str, pd.DataFrame]:
    """Every table, small; `tickets` makes contents that differ."""
    ids = [f"u{number:03}" for number in range(users)]
    samples = {"int": tickets, "float": 1.5, "bool": True, "category": "No", "date": date(2023, 5, 6)}
    return {
        name: pd.DataFrame({c.name: [samples[c.kind]] * users for c in table.columns}, index=ids)
        for name, table in TABLES.items()
    }


@pytest.fixture
def store(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path / "home" / "snapshots")


def test_instant_is_the_last_whole_second_of_the_day():
    assert instant(FEBRUARY) == datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)


def test_an_absent_store_has_no_days_and_is_not_made_by_looking(store: Snapshots):
    assert store.days() == []
    assert store.newest(instant(JANUARY)) is None
    store.recover()
    assert not store.root.parent.exists()


def test_newest_is_not_later_than_as_of(store: Snapshots):
    store.write(FEBRUARY, tables(), {})
    store.write(JANUARY, tables(), {})

    assert store.days() == [JANUARY, FEBRUARY]
    assert store.newest(instant(FEBRUARY)) == FEBRUARY
    assert store.newest(instant(FEBRUARY) - timedelta(seconds=1)) == JANUARY
    assert store.newest(instant(JANUARY) - timedelta(seconds=1)) is None


def test_frames_come_back_sorted_with_nullable_dtypes(store: Snapshots):
    written = tables()
    written["subscriptions"] = written["subscriptions"].iloc[::-1]
    written["usage_agg_30d"]["skips_7d"] = pd.array([None, *range(11)], dtype="Int64")

    store.write(JANUARY, written, {})

    subscriptions = store.read("subscriptions", JANUARY)
    assert list(subscriptions.index) == sorted(written["subscriptions"].index)
    assert (subscriptions.index.name, subscriptions.index.dtype) == ("user_id", object)
    assert "event_timestamp" not in subscriptions
    assert subscriptions.dtypes.astype(str).to_dict() == {
        "months_active": "Int64",
        "plan_stream_tv": "string",
        "plan_stream_movies": "string",
        "contract_type": "string",
        "paperless_billing": "boolean",
        "monthly_fee": "float64",
        "total_paid": "float64",
        "net_service": "string",
    }
    assert str(store.read("users", JANUARY)["signup_date"].dtype) == "datetime64[s]"
    assert store.read("usage_agg_30d", JANUARY)["skips_7d"].isna().sum() == 1


def test_every_day_has_the_same_schema_even_when_a_column_is_empty(store: Snapshots):
    """DuckDB, and so Feast, reads all days by one pattern."""
    store.write(JANUARY, tables(), {})
    empty = tables()
    empty[TABLE]["ticket_avg_resolution_hrs_90d"] = None
    store.write(FEBRUARY, empty, {})

    schemas = [pq.read_schema(store.root / str(day) / f"{TABLE}.parquet") for day in (JANUARY, FEBRUARY)]
    assert schemas[0].equals(schemas[1], check_metadata=True)
    assert str(schemas[0].field("event_timestamp").type) == "timestamp[us, tz=UTC]"
    counts = duckdb.sql(
        f"select event_timestamp at time zone 'UTC', count(ticket_avg_resolution_hrs_90d), count(*) "
        f"from '{store.glob(TABLE)}' group by 1 order by 1"
    ).fetchall()
    assert counts == [(instant(JANUARY).replace(tzinfo=None), 12, 12), (instant(FEBRUARY).replace(tzinfo=None), 0, 12)]


def test_the_pattern_does_not_see_what_is_being_written(store: Snapshots, monkeypatch: pytest.MonkeyPatch):
    store.write(JANUARY, tables(), {})
    with pytest.raises(Killed):
        kill_at(7, monkeypatch, lambda: store.write(FEBRUARY, tables(), {}))
    monkeypatch.undo()

    assert list(store.root.parent.glob("snapshots.staging/*"))
    assert duckdb.sql(f"select count(*) from '{store.glob(TABLE)}'").fetchall() == [(12,)]


def test_the_same_content_leaves_the_folder_untouched(store: Snapshots):
    store.write(JANUARY, tables(), {"ingested_at": "first"})
    before = state(store)

    shuffled = {name: frame.sample(frac=1, random_state=1) for name, frame in tables().items()}
    assert store.write(JANUARY, shuffled, {"ingested_at": "second"}) == "unchanged"
    assert state(store) == before


def test_the_record_has_rows_fingerprint_and_what_was_given(store: Snapshots):
    store.write(JANUARY, tables(), {"warnings": ["odd"], "ingested_at": "2024-02-01T00:00:00+00:00"})

    report = store.report(JANUARY)
    assert report["rows"] == dict.fromkeys(TABLES, 12)
    assert report["fingerprint"] == store.fingerprint(JANUARY) == fingerprint_of(tables(), JANUARY)
    assert report["warnings"] == ["odd"]


def test_fingerprint_is_of_the_contents_not_of_the_file(store: Snapshots):
    store.write(JANUARY, tables(), {})
    before = store.fingerprint(JANUARY)
    path = store.root / str(JANUARY) / f"{TABLE}.parquet"

    pq.write_table(pq.ParquetFile(path).read(), path, compression="gzip", use_dictionary=False, row_group_size=5)
    assert store.fingerprint(JANUARY) == before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda f: f.assign(support_tickets_90d=[None, *[1] * 11]), id="null"),
        pytest.param(lambda f: f.assign(support_tickets_90d=[0, *[1] * 11]), id="zero-is-not-null"),
        pytest.param(lambda f: f.rename(index={"u001": "u0010"}), id="user"),
        pytest.param(lambda f: f.iloc[1:], id="row"),
        pytest.param(lambda f: f.assign(ticket_avg_resolution_hrs_90d=1.5000000000000002), id="last-digit"),
    ],
)
def test_fingerprint_changes_with_any_value(change: Callable[[pd.DataFrame], pd.DataFrame]):
    changed = tables()
    changed[TABLE] = change(changed[TABLE])
    assert fingerprint_of(changed, JANUARY) != fingerprint_of(tables(), JANUARY)
    assert fingerprint_of(tables(), FEBRUARY) != fingerprint_of(tables(), JANUARY)


def test_a_damaged_day_is_written_anew(store: Snapshots):
    store.write(JANUARY, tables(), {})
    path = store.root / str(JANUARY) / f"{TABLE}.parquet"
    path.write_bytes(path.read_bytes()[:200])

    assert store.write(JANUARY, tables(), {}) == "replaced"
    assert store.fingerprint(JANUARY) == fingerprint_of(tables(), JANUARY)


def test_labels_are_there_when_their_table_is(store: Snapshots):
    without = {name: frame for name, frame in tables().items() if name != "labels"}
    store.write(JANUARY, without, {})
    assert not store.has_labels(JANUARY)
    assert store.write(JANUARY, tables(), {}) == "replaced"
    assert store.has_labels(JANUARY)


def test_what_is_not_stored_is_named(store: Snapshots):
    store.write(JANUARY, {TABLE: tables()[TABLE]}, {})
    with pytest.raises(FileNotFoundError, match=r"no snapshot of 2024-02-29 .*the newest of 2024-01-31"):
        store.read(TABLE, FEBRUARY)
    with pytest.raises(FileNotFoundError, match="snapshot 2024-01-31 has no labels; it has support_agg_90d"):
        store.read("labels", JANUARY)


# --- killed at any step ---------------------------------------------------------------------------------

STEPS = ("rename", "fsync", "unlink", "rmdir", "mkdir")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may answer it."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> bool:
    """Do it, and die before the given change to the disk; False when there were fewer."""
    count = 0

    def patched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, patched(getattr(os, name)))
    act()
    return count >= step


@pytest.mark.parametrize("existed", [False, True], ids=["new", "corrected"])
def test_killed_at_any_step_the_old_or_the_new_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool):
    """Also when what recovers is killed at any of its steps."""
    names = (TABLE,)
    old, new = ({name: tables(tickets=n)[name] for name in names} for n in (1, 2))
    good = {fingerprint_of(new, JANUARY), fingerprint_of(old, JANUARY) if existed else None}
    seen: list[str | None] = []

    def attempt(step: int, recovery_step: int) -> tuple[bool, bool]:
        store = Snapshots(tmp_path / f"{step}-{recovery_step}" / "snapshots")
        if existed:
            store.write(JANUARY, old, {})
        killed = dies(step, lambda: Snapshots(store.root).write(JANUARY, new, {}))
        killed_again = dies(recovery_step, lambda: Snapshots(store.root).recover())
        Snapshots(store.root).recover()

        found = store.fingerprint(JANUARY) if store.days() else None
        assert found in good, f"killed at {step}, then at {recovery_step}"
        assert not store.root.with_name("snapshots.staging").exists()
        assert Snapshots(store.root).write(JANUARY, new, {}) in {"written", "replaced", "unchanged"}
        assert store.fingerprint(JANUARY) == fingerprint_of(new, JANUARY)
        seen.append(found)
        return killed, killed_again

    def dies(step: int, act: Callable[[], object]) -> bool:
        try:
            kill_at(step, monkeypatch, act)
        except Killed:
            return True
        finally:
            monkeypatch.undo()
        return False

    step = 1
    while True:
        recovery_step = 1
        while True:
            killed, killed_again = attempt(step, recovery_step)
            if not killed_again:
                break
            recovery_step += 1
        if not killed:
            break
        step += 1
    assert step > 10
    assert set(seen) == good


_WRITER = """
import sys
from pathlib import Path
from jobs.snapshots import Snapshots
from tests.jobs.test_snapshots import JANUARY, tables
store, contents = Snapshots(Path(sys.argv[1])), [tables(tickets=1), tables(tickets=2)]
print("ready", flush=True)
while True:
    for content in contents:
        store.write(JANUARY, content, {})
"""


def test_sigkill_while_writing_leaves_a_whole_snapshot(store: Snapshots):
    store.write(JANUARY, tables(tickets=1), {})
    good = {fingerprint_of(tables(tickets=n), JANUARY) for n in (1, 2)}
    for seed in range(3):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(store.root)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(random.Random(seed).uniform(0.01, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()

        store.recover()
        assert store.fingerprint(JANUARY) in good


# --- two at once ----------------------------------------------------------------------------------------


def test_who_waits_too_long_is_told_who_holds(store: Snapshots):
    other = Snapshots(store.root)
    too_late = pytest.raises(StoreLocked, match=rf"held by pid {os.getpid()} on .*after 0.1 s")
    with store.lock(), store.lock(), too_late, other.lock(wait=0.1):  # the same store may take it again
        pass
    with Snapshots(store.root).lock(wait=0.1):
        pass


def test_two_writers_at_once_leave_one_of_the_two(store: Snapshots):
    contents = [tables(tickets=n) for n in (1, 2)]
    failures: list[BaseException] = []

    def write(content: dict[str, pd.DataFrame]) -> None:
        try:
            for _ in range(5):
                Snapshots(store.root).write(JANUARY, content, {})
        except BaseException as error:  # what a thread raises is lost otherwise
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert store.fingerprint(JANUARY) in {fingerprint_of(content, JANUARY) for content in contents}


def state(store: Snapshots) -> dict[str, tuple[bytes, int, int]]:
    files = [path for path in store.root.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in files}
