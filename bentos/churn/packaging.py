"""Make a bento of a registered scikit-learn pipeline.

The pipeline's first step, `encode`, turns the columns of a frame into numbers; what follows becomes ONNX.
Serving does the encoding itself, from the list of features, so this checks both halves on every row of
the reference frame: the same numbers as `encode` gave, and scores within 1e-6 of scikit-learn's.
Only this module of the package needs scikit-learn, and it stays behind when the bento is built.

BentoML keeps its store and configuration in globals, so it builds in a process of its own, in a store of
its own: building twice, or beside someone's own bentos, cannot interfere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentos.churn import model

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

PARITY = 1e-6
FEATURE_SERVICE = "churn_v1"
OPSETS = {"": 17, "ai.onnx.ml": 3}
BUILD_SECONDS = 120

_CODE = Path(__file__).parent
_CHUNK = 10_000  # rows encoded at a time

_BUILD = """
import sys
import bentoml.bentos

version, context, archive = sys.argv[1:]
bento = bentoml.bentos.build(
    "bentos.churn.service:Churn", name="churn", version=version, build_ctx=context, include=["*"],
    python={"packages": [], "lock_packages": False},  # the serving image has what it needs
)
bento.export(archive)
"""


class ParityError(ValueError):
    """ONNX or the encoding does not reproduce the registered pipeline."""


class UnsafeModel(ValueError):
    """The ONNX file refers to other files, or to operators that are not standard."""


@dataclass(frozen=True)
class Built:
    """A packaged bento. Archives of one tag differ in their bytes; the checksum belongs to this one."""

    tag: str
    archive: bytes
    sha256: str
    onnx_sha256: str
    parity: float


def code_digest() -> str:
    """sha256 over the code that serves."""
    return model.code_digest(_CODE)


def bento_tag(version: int, run_id: str, model_sha256: str) -> str:
    """The tag of the bento that this code makes of a model version: known before it is built."""
    digest = hashlib.sha256(f"{code_digest()}\0{run_id}\0{model_sha256}".encode()).hexdigest()
    return f"churn:v{version}-{digest[:8]}"


def to_onnx(pipeline: Any) -> bytes:
    """What follows the pipeline's `encode` step as ONNX: float32 `features` in, probabilities out."""
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType

    if pipeline.steps[0][0] != "encode":
        raise ValueError(f"the pipeline begins with step {pipeline.steps[0][0]!r}, expected 'encode'")
    if len(pipeline.classes_) != 2 or int(pipeline.classes_[1]) != 1:
        raise ValueError(f"the pipeline knows the classes {list(pipeline.classes_)}, expected 0 and 1")
    rest = pipeline[1:]
    columns = len(pipeline[0].get_feature_names_out())
    converted = convert_sklearn(
        rest,
        name="churn",  # else a random one, and other bytes each time
        initial_types=[("features", FloatTensorType([None, columns]))],
        options={id(rest.steps[-1][1]): {"zipmap": False}},
        target_opset=OPSETS,
    )
    data: bytes = converted.SerializeToString()
    check_onnx(data)
    return data


def check_onnx(data: bytes) -> None:
    """Raise UnsafeModel unless the model is self-contained and uses standard operators only."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    loaded = onnx.load_model_from_string(data)

    def tensors(graph: Any) -> list[Any]:
        found = [*graph.initializer]
        for node in graph.node:
            if node.domain not in OPSETS:
                raise UnsafeModel(f"the model uses operator {node.op_type} of domain {node.domain!r}")
            for attribute in node.attribute:
                found += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
                for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                    found += tensors(inner)
        return found

    if loaded.functions:
        raise UnsafeModel("the model brings functions of its own")
    for tensor in tensors(loaded.graph):
        if uses_external_data(tensor):
            raise UnsafeModel(f"tensor {tensor.name!r} lies in another file")
    onnx.checker.check_model(loaded)


def parity(pipeline: Any, onnx: bytes, frame: pd.DataFrame) -> float:
    """The largest difference between scikit-learn and ONNX over all rows of `frame`."""
    matrix = pipeline[0].transform(frame)
    return _difference(pipeline, frame, _score(onnx, _float32(matrix)))


def _float32(matrix: Any) -> NDArray[np.float32]:
    import numpy as np

    return np.ascontiguousarray(matrix, dtype=np.float32)


def _score(onnx: bytes, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    session = model.session(onnx)
    output = session.get_outputs()[-1].name
    return session.run([output], {"features": matrix})[0][:, 1]  # type: ignore[no-any-return]


def _difference(pipeline: Any, frame: pd.DataFrame, scores: NDArray[np.float32]) -> float:
    import numpy as np

    if not len(frame):
        raise ParityError("the reference frame has no rows")
    final = pipeline.steps[-1][1]
    jobs = getattr(final, "n_jobs", None)
    if jobs is not None:
        final.n_jobs = 1  # threads would change the last digit
    try:
        expected = pipeline.predict_proba(frame)[:, 1]
    finally:
        if jobs is not None:
            final.n_jobs = jobs
    return float(np.max(np.abs(expected - scores.astype(np.float64))))


def _encode(plan: model.Plan, frame: pd.DataFrame) -> NDArray[np.float32]:
    """The frame's rows as serving encodes them."""
    import numpy as np

    parts = []
    for start in range(0, len(frame), _CHUNK):
        columns = [frame[name].iloc[start : start + _CHUNK].tolist() for name in plan.names]
        rows = (dict(zip(plan.names, values, strict=True)) for values in zip(*columns, strict=True))
        parts.append(np.asarray([plan.encode(row) for row in rows], dtype=np.float32))
    return np.concatenate(parts)


def build(
    pipeline: Any,
    *,
    version: int,
    run_id: str,
    model_sha256: str,
    trained_as_of: date,
    threshold: float,
    features: Sequence[Mapping[str, Any]],
    reference: pd.DataFrame,
    golden: pd.DataFrame | None = None,
    golden_rows: int = 50,
) -> Built:
    """The bento of a registered model version; ParityError if it would not score as the pipeline does.

    `features` are the model's columns in their order, as in `model.Feature`; `reference` is the feature
    frame of the snapshot trained on, in the form the pipeline takes; `golden` are the rows that serving
    reproduces before it is ready, by default `golden_rows` of the reference, spread over the scores.
    """
    import numpy as np

    plan = model.Plan.from_json(features)
    if not len(reference):
        raise ParityError("the reference frame has no rows")
    encoded = _encode(plan, reference)
    expected = _float32(pipeline[0].transform(reference[list(plan.names)]))
    if encoded.shape != expected.shape:
        raise ParityError(f"the pipeline encodes {expected.shape[1]} columns, the feature list has {encoded.shape[1]}")
    for column in np.flatnonzero((encoded != expected).any(axis=0)):
        raise ParityError(f"serving encodes {plan.names[column]} otherwise than the pipeline does")

    onnx = to_onnx(pipeline)
    scores = _score(onnx, encoded)
    difference = _difference(pipeline, reference[list(plan.names)], scores)
    if not difference <= PARITY:
        raise ParityError(
            f"ONNX differs from scikit-learn by {difference:.2g} on {len(reference):,} rows, "
            f"at most {PARITY:g} is allowed"
        )

    tag = bento_tag(version, run_id, model_sha256)
    onnx_sha256 = hashlib.sha256(onnx).hexdigest()
    about = {
        "model_version": version,
        "run_id": run_id,
        "trained_as_of": trained_as_of.isoformat()[:10],
        "feature_service": FEATURE_SERVICE,
        "threshold": float(threshold),
        "onnx_sha256": onnx_sha256,
        "model_sha256": model_sha256,
        "code_digest": code_digest(),
        "bento_tag": tag,
        "features": [dict(feature) for feature in features],
    }
    if golden is None:
        golden = spread(reference, scores, golden_rows)
    archive = _bento(tag, about, onnx, _golden(plan, golden, _score(onnx, _encode(plan, golden))))
    return Built(tag, archive, hashlib.sha256(archive).hexdigest(), onnx_sha256, difference)


def spread(frame: pd.DataFrame, scores: NDArray[Any], count: int) -> pd.DataFrame:
    """Rows spread evenly over the scores, from the lowest to the highest."""
    import numpy as np

    order = np.argsort(scores, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    chosen: pd.DataFrame = frame.iloc[order[places]]
    return chosen


def _golden(plan: model.Plan, frame: pd.DataFrame, scores: NDArray[np.float32]) -> dict[str, Any]:
    """Each row as serving sees it, with what ONNX gave for it."""
    columns = [frame[name].tolist() for name in plan.names]  # Python's own numbers, as requests have them
    found = [plan.cells(dict(zip(plan.names, values, strict=True))) for values in zip(*columns, strict=True)]
    rows = [json.loads(plan.row(cells).text) for cells in found]
    return {"rows": rows, "scores": [float(score) for score in scores]}


def _bento(tag: str, about: dict[str, Any], onnx: bytes, golden: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="churn-bento-") as scratch:
        context, home, archive = Path(scratch) / "context", Path(scratch) / "home", Path(scratch) / "out.bento"
        code = context / "bentos" / "churn"
        code.mkdir(parents=True)
        home.mkdir()
        shutil.copy(_CODE.parent / "__init__.py", code.parent)
        for path in model.serving_code(_CODE):
            shutil.copy(path, code)
        files = context / "model"
        files.mkdir()
        (files / "model.onnx").write_bytes(onnx)
        (files / "model.json").write_text(json.dumps(about, indent=1))
        (files / "golden.json").write_text(json.dumps(golden))
        built = subprocess.run(
            [sys.executable, "-c", _BUILD, tag.removeprefix("churn:"), str(context), str(archive)],
            cwd=context,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
            env={
                **os.environ,
                "BENTOML_HOME": str(home),
                "BENTOML_DO_NOT_TRACK": "true",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        if built.returncode or not archive.is_file():
            raise RuntimeError(f"bentoml could not build {tag}: {built.stderr.strip()[-2000:]}")
        return archive.read_bytes()
