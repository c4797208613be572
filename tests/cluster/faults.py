"""What a fault costs the clients of a release, ways to break one, and a check that its records add up afterwards.

    with fault(release, "15 Valkey killed", refused="store_down") as happened:
        ...break something...
        happened.mended()  # where somebody has to; its time until normal is counted from here
        happened.normal(version, within=BUDGET)

Clients ask throughout. At the end their answers, table `promotions` and table `predictions` have to tell the same
story (`History`), and a line {fault, sent, failed, unlogged, seconds_to_normal} is in results/faults.json.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bentos.churn import archive
from bentos.churn.model import Scorer
from tests.broken_bentos import Change, changed
from tests.cluster.clients import Clients, Pace, Reply
from tests.cluster.commands import Cluster, NotYet, wait_until
from tests.cluster.release import TAG, JobEnd, Release

RESULTS = Path(__file__).parent / "results" / "faults.json"
PODS = Path("/var/lib/kubelet/pods")
GOOD = ("promoted", "rolled_back")  # results after which `to_tag` serves
LEAVING = timedelta(seconds=15)  # a pod that was told to go still answers: drainSeconds, and what is under way
TOLERANCE = 1e-6
CLOCK = """
import datetime, sys
import jobs.cli, jobs.cluster, jobs.pin, jobs.promote

class Off(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(hours={hours})

for name, module in list(sys.modules.items()):
    if name.startswith("jobs.") and getattr(module, "datetime", None) is datetime.datetime:
        module.datetime = Off
jobs.cli.app()
"""  # what `churn` does, by another clock; the kernel's is everybody's
STAND_IN = """
import itertools, socketserver, time

ANSWERS = itertools.cycle({answers!r})

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        request = self.rfile.readline()
        if not request:
            return  # a probe
        print(request.decode("latin-1").strip(), flush=True)
        while self.rfile.readline().strip():
            pass
        time.sleep({after})
        self.wfile.write(next(ANSWERS))

class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 50

Server(("", {port}), Handler).serve_forever()
"""  # what answers in place of a store
SAMPLE = 25  # scores of each tag that are computed again
CONVERGED = 90.0  # seconds for the run after a killed one, from its start
NORMAL = 60.0  # seconds until all is as before, once what was broken works again
JOB_FAILS = 60.0  # seconds until a job that lacks a store says so
FIRST_POD = 15.0  # seconds from a rollback's command to the first answer of the old tag
REFUSED = 1.0  # seconds of the slowest look-up while the online store is away
CALM = 60.0  # seconds in which nothing happens, to compare with
SAID = 500  # characters of what clients say
IN_A_ROW = 20  # answers after which clients are served as before

Row = dict[str, Any]
Score = Callable[[Mapping[str, Any]], float]


# ---- what it cost ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One line of the table: a fault, what clients noticed of it, and when all was as before."""

    fault: str
    sent: int
    failed: int
    unlogged: int  # answered, but not in table `predictions`; none but what the fault itself destroyed
    seconds_to_normal: float  # the longest time, where it happened more than once


def record(result: Result, file: Path = RESULTS) -> None:
    """Write a result beside those of other faults, in place of an older one of the same."""
    found = json.loads(file.read_text()) if file.exists() else []
    kept = [row for row in found if row["fault"] != result.fault]
    rows = sorted([*kept, asdict(result)], key=lambda row: (int(row["fault"].split()[0]), row["fault"]))
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")


@dataclass
class Fault:
    """One that happens now."""

    release: Release
    clients: Clients
    since: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    destroyed: set[str] = field(default_factory=set)

    def destroys(self, requests: Iterable[str]) -> None:
        """The fault is that the log's only copy of these requests is destroyed: they alone may be missing in it."""
        self.destroyed.update(requests)

    def goes_on(self, seconds: float, since: float | None = None) -> Pace:
        """The pace at which clients are answered from now until so many seconds later, or after `since`."""
        began = time.monotonic()
        end = (began if since is None else since) + seconds

        def over() -> bool:
            if time.monotonic() < end:
                raise NotYet(f"{end - time.monotonic():.0f} s are left")
            return True

        wait_until("the time is over", over, within=max(end - began, 0) + 10)
        return self.pace(began)

    def pace(self, since: float) -> Pace:
        """The pace at which clients are answered since then."""
        return Pace.of(reply for reply in list(self.clients.replies) if reply.sent_at >= since)

    def mended(self, at: datetime | None = None) -> None:
        """What was broken works again, from this moment on, or from then."""
        ago = datetime.now(UTC) - at if at else timedelta(0)
        self.since = time.monotonic() - ago.total_seconds()

    def normal(self, version: int, *, within: float) -> float:
        """Seconds until that version serves on every pod and by the record, and clients are answered in a row."""

        def left() -> float:
            return max(self.since + within - time.monotonic(), 1)

        def agreed() -> bool:
            try:
                open_rows = [row["id"] for row in self.release.promotions() if row["closed_at"] is None]
                production, served = self.release.aliases().get("production"), self.release.served_version()
            except AssertionError as error:  # what was just started does not answer yet
                raise NotYet(str(error)) from None
            if open_rows or production != version or served != version:
                raise NotYet(f"promotions {open_rows} are open, production is {production}, {served} is served")
            return True

        wait_until(f"version {version} is served by record and alias", agreed, within=left())
        self.release.wait_rolled_out(within=left())
        seen = len(self.clients.replies)

        def answered() -> bool:
            new = list(self.clients.replies)[seen:]
            return len(new) >= IN_A_ROW and all(reply.model_version == version for reply in new[-IN_A_ROW:])

        wait_until(f"{IN_A_ROW} answers in a row", answered, within=left(), every=0.1)
        took = time.monotonic() - self.since
        assert took <= within, f"normal after {took:.1f} s, at most {within:.0f} are allowed"
        self.seconds = max(self.seconds or 0.0, took)
        return took

    def logged(self, *, within: float) -> float:
        """Seconds until all that was answered so far is in table `predictions`, but what was destroyed."""
        answered = [reply for reply in self.clients.answered if reply.request_id not in self.destroyed]
        query = f"SELECT request_id FROM predictions WHERE request_id LIKE '{self.clients.run}-%'"

        def all_there() -> bool:
            try:
                found = {row["request_id"] for row in self.release.rows(query)}
            except AssertionError as error:
                raise NotYet(str(error)) from None
            missing = sum(reply.request_id not in found for reply in answered)
            if missing:
                raise NotYet(f"{missing} of {len(answered)} are not")
            return True

        wait_until("the backlog is empty", all_there, within=max(self.since + within - time.monotonic(), 1))
        return time.monotonic() - self.since


@contextmanager
def fault(
    release: Release, name: str, *, refused: str = "", again: float | None = None, count: int = 3
) -> Iterator[Fault]:
    """Clients ask while the block breaks something and sees it mended; then everything is checked and recorded.

    Requests may fail only with errors that `refused` matches, none by default. `again`: clients ask once more
    after so many seconds, as those do that retry.
    """
    with release.clients(count=count, again=again) as clients:
        happened = Fault(release, clients)
        yield happened
        assert happened.seconds is not None, "a fault ends with normal()"
    history = History.of(release, clients, frozenset(happened.destroyed))
    result = Result(name, len(clients.replies), len(clients.failed), len(history.unlogged), round(happened.seconds, 1))
    record(result)
    print(f"\n{json.dumps(asdict(result))}\n  {str(clients)[:SAID]}")
    history.check()
    history.check_scores(lambda tag: scorer(release, tag))
    unexpected = [reply for reply in clients.failed if not (refused and re.search(refused, reply.error))]
    assert not unexpected, f"{len(unexpected)} failed, such as {unexpected[0]}; {clients}"


# ---- whether the records add up --------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """From when until when pods of a tag may answer."""

    tag: str
    begin: datetime
    end: datetime

    def covers(self, reply: Reply) -> bool:
        """Whether some moment between question and answer is in it."""
        return self.begin <= reply.at + timedelta(seconds=reply.seconds) and reply.at <= self.end


def spans(promotions: Sequence[Row]) -> list[Span]:
    """When which tag was valid: from the opening of its promotion to the end of the one that replaced it.

    While one is open the old tag and the new one are. A promotion that failed ends the new tag with itself; one that
    yielded to a pin leaves the tag to the pin's.
    """
    rows = sorted(promotions, key=lambda row: int(row["id"]))
    found = []
    for row, later in ((row, rows[n + 1 :]) for n, row in enumerate(rows)):
        ends = [when(next_["closed_at"]) for next_ in later if next_["closed_at"] and next_["result"] in GOOD]
        if row["closed_at"] is None:
            end = datetime.max.replace(tzinfo=UTC) - LEAVING
        elif row["result"] in GOOD or row["reason"].startswith("yields"):
            end = ends[0] if ends else datetime.max.replace(tzinfo=UTC) - LEAVING
        else:
            end = when(row["closed_at"])
        found.append(Span(row["to_tag"] or "", when(row["opened_at"]), end + LEAVING))
    return found


def when(text: str) -> datetime:
    """A timestamp as Postgres puts it into JSON."""
    return datetime.fromisoformat(text).astimezone(UTC)


@dataclass(frozen=True)
class History:
    """What clients were answered, what the log says of it, and the record of promotions."""

    answered: Sequence[Reply]
    log: Sequence[Row]  # request_id, bento_tag, churn_probability, features
    promotions: Sequence[Row]
    destroyed: frozenset[str] = frozenset()  # requests whose record the fault destroyed before it was in the log

    @classmethod
    def of(
        cls, release: Release, clients: Clients, destroyed: frozenset[str] = frozenset(), within: float = 60
    ) -> History:
        """That of a release; a pod that goes may still be copying its last answers."""
        query = (
            "SELECT request_id, bento_tag, churn_probability, features FROM predictions "
            f"WHERE request_id LIKE '{clients.run}-%' AND source = 'client'"
        )
        found: list[Row] = []

        def all_there() -> bool:
            found[:] = release.rows(query)
            missing = cls(clients.answered, found, (), destroyed).missing
            if missing:
                raise NotYet(f"{len(missing)} of {len(clients.answered)} answers are not in the log yet")
            return True

        with suppress(AssertionError):  # check() says more
            wait_until("answers reach the log", all_there, within=within, every=1)
        return cls(clients.answered, found, release.promotions(), destroyed)

    @property
    def logged(self) -> dict[str, list[Row]]:
        """Rows by request."""
        result: defaultdict[str, list[Row]] = defaultdict(list)
        for row in self.log:
            result[row["request_id"]].append(row)
        return dict(result)

    @property
    def unlogged(self) -> list[Reply]:
        """Answers that the log does not have."""
        logged = {row["request_id"] for row in self.log}
        return [reply for reply in self.answered if reply.request_id not in logged]

    @property
    def missing(self) -> list[Reply]:
        """Those of them that nothing excuses."""
        return [reply for reply in self.unlogged if reply.request_id not in self.destroyed]

    def check(self) -> None:
        """Fail unless each answer is in the log exactly once, as it was given, by a tag that was valid then.

        What was destroyed must not be in it: a fault may not excuse more than it did.
        """
        assert not self.missing, f"{len(self.missing)} answers are not in the log, such as {self.missing[0]}"
        logged, valid = self.logged, spans(self.promotions)
        promoted = {span.tag for span in valid}
        assert not self.destroyed & logged.keys(), f"destroyed, and in the log: {self.destroyed & logged.keys()}"
        for reply in self.answered:
            if reply.request_id in self.destroyed:
                continue
            rows = logged[reply.request_id]
            assert len(rows) == 1, f"{len(rows)} rows in the log for {reply}"
            (row,) = rows
            assert row["bento_tag"] == reply.bento_tag, f"logged by {row['bento_tag']}: {reply}"
            same = abs(row["churn_probability"] - reply.score) < TOLERANCE
            assert same, f"logged with score {row['churn_probability']}: {reply}"
            assert reply.bento_tag in promoted, f"answered by a tag that was never promoted: {reply}"
            assert any(span.tag == reply.bento_tag and span.covers(reply) for span in valid), (
                f"not valid at {reply.at:%H:%M:%S}: {reply}; {[span for span in valid if span.tag == reply.bento_tag]}"
            )

    def check_scores(self, scorer: Callable[[str], Score], sample: int = SAMPLE) -> None:
        """Fail unless the scores of some requests of each tag can be computed again from its archive."""
        by_tag: defaultdict[str, list[Row]] = defaultdict(list)
        for row in self.log:
            by_tag[row["bento_tag"]].append(row)
        for tag, rows in by_tag.items():
            score = scorer(tag)
            for row in rows[:: max(1, len(rows) // sample)]:
                again = score(json.loads(row["features"]))
                difference = abs(again - row["churn_probability"])
                assert difference <= TOLERANCE, f"{tag} scores {again} now, and {row} is in the log"


def scorer(release: Release, tag: str) -> Score:
    """The model of a stored archive, loaded here."""
    import numpy as np

    stored = stored_archive(release, tag)
    with tempfile.TemporaryDirectory() as folder:
        loaded = Scorer(archive.extract(stored, hashlib.sha256(stored).hexdigest(), Path(folder) / "bento"))

    def score(features: Mapping[str, Any]) -> float:
        return float(loaded.score(np.asarray([loaded.encode(features)], dtype=np.float32))[0])

    return score


# ---- promotion, when a test wants it ---------------------------------------------------------------------


def quiet(release: Release) -> None:
    """No Job of the CronJob is at work any more."""

    def none_active() -> bool:
        active = release.get("cronjob", "promote").get("status", {}).get("active", [])
        if active:
            raise NotYet(f"{[job['name'] for job in active]} at work")
        return True

    wait_until("no promote is at work", none_active, within=120)
    release.wait_rolled_out()


def promote(release: Release, *, complete: bool = True) -> JobEnd:
    """One run of promote, and that it ended so."""
    end = release.job_from_cronjob("promote")
    assert end.complete is complete, end
    return end


def other(release: Release) -> int:
    """The version of the story that does not serve now."""
    return 3 - release.served_version()


def new_rows(release: Release, before: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Action, version and result of promotions that came since."""
    return [(row["action"], row["to_version"], row["result"]) for row in release.promotions()[len(before) :]]


def serve(release: Release, version: int) -> None:
    """Version 1 or 2 serves, by a promotion if it does not."""
    if release.served_version() != version:
        release.move_alias(version)
        promote(release)
    release.wait_served(version, within=NORMAL)


def tag_of(release: Release, version: int) -> str:
    """The tag of the version's bento."""
    (row,) = release.rows(f"SELECT tag FROM bentos WHERE model_version = {version}")
    return str(row["tag"])


def unpin(release: Release) -> None:
    """What was pinned serves on."""
    version = release.served_version()
    done = release.churn("unpin")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "result=idle" in promote(release).log
    assert release.served_version() == version


def see_it_fail(happened: Fault, tag: str) -> None:
    """A run of promote that is undone, with one pod of the new tag at most; time counts from the check that failed."""
    release, most = happened.release, 0
    job = release.start_job("promote")

    def ended() -> bool:
        nonlocal most
        most = max(most, tags_of_pods(release).count(tag))
        return bool(release.get("job", job).get("status", {}).get("conditions"))

    wait_until(f"Job {job} ends", ended, within=300)
    end = release.job_end(job)
    assert not end.complete, end
    assert most == 1, f"{most} pods had the tag {tag}"
    undone = re.search(r"^(\S+ \S+) ERROR jobs\.promote: promotion \d+ is undone", end.log, re.MULTILINE)
    assert undone, end
    happened.mended(datetime.strptime(undone[1], "%Y-%m-%d %H:%M:%S,%f").replace(tzinfo=UTC))


# ---- ways to break things --------------------------------------------------------------------------------


def stored_archive(release: Release, tag: str) -> bytes:
    """The bento of table `bentos`, checked against the checksum beside it."""
    (row,) = release.rows(f"SELECT encode(archive, 'base64') AS archive, sha256 FROM bentos WHERE tag = '{tag}'")
    data = base64.b64decode(row["archive"])
    assert hashlib.sha256(data).hexdigest() == row["sha256"], f"{tag} is not what was stored"
    return data


@contextmanager
def stored_as(release: Release, tag: str, data: bytes, sha256: str = "") -> Iterator[None]:
    """Another archive in its place for the block; with its own checksum, as of a bad build, or with that."""

    def store(archive: bytes, sha256: str) -> None:
        text = base64.b64encode(archive).decode()
        release.sql(f"UPDATE bentos SET archive = decode('{text}', 'base64'), sha256 = '{sha256}' WHERE tag = '{tag}'")

    before = stored_archive(release, tag)
    store(data, sha256 or hashlib.sha256(data).hexdigest())
    try:
        yield
    finally:
        store(before, hashlib.sha256(before).hexdigest())


def rewritten(release: Release, tag: str, name: str, change: Change) -> AbstractContextManager[None]:
    """One file in a stored archive is another for the block."""
    return stored_as(release, tag, changed(stored_archive(release, tag), {name: change}))


def scale(release: Release, store: str, replicas: int) -> None:
    """Pods of a store, waited for: none, or one that is ready."""
    name = f"{release.name}-{store}"
    release.kubectl("scale", f"deployment/{name}", f"--replicas={replicas}")
    if replicas:
        release.kubectl("rollout", "status", f"deployment/{name}", "--timeout=180s", timeout=200)
        return
    labels = f"app.kubernetes.io/instance={release.name},app.kubernetes.io/component={store}"
    release.kubectl("wait", "--for=delete", "pod", f"--selector={labels}", "--timeout=120s", timeout=130)


@contextmanager
def without(release: Release, store: str) -> Iterator[None]:
    """No pod of it for the block."""
    scale(release, store, 0)
    try:
        yield
    finally:
        scale(release, store, 1)


@contextmanager
def answering(release: Release, store: str, port: int, *answers: bytes, after: float = 0) -> Iterator[str]:
    """A pod that sends these, in turn and so late, to whoever asks the store by its Service; the pod's name.

    The store runs on and nobody finds it. The pod has the store's labels, so that network policies are the same for it.
    """
    cronjob = release.get("cronjob", "promote")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    container, service = cronjob["containers"][0], release.get("service", f"{release.name}-{store}")
    name, only = f"{store}-stand-in-{secrets.token_hex(2)}", {"churn.test/stand-in": store}
    release.create({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {**service["spec"]["selector"], **only}},
        "spec": {
            "automountServiceAccountToken": False, "securityContext": cronjob["securityContext"],
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "stand-in", "image": container["image"], "securityContext": container["securityContext"],
                "command": ["python", "-c", STAND_IN.format(answers=answers, after=after, port=port)],
                "ports": [{"name": service["spec"]["ports"][0]["targetPort"], "containerPort": port}],
                "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
            }],
        },
    })  # fmt: skip

    def select(value: str | None) -> None:
        patch = {"spec": {"selector": {"churn.test/stand-in": value}}}
        release.kubectl("patch", "service", service["metadata"]["name"], "--patch", json.dumps(patch))

    def found() -> list[str]:
        slices = release.get("endpointslices", f"--selector=kubernetes.io/service-name={service['metadata']['name']}")
        return [
            point["targetRef"]["name"]
            for piece in slices["items"]
            for point in piece.get("endpoints") or ()
            if point["conditions"].get("ready")
        ]

    try:
        release.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s", timeout=70)
        select(store)
        wait_until("it alone is found", lambda: found() == [name], within=30)
        yield name
    finally:
        select(None)
        release.kubectl("delete", "pod", name, "--wait=true")
        wait_until(f"{store} is found again", lambda: found() not in ([], [name]), within=30)


def volumes(uid: str) -> Path:
    """Where a node that is this machine has the emptyDir volumes of a pod."""
    return PODS / uid / "volumes" / "kubernetes.io~empty-dir"


def processes(cluster: Cluster, namespace: str, pod: str, container: str = "") -> list[int]:
    """Ids, on this machine, of a container's processes: those in its control group."""
    status = cluster.get("pod", pod, f"--namespace={namespace}")["status"]
    (identity,) = [
        found["containerID"].rpartition("/")[2]
        for found in status["containerStatuses"]
        if container in ("", found["name"])
    ]
    result = []
    for group in Path("/proc").glob("[0-9]*/cgroup"):
        with suppress(OSError):
            if identity in group.read_text():
                result.append(int(group.parent.name))
    assert result, f"no process of {pod} is on this machine"
    return result


def kill(release: Release, pod: str) -> None:
    """SIGKILL for every process of a pod's container, as the kernel does when memory runs out."""
    for process in processes(release.cluster, release.namespace, pod):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def worker(release: Release, pod: str) -> int:
    """The process of the pod that answers, once it is ready; raises NotYet while it is not."""
    path = f"/api/v1/namespaces/{release.namespace}/pods/{pod}:3000/proxy/readyz"
    said = release.cluster.run(["kubectl", f"--context={release.cluster.context}", "get", "--raw", path], check=False)
    if said.returncode:
        raise NotYet(f"{pod} is not ready: {said.stderr}")
    for process in processes(release.cluster, release.namespace, pod):
        with suppress(OSError):
            if b"_bentoml_impl.worker" in Path(f"/proc/{process}/cmdline").read_bytes():
                return process
    raise NotYet(f"{pod} has no worker")


def restarts(release: Release, pod: str) -> int:
    """How often the pod's container was started again; raises NotYet while it is not ready."""
    (status,) = release.get("pod", pod)["status"]["containerStatuses"]
    if not status["ready"]:
        raise NotYet(f"{pod} is not ready: {status['state']}")
    return int(status["restartCount"])


@contextmanager
def stopped(cluster: Cluster, namespace: str, pod: str) -> Iterator[None]:
    """Its processes stand still for the block, those that it does not kill go on."""
    found = processes(cluster, namespace, pod)
    for process in found:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


@contextmanager
def cut_off(release: Release, pod: str, port: int, *, reset: bool = False) -> Iterator[None]:
    """What is sent to a port of the pod is lost for the block, or answered by a reset; its own probes are local."""
    process = processes(release.cluster, release.namespace, pod)[0]
    answer = ["REJECT", "--reject-with", "tcp-reset"] if reset else ["DROP"]

    def change(how: str) -> None:
        rule = ["INPUT", "--protocol", "tcp", "--dport", str(port), "!", "--in-interface", "lo", "--jump", *answer]
        release.cluster.run(["nsenter", f"--net=/proc/{process}/ns/net", "iptables", "--wait", how, *rule])

    change("--insert")
    try:
        yield
    finally:
        change("--delete")


def threads(release: Release) -> int:
    """Of the serving pod that has most of them."""
    pods = (processes(release.cluster, release.namespace, pod) for pod in names(release, "serving"))
    return max(sum(len(list(Path(f"/proc/{process}/task").glob("*"))) for process in found) for found in pods)


def score_features(release: Release, seconds: float) -> None:
    """Send features instead of an id for so long; each time a score comes back."""
    (row,) = release.rows("SELECT features FROM predictions WHERE source = 'client' ORDER BY predicted_at DESC LIMIT 1")
    end, features = time.monotonic() + seconds, json.loads(row["features"])

    def over() -> bool:
        status, body = release.address.post({"features": features}, "test-raw-features")
        assert status == 200, body
        return time.monotonic() > end

    wait_until("the time is over", over, within=seconds + 10, every=0.2)


def metric(release: Release, name: str) -> float:
    """The sum of a metric over all serving pods."""
    return sum(metrics(release, name).values())


def metrics(release: Release, name: str) -> dict[str, float]:
    """A metric of each serving pod."""
    found = {}
    for pod in names(release, "serving"):
        page = release.cluster.kubectl(
            "get", "--raw", f"/api/v1/namespaces/{release.namespace}/pods/{pod}:3000/proxy/metrics"
        )
        found[pod] = sum(float(line.split()[-1]) for line in page.splitlines() if re.match(rf"{name}[{{ ]", line))
    return found


def alert(release: Release, name: str) -> tuple[list[str], float]:
    """The metrics of an alert's expression, in its order, and the limit above which it is true."""
    rule = release.rendered("serving/prometheusrule.yaml", {"metrics": {"prometheusRule": {"enabled": True}}})
    (group,) = rule["spec"]["groups"]
    (expression,) = [rule["expr"] for rule in group["rules"] if rule["alert"] == name]
    return re.findall(r"(\w+){", expression), float(expression.rpartition(">")[2])


def evict(release: Release, pod: str) -> None:
    """As `kubectl drain` does it, which asks PodDisruptionBudgets."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    path = f"/api/v1/namespaces/{release.namespace}/pods/{pod}/eviction"
    release.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def names(release: Release, component: str) -> list[str]:
    """Of its pods that are not about to go."""
    return sorted(pod["metadata"]["name"] for pod in release.pods(component))


def says_why(release: Release, job: str) -> str:
    """The one sentence with which a Job failed, in time."""
    end = release.job_end(job)
    assert not end.complete, end
    pods = release.get("pods", f"--selector=batch.kubernetes.io/job-name={job}")["items"]
    for pod in pods:
        (container,) = pod["status"]["containerStatuses"]
        ended = container["state"]["terminated"]
        took = when(ended["finishedAt"]) - when(ended["startedAt"])
        assert took.total_seconds() <= JOB_FAILS, f"{job} took {took}: {end}"
    said = [line for line in end.log.splitlines() if line.startswith("churn: ")]
    assert len(said) == 1 and end.log.rstrip().endswith(said[0]), end
    print(f"\n  {job}: {said[0]}")
    return said[0]


def exit_code(release: Release, job: str) -> int:
    """With which the only pod of a Job ended."""
    (pod,) = release.get("pods", f"--selector=batch.kubernetes.io/job-name={job}")["items"]
    (container,) = pod["status"]["containerStatuses"]
    return int(container["state"]["terminated"]["exitCode"])


def jobs_fail_and_a_pod_starts(release: Release) -> None:
    """Without MLflow: promote and drift say why they fail, and a pod that goes is replaced."""
    jobs = [release.start_job("promote"), release.start_job("drift")]
    pod = names(release, "serving")[0]
    release.kubectl("delete", "pod", pod, "--wait=false")
    wait_until(f"{pod} goes", lambda: pod not in names(release, "serving"), within=30)
    release.wait_rolled_out()
    for job in jobs:
        says_why(release, job)


def tags_of_pods(release: Release) -> list[str]:
    """The tag of each pod that serves or starts."""
    return [str((pod["metadata"].get("annotations") or {}).get(TAG)) for pod in release.pods("serving")]


def start_promote_by_another_clock(release: Release, name: str, *, hours: int, failpoint: str) -> str:
    """A Job of promote for which it is so many hours later; its name."""
    return start_python(release, name, CLOCK.format(hours=hours), failpoint=failpoint)


def start_python(release: Release, name: str, code: str, *, failpoint: str = "") -> str:
    """A Job like those of promote that runs this code instead, once; its name."""
    return _start(release, name, {"command": ["python", "-c", code]}, failpoint)


def start_churn(release: Release, *arguments: str, failpoint: str) -> str:
    """A Job that runs `churn …` as `kubectl churn` does it, once, to a failpoint; its name."""
    return _start(release, f"{arguments[0]}-{secrets.token_hex(2)}", {"args": arguments}, failpoint)


def _start(release: Release, name: str, changes: Mapping[str, Sequence[str]], failpoint: str) -> str:
    made = json.loads(
        release.kubectl("create", "job", "--from=cronjob/promote", name, "--dry-run=client", "-o", "json")
    )
    made["spec"]["backoffLimit"] = 0
    container = made["spec"]["template"]["spec"]["containers"][0]
    container |= changes
    container["env"].append({"name": "CHURN_FAILPOINT", "value": failpoint})
    release.create(made)
    return name
