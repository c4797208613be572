"""The switch that breaks a step."""

from __future__ import annotations

import time

import pytest

from jobs.failpoints import STEPS, Failpoint, failpoint
from jobs.settings import SettingsError, load_settings


def test_off_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHURN_FAILPOINT", raising=False)
    for step in STEPS:
        failpoint(step)


def test_it_breaks_the_named_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_FAILPOINT", "promote.built=raise")
    failpoint("promote.opened")
    with pytest.raises(Failpoint, match=r"promote\.built"):
        failpoint("promote.built")


def test_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_FAILPOINT", "promote.built=sleep:0,undo.tag_put_back=raise")
    failpoint("promote.built")
    with pytest.raises(Failpoint, match=r"undo\.tag_put_back"):
        failpoint("undo.tag_put_back")


def test_it_may_only_hold_a_step_up(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("CHURN_FAILPOINT", "promote.patched=sleep:1.5")
    failpoint("promote.patched")
    assert slept == [1.5]


def test_every_step_is_broken_by_a_test() -> None:
    """Tests of promote, retrain and rollback take all steps of these names; a new name needs one of its own."""
    assert {step.split(".")[0] for step in STEPS} == {"promote", "undo", "pin", "retrain"}


@pytest.mark.parametrize(
    "said", ["promote.nosuch=exit", "promote.built", "promote.built=exti", "promote.built=sleep:x"]
)
def test_a_typo_is_refused_by_every_command(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("CHURN_FAILPOINT", said)
    with pytest.raises(SettingsError, match=r"CHURN_FAILPOINT (names|says) .*; expected"):
        load_settings()


def test_steps_have_to_be_listed() -> None:
    with pytest.raises(ValueError, match=r"promote\.unheard of is not listed"):
        failpoint("promote.unheard of")
