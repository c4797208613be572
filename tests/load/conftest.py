"""A forest of full size served, features in Redis, predictions in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bench.stage import Stage, stage


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Both stores with 2,000 users, and the bento; `scene.environment` is a service's."""
    with stage(tmp_path_factory.mktemp("load"), users=2000, trees=None) as scene:
        yield scene
