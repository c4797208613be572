"""A bento of a registered pipeline: checked before it is built, the same wherever it is loaded."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import Pipeline

from bentos.churn import archive, packaging
from bentos.churn.model import (
    GoldenMismatch,
    MissingFeatures,
    ModelError,
    Plan,
    Scorer,
    WrongValue,
    code_digest,
    model_folder,
)
from tests.bentos.conftest import fit, frame_of

Features = list[dict[str, Any]]


def build(pipeline: Pipeline, features: Features, **changes: Any) -> packaging.Built:
    settings: dict[str, Any] = {
        "version": 2, "run_id": "run-2", "model_sha256": "cd" * 32, "trained_as_of": date(2024, 2, 29),
        "threshold": 0.5, "features": features, "reference": frame_of(features, 300, seed=7),
    }  # fmt: skip
    return packaging.build(pipeline, **{**settings, **changes})


@pytest.mark.parametrize("kind", ["linear", "boosted", "forest"])
def test_onnx_scores_as_scikit_learn_does(kind: str, features: Features, request: pytest.FixtureRequest) -> None:
    pipeline = (
        fit(features, ("model", RandomForestClassifier(30, n_jobs=2, random_state=0)))
        if kind == "forest"
        else request.getfixturevalue(kind)
    )

    assert packaging.parity(pipeline, packaging.to_onnx(pipeline), frame_of(features, 3_000, seed=9)) <= 1e-6


def test_a_built_bento_scores_as_the_pipeline_does(boosted: Pipeline, scorer: Scorer, features: Features) -> None:
    frame = frame_of(features, 200, seed=11)
    matrix = np.asarray([scorer.encode(row) for row in frame.to_dict("records")], dtype=np.float32)

    found = scorer.score(matrix)

    assert np.abs(found - boosted.predict_proba(frame)[:, 1]).max() <= 1e-6


def test_a_bento_says_what_it_is(built: packaging.Built, scorer: Scorer, features: Features) -> None:
    assert re.fullmatch(r"churn:v1-[0-9a-f]{8}", built.tag)
    assert built.parity <= 1e-6
    assert scorer.bento_tag == built.tag == packaging.bento_tag(1, "run-1", "ab" * 32)
    assert (scorer.model_version, scorer.run_id, scorer.threshold) == (1, "run-1", 0.4)
    assert scorer.about["onnx_sha256"] == built.onnx_sha256
    assert scorer.about["code_digest"] == packaging.code_digest()
    assert scorer.about["trained_as_of"] == "2024-01-31"
    assert scorer.about["feature_service"] == "churn_v1"
    assert scorer.about["features"] == features
    assert len(scorer.golden["rows"]) == 50
    assert scorer.check_golden() <= 1e-6


def test_the_tag_names_code_run_and_model() -> None:
    tag = packaging.bento_tag(3, "run", "aa")

    assert tag == packaging.bento_tag(3, "run", "aa")
    assert len({tag, packaging.bento_tag(3, "other", "aa"), packaging.bento_tag(3, "run", "bb")}) == 3


def test_code_that_does_not_serve_stays_behind(bento: Path, tmp_path: Path) -> None:
    """Another init container or another way of packaging is no reason to build a bento anew."""
    left_behind = {"archive.py", "fetch.py", "packaging.py", "serve.py"}
    code = bento / "src" / "bentos" / "churn"

    assert {path.name for path in packaging._CODE.glob("*.py")} - {
        path.name for path in code.glob("*.py")
    } == left_behind

    changed = shutil.copytree(packaging._CODE, tmp_path / "churn")
    for name in left_behind:
        (changed / name).write_text("# other code")
    assert code_digest(changed) == code_digest(code) == packaging.code_digest()
    (changed / "service.py").write_text("# other code")
    assert code_digest(changed) != packaging.code_digest()


def test_building_twice_in_one_process_works(linear: Pipeline, features: Features, tmp_path: Path) -> None:
    """The same version again: BentoML would refuse it in one store."""
    first, second = build(linear, features), build(linear, features)

    assert first.tag == second.tag
    assert first.onnx_sha256 == second.onnx_sha256
    for i, one in enumerate((first, second)):
        assert Scorer(archive.extract(one.archive, one.sha256, tmp_path / str(i))).bento_tag == first.tag


def test_a_difference_above_1e6_is_not_packaged(
    boosted: Pipeline, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = packaging.to_onnx(fit(features, ("model", RandomForestClassifier(5, random_state=1))))
    monkeypatch.setattr(packaging, "to_onnx", lambda _: other)

    with pytest.raises(packaging.ParityError, match=r"differs from scikit-learn by 0\.\d+ on 300 rows"):
        build(boosted, features)


def test_another_encoding_is_not_packaged(linear: Pipeline, features: Features) -> None:
    reordered = [dict(f) for f in features]
    contract = next(f for f in reordered if f["name"] == "contract_type")
    contract["categories"] = contract["categories"][::-1]

    with pytest.raises(packaging.ParityError, match="encodes contract_type otherwise"):
        build(linear, reordered)


def test_columns_in_another_order_are_not_packaged(linear: Pipeline, features: Features) -> None:
    with pytest.raises(packaging.ParityError, match="otherwise"):
        build(linear, [features[1], features[0], *features[2:]])


def test_an_empty_reference_is_not_packaged(linear: Pipeline, features: Features) -> None:
    with pytest.raises(packaging.ParityError, match="no rows"):
        build(linear, features, reference=frame_of(features, 0, seed=1))


def test_onnx_that_reads_other_files_is_refused(linear: Pipeline) -> None:
    model = onnx.load_model_from_string(packaging.to_onnx(linear))
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "outside")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.initializer.append(tensor)

    with pytest.raises(packaging.UnsafeModel, match="'outside' lies in another file"):
        packaging.check_onnx(model.SerializeToString())


def test_onnx_with_operators_of_its_own_is_refused(linear: Pipeline) -> None:
    model = onnx.load_model_from_string(packaging.to_onnx(linear))
    model.graph.node.append(helper.make_node("Shell", ["features"], ["y"], domain="com.example"))

    with pytest.raises(packaging.UnsafeModel, match=r"com\.example"):
        packaging.check_onnx(model.SerializeToString())


# --- the model's files ------------------------------------------------------------------------------------


@pytest.fixture
def broken(bento: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bento, tmp_path / "bento"))


def test_another_model_file_is_refused(broken: Path) -> None:
    path = model_folder(broken) / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(ModelError, match="sha256"):
        Scorer(broken)


@pytest.mark.parametrize("change", [2e-6, float("nan")], ids=["above", "nan"])
def test_golden_rows_must_come_out_the_same(broken: Path, change: float) -> None:
    path = model_folder(broken) / "golden.json"
    golden = json.loads(path.read_text())
    golden["scores"][20] += change
    path.write_text(json.dumps(golden))

    with pytest.raises(GoldenMismatch, match="golden rows differ"):
        Scorer(broken).check_golden()


def test_golden_rows_must_be_there(broken: Path) -> None:
    (model_folder(broken) / "golden.json").write_text('{"rows": [], "scores": []}')

    with pytest.raises(GoldenMismatch, match="0 rows"):
        Scorer(broken).check_golden()


def test_rows_become_numbers(plan: Plan, scorer: Scorer) -> None:
    row = dict(scorer.golden["rows"][0])
    row |= {"contract_type": "Two year", "plan_stream_tv": None, "plan_stream_movies": True, "paperless_billing": True,
            "failed_payments_90d": None, "ticket_avg_resolution_hrs_90d": float("nan"), "months_active": 7}  # fmt: skip
    del row["support_tickets_90d"]

    numbers = dict(zip(plan.names, plan.encode(row), strict=True))

    assert numbers["contract_type"] == 2.0
    assert numbers["plan_stream_tv"] == 2.0
    assert numbers["plan_stream_movies"] == 1.0
    assert numbers["paperless_billing"] == 1.0
    assert numbers["failed_payments_90d"] == 0.0
    assert numbers["ticket_avg_resolution_hrs_90d"] == 12.0
    assert numbers["support_tickets_90d"] == 0.0
    assert numbers["months_active"] == 7.0


def test_all_missing_features_are_named(scorer: Scorer) -> None:
    row = {**scorer.golden["rows"][0], "monthly_fee": None}
    del row["contract_type"]

    with pytest.raises(MissingFeatures) as refused:
        scorer.encode(row)
    assert refused.value.names == ("contract_type", "monthly_fee")


@pytest.mark.parametrize(
    ("name", "value"),
    [("months_active", "7"), ("months_active", 7.5), ("months_active", True), ("monthly_fee", float("inf")),
     ("contract_type", "Weekly"), ("contract_type", 1), ("paperless_billing", 2), ("paperless_billing", "true"),
     ("contract_type", True)],
)  # fmt: skip
def test_values_of_another_type_are_refused(scorer: Scorer, name: str, value: Any) -> None:
    """What lies in the online store may be of any type."""
    with pytest.raises(WrongValue, match=name):
        scorer.encode({**scorer.golden["rows"][0], name: value})


def test_serving_imports_nothing_of_training(bento: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'src')\n"
        "import bentos.churn.service, bentos.churn.predict, bentos.churn.shipper, bentos.churn.openapi\n"
        "from pathlib import Path\n"
        "from bentos.churn.model import Scorer\n"
        "Scorer(Path('.')).check_golden(); bentos.churn.service.API.metrics.render()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=bento, capture_output=True, text=True, check=True)
    imported = set(shown.stdout.split())

    assert "onnxruntime" in imported
    assert not imported & {"feast", "mlflow", "sklearn", "pandas", "evidently", "sqlalchemy", "onnx", "jobs", "scipy",
                           "skl2onnx", "feature_repo", "pyarrow"}  # fmt: skip


def test_archives_are_tar_files_without_this_machines_paths(built: packaging.Built, tmp_path: Path) -> None:
    path = tmp_path / "one.bento"
    path.write_bytes(built.archive)
    with tarfile.open(path) as tar:
        text = b"".join(file.read() for m in tar if (file := tar.extractfile(m)))

    assert str(Path(packaging.__file__).parents[2]).encode() not in text
    assert dataclasses.asdict(built)["tag"].encode() in text
