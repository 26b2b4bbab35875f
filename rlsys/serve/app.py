"""The ASGI application: routes behind the gate."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp

from rlsys.errors import RlsysError
from rlsys.serve.errors import NumberedRefusal, Refusal, answer_of, failure_of, referenced
from rlsys.serve.front import Front
from rlsys.serve.gate import Gate
from rlsys.serve.keys import Keys
from rlsys.serve.openai import routes as openai
from rlsys.serve.openai.errors import OpenAIEdge
from rlsys.serve.openai.text import TextCodec
from rlsys.serve.operator.access import reference_of
from rlsys.serve.operator.readiness import Readiness
from rlsys.serve.routes import downloads, futures, models, rest, sampling, start, training
from rlsys.serve.routes.common import answer, front_of, tenant_of

# Routes are matched in this order: the ones that are asked most come first.
ROUTERS = (
    futures.router,
    sampling.router,
    training.router,
    start.router,
    models.router,
    rest.router,
    downloads.router,
    openai.router,
)
log = logging.getLogger("rlsys.serve")


def build_app(front: Front, keys: Keys) -> ASGIApp:
    """The application of one HTTP process."""
    # A redirect from a path with a slash too many would name the scheme that this process sees: behind a proxy, http.
    app = FastAPI(title="rlsys serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.front, app.state.readiness = front, Readiness(front)
    app.state.codecs = {base.name: TextCodec(base.about) for base in front.bases.values()}
    for router in ROUTERS:
        app.router.routes.extend(router.routes)  # include_router() would inspect every function and its models again
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RlsysError, _failed)
    app.add_exception_handler(Exception, _broken)
    return OpenAIEdge(Gate(app, keys, front))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    if isinstance(error, NumberedRefusal):
        await front_of(request).controller.use_up(tenant_of(request), error)
    return answer({"detail": error.detail}, error.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RlsysError)
    failure = failure_of(error, {})
    if failure.category == "user":
        return answer({"detail": failure.error}, 400)
    reference = reference_of(request.scope)
    log.error("%s: reference %s: %s: %s", request.url.path[:200], reference, type(error).__name__, error)
    status, headers = answer_of(error)
    return answer({"detail": referenced(failure, reference).error}, status, headers)


async def _broken(request: Request, error: Exception) -> Response:
    reference = reference_of(request.scope)
    return answer({"detail": f"internal error of the server; reference {reference}"}, 500)
