"""External PostgreSQL, Redis and MLflow instead of the bundled ones, installed by Helm 4."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cluster.commands import Cluster, wait_until
from tests.cluster.release import MakeRelease, Release
from tests.cluster.stores import Stores

pytestmark = pytest.mark.cluster

NAME = "else-where"  # a schema and a Feast project allow no dash, so that it has to be written otherwise there


@pytest.fixture(scope="module")
def stores(cluster: Cluster) -> Iterator[Stores]:
    """Installed separately, in a namespace of their own."""
    made = Stores(cluster)
    yield made
    made.delete()


def install(make_release: MakeRelease, stores: Stores, name: str) -> Release:
    """A release that has no store of its own."""
    made = make_release("external", name=name, host=f"{name}.example.com")
    made.postgres = (stores.namespace, "pod/postgres")
    for secret, keys in {
        "postgres-urls": ("database-url", "serving-database-url", "feast-registry-url"),
        "redis-url": ("online-store-url",),
    }.items():
        data = {key: stores.urls[key] for key in keys}
        made.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}, "stringData": data})
    made.install(
        {
            "postgres": {"enabled": False},
            "externalPostgres": {"existingSecret": "postgres-urls", "servingRole": "reader"},
            "valkey": {"enabled": False},
            "externalRedis": {"existingSecret": "redis-url"},
            "mlflow": {"enabled": False},
            "externalMlflow": {"url": stores.mlflow_url},
            "simulate": {"users": 3000, "months": 2},
            "jobs": {"retrain": {"candidates": ["logistic_regression"]}},
        },
        helm="helm4",
    )
    return made


@pytest.fixture(scope="module")
def release(make_release: MakeRelease, stores: Stores) -> Iterator[Release]:
    """A release on the external stores."""
    made = install(make_release, stores, NAME)
    yield made
    made.delete()  # the node's CPU is for the next one


@pytest.fixture(scope="module")
def neighbour(make_release: MakeRelease, stores: Stores, release: Release) -> Iterator[Release]:
    """Another release on the same stores."""
    made = install(make_release, stores, "next-door")
    yield made
    made.delete()


def test_helm_4_installs_it_and_a_user_gets_a_probability(release: Release) -> None:
    """`/predict` answers; nothing of ours runs but the service."""
    print(f"installed in {release.install_seconds:.0f} s")
    answer = release.predict()
    assert 0 < answer["churn_probability"] < 1
    assert [d["metadata"]["name"] for d in release.get("deployments")["items"]] == [NAME]


def test_predictions_are_in_the_external_database(release: Release) -> None:
    """In the release's own schema, written by the role that may do no more."""
    with release.clients(count=2) as clients:
        wait_until("some answers", lambda: len(clients.answered) >= 50, within=30)
    clients.check_none_failed()
    release.check_logged_once(clients)


def test_the_model_is_in_the_external_mlflow(release: Release, stores: Stores) -> None:
    """The model carries the release's name, so that releases can share an MLflow."""
    look = "import sys, urllib.request as u; sys.stdout.write(u.urlopen(sys.argv[1], timeout=20).read().decode())"
    url = f"{stores.mlflow_url}/api/2.0/mlflow/registered-models/get?name={NAME}"
    found = json.loads(stores.kubectl("exec", "mlflow", "--", "python", "-c", look, url))
    assert found["registered_model"]["aliases"] == [{"alias": "production", "version": "1"}]


def test_two_releases_share_the_stores_and_do_not_meet(release: Release, neighbour: Release) -> None:
    """Same servers, same databases: each has its own schema, Feast project and model."""
    with release.clients(count=1) as ours, neighbour.clients(count=1) as theirs:
        wait_until("answers of both", lambda: min(len(ours.answered), len(theirs.answered)) >= 30, within=60)
    ours.check_none_failed()
    theirs.check_none_failed()
    assert (ours.tags, theirs.tags) == ([release.served_tag()], [neighbour.served_tag()])
    for mine, asked, foreign in ((release, ours, theirs), (neighbour, theirs, ours)):
        mine.check_logged_once(asked)
        assert mine.rows(f"SELECT 1 FROM predictions WHERE request_id LIKE '{foreign.run}-%'") == []
        tags = {row["bento_tag"] for row in mine.rows("SELECT DISTINCT bento_tag FROM predictions")}
        assert tags == {mine.served_tag()}


def test_helm_4_uninstalls_it(release: Release) -> None:
    """The data volume and the Secrets that were there before stay, nothing else."""
    said = release.uninstall(helm="helm4").stdout
    kept = {f"persistentvolumeclaim/{NAME}-data", "secret/postgres-urls", "secret/redis-url"}
    wait_until("only what is kept is left", lambda: release.left() <= kept, within=120, every=2)
    assert release.left() == kept
    assert f"{NAME}-data" in said
