"""A minute at full load: the garbage collector keeps nobody waiting, and memory stays what it was."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from tests.bench.stage import Stage
from tests.bentos import serving_process
from tests.bentos.serving_process import eventually
from tests.load.closed_loop import Load, metric

pytestmark = pytest.mark.load

SECONDS = 60.0
WARM_UP_SECONDS = 10.0
CONNECTIONS = 8
PAUSE_SECONDS = 0.010  # the longest of the garbage collector
GROWTH = 0.05  # of the worker's resident memory after the warm-up
WINDOW_SECONDS = 5.0  # whose median is the memory at the begin, and at the end
SAMPLE_SECONDS = 0.25


def rss(pid: int) -> float:
    """Resident memory in MB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def test_a_minute_of_load_leaves_no_trace(scene: Stage, tmp_path: Path) -> None:
    settings = {**scene.environment, "CHURN_SPOOL_DIR": str(tmp_path / "spool")}
    with serving_process.start(scene.bento, settings) as service:
        worker = service.worker()
        assert worker is not None
        at_start = rss(worker)
        samples: list[tuple[float, float]] = []  # seconds of load, MB

        def sampled() -> bool:
            samples.append((time.monotonic() - began, rss(worker)))
            return samples[-1][0] >= SECONDS

        with Load(service.port, scene.users, CONNECTIONS) as load:
            began = time.monotonic()
            eventually(sampled, seconds=SECONDS + 5, every=SAMPLE_SECONDS)
            answered = load.answered
        assert service.worker() == worker
        pauses = metric(service, "churn_gc_pauses_total")
        longest = metric(service, "churn_gc_pause_seconds_max")
        eventually(lambda: metric(service, "churn_log_backlog_bytes") == 0, seconds=30, what="an empty spool")
        after = rss(worker)

    warm = [memory for at, memory in samples if at >= WARM_UP_SECONDS]
    begin = statistics.median(m for at, m in samples if 0 <= at - WARM_UP_SECONDS < WINDOW_SECONDS)
    end = statistics.median(m for at, m in samples if at >= SECONDS - WINDOW_SECONDS)
    print(
        f"{answered:,} answers in {SECONDS:.0f} s on {CONNECTIONS} connections, longest gap {load.longest_gap() * 1e3:.0f} ms; "
        f"{pauses:.0f} collections, the longest of {longest * 1e3:.2f} ms; RSS {at_start:.1f} MB ready, "
        f"{begin:.1f} MB after {WARM_UP_SECONDS:.0f} s, {end:.1f} MB at the end ({end / begin - 1:+.1%}), "
        f"from {min(warm):.1f} to {max(warm):.1f} MB in between, {after:.1f} MB when all was shipped"
    )
    assert (load.broken, load.refused) == ([], [])
    assert longest <= PAUSE_SECONDS
    assert end / begin - 1 <= GROWTH
