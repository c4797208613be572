"""The whole loop on one machine, told as a story, with a clock that the demo moves itself.

The same jobs that run as CronJobs are called here in one process, on real stores below one folder; `churn serve`
runs beside them, and a client asks throughout. Every chapter says what should have come of it and the demo fails
if it did not, so that a demo that ends well is a test of the loop.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
from rich.console import Console
from rich.table import Table as RichTable

from feature_repo.columns import POPULATION
from jobs.lease import Held, file_lease
from jobs.settings import Settings, load_settings
from jobs.snapshots import Snapshots, as_day, instant

MARK = ".churn-demo"  # a folder without it is not ours to replace
USERS = 5000
FIRST = date(2024, 1, 31)

T = TypeVar("T")


class StoryFailed(AssertionError):
    """A chapter did not end as it should; says what was expected and what was found."""


@dataclass
class Client:
    """Asks /predict for one user after another, on a kept connection and on new ones, and counts what comes back."""

    url: str
    users: Sequence[str]
    answers: Counter[int] = field(default_factory=Counter)  # by model version
    order: list[int] = field(default_factory=list)  # model versions as they changed
    failures: list[str] = field(default_factory=list)
    longest: float = 0.0  # seconds
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Client:
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=10) as kept:
            number = 0
            while not self._stop.wait(0.02):
                user = self.users[number % len(self.users)]
                number += 1
                began = time.monotonic()
                try:
                    if number % 4:
                        answer = kept.post("/predict", json={"user_id": user})
                    else:
                        answer = httpx.post(f"{self.url}/predict", json={"user_id": user}, timeout=10)
                except httpx.HTTPError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                self.longest = max(self.longest, time.monotonic() - began)
                if answer.status_code != 200:
                    self.failures.append(f"{answer.status_code} {answer.text[:200]}")
                    continue
                version = int(answer.json()["model_version"])
                self.answers[version] += 1
                if self.order[-1:] != [version]:
                    self.order.append(version)


class Story:
    """The chapters' common ground: settings, clock, console, and the facts that the summary lists."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.clock = instant(FIRST)
        self.url = ""
        self.facts: dict[str, Any] = {"versions_served": [], "client": {"sent": 0, "failed": 0}}

    def at(self, day: date, title: str) -> None:
        """Move the clock."""
        self.clock = instant(day)
        self.console.print(f"\n[bold]{day}[/]  {title}")

    @contextmanager
    def step(self, what: str) -> Iterator[Callable[[str], None]]:
        """Show what is going on, then what came of it and how long it took."""
        began = time.monotonic()
        said: list[str] = []
        with self.console.status(what):
            yield said.append
        outcome = f": {said[-1]}" if said else ""
        self.console.print(
            f"  {what}{outcome} [dim]({time.monotonic() - began:.1f} s)[/]", highlight=False, soft_wrap=True
        )

    def expect(self, statement: bool, expected: str, found: object) -> None:
        """Fail the demo, with what was expected and what was found."""
        if not statement:
            raise StoryFailed(f"as of {self.clock:%Y-%m-%d}: expected {expected}; found {found}")

    def asked(self, client: Client) -> None:
        """Add what a client saw."""
        counted = self.facts["client"]
        counted["sent"] += sum(client.answers.values()) + len(client.failures)
        counted["failed"] += len(client.failures)
        served = self.facts["versions_served"]
        for version in (client.order[:1] + client.order[-1:]) if client.order else []:
            if served[-1:] != [version]:
                served.append(version)

    def status(self, **expected: Any) -> dict[str, Any]:
        """`churn status`, which must agree with these entries."""
        from jobs.status import status

        found = status(self.settings)
        for key, value in expected.items():
            self.expect(found[key] == value, f"status {key}={value}", found[key])
        return found


def run(home: Path, *, snapshots: Path | None, seed: int, keep: bool = True) -> dict[str, Any]:
    """Tell the story below `home`; returns (and writes to demo.json) what was seen. Raises StoryFailed.

    With `keep` the service and MLflow's page stay running in the background when it has ended well.
    """
    from jobs.background import free_port, start_mlflow_page, stop, wait_for
    from jobs.supervisor import start_supervisor

    console, home = Console(), home.resolve()
    with _alone(home), _ended_by_signals():
        if snapshots is not None:
            _folders(snapshots, home)
        _clear(home, console)
        settings = load_settings(home=home, serve_port=free_port(3000), seed=seed, drift_n=1, drift_k=1)
        story = Story(settings, console)
        began = time.monotonic()
        first, second = _deliveries(story, snapshots, seed)
        story.settings = settings.model_copy(update={"serve_as_of": second[0] + timedelta(days=1)})
        try:
            story.url = start_supervisor(story.settings).url
            _first_model(story, first, second)
            page = start_mlflow_page(story.settings) if keep else None
            _drift_without_labels(story, second[0])
            _labels_arrive(story, first[0], second)
            _worse_model_is_refused(story)
            _roll_back(story)
            _score(story)
            _count_predictions(story)
            story.facts["seconds"] = round(time.monotonic() - began)
            (home / "demo.json").write_text(json.dumps(story.facts, indent=1))
            _summary(story)
            if page is None:
                stop(story.settings)
            else:
                slow = "" if wait_for(page) else " (still starting)"
                console.print(
                    f"Still running:\n  API           {story.url}/predict\n  MLflow        {page}{slow}\n"
                    "  stop it with  make stop", highlight=False, soft_wrap=True,
                )  # fmt: skip
        except BaseException:
            stop(story.settings)
            raise
    return story.facts


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One demo at a time in a folder: the next would pull it from under the first."""
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file_lease(home.parent / f".{home.name.lstrip('.')}.demo.lock"):
            yield
    except Held as held:
        raise RuntimeError(f"another demo works in {home} ({held}); name another folder with --home") from None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end it as Ctrl-C does, so that nothing is left running."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clear(home: Path, console: Console) -> None:
    """An empty folder; an earlier demo in it is stopped and removed, anything else is left alone."""
    from jobs.background import stop

    if home.exists():
        if not (home / MARK).exists() and any(home.iterdir()):
            raise FileExistsError(f"{home} holds other things than a demo; name another folder with --home")
        for stopped in stop(load_settings(home=home)):
            console.print(f"stopped {stopped} of an earlier demo", highlight=False)
        shutil.rmtree(home)
    home.mkdir(parents=True)
    (home / MARK).touch()


def _folders(source: Path, home: Path) -> tuple[Path, Path]:
    """The first two sub-folders, which must be there before an earlier demo is removed, and must survive that."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder; expected one with a sub-folder for each monthly snapshot")
    if source.resolve().is_relative_to(home):
        raise ValueError(f"{source} lies in {home}, which a demo empties; copy it elsewhere first")
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    if len(folders) < 2:
        raise FileNotFoundError(f"{source} has {len(folders)} sub-folders; expected two monthly snapshots")
    return folders[0], folders[1]


def _deliveries(story: Story, source: Path | None, seed: int) -> tuple[tuple[date, Path], tuple[date, Path]]:
    """The folders of the first two snapshots with their days: those given, or simulated ones."""
    if source is None:
        from jobs.simulate import simulate

        with story.step(f"simulate two months of {USERS} users, seed {seed}"):
            first, second = simulate(
                story.settings.home / "simulated", users=USERS, months=2, start=FIRST, seed=seed,
                feature_drift_month=1, concept_drift_month=1,
            )  # fmt: skip
    else:
        first, second = _folders(source, story.settings.home)
    days = as_day(first.name), as_day(second.name)
    return (days[0] or FIRST, first), (days[1] or date(2024, 2, 29), second)


def _ingest(story: Story, day: date, folder: Path, *, only: str = "all") -> str:
    """Deliver a snapshot as it arrives: its tables, with the labels a horizon later."""
    from jobs.ingest import ingest

    delivery = story.settings.home / "deliveries" / f"{day}-{only}"
    delivery.mkdir(parents=True)
    for file in folder.iterdir():
        if only == "all" or (file.stem == "labels") == (only == "labels"):
            shutil.copy(file, delivery)
    result = ingest(story.settings, delivery, as_of=day, now=story.clock)
    return f"{result.result}, {result.rows.get(POPULATION) or result.rows.get('labels')} users"


def _first_model(story: Story, first: tuple[date, Path], second: tuple[date, Path]) -> None:
    from jobs.materialize import materialize
    from jobs.promote import promote
    from jobs.retrain import retrain

    settings = story.settings
    story.at(second[0] + timedelta(days=1), f"labels of {first[0]} are known: a first model")
    with story.step(f"ingest {first[0]} with its labels") as say:
        say(_ingest(story, *first))
    with story.step(f"ingest {second[0]}, labels unknown yet") as say:
        say(_ingest(story, *second, only="features"))
    with story.step("materialize features") as say:
        features = materialize(settings, as_of=story.clock)
        say(f"{features.users} users, {features.compared} compared with the offline store")
    with story.step("train, judge and register") as say:
        trained = retrain(settings, as_of=story.clock)
        say(f"version {trained.version}, {trained.algorithm}, gate {trained.gate}: {trained.reason}")
    story.expect((trained.version, trained.gate) == (1, "passed"), "version 1 to pass the gate", trained)
    story.expect(trained.trained_on == (first[0],), f"training on {first[0]}", trained.trained_on)
    story.facts["first_auc"] = trained.metrics["auc"]
    story.expect(0.75 <= trained.metrics["auc"] <= 0.9, "AUC from 0.75 to 0.9", trained.metrics["auc"])
    with story.step("promote: build a bento, serve it") as say:
        promoted = promote(settings)
        say(f"{promoted.served_tag} {promoted.result}")
    users = _users(story, second[0])
    answer = httpx.post(f"{story.url}/predict", json={"user_id": users[0]}, timeout=10)
    story.expect(
        answer.status_code == 200 and answer.json()["model_version"] == 1, "an answer of version 1", answer.text
    )
    story.facts["client"]["sent"] += 1
    story.facts["versions_served"].append(1)
    story.console.print_json(answer.text)
    story.status(production=1, candidate=None, served_tag=promoted.served_tag, pinned=None)


def _users(story: Story, day: date) -> list[str]:
    users: list[str] = Snapshots(story.settings.snapshots).read(POPULATION, day).index.tolist()
    return users


def _check_drift(story: Story) -> Any:
    from jobs.drift import check_drift
    from jobs.retrain import retrain

    return check_drift(
        story.settings,
        as_of=story.clock,
        now=datetime.now(UTC),
        start_retrain=lambda reason: retrain(story.settings, as_of=story.clock, wanted_by="drift", reason=reason),
    )


def _drift_without_labels(story: Story, second: date) -> None:
    with story.step("drift: are users still like those it learned from?") as say:
        drift = _check_drift(story)
        say(drift.reason)
    story.facts["drift"] = {"columns": list(drift.drifted_columns), "share": drift.share}
    story.expect(
        drift.drifted_columns == ("rebuffer_events_7d",), "drift in rebuffer_events_7d alone", drift.drifted_columns
    )
    story.expect(drift.decision == "retrain", "retraining to start", drift.decision)
    waiting = drift.started
    story.console.print(f"  retrain answers: {waiting.result}, {waiting.reason}", highlight=False, soft_wrap=True)
    known = instant(second + story.settings.label_horizon)
    story.facts["waiting_until"] = known.date().isoformat()
    story.expect(
        (waiting.result, waiting.known_at) == ("waiting_for_labels", known), f"to wait until {known:%Y-%m-%d}", waiting
    )
    found = story.status(production=1, candidate=None)
    story.expect(found["drift"]["decision"] == "retrain", "status to show drift's decision", found["drift"])


def _labels_arrive(story: Story, first: date, second: tuple[date, Path]) -> None:
    from jobs.promote import promote

    day, folder = second
    story.at(day + story.settings.label_horizon + timedelta(days=1), f"labels of {day} have arrived")
    with story.step("ingest labels") as say:
        say(_ingest(story, day, folder, only="labels"))
    with story.step("drift, with labels, starts retraining") as say:
        drift = _check_drift(story)
        say(
            f"realised AUC {drift.realised_auc:.3f}; {drift.reason}" if drift.realised_auc is not None else drift.reason
        )
    trained = drift.started
    story.expect(
        trained is not None and trained.result == "registered", "a candidate to be registered", trained or drift
    )
    story.facts["realised_auc"] = drift.realised_auc
    story.facts["candidate_auc"] = trained.metrics["auc"]
    story.facts["champion_auc"] = trained.metrics["champion_auc"]
    story.console.print(
        f"  version {trained.version}: gate {trained.gate}, {trained.reason}", highlight=False, soft_wrap=True
    )
    story.expect(
        trained.gate == "passed" and trained.trained_on == (day,), f"version 2, trained on {day}, to pass", trained
    )
    with Client(story.url, _users(story, day)) as client:
        _wait(lambda: client.answers[1] >= 50, "50 answers of version 1", lambda: client)
        with story.step("promote, while a client asks") as say:
            promoted = promote(story.settings)
            _wait(lambda: client.answers[2] >= 50, "50 answers of version 2", lambda: client)
            say(f"{promoted.served_tag} {promoted.result}")
    asked = sum(client.answers.values())
    story.asked(client)
    story.console.print(
        f"  {asked} answers, {len(client.failures)} refused, the longest took {client.longest * 1000:.0f} ms; "
        f"model_version {client.order[0]} → {client.order[-1]}",
        highlight=False,
    )
    story.expect(not client.failures, "no request to be refused", client.failures[:3])
    # a kept connection is answered by version 1 until it is closed, while new ones reach version 2
    gone = (client.order[0], client.order[-1], set(client.order)) == (1, 2, {1, 2})
    story.expect(gone, "model_version to go from 1 to 2", client.order)
    story.status(production=2, candidate=None, previous=1, served_tag=promoted.served_tag)


def _wait(until: Callable[[], bool], what: str, seen: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise StoryFailed(f"waited {seconds:.0f} s for {what}; last seen: {seen()}")
        time.sleep(0.05)


def _worse_model_is_refused(story: Story) -> None:
    from jobs.promote import promote
    from jobs.retrain import retrain

    story.console.print("\n[bold]Somebody breaks training[/]: the only candidate left knows nothing")
    broken = story.settings.model_copy(update={"candidates": ("dummy",)})
    with story.step("train, judge and register") as say:
        refused = retrain(broken, as_of=story.clock, reason="a broken configuration")
        say(f"version {refused.version}, gate {refused.gate}: {refused.reason}")
    story.expect((refused.version, refused.gate) == (3, "refused"), "version 3 to be refused", refused)
    with story.step("promote") as say:
        result = promote(story.settings)
        say(f"nothing to promote, {result.served_tag} serves on")
    story.expect(result.result == "idle", "nothing to be promoted", result)
    story.status(production=2, candidate=3)


def _roll_back(story: Story) -> None:
    from jobs.pin import rollback, unpin
    from jobs.promote import promote

    story.console.print("\n[bold]Somebody doubts version 2[/]")
    with Client(story.url, _users(story, Snapshots(story.settings.snapshots).days()[-1])) as client:
        _wait(lambda: client.answers[2] >= 20, "answers of version 2", lambda: client)
        began = time.monotonic()
        with story.step("roll back") as say:
            result = rollback(story.settings, reason="doubts about version 2", by="demo")
            _wait(lambda: client.answers[1] >= 20, "answers of version 1", lambda: client)
            say(f"{result.served_tag} serves again")
        story.facts["rollback_seconds"] = round(time.monotonic() - began, 1)
        again = promote(story.settings)
    story.asked(client)
    story.expect(not client.failures, "no request to be refused", client.failures[:3])
    story.expect(again.result == "idle" and "pinned" in again.reason, "promotion to respect the pin", again)
    found = story.status(production=1, served_tag=result.served_tag)
    story.expect(found["pinned"]["version"] == 1, "status to show the pin", found["pinned"])
    with story.step("unpin; version 2 was rolled back and does not return by itself") as say:
        unpin(story.settings)
        after = promote(story.settings)
        say(f"{after.served_tag} serves on")
    story.status(production=1, pinned=None, served_tag=result.served_tag)


def _score(story: Story) -> None:
    from jobs.score import score

    with story.step("score every user") as say:
        scored = score(story.settings, as_of=story.clock)
        say(scored.reason)


def _count_predictions(story: Story) -> None:
    import sqlalchemy as sa

    from jobs.database import connect, predictions

    query = sa.select(sa.func.count()).where(predictions.c.source == "client")
    engine = connect(story.settings.database)

    def logged() -> int:
        with engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    counted = story.facts["client"]
    answers = counted["sent"] - counted["failed"]
    _wait(lambda: logged() >= answers, f"{answers} answers in the log", logged)
    story.facts["predictions_logged"] = logged()
    story.expect(logged() == answers, f"each of {answers} answers in the log, once", logged())


def _summary(story: Story) -> None:
    facts, settings = story.facts, story.settings
    table = RichTable(title=f"What happened, in {facts['seconds']} s", title_justify="left")
    table.add_column("")
    table.add_column("figure", justify="right")
    for name, value in (
        ("version 1, AUC on users it never saw", f"{facts['first_auc']:.3f}"),
        ("drifted columns", ", ".join(facts["drift"]["columns"])),
        ("version 1, a month later", f"{facts['champion_auc']:.3f}"),
        ("version 2 on the same users", f"{facts['candidate_auc']:.3f}"),
        ("versions served", " → ".join(map(str, facts["versions_served"]))),
        ("requests, and of these refused", f"{facts['client']['sent']}, {facts['client']['failed']}"),
        ("answers in the log", str(facts["predictions_logged"])),
        ("seconds to roll back", str(facts["rollback_seconds"])),
    ):
        table.add_row(name, value)
    story.console.print()
    story.console.print(table)
    story.console.print(
        f"Look at {settings.home}: churn.db (predictions, promotions), scores/ (call list), demo.json\n"
        f"  CHURN_HOME={settings.home} churn status      and: churn history",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
