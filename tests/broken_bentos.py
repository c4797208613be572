"""Bentos as a bad build would have left them: archives in which some files are others, and what to make of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping

Change = Callable[[bytes], bytes]


def changed(archive: bytes, changes: Mapping[str, Change]) -> bytes:
    """The archive with files changed: those whose name ends with a key, by its function."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as source, tarfile.open(fileobj=out, mode="w") as target:
        for member in source:
            file = source.extractfile(member)
            data = file.read() if file else b""
            for name, change in changes.items():
                if member.name.endswith(name):
                    data = change(data)
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    return out.getvalue()


def wrong_golden(data: bytes) -> bytes:
    golden = json.loads(data)
    golden["scores"][0] += 0.1
    return json.dumps(golden).encode()


def crash(data: bytes) -> bytes:
    return data + b"\nraise SystemExit('broken build')\n"


def slow(data: bytes) -> bytes:
    return data + b"\nimport time; time.sleep(60)\n"


def misbehaving(statement: str) -> Change:
    """Code that is no part of what the bento's digest covers, and does something at each /predict with a body."""
    code = f"""
import asyncio
from bentos.churn import guard
_predict_answer = guard.Guard._answer
async def _answer(self, scope, wire):
    if scope["path"] == "/predict" and wire.source != "probe":
        {statement}
    return await _predict_answer(self, scope, wire)
guard.Guard._answer = _answer
"""
    return lambda data: data + code.encode()


WORSE = {
    "new pods failed": misbehaving("raise RuntimeError('a fault that no golden row shows')"),
    "new pods answer 95 %": misbehaving("await asyncio.sleep(0.3)"),
}

BREAKS = {
    "golden rows differ": ("src/model/golden.json", wrong_golden),
    "crash": ("src/bentos/churn/service.py", crash),
    "not ready within": ("src/bentos/churn/service.py", slow),
}
