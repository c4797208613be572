"""values.yaml and its schema: every value with a word on it, and no key that only one of them knows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from jobs.settings import SettingsError, load_settings
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
    descriptions = {
        path: resolve(schema).get("description")
        for path, schema in leaves()
        if path in COMMENTS and not inherited(path)
    }
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


@pytest.fixture(scope="module")
def refusal(chart: Chart) -> str:
    """What Helm says of one unknown key at every level, all of them given at once."""
    values: Object = {}
    for path, _ in groups():
        level = values
        for key in path.split(".") if path else []:
            level = level.setdefault(key, {})
        level["replicaz"] = 1
    done = chart.run("template", "churn", chart.folder, "-f", "-", values=json.dumps(values))
    assert done.returncode
    return done.stderr


@pytest.mark.parametrize("path", [path for path, _ in groups()], ids=lambda path: path or "top")
def test_an_unknown_key_is_refused_at_every_level(refusal: str, path: str) -> None:
    place = "/" + path.replace(".", "/") if path else ""
    assert f"at '{place}': additional properties 'replicaz' not allowed" in refusal


def test_default_values_are_what_the_chart_has_without_any(chart: Chart) -> None:
    """values.yaml given as values changes nothing: no default is hidden in a template."""
    given = chart.text(
        "existing-secret", values=TEXT.replace('existingSecret: ""', "existingSecret: churn-credentials", 1)
    )
    assert given == chart.text("existing-secret")


@pytest.mark.parametrize("ci", [name for name in CI if name != "default"])
def test_a_file_in_ci_says_what_it_is_for(ci: str) -> None:
    text = (CHART / "ci" / f"{ci}-values.yaml").read_text()
    assert text.startswith("# ")


# ---- the schema and the settings of the jobs, which read most values once more ------------------------------

ODD: list[Any] = [
    "", " ", "x", "off", "true", True, False, 0, 1, -1, 2, 29, 30, 0.5, 1.5, -0.5, 1e-9, 1e9, "0", "0.0", "0.5", "1", "1.0", "-0",
    "-0.5", "1e3", "00", "0d", "00d", "1d", "1h", "90m", "20m", "21m", "999999d", "999999999d", "1w", "30", "10 s", [], ["dummy"],
    ["dummy", "dummy"], ["x"], "none", "f1", "top_k", "sigmoid", "auto", "dryRun", {}, "2024-02-29", "ä", "a b", "-",
]  # fmt: skip


def takes(schema: Object, value: Any) -> bool:
    """Whether a schema of ours takes a value; what it knows is what values.schema.json uses of JSON Schema for settings."""
    schema = resolve(schema)
    assert not set(schema) - {
        "type", "enum", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "uniqueItems",
        "items", "description", "minLength", "anyOf",
    }, schema  # fmt: skip
    kinds = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int | float) and not isinstance(value, bool) and value == int(value),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "array": isinstance(value, list),
    }
    wanted = schema.get("type", list(kinds))
    if not any(kinds[kind] for kind in ([wanted] if isinstance(wanted, str) else wanted)):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if kinds["string"]:
        return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))
    if kinds["number"]:
        return bool(
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and schema.get("exclusiveMinimum", value - 1) < value < schema.get("exclusiveMaximum", value + 1)
            and any(
                value == o.get("const", value) and value >= o.get("minimum", value) for o in schema.get("anyOf", [{}])
            )
        )
    if kinds["array"]:
        twice = schema.get("uniqueItems") and len({*map(str, value)}) < len(value)
        return len(value) >= schema.get("minItems", 0) and not twice and all(takes(schema["items"], v) for v in value)
    return True


def settings_by_path() -> dict[str, str]:
    """The values that are settings, as templates/_jobs.tpl lists them: jobs.drift.driftK is drift_k."""
    text = (CHART / "templates" / "_jobs.tpl").read_text()
    listed = parse(text.split('define "churn.settings" -}}')[1].split("{{- end }}")[0])[0]
    found = {f"{group}.{key}": key for group, keys in listed.items() for key in keys}
    found |= {"simulate.users": "simulateUsers", "simulate.months": "simulateMonths", "asOf": "asOf"}
    found |= {"jobs.namePrefix": "cronjobPrefix", "externalPostgres.servingRole": "servingRole"}
    return {path: re.sub("([A-Z])", r"_\1", key).lower() for path, key in found.items()}


@pytest.mark.parametrize(("path", "setting"), settings_by_path().items())
def test_what_the_chart_takes_the_jobs_take(
    monkeypatch: pytest.MonkeyPatch, chart: Chart, path: str, setting: str
) -> None:
    """Or an install would succeed, and every job of it fail with exit code 2."""
    for name in [name for name in os.environ if name.startswith("CHURN_")]:
        monkeypatch.delenv(name)
    load_settings()
    for value in ODD:
        if not takes(SCHEMA_AT[path], value) or (value == "" and path in ("asOf",)):  # not rendered then
            continue
        monkeypatch.setenv(f"CHURN_{setting.upper()}", value if isinstance(value, str) else json.dumps(value))
        if setting == "drift_k":
            monkeypatch.setenv("CHURN_DRIFT_N", "1000000000")
        try:
            load_settings()
        except SettingsError as error:
            values: Any = value
            for key in reversed(path.split(".")):
                values = {key: values}
            done = chart.run("template", "churn", chart.folder, "-f", "-", values=json.dumps(values))
            assert done.returncode, f"{path}: {value!r} is taken by the chart, but: {error}"


def test_the_evaluator_is_as_strict_as_helm(chart: Chart) -> None:
    """Of the test above, on some values that it depends on."""
    for path, value in (
        ("jobs.drift.driftShare", "0.5"), ("jobs.drift.driftShare", 1.5), ("jobs.drift.driftMinRows", 29),
        ("jobs.drift.driftMinRows", True), ("gate.sliceFloor", "-0.5"), ("gate.sliceFloor", 0.5), ("snapshots.labelHorizon", "0d"),
        ("jobs.retrain.candidates", []), ("jobs.retrain.candidates", ["dummy", "dummy"]), ("jobs.retrain.holdoutShare", 1),
    ):  # fmt: skip
        values: Any = value
        for key in reversed(path.split(".")):
            values = {key: values}
        done = chart.run("template", "churn", chart.folder, "-f", "-", values=json.dumps(values))
        assert (done.returncode == 0) == takes(SCHEMA_AT[path], value), f"{path}: {value!r}"
