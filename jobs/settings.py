"""Settings of every job, read from the environment once, by the command line.

Each field is the variable `CHURN_<NAME>`. The defaults are the one-machine size: everything lies below
`home`. The chart sets the same variables to servers and volumes; nothing else differs between the sizes.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from jobs.failpoints import acts

Mode = Literal["auto", "manual", "dryRun", "off"]
Estimator = Literal["dummy", "logistic_regression", "random_forest", "gradient_boosting"]

_SQLITE, _POSTGRES = "sqlite:///", ("postgresql://", "postgresql+psycopg://")
_BEGINNINGS = {  # of each URL; such a value may hold a password and is never repeated in a message
    "database_url": (_SQLITE, *_POSTGRES),
    "mlflow_url": ("http://", "https://", _SQLITE),
    "online_store_url": (_SQLITE, "redis://", "rediss://"),
    "feast_registry_url": (_SQLITE, *_POSTGRES),
    "serving_url": ("http://", "https://"),
}
_SOURCES = ("file:///", "http://", "https://", "s3://", "gs://")  # of snapshots_source, when it is no folder

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _duration(value: Any) -> Any:
    """`30d`, `12h`, `5m`, `10s`; a bare number is refused, because 30 could be days or seconds."""
    if isinstance(value, timedelta):
        return value
    match = re.fullmatch(r"(\d+)([smhd])", str(value).strip())
    if not match:
        raise ValueError("expected a number with its unit, such as 30d, 12h, 5m or 10s")
    try:
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    except OverflowError:
        raise ValueError("expected fewer: this is longer than a calendar") from None


Duration = Annotated[timedelta, BeforeValidator(_duration)]


def _json_list(value: Any) -> Any:
    """A variable's text as the list it is; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('expected a JSON list, such as ["logistic_regression", "random_forest"]') from None


class Settings(BaseSettings):
    """What a job may know of its surroundings. Values are checked here, so that jobs need not."""

    model_config = SettingsConfigDict(env_prefix="CHURN_", extra="forbid", frozen=True, hide_input_in_errors=True)

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
    snapshots_source: str | None = Field(
        None, description="where new snapshots arrive: a folder, or a URL: file, http(s) of a .zip or .tar.gz, s3, gs"
    )
    as_of: date | None = Field(None, description="the day taken for today, to replay history; default: the clock")
    simulate_users: int = Field(5_000, ge=1_000, description="users that bootstrap simulates without a source")
    simulate_months: int = Field(3, ge=1, description="months of them")

    # --- the cluster ------------------------------------------------------------------------------------
    deployment: str = Field("", description="Deployment whose pods serve; empty: this machine serves")
    serving_url: str = Field("", description="the Service, http(s), which promotion asks when the pods are ready")
    serving_role: str = Field(
        "", description="database role of the service; bootstrap lets it read bentos and insert predictions"
    )
    cronjob_prefix: str = Field("", description="the CronJobs are <prefix>retrain, <prefix>drift and so on")

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
    candidates: Annotated[tuple[Estimator, ...], NoDecode, BeforeValidator(_json_list)] = Field(
        ("dummy", "logistic_regression", "random_forest", "gradient_boosting"),
        min_length=1,
        description="estimators that compete in cross-validation, a JSON list",
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
    retrain_budget: int = Field(2, ge=1, description="retrainings drift may start in 7 days")
    retrain_breaker: int = Field(3, ge=1, description="candidates that failed in a row: drift starts no more")
    predictions_kept: Duration = Field(timedelta(0), description="older predictions and scores are deleted; 0d: never")

    # --- promotion and serving --------------------------------------------------------------------------
    promotion_mode: Mode = Field("auto", description="auto, manual (waits for approve), dryRun, off")
    promotion_deadline: Duration = Field(timedelta(minutes=3), description="the next new pod must be ready by then")
    promotion_soak: Duration = Field(timedelta(0), description="new pods stay up this long before old ones go")
    replay_requests: int = Field(1000, ge=0, description="logged requests a candidate answers again; 0: none")
    replay_max_flipped: float = Field(0.25, ge=0, le=1, description="share of them decided otherwise: waits above")
    replay_max_shift: float = Field(0.2, ge=0, le=1, description="mean change of probability: waits above")
    canary_max_failed: float = Field(0.01, ge=0, le=1, description="share new pods may fail above the old ones'")
    canary_max_slowdown: float = Field(3.0, ge=1, description="times the old pods' p95 that new ones may take")
    rebuild_on_code_change: bool = Field(True, description="new serving code: build the served version anew")
    bentos_kept: int = Field(10, ge=2, description="newest archives kept; those in use are, however old")
    serve_host: str = Field("127.0.0.1", description="address that `churn serve` listens on")
    serve_port: int = Field(3000, ge=0, le=65535, description="its port; 0 takes a free one")
    serve_as_of: date | None = Field(None, description="the day features' age is judged on; default: today")
    api_keys_dir: Path | None = Field(None, description="folder of keys for /predict, one a file; none: all may ask")
    probe_token: SecretStr = Field(SecretStr(""), description="shown by our own requests, instead of a key too")
    score_call_share: float = Field(0.1, gt=0, le=1, description="share of users in the CSV of `score`")

    @field_validator("release")
    @classmethod
    def _release_is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?", value):
            raise ValueError("expected a DNS label such as churn: a-z, 0-9 and -, at most 53 characters")
        return value

    @field_validator("replay_requests")
    @classmethod
    def _replay_shows_something(cls, value: int) -> int:
        if 0 < value < 100:  # see jobs.replay.ENOUGH
            raise ValueError("expected 0, or 100 and more: of fewer nothing is concluded")
        return value

    @field_validator("home", mode="before")
    @classmethod
    def _home_is_somewhere(cls, value: Any) -> Any:
        if not str(value).strip():  # would be the working directory
            raise ValueError("expected a folder, such as .churn")
        return value

    @field_validator("api_keys_dir", mode="before")
    @classmethod
    def _keys_are_somewhere(cls, value: Any) -> Path | None:
        text = str(value or "").strip()
        if text and not text.startswith("/"):  # the service works in another folder
            raise ValueError("expected an absolute path, such as /etc/churn/keys")
        return Path(text) if text else None

    @field_validator("probe_token")
    @classmethod
    def _token_is_one(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value().strip()
        if text and not re.fullmatch("[!-~]{16,1024}", text):
            raise ValueError("expected 16 to 1,024 visible ASCII characters")
        return SecretStr(text)

    @field_validator("deployment", "cronjob_prefix")
    @classmethod
    def _name_is_one_of_kubernetes(cls, value: str, info: ValidationInfo) -> str:
        form = (
            r"[a-z0-9][a-z0-9-]{0,40}" if info.field_name == "cronjob_prefix" else r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
        )
        if value and not re.fullmatch(form, value):
            raise ValueError("expected a name as Kubernetes has them: a-z, 0-9 and -, not too long")
        return value

    @field_validator("snapshots_source", mode="before")
    @classmethod
    def _source_is_a_folder_or_a_url(cls, value: Any) -> str | None:
        text = str(value or "").strip()
        if "://" in text:
            if not any(text.startswith(known) and text != known for known in _SOURCES):
                raise ValueError(f"expected a folder, or a URL that begins with {', '.join(_SOURCES)}")
            if "@" in text.split("/")[2]:
                raise ValueError("expected no user or password in it, only host and port, or bucket")
            if text.startswith("http") and not text.split("?")[0].endswith((".zip", ".tar.gz", ".tgz")):
                raise ValueError("expected an archive: .zip, .tar.gz or .tgz")
        return text or None

    @field_validator(*_BEGINNINGS)
    @classmethod
    def _url_is_one_we_know(cls, value: str, info: ValidationInfo) -> str:
        known = _BEGINNINGS[str(info.field_name)]
        if value and not any(value.startswith(beginning) and value != beginning for beginning in known):
            raise ValueError(f"expected a URL that begins with {', '.join(known[:-1])} or {known[-1]}")
        if value.startswith("http") and "@" in value.split("/")[2]:
            raise ValueError("expected no user or password in it, only host and port")
        return value

    @field_validator("predictions_kept")
    @classmethod
    def _kept_as_long_as_needed(cls, value: timedelta) -> timedelta:
        if timedelta(0) < value < timedelta(days=30):  # what drift looks back on
            raise ValueError("expected 0d, which is for ever, or at least 30d")
        return value

    @field_validator("promotion_soak")
    @classmethod
    def _soak_ends(cls, value: timedelta) -> timedelta:
        if value > timedelta(minutes=20):  # the Deployment's progressDeadlineSeconds, half an hour, must be longer
            raise ValueError("expected at most 20m")
        return value

    @field_validator("label_horizon")
    @classmethod
    def _horizon_is_days(cls, value: timedelta) -> timedelta:
        if value < timedelta(days=1) or value % timedelta(days=1):
            raise ValueError("expected whole days, at least 1d, because labels are known at the end of a day")
        return value

    @field_validator("promotion_deadline")
    @classmethod
    def _a_pod_can_start(cls, value: timedelta) -> timedelta:
        if value < timedelta(seconds=10):
            raise ValueError("expected 10s or more: no pod starts faster, and each version would be marked as failed")
        return value

    @model_validator(mode="after")
    def _k_of_n(self) -> Settings:
        if self.drift_k > self.drift_n:
            raise ValueError(f"drift_k is {self.drift_k}, more than drift_n ({self.drift_n})")
        return self

    def _sqlite(self, url: str, name: str) -> str:
        path = re.sub(r"%(?=[0-9A-Fa-f]{2})|\?", lambda sign: quote(sign[0]), str(self.home.resolve() / name))
        return url or f"sqlite:///{path}"

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
        acts()
    except ValueError as error:
        raise SettingsError(str(error)) from None
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
    message = str(error["msg"]).removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}"
    if name in _BEGINNINGS or (name == "snapshots_source" and "://" in str(error["input"])):
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)", str(error["input"]))
        default = "none" if name in ("serving_url", "snapshots_source") else "SQLite below CHURN_HOME"
        return f"{variable} is {f'{scheme[0]}://…' if scheme else 'no URL'}; {message}; default: {default}"
    if name == "probe_token":
        return f"{variable} is not a usable token; {message}; default: none"
    default = Settings.model_fields[name].default
    shown = json.dumps(default) if isinstance(default, tuple) else repr(default)
    return f"{variable} is {error['input']!r}; {message}; default {shown}"
