"""Two releases of the same name in two namespaces, with two hosts, at once; then one of them is uninstalled."""

from __future__ import annotations

import pytest

from tests.cluster.clients import Clients
from tests.cluster.commands import wait_until
from tests.cluster.release import Release
from tests.cluster.story import Story

pytestmark = pytest.mark.cluster

HOST = "install.example.com"
STORES = ("data", "mlflow", "postgres", "valkey")


@pytest.fixture(scope="module")
def other(story: Story) -> Release:
    """The release of the story, with its first model at least."""
    assert story.first_model
    return story.release


@pytest.fixture(scope="module")
def hosted(installed: Release, other: Release) -> Release:
    """The first release, with a host of its own from now on."""
    assert installed.users()
    before = [pod["metadata"]["name"] for pod in installed.pods("serving")]
    installed.upgrade({"ingress": {"host": HOST}})
    after = [pod["metadata"]["name"] for pod in installed.pods("serving")]
    assert after == before, "another host is no reason to restart the service"
    wait_until("the ingress controller knows the host", lambda: installed.predict()["bento_tag"], within=30)
    return installed


@pytest.fixture(scope="module")
def asked(hosted: Release, other: Release) -> tuple[Clients, Clients]:
    """Clients of both at the same time."""
    with hosted.clients(count=2) as ours, other.clients(count=2) as theirs:
        wait_until("answers of both", lambda: min(len(ours.answered), len(theirs.answered)) >= 100, within=60)
    return ours, theirs


def test_each_host_is_answered_by_its_own_model(
    hosted: Release, other: Release, asked: tuple[Clients, Clients]
) -> None:
    """Two releases in two namespaces (two hosts), at once, do not meet."""
    ours, theirs = asked
    ours.check_none_failed()
    theirs.check_none_failed()
    assert (ours.tags, theirs.tags) == ([hosted.served_tag()], [other.served_tag()])
    assert hosted.served_tag() != other.served_tag()


def test_each_log_has_its_own_predictions(hosted: Release, other: Release, asked: tuple[Clients, Clients]) -> None:
    """Exactly once in its own, never in the other's."""
    ours, theirs = asked
    hosted.check_logged_once(ours)
    other.check_logged_once(theirs)
    for release, foreign in ((hosted, theirs), (other, ours)):
        query = f"SELECT count(*) AS n FROM predictions WHERE request_id LIKE '{foreign.run}-%'"
        assert release.rows(query) == [{"n": 0}]


def test_bentos_and_users_are_apart(hosted: Release, other: Release) -> None:
    """A user of one is unknown to the other; no bento is in both databases."""
    tags = [{row["tag"] for row in release.rows("SELECT tag FROM bentos")} for release in (hosted, other)]
    assert tags[0] and tags[1] and not tags[0] & tags[1]
    mine = next(user for user in hosted.users() if user not in other.users())
    status, body = other.address.ask(mine, "test-foreign-user")
    assert status == 404, body


def test_a_host_of_neither_is_not_answered(hosted: Release) -> None:
    """Both have hosts now, so that nobody answers for every name."""
    connection = hosted.address.connection()
    connection.request("POST", "/predict", "{}", {"Host": "nobody.example.com", "Content-Type": "application/json"})
    assert connection.getresponse().status == 404


def test_uninstall_leaves_claims_and_the_secret_and_says_so(hosted: Release, other: Release) -> None:
    """`helm uninstall` leaves nothing but PVCs and the kept Secret, and says so; the other release serves on."""
    kept = {f"persistentvolumeclaim/churn-{store}" for store in STORES} | {"secret/churn"}
    with other.clients(count=2) as clients:
        said = hosted.uninstall().stdout
        wait_until("only what is kept is left", lambda: hosted.left() <= kept, within=120, every=2)
    assert hosted.left() == kept
    for name in (*(f"churn-{store}" for store in STORES), "[Secret] churn"):
        assert name in said, said
    clients.check_none_failed()


def test_an_install_after_it_finds_volumes_and_passwords_again(hosted: Release) -> None:
    """The same name and namespace: the same model serves at once, with its history."""
    before = {"production": 1}
    hosted.install()
    print(f"installed again in {hosted.install_seconds:.0f} s")
    assert hosted.aliases() == before
    assert hosted.promotions()[0]["action"] == "promote"
    assert hosted.predict()["model_version"] == 1
    hosted.delete()
