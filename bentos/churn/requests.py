"""What may be sent to /predict: strict JSON, in one of three forms, checked against the model's columns.

Everything that is not exactly right is a RequestError whose sentence says where, what was found and
what would be right. Nothing that passes here can fail later for its form: user ids can be stored in
Postgres and features are finite and in range.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from bentos.churn.model import Feature, MissingFeatures, Plan, Row

MAX_USERS = 1_000
MAX_USER_ID = 128

_SHOWN = 60  # characters of a wrong value that are repeated
_PROBLEMS = 10  # problems that are listed
# neither Redis nor Postgres can store the last of them; isprintable alone depends on Python's version of Unicode
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class RequestError(ValueError):
    """A request that is not answered with a score."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        self.status, self.code, self.detail = status, code, detail
        super().__init__(detail)


class Request(NamedTuple):
    """A valid request: one of the three is set."""

    user_id: str | None = None
    user_ids: list[str] | None = None
    features: Row | None = None  # as the model sees them


_FORMS = ("user_id", "user_ids", "features")


class RequestParser:
    """Reads requests for one model; the checks of its columns are made once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._checks: dict[str, Callable[[Any], str | None]] = {f.name: _check_of(f) for f in plan.features}

    def parse(self, body: bytes) -> Request:
        """The request in this body, or RequestError."""
        document = parse_json(body)
        if document.__class__ is not dict:
            raise malformed(f"expected a JSON object, found {shown(document)}")
        given = [form for form in _FORMS if form in document]
        unknown = [key for key in document if key not in _FORMS]
        if unknown:
            raise malformed(f"{shown(unknown[0])} is not a field; expected one of user_id, user_ids, features")
        if len(given) != 1:
            raise malformed(
                f"expected exactly one of user_id, user_ids, features, found {' and '.join(given) or 'none'}"
            )
        if given[0] == "user_id":
            return Request(user_id=_user_id(document["user_id"], "user_id"))
        if given[0] == "user_ids":
            return Request(user_ids=_user_ids(document["user_ids"]))
        return Request(features=self._features(document["features"]))

    def _features(self, row: Any) -> Row:
        if row.__class__ is not dict:
            raise malformed(f"features: expected an object with the model's features, found {shown(row)}")
        problems = []
        for name, value in row.items():
            check = self._checks.get(name)
            if check is None:
                problems.append(f"features: {shown(name)} is not a feature of the model")
            elif value is not None and (expected := check(value)):
                problems.append(f"features.{name}: expected {expected}, found {shown(value)}")
        if problems:
            more = len(problems) - _PROBLEMS
            raise malformed("; ".join(problems[:_PROBLEMS]) + (f"; and {more} more" if more > 0 else ""))
        try:
            return self._plan.row(self._plan.cells(row))
        except MissingFeatures as error:
            raise RequestError(422, "missing_features", str(error)) from None


def malformed(detail: str) -> RequestError:
    """A request whose form is wrong."""
    return RequestError(400, "malformed", detail)


def shown(value: Any) -> str:
    """A value as JSON, short enough and safe to repeat in an answer."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


# --- JSON -------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise malformed(f"{shown(key)} is there twice")
            seen.add(key)
    return found


def _constant(name: str) -> Any:
    raise malformed(f"{name} is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise malformed(f"{text[:_SHOWN]} is not a finite number")
    return number


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def parse_json(body: bytes) -> Any:
    """The JSON document in `body`; stricter than Python's parser: no duplicate keys, no NaN, no infinities."""
    try:
        return _decoder.decode(body.decode())
    except RequestError:
        raise
    except UnicodeDecodeError as error:
        raise malformed(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise malformed(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise malformed("the body is nested too deeply") from None
    except ValueError:  # the one left: Python converts at most 4,300 digits
        raise malformed("the body holds a number with too many digits") from None


# --- users ------------------------------------------------------------------------------------------------


def _user_id(value: Any, path: str) -> str:
    if value.__class__ is not str or not 1 <= len(value) <= MAX_USER_ID or not _is_clean(value):
        raise malformed(f"{path}: expected a string of 1 to {MAX_USER_ID} printable characters, found {shown(value)}")
    if value.startswith("__"):
        raise malformed(f"{path}: names beginning with __ are reserved, found {shown(value)}")
    return value


def _is_clean(text: str) -> bool:
    return text.isprintable() or _CONTROL.search(text) is None


def _user_ids(value: Any) -> list[str]:
    if value.__class__ is not list or not 1 <= len(value) <= MAX_USERS:
        found = f"{len(value):,} of them" if value.__class__ is list else shown(value)
        raise malformed(f"user_ids: expected a list of 1 to {MAX_USERS:,} user ids, found {found}")
    return [_user_id(user_id, f"user_ids[{i}]") for i, user_id in enumerate(value)]


# --- features ---------------------------------------------------------------------------------------------


def _check_of(feature: Feature) -> Callable[[Any], str | None]:
    """A function that says what was expected, if a value is not that. A null is checked by the plan."""
    low, high = feature.low, feature.high
    if feature.kind == "bool":
        return lambda value: None if value is True or value is False else "true or false"
    if feature.kind == "category":
        allowed = frozenset(feature.categories or ())
        wording = "one of " + ", ".join(map(json.dumps, feature.categories or ()))

        def category(value: Any) -> str | None:
            if value is True or value is False:
                value = "true" if value else "false"
            return None if value.__class__ is str and value in allowed else wording

        return category
    whole = feature.kind == "int"
    wording = f"a {'whole number' if whole else 'number'} from {_plain(low)} to {_plain(high)}"

    def number(value: Any) -> str | None:
        if value.__class__ is not int and (value.__class__ is not float or (whole and not value.is_integer())):
            return wording
        return None if low <= value <= high else wording

    return number


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else repr(number)
