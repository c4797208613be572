"""Before a pod: what a candidate's bento would have answered to the last requests, beside what is served.

The log has each request's features as the served model saw them. Both bentos score them again, here and now, so that
the difference is that of the models. A model can be better and still decide otherwise about half of the users: who
acts on its answers should know before. That holds only while the served model is worth comparing with: the right
successor of one that no better than guesses differs from it everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from jobs.database import drift_checks, predictions
from jobs.package import extracted
from jobs.settings import Settings

if TYPE_CHECKING:
    from bentos.churn.model import Scorer

ENOUGH = 100  # logged requests; of fewer nothing is concluded, and so the setting is 0 or this at least


@dataclass(frozen=True)
class Replay:
    """What would change, over `requests` logged requests."""

    requests: int
    flipped: float = 0.0  # share of decisions that would be others
    to_churn: int = 0  # decisions that would become churn
    to_stay: int = 0  # decisions that would cease to be
    refused: int = 0  # the candidate cannot answer: it needs features that these lack
    shift: float = 0.0  # mean absolute difference of the probabilities

    def __str__(self) -> str:
        if self.requests < ENOUGH:
            return f"{self.requests} logged requests, too few to compare"
        refused = f", {self.refused} could not be answered" if self.refused else ""
        return (
            f"of {self.requests:,} logged requests {self.flipped:.1%} would be decided otherwise ({self.to_churn:,} "
            f"would become churn, {self.to_stay:,} cease to be){refused}; probabilities move by {self.shift:.3f} "
            "on average"
        )

    def objections(self, settings: Settings) -> list[str]:
        """What of it is beyond the settings."""
        if self.requests < ENOUGH:
            return []
        found = []
        if not self.flipped <= settings.replay_max_flipped:  # a NaN is too much as well
            found.append(f"{self.flipped:.1%} is above replay_max_flipped, {settings.replay_max_flipped:.1%}")
        if not self.shift <= settings.replay_max_shift:
            found.append(f"{self.shift:.3f} is above replay_max_shift, {settings.replay_max_shift:g}")
        return found


def held_against(settings: Settings, champion: int | None) -> str:
    """What a replay is judged by: while it is the same, so is the judgement."""
    limits = (settings.replay_requests, settings.replay_max_flipped, settings.replay_max_shift)
    return " ".join(f"{limit:g}" for limit in (champion or 0, *limits))


def replay(settings: Settings, engine: sa.Engine, served_tag: str, tag: str) -> Replay:
    """Score the last `replay_requests` requests of clients with both bentos."""
    from bentos.churn.model import Scorer

    query = sa.select(predictions.c.features).where(predictions.c.source == "client")
    query = query.order_by(predictions.c.predicted_at.desc()).limit(settings.replay_requests)
    with engine.connect() as connection:
        rows = [json.loads(features) for features in connection.execute(query).scalars()]
    if len(rows) < ENOUGH:
        return Replay(len(rows))
    return compare(rows, Scorer(extracted(settings, served_tag)), Scorer(extracted(settings, tag)))


def compare(rows: Sequence[dict[str, Any]], served: Scorer, candidate: Scorer) -> Replay:
    """What changes on these rows from one model to the other; rows that one of them cannot score are not compared."""
    import numpy as np

    pairs = [(_codes(served, row), _codes(candidate, row)) for row in rows]
    both = [(old, new) for old, new in pairs if old is not None and new is not None]
    refused = sum(old is not None and new is None for old, new in pairs)
    if not both:
        return Replay(len(rows), flipped=1.0 if refused else 0.0, refused=refused)
    before = served.score(np.array([old for old, _ in both], np.float32))
    after = candidate.score(np.array([new for _, new in both], np.float32))
    was, would = before >= served.threshold, after >= candidate.threshold
    to_churn, to_stay = int((~was & would).sum()), int((was & ~would).sum())
    return Replay(
        requests=len(rows),
        flipped=(to_churn + to_stay + refused) / (len(both) + refused),
        to_churn=to_churn,
        to_stay=to_stay,
        refused=refused,
        shift=float(np.abs(after.astype(np.float64) - before).mean()),
    )


def _codes(scorer: Scorer, row: dict[str, Any]) -> list[float] | None:
    from bentos.churn.model import MissingFeatures, WrongValue

    try:
        return scorer.encode(row)
    except (MissingFeatures, WrongValue):
        return None


def realised_auc(engine: sa.Engine, version: int) -> float | None:
    """The newest AUC that labels have shown of a served version; None while none are known."""
    query = sa.select(drift_checks.c.realised_auc).where(
        drift_checks.c.model_version == version, drift_checks.c.realised_auc.is_not(None)
    )
    with engine.connect() as connection:
        found: float | None = connection.execute(query.order_by(drift_checks.c.id.desc()).limit(1)).scalar()
    return found
