"""Answer a request: look up, score, log, answer.

A prediction is in the spool before its answer is sent, so that none is given that the log does not have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as _text
from typing import NamedTuple

import numpy as np

from bentos.churn.config import Config
from bentos.churn.guard import Answer
from bentos.churn.metrics import Metrics
from bentos.churn.model import MissingFeatures, Row, Scorer, WrongValue
from bentos.churn.online import OnlineStore, StoreDown, StoreEmpty, UserFeatures
from bentos.churn.requests import RequestError, RequestParser
from bentos.churn.spool import Spool, SpoolDown, SpoolFull

_TRUTH = {False: "false", True: "true"}


class Subject(NamedTuple):
    """Whom a score is for, and what the model gets to see."""

    row: Row
    user: str = "null"  # the id in JSON
    features_as_of: str = "null"  # in JSON; null: the features came with the request
    stale: bool = False


class Predictor:
    """The model, the store and the log, put together."""

    def __init__(self, config: Config, scorer: Scorer, store: OnlineStore, spool: Spool, metrics: Metrics) -> None:
        self._config = config
        self._scorer = scorer
        self._store = store
        self._spool = spool
        self._metrics = metrics
        self._parser = RequestParser(scorer.plan)
        self._threshold = scorer.threshold
        self._served = f'"model_version":{scorer.model_version},"bento_tag":{_text(scorer.bento_tag)}'
        self._served_by = f'"bento_tag":{_text(scorer.bento_tag)},"model_version":{scorer.model_version}'

    async def __call__(self, body: bytes, request_id: str, source: str) -> Answer:
        """The answer to a body, or RequestError."""
        request = self._parser.parse(body)
        if request.features is not None:
            return self._one(Subject(request.features), request_id, source)
        if request.user_id is not None:
            (subject,) = await self._look_up([request.user_id])
            if isinstance(subject, RequestError):
                raise subject
            return self._one(subject, request_id, source)
        user_ids = request.user_ids or []
        return self._many(user_ids, await self._look_up(user_ids), request_id, source)

    async def _look_up(self, user_ids: list[str]) -> list[Subject | RequestError]:
        try:
            found = await self._store.read(user_ids)
            now = self._config.now()
            return [self._subject(user_id, user, now) for user_id, user in zip(user_ids, found, strict=True)]
        except StoreEmpty as error:
            raise RequestError(503, "store_empty", str(error)) from None
        except (StoreDown, WrongValue) as error:
            raise RequestError(503, "store_down", str(error)) from None

    def _subject(self, user_id: str, user: UserFeatures | None, now: datetime) -> Subject | RequestError:
        if user is None:
            return RequestError(404, "unknown_user", f"no features of user {json.dumps(user_id)}")
        try:
            row = self._scorer.plan.row(user.cells)
        except MissingFeatures as error:
            return RequestError(422, "missing_features", str(error))
        for name in row.replaced:
            self._metrics.missing[name] = self._metrics.missing.get(name, 0) + 1
        ages = user.ages
        return Subject(row, _text(user_id), f'"{ages.text}"', now - ages.oldest > self._config.stale_after)

    def _score(self, subjects: Sequence[Subject], request_id: str, source: str) -> list[tuple[str, str]]:
        """Score and log. Of each prediction its fields in JSON, as in the log and in answers.

        They are in two parts: what tells of the bento stands between them where it is told of each.
        """
        scores = self._scorer.score(np.array([subject.row.codes for subject in subjects], np.float32)).tolist()
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        about = f'"request_id":{_text(request_id)},"source":"{source}","predicted_at":"{now}"'
        predictions = []
        records = []
        for subject, score in zip(subjects, scores, strict=True):
            head = (
                f'"prediction_id":"{os.urandom(16).hex()}","user_id":{subject.user},"churn_probability":{score!r},'
                f'"churn":{_TRUTH[score >= self._threshold]},"threshold":{self._threshold!r}'
            )
            tail = f'"features_as_of":{subject.features_as_of},"stale":{_TRUTH[subject.stale]}'
            predictions.append((head, tail))
            records.append(f'{{{head},{self._served},{tail},{about},"features":{_text(subject.row.text)}}}'.encode())
        try:
            self._spool.append(records)
        except SpoolFull as error:
            raise RequestError(503, "log_full", str(error)) from None
        except SpoolDown as error:
            raise RequestError(503, "log_down", str(error)) from None
        for subject, score in zip(subjects, scores, strict=True):
            self._metrics.scores.observe(score)
            self._metrics.stale += subject.stale
        return predictions

    def _one(self, subject: Subject, request_id: str, source: str) -> Answer:
        ((head, tail),) = self._score((subject,), request_id, source)
        return Answer(200, f'{{"request_id":{_text(request_id)},{head},{self._served},{tail}}}'.encode())

    def _many(self, user_ids: list[str], found: list[Subject | RequestError], request_id: str, source: str) -> Answer:
        subjects = [subject for subject in found if isinstance(subject, Subject)]
        predictions = iter(self._score(subjects, request_id, source) if subjects else ())
        items = [
            json.dumps({"user_id": user_id, "error": subject.code, "detail": subject.detail}, separators=(",", ":"))
            if isinstance(subject, RequestError)
            else f"{{{','.join(next(predictions))}}}"
            for user_id, subject in zip(user_ids, found, strict=True)
        ]
        document = f'{{"request_id":{_text(request_id)},{self._served_by},"predictions":[{",".join(items)}]}}'
        return Answer(200, document.encode())
