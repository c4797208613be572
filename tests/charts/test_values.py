"""values.yaml and its schema: every value with a word on it, and no key that only one of them knows."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml

from tests.charts.rendering import CHART, CI, Chart, Object, parse

SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text())
TEXT = (CHART / "values.yaml").read_text()
VALUES = parse(TEXT)[0]
# Given in jobs.defaults; «each of these may stand in a job's own group below, and wins there».
INHERITED = set(VALUES["jobs"]["defaults"])
OF_HELM = {"global"}  # of the parent, where this chart is a dependency
OPEN = {  # as Kubernetes has them: its API server knows their keys
    "serving.affinity", "serving.autoscaling.behavior", "jobs.affinity", "mlflow.affinity", "postgres.affinity",
    "valkey.affinity", "podSecurityContext", "containerSecurityContext", "global",
}  # fmt: skip


def resolve(schema: Object) -> Object:
    """A schema with what it refers to; its own words win."""
    for part in (schema, *schema.get("allOf", ())):
        if "$ref" in part:
            found = SCHEMA
            for key in part["$ref"].removeprefix("#/").split("/"):
                found = found[key]
            schema = {**resolve(found), **{key: value for key, value in schema.items() if key not in ("$ref", "allOf")}}
    return schema


def groups(schema: Object = SCHEMA, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every level of the schema that has keys of its own: its path, as serving.autoscaling, and itself."""
    schema = resolve(schema)
    if "properties" in schema:
        yield path, schema
        for key, below in schema["properties"].items():
            yield from groups(below, f"{path}.{key}" if path else key)


def leaves(schema: Object = SCHEMA, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every value of the schema: its path and itself; resources and probes are one value each."""
    for key, below in schema["properties"].items():
        here = f"{path}.{key}" if path else key
        if "properties" in below:
            yield from leaves(below, here)
        else:
            yield here, below


def at(path: str) -> object:
    """The value in values.yaml; KeyError where it is not."""
    found: object = VALUES
    for key in path.split("."):
        assert isinstance(found, dict)
        found = found[key]
    return found


def inherited(path: str) -> bool:
    """Whether a job has it by jobs.defaults."""
    words = path.split(".")
    return len(words) == 3 and words[0] == "jobs" and words[2] in INHERITED


def comments() -> Iterator[tuple[str, str]]:
    """Every key of values.yaml that stands on a line of its own, and the comment above it, as one line."""
    lines = TEXT.splitlines()

    def walk(node: yaml.MappingNode, path: str) -> Iterator[tuple[str, str]]:
        for key, value in node.value:
            here = f"{path}.{key.value}" if path else key.value
            above = key.start_mark.line
            while lines[above - 1].strip().startswith("#"):
                above -= 1
            yield here, " ".join(line.strip().lstrip("# ") for line in lines[above : key.start_mark.line])
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                yield from walk(value, here)

    root = yaml.compose(TEXT, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    yield from walk(root, "")


COMMENTS = dict(comments())


@pytest.mark.parametrize("path", [path for path, _ in leaves() if path not in OF_HELM and not inherited(path)])
def test_each_value_is_in_values_yaml_with_a_comment(path: str) -> None:
    at(path)
    assert path in COMMENTS, f"{path} should stand on a line of its own"
    assert len(COMMENTS[path]) > 2, f"{path} has no comment above it"


@pytest.mark.parametrize("path", [path for path, _ in leaves()])
def test_each_value_has_a_description_in_the_schema(path: str) -> None:
    (schema,) = [schema for found, schema in leaves() if found == path]
    assert resolve(schema).get("description"), path


def test_the_schema_says_what_the_comments_say() -> None:
    """An editor shows the schema's, a reader sees the comments: a change of one is a change of both."""
    descriptions = {path: resolve(schema).get("description") for path, schema in leaves() if path in COMMENTS and not inherited(path)}
    differing = {path: (COMMENTS[path], text) for path, text in descriptions.items() if text != COMMENTS[path]}
    assert not differing


def test_values_yaml_has_no_key_that_the_schema_does_not_know() -> None:
    known = {path for path, _ in groups()} | {path for path, _ in leaves()}
    unknown = [path for path in COMMENTS if path not in known and not path.startswith(tuple(f"{o}." for o in known))]
    assert not unknown
    for path in COMMENTS:
        schema = SCHEMA
        for key in path.split("."):
            schema = resolve(schema)
            if "properties" not in schema:
                break
            assert key in schema["properties"], path
            schema = schema["properties"][key]


def test_every_level_knows_its_keys_and_no_others() -> None:
    lax = [path for path, schema in groups() if schema.get("additionalProperties") is not False]
    assert not lax
    untyped = [path for path, s in leaves() if not {"type", "enum"} & set(resolve(s))]
    assert not untyped
    objects = {path for path, s in leaves() if "object" in resolve(s).get("type", ()) and path != "extraObjects"}
    assert {path for path in objects if "additionalProperties" not in resolve(SCHEMA_AT[path])} == OPEN


SCHEMA_AT = dict(leaves())


@pytest.mark.parametrize("path", [path for path, _ in groups()], ids=lambda path: path or "top")
def test_an_unknown_key_is_refused_at_every_level(chart: Chart, path: str) -> None:
    values: object = {"replicaz": 1}
    for key in reversed(path.split(".") if path else []):
        values = {key: values}
    done = chart.run("template", "churn", chart.folder, "-f", "-", values=json.dumps(values))
    assert done.returncode
    assert f"at '{'/' + path.replace('.', '/') if path else ''}'" in done.stderr
    assert "additional properties 'replicaz' not allowed" in done.stderr


def test_default_values_are_what_the_chart_has_without_any(chart: Chart) -> None:
    """values.yaml given as values changes nothing: no default is hidden in a template."""
    given = chart.text("existing-secret", values=TEXT.replace('existingSecret: ""', "existingSecret: churn-credentials", 1))
    assert given == chart.text("existing-secret")


@pytest.mark.parametrize("ci", [name for name in CI if name != "default"])
def test_a_file_in_ci_says_what_it_is_for(ci: str) -> None:
    text = (CHART / "ci" / f"{ci}-values.yaml").read_text()
    assert text.startswith("# ")
