"""The chart as Helm renders it, parsed into objects, and what tests ask of them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from tests.cluster.node import pins
from tests.conftest import REPOSITORY

CHART = REPOSITORY / "charts"
NAMESPACE = "churn-ns"  # of all rendering here
JOBS = ("materialize", "drift", "retrain", "promote", "score")
# what each file turns on, and `default`: no file at all
CI = ("default", *(path.name.removesuffix("-values.yaml") for path in sorted(CHART.glob("ci/*-values.yaml"))))

Object = dict[str, Any]
Done = subprocess.CompletedProcess[str]


class Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it: a date is text, and a key that comes twice is an error."""


def _mapping(loader: Loader, node: yaml.MappingNode) -> Object:
    keys = [key.value for key, _ in node.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} twice", node.start_mark)
    return cast(Object, loader.construct_mapping(node, deep=True))


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str) -> list[Object]:
    """The objects of a rendering, or of a values file."""
    return [document for document in yaml.load_all(text, Loader) if document]


@functools.cache
def find_helm(major: int) -> Path | None:
    """A Helm of that major version: on the PATH, else where the test node's binaries are built."""
    built = pins.cache() / "current" / "bin"
    for name in ("helm", f"helm{major}"):
        for found in (shutil.which(name), built / name):
            if found is not None and Path(found).is_file():
                said = subprocess.run([found, "version", "--short"], capture_output=True, text=True, check=False)
                if said.stdout.startswith(f"v{major}."):
                    return Path(found)
    return None


class Refused(AssertionError):
    """Helm did not render; the message is what it said."""


@dataclass(frozen=True)
class Chart:
    """The chart and a Helm. No user's settings, plugins or cluster play a part in what is rendered."""

    helm: Path
    home: Path
    folder: Path = CHART

    def run(
        self, *arguments: str | Path, values: str = "", helm: Path | None = None, kubeconfig: str | Path = os.devnull
    ) -> Done:
        """Run helm; `values` is YAML on its standard input, for `-f -`."""
        own = {f"HELM_{name}_HOME": str(self.home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        environment = {**os.environ, **own, "KUBECONFIG": str(kubeconfig)}
        command = [str(helm or self.helm), *map(str, arguments)]
        return subprocess.run(
            command, env=environment, input=values, capture_output=True, text=True, timeout=60, check=False
        )

    def text(
        self,
        ci: str = "default",
        values: str = "",
        *,
        helm: Path | None = None,
        release: str = "churn",
        arguments: Sequence[str] = (),
        namespace: str = NAMESPACE,
    ) -> str:
        """What `helm template` prints for one of the files in `ci/`, and values (YAML) laid over it."""
        files: list[str | Path] = [] if ci == "default" else ["-f", self.folder / "ci" / f"{ci}-values.yaml"]
        over = ["-f", "-"] if values else []
        command = ("template", release, self.folder, "--namespace", namespace, *files, *over, *arguments)
        done = self.run(*command, values=values, helm=helm)
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout

    def objects(self, ci: str = "default", values: str = "", *, release: str = "churn") -> list[Object]:
        """The same, parsed."""
        return parse(self.text(ci, values, release=release))

    def values(self, ci: str) -> Object:
        """What a file in `ci/` says, by itself."""
        if ci == "default":
            return {}
        found: Object = parse((self.folder / "ci" / f"{ci}-values.yaml").read_text())[0]
        return found


def name_of(obj: Object) -> str:
    """As kubectl has it: CronJob/drift."""
    return f"{obj['kind']}/{obj['metadata']['name']}"


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    """Those of these kinds."""
    return [obj for obj in objects if obj["kind"] in kinds]


def one(objects: Sequence[Object], name: str) -> Object:
    """The object that is called so, as Deployment/churn."""
    (found,) = [obj for obj in objects if name_of(obj) == name]
    return found


@dataclass(frozen=True)
class Pod:
    """A pod that an object makes."""

    owner: str
    metadata: Object
    spec: Object

    @property
    def labels(self) -> dict[str, str]:
        found: dict[str, str] = self.metadata["labels"]
        return found

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def containers(self) -> list[Object]:
        """Init containers too."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def cpu(self) -> int:
        """What the scheduler reserves, in thousandths of a core."""
        requests = [millicores(c["resources"]["requests"]["cpu"]) for c in self.spec["containers"]]
        first = [millicores(c["resources"]["requests"]["cpu"]) for c in self.spec.get("initContainers", ())]
        return max(sum(requests), *first, 0)


def millicores(quantity: str | float) -> int:
    """100m and 0.1 are 100."""
    text = str(quantity)
    return int(text[:-1]) if text.endswith("m") else round(float(text) * 1000)


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    """Every pod that these objects make: of Deployments, Jobs, CronJobs, and bare ones."""
    for obj in objects:
        if obj["kind"] == "Pod":
            yield Pod(name_of(obj), obj["metadata"], obj["spec"])
        elif obj["kind"] == "CronJob":
            template = obj["spec"]["jobTemplate"]["spec"]["template"]
            yield Pod(name_of(obj), template["metadata"], template["spec"])
        elif obj["kind"] in ("Deployment", "Job", "StatefulSet", "DaemonSet"):
            template = obj["spec"]["template"]
            yield Pod(name_of(obj), template["metadata"], template["spec"])


def environment(objects: Sequence[Object], pod: Pod, container: Object, *, secrets: dict[str, str]) -> dict[str, str]:
    """What a container's process will find: ConfigMaps are resolved, a variable from a Secret has its value in `secrets`."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= one(objects, f"ConfigMap/{source['configMapRef']['name']}")["data"]
    for entry in container.get("env", ()):
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        elif "secretKeyRef" in entry["valueFrom"]:
            found[entry["name"]] = secrets[entry["name"]]
        else:
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            found[entry["name"]] = pod.metadata["annotations"].get(path.split("'")[1], "")
    return found
