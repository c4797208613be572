"""While new pods soak beside the old: what their clients get, compared by each pod's own counters.

Both take their share of the same requests at the same time, so that a store that is down or a busy node shows on both
sides, and only what the new ones do worse is theirs.
"""

from __future__ import annotations

import urllib.error
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.client import HTTPException

from jobs.serving import DIRECT, Pod
from jobs.settings import Settings

ENOUGH = 50  # requests on each side; of fewer nothing is concluded
NOTICEABLE = 0.1  # seconds: a p95 below this is no slowdown, whatever it was
TIMEOUT = 2.0  # seconds, to read a pod's counters
_STATUSES, _SECONDS = "churn_requests_total", "churn_request_seconds_bucket"


@dataclass(frozen=True)
class Traffic:
    """Requests that were answered: how many, how many of them not as they should, and how fast."""

    requests: float = 0.0
    failed: float = 0.0  # 5xx
    seconds: dict[float, float] = field(default_factory=dict)  # upper bound -> requests that took no longer

    def __add__(self, other: Traffic) -> Traffic:
        return self._with(other, 1)

    def __sub__(self, other: Traffic) -> Traffic:
        return self._with(other, -1)

    def _with(self, other: Traffic, sign: int) -> Traffic:
        bounds = {*self.seconds, *other.seconds}
        seconds = {b: self.seconds.get(b, 0.0) + sign * other.seconds.get(b, 0.0) for b in bounds}
        return Traffic(self.requests + sign * other.requests, self.failed + sign * other.failed, seconds)

    def began_anew(self, before: Traffic) -> bool:
        """Whether the process that counts is another than that of `before`: a counter never goes down."""
        down = any(self.seconds.get(bound, 0.0) < count for bound, count in before.seconds.items())
        return down or self.requests < before.requests or self.failed < before.failed

    @property
    def failed_share(self) -> float:
        """Of all requests, 0 to 1."""
        return self.failed / self.requests if self.requests else 0.0

    @property
    def p95(self) -> float:
        """Seconds that 95 % of the requests did not take longer than, linear within a bucket, as in Prometheus'
        `histogram_quantile`; the highest bound for those beyond it.
        """
        total = max(self.seconds.values(), default=0.0)
        below, low = 0.0, 0.0
        for bound, count in sorted(self.seconds.items()):
            if count >= 0.95 * total and total:
                if bound == float("inf"):
                    return low
                return low + (bound - low) * (0.95 * total - below) / max(count - below, 1e-9)
            below, low = count, bound
        return 0.0


def traffic_in(text: str) -> Traffic:
    """The traffic in a page of /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    requests = failed = 0.0
    seconds: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == _STATUSES:
                requests += sample.value
                if sample.labels["status"] >= "500":
                    failed += sample.value
            elif sample.name == _SECONDS:
                seconds[float(sample.labels["le"])] = sample.value
    return Traffic(requests, failed, seconds)


class Canary:
    """Compares the pods of a tag with the others, from the first look on."""

    def __init__(self, settings: Settings, tag: str) -> None:
        self._settings = settings
        self._tag = tag
        self._seen: dict[str, Traffic] = {}  # each pod's counters at the last look
        self._since: dict[str, tuple[bool, Traffic]] = {}  # by pod, also of those that have gone: new, traffic

    def look(self, pods: Iterable[Pod]) -> str | None:
        """What the new pods do worse, in a sentence; None while nothing is known against them."""
        for pod in pods:
            if pod.address and (found := _ask(pod.address)):
                new = pod.bento_tag == self._tag
                before = self._seen.get(pod.name, Traffic() if new else found)
                more = found if found.began_anew(before) else found - before
                self._seen[pod.name] = found
                self._since[pod.name] = (new, self._since.get(pod.name, (new, Traffic()))[1] + more)
        return self.objection()

    def objection(self) -> str | None:
        """The same of what was seen so far."""
        new = sum((traffic for is_new, traffic in self._since.values() if is_new), Traffic())
        old = sum((traffic for is_new, traffic in self._since.values() if not is_new), Traffic())
        if min(new.requests, old.requests) < ENOUGH:
            return None
        allowed = (max(old.failed_share, 0.0) + self._settings.canary_max_failed) * new.requests
        if new.failed >= allowed + 2:  # of few requests a single one is a large share
            return (
                f"new pods failed {new.failed:.0f} of {new.requests:.0f} requests, "
                f"old ones {old.failed:.0f} of {old.requests:.0f}"
            )
        if new.p95 > max(NOTICEABLE, old.p95 * self._settings.canary_max_slowdown):
            slow, fast = f"{new.p95 * 1e3:.0f} ms", f"{old.p95 * 1e3:.0f} ms"
            return f"new pods answer 95 % of requests within {slow}, old ones within {fast}"
        return None


def _ask(address: str) -> Traffic | None:
    try:
        with DIRECT.open(f"{address}/metrics", timeout=TIMEOUT) as answer:
            return traffic_in(answer.read().decode())
    except (OSError, ValueError, KeyError, HTTPException, urllib.error.URLError):
        return None  # it is just starting, or going: the rollout knows of that
