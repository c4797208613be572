"""The kubectl plugin, with a kubectl that remembers what it was asked; tests/cluster uses it with the real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer

from jobs.cli import app
from tests.charts.rendering import CHART, Chart, find_helm, one, pods

PLUGIN = CHART / "files" / "kubectl-churn"
COMMANDS = (
    "status",
    "history",
    "verify",
    "approve",
    "rollback",
    "pin",
    "unpin",
    "adopt",
    "promote",
    "check",
    "settings",
)

# Stands for kubectl: appends its arguments to a file, and answers as the situation says.
FAKE = """
import json, os, sys
from pathlib import Path
home = Path(os.environ["FAKE_HOME"])
situation = json.loads((home / "situation.json").read_text())
words = sys.argv[1:]
with (home / "calls.jsonl").open("a") as file:
    file.write(json.dumps(words) + "\\n")
asked = [word for word in words if not word.startswith(("--namespace=", "--context=", "--kubeconfig="))]
if asked[:2] == ["get", "cronjobs"]:
    if any(word.startswith("jsonpath=") for word in asked):
        print(" ".join(situation["releases"]), end="")
    else:
        print("\\n".join(situation["cronjobs"]))
    sys.exit(situation["list_fails"])
if asked[:2] == ["create", "job"]:
    print(json.dumps({"metadata": {"name": asked[2], "ownerReferences": [{"kind": "CronJob"}]}, "spec": situation["spec"]}))
    sys.exit(0)
if asked[0] == "patch":
    job = json.loads(sys.stdin.read())
    for change in json.loads(asked[asked.index("-p") + 1]):
        *path, last = change["path"].removeprefix("/").split("/")
        target = job
        for key in path:
            target = target[int(key) if isinstance(target, list) else key]
        if change["op"] == "remove":
            del target[last]
        elif last == "-":
            target.append(change["value"])
        else:
            assert change["op"] == "add" or last in target, change
            target[last] = change["value"]
    print(json.dumps(job))
    sys.exit(0)
if asked[:2] == ["create", "-f"]:
    (home / "made.json").write_text(sys.stdin.read())
    sys.exit(situation["create_fails"])
if asked[:2] == ["get", "pods"]:
    left = situation["states"]
    print(left[0], end="")
    if len(left) > 1:
        (home / "situation.json").write_text(json.dumps({**situation, "states": left[1:]}))
    sys.exit(0)
if asked[0] == "attach":
    (home / "attached").write_bytes(sys.stdin.buffer.read())
    print(situation["log"])
    sys.exit(0)
if asked[0] == "logs":
    print(situation["log"])
    sys.exit(0)
if asked[:2] == ["delete", "job"]:
    sys.exit(0)
sys.exit(f"the fake does not know {words}")
"""
SPEC: dict[str, Any] = {
    "backoffLimit": 0,
    "template": {"spec": {"containers": [{"args": ["promote"], "env": [{"name": "CHURN_DATABASE_URL"}]}]}},
}


@dataclass
class Kubectl:
    """The fake, and what it was asked."""

    home: Path
    situation: dict[str, Any] = field(
        default_factory=lambda: {
            "cronjobs": ["cronjob.batch/promote"], "releases": ["churn"], "spec": SPEC, "log": "what the job said",
            "states": ["churn-x|Succeeded|0| "], "list_fails": 0, "create_fails": 0,
        }
    )  # fmt: skip
    interpreter: Sequence[str] = ("sh",)

    def churn(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the plugin."""
        (self.home / "situation.json").write_text(json.dumps(self.situation))
        program = self.home / "kubectl"
        program.write_text(f"#!{sys.executable} -IS\n{FAKE}")
        program.chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{self.home}:{os.environ['PATH']}",
            "FAKE_HOME": str(self.home),
            **environ,
        }
        return subprocess.run(
            [*self.interpreter, str(PLUGIN), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def calls(self) -> list[list[str]]:
        file = self.home / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def made(self) -> dict[str, Any]:
        """The Job that was made."""
        found: dict[str, Any] = json.loads((self.home / "made.json").read_text())
        return found

    @property
    def container(self) -> dict[str, Any]:
        found: dict[str, Any] = self.made["spec"]["template"]["spec"]["containers"][0]
        return found


@pytest.fixture
def kubectl(tmp_path: Path) -> Kubectl:
    """The fake, and the plugin in this system's `sh`."""
    return Kubectl(tmp_path)


@pytest.fixture(params=["dash", "bash", "busybox"])
def each_shell(request: pytest.FixtureRequest, tmp_path: Path) -> Kubectl:
    """The same in each shell that is here: `sh` is another one on each system."""
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} here")
    return Kubectl(tmp_path, interpreter=[request.param, *(["sh"] if request.param == "busybox" else [])])


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "busybox"])
def test_every_shell_can_read_it(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    command = [shell, "sh", "-n"] if shell == "busybox" else [shell, "-n"]
    done = subprocess.run([*command, str(PLUGIN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_can_be_copied_to_the_path_as_it_is() -> None:
    assert os.access(PLUGIN, os.X_OK)
    assert PLUGIN.read_text().startswith("#!/bin/sh\n")


def test_its_commands_are_those_of_the_command_line(kubectl: Kubectl) -> None:
    """And each that it names in its help is one it takes."""
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {*COMMANDS, "receive"} <= known
    usage = kubectl.churn("--help").stdout
    lines = re.findall(r"^  ([a-z|\- ]+?)(?: [A-Z]+| \[.*)?  ", usage, re.MULTILINE)
    named = {word for line in lines for word in re.split(r"[ |]+", line) if word in {*known, "put"}}
    assert named == {*COMMANDS, "put"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_makes_a_job_with_its_arguments(kubectl: Kubectl, command: str) -> None:
    done = kubectl.churn(command)
    assert (done.returncode, done.stdout) == (0, "what the job said\n"), done.stderr
    assert kubectl.container["args"] == [command]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "kubectl churn [-n NAMESPACE]"),
        (["promot"], "promot is not a command; see kubectl churn --help"),
        (["demo"], "demo is not a command"),
        (["serve"], "serve is not a command"),
        (["bootstrap"], "bootstrap is not a command"),
        (["--dry-run"], "--dry-run is not an option"),
        (["-n"], "-n needs a value"),
        (["status", "--namespace"], "--namespace needs a value"),
        (["status", "--timeout", "soon"], '--timeout is "soon"; expected seconds'),
        (["put"], "put needs a folder"),
        (["put", "/nowhere"], "put needs a folder"),
        (["drift"], "kubectl create job --from=cronjob/drift"),
        (["rollback", "--reason", "two\nlines"], "more than one line"),
        ([""], "kubectl churn [-n NAMESPACE]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_exit_code_2_and_asks_nobody(kubectl: Kubectl, arguments: list[str], says: str) -> None:
    done = kubectl.churn(*arguments)
    assert done.returncode == 2, done
    assert says in done.stderr
    assert done.stdout == ""
    assert kubectl.calls == []


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_is_no_error(kubectl: Kubectl, word: str) -> None:
    done = kubectl.churn(word)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert kubectl.calls == []


def test_help_behind_a_command_is_the_command_s(kubectl: Kubectl) -> None:
    kubectl.churn("rollback", "--help")
    assert kubectl.container["args"] == ["rollback", "--help"]


NASTY = [
    "two words", "it's", 'say "no"', "back\\slash", "\\n", "tab\there", "$HOME", "$(touch pwned)", "`touch pwned`", "; exit 7",
    "*", "~", "ümläut – №", "a,b", "']}", "%s %d", "--", "  spaces  ", "trailing\\",
]  # fmt: skip


def test_arguments_arrive_as_they_were_given(each_shell: Kubectl) -> None:
    """Quotes, dollars and spaces included; and none of them is run on the way."""
    done = each_shell.churn("rollback", "--to", "3", "--reason", *NASTY, "", "--json")
    assert done.returncode == 0, done.stderr
    assert each_shell.container["args"] == ["rollback", "--to", "3", "--reason", *NASTY, "", "--json"]
    assert not list(each_shell.home.glob("pwned"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "my ns", "--context", "my context", "--kubeconfig", "/my files/config", "status", "--json"],
        ["status", "--json", "--namespace=my ns", "--context=my context", "--kubeconfig=/my files/config"],
        ["status", "-n", "my ns", "--json", "--context", "my context", "--kubeconfig=/my files/config"],
    ],
    ids=["before", "behind", "between"],
)
def test_kubectl_s_flags_go_to_every_call_and_not_to_the_job(kubectl: Kubectl, arguments: list[str]) -> None:
    done = kubectl.churn(*arguments)
    assert done.returncode == 0, done.stderr
    assert kubectl.container["args"] == ["status", "--json"]
    flags = ["--kubeconfig=/my files/config", "--context=my context", "--namespace=my ns"]
    assert all(call[:3] == flags for call in kubectl.calls)


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_the_exit_code_is_the_job_s(kubectl: Kubectl, code: int) -> None:
    kubectl.situation["states"] = [f"churn-x|{'Failed' if code else 'Succeeded'}|{code}| "]
    assert kubectl.churn("status").returncode == code


def test_it_waits_for_the_pod(each_shell: Kubectl) -> None:
    states = ["", "churn-x|Pending||ContainerCreating ", "churn-x|Running|| ", "churn-x|Failed|3| "]
    each_shell.situation["states"] = states
    done = each_shell.churn("status")
    assert done.returncode == 3
    assert ["logs", "-f", "pod/churn-x"] in each_shell.calls


def test_a_job_that_does_not_start_is_told_with_the_reason(kubectl: Kubectl) -> None:
    kubectl.situation["states"] = ["churn-x|Pending||ImagePullBackOff 0/1 nodes are available"]
    done = kubectl.churn("status", "--timeout", "1")
    assert done.returncode == 1
    assert "did not start within 1 s: ImagePullBackOff 0/1 nodes are available" in done.stderr
    assert kubectl.calls[-1][:2] == ["delete", "job"]


def test_the_job_goes_away_whatever_came_of_it(kubectl: Kubectl) -> None:
    kubectl.situation["states"] = ["churn-x|Failed|1| "]
    kubectl.churn("status")
    assert kubectl.calls[-1][:3] == ["delete", "job", kubectl.made["metadata"]["name"]]


def test_what_could_not_be_made_is_not_deleted(kubectl: Kubectl) -> None:
    kubectl.situation["create_fails"] = 1
    assert kubectl.churn("status").returncode == 1
    assert [call for call in kubectl.calls if call[0] == "logs"] == []


def test_the_job_is_nobody_s_is_tried_once_and_says_who_asked(kubectl: Kubectl) -> None:
    """The CronJob's history limit would take it away before its exit code is read."""
    kubectl.churn("approve", "7", USER='o\'neill "x"')
    assert "ownerReferences" not in kubectl.made["metadata"]
    assert kubectl.made["spec"]["backoffLimit"] == 0
    env = {entry["name"]: entry.get("value") for entry in kubectl.container["env"]}
    assert env == {"CHURN_DATABASE_URL": None, "USER": 'o\'neill "x"', "CHURN_LOG_LEVEL": "WARNING"}


def test_put_sends_a_folder_to_a_job_with_the_data_volume(each_shell: Kubectl, chart: Chart, tmp_path: Path) -> None:
    """As a tar on the standard input of `churn receive`, in a Job from CronJob materialize."""
    each_shell.situation["spec"] = one(chart.objects(), "CronJob/materialize")["spec"]["jobTemplate"]["spec"]
    each_shell.situation["states"] = ["churn-x|Running|| ", "churn-x|Running|| ", "churn-x|Succeeded|0| "]
    each_shell.situation["cronjobs"] = ["cronjob.batch/materialize"]
    folder = tmp_path / "my snapshots"
    (folder / "2024-02-29").mkdir(parents=True)
    (folder / "2024-02-29" / "users.csv").write_text("user_id\n")
    done = each_shell.churn("put", str(folder))
    assert (done.returncode, done.stdout) == (0, "what the job said\n"), done.stderr
    selector = each_shell.calls[0][each_shell.calls[0].index("-l") + 1]
    assert "app.kubernetes.io/component=materialize" in selector
    assert each_shell.container["args"] == ["receive"]
    assert each_shell.container["stdin"] is each_shell.container["stdinOnce"] is True
    (volume,) = [v for v in each_shell.made["spec"]["template"]["spec"]["volumes"] if v["name"] == "data"]
    assert "persistentVolumeClaim" in volume
    with tarfile.open(each_shell.home / "attached") as archive:
        assert [member.name for member in archive if member.isfile()] == ["./2024-02-29/users.csv"]


def test_verify_runs_where_the_snapshots_are(kubectl: Kubectl, chart: Chart) -> None:
    """In a Job from CronJob retrain: training data is a link of the chain."""
    kubectl.situation["spec"] = one(chart.objects(), "CronJob/retrain")["spec"]["jobTemplate"]["spec"]
    kubectl.situation["cronjobs"] = ["cronjob.batch/retrain"]
    assert kubectl.churn("verify", "churn:v2-0a1b2c3d", "--json").returncode == 0
    assert "app.kubernetes.io/component=retrain" in kubectl.calls[0][kubectl.calls[0].index("-l") + 1]
    assert kubectl.container["args"] == ["verify", "churn:v2-0a1b2c3d", "--json"]
    (volume,) = [v for v in kubectl.made["spec"]["template"]["spec"]["volumes"] if v["name"] == "data"]
    assert "persistentVolumeClaim" in volume


def test_no_release_is_told(kubectl: Kubectl) -> None:
    kubectl.situation["cronjobs"] = []
    done = kubectl.churn("status", "-n", "empty")
    assert done.returncode == 1
    assert "no release here" in done.stderr
    assert "namespace empty" in done.stderr


def test_of_two_releases_one_has_to_be_chosen(kubectl: Kubectl) -> None:
    kubectl.situation["cronjobs"] = ["cronjob.batch/promote", "cronjob.batch/eu-promote"]
    kubectl.situation["releases"] = ["churn", "eu"]
    done = kubectl.churn("status")
    assert done.returncode == 1
    assert "choose with --release: churn eu" in done.stderr


def test_a_release_is_found_by_its_labels(kubectl: Kubectl, chart: Chart) -> None:
    """Those that the chart gives its CronJob, whatever its name's prefix is."""
    kubectl.situation["cronjobs"] = ["cronjob.batch/eu-promote"]
    done = kubectl.churn("status", "--release", "eu")
    assert done.returncode == 0, done.stderr
    listing, making, *_ = kubectl.calls
    selector = dict(pair.split("=") for pair in listing[listing.index("-l") + 1].split(","))
    labels = one(chart.objects(release="eu", values="jobs: {namePrefix: eu-}"), "CronJob/eu-promote")["metadata"][
        "labels"
    ]
    assert selector.items() <= labels.items()
    assert "app.kubernetes.io/instance" in selector
    assert "--from=cronjob/eu-promote" in making


def test_what_it_patches_is_what_the_chart_renders(kubectl: Kubectl, chart: Chart) -> None:
    """The first container's args and env are there, to be replaced and added to."""
    cronjob = one(chart.objects(), "CronJob/promote")
    kubectl.situation["spec"] = cronjob["spec"]["jobTemplate"]["spec"]
    assert kubectl.churn("history", "--limit", "5").returncode == 0
    (pod,) = pods([cronjob])
    before = pod.containers[0]
    assert kubectl.container["args"] == ["history", "--limit", "5"]
    assert kubectl.container["env"][: len(before["env"])] == before["env"]
    assert {key: value for key, value in kubectl.container.items() if key not in ("args", "env")} == {
        key: value for key, value in before.items() if key not in ("args", "env")
    }


@pytest.fixture(scope="session")
def notes(chart: Chart) -> Callable[..., str]:
    """What Helm says after an install; Helm 3 says it only where a cluster answers."""
    helm = find_helm(4)
    if helm is None:
        pytest.skip("no Helm 4 on the PATH, nor one that `make node-build` made")

    def read(*values: str) -> str:
        arguments = [word for value in values for word in ("--set-string", value)]
        done = chart.run("install", "churn", chart.folder, "--dry-run=client", "-n", "ns", *arguments, helm=helm)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("NOTES:")[1]

    return read


def test_notes_name_commands_that_work(chart: Chart, notes: Callable[..., str]) -> None:
    """What a newcomer copies from the screen."""
    said = notes("jobs.namePrefix=eu-")
    objects = chart.objects(values="jobs: {namePrefix: eu-}")
    names = {obj["metadata"]["name"] for obj in objects if obj["kind"] == "CronJob"}
    assert set(re.findall(r"--from=cronjob/(\S+)", said)) == names
    services = {obj["metadata"]["name"] for obj in objects if obj["kind"] == "Service"}
    assert set(re.findall(r"service/(\S+)", said)) <= services
    assert set(re.findall(r"kubectl churn -n ns (\w+)", said)) <= set(COMMANDS)
    assert "THE DATA IS SIMULATED" in said
    kept = {
        f"{'pvc' if o['kind'][0] == 'P' else 'secret'}/{o['metadata']['name']}"
        for o in objects
        if "resource-policy" in str(o)
    }
    assert set(re.findall(r"(?:pvc|secret)/\S+", said)) == kept


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("snapshots.source=/data/incoming", "Snapshots are taken from /data/incoming"),
        ("promotion.promotionMode=off", "NOTHING IS PROMOTED"),
        ("ingress.host=churn.example.com", "curl http://churn.example.com/predict"),
        ("serving.apiKeys.existingSecret=keys", "Ask, with one of the keys in Secret keys as KEY:"),
        ("serving.apiKeys.existingSecret=keys", '/predict -H "Authorization: Bearer $KEY" -H'),
        ("serving.apiKeys.existingSecret=keys", "It answers for every host: set a host before strangers"),
        ("ingress.className=x", "set a host, and keys (serving.apiKeys) or authentication in front of it, before"),
        ("existingSecret=mine", "delete pvc/churn-data pvc/churn-mlflow pvc/churn-postgres pvc/churn-valkey\n"),
    ],
)
def test_notes_warn_and_name_addresses(notes: Callable[..., str], values: str, says: str) -> None:
    assert says in notes(values)
