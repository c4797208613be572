"""`churn verify`: one flipped byte anywhere in the chain is found, and what is away is said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import sqlalchemy as sa

from feature_repo.columns import LABEL
from jobs import provenance
from jobs.background import wait_for
from jobs.database import bentos, connect
from jobs.pin import approve
from jobs.promote import PromotionFailed, promote
from jobs.registry import Registry
from jobs.retrain import retrain
from jobs.serving import LocalServing
from jobs.settings import Settings
from jobs.verify import Chain, UnknownTag, lines, verify
from tests.jobs.conftest import FIRST_KNOWN, SECOND, Trained, settings_for
from tests.jobs.test_cli import Churn, churn
from tests.jobs.test_promote_served import Copy, rewrite, served
from tests.jobs.test_provenance import artifact, chain, database, flip, forget, on, tag
from tests.stores import free_port

__all__ = ["chain", "churn", "database"]  # fixtures


def changed(chain: Chain) -> list[str]:
    assert (chain.result == "CHANGED") == any(link.state == "CHANGED" for link in chain.links)
    return [link.name for link in chain.links if link.state == "CHANGED"]


def test_a_chain_that_nobody_touched_is_ok(chain: Settings, database: str, trained: Trained) -> None:
    """Every link was recomputed, for the version that serves and for the one before."""
    for bento in (trained.first_tag, trained.second_tag):
        found = verify(on(chain, database), bento)
        assert {link.state for link in found.links} == {"ok"}, lines(found)
        assert [link.name for link in found.links] == [
            "archive", "serving code", "onnx", "version", "run", "trained model", "threshold", "trained as of", "tag",
            "golden rows", "record", "registered run", "model.skops", "features.json", "gate.json", "golden.parquet",
            "reference.parquet", "tag model_sha256", "tag threshold", "tag trained_as_of", "tag data_fingerprint",
            "tag settings_fingerprint", "tag gate", "training data",
        ]  # fmt: skip


def change_the_archive(settings: Settings, bento: str, *, checksum_too: bool = False) -> None:
    with connect(settings.database).begin() as connection:
        archive = bytearray(connection.execute(sa.select(bentos.c.archive).where(bentos.c.tag == bento)).scalar_one())
        archive[len(archive) // 2] ^= 1
        values: dict[str, object] = {"archive": bytes(archive)}
        if checksum_too:
            values["sha256"] = provenance.sha256(bytes(archive))
        connection.execute(bentos.update().where(bentos.c.tag == bento).values(**values))


def field(name: str, value: object) -> Callable[[bytes], bytes]:
    """A JSON file with another value."""
    return lambda data: json.dumps({**json.loads(data), name: value}).encode()


def last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def first_score(data: bytes) -> bytes:
    golden = json.loads(data)
    golden["scores"][0] += 2e-6
    return json.dumps(golden).encode()


def change_a_row(settings: Settings, _: str, table: str = "usage_agg_30d", column: str = "watch_hours_30d") -> None:
    """One cell of the snapshot that was trained on."""
    path = settings.snapshots / f"{SECOND}" / f"{table}.parquet"
    frame = pd.read_parquet(path)
    frame.loc[frame.index[100], column] = not frame[column].iloc[100] if table == "labels" else 1.0
    frame.to_parquet(path)


Change = Callable[[Settings, str], object]
MODEL_JSON, ONNX, GOLDEN = (f"src/model/{name}" for name in ("model.json", "model.onnx", "golden.json"))


def inside(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda settings, bento: rewrite(settings, bento, name, change)


CHANGES: dict[str, tuple[Change, list[str]]] = {
    "archive": (change_the_archive, ["archive"]),
    "archive and checksum": (lambda s, b: change_the_archive(s, b, checksum_too=True), ["what is inside"]),
    "serving code": (inside("src/bentos/churn/predict.py", last_bit), ["serving code", "tag"]),
    "onnx": (inside(ONNX, last_bit), ["onnx"]),
    "onnx, said by model.json": (inside(MODEL_JSON, field("onnx_sha256", "0" * 64)), ["onnx"]),
    "version inside": (inside(MODEL_JSON, field("model_version", 7)), ["version", "tag"]),
    "run inside": (inside(MODEL_JSON, field("run_id", "another")), ["run", "tag"]),
    "model inside": (inside(MODEL_JSON, field("model_sha256", "0" * 64)), ["trained model", "tag"]),
    "threshold inside": (inside(MODEL_JSON, field("threshold", 0.001)), ["threshold"]),
    "model.json is none": (inside(MODEL_JSON, lambda data: data[1:]), ["what is inside"]),
    "golden score": (inside(GOLDEN, first_score), ["golden rows"]),
    "model": (lambda s, _: flip(artifact(s, 2, provenance.MODEL)), ["model.skops"]),
    "features": (lambda s, _: flip(artifact(s, 2, "features.json")), ["features.json"]),
    "gate": (lambda s, _: flip(artifact(s, 2, "gate.json")), ["gate.json"]),
    "golden rows": (lambda s, _: flip(artifact(s, 2, "golden.parquet")), ["golden.parquet"]),
    "reference": (lambda s, _: flip(artifact(s, 2, "reference.parquet")), ["reference.parquet"]),
    "threshold tag": (lambda s, _: tag(s, threshold="0.001"), ["tag threshold"]),
    "gate tag": (lambda s, _: tag(s, gate="refused"), ["tag gate"]),
    "fingerprint tag": (lambda s, _: tag(s, data_fingerprint="0" * 64), ["tag data_fingerprint"]),
    "feature row": (change_a_row, ["training data"]),
    "label": (lambda s, b: change_a_row(s, b, "labels", LABEL), ["training data"]),
    "snapshot file": (lambda s, _: flip(s.snapshots / f"{SECOND}" / "labels.parquet"), ["training data"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_where_it_was_made(chain: Settings, trained: Trained, change: str) -> None:
    """And nowhere else: every other link is still recomputed and right."""
    make, links = CHANGES[change]
    make(chain, trained.second_tag)

    found = verify(chain, trained.second_tag)

    assert changed(found) == links, lines(found)


def test_so_it_is_with_postgres(chain: Settings, database: str, trained: Trained) -> None:
    """The bento beside it is still right."""
    settings = on(chain, database)
    rewrite(settings, trained.second_tag, ONNX, last_bit)
    flip(artifact(settings, 2, provenance.MODEL))
    assert changed(verify(settings, trained.second_tag)) == ["onnx", "model.skops"]
    assert verify(settings, trained.first_tag).result == "ok"


def test_a_stored_archive_that_changed_is_not_served_but_built_again(promotable: Copy, trained: Trained) -> None:
    """Of the model in the registry, which is what was recorded."""
    settings = promotable()
    change_the_archive(settings, trained.second_tag)
    assert verify(settings, trained.second_tag).result == "CHANGED"
    with served(settings):
        assert promote(settings).result == "promoted"
    assert verify(settings, trained.second_tag).result == "ok"


def test_what_changed_is_not_run(chain: Settings, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive or an ONNX file that is not the recorded one is not looked into."""
    monkeypatch.setattr("jobs.verify.Scorer", None)
    rewrite(chain, trained.second_tag, ONNX, last_bit)
    states = {link.name: (link.state, link.detail) for link in verify(chain, trained.second_tag).links}
    assert states["golden rows"] == ("not asked", "an ONNX file that changed is not run")
    change_the_archive(chain, trained.second_tag)
    states = {link.name: (link.state, link.detail) for link in verify(chain, trained.second_tag).links}
    assert states["what is inside"] == ("not asked", "nothing of an archive that changed is read")


def test_what_is_away_is_said_and_is_no_failure(chain: Settings, trained: Trained) -> None:
    """Without MLflow, and where there are no snapshots, the archive and the record are still compared."""
    away = chain.model_copy(update={"mlflow_url": "http://127.0.0.1:9", "home": chain.home / "elsewhere"})
    away = away.model_copy(update={"database_url": chain.database})

    found = verify(away, trained.second_tag)

    assert found.result == "ok"
    missing = {link.name: (link.state, link.detail) for link in found.links if link.state != "ok"}
    assert missing["model registry"][0] == "not asked"
    assert missing["model registry"][1].startswith("MLflow does not answer")
    assert missing["training data"][0] == "not there"
    assert "no snapshot of 2024-02-29 with labels" in missing["training data"][1]
    assert len(missing) == 2


def test_a_version_or_an_artifact_that_was_deleted_is_not_there(chain: Settings, trained: Trained) -> None:
    artifact(chain, 2, "golden.parquet").unlink()
    found = {link.name: link.state for link in verify(chain, trained.second_tag).links}
    assert (found["golden.parquet"], found["reference.parquet"]) == ("not there", "ok")
    Registry(chain).client.delete_model_version(chain.release, "2")
    after = verify(chain, trained.second_tag)
    assert (after.result, [link.name for link in after.links if link.state == "not there"]) == (
        "ok",
        ["model registry"],
    )


def test_bentos_of_older_releases_are_verified_as_far_as_they_are_recorded(chain: Settings, trained: Trained) -> None:
    forget(chain)
    found = verify(chain, trained.second_tag)
    assert found.result == "ok"
    assert [link.name for link in found.links if link.state != "ok"] == ["record", "model registry", "training data"]


def test_other_features_than_it_was_trained_on_are_not_compared(
    chain: Settings, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import dataset

    fewer = dataset.features(chain)[1:]
    monkeypatch.setattr(dataset, "features", lambda _: fewer)
    found = verify(chain, trained.second_tag).links[-1]
    assert (found.name, found.state) == ("training data", "not asked")


def test_a_tag_that_is_not_stored_is_answered_with_those_that_are(chain: Settings, trained: Trained) -> None:
    with pytest.raises(UnknownTag, match=f"no bento churn:v9-00000000 is stored; .*{trained.first_tag}"):
        verify(chain, "churn:v9-00000000")


def test_the_command_says_it_by_its_exit_code(churn: Churn, chain: Settings, trained: Trained) -> None:
    code, output, _ = churn(chain, "verify", trained.second_tag)
    assert code == 0
    assert "golden rows                ok         50 rows within" in output

    tag(chain, threshold="0.001")
    code, output, _ = churn(chain, "verify", trained.second_tag)
    assert code == 1
    assert "tag threshold              CHANGED    found 0.001, recorded 0." in output
    code, output, _ = churn(chain, "verify", trained.second_tag, "--json")
    assert code == 1
    found = json.loads(output)
    assert (found["tag"], found["result"]) == (trained.second_tag, "CHANGED")
    assert [link["name"] for link in found["links"] if link["state"] == "CHANGED"] == ["tag threshold"]

    code, output, error = churn(chain, "verify", "churn:v9-00000000")
    assert (code, output) == (2, "")
    assert trained.first_tag in error


# ---- a server, as on the cluster -------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """MLflow's server, which hands out artifacts and takes them from everybody."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--serve-artifacts",
               "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "mlflow.log").open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **off}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        assert wait_for(address, 120), (folder / "mlflow.log").read_text()[-2000:]
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def test_a_model_that_was_overwritten_through_mlflow_s_own_api(home: Path, tmp_path: Path) -> None:
    """Whoever reaches MLflow may do that: it is not promoted, and found when it was promoted before."""
    with mlflow_server(tmp_path) as address:
        settings = settings_for(home, mlflow_url=address)
        assert retrain(settings, as_of=FIRST_KNOWN).version == 1
        registry = Registry(settings)
        source = registry.version(1).source  # type: ignore[union-attr]
        location = registry.client.get_logged_model(source.removeprefix("models:/")).artifact_location
        path = f"{location.removeprefix('mlflow-artifacts:/')}/{provenance.MODEL}"
        url = f"{address}/api/2.0/mlflow-artifacts/artifacts/{path}"

        def put(content: bytes) -> None:
            urllib.request.urlopen(urllib.request.Request(url, content, method="PUT"), timeout=30).close()

        with urllib.request.urlopen(url, timeout=30) as answer:
            original = answer.read()
        put(last_bit(original))
        with pytest.raises(PromotionFailed, match="version 1 is not what was recorded: the model's sha256 is"):
            promote(settings)
        assert LocalServing(settings).served_tag() is None

        put(original)
        approve(settings, 1, by="ada", reason="put back")
        bento = promote(settings).served_tag
        assert bento is not None
        assert {link.state for link in verify(settings, bento).links} == {"ok"}
        put(last_bit(original))
        assert changed(verify(settings, bento)) == ["model.skops"]
    away = verify(settings, bento)
    assert (away.result, [link.name for link in away.links if link.state != "ok"]) == ("ok", ["model registry"])
