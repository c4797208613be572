"""What each model version was made of, kept outside the model registry by the job that made it.

Whoever can write an artifact in MLflow can write its tags as well, so that neither vouches for the other. `retrain`
keeps the checksums in table `models` before it registers a version: of files as it had them at hand, and of the model
file as it was read back. Packaging compares before it loads anything, and adds the checksums of what it makes to table
`bentos`; `jobs.verify` recomputes the whole chain.

Left simple: nothing here is signed. Whoever may write our tables can make them say anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from bentos.churn.archive import extract
from bentos.churn.model import model_folder
from jobs.database import bentos, models
from jobs.registry import LoggedRun, ModelRefused, ModelVersion, Registry, RegistryError, TrainingRun

log = logging.getLogger(__name__)

MODEL = "model.skops"
PACKAGED = ("features.json", "reference.parquet", "golden.parquet")  # what a bento is made of, beside the model
CHECKED = (*PACKAGED, "gate.json")  # what promotion believes
TAGS = ("model_sha256", "threshold", "trained_as_of")  # of the version: promotion believes these, too


@dataclass(frozen=True)
class Record:
    """One row of table `models`."""

    run_id: str
    version: int | None
    model_sha256: str
    artifacts: Mapping[str, str]  # path in the run -> sha256
    data_fingerprint: str
    settings_fingerprint: str
    trained_as_of: date
    trained_on: str
    threshold: float
    gate: str
    recorded_by: str
    recorded_at: datetime


class Compared(NamedTuple):
    """One thing as it is in the registry, and as it was recorded."""

    what: str
    found: str
    recorded: str

    @property
    def same(self) -> bool:
        return self.found == self.recorded

    def __str__(self) -> str:
        return f"{self.what} is {short(self.found)}, recorded was {short(self.recorded)}"


def short(text: str) -> str:
    """A checksum's beginning; others' texts as they are, unless they are long or would steer a terminal."""
    if len(text) == 64 and text.isalnum():
        return f"{text[:12]}…"
    return text if text.isprintable() and len(text) <= 80 else f"{text[:60]!r}…"


def sha256(content: bytes) -> str:
    """The checksum of these bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------


def record_training(engine: sa.Engine, run: TrainingRun, logged: LoggedRun) -> None:
    """Keep what a run made, before a version is made of it: a version without a row was not made by us."""
    artifacts = {path: sha256(run.files[path]) for path in CHECKED}
    trained_on = str(run.parameters["trained_on"])
    _write(engine, _record(logged.run_id, run.version_tags, logged.model_sha256, artifacts, trained_on, "retrain"))


def record_version(engine: sa.Engine, version: ModelVersion) -> None:
    """Note the number of a version that was made of a recorded run; again, it changes nothing."""
    with engine.begin() as connection:
        row = models.update().where(models.c.run_id == version.run_id, models.c.version.is_(None))
        connection.execute(row.values(version=version.version))


def record_gate(engine: sa.Engine, version: ModelVersion, gate: str) -> None:
    """Note a verdict that was renewed."""
    with engine.begin() as connection:
        connection.execute(models.update().where(models.c.run_id == version.run_id).values(gate=gate))


def record_as_it_is(engine: sa.Engine, registry: Registry, version: ModelVersion, *, by: str) -> bool:
    """Keep what the registry says now of a version that has no row; whether it had none."""
    if record_of(engine, version.run_id) is not None:
        return False
    _take_over(engine, registry, version, _files(registry, version, PACKAGED), by)
    return True


def _take_over(
    engine: sa.Engine, registry: Registry, version: ModelVersion, files: Mapping[str, Path], by: str
) -> Record:
    found = {path: sha256(file.read_bytes()) for path, file in files.items()}
    model = found.pop(MODEL)
    try:
        record = _record(version.run_id, version.tags, model, found, registry.trained_on(version.run_id), by)
    except (KeyError, ValueError) as error:
        raise ModelRefused(f"version {version.version} lacks a tag that serving needs: {error}") from error
    record = replace(record, version=version.version)
    _write(engine, record)
    return record


def _record(
    run_id: str, tags: Mapping[str, str], model: str, artifacts: Mapping[str, str], trained_on: str, by: str
) -> Record:
    return Record(
        run_id=run_id,
        version=None,
        model_sha256=model,
        artifacts=artifacts,
        data_fingerprint=tags.get("data_fingerprint", ""),
        settings_fingerprint=tags.get("settings_fingerprint", ""),
        trained_as_of=date.fromisoformat(tags["trained_as_of"]),
        trained_on=trained_on,
        threshold=float(tags["threshold"]),
        gate=tags.get("gate", ""),
        recorded_by=by,
        recorded_at=datetime.now(UTC),
    )


def _write(engine: sa.Engine, record: Record) -> None:
    row = {**asdict(record), "artifacts": json.dumps(dict(record.artifacts), sort_keys=True)}
    with engine.begin() as connection:
        connection.execute(models.insert().values(**row))


# ---- comparing -------------------------------------------------------------------------------------------


def record_of(engine: sa.Engine, run_id: str) -> Record | None:
    """What was recorded of that run, or None."""
    return _first(engine, models.c.run_id == run_id)


def record_of_version(engine: sa.Engine, number: int) -> Record | None:
    """What was recorded last of that number, or None; for when nothing says which run it is of."""
    return _first(engine, models.c.version == number)


def _first(engine: sa.Engine, condition: sa.ColumnElement[bool]) -> Record | None:
    with engine.connect() as connection:
        newest = sa.select(models).where(condition).order_by(models.c.recorded_at.desc())
        row = connection.execute(newest).mappings().first()
    return None if row is None else Record(**{**row, "artifacts": json.loads(row["artifacts"])})


def checked(engine: sa.Engine, registry: Registry, version: ModelVersion) -> dict[str, Path]:
    """Copies of what a bento is made of, by name; raises ModelRefused unless they are what was recorded.

    Nothing of them is loaded before. A version that a release without table `models` packaged is taken over.
    """
    record = record_of(engine, version.run_id)
    files = _files(registry, version, CHECKED if record is None else [p for p in CHECKED if p in record.artifacts])
    record = record or _of_older_release(engine, registry, version, files)
    changed = [str(found) for found in compared(record, version, files) if not found.same]
    if changed:
        raise ModelRefused(f"version {version.version} is not what was recorded: {'; '.join(changed)}")
    return files


def what_changed(engine: sa.Engine, registry: Registry, version: ModelVersion) -> str:
    """In what a recorded version differs from its record; empty: in nothing, or it has none."""
    if record_of(engine, version.run_id) is None:
        return ""
    try:
        checked(engine, registry, version)
    except RegistryError as error:  # also an artifact that is not there any more
        return str(error)
    return ""


def _files(registry: Registry, version: ModelVersion, paths: Iterable[str]) -> dict[str, Path]:
    return {MODEL: registry.model_file(version), **{path: registry.artifact(version.run_id, path) for path in paths}}


def compared(record: Record, version: ModelVersion, files: Mapping[str, Path]) -> list[Compared]:
    """The version's number, files and tags beside what was recorded."""
    recorded = {MODEL: record.model_sha256, **record.artifacts}
    found = [] if record.version is None else [Compared("the version", str(version.version), str(record.version))]
    for path, file in files.items():
        what = "the model's sha256" if path == MODEL else f"sha256 of {path}"
        found.append(Compared(what, sha256(file.read_bytes()), recorded[path]))
    return [*found, *tags_compared(record, version, TAGS)]


def tags_compared(record: Record, version: ModelVersion, names: Iterable[str]) -> list[Compared]:
    """Tags of the version beside what was recorded."""
    return [
        Compared(f"tag {name}", _normal(version.tags.get(name, "")), _normal(str(getattr(record, name))))
        for name in names
    ]


def _normal(text: str) -> str:
    """Numbers in their shortest form: 0.50 is 0.5."""
    try:
        return text if len(text) == 64 else repr(float(text))
    except ValueError:
        return text or "missing"


def _of_older_release(
    engine: sa.Engine, registry: Registry, version: ModelVersion, files: Mapping[str, Path]
) -> Record:
    """The record of a version that was packaged before there were any: as the registry and that bento agree on."""
    query = sa.select(bentos.c.tag, bentos.c.sha256, bentos.c.archive).where(
        bentos.c.run_id == version.run_id, bentos.c.model_version == version.version
    )
    with engine.connect() as connection:
        bento = connection.execute(query.order_by(bentos.c.built_at.desc())).first()
    number = version.version
    if bento is None:
        raise ModelRefused(
            f"version {number} was not registered by `churn retrain`; "
            f"`churn approve {number} --why …` records it as it is now"
        )
    with tempfile.TemporaryDirectory(prefix="churn-bento-") as folder:
        inside = model_folder(extract(bento.archive, bento.sha256, Path(folder) / "bento"))
        about = json.loads((inside / "model.json").read_text())
    seen = [
        Compared("the model's sha256", sha256(files[MODEL].read_bytes()), about["model_sha256"]),
        Compared("tag threshold", _normal(version.tags.get("threshold", "")), repr(float(about["threshold"]))),
    ]
    changed = [str(found) for found in seen if not found.same]
    if json.loads(files["features.json"].read_text()) != about["features"]:
        changed.append("features.json lists other features")
    if changed:
        raise ModelRefused(f"version {number} is not what {bento.tag} was made of: {'; '.join(changed)}")
    log.warning("version %d was packaged as %s before models were recorded: recorded as it is now", number, bento.tag)
    return _take_over(engine, registry, version, files, f"taken over with {bento.tag}")
