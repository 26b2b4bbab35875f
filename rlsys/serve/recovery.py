"""What a new controller finds in the database: sessions, models and samplers of an earlier one.

The learner of a deployment outlives a controller. It numbers a model's calls, executes each once and keeps the latest
results, so a call that was begun is finished here, and a call that had not begun has had no effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from rlsys.client.backend import Adopted, RunProgress
from rlsys.errors import RlsysError
from rlsys.serve import parking, rows, sessions, training
from rlsys.serve.database import Row
from rlsys.serve.outcomes import outcome_of
from rlsys.serve.state import Model, Sampler, Session, State, now
from rlsys.serve.wire.results import JsonResult

log = logging.getLogger("rlsys.serve")


async def recover(state: State) -> None:
    """
    Raises:
        StorageError: the database cannot be read.
    """
    await asyncio.to_thread(state.store.reconcile)
    for row in state.database.read("SELECT * FROM sessions"):
        session = rows.session_of(row)
        state.sessions[session.id] = session
    models = state.database.read("SELECT * FROM models ORDER BY session_id, number")
    samplers = state.database.read("SELECT * FROM samplers ORDER BY session_id, number")
    for base in state.backend.bases.values():
        mine = [row for row in models if row["base"] == base.name]
        adopted = await _adopted(state, base.name, mine, samplers)
        for row in mine:
            _recover_model(state, row, adopted.runs)
        for row in samplers:
            if row["base"] == base.name:
                _recover_sampler(state, row, adopted.snapshot_keys)
    for row in models:
        if row["base"] not in state.backend.bases:
            _lose(state, row, f"its base {row['base']!r} is not served any more")
    await asyncio.to_thread(parking.remove_unknown, state)
    if models or samplers:
        log.info("recovered %d of %d models, %d samplers", len(state.models), len(models), len(state.samplers))


async def _adopted(state: State, base: str, models: list[Row], samplers: list[Row]) -> Adopted:
    keys = [
        handle.key
        for row in samplers
        if row["base"] == base and row["released"] is None and (handle := rows.snapshot_of(row)) is not None
    ]
    try:
        return await state.backend.adopt(state.backend.bases[base], [str(row["id"]) for row in models], keys)
    except RlsysError as error:
        log.warning("%s: nothing of an earlier server is left: %s", base, error)
        return Adopted({}, ())


def _recover_model(state: State, row: Row, runs: Mapping[str, RunProgress]) -> None:
    model_id, session = str(row["id"]), state.sessions[str(row["session_id"])]
    progress, lora = runs.get(model_id), rows.lora_of(row)
    folder = parking.folder_of(state, model_id)
    if lora is None or session.ended is not None or (progress is None and not folder.is_dir()):
        if progress is not None:
            state.backend.drop_model(model_id, progress.unused)
        _lose(state, row, f"its server or its learner ended before {now():%Y-%m-%d %H:%M} UTC")
        return
    created = state.promises.new(session.tenant, session.id, model_id)
    model = Model(
        id=model_id,
        session=session,
        base=state.backend.bases[str(row["base"])],
        base_model=str(row["base_model"]),
        created=created,
        number=int(row["number"] or 0),
        queue=sessions.new_queue(state, session, model_id, int(row["next"] or 1)),
        lora=lora,
        failed_passes=int(row["failed_passes"] or 0),
        unstepped=0 if progress is None else int(row["unstepped"] or 0),
        parked=folder if progress is None else None,
    )
    if progress is None:  # the gradient of passes since the last step is gone
        model.failed_passes += int(row["unstepped"] or 0)
    session.models[model.number] = model
    state.models[model_id] = model
    state.promises.settle(created, JsonResult({"type": "create_model", "model_id": model_id}))
    _recover_calls(state, model, progress)


def _recover_calls(state: State, model: Model, progress: RunProgress | None) -> None:
    unused = 1 if progress is None else progress.unused
    model.calls = unused - 1
    session = model.session
    calls = state.database.read("SELECT * FROM calls WHERE model_id = ? ORDER BY seq", (model.id,))
    for row in calls:
        seq, request_id = int(row["seq"] or 0), str(row["id"])
        promise = state.promises.restored(request_id, session.tenant, session.id, model.id)
        model.queue.remember(seq, request_id)
        number = row["number"]
        if number is not None and int(number) < unused and row["outcome"] is not None:
            training.resume(state, model, promise, int(number), outcome_of(str(row["outcome"])))
            continue
        model.failed_passes += bool(row["is_pass"])
        state.fail(promise, training.LOST, "server")
    last = max((int(row["seq"] or 0) for row in calls), default=0)
    model.queue.use_up_to(last)
    rows.forget_waiting(state.database, model.id)


def _recover_sampler(state: State, row: Row, snapshot_keys: tuple[str, ...]) -> None:
    session = state.sessions[str(row["session_id"])]
    snapshot = rows.snapshot_of(row)
    sampler = Sampler(
        id=str(row["id"]),
        session=session,
        base=state.backend.bases[str(row["base"])],
        base_model=str(row["base_model"]),
        number=int(row["number"] or 0),
        snapshot=snapshot if snapshot is not None and snapshot.key in snapshot_keys else None,
        path=None if row["path"] is None else str(row["path"]),
        is_ephemeral=bool(row["is_ephemeral"]),
        released=None if row["released"] is None else str(row["released"]),
    )
    if sampler.is_ephemeral and sampler.snapshot is None and sampler.released is None:
        sampler.released = "its unnamed snapshot ended with an earlier server; save the weights again"
    if session.ended is not None and sampler.released is None:
        sessions.release_sampler(state, sampler, f"the session of this sampler has ended: {session.ended}")
    _add(session, sampler, state)


def _add(session: Session, sampler: Sampler, state: State) -> None:
    session.samplers[sampler.number] = sampler
    state.samplers[sampler.id] = sampler


def _lose(state: State, row: Row, why: str) -> None:
    state.store.note_end(str(row["id"]), why)
    rows.forget_model(state.database, str(row["id"]))
