"""The clients and the checker, without a cluster: a test that cannot fail proves nothing."""

from __future__ import annotations

import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.clients import Address, Clients, check_logged_once
from tests.cluster.commands import wait_until


class Service(http.server.BaseHTTPRequestHandler):
    """Answers as the service does; user `nobody` gets no answer."""

    protocol_version = "HTTP/1.1"
    tag = "churn:v1-00000000"

    def do_POST(self) -> None:
        user = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["user_id"]
        if user == "nobody":
            self.close_connection = True
            return
        body = {"bento_tag": self.tag, "model_version": 1, "churn_probability": 0.5}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    """A service of our own on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Address(f"http://127.0.0.1:{server.server_address[1]}", "any.example.com")
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked(address: Address) -> Clients:
    """Clients that asked about somebody the service knows."""
    with Clients(address, ["1234-ABCDE"], count=2) as clients:
        wait_until("answers", lambda: len(clients.answered) >= 6, within=10)
    return clients


def log_of(clients: Clients) -> dict[str, Counter[tuple[str, int]]]:
    """A log as it should be."""
    return {reply.request_id: Counter({(reply.bento_tag, reply.model_version): 1}) for reply in clients.answered}


def test_answers_are_counted(asked: Clients) -> None:
    assert (asked.versions, asked.tags, asked.failed) == ([1], [Service.tag], [])
    check_logged_once(asked, log_of(asked))


def test_a_request_without_answer_is_a_failure(address: Address) -> None:
    """On kept and on new connections alike."""
    with Clients(address, ["1234-ABCDE", "nobody"], count=2) as clients:
        wait_until("failures", lambda: len(clients.failed) >= 4, within=10)
    assert {reply.request_id.split("-")[2] for reply in clients.failed} == {"0", "1"}
    assert "RemoteDisconnected" in str(clients)


@pytest.mark.parametrize(
    ("logged", "complaint"),
    [
        (Counter(), "not in the log"),
        (Counter({("churn:v1-00000000", 1): 2}), "more than once"),
        (Counter({("churn:v1-00000000", 1): 1, ("churn:v2-00000000", 2): 1}), "more than once"),
        (Counter({("churn:v2-00000000", 2): 1}), "another model"),
    ],
    ids=["missing", "twice", "by two models", "by another model"],
)
def test_the_checker_complains(asked: Clients, logged: Counter[tuple[str, int]], complaint: str) -> None:
    """One answer of all that is logged otherwise."""
    log = log_of(asked)
    log[asked.answered[0].request_id] = logged
    if not logged:
        del log[asked.answered[0].request_id]
    with pytest.raises(AssertionError, match=complaint):
        check_logged_once(asked, log)
