"""PostgreSQL, Valkey and MLflow that somebody else looks after: plain pods in a namespace of their own."""

from __future__ import annotations

import json
import secrets
from typing import Any

from tests.cluster.commands import Cluster, wait_until
from tests.cluster.release import delete_namespace, make_namespace

_ROLES = """
CREATE ROLE app LOGIN PASSWORD '{password}';
CREATE ROLE reader LOGIN PASSWORD '{password}';
CREATE DATABASE churn OWNER app;
CREATE DATABASE feast OWNER app;
CREATE DATABASE mlflow OWNER app;
"""


class Stores:
    """The three, ready to be used when made; `urls` and `mlflow_url` say where."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.password = secrets.token_hex(12)
        self.namespace = make_namespace(cluster, "stores")
        try:
            self._start()
        except BaseException:
            self.delete()
            raise

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, stdin=stdin, timeout=timeout)

    def host(self, store: str) -> str:
        return f"{store}.{self.namespace}.svc"

    @property
    def mlflow_url(self) -> str:
        return f"http://{self.host('mlflow')}:5000"

    def database_url(self, role: str, database: str) -> str:
        return f"postgresql+psycopg://{role}:{self.password}@{self.host('postgres')}:5432/{database}"

    @property
    def urls(self) -> dict[str, str]:
        """The keys of the Secrets that the chart asks for."""
        return {
            "database-url": self.database_url("app", "churn"),
            "serving-database-url": self.database_url("reader", "churn"),
            "feast-registry-url": self.database_url("app", "feast"),
            "online-store-url": f"redis://:{self.password}@{self.host('valkey')}:6379/0",
        }

    def delete(self) -> None:
        delete_namespace(self.cluster, self.namespace)

    def _start(self) -> None:
        hosts = ",".join(f"{self.host('mlflow')}{port}" for port in ("", ":5000"))
        environment = {
            "MLFLOW_BACKEND_STORE_URI": self.database_url("app", "mlflow"),
            "MLFLOW_ARTIFACTS_DESTINATION": "/tmp/artifacts",  # noqa: S108  in the pod
            "MLFLOW_SERVER_ALLOWED_HOSTS": hosts,
        }
        data = {"PGDATA": "/data/pgdata", "POSTGRES_PASSWORD": self.password}
        self._run("postgres", "postgres:17", 5432, uid=999, env=data, folders=("/data", "/var/run/postgresql"))
        arguments = ["--requirepass", self.password, "--save", "", "--maxmemory-policy", "noeviction"]
        self._run("valkey", "valkey/valkey:8", 6379, uid=999, args=arguments, folders=("/data",))
        self._ready("postgres", 90)
        psql = ("psql", "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-q")
        roles = _ROLES.format(password=self.password)

        def let_in() -> bool:  # the server that runs its first scripts listens too
            done = self.cluster.run(
                ["kubectl", f"--context={self.cluster.context}", f"--namespace={self.namespace}", "exec", "postgres",
                 "--", "pg_isready", "--quiet", "--host=127.0.0.1"], check=False,
            )  # fmt: skip
            return done.returncode == 0

        wait_until("PostgreSQL lets us in", let_in, within=60)
        self.kubectl("exec", "--stdin", "postgres", "--", *psql, stdin=roles)
        self._run("mlflow", "churn-mlflow:dev", 5000, uid=10001, args=["server"], env=environment)
        self._ready("valkey", 60)
        self._ready("mlflow", 180)

    def _ready(self, pod: str, seconds: int) -> None:
        wait = ("wait", "--for=condition=Ready", f"pod/{pod}", f"--timeout={seconds}s")
        try:
            self.kubectl(*wait, timeout=seconds + 30)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.kubectl('logs', pod, '--tail=40')}") from None

    def _run(
        self,
        name: str,
        image: str,
        port: int,
        *,
        uid: int,
        args: list[str] | None = None,
        env: dict[str, str] | None = None,
        folders: tuple[str, ...] = (),
    ) -> None:
        """A pod that listens, and a Service of the same name."""
        mounts = [{"name": f"folder-{n}", "mountPath": path} for n, path in enumerate(("/tmp", *folders))]  # noqa: S108
        container: dict[str, Any] = {
            "name": name, "image": image, "imagePullPolicy": "IfNotPresent", "args": args or [],
            "env": [{"name": key, "value": value} for key, value in (env or {}).items()],
            "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": 300},
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "volumeMounts": mounts,
        }  # fmt: skip
        security = {
            "runAsNonRoot": True, "runAsUser": uid, "runAsGroup": uid, "fsGroup": uid,
            "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        spec = {
            "enableServiceLinks": False,
            "automountServiceAccountToken": False,
            "securityContext": security,
            "containers": [container],
            "volumes": [{"name": mount["name"], "emptyDir": {}} for mount in mounts],
        }
        metadata = {"name": name, "labels": {"app": name}}
        service = {"selector": {"app": name}, "ports": [{"port": port}]}
        for manifest in (
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec},
        ):
            self.kubectl("create", "-f", "-", stdin=json.dumps(manifest))
