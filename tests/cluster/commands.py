"""kubectl and helm as subprocesses with timeouts, on one context, and waiting for conditions with an end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.node import pins

T = TypeVar("T")
Object = dict[str, Any]
Done = subprocess.CompletedProcess[str]


class CommandFailed(AssertionError):
    """A command ended with another exit code than 0; the message is the end of what it said."""

    def __init__(self, done: Done) -> None:
        said = "\n".join(part.strip()[-6000:] for part in (done.stdout, done.stderr) if part.strip())
        super().__init__(f"`{' '.join(map(str, done.args))}` ended with {done.returncode}:\n{said}")
        self.done = done


def wait_until(what: str, look: Callable[[], T | None], *, within: float, every: float = 0.5) -> T:
    """What `look` answers, once that is true; when time is up, AssertionError with the last answer or error."""
    end, seen = time.monotonic() + within, "nothing"
    while True:
        try:
            found = look()
            if found:
                return found
            seen = repr(found)
        except NotYet as reason:
            seen = str(reason)
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {within:.0f} s; last seen: {seen}")
        time.sleep(every)


class NotYet(Exception):
    """Raised by what `wait_until` calls: what it saw instead."""


@dataclass(frozen=True)
class Cluster:
    """One context of one kubeconfig, and no other."""

    kubeconfig: Path
    context: str
    ingress: str  # address of the ingress controller, as http://10.244.0.1
    home: Path = field(default_factory=Path)  # helm's cache and configuration, so that it leaves the user's alone

    def environment(self) -> dict[str, str]:
        """Of every command: our binaries first, our kubeconfig, helm's folders below `home`."""
        bin_ = pins.cache() / "current" / "bin"
        helms = {f"HELM_{name}_HOME": str(self.home / f"helm-{name.lower()}") for name in ("CACHE", "CONFIG", "DATA")}
        own = {"PATH": f"{bin_}:{os.environ.get('PATH', '')}", "KUBECONFIG": str(self.kubeconfig)}
        return {**os.environ, **own, **helms}

    def run(
        self,
        command: Sequence[str | Path],
        *,
        timeout: float = 60,
        stdin: str | None = None,
        check: bool = True,
        path: Path | None = None,
    ) -> Done:
        """Run a command in this cluster's environment; `path` comes first on its PATH."""
        environment = self.environment()
        if path is not None:
            environment["PATH"] = f"{path}:{environment['PATH']}"
        words = [str(word) for word in command]
        program = shutil.which(words[0], path=environment["PATH"])
        assert program is not None, f"{words[0]} is not on the PATH, nor in {pins.cache()}/current/bin"
        done = subprocess.run(
            [program, *words[1:]], env=environment, input=stdin, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise CommandFailed(done)
        return done

    def kubectl(self, *arguments: str | Path, timeout: float = 60, stdin: str | None = None, check: bool = True) -> str:
        """What kubectl printed."""
        command = ["kubectl", f"--context={self.context}", *arguments]
        return self.run(command, timeout=timeout, stdin=stdin, check=check).stdout

    def get(self, *arguments: str) -> Object:
        """An object, or a list of them, as JSON."""
        found: Object = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def helm(self, program: str, *arguments: str | Path, timeout: float = 60, check: bool = True) -> Done:
        """Run helm (`helm` is Helm 3, `helm4` Helm 4)."""
        return self.run([program, f"--kube-context={self.context}", *arguments], timeout=timeout, check=check)


def find_cluster(home: Path) -> tuple[Cluster | None, str]:
    """The test node, or the context that CONTEXT names, if it answers within three seconds; else the reason."""
    named = os.environ.get("CONTEXT")
    if named:
        kubeconfig = Path(os.environ.get("KUBECONFIG", "~/.kube/config").split(":")[0]).expanduser()
        context, ingress = named, os.environ.get("INGRESS_ADDRESS", "http://127.0.0.1")
    else:
        kubeconfig, ingress = pins.KUBECONFIG, pins.INGRESS_ADDRESS
        if not kubeconfig.exists():
            return None, f"no test node ({kubeconfig} is missing): make up; or CONTEXT names another cluster"
        context = ""
    cluster = Cluster(kubeconfig, context, ingress.rstrip("/"), home)
    try:
        if not context:
            context = cluster.run(["kubectl", "config", "current-context"], timeout=3).stdout.strip()
            cluster = Cluster(kubeconfig, context, cluster.ingress, home)
        cluster.kubectl("version", "--request-timeout=3s", timeout=4)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return None, f"{context or kubeconfig} does not answer: {' '.join(str(error).split())[-300:]}"
    return cluster, ""
