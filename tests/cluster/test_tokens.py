"""What each component could do to the cluster if somebody got hold of its token: tried, not read off a role."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.commands import Done
from tests.cluster.release import Release

pytestmark = pytest.mark.cluster

COMPONENTS = ("bootstrap", "drift", "materialize", "mlflow", "postgres", "promote", "retrain", "score", "serving", "valkey")  # fmt: skip
_PATCH = '--patch={"metadata": {"annotations": {"churn.test/token": "tried"}}}'
_JOB = """{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "tried"}, "spec": {"template": {"spec":
 {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a"}]}}}}"""
_POD = """{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tried"}, "spec": {"containers": [
 {"name": "a", "image": "a"}]}}"""
_ROLE = """{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "tried"}, "rules": [
 {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]}"""

# What is tried, dry where it would change something, and who may.
TRIED: dict[str, tuple[list[str], str, set[str]]] = {
    "list Secrets": (["get", "secrets"], "", set()),
    "read the release's own Secret": (["get", "secret", "churn"], "", set()),
    "list ConfigMaps": (["get", "configmaps"], "", set()),
    "make a pod": (["create", "-f", "-", "--dry-run=server"], _POD, set()),
    "make a Job": (["create", "-f", "-", "--dry-run=server"], _JOB, {"drift"}),
    "make a Role": (["create", "-f", "-", "--dry-run=server"], _ROLE, set()),
    "a token of another account": (["create", "token", "churn-promote"], "", set()),
    "run a command in a pod": (["exec", "deployment/churn-postgres", "--", "true"], "", set()),
    "delete pods": (["delete", "pods", "--all", "--dry-run=server"], "", set()),
    "patch the Deployment that serves": (
        ["patch", "deployment", "churn", _PATCH, "--dry-run=server"],
        "",
        {"promote", "bootstrap"},
    ),
    "patch another Deployment": (["patch", "deployment", "churn-mlflow", _PATCH, "--dry-run=server"], "", set()),
    "delete the Deployment that serves": (["delete", "deployment", "churn", "--dry-run=server"], "", set()),
    "scale it": (["scale", "deployment", "churn", "--replicas=0"], "", set()),
    "patch a CronJob": (["patch", "cronjob", "promote", _PATCH, "--dry-run=server"], "", set()),
    "read CronJob retrain": (["get", "cronjob", "retrain"], "", {"drift"}),
    "list pods": (["get", "pods"], "", {"promote", "bootstrap"}),
    "pods of another namespace": (["get", "pods", "--namespace=kube-system"], "", set()),
    "nodes": (["get", "nodes"], "", set()),
}

As = Callable[..., Done]


@pytest.fixture
def as_component(installed: Release, tmp_path: Path) -> As:
    """Run kubectl with a component's token and nothing else: a client certificate would be believed first."""
    config = json.loads(installed.cluster.kubectl("config", "view", "--raw", "--minify", "-o", "json"))

    def run(component: str, *arguments: str, stdin: str = "") -> Done:
        kubeconfig = tmp_path / component
        if not kubeconfig.exists():
            token = installed.kubectl("create", "token", f"churn-{component}").strip()
            config["users"] = [{"name": "token", "user": {"token": token}}]
            context = {"cluster": config["clusters"][0]["name"], "user": "token", "namespace": installed.namespace}
            config["contexts"] = [{"name": "token", "context": context}]
            kubeconfig.write_text(json.dumps({**config, "current-context": "token"}))
        command = ["kubectl", f"--kubeconfig={kubeconfig}", *arguments]
        return installed.cluster.run(command, stdin=stdin, check=False)

    return run


def test_every_component_is_in_the_table(installed: Release) -> None:
    accounts = {account["metadata"]["name"] for account in installed.get("serviceaccounts")["items"]}
    assert accounts - {"default", "churn-test"} == {f"churn-{component}" for component in COMPONENTS}, (
        "or `helm test`'s"
    )


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_token_may_do_what_its_component_does_and_no_more(
    as_component: As, installed: Release, component: str
) -> None:
    who = as_component(component, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}").stdout
    assert who == f"system:serviceaccount:{installed.namespace}:churn-{component}"
    wrong = []
    for what, (command, stdin, allowed) in TRIED.items():
        done = as_component(component, *command, stdin=stdin)
        refused = done.returncode != 0 and "forbidden" in done.stderr.lower()
        print(f"{component}: {what}: {'refused' if refused else 'may'}")
        if refused == (component in allowed):
            wrong.append(f"{what}: {done.stderr.strip()[-300:] or 'done'}")
    assert wrong == []
