"""Listings and management of runs, checkpoints and sessions."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request, Response

from rlsys.serve.checkpoints import Checkpoint, RunRecord
from rlsys.serve.errors import bad_request, not_found
from rlsys.serve.paths import CHECKPOINT_TYPES, RUN_ID, checkpoint_of
from rlsys.serve.routes.common import answer, body_as, state_of, tenant_of
from rlsys.serve.state import Session, State, now
from rlsys.serve.wire.requests import SearchSessions, SetTtl, StatusQuery

router = APIRouter(prefix="/api/v1")
MOST_PER_PAGE = 1000


@router.get("/training_runs")
async def training_runs(request: Request) -> Response:
    state, tenant = state_of(request), tenant_of(request)
    limit, offset = _page(request, 20)
    found = await asyncio.to_thread(_runs, state, tenant, limit, offset)
    return answer(found)


@router.get("/training_runs/{run_id}")
async def training_run(run_id: str, request: Request) -> Response:
    state, tenant = state_of(request), tenant_of(request)
    run = state.store.run(tenant, _run_id(run_id))
    if run is None:
        raise not_found("training run", run_id[:100])
    return answer(await asyncio.to_thread(_run, state, tenant, run))


@router.get("/training_runs/{run_id}/checkpoints")
async def run_checkpoints(run_id: str, request: Request) -> Response:
    state, tenant = state_of(request), tenant_of(request)
    if state.store.run(tenant, _run_id(run_id)) is None:
        raise not_found("training run", run_id[:100])
    found = await asyncio.to_thread(state.store.checkpoints, tenant, run_id)
    return answer({"checkpoints": [_checkpoint(each) for each in _shown(found, request)]})


@router.get("/checkpoints")
async def checkpoints(request: Request) -> Response:
    limit, offset = _page(request, 100)
    found = _shown(await asyncio.to_thread(state_of(request).store.checkpoints, tenant_of(request)), request)
    page = [_checkpoint(each) for each in found[offset : offset + limit]]
    return answer({"checkpoints": page, "cursor": _cursor(offset, limit, len(found))})


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}")
async def delete_checkpoint(run_id: str, kind: str, name: str, request: Request) -> Response:
    state = state_of(request)
    await asyncio.to_thread(state.store.delete, _own(request, run_id, kind, name))
    return Response(status_code=204)


@router.post("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish")
async def publish(run_id: str, kind: str, name: str, request: Request) -> Response:
    _update(request, _own(request, run_id, kind, name), {"public": True})
    return Response(status_code=204)


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish")
async def unpublish(run_id: str, kind: str, name: str, request: Request) -> Response:
    _update(request, _own(request, run_id, kind, name), {"public": False})
    return Response(status_code=204)


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl")
async def set_ttl(run_id: str, kind: str, name: str, request: Request) -> Response:
    body = await body_as(SetTtl, request)
    expires = None if body.ttl_seconds is None else now() + timedelta(seconds=body.ttl_seconds)
    _update(request, _own(request, run_id, kind, name), {"expires_at": expires})
    return Response(status_code=204)


@router.get("/sessions")
async def list_sessions(request: Request) -> Response:
    limit, offset = _page(request, 100)
    found = [each.id for each in _sessions(request)]
    return answer({"sessions": found[offset : offset + limit]})


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, request: Request) -> Response:
    session = state_of(request).sessions.get(session_id)
    if session is None or session.tenant != tenant_of(request):
        raise not_found("session", session_id[:100])
    return answer(
        {
            "training_run_ids": [model.id for model in session.models.values()],
            "sampler_ids": [sampler.id for sampler in session.samplers.values()],
            "user_metadata": session.user_metadata,
            "display_name": session.display_name,
        }
    )


@router.post("/sessions/search")
async def search_sessions(request: Request) -> Response:
    body, state = await body_as(SearchSessions, request), state_of(request)
    found = [each for each in _sessions(request) if _matches(each, body)]
    page = found[: body.limit]
    value: dict[str, Any] = {"sessions": [_session(state, each) for each in page]}
    if len(found) > len(page):
        last = page[-1]
        value["next_cursor"] = {"last_created_at": last.created_at.isoformat(), "last_session_id": last.id}
    return answer(value)


@router.get("/auth/apikey/me")
async def api_key(request: Request) -> Response:
    tenant = tenant_of(request)
    details = {"org_details": {"name": tenant}, "user_details": {"email": ""}}
    return answer({"key_id": 0, "name": tenant, "note": "", "details": details})


def _runs(state: State, tenant: str, limit: int, offset: int) -> dict[str, Any]:
    found = state.store.runs(tenant)
    page = [_run(state, tenant, run) for run in found[offset : offset + limit]]
    return {"training_runs": page, "cursor": _cursor(offset, limit, len(found))}


def _run(state: State, tenant: str, run: RunRecord) -> dict[str, Any]:
    model = state.models.get(run.run_id)
    last = run.last_request_time if model is None else model.last_request
    value: dict[str, Any] = {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": tenant,
        "is_lora": True,
        "lora_rank": run.lora_rank,
        "corrupted": False,
        "last_request_time": last.isoformat(),
        "user_metadata": run.user_metadata,
    }
    found = state.store.checkpoints(tenant, run.run_id)
    for key, kind in (("last_checkpoint", "weights"), ("last_sampler_checkpoint", "sampler_weights")):
        newest = next((each for each in found if each.path.kind == kind), None)
        if newest is not None:
            value[key] = _checkpoint(newest)
    return value


def _checkpoint(found: Checkpoint) -> dict[str, Any]:
    record = found.record
    value: dict[str, Any] = {
        "checkpoint_id": found.path.checkpoint_id,
        "checkpoint_type": CHECKPOINT_TYPES[found.path.kind],
        "time": record.time.isoformat(),
        "tinker_path": found.path.text,
        "public": record.public,
        "user_metadata": record.user_metadata,
    }
    if record.size_bytes is not None:
        value["size_bytes"] = record.size_bytes
    if record.expires_at is not None:
        value["expires_at"] = record.expires_at.isoformat()
    return value


def _shown(found: list[Checkpoint], request: Request) -> list[Checkpoint]:
    """Clients before 0.28 cannot read the type of external weights."""
    version = request.headers.get("user-agent", "").rpartition(" ")[2].split(".")
    is_old = len(version) >= 2 and version[0] == "0" and version[1].isdigit() and int(version[1][:6]) < 28
    return [each for each in found if not is_old or each.path.kind != "external_weights"]


def _own(request: Request, run_id: str, kind: str, name: str) -> Checkpoint:
    return state_of(request).store.own(tenant_of(request), checkpoint_of(run_id, kind, name))


def _update(request: Request, found: Checkpoint, update: dict[str, Any]) -> None:
    record = found.record.model_copy(update=update)
    state_of(request).store.put_record(found.tenant, found.path, record)


def _sessions(request: Request) -> list[Session]:
    tenant = tenant_of(request)
    mine = [each for each in state_of(request).sessions.values() if each.tenant == tenant]
    return sorted(mine, key=lambda each: _place(each.created_at, each.id), reverse=True)


def _session(state: State, session: Session) -> dict[str, Any]:
    saved = sum(len(state.store.checkpoints(session.tenant, model.id)) for model in session.models.values())
    return {
        "session_id": session.id,
        "created_at": session.created_at.isoformat(),
        "owner": session.tenant,
        "project_id": "",
        "status": _status(session),
        "display_name": session.display_name,
        "user_metadata": session.user_metadata,
        "tags": session.tags,
        "sdk_version": session.sdk_version,
        "checkpoints_count": saved,
    }


def _status(session: Session) -> dict[str, Any] | None:
    if session.finish_reason is not None:
        return {"type": "client_finished", "reason": {"type": session.finish_reason}}
    return {"type": "active"} if session.ended is None else None


def _matches(session: Session, body: SearchSessions) -> bool:
    """With a session id and a name, one of them suffices. All words of a name must be in it, in any case."""
    if body.cursor is not None and _place(session.created_at, session.id) >= _place(
        body.cursor.last_created_at, body.cursor.last_session_id
    ):
        return False
    words = (body.display_name or "").lower().split()
    named = bool(words) and all(word in (session.display_name or "").lower() for word in words)
    if (body.session_id is not None or words) and not (named or session.id == body.session_id):
        return False
    if body.statuses is not None and not any(_has_status(session, each) for each in body.statuses):
        return False
    return all(session.user_metadata.get(key) == value for key, value in body.user_metadata.items())


def _place(created_at: datetime, session_id: str) -> tuple[float, str]:
    return created_at.timestamp(), session_id


def _has_status(session: Session, query: StatusQuery) -> bool:
    status = _status(session)
    if status is None or status["type"] != query.type:
        return False
    return query.reasons is None or session.finish_reason in query.reasons


def _run_id(text: str) -> str:
    if not RUN_ID.fullmatch(text):
        raise not_found("training run", text[:100])
    return text


def _cursor(offset: int, limit: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def _page(request: Request, limit: int) -> tuple[int, int]:
    """(limit, offset) of a listing."""
    found = []
    for name, default, most in (("limit", limit, MOST_PER_PAGE), ("offset", 0, 2**31)):
        text = request.query_params.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most):
            raise bad_request(f"{name}: found {text[:40]!r}; wanted 0 to {most}")
        found.append(int(text))
    return found[0], found[1]
