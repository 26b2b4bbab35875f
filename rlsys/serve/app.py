"""The ASGI application: routes behind the gate, and the server's periodic work."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp

from rlsys.errors import RlsysError
from rlsys.serve import sessions
from rlsys.serve import training as operations
from rlsys.serve.errors import NumberedRefusal, Refusal, failure_of
from rlsys.serve.gate import Gate
from rlsys.serve.keys import Keys
from rlsys.serve.routes import downloads, futures, models, rest, sampling, start, training
from rlsys.serve.routes.common import answer, state_of, tenant_of
from rlsys.serve.state import State, now

SWEEP_S = 1.0
TTL_SWEEP_S = 30.0
DRAIN_S = 30.0  # how long pending work may take at the end
# Routes are matched in this order: the ones that are asked most come first.
ROUTERS = (futures.router, sampling.router, training.router, start.router, models.router, rest.router, downloads.router)
log = logging.getLogger("rlsys.serve")


def build_app(state: State, keys: Keys) -> ASGIApp:
    """The application on a state whose backend runs."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(_every(SWEEP_S, lambda: sessions.sweep(state))),
            asyncio.create_task(_every_in_thread(TTL_SWEEP_S, lambda: remove_expired(state))),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await stop_work(state)

    app = FastAPI(title="rlsys serve", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.server = state
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RlsysError, _failed)
    app.add_exception_handler(Exception, _broken)
    return Gate(app, keys, state)


async def stop_work(state: State) -> None:
    """Refuse new work, let running work finish, then end all sessions. Can be called twice."""
    state.closing = True
    for model in list(state.models.values()):
        model.queue.abandon("the server is stopping")  # what they wait for is refused from now on
    deadline = asyncio.get_running_loop().time() + DRAIN_S
    while state.promises.unsettled and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    for session in list(state.sessions.values()):
        sessions.finish(state, session, "the server is stopping")
    await state.drain(DRAIN_S)


def remove_expired(state: State) -> None:
    """Delete checkpoints whose time is over. Samplers that were opened from them keep their weights."""
    for checkpoint in state.store.expired(now()):
        state.store.delete(checkpoint)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    if isinstance(error, NumberedRefusal):
        operations.use_up(state_of(request), tenant_of(request), error)
    return answer({"detail": error.detail}, error.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RlsysError)
    names = {str(state_of(request).store.root): "(checkpoints)"}
    failure = failure_of(error, names)
    return answer({"detail": failure.error}, 400 if failure.category == "user" else 500)


async def _broken(request: Request, error: Exception) -> Response:
    reference = secrets.token_hex(6)
    log.error("%s %s: reference %s", request.method, request.url.path[:200], reference)
    return answer({"detail": f"internal error of the server; reference {reference}"}, 500)


async def _every(seconds: float, work: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            work()
        except Exception:  # the next round must come
            log.exception("periodic work failed")


async def _every_in_thread(seconds: float, work: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(seconds)
        with suppress(Exception):
            await asyncio.to_thread(_logged, work)


def _logged(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception:  # as above
        log.exception("periodic work failed")
