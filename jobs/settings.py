"""Settings of every job, read from the environment once, by the command line.

Each field is the variable `CHURN_<NAME>`. The defaults are the one-machine size: everything lies below
`home`. The chart sets the same variables to servers and volumes; nothing else differs between the sizes.
"""

from __future__ import annotations

import difflib
import os
import re
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Mode = Literal["auto", "manual", "dryRun", "off"]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _duration(value: Any) -> Any:
    """`30d`, `12h`, `5m`, `10s`; a bare number is refused, because 30 could be days or seconds."""
    if isinstance(value, timedelta):
        return value
    match = re.fullmatch(r"(\d+)([smhd])", str(value).strip())
    if not match:
        raise ValueError("expected a number with its unit, such as 30d, 12h, 5m or 10s")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


Duration = Annotated[timedelta, BeforeValidator(_duration)]


class Settings(BaseSettings):
    """What a job may know of its surroundings. Values are checked here, so that jobs need not."""

    model_config = SettingsConfigDict(env_prefix="CHURN_", extra="forbid", frozen=True)

    # --- where things are -------------------------------------------------------------------------------
    home: Path = Field(Path(".churn"), description="folder that holds everything of the one-machine size")
    release: str = Field("churn", description="name of the release: model name, Feast project, schema")
    database_url: str = Field("", description="predictions, promotions, bentos; SQLite below home by default")
    mlflow_url: str = Field("", description="MLflow tracking and registry; SQLite below home by default")
    online_store_url: str = Field("", description="sqlite:/// or redis://; SQLite below home by default")
    feature_store_yaml: Path = Field(
        Path(__file__).resolve().parent.parent / "feature_repo" / "feature_store.yaml",
        description="Feast's configuration; ${...} in it are these settings",
    )
    feast_registry_url: str = Field("", description="Feast's SQL registry; SQLite below home by default")
    snapshots_source: Path | None = Field(None, description="folder in which new snapshots arrive")

    # --- data -------------------------------------------------------------------------------------------
    label_horizon: Duration = Field(timedelta(days=30), description="labels of S are known at S + this")
    max_missing_share: float = Field(0.05, ge=0, le=1, description="share of nulls or absent rows refused above")
    stale_after: Duration = Field(timedelta(days=45), description="features older than this are stale")
    feature_ttl: Duration = Field(timedelta(days=45), description="training ignores feature rows older than this")

    # --- training and the gate --------------------------------------------------------------------------
    seed: int = Field(0, description="seed of cross-validation, forests and the bootstrap")
    holdout_salt: str = Field("churn", description="with user_id decides who is in the holdout, for ever")
    holdout_share: float = Field(0.2, gt=0, lt=1, description="share of users in the holdout")
    training_snapshots: int = Field(1, ge=1, description="training window, in snapshots")
    candidates: tuple[str, ...] = Field(
        ("dummy", "logistic_regression", "random_forest", "gradient_boosting"),
        description="estimators that compete in cross-validation",
    )
    calibration: Literal["none", "sigmoid"] = Field("none", description="calibration of the winner's scores")
    threshold: Literal["f1", "top_k"] = Field("f1", description="how the decision threshold is chosen")
    top_k_share: float = Field(0.1, gt=0, lt=1, description="share of users called, if threshold is top_k")
    promotion_delta: float = Field(0.01, ge=0, le=1, description="AUC a candidate must be better by")
    bootstrap_samples: int = Field(2000, ge=100, description="resamples of the paired bootstrap")
    first_auc_floor: float = Field(0.55, ge=0, le=1, description="lower bound of AUC a first model must exceed")
    min_class_rows: int = Field(100, ge=1, description="positives and negatives a holdout must have")
    slice_floor: float = Field(-0.05, le=0, description="a slice fails if its difference is surely below this")
    slice_min_positives: int = Field(50, ge=1, description="smaller slices are reported, not judged")

    # --- drift ------------------------------------------------------------------------------------------
    drift_share: float = Field(0.02, ge=0, le=1, description="share of feature columns that is dataset drift")
    drift_threshold: float = Field(0.1, gt=0, description="distance from which a column has drifted")
    drift_min_rows: int = Field(1000, ge=30, description="fewer current rows are not judged")
    drift_min_logged: int = Field(2000, ge=30, description="fewer logged predictions are not judged")
    drift_k: int = Field(1, ge=1, description="snapshots of the last n that must have drifted")
    drift_n: int = Field(1, ge=1, description="snapshots looked back on")
    champion_floor: float = Field(0.55, ge=0, le=1, description="realised AUC below this starts retraining")
    retrain_cooldown: Duration = Field(timedelta(days=7), description="rest between retrainings drift starts")

    # --- promotion and serving --------------------------------------------------------------------------
    promotion_mode: Mode = Field("auto", description="auto, manual (waits for approve), dryRun, off")
    promotion_deadline: Duration = Field(timedelta(minutes=3), description="new pods must be ready by then")
    rebuild_on_code_change: bool = Field(True, description="new serving code: build the served version anew")
    bentos_kept: int = Field(10, ge=2, description="archives kept beside those in use")
    serve_host: str = Field("127.0.0.1", description="address that `churn serve` listens on")
    serve_port: int = Field(3000, ge=0, le=65535, description="its port; 0 takes a free one")
    serve_as_of: date | None = Field(None, description="the day features' age is judged on; default: today")
    score_call_share: float = Field(0.1, gt=0, le=1, description="share of users in the CSV of `score`")

    @field_validator("release")
    @classmethod
    def _release_is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?", value):
            raise ValueError("expected a DNS label such as churn: a-z, 0-9 and -, at most 53 characters")
        return value

    @model_validator(mode="after")
    def _k_of_n(self) -> Settings:
        if self.drift_k > self.drift_n:
            raise ValueError(f"drift_k is {self.drift_k}, more than drift_n ({self.drift_n})")
        return self

    def _sqlite(self, url: str, name: str) -> str:
        return url or f"sqlite:///{self.home.resolve() / name}"

    @property
    def database(self) -> str:
        """SQLAlchemy URL of our own tables."""
        return self._sqlite(self.database_url, "churn.db")

    @property
    def mlflow(self) -> str:
        """Tracking URI of MLflow."""
        return self._sqlite(self.mlflow_url, "mlflow.db")

    @property
    def online_store(self) -> str:
        """URL of the online store."""
        return self._sqlite(self.online_store_url, "online.db")

    @property
    def feast_registry(self) -> str:
        """SQLAlchemy URL of Feast's registry."""
        return self._sqlite(self.feast_registry_url, "feast.db")

    @property
    def feast_project(self) -> str:
        """Feast allows no dash in a project's name."""
        return self.release.replace("-", "_")

    @property
    def snapshots(self) -> Path:
        """Folder of the ingested snapshots: one folder a day, one Parquet file a table."""
        return self.home.resolve() / "snapshots"


class SettingsError(ValueError):
    """The environment holds a value that no job can work with."""


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, or SettingsError with one line per wrong variable, misspelt ones included."""
    known = [f"CHURN_{name.upper()}" for name in Settings.model_fields]
    others = re.compile(r"CHURN_(SERVICE|PORT)(_|$)")  # Kubernetes sets these for a Service named churn
    for variable in sorted(name for name in os.environ if name.startswith("CHURN_") and name not in known):
        meant = None if others.match(variable) else difflib.get_close_matches(variable, known, n=1, cutoff=0.88)
        if meant:
            raise SettingsError(f"{variable} is not a setting; {meant[0]} is")
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(e) for e in error.errors())) from None


def _explain(error: object) -> str:
    assert isinstance(error, dict)  # noqa: S101  pydantic's ErrorDetails
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = str(error["loc"][0])
    variable = name.upper() if name.upper().startswith("CHURN_") else f"CHURN_{name.upper()}"
    if error["type"] == "extra_forbidden":
        return f"{variable} is not a setting; `churn settings` lists them"
    field = Settings.model_fields[name]
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{variable} is {error['input']!r}; {message[:1].lower()}{message[1:]}; default {field.default!r}"
