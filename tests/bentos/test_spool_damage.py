"""What a dying disk, a torn write or a wrong value does to predictions on their way: nothing to the others.

Segments are as the spool writes them, damaged in the folders of dead workers, and shipped into real databases.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa

from bentos.churn.shipper import BATCH, Shipper, open_log
from bentos.churn.spool import Spool
from jobs.database import connect, predictions
from tests.bentos.serving_process import eventually
from tests.bentos.test_spool import quarantined, record
from tests.test_postgres import fresh_database

RECORDS = 4  # in each segment; the first stays whole
FIRST = 10**6  # ids of one width, and so records of one length
FOLDERS = 500  # of dead workers at once: each has an open file
MASKS = (0x01, 0x80, 0xFF)
LATE_SECONDS = 5.0
PACE_SECONDS = 0.002  # between two predictions of a worker that goes on


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of ours, of the kind that the test asks for."""
    if request.param == "sqlite":
        connect(f"sqlite:///{tmp_path}/churn.db")
        yield f"sqlite:///{tmp_path}/churn.db"
    else:
        with fresh_database(request.getfixturevalue("postgres_server")) as fresh:
            connect(fresh)
            yield fresh


both = pytest.mark.parametrize("url", ["postgres", "sqlite"], indirect=True)


def logged(url: str) -> Counter[str]:
    """The predictions in the log."""
    with connect(url).connect() as connection:
        return Counter(connection.execute(sa.select(predictions.c.prediction_id)).scalars())


def key(number: int) -> str:
    """The id of `record(number)`."""
    return f"{number:032x}"


class Case(NamedTuple):
    """A damaged segment."""

    name: str
    data: bytes
    whole: list[int]  # the records that are
    lost: list[int]
    damage: bytes  # the bytes that are no record any more; empty: the cut was between two


class Segment(NamedTuple):
    """A segment before that."""

    numbers: range
    data: bytes
    ends: list[int]  # of its records

    def cut(self, at: int) -> Case:
        """Only its first bytes reached the disk."""
        complete = sum(end <= at for end in self.ends)
        begin = ([0, *self.ends])[complete]
        whole, lost = list(self.numbers[:complete]), list(self.numbers[complete:])
        return Case(f"cut at {at}", self.data[:at], whole, lost, self.data[begin:at])

    def flip(self, at: int, mask: int) -> Case:
        """One byte came back from the disk as another."""
        hit = sum(end <= at for end in self.ends)
        data = self.data[:at] + bytes([self.data[at] ^ mask]) + self.data[at + 1 :]
        begin, end = ([0, *self.ends])[hit : hit + 2]
        whole = [number for number in self.numbers if number != self.numbers[hit]]
        return Case(f"byte {at} ^ {mask:#x}", data, whole, [self.numbers[hit]], data[begin:end])


@pytest.fixture
def segments(tmp_path: Path) -> Iterator[Iterator[Segment]]:
    """Segments as a worker writes them, each with records of its own."""
    spool = Spool(tmp_path / "writer", max_bytes=2**20)

    def write() -> Generator[Segment, None, None]:
        numbers = range(FIRST, FIRST + RECORDS)
        while True:
            ends = []
            for number in numbers:
                spool.append([record(number)])
                ends.append(spool.backlog_bytes)
            spool.seal()
            (path,) = spool.segments()
            yield Segment(numbers, path.read_bytes(), ends)
            spool.remove(path)
            numbers = range(numbers.stop, numbers.stop + RECORDS)

    written = write()
    yield written
    written.close()
    spool.close()


def ship(root: Path, url: str, cases: Sequence[Case]) -> Shipper:
    """Each case in the folder of a dead worker, all of them shipped by the next one."""
    for number, case in enumerate(cases):
        folder = root / f"worker-{number:016x}"
        folder.mkdir(parents=True)
        (folder / "000000000001.seg").write_bytes(case.data)
    shipper = Shipper(Spool(root, max_bytes=2**30), open_log(url))
    shipper.ship_once()
    assert shipper.drain(10)
    return shipper


def check(tmp_path: Path, url: str, cases: Sequence[Case]) -> None:
    """Whole records are in the log once, damaged ones are not, and their bytes are kept."""
    for start in range(0, len(cases), FOLDERS):
        some = cases[start : start + FOLDERS]
        whole, damaged = sum(len(case.whole) for case in some), [case for case in some if case.damage]
        root = tmp_path / f"spool-{start}"
        before = logged(url).total()

        shipper = ship(root, url, some)

        log, kept = logged(url), {path.read_bytes() for path in quarantined(root)}
        assert [case.name for case in some if any(log[key(number)] != 1 for number in case.whole)] == []
        assert [case.name for case in some if any(log[key(number)] for number in case.lost)] == []
        assert [case.name for case in damaged if case.damage not in kept] == []
        assert len(kept - {case.damage for case in damaged}) == 0
        counted = (log.total() - before, shipper.shipped, shipper.quarantined)
        assert counted == (whole, whole, len(damaged))
        assert list(root.glob("worker-*")) == []


@both
def test_a_tail_cut_at_any_byte_costs_the_cut_record_only(
    url: str, segments: Iterator[Segment], tmp_path: Path
) -> None:
    """Everywhere from the end of the first record to that of the last."""
    first = next(segments)
    cases = [segment.cut(at) for at, segment in zip(range(first.ends[0], len(first.data) + 1), segments, strict=False)]

    check(tmp_path, url, cases)

    print(f"{len(cases):,} segments, {sum(bool(case.damage) for case in cases):,} with a torn record")
    assert [len(case.whole) for case in cases if not case.damage] == [*range(1, RECORDS + 1)]


@both
def test_any_flipped_byte_costs_its_record_only(url: str, segments: Iterator[Segment], tmp_path: Path) -> None:
    """Of the last three records, so that there are whole ones before and behind; each mask has its turn at each byte."""
    first = next(segments)
    places = [
        (at, MASKS[(at - begin + turn) % len(MASKS)])
        for turn, (begin, end) in enumerate(pairwise(first.ends))
        for at in range(begin, end)
    ]
    cases = [segment.flip(at, mask) for (at, mask), segment in zip(places, segments, strict=False)]

    check(tmp_path, url, cases)

    print(f"{len(cases):,} segments, each with one flipped byte")
    assert all(len(case.whole) == RECORDS - 1 for case in cases)


@pytest.mark.parametrize(
    ("url", "poison"),
    [
        pytest.param("postgres", {"user_id": "a\0b"}, id="postgres-nul"),
        pytest.param("postgres", {"request_id": None}, id="postgres-null"),
        pytest.param("postgres", {"model_version": 2**40}, id="postgres-huge-int"),
        pytest.param("sqlite", {"request_id": None}, id="sqlite-null"),
        pytest.param("sqlite", {"model_version": 2**70}, id="sqlite-huge-int"),
    ],
    indirect=["url"],
)
def test_those_behind_a_refused_row_are_not_late(url: str, poison: dict[str, Any], tmp_path: Path) -> None:
    """It is in the middle of a full batch, and further predictions are made all the time."""
    root = tmp_path / "spool"
    spool = Spool(root, max_bytes=2**26)
    shipper = Shipper(spool, open_log(url))
    appended: dict[str, float] = {}
    seen: dict[str, float] = {}
    enough = threading.Event()

    def go_on() -> None:
        number = FIRST
        while not enough.wait(PACE_SECONDS):
            spool.append([record(number)])
            appended[key(number)] = time.monotonic()
            number += 1

    def wait_for(wanted: Sequence[str]) -> None:
        end = time.monotonic() + 3 * LATE_SECONDS
        while missing := [prediction_id for prediction_id in wanted if prediction_id not in seen]:
            now = time.monotonic()
            assert now < end, f"{len(missing)} of {len(wanted)} are not in the log, such as {missing[0]}"
            seen.update(dict.fromkeys(logged(url).keys() - seen.keys(), now))
            time.sleep(0.02)

    worker = threading.Thread(target=go_on)
    shipper.start()
    worker.start()
    try:
        wait_for([key(FIRST)])
        refused = BATCH + BATCH // 2  # what waits before these is less than half a batch
        batch = [record(number, **(poison if number == refused else {})) for number in range(2 * BATCH)]
        spool.append(batch)
        begun = time.monotonic()
        others = [key(number) for number in range(2 * BATCH) if number != refused]
        appended |= dict.fromkeys(others, begun)
        wait_for(others)
        eventually(lambda: shipper.quarantined, what="the refused one in quarantine")
    finally:
        enough.set()
        worker.join(10)
    wait_for(list(appended))
    assert shipper.drain(10)

    behind = [prediction_id for prediction_id, at in appended.items() if at >= begun]
    late = max(seen[prediction_id] - appended[prediction_id] for prediction_id in behind)
    print(f"{len(behind) - len(others)} came behind the {2 * BATCH:,}; the latest was in the log after {late:.2f} s")
    assert late <= LATE_SECONDS
    assert len(behind) > len(others)
    assert logged(url) == Counter(appended.keys())
    assert shipper.quarantined == 1
    assert [path.read_bytes() for path in quarantined(root)] == [batch[refused]]
