"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import stores

REPOSITORY = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("churn", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("churn")


@pytest.fixture(scope="session")
def sample() -> Path:
    """The folder of the real snapshots (month_000, month_001); tests skip where it is not."""
    folder = Path(os.environ.get("CHURN_SAMPLE", REPOSITORY.parent / "shared" / "data" / "streamflow"))
    if not (folder / "month_000" / "subscriptions.csv").is_file():
        pytest.skip(f"no sample snapshots in {folder}; CHURN_SAMPLE names another folder")
    return folder


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stores.Server]:
    """A Redis server for the session; flush what you need empty."""
    with stores.redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[stores.Server]:
    """A PostgreSQL server for the session, with the empty database `churn`; make schemas or databases of your own."""
    with stores.postgres() as server:
        yield server
