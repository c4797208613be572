"""Feast's objects, made from `feature_repo.columns`: one entity, four feature views, one feature service.

The feature service `churn_v1` is the one list of features: training, drift, packaging and serving ask it.
What Feast has no word for (categories, defaults) rides along as tags of the fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Bool, Float64, Int64, String

from feature_repo.columns import ENTITY, FEATURE_TABLES, Column, view_name

FEATURE_SERVICE = "churn_v1"

_DTYPES = {"int": Int64, "float": Float64, "bool": Bool, "category": String}


@dataclass(frozen=True)
class Definitions:
    """Everything `FeatureStore.apply` needs."""

    entity: Entity
    views: tuple[FeatureView, ...]
    service: FeatureService

    def objects(self) -> list[Any]:
        """All of them, in one list."""
        return [self.entity, *self.views, self.service]


def define(glob: Callable[[str], str], *, ttl: timedelta) -> Definitions:
    """The definitions over the Parquet files that `glob(table)` names, rows older than `ttl` ignored in training."""
    user = Entity(name="user", join_keys=[ENTITY], value_type=ValueType.STRING)
    views = tuple(
        FeatureView(
            name=view_name(table.name),
            entities=[user],
            ttl=ttl,
            schema=[Field(name=ENTITY, dtype=String), *(_field(column) for column in table.columns)],
            source=FileSource(
                name=table.name,
                path=glob(table.name),
                timestamp_field="event_timestamp",
                file_format=ParquetFormat(),  # without it duckdb cannot read a pattern of files
            ),
        )
        for table in FEATURE_TABLES
    )
    return Definitions(user, views, FeatureService(name=FEATURE_SERVICE, features=list(views)))


def _field(column: Column) -> Field:
    tags = {
        "kind": column.kind,
        "low": json.dumps(column.low),
        "high": json.dumps(column.high),
        "categories": json.dumps(column.categories),
        "null_category": json.dumps(column.null_category),
        "default": json.dumps(column.default),
    }
    return Field(name=column.name, dtype=_DTYPES[column.kind], description=column.description, tags=tags)
