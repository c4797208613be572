"""`make up`: a release on the node, its curl, and again in under two minutes.

Runs before the others, whose releases would answer for every host as well. What `make down` does to a node is not tried here, because the other tests live on this one; see `tests/cluster/node`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cluster import local
from tests.cluster.commands import Cluster

pytestmark = pytest.mark.cluster


def make_up() -> tuple[str, float]:
    """The curl that it prints, and the seconds it says it took."""
    command = [sys.executable, "-m", "tests.cluster.local", "up"]
    found = subprocess.run(command, cwd=local.ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    said = re.search(r"up in (\d+) s; ask it:\n\n +(curl .*)\n", found.stdout)
    assert said, found.stdout[-3000:]
    return said[2], float(said[1])


@pytest.fixture(scope="module")
def up(cluster: Cluster) -> Iterator[tuple[str, float]]:
    """What the first `make up` printed; its release is gone afterwards, the node stays."""
    if cluster.get("nodes")["items"][0]["metadata"]["name"] != "churn-node":
        pytest.skip("`make up` is tried on the node of tests/cluster/node, and this is another cluster")
    yield make_up()
    cluster.helm(
        "helm", "uninstall", local.RELEASE, "--namespace", local.NAMESPACE, "--wait", "--timeout", "2m", timeout=150
    )
    cluster.kubectl("delete", "namespace", local.NAMESPACE, "--timeout=120s", timeout=150)


def test_the_curl_that_it_prints_is_answered(up: tuple[str, float]) -> None:
    curl, seconds = up
    print(f"make up, node and images there: {seconds:.0f} s")
    answer = json.loads(subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=30, check=True).stdout)  # noqa: S602  what people paste

    assert 0 <= answer["churn_probability"] <= 1 and answer["model_version"] == 1


def test_a_second_one_takes_less_than_two_minutes(up: tuple[str, float]) -> None:
    _, seconds = make_up()
    print(f"make up again: {seconds:.0f} s")

    assert seconds < 120
