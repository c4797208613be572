"""CronJobs, bootstrap and the test: their arguments go through the real parser, their environment through the real settings."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import pytest
import typer

from bentos.churn import config, fetch
from jobs.cli import app
from jobs.settings import Settings, load_settings
from tests.charts.rendering import CHART, CI, JOBS, Chart, Object, Pod, environment, of_kind, one, parse, pods
from tests.conftest import REPOSITORY

SECRETS = {
    "CHURN_DATABASE_URL": "postgresql+psycopg://churn:x@churn-postgres:5432/churn",
    "CHURN_FEAST_REGISTRY_URL": "postgresql+psycopg://feast:x@churn-postgres:5432/feast",
    "CHURN_ONLINE_STORE_URL": "redis://:x@churn-valkey:6379/0",
    "CHURN_PROBE_TOKEN": "x" * 32,
}
VARIABLES = {f"CHURN_{name.upper()}" for name in Settings.model_fields}
THE_COMMAND_LINE_S = {"CHURN_LOG_LEVEL"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def parse_arguments(arguments: list[str]) -> dict[str, object]:
    """What `churn ARGUMENT...` would be called with; an option or a value that it does not take raises."""
    command = COMMANDS[arguments[0]]
    return dict(command.make_context(arguments[0], list(arguments[1:])).params)


def prefix(chart: Chart, ci: str) -> str:
    """Before the names of CronJobs."""
    found: str = chart.values(ci).get("jobs", {}).get("namePrefix", "")
    return found


def job_pods(objects: list[Object]) -> list[Pod]:
    """Those that run the jobs image."""
    return list(pods(of_kind(objects, "CronJob", "Job", "Pod")))


def test_cronjobs_have_literal_names(objects: list[Object], ci: str, chart: Chart) -> None:
    """`kubectl create job --from=cronjob/drift d1` works, whatever the release is called."""
    names = {cronjob["metadata"]["name"] for cronjob in of_kind(objects, "CronJob")}
    assert names == {f"{prefix(chart, ci)}{job}" for job in JOBS}


def test_cronjobs_do_not_pile_up(objects: list[Object], chart: Chart, ci: str) -> None:
    zone = chart.values(ci).get("jobs", {}).get("timeZone", "Etc/UTC")
    for cronjob in of_kind(objects, "CronJob"):
        spec, job = cronjob["spec"], cronjob["spec"]["jobTemplate"]["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"
        assert spec["timeZone"] == zone
        assert spec["startingDeadlineSeconds"] >= 10, "below that the controller may miss every start"
        assert spec["successfulJobsHistoryLimit"] >= 1
        assert spec["failedJobsHistoryLimit"] >= 1
        assert job["ttlSecondsAfterFinished"] >= 60, "Jobs made by hand know no history limit"
        assert job["activeDeadlineSeconds"] >= 60
        assert job["backoffLimit"] >= 0


def test_only_retrain_is_suspended(rendered: Callable[[str], list[Object]]) -> None:
    """Drift starts it; a date is an option."""

    def suspended(ci: str) -> set[str]:
        return {o["metadata"]["name"] for o in of_kind(rendered(ci), "CronJob") if o["spec"]["suspend"] is not False}

    assert suspended("default") == {"retrain"}
    assert suspended("manual-approval") == set()


def test_schedules_are_those_of_the_design(rendered: Callable[[str], list[Object]]) -> None:
    found = {o["metadata"]["name"]: o["spec"]["schedule"] for o in of_kind(rendered("default"), "CronJob")}
    assert found == {
        "materialize": "0 2 * * *", "drift": "0 3 * * *", "retrain": "0 6 2 * *", "promote": "* * * * *",
        "score": "0 5 * * *",
    }  # fmt: skip


def test_a_pod_that_was_evicted_has_not_failed_and_wrong_settings_are_not_tried_again(objects: list[Object]) -> None:
    for obj in of_kind(objects, "CronJob", "Job"):
        spec = obj["spec"]["jobTemplate"]["spec"] if obj["kind"] == "CronJob" else obj["spec"]
        assert spec["template"]["spec"]["restartPolicy"] == "Never", "a podFailurePolicy asks for it"
        ignore, fail = spec["podFailurePolicy"]["rules"]
        assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        assert fail["action"] == "FailJob"
        (container,) = spec["template"]["spec"]["containers"]
        assert fail["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}


def test_bootstrap_stays(objects: list[Object]) -> None:
    """A Job that a ttl removed would be made anew by each upgrade; its name is a hash, because a Job cannot be changed."""
    (job,) = of_kind(objects, "Job")
    assert "ttlSecondsAfterFinished" not in job["spec"]
    assert re.fullmatch(r"churn-bootstrap-[0-9a-f]{8}", job["metadata"]["name"])


def test_arguments_are_taken_by_the_command_line(objects: list[Object]) -> None:
    for pod in job_pods(objects):
        (container,) = pod.containers
        assert "command" not in container, "the image's entry point is `churn`"
        parse_arguments(container["args"])
        assert container["args"][0] == {"test": "check"}.get(pod.component, pod.component)


def test_more_arguments_are_the_job_s(chart: Chart) -> None:
    values = """
    jobs:
      defaults: {args: [--json, --dry-run]}
      drift: {args: [--as-of, '2024-02-29', --dry-run]}
    """
    found = {
        pod.component: parse_arguments(pod.containers[0]["args"])
        for pod in pods(of_kind(chart.objects(values=values), "CronJob"))
    }
    assert found["drift"]["dry_run"] is True
    assert f"{found['drift']['as_of']:%Y-%m-%d}" == "2024-02-29"
    assert all(found[job]["json_"] is (job != "drift") for job in JOBS)
    assert all(found[job]["dry_run"] is True for job in JOBS), "what values.yaml has for an example, each job takes"


def test_the_parser_refuses_what_it_does_not_know() -> None:
    """Or the tests above would prove nothing."""
    for wrong in (["drift", "--dryrun"], ["drift", "--as-of", "yesterday"], ["promote", "now"]):
        with pytest.raises(Exception, match=r"No such option|no date|unexpected extra argument") as error:
            parse_arguments(wrong)
        assert "UsageError" in {kind.__name__ for kind in type(error.value).__mro__}
    with pytest.raises(KeyError):
        parse_arguments(["drfit"])


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Object], Pod], Settings]:
    """The settings that a pod's process will read."""
    import os

    def load(objects: list[Object], pod: Pod) -> Settings:
        for name in [name for name in os.environ if name.startswith("CHURN_")]:
            monkeypatch.delenv(name)
        (container,) = pod.containers
        for name, value in environment(objects, pod, container, secrets=SECRETS).items():
            monkeypatch.setenv(name, value)
        return load_settings()

    return load


def test_the_environment_of_jobs_is_settings_they_know(
    objects: list[Object], settings_of: Callable[[list[Object], Pod], Settings]
) -> None:
    for pod in job_pods(objects):
        (container,) = pod.containers
        found = environment(objects, pod, container, secrets=SECRETS)
        ours = {name for name in found if name.startswith("CHURN_")}
        assert ours <= VARIABLES | THE_COMMAND_LINE_S, pod.owner
        settings = settings_of(objects, pod)
        assert settings.release == settings.deployment == "churn"
        assert str(settings.home) == "/data"
        assert settings.database_url == SECRETS["CHURN_DATABASE_URL"]
        assert found["PGOPTIONS"] == "-c search_path=churn"
        assert found["HOME"] == "/tmp"  # noqa: S108
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/data", "/tmp"} <= mounted  # noqa: S108


def test_every_setting_can_be_given_by_values(chart: Chart) -> None:
    """All but those of `churn serve`, which runs on one machine only."""
    values = "{asOf: 2024-03-01, jobs: {featureStore: x}, snapshots: {source: ''}}"
    with_source = chart.objects(values="snapshots: {source: /data/incoming}")
    objects = chart.objects(values=values)
    found = set(SECRETS)
    for rendered in (objects, with_source):
        found |= set(one(rendered, "ConfigMap/churn")["data"])
        found |= {
            entry["name"] for pod in job_pods(rendered) for container in pod.containers for entry in container["env"]
        }
    assert VARIABLES - found == {"CHURN_SERVE_HOST", "CHURN_SERVE_PORT", "CHURN_SERVE_AS_OF", "CHURN_API_KEYS_DIR"}


def test_defaults_are_those_of_the_settings(
    rendered: Callable[[str], list[Object]], settings_of: Callable[[list[Object], Pod], Settings]
) -> None:
    """One machine and a cluster judge alike."""
    objects = rendered("default")
    (bootstrap,) = pods(of_kind(objects, "Job"))
    given = settings_of(objects, bootstrap)
    of_the_cluster = {
        "home", "database_url", "mlflow_url", "online_store_url", "feast_registry_url", "deployment", "serving_url",
        "serving_role", "probe_token",
        "promotion_soak",  # on one machine nobody else's requests would show a fault
    }  # fmt: skip
    differing = {name for name, field in Settings.model_fields.items() if getattr(given, name) != field.default}
    assert differing == of_the_cluster


@pytest.mark.parametrize(
    ("values", "setting", "value"),
    [
        ("snapshots: {source: 's3://bucket/prefix'}", "snapshots_source", "s3://bucket/prefix"),
        ("snapshots: {source: /data/incoming}", "snapshots_source", "/data/incoming"),
        ("snapshots: {labelHorizon: 60d}", "label_horizon", timedelta(days=60)),
        ("snapshots: {maxMissingShare: 0}", "max_missing_share", 0.0),
        ("snapshots: {maxMissingShare: 0.00001}", "max_missing_share", 0.00001),
        ("asOf: 2024-03-01", "as_of", date(2024, 3, 1)),
        ("serving: {staleAfter: 12h}", "stale_after", timedelta(hours=12)),
        ("jobs: {drift: {driftShare: 0.5}}", "drift_share", 0.5),
        ("jobs: {drift: {driftThreshold: 0.001}}", "drift_threshold", 0.001),
        ("jobs: {drift: {retrainCooldown: 0s}}", "retrain_cooldown", timedelta(0)),
        ("jobs: {drift: {predictionsKept: 400d}}", "predictions_kept", timedelta(days=400)),
        ("jobs: {drift: {driftK: 2, driftN: 3}}", "drift_n", 3),
        ("jobs: {retrain: {candidates: [dummy]}}", "candidates", ("dummy",)),
        ("jobs: {retrain: {holdoutSalt: 'a \"b\": c'}}", "holdout_salt", 'a "b": c'),
        ("jobs: {retrain: {holdoutSalt: '2024'}}", "holdout_salt", "2024"),
        ("jobs: {retrain: {seed: -1}}", "seed", -1),
        ("jobs: {retrain: {threshold: top_k, topKShare: 0.05}}", "top_k_share", 0.05),
        ("jobs: {score: {scoreCallShare: 1}}", "score_call_share", 1.0),
        ("gate: {sliceFloor: 0}", "slice_floor", 0.0),
        ("gate: {sliceFloor: -0.2}", "slice_floor", -0.2),
        ("gate: {bootstrapSamples: 1000000}", "bootstrap_samples", 1_000_000),
        ("promotion: {promotionMode: 'off'}", "promotion_mode", "off"),
        ("promotion: {rebuildOnCodeChange: false}", "rebuild_on_code_change", False),
        ("promotion: {promotionSoak: 2m}", "promotion_soak", timedelta(minutes=2)),
        ("simulate: {users: 1000000}", "simulate_users", 1_000_000),
        ("simulate: {months: 12}", "simulate_months", 12),
        ("jobs: {namePrefix: eu-}", "cronjob_prefix", "eu-"),
        ("{mlflow: {enabled: false}, externalMlflow: {url: 'https://m.example.com'}}", "mlflow_url", "https://m.example.com"),
        (
            "{postgres: {enabled: false}, externalPostgres: {existingSecret: s, servingRole: reader}}",
            "serving_role", "reader",
        ),
        ("{postgres: {enabled: false}, externalPostgres: {existingSecret: s}}", "serving_role", ""),
    ],
    ids=lambda value: value if isinstance(value, str) and ":" in value else "",
)  # fmt: skip
def test_a_value_reaches_its_setting(
    chart: Chart,
    settings_of: Callable[[list[Object], Pod], Settings],
    values: str,
    setting: str,
    value: object,
) -> None:
    objects = chart.objects(values=values)
    (bootstrap,) = pods(of_kind(objects, "Job"))
    found = getattr(settings_of(objects, bootstrap), setting)
    assert (str(found) if isinstance(found, Path) else found) == value


def test_names_follow_the_release(chart: Chart, settings_of: Callable[[list[Object], Pod], Settings]) -> None:
    """Model, Feast project, PostgreSQL schema and Deployment, so that two releases on shared stores do not meet."""
    objects = chart.objects(release="churn-eu")
    (bootstrap,) = pods(of_kind(objects, "Job"))
    settings = settings_of(objects, bootstrap)
    assert (settings.release, settings.deployment, settings.feast_project) == ("churn-eu", "churn-eu", "churn_eu")
    assert settings.serving_url == "http://churn-eu:80"
    assert settings.mlflow_url == "http://churn-eu-mlflow:5000"
    for name in ("ConfigMap/churn-eu", "ConfigMap/churn-eu-serving"):
        assert one(objects, name)["data"]["PGOPTIONS"] == "-c search_path=churn_eu"


def test_only_bootstrap_simulates_and_only_without_a_source(objects: list[Object], ci: str, chart: Chart) -> None:
    source = chart.values(ci).get("snapshots", {}).get("source", "")
    for pod in job_pods(objects):
        names = {entry["name"] for container in pod.containers for entry in container["env"]}
        simulates = {name for name in names if name.startswith("CHURN_SIMULATE_")}
        assert bool(simulates) == (pod.component == "bootstrap" and not source), pod.owner


def test_jobs_that_need_data_have_the_volume(objects: list[Object], ci: str) -> None:
    for pod in job_pods(objects):
        (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == "data"]
        on_volume = pod.component in {"materialize", "drift", "retrain", "score", "bootstrap"}
        assert ("persistentVolumeClaim" in volume) == on_volume, pod.owner


def test_the_feature_store_is_the_one_of_the_values(rendered: Callable[[str], list[Object]], chart: Chart) -> None:
    objects = rendered("feast")
    mounted = one(objects, "ConfigMap/churn-feast")["data"]["feature_store.yaml"]
    assert parse(mounted) == parse(chart.values("feast")["jobs"]["featureStore"])
    for pod in job_pods(objects):
        (container,) = pod.containers
        path = Path(environment(objects, pod, container, secrets=SECRETS)["CHURN_FEATURE_STORE_YAML"])
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == str(path.parent)]
        (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"]]
        assert volume["configMap"] == {"name": "churn-feast"}
        assert path.name in one(objects, "ConfigMap/churn-feast")["data"]


def test_the_feature_store_s_placeholders_are_those_the_jobs_fill_in() -> None:
    """What values.yaml promises is what the image's own file uses."""
    comment = (CHART / "values.yaml").read_text()
    own = (REPOSITORY / "feature_repo" / "feature_store.yaml").read_text()
    for name in set(re.findall(r"\$\{(feast_project|feast_registry|online_store)\}", comment)):
        assert f"${{{name}" in own


# ---- serving ------------------------------------------------------------------------------------------------

SERVING_SECRETS = {
    "CHURN_DATABASE_URL": "postgresql+psycopg://churn_serving:x@churn-postgres:5432/churn",
    "CHURN_ONLINE_STORE_URL": "redis://:x@churn-valkey:6379/0",
    "CHURN_PROBE_TOKEN": "x" * 32,
}


def test_the_environment_of_the_service_is_what_it_reads(objects: list[Object], ci: str) -> None:
    (pod,) = pods([one(objects, "Deployment/churn")])
    (container,) = pod.spec["containers"]
    found = environment(objects, pod, container, secrets=SERVING_SECRETS)
    known = {f"CHURN_{name.upper()}" for name in config.Config.__dataclass_fields__}
    assert {name for name in found if name.startswith("CHURN_")} - known == {"CHURN_BENTO_DIR"}
    read = config.read_config(found)
    assert read.release == "churn"
    assert read.serve_as_of == (date(2024, 3, 1) if ci == "replay" else None)
    (spool,) = [v["emptyDir"]["sizeLimit"] for v in pod.spec["volumes"] if v["name"] == "spool"]
    unit = {"Mi": 2**20, "Gi": 2**30}[spool[-2:]]
    assert read.spool_max_bytes * 2 == int(spool[:-2]) * unit, "half: a full spool is our 503, not an eviction"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(read.spool_dir), found["BENTOML_HOME"], found["PROMETHEUS_MULTIPROC_DIR"], found["HOME"]} <= mounted
    assert found["BENTOML_DO_NOT_TRACK"] == "true"
    assert found["PGOPTIONS"] == "-c search_path=churn"


def test_defaults_are_those_of_the_service(rendered: Callable[[str], list[Object]]) -> None:
    objects = rendered("default")
    (pod,) = pods([one(objects, "Deployment/churn")])
    (container,) = pod.spec["containers"]
    read = config.read_config(environment(objects, pod, container, secrets=SERVING_SECRETS))
    fields = config.Config.__dataclass_fields__
    differing = {name for name in fields if getattr(read, name) != fields[name].default}
    # on one machine no ingress controller has to notice that a pod goes
    assert differing == {"database_url", "online_store_url", "spool_dir", "drain_seconds", "probe_token"}


ASK = {"promote", "bootstrap", "test"}  # the service, for a golden row


def probe_tokens(objects: list[Object]) -> dict[str, Object]:
    """Where each component's containers have the token from; those without are left out."""
    return {
        pod.component: entry["valueFrom"]["secretKeyRef"]
        for pod in pods(objects)
        for container in pod.containers
        for entry in container.get("env", ())
        if entry["name"] == "CHURN_PROBE_TOKEN"
    }


def test_the_token_of_probes_is_given_to_the_service_and_to_those_that_ask_it(objects: list[Object], ci: str) -> None:
    """From one Secret, or their requests would be refused. Nobody generates one where no Secret is generated."""
    found = probe_tokens(objects)
    assert set(found) == (set() if ci == "external-stores" else {"serving", *ASK})
    wanted: Object = {"name": "churn", "key": "probe-token"}
    if ci == "existing-secret":
        wanted = {"name": "churn-credentials", "key": "probe-token", "optional": True}
    assert all(ref == wanted for ref in found.values())


def test_a_generated_token_is_one_that_the_service_takes(rendered: Callable[[str], list[Object]]) -> None:
    data = one(rendered("default"), "Secret/churn")["data"]
    token = base64.b64decode(data["probe-token"]).decode()
    assert (
        config.read_config({**SERVING_SECRETS, "CHURN_SPOOL_DIR": "/x", "CHURN_PROBE_TOKEN": token}).probe_token
        == token
    )
    assert len(token) == 32


def test_with_keys_asked_for_a_secret_of_yours_must_have_the_token(chart: Chart) -> None:
    """Or promotion could not ask: a pod that does not start says so sooner."""
    found = probe_tokens(chart.objects("existing-secret", values="serving: {apiKeys: {existingSecret: k}}"))
    assert set(found) == {"serving", *ASK}
    assert all("optional" not in ref for ref in found.values())


def test_keys_are_mounted_as_a_whole_where_the_service_looks(rendered: Callable[[str], list[Object]]) -> None:
    """As a folder: the kubelet does not renew single files (subPath), nor variables."""
    objects = rendered("api-keys")
    (pod,) = pods([one(objects, "Deployment/churn")])
    (container,) = pod.spec["containers"]
    read = config.read_config(environment(objects, pod, container, secrets=SERVING_SECRETS))
    (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == str(read.api_keys_dir)]
    assert mount == {"name": "keys", "mountPath": "/etc/churn/keys", "readOnly": True}
    (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == "keys"]
    assert volume["secret"] == {"secretName": "churn-api-keys"}
    for other in pods(objects):
        secret_volumes = [volume for volume in other.spec["volumes"] if "secret" in volume]
        assert secret_volumes == ([volume] if other.component == "serving" else []), other.owner


@pytest.mark.parametrize("ci", [name for name in CI if name != "api-keys"])
def test_without_a_secret_no_keys_are_asked_for(rendered: Callable[[str], list[Object]], ci: str) -> None:
    objects = rendered(ci)
    (pod,) = pods([one(objects, "Deployment/churn")])
    (container,) = pod.spec["containers"]
    assert "CHURN_API_KEYS_DIR" not in environment(objects, pod, container, secrets=SERVING_SECRETS)


def test_fetch_is_told_the_served_tag_by_the_annotation(objects: list[Object]) -> None:
    """Empty before the first promotion: it waits."""
    (pod,) = pods([one(objects, "Deployment/churn")])
    (init,) = pod.spec["initContainers"]
    (container,) = pod.spec["containers"]
    assert init["command"] == ["python", "-m", "bentos.churn.fetch"]
    assert init["terminationMessagePolicy"] == "File"
    found = environment(objects, pod, init, secrets=SERVING_SECRETS)
    assert fetch.read_environment(found)[0] == ""
    pod.metadata["annotations"]["churn/bento-tag"] = "churn:v7-0123abcd"
    try:
        found = environment(objects, pod, init, secrets=SERVING_SECRETS)
    finally:
        del pod.metadata["annotations"]["churn/bento-tag"]
    tag, _, folder = fetch.read_environment(found)
    assert tag == "churn:v7-0123abcd"
    assert str(folder) in container["command"], "what is fetched is what is served"
    assert container["command"][:3] == ["python", "-m", "bentos.churn.serve"]


@pytest.mark.parametrize("group", ["serving", "jobs", "mlflow"])
def test_a_variable_of_the_chart_s_cannot_be_set_twice(chart: Chart, group: str) -> None:
    """Server-side apply would refuse it less clearly."""
    variable = "MLFLOW_BACKEND_STORE_URI" if group == "mlflow" else "CHURN_DATABASE_URL"
    done = chart.run(
        "template", "churn", chart.folder, "-f", "-",
        values=json.dumps({group: {"extraEnv": [{"name": variable, "value": "x"}]}}),
    )  # fmt: skip
    assert done.returncode
    assert f"{group}.extraEnv sets {variable}, which the chart sets itself; remove it there" in done.stderr


@pytest.mark.parametrize("group", ["serving", "jobs", "mlflow"])
def test_more_environment_reaches_the_pods_of_its_group(chart: Chart, group: str) -> None:
    entry = {"name": "EXTRA", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    for pod in pods(chart.objects(values=json.dumps({group: {"extraEnv": [entry]}}))):
        of_group = pod.component == group or (group == "jobs" and pod.component in {*JOBS, "bootstrap", "test"})
        for container in pod.containers:
            assert (entry in container["env"]) == of_group, pod.owner


# ---- what tells people of jobs ------------------------------------------------------------------------------


def test_alerts_ask_for_metrics_that_exist_and_have_a_heading_in_the_runbook(
    rendered: Callable[[str], list[Object]],
) -> None:
    said = (REPOSITORY / "bentos" / "churn" / "metrics.py").read_text()
    headings = set(re.findall(r"^### (\w+)$", (CHART / "README.md").read_text(), re.MULTILINE))
    (group,) = one(rendered("monitoring"), "PrometheusRule/churn")["spec"]["groups"]
    assert {rule["alert"] for rule in group["rules"]} == headings
    for rule in group["rules"]:
        for metric in re.findall(r"\bchurn_\w+", rule["expr"]):
            assert f'"{re.sub("_(total|bucket|sum|count)$", "", metric)}"' in said, rule["alert"]
        assert rule["annotations"]["runbook_url"].endswith(f"#{rule['alert'].lower()}")
        assert rule["labels"]["team"] == "growth"


def test_the_dashboard_asks_for_metrics_that_exist(rendered: Callable[[str], list[Object]]) -> None:
    said = (REPOSITORY / "bentos" / "churn" / "metrics.py").read_text()
    text = one(rendered("monitoring"), "ConfigMap/churn-dashboard")["data"]["churn.json"]
    assert json.loads(text)["panels"]
    assert "RELEASE" not in text
    assert "NAMESPACE" not in text
    asked = set(re.findall(r"\bchurn_\w+", " ".join(re.findall(r'"expr": "(.*)"', text))))
    assert asked
    for metric in asked:
        assert f'"{re.sub("_(total|bucket|sum|count)$", "", metric)}"' in said
