"""`helm install churn ./charts --wait` on an empty namespace that enforces Pod Security `restricted`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.commands import NotYet, wait_until
from tests.cluster.faults import Result, record
from tests.cluster.release import MakeRelease, Release

pytestmark = pytest.mark.cluster

MINUTES = 6

# What each component's ServiceAccount may do beyond what every account may; those not named here: nothing.
_JOB = {
    "events": "create patch",
    "events.events.k8s.io": "create patch",
    "leases.coordination.k8s.io": "create",
    "deployments.apps/churn": "get",
    "pods": "get",
}
_PROMOTE = {
    "deployments.apps/churn": "get patch",
    "replicasets.apps": "get list watch",
    "pods": "get list watch",
    "leases.coordination.k8s.io/churn-retrain": "get",
}


def _lease(*jobs: str) -> dict[str, str]:
    return {f"leases.coordination.k8s.io/churn-{job}": "delete get patch update" for job in jobs}


MAY: dict[str, dict[str, str]] = {
    "churn-materialize": {**_JOB, **_lease("materialize")},
    "churn-retrain": {**_JOB, **_lease("retrain")},
    "churn-drift": {
        **_JOB,
        **_lease("drift", "retrain"),
        "cronjobs.batch/retrain": "get",
        "jobs.batch": "create get list",
    },
    "churn-promote": {**_JOB, **_PROMOTE, **_lease("promote")},
    "churn-bootstrap": {**_JOB, **_PROMOTE, **_lease("bootstrap", "materialize", "retrain", "promote")},
}
KEPT = {f"persistentvolumeclaim/churn-{store}" for store in ("data", "mlflow", "postgres", "valkey")} | {"secret/churn"}
SPEAK = {account.removeprefix("churn-") for account in MAY}  # components that mount a token


def test_defaults_answer_within_six_minutes(installed: Release) -> None:
    """Defaults plus image names, `--wait --timeout 10m`, simulated data: success in under 6 minutes on 2 cores, and
    the ingress controller gives a user's probability."""
    print(f"helm install --wait took {installed.install_seconds:.0f} s")
    assert installed.install_seconds < MINUTES * 60
    end = installed.bootstrapped()
    assert end.complete, end
    example = end.log.split("example_user=")[1].split()[0]  # NOTES say that it is there
    answer = installed.predict(example)
    assert answer["user_id"] == example
    assert 0 < answer["churn_probability"] < 1
    assert (answer["model_version"], answer["bento_tag"]) == (1, installed.served_tag())


def test_every_user_can_be_scored_by_hand(installed: Release) -> None:
    """`kubectl create job --from=cronjob/score s1` writes a row a user, by the bento that serves."""
    assert installed.users()
    found = installed.rows("SELECT count(DISTINCT user_id) AS users, min(bento_tag) AS tag FROM scores")
    assert found == [{"users": 5000, "tag": installed.served_tag()}]


def test_helm_test_predicts(installed: Release) -> None:
    """`helm test` asks for a golden row and finds the score that was stored with it."""
    done = installed.helm("helm", "test", installed.name, timeout=360, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Phase:          Succeeded" in done.stdout


def test_restricted_pod_security_refuses_no_pod(installed: Release) -> None:
    """The namespace enforces it; a pod that broke it would be refused with an Event."""
    labels = installed.cluster.get("namespace", installed.namespace)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert [event["message"] for event in installed.events("FailedCreate")] == []


def test_no_container_had_to_be_restarted(installed: Release) -> None:
    """Everything starts at once and waits for what it needs, instead of crashing until that is there."""
    restarted = {
        f"{pod['metadata']['name']}/{container['name']}": container["lastState"]
        for pod in installed.get("pods", f"--selector=app.kubernetes.io/instance={installed.name}")["items"]
        for container in pod["status"].get("containerStatuses", [])
        if container["restartCount"]
    }
    assert restarted == {}


def _millicores(spec: dict[str, Any]) -> int:
    asked = [container["resources"]["requests"]["cpu"] for container in spec["template"]["spec"]["containers"]]
    return sum(int(cpu[:-1]) if cpu.endswith("m") else 1000 * int(cpu) for cpu in asked)


def test_a_release_fits_into_450_millicores(installed: Release) -> None:
    """CPU requests at most, surge pod, the largest Job and promote included, so that two fit on two cores."""
    deployments = [d["spec"] for d in installed.get("deployments")["items"]]
    cronjobs = {c["metadata"]["name"]: c["spec"]["jobTemplate"]["spec"] for c in installed.get("cronjobs")["items"]}
    surge = _millicores(installed.deployment()["spec"])
    jobs = _millicores(cronjobs.pop("promote")) + max(_millicores(spec) for spec in cronjobs.values())
    assert sum(spec["replicas"] * _millicores(spec) for spec in deployments) + surge + jobs <= 450


def test_status_and_history_are_there_by_kubectl(installed: Release) -> None:
    """`kubectl churn status|history`: exit code 0, and what was promoted."""
    status = installed.churn("status")
    assert status.returncode == 0, status.stdout + status.stderr
    assert str(installed.served_tag()) in status.stdout
    history = installed.churn("history")
    assert history.returncode == 0, history.stdout + history.stderr
    assert "promote" in history.stdout
    assert installed.status()["production"] == 1


def _rules(release: Release, account: str) -> dict[str, str]:
    """`kubectl auth can-i --list` of a ServiceAccount: resource[.group][/name] → verbs."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": release.namespace},
    }
    user = f"--as=system:serviceaccount:{release.namespace}:{account}"
    answered = release.kubectl("create", "--validate=false", "-f", "-", "-o", "json", user, stdin=json.dumps(review))
    verbs: dict[str, set[str]] = {}
    for rule in json.loads(answered)["status"]["resourceRules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for name in rule.get("resourceNames") or [""]:
                    key = resource + (f".{group}" if group else "") + (f"/{name}" if name else "")
                    verbs.setdefault(key, set()).update(rule["verbs"])
    return {key: " ".join(sorted(found)) for key, found in verbs.items()}


def test_roles_are_what_the_table_says(installed: Release) -> None:
    """`kubectl auth can-i --list` per ServiceAccount; those the table does not name may do nothing."""
    names = [account["metadata"]["name"] for account in installed.get("serviceaccounts")["items"]]
    everybody = _rules(installed, "default")
    found = {
        name: {key: verbs for key, verbs in _rules(installed, name).items() if everybody.get(key) != verbs}
        for name in names
    }
    assert {name: rules for name, rules in found.items() if rules} == MAY
    assert {f"churn-{name}" for name in ("serving", "score", "mlflow", "postgres", "valkey")} <= set(names)


def _tokens(spec: dict[str, Any]) -> list[str]:
    return [
        volume["name"]
        for volume in spec.get("volumes", ())
        for source in volume.get("projected", {}).get("sources", ())
        if "serviceAccountToken" in source
    ]


def test_only_who_speaks_to_kubernetes_mounts_a_token(installed: Release) -> None:
    """Serving and the stores mount none; no pod runs as the namespace's default account."""
    seen = set()
    for pod in installed.get("pods", f"--selector=app.kubernetes.io/instance={installed.name}")["items"]:
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        assert pod["spec"]["serviceAccountName"] == f"churn-{component}"
        assert bool(_tokens(pod["spec"])) == (component in SPEAK), component
        seen.add(component)
    assert {"serving", "mlflow", "postgres", "valkey", "bootstrap"} <= seen


@pytest.mark.parametrize("path", ["/metrics", "/info", "/livez", "/"])
def test_nothing_but_predict_is_published(installed: Release, path: str) -> None:
    """The ingress controller has no route to the rest."""
    connection = installed.address.connection()
    connection.request("GET", path, headers={"Host": installed.address.host})
    assert connection.getresponse().status == 404


def _wait_left(release: Release, expected: set[str]) -> None:
    """Wait until nothing else is in the namespace."""

    def only() -> bool:
        left = release.left()
        if left != expected:
            raise NotYet(f"more: {sorted(left - expected)}, missing: {sorted(expected - left)}")
        return True

    wait_until("what is left is what should be", only, within=180, every=2)


@pytest.mark.faults
def test_uninstalled_and_installed_again(make_release: MakeRelease) -> None:
    """With the claims and the Secret that stay the same tag serves, and every row is there; without them nothing is left."""
    release = make_release("again", host="again.example.com")
    release.install()
    with release.clients() as before:
        wait_until("answers", lambda: len(before.answered) >= 100, within=60)
    release.check_logged_once(before)
    tag, promotions, users = release.served_tag(), release.promotions(), release.known_users
    tables = ("predictions", "scores", "bentos", "models", "retrains")
    counts = "SELECT " + ", ".join(f"(SELECT count(*) FROM {table}) AS {table}" for table in tables)
    (rows,) = release.rows(counts)
    release.uninstall()
    _wait_left(release, KEPT)
    release.install()
    with release.clients() as after:
        release.bootstrapped()
        assert release.wait_rolled_out() == tag
    release.check_logged_once(after)
    (found,) = release.rows(counts)
    lost = {table: count - found[table] for table, count in rows.items() if found[table] < count}
    sent, failed = len(before.replies) + len(after.replies), len(before.failed) + len(after.failed)
    since = [(row["action"], row["result"]) for row in release.promotions()[len(promotions) :]]
    print(f"\n41 {tag}: lost {lost or 0} of {rows}, {failed} requests of {sent} failed; promotions since: {since}")
    record(Result("41 uninstalled and installed again", sent, failed, 0, round(release.install_seconds, 1)))
    assert (after.tags, failed, lost) == ([tag], 0, {})
    assert release.promotions()[: len(promotions)] == promotions
    assert set(since) <= {("restore", "promoted")}
    assert release.predict(users[-1])["bento_tag"] == tag
    release.uninstall()
    release.kubectl("delete", "persistentvolumeclaims,secrets", f"--selector=app.kubernetes.io/instance={release.name}")
    _wait_left(release, set())

    def volumes() -> bool:
        claimed = [pv["spec"]["claimRef"]["namespace"] for pv in release.cluster.get("persistentvolumes")["items"]]
        return release.namespace not in claimed

    wait_until("its volumes are gone", volumes, within=60)
