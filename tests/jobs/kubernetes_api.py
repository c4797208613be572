"""A small API server for tests: objects in memory, answered as Kubernetes answers, and as it fails.

It knows no kinds: what is at a path was put there. Bookkeeping is the real one's where the jobs rely on it:
resourceVersion (a write that changes nothing leaves it), generation, 409 on stale writes, 422 on a patch whose
`test` does not hold.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import secrets
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]

TOKEN = "token-of-a-test"  # noqa: S105  opens nothing else

REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 422: "Invalid"}


class Refused(Exception):
    """An answer that is a Status, not an object."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: Any


@dataclass
class Fault:
    """What happens to requests whose `METHOD path` matches: a delay, then a status, or no answer; or else it passes."""

    match: str
    status: int = 0
    delay: float = 0.0
    drop: bool = False  # the connection is closed without an answer
    done: bool = False  # the request is carried out first: only its answer is late, wrong, or lost
    times: int = 1_000_000
    before: Callable[[], None] | None = None  # done first: somebody else's write, for a race


class KubernetesApi:
    """The server, in a thread of its own. Use it in a `with`."""

    def __init__(self, *, namespace: str = "churn-test", tls: ssl.SSLContext | None = None) -> None:
        self.token: str | None = TOKEN  # without one everybody may ask
        self.namespace = namespace
        self.objects: dict[str, Object] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._version = 100
        self._closed = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> KubernetesApi:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self, folder: Path) -> Path:
        """A file that leads here."""
        user = {"token": self.token} if self.token else {}
        file = folder / "kubeconfig"
        found = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": self.namespace}}],
            "clusters": [{"name": "test", "cluster": {"server": f"http://{self.host}"}}],
            "users": [{"name": "test", "user": user}],
        }
        file.write_text(json.dumps(found))  # JSON is YAML
        return file

    # ---- what a test does ----------------------------------------------------------------------------------

    def path(self, kind: str, name: str = "") -> str:
        """`apps/v1/deployments`, `churn` → its path."""
        group, _, plural = kind.rpartition("/")
        root = "/api" if group == "v1" else "/apis"
        return f"{root}/{group}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def put(self, kind: str, found: Object) -> Object:
        """Make an object, whether it was there or not."""
        with self.lock:
            self.objects.pop(self.path(kind, found["metadata"].get("name", "")), None)
            return self.create(self.path(kind), found)

    def get(self, kind: str, name: str) -> Object | None:
        """A copy of it as it is now."""
        with self.lock:
            return copy.deepcopy(self.objects.get(self.path(kind, name)))

    def all(self, kind: str) -> list[Object]:
        """Copies of all of a kind."""
        with self.lock:
            return [copy.deepcopy(found) for path, found in self.objects.items() if path.startswith(self.path(kind))]

    def edit(self, kind: str, name: str, change: Callable[[Object], object]) -> Object:
        """Change one as another client, or a controller, would."""
        with self.lock:
            found = copy.deepcopy(self.objects[self.path(kind, name)])
            change(found)
            return self.store(self.path(kind, name), found)

    def delete(self, kind: str, name: str) -> None:
        with self.lock:
            self.objects.pop(self.path(kind, name), None)

    def fail(self, match: str, **how: Any) -> Fault:
        """Let matching requests fail, from now on."""
        fault = Fault(match, **how)
        self.faults.append(fault)
        return fault

    def asked(self, match: str) -> list[Request]:
        """Requests whose `METHOD path` matches."""
        return [request for request in list(self.requests) if re.search(match, f"{request.method} {request.path}")]

    # ---- what the server does ------------------------------------------------------------------------------

    def answer(self, request: Request) -> Object | None:
        """The object, or None for no answer at all."""
        self.requests.append(request)
        fault = self._fault(request)
        if fault is None:
            return self._carry_out(self._known(request))
        if fault.before is not None:
            fault.before()
        found = self._carry_out(request) if fault.done else None
        self._closed.wait(fault.delay)
        if fault.drop:
            return None
        if fault.status:
            raise Refused(fault.status, f"the test says {fault.status}")
        return found or self._carry_out(self._known(request))

    def _known(self, request: Request) -> Request:
        if self.token and request.headers.get("authorization", "").lower() != f"bearer {self.token}".lower():
            raise Refused(401, "Unauthorized")
        return request

    def _fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, f"{request.method} {request.path}"):
                    fault.times -= 1
                    return fault
        return None

    def _carry_out(self, request: Request) -> Object:
        with self.lock:
            if request.method == "POST":
                return self.create(request.path, request.body)
            if request.method == "GET" and request.path not in self.objects and _is_list(request.path):
                return self._list(request)
            found = self.objects.get(request.path)
            if found is None:
                raise Refused(404, f"{request.path.rsplit('/', maxsplit=1)[-1]} not found")
            if request.method == "GET":
                return copy.deepcopy(found)
            if request.method == "DELETE":
                return self.objects.pop(request.path)
            if request.method == "PUT":
                return self._replace(request.path, found, request.body)
            kind = request.headers.get("content-type", "")
            if kind == "application/json-patch+json":
                return self.store(request.path, json_patched(found, request.body))
            if kind in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
                return self.store(request.path, merged(found, request.body))
            raise Refused(415, f"content type {kind}")

    def _list(self, request: Request) -> Object:
        wanted = dict(pair.split("=", 1) for pair in request.query.get("labelSelector", "").split(",") if pair)
        items = [
            copy.deepcopy(found)
            for path, found in self.objects.items()
            if path.startswith(f"{request.path}/") and wanted.items() <= found["metadata"].get("labels", {}).items()
        ]
        return {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}

    def create(self, path: str, body: Object) -> Object:
        found = copy.deepcopy(body)
        metadata = found.setdefault("metadata", {})
        if "name" not in metadata:
            if not metadata.get("generateName"):
                raise Refused(422, "name or generateName is required")
            metadata["name"] = metadata["generateName"] + secrets.token_hex(3)[:5]
        if f"{path}/{metadata['name']}" in self.objects:
            raise Refused(409, f"{metadata['name']} already exists")
        if found.get("kind") == "Event" and len(found["message"].encode()) > 1024:
            raise Refused(422, "message: can have at most 1024 characters")  # it means bytes
        metadata.setdefault("uid", f"uid-{secrets.token_hex(6)}")
        metadata.setdefault("namespace", self.namespace)
        metadata["creationTimestamp"] = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        metadata["generation"] = 1
        return self.store(f"{path}/{metadata['name']}", found)

    def _replace(self, path: str, old: Object, body: Object) -> Object:
        version = body["metadata"].get("resourceVersion")
        if not version:
            raise Refused(422, "metadata.resourceVersion: must be specified for an update")
        if version != old["metadata"]["resourceVersion"]:
            raise Refused(409, "the object has been modified; please apply your changes to the latest version")
        found = copy.deepcopy(body)
        for key in ("uid", "namespace", "creationTimestamp", "generation"):
            found["metadata"].setdefault(key, old["metadata"][key])
        return self.store(path, found)

    def store(self, path: str, found: Object) -> Object:
        old = self.objects.get(path)
        if old == found:
            return copy.deepcopy(found)
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)
        if old is not None and old.get("spec") != found.get("spec"):
            found["metadata"]["generation"] = old["metadata"]["generation"] + 1
        self.objects[path] = found
        return copy.deepcopy(found)


def _is_list(path: str) -> bool:
    return len(path.rsplit("/namespaces/", maxsplit=1)[-1].split("/")) == 2


def json_patched(found: Object, patch: list[Object]) -> Object:
    """RFC 6902 as the API server does it; a step that cannot be taken refuses the whole."""
    done = copy.deepcopy(found)
    for step in patch:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
        at = done
        for part in parents:
            if not isinstance(at.get(part), dict):
                raise Refused(422, f"{step['op']} operation does not apply: doc is missing path: {step['path']}")
            at = at[part]
        if step["op"] == "test" and at.get(last) != step["value"]:
            raise Refused(422, "the server rejected our request due to an error in our request")
        if step["op"] in ("remove", "replace") and last not in at:
            raise Refused(422, f"{step['op']} operation does not apply: missing key: {step['path']}")
        if step["op"] in ("add", "replace"):
            at[last] = copy.deepcopy(step["value"])
        if step["op"] == "remove":
            del at[last]
    return done


def merged(found: Object, patch: Object) -> Object:
    """RFC 7396."""
    done = copy.deepcopy(found)
    for key, value in patch.items():
        if value is None:
            done.pop(key, None)
        else:
            done[key] = merged(done.get(key) or {}, value) if isinstance(value, dict) else value
    return done


def _handler(api: KubernetesApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            headers = {key.lower(): value for key, value in self.headers.items()}
            try:
                found = api.answer(Request(self.command, url.path, query, headers, body))
                status = 201 if self.command == "POST" else 200
            except Refused as refused:
                status = refused.status
                reason = "AlreadyExists" if str(refused).endswith("already exists") else REASONS.get(status, "")
                found = {"kind": "Status", "status": "Failure", "code": status, "reason": reason}
                found["message"] = str(refused)
            if found is None:
                self.close_connection = True
                return
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client has gone
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def until(condition: Callable[[], Any], *, seconds: float = 20.0) -> Any:
    """Wait for a condition, and say so when it does not come."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"{condition} did not come true in {seconds:.0f} s")
        time.sleep(0.01)
    return found
