"""A small fitted pipeline of each kind, a bento of it, an online store written by Feast, and a running service."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OrdinalEncoder, StandardScaler

from bentos.churn import archive, packaging
from bentos.churn.model import Plan, Scorer
from feature_repo.columns import ENTITY, FEATURE_TABLES, view_name
from jobs.database import connect
from tests.bentos import serving_process

AS_OF = datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)
USERS = 1_000
NO_PAYMENTS = "u-0007"  # no row in payments_agg_90d: its feature has a default
NO_USAGE = "u-0008"  # no row in usage_agg_30d: the model cannot do without
NO_INTERNET = "u-0009"  # nulls that are a category
OLD = "u-0010"  # one view is two months old


def feature_list() -> list[dict[str, Any]]:
    """The model's columns as model.json has them; medians are 12."""
    return [
        {
            "name": column.name,
            "view": view_name(table.name),
            "kind": column.kind,
            "categories": list(column.categories) if column.categories else None,
            "null_category": column.null_category,
            "default": 12.0 if column.default == "median" else column.default,
            "low": column.low,
            "high": column.high,
            "description": column.description,
        }
        for table in FEATURE_TABLES
        for column in table.columns
    ]


def frame_of(features: list[dict[str, Any]], rows: int, seed: int) -> pd.DataFrame:
    """Rows in the form a pipeline takes: numbers and booleans as float64, categories as text."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    for feature in features:
        if feature["kind"] == "category":
            columns[feature["name"]] = rng.choice(feature["categories"], rows)
        elif feature["kind"] == "bool":
            columns[feature["name"]] = rng.integers(0, 2, rows).astype(float)
        elif feature["kind"] == "int":
            columns[feature["name"]] = rng.integers(0, 60, rows).astype(float)
        else:
            columns[feature["name"]] = rng.gamma(2, feature["high"] / 500, rows)
    return pd.DataFrame(columns)


def fit(features: list[dict[str, Any]], *steps: tuple[str, BaseEstimator]) -> Pipeline:
    """A pipeline as training registers it: `encode`, then the steps."""
    frame = frame_of(features, 600, seed=1)
    rng = np.random.default_rng(2)
    churned = ((frame["months_active"] < 20) ^ (rng.random(len(frame)) < 0.15)).astype(int)
    encode = ColumnTransformer(
        [
            (f["name"], OrdinalEncoder(categories=[f["categories"]]) if f["categories"] else "passthrough", [f["name"]])
            for f in features
        ],
        verbose_feature_names_out=False,
    )
    return Pipeline([("encode", encode), *steps]).fit(frame, churned)


@pytest.fixture(scope="session")
def features() -> list[dict[str, Any]]:
    return feature_list()


@pytest.fixture(scope="session")
def plan(features: list[dict[str, Any]]) -> Plan:
    return Plan.from_json(features)


@pytest.fixture(scope="session")
def linear(features: list[dict[str, Any]]) -> Pipeline:
    return fit(features, ("scale", StandardScaler()), ("model", LogisticRegression()))


@pytest.fixture(scope="session")
def boosted(features: list[dict[str, Any]]) -> Pipeline:
    return fit(features, ("model", GradientBoostingClassifier(n_estimators=20, random_state=0)))


@pytest.fixture(scope="session")
def built(boosted: Pipeline, features: list[dict[str, Any]]) -> packaging.Built:
    """A bento, built once for all tests."""
    return packaging.build(
        boosted,
        version=1,
        run_id="run-1",
        model_sha256="ab" * 32,
        trained_as_of=date(2024, 1, 31),
        threshold=0.4,
        features=features,
        reference=frame_of(features, 2_000, seed=3),
    )


@pytest.fixture(scope="session")
def bento(built: packaging.Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, extracted."""
    return archive.extract(built.archive, built.sha256, tmp_path_factory.mktemp("bentos") / "churn-v1")


@pytest.fixture(scope="session")
def scorer(bento: Path) -> Scorer:
    return Scorer(bento)


@dataclass(frozen=True)
class FeastStore:
    """An online store that Feast wrote, and Feast's SDK on it."""

    sdk: Any
    path: Path
    users: tuple[str, ...]

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"


def _write(store: Any, features: list[dict[str, Any]], users: list[str]) -> None:
    frame = frame_of(features, len(users), seed=4)
    rng = random.Random(5)
    for view in dict.fromkeys(f["view"] for f in features):
        table = pd.DataFrame({ENTITY: users, "event_timestamp": pd.Timestamp(AS_OF)})
        for feature in (f for f in features if f["view"] == view):
            column: list[Any] = frame[feature["name"]].tolist()
            if feature["kind"] == "int":
                column = [int(value) for value in column]
            elif feature["kind"] == "bool":
                column = [bool(value) for value in column]
            if feature["default"] is not None or feature["null_category"]:
                column = [None if rng.random() < 0.1 else value for value in column]
            table[feature["name"]] = pd.Series(column, dtype=object)
        if view == "subscriptions_profile":
            table.loc[table[ENTITY] == NO_INTERNET, ["plan_stream_tv", "plan_stream_movies"]] = None
        if view == "payments_agg_90d":
            table = table[table[ENTITY] != NO_PAYMENTS]
        if view == "usage_agg_30d":
            table = table[table[ENTITY] != NO_USAGE]
            table.loc[table[ENTITY] == OLD, "event_timestamp"] = pd.Timestamp(AS_OF - timedelta(days=60))
        store.write_to_online_store(view, table)


@pytest.fixture(scope="session")
def online(features: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> FeastStore:
    """1,000 users and the sentinel in Feast's SQLite store, in Feast's way, with the project's definitions."""
    from feast import FeatureStore, RepoConfig

    from feature_repo.definitions import define

    folder = tmp_path_factory.mktemp("feast")
    config = RepoConfig(
        project="churn",
        provider="local",
        registry={"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db"},
        offline_store={"type": "duckdb"},
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    store.apply(define(lambda table: str(folder / f"{table}.parquet"), ttl=timedelta(days=45)).objects())
    users = [f"u-{i:04}" for i in range(USERS - 1)] + ["Zoë Ünïcode ☂"]
    _write(store, features, [*users, "__sentinel__"])
    return FeastStore(store, folder / "online.db", tuple(users))


@pytest.fixture
def database(tmp_path: Path) -> str:
    """URL of an empty database of ours."""
    url = f"sqlite:///{tmp_path}/churn.db"
    connect(url)
    return url


@pytest.fixture(scope="session")
def settings(online: FeastStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the shared service."""
    folder = tmp_path_factory.mktemp("service")
    connect(f"sqlite:///{folder}/churn.db")
    return serving_process.environment(
        database=f"sqlite:///{folder}/churn.db",
        online_store=online.url,
        spool=folder / "spool",
        serve_as_of=AS_OF.date().isoformat(),
    )


@pytest.fixture(scope="session")
def service(bento: Path, settings: dict[str, str]) -> Iterator[serving_process.Service]:
    """A running service that several tests ask; those that break one start their own."""
    with serving_process.start(bento, settings) as running:
        yield running
