"""Faults on a real cluster, each while clients ask through the ingress and are counted: what design.md promises of bad days.

The number before a fault is its row in the table of charts/README.md, section "Faults". CronJob promote is suspended, so
that a test decides when promotion looks.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.failpoints import STEPS
from tests.broken_bentos import BREAKS, WORSE
from tests.cluster.clients import Reply, in_order
from tests.cluster.commands import NotYet, wait_until
from tests.cluster.faults import (
    CALM,
    CONVERGED,
    FIRST_POD,
    NORMAL,
    REFUSED,
    History,
    Result,
    Row,
    alert,
    evict,
    exit_code,
    fault,
    jobs_fail_and_a_pod_starts,
    kill,
    metrics,
    names,
    new_rows,
    other,
    promote,
    record,
    restarts,
    rewritten,
    says_why,
    score_features,
    see_it_fail,
    serve,
    start_churn,
    start_promote_by_another_clock,
    stopped,
    tag_of,
    unpin,
    without,
    worker,
)
from tests.cluster.node import node
from tests.cluster.release import Release

TIMES = 5  # that promote is killed at each step
SIGKILLED = 137  # exit code
PUT_BACK = 60.0  # seconds from the failed check of a bento until the old one is wanted, named and alone again
SURGE_FAILED = 200  # requests that one pod may fail before it is noticed
KILLS, FEWEST = 100, 50  # depending on how busy the machine is
KILLING = 180.0  # seconds for them
OUTAGE = 60.0  # seconds that the API server is away, or a spool has to get full
POSTGRES_AWAY = 600.0
MLFLOW_AWAY = 300.0
TOLD = 60.0  # seconds from the beginning of an outage until the condition of its alert holds
RETRAINS = 15  # seconds that one takes longer, so that the others come meanwhile
HEARTBEAT = 30.0  # seconds after which a kubelet has told the API server of its pods again


def on_the_cluster(test: Callable[..., None]) -> Callable[..., None]:
    """Marks what breaks a release; what checks the checker needs none."""
    marked: Callable[..., None] = pytest.mark.cluster(pytest.mark.faults(test))
    return marked


# ---- the checker, on made-up records ---------------------------------------------------------------------

OLD, NEW, NEVER = "churn:v1-00000000", "churn:v2-00000000", "churn:v3-00000000"
NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)


def second(number: float) -> datetime:
    """That many seconds after noon."""
    return NOON + timedelta(seconds=number)


def promotion(number: int, tag: str, opened: float, closed: float | None, **other: Any) -> Row:
    """A row as psql gives it."""
    return {
        "id": number,
        "to_tag": tag,
        "opened_at": second(opened).isoformat(),
        "closed_at": None if closed is None else second(closed).isoformat(),
        "result": "promoted" if closed is not None else None,
        "reason": "",
        **other,
    }


def answer(at: float, tag: str, score: float = 0.5) -> Reply:
    """An answer to a request that was sent then."""
    sent_at = time.monotonic() - time.time() + second(at).timestamp()
    return Reply(f"request-{at}", sent_at, 0.01, 200, tag, int(tag[7]), score)


def log_of(*answers: Reply) -> list[Row]:
    """The log as it should be."""
    return [
        {"request_id": a.request_id, "bento_tag": a.bento_tag, "churn_probability": a.score, "features": '{"a": 1}'}
        for a in answers
    ]


PROMOTED = (promotion(1, OLD, 0, 10), promotion(2, NEW, 100, 120))
ANSWERS = (answer(50, OLD), answer(110, OLD), answer(110.5, NEW), answer(150, NEW, 0.25))


def test_history_that_adds_up() -> None:
    History(ANSWERS, log_of(*ANSWERS), PROMOTED).check()


@pytest.mark.parametrize(
    ("answers", "log", "promotions", "complaint"),
    [
        (ANSWERS, log_of(*ANSWERS[1:]), PROMOTED, "not in the log"),
        (ANSWERS, log_of(*ANSWERS, ANSWERS[0]), PROMOTED, "2 rows in the log"),
        (ANSWERS, log_of(*ANSWERS[:3], answer(150, NEW, 0.26)), PROMOTED, "logged with score 0.26"),
        (ANSWERS, log_of(*ANSWERS[:3], answer(150, OLD, 0.25)), PROMOTED, f"logged by {OLD}"),
        ([answer(50, NEVER)], log_of(answer(50, NEVER)), PROMOTED, "never promoted"),
        ([answer(99, NEW)], log_of(answer(99, NEW)), PROMOTED, "not valid at 12:01:39"),
        ([answer(136, OLD)], log_of(answer(136, OLD)), PROMOTED, "not valid at 12:02:16"),
        (
            [answer(136, NEW)],
            log_of(answer(136, NEW)),
            (PROMOTED[0], promotion(2, NEW, 100, 120, result="failed")),
            "not valid at 12:02:16",
        ),
    ],
    ids=["missing", "twice", "other score", "other tag", "never promoted", "too early", "too late", "after it failed"],
)
def test_history_that_does_not(
    answers: list[Reply], log: list[Row], promotions: tuple[Row, ...], complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        History(answers, log, promotions).check()


@pytest.mark.parametrize(
    ("tag", "row"),
    [
        (OLD, promotion(2, NEW, 100, 120, result="failed")),
        (OLD, promotion(2, NEW, 100, None)),
        (NEW, promotion(2, NEW, 100, None)),
        (NEW, promotion(2, NEW, 100, 120, result="interrupted", reason="yields to the pin on …")),
    ],
    ids=["old after the new one failed", "old while it is open", "new while it is open", "new until the pin is done"],
)
def test_what_is_valid_after(tag: str, row: Row) -> None:
    """A minute after."""
    late = answer(180, tag)
    History([late], log_of(late), (PROMOTED[0], row)).check()


def test_what_a_fault_destroys_may_be_missing_and_nothing_else() -> None:
    """Nor may it say so of what is there."""
    destroyed = frozenset({ANSWERS[0].request_id})
    History(ANSWERS, log_of(*ANSWERS[1:]), PROMOTED, destroyed).check()
    with pytest.raises(AssertionError, match=rf"1 answers are not in the log.*{ANSWERS[1].request_id}"):
        History(ANSWERS, log_of(*ANSWERS[2:]), PROMOTED, destroyed).check()
    with pytest.raises(AssertionError, match="destroyed, and in the log"):
        History(ANSWERS, log_of(*ANSWERS), PROMOTED, destroyed).check()


def test_scores_are_computed_again() -> None:
    """From the features in the log; a difference above 1e-6 fails."""
    history = History(ANSWERS[:1], log_of(ANSWERS[0]), PROMOTED)
    history.check_scores(lambda tag: lambda features: 0.5 + 1e-7 * features["a"])
    with pytest.raises(AssertionError, match=r"scores 0\.50001 now"):
        history.check_scores(lambda tag: lambda features: 0.50001)


def test_results_are_merged_by_fault(tmp_path: Path) -> None:
    """In the order of their numbers; a second run of one replaces the first."""
    file = tmp_path / "results" / "faults.json"
    for name, failed in (("10 Postgres killed", 0), ("5 promote killed", 1), ("5 promote killed", 0)):
        record(Result(name, 100, failed, 0, 1.5), file)
    assert json.loads(file.read_text()) == [
        {"fault": name, "sent": 100, "failed": 0, "unlogged": 0, "seconds_to_normal": 1.5}
        for name in ("5 promote killed", "10 Postgres killed")
    ]


# ---- promotion killed, twice at once, many times ---------------------------------------------------------


def follow(release: Release, version: int, step: str) -> str:
    """A hand moves the alias; the Job that follows it is killed."""
    release.move_alias(version)
    return release.start_job("promote", failpoint=f"{step}=exit")


def promote_and_undo(release: Release, version: int, step: str) -> str:
    """A candidate is promoted, found wanting at the end, and the Job is killed while it undoes that."""
    done = release.churn("approve", str(version))
    assert done.returncode == 0, done.stdout + done.stderr
    return release.start_job("promote", failpoint=f"promote.settled=raise,{step}=exit")


def roll_back(release: Release, version: int, step: str) -> str:
    """`churn rollback` is killed."""
    return start_churn(release, "rollback", "--to", str(version), failpoint=f"{step}=exit")


Begin = Callable[[Release, int, str], str]
BEGINS: dict[str, tuple[Begin, tuple[str, str]]] = {
    "promote": (follow, ("follow", "promoted")),
    "undo": (promote_and_undo, ("promote", "promoted")),
    "pin": (roll_back, ("pin", "rolled_back")),
}  # of steps: what reaches them, and the row after the next run
KILLED_STEPS = [step for step in STEPS if not step.startswith("retrain.")]  # those: tests/jobs/test_retrain.py


def test_each_step_has_something_that_reaches_it() -> None:
    assert {step.partition(".")[0] for step in KILLED_STEPS} == set(BEGINS)


@on_the_cluster
@pytest.mark.parametrize("step", KILLED_STEPS)
def test_promote_killed_at_a_step_is_finished_by_the_next_run(release: Release, step: str) -> None:
    """SIGKILL at every step, again and again: the next run converges, one row is new, alias and served tag agree."""
    begin, (action, result) = BEGINS[step.partition(".")[0]]
    before, expected = release.promotions(), []
    with fault(release, f"5 promote killed at {step}") as happened:
        for _ in range(TIMES):
            version = other(release)
            killed = release.job_end(begin(release, version, step))
            assert exit_code(release, killed.name) == SIGKILLED, f"{step} was not reached: {killed}"
            happened.mended()
            end = promote(release)
            happened.normal(version, within=CONVERGED)
            expected.append((action, version, result))
            assert new_rows(release, before) == expected
            if action == "pin":
                unpin(release)
    print(f"  normal {happened.seconds:.1f} s after the next run's start at the latest; {end.log.splitlines()[-1]}")


@on_the_cluster
def test_three_promotes_at_once(release: Release) -> None:
    """One works, the others end well and say who does."""
    version, before = other(release), release.promotions()
    with fault(release, "6 three promotes in the same second") as happened:
        release.move_alias(version)
        jobs = [release.start_job("promote") for _ in range(3)]
        ends = [release.job_end(job) for job in jobs]
        happened.normal(version, within=CONVERGED)
    assert all(end.complete for end in ends), ends
    promoted = [end for end in ends if "result=promoted" in end.log]
    held = [end for end in ends if "result=held" in end.log]
    assert (len(promoted), len(held)) == (1, 2), ends
    for end in held:
        assert f"held by {promoted[0].name}" in end.log, end
    assert new_rows(release, before) == [("follow", version, "promoted")]


@on_the_cluster
def test_three_retrains_at_once(release: Release) -> None:
    """One works, the others end well and say who does; there is one version more, which goes away again."""
    version, versions = release.served_version(), release.versions()
    with fault(release, "6 three retrains in the same second") as happened:
        late = f"retrain.trained=sleep:{RETRAINS}"
        jobs = [release.start_job("retrain", failpoint=late, env={"CHURN_SEED": "20"}) for _ in range(3)]
        ends = [release.job_end(job) for job in jobs]
        new = release.versions() - versions
        for number in new:
            release.delete_version(number)
        happened.normal(version, within=CONVERGED)
    assert all(end.complete for end in ends), ends
    registered = [end for end in ends if "result=registered" in end.log]
    held = [end for end in ends if "result=held" in end.log]
    assert (len(registered), len(held)) == (1, 2), ends
    for end in held:
        assert f"held by {registered[0].name}" in end.log, end
    assert len(new) == 1


@on_the_cluster
def test_lease_deleted_while_it_is_held(release: Release) -> None:
    """Whoever finds it gone takes it; the one it was taken from ends, and there is one promotion."""
    version, before = other(release), release.promotions()
    with fault(release, "6 Lease deleted while held") as happened:
        release.move_alias(version)
        first = release.start_job("promote", failpoint="promote.patched=sleep:20")
        wait_until("it has patched the tag", lambda: release.served_version() == version, within=60)
        release.kubectl("delete", "lease", f"{release.name}-promote")
        happened.mended()
        second, taken = promote(release), release.job_end(first)
        happened.normal(version, within=CONVERGED)
    print(f"  first: {taken.log.splitlines()[-1]}\n  second: {second.log.splitlines()[-1]}")
    assert new_rows(release, before) == [("follow", version, "promoted")]


@on_the_cluster
@pytest.mark.usefixtures("node")
def test_holder_of_the_lease_stands_still(release: Release) -> None:
    """Longer than its Lease lasts: another takes it and does the work; the first, awake again, writes nothing."""
    version, before = other(release), release.promotions()
    with fault(release, "7 holder of the Lease stands still") as happened:
        release.move_alias(version)
        job = release.start_job("promote", failpoint="promote.patched=sleep:3")
        wait_until("it has patched the tag", lambda: release.served_version() == version, within=60, every=0.1)
        holder = release.get("lease", f"{release.name}-promote")["spec"]["holderIdentity"].split("/")[0]
        with stopped(release.cluster, release.namespace, holder):
            happened.mended()
            assert "result=promoted" in promote(release).log
        first = release.job_end(job)
        happened.normal(version, within=CONVERGED)
    assert not first.complete, first
    assert new_rows(release, before) == [("follow", version, "promoted")]


@on_the_cluster
def test_rollback_in_the_middle_of_a_promotion(release: Release) -> None:
    """The promotion yields to the pin: the old tag is everywhere within 15 s a pod."""
    version = release.served_version()
    with fault(release, "4 rollback in the middle of a promotion") as happened:
        release.move_alias(3 - version)
        job = release.start_job("promote")
        wait_until("it has patched the tag", lambda: release.served_version() != version, within=60, every=0.1)
        happened.mended()
        done = release.churn("rollback", "--to", str(version), "--reason", "doubts")
        assert done.returncode == 0, done.stdout + done.stderr
        release.job_end(job)
        took = happened.normal(version, within=2 * NORMAL)
    print(f"  normal after {took:.1f} s")
    assert release.promotions()[-1]["reason"].endswith("doubts")
    unpin(release)


@on_the_cluster
def test_rollback_while_mlflow_is_down(release: Release) -> None:
    """`kubectl churn rollback`: the old bento answers within 15 s, and stays until unpinned, also when MLflow is back."""
    version = other(release)
    with fault(release, "4 rollback with MLflow down") as happened:
        with without(release, "mlflow"):
            happened.mended()
            done = release.churn("rollback", "--to", str(version), "--reason", "the new one is wrong")
            assert done.returncode == 0, done.stdout + done.stderr
            first = next(r for r in happened.clients.answered if r.model_version == version)
            took = first.sent_at + first.seconds - happened.since
            release.wait_served(version, within=NORMAL)
            everywhere = time.monotonic() - happened.since
            print(f"\n  first answer of the old bento after {took:.1f} s, everywhere after {everywhere:.1f} s")
            promote(release)
            assert release.served_version() == version
        happened.mended()
        promote(release)  # MLflow is back: the alias follows
        happened.normal(version, within=NORMAL)
    assert took <= FIRST_POD
    unpin(release)


@on_the_cluster
def test_twenty_promotions_and_rollbacks_in_a_row(release: Release) -> None:
    """No request fails; the record is complete and in order."""
    versions = [other(release), release.served_version()] * 10
    before = release.promotions()
    with fault(release, "1 twenty promotions and rollbacks in a row") as happened:
        calm, began = happened.goes_on(CALM), time.monotonic()
        for number, version in enumerate(versions):
            if number % 2 == 0:
                release.move_alias(version)
                promote(release)
            else:
                done = release.churn("rollback", "--reason", f"number {number}")
                assert done.returncode == 0, done.stdout + done.stderr
                release.churn("unpin")
        pace = happened.pace(began)
        happened.mended()
        happened.normal(versions[-1], within=NORMAL)
    print(f"  before: {calm}; meanwhile: {pace}: p99 is {pace.p99 / calm.p99:.1f} times as long")
    expected = [("follow", "promoted"), ("pin", "rolled_back")] * 10
    assert new_rows(release, before) == [
        (action, version, result) for (action, result), version in zip(expected, versions, strict=True)
    ]
    rows = release.promotions()[len(before) - 1 :]
    for earlier, later in itertools.pairwise(rows):
        assert (later["from_version"], later["from_tag"]) == (earlier["to_version"], earlier["to_tag"])
        assert earlier["closed_at"] <= later["opened_at"] <= later["closed_at"]
    assert in_order(happened.clients.versions) == in_order([before[-1]["to_version"], *versions])


# ---- bad bentos; from here on there are two pods ---------------------------------------------------------


@on_the_cluster
@pytest.mark.parametrize("reason", BREAKS)
def test_bad_bento_takes_the_surge_pod_and_no_more(pair: Release, reason: str) -> None:
    """The old pods serve throughout; alias and tag are back within a minute, and the history says why."""
    version, before, old_tag = pair.served_version(), pair.promotions(), pair.served_tag()
    bad = tag_of(pair, 3 - version)
    with fault(pair, f"2 bad bento: {reason}") as happened, rewritten(pair, bad, *BREAKS[reason]):
        pair.move_alias(3 - version)
        see_it_fail(happened, bad)
        took = happened.normal(version, within=PUT_BACK)
    print(f"  put back {took:.1f} s after the failed check: {pair.promotions()[-1]['reason'][:200]}")
    assert happened.clients.tags == [old_tag]
    assert new_rows(pair, before) == [("follow", 3 - version, "failed")]
    assert reason in pair.churn("history").stdout


@on_the_cluster
def test_bad_and_bad_and_good(pair: Release) -> None:
    """A version that never served: its pods fail requests, then they are slow, then all is well, and it serves."""
    serve(pair, 2)
    pair.upgrade({"jobs": {"retrain": {"seed": 1}}})
    pair.bootstrapped()
    end = pair.job_from_cronjob("retrain")
    assert end.complete, end
    version = pair.rows("SELECT version FROM retrains ORDER BY id DESC LIMIT 1")[0]["version"]
    assert version not in (None, 1, 2), end
    pair.move_alias(version)
    pair.job_end(pair.start_job("promote", failpoint="promote.built=exit"))  # its bento is stored, and nothing else
    tag = tag_of(pair, version)
    for reason, name, refused in (
        ("new pods failed", "3 bad bento: fails requests", "internal"),
        ("new pods answer 95 %", "3 bad bento: slow", ""),
    ):
        with (
            fault(pair, name, refused=refused, count=6) as happened,
            rewritten(pair, tag, "src/bentos/__init__.py", WORSE[reason]),
        ):
            pair.move_alias(version)
            see_it_fail(happened, tag)
            took = happened.normal(2, within=PUT_BACK)
        failed = len(happened.clients.failed)
        print(f"  put back {took:.1f} s after the failed check: {pair.promotions()[-1]['reason']}")
        assert failed <= SURGE_FAILED, happened.clients
        assert reason in pair.churn("history").stdout
    with fault(pair, "3 good bento after bad ones") as happened:
        pair.move_alias(version)
        promote(pair)
        happened.normal(version, within=2 * CONVERGED)
    serve(pair, 2)


@on_the_cluster
def test_alias_to_a_version_that_is_not_there(pair: Release) -> None:
    """As it is left by a deletion: the served tag stays, the alias is put back, and status says why."""
    version, before = pair.served_version(), pair.promotions()
    with fault(pair, "20 alias to a deleted version") as happened:
        pair.sql(
            "UPDATE public.registered_model_aliases SET version = 99 WHERE alias = 'production'", database="mlflow"
        )
        assert pair.aliases()["production"] == 99
        promote(pair, complete=False)
        problems = pair.status()["problems"]
        happened.normal(version, within=CONVERGED)
    assert any("has no version 99" in problem for problem in problems), problems
    assert new_rows(pair, before) == [("follow", 99, "failed")]


def set_right(release: Release, hours: int, *columns: str) -> None:
    """The newest promotion's times, which are those of a clock that was so many hours off."""
    to = ", ".join(f"{column} = {column} - interval '{hours} hours'" for column in columns)
    release.sql(f"UPDATE promotions SET {to} WHERE id = (SELECT max(id) FROM promotions)")


@on_the_cluster
def test_clock_of_a_job_an_hour_off(pair: Release) -> None:
    """Behind, its Lease looks stale and is not taken from it; ahead and killed, the next run need not wait an hour."""
    version, before = other(pair), pair.promotions()
    with fault(pair, "33 clock of promote an hour behind") as happened:
        pair.move_alias(version)
        job = start_promote_by_another_clock(pair, "behind", hours=-1, failpoint="promote.patched=sleep:15")
        wait_until("it has patched the tag", lambda: pair.served_version() == version, within=60)
        assert "result=held" in promote(pair).log
        happened.mended()
        assert pair.job_end(job).complete
        happened.normal(version, within=CONVERGED)
        set_right(pair, -1, "opened_at", "closed_at")
    with fault(pair, "33 clock of promote an hour ahead, and killed") as happened:
        pair.move_alias(3 - version)
        job = start_promote_by_another_clock(pair, "ahead", hours=1, failpoint="promote.patched=exit")
        assert not pair.job_end(job).complete
        happened.mended()
        promote(pair)
        happened.normal(3 - version, within=CONVERGED)
        set_right(pair, 1, "opened_at")
    assert new_rows(pair, before) == [("follow", version, "promoted"), ("follow", 3 - version, "promoted")]


# ---- pods and the node -----------------------------------------------------------------------------------


@on_the_cluster
@pytest.mark.usefixtures("node")
def test_serving_containers_killed(pair: Release) -> None:
    """SIGKILL, each pod twice: whoever asks once more is answered, and nothing that was answered is lost or doubled."""
    version = pair.served_version()
    with fault(pair, "8 serving container killed four times", again=1.0) as happened:
        for pod in names(pair, "serving") * 2:
            before = restarts(pair, pod)
            kill(pair, pod)
            happened.mended()
            wait_until(f"{pod} is back", lambda p=pod, b=before: restarts(pair, p) > b, within=NORMAL)  # type: ignore[misc]
            # the ingress controller learns of it later; until then it would have nobody but the next one to be killed
            wait_until(f"{pod} is asked", lambda p=pod: metrics(pair, "churn_log_appended_total")[p], within=NORMAL)  # type: ignore[misc]
        happened.normal(version, within=NORMAL)
    print(f"  {happened.clients.repeated} requests were asked twice")


@on_the_cluster
@pytest.mark.usefixtures("node")
def test_workers_killed(pair: Release) -> None:
    """SIGKILL for the process that answers, in one pod and the other in turn, when the one before is back."""
    version, pods, kills = pair.served_version(), names(pair, "serving"), 0
    with fault(pair, "8 workers killed for three minutes", again=1.0) as happened:
        end = time.monotonic() + KILLING
        while kills < KILLS and time.monotonic() < end:
            pod = pods[kills % len(pods)]
            killed = worker(pair, pod)
            os.kill(killed, signal.SIGKILL)
            happened.mended()
            kills += 1
            wait_until(f"{pod} has another", lambda p=pod, k=killed: worker(pair, p) != k, within=NORMAL, every=0.1)  # type: ignore[misc]
        happened.normal(version, within=NORMAL)
    print(f"  {kills} kills; {happened.clients.repeated} requests were asked twice")
    assert kills >= FEWEST


@on_the_cluster
def test_serving_pods_evicted(pair: Release) -> None:
    """One after the other by the Eviction API, as a drain does it."""
    version = pair.served_version()
    with fault(pair, "9 serving pods evicted one after the other") as happened:
        for pod in names(pair, "serving"):
            evict(pair, pod)
            happened.mended()
            wait_until(f"{pod} goes", lambda p=pod: p not in names(pair, "serving"), within=30)  # type: ignore[misc]
            pair.wait_rolled_out()
        happened.normal(version, within=NORMAL)


@on_the_cluster
@pytest.mark.usefixtures("node")
def test_kubelet_restarted(pair: Release) -> None:
    """Pods run on, and the same ones are ready afterwards."""
    version, before = pair.served_version(), names(pair, "serving")
    with fault(pair, "9 kubelet restarted") as happened:
        node.restart_kubelet()
        happened.mended()
        happened.normal(version, within=NORMAL)
    assert names(pair, "serving") == before


# ---- stores ----------------------------------------------------------------------------------------------


@on_the_cluster
def test_postgres_away_for_ten_minutes(pair: Release) -> None:
    """Predictions wait in the spool, which is not even half full; promotion begins nothing, and says why."""
    version, ((backlog,), limit) = pair.served_version(), alert(pair, "ChurnSpoolFilling")
    with fault(pair, "10 Postgres away for ten minutes") as happened:
        calm = happened.goes_on(CALM)
        with without(pair, "postgres"):
            began = time.monotonic()
            says_why(pair, pair.start_job("promote"))
            pace = happened.goes_on(POSTGRES_AWAY, since=began)
            waiting = max(metrics(pair, backlog).values())
        happened.mended()
        print(f"  backlog empty after {happened.logged(within=NORMAL):.1f} s; {waiting / 2**20:.1f} MiB in a pod")
        happened.normal(version, within=NORMAL)
        promote(pair)
    print(f"  before: {calm}; meanwhile: {pace}: p99 is {pace.p99 / calm.p99:.2f} times as long")
    assert waiting <= limit


@on_the_cluster
@pytest.mark.usefixtures("node")
def test_postgres_killed(pair: Release) -> None:
    """SIGKILL for all its processes."""
    version, (pod,) = pair.served_version(), names(pair, "postgres")
    with fault(pair, "10 Postgres killed") as happened:
        before = restarts(pair, pod)
        kill(pair, pod)
        wait_until("it is back", lambda: restarts(pair, pod) > before, within=NORMAL)
        happened.mended()
        print(f"  backlog empty after {happened.logged(within=NORMAL):.1f} s")
        happened.normal(version, within=NORMAL)


@on_the_cluster
@pytest.mark.usefixtures("node")
def test_valkey_killed_and_away(pair: Release) -> None:
    """Look-ups answer 503 in time, raw features still score."""
    version, (pod,) = pair.served_version(), names(pair, "valkey")
    with fault(pair, "15 Valkey killed, then away for 10 s", refused="store_down") as happened:
        kill(pair, pod)
        with without(pair, "valkey"):
            score_features(pair, 10)
        happened.mended()
        happened.normal(version, within=NORMAL)
    slowest = max(reply.seconds for reply in happened.clients.failed)
    print(f"  the slowest 503 took {slowest * 1000:.0f} ms")
    assert slowest <= REFUSED


@on_the_cluster
def test_valkey_flushed(pair: Release) -> None:
    """Nobody is told of a user whose features are gone; materialize fills it again."""
    version = pair.served_version()
    with fault(pair, "16 Valkey flushed", refused="store_empty") as happened:
        pair.exec(f"deployment/{pair.name}-valkey", "valkey-cli", "FLUSHALL")
        wait_until("clients are told", lambda: happened.clients.failed, within=10, every=0.1)
        end = pair.job_from_cronjob("materialize")
        assert end.complete, end
        happened.mended()
        happened.normal(version, within=NORMAL)
    first, last = happened.clients.failed[0], happened.clients.failed[-1]
    between = [r for r in happened.clients.answered if first.sent_at < r.sent_at < r.sent_at + r.seconds < last.sent_at]
    assert between == []


@on_the_cluster
def test_mlflow_away(pair: Release) -> None:
    """For minutes: predictions go on, a pod starts, jobs fail with a sentence and do their work later."""
    version = pair.served_version()
    with fault(pair, "19 MLflow away") as happened:
        with without(pair, "mlflow"):
            began = time.monotonic()
            jobs_fail_and_a_pod_starts(pair)
            happened.goes_on(MLFLOW_AWAY, since=began)
        happened.mended()
        promote(pair)
        happened.normal(version, within=NORMAL)
        end = pair.job_from_cronjob("drift")
    assert end.complete, end


@pytest.fixture
def small_spool(pair: Release) -> Iterator[None]:
    """Room for some hundred predictions a pod."""
    pair.upgrade({"serving": {"spool": {"size": "600Ki"}}})
    pair.wait_rolled_out()
    yield
    pair.upgrade({"serving": {"spool": {"size": "512Mi"}}})
    pair.wait_rolled_out()


@on_the_cluster
@pytest.mark.usefixtures("small_spool")
def test_spool_full(pair: Release) -> None:
    """503 while Postgres is away and the spool has no room: none is answered that is not logged; it heals by itself.

    The condition of alert ChurnSpoolFilling holds meanwhile, in time, and no longer.
    """
    version, ((backlog,), limit) = pair.served_version(), alert(pair, "ChurnSpoolFilling")
    before = {pod: restarts(pair, pod) for pod in names(pair, "serving")}

    def alarming() -> bool:
        return max(metrics(pair, backlog).values()) > limit

    with fault(pair, "12 spool full", refused="log_full") as happened:
        assert not alarming()
        began = time.monotonic()
        with without(pair, "postgres"):
            wait_until("the alert's condition holds", alarming, within=TOLD, every=0.1)
            told = time.monotonic() - began
            wait_until("clients are refused", lambda: len(happened.clients.failed) >= 100, within=2 * OUTAGE)
        happened.mended()
        logged = happened.logged(within=NORMAL)
        wait_until("the alert's condition is over", lambda: not alarming(), within=NORMAL, every=0.1)
        over = time.monotonic() - happened.since
        happened.normal(version, within=NORMAL)
    refused = happened.clients.failed[0].sent_at - began
    print(f"  the alert's condition held after {told:.1f} s, clients were refused after {refused:.1f} s")
    print(f"  backlog empty after {logged:.1f} s, the condition was over after {over:.1f} s")
    assert told <= TOLD
    assert {pod: restarts(pair, pod) for pod in names(pair, "serving")} == before


# ---- the cluster -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def another_architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tag of a serving image whose Python is for other CPUs; it is in the node."""
    if os.environ.get("CONTEXT"):
        pytest.skip("needs the node of tests/cluster/node, which takes images from buildah")
    folder, name = tmp_path_factory.mktemp("image"), "docker.io/library/churn-serving"
    cpu = "arm64" if platform.machine() == "x86_64" else "amd64"
    (folder / "main.go").write_text("package main\n\nfunc main() {}\n")
    (folder / "Dockerfile").write_text(f"FROM {name}:dev\nCOPY python /app/bin/python\n")  # comes first on its PATH
    go = shutil.which("go") or "/usr/local/go/bin/go"
    environment = {**os.environ, "GOOS": "linux", "GOARCH": cpu, "CGO_ENABLED": "0"}
    for command in (
        [go, "build", "-o", "python", "main.go"],
        ["buildah", "bud", "--isolation", "chroot", "--quiet", "--tag", f"{name}:{cpu}", "."],
    ):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    node.load([f"{name}:{cpu}"])
    return cpu


IMAGES = {"that cannot be pulled": "ImagePull", "of another architecture": "exec format error"}  # and what is said then


def complaints(release: Release) -> str:
    """The status of all pods, and what those that should serve say before they do."""
    serving = "--selector=app.kubernetes.io/component=serving"
    return release.kubectl("get", "pods") + release.kubectl("logs", serving, "--container=fetch", check=False)


@on_the_cluster
@pytest.mark.parametrize("image", IMAGES)
def test_image_that_cannot_run(pair: Release, request: pytest.FixtureRequest, image: str) -> None:
    """`helm upgrade` with such a tag: the old pods serve, a promotion is put off and done when the image is right."""
    tag = request.getfixturevalue("another_architecture") if "architecture" in image else "absent"
    version = pair.served_version()
    with fault(pair, f"2 image {image}") as happened:
        pair.upgrade({"images": {"serving": {"tag": tag}}}, wait=False)
        wait_until("a pod fails with it", lambda: IMAGES[image] in complaints(pair), within=60)
        pair.move_alias(3 - version)
        promote(pair, complete=False)
        (*_, undone) = pair.promotions()
        assert undone["result"] == "interrupted", undone
        assert pair.served_version() == version
        pair.upgrade({"images": {"serving": {"tag": "dev"}}})
        pair.bootstrapped()
        happened.mended()

        def promoted() -> bool:
            said = promote(pair).log.splitlines()[-1]
            if "result=promoted" in said:
                return True
            raise NotYet(said)

        wait_until("it is tried again", promoted, within=2 * CONVERGED, every=5)
        happened.normal(3 - version, within=2 * CONVERGED)
    print(f"  put off: {undone['reason'][:300]}")
    assert set(happened.clients.versions) == {1, 2}


@on_the_cluster
@pytest.mark.usefixtures("node")
def test_api_server_away_in_the_middle_of_a_promotion(pair: Release) -> None:
    """It stands still for a minute: the promotion is ended or undone, and one row tells of it.

    Answers go on meanwhile. When it is back, Kubernetes takes every pod for not ready until the kubelet's next heartbeat,
    because nodes could not send any: for these seconds the ingress controller, and we in Valkey's case, have nobody to ask.
    """
    version, before = 3 - pair.served_version(), pair.promotions()
    (server,) = [
        pod["metadata"]["name"]
        for pod in pair.cluster.get("pods", "--namespace=kube-system", "--selector=component=kube-apiserver")["items"]
    ]
    name, refused = (
        "37 API server away in the middle of a promotion",
        "no available server|404 page not found|store_down",
    )
    with fault(pair, name, refused=refused) as happened:
        pair.move_alias(version)
        job = pair.start_job("promote")
        wait_until("it has patched the tag", lambda: pair.served_version() == version, within=60, every=0.1)
        with stopped(pair.cluster, "kube-system", server):
            happened.goes_on(OUTAGE)
        back = time.monotonic()
        happened.mended()
        wait_until("it answers again", lambda: pair.kubectl("version", check=False), within=NORMAL)
        pair.job_end(job)
        promote(pair)
        happened.normal(version, within=2 * CONVERGED)
    assert new_rows(pair, before) == [("follow", version, "promoted")]
    failed = [reply.sent_at - back for reply in happened.clients.failed]
    print(f"  failed from {min(failed, default=0):.1f} to {max(failed, default=0):.1f} s after it was back")
    assert all(0 <= seconds <= HEARTBEAT for seconds in failed)
