"""The files between whoever promotes and `churn serve`."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest

from jobs.serving import LocalServing, Pod, ServedTagChanged, StaleFence, Status, write_json
from jobs.settings import Settings

NO_SOAK = timedelta()
POD = Pod("churn-v1-aa-1", "http://127.0.0.1:41231", "churn:v1-aa", ready=True, message="")


@pytest.fixture
def serving(tmp_path: Path) -> LocalServing:
    return LocalServing(Settings(home=tmp_path))


@contextmanager
def supervised(serving: LocalServing, **changes: object) -> Iterator[None]:
    """What a supervisor leaves for others: a status, and the lock that says it lives."""
    serving.folder.mkdir(exist_ok=True)
    status = Status(os.getpid(), "127.0.0.1", 4711, generation=1, settled=True, failure=None, pods=(POD,))
    write_json(serving.folder / "status.json", {**asdict(status), **changes})
    with (serving.folder / "supervisor.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_nothing_is_served_at_first(serving: LocalServing) -> None:
    rollout = serving.rollout()

    assert (serving.served_tag(), serving.fence()) == (None, 0)
    assert (rollout.served_tag, rollout.pods, rollout.running, rollout.settled) == (None, (), False, False)
    assert not serving.folder.exists()  # looking leaves nothing behind


def test_a_served_tag_is_kept_with_its_fence(serving: LocalServing) -> None:
    serving.set_served_tag(old=None, new="churn:v1-aa", fence=7, soak=timedelta(seconds=5))

    assert (serving.served_tag(), serving.fence(), serving.desired().soak) == ("churn:v1-aa", 7, 5.0)


def test_a_tag_that_somebody_else_changed_is_not_overwritten(serving: LocalServing) -> None:
    serving.set_served_tag(old=None, new="churn:v2-bb", fence=1, soak=NO_SOAK)

    with pytest.raises(ServedTagChanged, match="served tag is churn:v2-bb; expected churn:v1-aa") as caught:
        serving.set_served_tag(old="churn:v1-aa", new="churn:v3-cc", fence=2, soak=NO_SOAK)

    assert caught.value.found == serving.served_tag() == "churn:v2-bb"


def test_a_lower_fence_is_refused_and_an_equal_one_taken(serving: LocalServing) -> None:
    """A promotion puts back what it wrote itself, under its own number."""
    serving.set_served_tag(old=None, new="churn:v1-aa", fence=5, soak=NO_SOAK)
    with pytest.raises(StaleFence, match="fence number 5; 4 is lower"):
        serving.set_served_tag(old="churn:v1-aa", new="churn:v2-bb", fence=4, soak=NO_SOAK)
    assert serving.served_tag() == "churn:v1-aa"

    serving.set_served_tag(old="churn:v1-aa", new="churn:v2-bb", fence=5, soak=NO_SOAK)

    assert serving.served_tag() == "churn:v2-bb"


@pytest.mark.parametrize("tag", ["", "churn", "churn:", "churn:../../etc", "../x:v1", "churn:v1/a", "churn:.x"])
def test_a_tag_that_is_no_tag_is_refused(serving: LocalServing, tag: str) -> None:
    """It becomes the name of a folder."""
    with pytest.raises(ValueError, match="expected something like churn:v7-1a2b3c4d"):
        serving.set_served_tag(old=None, new=tag, fence=1, soak=NO_SOAK)


def test_of_many_writers_with_the_same_belief_one_wins(serving: LocalServing) -> None:
    won: list[str] = []
    start = threading.Barrier(12)

    def write(tag: str) -> None:
        start.wait()
        try:
            serving.set_served_tag(old=None, new=tag, fence=1, soak=NO_SOAK)
        except ServedTagChanged:
            return
        won.append(tag)

    writers = [threading.Thread(target=write, args=(f"churn:v{n}-aa",)) for n in range(12)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert won == [serving.served_tag()]
    assert serving.desired().generation == 1
    assert [path.name for path in serving.folder.glob(".desired*")] == []


def test_each_write_is_a_new_generation(serving: LocalServing) -> None:
    """Writing the tag that is there already is how a tag that failed is tried again."""
    for _ in range(2):
        serving.set_served_tag(old=serving.served_tag(), new="churn:v1-aa", fence=1, soak=NO_SOAK)

    assert serving.desired().generation == 2


def test_a_rollout_is_what_the_supervisor_says(serving: LocalServing) -> None:
    serving.set_served_tag(old=None, new="churn:v1-aa", fence=1, soak=NO_SOAK)

    with supervised(serving):
        rollout = serving.rollout()
        assert serving.url == "http://127.0.0.1:4711"

    assert rollout.pods == (POD,)
    assert (rollout.running, rollout.settled, rollout.failure) == (True, True, None)


def test_a_supervisor_that_has_not_seen_the_last_write_says_nothing_about_it(serving: LocalServing) -> None:
    serving.set_served_tag(old=None, new="churn:v1-aa", fence=1, soak=NO_SOAK)
    serving.set_served_tag(old="churn:v1-aa", new="churn:v2-bb", fence=2, soak=NO_SOAK)

    with supervised(serving, failure="golden rows differ"):
        rollout = serving.rollout()

    assert (rollout.served_tag, rollout.settled, rollout.failure) == ("churn:v2-bb", False, None)


def test_the_status_of_a_supervisor_that_is_gone_counts_for_nothing(serving: LocalServing) -> None:
    """Killed, it leaves the file behind; the kernel let go of the lock."""
    with supervised(serving):
        pass

    assert serving.status() is None
    assert not serving.rollout().running
    assert serving.url == "http://127.0.0.1:3000"


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:4711"), ("::1", "http://[::1]:4711")], ids=["any", "IPv6"]
)
def test_the_url_is_one_that_can_be_asked(serving: LocalServing, host: str, url: str) -> None:
    with supervised(serving, host=host):
        assert serving.url == url


def test_a_broken_file_is_named(serving: LocalServing) -> None:
    serving.folder.mkdir()
    (serving.folder / "desired.json").write_text("{")

    with pytest.raises(RuntimeError, match=r"desired\.json is not JSON"):
        serving.served_tag()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})

    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})

    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_importing_it_is_cheap() -> None:
    """`promote` looks every minute."""
    heavy = ("sqlalchemy", "httpx", "bentoml", "pandas", "mlflow")
    code = f"import sys, jobs.serving; print([m for m in {heavy} if m in sys.modules])"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert found.strip() == "[]"
