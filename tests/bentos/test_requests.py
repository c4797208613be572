"""What may be sent: one of three forms, strictly, and a sentence that helps for everything else."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.churn.model import Plan
from bentos.churn.requests import Request, RequestError, RequestParser
from tests.bentos.conftest import feature_list

PLAN = Plan.from_json(feature_list())
PARSER = RequestParser(PLAN)

ROW: dict[str, Any] = {
    "months_active": 12, "plan_stream_tv": "true", "plan_stream_movies": None, "contract_type": "One year",
    "paperless_billing": True, "monthly_fee": 70.5, "total_paid": 846, "net_service": "DSL", "watch_hours_30d": 3.5,
    "avg_session_mins_7d": 40, "unique_devices_30d": 2, "skips_7d": 0, "rebuffer_events_7d": 1,
    "failed_payments_90d": 0, "support_tickets_90d": 1, "ticket_avg_resolution_hrs_90d": 4.5,
}  # fmt: skip


def parse(document: Any) -> Request:
    return PARSER.parse(json.dumps(document).encode())


def refusal(body: Any) -> RequestError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as refused:
        PARSER.parse(data)
    return refused.value


def with_feature(**values: Any) -> dict[str, Any]:
    return {"features": {**ROW, **values}}


def values(request: Request) -> dict[str, Any]:
    """The features of a request as the model sees them."""
    assert request.features is not None
    found: dict[str, Any] = json.loads(request.features.text)
    return found


def test_the_three_forms() -> None:
    assert parse({"user_id": "7590-VHVEG"}) == Request(user_id="7590-VHVEG")
    assert parse({"user_ids": ["a", "b", "a"]}) == Request(user_ids=["a", "b", "a"])
    features = values(parse({"features": ROW}))
    assert tuple(features) == PLAN.names
    assert features["plan_stream_movies"] == "none"


def test_absent_and_null_features_take_their_defaults() -> None:
    row = {**ROW, "failed_payments_90d": None}
    del row["ticket_avg_resolution_hrs_90d"]

    features = values(parse({"features": row}))

    assert features["failed_payments_90d"] == 0
    assert features["ticket_avg_resolution_hrs_90d"] == 12.0


def test_all_missing_features_are_named() -> None:
    row = {**ROW, "monthly_fee": None}
    del row["months_active"]
    del row["plan_stream_tv"]  # null is an answer, silence is not

    found = refusal({"features": row})

    assert (found.status, found.code) == (422, "missing_features")
    assert found.detail == "the model cannot do without months_active, plan_stream_tv, monthly_fee"


def test_whole_numbers_may_have_a_point() -> None:
    features = values(parse(with_feature(months_active=12.0)))
    assert features["months_active"] == 12


def test_true_and_false_are_categories_where_they_are() -> None:
    features = values(parse(with_feature(plan_stream_tv=False)))
    assert features["plan_stream_tv"] == "false"
    assert "contract_type: expected one of" in refusal(with_feature(contract_type=True)).detail


@pytest.mark.parametrize(
    ("document", "detail"),
    [
        (with_feature(monthly_fee="abc"), 'features.monthly_fee: expected a number from 0 to 100000, found "abc"'),
        (with_feature(monthly_fee=True), "features.monthly_fee: expected a number from 0 to 100000, found true"),
        (with_feature(monthly_fee=-0.01), "features.monthly_fee: expected a number from 0 to 100000, found -0.01"),
        (with_feature(months_active=1.5), "features.months_active: expected a whole number from 0 to 1200, found 1.5"),
        (with_feature(months_active=-7), "features.months_active: expected a whole number from 0 to 1200, found -7"),
        (with_feature(paperless_billing=1), "features.paperless_billing: expected true or false, found 1"),
        (with_feature(net_service="Cable"),
         'features.net_service: expected one of "DSL", "Fiber optic", "No", found "Cable"'),
        (with_feature(shoe_size=42), 'features: "shoe_size" is not a feature of the model'),
        ({"user_id": ""}, 'user_id: expected a string of 1 to 128 printable characters, found ""'),
        ({"user_ids": ["a", 7]}, "user_ids[1]: expected a string of 1 to 128 printable characters, found 7"),
        ({"user_id": "__sentinel__"}, 'user_id: names beginning with __ are reserved, found "__sentinel__"'),
        ({"user": "a"}, '"user" is not a field; expected one of user_id, user_ids, features'),
        ({"user_id": "a", "features": ROW}, "expected exactly one of user_id, user_ids, features, "
                                            "found user_id and features"),
        ([], "expected a JSON object, found []"),
    ],
)  # fmt: skip
def test_the_sentence_says_where_what_and_what_would_be_right(document: Any, detail: str) -> None:
    found = refusal(document)

    assert (found.status, found.code, found.detail) == (400, "malformed", detail)


def test_several_problems_are_told_at_once() -> None:
    detail = refusal(with_feature(monthly_fee="a", skips_7d=-1)).detail

    assert "features.monthly_fee" in detail
    assert "features.skips_7d" in detail


def test_details_stay_short() -> None:
    assert len(refusal({"features": {f"x{i}": "y" * 5_000 for i in range(500)}}).detail) < 1_000
    assert len(refusal({"user_id": "x" * 100_000}).detail) < 300


def test_many_keys_take_no_long_time() -> None:
    keys = ",".join(f'"k{i}":0' for i in range(100_000))
    assert "is there twice" in refusal(f'{{{keys},"k99999":1}}'.encode()).detail


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NEARLY = st.one_of(
    st.fixed_dictionaries({"user_id": st.text() | JSON}),
    st.fixed_dictionaries({"user_ids": st.lists(st.text(max_size=4) | JSON, max_size=5) | JSON}),
    st.fixed_dictionaries({"features": st.fixed_dictionaries(
        {}, optional={name: st.just(value) | JSON for name, value in ROW.items()}) | JSON}),
    st.dictionaries(st.sampled_from(["user_id", "user_ids", "features", "x"]), JSON, max_size=3),
    JSON,
)  # fmt: skip


def check(body: bytes) -> None:
    """Either a request that cannot fail later for its form, or a refusal with a status of its own."""
    try:
        request = PARSER.parse(body)
    except RequestError as refused:
        assert refused.status in (400, 422)
        assert json.dumps(refused.detail)
        assert refused.detail
        return
    assert sum(part is not None for part in request) == 1
    for user_id in request.user_ids or [request.user_id or "features"]:
        assert 1 <= len(user_id) <= 128
        assert "\0" not in user_id
        assert user_id.encode()
    if request.features is not None:
        assert tuple(values(request)) == PLAN.names
        assert all(math.isfinite(code) for code in request.features.codes)
        for feature in PLAN.features:
            if feature.kind in ("int", "float"):
                assert feature.low <= float(values(request)[feature.name]) <= feature.high


@settings(max_examples=300)
@given(NEARLY)
def test_any_json_is_a_request_or_refused(document: Any) -> None:
    check(json.dumps(document).encode())


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    check(body)


@settings(max_examples=200)
@given(st.data())
def test_damaged_requests_are_requests_or_refused(data: st.DataObject) -> None:
    body = bytearray(json.dumps({"features": ROW}).encode())
    for at in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=4)):
        body[at] = data.draw(st.integers(0, 255))
    check(bytes(body))
