"""What the measurements need: Redis and PostgreSQL, users in them, a trained forest and the bento made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests import stores
from tests.bench.raw_redis import HashLayout

DAY = date(2024, 1, 31)


@dataclass(frozen=True)
class Stage:
    """Everything on its place. `environment` is for services: settings of the jobs and of ours, and BENCH_…"""

    folder: Path
    environment: dict[str, str]
    redis_url: str
    database_url: str
    users: list[str]
    features: list[dict[str, Any]]
    layout: HashLayout
    frame: pd.DataFrame  # the users' features, in the form the pipeline takes, in the order of `users`
    pipeline: Any
    bento: Path
    tag: str
    feast: Any  # the SDK's store
    redis: stores.Server
    postgres: stores.Server

    @property
    def stores(self) -> list[int]:
        """Process ids of Redis and PostgreSQL."""
        return [server.process.pid for server in (self.redis, self.postgres) if server.process]


@contextmanager
def stage(folder: Path, *, users: int, trees: int | None) -> Iterator[Stage]:
    """Set it up below `folder`, and stop the servers at the end."""
    with ExitStack() as running:
        redis = running.enter_context(stores.redis(folder))
        postgres = running.enter_context(stores.postgres())
        yield _fill(folder, redis, postgres, users, trees)


def _fill(folder: Path, redis: stores.Server, postgres: stores.Server, users: int, trees: int | None) -> Stage:
    from jobs import dataset
    from jobs.database import connect
    from jobs.ingest import ingest
    from jobs.materialize import materialize
    from jobs.retrain import complete, resolve
    from jobs.settings import load_settings
    from jobs.simulate import simulate
    from jobs.snapshots import instant
    from jobs.supervisor import as_environment

    redis_url, database_url = redis.url, postgres.url
    connect(database_url).dispose()  # a kept connection would hold up the end of the server
    settings = load_settings(
        home=folder / "home", database_url=database_url, online_store_url=redis_url, serve_as_of=DAY
    )
    (delivery,) = simulate(folder / "simulated", users=users, months=1, start=DAY, seed=1)
    ingest(settings, delivery, as_of=DAY, now=datetime.now(UTC))
    materialize(settings, as_of=instant(DAY))

    training = dataset.training_set(settings, [DAY])
    declared = dataset.features(settings)
    features = resolve(declared, dataset.defaults(declared, training.features))
    frame = complete(training.features, features)
    pipeline = _train(declared, frame, training.labels.loc[frame.index], trees)
    bento, tag = _package(folder, pipeline, features, frame)
    model = folder / "model"
    _write_model(model, pipeline, features, bento)
    layout = HashLayout.of(settings.feast_project, features)
    layout.save(model / "layout.json")
    names = [str(user) for user in frame.index]
    (folder / "users.txt").write_text("\n".join(names))
    environment = {
        **as_environment(settings),
        "CHURN_SPOOL_DIR": str(folder / "spool"),
        "CHURN_DRAIN_SECONDS": "0",
        "BENCH_MODEL": str(model),
        "BENCH_BENTO": str(bento),
        "BENCH_REDIS": redis_url,
    }
    return Stage(
        folder=folder,
        environment=environment,
        redis_url=redis_url,
        database_url=database_url,
        users=names,
        features=features,
        layout=layout,
        frame=frame,
        pipeline=pipeline,
        bento=bento,
        tag=tag,
        feast=dataset.feature_store(settings),
        redis=redis,
        postgres=postgres,
    )


def _train(declared: Any, frame: pd.DataFrame, labels: pd.Series, trees: int | None) -> Any:
    from jobs.candidates import pipeline

    forest = pipeline("random_forest", declared, seed=0)
    if trees is not None:
        forest.set_params(model__n_estimators=trees)
    forest.fit(frame, labels.astype(int).to_numpy())
    return forest.set_params(model__n_jobs=1)  # faster for one row


def _package(folder: Path, pipeline: Any, features: list[dict[str, Any]], frame: pd.DataFrame) -> tuple[Path, str]:
    from bentos.churn import archive, packaging

    built = packaging.build(
        pipeline,
        version=1,
        run_id="bench",
        model_sha256=hashlib.sha256(json.dumps(features).encode()).hexdigest(),
        trained_as_of=DAY,
        threshold=0.3,
        features=features,
        reference=frame,
    )
    return archive.extract(built.archive, built.sha256, folder / "bento"), built.tag


def _write_model(folder: Path, pipeline: Any, features: list[dict[str, Any]], bento: Path) -> None:
    """The model for those who do not know bentos."""
    import joblib

    folder.mkdir()
    joblib.dump(pipeline, folder / "pipeline.joblib")
    (folder / "features.json").write_text(json.dumps({"features": features, "threshold": 0.3}))
    (folder / "model.onnx").write_bytes((bento / "src" / "model" / "model.onnx").read_bytes())
    (folder / "codes.json").write_text(json.dumps([_codes(feature) for feature in features]))


def _codes(feature: dict[str, Any]) -> dict[str, float]:
    """What stands for a number in Redis, by its bytes in hexadecimal: texts, booleans, nulls."""
    from feast.protos.feast.types.Value_pb2 import Value

    codes = {}
    for code, category in enumerate(feature["categories"] or ()):
        codes[Value(string_val=category).SerializeToString()] = float(code)
        if category == feature["null_category"]:
            codes[b""] = codes[Value(null_val=0).SerializeToString()] = float(code)
    if feature["default"] is not None:
        codes[b""] = codes[Value(null_val=0).SerializeToString()] = float(feature["default"])
    if feature["kind"] == "bool":
        codes |= {Value(bool_val=truth).SerializeToString(): float(truth) for truth in (False, True)}
    return {value.hex(): code for value, code in codes.items()}


def many_rows(stage: Stage, rows: int) -> pd.DataFrame:
    """Users who are not in the store: each column drawn for itself, the amounts stretched a little."""
    rng = np.random.default_rng(0)
    columns = {}
    for feature in stage.features:
        values = stage.frame[feature["name"]].to_numpy()[rng.integers(0, len(stage.frame), rows)]
        if feature["kind"] == "float":
            values = values * rng.uniform(0.9, 1.1, rows)
        columns[feature["name"]] = values
    return pd.DataFrame(columns)
