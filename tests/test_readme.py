"""What README names exists: commands, make targets, folders, settings. The demo's output is shown by test_demo."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from typer.testing import CliRunner

from bentos.churn.config import Config
from jobs.cli import app
from jobs.settings import Settings
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(?:churn )([a-z]+)", README))))
def test_command_exists(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z][a-z-]+)(?=[\s`,)]|$)", README))))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("variable", sorted(set(re.findall(r"CHURN_([A-Z_]+)", README)) - {"SAMPLE", ""}))
def test_setting_exists(variable: str) -> None:
    of_service = {field.name for field in fields(Config)}
    assert variable.lower() in {*Settings.model_fields, *of_service, "log_level"}


def test_first_command_is_on_the_first_screen() -> None:
    assert "    make demo\n" in "\n".join(README.splitlines()[:24])
