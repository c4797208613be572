"""The floor: what uvicorn, Redis and ONNX Runtime cost, with nothing around them.

A bare ASGI application, one HMGET on one connection, a run of the model, an answer put together by hand. Nothing
is validated, logged or counted, and a user that is not there is an exception.
"""

from __future__ import annotations

import gc
import json
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tests.bench.raw_redis import HashLayout, RawRedis, connect

_DOUBLE = struct.Struct("<xd")


class Floor:
    """The application."""

    def __init__(self, folder: Path) -> None:
        self.layout = HashLayout.load(folder / "layout.json")
        self.codes = [
            {bytes.fromhex(value): code for value, code in column.items()}
            for column in json.loads((folder / "codes.json").read_text())
        ]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            (folder / "model.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [self.session.get_outputs()[-1].name]
        self.redis: RawRedis

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await receive()
            self.redis = await connect(os.environ["BENCH_REDIS"])
            gc.collect()
            gc.freeze()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.redis.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = b"{}"
        if scope["path"] == "/predict":
            user_id = json.loads((await receive())["body"])["user_id"]
            values = await self.redis.command(self.layout.hmget(user_id))
            row = [_number(value, codes) for value, codes in zip(values, self.codes, strict=False)]
            score = self.session.run(self.outputs, {"features": np.array([row], np.float32)})[0][0, 1]
            body = b'{"user_id":%b,"churn_probability":%r}' % (json.dumps(user_id).encode(), float(score))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _number(value: bytes, codes: dict[bytes, float]) -> float:
    """The number in a serialized feast.types.Value; texts, booleans and nulls are in the table."""
    code = codes.get(value)
    if code is not None:
        return code
    if value[0] == 0x29:
        return _DOUBLE.unpack(value)[0]
    number = 0
    for shift, byte in enumerate(value[1:]):
        number |= (byte & 0x7F) << 7 * shift
    return number


app = Floor(Path(os.environ["BENCH_MODEL"]))
