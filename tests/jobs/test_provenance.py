"""The chain outside the model registry: what `retrain` recorded is what is packaged, or nothing is."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import skops.io
import sqlalchemy as sa
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from jobs import package, provenance
from jobs.database import bentos, connect, metadata, models
from jobs.pin import NothingToDo, approve
from jobs.promote import PromotionFailed, promote
from jobs.registry import CANDIDATE, PREVIOUS, PRODUCTION, Registry
from jobs.retrain import retrain
from jobs.serving import LocalServing
from jobs.settings import Settings
from tests.jobs.conftest import SECOND_KNOWN, Trained, settings_for
from tests.test_postgres import fresh_database


def own_artifacts(trained: Trained, home: Path) -> None:
    """A copy of the trained home, its artifacts too: MLflow keeps their absolute paths."""
    shutil.copytree(trained.home, home)
    with closing(sqlite3.connect(home / "mlflow.db")) as connection, connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for column in [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]:
                connection.execute(
                    f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE {column} LIKE ?",
                    (str(trained.home), str(home), f"%{trained.home}%"),
                )


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, trained: Trained) -> Iterator[str]:
    """The trained home's tables, in each kind of database; empty: the home's own."""
    if request.param == "sqlite":
        yield ""
        return
    with fresh_database(request.getfixturevalue("postgres_server")) as url:
        source = connect(settings_for(trained.home).database)
        with source.connect() as rows, connect(url).begin() as connection:
            for table in metadata.sorted_tables:
                for row in rows.execute(sa.select(table)).mappings():
                    connection.execute(table.insert().values(**row))
            connection.exec_driver_sql("SELECT setval('promotions_id_seq', (SELECT max(id) FROM promotions))")
            connection.exec_driver_sql("SELECT setval('retrains_id_seq', (SELECT max(id) FROM retrains))")
        yield url


@pytest.fixture
def chain(tmp_path: Path, trained: Trained) -> Settings:
    """Version 1 serves, version 2 passed the gate, both are packaged; artifacts are this test's own."""
    own_artifacts(trained, tmp_path / "home")
    return settings_for(tmp_path / "home")


@pytest.fixture
def sqlite_settings(chain: Settings, trained: Trained) -> Settings:
    """The same, version 2 not packaged yet."""
    return not_packaged(chain, trained)


@pytest.fixture
def settings(chain: Settings, trained: Trained, database: str) -> Settings:
    """The same, on each kind of database."""
    return not_packaged(on(chain, database), trained)


def on(settings: Settings, database: str) -> Settings:
    return settings.model_copy(update={"database_url": database}) if database else settings


def not_packaged(settings: Settings, trained: Trained) -> Settings:
    with connect(settings.database).begin() as connection:
        connection.execute(bentos.delete().where(bentos.c.tag == trained.second_tag))
    return settings


def artifact(settings: Settings, version: int, name: str) -> Path:
    """Where MLflow keeps it."""
    registered = Registry(settings).version(version)
    assert registered is not None
    if name != provenance.MODEL:
        return next((settings.home / "mlartifacts").rglob(f"{registered.run_id}/artifacts/{name}"))
    with closing(sqlite3.connect(settings.home / "mlflow.db")) as connection:
        query = "SELECT artifact_location FROM logged_models WHERE model_id = ?"
        model = registered.source.removeprefix("models:/")
        (location,) = connection.execute(query, (model,)).fetchone()
    return Path(location.removeprefix("file://")) / name


def flip(path: Path) -> None:
    """One bit of the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tag(settings: Settings, **tags: str | None) -> None:
    Registry(settings).set_tags(2, tags)


def swap_model_and_its_tag(settings: Settings) -> None:
    """Another model, and the tag that vouches for it."""
    shutil.copy(artifact(settings, 1, provenance.MODEL), artifact(settings, 2, provenance.MODEL))
    tag(settings, model_sha256=provenance.sha256(artifact(settings, 2, provenance.MODEL).read_bytes()))


def lower_a_default(settings: Settings) -> None:
    path = artifact(settings, 2, "features.json")
    features = json.loads(path.read_text())
    features[-1]["default"] = 0.0
    path.write_text(json.dumps(features))


SWAPS: dict[str, tuple[Callable[[Settings], None], str]] = {
    "model": (lambda s: flip(artifact(s, 2, provenance.MODEL)), "the model's sha256"),
    "model and its tag": (swap_model_and_its_tag, "the model's sha256"),
    "features": (lambda s: flip(artifact(s, 2, "features.json")), "sha256 of features.json"),
    "a default": (lower_a_default, "sha256 of features.json"),
    "reference": (lambda s: flip(artifact(s, 2, "reference.parquet")), "sha256 of reference.parquet"),
    "golden rows": (lambda s: flip(artifact(s, 2, "golden.parquet")), "sha256 of golden.parquet"),
    "gate": (lambda s: flip(artifact(s, 2, "gate.json")), "sha256 of gate.json"),
    "threshold": (lambda s: tag(s, threshold="0.001"), "tag threshold is 0.001, recorded was 0."),
    "no threshold": (lambda s: tag(s, threshold=None), "tag threshold is missing, recorded was 0."),
    "trained as of": (lambda s: tag(s, trained_as_of="2024-01-31"), "tag trained_as_of is 2024-01-31"),
}


def nothing_moved(settings: Settings, trained: Trained) -> None:
    assert LocalServing(settings).served_tag() == trained.first_tag
    assert Registry(settings).aliases() == {PRODUCTION: 1, CANDIDATE: 2}
    with connect(settings.database).connect() as connection:
        assert connection.execute(sa.select(bentos.c.tag)).scalars().all() == [trained.first_tag]


@pytest.mark.parametrize("swap", SWAPS)
def test_what_was_swapped_after_the_gate_is_not_promoted(
    sqlite_settings: Settings, trained: Trained, monkeypatch: pytest.MonkeyPatch, swap: str
) -> None:
    """Promoted 0, nothing of it loaded, the version marked with what differs; not tried again."""
    refused(sqlite_settings, trained, monkeypatch, *SWAPS[swap])


def test_nor_is_it_with_postgres(settings: Settings, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(settings, trained, monkeypatch, *SWAPS["model and its tag"])


def refused(
    settings: Settings,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Settings], None],
    says: str,
) -> None:
    change(settings)
    loaded: list[Path] = []
    monkeypatch.setattr(package, "load_skops", loaded.append)

    with pytest.raises(PromotionFailed, match="version 2 is not what was recorded") as failed:
        promote(settings)

    assert says in str(failed.value)
    assert loaded == []
    nothing_moved(settings, trained)
    assert says in Registry(settings).version(2).tags["promotion_failed"]  # type: ignore[union-attr]
    assert "not tried again" in promote(settings).reason


def test_what_was_not_swapped_is_promoted(settings: Settings, trained: Trained) -> None:
    """And its bento is recorded with what it is made of."""
    assert promote(settings).to_version == 2
    with connect(settings.database).connect() as connection:
        row = connection.execute(sa.select(bentos).where(bentos.c.tag == trained.second_tag)).mappings().one()
    record = provenance.record_of(connect(settings.database), row["run_id"])
    assert record is not None
    assert row["model_sha256"] == record.model_sha256
    assert len({row["onnx_sha256"], row["code_digest"], row["sha256"]} - {None}) == 3


def test_a_version_that_was_swapped_is_trained_anew(sqlite_settings: Settings) -> None:
    """Bad, then good, without a person: the same data and settings do not hold it up."""
    flip(artifact(sqlite_settings, 2, provenance.MODEL))
    with pytest.raises(PromotionFailed, match="not what was recorded"):
        promote(sqlite_settings)
    assert retrain(sqlite_settings, as_of=SECOND_KNOWN).version == 3
    assert promote(sqlite_settings).to_version == 3


def test_nothing_is_compared_with_a_champion_that_was_swapped(sqlite_settings: Settings) -> None:
    """Beside a model that guesses any candidate would pass."""
    tag(sqlite_settings, data_fingerprint="another")
    flip(artifact(sqlite_settings, 1, provenance.MODEL))
    with pytest.raises(RuntimeError, match="cannot be compared with the champion: version 1 is not what was recorded"):
        retrain(sqlite_settings, as_of=SECOND_KNOWN)
    assert len(Registry(sqlite_settings).versions()) == 2


# ---- what is recorded ------------------------------------------------------------------------------------


def test_retrain_records_what_it_made(settings: Settings) -> None:
    registered = Registry(settings).version(2)
    assert registered is not None
    record = provenance.record_of(connect(settings.database), registered.run_id)
    assert record is not None
    assert (record.version, record.gate, record.recorded_by, record.trained_on) == (
        2,
        "passed",
        "retrain",
        "2024-02-29",
    )
    assert record.model_sha256 == registered.tags["model_sha256"]
    assert repr(record.threshold) == registered.tags["threshold"]
    assert record.trained_as_of == registered.trained_as_of
    assert (record.data_fingerprint, record.settings_fingerprint) == (
        registered.tags["data_fingerprint"],
        registered.tags["settings_fingerprint"],
    )
    assert set(record.artifacts) == {"features.json", "gate.json", "reference.parquet", "golden.parquet"}
    for name, recorded in record.artifacts.items():
        assert provenance.sha256(artifact(settings, 2, name).read_bytes()) == recorded


def test_a_run_is_recorded_before_it_is_registered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two, there is a row without a version, and no version without a row."""
    settings = settings_for(home)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Registry, "register", killed)
    with pytest.raises(KeyboardInterrupt):
        retrain(settings, as_of=SECOND_KNOWN)
    monkeypatch.undo()
    assert recorded(settings) == [(None, "retrain")]

    assert retrain(settings, as_of=SECOND_KNOWN).result == "registered"
    assert sorted(recorded(settings), key=str) == [(1, "retrain"), (None, "retrain")]
    assert promote(settings).to_version == 1


def recorded(settings: Settings) -> list[tuple[int | None, str]]:
    with connect(settings.database).connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(models.c.version, models.c.recorded_by))]  # type: ignore[misc]


def test_a_renewed_verdict_is_recorded(sqlite_settings: Settings) -> None:
    tag(sqlite_settings, champion="7", gate="refused")
    with connect(sqlite_settings.database).begin() as connection:
        connection.execute(models.update().values(gate="refused"))
    assert retrain(sqlite_settings, as_of=SECOND_KNOWN).gate == "passed"
    registered = Registry(sqlite_settings).version(2)
    assert registered is not None
    assert provenance.record_of(connect(sqlite_settings.database), registered.run_id).gate == "passed"  # type: ignore[union-attr]


# ---- versions without a row ------------------------------------------------------------------------------


def forget(settings: Settings) -> None:
    """The tables as a release before 0002 left them."""
    with connect(settings.database).begin() as connection:
        connection.execute(models.delete())
        connection.execute(bentos.update().values(onnx_sha256=None, model_sha256=None, code_digest=None))


def test_a_version_that_retrain_did_not_register_waits_for_approve(settings: Settings, trained: Trained) -> None:
    """Planted in the registry with every tag it needs, it is refused; a person may take it as it is now."""
    forget(settings)
    with pytest.raises(
        PromotionFailed, match="version 2 was not registered by `churn retrain`; `churn approve 2 --why"
    ):
        promote(settings)
    nothing_moved(settings, trained)

    approve(settings, 2, by="ada", reason="I trained it")

    assert recorded(settings) == [(2, "approve by ada: I trained it")]
    assert promote(settings).to_version == 2
    assert Registry(settings).aliases() == {PRODUCTION: 2, PREVIOUS: 1}


def test_retrain_does_not_vouch_for_what_it_did_not_make(sqlite_settings: Settings) -> None:
    """Whoever can register can copy the fingerprints into the tags."""
    forget(sqlite_settings)
    assert retrain(sqlite_settings, as_of=SECOND_KNOWN).result == "unchanged"
    assert recorded(sqlite_settings) == []


def test_approve_does_not_take_what_changed(sqlite_settings: Settings, trained: Trained) -> None:
    flip(artifact(sqlite_settings, 2, provenance.MODEL))
    approve(sqlite_settings, 2, by="ada", reason="looks good")
    with pytest.raises(PromotionFailed, match="not what was recorded"):
        promote(sqlite_settings)
    nothing_moved(sqlite_settings, trained)


def test_what_the_gate_refused_is_recorded_by_approve_and_followed_by_its_alias(sqlite_settings: Settings) -> None:
    """A version from elsewhere that no gate judged: approve records it, moving the alias serves it."""
    forget(sqlite_settings)
    tag(sqlite_settings, gate=None)
    with pytest.raises(NothingToDo, match="the gate refused version 2"):
        approve(sqlite_settings, 2, by="ada", reason="")
    Registry(sqlite_settings).set_alias(PRODUCTION, 2)
    assert promote(sqlite_settings).to_version == 2


@pytest.fixture
def older(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Version 1 was packaged by a release without table `models`; this one has other serving code."""
    forget(settings)
    Registry(settings).drop_alias(CANDIDATE)
    monkeypatch.setattr("bentos.churn.packaging.code_digest", lambda: "c0de" * 16)
    return settings


def test_a_version_of_an_older_release_is_taken_over(older: Settings, trained: Trained) -> None:
    found = promote(older)
    assert (found.to_version, found.served_tag == trained.first_tag) == (1, False)
    assert recorded(older) == [(1, f"taken over with {trained.first_tag}")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: Registry(s).set_tags(1, {"threshold": "0.001"}), "tag threshold is 0.001"),
        (lambda s: flip(artifact(s, 1, provenance.MODEL)), "the model's sha256 is"),
        (lambda s: artifact(s, 1, "features.json").write_text("[]"), "features.json lists other features"),
    ],
    ids=["threshold", "model", "features"],
)
def test_unless_it_is_not_what_that_release_packaged(
    older: Settings, trained: Trained, change: Callable[[Settings], None], says: str
) -> None:
    change(older)
    with pytest.raises(PromotionFailed, match=f"version 1 is not what {trained.first_tag} was made of: .*{says}"):
        promote(older)
    assert LocalServing(older).served_tag() == trained.first_tag
    assert recorded(older) == []


# ---- code in the registry --------------------------------------------------------------------------------


class Planted:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def a_pickle(command: str) -> bytes:
    return pickle.dumps(Planted(command))


def a_skops_file(command: str) -> bytes:
    """scikit-learn calls os.system when it is asked to transform."""
    return bytes(skops.io.dumps(make_pipeline(FunctionTransformer(os.system, kw_args={"command": command}))))


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (a_pickle, r"model.skops is no skops file: it begins with b'\\x80"),
        (a_skops_file, r"model.skops holds types that were not reviewed: posix.system"),
    ],
    ids=["pickle", "skops"],
)
def test_code_in_the_registry_is_never_run(
    sqlite_settings: Settings, trained: Trained, tmp_path: Path, plant: Callable[[str], bytes], says: str
) -> None:
    """Even when its checksum was recorded, because a person took the version as it was."""
    canary = tmp_path / "canary"
    forget(sqlite_settings)
    planted = plant(f"touch {canary}")
    artifact(sqlite_settings, 2, provenance.MODEL).write_bytes(planted)
    tag(sqlite_settings, model_sha256=provenance.sha256(planted))
    approve(sqlite_settings, 2, by="ada", reason="I did not look")

    with pytest.raises(PromotionFailed, match=says):
        promote(sqlite_settings)

    nothing_moved(sqlite_settings, trained)
    assert not canary.exists()
    pickle.loads(a_pickle(f"touch {canary}"))  # noqa: S301  the canary would have sung
    assert canary.exists()


def test_what_lies_beside_the_model_is_not_read(sqlite_settings: Settings, tmp_path: Path) -> None:
    """A pickle under the names that other tools load, and ONNX whose weights lie in another file."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    canary = tmp_path / "canary"
    folder = artifact(sqlite_settings, 2, provenance.MODEL).parent
    for name in ("model.pkl", "python_model.pkl", "model.joblib"):
        (folder / name).write_bytes(a_pickle(f"touch {canary}"))
    weights = numpy_helper.from_array(np.zeros(3, np.float32), "weights")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="/etc/passwd")
    graph = helper.make_graph([], "planted", [], [], [weights])
    (folder / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: os, python_model: python_model.pkl}}\n")

    assert promote(sqlite_settings).to_version == 2
    assert not canary.exists()


def test_a_model_without_a_skops_file_is_refused(sqlite_settings: Settings, trained: Trained, tmp_path: Path) -> None:
    file = artifact(sqlite_settings, 2, provenance.MODEL)
    file.with_suffix(".pkl").write_bytes(a_pickle(f"touch {tmp_path / 'canary'}"))
    file.unlink()
    with pytest.raises(PromotionFailed, match=r"holds .*'model.pkl'.*; expected one .skops file"):
        promote(sqlite_settings)
    nothing_moved(sqlite_settings, trained)
    assert not (tmp_path / "canary").exists()


def test_golden_rows_that_are_no_parquet_are_refused(sqlite_settings: Settings, trained: Trained) -> None:
    """Taken as it was, the file is found out when it is read."""
    forget(sqlite_settings)
    artifact(sqlite_settings, 2, "golden.parquet").write_bytes(a_pickle("true"))
    approve(sqlite_settings, 2, by="ada", reason="")
    with pytest.raises(PromotionFailed, match="version 2 cannot be packaged"):
        promote(sqlite_settings)
    nothing_moved(sqlite_settings, trained)
