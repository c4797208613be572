"""What stands where MLflow should: whatever it answers is one kind of error, and a rollback works all the same."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator

import pytest

from jobs.pin import rollback
from jobs.promote import promote
from jobs.registry import Registry, RegistryError
from jobs.serving import LocalServing
from jobs.settings import Settings
from tests.jobs.conftest import Trained

Answering = Callable[[bytes], str]


def http(body: bytes, *, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return b"HTTP/1.0 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, length, body)


GARBAGE = {
    "a page": http(b"<html></html>"),
    "half of it": http(b'{"registered_model":', length=2000),
    "no HTTP": b"\x00\x01\xff\n\n",
    "nothing": b"",
    "a list": http(b"[1]"),
    "a number": http(b"42"),
    "null": http(b"null"),
    "an empty object": http(b"{}"),
    "a name for an object": http(b'{"registered_model": "x", "model_version": "x"}'),
    "other members": http(b'{"registered_model": {"aliases": ["x"]}, "model_version": {"tags": ["x"]}}'),
    "no text": http(b"\xff\xfe"),
    "an error": http(b"oops", status=b"500 Oops"),
    "half an error": http(b"oops", status=b"500 Oops", length=400),
    "another's 404": http(b"oops", status=b"404 Not Found"),
}


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Starts a server that answers so to everything; its URL."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), socketserver.StreamRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

        def start(answer: bytes) -> str:
            class Handler(socketserver.StreamRequestHandler):
                def handle(self) -> None:
                    while self.rfile.readline().strip():
                        pass
                    self.wfile.write(answer)

            server.RequestHandlerClass = Handler
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield start
        server.shutdown()


@pytest.mark.parametrize("kind", GARBAGE)
def test_no_answer_of_mlflows_is_one_kind_of_error(
    promotable: Callable[..., Settings], answering: Answering, kind: str
) -> None:
    registry = Registry(promotable(mlflow_url=answering(GARBAGE[kind])))

    with pytest.raises(RegistryError, match=r"MLflow .*answer.* registered-models/get"):
        registry.aliases()
    with pytest.raises(RegistryError, match=r"MLflow .*answer.* model-versions/get"):
        registry.version(1)


def test_a_rollback_waits_once_and_briefly_for_a_registry_that_hangs(
    promotable: Callable[..., Settings], trained: Trained
) -> None:
    settings = promotable()
    promote(settings)
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections are made, and nobody takes them
        hanging = promotable(mlflow_url=f"http://127.0.0.1:{server.getsockname()[1]}")
        assert rollback(hanging, reason="doubts", by="ada").result == "rolled_back"
        server.setblocking(False)
        questions = [server.accept()]
        with pytest.raises(BlockingIOError):
            server.accept()

    assert len(questions) == 1
    assert LocalServing(settings).served_tag() == trained.first_tag


@pytest.mark.parametrize("kind", ["an empty object", "no HTTP", "an error"])
def test_rollback_works_while_something_else_answers(
    promotable: Callable[..., Settings], trained: Trained, answering: Answering, kind: str
) -> None:
    settings = promotable()
    promote(settings)

    assert rollback(promotable(mlflow_url=answering(GARBAGE[kind])), reason="doubts", by="ada").result == "rolled_back"
    assert LocalServing(settings).served_tag() == trained.first_tag
