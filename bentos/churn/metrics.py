"""What the service counts, kept in plain numbers and put into Prometheus' form only when asked.

prometheus_client's own counters would be files in BentoML's multiprocess mode; there is one worker process,
so a request costs a few additions here.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

_LATENCY = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_SCORE = tuple(i / 10 for i in range(1, 11))


class Histogram:
    """Counts by upper bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by bound, and the sum."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets, self._sum


class Pauses:
    """How often and how long the garbage collector held everything up; one of `gc.callbacks`.

    Seconds of the CPU: on a busy machine the time of others would count as ours.
    """

    def __init__(self) -> None:
        self.count = 0
        self.longest = 0.0  # seconds
        self._began = 0.0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
            return
        self.count += 1
        self.longest = max(self.longest, time.thread_time() - self._began)


class Metrics:
    """The service's numbers; `collect` makes it a collector for prometheus_client."""

    def __init__(self) -> None:
        self.requests: dict[int, int] = {}  # by status
        self.callers: dict[str, int] = {}  # let in, by the name of their API key; empty where none is asked for
        self.latency = Histogram(_LATENCY)
        self.scores = Histogram(_SCORE)
        self.missing: dict[str, int] = {}  # by feature: a default stood in
        self.stale = 0
        self.pauses = Pauses()
        self.info: dict[str, str] = {}
        self.ready = False
        self.spool: Any = None
        self.shipper: Any = None

    def request(self, status: int, seconds: float) -> None:
        """Count an answered /predict."""
        self.requests[status] = self.requests.get(status, 0) + 1
        if status not in (408, 429):  # how long a sender dawdled, or a refusal was held back, is not our pace
            self.latency.observe(seconds)

    def collect(self) -> Iterator[Any]:
        """Everything as prometheus_client's metric families."""
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge
        from prometheus_client.core import HistogramMetricFamily as HistogramFamily

        requests = Counter("churn_requests", "Requests to /predict by status", labels=["status"])
        for status, count in sorted(self.requests.items()):
            requests.add_metric([str(status)], count)
        yield requests
        if self.callers:
            by_key = Counter("churn_requests_by_key", "Requests to /predict let in, by the key's name", labels=["key"])
            for name, count in sorted(self.callers.items()):
                by_key.add_metric([name], count)
            yield by_key
        yield _histogram(
            HistogramFamily("churn_request_seconds", "Time to answer /predict, body included"), self.latency
        )
        yield _histogram(HistogramFamily("churn_probability", "Scores given"), self.scores)
        missing = Counter("churn_missing_features", "Values a default stood in for", labels=["feature"])
        for name, count in sorted(self.missing.items()):
            missing.add_metric([name], count)
        yield missing
        yield Counter("churn_stale_predictions", "Predictions on features older than stale_after", value=self.stale)
        info = Gauge("churn_bento_info", "1; the bento served", labels=sorted(self.info))
        if self.info:
            info.add_metric([self.info[name] for name in sorted(self.info)], 1)
        yield info
        yield Gauge("churn_ready", "1 if ready", value=float(self.ready))
        restarts = int(os.environ.get("CHURN_WORKER_RESTARTS", "0"))  # bentos.churn.serve counts them
        yield Counter("churn_worker_restarts", "Times the worker was killed and started again", value=restarts)
        yield Counter("churn_gc_pauses", "Garbage collections since it was ready", value=self.pauses.count)
        yield Gauge("churn_gc_pause_seconds_max", "The longest of them, in seconds of CPU", value=self.pauses.longest)
        if self.spool is not None and self.shipper is not None:
            yield Gauge(
                "churn_log_backlog_bytes", "Predictions waiting for the database", value=self.spool.backlog_bytes
            )
            since = self.shipper.failing_since
            yield Gauge(
                "churn_log_failing_seconds",
                "How long the database has not taken predictions",
                value=0.0 if since is None else time.monotonic() - since,
            )
            yield Counter("churn_log_appended", "Predictions written to the spool", value=self.spool.appended)
            yield Counter(
                "churn_log_shipped", "Predictions the database took, replayed ones included", value=self.shipper.shipped
            )
            yield Counter("churn_log_quarantined", "Damaged or refused records", value=self.shipper.quarantined)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def _histogram(family: Any, histogram: Histogram) -> Any:
    buckets, total = histogram.buckets()
    family.add_metric([], buckets, total)
    return family
