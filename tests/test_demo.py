"""The whole story, from data to rollback, as `make demo` tells it. The demo itself fails where a chapter goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from jobs.serving import LocalServing
from jobs.settings import load_settings
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.demo

TIMED = ("client", "rollback_seconds", "seconds", "predictions_logged")


def churn(home: Path, *arguments: str, seconds: float = 900) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CHURN_")}
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=REPOSITORY, env={**environment, "CHURN_HOME": str(home)}, capture_output=True, text=True,
        timeout=seconds, check=False,
    )  # fmt: skip


def demo(home: Path, *arguments: str) -> dict[str, Any]:
    """Run `churn demo` in a process of its own; what it saw."""
    done = churn(home, "demo", "--home", str(home), *arguments)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads((home / "demo.json").read_text())
    assert found["versions_served"] == [1, 2, 1]
    assert found["client"]["failed"] == 0
    assert found["predictions_logged"] == found["client"]["sent"], "each answer is in the log once"
    return found


def test_on_the_sample(tmp_path: Path, sample: Path) -> None:
    """7,043 users, two months: figures in the ranges that many salts gave. The API runs on until it is stopped."""
    home = tmp_path / "demo"
    try:
        found = demo(home, "--snapshots", str(sample))
        assert 0.80 <= found["first_auc"] <= 0.88
        assert found["drift"] == {"columns": ["rebuffer_events_7d"], "share": 0.0625}
        assert found["waiting_until"] == "2024-03-30"
        assert 0.44 <= found["champion_auc"] <= 0.55
        assert 0.59 <= found["candidate_auc"] <= 0.71
        assert found["candidate_auc"] - found["champion_auc"] >= 0.08
        status = json.loads(churn(home, "status", "--json").stdout)
        assert (status["production"], status["pinned"]) == (1, None)
        page = json.loads((home / "mlflow-page.json").read_text())["address"]
        body = json.dumps({"user_id": "7590-VHVEG"}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{status['serving']['url']}/predict", body, headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["model_version"] == 1
        with urllib.request.urlopen(f"{page}/health", timeout=10) as answer:
            assert answer.status == 200
    finally:
        stopped = churn(home, "stop", seconds=90).stdout
    assert "stopped churn serve" in stopped and "stopped MLflow's page" in stopped
    assert churn(home, "stop", seconds=90).stdout == "nothing was running\n"


def test_on_simulated_months_the_same_seed_tells_the_same_story(tmp_path: Path) -> None:
    """A second demo in the same folder starts clean."""
    home = tmp_path / "demo"
    first, second = demo(home, "--seed", "7", "--no-keep"), demo(home, "--seed", "7", "--no-keep")
    assert {k: v for k, v in first.items() if k not in TIMED} == {k: v for k, v in second.items() if k not in TIMED}


def test_a_demo_that_is_ended_leaves_nothing_running(tmp_path: Path) -> None:
    """SIGTERM in the middle, when the service runs already."""
    home = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "demo", "--home", str(home), "--seed", "3"],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    serving = LocalServing(load_settings(home=home))
    end = time.monotonic() + 60
    while serving.status() is None:
        assert time.monotonic() < end and process.poll() is None, "the service did not start"
        time.sleep(0.05)
    process.terminate()
    # 130, or ended by the interrupt itself when it fell into a library's clean-up: a shell shows 130 for both
    assert process.wait(timeout=60) in (130, -signal.SIGINT)
    assert serving.status() is None


@pytest.mark.parametrize("source", ["nowhere", "demo/simulated"], ids=["a typo", "inside the demo"])
def test_a_wrong_folder_costs_the_last_demo_nothing(tmp_path: Path, source: str) -> None:
    home = tmp_path / "demo"
    (home / "simulated" / "2024-01-31").mkdir(parents=True)
    (home / ".churn-demo").touch()
    done = churn(home, "demo", "--home", str(home), "--snapshots", str(tmp_path / source), seconds=60)
    assert done.returncode == 1
    assert "expected one with a sub-folder" in done.stderr or "which a demo empties" in done.stderr
    assert (home / "simulated" / "2024-01-31").exists()


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "demo", "--home", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "holds other things than a demo" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
