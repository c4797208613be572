"""The model registry: aliases, versions, runs and artifacts. The only module that speaks to MLflow.

Reads that `promote` makes every minute do not import MLflow (2 s of CPU): over HTTP they are its REST API,
on one machine, where MLflow is a SQLite file without a server, they are three SELECTs on its schema; a test
pins both to MLflow's own client. Everything else goes through the client, imported where it is used.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import sqlite3
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import select

from bentos.churn.database import sqlite_path
from jobs.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

T = TypeVar("T")

PRODUCTION, CANDIDATE, PREVIOUS = "production", "candidate", "previous"
HELD, HELD_AGAINST = "held_by_replay", "held_against"  # what would change too much, beside which version
SPENT_TAGS = ("promoted_at", "rolled_back", "promotion_failed")  # a version with one is not promoted again unasked
TIMEOUT, BRIEF = 10, 2  # seconds, for one call

# Types in our pipelines that skops does not trust by itself; each was read and holds plain arrays and numbers.
# The list is ours and never the model's own: a model that needs another type is refused.
TRUSTED_TYPES = [
    "numpy.dtype",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.tree._tree.Tree",
]


class RegistryError(RuntimeError):
    """The model registry did not answer, or not as expected; says which and what it was asked."""


class ModelRefused(RegistryError):
    """The registry answered, and what it holds for a version is not a model that may be used."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered version: its number, the run that trained it, and its tags."""

    version: int
    run_id: str
    source: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def trained_as_of(self) -> date:
        """The newest snapshot it was trained on."""
        if "trained_as_of" not in self.tags:
            raise RegistryError(
                f"model version {self.version} has no tag trained_as_of: `churn retrain` did not make it; "
                "give it the date of its snapshot, or move the alias to a version that has one"
            )
        return date.fromisoformat(self.tags["trained_as_of"])

    @property
    def passed(self) -> bool:
        """Whether the gate let it through."""
        return self.tags.get("gate") == "passed"

    @property
    def spent(self) -> str:
        """Why it is not promoted again unasked, such as `rolled_back=2024-03-01T12:00:00Z`; empty if it may be."""
        return ", ".join(f"{tag}={self.tags[tag]}" for tag in SPENT_TAGS if tag in self.tags)


@dataclass(frozen=True)
class TrainingRun:
    """What `retrain` hands over to be logged and registered."""

    parameters: Mapping[str, object]
    metrics: Mapping[str, float]
    files: Mapping[str, bytes]  # artifact path → content
    model: Any  # a fitted scikit-learn pipeline
    example: pd.DataFrame  # rows for the signature and the input example
    version_tags: Mapping[str, str]
    run_name: str


@dataclass(frozen=True)
class LoggedRun:
    """A training run in MLflow that no version was made of yet."""

    run_id: str
    source: str
    model_id: str
    model_sha256: str  # of the file, read back


class Registry:
    """The registered model of one release."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.release
        self.url = settings.mlflow
        self._scratch: tempfile.TemporaryDirectory[str] | None = None  # downloads; gone with this object
        self._brief = False
        self._silent: RegistryError | None = None  # MLflow did not answer the last question

    def be_brief(self) -> None:
        """From now on wait BRIEF seconds for an answer, and if there was none once do not ask again: somebody waits."""
        self._brief = True

    def _folder(self) -> str:
        self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="churn-registry-")
        return tempfile.mkdtemp(dir=self._scratch.name)

    # ---- cheap reads -------------------------------------------------------------------------------------

    def aliases(self) -> dict[str, int]:
        """Alias → version; empty when nothing is registered yet."""
        if self.url.startswith("http"):

            def read(answer: Any) -> dict[str, int]:
                return {a["alias"]: int(a["version"]) for a in answer["registered_model"].get("aliases", [])}

            return self._get("registered-models/get", read, name=self.name) or {}
        rows = self._select("SELECT alias, version FROM registered_model_aliases WHERE name = ?", self.name)
        return {alias: int(version) for alias, version in rows}

    def version(self, number: int) -> ModelVersion | None:
        """That version, or None if there is none (or it was deleted)."""
        if self.url.startswith("http"):

            def read(answer: Any) -> ModelVersion:
                v = answer["model_version"]
                tags = {t["key"]: t.get("value", "") for t in v.get("tags", [])}
                return ModelVersion(number, v.get("run_id", ""), v.get("source", ""), tags)

            return self._get("model-versions/get", read, name=self.name, version=str(number))
        rows = self._select(
            "SELECT run_id, source FROM model_versions WHERE name = ? AND version = ? "
            "AND current_stage != 'Deleted_Internal'",
            self.name,
            number,
        )
        if not rows:
            return None
        tags = dict(
            self._select("SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?", self.name, number)
        )
        return ModelVersion(number, rows[0][0], rows[0][1], tags)

    def alias(self, alias: str) -> ModelVersion | None:
        """The version an alias points to; None if there is no such alias. A dangling one is an error."""
        number = self.aliases().get(alias)
        if number is None:
            return None
        version = self.version(number)
        if version is None:
            raise RegistryError(f"alias {alias} of model {self.name} points to version {number}, which does not exist")
        return version

    def production(self) -> ModelVersion | None:
        """The champion, or None before the first model."""
        return self.alias(PRODUCTION)

    def _get(self, path: str, read: Callable[[Any], T], **query: str) -> T | None:
        """What `read` finds in MLflow's answer, None if it says that there is no such thing."""
        if self._brief and self._silent:
            raise self._silent
        url = f"{self.url.rstrip('/')}/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=BRIEF if self._brief else TIMEOUT) as answer:
                return read(json.load(answer))
        except urllib.error.HTTPError as error:
            body = ""
            with suppress(OSError, http.client.HTTPException):
                body = error.read(2000).decode("utf-8", "replace")
            if error.code == 404 and "RESOURCE_DOES_NOT_EXIST" in body:
                return None
            raise RegistryError(f"MLflow answered {error.code} to {path}: {body[:200]}") from error
        except (OSError, ValueError) as error:
            self._silent = RegistryError(f"MLflow did not answer {path}: {error}")
            raise self._silent from error
        except (http.client.HTTPException, LookupError, TypeError, AttributeError) as error:
            raise RegistryError(f"MLflow answered {path} with something else than expected: {error!r}") from error

    def _select(self, sql: str, *parameters: object) -> list[Any]:
        path = sqlite_path(self.url)
        if not path.exists():
            self._refuse_if_there_were_versions(path)
            return []
        try:
            uri = f"{path.resolve().as_uri()}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True, timeout=TIMEOUT)) as connection:
                return connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            if "no such table" in str(error):  # MLflow has not made its schema yet
                return []
            raise RegistryError(f"MLflow's database {path.name}: {error}") from error

    def _refuse_if_there_were_versions(self, path: Path) -> None:
        """Raise where a registry that is not there is not one that nothing was registered in yet."""
        from jobs.database import connect, models

        with connect(self.settings.database).connect() as connection:
            if connection.execute(select(models.c.run_id).limit(1)).first() is not None:
                raise RegistryError(f"MLflow's database {path} is not there, though models were registered in it")

    # ---- through MLflow's client -------------------------------------------------------------------------

    @property
    def client(self) -> MlflowClient:
        """MLflow's client, its environment set so that nothing phones home and every call ends."""
        for key, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
        }.items():
            os.environ.setdefault(key, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        import mlflow
        from mlflow import MlflowClient

        if not self.url.startswith("http"):
            sqlite_path(self.url).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(self.url)
        mlflow.set_registry_uri(self.url)
        return MlflowClient(self.url, self.url)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """What MLflow's client raises, as RegistryError: its own exceptions, and those of answers it cannot read."""
        try:
            yield
        except Exception as error:
            raise RegistryError(f"MLflow did not write {what} of model {self.name}: {error}") from error

    def set_alias(self, alias: str, version: int) -> None:
        """Point the alias to the version, unless it does already."""
        if self.aliases().get(alias) != version:
            with self._writing(f"alias {alias} to version {version}"):
                self.client.set_registered_model_alias(self.name, alias, str(version))

    def drop_alias(self, alias: str) -> None:
        """Remove the alias, if it is there."""
        if alias in self.aliases():
            with self._writing(f"alias {alias}"):
                self.client.delete_registered_model_alias(self.name, alias)

    def set_tags(self, version: int, tags: Mapping[str, str | None]) -> None:
        """Set tags of a version (None deletes), touching only those that differ."""
        found = self.version(version)
        if found is None:
            raise RegistryError(f"model {self.name} has no version {version}")
        for key, value in tags.items():
            with self._writing(f"tag {key} of version {version}"):
                if value is None and key in found.tags:
                    self.client.delete_model_version_tag(self.name, str(version), key)
                elif value is not None and found.tags.get(key) != value:
                    self.client.set_model_version_tag(self.name, str(version), key, value)

    def versions(self) -> list[ModelVersion]:
        """Every version with its tags, newest first."""
        found = self.client.search_model_versions(f"name = '{self.name}'", max_results=1000)
        result = [ModelVersion(int(v.version), v.run_id or "", v.source or "", dict(v.tags)) for v in found]
        return sorted(result, key=lambda v: -v.version)

    def artifact(self, run_id: str, path: str) -> Path:
        """A copy of a run's artifact that lives as long as this object; raises RegistryError if it is not there."""
        client = self.client
        from mlflow.exceptions import MlflowException

        try:
            return Path(client.download_artifacts(run_id, path, self._folder()))
        except (MlflowException, OSError) as error:
            raise RegistryError(f"run {run_id} has no artifact {path}: {error}") from error

    def model_file(self, version: ModelVersion) -> Path:
        """A copy of the version's skops file as the registry has it now; whoever loads it compares its checksum."""
        return self._skops(f"models:/{self.name}/{version.version}")

    def _skops(self, uri: str) -> Path:
        _ = self.client
        import mlflow.artifacts
        from mlflow.exceptions import MlflowException

        try:
            folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=self._folder()))
        except (MlflowException, OSError) as error:
            raise RegistryError(f"{uri} has no model artifact: {error}") from error
        files = list(folder.glob("*.skops"))
        if len(files) != 1:
            raise ModelRefused(f"{uri} holds {sorted(p.name for p in folder.iterdir())}; expected one .skops file")
        return files[0]

    def load_model(self, version: ModelVersion) -> Any:
        """The version's scikit-learn pipeline, if its file is the one its tag names; see `load_skops`."""
        file = self.model_file(version)
        found, recorded = hashlib.sha256(file.read_bytes()).hexdigest(), version.tags.get("model_sha256")
        if found != recorded:
            raise ModelRefused(
                f"version {version.version}: the model's sha256 is {found[:12]}…, registered was {str(recorded)[:12]}…"
            )
        return load_skops(file)

    def trained_on(self, run_id: str) -> str:
        """The snapshots that a training run says it saw, with commas between; empty where it says nothing."""
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.get_run(run_id).data.params.get("trained_on", ""))
        except MlflowException as error:
            raise RegistryError(f"MLflow did not show run {run_id}: {error}") from error

    def log_training(self, run: TrainingRun) -> LoggedRun:
        """Log the run with its model and files; a run killed before its end is never registered."""
        client = self.client
        import mlflow
        import mlflow.sklearn
        from mlflow.models import infer_signature

        experiment = self._experiment(f"{self.name}-training")
        with mlflow.start_run(experiment_id=experiment, run_name=run.run_name) as active:
            run_id = active.info.run_id
            mlflow.log_params(dict(run.parameters))
            mlflow.log_metrics({key: float(value) for key, value in run.metrics.items()})
            self._log_files(client, run_id, run.files)
            example = run.example.head(5)
            info = mlflow.sklearn.log_model(
                run.model,
                name="model",
                signature=infer_signature(example, run.model.predict_proba(example)),
                input_example=example,
                pyfunc_predict_fn="predict_proba",
                serialization_format="skops",
                skops_trusted_types=TRUSTED_TYPES,
                pip_requirements=_requirements(),
            )
            sha256 = hashlib.sha256(self._skops(info.model_uri).read_bytes()).hexdigest()
        return LoggedRun(run_id, info.model_uri, info.model_id, sha256)

    def register(self, logged: LoggedRun, tags: Mapping[str, str]) -> ModelVersion:
        """Make a version of a logged run."""
        client = self.client
        tags = {**tags, "model_sha256": logged.model_sha256}
        if not self._exists(client):
            client.create_registered_model(self.name, description="Probability that a user churns within the horizon")
        created = client.create_model_version(
            self.name, logged.source, logged.run_id, tags=tags, model_id=logged.model_id
        )
        return ModelVersion(int(created.version), logged.run_id, logged.source, tags)

    def log_drift(
        self,
        *,
        as_of: datetime,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> str:
        """Log one drift check with its reports; returns the run's id."""
        client = self.client
        import mlflow

        with mlflow.start_run(
            experiment_id=self._experiment(f"{self.name}-drift"), run_name=f"drift-{as_of:%Y-%m-%d}"
        ) as run:
            mlflow.set_tags(dict(tags))
            mlflow.log_metrics(dict(metrics))
            self._log_files(client, run.info.run_id, files)
            return str(run.info.run_id)

    def _exists(self, client: MlflowClient) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _experiment(self, name: str) -> str:
        client = self.client
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = None if self.url.startswith("http") else (self.settings.home.resolve() / "mlartifacts").as_uri()
        return str(client.create_experiment(name, artifact_location=location and f"{location}/{name}"))

    @staticmethod
    def _log_files(client: MlflowClient, run_id: str, files: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix="churn-log-") as folder:
            for path, content in files.items():
                target = Path(folder) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            client.log_artifacts(run_id, folder)


def load_skops(path: Path) -> Any:
    """The object in a skops file; raises ModelRefused if it is none, or needs a type outside TRUSTED_TYPES."""
    import zipfile

    import skops.io

    if not zipfile.is_zipfile(path):  # a pickle, for one
        raise ModelRefused(f"{path.name} is no skops file: it begins with {path.read_bytes()[:16]!r}")
    unknown = sorted(set(skops.io.get_untrusted_types(file=path)) - set(TRUSTED_TYPES))
    if unknown:
        raise ModelRefused(f"{path.name} holds types that were not reviewed: {', '.join(unknown)}")
    return skops.io.load(path, trusted=TRUSTED_TYPES)


def _requirements() -> Sequence[str]:
    from importlib.metadata import version

    return [f"{name}=={version(name)}" for name in ("scikit-learn", "skops", "numpy", "pandas")]
