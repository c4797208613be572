"""100,000 requests at full load, the worker killed three times under them and PostgreSQL away for half a minute."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import stores
from tests.bench.stage import Stage
from tests.bentos import serving_process
from tests.bentos.serving_process import Service, eventually
from tests.load.closed_loop import Load, metric
from tests.test_postgres import admin, bring_back

pytestmark = pytest.mark.load

REQUESTS = 100_000
CONNECTIONS = 16
OUTAGE_SECONDS = 30.0
BETWEEN = REQUESTS // 20  # answers between two of the things that happen
ANSWERS_SECONDS = 120.0  # for those between
SHIP_SECONDS = 60.0  # for all that waits when the load has ended

Row = tuple[str, str, float]  # prediction_id, user_id, churn_probability


@pytest.fixture
def postgres(scene: Stage) -> Iterator[stores.Server]:
    """The scene's, which runs again at the end."""
    yield scene.postgres
    if scene.postgres.process is None or scene.postgres.process.poll() is not None:
        bring_back(scene.postgres)


def kill_worker(service: Service) -> float:
    """SIGKILL; returns the moment when another one has begun."""
    worker = service.worker()
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: service.worker() not in (None, worker), what="another worker")
    return killed


def logged(url: str, run_id: str) -> list[tuple[str, Row]]:
    """This run's rows of the log, by request id."""
    query = "SELECT request_id, prediction_id, user_id, churn_probability FROM predictions WHERE request_id LIKE %s"
    with admin(url) as connection:
        return [(request_id, tuple(row)) for request_id, *row in connection.execute(query, (f"{run_id}-%",))]


def answered(load: Load) -> dict[str, Row]:
    """What the clients were told, by the id that they had given the request."""
    found = {}
    for answer in load.answers:
        told = json.loads(answer.body)
        assert told["request_id"] == answer.request_id
        found[answer.request_id] = told["prediction_id"], told["user_id"], told["churn_probability"]
    assert len(found) == len(load.answers)
    return found


def test_every_answer_is_in_the_log_once(scene: Stage, postgres: stores.Server, tmp_path: Path) -> None:
    """Killed with the database there, with it away, and while what had waited for it was being shipped."""
    settings = {**scene.environment, "CHURN_SPOOL_DIR": str(tmp_path / "spool")}
    kills: list[float] = []
    with serving_process.start(scene.bento, settings) as service:
        with Load(service.port, scene.users, CONNECTIONS) as load:
            began = time.monotonic()
            load.wait(BETWEEN, ANSWERS_SECONDS)
            kills.append(kill_worker(service))
            load.wait(BETWEEN, ANSWERS_SECONDS)

            postgres.stop()
            away = time.monotonic()
            load.wait(BETWEEN, ANSWERS_SECONDS)
            kills.append(kill_worker(service))
            load.wait(2 * CONNECTIONS, ANSWERS_SECONDS)
            eventually(lambda: time.monotonic() - away >= OUTAGE_SECONDS, seconds=OUTAGE_SECONDS + 1)
            bring_back(postgres)
            outage = time.monotonic() - away

            eventually(lambda: metric(service, "churn_log_shipped_total") > 0, seconds=30, every=0.01)
            waiting = metric(service, "churn_log_backlog_bytes")
            kills.append(kill_worker(service))
            load.wait(max(2 * BETWEEN, REQUESTS - load.answered), ANSWERS_SECONDS)
            seconds = time.monotonic() - began

        shipping = time.monotonic()
        eventually(lambda: metric(service, "churn_log_backlog_bytes") == 0, seconds=SHIP_SECONDS, what="an empty spool")
        shipping = time.monotonic() - shipping
        service.stop()
        assert "every prediction is in the database" in service.log

    quarantined = [path.name for path in (tmp_path / "spool").glob("quarantine/*")]
    rows, told = logged(scene.database_url, load.run_id), answered(load)
    log = dict(rows)
    lost = {answer.request_id for answer in load.broken}
    beyond = log.keys() - told.keys()
    gaps = [load.longest_gap(kill - 0.5, kill + 20) for kill in kills]
    print(
        f"sent {load.sent:,}, answered {len(told):,} in {seconds:.0f} s, failed at kills {len(lost)}, "
        f"logged {len(rows):,}, beyond {len(beyond)}, torn by a kill {len(quarantined)}, PostgreSQL away for {outage:.1f} s, "
        f"{waiting / 2**20:.0f} MB waiting at the third kill, shipped {shipping:.1f} s after the load, "
        f"longest gap {load.longest_gap():.2f} s (at the kills {', '.join(f'{gap:.2f}' for gap in gaps)})"
    )
    assert load.refused == []
    assert len(told) >= REQUESTS
    assert load.sent == len(told) + len(lost)
    assert [request_id for request_id, times in Counter(key for key, _ in rows).items() if times > 1] == []
    assert sorted(told.keys() - log.keys()) == []
    assert [request_id for request_id, row in told.items() if log[request_id] != row] == []
    assert beyond <= lost
    assert len(quarantined) <= len(kills)
    assert [name for name in quarantined if not name.endswith(".damaged")] == []
    assert 0 < len(lost) <= CONNECTIONS * len(kills)
