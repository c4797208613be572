"""The service that a bento serves: one class, one worker process.

BentoML starts the process, loads this and runs its lifespan. Requests do not go through BentoML's layers
(tracing, timers, its routes): the guard stands in front and answers them itself.

A worker that cannot serve (wrong hash, golden rows not reproduced, wrong settings) stays up and not ready,
and says why at /readyz and in its log: dying would only start it again.

On SIGTERM readiness goes first and answers close their connections; the listener stays open for
`CHURN_DRAIN_SECONDS`, until balancers and proxies have taken notice. Then uvicorn finishes what is under
way, and the spool is emptied into the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bentoml
from _bentoml_sdk import Service  # type: ignore[import-untyped]
from bentoml import server_context

from bentos.churn.config import Config, read_config
from bentos.churn.guard import Answer, Guard, error
from bentos.churn.keys import Callers
from bentos.churn.metrics import Metrics
from bentos.churn.requests import RequestError

log = logging.getLogger(__name__)

LOG_DRAIN_SECONDS = 10.0
STORE_SECONDS = 5.0  # from one look at an online store that cannot be read to the next
_SOURCES = Path(__file__).resolve().parents[2]  # the folder that holds bentos/ and model/
_PR_SET_PDEATHSIG = 1


class ChurnApi:
    """What the guard stands in front of: the predictor once it is ready, and the pages beside it."""

    def __init__(self) -> None:
        self.draining = False
        self.max_concurrency = 1
        self.callers = Callers()
        self.reason = "the model is being loaded"  # why it is not ready; empty: it is
        self.metrics = Metrics()
        self.info: dict[str, Any] = {"started_at": datetime.now(UTC).isoformat(timespec="seconds")}
        self._predictor: Any = None
        self._store: Any = None
        self._mending: asyncio.Task[None] | None = None
        self._shipper: Any = None
        self._openapi = b"{}"
        self.pages: dict[str, Callable[[], Answer]] = {
            "/livez": lambda: _page({"alive": True}),
            "/readyz": self._readyz,
            "/info": lambda: _page({**self.info, "ready": self.ready, "draining": self.draining}),
            "/metrics": self._metrics_page,
            "/docs.json": lambda: Answer(200, self._openapi),
        }

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return not self.reason and not self.draining

    def load(self) -> Config | None:
        """Get ready, or keep the reason why not."""
        try:
            config = self._load()
        except Exception as failure:
            self.reason = str(failure) or type(failure).__name__
            log.exception("not ready, and will not be: %s", self.reason)
            return None
        self.reason = ""
        log.info("ready: %s", " ".join(f"{key}={value}" for key, value in self.info.items()))
        return config

    def _load(self) -> Config:
        from bentos.churn.model import ModelError, Scorer, code_digest
        from bentos.churn.online import open_store
        from bentos.churn.openapi import describe
        from bentos.churn.predict import Predictor
        from bentos.churn.shipper import Shipper, open_log
        from bentos.churn.spool import Spool

        scorer = Scorer(_SOURCES)
        digest = code_digest(Path(__file__).parent)
        self.info = {
            "bento_tag": scorer.bento_tag,
            "model_version": scorer.model_version,
            "run_id": scorer.run_id,
            "code_digest": digest,
            "feature_service": scorer.about["feature_service"],
            **self.info,
        }
        if digest != scorer.about["code_digest"]:
            raise ModelError(f"the code has digest {digest}, the bento was built with {scorer.about['code_digest']}")
        scorer.check_golden()
        config = read_config(os.environ)
        self.callers = Callers(config.api_keys_dir, config.probe_token)
        self._store = open_store(config.online_store_url, config.project, scorer.plan)
        predictions = open_log(config.database_url)
        spool = Spool(config.spool_dir, max_bytes=config.spool_max_bytes, fsync=config.spool_fsync == "batch")
        self._shipper = Shipper(spool, predictions)
        self._shipper.start()
        self.callers.watch()
        self._predictor = Predictor(config, scorer, self._store, spool, self.metrics)
        self._openapi = json.dumps(describe(scorer, keys=self.callers.required)).encode()
        self.max_concurrency = config.max_concurrency
        self.metrics.spool, self.metrics.shipper, self.metrics.callers = spool, self._shipper, self.callers.requests
        self.metrics.info = {"bento_tag": scorer.bento_tag, "model_version": str(scorer.model_version)}
        return config

    async def warm_up(self) -> None:
        """Connect to the online store, which the first request would pay for.

        It may be away or empty: look-ups say it. If it is filled in a way that cannot be read the process is not
        ready until that is mended, by `materialize` or with another bento.
        """
        if self.reason:  # it will not be ready anyhow
            return
        if reason := await self._unreadable():
            log.warning("not ready: %s", reason)
            self.reason = reason
            self._mending = asyncio.create_task(self._await_readable())

    async def _await_readable(self) -> None:
        while self.reason:
            await asyncio.sleep(STORE_SECONDS)
            self.reason = await self._unreadable()
        log.info("ready: the online store can be read")

    async def _unreadable(self) -> str:
        """Why no look-up will be answered until something changes in the online store; empty: they may be."""
        from bentos.churn.online import LayoutMismatch, StoreDown, StoreEmpty

        try:
            await self._store.probe()
        except LayoutMismatch as mismatch:
            return str(mismatch)
        except (StoreDown, StoreEmpty) as reason:
            log.warning("look-ups cannot be answered yet: %s", reason)
        return ""

    async def predict(self, body: bytes, request_id: str, source: str) -> Answer:
        """See guard.Api."""
        if self.reason:
            raise RequestError(503, "not_ready", self.reason)
        return await self._predictor(body, request_id, source)  # type: ignore[no-any-return]

    def count(self, status: int, seconds: float) -> None:
        """See guard.Api."""
        self.metrics.request(status, seconds)

    def close(self) -> None:
        """Empty the spool into the database, as far as it goes in time."""
        self.draining = True
        if self._store is not None:
            self._store.close()
        if self._shipper is not None:
            if self._shipper.drain(LOG_DRAIN_SECONDS):
                log.info("stopped; every prediction is in the database")
            else:
                log.warning("stopped; predictions are left in the spool for the next process")

    def _readyz(self) -> Answer:
        if self.ready:
            return _page({"ready": True})
        return error(503, "not_ready", self.reason or "the process is about to stop", "")

    def _metrics_page(self) -> Answer:
        self.metrics.ready = self.ready
        return Answer(200, self.metrics.render(), (), b"text/plain; version=0.0.4; charset=utf-8")


def _page(document: dict[str, Any]) -> Answer:
    return Answer(200, json.dumps(document).encode())


API = ChurnApi()


class GuardedService(Service):  # type: ignore[misc]
    """A BentoML service whose ASGI application is the guard."""

    def to_asgi(self, is_main: bool = True) -> Guard:
        """The application that BentoML's worker runs."""
        import uvicorn.config

        uvicorn.config.HTTP_PROTOCOLS["auto"] = "bentos.churn.protocol:Protocol"
        uvicorn.config.WS_PROTOCOLS["auto"] = None
        return Guard(super().to_asgi(is_main), API)


@bentoml.service(
    name="churn",
    service_class=GuardedService,
    workers=1,  # one spool folder and one set of numbers; more processes are more replicas
    tracing={"excluded_urls": ".*"},
    metrics={"enabled": False},  # ours are at /metrics
    logging={"access": {"enabled": False}},
)
class Churn:
    """Churn probabilities of users, by their id or by their features."""

    def __init__(self) -> None:
        if server_context.worker_index is not None:
            _log_as_bentoml_does()
        self._config = API.load()
        self._listener: socket.socket | None = None

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def begin(self) -> None:
        """Look after signals, and keep the garbage collector off what was loaded."""
        if server_context.worker_index is not None:
            _end_with_parent()
            _allow_connections()
            self._listener = _listener()
            if self._listener is not None:
                from bentos.churn import protocol

                self._listener.setblocking(False)
                protocol.listener = self._listener
        if threading.current_thread() is threading.main_thread():
            _drain_on_sigterm(self._config.drain_seconds if self._config else 0.0)
        await API.warm_up()
        gc.collect()
        gc.freeze()
        gc.callbacks.append(API.metrics.pauses)
        _give_back_memory()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def end(self) -> None:
        """The listener is closed and every answer sent."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
        await asyncio.get_running_loop().run_in_executor(None, API.close)


def _log_as_bentoml_does() -> None:
    ours, theirs = logging.getLogger("bentos"), logging.getLogger("bentoml")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)


def _end_with_parent() -> None:
    """SIGTERM when the process that started this one dies, however it dies, even if that was before we asked."""
    parent = int(os.environ.get("CHURN_PARENT_PID", os.getppid()))  # from bentos.churn.serve
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _allow_connections() -> None:
    """As many as the system lets this process have: each holds a file open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _give_back_memory() -> None:
    """What loading took and does not need any more."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _listener() -> socket.socket | None:
    """The socket that the parent process opened and handed to this one.

    The parent holds it open until this process is gone. To close it here is not enough: clients would still be
    let in, and wait for nobody. It has to be shut down.
    """
    try:
        return socket.socket(fileno=os.dup(int(sys.argv[sys.argv.index("--fd") + 1])))
    except (ValueError, IndexError, OSError):
        log.warning("the listening socket was not found: connections may hang while the service stops")
        return None


def _drain_on_sigterm(seconds: float) -> None:
    """On SIGTERM stop being ready, and tell uvicorn only after `seconds`."""
    stop_listening = signal.getsignal(signal.SIGTERM)
    loop = asyncio.get_running_loop()

    def finish() -> None:
        if callable(stop_listening):
            stop_listening(signal.SIGTERM, None)

    def drain() -> None:
        if not API.draining:
            API.draining = True
            log.info("SIGTERM: no longer ready; the listener closes in %g s", seconds)
            loop.call_later(seconds, finish)

    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(drain) and None)
