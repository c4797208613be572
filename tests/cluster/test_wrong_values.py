"""Wrong values fail at `helm install`, with the remedy, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.release import MakeRelease, Release

pytestmark = pytest.mark.cluster

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"servings": {"replicas": 2}}, ["servings", "not allowed"]),
    "unknown key inside": ({"serving": {"replica": 2}}, ["serving", "replica", "not allowed"]),
    "ingress and HTTPRoute both": (
        {"ingress": {"enabled": True}, "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
        ["ingress.enabled and httpRoute.enabled are both true", "Set ingress.enabled to false"],
    ),
    "replicas with a single-writer store": (
        {"postgres": {"replicas": 2}},
        ["postgres.replicas is 2", "single writer", "externalPostgres.existingSecret"],
    ),
    "bad schedule": (
        {"jobs": {"drift": {"schedule": "often"}}},
        ['jobs.drift.schedule is "often"', 'such as "0 3 * * *"'],
    ),
    "missing secret": (
        {"existingSecret": "nowhere"},
        ["there is no Secret nowhere", "create secret generic nowhere"],
    ),
    "missing Secret of API keys": (
        {"serving": {"apiKeys": {"existingSecret": "nowhere"}}},
        ["there is no Secret nowhere", "serving.apiKeys.existingSecret", "create secret generic nowhere"],
    ),
}


@pytest.fixture(scope="module")
def refused(make_release: MakeRelease) -> Release:
    """A namespace in which nothing can be installed."""
    return make_release("refused")


@pytest.mark.parametrize("helm", ["helm", "helm4"])
@pytest.mark.parametrize("case", CASES)
def test_is_refused_with_the_remedy(refused: Release, case: str, helm: str) -> None:
    """(unknown key, ingress and HTTPRoute both, replicas with a single-writer store, bad schedule, missing secrets)"""
    values, words = CASES[case]
    done = refused.install(values, helm=helm, check=False)
    assert done.returncode != 0, done.stdout
    missing = [word for word in words if word not in done.stderr]
    assert not missing, f"{missing} are not in:\n{done.stderr}"


def test_nothing_was_made(refused: Release) -> None:
    """Not even Helm's own Secret of a failed release."""
    assert refused.left() == set()
