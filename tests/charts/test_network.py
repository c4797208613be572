"""Who may reach whom: the NetworkPolicies, evaluated against the labels of the pods that are rendered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.charts.rendering import JOBS, Chart, Object, name_of, of_kind, one, pods

Labels = dict[str, str]
OUTSIDE: Labels = {"app": "somebody"}  # no pod of a release
PORTS = {"serving": 3000, "mlflow": 5000, "postgres": 5432, "valkey": 6379}
RUN_THE_JOBS_IMAGE = {*JOBS, "bootstrap", "test"}


def matches(selector: Object, labels: Labels) -> bool:
    """As Kubernetes reads a label selector; an empty one finds everything."""
    for expression in selector.get("matchExpressions", ()):
        value, values = labels.get(expression["key"]), expression.get("values", ())
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not holds[expression["operator"]]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _rules(policies: Sequence[Object], labels: Labels, direction: str) -> Iterator[Object] | None:
    """The rules for a pod; None if no policy isolates it, so that everything is allowed."""
    applying = [
        policy["spec"]
        for policy in policies
        if matches(policy["spec"]["podSelector"], labels) and direction in policy["spec"]["policyTypes"]
    ]
    if not applying:
        return None
    return (rule for spec in applying for rule in spec.get(direction.lower(), ()))


def _lets(rule: Object, peers: str, other: Labels, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    if ports and not any(p["port"] == port and p.get("protocol", "TCP") == protocol for p in ports):
        return False
    if not rule.get(peers):
        return True
    for peer in rule[peers]:
        assert set(peer) == {"podSelector"}, f"teach this test {peer}"
    return other is not OUTSIDE and any(matches(peer["podSelector"], other) for peer in rule[peers])


def lets_out(objects: Sequence[Object], source: Labels, target: Labels, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection is let out of its source, as the policies of one namespace say."""
    rules = _rules(of_kind(objects, "NetworkPolicy"), source, "Egress")
    return rules is None or any(_lets(rule, "to", target, port, protocol) for rule in rules)


def lets_in(objects: Sequence[Object], source: Labels, target: Labels, port: int, protocol: str = "TCP") -> bool:
    """Whether it is let into its target."""
    rules = _rules(of_kind(objects, "NetworkPolicy"), target, "Ingress")
    return rules is None or any(_lets(rule, "from", source, port, protocol) for rule in rules)


def reaches(objects: Sequence[Object], source: Labels, target: Labels, port: int, protocol: str = "TCP") -> bool:
    """Whether it gets from one to the other."""
    return lets_out(objects, source, target, port, protocol) and lets_in(objects, source, target, port, protocol)


def labels_of(objects: Sequence[Object]) -> dict[str, Labels]:
    """Of the pods of each component."""
    return {pod.component: pod.labels for pod in pods(objects)}


def reachable(objects: Sequence[Object], source: Labels) -> set[str]:
    """The components whose port can be reached."""
    return {
        component
        for component, labels in labels_of(objects).items()
        if component in PORTS and reaches(objects, source, labels, PORTS[component])
    }


def ports_outside(objects: Sequence[Object], source: Labels) -> set[int]:
    """Of anything that is no pod of the release."""
    asked = (22, 25, 80, 443, 3000, 5000, 5432, 6379, 6380, 6443, 8080, 8443, 9000, 9443, 16443)
    return {port for port in asked if reaches(objects, source, OUTSIDE, port)}


EVERY_STORE = {"serving", "mlflow", "postgres", "valkey"}
MAY_REACH: dict[str, set[str]] = {
    **dict.fromkeys(RUN_THE_JOBS_IMAGE, EVERY_STORE),
    "serving": {"postgres", "valkey"},
    "mlflow": {"postgres"},
    "postgres": set(),
    "valkey": set(),
}
THE_API_SERVER = {443, 6443, 8443, 16443}  # its Service, itself, minikube's, MicroK8s'
WITH_TOKEN = {"bootstrap", "materialize", "drift", "retrain", "promote"}


@pytest.mark.parametrize("source", MAY_REACH)
def test_who_reaches_whom(rendered: Callable[[str], list[Object]], source: str) -> None:
    objects = rendered("default")
    found = labels_of(objects)
    assert reachable(objects, found[source]) - {source} == MAY_REACH[source] - {source}


@pytest.mark.parametrize("target", [store for store in PORTS if store != "serving"])
def test_a_store_lets_in_whom_it_serves_and_no_others(rendered: Callable[[str], list[Object]], target: str) -> None:
    """By its own policy: a source whose policy is too wide, or was deleted, gets no further."""
    objects = rendered("default")
    found = labels_of(objects)
    let_in = {source for source, labels in found.items() if lets_in(objects, labels, found[target], PORTS[target])}
    assert let_in == {source for source, targets in MAY_REACH.items() if target in targets}


@pytest.mark.parametrize("source", MAY_REACH)
def test_a_component_is_let_out_to_what_it_needs_and_no_further(
    rendered: Callable[[str], list[Object]], source: str
) -> None:
    objects = rendered("default")
    found = labels_of(objects)
    let_out = {target for target, port in PORTS.items() if lets_out(objects, found[source], found[target], port)}
    assert let_out == MAY_REACH[source]


@pytest.mark.parametrize("source", MAY_REACH)
def test_what_is_reached_outside(rendered: Callable[[str], list[Object]], source: str) -> None:
    """DNS by everybody, the API server by those with a token, nothing else."""
    objects = rendered("default")
    labels = labels_of(objects)[source]
    assert ports_outside(objects, labels) == (THE_API_SERVER if source in WITH_TOKEN else set())
    assert reaches(objects, labels, OUTSIDE, 53, "UDP")
    assert reaches(objects, labels, OUTSIDE, 53)


@pytest.mark.parametrize(
    "stranger",
    [
        OUTSIDE,
        {
            "app.kubernetes.io/name": "churn",
            "app.kubernetes.io/instance": "other",
            "app.kubernetes.io/component": "promote",
        },
        {
            "app.kubernetes.io/name": "other",
            "app.kubernetes.io/instance": "churn",
            "app.kubernetes.io/component": "promote",
        },
        {"app.kubernetes.io/component": "promote"},
    ],
    ids=["outside", "another release's", "another chart's", "without a name"],
)
def test_strangers_reach_the_service_alone(rendered: Callable[[str], list[Object]], stranger: Labels) -> None:
    """An ingress controller may live anywhere; nobody but ours has business with a store."""
    assert reachable(rendered("default"), stranger) == {"serving"}


def test_a_new_component_of_the_release_reaches_nothing(rendered: Callable[[str], list[Object]]) -> None:
    """`default-deny` finds it, until it has a policy of its own."""
    labels = {
        "app.kubernetes.io/name": "churn",
        "app.kubernetes.io/instance": "churn",
        "app.kubernetes.io/component": "new",
    }
    assert reachable(rendered("default"), labels) == set()
    assert ports_outside(rendered("default"), labels) == set()


def test_no_port_but_its_own_is_open(rendered: Callable[[str], list[Object]]) -> None:
    objects = rendered("default")
    found = labels_of(objects)
    for component, port in PORTS.items():
        for other in {22, 80, 443, 8080, *PORTS.values()} - {port}:
            assert not reaches(objects, OUTSIDE, found[component], other)
            assert not reaches(objects, found["promote"], found[component], other)


def test_each_policy_is_of_a_component_that_has_pods(objects: list[Object]) -> None:
    """And each component has one."""
    found = labels_of(objects)
    policies = {
        name_of(policy).removeprefix("NetworkPolicy/churn-"): [
            component for component, labels in found.items() if matches(policy["spec"]["podSelector"], labels)
        ]
        for policy in of_kind(objects, "NetworkPolicy")
    }
    assert set(policies.pop("default-deny")) == set(found)
    assert policies == {component: [component] for component in found}


@pytest.mark.parametrize("ci", ["default", "openshift", "own-data"])
def test_nodes_and_service_ports_agree_with_the_pods(rendered: Callable[[str], list[Object]], ci: str) -> None:
    """Policies speak of pods' ports, Services may have others: 80 of the Service is 3000 of the pod."""
    objects = rendered(ci)
    for pod in pods(of_kind(objects, "Deployment")):
        ports = {port["containerPort"] for container in pod.containers for port in container.get("ports", ())}
        assert ports == {PORTS[pod.component]}


def test_external_stores_are_reached_by_their_ports(rendered: Callable[[str], list[Object]]) -> None:
    objects = rendered("external-stores")
    found = labels_of(objects)
    for component in RUN_THE_JOBS_IMAGE:
        wanted = {5432, 6380, 443} | (THE_API_SERVER if component in WITH_TOKEN else set())
        assert ports_outside(objects, found[component]) == wanted, component
    assert ports_outside(objects, found["serving"]) == {5432, 6380}


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("https://mlflow.example.com", 443),
        ("http://mlflow.example.com", 80),
        ("http://mlflow.example.com:8080/path", 8080),
        ("https://mlflow.example.com:9443", 9443),
    ],
)
def test_an_external_mlflow_is_reached_by_the_port_of_its_url(chart: Chart, url: str, port: int) -> None:
    objects = chart.objects(values=f"{{mlflow: {{enabled: false}}, externalMlflow: {{url: '{url}'}}}}")
    assert ports_outside(objects, labels_of(objects)["score"]) == {port}


@pytest.mark.parametrize(
    ("source", "port"),
    [
        ("s3://bucket/prefix", 443),
        ("gs://bucket", 443),
        ("https://example.com/s.zip", 443),
        ("http://example.com/s.tar.gz", 80),
        ("http://example.com:8080/s.tgz", 8080),
    ],
)
def test_only_what_ingests_reaches_the_source(chart: Chart, source: str, port: int) -> None:
    objects = chart.objects(values=f"snapshots: {{source: '{source}'}}")
    for component, labels in labels_of(objects).items():
        wanted = set(THE_API_SERVER) if component in WITH_TOKEN else set()
        if component in ("materialize", "bootstrap"):
            wanted |= {port}
        assert ports_outside(objects, labels) == wanted, component


def test_mlflow_reaches_its_bucket(rendered: Callable[[str], list[Object]]) -> None:
    objects = rendered("openshift")
    assert ports_outside(objects, labels_of(objects)["mlflow"]) == {443}


def test_more_may_be_reached_by_a_value(chart: Chart) -> None:
    objects = chart.objects(values="networkPolicy: {extraEgress: [{ports: [{port: 9000}]}]}")
    for component, labels in labels_of(objects).items():
        assert 9000 in ports_outside(objects, labels), component


def test_without_policies_there_are_none(chart: Chart) -> None:
    objects = chart.objects(values="networkPolicy: {enabled: false}")
    assert of_kind(objects, "NetworkPolicy") == []
    assert one(objects, "Deployment/churn")
