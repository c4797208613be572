"""Which snapshot is trained on, what is registered, and that nothing is registered twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from jobs import dataset
from jobs.database import connect, retrains
from jobs.failpoints import STEPS
from jobs.lease import lease
from jobs.pin import rollback
from jobs.promote import promote
from jobs.provenance import record_of
from jobs.registry import CANDIDATE, PRODUCTION, Registry
from jobs.retrain import fill, retrain
from jobs.settings import Settings
from jobs.snapshots import instant
from jobs.supervisor import as_environment
from tests.jobs.conftest import FIRST, FIRST_KNOWN, SECOND, SECOND_KNOWN, Trained, settings_for

Copy = Callable[..., Settings]


def rows(settings: Settings) -> list[sa.Row[tuple[object, ...]]]:
    with connect(settings.database).connect() as connection:
        return list(connection.execute(sa.select(retrains).order_by(retrains.c.id)))


def test_waits_for_labels_and_keeps_the_wish(promotable: Copy) -> None:
    """The champion was trained on the newest snapshot with known labels: success, and the date is said."""
    settings = promotable()
    before = len(Registry(settings).versions())
    found = retrain(settings, as_of=FIRST_KNOWN, wanted_by="drift", reason="stalls")
    assert (found.result, found.known_at) == ("waiting_for_labels", dataset.known_at(settings, SECOND))
    assert "labels of 2024-02-29 are known on 2024-03-30" in found.reason
    assert len(Registry(settings).versions()) == before
    kept = rows(settings)[-1]
    assert (kept.result, kept.wanted_by, kept.reason, kept.known_at) == (
        "waiting_for_labels", "drift", "stalls", dataset.known_at(settings, SECOND),
    )  # fmt: skip


def test_the_same_data_and_settings_register_nothing(promotable: Copy) -> None:
    settings = promotable()
    found = retrain(settings, as_of=SECOND_KNOWN)
    assert (found.result, found.version) == ("unchanged", 2)
    assert len(Registry(settings).versions()) == 2


def test_before_any_labels_are_known_it_waits(home: Path) -> None:
    found = retrain(settings_for(home), as_of=instant(FIRST))
    assert (found.result, found.trained_on) == ("waiting_for_labels", ())


def test_without_a_snapshot_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no snapshot on or before 2024-03-01 was ingested"):
        retrain(settings_for(tmp_path), as_of=FIRST_KNOWN)
    assert rows(settings_for(tmp_path))[-1].result == "failed"


def test_another_retraining_under_way_is_named(promotable: Copy) -> None:
    settings = promotable()
    with lease(settings, "retrain"):
        assert retrain(settings, as_of=SECOND_KNOWN).result == "held"


def test_the_run_holds_what_the_design_lists(trained: Trained) -> None:
    settings = settings_for(trained.home)
    registry = Registry(settings)
    version = registry.version(2)
    assert version is not None
    run = registry.client.get_run(version.run_id)
    assert run.data.params["algorithm"] == "logistic_regression"
    assert run.data.params["trained_on"] == "2024-02-29"
    assert {"data_fingerprint", "git_revision", "feature_service", "seed", "holdout_salt"} <= set(run.data.params)
    metrics = run.data.metrics
    assert {"auc", "champion_auc", "auc_difference_lower", "f1", "brier_skill", "cv_auc/logistic_regression"} <= set(
        metrics
    )
    assert "slice/user_is_senior/true/auc" in metrics
    names = {item.path for item in registry.client.list_artifacts(version.run_id)}
    assert {
        "features.json",
        "gate.json",
        "reliability.json",
        "reference.parquet",
        "golden.parquet",
        "requirements.lock",
        "plots",
    } <= names
    plots = {item.path for item in registry.client.list_artifacts(version.run_id, "plots")}
    assert plots == {f"plots/{name}.png" for name in ("curves", "confusion", "calibration", "importance")}
    reference = pd.read_parquet(registry.artifact(version.run_id, "reference.parquet"))
    pd.testing.assert_frame_equal(reference, dataset.feature_frame(settings, SECOND), check_index_type=False)
    assert version.tags["gate"] == "passed"
    assert version.tags["champion"] == "1"


def test_registered_model_has_a_signature_and_predicts_probabilities(trained: Trained) -> None:
    """Loaded by whoever uses MLflow: raw columns in, probabilities out, no pickle."""
    settings = settings_for(trained.home)
    registry = Registry(settings)
    _ = registry.client
    import mlflow

    model = mlflow.pyfunc.load_model(f"models:/{settings.release}/2")
    names = [feature.name for feature in dataset.features(settings)]
    assert model.metadata.get_input_schema().input_names() == names
    plan = json.loads(registry.artifact(registry.version(2).run_id, "features.json").read_text())  # type: ignore[union-attr]
    frame = fill(dataset.feature_frame(settings, SECOND), plan).head(50)
    predicted = model.predict(frame)
    assert predicted.shape == (50, 2)
    ours = registry.load_model(registry.version(2)).predict_proba(frame)  # type: ignore[arg-type]
    assert np.array_equal(predicted, ours)


def test_holdout_users_are_never_trained_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is in the holdout is not among the rows that the candidates are fitted on."""
    from jobs import retrain as module

    seen: list[pd.Index] = []
    original = module.select

    def spy(names, plan, frame, target, **rest):  # type: ignore[no-untyped-def]
        seen.append(frame.index)
        return original(names, plan, frame, target, **rest)

    monkeypatch.setattr(module, "select", spy)
    settings = settings_for(home)
    retrain(settings, as_of=SECOND_KNOWN, dry_run=True)
    assert not dataset.in_holdout(seen[0], salt=settings.holdout_salt, share=settings.holdout_share).any()
    assert len(seen[0]) == pytest.approx(0.8 * 3000, abs=80)


def test_another_holdout_is_refused(promotable: Copy) -> None:
    """A champion that held out other users may have seen ours."""
    settings = promotable(holdout_salt="another")
    found = retrain(settings, as_of=SECOND_KNOWN, dry_run=True)
    assert found.gate == "refused"
    assert "holdout differs" in found.reason


def test_two_snapshots_are_judged_on_the_newest_alone(home: Path) -> None:
    settings = settings_for(home, training_snapshots=2)
    found = retrain(settings, as_of=SECOND_KNOWN, dry_run=True)
    assert found.trained_on == (FIRST, SECOND)
    share = dataset.in_holdout(dataset.feature_frame(settings, SECOND).index, salt="churn", share=0.2).sum()
    assert found.metrics["holdout_rows"] == share


def test_another_champion_renews_the_verdict_and_registers_nothing(promotable: Copy) -> None:
    """Version 2 was judged against version 1; production is now version 2 itself or another: no second version."""
    settings = promotable()
    registry = Registry(settings)
    registry.set_tags(2, {"champion": "7", "gate": "refused"})
    found = retrain(settings, as_of=SECOND_KNOWN)
    assert (found.result, found.version, found.gate) == ("unchanged", 2, "passed")
    assert "judged anew" in found.reason
    assert registry.version(2).tags["champion"] == "1"  # type: ignore[union-attr]
    assert len(registry.versions()) == 2


def test_a_version_that_was_rolled_back_is_not_trained_again_and_the_way_out_is_named(promotable: Copy) -> None:
    settings = promotable()
    promote(settings)
    rollback(settings, reason="doubts", by="ada")
    found = retrain(settings, as_of=SECOND_KNOWN)
    assert found.result == "unchanged"
    assert "rolled_back=" in found.reason
    assert "unless `churn approve 2` allows it" in found.reason


@pytest.mark.parametrize("step", [step for step in STEPS if step.startswith("retrain.")])
def test_killed_retraining_leaves_nothing_half_done(home: Path, step: str) -> None:
    """No version without its tags; the next run registers, or names what was registered."""
    settings = settings_for(home)
    killed = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "retrain", "--as-of", "2024-03-01"],
        env={**os.environ, **as_environment(settings), "CHURN_FAILPOINT": f"{step}=exit"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert killed.returncode == 137, killed.stderr
    again = retrain(settings, as_of=FIRST_KNOWN)
    assert again.result == ("unchanged" if step == "retrain.registered" else "registered")
    registry = Registry(settings)
    assert registry.aliases() == {CANDIDATE: 1}
    assert len(registry.versions()) == 1
    version = registry.version(1)
    assert version is not None
    assert {"gate", "trained_as_of", "threshold", "model_sha256"} <= set(version.tags)
    record = record_of(connect(settings.database), version.run_id)
    assert record is not None
    assert (record.version, record.model_sha256) == (1, version.tags["model_sha256"])


def test_registry_reads_agree_with_mlflows_client(promotable: Copy) -> None:
    """The SELECTs on MLflow's schema say what its client says, deleted versions included."""
    settings = promotable()
    registry = Registry(settings)
    client = registry.client
    assert registry.aliases() == {k: int(v) for k, v in client.get_registered_model(settings.release).aliases.items()}
    for number in (1, 2):
        theirs, ours = client.get_model_version(settings.release, str(number)), registry.version(number)
        assert ours is not None
        assert (ours.run_id, dict(ours.tags)) == (theirs.run_id, theirs.tags)
    client.delete_registered_model_alias(settings.release, CANDIDATE)
    client.delete_model_version(settings.release, "2")
    assert registry.version(2) is None
    assert registry.aliases() == {PRODUCTION: 1}
