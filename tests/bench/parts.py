"""Scoring and feature reads alone, in this process, ours beside what they stand on and what they replace.

Every figure is the median time of single calls, of different users, in several rounds that alternate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from tests.bench.raw_redis import connect
from tests.bench.stage import Stage, many_rows

ROUNDS = 3
APART = 101  # calls that take turns are this many users apart
CHUNK = 10_000  # rows compared at a time


def _timed(calls: dict[str, Callable[[int], Any]], times: int) -> dict[str, float]:
    """Median microseconds of each call; they take turns, and none gets a row that another has just warmed up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(times):
        for offset, (name, call) in enumerate(calls.items()):
            began = time.perf_counter()
            call(number + offset * APART)
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) * 1e6 for name, spent in found.items()}


async def _timed_async(calls: dict[str, Callable[[int], Awaitable[Any]]], times: int) -> dict[str, float]:
    """The same, of coroutines."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(times):
        for offset, (name, call) in enumerate(calls.items()):
            began = time.perf_counter()
            await call(number + offset * APART)
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) * 1e6 for name, spent in found.items()}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def scoring(stage: Stage, *, calls: int, rows: int) -> dict[str, float]:
    """Microseconds for one row, and the largest difference from scikit-learn over `rows` rows."""
    import pandas as pd

    from bentos.churn.model import Scorer, session

    scorer = Scorer(stage.bento)
    bare = session((stage.bento / "src" / "model" / "model.onnx").read_bytes())
    outputs = [bare.get_outputs()[-1].name]
    users = stage.frame.to_dict("records")[:1000]
    ready = [np.array([scorer.encode(user)], dtype=np.float32) for user in users]

    def ours(number: int) -> float:
        row = scorer.encode(users[number % len(users)])
        return float(scorer.score(np.array([row], dtype=np.float32))[0])

    def onnx(number: int) -> Any:
        return bare.run(outputs, {"features": ready[number % len(ready)]})

    def scikit_learn(number: int) -> float:
        return float(stage.pipeline.predict_proba(pd.DataFrame([users[number % len(users)]]))[0, 1])

    rounds = []
    for _ in range(ROUNDS):
        found = _timed({"onnx_us": onnx, "ours_us": ours}, calls)
        rounds.append({**found, **_timed({"sklearn_us": scikit_learn}, max(5, calls // 50))})
    return {**_medians(rounds), "difference": _difference(stage, scorer, rows), "rows": rows}


def _difference(stage: Stage, scorer: Any, rows: int) -> float:
    """Largest difference of probabilities, each row encoded as the service does it."""
    worst = 0.0
    frame = many_rows(stage, rows)
    for start in range(0, rows, CHUNK):
        part = frame.iloc[start : start + CHUNK]
        encoded = np.array([scorer.encode(row) for row in part.to_dict("records")], dtype=np.float32)
        expected = stage.pipeline.predict_proba(part)[:, 1]
        worst = max(worst, float(np.abs(scorer.score(encoded) - expected).max()))
    return worst


async def reading(stage: Stage, *, calls: int) -> dict[str, float]:
    """Microseconds for the features of 1 and of 100 users: our store, a raw HMGET, redis-py's, Feast's SDK.

    The raw one is on a connection like ours, asyncio without a general client in between.
    """
    from redis.asyncio import Redis

    from bentos.churn.model import Plan
    from bentos.churn.online import open_store
    from jobs.dataset import FEATURE_SERVICE

    raw = await connect(stage.redis_url)
    general = Redis.from_url(stage.redis_url)
    store = open_store(stage.redis_url, stage.environment["CHURN_RELEASE"], Plan.from_json(stage.features))
    service = stage.feast.get_feature_service(FEATURE_SERVICE)
    many = [stage.users[at : at + 100] for at in range(0, min(len(stage.users), 1000) - 99, 100)]

    def group(number: int, size: int) -> list[str]:
        return [stage.users[number % len(stage.users)]] if size == 1 else many[number % len(many)]

    async def hmget(users: list[str]) -> None:
        for reply in [raw.command(stage.layout.hmget(user)) for user in users]:
            await reply

    async def redis_py(users: list[str]) -> None:
        pipeline = general.pipeline(transaction=False)
        for user in users:
            pipeline.hmget(stage.layout.key(user), stage.layout.fields)
        await pipeline.execute()

    def sdk(users: list[str]) -> dict[str, list[Any]]:
        rows = [{"user_id": user} for user in users]
        return stage.feast.get_online_features(service, rows).to_dict(include_event_timestamps=True)

    def at(size: int, call: Callable[[list[str]], Any]) -> Callable[[int], Any]:
        return lambda number: call(group(number, size))

    rounds = []
    for _ in range(ROUNDS):
        found: dict[str, float] = {}
        for size, times in ((1, calls), (100, max(5, calls // 50))):
            await store.read(group(0, size))  # connected, and warm
            lean = {f"hmget_{size}_us": at(size, hmget), f"ours_{size}_us": at(size, store.read)}
            found |= await _timed_async(lean, times)
            found |= await _timed_async({f"redis_py_{size}_us": at(size, redis_py)}, max(5, times // 4))
            found |= _timed({f"sdk_{size}_us": at(size, sdk)}, max(5, times // 10))
        rounds.append(found)
    raw.close()
    await general.aclose()
    store.close()
    return _medians(rounds)
