"""Recompute what stands behind a bento: archive, serving code, ONNX, model, registry, training data.

Each link is compared with our own tables and never with what the thing says of itself alone. What is not there any
more, or does not answer, is said and is no failure: archives outlive snapshots and model registries.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from bentos.churn.archive import ArchiveError, extract
from bentos.churn.model import GoldenMismatch, Scorer, code_digest, model_folder
from jobs import provenance
from jobs.database import bentos, connect
from jobs.provenance import Compared, Record, sha256, short
from jobs.registry import ModelRefused, ModelVersion, Registry, RegistryError
from jobs.settings import Settings
from jobs.snapshots import Snapshots

State = Literal["ok", "CHANGED", "not there", "not asked"]

TAGS = (*provenance.TAGS, "data_fingerprint", "settings_fingerprint", "gate")


class UnknownTag(LookupError):
    """No bento of that tag is stored; says which are."""


@dataclass(frozen=True)
class Link:
    """One thing in the chain; `detail` says what it is, what changed, or why it was not looked at."""

    name: str
    state: State
    detail: str


@dataclass(frozen=True)
class Chain:
    """A bento's links, from the archive to the training data."""

    tag: str
    result: Literal["ok", "CHANGED"]
    links: tuple[Link, ...]


def verify(settings: Settings, tag: str) -> Chain:
    """Every link of the bento of that tag; raises UnknownTag."""
    engine = connect(settings.database)
    with engine.connect() as connection:
        row = connection.execute(sa.select(bentos).where(bentos.c.tag == tag)).mappings().first()
        if row is None:
            tags = connection.execute(sa.select(bentos.c.tag).order_by(bentos.c.built_at.desc())).scalars().all()
            raise UnknownTag(f"no bento {tag} is stored; there are {', '.join(tags) or 'none'}")
    bento = dict(row)
    record = provenance.record_of(engine, bento["run_id"])
    with tempfile.TemporaryDirectory(prefix="churn-verify-") as scratch:
        links = [_equal("archive", sha256(bento["archive"]), bento["sha256"])]
        features: list[dict[str, Any]] | None = None
        if links[0].state == "ok":
            try:
                folder = extract(bento["archive"], bento["sha256"], Path(scratch) / "bento")
                about = json.loads((model_folder(folder) / "model.json").read_text())
                links += _inside(folder, about, bento, record)
                features = about["features"]
            except (ArchiveError, LookupError, TypeError, ValueError) as error:
                links.append(Link("what is inside", "CHANGED", f"cannot be read: {error!r}"))
        else:
            links.append(Link("what is inside", "not asked", "nothing of an archive that changed is read"))
    links.append(_recorded(record))
    links += _registry(settings, bento["model_version"], record)
    links.append(_data(settings, record, features))
    changed = any(link.state == "CHANGED" for link in links)
    return Chain(tag, "CHANGED" if changed else "ok", tuple(links))


def _equal(name: str, found: object, *recorded: object) -> Link:
    """Whether what was found is what was recorded, in each place that recorded it; None: in that place nothing was."""
    for other in recorded:
        if other is not None and other != found:
            return Link(name, "CHANGED", f"found {short(str(found))}, recorded {short(str(other))}")
    return Link(name, "ok", short(str(found)))


def _inside(folder: Path, about: dict[str, Any], bento: dict[str, Any], record: Record | None) -> Iterator[Link]:
    model = model_folder(folder)
    code = code_digest(folder / "src" / "bentos" / "churn")
    onnx = sha256((model / "model.onnx").read_bytes())
    run, trained = about["run_id"], about["model_sha256"]
    yield _equal("serving code", code, about["code_digest"], bento["code_digest"])
    yield (same_onnx := _equal("onnx", onnx, about["onnx_sha256"], bento["onnx_sha256"]))
    yield _equal("version", about["model_version"], bento["model_version"], record and record.version)
    yield _equal("run", run, bento["run_id"])
    yield _equal("trained model", trained, bento["model_sha256"], record and record.model_sha256)
    yield _equal("threshold", about["threshold"], record and record.threshold)
    yield _equal("trained as of", about["trained_as_of"], record and record.trained_as_of.isoformat())
    digest = hashlib.sha256(f"{code}\0{run}\0{trained}".encode()).hexdigest()[:8]
    yield _equal("tag", f"churn:v{about['model_version']}-{digest}", about["bento_tag"], bento["tag"])
    if same_onnx.state != "ok":
        yield Link("golden rows", "not asked", "an ONNX file that changed is not run")
        return
    try:
        scorer = Scorer(folder)
        yield Link("golden rows", "ok", f"{len(scorer.golden['rows'])} rows within {scorer.check_golden():.1g}")
    except GoldenMismatch as error:
        yield Link("golden rows", "CHANGED", str(error))
    except Exception as error:  # the same bytes as ever, and this release's libraries do not take them
        yield Link("golden rows", "not asked", f"they cannot be scored here: {error}")


def _recorded(record: Record | None) -> Link:
    if record is None:
        return Link("record", "not there", "a release that recorded no models packaged it")
    return Link("record", "ok", f"by {record.recorded_by}, {record.recorded_at:%Y-%m-%d %H:%M:%S} UTC")


def _registry(settings: Settings, number: int, record: Record | None) -> Iterator[Link]:
    """The version in the model registry beside its record."""
    if record is None:
        yield Link("model registry", "not asked", "there is no record to compare it with")
        return
    registry = Registry(settings)
    try:
        version = registry.version(number)
    except RegistryError as error:
        yield Link("model registry", "not asked", f"MLflow does not answer: {error}")
        return
    if version is None:
        yield Link("model registry", "not there", f"it has no version {number}")
        return
    yield (same_run := _equal("registered run", version.run_id, record.run_id))
    if same_run.state != "ok":
        return  # another model altogether, such as one of a registry that was begun anew
    yield _artifact(registry, version, provenance.MODEL, record.model_sha256)
    for path, recorded in sorted(record.artifacts.items()):
        yield _artifact(registry, version, path, recorded)
    for found in provenance.tags_compared(record, version, TAGS):
        yield _compared(found)


def _artifact(registry: Registry, version: ModelVersion, path: str, recorded: str) -> Link:
    try:
        file = registry.model_file(version) if path == provenance.MODEL else registry.artifact(version.run_id, path)
        return _equal(path, sha256(file.read_bytes()), recorded)
    except ModelRefused as error:
        return Link(path, "CHANGED", str(error))
    except (RegistryError, OSError) as error:
        return Link(path, "not there", str(error))


def _compared(found: Compared) -> Link:
    return _equal(found.what, found.found, found.recorded)


def _data(settings: Settings, record: Record | None, features: list[dict[str, Any]] | None) -> Link:
    """The training set's fingerprint, from the snapshots, if they and the features are still those."""
    name = "training data"
    if record is None or not record.trained_on:
        return Link(name, "not asked", "it is not recorded on which snapshots it was trained")
    snapshots = Snapshots(settings.snapshots)
    days = [date.fromisoformat(day) for day in record.trained_on.split(",")]
    for day in days:
        if not snapshots.has_labels(day):
            return Link(name, "not there", f"no snapshot of {day} with labels in {settings.snapshots}")
        try:
            snapshots.fingerprint(day)
        except Exception as error:  # whatever Arrow says of a damaged file
            return Link(name, "CHANGED", f"snapshot {day} cannot be read: {error}")
    from jobs import dataset

    try:
        if features is None or _essence(features) != _essence([asdict(f) for f in dataset.features(settings)]):
            return Link(name, "not asked", "the feature service has other features now")
        found = dataset.training_set(settings, days).fingerprint
    except Exception as error:  # Feast's registry is a database, too
        return Link(name, "not asked", f"the feature store does not answer: {error}")
    return _equal(name, found, record.data_fingerprint)


def _essence(features: list[dict[str, Any]]) -> str:
    """What decides which rows and columns a training set has."""
    kept = ("name", "view", "kind", "categories", "null_category")
    return json.dumps([[f[key] for key in kept] + [f["default"] is None] for f in features])


def lines(chain: Chain) -> list[str]:
    """The same for people, a line a link."""
    return [f"{link.name:<26} {link.state:<10} {link.detail}" for link in chain.links]
