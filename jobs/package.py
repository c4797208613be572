"""Bentos of registered versions: built once, from the registry and not from memory, kept in the database.

The tag is known before anything is built: it names serving code, run and model file. An archive in the database
lets a pod start, move or roll back while the model registry is down. What the registry holds is compared with what
`churn retrain` recorded before anything of it is loaded: see `jobs.provenance`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from bentos.churn import archive, packaging
from jobs.database import bentos
from jobs.provenance import MODEL, checked
from jobs.registry import ModelRefused, ModelVersion, Registry, load_skops
from jobs.settings import Settings

log = logging.getLogger(__name__)


class Bento(NamedTuple):
    """A stored archive, without its bytes."""

    tag: str
    model_version: int
    run_id: str
    built_at: datetime


def bento_of(engine: sa.Engine, tag: str) -> Bento | None:
    """The stored bento of that tag, or None."""
    query = sa.select(bentos.c.tag, bentos.c.model_version, bentos.c.run_id, bentos.c.built_at).where(
        bentos.c.tag == tag
    )
    with engine.connect() as connection:
        row = connection.execute(query).first()
    return Bento(*row) if row else None


def version_of(engine: sa.Engine, registry: Registry, number: int, tag: str | None) -> ModelVersion | None:
    """The version that this bento was made of; None if it was deleted, or its number now is another run's."""
    found, stored = registry.version(number), bento_of(engine, tag) if tag else None
    return None if found is not None and stored is not None and found.run_id != stored.run_id else found


def is_whole(engine: sa.Engine, tag: str) -> bool:
    """Whether the bento of that tag is stored, and its archive is the one that was built."""
    query = sa.select(bentos.c.archive, bentos.c.sha256).where(bentos.c.tag == tag)
    with engine.connect() as connection:
        row = connection.execute(query).first()
    return row is not None and hashlib.sha256(row.archive).hexdigest() == row.sha256


def note_lost(engine: sa.Engine, tag: str, version: int, run_id: str) -> None:
    """Keep which run a bento is of whose archive is in no backup: it serves on, and no pod can be added."""
    lost = {"sha256": "", "archive": b"", "built_at": datetime.now(UTC)}
    with engine.begin() as connection:
        connection.execute(bentos.insert().values(tag=tag, model_version=version, run_id=run_id, **lost))


def expected_tag(version: ModelVersion) -> str:
    """The tag that today's serving code makes of a version."""
    return packaging.bento_tag(version.version, version.run_id, version.tags.get("model_sha256", ""))


def ensure_bento(settings: Settings, engine: sa.Engine, registry: Registry, version: ModelVersion) -> str:
    """The tag of the version's bento, built and stored if it was not; raises ModelRefused if it must not be served.

    One that is stored whole was compared and checked when it was built, and needs nothing of the registry.
    """
    tag = expected_tag(version)
    if is_whole(engine, tag):
        return tag
    files = checked(engine, registry, version)
    import pandas as pd

    from jobs.retrain import complete

    log.info("building %s", tag)
    try:
        plan: list[dict[str, Any]] = json.loads(files["features.json"].read_text())
        reference = pd.read_parquet(files["reference.parquet"])
        built = packaging.build(
            load_skops(files[MODEL]),
            version=version.version,
            run_id=version.run_id,
            model_sha256=version.tags["model_sha256"],
            trained_as_of=version.trained_as_of,
            threshold=float(version.tags["threshold"]),
            features=plan,
            reference=complete(reference, plan),
            golden=pd.read_parquet(files["golden.parquet"]),
        )
    except (OSError, subprocess.SubprocessError):
        raise  # a full disk, a build that hangs: not the model's fault
    except Exception as error:  # parity, an unsafe operator, or whatever the converter says of a model it cannot take
        said = " ".join(str(error).split())
        if len(said) > 500:  # a converter begins with the cause, the output of a program ends with it
            said = f"{said[:250]} … {said[-250:]}"
        raise ModelRefused(f"version {version.version} cannot be packaged: {said}") from error
    log.info(
        "built %s: %d KB, parity %.1e on %d rows",
        tag,
        len(built.archive) // 1024,
        built.parity,
        len(reference),
    )
    with engine.begin() as connection:
        connection.execute(bentos.delete().where(bentos.c.tag == tag))
        connection.execute(
            bentos.insert().values(
                tag=tag,
                model_version=version.version,
                run_id=version.run_id,
                sha256=built.sha256,
                archive=built.archive,
                built_at=datetime.now(UTC),
                onnx_sha256=built.onnx_sha256,
                model_sha256=version.tags["model_sha256"],
                code_digest=packaging.code_digest(),
            )
        )
    return tag


def extracted(settings: Settings, tag: str) -> Path:
    """The folder of that bento, fetched from the database and checked if it is not there yet."""
    folder = settings.home.resolve() / "cache" / "bentos" / tag.replace(":", "-")
    return archive.fetch(settings.database, tag, folder)


def golden_row(settings: Settings, tag: str) -> tuple[dict[str, object], float]:
    """One row of features with the score that was stored for it when the bento was built."""
    golden = json.loads((extracted(settings, tag) / "src" / "model" / "golden.json").read_text())
    middle = len(golden["rows"]) // 2
    return golden["rows"][middle], float(golden["scores"][middle])


def prune_bentos(engine: sa.Engine, *, keep: int, in_use: Collection[str]) -> None:
    """Delete the oldest archives, but for `keep` of them and those in use."""
    with engine.begin() as connection:
        tags = connection.execute(sa.select(bentos.c.tag).order_by(bentos.c.built_at.desc())).scalars().all()
        old = [tag for tag in tags[keep:] if tag not in in_use]
        if old:
            connection.execute(bentos.delete().where(bentos.c.tag.in_(old)))
