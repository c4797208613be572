"""The whole story, from data to rollback, as `make demo` tells it. The demo itself fails where a chapter goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.demo

TIMED = ("url", "promotion", "rollback_seconds", "seconds", "answers", "predictions_logged")


def demo(home: Path, *arguments: str) -> dict[str, Any]:
    """Run `churn demo` in a process of its own; its summary."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CHURN_")}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "demo", "--home", str(home), *arguments],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads((home / "summary.json").read_text())
    return found


def test_on_the_sample(tmp_path: Path, sample: Path) -> None:
    """7,043 users, two months: figures in the ranges that many salts gave."""
    found = demo(tmp_path / "demo", "--snapshots", str(sample))
    assert 0.80 <= found["auc_version_1"] <= 0.88
    assert found["drift"] == {"columns": ["rebuffer_events_7d"], "share": 0.0625}
    assert 0.44 <= found["realised_auc_version_1"] <= 0.55
    assert 0.59 <= found["auc_version_2"] <= 0.71
    assert found["auc_version_2"] - found["champion_auc_on_the_same_users"] >= 0.08
    assert found["promotion"]["refused"] == 0
    assert found["predictions_logged"] == found["answers"], "each answer is in the log once"


def test_on_simulated_months_the_same_seed_tells_the_same_story(tmp_path: Path) -> None:
    first, second = demo(tmp_path / "a", "--seed", "7"), demo(tmp_path / "b", "--seed", "7")
    assert {k: v for k, v in first.items() if k not in TIMED} == {k: v for k, v in second.items() if k not in TIMED}
    assert first["promotion"]["refused"] == second["promotion"]["refused"] == 0
    assert first["predictions_logged"] == first["answers"]


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "demo", "--home", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "holds other things than a demo" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
