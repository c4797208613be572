"""`python -m bentos.churn.serve FOLDER`: BentoML's worker for an extracted bento, kept running.

`bentoml serve` does the same by way of its whole command line, which takes long to import and stays in memory.
This process imports nothing of BentoML. It starts the worker as `bentoml serve` does (`_bentoml_impl.server.serving`,
BentoML 1.4), and again when it is killed; meanwhile connections wait in the queue of the socket. A worker that ends by
itself has a reason that a new one would have too, and one that was told to end has shut the socket down: then this
process ends as well.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

SERVICE = "churn"
BACKLOG = 2048
START_SECONDS = 1.0  # from a start of the worker to the next one, at least


class Arbiter:
    """Starts the worker, and lets it drain and end on SIGTERM or SIGINT; a second SIGINT, which is Ctrl-C, kills it.

    A second SIGTERM says nothing new: a parent that is killed sends one for each of its threads.
    """

    def __init__(self, folder: str, listener: socket.socket) -> None:
        self._listener = listener
        self._command = [sys.executable, "-m", "_bentoml_impl.worker.service", folder, "--service-name", SERVICE]
        self._command += ["--fd", str(listener.fileno()), "--backlog", str(BACKLOG), "--worker-id", "1", "--args", "{}"]
        self._worker: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """Until it is told to end or the worker ends by itself; the exit code."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        for restarts in itertools.count():
            started = time.monotonic()
            told = {"CHURN_WORKER_RESTARTS": str(restarts), "CHURN_PARENT_PID": str(os.getpid())}
            code = self._run_worker({**os.environ, **told})
            if self._stopping:
                return 0 if code in (0, -signal.SIGTERM) else 1
            if code >= 0 or code == -signal.SIGTERM:
                print(f"the worker ended with exit code {code}", file=sys.stderr, flush=True)
                return max(code, 1)
            print(f"the worker was killed by signal {-code}; another starts", file=sys.stderr, flush=True)
            while not self._stopping and time.monotonic() < started + START_SECONDS:
                time.sleep(0.05)
            if self._stopping:
                break
        return 0

    def _run_worker(self, environment: dict[str, str]) -> int:
        fds = [self._listener.fileno()]
        self._worker = subprocess.Popen(  # in a session of its own: Ctrl-C is for this process
            self._command, env=environment, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True
        )
        if self._stopping:  # told so while it was being started
            self._worker.terminate()
        return self._worker.wait()

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        again, self._stopping = self._stopping, True
        if self._worker is not None:
            if not again:
                self._worker.terminate()
            elif number == signal.SIGINT:
                self._worker.kill()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an IP address; raises OSError if the port is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    return listener


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told otherwise; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bentos.churn.serve", description="Serve an extracted bento.")
    parser.add_argument("folder", help="where it was extracted to")
    parser.add_argument("--host", default="127.0.0.1", help="IP address to listen at")
    parser.add_argument("--port", type=int, default=3000)
    given = parser.parse_args(arguments)
    try:
        listener = listen(given.host, given.port)
    except OSError as error:
        parser.exit(1, f"{given.host}:{given.port}: {error.strerror or error}\n")
    return Arbiter(given.folder, listener).run()


if __name__ == "__main__":
    sys.exit(main())
