"""Whatever people do to a release, the model version that promotion chose is the one served. One test after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.clients import Clients
from tests.cluster.commands import wait_until
from tests.cluster.release import Release, version_of
from tests.cluster.story import Story

pytestmark = pytest.mark.cluster

ALIAS_SECONDS = 90


@pytest.fixture(scope="module")
def release(story: Story) -> Release:
    """The release of the story, in which version 2 followed version 1."""
    assert story.promoted
    return story.release


@contextmanager
def served_on(release: Release) -> Iterator[Clients]:
    """A change in which no request may fail, after which the same tag serves, and each answer is logged once."""
    tag = str(release.served_tag())
    with release.clients() as clients:
        yield clients
        assert release.wait_rolled_out() == tag
    print(clients)
    clients.check_none_failed()
    assert clients.tags == [tag]
    release.check_logged_once(clients)


def test_moving_the_alias_by_hand_moves_the_served_tag(release: Release) -> None:
    """Moving the alias by hand in MLflow moves the served tag back within 90 s, and it stays there."""
    with release.clients() as clients:
        release.move_alias(1)
        began = time.monotonic()
        release.wait_served(1, within=ALIAS_SECONDS)
        took = time.monotonic() - began
    print(f"served after {took:.0f} s; {clients}")
    assert took < ALIAS_SECONDS
    clients.check_none_failed()
    assert clients.versions == [2, 1]
    release.check_logged_once(clients)
    assert release.aliases()["production"] == 1


def test_promote_run_again_does_nothing(release: Release) -> None:
    """… and it stays there: the next run of promote finds all as it should be, and writes nothing."""
    promotions, deployment = release.promotions(), release.deployment()["metadata"]["generation"]
    end = release.job_from_cronjob("promote")
    assert end.complete, end
    assert "result=idle" in end.log
    assert release.promotions() == promotions
    assert release.deployment()["metadata"]["generation"] == deployment
    assert release.served_version() == 1


def test_rollout_undo_is_pinned(release: Release) -> None:
    """`kubectl rollout undo`: the tag that was gone back to is pinned, with an Event, and the alias follows."""
    with release.clients() as clients:
        release.kubectl("rollout", "undo", f"deployment/{release.name}")
        release.wait_served(2, within=120)
        tag = release.served_tag()
        wait_until("promotion pins it", lambda: release.rows("SELECT * FROM pins"), within=90)
        wait_until("the promotion is closed", lambda: release.promotions()[-1]["closed_at"], within=60)
    clients.check_none_failed()
    assert release.served_tag() == tag
    (pin,) = release.rows("SELECT version, bento_tag FROM pins")
    assert pin == {"version": 2, "bento_tag": tag}
    assert release.aliases()["production"] == 2
    assert any(str(tag) in event["message"] for event in release.events("Pinned"))


def test_status_shows_the_pin(release: Release) -> None:
    """`kubectl churn status` is content with it, and says who pinned what."""
    done = release.churn("status")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pinned" in done.stdout
    assert release.status()["pinned"]["version"] == 2


def test_unpin_ends_it(release: Release) -> None:
    """`kubectl churn unpin`, which says what was pinned; again, that nothing was."""
    first, second = release.churn("unpin"), release.churn("unpin")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"unpinned {release.served_tag()}" in first.stdout
    assert "nothing was pinned" in second.stdout


def test_rollback_by_kubectl(release: Release) -> None:
    """`kubectl churn rollback` serves the version before, and no request fails."""
    with release.clients() as clients:
        done = release.churn("rollback", "--reason", "a test", timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        release.wait_served(1, within=30)
    clients.check_none_failed()
    history = release.churn("history")
    assert history.returncode == 0
    assert "a test" in history.stdout
    assert release.churn("unpin").returncode == 0


def test_a_command_that_fails_returns_its_exit_code(release: Release) -> None:
    """`kubectl churn rollback --to 99`: 1, with what there is; a word that is no command: 2."""
    absent = release.churn("rollback", "--to", "99")
    assert absent.returncode == 1
    assert "no bento of version 99 is stored; there are 1, 2" in absent.stdout + absent.stderr
    assert release.churn("forward").returncode == 2


def test_helm_upgrade_with_changed_values(release: Release) -> None:
    """`helm upgrade` with changed values restarts the service and changes no model."""
    with served_on(release):
        release.upgrade({"serving": {"staleAfter": "44d"}, "jobs": {"drift": {"driftShare": 0.03}}})
    assert release.served_version() == 1


def test_helm_rollback(release: Release) -> None:
    """`helm rollback` takes the values back, not the model."""
    with served_on(release):
        release.rollback()
    release.values["serving"]["staleAfter"], release.values["jobs"]["drift"]["driftShare"] = "45d", 0.02
    assert release.served_version() == 1


def test_rollout_restart(release: Release) -> None:
    """`kubectl rollout restart`."""
    with served_on(release):
        release.kubectl("rollout", "restart", f"deployment/{release.name}")
        release.kubectl("rollout", "status", f"deployment/{release.name}", "--timeout=180s", timeout=200)
    assert release.served_version() == 1


def test_helm_upgrade_force(release: Release) -> None:
    """`helm upgrade --force` replaces objects, so that the served tag is gone for a moment: promotion restores it.

    Helm 3 itself fails then, as it would replace claims that are bound and Jobs too; nobody notices."""
    with served_on(release):
        done = release.upgrade({}, "--force", wait=False, check=False)
        refused = sorted(set(re.findall(r'failed to replace object: (\S+ "[^"]+")', done.stderr)))
        print(f"helm upgrade --force ended with {done.returncode}, could not replace {', '.join(refused)}")
        wait_until("promotion restores the tag", release.served_tag, within=ALIAS_SECONDS)
    assert release.served_version() == 1


def test_helm_4_upgrades_a_release_of_helm_3(release: Release) -> None:
    """Upgrade of a Helm 3 release by Helm 4, values changed as well."""
    with served_on(release):
        release.upgrade({"serving": {"staleAfter": "43d"}}, helm="helm4")
    assert version_of(release.served_tag()) == 1


def test_promote_ended_in_the_middle_is_finished_by_the_next(release: Release) -> None:
    """The pod that holds the Lease is deleted while the new one starts: the next run finishes what it began."""
    version = 3 - release.served_version()
    with release.clients() as clients:
        with release.suspended("promote"):
            release.move_alias(version)
            job = release.start_job("promote", "ended", failpoint="promote.patched=sleep:120")
            wait_until("it has patched the tag", lambda: release.served_version() == version, within=90)
            assert release.promotions()[-1]["closed_at"] is None
            holder = release.get("lease", f"{release.name}-promote")["spec"]["holderIdentity"].split("/")[0]
            assert release.get("pod", holder)["metadata"]["labels"]["batch.kubernetes.io/job-name"] == job
            release.kubectl("delete", "pod", holder, "--grace-period=1", "--wait=false")
            assert not release.job_end(job).complete
        release.wait_served(version, within=120)
        wait_until("the promotion is closed", lambda: release.promotions()[-1]["closed_at"], within=120)
    print(clients)
    clients.check_none_failed()
    release.check_logged_once(clients)
    last = release.promotions()[-1]
    assert (last["action"], last["to_version"], last["result"]) == ("follow", version, "promoted")
    assert release.aliases()["production"] == version


def test_status_is_content_at_the_end(release: Release) -> None:
    """After all that alias, record and served tag agree, and nothing is pinned."""
    status = release.status()
    assert (status["pinned"], status["problems"]) == (None, [])
    assert status["production"] == release.served_version()
