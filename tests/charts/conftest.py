"""The chart, rendered once a session for each file of `ci/`. No Helm: every test skips, and says how to get one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.charts.rendering import CI, Chart, Object, find_helm


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Chart:
    """The chart, and Helm 3 or else Helm 4."""
    helm = find_helm(3) or find_helm(4)
    if helm is None:
        pytest.skip("no helm on the PATH, nor one that `make node-build` made: install Helm 3 or 4, or run that")
    return Chart(helm, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def rendered(chart: Chart) -> Callable[[str], list[Object]]:
    """The objects of a file in `ci/`; not to be changed."""
    known: dict[str, list[Object]] = {}

    def look(ci: str) -> list[Object]:
        if ci not in known:
            known[ci] = chart.objects(ci)
        return known[ci]

    return look


@pytest.fixture(scope="session", params=CI)
def ci(request: pytest.FixtureRequest) -> str:
    """Each file in `ci/`, and `default`."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def objects(ci: str, rendered: Callable[[str], list[Object]]) -> list[Object]:
    """Of each file in `ci/` in turn; not to be changed."""
    return rendered(ci)
