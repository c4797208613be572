"""The fast path, as a cluster serves it: a load through the ingress controller, and the same to the pod itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import load
from tests.cluster.commands import NotYet, wait_until
from tests.cluster.release import Release

pytestmark = pytest.mark.cluster

CONNECTIONS = (1, 8)
SECONDS = 5
MEMORY_MB = 200  # of the pod, page cache left out
_MEMORY = """
import pathlib
for folder in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):
    stat = pathlib.Path(folder, "memory.stat")
    if stat.exists():
        found = dict(line.split() for line in stat.read_text().splitlines())
        print((int(found.get("anon") or found["rss"]) + int(found.get("file_mapped") or found["mapped_file"])) >> 20)
        break
"""


@pytest.mark.skipif(load.wrk() is None, reason="no wrk here: apt-get install wrk")
def test_load_through_the_ingress(installed: Release, tmp_path: Path) -> None:
    """No error on either way, every answer in the log, and the figures printed beside each other."""
    users = tmp_path / "users.txt"
    users.write_text("\n".join(installed.users()))
    (pod,) = installed.pods("serving")
    ways = {
        "through the ingress": (installed.address.ingress, installed.address.host),
        "to the pod": (f"http://{pod['status']['podIP']}:3000", ""),
    }
    before = _logged(installed)
    answered = 0
    for way, (url, host) in ways.items():
        for connections in CONNECTIONS:
            row = load.run_wrk(url, users, connections, SECONDS, host)
            print(
                f"{way}, {connections} connections: {row['rps']:.0f} requests/s, "
                f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms, errors {row['errors']}"
            )
            assert not any(row["errors"].values())
            answered += row["requests"]
    memory = int(installed.exec(f"pod/{pod['metadata']['name']}", "python", "-c", _MEMORY))
    print(f"the pod's memory, page cache left out: {memory} MB")
    assert memory <= MEMORY_MB

    def all_logged() -> bool:
        logged = _logged(installed) - before
        if logged < answered:
            raise NotYet(f"{logged} of {answered} answers are in the log")
        return True

    wait_until("every answer is in the log", all_logged, within=60, every=1)


def _logged(release: Release) -> int:
    (row,) = release.rows("SELECT count(*) AS rows FROM predictions")
    return int(row["rows"])
