"""Answer a request: look up, score, log, answer.

A prediction is in the spool before its answer is sent, so that none is given that the log does not have.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any

import numpy as np

from bentos.churn.config import Config
from bentos.churn.guard import Answer
from bentos.churn.metrics import Metrics
from bentos.churn.model import MissingFeatures, Scorer, Value, WrongValue
from bentos.churn.online import OnlineStore, StoreDown, StoreEmpty, UserFeatures
from bentos.churn.requests import RequestError, RequestParser
from bentos.churn.spool import Record, Spool, SpoolDown, SpoolFull


class Row:
    """One user on the way through: what the model sees, then what it says."""

    __slots__ = ("features_as_of", "stale", "user_id", "values")

    def __init__(self, user_id: str | None, values: dict[str, Value], features_as_of: str | None, stale: bool) -> None:
        self.user_id = user_id
        self.values = values
        self.features_as_of = features_as_of  # None: the features came with the request
        self.stale = stale


class Predictor:
    """The model, the store and the log, put together."""

    def __init__(self, config: Config, scorer: Scorer, store: OnlineStore, spool: Spool, metrics: Metrics) -> None:
        self._config = config
        self._scorer = scorer
        self._store = store
        self._spool = spool
        self._metrics = metrics
        self._parser = RequestParser(scorer.plan)

    async def __call__(self, body: bytes, request_id: str, source: str) -> Answer:
        """The answer to a body, or RequestError."""
        request = self._parser.parse(body)
        if request.features is not None:
            return self._one(Row(None, request.features, None, stale=False), request_id, source)
        if request.user_id is not None:
            (row,) = await self._look_up([request.user_id])
            if isinstance(row, RequestError):
                raise row
            return self._one(row, request_id, source)
        user_ids = request.user_ids or []
        return self._many(user_ids, await self._look_up(user_ids), request_id, source)

    async def _look_up(self, user_ids: list[str]) -> list[Row | RequestError]:
        try:
            found = await self._store.read(user_ids)
            now = self._config.now()
            return [self._row(user_id, user, now) for user_id, user in zip(user_ids, found, strict=True)]
        except StoreEmpty as error:
            raise RequestError(503, "store_empty", str(error)) from None
        except (StoreDown, WrongValue) as error:
            raise RequestError(503, "store_down", str(error)) from None

    def _row(self, user_id: str, user: UserFeatures | None, now: datetime) -> Row | RequestError:
        if user is None:
            return RequestError(404, "unknown_user", f"no features of user {json.dumps(user_id)}")
        try:
            values = self._scorer.plan.complete(user.values)
        except MissingFeatures as error:
            return RequestError(422, "missing_features", str(error))
        for name, value in user.values.items():
            if value is None:
                self._metrics.missing[name] = self._metrics.missing.get(name, 0) + 1
        oldest = min(user.timestamps.values())
        stale = now - oldest > self._config.stale_after
        return Row(user_id, values, oldest.isoformat(), stale)

    def _score(self, rows: list[Row], request_id: str, source: str) -> list[Record]:
        """Score and log; the records as they are in the log."""
        scorer = self._scorer
        matrix = np.array([scorer.plan.codes(row.values) for row in rows], dtype=np.float32)
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        records: list[Record] = [
            {
                "prediction_id": os.urandom(16).hex(),
                "request_id": request_id,
                "user_id": row.user_id,
                "source": source,
                "predicted_at": now,
                "bento_tag": scorer.bento_tag,
                "model_version": scorer.model_version,
                "churn_probability": score,
                "churn": score >= scorer.threshold,
                "threshold": scorer.threshold,
                "features_as_of": row.features_as_of,
                "stale": row.stale,
                "features": json.dumps(row.values, separators=(",", ":")),
            }
            for row, score in zip(rows, scorer.score(matrix).tolist(), strict=True)
        ]
        try:
            self._spool.append(records)
        except SpoolFull as error:
            raise RequestError(503, "log_full", str(error)) from None
        except SpoolDown as error:
            raise RequestError(503, "log_down", str(error)) from None
        for record in records:
            self._metrics.scores.observe(record["churn_probability"])
            self._metrics.stale += record["stale"]
        return records

    def _one(self, row: Row, request_id: str, source: str) -> Answer:
        (record,) = self._score([row], request_id, source)
        return _json({"request_id": request_id, **{name: record[name] for name in _ONE}})

    def _many(self, user_ids: list[str], found: list[Row | RequestError], request_id: str, source: str) -> Answer:
        rows = [row for row in found if isinstance(row, Row)]
        records = iter(self._score(rows, request_id, source) if rows else ())
        items = [
            {"user_id": user_id, "error": row.code, "detail": row.detail}
            if isinstance(row, RequestError)
            else _item(next(records))
            for user_id, row in zip(user_ids, found, strict=True)
        ]
        return _json(
            {
                "request_id": request_id,
                "bento_tag": self._scorer.bento_tag,
                "model_version": self._scorer.model_version,
                "predictions": items,
            }
        )


_ITEM = ("prediction_id", "user_id", "churn_probability", "churn", "threshold", "features_as_of", "stale")
_ONE = (*_ITEM[:5], "model_version", "bento_tag", *_ITEM[5:])


def _item(record: Record) -> dict[str, Any]:
    return {name: record[name] for name in _ITEM}


def _json(document: dict[str, Any]) -> Answer:
    return Answer(200, json.dumps(document, separators=(",", ":")).encode())
