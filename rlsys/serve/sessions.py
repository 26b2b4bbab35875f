"""Sessions: created by a client, kept alive by its requests, and ended with all that they hold."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from rlsys.serve import rows
from rlsys.serve.checkpoints import metadata_size
from rlsys.serve.errors import Refusal, bad_request, public_text
from rlsys.serve.model_queue import FIRST, ModelQueue
from rlsys.serve.promises import Promise
from rlsys.serve.state import Model, Sampler, Session, State, now
from rlsys.serve.wire.requests import CreateSession
from rlsys.utils.atomic_files import remove_folder

# Tinker's SDKs up to 0.15 send a call once the one before is answered or given up, so a gap stays one. They leave a
# number out when they refuse a call themselves, such as one with an unknown loss.
LAST_IN_ORDER, IN_ORDER_GAP_S = 15, 5.0
UNHEARD_S = 120.0  # clients beat every 10 s, and warn after this long without an answer


def create_session(state: State, tenant: str, body: CreateSession) -> Session:
    refuse_large("user_metadata", body.user_metadata, state.limits.metadata_bytes)
    if _alive(state, tenant) >= state.limits.sessions:
        end_unheard(state, tenant)
    alive = _alive(state, tenant)
    if alive >= state.limits.sessions:
        raise bad_request(
            f"sessions: found {alive} that are open; wanted at most limits.sessions = {state.limits.sessions}"
        )
    session = Session(
        id=uuid.uuid4().hex,
        tenant=tenant,
        tags=body.tags,
        user_metadata=body.user_metadata,
        display_name=body.display_name,
        sdk_version=body.sdk_version,
        created_at=now(),
        seen=time.monotonic(),
    )
    rows.put_session(state.database, session)
    state.sessions[session.id] = session
    return session


def _alive(state: State, tenant: str) -> int:
    return sum(each.tenant == tenant and each.ended is None for each in state.sessions.values())


def end_unheard(state: State, tenant: str) -> None:
    """End sessions whose client has stopped without a word, as those before SDK 0.28 do, when a limit is reached."""
    at = time.monotonic()
    for session in list(state.sessions.values()):
        if session.tenant == tenant and session.ended is None and at - session.seen > UNHEARD_S:
            finish(state, session, f"no request for {UNHEARD_S:g} s, and a limit of its tenant was reached")


def heartbeat(state: State, tenant: str, session_id: str) -> None:
    """
    Raises:
        Refusal: 410: it has ended, or belongs to an earlier server or another tenant; the client stops beating.
    """
    session = state.sessions.get(session_id)
    if session is None or session.tenant != tenant:
        raise Refusal(410, "session: has ended, or belongs to a server that has ended; create a new one")
    if session.ended is not None:
        raise Refusal(410, f"session: has ended: {session.ended}")
    session.seen = time.monotonic()


def finish(state: State, session: Session, why: str) -> None:
    """End a session: its models and samplers are released, and its pending requests fail."""
    if session.ended is not None:
        return
    session.ended = why
    rows.note_ended(state.database, session)
    for promise in state.promises.of_session(session.id):
        if promise.result is None:
            promise.cancel()
    for model in session.models.values():
        release_model(state, model, f"the session of this model has ended: {why}")
    for sampler in session.samplers.values():
        release_sampler(state, sampler, f"the session of this sampler has ended: {why}")


def release_model(state: State, model: Model, why: str) -> None:
    if state.models.pop(model.id, None) is None:
        return
    model.queue.abandon(why)
    _note_end(state, model.id, why)
    if model.moving:  # rlsys.serve.parking ends it
        return
    if model.parked is None:
        state.backend.drop_model(model.id, model.calls + 1)
    else:
        remove_folder(model.parked)


def lose_model(state: State, model: Model, why: str) -> None:
    """Forget a model whose learner has died."""
    if state.models.pop(model.id, None) is not None:
        model.session.models.pop(model.number, None)
        model.queue.abandon(why)
        _note_end(state, model.id, why)


def _note_end(state: State, model_id: str, why: str) -> None:
    state.store.note_end(model_id, public_text(why, state.names()))
    rows.forget_model(state.database, model_id)


def release_sampler(state: State, sampler: Sampler, why: str) -> None:
    if sampler.released is not None:
        return
    sampler.released = why
    if sampler.snapshot is not None:
        state.backend.release(sampler.base, sampler.snapshot)
        sampler.snapshot = None
    rows.note_snapshot(state.database, sampler)


def open_sampler(state: State, sampler: Sampler) -> None:
    """Register a sampling session. Above the limit, the tenant's oldest idle unnamed one is released. If this fails, so
    is its snapshot.

    Raises:
        Refusal: 400: as `make_room`.
        StorageError: its row cannot be written.
    """
    try:
        make_room(state, sampler.session.tenant)
        rows.put_sampler(state.database, sampler)
    except BaseException:
        if sampler.snapshot is not None:
            state.backend.release(sampler.base, sampler.snapshot)
        raise
    state.samplers[sampler.id] = sampler
    sampler.session.samplers[sampler.number] = sampler


def make_room(state: State, tenant: str) -> None:
    """
    Raises:
        Refusal: 400: the tenant's samplers are all named or busy.
    """
    mine = [each for each in state.samplers.values() if each.session.tenant == tenant and each.released is None]
    if len(mine) < state.limits.samplers:
        return
    idle = [each for each in mine if each.is_ephemeral and not each.running]
    if not idle:
        raise bad_request(
            f"samplers: found {len(mine)} that are open; wanted at most limits.samplers = {state.limits.samplers}: end "
            "a session that is not needed"
        )
    oldest = min(idle, key=lambda each: each.used)
    release_sampler(state, oldest, f"it was the oldest idle of limits.samplers = {state.limits.samplers} samplers")


def new_queue(state: State, session: Session, model_id: str, first: int = FIRST) -> ModelQueue:
    version = re.match(r"0\.(\d{1,4})\.", session.sdk_version, re.ASCII)
    in_order = version is not None and int(version[1]) <= LAST_IN_ORDER
    gap_s = min(state.limits.gap_s, IN_ORDER_GAP_S) if in_order else state.limits.gap_s
    return ModelQueue(gap_s, first=first, advanced=lambda number: rows.put_next(state.database, model_id, number))


def sweep(state: State) -> None:
    """Once a second: end silent sessions, close gaps, forget old results."""
    at = time.monotonic()
    for session in list(state.sessions.values()):
        silent = at - session.seen
        if session.ended is None and silent > state.limits.session_s:
            finish(state, session, f"no request for {state.limits.session_s:g} s (limits.session_s)")
        elif session.ended is not None and silent > max(state.limits.ended_session_s, state.limits.session_s):
            _forget(state, session)
    for model in list(state.models.values()):
        model.queue.close_overdue()
    state.promises.expire()


def note_seen(state: State) -> None:
    """Every few seconds: keep when clients were last heard."""
    rows.put_seen(state.database, [each for each in state.sessions.values() if each.ended is None])


def _forget(state: State, session: Session) -> None:
    for sampler in session.samplers.values():
        state.samplers.pop(sampler.id, None)
    del state.sessions[session.id]
    rows.forget_session(state.database, session.id)


def refuse_large(what: str, value: dict[str, Any], limit: int) -> None:
    found = metadata_size(value)
    if found > limit:
        raise bad_request(f"{what}: found {found} bytes of JSON; wanted at most limits.metadata_bytes = {limit}")


def promise_of(state: State, session: Session, model_id: str | None = None) -> Promise:
    return state.promises.new(session.tenant, session.id, model_id)
