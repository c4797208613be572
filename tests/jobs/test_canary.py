"""New pods beside the old: who fails more, who is slower, and when too little is known."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bentos.churn.metrics import Metrics
from jobs.canary import ENOUGH, Canary, Traffic, traffic_in
from jobs.serving import Pod
from jobs.settings import Settings, load_settings

OLD, NEW = "churn:v1-00000000", "churn:v2-00000000"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path)


def answered(metrics: Metrics, count: int, status: int = 200, seconds: float = 0.003) -> Metrics:
    for _ in range(count):
        metrics.request(status, seconds)
    return metrics


@contextmanager
def pod(name: str, tag: str, metrics: Metrics) -> Iterator[Pod]:
    """What the service's own metrics look like at an address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(metrics.render())

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Pod(name, f"http://127.0.0.1:{server.server_address[1]}", tag, ready=True, message="")
        finally:
            server.shutdown()


def test_counters_are_read_from_the_page() -> None:
    metrics = answered(answered(answered(Metrics(), 90), 6, 503), 4, 422, 0.2)
    answered(answered(metrics, 10, 404), 5, 429, 1.0)

    found = traffic_in(metrics.render().decode())

    assert (found.requests, found.failed) == (115, 6)
    assert found.seconds[0.005] == 106
    assert found.seconds[float("inf")] == 110, "without refusals that were held back"


def test_p95_is_that_of_prometheus() -> None:
    """95 of 100 lie in the bucket from 2 to 5 ms: all of it is needed. The last 5 are beyond the highest bound."""
    assert traffic_in(answered(Metrics(), 100).render().decode()).p95 == pytest.approx(0.002 + 0.003 * 0.95)
    beyond = answered(answered(Metrics(), 10), 90, seconds=7)
    assert traffic_in(beyond.render().decode()).p95 == 1.0
    assert Traffic().p95 == 0.0


@pytest.mark.parametrize(
    ("old", "new", "objection"),
    [
        (((500, 200, 0.003),), ((500, 200, 0.003),), None),
        (((500, 200, 0.003),), ((97, 200, 0.003), (3, 500, 0.003)), "new pods failed 3 of 100 requests, old ones 0 of 500"),
        (((500, 200, 0.003),), ((97, 200, 0.003), (3, 422, 0.003)), None),
        (((500, 200, 0.003),), ((98, 200, 0.003), (1, 503, 0.003)), None),
        (((450, 200, 0.003), (50, 503, 0.003)), ((90, 200, 0.003), (10, 503, 0.003)), None),
        (((500, 200, 0.003),), ((90, 200, 0.003), (10, 400, 0.003)), None),
        (((500, 200, 0.003),), ((100, 200, 0.3),), "new pods answer 95 % of requests within 488 ms, old ones within 5 ms"),
        (((500, 200, 0.003),), ((100, 200, 0.04),), None),
        (((500, 200, 0.3),), ((100, 200, 0.3),), None),
        (((500, 200, 0.003),), ((ENOUGH - 1, 500, 0.3),), None),
        (((ENOUGH - 1, 200, 0.003),), ((100, 500, 0.3),), None),
    ],
    ids=["alike", "5xx", "422", "one", "both-fail", "clients-fault", "slow", "not-noticeable", "both-slow", "few", "few-old"],
)  # fmt: skip
def test_only_what_the_new_ones_do_worse_is_theirs(
    settings: Settings,
    old: tuple[tuple[int, int, float], ...],
    new: tuple[tuple[int, int, float], ...],
    objection: str | None,
) -> None:
    before, after = answered(Metrics(), 10_000, 500), Metrics()  # what was before the first look does not count
    canary = Canary(settings, NEW)
    with pod("a", OLD, before) as first, pod("b", NEW, after) as second:
        assert canary.look([first, second]) is None
        for metrics, answers in ((before, old), (after, new)):
            for count, status, seconds in answers:
                answered(metrics, count, status, seconds)

        found = canary.look([first, second])
        assert canary.look([second]) == found, "an old pod that went is remembered"

    assert (found is None) if objection is None else (found is not None and found.startswith(objection))


def test_a_container_that_restarts_counts_on(settings: Settings) -> None:
    """Its counters begin anew; what it did before is not taken back."""
    canary = Canary(settings, NEW)
    old, new = answered(Metrics(), 1000), answered(Metrics(), 60)
    with pod("a", OLD, old) as first, pod("b", NEW, new) as second:
        canary.look([first, second])
        answered(old, 200)
        answered(new, 20, 500)
        assert str(canary.look([first, second])).startswith("new pods failed 20 of 80 requests, old ones 0 of 200")
        for metrics in (old, new):
            metrics.__init__()  # type: ignore[misc]
        answered(old, 100)
        answered(new, 30)
        assert str(canary.look([first, second])).startswith("new pods failed 20 of 110 requests, old ones 0 of 300")


def test_a_pod_that_does_not_answer_is_not_judged(settings: Settings) -> None:
    gone = Pod("a", "http://127.0.0.1:9", NEW, ready=False, message="")
    assert Canary(settings, NEW).look([gone, Pod("b", "", NEW, ready=False, message="")]) is None
