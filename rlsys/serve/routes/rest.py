"""Listings and management of runs, checkpoints and sessions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from rlsys.serve.errors import bad_request, not_found
from rlsys.serve.listings import cursor
from rlsys.serve.paths import RUN_ID, checkpoint_of
from rlsys.serve.routes.common import answer, body_as, front_of, tenant_of
from rlsys.serve.wire.requests import SearchSessions, SetTtl

router = APIRouter(prefix="/api/v1")
MOST_PER_PAGE = 1000
CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


@router.get("/training_runs")
async def training_runs(request: Request) -> Response:
    limit, offset = _page(request, 20)
    return answer(await front_of(request).controller.runs(tenant_of(request), limit, offset))


@router.get("/training_runs/{run_id}")
async def training_run(run_id: str, request: Request) -> Response:
    return answer(await front_of(request).controller.describe_run(tenant_of(request), _run_id(run_id)))


@router.get("/training_runs/{run_id}/checkpoints")
async def run_checkpoints(run_id: str, request: Request) -> Response:
    controller, with_external = front_of(request).controller, _reads_external(request)
    found = await controller.checkpoints(tenant_of(request), _run_id(run_id), with_external)
    return answer({"checkpoints": found})


@router.get("/checkpoints")
async def checkpoints(request: Request) -> Response:
    limit, offset = _page(request, 100)
    found = await front_of(request).controller.checkpoints(tenant_of(request), None, _reads_external(request))
    return answer({"checkpoints": found[offset : offset + limit], "cursor": cursor(offset, limit, len(found))})


@router.delete(CHECKPOINT)
async def delete_checkpoint(run_id: str, kind: str, name: str, request: Request) -> Response:
    await front_of(request).controller.delete_checkpoint(tenant_of(request), checkpoint_of(run_id, kind, name))
    return Response(status_code=204)


@router.post(f"{CHECKPOINT}/publish")
async def publish(run_id: str, kind: str, name: str, request: Request) -> Response:
    await front_of(request).controller.publish(tenant_of(request), checkpoint_of(run_id, kind, name), True)
    return Response(status_code=204)


@router.delete(f"{CHECKPOINT}/publish")
async def unpublish(run_id: str, kind: str, name: str, request: Request) -> Response:
    await front_of(request).controller.publish(tenant_of(request), checkpoint_of(run_id, kind, name), False)
    return Response(status_code=204)


@router.put(f"{CHECKPOINT}/ttl")
async def set_ttl(run_id: str, kind: str, name: str, request: Request) -> Response:
    body = await body_as(SetTtl, request)
    path = checkpoint_of(run_id, kind, name)
    await front_of(request).controller.set_ttl(tenant_of(request), path, body.ttl_seconds)
    return Response(status_code=204)


@router.get("/sessions")
async def list_sessions(request: Request) -> Response:
    limit, offset = _page(request, 100)
    found = await front_of(request).controller.session_ids(tenant_of(request))
    return answer({"sessions": found[offset : offset + limit]})


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, request: Request) -> Response:
    return answer(await front_of(request).controller.describe_session(tenant_of(request), session_id))


@router.post("/sessions/search")
async def search_sessions(request: Request) -> Response:
    body = await body_as(SearchSessions, request)
    return answer(await front_of(request).controller.search_sessions(tenant_of(request), body))


@router.get("/auth/apikey/me")
async def api_key(request: Request) -> Response:
    tenant = tenant_of(request)
    details = {"org_details": {"name": tenant}, "user_details": {"email": ""}}
    return answer({"key_id": 0, "name": tenant, "note": "", "details": details})


def _reads_external(request: Request) -> bool:
    """Clients before 0.28 cannot read the type of external weights."""
    version = request.headers.get("user-agent", "").rpartition(" ")[2].split(".")
    is_old = len(version) >= 2 and version[0] == "0" and version[1].isdigit() and int(version[1][:6]) < 28
    return not is_old


def _run_id(text: str) -> str:
    if not RUN_ID.fullmatch(text):
        raise not_found("training run", text[:100])
    return text


def _page(request: Request, limit: int) -> tuple[int, int]:
    """(limit, offset) of a listing."""
    found = []
    for name, default, most in (("limit", limit, MOST_PER_PAGE), ("offset", 0, 2**31)):
        text = request.query_params.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most):
            raise bad_request(f"{name}: found {text[:40]!r}; wanted 0 to {most}")
        found.append(int(text))
    return found[0], found[1]
