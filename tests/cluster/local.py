"""`make up` and `make down`: a cluster on this machine, the images, the release, and the curl that asks it.

    python -m tests.cluster.local up | down | node     [--context NAME]

Which cluster, first that applies: the context that is named; the current one if it is kind's or minikube's; a kind
cluster named churn, where Docker and kind are; the node of `tests.cluster.node`, for root on Linux. No other context is
touched. What was made is noted below the cache folder, so that `down` removes that and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.node import pins

ROOT = Path(__file__).resolve().parents[2]
NOTE = pins.cache().parent / "up.json"
NAMESPACE, RELEASE, TAG = "churn", "churn", "dev"
OURS = [f"docker.io/library/churn-{name}:{TAG}" for name in ("jobs", "serving", "mlflow")]
STAND_INS = ["docker.io/library/postgres:17", "docker.io/valkey/valkey:8"]
NODE = [sys.executable, "-m", "tests.cluster.node"]


class UpError(RuntimeError):
    """No cluster can be used, or a step failed; says what would help."""


@dataclass(frozen=True)
class Cluster:
    """One cluster: the environment and context that kubectl and helm need, and how images get there."""

    kind: str
    environment: dict[str, str]
    context: str
    load: Callable[[], None]
    made: bool = False

    @property
    def flags(self) -> list[str]:
        """What tells kubectl the context."""
        return ["--context", self.context] if self.context else []


def run(*command: str, env: dict[str, str] | None = None, timeout: float = 1800) -> None:
    """A command whose output people see; raises UpError if it fails."""
    found = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, timeout=timeout, check=False)
    if found.returncode:
        raise UpError(f"{' '.join(command[:6])} ended with code {found.returncode}")


def said(*command: str, env: dict[str, str] | None = None) -> str:
    """What a command prints, empty if it fails or is not there."""
    try:
        found = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            timeout=60,
            check=False,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


# --- which cluster ----------------------------------------------------------------------------------------


def choose(context: str) -> Cluster:
    """The cluster to use; a kind cluster or node is made if there is none. Raises UpError."""
    current = context or said("kubectl", "config", "current-context")
    if current.startswith("kind-"):
        return Cluster("kind", {}, current, lambda: _kind_load(current.removeprefix("kind-")))
    if current == "minikube":
        return Cluster("minikube", {}, current, _minikube_load)
    if context:
        return Cluster("named", {}, context, lambda: print(f"images {', '.join(OURS)} must be in {context} already"))
    if shutil.which("kind") and said("docker", "info"):
        if "churn" not in said("kind", "get", "clusters").split():
            run("kind", "create", "cluster", "--name", "churn", "--wait", "120s")
        return Cluster("kind", {}, "kind-churn", lambda: _kind_load("churn"), made=True)
    if sys.platform == "linux" and os.geteuid() == 0:
        return _node()
    raise UpError(
        "no cluster: expected a kubectl context of kind or minikube, or Docker with kind (https://kind.sigs.k8s.io), "
        "or root on Linux, for the single node of tests/cluster/node"
    )


def _node() -> Cluster:
    run(*NODE, "up", timeout=5400)
    path = f"{pins.cache() / 'current' / 'bin'}:{os.environ['PATH']}"
    environment = {"KUBECONFIG": str(pins.KUBECONFIG), "INGRESS_ADDRESS": pins.INGRESS_ADDRESS, "PATH": path}
    return Cluster("node", environment, "", lambda: run(*NODE, "load", *OURS, *STAND_INS), made=True)


def _kind_load(name: str) -> None:
    run("kind", "load", "docker-image", "--name", name, *(image.removeprefix("docker.io/library/") for image in OURS))


def _minikube_load() -> None:
    for image in OURS:
        run("minikube", "image", "load", image.removeprefix("docker.io/library/"))


def images(kind: str) -> None:
    """Build the images; for the node also its base and the stand-ins, as it can pull nothing."""
    if kind == "node":
        run("tests/cluster/images/build")
        run("images/build", "--tag", TAG, "--builder", "buildah")
    else:
        run("images/build", "--tag", TAG)


# --- up and down ------------------------------------------------------------------------------------------


def up(context: str) -> None:
    """Cluster, images, release; prints the curl. Run again it brings a changed checkout into the cluster."""
    began = time.monotonic()
    cluster = choose(context)
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    NOTE.write_text(json.dumps({"kind": cluster.kind, "context": cluster.context, "made": cluster.made}))
    images(cluster.kind)
    cluster.load()
    flags = ["--kube-context", cluster.context] if cluster.context else []
    run("helm", "upgrade", "--install", RELEASE, "charts", "--namespace", NAMESPACE, "--create-namespace", *flags,
        "--values", "charts/ci/dev-values.yaml", "--set-string", f"jobs.podAnnotations.images={_loaded(cluster.kind)}",
        "--set-string", f"serving.podAnnotations.images={_loaded(cluster.kind)}",
        "--wait", "--timeout", "10m", env=cluster.environment)  # fmt: skip
    # the pods answer a moment before bootstrap ends, whose last line names a user
    run("kubectl", *cluster.flags, "--namespace", NAMESPACE, "wait", "job", "--for", "condition=complete", "--timeout", "300s",
        "--selector", "app.kubernetes.io/component=bootstrap", env=cluster.environment)  # fmt: skip
    print(f"\nup in {time.monotonic() - began:.0f} s; ask it:\n\n    {_curl(cluster)}\n")


def _loaded(kind: str) -> str:
    """What the tag `dev` means now, so that pods of an older image are replaced."""
    name = OURS[1] if kind == "node" else OURS[1].removeprefix("docker.io/library/")
    command = ("buildah", "inspect", "--format", "{{.FromImageID}}") if kind == "node" else (
        "docker", "image", "inspect", "--format", "{{.Id}}")  # fmt: skip
    return (said(*command, name).removeprefix("sha256:") or "unknown")[:12]


def _curl(cluster: Cluster) -> str:
    log = said("kubectl", *cluster.flags, "-n", NAMESPACE, "logs", "-l", "app.kubernetes.io/component=bootstrap", "--tail=20",
               env=cluster.environment)  # fmt: skip
    user = re.search(r"example_user=(\S+)", log)
    body = f"""-H 'Content-Type: application/json' -d '{{"user_id": "{user[1] if user else "7590-VHVEG"}"}}'"""
    if cluster.kind == "node":
        return f"curl {cluster.environment['INGRESS_ADDRESS'].rstrip('/')}/predict {body}"
    forward = " ".join(["kubectl", *cluster.flags, "-n", NAMESPACE, "port-forward", f"service/{RELEASE}", "8080:80"])
    return f"{forward} &\n    curl http://127.0.0.1:8080/predict {body}"


def down(context: str) -> None:
    """Remove what `up` made: the cluster if it made one, else the release and its namespace."""
    note = json.loads(NOTE.read_text()) if NOTE.exists() else None
    if note is None or (context and context != note["context"]):
        print("nothing to remove: `make up` has made nothing here")
        return
    if note["made"] and note["kind"] == "node":
        run(*NODE, "down")
    elif note["made"] and note["kind"] == "kind":
        run("kind", "delete", "cluster", "--name", "churn")
    else:
        run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE, "--kube-context", note["context"], "--wait")
        run("kubectl", "--context", note["context"], "delete", "namespace", NAMESPACE, "--timeout", "120s")
    NOTE.unlink()


def main() -> int:
    """Exit code 0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.local", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("up", "down", "node"))
    parser.add_argument("--context", default=os.environ.get("CONTEXT", ""))
    arguments = parser.parse_args()
    try:
        if arguments.command == "up":
            up(arguments.context)
        elif arguments.command == "down":
            down(arguments.context)
        else:
            node = _node()
            images(node.kind)
            node.load()
    except (UpError, subprocess.TimeoutExpired) as error:
        print(f"make {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
