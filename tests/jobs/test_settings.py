"""Settings from the environment: what is refused says which variable, what was found, and what would be right."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.dataset import known_at
from jobs.settings import Settings, SettingsError, load_settings
from jobs.snapshots import instant
from tests.jobs.conftest import FIRST, FIRST_KNOWN


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("CHURN_DRIFT_SHARE", "half", "valid number"),
        ("CHURN_DRIFT_SHARE", "1.5", "less than or equal to 1"),
        ("CHURN_LABEL_HORIZON", "30", "with its unit, such as 30d"),
        ("CHURN_PROMOTION_MODE", "always", "'auto', 'manual', 'dryRun' or 'off'"),
        ("CHURN_RELEASE", "Churn!", "DNS label"),
        ("CHURN_HOLDOUT_SHARE", "0", "greater than 0"),
        ("CHURN_SERVE_AS_OF", "yesterday", "date"),
        ("CHURN_HOME", "", "a folder, such as .churn"),
        ("CHURN_HOME", " ", "a folder, such as .churn"),
        ("CHURN_LABEL_HORIZON", "12h", "whole days, at least 1d, because labels are known at the end of a day"),
        ("CHURN_LABEL_HORIZON", "36h", "whole days"),
        ("CHURN_LABEL_HORIZON", "0d", "at least 1d"),
        ("CHURN_FEATURE_TTL", "99999999999d", "longer than a calendar"),
        ("CHURN_CANDIDATES", "dummy", 'JSON list, such as ["logistic_regression", "random_forest"]'),
        ("CHURN_CANDIDATES", "", "JSON list"),
        ("CHURN_AS_OF", "today", "date"),
        ("CHURN_SIMULATE_USERS", "999", "greater than or equal to 1000"),
        ("CHURN_SIMULATE_MONTHS", "0", "greater than or equal to 1"),
        ("CHURN_DEPLOYMENT", "churn/web", "a name as Kubernetes has them"),
        ("CHURN_DEPLOYMENT", "churn-", "a name as Kubernetes has them"),
        ("CHURN_CRONJOB_PREFIX", "Team_", "a name as Kubernetes has them"),
        ("CHURN_CRONJOB_PREFIX", "x" * 42, "not too long"),
    ],
)
def test_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"{variable} is '{value}'") as error:
        load_settings()
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("value", "found", "says"),
    [
        ("[]", "[]", "at least 1 item"),
        ('["dumy"]', "'dumy'", "'dummy', 'logistic_regression'"),
        ('["dummy", 1]', "1", "'dummy'"),
        ("{}", "{}", "tuple"),
        ('"dummy"', "'dummy'", "tuple"),
    ],
)
def test_candidates_are_estimators_we_have(monkeypatch: pytest.MonkeyPatch, value: str, found: str, says: str) -> None:
    monkeypatch.setenv("CHURN_CANDIDATES", value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value).startswith(f"CHURN_CANDIDATES is {found}; ")
    assert says in str(error.value)
    assert str(error.value).endswith('default ["dummy", "logistic_regression", "random_forest", "gradient_boosting"]')


@pytest.mark.parametrize("name", Settings.model_fields)
@pytest.mark.parametrize("value", ["", "?", "[", "-1"])
def test_no_value_ends_in_a_traceback(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Each is taken, or refused with its variable named."""
    monkeypatch.setenv(f"CHURN_{name.upper()}", value)
    try:
        load_settings()
    except SettingsError as error:
        assert f"CHURN_{name.upper()} is " in str(error)


DATABASES = "sqlite:///, postgresql:// or postgresql+psycopg://"


@pytest.mark.parametrize(
    ("variable", "value", "found", "expected"),
    [
        ("CHURN_DATABASE_URL", "mysql://churn:hunter2@db/churn", "mysql://…", DATABASES),
        ("CHURN_DATABASE_URL", "postgres://churn:hunter2@db/churn", "postgres://…", DATABASES),
        ("CHURN_DATABASE_URL", "postgresql+psycopg2://churn:hunter2@db/churn", "postgresql+psycopg2://…", DATABASES),
        ("CHURN_DATABASE_URL", "churn:hunter2@db/churn", "no URL", DATABASES),
        ("CHURN_DATABASE_URL", "churn:hunter2@db://churn", "no URL", DATABASES),
        ("CHURN_DATABASE_URL", "sqlite://", "sqlite://…", DATABASES),
        ("CHURN_DATABASE_URL", "postgresql://", "postgresql://…", DATABASES),
        (
            "CHURN_MLFLOW_URL",
            "postgresql://mlflow:hunter2@db/mlflow",
            "postgresql://…",
            "http://, https:// or sqlite:///",
        ),
        ("CHURN_MLFLOW_URL", "http://mlflow:hunter2@mlflow:5000", "http://…", "no user or password in it"),
        ("CHURN_ONLINE_STORE_URL", "http://:hunter2@redis", "http://…", "sqlite:///, redis:// or rediss://"),
        ("CHURN_ONLINE_STORE_URL", "redis:6379", "no URL", "sqlite:///, redis:// or rediss://"),
        ("CHURN_FEAST_REGISTRY_URL", "s3://feast:hunter2@bucket", "s3://…", DATABASES),
        ("CHURN_SERVING_URL", "https://churn:hunter2@churn", "https://…", "no user or password in it"),
        ("CHURN_SERVING_URL", "churn:hunter2@churn", "no URL", "http:// or https://; default: none"),
        ("CHURN_SNAPSHOTS_SOURCE", "s3://key:hunter2@bucket/prefix", "s3://…", "no user or password in it"),
        ("CHURN_SNAPSHOTS_SOURCE", "https://data/x?sig=hunter2", "https://…", "an archive: .zip, .tar.gz or .tgz"),
        ("CHURN_SNAPSHOTS_SOURCE", "ftp://u:hunter2@data/x.zip", "ftp://…", "a folder, or a URL that begins with"),
        ("CHURN_SNAPSHOTS_SOURCE", "file://hunter2/x", "file://…", "file:///, http://"),
    ],
)
def test_unknown_url_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, found: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value).startswith(f"{variable} is {found}; expected ")
    assert expected in str(error.value)
    assert "hunter2" not in str(error.value)
    with pytest.raises(ValidationError) as bare:
        Settings()
    assert "hunter2" not in str(bare.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CHURN_DATABASE_URL", "sqlite:////data/churn.db"),
        ("CHURN_DATABASE_URL", "postgresql://churn:p%40ss@db:5432/churn"),
        ("CHURN_DATABASE_URL", "postgresql+psycopg://churn@db/churn?sslmode=require"),
        ("CHURN_DATABASE_URL", ""),
        ("CHURN_MLFLOW_URL", "https://mlflow.example.org/path"),
        ("CHURN_MLFLOW_URL", "sqlite:///mlflow.db"),
        ("CHURN_ONLINE_STORE_URL", "rediss://user:p%40ss@redis:6379/1?ssl_ca_certs=/ca.pem"),
        ("CHURN_ONLINE_STORE_URL", "redis://redis"),
        ("CHURN_FEAST_REGISTRY_URL", "postgresql+psycopg://feast:secret@db/feast"),
        ("CHURN_SNAPSHOTS_SOURCE", "/not/mounted/yet"),
        ("CHURN_SNAPSHOTS_SOURCE", "incoming"),
        ("CHURN_SNAPSHOTS_SOURCE", "file:///data/incoming"),
        ("CHURN_SNAPSHOTS_SOURCE", "https://data.example.org/months.tar.gz?sig=x"),
        ("CHURN_SNAPSHOTS_SOURCE", "s3://bucket/prefix?region=eu-west-1"),
        ("CHURN_SNAPSHOTS_SOURCE", "gs://bucket"),
        ("CHURN_SERVING_URL", "http://churn:80"),
        ("CHURN_SERVING_URL", ""),
        ("CHURN_DEPLOYMENT", "churn"),
        ("CHURN_CRONJOB_PREFIX", "team-"),
        ("CHURN_AS_OF", "2024-02-29"),
        ("CHURN_LABEL_HORIZON", "24h"),
        ("CHURN_FEATURE_TTL", "36h"),
    ],
)
def test_these_are_taken(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    load_settings()


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_source_is_none_and_not_the_working_directory(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CHURN_SNAPSHOTS_SOURCE", value)
    assert load_settings().snapshots_source is None


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b", "50%", "a b"])
def test_the_name_of_home_reaches_the_database_as_it_is(tmp_path: Path, name: str) -> None:
    """What stands for something else in a URL is quoted."""
    import sqlalchemy as sa

    from bentos.churn.database import sqlite_path

    url = load_settings(home=tmp_path / name).database
    assert sqlite_path(url) == tmp_path / name / "churn.db"
    assert sa.engine.make_url(url).database == str(tmp_path / name / "churn.db")


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b", "50%"])
def test_the_model_registry_is_read_whatever_home_is_called(tmp_path: Path, name: str) -> None:
    import sqlite3
    from contextlib import closing

    from jobs.registry import Registry, RegistryError

    home = tmp_path / name
    home.mkdir()
    with closing(sqlite3.connect(home / "mlflow.db")) as connection, connection:
        connection.execute("CREATE TABLE registered_model_aliases (name, alias, version)")
        connection.execute("INSERT INTO registered_model_aliases VALUES ('churn', 'production', 7)")
    assert Registry(load_settings(home=home)).aliases() == {"production": 7}

    (home / "mlflow.db").write_text("no database at all " * 100)
    with pytest.raises(RegistryError, match=r"mlflow\.db"):
        Registry(load_settings(home=home)).aliases()


def test_labels_are_known_a_horizon_after_the_snapshot() -> None:
    assert known_at(load_settings(), FIRST) == FIRST_KNOWN
    later = load_settings().model_copy(update={"label_horizon": timedelta(hours=36)})
    assert known_at(later, FIRST) == instant(FIRST) + timedelta(hours=36), "no hour is dropped"


def test_k_of_n_must_be_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_DRIFT_K", "3")
    with pytest.raises(SettingsError, match="drift_k is 3, more than drift_n"):
        load_settings()


def test_a_deadline_that_no_pod_meets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_PROMOTION_DEADLINE", "1s")
    with pytest.raises(SettingsError, match=r"CHURN_PROMOTION_DEADLINE is .*expected 10s or more"):
        load_settings()


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_LABEL_HORIZON", "14d")
    monkeypatch.setenv("CHURN_CANDIDATES", '["dummy"]')
    settings = load_settings()
    assert settings.label_horizon == timedelta(days=14)
    assert settings.candidates == ("dummy",)


def test_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_DRIFT_SHAER", "0.1")
    with pytest.raises(SettingsError, match="CHURN_DRIFT_SHAER is not a setting; CHURN_DRIFT_SHARE is"):
        load_settings()


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets CHURN_PORT for a Service named churn; the service has variables of its own."""
    for variable in ("CHURN_PORT", "CHURN_SERVICE_HOST", "CHURN_SPOOL_DIR", "CHURN_DRAIN_SECONDS"):
        monkeypatch.setenv(variable, "x")
    load_settings()
