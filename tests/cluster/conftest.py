"""The cluster, and releases that several tests share. No cluster: every test skips within seconds and says why."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from tests.cluster.commands import Cluster, NotYet, find_cluster, wait_until
from tests.cluster.faults import quiet
from tests.cluster.release import IMAGES, MakeRelease, Release
from tests.cluster.story import FIRST, SECOND, Snapshots, Story

IMAGES_KNOWN = 30.0  # seconds until a kubelet has told of those that were just loaded

_alive: list[Release] = []  # what a failing test reports on


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    told = call.excinfo is not None and "failed before" in str(call.excinfo.value)
    if report.failed and not told and item.get_closest_marker("cluster"):
        for release in _alive:
            report.sections.append((f"release {release.name} in {release.namespace}", release.report()))
    return report


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The test node, or the context that CONTEXT names."""
    found, reason = find_cluster(tmp_path_factory.mktemp("helm"))
    if found is None:
        pytest.skip(reason)
    _require_images(found)
    return found


def _require_images(cluster: Cluster) -> None:
    """Without them every install would wait ten minutes to fail."""
    wanted = {f"churn-{name}:{values['tag']}" for name, values in IMAGES["images"].items()}

    def there() -> bool:
        found = {
            name.removeprefix("docker.io/").removeprefix("library/")
            for node in cluster.get("nodes")["items"]
            for image in node["status"].get("images") or ()
            for name in image.get("names") or ()
        }
        missing = sorted({*wanted, "postgres:17", "valkey/valkey:8"} - found)
        if missing:
            raise NotYet(f"{', '.join(missing)} are not; `make up` builds and loads them")
        return True

    wait_until("the nodes' images are there", there, within=IMAGES_KNOWN, every=1)


@pytest.fixture(scope="session")
def make_release(cluster: Cluster) -> Iterator[MakeRelease]:
    """Makes a Release, in a namespace that goes away at the end at the latest."""
    made: list[Release] = []

    def make(purpose: str, *, name: str = "churn", host: str = "") -> Release:
        release = Release(cluster, purpose, name=name, host=host)
        made.append(release)
        _alive.append(release)
        return release

    yield make
    problems = []
    for release in made:
        try:
            release.delete()
        except AssertionError as error:
            problems.append(str(error))
        _alive.remove(release)
    assert not problems, problems


@pytest.fixture(scope="session")
def installed(cluster: Cluster, make_release: MakeRelease) -> Release:
    """A release installed by Helm 3 with default values beside the image names; its users are simulated.

    Without a host it answers for every host, and so needs one where somebody else's release does that already.
    """
    taken = any(
        not rule.get("host")
        for ingress in cluster.get("ingresses", "--all-namespaces")["items"]
        for rule in ingress["spec"].get("rules", ())
    )
    release = make_release("install", host="default.example.com" if taken else "")
    release.install()
    return release


@pytest.fixture(scope="session")
def snapshots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Snapshots:
    """Two months: the sample where it is, else simulated ones in which playback stalls rise and habits change."""
    try:
        folder: Path = request.getfixturevalue("sample")
    except pytest.skip.Exception as reason:
        from jobs.simulate import simulate

        print(f"simulated months: {reason}", file=sys.stderr)
        folder = tmp_path_factory.mktemp("simulated")
        first, second = simulate(
            folder, users=3000, months=2, start=FIRST, seed=1, feature_drift_month=1, concept_drift_month=1
        )
        return Snapshots({FIRST: first, SECOND: second})
    return Snapshots({date(2024, 1, 31): folder / "month_000", date(2024, 2, 29): folder / "month_001"})


@pytest.fixture(scope="session")
def story(make_release: MakeRelease, snapshots: Snapshots) -> Story:
    """The story of the first model and the second, told as far as a test asks for."""
    return Story(make_release("story", host="story.example.com"), snapshots)


# ---- for test_faults*.py: what breaks a release ------------------------------------------------------------


@pytest.fixture(scope="module")
def release(story: Story) -> Iterator[Release]:
    """The release of the story: version 2 serves, version 1 did; promotion looks when it is told to."""
    assert story.promoted
    story.release.upgrade({"jobs": {"promote": {"suspend": True}}})
    story.release.bootstrapped()  # what an upgrade starts is a promotion too
    quiet(story.release)
    yield story.release
    story.release.upgrade({"jobs": {"promote": {"suspend": False}}})


@pytest.fixture
def node() -> None:
    """Processes of pods are this machine's."""
    if os.environ.get("CONTEXT"):
        pytest.skip("needs the node of tests/cluster/node, whose processes run on this machine")


@pytest.fixture(scope="module")
def pair(release: Release) -> Release:
    """Two pods: one answers while the other goes. A bento never ready is given up after 45 s, 20 of them the soak."""
    promotion = {"promotionDeadline": "25s", "promotionSoak": "20s"}
    release.upgrade({"serving": {"replicas": 2}, "promotion": promotion})
    release.bootstrapped()
    release.wait_rolled_out()
    return release
