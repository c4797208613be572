"""What a trained model has learned: version 1, as the registry holds it and as its bento scores.

True effects of the first month are in `jobs.simulate._reasons`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bentos.churn.model import Scorer
from jobs import dataset
from jobs.package import extracted
from jobs.registry import Registry
from jobs.score import encode, fill
from tests.jobs.conftest import FIRST, Trained, settings_for

CLOSE = 1e-6  # a score may move by the last bits of float32, no more


@dataclass(frozen=True)
class Model:
    """Version 1 twice, with the users it was made for."""

    pipeline: Any
    scorer: Scorer
    users: pd.DataFrame  # complete feature rows of the first month, indexed by user_id
    left: pd.Series  # who of them did leave
    held_out: np.ndarray  # whom it has not seen

    def score(self, users: pd.DataFrame) -> np.ndarray:
        """P(churn) as the bento gives it."""
        return self.scorer.score(encode(users, self.scorer.plan)).astype(float)

    def score_by_pipeline(self, users: pd.DataFrame) -> np.ndarray:
        """P(churn) as scikit-learn gives it."""
        return np.asarray(self.pipeline.predict_proba(users)[:, 1])


@pytest.fixture(scope="module")
def model(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Model:
    settings = settings_for(trained.home)
    version = Registry(settings).version(1)
    assert version is not None
    elsewhere = settings_for(tmp_path_factory.mktemp("model"), database_url=settings.database)
    scorer = Scorer(extracted(elsewhere, trained.first_tag))
    users = fill(dataset.feature_frame(settings, FIRST), scorer.plan).dropna()
    held_out = dataset.in_holdout(users.index, salt=settings.holdout_salt, share=settings.holdout_share)
    left = dataset.labels(settings, FIRST).loc[users.index]
    return Model(Registry(settings).load_model(version), scorer, users, left, held_out)


# --- direction --------------------


def test_a_longer_contract_keeps_users(model: Model) -> None:
    scores = [
        model.score(model.users.assign(contract_type=contract)).mean()
        for contract in ("Month-to-month", "One year", "Two year")
    ]

    assert scores[0] > scores[1] > scores[2]
    assert scores[0] - scores[2] > 0.05, "the strongest reason there is"


@pytest.mark.parametrize(
    ("column", "more"), [("failed_payments_90d", 2), ("support_tickets_90d", 2), ("rebuffer_events_7d", 3)]
)
def test_more_trouble_does_not_keep_users(model: Model, column: str, more: int) -> None:
    troubled = model.users.assign(**{column: model.users[column] + more})

    assert model.score(troubled).mean() > model.score(model.users).mean()


def test_watching_more_does_not_make_users_leave(model: Model) -> None:
    keen = model.users.assign(watch_hours_30d=model.users["watch_hours_30d"] + 20)

    assert model.score(keen).mean() < model.score(model.users).mean()


# --- invariance --------------------


def test_order_of_rows_does_not_matter(model: Model) -> None:
    shuffled = model.users.sample(frac=1, random_state=3)

    for score in (model.score, model.score_by_pipeline):
        before = pd.Series(score(model.users), model.users.index)
        assert np.abs(before[shuffled.index].to_numpy() - score(shuffled)).max() <= CLOSE


def test_other_users_of_the_batch_do_not_matter(model: Model) -> None:
    some = range(0, len(model.users), 100)

    for score in (model.score, model.score_by_pipeline):
        alone = [score(model.users.iloc[[row]])[0] for row in some]
        assert np.abs(score(model.users)[list(some)] - alone).max() <= CLOSE


def test_user_id_does_not_matter(model: Model) -> None:
    renamed = model.users.set_axis([f"{number:04}-ZZZZZ" for number in range(len(model.users))])

    for score in (model.score, model.score_by_pipeline):
        assert np.array_equal(score(renamed), score(model.users))


def test_bento_and_pipeline_agree(model: Model) -> None:
    assert np.abs(model.score(model.users) - model.score_by_pipeline(model.users)).max() <= CLOSE


def test_a_row_over_http_is_the_row_in_bulk(model: Model) -> None:
    """`Scorer.encode` takes one user's values as they come in JSON; `jobs.score.encode` takes a frame."""
    users = model.users.iloc[::200]
    rows = [model.scorer.encode(row) for row in users.to_dict("records")]

    assert np.array_equal(np.asarray(rows, dtype=np.float32), encode(users, model.scorer.plan))


# --- minimum functionality --------------------


def test_a_clear_stayer_scores_below_a_clear_leaver(model: Model) -> None:
    anybody = model.users.iloc[0].to_dict() | {
        "net_service": "Fiber optic", "plan_stream_tv": False, "plan_stream_movies": False, "paperless_billing": False,
        "monthly_fee": 70.0, "watch_hours_30d": 30.0,
    }  # fmt: skip
    stayer = anybody | {
        "contract_type": "Two year", "net_service": "DSL", "months_active": 70, "total_paid": 4900.0,
        "failed_payments_90d": 0, "support_tickets_90d": 0, "rebuffer_events_7d": 0,
    }  # fmt: skip
    leaver = anybody | {
        "contract_type": "Month-to-month", "months_active": 2, "total_paid": 140.0,
        "failed_payments_90d": 3, "support_tickets_90d": 3, "rebuffer_events_7d": 6,
    }  # fmt: skip
    rows = [model.scorer.encode(row) for row in (stayer, leaver)]
    low, high = model.scorer.score(np.asarray(rows, dtype=np.float32))

    assert low < model.scorer.threshold <= high
    assert low < 0.1
    assert high > 0.5


def test_scores_are_probabilities(model: Model) -> None:
    """Also far outside of what was seen."""
    numbers = [f.name for f in model.scorer.plan.features if f.kind in ("int", "float")]
    extreme = [model.users.assign(**dict.fromkeys(numbers, value)) for value in (0.0, 1e6)]

    scores = np.concatenate([model.score(users) for users in (model.users, *extreme)])
    assert np.isfinite(scores).all()
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_mean_score_is_the_churn_rate_of_users_it_has_not_seen(model: Model) -> None:
    unseen, left = model.users[model.held_out], model.left[model.held_out]

    assert abs(model.score(unseen).mean() - left.mean()) <= 0.05


def test_users_it_has_not_seen_are_ranked_better_than_by_chance(model: Model) -> None:
    """Those of them who left scored clearly higher than those who stayed."""
    scores, left = model.score(model.users[model.held_out]), model.left[model.held_out].to_numpy()

    assert scores[left].mean() - scores[~left].mean() > 0.1
