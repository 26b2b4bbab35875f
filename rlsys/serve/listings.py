"""Listings of runs, checkpoints and sessions, as clients see them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rlsys.serve.checkpoints import Checkpoint, RunRecord
from rlsys.serve.errors import not_found
from rlsys.serve.paths import CHECKPOINT_TYPES
from rlsys.serve.state import Session, State
from rlsys.serve.wire.requests import SearchSessions, StatusQuery

Json = dict[str, Any]  # Any: JSON


def runs(state: State, tenant: str, limit: int, offset: int) -> Json:
    found = state.store.runs(tenant)
    page = [describe_run(state, tenant, run) for run in found[offset : offset + limit]]
    return {"training_runs": page, "cursor": cursor(offset, limit, len(found))}


def describe_run(state: State, tenant: str, run: RunRecord) -> Json:
    model = state.models.get(run.run_id)
    last = run.last_request_time if model is None else model.last_request
    value: Json = {
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


def checkpoints(state: State, tenant: str, run_id: str | None, with_external: bool) -> list[Json]:
    """Newest first. Clients before 0.28 cannot read the type of external weights."""
    found = state.store.checkpoints(tenant, run_id)
    return [_checkpoint(each) for each in found if with_external or each.path.kind != "external_weights"]


def sessions_of(state: State, tenant: str) -> list[Session]:
    """Newest first."""
    mine = [each for each in state.sessions.values() if each.tenant == tenant]
    return sorted(mine, key=lambda each: _place(each.created_at, each.id), reverse=True)


def describe_session(state: State, tenant: str, session_id: str) -> Json:
    session = state.sessions.get(session_id)
    if session is None or session.tenant != tenant:
        raise not_found("session", session_id[:100])
    return {
        "training_run_ids": [model.id for model in session.models.values()],
        "sampler_ids": [sampler.id for sampler in session.samplers.values()],
        "user_metadata": session.user_metadata,
        "display_name": session.display_name,
    }


def search_sessions(state: State, tenant: str, body: SearchSessions) -> Json:
    found = [each for each in sessions_of(state, tenant) if _matches(each, body)]
    page = found[: body.limit]
    value: Json = {"sessions": [_session(state, each) for each in page]}
    if len(found) > len(page):
        last = page[-1]
        value["next_cursor"] = {"last_created_at": last.created_at.isoformat(), "last_session_id": last.id}
    return value


def cursor(offset: int, limit: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def _checkpoint(found: Checkpoint) -> Json:
    record = found.record
    value: Json = {
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


def _session(state: State, session: Session) -> Json:
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


def _status(session: Session) -> Json | None:
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
