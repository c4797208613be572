"""The command line: reads clock and environment once, calls one job, prints what came of it.

Importing this must stay quick, because `churn promote` runs every minute: jobs are imported where they are
called. Exit code 0: done, also when there was nothing to do; 1: the job failed; 2: wrong use or settings;
130: interrupted; 141: nobody reads what it prints any more.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from jobs.settings import Settings

# rich_markup_mode: importing rich would double the time of --help
app = typer.Typer(
    name="churn",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Keep a churn model alive: data, features, training, serving, promotion.",
)

log = logging.getLogger("jobs")


def _as_of(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no date; expected one such as 2024-02-29") from None
    from jobs.snapshots import instant

    return instant(day)


AsOf = Annotated[
    datetime | None,
    typer.Option(
        "--as-of",
        parser=_as_of,
        metavar="DATE",
        help="Reason as of the end of that day, UTC. Default: CHURN_AS_OF, or now.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]
By = Annotated[str, typer.Option("--by", help="Who asks; recorded.")]


def _user() -> str:
    try:
        return os.environ.get("USER") or getpass.getuser()
    except (KeyError, OSError):  # a container's user often has a number and no name
        return f"uid {os.getuid()}"


USER = _user()


@contextmanager
def _job(as_json: bool) -> Iterator[Settings]:
    """Settings and logging for one job; an error the job raises ends as one line on standard error and exit code 1."""
    level = os.environ.get("CHURN_LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        typer.echo(f"churn: CHURN_LOG_LEVEL is {level!r}; expected DEBUG, INFO, WARNING or ERROR", err=True)
        raise typer.Exit(2)
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s" if not sys.stderr.isatty() else "%(message)s",
    )
    for noisy in ("alembic", "feast", "httpx", "mlflow", "matplotlib", "ibis", "skl2onnx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not sys.warnoptions:  # the libraries' warnings about each other; python -W shows them
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").setLevel(logging.ERROR)
    from jobs.settings import SettingsError, load_settings

    try:
        settings = load_settings()
    except SettingsError as error:
        typer.echo(f"churn: {error}", err=True)
        raise typer.Exit(2) from None
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield settings
    except KeyboardInterrupt:
        typer.echo("churn: interrupted; the next run finishes or undoes what was begun", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if isinstance(error, typer.Exit):
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            raise typer.Exit(128 + signal.SIGPIPE) from None
        log.debug("the job failed", exc_info=True)
        if level == "DEBUG":
            raise
        typer.echo(f"churn: {_said(error, settings) or type(error).__name__}", err=True)
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _said(error: Exception, settings: Settings) -> str:
    """Its sentence; of SQLAlchemy's pages only what the database said, which names no statement and no values."""
    original = getattr(error, "orig", None)
    if original is None:
        return str(error)
    from jobs.database import redact

    return f"the database {redact(settings.database)}: {' '.join(str(original).split())}"


def _nobody_reads() -> bool:
    """Whether the broken pipe is standard output, as in `churn history | head -1`, and no server's connection."""
    pipe = select.poll()
    pipe.register(sys.stdout, 0)
    return bool(pipe.poll(0))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM is Ctrl-C: leases are given back. In a container, as process 1, it would otherwise do nothing at all."""
    raise KeyboardInterrupt


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in asdict(value).items()}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value) if isinstance(value, Path) else value


def _print(result: Any, as_json: bool, *, keys: tuple[str, ...] = ()) -> None:
    """The result as JSON, or one line of `key=value`, as the last line of a job."""
    plain = _plain(result)
    if as_json:
        typer.echo(json.dumps(plain, indent=1))
        return
    shown = {key: plain[key] for key in keys or plain if plain.get(key) not in (None, [], {}, "")}
    typer.echo(" ".join(f"{key}={_word(value)}" for key, value in shown.items()))


def _word(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key}:{item}" for key, item in value.items()]
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text else text


def _now() -> datetime:
    return datetime.now(UTC)


def _today(settings: Settings) -> datetime:
    """The instant a job reasons about if none is given: now, or the end of the day that the settings take for today."""
    if settings.as_of is None:
        return _now()
    from jobs.snapshots import instant

    return instant(settings.as_of)


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(help="Where to write; one sub-folder a snapshot.")],
    users: Annotated[int, typer.Option(min=1)] = 5000,
    months: Annotated[int, typer.Option(min=1)] = 2,
    start: Annotated[str, typer.Option(help="Day of the first snapshot.")] = "2024-01-31",
    seed: int = 0,
    feature_drift_month: Annotated[
        int | None, typer.Option(help="From this month (0 is the first) playback stalls rise.")
    ] = None,
    concept_drift_month: Annotated[
        int | None, typer.Option(help="From this month users leave for other reasons.")
    ] = None,
    late_share: Annotated[float, typer.Option(min=0, max=1, help="Share of usage rows that come a month late.")] = 0.0,
    missing_share: Annotated[float, typer.Option(min=0, max=1, help="Share of feature cells left empty.")] = 0.0,
    malformed: Annotated[int, typer.Option(min=0, help="Cells made wrong, so that ingest refuses.")] = 0,
    file_format: Annotated[Literal["csv", "parquet"], typer.Option("--format")] = "csv",
    labels: Annotated[bool, typer.Option(help="Write labels.")] = True,
) -> None:
    """Write snapshots of made-up users: same seed, same bytes."""
    with _job(False):
        from jobs.simulate import simulate as run

        first = _as_of(start)
        assert first is not None  # noqa: S101  start has a default
        for path in run(
            folder,
            users=users,
            months=months,
            start=first.date(),
            seed=seed,
            feature_drift_month=feature_drift_month,
            concept_drift_month=concept_drift_month,
            late_share=late_share,
            missing_share=missing_share,
            malformed=malformed,
            format=file_format,
            labels=labels,
        ):
            typer.echo(path)


@app.command()
def ingest(
    folder: Annotated[Path, typer.Argument(help="Folder with one CSV or Parquet file a table.")],
    as_of: Annotated[datetime, typer.Option("--as-of", parser=_as_of, metavar="DATE", help="The snapshot's day.")],
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Check a snapshot and take it in; a bad one is refused with a report, and nothing changes."""
    with _job(json_) as settings:
        from jobs.ingest import ingest as run

        result = run(settings, folder, as_of=as_of.date(), now=_now(), dry_run=dry_run)
        _print(result.as_dict(), json_, keys=("day", "result", "rows", "fingerprint"))


@app.command()
def receive() -> None:
    """Take day folders as a .tar.gz from standard input into the folder where snapshots arrive: `kubectl churn put`."""
    with _job(False) as settings:
        from jobs.sources import receive as run

        if settings.snapshots_source is None or "://" in settings.snapshots_source:
            raise ValueError(
                "snapshots are not taken from a folder; set snapshots.source (CHURN_SNAPSHOTS_SOURCE) to one, "
                "such as /data/incoming"
            )
        days = run(sys.stdin.buffer, Path(settings.snapshots_source))
        typer.echo(f"received {', '.join(days)} into {settings.snapshots_source}; `materialize` ingests them")


@app.command()
def materialize(as_of: AsOf = None, dry_run: DryRun = False, json_: Json = False) -> None:
    """Ingest what arrived in snapshots_source, then bring features into the online store."""
    with _job(json_) as settings:
        from jobs.materialize import materialize as run

        refused: Exception | None = None
        if settings.snapshots_source is not None and not dry_run:
            from jobs.ingest import DeliveriesRefused, SimulatedData, ingest_source
            from jobs.sources import SourceError

            try:
                ingest_source(settings, now=_now())
            except (DeliveriesRefused, SimulatedData, SourceError) as error:
                refused = error  # what is in goes online, then this fails
        _print(run(settings, as_of=as_of or _today(settings), dry_run=dry_run), json_)
        if refused is not None:
            raise refused


@app.command()
def drift(
    as_of: AsOf = None,
    dry_run: DryRun = False,
    json_: Json = False,
    force: Annotated[bool, typer.Option("--force", help="Ignore cooldown, budget and failed candidates.")] = False,
) -> None:
    """Compare users with those the production model learned from; start retraining if need be."""
    with _job(json_) as settings:
        from jobs.drift import check_drift

        at = as_of or _today(settings)

        def start(reason: str) -> object:
            if settings.deployment:
                from jobs.cluster import start_job

                dated = ["--as-of", f"{as_of:%Y-%m-%d}"] if as_of else []
                return start_job(settings, "retrain", ["--wanted-by", "drift", "--reason", reason, *dated], why=reason)
            from jobs.retrain import retrain

            return retrain(settings, as_of=at, wanted_by="drift", reason=reason)

        result = check_drift(
            settings,
            as_of=at,
            now=_now(),
            dry_run=dry_run,
            force=force,
            start_retrain=start,
        )
        if not dry_run:
            from jobs.retention import prune

            prune(settings, now=_now())
        found = {**result.as_json(), "started": _plain(result.started)}
        if not json_ and isinstance(found["started"], dict):  # retrain's answer; on a cluster the Job's name
            found["started"] = "{result}: {reason}".format_map(found["started"])
        _print(
            found,
            json_,
            keys=(
                "as_of",
                "snapshot",
                "model_version",
                "share",
                "drifted_columns",
                "realised_auc",
                "decision",
                "reason",
                "started",
                "run_id",
            ),
        )


@app.command()
def retrain(
    as_of: AsOf = None,
    dry_run: DryRun = False,
    json_: Json = False,
    wanted_by: Annotated[str, typer.Option(help="Who wants it; recorded.")] = "person",
    reason: Annotated[str, typer.Option(help="Why; recorded.")] = "asked for by hand",
) -> None:
    """Train a candidate on the newest snapshot with known labels, judge it, register it."""
    with _job(json_) as settings:
        from jobs.retrain import retrain as run

        result = run(settings, as_of=as_of or _today(settings), wanted_by=wanted_by, reason=reason, dry_run=dry_run)
        _print(result, json_, keys=("result", "version", "gate", "reason", "algorithm", "trained_on", "known_at"))


@app.command()
def promote(dry_run: DryRun = False, json_: Json = False) -> None:
    """Bring what is served into line with the model registry; safe to run at any time."""
    with _job(json_) as settings:
        from jobs.promote import promote as run

        _print(run(settings, dry_run=dry_run), json_)


@app.command()
def score(as_of: AsOf = None, dry_run: DryRun = False, json_: Json = False) -> None:
    """Score every user into table `scores`, and write a CSV of those most worth a call."""
    with _job(json_) as settings:
        from jobs.score import score as run

        _print(run(settings, as_of=as_of or _today(settings), dry_run=dry_run), json_)


@app.command()
def bootstrap(as_of: AsOf = None, json_: Json = False) -> None:
    """Bring a new release up: tables, data, features, a first model, its promotion; again, what is left of it."""
    with _job(json_) as settings:
        from jobs.bootstrap import bootstrap as run

        _print(run(settings, as_of=as_of or _today(settings), now=_now()), json_)


@app.command()
def check(json_: Json = False) -> None:
    """Ask the service for a golden row of what it serves; exit code 1 if the score is not the stored one."""
    with _job(json_) as settings:
        from jobs.check import check as run

        _print(run(settings), json_)


@app.command()
def approve(version: int, reason: Annotated[str, typer.Option("--reason", "--why")] = "", by: By = USER) -> None:
    """Let a version that passed the gate be promoted; the next `churn promote` does it."""
    with _job(False) as settings:
        from jobs.pin import approve as run

        run(settings, version, by=by, reason=reason)
        typer.echo(f"version {version} is approved by {by}")


@app.command()
def rollback(
    to: Annotated[
        str | None,
        typer.Option(metavar="N", help="Model version, or a bento's tag; default: the one served before."),
    ] = None,
    reason: Annotated[str, typer.Option("--reason", "--why")] = "asked for by hand",
    by: By = USER,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Serve an earlier version now, and stay with it until `churn unpin`."""
    with _job(json_) as settings:
        from jobs.pin import rollback as run

        _print(run(settings, to=to, reason=reason, by=by, dry_run=dry_run), json_)


@app.command()
def pin(
    reason: Annotated[str, typer.Option("--reason", "--why")] = "asked for by hand",
    by: By = USER,
    json_: Json = False,
) -> None:
    """Stay with what is served now, whatever passes the gate."""
    with _job(json_) as settings:
        from jobs.pin import pin as run

        _print(run(settings, reason=reason, by=by), json_)


@app.command()
def unpin() -> None:
    """End the pin."""
    with _job(False) as settings:
        from jobs.pin import unpin as run

        found = run(settings)
        typer.echo(f"unpinned {found.bento_tag}" if found else "nothing was pinned")


@app.command()
def adopt(by: By = USER) -> None:
    """Go on from what serves, after the database was restored from an older backup."""
    with _job(False) as settings:
        from jobs.pin import adopt as run

        typer.echo(f"adopted {run(settings, by=by)}")


@app.command()
def serve() -> None:
    """Serve what promotion wants on this machine, in the foreground, until Ctrl-C."""
    with _job(False) as settings:
        from jobs.supervisor import serve as run

        run(settings)


@app.command()
def status(json_: Json = False) -> None:
    """What serves now, what is being tried, and what each job found last. Exit code 1 if something is wrong."""
    with _job(json_) as settings:
        from jobs.status import status as look

        found = look(settings)
        if json_:
            typer.echo(json.dumps(found, indent=1))
        else:
            from jobs.status import lines

            for key, value in lines(found):
                typer.echo(f"{key:<15} {value}")
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def history(limit: Annotated[int, typer.Option(min=1)] = 20, json_: Json = False) -> None:
    """Promotions and rollbacks, newest first: when, what, by whom, why."""
    with _job(json_) as settings:
        from jobs.database import connect
        from jobs.history import History

        rows = History(connect(settings.database)).rows(limit)
        if json_:
            typer.echo(json.dumps(_plain(rows), indent=1))
            return
        if not rows:
            typer.echo("nothing was promoted yet")
        for row in rows:
            versions = f"{row.from_version or '-'} -> {row.to_version}"
            what = f"{row.id:>4}  {row.opened_at:%Y-%m-%d %H:%M:%S} UTC  {row.action:<8} {versions:<9}"
            typer.echo(f"{what} {row.result or 'open':<12} {row.by}: {row.reason}")


@app.command()
def explain(
    request: Annotated[str, typer.Argument(help="A request_id or prediction_id.")], json_: Json = False
) -> None:
    """Where a prediction came from: bento, promotion, training, gate, the features and their age."""
    with _job(json_) as settings:
        from jobs.explain import explain as run
        from jobs.explain import lines

        found = run(settings, request)
        if json_:
            typer.echo(json.dumps(_plain(found), indent=1))
            return
        for number, explanation in enumerate(found):
            if number:
                typer.echo()
            for key, value in lines(explanation):
                typer.echo(f"{key:<24} {value}")


@app.command()
def verify(
    tag: Annotated[
        str, typer.Argument(help="A stored bento, such as churn:v2-0a1b2c3d; `churn status` names the served one.")
    ],
    json_: Json = False,
) -> None:
    """Recompute what stands behind a bento, from archive to training data. Exit code 1 if anything changed."""
    with _job(json_) as settings:
        from jobs.verify import UnknownTag, lines
        from jobs.verify import verify as run

        try:
            found = run(settings, tag)
        except UnknownTag as error:
            typer.echo(f"churn: {error}", err=True)
            raise typer.Exit(2) from None
        if json_:
            _print(found, True)
        else:
            typer.echo("\n".join(lines(found)))
    if found.result != "ok":
        raise typer.Exit(1)


@app.command()
def settings(json_: Json = False) -> None:
    """Every setting with its variable, value and meaning."""
    with _job(json_) as found:
        from pydantic import SecretStr

        from jobs.settings import Settings
        from jobs.supervisor import as_environment

        if json_:
            typer.echo(re.sub(r"//([^/@\"]*:)?[^/@\"]*@", r"//***@", found.model_dump_json(indent=1)))
            return
        secret = {f"CHURN_{name.upper()}": str(value) for name, value in found if isinstance(value, SecretStr)}
        given = {**as_environment(found), **secret}
        for name, field in Settings.model_fields.items():
            value = given.get(f"CHURN_{name.upper()}", "")
            value = re.sub(r"//([^/@]*:)?[^/@]*@", r"//***@", value)  # no password on a screen
            value = re.sub(r"(https?://[^?]*)\?.*", r"\1?***", value)  # nor a signature
            typer.echo(f"CHURN_{name.upper():<24} {value:<24} {field.description}")


@app.command()
def demo(
    snapshots: Annotated[
        Path | None, typer.Option(help="Folder with two monthly snapshots; default: simulated ones.")
    ] = None,
    home: Annotated[
        Path, typer.Option(help="Folder for everything the demo makes; an older demo in it is replaced.")
    ] = Path(".churn"),
    seed: int = 0,
    keep: Annotated[bool, typer.Option(help="Leave the API and MLflow's page running at the end.")] = True,
) -> None:
    """The whole loop in minutes: train, serve, drift, retrain, promote, roll back, with a clock it moves itself."""
    with _job(False):
        from jobs.demo import run

        logging.getLogger("jobs").setLevel(logging.ERROR)  # the story says it
        run(home, snapshots=snapshots, seed=seed, keep=keep)


@app.command()
def stop() -> None:
    """Stop `churn serve` and the MLflow page that a demo left running."""
    with _job(False) as settings:
        from jobs.background import stop as run

        typer.echo("\n".join(f"stopped {what}" for what in run(settings)) or "nothing was running")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
