"""Who may do what in the Kubernetes API: the whole of it, so that a right more is a decision that somebody reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.charts.rendering import Chart, Object, name_of, of_kind, pods

Row = tuple[str, str, str, str, str]  # component, API group ("" is core), resource, names ("*": any), verbs

LEASES, EVENTS = "coordination.k8s.io", "events.k8s.io"


def lease(component: str, *jobs: str) -> list[Row]:
    """What every job with a token may: a Lease of its own (a name cannot be asked for when creating), and say what happened."""
    return [
        (component, LEASES, "leases", "*", "create"),
        (component, LEASES, "leases", " ".join(f"churn-{job}" for job in sorted(jobs)), "delete get patch update"),
        (component, "apps", "deployments", "churn", "get"),  # the Lease's owner
        (component, "", "pods", "*", "get"),  # is the holder's pod gone?
        (component, "", "events", "*", "create patch"),
        (component, EVENTS, "events", "*", "create patch"),
    ]


def promotion(component: str) -> list[Row]:
    """Change the one Deployment by name, and watch its pods."""
    return [
        (component, "apps", "deployments", "churn", "patch"),
        (component, "apps", "replicasets", "*", "get list watch"),
        (component, "", "pods", "*", "list watch"),
        (component, LEASES, "leases", "churn-retrain", "get"),  # `churn status` says whether a retraining runs
    ]


ROLES: list[Row] = [
    *lease("materialize", "materialize"),
    *lease("retrain", "retrain"),
    *lease("drift", "drift", "retrain"),
    ("drift", "batch", "cronjobs", "retrain", "get"),
    ("drift", "batch", "jobs", "*", "create get list"),
    *lease("promote", "promote"),
    *promotion("promote"),
    *lease("bootstrap", "bootstrap", "materialize", "promote", "retrain"),
    *promotion("bootstrap"),
]


def table(objects: list[Object]) -> list[Row]:
    """The rights these objects give."""
    return [
        (
            role["metadata"]["labels"]["app.kubernetes.io/component"],
            group,
            resource,
            " ".join(sorted(rule.get("resourceNames", ()))) or "*",
            " ".join(sorted(rule["verbs"])),
        )
        for role in of_kind(objects, "Role")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    ]


def test_roles_are_these_and_no_more(objects: list[Object], ci: str, chart: Chart) -> None:
    prefix = chart.values(ci).get("jobs", {}).get("namePrefix", "")
    wanted = [
        (component, group, resource, f"{prefix}{names}" if resource == "cronjobs" else names, verbs)
        for component, group, resource, names, verbs in ROLES
    ]
    assert sorted(table(objects)) == sorted(wanted)


def test_another_release_has_other_names(chart: Chart) -> None:
    names = {row[3] for row in table(chart.objects(release="eu")) if row[2] in ("deployments", "leases")}
    assert names >= {"eu", "eu-promote"}
    assert not [name for name in names if "churn" in name]


def test_rights_end_at_the_namespace(objects: list[Object]) -> None:
    assert of_kind(objects, "ClusterRole", "ClusterRoleBinding") == []


def test_no_right_is_a_wildcard_or_reads_secrets(objects: list[Object]) -> None:
    for component, group, resource, _, verbs in table(objects):
        assert "*" not in (group, resource, verbs), component
        assert resource not in ("secrets", "configmaps", "pods/exec", "roles", "serviceaccounts/token"), component


def test_each_role_is_bound_to_the_account_of_its_component_alone(objects: list[Object]) -> None:
    accounts = {account["metadata"]["name"] for account in of_kind(objects, "ServiceAccount")}
    bound = {}
    for binding in of_kind(objects, "RoleBinding"):
        (subject,) = binding["subjects"]
        assert subject["kind"] == "ServiceAccount"
        assert subject["name"] in accounts
        assert subject["namespace"] == binding["metadata"]["namespace"]
        assert binding["roleRef"]["kind"] == "Role"
        assert binding["roleRef"]["apiGroup"] == "rbac.authorization.k8s.io"
        bound[binding["roleRef"]["name"]] = subject["name"]
    assert bound == {role["metadata"]["name"]: role["metadata"]["name"] for role in of_kind(objects, "Role")}


def test_who_has_a_token_has_a_role(objects: list[Object]) -> None:
    with_token = {pod.component for pod in pods(objects) if pod.spec["automountServiceAccountToken"]}
    assert with_token == {row[0] for row in table(objects)}


@pytest.mark.parametrize("component", ["bootstrap", "promote"])
def test_one_deployment_may_be_patched(rendered: Callable[[str], list[Object]], component: str) -> None:
    """By its name: not MLflow's, nor anybody else's in the namespace."""
    patched = [row for row in table(rendered("default")) if row[2] == "deployments" and "patch" in row[4]]
    assert [row[3] for row in patched if row[0] == component] == ["churn"]
    assert {row[0] for row in patched} == {"bootstrap", "promote"}
    assert [name_of(o) for o in of_kind(rendered("default"), "Role") if component in name_of(o)] == [
        f"Role/churn-{component}"
    ]
