"""Delete what has been kept long enough: rows of the prediction log, and of the scores of every user.

Nothing is deleted unless `predictions_kept` is set. In small transactions, so that the service's own writes never
wait for it, and a killed run has done a part of the work.
"""

from __future__ import annotations

import logging
from datetime import datetime

import sqlalchemy as sa

from jobs.database import connect, predictions, scores
from jobs.settings import Settings

log = logging.getLogger(__name__)

BATCH = 5_000  # rows a transaction


def prune(settings: Settings, *, now: datetime) -> int:
    """Delete predictions, and scores as of an instant, from more than `predictions_kept` before `now`; how many."""
    if not settings.predictions_kept:
        return 0
    before = now - settings.predictions_kept
    engine = connect(settings.database)
    deleted = 0
    for table, instant in ((predictions, predictions.c.predicted_at), (scores, scores.c.as_of)):
        keys = list(table.primary_key.columns)
        old = sa.select(*keys).where(instant < before).limit(BATCH)
        while True:
            with engine.begin() as connection:
                count = connection.execute(table.delete().where(sa.tuple_(*keys).in_(old))).rowcount
            deleted += count
            if not count:
                break
    log.info("deleted=%d older than %s", deleted, f"{before:%Y-%m-%d}")
    return deleted
