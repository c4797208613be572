"""Faults of the stores, while clients ask: Postgres that takes no predictions, a damaged spool, Valkey that holds other
things, MLflow that answers something else.

As in test_faults.py; the number before a fault is its row in charts/README.md, section "Faults".
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bentos.churn.spool import frame, read_records
from tests.cluster.commands import NotYet, wait_until
from tests.cluster.faults import (
    FIRST_POD,
    NORMAL,
    REFUSED,
    Fault,
    alert,
    answering,
    cut_off,
    fault,
    jobs_fail_and_a_pod_starts,
    kill,
    metric,
    metrics,
    names,
    other,
    processes,
    promote,
    restarts,
    score_features,
    stopped,
    threads,
    unpin,
    volumes,
    without,
)
from tests.cluster.release import Release
from tests.cluster.story import SECOND, Snapshots

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

AWAY = 20.0  # seconds that Postgres takes nothing, or takes it slowly
PILE = 2  # threads more than before; each batch has a timer's
LATE = 5.0  # seconds until what came with a row that is refused, or after it, is in the log
BACK = 2.0  # seconds until look-ups are answered when Valkey answers again
SEGMENTS = 4  # of a spool, before it is damaged


# ---- Postgres --------------------------------------------------------------------------------------------


@contextmanager
def slow(release: Release) -> Iterator[None]:
    """Two seconds for each batch."""
    release.sql(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(2); RETURN NULL; END';"
        "CREATE TRIGGER slow BEFORE INSERT ON predictions EXECUTE FUNCTION slow()"
    )
    try:
        yield
    finally:
        release.sql("DROP FUNCTION slow CASCADE")


@contextmanager
def read_only(release: Release) -> Iterator[None]:
    """As a standby is, for connections there are and for new ones."""
    release.sql("ALTER SYSTEM SET default_transaction_read_only = on")
    release.sql("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        release.sql("ALTER SYSTEM RESET default_transaction_read_only")
        release.sql("SELECT pg_reload_conf()")


def unreachable(release: Release, *, reset: bool) -> AbstractContextManager[None]:
    (pod,) = names(release, "postgres")
    return cut_off(release, pod, 5432, reset=reset)


POSTGRES: dict[str, tuple[Callable[[Release], AbstractContextManager[None]], float]] = {
    "slow": (slow, 1.5),
    "a black hole": (lambda release: unreachable(release, reset=False), AWAY - 5),
    "reset": (lambda release: unreachable(release, reset=True), AWAY - 5),
    "read-only": (read_only, AWAY - 5),
}  # and how many seconds the log is behind by then, at least


def most_threads(release: Release, seconds: float) -> int:
    """Of a pod, at any moment of so many seconds."""
    end, seen = time.monotonic() + seconds, [0]

    def over() -> bool:
        seen.append(threads(release))
        return time.monotonic() > end

    wait_until("the time is over", over, within=seconds + 10, every=0.2)
    return max(seen)


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("how", POSTGRES)
def test_postgres_that_takes_no_predictions(pair: Release, how: str) -> None:
    """They wait in the spool, nobody notices, no threads pile up, and the log is complete soon after."""
    version, (broken, behind) = pair.served_version(), POSTGRES[how]
    with fault(pair, f"11 Postgres {how}") as happened:
        before = most_threads(pair, 3)
        with broken(pair):
            most = most_threads(pair, AWAY)
            (row,) = pair.rows("SELECT extract(epoch FROM now() - max(predicted_at)) AS behind FROM predictions")
        happened.mended()
        took = happened.logged(within=NORMAL)
        happened.normal(version, within=NORMAL)
    print(f"  log {row['behind']:.1f} s behind, complete {took:.1f} s after; threads {before}, then {most}")
    assert row["behind"] >= behind
    assert most <= before + PILE


def test_row_that_postgres_refuses(pair: Release, snapshots: Snapshots) -> None:
    """It is set aside and counted; those behind it are in the log in time."""
    version, user = pair.served_version(), snapshots.users(SECOND, 201)[-1]  # whom clients do not ask about
    before = metric(pair, "churn_log_quarantined_total")
    with fault(pair, "14 row that Postgres refuses") as happened:
        pair.sql(f"ALTER TABLE predictions ADD CONSTRAINT poison CHECK (user_id IS DISTINCT FROM '{user}') NOT VALID")
        status, body = pair.address.ask(user, f"{happened.clients.run}-poison")
        assert status == 200, body
        happened.mended()  # nobody has to
        answered = len(happened.clients.answered)
        wait_until("some answers after it", lambda: len(happened.clients.answered) > answered + 20, within=10)
        took = happened.logged(within=LATE)
        quarantined = metric(pair, "churn_log_quarantined_total") - before
        pair.sql("ALTER TABLE predictions DROP CONSTRAINT poison")
        happened.normal(version, within=NORMAL)
    print(f"  those behind it were in the log within {took:.1f} s; {quarantined:.0f} in quarantine")
    assert quarantined == 1
    assert pair.rows(f"SELECT 1 FROM predictions WHERE request_id = '{happened.clients.run}-poison'") == []


# ---- the spool -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What was done to a spool, whose process stood still."""

    whole: set[str]  # ids of predictions that can still be read
    requests: list[str]  # those of the two that cannot
    stretches: set[bytes]  # what is left of these

    @classmethod
    def do(cls, spool: Path) -> Damage:
        """Flip a byte in the middle of a record, and cut the tail of the newest one in half."""
        _, flipped, *_, torn = segments(spool)
        records = {path: read_records(path.read_bytes()) for path in segments(spool)}
        assert not any(damaged for _, damaged in records.values())
        victims = [records[flipped][0][len(records[flipped][0]) // 2], records[torn][0][-1]]
        first, last = map(frame, victims)
        data, middle = flipped.read_bytes(), len(first) // 2
        at = data.index(first) + middle
        with flipped.open("r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ 1]))
        os.truncate(torn, torn.stat().st_size - len(last) // 2)
        rows = [json.loads(record) for found, _ in records.values() for record in found if record not in victims]
        left = {first[:middle] + bytes([first[middle] ^ 1]) + first[middle + 1 :], last[: -(len(last) // 2)]}
        return cls({row["prediction_id"] for row in rows}, [json.loads(v)["request_id"] for v in victims], left)


def segments(spool: Path) -> list[Path]:
    """Of the process that serves, oldest first."""
    (folder,) = spool.glob("worker-*")
    found = sorted(folder.glob("*.seg"))
    if len(found) < SEGMENTS:
        raise NotYet(f"{len(found)} segments")
    return found


@pytest.mark.usefixtures("node")
def test_spool_with_a_torn_tail_and_a_damaged_record(pair: Release) -> None:
    """Killed while Postgres is away: all other records reach the log, these two are set aside, and counted."""
    version, pod = pair.served_version(), names(pair, "serving")[0]
    spool, before = volumes(pair.get("pod", pod)["metadata"]["uid"]) / "spool", restarts(pair, pod)
    kept = set((spool / "quarantine").glob("*"))
    with fault(pair, "13 spool with a torn tail and a damaged record", again=3.0) as happened:
        with without(pair, "postgres"):
            wait_until("segments wait", lambda: segments(spool), within=NORMAL)
            with stopped(pair.cluster, pair.namespace, pod):
                damage = Damage.do(spool)
                kill(pair, pod)
            happened.destroys(damage.requests)
            wait_until(f"{pod} is back", lambda: restarts(pair, pod) > before, within=NORMAL)
        happened.mended()
        took = happened.logged(within=NORMAL)
        happened.normal(version, within=NORMAL)
        logged = pair.rows(f"SELECT prediction_id FROM predictions WHERE request_id LIKE '{happened.clients.run}-%'")
        aside = set((spool / "quarantine").glob("*")) - kept
        counted = metrics(pair, "churn_log_quarantined_total")[pod]
    print(f"  {len(damage.whole)} records were whole, log complete after {took:.1f} s; lost: {damage.requests}")
    print(f"  {counted:.0f} in quarantine; {happened.clients.repeated} requests were asked twice")
    assert damage.whole <= {row["prediction_id"] for row in logged}
    assert {path.read_bytes() for path in aside} == damage.stretches
    assert counted == len(damage.stretches)
    assert (restarts(pair, pod), metrics(pair, "churn_worker_restarts_total")[pod]) == (before + 1, 0)


# ---- Valkey ----------------------------------------------------------------------------------------------


@contextmanager
def halting(release: Release, pod: str) -> Iterator[None]:
    """Each answer takes up to two seconds: it is at work for a tenth of a second, and then stands still."""
    found, over = processes(release.cluster, release.namespace, pod), threading.Event()

    def halt() -> None:
        while not over.is_set():
            for number, pause in ((signal.SIGSTOP, 1.9), (signal.SIGCONT, 0.1)):
                for process in found:
                    os.kill(process, number)
                over.wait(pause)

    thread = threading.Thread(target=halt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for process in found:
            os.kill(process, signal.SIGCONT)


VALKEY: dict[str, Callable[[Release, str], AbstractContextManager[None]]] = {
    "slow": halting,
    "a black hole": lambda release, pod: cut_off(release, pod, 6379),
}


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("how", VALKEY)
def test_valkey_that_does_not_answer_in_time(pair: Release, how: str) -> None:
    """Look-ups answer 503 in time, raw features still score, and look-ups are back at once."""
    version, (pod,) = pair.served_version(), names(pair, "valkey")
    with fault(pair, f"15 Valkey {how}", refused="store_down") as happened:
        with VALKEY[how](pair, pod):
            score_features(pair, 10)
        happened.mended()
        happened.normal(version, within=NORMAL)
    slowest = max(reply.seconds for reply in happened.clients.failed)
    back = next(r.sent_at + r.seconds for r in happened.clients.answered if r.sent_at > happened.since) - happened.since
    print(f"  the slowest 503 took {slowest * 1000:.0f} ms; answers again after {back:.1f} s")
    assert slowest <= REFUSED
    assert back <= BACK


def valkey(release: Release, *command: str) -> str:
    return release.exec(f"deployment/{release.name}-valkey", "valkey-cli", "-e", *command).strip()


def one_score_each(happened: Fault) -> None:
    """Nobody was told two scores: what fills the store again begins with the newest month."""
    query = (
        f"SELECT user_id, array_agg(DISTINCT churn_probability) FROM predictions "
        f"WHERE request_id LIKE '{happened.clients.run}-%' GROUP BY user_id, bento_tag "
        "HAVING count(DISTINCT churn_probability) > 1"
    )
    assert happened.release.rows(query) == []


def materialize(release: Release) -> None:
    end = release.job_from_cronjob("materialize")
    assert end.complete, end


HALVE = """
local gone = 0
for n, key in ipairs(redis.call('KEYS', '*')) do
  if n % 2 == 0 and not string.find(key, '__sentinel__', 1, true) then gone = gone + redis.call('DEL', key) end
end
return gone
"""


def test_half_of_the_keys_gone(pair: Release) -> None:
    """Whose features are gone is not told a score; materialize notices, though the sentinel is still there."""
    version, keys = pair.served_version(), int(valkey(pair, "DBSIZE"))
    with fault(pair, "16 half of the keys gone", refused="unknown_user|missing_features") as happened:
        gone = int(valkey(pair, "EVAL", HALVE, "0"))
        wait_until("clients are told", lambda: len(happened.clients.failed) > 20, within=10, every=0.1)
        materialize(pair)
        happened.mended()
        happened.normal(version, within=NORMAL)
    print(f"  {gone} of {keys} keys deleted")
    assert gone >= keys // 2 - 1
    assert int(valkey(pair, "DBSIZE")) == keys
    one_score_each(happened)


DAMAGE = """
for n, user in ipairs(ARGV) do
  for _, key in ipairs(redis.call('KEYS', '*' .. user .. '*')) do
    if n % 2 == 0 then redis.call('SET', key, 'x') else
      for _, field in ipairs(redis.call('HKEYS', key)) do
        redis.call('HSET', key, field, string.sub(redis.call('HGET', key, field), 1, -2))
      end
    end
  end
end
"""


def test_values_that_are_damaged(pair: Release) -> None:
    """Of a wrong type or truncated: 503 for those users, until the next materialize writes them again."""
    version, users = pair.served_version(), pair.users()[:50]
    refused = "store_down|store_empty|unknown_user|missing_features"
    with fault(pair, "18 values damaged in Valkey", refused=refused) as happened:
        wait_until("everybody was answered", lambda: len(happened.clients.answered) > 2 * len(pair.users()), within=60)
        valkey(pair, "EVAL", DAMAGE, "0", *users)
        since = datetime.now(UTC)
        wait_until("clients are told", lambda: len(happened.clients.failed) > 2 * len(users), within=60, every=0.1)
        until = datetime.now(UTC)
        materialize(pair)
        happened.mended()
        happened.normal(version, within=NORMAL)
    one_score_each(happened)
    query = (
        f"SELECT 1 FROM predictions WHERE request_id LIKE '{happened.clients.run}-%' "
        f"AND user_id = ANY('{{{','.join(users)}}}') AND predicted_at BETWEEN '{since}' AND '{until}'"
    )
    assert pair.rows(query) == []


def set_stale_after(release: Release, age: str) -> None:
    """And that no pod is left that goes by another."""
    release.upgrade({"serving": {"staleAfter": age}})
    release.bootstrapped()
    release.wait_rolled_out()
    labels = f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component=serving"
    replicas = release.deployment()["spec"]["replicas"]
    wait_until(
        "old pods are gone",
        lambda: len(release.get("pods", f"--selector={labels}")["items"]) == replicas,
        within=NORMAL,
    )


def test_stale_features(pair: Release) -> None:
    """A month old, where a day is allowed: every answer says so, and the alert's counters do."""
    version, ((stale, all_), share) = pair.served_version(), alert(pair, "ChurnStaleFeatures")
    with fault(pair, "17 stale features") as happened:
        set_stale_after(pair, "1d")
        since, before = datetime.now(UTC), (metric(pair, stale), metric(pair, all_))
        answered = len(happened.clients.answered)
        wait_until("some answers", lambda: len(happened.clients.answered) > answered + 200, within=60)
        after, until = (metric(pair, stale), metric(pair, all_)), datetime.now(UTC)
        assert pair.predict()["stale"] is True
        set_stale_after(pair, "45d")
        happened.mended()
        happened.normal(version, within=NORMAL)
    assert pair.predict()["stale"] is False
    query = (
        "SELECT count(*) FILTER (WHERE stale) AS stale, count(*) AS rows FROM predictions "
        f"WHERE request_id LIKE '{happened.clients.run}-%' AND predicted_at BETWEEN '{since}' AND '{until}'"
    )
    (row,) = pair.rows(query)
    fires = (after[0] - before[0]) / (after[1] - before[1])
    print(f"  {row['stale']} of {row['rows']} answers said so; the alert's ratio is {fires:.2f}, it fires at {share}")
    assert row["stale"] == row["rows"] > 200
    assert fires > share


# ---- MLflow ----------------------------------------------------------------------------------------------


def http_answer(body: bytes, status: str = "200 OK", length: int = 0) -> bytes:
    """As it goes over the wire; with another length than its own it ends too early."""
    return f"HTTP/1.0 {status}\r\nContent-Length: {length or len(body)}\r\n\r\n".encode() + body


WRONG: dict[str, tuple[list[bytes], float]] = {
    "500": ([http_answer(b'{"error_code": "INTERNAL_ERROR"}', "500 Internal Server Error")], 0),
    "garbage": (
        [
            http_answer(b"<html><body>It works!</body></html>"),
            http_answer(b'{"registered_model": {"name": "chu', length=2000),
            http_answer(b"\xff\xfe\x00"),
            http_answer(b"[1]"),
            b"\x16\x03\x01 no HTTP at all\n\n",
            http_answer(b'{"registered_model": "x", "model_version": []}'),
        ],
        0,
    ),
    "after 30 s": ([http_answer(b"{}")], 30),
}


@pytest.mark.parametrize("how", WRONG)
def test_mlflow_that_answers_something_else(pair: Release, how: str) -> None:
    """Predictions go on, a pod starts, jobs fail with a sentence, a rollback works; later all catch up."""
    version, (answers, after) = other(pair), WRONG[how]
    with fault(pair, f"19 MLflow answers {how}") as happened:
        with answering(pair, "mlflow", 5000, *answers, after=after) as pod:
            jobs_fail_and_a_pod_starts(pair)
            began = time.monotonic()
            done = pair.churn("rollback", "--to", str(version), "--reason", f"MLflow answers {how}")
            assert done.returncode == 0, done.stdout + done.stderr
            pair.wait_served(version, within=NORMAL)
            everywhere = time.monotonic() - began
            asked = pair.kubectl("logs", pod).count("/api/2.0/mlflow/")
        happened.mended()
        promote(pair)
        happened.normal(version, within=NORMAL)
        end = pair.job_from_cronjob("drift")
    first = next(r for r in happened.clients.answered if r.sent_at > began and r.model_version == version)
    took = first.sent_at + first.seconds - began
    print(f"  first answer of the old bento {took:.1f} s after the command, everywhere after {everywhere:.1f} s")
    print(f"  MLflow was asked {asked} times")
    assert asked > 2
    assert took <= FIRST_POD
    assert end.complete, end
    unpin(pair)
