"""From an older release to this one and back, with data, two models and clients: fault 34 of charts/README.md.

The older release is the last one whose tables are at revision 0001: its own chart, and images that its own scripts
build from a worktree of that commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.clients import in_order
from tests.cluster.commands import NotYet, wait_until
from tests.cluster.faults import Fault, fault
from tests.cluster.release import MakeRelease, Release
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

OLDER = "c0452ea"
TAG = "older"
NAMES = ("jobs", "serving", "mlflow")
NORMAL = 300.0  # seconds until all is as before: a rollout, packaging, another rollout
DOWNGRADE = (
    "from jobs.database import downgrade; from jobs.settings import load_settings; "
    "downgrade(load_settings().database, '0001')"
)  # as CHANGELOG.md has it

Row = dict[str, Any]


def run(*command: str | Path, cwd: Path = REPOSITORY, timeout: float = 60) -> str:
    """What a command on this machine printed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The older chart; its images are in the node, under a tag of their own."""
    if os.environ.get("CONTEXT"):
        pytest.skip("needs the node of tests/cluster/node, which takes images from buildah")
    if subprocess.run(["git", "cat-file", "-e", f"{OLDER}^{{commit}}"], cwd=REPOSITORY, check=False).returncode:
        pytest.skip(f"commit {OLDER} is not in this clone: git fetch --unshallow")
    folder = tmp_path_factory.mktemp("older") / "checkout"
    run("git", "worktree", "add", "--detach", folder, OLDER)
    try:
        run("images/build", "--tag", TAG, "--builder", "buildah", cwd=folder, timeout=1800)
        images = [f"docker.io/library/churn-{name}:{TAG}" for name in NAMES]
        run(sys.executable, "-m", "tests.cluster.node", "load", *images, timeout=900)
        yield folder / "charts"
    finally:
        run("git", "worktree", "remove", "--force", folder)


@dataclass
class Older:
    """A release that was installed by the older chart, and what its tables hold."""

    release: Release
    chart: Path

    def helm(self, verb: str, **jobs: Any) -> None:
        """`helm install` or `helm upgrade` with the older chart and images."""
        release = self.release
        values = {
            "images": {name: {"tag": TAG} for name in NAMES},
            "ingress": release.values["ingress"],
            "jobs": jobs,
        }
        with tempfile.NamedTemporaryFile("w", suffix="-values.yaml") as file:
            yaml.safe_dump(values, file)
            file.flush()
            release.helm(
                "helm", verb, release.name, self.chart, f"--values={file.name}", "--wait", "--timeout=10m", timeout=660
            )

    def image(self) -> str:
        """What jobs run now."""
        pod = self.release.get("cronjob", "promote")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        return str(pod["containers"][0]["image"])

    def downgrade(self, image: str) -> None:
        """Start what CHANGELOG.md says of tables: in a pod of the newer image, and with the older release's Secret and settings."""
        command = ["create", "job", "--from=cronjob/promote", "downgrade", "--dry-run=client", "-o", "json"]
        made = json.loads(self.release.kubectl(*command))
        made["spec"]["template"]["spec"]["containers"][0] |= {
            "image": image,
            "command": ["python", "-c", DOWNGRADE],
            "args": [],
        }
        self.release.create(made)

    def predictions(self) -> set[str]:
        """What is in the log now."""
        return {row["prediction_id"] for row in self.release.rows("SELECT prediction_id FROM predictions")}

    def revision(self) -> str:
        """That of the tables."""
        return str(self.release.rows("SELECT version_num FROM alembic_version")[0]["version_num"])

    def new_rows(self, before: Sequence[Row]) -> list[Row]:
        """Promotions that came since; those of before are there as they were."""
        found = self.release.promotions()
        assert found[: len(before)] == list(before)
        return found[len(before) :]

    def wait_repackaged(self, before: Sequence[Row]) -> None:
        """Wait until the served version was packaged anew, for the other serving code, and promoted."""

        def done() -> bool:
            last = self.release.promotions()[-1]
            if len(self.release.promotions()) > len(before) and last["action"] == "rebuild" and last["closed_at"]:
                return True
            raise NotYet(f"the last promotion is {last}")

        wait_until("the served version is packaged anew", done, within=NORMAL)


@pytest.fixture(scope="module")
def older(chart: Path, make_release: MakeRelease) -> Older:
    """Two models by the older release, the second one serves."""
    found = Older(make_release("older", host="older.example.com"), chart)
    found.helm("install")
    release = found.release
    assert release.users()
    found.helm("upgrade", retrain={"seed": 1})
    assert release.bootstrapped().complete
    end = release.job_from_cronjob("retrain")
    assert end.complete, end
    with release.clients() as clients:
        release.move_alias(2)
        release.wait_served(2, within=240)
    release.check_logged_once(clients)
    wait_until("the promotion is closed", lambda: release.promotions()[-1]["closed_at"], within=60)
    assert found.revision() == "0001"
    return found


@contextmanager
def repackaged(older: Older, name: str) -> Iterator[Fault]:
    """The block changes the release: no request fails, no row is lost, the same version is packaged anew, once."""
    release, promotions, predictions = older.release, older.release.promotions(), older.predictions()
    tag = release.served_tag()
    with fault(release, name) as happened:
        yield happened
        older.wait_repackaged(promotions)
        happened.normal(2, within=NORMAL)
    happened.clients.check_none_failed()
    rows = [(row["action"], row["to_version"], row["result"]) for row in older.new_rows(promotions)]
    lost = predictions - older.predictions()
    print(f"  promotions since: {rows}; predictions lost {len(lost)} of {len(predictions)}; tables {older.revision()}")
    assert not lost
    assert rows == [("rebuild", 2, "promoted")]
    assert in_order(happened.clients.tags) == [tag, release.served_tag()]


def test_upgrade_from_the_older_release(older: Older) -> None:
    """`helm upgrade` to this chart and its images: the same version serves on, packaged anew for the new code."""
    with repackaged(older, f"34 upgrade from {OLDER}") as happened:
        older.release.upgrade({"jobs": {"retrain": {"seed": 1}}})
        happened.mended()
        assert older.release.bootstrapped().complete
    assert older.revision() == "0002"


def test_back_to_the_older_release(older: Older) -> None:
    """`helm rollback`, then the tables by a pod of the new release, as CHANGELOG.md says: promote repackages."""
    release, image = older.release, older.image()
    assert older.revision() == "0002", "comes after the upgrade"
    with repackaged(older, f"34 back to {OLDER}") as happened:
        release.helm("helm", "rollback", release.name)  # not --wait: new pods are ready once promote has repackaged
        older.downgrade(image)
        end = release.job_end("downgrade")
        assert end.complete, end
        happened.mended()
    assert older.revision() == "0001"


def test_upgrade_during_a_promotion(older: Older) -> None:
    """The older release's promote has patched the tag and sleeps: what it began is ended, by it or by the next."""
    release, promotions, predictions = older.release, older.release.promotions(), older.predictions()
    assert older.revision() == "0001", "comes after the way back"
    with fault(release, f"34 upgrade from {OLDER} during a promotion") as happened:
        release.move_alias(1)
        job = release.start_job("promote", failpoint="promote.patched=sleep:20")
        wait_until("it has patched the tag", lambda: release.served_version() == 1, within=60)
        release.upgrade()
        happened.mended()
        end = release.job_end(job)
        assert release.bootstrapped().complete
        older.wait_repackaged(promotions)
        happened.normal(1, within=NORMAL)
    print(f"  the older promote: {end.log.splitlines()[-1]}")
    happened.clients.check_none_failed()
    rows = [(row["action"], row["to_version"], row["result"]) for row in older.new_rows(promotions)]
    print(f"  promotions since: {rows}")
    assert not predictions - older.predictions()
    assert rows[-1] == ("rebuild", 1, "promoted")
    assert happened.clients.versions == [2, 1]
