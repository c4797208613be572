"""FastAPI on uvicorn with our parts: the same code from the request's body to the answer's, log included.

The leanest way FastAPI has, a route that takes the request and returns a response. What is left to compare is
what each puts around that: routing, limits, request ids and metrics, with or without BentoML.
"""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from fastapi import FastAPI, Request, Response

from bentos.churn.config import read_config
from bentos.churn.metrics import Metrics
from bentos.churn.model import Scorer
from bentos.churn.online import open_store
from bentos.churn.predict import Predictor
from bentos.churn.requests import RequestError
from bentos.churn.shipper import Shipper, open_log
from bentos.churn.spool import Spool


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load as our service does, and empty the spool at the end."""
    config = read_config(os.environ)
    scorer = Scorer(Path(os.environ["BENCH_BENTO"]))
    scorer.check_golden()
    store = open_store(config.online_store_url, config.project, scorer.plan)
    spool = Spool(config.spool_dir, max_bytes=config.spool_max_bytes)
    shipper = Shipper(spool, open_log(config.database_url))
    shipper.start()
    app.state.predictor = Predictor(config, scorer, store, spool, Metrics())
    gc.collect()
    gc.freeze()
    yield
    shipper.drain(10)
    store.close()


app = FastAPI(lifespan=lifespan)


@app.get("/readyz")
async def readyz() -> Response:
    """The application is up when this is answered."""
    return Response(b"{}", media_type="application/json")


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Our predictor's answer."""
    request_id = request.headers.get("x-request-id") or uuid4().hex
    try:
        answer = await request.app.state.predictor(await request.body(), request_id, "client")
    except RequestError as refused:
        return Response(refused.detail, refused.status, {"x-request-id": request_id})
    return Response(answer.body, answer.status, {"x-request-id": request_id}, "application/json")
