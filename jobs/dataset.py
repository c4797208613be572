"""Feature frames out of Feast: what was known of every user at an instant, and nothing later.

With `jobs.materialize` the only module that speaks to Feast. Frames come back sorted by user with the
feature service's columns in its order, because Feast's order of rows and columns varies between processes.
Numbers and booleans are float64 with NaN for missing, categories are strings with None.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from string import Template
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from bentos.churn.database import sqlite_path
from bentos.churn.redis_client import Address
from feature_repo.columns import ENTITY, LABEL, POPULATION
from jobs.lease import file_lease
from jobs.settings import Settings
from jobs.snapshots import Snapshots, instant

if TYPE_CHECKING:
    from feast import FeatureStore

    from feature_repo.definitions import Definitions

log = logging.getLogger(__name__)

FEATURE_SERVICE = "churn_v1"


@dataclass(frozen=True)
class Feature:
    """One feature as the feature service states it; `view` is the feature view it comes from."""

    name: str
    view: str
    kind: Literal["int", "float", "bool", "category"]
    categories: tuple[str, ...] | None
    null_category: str | None
    default: float | Literal["median"] | None
    low: float
    high: float
    description: str


def feature_store(settings: Settings) -> FeatureStore:
    """Feast's store for these settings, its definitions applied if they differ from the registry's."""
    import yaml
    from feast import FeatureStore, RepoConfig

    template = Template(settings.feature_store_yaml.read_text(encoding="utf-8"))
    values = {
        "feast_project": settings.feast_project,
        "feast_registry": settings.feast_registry,
        "online_store": online_store(settings.online_store),
    }
    filled = template.substitute({name: json.dumps(value) for name, value in values.items()})  # JSON is YAML
    settings.home.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(config=RepoConfig(**yaml.safe_load(filled), repo_path=settings.home.resolve()))
    if not _applied(store, _definitions(settings)):
        # a file's: Jobs of a release share the volume, and Feast's own first apply does not bear company
        with file_lease(settings.home.resolve() / "feast-apply.lock", wait=60):
            if not _applied(store, _definitions(settings)):
                apply(settings, store)
    return store


def online_store(url: str) -> dict[str, Any]:
    """Feast's section `online_store` for the store at this URL, which is what the service is given, too."""
    if url.startswith("sqlite:///"):
        return {"type": "sqlite", "path": str(sqlite_path(url))}
    if not url.startswith(("redis://", "rediss://")):
        raise ValueError(f"{url.split('://', 1)[0]}:// is no online store; expected sqlite:///, redis:// or rediss://")
    address = Address.from_url(url)
    options: dict[str, Any] = {"db": address.db, "socket_connect_timeout": 5, "socket_timeout": 60}
    if address.username:
        options["username"] = address.username
    if address.password:
        options["password"] = address.password
    if address.tls:
        options["ssl"] = True
    if address.ca_file:
        options["ssl_ca_certs"] = address.ca_file
    # Feast splits at commas and reads what follows a = as JSON, so that a password of digits would be a number
    texts = [f"{name}={json.dumps(value).replace(',', chr(92) + 'u002c')}" for name, value in options.items()]
    return {
        "type": "redis",
        "connection_string": ",".join([f"{address.host}:{address.port}", *texts]),
        "skip_dedup": True,  # else corrected rows of an instant that is there already would be ignored
    }


def _definitions(settings: Settings) -> Definitions:
    from feature_repo.definitions import define

    return define(Snapshots(settings.snapshots).glob, ttl=settings.feature_ttl)


def apply(settings: Settings, store: FeatureStore) -> None:
    """Write the definitions to Feast's registry, and make the online store's tables where they are missing."""
    store.apply(_definitions(settings).objects())
    store.refresh_registry()  # an apply is not seen by its own process without


def _applied(store: FeatureStore, wanted: Definitions) -> bool:
    from feast.errors import FeastObjectNotFoundException

    def essence(view: Any) -> Any:
        fields = sorted((f.name, str(f.dtype), sorted(f.tags.items()), f.description) for f in view.features)
        return view.name, view.ttl, fields, view.batch_source.path

    try:
        stored = [store.get_feature_view(view.name) for view in wanted.views]
        service = store.get_feature_service(wanted.service.name)
    except FeastObjectNotFoundException:
        return False
    names = {p.name for p in service.feature_view_projections}
    return list(map(essence, stored)) == list(map(essence, wanted.views)) and names == {v.name for v in wanted.views}


def features(settings: Settings) -> tuple[Feature, ...]:
    """The features, in the order of the feature service, which is the order of the model's columns."""
    return features_of(feature_store(settings))


def features_of(store: FeatureStore) -> tuple[Feature, ...]:
    """The same, of a store at hand."""
    result = []
    for projection in store.get_feature_service(FEATURE_SERVICE).feature_view_projections:
        for field in projection.features:
            tags = {key: json.loads(value) for key, value in field.tags.items() if key != "kind"}
            categories = tags["categories"]
            result.append(
                Feature(
                    name=field.name,
                    view=projection.name,
                    kind=field.tags["kind"],
                    categories=None if categories is None else tuple(categories),
                    null_category=tags["null_category"],
                    default=tags["default"],
                    low=tags["low"],
                    high=tags["high"],
                    description=field.description,
                )
            )
    from feature_repo.columns import FEATURE_TABLES

    order = [column.name for table in FEATURE_TABLES for column in table.columns]
    return tuple(sorted(result, key=lambda feature: order.index(feature.name)))  # Feast sorts fields as it likes


def feature_frame(settings: Settings, day: date) -> pd.DataFrame:
    """The features of every user of the snapshot's population, as known at its instant; indexed by user_id.

    A user without a row in a view within `feature_ttl` has missing values there, and is not left out.
    """
    population = Snapshots(settings.snapshots).read(POPULATION, day).index
    return _point_in_time(settings, pd.Series(instant(day), index=population))


def _point_in_time(settings: Settings, instants: pd.Series) -> pd.DataFrame:
    store = feature_store(settings)
    entities = pd.DataFrame(
        {ENTITY: instants.index.astype(str), "event_timestamp": pd.to_datetime(instants.values, utc=True)}
    )
    job = store.get_historical_features(entities, features=store.get_feature_service(FEATURE_SERVICE))
    rows: pd.DataFrame = job.to_df()
    if len(rows) != len(entities):  # Feast's dask store drops rows without features; ours must not
        raise RuntimeError(f"Feast returned {len(rows)} rows for {len(entities)} users")
    frame = rows.set_index(ENTITY).sort_index()
    return canonical(frame, features_of(store))


def canonical(frame: pd.DataFrame, plan: Sequence[Feature]) -> pd.DataFrame:
    """The frame with the plan's columns and types: float64 with NaN, or str with None; null categories named."""
    columns: dict[str, Any] = {}
    for feature in plan:
        values = frame[feature.name]
        if feature.kind == "category":
            text = values.astype(object).where(values.notna(), feature.null_category)
            columns[feature.name] = text
        else:
            columns[feature.name] = values.astype("Float64").astype("float64")
    result = pd.DataFrame(columns, index=frame.index)
    result.index.name = ENTITY
    return result


def labels(settings: Settings, day: date) -> pd.Series:
    """Who of the snapshot left within the horizon: bool, indexed by user_id. Nobody asks when that is known here."""
    return Snapshots(settings.snapshots).read("labels", day)[LABEL].dropna().astype(bool)


def known_at(settings: Settings, day: date) -> datetime:
    """The instant at which the labels of that day's snapshot are known, whatever files lie in the folder."""
    return instant(day) + settings.label_horizon


@dataclass(frozen=True)
class TrainingSet:
    """Features and labels of users, as of each snapshot's instant. Rows may repeat a user in several snapshots."""

    days: tuple[date, ...]
    features: pd.DataFrame  # indexed by user_id
    labels: pd.Series  # bool, same rows
    rows: tuple[int, ...]  # of each snapshot, in the order of `days`
    without_required: int  # users left out, because a feature without default was missing

    @property
    def fingerprint(self) -> str:
        """sha256 of the rows: equal for equal data, whatever files they came from."""
        hashes = pd.util.hash_pandas_object(self.features.assign(**{LABEL: self.labels}), index=True)
        digest = hashlib.sha256(np.ascontiguousarray(hashes.to_numpy()).tobytes())
        digest.update(repr((self.days, list(self.features.columns))).encode())
        return digest.hexdigest()


def training_days(settings: Settings, as_of: datetime) -> tuple[date, ...]:
    """The newest snapshots (as many as `training_snapshots`) whose labels are known at `as_of` and have arrived."""
    snapshots = Snapshots(settings.snapshots)
    usable = [day for day in snapshots.days() if known_at(settings, day) <= as_of and snapshots.has_labels(day)]
    return tuple(usable[-settings.training_snapshots :])


def training_set(settings: Settings, days: Sequence[date]) -> TrainingSet:
    """The training set of these snapshots, joined point in time: no feature row later than a row's snapshot."""
    plan = features(settings)
    frames, targets, rows = [], [], []
    required = [feature.name for feature in plan if feature.default is None]
    for day in days:
        frame = feature_frame(settings, day)
        known = labels(settings, day)
        both = frame.index.intersection(known.index)
        complete = both[frame.loc[both, required].notna().all(axis=1)]
        if len(complete) < len(both):
            left_out = len(both) - len(complete)
            log.warning("%s: left out %d of %d users, a feature without default is missing", day, left_out, len(both))
        frames.append(frame.loc[complete])
        targets.append(known.loc[complete])
        rows.append((len(both), len(complete)))
    without = sum(before - after for before, after in rows)
    return TrainingSet(tuple(days), pd.concat(frames), pd.concat(targets), tuple(n for _, n in rows), without)


def in_holdout(user_ids: Iterable[str], *, salt: str, share: float) -> np.ndarray:
    """Whether each user is held out for ever: sha256 of salt and user_id, as a number in [0, 1), is below share."""
    draws = (hashlib.sha256(f"{salt}:{user}".encode()).digest()[:8] for user in user_ids)
    return np.array([int.from_bytes(draw, "big") < share * 2**64 for draw in draws], dtype=bool)


def defaults(plan: Sequence[Feature], training: pd.DataFrame) -> dict[str, float]:
    """What stands in for a missing value, by feature: the stated default, or the median of the training rows."""
    return {
        feature.name: float(training[feature.name].median()) if feature.default == "median" else float(feature.default)
        for feature in plan
        if feature.default is not None
    }
