"""What /predict takes and gives, as OpenAPI 3.0, made from the model's own columns."""

from __future__ import annotations

from typing import Any

from bentos.churn.model import Feature, Scorer
from bentos.churn.requests import MAX_USER_ID, MAX_USERS

_ERRORS = {
    400: ("malformed", "Not strict JSON, not one of the three forms, or a value that is not allowed"),
    401: ("unauthorized", "No API key, or none that is known"),
    404: ("unknown_user", "No features of this user"),
    405: ("method_not_allowed", "Not POST"),
    408: ("body_timeout", "The body took longer than a second"),
    413: ("too_large", "The body is larger than 1 MiB"),
    415: ("unsupported_media_type", "Not application/json"),
    422: ("missing_features", "Features are missing that the model cannot do without"),
    429: ("overloaded", "Too many requests under way; see Retry-After"),
    431: ("headers_too_large", "More than 100 headers, or more than 16 KiB of them"),
    503: ("store_down", "store_down, store_empty, log_full, log_down or not_ready; see Retry-After"),
}

_USER_ID = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_USER_ID,
    "pattern": r"^(?!__)[^\u0000-\u001f\u007f-\u009f]+$",
    "description": "No control characters; names that begin with __ are reserved",
}
_PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}
_PREDICTION: dict[str, Any] = {
    "prediction_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "user_id": {"type": "string", "nullable": True},
    "churn_probability": _PROBABILITY,
    "churn": {"type": "boolean", "description": "churn_probability >= threshold"},
    "threshold": _PROBABILITY,
    "features_as_of": {
        "type": "string",
        "format": "date-time",
        "nullable": True,
        "description": "When the oldest feature was true; null: they came with the request",
    },
    "stale": {"type": "boolean"},
}
_MODEL = {"model_version": {"type": "integer"}, "bento_tag": {"type": "string"}}
_REQUEST_ID = {"request_id": {"type": "string"}}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(properties) if required is None else required,
    }


def _feature(feature: Feature) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": feature.description}
    if feature.kind == "bool":
        schema["type"] = "boolean"
    elif feature.kind == "category":
        allowed: list[Any] = [*(feature.categories or ())]
        allowed += [word == "true" for word in ("true", "false") if word in allowed]
        schema["enum"] = allowed
    else:
        schema |= {"type": "number", "minimum": feature.low, "maximum": feature.high}
        if feature.kind == "int":
            schema["multipleOf"] = 1  # "integer" would be without 3.0, in OpenAPI 3.0
    if feature.null_category is not None or feature.default is not None:
        schema["nullable"] = True
        if "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
        stand_in = feature.null_category if feature.default is None else feature.default
        schema["description"] += f"; null stands for {stand_in}"
    return schema


def describe(scorer: Scorer, *, keys: bool = False) -> dict[str, Any]:
    """The OpenAPI document of the service with this model; `keys`: callers must show one."""
    plan = scorer.plan
    features = _object(
        {f.name: _feature(f) for f in plan.features}, [f.name for f in plan.features if f.default is None]
    )
    error = _object({"error": {"type": "string"}, "detail": {"type": "string"}, **_REQUEST_ID})
    schemas = {
        "Features": features,
        "ByUser": _object({"user_id": _USER_ID}),
        "ByUsers": _object(
            {
                "user_ids": {
                    "type": "array",
                    "items": _USER_ID,
                    "minItems": 1,
                    "maxItems": MAX_USERS,
                    "description": "A user that is there twice is answered twice",
                }
            }
        ),
        "ByFeatures": _object({"features": _ref("Features")}),
        "Prediction": _object({**_REQUEST_ID, **_PREDICTION, **_MODEL}),
        "UserPrediction": _object(_PREDICTION),
        "UserError": _object(
            {
                "user_id": {"type": "string"},
                "error": {"type": "string", "enum": ["unknown_user", "missing_features"]},
                "detail": {"type": "string"},
            }
        ),
        "Predictions": _object(
            {
                **_REQUEST_ID,
                **_MODEL,
                "predictions": {"type": "array", "items": {"oneOf": [_ref("UserPrediction"), _ref("UserError")]}},
            }
        ),
        "Error": error,
    }
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "churn",
            "version": str(scorer.model_version),
            "description": "Churn probabilities of users, by their id or by their features.",
        },
        "paths": {
            "/predict": {"post": _predict(scorer, keys=keys)},
            "/info": {"get": _get("What is served", "application/json")},
            "/livez": {"get": _get("The process answers", "application/json")},
            "/readyz": {
                "get": {
                    **_get("New requests are welcome", "application/json"),
                    "responses": {
                        "200": _response("Ready", {"type": "object"}),
                        "503": _response("Not ready, and why", _ref("Error")),
                    },
                }
            },
            "/metrics": {"get": _get("Prometheus metrics", "text/plain")},
            "/docs.json": {"get": _get("This document", "application/json")},
        },
        "components": {"schemas": schemas, **({"securitySchemes": _SECURITY} if keys else {})},
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _response(description: str, schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {
        "description": description,
        "content": {kind: {"schema": schema}},
        "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
    }


def _get(summary: str, kind: str) -> dict[str, Any]:
    schema = {"type": "string"} if kind == "text/plain" else {"type": "object"}
    return {"summary": summary, "responses": {"200": _response(summary, schema, kind)}}


def _predict(scorer: Scorer, *, keys: bool) -> dict[str, Any]:
    forms = ("ByUser", "ByUsers", "ByFeatures")
    answers = {"oneOf": [_ref("Prediction"), _ref("Predictions")]}
    responses: dict[str, Any] = {"200": _response("Scores; each is in the prediction log", answers)}
    for status, (code, meaning) in _ERRORS.items():
        if status == 401 and not keys:
            continue
        responses[str(status)] = _response(meaning, _ref("Error"))
        responses[str(status)]["content"]["application/json"]["example"] = {
            "error": code,
            "detail": meaning,
            "request_id": "5f0c",
        }
    if keys:
        responses["401"]["headers"]["WWW-Authenticate"] = {"schema": {"type": "string", "enum": ["Bearer"]}}
    return {
        **({"security": [{name: []} for name in _SECURITY]} if keys else {}),
        "summary": "Churn probability of a user, of up to 1,000 users, or for given features",
        "parameters": [
            {
                "name": "X-Request-ID",
                "in": "header",
                "required": False,
                "description": "1 to 128 visible ASCII characters; with any other one is made",
                "schema": {"type": "string"},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"oneOf": [_ref(form) for form in forms]},
                    "examples": {
                        "user": {"value": {"user_id": "7590-VHVEG"}},
                        "users": {"value": {"user_ids": ["7590-VHVEG", "5575-GNVDE"]}},
                        "features": {"value": {"features": scorer.golden["rows"][0]}},
                    },
                }
            },
        },
        "responses": responses,
    }
