"""Commands, waits, and processes that outlive us: started detached, recorded, and stopped by id."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cluster.node import pins

PROCESSES = pins.STATE / "processes"


class NodeError(Exception):
    """A sentence for the person at the terminal."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(
    command: Sequence[str | Path],
    *,
    timeout: float,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """What the command printed. One that fails raises with the end of what it said."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, check=False, input=stdin, capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        raise NodeError(f"{' '.join(words)} took longer than {timeout:.0f} s; last it said: {said[-2000:]}") from None
    if done.returncode:
        raise NodeError(f"{' '.join(words)} ended with {done.returncode}: {(done.stderr or done.stdout)[-3000:]}")
    return done.stdout


def wait_until(what: str, met: Callable[[], str], *, timeout: float, every: float = 0.2) -> None:
    """Return when `met` answers "". Any other answer is what it saw, told when time is up."""
    end = time.monotonic() + timeout
    while saw := met():
        if time.monotonic() > end:
            raise NodeError(f"{what}: not within {timeout:.0f} s; last seen: {saw}. Logs are in {pins.LOGS}")
        time.sleep(every)


def start(name: str, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> None:
    """Start a process that stays when we end, with its log in LOGS and its id on record."""
    PROCESSES.mkdir(parents=True, exist_ok=True)
    pins.LOGS.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    with (pins.LOGS / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd="/", start_new_session=True
        )
    record = {"pid": process.pid, "born": _born(process.pid), "command": words, "env": dict(env) if env else None}
    (PROCESSES / f"{name}.json").write_text(json.dumps(record))


def is_alive(name: str) -> bool:
    """Whether the recorded process runs, and is the one we started: ids are used again."""
    file = PROCESSES / f"{name}.json"
    if not file.exists():
        return False
    record = json.loads(file.read_text())
    return bool(record["born"]) and _born(record["pid"]) == record["born"]


def stop(name: str, *, grace: float = 15) -> None:
    """End the recorded process; return when it is gone. One that is not ours any more is left alone."""
    file = PROCESSES / f"{name}.json"
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not is_alive(name):
            break
        os.kill(json.loads(file.read_text())["pid"], number)
        end = time.monotonic() + grace
        while is_alive(name) and time.monotonic() < end:
            time.sleep(0.05)
    if is_alive(name):
        raise NodeError(f"{name} does not end, not even by SIGKILL; see {file}")
    file.unlink(missing_ok=True)


def restart(name: str) -> None:
    """End the recorded process and start it with the same command."""
    file = PROCESSES / f"{name}.json"
    if not file.exists():
        raise NodeError(f"{name} was not started here: {file} is missing; `up` first")
    record = json.loads(file.read_text())
    stop(name)
    start(name, record["command"], env=record["env"])


def _born(pid: int) -> str:
    """When the process started, as boot and clock ticks; "" for none and for a zombie."""
    try:
        # the name stands in parentheses and may contain any character
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    if fields[0] in "ZX":
        return ""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/" + fields[19]
