"""Predictions on their way to the database: none missing, none twice, whatever breaks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bentos.churn import spool as spool_module
from bentos.churn.shipper import COLUMNS, Shipper, SqliteLog, open_log
from bentos.churn.spool import Spool, SpoolDown, SpoolFull, frame, read_records
from tests import stores
from tests.bentos import serving_process
from tests.bentos.serving_process import eventually

if TYPE_CHECKING:  # else the processes that these tests kill would import all of scikit-learn first
    from tests.bentos.conftest import FeastStore


def record(i: int, **changes: Any) -> bytes:
    row = {
        "prediction_id": f"{i:032x}", "request_id": f"r{i}", "user_id": f"u{i}", "source": "client",
        "predicted_at": "2024-03-01T00:00:00.000000+00:00", "bento_tag": "churn:v1-00000000", "model_version": 1,
        "churn_probability": 0.25, "churn": False, "threshold": 0.5, "features_as_of": None, "stale": False,
        "features": '{"a":1}', **changes,
    }  # fmt: skip
    return json.dumps(row, separators=(",", ":")).encode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def spool_at(root: Path, max_bytes: int = 2**20, **settings: Any) -> Spool:
    return Spool(root, max_bytes=max_bytes, **settings)


def logged(database: str) -> list[str]:
    with contextlib.closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as connection:
        rows = connection.execute("SELECT prediction_id FROM predictions ORDER BY prediction_id")
        return [prediction_id for (prediction_id,) in rows]


def ids(*numbers: int) -> list[str]:
    return [f"{i:032x}" for i in numbers]


def quarantined(root: Path) -> list[Path]:
    return sorted((root / "quarantine").glob("*")) if (root / "quarantine").exists() else []


# --- records in a segment ---------------------------------------------------------------------------------


def test_a_tail_cut_at_any_byte_loses_the_cut_record_only() -> None:
    whole = [frame(record(i)) for i in range(3)]
    data = b"".join(whole)
    for cut in range(len(data)):
        complete = sum(cut >= sum(map(len, whole[: i + 1])) for i in range(3))

        records, damaged = read_records(data[:cut])

        assert records == [record(i) for i in range(complete)]
        assert b"".join(damaged) == data[sum(map(len, whole[:complete])) : cut]


@pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
def test_any_flipped_byte_loses_its_record_only(position: int) -> None:
    whole = [frame(record(i)) for i in range(3)]
    start = sum(map(len, whole[:position]))
    others = [record(i) for i in range(3) if i != position]
    for at in range(start, start + len(whole[position])):
        for bit in (0x01, 0x80, 0xFF):
            data = bytearray(b"".join(whole))
            data[at] ^= bit

            records, damaged = read_records(bytes(data))

            assert records == others, (at, bit)
            assert sum(map(len, damaged)) == len(whole[position])


def test_bytes_that_are_no_records_are_damaged() -> None:
    assert read_records(b"") == ([], [])
    assert read_records(b"\0" * 100) == ([], [b"\0" * 100])


# --- the spool --------------------------------------------------------------------------------------------


def test_a_full_spool_refuses_and_takes_again_when_there_is_room(root: Path, database: str) -> None:
    size = len(frame(record(0)))
    spool = spool_at(root, max_bytes=3 * size)
    spool.append([record(0), record(1)])
    with pytest.raises(SpoolFull):
        spool.append([record(2), record(3)])
    spool.append([record(2)])

    Shipper(spool, SqliteLog(database)).ship_once()
    spool.append([record(4)])

    assert logged(database) == ids(0, 1, 2)
    assert spool.backlog_bytes == size


def test_what_a_dead_process_left_counts_too(root: Path) -> None:
    first = spool_at(root)
    first.append([record(i) for i in range(4)])

    second = spool_at(root, max_bytes=first.backlog_bytes + 10)

    with pytest.raises(SpoolFull):
        second.append([record(9)])


def test_a_write_that_fails_is_an_error_and_leaves_nothing_behind(
    root: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spool_at(root)
    spool.append([record(0)])
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(spool_module.os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
        with pytest.raises(SpoolDown, match="no space left"):
            spool.append([record(1)])
    spool.append([record(2)])
    shipper = Shipper(spool, SqliteLog(database))

    shipper.ship_once()

    assert logged(database) == ids(0, 2)
    assert shipper.quarantined == 0
    assert spool.backlog_bytes == 0


def test_a_folder_that_went_away_is_an_error_not_a_loss(root: Path) -> None:
    spool = spool_at(root)
    (spool.folder / "lock").unlink()
    spool.folder.rmdir()

    with pytest.raises(SpoolDown):
        spool.append([record(0)])


def test_segments_grow_no_further_than_their_bound(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 2_000)
    spool = spool_at(root)
    for i in range(20):
        spool.append([record(i)])

    assert max(path.stat().st_size for path in spool.folder.glob("*.seg")) < 2_000 + len(frame(record(0)))


@pytest.mark.parametrize("fsync", [False, True], ids=["never", "batch"])
def test_nothing_is_lost_between_appending_and_shipping(root: Path, database: str, fsync: bool) -> None:
    spool = spool_at(root, fsync=fsync)
    shipper = Shipper(spool, SqliteLog(database))
    done = threading.Event()

    def ship() -> None:
        while not done.is_set():
            shipper.ship_once()

    thread = threading.Thread(target=ship)
    thread.start()
    for i in range(500):
        spool.append([record(2 * i), record(2 * i + 1)])
    done.set()
    thread.join(20)
    shipper.ship_once()

    assert logged(database) == ids(*range(1000))
    assert spool.backlog_bytes == 0


# --- the dead and the living ------------------------------------------------------------------------------


def die_after_appending(root: Path, *numbers: int, tail: bytes = b"") -> None:
    """A process that is killed by SIGKILL with records in its spool, and half of one."""
    code = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from bentos.churn.spool import Spool\n"
        "from tests.bentos.test_spool import record\n"
        "spool = Spool(Path(sys.argv[1]), max_bytes=2**20)\n"
        "spool.append([record(int(i)) for i in sys.argv[3:]])\n"
        "os.write(spool._fd, bytes.fromhex(sys.argv[2]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(root), tail.hex(), *map(str, numbers)],
        check=False, cwd=Path(__file__).parents[2], timeout=60,
    )  # fmt: skip


def test_the_next_process_ships_what_a_killed_one_left(root: Path, database: str) -> None:
    die_after_appending(root, 1, 2, 3, tail=frame(record(4))[:-5])
    spool = spool_at(root)
    spool.append([record(9)])
    shipper = Shipper(spool, SqliteLog(database))

    shipper.ship_once()
    spool.look_around()

    assert logged(database) == ids(1, 2, 3, 9)
    assert shipper.quarantined == 1
    assert [path.name for path in root.iterdir() if path.name.startswith("worker-")] == [spool.folder.name]


def test_the_living_are_left_alone(root: Path, database: str) -> None:
    one, other = spool_at(root), spool_at(root)
    one.append([record(1)])
    other.look_around()

    Shipper(other, SqliteLog(database)).ship_once()

    assert logged(database) == []
    assert len(list(one.folder.glob("*.seg"))) == 1


def test_a_process_that_dies_while_another_lives_is_adopted(root: Path, database: str) -> None:
    alive = spool_at(root)
    shipper = Shipper(alive, SqliteLog(database))
    shipper.start()
    die_after_appending(root, 5, 6)

    eventually(lambda: logged(database) == ids(5, 6))

    assert shipper.drain(10)
    assert list(root.glob("worker-*")) == []


def test_shipping_again_adds_nothing(root: Path, database: str) -> None:
    """A crash between the database's commit and the removal of the segment."""
    for _ in range(2):
        spool = spool_at(root)
        spool.append([record(1), record(2)])
        Shipper(spool, SqliteLog(database)).ship_once()

    assert logged(database) == ids(1, 2)
    assert quarantined(root) == []


# --- the database -----------------------------------------------------------------------------------------


def refuse(database: str, *numbers: int) -> None:
    """The database will not take these rows."""
    with contextlib.closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as connection, connection:
        for i in numbers:
            connection.execute(
                f"CREATE TRIGGER refuse_{i} BEFORE INSERT ON predictions WHEN NEW.prediction_id = '{i:032x}' "
                "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
            )


def test_a_row_the_database_refuses_is_kept_aside_and_the_others_go_on(root: Path, database: str) -> None:
    refuse(database, 137)
    spool = spool_at(root)
    spool.append([record(i) for i in range(300)])
    spool.append([record(300)])
    shipper = Shipper(spool, SqliteLog(database))

    shipper.ship_once()

    assert logged(database) == ids(*(i for i in range(301) if i != 137))
    assert shipper.quarantined == 1
    (kept,) = quarantined(root)
    assert kept.read_bytes() == record(137)
    assert spool.backlog_bytes == kept.stat().st_size or spool.backlog_bytes == 0


@pytest.mark.parametrize(
    "poison",
    [{"prediction_id": None}, {"churn_probability": [1]}, {"model_version": 2**70}, {"user_id": "\ud800"}],
    ids=["null-key", "list", "huge-int", "surrogate"],
)
def test_rows_that_cannot_be_bound_are_kept_aside(root: Path, database: str, poison: dict[str, Any]) -> None:
    spool = spool_at(root)
    spool.append([record(1), record(2, **poison), record(3)])
    shipper = Shipper(spool, SqliteLog(database))

    shipper.ship_once()

    assert logged(database) == ids(1, 3)
    assert shipper.quarantined == 1


def test_damaged_records_are_kept_aside_and_the_others_go_on(root: Path, database: str) -> None:
    spool = spool_at(root)
    spool.append([record(i) for i in range(3)])
    spool.seal()
    (segment,) = spool.segments()
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    shipper = Shipper(spool, SqliteLog(database))

    shipper.ship_once()

    assert logged(database) == ids(0, 2)
    assert shipper.quarantined == 1
    assert len(quarantined(root)) == 1


class Away:
    """A database that is away at first."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.records: list[bytes] = []

    def insert(self, records: Sequence[bytes]) -> None:
        self.times -= 1
        if self.times >= 0:
            raise OSError("connection refused")
        self.records += records

    def close(self) -> None:
        pass


def test_an_outage_is_waited_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool, database = spool_at(root), Away(times=3)
    shipper = Shipper(spool, database)
    spool.append([record(1)])
    shipper.start()
    eventually(lambda: database.times < 2)
    assert shipper.failing_since is not None
    spool.append([record(2)])

    eventually(lambda: len(database.records) == 2)

    eventually(lambda: shipper.failing_since is None)
    assert shipper.drain(5)
    assert [message for message in caplog.messages if "wait in the spool" in message] == [
        f"predictions wait in the spool, {len(frame(record(1))):,} bytes: connection refused"
    ]


def test_draining_gives_up_in_time_and_leaves_the_rest(root: Path, database: str) -> None:
    spool = spool_at(root)
    spool.append([record(1)])
    shipper = Shipper(spool, Away(times=10**6))
    shipper.start()

    assert not shipper.drain(0.3)
    with pytest.raises(SpoolDown):
        spool.append([record(2)])
    assert len(list(root.glob("worker-*/*.seg"))) == 1


def test_a_table_that_is_not_there_yet_is_an_outage(root: Path, tmp_path: Path) -> None:
    for name, prepare in (("none.db", None), ("empty.db", sqlite3.connect)):
        spool = spool_at(root)
        if prepare:
            with contextlib.closing(prepare(tmp_path / name)) as connection:
                connection.execute("CREATE TABLE x (y)")
        spool.append([record(1)])
        with pytest.raises(sqlite3.OperationalError):
            Shipper(spool, SqliteLog(f"sqlite:///{tmp_path / name}")).ship_once()
        assert spool.backlog_bytes > 0
        assert not quarantined(root)
    assert not (tmp_path / "none.db").exists()


def test_rows_are_as_the_jobs_read_them(root: Path, database: str) -> None:
    import sqlalchemy as sa

    from jobs.database import connect, predictions

    assert tuple(column.name for column in predictions.columns) == COLUMNS
    spool = spool_at(root)
    spool.append([record(1, churn=True, user_id=None)])
    Shipper(spool, open_log(database)).ship_once()

    with connect(database).connect() as connection:
        row = connection.execute(sa.select(predictions)).mappings().one()

    assert row["churn"] is True
    assert row["stale"] is False
    assert row["user_id"] is None
    assert row["predicted_at"].isoformat() == "2024-03-01T00:00:00+00:00"
    assert json.loads(row["features"]) == {"a": 1}


# --- Postgres; tests/test_postgres.py has what needs no service -------------------------------------------


def test_no_answer_is_lost_when_the_service_or_postgres_is_killed(bento: Path, online: FeastStore, root: Path) -> None:
    """500 predictions: kill -9 of the service after 150, of Postgres after 300; it is back after 400."""
    from jobs.database import connect
    from tests.bentos.test_process import Client
    from tests.test_postgres import bring_back
    from tests.test_postgres import logged as in_postgres

    clients = 2
    ports: list[int] = []
    asking = [Client(ports, 500 // clients) for _ in range(clients)]

    def answered() -> int:
        return sum(len(client.answered) for client in asking)

    with stores.postgres() as server:
        connect(server.url).dispose()
        settings = serving_process.environment(database=server.url, online_store=online.url, spool=root)
        with serving_process.start(bento, settings) as service:
            ports.append(service.port)
            for client in asking:
                client.start()
            eventually(lambda: answered() >= 150, seconds=30, every=0.001)
            worker = service.worker()
            assert worker is not None
            os.kill(worker, signal.SIGKILL)
            os.kill(service.pid, signal.SIGKILL)
        with serving_process.start(bento, settings) as service:
            ports.append(service.port)
            eventually(lambda: answered() >= 300, seconds=30, every=0.001)
            server.stop(kill=True)
            eventually(lambda: answered() >= 400, seconds=30, every=0.001)
            bring_back(server)
            for client in asking:
                client.join(30)
            service.stop()
            assert "every prediction is in the database" in service.log
        rows = in_postgres(server.url)

    acknowledged = [prediction_id for client in asking for prediction_id in client.answered]
    assert len(acknowledged) == 500
    assert set(acknowledged) - set(rows) == set()
    assert len(rows) == len(set(rows))
    assert len(rows) - 500 <= clients  # what was in flight at the kill
    assert [client.wrong for client in asking] == [[]] * clients
