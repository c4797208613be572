"""A release of the chart in a namespace of its own: install, change, ask, look into its stores, and remove it."""

from __future__ import annotations

import json
import secrets
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.clients import Address, Clients, check_logged_once
from tests.cluster.commands import Cluster, CommandFailed, Done, NotYet, Object, wait_until
from tests.conftest import REPOSITORY

CHART = REPOSITORY / "charts"
PLUGIN = CHART / "files"
TAG = "churn/bento-tag"
IMAGES = {"images": {name: {"tag": "dev"} for name in ("jobs", "serving", "mlflow")}}  # images/build calls them so
JOB_SECONDS = 300.0
_ASK_MLFLOW = """
import json, sys, urllib.request
method, url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode() or None, {"Content-Type": "application/json"}, method=method)
with urllib.request.urlopen(request, timeout=20) as answer:
    sys.stdout.write(answer.read().decode())
"""


def merged(*values: Mapping[str, Any]) -> dict[str, Any]:
    """Values laid over each other as helm does; the later ones win."""
    result: dict[str, Any] = {}
    for layer in values:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def make_namespace(cluster: Cluster, purpose: str) -> str:
    """A namespace whose name nobody else has, which refuses what Pod Security `restricted` forbids."""
    name = f"churn-{purpose}-{secrets.token_hex(3)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "churn.test/purpose": purpose}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(namespace))
    return name


def delete_namespace(cluster: Cluster, name: str) -> None:
    """Remove it and all that is in it; a namespace that does not go away fails."""
    cluster.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")

    def gone() -> bool:
        found = cluster.run(
            ["kubectl", f"--context={cluster.context}", "get", "namespace", name, "-o", "json"], check=False
        )
        if found.returncode:
            return "NotFound" in found.stderr
        conditions = json.loads(found.stdout)["status"].get("conditions", [])
        raise NotYet("; ".join(c.get("message", "") for c in conditions if c["status"] == "True"))

    wait_until(f"namespace {name} goes away", gone, within=180, every=1)


@dataclass(frozen=True)
class JobEnd:
    """How a Job ended, and what it printed."""

    name: str
    complete: bool
    log: str

    def __str__(self) -> str:
        return f"Job {self.name} {'is Complete' if self.complete else 'Failed'}:\n{self.log[-4000:]}"


class Release:
    """One release. What is given to `install` and `upgrade` as values is laid over what was given before."""

    def __init__(self, cluster: Cluster, purpose: str, *, name: str = "churn", host: str = "") -> None:
        self.cluster, self.name = cluster, name
        self.namespace = make_namespace(cluster, purpose)
        self.values: dict[str, Any] = merged(IMAGES, {"ingress": {"host": host}} if host else {})
        self.address = Address(cluster.ingress, host or "any.example.com")
        self.known_users: list[str] = []
        self.install_seconds = 0.0
        self.postgres = (self.namespace, f"deployment/{name}-postgres")  # where its tables are; the bundled one

    # ---- helm --------------------------------------------------------------------------------------------

    def helm(self, program: str, *arguments: str | Path, timeout: float = 60, check: bool = True) -> Done:
        """Run helm in this release's namespace."""
        return self.cluster.helm(program, *arguments, f"--namespace={self.namespace}", timeout=timeout, check=check)

    def _with_values(
        self, helm: str, verb: str, values: Mapping[str, Any], *options: str, timeout: float = 60, check: bool = True
    ) -> Done:
        with tempfile.NamedTemporaryFile("w", suffix="-values.yaml") as file:
            yaml.safe_dump(values, file)
            file.flush()
            return self.helm(
                helm, verb, self.name, CHART, f"--values={file.name}", *options, timeout=timeout, check=check
            )

    def _apply(
        self, helm: str, verb: str, values: Mapping[str, Any], options: tuple[str, ...], wait: bool, check: bool
    ) -> Done:
        wanted = merged(self.values, values)
        waits = ("--wait", "--timeout=10m") if wait else ()
        done = self._with_values(helm, verb, wanted, *waits, *options, timeout=660, check=check)
        if done.returncode == 0:
            self.values = wanted
            host = wanted.get("ingress", {}).get("host") or "any.example.com"
            self.address = Address(self.cluster.ingress, host)
        return done

    def install(
        self, values: Mapping[str, Any] | None = None, *, helm: str = "helm", wait: bool = True, check: bool = True
    ) -> Done:
        """`helm install`, with `--wait --timeout 10m` if not told otherwise."""
        began = time.monotonic()
        done = self._apply(helm, "install", values or {}, (), wait, check)
        self.install_seconds = time.monotonic() - began
        return done

    def upgrade(
        self,
        values: Mapping[str, Any] | None = None,
        *options: str,
        helm: str = "helm",
        wait: bool = True,
        check: bool = True,
    ) -> Done:
        """`helm upgrade` with all values given so far and these."""
        return self._apply(helm, "upgrade", values or {}, options, wait, check)

    def rendered(self, file: str, values: Mapping[str, Any]) -> Object:
        """An object as the chart renders it with all values given so far and these."""
        done = self._with_values("helm", "template", merged(self.values, values), f"--show-only=templates/{file}")
        found: Object = yaml.safe_load(done.stdout)
        return found

    def rollback(self, revision: int = 0, *, helm: str = "helm") -> Done:
        """`helm rollback`, by default to the revision before."""
        return self.helm(helm, "rollback", self.name, str(revision), "--wait", "--timeout=10m", timeout=660)

    def uninstall(self, *, helm: str = "helm") -> Done:
        """`helm uninstall`."""
        return self.helm(helm, "uninstall", self.name, "--wait", "--timeout=5m", timeout=330)

    # ---- objects -----------------------------------------------------------------------------------------

    def kubectl(self, *arguments: str | Path, timeout: float = 60, stdin: str | None = None, check: bool = True) -> str:
        """What kubectl printed, in this release's namespace."""
        return self.cluster.kubectl(
            f"--namespace={self.namespace}", *arguments, timeout=timeout, stdin=stdin, check=check
        )

    def get(self, *arguments: str) -> Object:
        """An object, or a list of them, as JSON."""
        return self.cluster.get(*arguments, f"--namespace={self.namespace}")

    def create(self, manifest: Object) -> None:
        """Make one object."""
        self.kubectl("create", "-f", "-", stdin=json.dumps(manifest))

    def exec(self, target: str, *command: str, stdin: str | None = None, timeout: float = 60) -> str:
        """What a command printed in a container: `deployment/churn-postgres`, `pod/helper`."""
        stdin_flag = ("--stdin",) if stdin is not None else ()
        return self.kubectl("exec", *stdin_flag, target, "--", *command, stdin=stdin, timeout=timeout)

    def pods(self, component: str) -> list[Object]:
        """The component's pods that are not about to go."""
        labels = f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component={component}"
        found = self.get("pods", f"--selector={labels}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def events(self, reason: str) -> list[Object]:
        """Events of that reason, oldest first."""
        found = self.get("events", f"--field-selector=reason={reason}")["items"]
        return sorted(found, key=lambda event: event["metadata"]["creationTimestamp"])

    # ---- jobs --------------------------------------------------------------------------------------------

    def job_from_cronjob(self, cronjob: str, name: str = "", *arguments: str, as_of: str | None = None) -> JobEnd:
        """`kubectl create job --from=cronjob/…`, waited for; arguments are added to those of the CronJob."""
        if as_of:
            arguments = (*arguments, "--as-of", as_of)
        return self.job_end(self.start_job(cronjob, name, *arguments))

    def start_job(
        self, cronjob: str, name: str = "", *arguments: str, failpoint: str = "", env: Mapping[str, str] | None = None
    ) -> str:
        """The same, not waited for; its name. One with a failpoint (`jobs.failpoints`) is not tried a second time."""
        job = name or f"{cronjob}-{secrets.token_hex(2)}"
        command = ["create", "job", f"--from=cronjob/{cronjob}", job]
        if not arguments and not failpoint and not env:
            self.kubectl(*command)
            return job
        made = json.loads(self.kubectl(*command, "--dry-run=client", "-o", "json"))
        container = made["spec"]["template"]["spec"]["containers"][0]
        container["args"] += arguments
        container["env"] += [{"name": key, "value": value} for key, value in (env or {}).items()]
        if failpoint:
            made["spec"]["backoffLimit"] = 0
            container["env"].append({"name": "CHURN_FAILPOINT", "value": failpoint})
        self.create(made)
        return job

    @contextmanager
    def suspended(self, cronjob: str) -> Iterator[None]:
        """No Job of that CronJob begins by itself, and none that did is still at work."""
        # not at the moment at which one is made: CronJobs that run each minute do so at its beginning
        wait_until("the minute is well under way", lambda: 5 <= datetime.now(UTC).second < 55, within=30, every=0.5)
        self.kubectl("patch", "cronjob", cronjob, "--patch", '{"spec": {"suspend": true}}')
        try:

            def quiet() -> bool:
                active = self.get("cronjob", cronjob).get("status", {}).get("active", [])
                if active:
                    raise NotYet(f"{[job['name'] for job in active]} at work")
                return True

            wait_until(f"no {cronjob} is at work", quiet, within=120)
            self.bootstrapped()  # what an upgrade started does all of it too
            yield
        finally:
            self.kubectl("patch", "cronjob", cronjob, "--patch", '{"spec": {"suspend": false}}')

    def job_end(self, name: str, within: float = JOB_SECONDS) -> JobEnd:
        """Wait until a Job is Complete or Failed, and read its log."""

        def ended() -> Object:
            found = self.get("job", name)
            status = found.get("status", {})
            for condition in status.get("conditions", ()):
                if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
                    return found
            raise NotYet(json.dumps(status))

        try:
            found = wait_until(f"Job {name} ends", ended, within=within)
        except AssertionError as error:
            raise AssertionError(f"{error}\nits log: {self._job_log(name)[-3000:]}") from None
        complete = any(c["type"] == "Complete" and c["status"] == "True" for c in found["status"]["conditions"])
        return JobEnd(name, complete, self._job_log(name))

    def _job_log(self, name: str) -> str:
        return self.kubectl("logs", f"job/{name}", "--all-containers", "--tail=-1", check=False)

    def jobs(self, component: str) -> list[Object]:
        """Jobs of a component, oldest first."""
        labels = f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component={component}"
        found = self.get("jobs", f"--selector={labels}")["items"]
        return sorted(found, key=lambda job: job["metadata"]["creationTimestamp"])

    def bootstrapped(self) -> JobEnd:
        """The end of the newest bootstrap Job."""
        newest = wait_until("there is a bootstrap Job", lambda: self.jobs("bootstrap"), within=30)[-1]
        return self.job_end(newest["metadata"]["name"], within=600)

    # ---- what is served ----------------------------------------------------------------------------------

    def deployment(self) -> Object:
        """The one that serves."""
        return self.get("deployment", self.name)

    def served_tag(self) -> str | None:
        """The annotation that promotion writes."""
        return _tag_of(self.deployment()["spec"]["template"])

    def served_version(self) -> int:
        """The model version of the served tag."""
        return version_of(self.served_tag())

    def wait_rolled_out(self, within: float = 180) -> str:
        """Wait until each pod there is is ready and serves the wanted tag; that tag."""

        def settled() -> str:
            found = self.deployment()
            status, replicas, tag = (
                found.get("status", {}),
                found["spec"]["replicas"],
                _tag_of(found["spec"]["template"]),
            )
            counts = [status.get(key, 0) for key in ("updatedReplicas", "readyReplicas", "replicas")]
            current = status.get("observedGeneration", 0) >= found["metadata"]["generation"]
            tags = {_tag_of(pod) for pod in self.pods("serving")}
            if tag and current and counts == [replicas] * 3 and tags == {tag}:
                return tag
            raise NotYet(f"wanted {tag}, pods {tags}, updated/ready/all {counts} of {replicas}")

        return wait_until(f"{self.name} is rolled out", settled, within=within)

    def wait_served(self, version: int, within: float) -> str:
        """Wait until every pod serves that model version, and clients are told so."""
        end = time.monotonic() + within

        def right() -> bool:
            tag = self.served_tag()
            if version_of(tag) == version:
                return True
            raise NotYet(f"{tag} is the served tag")

        wait_until(f"version {version} is the served tag", right, within=within)
        tag = self.wait_rolled_out(within=max(end - time.monotonic(), 10))
        wait_until("clients are answered by it", lambda: self.predict()["bento_tag"] == tag, within=10)
        return tag

    def predict(self, user: str | None = None) -> dict[str, Any]:
        """What the ingress answers about a user; anything but 200 fails."""
        status, body = self.address.ask(user or self.users()[0], f"test-{secrets.token_hex(6)}")
        assert status == 200, f"/predict answered {status}: {body}"
        return body

    def users(self) -> list[str]:
        """Users with features online: those given, or else those that Job `score` scores."""
        if not self.known_users:
            end = self.bootstrapped()  # helm's --wait ends when a pod is ready, a moment before that is on record
            assert end.complete, end
            end = self.job_from_cronjob("score")
            assert end.complete, end
            found = self.rows("SELECT DISTINCT user_id FROM scores ORDER BY 1 LIMIT 500")
            assert found, end
            self.known_users = [row["user_id"] for row in found]
        return self.known_users

    def clients(self, count: int = 3, again: float | None = None) -> Clients:
        """Clients of this release; use them in a `with`."""
        return Clients(self.address, self.users(), count=count, again=again)

    def check_logged_once(self, clients: Clients) -> None:
        """Every answer is in table `predictions` exactly once; a pod that goes may still be copying its last."""
        answered = {reply.request_id for reply in clients.answered}
        query = (
            "SELECT request_id, bento_tag, model_version FROM predictions "
            f"WHERE request_id LIKE '{clients.run}-%' AND source = 'client'"
        )
        log: defaultdict[str, Counter[tuple[str, int]]] = defaultdict(Counter)

        def all_there() -> bool:
            log.clear()
            for row in self.rows(query):
                log[row["request_id"]][row["bento_tag"], row["model_version"]] += 1
            missing = answered - log.keys()
            if missing:
                raise NotYet(f"{len(missing)} of {len(answered)} answers are not in the log yet")
            return True

        with suppress(AssertionError):  # the check below says more
            wait_until("answers reach the log", all_there, within=60, every=1)
        check_logged_once(clients, dict(log))

    # ---- its stores --------------------------------------------------------------------------------------

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Rows of a query in this release's schema."""
        printed = self.sql(f"SELECT coalesce(json_agg(t), '[]') FROM ({query}) t;")
        found: list[dict[str, Any]] = json.loads(printed)
        return found

    def sql(self, statement: str, database: str = "churn") -> str:
        """What psql prints of a statement in this release's schema."""
        namespace, pod = self.postgres
        schema = self.name.replace("-", "_")
        psql = ["psql", "-U", "postgres", "-d", database, "-At", "-v", "ON_ERROR_STOP=1"]
        command = ["env", f"PGOPTIONS=-c search_path={schema}", *psql]
        return self.cluster.kubectl(f"--namespace={namespace}", "exec", "--stdin", pod, "--", *command, stdin=statement)

    def promotions(self) -> list[dict[str, Any]]:
        """The record of promotions, oldest first."""
        return self.rows("SELECT * FROM promotions ORDER BY id")

    def mlflow(self, method: str, path: str, body: object = None) -> str:
        """What MLflow answers, asked by its Service's name from inside the cluster."""
        url = f"http://{self.name}-mlflow:5000{path}"
        text = "" if body is None else json.dumps(body)
        return self.exec(f"deployment/{self.name}-mlflow", "python", "-c", _ASK_MLFLOW, method, url, text)

    def move_alias(self, version: int) -> None:
        """Move the alias `production` by hand, as somebody does on MLflow's page."""
        body = {"name": self.name, "alias": "production", "version": str(version)}
        self.mlflow("POST", "/api/2.0/mlflow/registered-models/alias", body)

    def aliases(self) -> dict[str, int]:
        """The registry's aliases of the model."""
        found = json.loads(self.mlflow("GET", f"/api/2.0/mlflow/registered-models/get?name={self.name}"))
        return {a["alias"]: int(a["version"]) for a in found["registered_model"].get("aliases", ())}

    def versions(self) -> set[int]:
        """The registry's versions of the model."""
        found = json.loads(self.mlflow("GET", f"/api/2.0/mlflow/model-versions/search?filter=name%3D'{self.name}'"))
        return {int(version["version"]) for version in found.get("model_versions", ())}

    def delete_version(self, version: int) -> None:
        """Delete a version of the model, and with it aliases that point to it."""
        body = {"name": self.name, "version": str(version)}
        self.mlflow("DELETE", "/api/2.0/mlflow/model-versions/delete", body)

    def churn(self, *arguments: str, timeout: float = 180) -> Done:
        """`kubectl churn …` with the plugin the chart comes with on the PATH; its exit code is the caller's to judge."""
        command = ["kubectl", "churn", "-n", self.namespace, "--context", self.cluster.context, *arguments]
        return self.cluster.run(command, timeout=timeout, check=False, path=PLUGIN)

    def status(self) -> dict[str, Any]:
        """`kubectl churn status --json`."""
        done = self.churn("status", "--json")
        try:
            found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
        except ValueError:
            raise CommandFailed(done) from None
        return found

    # ---- the end -----------------------------------------------------------------------------------------

    def report(self) -> str:
        """What somebody wants to see when a test failed; what cannot be read is left out."""
        parts = [f"release {self.name} in namespace {self.namespace}"]
        looks = {
            "pods": ["get", "pods", "-o", "wide"],
            "jobs": ["get", "jobs,cronjobs,deployments"],
            "events": ["get", "events", "--sort-by=.metadata.creationTimestamp"],
        }
        for title, command in looks.items():
            with suppress(AssertionError, subprocess.TimeoutExpired):
                parts.append(f"--- {title}\n{_tail(self.kubectl(*command, check=False), 60)}")
        with suppress(AssertionError, subprocess.TimeoutExpired, ValueError):
            history = "\n".join(json.dumps(row) for row in self.promotions()[-10:])
            parts.append(f"--- history\n{history}")
        with suppress(AssertionError, subprocess.TimeoutExpired, KeyError, ValueError):
            for pod in self.get("pods")["items"]:
                name = pod["metadata"]["name"]
                log = self.kubectl("logs", name, "--all-containers", "--prefix", "--tail=40", check=False)
                parts.append(f"--- log of {name}\n{_tail(log, 60)}")
        return "\n".join(parts)

    def left(self) -> set[str]:
        """Every object of every kind in the namespace, but for what Kubernetes itself puts there, and Events."""
        kinds = self.cluster.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
        wanted = ",".join(kind for kind in kinds if not kind.startswith("events"))
        found = self.kubectl("get", wanted, "--output=name", "--ignore-not-found", timeout=120).split()
        return set(found) - {"serviceaccount/default", "configmap/kube-root-ca.crt"}

    def delete(self) -> None:
        """Remove the namespace and all that is in it."""
        delete_namespace(self.cluster, self.namespace)


MakeRelease = Callable[..., Release]  # the fixture: purpose, name, host


def version_of(tag: str | None) -> int:
    """The model version in a tag such as churn:v2-1a2b3c4d; 0 for none."""
    return int(tag.partition(":v")[2].partition("-")[0]) if tag else 0


def _tag_of(pod: Object) -> str | None:
    """The tag of a pod or a pod template."""
    return (pod["metadata"].get("annotations") or {}).get(TAG)


def _tail(text: str, lines: int) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
