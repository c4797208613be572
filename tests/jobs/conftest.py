"""Real stores in small: simulated snapshots, trained versions, homes to work in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from jobs.ingest import ingest
from jobs.settings import Settings, load_settings
from jobs.simulate import simulate
from jobs.snapshots import instant

FIRST, SECOND = date(2024, 1, 31), date(2024, 2, 29)
FIRST_KNOWN, SECOND_KNOWN = instant(date(2024, 3, 1)), instant(date(2024, 3, 31))
QUICK = {"candidates": ("logistic_regression",), "bootstrap_samples": 300}


def settings_for(home: Path, **changes: object) -> Settings:
    """Settings of a home, quick to train with."""
    return load_settings(home=home, serve_port=0, **{**QUICK, **changes})


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two months of 3,000 users: playback stalls rise in the second, and users leave for other reasons."""
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, users=3000, months=2, start=FIRST, seed=1, feature_drift_month=1, concept_drift_month=1)
    return folder


@pytest.fixture(scope="session")
def ingested(tmp_path_factory: pytest.TempPathFactory, simulated: Path) -> Path:
    """A home with both snapshots, labels and all. Copy it before writing: `home` does."""
    home = tmp_path_factory.mktemp("ingested")
    for day in (FIRST, SECOND):
        ingest(settings_for(home), simulated / day.isoformat(), as_of=day, now=datetime.now(UTC))
    return home


@pytest.fixture
def home(tmp_path: Path, ingested: Path) -> Path:
    """A home of this test's own, with both snapshots ingested."""
    return Path(shutil.copytree(ingested, tmp_path / "home"))


@dataclass(frozen=True)
class Trained:
    """A home in which version 1 was promoted and version 2 is a candidate that passed."""

    home: Path
    first_tag: str
    second_tag: str


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, ingested: Path) -> Trained:
    """The home that `promotable` copies. Its artifacts stay where they were logged, so it must not be written to."""
    from jobs.database import connect
    from jobs.package import ensure_bento
    from jobs.promote import promote
    from jobs.registry import Registry
    from jobs.retrain import retrain

    home = Path(shutil.copytree(ingested, tmp_path_factory.mktemp("trained") / "home"))
    settings = settings_for(home)
    assert retrain(settings, as_of=FIRST_KNOWN).gate == "passed"
    first_tag = promote(settings).served_tag
    second = retrain(settings, as_of=SECOND_KNOWN)
    assert (second.version, second.gate) == (2, "passed"), second.reason
    version = Registry(settings).version(2)
    assert version is not None and first_tag is not None
    second_tag = ensure_bento(settings, connect(settings.database), Registry(settings), version)
    return Trained(home, first_tag, second_tag)


@pytest.fixture
def promotable(tmp_path: Path, trained: Trained) -> Callable[..., Settings]:
    """Settings, with changes, of a fresh copy of the trained home."""

    def copy(**changes: object) -> Settings:
        home = tmp_path / "home"
        if not home.exists():
            shutil.copytree(trained.home, home)
        return settings_for(home, **changes)

    return copy
