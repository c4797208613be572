"""/docs.json says what /predict does: every form, answer and error, with the model's own columns."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bentos.churn.model import Scorer
from bentos.churn.openapi import describe
from bentos.churn.requests import RequestError, RequestParser
from tests.bentos.serving_process import Service


@pytest.fixture(scope="module")
def document(scorer: Scorer) -> dict[str, Any]:
    return describe(scorer)


def fits(value: Any, schema: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a value is what a schema of this document describes; knows the words the document uses, and no others."""
    assert set(schema) <= {"$ref", "oneOf", "type", "enum", "nullable", "minimum", "maximum", "minLength", "maxLength",
                           "pattern", "format", "items", "minItems", "maxItems", "properties", "required",
                           "additionalProperties", "description", "multipleOf"}, schema  # fmt: skip
    if "$ref" in schema:
        return fits(value, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    if "oneOf" in schema:
        return sum(fits(value, one, document) for one in schema["oneOf"]) == 1
    if value is None and schema.get("nullable"):
        return "enum" not in schema or None in schema["enum"]
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        return False
    kind = schema.get("type")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("integer", "number"):
        return (
            number
            and (kind == "number" or float(value).is_integer())
            and float(value) % schema.get("multipleOf", value or 1) == 0
            and schema.get("minimum", value) <= value <= schema.get("maximum", value)
        )
    if kind == "string":
        return (
            isinstance(value, str)
            and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
            and all(fits(item, schema["items"], document) for item in value)
        )
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(properties)
            and all(fits(value[name], properties[name], document) for name in value)
        )
    return isinstance(value, bool) if kind == "boolean" else kind is None


def body_schema(operation: dict[str, Any], status: int | None = None) -> dict[str, Any]:
    holder = operation["requestBody"] if status is None else operation["responses"][str(status)]
    schema: dict[str, Any] = holder["content"]["application/json"]["schema"]
    return schema


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text
    for part in text.split('"$ref": "#/components/schemas/')[1:]:
        assert part.split('"')[0] in document["components"]["schemas"]
    assert document["openapi"].startswith("3.0.")
    assert set(document["paths"]) == {"/predict", "/info", "/livez", "/readyz", "/metrics", "/docs.json"}


def test_every_error_is_described(document: dict[str, Any]) -> None:
    operation = document["paths"]["/predict"]["post"]

    assert set(operation["responses"]) == {
        "200", "400", "404", "405", "408", "413", "415", "422", "429", "431", "503"
    }  # fmt: skip
    for status in set(operation["responses"]) - {"200"}:
        example = operation["responses"][status]["content"]["application/json"]["example"]
        assert fits(example, body_schema(operation, int(status)), document)


def test_examples_are_requests(document: dict[str, Any], scorer: Scorer) -> None:
    operation = document["paths"]["/predict"]["post"]

    for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
        assert fits(example["value"], body_schema(operation), document)
        RequestParser(scorer.plan).parse(json.dumps(example["value"]).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [("monthly_fee", "abc"), ("monthly_fee", -1), ("months_active", 1.5), ("net_service", "Cable"),
     ("net_service", None), ("paperless_billing", 1), ("plan_stream_tv", None), ("plan_stream_tv", True),
     ("failed_payments_90d", None), ("monthly_fee", None), ("monthly_fee", 10), ("months_active", 3.0)],
)  # fmt: skip
def test_the_document_and_the_service_agree(document: dict[str, Any], scorer: Scorer, name: str, value: Any) -> None:
    request = {"features": {**scorer.golden["rows"][0], name: value}}
    try:
        RequestParser(scorer.plan).parse(json.dumps(request).encode())
        accepted = True
    except RequestError:
        accepted = False

    assert fits(request, body_schema(document["paths"]["/predict"]["post"]), document) is accepted


@pytest.mark.parametrize(
    "request_body", [{"user_id": "u-0001"}, {"user_id": "nobody"}, {"user_ids": ["u-0001", "nobody", "u-0008"]}, {}]
)
def test_answers_are_as_described(service: Service, request_body: dict[str, Any]) -> None:
    document = service.get("/docs.json").json()
    operation = document["paths"]["/predict"]["post"]

    reply = service.post(request_body)

    assert fits(reply.json(), body_schema(operation, reply.status), document)
