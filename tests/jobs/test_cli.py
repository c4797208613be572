"""The command line as people and CronJobs meet it: exit codes, one line of result, JSON, errors that help."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import cli
from jobs.cli import app
from jobs.lease import lease
from jobs.settings import Settings
from jobs.supervisor import as_environment
from tests.conftest import REPOSITORY
from tests.jobs.conftest import Trained, settings_for

Copy = Callable[..., Settings]


@pytest.fixture
def churn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process with a home: exit code, standard output, standard error."""

    def run(settings: Settings, *arguments: str) -> tuple[int, str, str]:
        for variable, value in as_environment(settings).items():
            monkeypatch.setenv(variable, value)
        result = CliRunner().invoke(app, list(arguments))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


Churn = Callable[..., tuple[int, str, str]]


def test_importing_the_command_line_imports_no_job() -> None:
    """Nor settings, nor any library of weight: `--help` and completion answer at once."""
    code = "import sys, jobs.cli; print(sorted(m for m in sys.modules if m.split('.')[0] in sys.argv[1:]))"
    heavy = ["pydantic", "sqlalchemy", "pandas", "numpy", "mlflow", "feast", "bentoml", "evidently", "sklearn", "rich"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command_of_the_design() -> None:
    output = CliRunner().invoke(app, ["--help"]).stdout
    commands = set(re.findall(r"^  ([a-z]+) ", output, re.MULTILINE))
    assert commands >= {
        "simulate", "ingest", "materialize", "drift", "retrain", "promote", "score", "status", "approve", "rollback",
        "pin", "unpin", "demo", "serve", "history", "verify", "settings",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["retrain", "--as-of", "2024-02-30"], "expected one such as 2024-02-29"),
        (["ingest"], "Missing argument"),
        (["ingest", "x"], "Missing option '--as-of'"),
        (["promot"], "No such command"),
        (["simulate", "x", "--users", "0"], "greater than or equal to 1"),
        (["approve", "latest"], "valid integer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_exit_code_2(churn: Churn, tmp_path: Path, arguments: list[str], says: str) -> None:
    code, _, error = churn(settings_for(tmp_path), *arguments)
    assert code == 2
    assert says in error


def test_wrong_setting_is_exit_code_2(churn: Churn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path)
    environment = {**as_environment(settings), "CHURN_DRIFT_SHARE": "half"}
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "promote"], env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("churn: CHURN_DRIFT_SHARE is 'half'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["materialize", "retrain"])
def test_a_job_that_could_not_do_its_work_fails_with_one_sentence(churn: Churn, tmp_path: Path, command: str) -> None:
    code, output, error = churn(settings_for(tmp_path), command, "--as-of", "2024-03-01")
    assert (code, output) == (1, "")
    assert "no snapshot on or before 2024-03-01 was ingested; `churn ingest DIR --as-of DATE` takes one" in error
    assert "Traceback" not in error


def test_jobs_without_anything_to_do_succeed(churn: Churn, tmp_path: Path) -> None:
    """Before the first model, drift, promote and score have nothing to do, and say so."""
    settings = settings_for(tmp_path)
    for command, says in (
        ("promote", "no model yet"),
        ("drift", "no production model"),
        ("score", "no model was promoted"),
    ):
        code, output, error = churn(settings, command)
        assert code == 0, error
        assert says in output


def test_refused_snapshot_is_reported_and_exit_code_1(churn: Churn, tmp_path: Path, simulated: Path) -> None:
    folder = tmp_path / "delivery"
    folder.mkdir()
    for file in (simulated / "2024-01-31").iterdir():
        text = file.read_text()
        (folder / file.name).write_text(text.replace("DSL", "Satellite", 2) if file.stem == "subscriptions" else text)
    code, _, error = churn(settings_for(tmp_path / "home"), "ingest", str(folder), "--as-of", "2024-01-31")
    assert code == 1
    assert "subscriptions" in error and "net_service" in error and "Satellite" in error


def test_ingest_warns_once_and_counts_rows_by_table(tmp_path: Path, simulated: Path) -> None:
    delivery = Path(shutil.copytree(simulated / "2024-01-31", tmp_path / "delivery"))
    (delivery / "notes.csv").write_text("a note\n")
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "ingest", delivery, "--as-of", "2024-01-31"],
                          env={**os.environ, "CHURN_HOME": str(tmp_path / "home")},
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("notes.csv: ignored") == 1
    assert " rows=users:3000,subscriptions:3000," in done.stdout


def test_results_are_json_for_machines(churn: Churn, promotable: Copy) -> None:
    settings = promotable()
    code, output, _ = churn(settings, "promote", "--dry-run", "--json")
    assert code == 0
    assert json.loads(output)["result"] == "dry_run"
    code, output, _ = churn(settings, "history", "--json")
    assert [row["result"] for row in json.loads(output)] == ["promoted"]


def test_status_has_the_keys_that_machines_rely_on(churn: Churn, promotable: Copy) -> None:
    """Exit code 1, because nothing serves, and the remedy is named."""
    settings = promotable()
    code, output, _ = churn(settings, "status", "--json")
    found = json.loads(output)
    assert code == 1
    assert (found["production"], found["candidate"], found["pinned"]) == (1, 2, None)
    assert found["served_tag"].startswith("churn:v1-")
    assert set(found["last_promotion"]) >= {"result", "reason", "from", "to"}
    assert found["predictions"] == {"rows": 0}
    assert {"previous_tag", "features_as_of", "drift"} <= set(found)
    assert any("`churn serve`" in problem for problem in found["problems"])
    code, output, _ = churn(settings, "status")
    assert "production 1" in output and "candidate 2" in output


def test_a_folder_without_a_home_is_named(churn: Churn, tmp_path: Path) -> None:
    """Who is in another folder than yesterday sees it."""
    settings = settings_for(tmp_path / "elsewhere")
    assert churn(settings, "history")[:2] == (0, "nothing was promoted yet\n")
    assert f"home            {tmp_path / 'elsewhere'}\n" in churn(settings, "status")[1]


def test_a_log_level_that_is_none_is_a_wrong_setting(
    churn: Churn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHURN_LOG_LEVEL", "loud")
    code, _, said = churn(settings_for(tmp_path), "history")
    assert (code, said) == (2, "churn: CHURN_LOG_LEVEL is 'LOUD'; expected DEBUG, INFO, WARNING or ERROR\n")


def test_what_a_database_said_is_one_sentence(churn: Churn, promotable: Copy) -> None:
    settings = promotable()
    with closing(sqlite3.connect(settings.home / "churn.db")) as connection:
        connection.execute("CREATE TRIGGER no BEFORE INSERT ON pins BEGIN SELECT RAISE(ABORT, 'no pins today'); END")
        connection.commit()
    code, _, said = churn(settings, "pin", "--why", "a secret")
    assert code == 1
    assert said.splitlines()[-1] == f"churn: the database sqlite:///{settings.home}/churn.db: no pins today"
    assert "a secret" not in said


def test_status_of_an_empty_home(churn: Churn, tmp_path: Path) -> None:
    code, output, _ = churn(settings_for(tmp_path), "status")
    assert code == 1
    assert "`churn materialize` fills the store" in output


def test_settings_are_listed_with_their_meaning(churn: Churn, tmp_path: Path) -> None:
    code, output, _ = churn(settings_for(tmp_path), "settings")
    assert code == 0
    assert "CHURN_DRIFT_SHARE" in output and "share of feature columns that is dataset drift" in output
    assert all(field.description for field in Settings.model_fields.values())


def test_settings_are_shown_as_they_can_be_given(churn: Churn, tmp_path: Path) -> None:
    """What is not set is shown as nothing, a secret as stars."""
    settings = settings_for(tmp_path, promotion_soak="90s", serve_as_of="2024-02-29", probe_token="x" * 20)
    code, output, _ = churn(settings, "settings")
    assert code == 0
    shown = {}
    for line in output.splitlines():
        name, rest = line.split(" ", 1)
        meaning = Settings.model_fields[name.removeprefix("CHURN_").lower()].description
        shown[name] = rest.removesuffix(f" {meaning}").strip()
    unset = dict.fromkeys((f"CHURN_{name.upper()}" for name in Settings.model_fields), "")
    assert shown == {**unset, **as_environment(settings), "CHURN_PROBE_TOKEN": "**********"}
    assert (shown["CHURN_LABEL_HORIZON"], shown["CHURN_CANDIDATES"]) == ("30d", '["logistic_regression"]')


def test_a_reader_that_has_enough_is_told_nothing(tmp_path: Path) -> None:
    """`churn settings | head -1` ends as other programs do on a closed pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run([sys.executable, "-m", "jobs.cli", "settings"], stdout=pipe, stderr=subprocess.PIPE,
                              env={**os.environ, "CHURN_HOME": str(tmp_path)}, text=True, timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


def test_a_server_that_hangs_up_is_a_failure(tmp_path: Path) -> None:
    """It is the same error as that of a reader who has gone."""
    script = (
        "import sys\n"
        "from jobs import cli, promote\n"
        "def hang_up(*_, **__):\n"
        "    raise BrokenPipeError(32, 'Broken pipe')\n"
        "promote.promote = hang_up\n"
        "sys.argv = ['churn', 'promote']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "CHURN_HOME": str(tmp_path)},
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "churn: [Errno 32] Broken pipe\n")


def test_who_asks_is_known_without_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """In cron, or after sudo; in a container, where users often have no name, it is the number."""
    for variable in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    assert cli._user() == pwd.getpwuid(os.getuid()).pw_name

    def nameless(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nameless)
    assert cli._user() == f"uid {os.getuid()}"


@pytest.mark.parametrize("as_json", [False, True], ids=["line", "json"])
def test_drift_says_what_it_found_and_what_retrain_answered(churn: Churn, promotable: Copy, as_json: bool) -> None:
    code, output, error = churn(promotable(), "drift", "--as-of", "2024-03-31", *["--json"] * as_json)
    assert code == 0, error
    if as_json:
        found = json.loads(output)
        assert (found["started"]["result"], found["started"]["version"]) == ("unchanged", 2)
        assert found["realised_auc"] == found["realised"]["holdout"]["auc"]
    else:
        assert re.search(r" realised_auc=0\.\d+ decision=retrain ", output)
        assert re.search(r' reason="rebuffer_events_7d drifted \([0-9.]+ ≥ 0\.1\): ', output)
        assert ' started="unchanged: version 2 ' in output


def test_history_says_which_clock_it_means(churn: Churn, promotable: Copy) -> None:
    assert re.search(r" \d\d:\d\d:\d\d UTC  promote ", churn(promotable(), "history")[1])


def test_a_rollback_that_moves_nothing_says_so(churn: Churn, promotable: Copy, trained: Trained) -> None:
    settings = promotable()
    code, output, _ = churn(settings, "rollback", "--to", "1", "--why", "doubts")
    assert code == 0
    assert f'reason="version 1 is served already; pinned to {trained.first_tag}: doubts"' in output
    code, _, error = churn(settings, "rollback", "--to", "3")
    assert code == 1
    assert "no bento of version 3 is stored; there are 1, 2; `churn approve 3`, then `churn promote`, " in error


def test_the_alias_is_moved_by_the_line_in_readme(churn: Churn, promotable: Copy, trained: Trained) -> None:
    """Where MLflow is a file, and no page of it runs; `churn promote` follows."""
    settings = promotable()
    (settings.home.parent / ".churn").symlink_to(settings.home)
    readme = (REPOSITORY / "README.md").read_text()
    (line,) = re.findall(r"^    \.venv/bin/python (-c .*_model_alias.*)$", readme, re.MULTILINE)
    subprocess.run([sys.executable, *shlex.split(line)], cwd=settings.home.parent, check=True, timeout=120)
    code, output, error = churn(settings, "promote")
    assert code == 0, error
    assert f"served_tag={trained.second_tag}" in output


def test_approve_rollback_and_unpin(churn: Churn, promotable: Copy) -> None:
    settings = promotable(promotion_mode="manual")
    assert "waits for `churn approve 2`" in churn(settings, "promote")[1]
    assert churn(settings, "approve", "2", "--why", "looks right", "--by", "ada")[0] == 0
    assert "result=promoted" in churn(settings, "promote")[1]
    code, output, _ = churn(settings, "rollback", "--why", "doubts", "--by", "ada")
    assert code == 0 and "result=rolled_back" in output
    assert "unpinned churn:v1-" in churn(settings, "unpin")[1]
    assert "nothing was pinned" in churn(settings, "unpin")[1]
    assert churn(settings, "approve", "9")[0] == 1


def test_score_writes_the_table_and_the_call_list(churn: Churn, promotable: Copy) -> None:
    settings = promotable()
    code, output, error = churn(settings, "score", "--json")
    assert code == 0, error
    found = json.loads(output)
    assert (found["users"], found["snapshot"]) == (3000, "2024-02-29")
    lines = Path(found["call_list"]).read_text().splitlines()
    assert len(lines) == 301, "a header and the tenth most worth a call"
    probabilities = [float(line.split(",")[1]) for line in lines[1:]]
    assert probabilities == sorted(probabilities, reverse=True)
    churn(settings, "score")
    import sqlalchemy as sa

    from jobs.database import connect, scores

    with connect(settings.database).connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(scores)).scalar_one() == 3000


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    makefile = (REPOSITORY / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    assert [name for name in phony if f"make {name} " not in listed] == []


def test_sigterm_is_an_interruption_that_gives_its_lease_back(tmp_path: Path) -> None:
    """A pod that is deleted: process 1 of a container dies of no signal that it does not handle."""
    script = (
        "import sys, time\n"
        "from jobs import cli, retrain\n"
        "def train(*_, **__):\n"
        "    print('training', flush=True)\n"
        "    time.sleep(60)\n"
        "retrain._retrain = train\n"
        "sys.argv = ['churn', 'retrain']\n"
        "cli.main()\n"
    )
    environment = {**os.environ, "CHURN_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "training\n"
        process.terminate()
        _, said = process.communicate(timeout=30)

    assert (process.returncode, said.splitlines()[-1]) == (
        130,
        "churn: interrupted; the next run finishes or undoes what was begun",
    )
    with lease(settings_for(tmp_path), "retrain"):
        pass
