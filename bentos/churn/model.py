"""The model inside a bento: its columns, how a row becomes numbers, and ONNX Runtime to score them.

A bento's folder holds `src/model/`: `model.onnx`, `model.json` (what the model is, and its columns in order)
and `golden.json` (rows with the scores ONNX gave when the bento was packaged). Whoever loads a model checks
the file's hash; whoever serves with it checks the golden rows first, in the very process that serves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["int", "float", "bool", "category"]
Value = int | float | bool | str

GOLDEN_TOLERANCE = 1e-6

_ABSENT = object()
_AROUND = ("archive.py", "fetch.py", "packaging.py", "serve.py")


class MissingFeatures(ValueError):
    """A row lacks features that have no default."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(f"the model cannot do without {', '.join(self.names)}")


class WrongValue(ValueError):
    """A row holds a value of another type than its column's, or a category the model does not know."""


class ModelError(ValueError):
    """The model's files are not what the bento says they are."""


class GoldenMismatch(ModelError):
    """This process does not give the scores that were recorded when the bento was packaged."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of the model."""

    name: str
    view: str
    kind: Kind
    categories: tuple[str, ...] | None = None
    null_category: str | None = None  # a null is this category, not a missing value
    default: float | None = None  # stands in for a missing value; None: cannot do without
    low: float = 0.0  # both ends inclusive
    high: float = 0.0
    description: str = ""


class Cell(NamedTuple):
    """What a feature of a row is, in the forms it is needed in."""

    name: str
    found: Value | None  # as it was stored or sent; None: null, or not there
    value: Value | None  # as the model sees it; None: it cannot do without, or cannot take what was found
    code: float  # the number for it
    text: str  # `"name":value` in JSON


class Row(NamedTuple):
    """A row as the model sees it."""

    codes: list[float]
    text: str  # a JSON object: every feature, in order
    replaced: list[str]  # features whose null or absent values something stands in for


class Plan:
    """The model's columns in their order, and the way from a row of values to a row of numbers."""

    def __init__(self, features: Sequence[Feature]) -> None:
        self.features = tuple(features)
        self.names = tuple(feature.name for feature in features)
        self._codes = {f.name: {c: float(i) for i, c in enumerate(f.categories or ())} for f in features}
        self._texts = {f.name: json.dumps(f.name) + ":" for f in features}

    @classmethod
    def from_json(cls, features: Sequence[Mapping[str, Any]]) -> Plan:
        """The plan in a model.json's `features`."""
        return cls(
            [
                Feature(**{**f, "categories": None if f["categories"] is None else tuple(f["categories"])})
                for f in features
            ]
        )

    def cell(self, feature: Feature, value: Any = _ABSENT) -> Cell:
        """A feature's value, or what stands in for it where it is null or absent."""
        name = feature.name
        found = None if value is _ABSENT or (value.__class__ is float and math.isnan(value)) else value
        value = self._value(feature, value)
        if value is None:
            return Cell(name, found, None, math.nan, "")
        return Cell(name, found, value, self._code(name, value), self._texts[name] + json.dumps(value))

    def _value(self, feature: Feature, value: Any) -> Value | None:
        """The value as the model sees it; None: there is none, or none that it could take."""
        if value is None or (value.__class__ is float and math.isnan(value)):  # a NaN is a null
            value = feature.null_category
        if value is None or value is _ABSENT:
            value = feature.default
        return None if value is None else self._cast(feature, value)

    def _code(self, name: str, value: Value) -> float:
        return self._codes[name][value] if value.__class__ is str else float(value)

    def measurement(self, feature: Feature, value: float) -> Cell:
        """The cell of a finite number in a column of floats: the shortest way."""
        return Cell(feature.name, value, value, value, f"{self._texts[feature.name]}{value!r}")

    def row(self, cells: Sequence[Cell]) -> Row:
        """The row of these cells, one for every feature in order; raises MissingFeatures or WrongValue."""
        values = [cell.value for cell in cells]
        if None in values:
            self._refuse([cell for cell in cells if cell.value is None])
        replaced = [cell.name for cell in cells if cell.found is None]
        return Row([cell.code for cell in cells], "{" + ",".join([cell.text for cell in cells]) + "}", replaced)

    def _refuse(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            if cell.found is not None:
                kind = next(feature.kind for feature in self.features if feature.name == cell.name)
                raise WrongValue(f"{cell.name} is {cell.found!r}, which is no {kind} the model knows")
        raise MissingFeatures([cell.name for cell in cells])

    def cells(self, values: Mapping[str, Any]) -> list[Cell]:
        """The cells of a row of values by name."""
        return [self.cell(feature, values.get(feature.name, _ABSENT)) for feature in self.features]

    def encode(self, values: Mapping[str, Any]) -> list[float]:
        """The numbers for a row: categories by index, booleans 0 or 1. Raises MissingFeatures or WrongValue."""
        codes = []
        for feature in self.features:
            value = self._value(feature, values.get(feature.name, _ABSENT))
            if value is None:
                return self.row(self.cells(values)).codes  # which says what is wrong
            codes.append(self._code(feature.name, value))
        return codes

    def _cast(self, feature: Feature, value: Any) -> Value | None:
        kind = feature.kind
        if kind == "category":
            if value is True or value is False:
                value = "true" if value else "false"
            if value.__class__ is str and value in self._codes[feature.name]:
                return value
        elif kind == "bool":
            if value is True or value is False:
                return bool(value)
            if value.__class__ in (int, float) and value in (0, 1):
                return bool(value)
        elif value.__class__ in (int, float) and math.isfinite(value):
            if kind == "float":
                return float(value)
            if value == int(value) or value == feature.default:  # the median of counts may be 1.5
                return int(value) if value == int(value) else float(value)
        return None


def code_digest(folder: Path) -> str:
    """sha256 over the serving code in `folder`."""
    digest = hashlib.sha256()
    for path in serving_code(folder):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def serving_code(folder: Path) -> list[Path]:
    """The modules in `folder` that go into a bento: not those that make, fetch, extract and run one."""
    return [path for path in sorted(folder.glob("*.py")) if path.name not in _AROUND]


def model_folder(folder: Path) -> Path:
    """Where an extracted bento keeps its model."""
    inside = folder / "src" / "model"
    return inside if inside.is_dir() else folder / "model"


class Scorer:
    """A model, loaded: `score(matrix)` gives P(churn) for each row of numbers that `encode` made."""

    def __init__(self, folder: Path) -> None:
        """Load the model of the bento extracted at `folder`; raises ModelError if its hash is another."""
        model = model_folder(folder)
        self.about: dict[str, Any] = json.loads((model / "model.json").read_text())
        self.golden: dict[str, Any] = json.loads((model / "golden.json").read_text())
        self.plan = Plan.from_json(self.about["features"])
        self.model_version = int(self.about["model_version"])
        self.run_id = str(self.about["run_id"])
        self.bento_tag = str(self.about["bento_tag"])
        self.threshold = float(self.about["threshold"])
        onnx = (model / "model.onnx").read_bytes()
        found = hashlib.sha256(onnx).hexdigest()
        if found != self.about["onnx_sha256"]:
            raise ModelError(f"model.onnx has sha256 {found}, expected {self.about['onnx_sha256']}")
        self._session = session(onnx)
        self._outputs = [self._session.get_outputs()[-1].name]

    def score(self, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
        """P(churn) for each row of a float32 matrix [rows, columns]."""
        return self._session.run(self._outputs, {"features": matrix})[0][:, 1]  # type: ignore[no-any-return]

    def encode(self, row: Mapping[str, Any]) -> list[float]:
        """The numbers for a row of features; see `Plan.encode`."""
        return self.plan.encode(row)

    def check_golden(self) -> float:
        """The largest difference from the recorded scores; raises GoldenMismatch if it is above 1e-6."""
        import numpy as np

        rows, scores = self.golden["rows"], self.golden["scores"]
        if not rows or len(rows) != len(scores):
            raise GoldenMismatch(f"golden.json has {len(rows)} rows and {len(scores)} scores")
        found = self.score(np.asarray([self.encode(row) for row in rows], dtype=np.float32))
        difference = float(np.max(np.abs(found.astype(np.float64) - np.asarray(scores, dtype=np.float64))))
        if not difference <= GOLDEN_TOLERANCE:  # a NaN is refused too
            raise GoldenMismatch(f"golden rows differ by {difference:.2g}, at most {GOLDEN_TOLERANCE:g} is allowed")
        return difference


def session(onnx: bytes) -> Any:
    """An ONNX Runtime session on one thread: in a pod it would see the host's cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
