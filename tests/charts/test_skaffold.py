"""skaffold.yaml names what exists: images, Dockerfiles, values. Skaffold itself is not run here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

SKAFFOLD: dict[str, Any] = yaml.safe_load((REPOSITORY / "skaffold.yaml").read_text())
VALUES: dict[str, Any] = yaml.safe_load((REPOSITORY / "charts" / "values.yaml").read_text())
RELEASE = SKAFFOLD["deploy"]["helm"]["releases"][0]
IMAGES = [artifact["image"] for artifact in SKAFFOLD["build"]["artifacts"]]


def test_it_builds_the_images_that_the_chart_runs() -> None:
    ours = ("jobs", "serving", "mlflow")
    assert sorted(IMAGES) == sorted(VALUES["images"][name]["repository"] for name in ours)
    for artifact in SKAFFOLD["build"]["artifacts"]:
        assert (REPOSITORY / artifact["docker"]["dockerfile"]).is_file()


@pytest.mark.parametrize("key", RELEASE["setValueTemplates"])
def test_each_value_it_sets_is_one_and_its_image_is_built(key: str) -> None:
    found: Any = VALUES
    for part in key.split("."):
        found = found[part]
    assert isinstance(found, str)
    variable = re.search(r"IMAGE_(?:REPO|TAG)_(\w+)", RELEASE["setValueTemplates"][key])
    assert variable is not None and variable[1] in {image.replace("-", "_") for image in IMAGES}


def test_what_it_deploys_is_there() -> None:
    assert (REPOSITORY / RELEASE["chartPath"] / "Chart.yaml").is_file()
    assert all((REPOSITORY / file).is_file() for file in RELEASE["valuesFiles"])


@pytest.mark.parametrize("profile", SKAFFOLD["profiles"], ids=lambda profile: profile["name"])
def test_a_profile_builds_all_images_or_changes_none(profile: dict[str, Any]) -> None:
    artifacts = profile.get("build", {}).get("artifacts", [])
    assert [artifact["image"] for artifact in artifacts] in ([], IMAGES)
    for artifact in artifacts:
        paths = artifact["custom"]["dependencies"]["paths"]
        assert all((REPOSITORY / path).exists() for path in paths)
