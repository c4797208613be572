"""The service as its clients see it: a real service of an extracted bento, asked over sockets."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import math
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bentos.churn.guard import MAX_BODY
from bentos.churn.model import Scorer
from bentos.churn.online import entity_key
from jobs.database import connect
from tests.bentos import serving_process
from tests.bentos.conftest import AS_OF, NO_INTERNET, NO_PAYMENTS, NO_USAGE, OLD, FeastStore
from tests.bentos.serving_process import Service, eventually

ANSWER = {"request_id", "prediction_id", "user_id", "churn_probability", "churn", "threshold", "model_version",
          "bento_tag", "features_as_of", "stale"}  # fmt: skip


def logged(settings: dict[str, str], **where: str) -> list[dict[str, Any]]:
    """Rows of the prediction log."""
    (column, value), *_ = where.items()
    path = settings["CHURN_DATABASE_URL"].removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM predictions WHERE {column} = ?", (value,))]


def scored(scorer: Scorer, row: dict[str, Any]) -> float:
    import numpy as np

    return float(scorer.score(np.asarray([scorer.encode(row)], dtype=np.float32))[0])


# --- answers ----------------------------------------------------------------------------------------------


def test_a_user_is_scored_on_online_features(
    service: Service, scorer: Scorer, online: FeastStore, settings: dict[str, str]
) -> None:
    references = [f"{f.view}:{f.name}" for f in scorer.plan.features]
    found = online.sdk.get_online_features(references, [{"user_id": "u-0001"}]).to_dict()
    row = {name: found[name][0] for name in scorer.plan.names}

    reply = service.post({"user_id": "u-0001"})

    answer = reply.json()
    assert reply.status == 200
    assert set(answer) == ANSWER
    assert answer["user_id"] == "u-0001"
    assert answer["churn_probability"] == pytest.approx(scored(scorer, row), abs=1e-6)
    assert answer["churn"] is (answer["churn_probability"] >= 0.4)
    assert answer["threshold"] == 0.4
    assert answer["model_version"] == 1
    assert answer["bento_tag"] == scorer.bento_tag
    assert datetime.fromisoformat(answer["features_as_of"]) == AS_OF
    assert answer["stale"] is False
    (entry,) = eventually(lambda: logged(settings, prediction_id=answer["prediction_id"]))
    assert json.loads(entry["features"]) == json.loads(scorer.plan.row(scorer.plan.cells(row)).text)
    assert {**entry, "churn": bool(entry["churn"]), "stale": bool(entry["stale"])}.items() >= answer.items()
    assert entry["source"] == "client"


def test_features_are_scored_without_a_look_up(service: Service, scorer: Scorer, settings: dict[str, str]) -> None:
    row = scorer.golden["rows"][10]

    answer = service.post({"features": row}).json()

    assert set(answer) == ANSWER
    assert answer["churn_probability"] == pytest.approx(scorer.golden["scores"][10], abs=1e-6)
    assert (answer["user_id"], answer["features_as_of"], answer["stale"]) == (None, None, False)
    assert eventually(lambda: logged(settings, prediction_id=answer["prediction_id"]))[0]["user_id"] is None


def test_a_thousand_users_are_scored_in_order(
    service: Service, online: FeastStore, scorer: Scorer, settings: dict[str, str]
) -> None:
    users = [*online.users[1:], "nobody"]

    reply = service.post({"user_ids": users}, x_request_id="thousand")

    document = reply.json()
    items = document["predictions"]
    assert set(document) == {"request_id", "bento_tag", "model_version", "predictions"}
    assert [item["user_id"] for item in items] == users
    errors = {item["user_id"]: item for item in items if "error" in item}
    assert {user: item["error"] for user, item in errors.items()} == {
        "nobody": "unknown_user", NO_USAGE: "missing_features"
    }  # fmt: skip
    assert all(set(item) == {"user_id", "error", "detail"} for item in errors.values())
    good = [item for item in items if "error" not in item]
    assert all(set(item) == ANSWER - {"request_id", "bento_tag", "model_version"} for item in good)
    assert len({item["prediction_id"] for item in good}) == 998
    one = service.post({"user_id": users[500]}).json()
    assert one["churn_probability"] == items[500]["churn_probability"]
    rows = eventually(lambda: (found := logged(settings, request_id="thousand")) and len(found) == 998 and found)
    assert {row["prediction_id"] for row in rows} == {item["prediction_id"] for item in good}


def test_a_user_asked_for_twice_is_answered_and_logged_twice(service: Service) -> None:
    one, two = service.post({"user_ids": ["u-0001", "u-0001"]}).json()["predictions"]

    assert one["churn_probability"] == two["churn_probability"]
    assert one["prediction_id"] != two["prediction_id"]


def test_users_unlike_others(service: Service) -> None:
    assert service.post({"user_id": NO_PAYMENTS}).status == 200
    assert service.post({"user_id": NO_INTERNET}).status == 200
    old = service.post({"user_id": OLD}).json()
    assert old["stale"] is True
    assert datetime.fromisoformat(old["features_as_of"]) < AS_OF
    assert service.post({"user_id": "Zoë Ünïcode ☂"}).json()["user_id"] == "Zoë Ünïcode ☂"


def test_request_ids_are_taken_or_made(service: Service) -> None:
    taken = service.post({"user_id": "u-0001"}, x_request_id="order/66!")
    made = service.post({"user_id": "u-0001"})
    refused = service.post({"user_id": "nobody"}, x_request_id="x" * 129)

    assert taken.headers["x-request-id"] == taken.json()["request_id"] == "order/66!"
    assert len(made.headers["x-request-id"]) == 32
    assert refused.headers["x-request-id"] == refused.json()["request_id"] != "x" * 129


def test_probes_are_marked_in_the_log(service: Service, settings: dict[str, str]) -> None:
    answer = service.post({"user_id": "u-0001"}, x_churn_source="probe").json()

    assert eventually(lambda: logged(settings, prediction_id=answer["prediction_id"]))[0]["source"] == "probe"


def test_info_says_what_is_served(service: Service, scorer: Scorer) -> None:
    info = service.get("/info").json()

    assert info["bento_tag"] == scorer.bento_tag
    assert info["code_digest"] == scorer.about["code_digest"]
    assert {"model_version": 1, "run_id": "run-1", "feature_service": "churn_v1", "ready": True,
            "draining": False}.items() <= info.items()  # fmt: skip
    assert datetime.fromisoformat(info["started_at"]) <= datetime.now(UTC)


def test_metrics_count(service: Service) -> None:
    def value(name: str) -> float:
        lines = service.get("/metrics").body.decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)

    names = [
        'churn_requests_total{status="200"}',
        "churn_request_seconds_count",
        "churn_probability_count",
        "churn_stale_predictions_total",
        'churn_missing_features_total{feature="failed_payments_90d"}',
    ]
    before = [value(name) for name in names]
    service.post({"user_ids": [NO_PAYMENTS, OLD]})

    increments = [value(name) - was for name, was in zip(names, before, strict=True)]

    assert increments[:4] == [1, 1, 2, 1]
    assert increments[4] >= 1
    assert value("churn_ready") == 1
    assert value("churn_bento_info{bento_tag=") == 1
    assert value("churn_log_quarantined_total") == 0
    eventually(lambda: value("churn_log_backlog_bytes") == 0)


# --- refusals ---------------------------------------------------------------------------------------------


def converse(service: Service, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send these bytes and read until the service closes, or has answered whole."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
                head, _, body = received.partition(b"\r\n\r\n")
                length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
                               if line.startswith(b"content-length")), None)  # fmt: skip
                if length is not None and len(body) >= length:
                    break
    return received


def post(body: bytes, *headers: str, kind: str = "application/json", path: str = "/predict") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([line for line in lines if line != "Content-Type: "]).encode() + b"\r\n\r\n" + body


def chunked(size: int) -> bytes:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    return head + chunk * (size // 65536) + b"0\r\n\r\n"


GOOD = json.dumps({"user_id": "u-0001"}).encode()


def request(document: Any) -> bytes:
    return post(json.dumps(document).encode())


def row(scorer: Scorer, **changes: Any) -> dict[str, Any]:
    return {"features": {**scorer.golden["rows"][5], **changes}}


Made = bytes | Callable[[Scorer], bytes]

MALFORMED: dict[str, tuple[int, Made]] = {
    "empty body": (400, post(b"")),
    "blank body": (400, post(b"  \n")),
    "not json": (400, post(b"user_id=u-0001")),
    "cut json": (400, post(GOOD[:-1])),
    "two documents": (400, post(GOOD + GOOD)),
    "byte order mark": (400, post(b"\xef\xbb\xbf" + GOOD)),
    "utf-16": (400, post(GOOD.decode().encode("utf-16"))),
    "bad utf-8": (400, post(b'{"user_id":"\xff\xfe"}')),
    "gzip": (400, post(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "Content-Encoding: gzip")),
    "array": (400, request([{"user_id": "u-0001"}])),
    "string": (400, request("u-0001")),
    "null": (400, request(None)),
    "number": (400, request(1)),
    "no field": (400, request({})),
    "two forms": (400, request({"user_id": "u-0001", "user_ids": ["u-0001"]})),
    "unknown field": (400, request({"user_id": "u-0001", "verbose": True})),
    "duplicate key": (400, post(b'{"user_id":"u-0001","user_id":"u-0002"}')),
    "NaN": (400, lambda s: post(json.dumps(row(s, monthly_fee=math.nan)).encode())),
    "Infinity": (400, lambda s: post(json.dumps(row(s, monthly_fee=math.inf)).encode())),
    "-Infinity": (400, lambda s: post(json.dumps(row(s, monthly_fee=-math.inf)).encode())),
    "1e999": (400, lambda s: post(json.dumps(row(s, monthly_fee=7777)).replace("7777", "1e999").encode())),
    "5,000 digits": (400, lambda s: post(json.dumps(row(s, skips_7d=7777)).replace("7777", "9" * 5000).encode())),
    "4,000 digits": (400, lambda s: post(json.dumps(row(s, skips_7d=7777)).replace("7777", "9" * 4000).encode())),
    "depth 100,000": (400, post(b"[" * 100_000)),
    "depth 100,000 in a field": (400, post(b'{"user_id":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    "user_id null": (400, request({"user_id": None})),
    "user_id number": (400, request({"user_id": 7})),
    "user_id empty": (400, request({"user_id": ""})),
    "user_id 129": (400, request({"user_id": "x" * 129})),
    "user_id NUL": (400, request({"user_id": "a\0b"})),
    "user_id newline": (400, request({"user_id": "a\nb"})),
    "user_id lone surrogate": (400, post(b'{"user_id":"\\ud800"}')),
    "user_id reserved": (400, request({"user_id": "__sentinel__"})),
    "user_ids empty": (400, request({"user_ids": []})),
    "user_ids string": (400, request({"user_ids": "u-0001"})),
    "user_ids 1,001": (400, request({"user_ids": [f"u-{i:04}" for i in range(1001)]})),
    "user_ids one bad": (400, request({"user_ids": ["u-0001", None]})),
    "features array": (400, request({"features": [1, 2]})),
    "features unknown": (400, lambda s: request(row(s, shoe_size=42))),
    "features text for number": (400, lambda s: request(row(s, monthly_fee="70"))),
    "features true for number": (400, lambda s: request(row(s, monthly_fee=True))),
    "features number for bool": (400, lambda s: request(row(s, paperless_billing=1))),
    "features half": (400, lambda s: request(row(s, months_active=1.5))),
    "features negative": (400, lambda s: request(row(s, skips_7d=-1))),
    "features too high": (400, lambda s: request(row(s, months_active=1201))),
    "features unknown category": (400, lambda s: request(row(s, net_service="Cable"))),
    "features nested": (400, lambda s: request(row(s, monthly_fee={"eur": 70}))),
    "features empty": (422, request({"features": {}})),
    "features null": (422, lambda s: request(row(s, monthly_fee=None))),
    "unknown user": (404, request({"user_id": "nobody"})),
    "user without usage": (422, request({"user_id": NO_USAGE})),
    "unknown path": (404, post(GOOD, path="/predictions")),
    "path below": (404, post(GOOD, path="/predict/")),
    "bentoml's own path": (404, b"GET /schema.json HTTP/1.1\r\nHost: x\r\n\r\n"),
    "root": (404, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "GET": (405, b"GET /predict HTTP/1.1\r\nHost: x\r\n\r\n"),
    "PUT": (405, post(GOOD).replace(b"POST", b"PUT", 1)),
    "DELETE": (405, b"DELETE /predict HTTP/1.1\r\nHost: x\r\n\r\n"),
    "OPTIONS": (405, b"OPTIONS /predict HTTP/1.1\r\nHost: x\r\n\r\n"),
    "POST to a page": (405, post(GOOD, path="/metrics")),
    "no content type": (415, post(GOOD, kind="")),
    "form": (415, post(GOOD, kind="application/x-www-form-urlencoded")),
    "multipart": (415, post(GOOD, kind="multipart/form-data; boundary=x")),
    "text": (415, post(GOOD, kind="text/plain")),
    "xml": (415, post(GOOD, kind="text/xml")),
    "pickle": (415, post(GOOD, kind="application/vnd.bentoml+pickle")),
    "latin-1": (415, post(GOOD, kind="application/json; charset=latin-1")),
    "two content types": (415, post(GOOD, "Content-Type: text/plain")),
    "10 MB": (413, post(b" " * 10_000_000)),
    "one byte too many": (413, post(b" " * (MAX_BODY + 1))),
    "10 MB in chunks": (413, chunked(10_000_000)),
    "announced 10 GB": (413, post(GOOD).replace(b"Content-Length: %d" % len(GOOD), b"Content-Length: 10000000000")),
    "half a body": (408, post(GOOD)[:-5]),
    "no body": (408, post(GOOD)[:-len(GOOD)]),
    "chunks without end": (408, chunked(65536)[:-5]),
    "101 headers": (431, post(GOOD, *(f"X-{i}: 1" for i in range(98)))),
    "10,000 headers": (431, post(GOOD, *(f"X-{i}: 1" for i in range(10_000)))),
    "17 KiB of headers": (431, post(GOOD, "X-Long: " + "x" * 17_000)),
    "64 KiB of headers": (431, post(GOOD, "X-Long: " + "x" * 65_000)),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_have_one_shape(case: str, service: Service, scorer: Scorer) -> None:
    expected, made = MALFORMED[case]
    started = time.monotonic()

    received = converse(service, made(scorer) if callable(made) else made)

    head, _, body = received.partition(b"\r\n\r\n")
    document = json.loads(body)
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert int(head.split()[1]) == expected, (head, body)
    assert set(document) == {"error", "detail", "request_id"}
    assert all(value and isinstance(value, str) for value in document.values())
    assert len(document["detail"]) < 1_000
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"x-request-id"].decode() == document["request_id"]
    assert (b"allow" in headers) is (expected == 405)
    assert time.monotonic() - started < 5


def test_head_has_no_body(service: Service) -> None:
    reply = service.request("HEAD", "/predict")

    assert (reply.status, reply.headers["allow"], reply.body) == (405, "POST", b"")


def test_a_connection_lives_on_after_a_refusal(service: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    statuses = []
    with contextlib.closing(connection):
        connection.connect()
        used = connection.sock
        for body in (b"{}", GOOD, b"[", GOOD):
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                response.read()
                statuses.append(response.status)
        assert connection.sock is used

    assert statuses == [400, 200, 400, 200]


def test_nothing_of_the_refused_is_logged_as_a_mistake(service: Service) -> None:
    assert "Traceback" not in service.log
    assert service.is_ready()


@pytest.mark.parametrize("way", ["in the body", "in two pieces"])
def test_no_request_is_hidden_in_another(service: Service, way: str) -> None:
    """`Upgrade` is taken out of a request's head before it is parsed: that must not move where its body ends."""
    hidden = b"GET /info HTTP/1.1\r\nHost: x\r\nX-Rest: "
    if way == "in the body":
        body = b"\r\nupgrade:" * len(hidden) + hidden
        pieces = [_head(len(body)) + body]
    else:
        head = _head(len(hidden), b"Connection: upgrade\r\nUpgrade: h2c\r\n")
        cut = head.index(b"Upgrade: h2c") + 3
        pieces = [head[:cut], head[cut:], hidden]
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answers = b""
        with contextlib.suppress(OSError):  # it may close before all is sent
            for piece in [*pieces, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]:
                connection.sendall(piece)
                time.sleep(0.1)  # so that it arrives as a piece of its own
            while received := connection.recv(65536):
                answers += received

    assert answers[:12] in (b"HTTP/1.1 400", b""), "nothing: the connection was reset before it could be read"
    assert b"bento_tag" not in answers


def _head(length: int, more: bytes = b"") -> bytes:
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n" % (
        more,
        length,
    )


def test_a_request_that_offers_to_upgrade_is_answered(service: Service) -> None:
    """As Java's client and `curl --http2` do by default."""
    offer = {"Content-Type": "application/json", "Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
    assert service.request("POST", "/predict", GOOD, {**offer, "HTTP2-Settings": "AAMAAABk"}).status == 200


def test_half_sent_bodies_do_not_hold_up_good_requests(service: Service) -> None:
    slow = post(GOOD)[:-5]
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=10))
            connection.sendall(slow)
        statuses = [service.post({"user_id": "u-0001"}).status for _ in range(30)]

    assert statuses == [200] * 30


def test_large_bodies_take_no_memory(service: Service) -> None:
    status = Path(f"/proc/{service.worker()}/status")

    def peak() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    before = peak()
    for body in (post(b" " * 60_000_000), chunked(60_000_000)):
        assert b" 413 " in converse(service, body)[:20]

    assert peak() - before < 10 * 1024


# --- states -----------------------------------------------------------------------------------------------


@pytest.fixture
def own(settings: dict[str, str], online: FeastStore, database: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a service with a store and a database of its own."""
    shutil.copy(online.path, tmp_path / "online.db")
    return {**settings, "CHURN_ONLINE_STORE_URL": f"sqlite:///{tmp_path}/online.db",
            "CHURN_DATABASE_URL": database, "CHURN_SPOOL_DIR": str(tmp_path / "spool")}  # fmt: skip


def test_the_store_goes_and_comes_back(bento: Path, own: dict[str, str], tmp_path: Path, scorer: Scorer) -> None:
    """Down, wrong, wiped, full spool: look-ups say so, and heal without a restart."""
    path = tmp_path / "online.db"

    def fails(code: str) -> None:
        started = time.monotonic()
        reply = service.post({"user_id": "u-0001"})
        assert (reply.status, reply.json()["error"]) == (503, code)
        assert reply.headers["retry-after"] == "1"
        assert time.monotonic() - started < 1
        assert service.post({"features": scorer.golden["rows"][0]}).status == 200
        assert service.is_ready()

    with serving_process.start(bento, {**own, "CHURN_SERVE_AS_OF": ""}) as service:
        assert service.post({"user_id": "u-0001"}).json()["stale"] is True
        path.rename(tmp_path / "away.db")
        fails("store_down")
        shutil.copy(tmp_path / "away.db", path)
        assert service.post({"user_id": "u-0001"}).status == 200
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            key = entity_key("u-0001").hex()
            connection.execute(
                "UPDATE churn_usage_agg_30d SET value = x'120161' "  # the text "a" where a number was
                f"WHERE entity_key = x'{key}' AND feature_name = 'skips_7d'"
            )
        fails("store_down")
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            for view in {f.view for f in scorer.plan.features}:
                connection.execute(f"DELETE FROM churn_{view}")
        fails("store_empty")
        (tmp_path / "away.db").replace(path)
        assert service.post({"user_id": "u-0001"}).status == 200


def test_a_full_spool_answers_nothing(bento: Path, own: dict[str, str], tmp_path: Path) -> None:
    """The database is away: predictions are given as long as they can be kept, and again when it is back."""
    away = {**own, "CHURN_DATABASE_URL": f"sqlite:///{tmp_path}/later.db", "CHURN_SPOOL_MAX_BYTES": "5000"}
    with serving_process.start(bento, away) as service:
        answered = []
        while (reply := service.post({"user_id": "u-0001"})).status == 200:
            answered.append(reply.json()["prediction_id"])
            assert len(answered) < 20
        assert (reply.status, reply.json()["error"]) == (503, "log_full")
        assert len(answered) >= 5
        eventually(lambda: "wait in the spool" in service.log and "unable to open" in service.log)

        connect(away["CHURN_DATABASE_URL"])

        eventually(lambda: service.post({"user_id": "u-0002"}).status == 200)
        eventually(lambda: "takes predictions again" in service.log)
    found = logged(away, user_id="u-0001")
    assert sorted(entry["prediction_id"] for entry in found) == sorted(answered)


@pytest.mark.parametrize("fault", ["golden", "hash", "code", "settings"])
def test_a_bento_that_is_not_right_never_gets_ready_and_says_why(
    fault: str, bento: Path, own: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bento, tmp_path / "bento"))
    model = folder / "src" / "model"
    said = {"golden": "golden rows differ", "hash": "sha256", "code": "digest", "settings": "CHURN_STALE_AFTER"}[fault]
    if fault == "golden":
        golden = json.loads((model / "golden.json").read_text())
        golden["scores"][0] += 0.01
        (model / "golden.json").write_text(json.dumps(golden))
    elif fault == "hash":
        with (model / "model.onnx").open("ab") as file:
            file.write(b"\0")
    elif fault == "code":
        with (folder / "src" / "bentos" / "churn" / "online.py").open("a") as file:
            file.write("\n")
    else:
        own = {**own, "CHURN_STALE_AFTER": "45"}
    with serving_process.start(folder, own, wait=False) as service:
        service.wait_answering()
        worker = service.worker()

        ready, predicted = service.get("/readyz"), service.post({"user_id": "u-0001"})

        assert (ready.status, predicted.status) == (503, 503)
        assert ready.json()["error"] == predicted.json()["error"] == "not_ready"
        assert said in ready.json()["detail"]
        assert said in service.log
        assert service.get("/livez").status == 200
        assert service.get("/info").json()["ready"] is False
        assert service.worker() == worker


def test_overload_is_told_to_come_back(bento: Path, own: dict[str, str], tmp_path: Path) -> None:
    """While `materialize` holds the store locked, look-ups pile up: those beyond the limit are told at once."""
    with serving_process.start(bento, {**own, "CHURN_MAX_CONCURRENCY": "2"}) as service:
        with contextlib.closing(sqlite3.connect(tmp_path / "online.db")) as writer:
            writer.execute("PRAGMA locking_mode = EXCLUSIVE")
            writer.execute("BEGIN EXCLUSIVE")
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                replies = list(pool.map(lambda _: service.post({"user_id": "u-0001"}), range(8)))
            writer.rollback()
        statuses = {reply.status for reply in replies}
        assert statuses == {429, 503}
        assert all(reply.headers["retry-after"] == "1" for reply in replies)
        assert next(r for r in replies if r.status == 429).json()["error"] == "overloaded"
        assert service.post({"user_id": "u-0001"}).status == 200
