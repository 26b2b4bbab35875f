"""The application on the operator's port: page, status, metrics, health."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp

from rlsys.errors import RlsysError
from rlsys.serve.errors import Refusal
from rlsys.serve.front import Front
from rlsys.serve.operator.figures import Rates, as_json
from rlsys.serve.operator.guard import Guard
from rlsys.serve.operator.metrics import Metrics
from rlsys.serve.operator.readiness import Readiness, ready_answer
from rlsys.serve.wire.results import JSON, json_bytes

NOTE_S = 2.0
PAGE = Path(__file__).with_name("page.html")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Operator:
    """What the operator's side shows of one server."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.metrics = Metrics()
        self.readiness = Readiness(front)
        self._rates = Rates()

    def app(self, token: str | None) -> ASGIApp:
        """`token`: what requests carry; None: loopback alone."""
        app = FastAPI(title="rlsys operator", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(Refusal, _refused)
        page = PAGE.read_bytes()

        @app.get("/")
        async def show() -> Response:
            return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

        @app.get("/status.json")
        async def status() -> Response:
            found = as_json(await self._front.controller.figures(), self._rates)
            return _json({**found, "stopping": self._front.closing, "ready": await self.readiness.states()})

        @app.get("/metrics")
        async def metrics() -> Response:
            text = self.metrics.text(await self._front.controller.figures())
            return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8", headers=HEADERS)

        @app.get("/healthz")
        @app.get("/api/v1/healthz")
        async def healthz() -> Response:
            return _json({"status": "ok"})

        @app.get("/readyz")
        @app.get("/api/v1/readyz")
        async def readyz() -> Response:
            return await ready_answer(self.readiness, self._front)

        return Guard(app, token)

    async def note_rates(self) -> None:
        """Runs until it is cancelled."""
        while True:
            with suppress(Refusal, RlsysError):  # the controller starts again
                self._rates.note(await self._front.controller.figures())
            await asyncio.sleep(NOTE_S)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _json({"detail": error.detail}, error.status)


def _json(value: object, status: int = 200) -> Response:
    return Response(json_bytes(value), status, media_type=JSON, headers=HEADERS)
