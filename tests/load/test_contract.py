"""What /docs.json says is what the service does: schemathesis sends what the document allows, and what it does not."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from tests.bench.stage import Stage
from tests.bentos import serving_process
from tests.load.schemathesis.environment import schemathesis

pytestmark = pytest.mark.load

CASES = 10_000  # different ones, that were sent
EXAMPLES = 8_000  # made up in each mode; a third of them turn out to be there already, and are not sent
MODES = ("positive", "negative")  # what the document allows, and what it does not; each is a process
SEED = 5
KNOWN_SHARE = 0.5  # of the user ids sent are users that are in the store
EACH_FORM = 500  # predictions answered by user_id, by user_ids, and by features, at least
RUN_SECONDS = 900.0  # two minutes where nothing else runs


class Exchange(NamedTuple):
    """A request that schemathesis sent, and its answer."""

    method: str
    path: str
    headers: str
    body: bytes
    status: int | None  # None: no answer
    answer: bytes


class Outcome(NamedTuple):
    """What one run says of itself."""

    report: dict[str, Any]
    exchanges: list[Exchange]
    checks: Counter[tuple[str, str]]  # name, status


def start(mode: str, folder: Path, service: serving_process.Service, users: list[str]) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    # a copy: schemathesis leaves out the page that it has read the document from
    (folder / "openapi.json").write_bytes(service.get("/docs.json").body)
    (folder / "schemathesis.toml").write_text(
        f"[cache]\nenabled = false\n"
        f"[dictionaries.users]\nvalues = {json.dumps(users)}\n"
        f"[parameters]\n"
        f'"body.user_id" = {{ dictionary = "users", probability = {KNOWN_SHARE} }}\n'
        f'"body.user_ids[*]" = {{ dictionary = "users", probability = {KNOWN_SHARE} }}\n'
    )
    command = [
        str(schemathesis()), "--config-file", "schemathesis.toml", "--no-color", "run", "openapi.json",
        "--url", service.url, "--checks", "all", "--mode", mode, "--max-examples", str(EXAMPLES), "--seed", str(SEED),
        "--continue-on-failure", "--no-shrink", "--generation-unique-inputs", "--generation-database", "none", "--output-sanitize", "false",
        "--report", "json,ndjson", "--report-json-path", "report.json", "--report-ndjson-path", "events.ndjson",
    ]  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("SCHEMATHESIS_")}
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            command, cwd=folder, env={**inherited, "PYTHONHASHSEED": "0"}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def run(folder: Path, service: serving_process.Service, users: list[str]) -> dict[str, Outcome]:
    """Both modes at the same time."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    end = time.monotonic() + RUN_SECONDS
    try:
        for mode in MODES:
            running[mode] = start(mode, folder / mode, service, users)
        for mode, process in running.items():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(
                    f"{mode} is not done after {RUN_SECONDS:.0f} s: {(folder / mode / 'output').read_text()[-3000:]}"
                )
    finally:
        for process in running.values():
            process.kill()
            process.wait(5)
    return {mode: read(folder / mode) for mode in MODES}


def read(folder: Path) -> Outcome:
    """The reports in a folder."""
    output = (folder / "output").read_text()
    assert (folder / "report.json").exists(), output[-5000:]
    report = json.loads((folder / "report.json").read_text())
    if report["exit_code"]:
        print("\n".join(line[:1000] for line in output.splitlines()))  # a request of 1,000 users is one line
    exchanges: list[Exchange] = []
    checks: Counter[tuple[str, str]] = Counter()
    with (folder / "events.ndjson").open() as events:
        for event in map(json.loads, events):
            recorder = event.get("ScenarioFinished", {}).get("recorder", {})
            exchanges += map(exchange, recorder.get("interactions", {}).values())
            for made in recorder.get("checks", {}).values():
                checks.update((check["name"], check["status"]) for check in made)
    return Outcome(report, exchanges, checks)


def exchange(interaction: dict[str, Any]) -> Exchange:
    request, response = interaction["request"], interaction.get("response")
    return Exchange(
        method=request["method"],
        path=re.sub(r"^http://[^/]+", "", request["uri"]),
        headers=json.dumps(request["headers"]),
        body=content(request.get("body")),
        status=None if response is None else response["status_code"],
        answer=b"" if response is None else content(response.get("content")),
    )


def content(encoded: dict[str, str] | None) -> bytes:
    return base64.b64decode(encoded["$base64"]) if encoded else b""


def answers(exchanges: list[Exchange]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each prediction that was answered, with the form of its request."""
    for sent in exchanges:
        if (sent.path, sent.status) == ("/predict", 200):
            answer = json.loads(sent.answer)
            if "predictions" in answer:
                yield from (("user_ids", one) for one in answer["predictions"] if "error" not in one)
            else:
                yield ("features" if answer["user_id"] is None else "user_id"), answer


def logged(scene: Stage) -> list[tuple[str, str | None, float]]:
    with psycopg.connect(scene.database_url.replace("+psycopg", "")) as connection:
        return connection.execute("SELECT prediction_id, user_id, churn_probability FROM predictions").fetchall()


def counted(metrics: str) -> dict[int, int]:
    """Requests to /predict by status."""
    return {
        int(s): int(float(n)) for s, n in re.findall(r'^churn_requests_total\{status="(\d+)"\} (\S+)$', metrics, re.M)
    }


def test_the_service_does_what_its_document_says(scene: Stage, tmp_path: Path) -> None:
    """All checks, at least 10,000 cases: none fails, no answer is a 5xx, and each prediction answered is logged once."""
    before = {row[0] for row in logged(scene)}
    own = {**scene.environment, "CHURN_SPOOL_DIR": str(tmp_path / "spool")}
    with serving_process.start(scene.bento, own) as service:
        document = service.get("/docs.json").json()
        began = time.monotonic()
        outcomes = run(tmp_path / "schemathesis", service, scene.users[:200])
        seconds = time.monotonic() - began
        metrics = service.get("/metrics").body.decode()
        service.stop()
        log = service.log
    rows = [row for row in logged(scene) if row[0] not in before]

    exchanges = [sent for outcome in outcomes.values() for sent in outcome.exchanges]
    statuses = Counter(sent.status for sent in exchanges if sent.path == "/predict")
    different = {(sent.method, sent.path, sent.headers, sent.body) for sent in exchanges}
    answered = list(answers(exchanges))
    forms = Counter(form for form, _ in answered)
    print(
        f"seed {SEED}: {len(exchanges):,} cases in {seconds:.0f} s, {len(different):,} of them different, "
        f"{sum(n for outcome in outcomes.values() for n in outcome.checks.values()):,} checks; "
        f"of /predict by status: {', '.join(f'{status}: {n:,}' for status, n in sorted(statuses.items(), key=str))}; "
        f"{len(answered):,} predictions answered ({', '.join(f'{n:,} by {form}' for form, n in sorted(forms.items()))}), "
        f"{len(rows):,} logged"
    )

    for mode, outcome in outcomes.items():
        report = outcome.report
        assert (report["failures"], report["errors"]) == ([], []), mode
        assert (report["exit_code"], report["complete"], report["stop_reason"]) == (0, True, "completed")
        assert {status for _, status in outcome.checks} == {"success"}
        # nothing is left out silently
        assert not any(report["warnings"].values()), report["warnings"]
        assert {name for name, phase in report["phases"].items() if phase["status"] == "success"} == {
            "examples", "coverage", "fuzzing"
        }  # fmt: skip
        assert report["operations"]["tested"] == len(document["paths"])
        assert (report["test_cases"]["without_checks"], report["test_cases"]["errored"]) == (0, 0)
        assert report["test_cases"]["generated"] == len(outcome.exchanges)
    assert len(different) >= CASES
    assert min(forms[form] for form in ("user_id", "user_ids", "features")) >= EACH_FORM, forms

    # the service counted the same
    assert counted(metrics) == statuses
    assert [sent for sent in exchanges if sent.status is None or sent.status >= 500] == []
    assert "Traceback" not in log
    assert "every prediction is in the database" in log

    # and logged each answer, once
    expected = Counter((one["prediction_id"], one["user_id"], one["churn_probability"]) for _, one in answered)
    assert set(expected.values()) == {1}
    assert list((expected - Counter(rows)).elements()) == []
    assert list((Counter(rows) - expected).elements()) == []
