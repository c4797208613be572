"""The loop on a cluster, in chapters: data arrives, a first model, drift, labels, a second model.

Each chapter is a property that tells the ones before it first, once, so that tests can be run alone and the
next test goes on where the one before stopped. A chapter that failed is not told again: it fails at once.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.clients import Clients
from tests.cluster.commands import NotYet, wait_until
from tests.cluster.release import JobEnd, Release

T = TypeVar("T")
FIRST, SECOND = date(2024, 1, 31), date(2024, 2, 29)
FIRST_KNOWN, SECOND_KNOWN = date(2024, 3, 1), date(2024, 3, 31)
INCOMING = "/data/incoming"


def once(chapter: Callable[[Any], T]) -> property:
    """A property that is worked out once; if that failed, it fails again with the same error."""

    @functools.wraps(chapter)
    def tell(story: Any) -> T:
        name = chapter.__name__
        if name in story.failed:
            raise AssertionError(f"chapter {name} failed before: {story.failed[name]}")
        if name not in story.told:
            try:
                story.told[name] = chapter(story)
            except Exception as error:
                story.failed[name] = str(error).splitlines()[0]
                raise
        return story.told[name]  # type: ignore[no-any-return]

    return property(tell)


@dataclass(frozen=True)
class Snapshots:
    """Folders of CSV files by day."""

    folders: Mapping[date, Path]

    def users(self, day: date, count: int = 200) -> list[str]:
        """Some users of a month."""
        lines = (self.folders[day] / "subscriptions.csv").read_text(encoding="utf-8-sig").splitlines()
        column = lines[0].split(",").index("user_id")
        return [line.split(",")[column].strip('"') for line in lines[1 : count + 1]]


@dataclass(frozen=True)
class Drift:
    """What a drift Job found, and the Job of `retrain` that it started."""

    job: JobEnd
    check: dict[str, Any]  # its row in drift_checks
    retrain: dict[str, Any]  # the Job object
    retrained: JobEnd
    outcome: dict[str, Any]  # the row in retrains


@dataclass(frozen=True)
class Promoted:
    """The second model's way into production, as clients saw it."""

    drift: Drift
    clients: Clients
    old_tag: str
    new_tag: str
    longest_gap: float  # seconds between two answers to any client


class Story:
    """One release, from an empty volume to version 2."""

    def __init__(self, release: Release, snapshots: Snapshots) -> None:
        self.release, self.snapshots = release, snapshots
        self.told: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        release.known_users = snapshots.users(SECOND)

    @once
    def waiting(self) -> JobEnd:
        """Installed before any data is there: bootstrap's end. Nothing serves, so there is nothing to --wait for."""
        values = {
            "asOf": FIRST_KNOWN.isoformat(),
            "snapshots": {"source": INCOMING},
            # The story runs these by hand, and not a second time when it is told at two in the morning.
            "jobs": {name: {"suspend": True} for name in ("materialize", "drift", "score")}
            | {"retrain": {"candidates": ["logistic_regression"]}},  # a minute less of a test's time
        }
        self.release.install(values, wait=False)
        return self.release.bootstrapped()

    @once
    def delivered(self) -> JobEnd:
        """The first month with its labels and the second without arrive on the data volume; Job materialize."""
        assert self.waiting.complete, self.waiting
        self._deliver({FIRST: lambda _: True, SECOND: lambda table: table != "labels"})
        end = self.release.job_from_cronjob("materialize", "m1")
        assert end.complete, end
        return end

    @once
    def first_model(self) -> str:
        """Job retrain trains version 1, CronJob promote serves it; its tag."""
        assert self.delivered.complete
        end = self.release.job_from_cronjob("retrain", "r1")
        assert end.complete, end
        return self.release.wait_served(1, within=240)

    @once
    def drifted(self) -> Drift:
        """`kubectl create job --from=cronjob/drift d1`, while the labels of the second month are unknown."""
        assert self.first_model
        return self._drift("d1")

    @once
    def upgraded(self) -> Clients:
        """The clock moves to when labels are known, by `helm upgrade --set asOf=…`, while clients ask."""
        assert self.drifted
        with self.release.clients() as clients:
            self.release.upgrade({"asOf": SECOND_KNOWN.isoformat()})
            self.release.wait_rolled_out()
        end = self.release.bootstrapped()
        assert end.complete, end
        return clients

    @once
    def promoted(self) -> Promoted:
        """Labels arrive; Job drift starts retrain, the candidate passes and is promoted, while clients ask."""
        assert self.upgraded
        self._deliver({SECOND: lambda table: table == "labels"})
        end = self.release.job_from_cronjob("materialize", "m2")
        assert end.complete, end
        old = str(self.release.served_tag())
        with self.release.clients() as clients:
            drift = self._drift("d2")
            new = self.release.wait_served(2, within=300)
        at = sorted(reply.sent_at + reply.seconds for reply in clients.answered)
        gap = max(later - earlier for earlier, later in itertools.pairwise(at))
        return Promoted(drift, clients, old, new, gap)

    # ---- how ---------------------------------------------------------------------------------------------

    def _drift(self, name: str) -> Drift:
        before = {job["metadata"]["name"] for job in self.release.jobs("retrain")}
        end = self.release.job_from_cronjob("drift", name)
        assert end.complete, end
        check = self.release.rows("SELECT * FROM drift_checks ORDER BY id DESC LIMIT 1")[0]

        def started() -> list[dict[str, Any]]:
            new = [job for job in self.release.jobs("retrain") if job["metadata"]["name"] not in before]
            if not new:
                raise NotYet(f"no Job of retrain is new; drift decided {check['decision']}: {check['reason']}")
            return new

        (retrain,) = wait_until("drift starts a Job of retrain", started, within=15)
        retrained = self.release.job_end(retrain["metadata"]["name"])
        assert retrained.complete, retrained
        outcome = self.release.rows("SELECT * FROM retrains ORDER BY id DESC LIMIT 1")[0]
        return Drift(end, check, retrain, retrained, outcome)

    def _deliver(self, files: Mapping[date, Callable[[str], bool]]) -> None:
        """Send months, or some of their tables, to the data volume: `kubectl churn put FOLDER`."""
        with tempfile.TemporaryDirectory() as folder:
            for day, wanted in files.items():
                (Path(folder) / day.isoformat()).mkdir()
                for file in self.snapshots.folders[day].iterdir():
                    if wanted(file.stem):
                        shutil.copyfile(file, Path(folder) / day.isoformat() / file.name)
            done = self.release.churn("put", folder)
        assert done.returncode == 0, done.stdout + done.stderr


def known_on(day: date) -> str:
    """The day the labels of a snapshot are known, as messages say it."""
    return (day + timedelta(days=30)).isoformat()


def html_report(release: Release, run_id: str) -> str:
    """The report of a drift check, as MLflow gives it to whoever asks for the artifact."""
    listed = json.loads(release.mlflow("GET", f"/api/2.0/mlflow/artifacts/list?run_id={run_id}"))
    paths = [file["path"] for file in listed.get("files", ())]
    assert "drift.html" in paths, f"run {run_id} has the artifacts {paths}, no drift.html"
    return release.mlflow("GET", f"/get-artifact?path=drift.html&run_uuid={run_id}")
