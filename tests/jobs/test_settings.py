"""Settings from the environment: what is refused says which variable, what was found, and what would be right."""

from __future__ import annotations

from datetime import timedelta

import pytest

from jobs.settings import SettingsError, load_settings


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
    ],
)
def test_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"{variable} is '{value}'") as error:
        load_settings()
    assert says in str(error.value)


def test_k_of_n_must_be_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_DRIFT_K", "3")
    with pytest.raises(SettingsError, match="drift_k is 3, more than drift_n"):
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
    for variable in ("CHURN_PORT", "CHURN_SERVICE_HOST", "CHURN_SPOOL_DIR", "CHURN_DRAIN_SECONDS", "CHURN_FAILPOINT"):
        monkeypatch.setenv(variable, "x")
    load_settings()
