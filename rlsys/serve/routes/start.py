"""Start and end of a client: configuration, sessions, heartbeats, capabilities."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from rlsys.serve.errors import Refusal
from rlsys.serve.failed_keys import NO_KEY
from rlsys.serve.operator.readiness import Readiness, ready_answer
from rlsys.serve.routes.common import answer, body_as, front_of, tenant_of
from rlsys.serve.wire.requests import CreateSession, FinishSession, SessionOnly

router = APIRouter(prefix="/api/v1")
REFRESH_S = 300  # how often clients ask for dynamic_config again
# With these, clients from 0.24 on send the same bodies as the newest. Its other transport is off: an old version of it
# cannot follow the redirect of an archive.
FLAGS = {
    "use_pyqwest_transport": False,
    "proto_write_fwdbwd": True,
    "fwd_via_fwdbwd": True,
    "create_model_via_load_weights": True,
    "proto_compress_fwdbwd": True,
    "parallel_fwdbwd_chunks": True,
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 20_000_000,
}


@router.get("/healthz")
async def healthz() -> Response:
    return answer({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    readiness: Readiness = request.app.state.readiness
    return await ready_answer(readiness, front_of(request))


@router.post("/client/config")
async def client_config(request: Request) -> Response:
    """Keys that begin with `sk-` are exchanged for short-lived ones: MinT's client stops without this."""
    exchanges = request.headers.get("x-api-key", "").startswith("sk-")
    return answer({**FLAGS, "pjwt_auth_enabled": True} if exchanges else FLAGS)


@router.post("/auth/token")
async def auth_token(request: Request) -> Response:
    """A short-lived key, for a key of the file: one token does not give another."""
    digest = request.scope["state"]["key_digest"]
    if digest is None:
        raise Refusal(401, NO_KEY)
    return answer({"jwt": front_of(request).signer.key_for(tenant_of(request), digest)})


@router.post("/client/dynamic_config")
async def dynamic_config(request: Request) -> Response:
    return answer({"refresh_interval_sec": REFRESH_S, "sample_cancel_enabled": True})


@router.post("/telemetry")
async def telemetry() -> Response:
    """Accepted and dropped."""
    return answer({"status": "accepted"})


@router.get("/get_server_capabilities")
async def capabilities(request: Request) -> Response:
    models = [
        {"model_name": name, "max_context_length": base.about.max_length, "trainable": True, "sampleable": True}
        for base in front_of(request).bases.values()
        for name in (base.name, *base.aliases)
    ]
    return answer({"supported_models": models})


@router.post("/create_session")
async def create_session(request: Request) -> Response:
    front, body = front_of(request), await body_as(CreateSession, request)
    session_id = await front.controller.create_session(tenant_of(request), body)
    value = {"type": "create_session", "session_id": session_id}
    names = [base.name for base in front.bases.values() if not base.about.serves_unembed]
    if names:
        value["warning_message"] = (
            f"train_unembed is off for {', '.join(names)}: vLLM on CUDA scores prompts wrongly under an adapter of the "
            "unembedding, so adapters are created without it"
        )
    return answer(value)


@router.post("/session_heartbeat")
async def session_heartbeat(request: Request) -> Response:
    body = await body_as(SessionOnly, request)
    await front_of(request).controller.heartbeat(tenant_of(request), body.session_id)
    return answer({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str, request: Request) -> Response:
    body = await body_as(FinishSession, request)
    await front_of(request).controller.finish_session(tenant_of(request), session_id, body.reason.type)
    return answer({})
