"""Models and bentos that somebody tampered with, while clients ask: nothing of them is run, served or answered by.

As in test_faults.py; the number before a fault is its row in charts/README.md, section "Faults".
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.commands import NotYet, wait_until
from tests.cluster.faults import (
    CONVERGED,
    NORMAL,
    fault,
    names,
    new_rows,
    promote,
    start_python,
    stored_archive,
    stored_as,
    volumes,
)
from tests.cluster.release import JobEnd, Release

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

REFUSED_ARCHIVE = 3  # exit code of the init container
CANARY = "the canary sang"


# ---- versions in the registry ----------------------------------------------------------------------------

PLANT = """
import hashlib, io, json, os, pickle, tempfile
from pathlib import Path

import pandas as pd
import skops.io

from jobs.database import connect
from jobs.provenance import CHECKED, MODEL, record_as_it_is
from jobs.registry import CANDIDATE, PRODUCTION, Registry
from jobs.settings import load_settings

settings = load_settings()
registry, engine = Registry(settings), connect(settings.database)
client, like = registry.client, registry.production()
files = {path: registry.artifact(like.run_id, path).read_bytes() for path in CHECKED}
model, recorded = registry.load_model(like), True
inside = {}  # what the model's folder holds

def upload(files, folder=None):
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        client.log_artifacts(run.info.run_id, scratch, folder)

#CHANGE
if recorded and not inside:
    inside = {MODEL: skops.io.dumps(model)}
run = client.create_run(client.get_run(like.run_id).info.experiment_id)
upload(files)
upload(inside, "model")
tags = {key: like.tags[key] for key in ("trained_as_of", "threshold", "holdout_salt", "holdout_share")}
tags |= {"gate": "passed", "gate_reason": "planted", "champion": str(like.version), "champion_auc": "0.5"}
tags |= {"model_sha256": hashlib.sha256(inside.get(MODEL, b"")).hexdigest()}
source = f"{run.info.artifact_uri}/model"
made = registry.version(int(client.create_model_version(registry.name, source, run.info.run_id, tags=tags).version))
if recorded:
    record_as_it_is(engine, registry, made, by="a test")
registry.set_alias(CANDIDATE, made.version)
#AFTER
print("planted", made.version)
"""  # a version that looks as if it had passed the gate, with a checksum in our own table where that can be


@contextmanager
def planted(release: Release, change: str, after: str = "") -> Iterator[tuple[int, JobEnd]]:
    """A version like the one in production, but for a change, for the block; its number, and the Job that made it."""
    code = PLANT.replace("#CHANGE", change).replace("#AFTER", after)
    end = release.job_end(start_python(release, f"plant-{secrets.token_hex(2)}", code))
    found = re.search(r"^planted (\d+)$", end.log, re.MULTILINE)
    assert end.complete and found, end
    yield int(found[1]), end
    release.delete_version(int(found[1]))


def is_refused(release: Release, name: str, version: int, says: str, *, by_hand: bool = False) -> JobEnd:
    """A run of promote leaves that version alone, candidate or moved to by a hand; pods stay, and status says why."""
    served, tag = release.served_version(), release.served_tag()
    before, pods = release.promotions(), names(release, "serving")
    with fault(release, name) as happened:
        if by_hand:
            release.move_alias(version)
        end = promote(release, complete=False)
        problems = release.status()["problems"]
        happened.normal(served, within=CONVERGED)
    print(f"  {problems}")
    assert happened.clients.tags == [tag]
    assert names(release, "serving") == pods, "a pod was started"
    assert new_rows(release, before) == [("follow" if by_hand else "promote", version, "failed")]
    assert any(re.search(says, problem) for problem in problems), problems
    return end


PLANTED = {
    "20 candidate with NaN scores": (
        "model.steps[-1][1].coef_[:] = float('nan')",
        "",
        "ONNX differs from scikit-learn by nan",
    ),
    "20 alias to a version without artifact": ("recorded = False", "", "expected one .skops file"),
    "20 alias to a version of another schema": (
        """
plan = json.loads(files["features.json"])
plan[-1]["name"] = "of_another_service"
files["features.json"] = json.dumps(plan).encode()
""",
        "",
        "cannot be packaged: .*of_another_service",
    ),
    "22 model swapped after the gate": (
        "",
        """
model.steps[-1][1].coef_[:] *= -1
other = skops.io.dumps(model)
upload({MODEL: other}, "model")
registry.set_tags(made.version, {"model_sha256": hashlib.sha256(other).hexdigest()})
""",
        "is not what was recorded: the model's sha256",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_version_that_must_not_serve(pair: Release, name: str) -> None:
    """Whatever the registry says of it: it is not packaged, and no pod is started for it."""
    change, after, says = PLANTED[name]
    with planted(pair, change, after) as (version, _):
        is_refused(pair, name, version, says, by_hand="alias" in name)


CODE = f"""
class Planted:
    def __reduce__(self):
        return os.system, ("echo {CANARY}",)

"""
HOSTILE = {
    "a pickle": (
        CODE + "inside = {MODEL: pickle.dumps(Planted())}; pickle.loads(inside[MODEL])",
        r"model.skops is no skops file: it begins with b'\\x80",
    ),
    "a skops file with a function": (
        f"""
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
hostile = make_pipeline(FunctionTransformer(os.system, kw_args={{"command": "echo {CANARY}"}}))
inside = {{MODEL: skops.io.dumps(hostile)}}
try:
    hostile.transform([[1.0]])
except Exception:
    os.system("echo {CANARY}")
""",
        "model.skops holds types that were not reviewed: posix.system",
    ),
    "ONNX with its data elsewhere": (
        f"""
import numpy as np
from onnx import TensorProto, helper, numpy_helper
weights = numpy_helper.from_array(np.zeros(3, np.float32), "weights")
weights.data_location = TensorProto.EXTERNAL
weights.external_data.add(key="location", value="/etc/passwd")
onnx = helper.make_model(helper.make_graph([], "planted", [], [], [weights])).SerializeToString()
inside, recorded = {{"model.onnx": onnx}}, False
os.system("echo {CANARY}")
""",
        r"holds \['model.onnx'\]; expected one .skops file",
    ),
}  # each shows first that one would hear the canary


@pytest.mark.parametrize("kind", HOSTILE)
def test_code_in_the_registry_is_not_run(pair: Release, kind: str) -> None:
    """Whoever may write to MLflow may not run anything; the reason names what was found."""
    change, says = HOSTILE[kind]
    with planted(pair, change) as (version, plant):
        assert CANARY in plant.log
        end = is_refused(pair, f"23 in the registry: {kind}", version, says)
    assert CANARY not in end.log


# ---- bentos in the database ------------------------------------------------------------------------------


def again(archive: bytes, *more: tarfile.TarInfo, without: str = "") -> bytes:
    """The archive with members more, all empty, or with one file less."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as source, tarfile.open(fileobj=out, mode="w") as target:
        for member in source:
            if not without or not member.name.endswith(without):
                target.addfile(member, source.extractfile(member) if member.isreg() else None)
        for member in more:
            target.addfile(member)
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def flipped(archive: bytes) -> bytes:
    """One bit of the byte in the middle."""
    middle = len(archive) // 2
    return archive[:middle] + bytes([archive[middle] ^ 1]) + archive[middle + 1 :]


def bomb(archive: bytes) -> bytes:
    """Ten gigabytes, says the header of the first file."""
    big = tarfile.TarInfo("src/big")
    big.size = 10 * 2**30
    return big.tobuf() + again(archive)


ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "byte flipped": (flipped, "sha256"),
    "symlink": (lambda a: again(a, member("src/outside", tarfile.SYMTYPE, "/spool")), "neither a file nor a folder"),
    "../": (lambda a: again(a, member("src/../../../../spool/outside")), "would be written outside the folder"),
    "file missing": (lambda a: again(a, without="src/model/model.onnx"), "the archive has no src/model/model.onnx"),
    "bomb": (bomb, "the archive has more than"),
}


def refusal(release: Release) -> tuple[str, str, str]:
    """Name, uid and last words of a new pod whose bento was refused."""
    seen = {}
    for pod in release.pods("serving"):
        (fetch,) = pod["status"].get("initContainerStatuses") or [{}]
        ended = fetch.get("state", {}).get("terminated") or fetch.get("lastState", {}).get("terminated")
        if ended and ended["exitCode"] == REFUSED_ARCHIVE:
            return pod["metadata"]["name"], pod["metadata"]["uid"], ended["message"]
        seen[pod["metadata"]["name"]] = fetch.get("state")
    raise NotYet(json.dumps(seen))


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("kind", ARCHIVES)
def test_archive_that_somebody_changed(pair: Release, kind: str) -> None:
    """A pod that starts with it does not serve and leaves nothing anywhere; the other one serves on."""
    version, tag, (change, says) = pair.served_version(), str(pair.served_tag()), ARCHIVES[kind]
    stored = stored_archive(pair, tag)
    sha256 = hashlib.sha256(stored).hexdigest() if kind == "byte flipped" else ""
    with fault(pair, f"21 archive: {kind}") as happened:
        with stored_as(pair, tag, change(stored), sha256):
            pair.kubectl("delete", "pod", names(pair, "serving")[0], "--wait=false")
            pod, uid, said = wait_until("a new pod refuses it", lambda: refusal(pair), within=NORMAL)
            folder = volumes(uid)
            left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
        happened.mended()
        pair.kubectl("delete", "pod", pod, "--wait=false")  # a new one is sooner than the kubelet's next try
        happened.normal(version, within=NORMAL)
    print(f"  {said}")
    assert says in said
    assert left == []
    assert happened.clients.tags == [tag]
