"""Models between learner and disk: idle ones are parked in a folder, and come back at their next call.

A model is parked with its optimizer, and only between steps: the gradient of a pass is on the learner alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from rlsys.client.requests import SaveFolder
from rlsys.errors import RlsysError
from rlsys.serve import rows
from rlsys.serve.paths import folder_name
from rlsys.serve.state import Held, Model, State
from rlsys.utils.atomic_files import remove_folder

FOLDER = ".parked"  # below the store's root; no tenant's name begins with a dot
AGAIN_S = 60.0  # after the disk has refused a model
log = logging.getLogger("rlsys.serve")


def when_resident(state: State, model: Model, call: Held) -> None:
    """Begin a call once its model is on the learner, after the calls before it."""
    if model.parked is None and not model.moving:
        call.go()
        return
    model.held_back.append(call)
    if not model.moving:
        model.moving = True
        state.spawn(_restore(state, model))


def park_idle(state: State) -> None:
    """Park models without a request for `limits.idle_model_s`, and the longest idle of a base that has more than
    `limits.resident_models`."""
    at = time.monotonic()
    if at < state.parks_after:
        return
    for base in state.backend.bases.values():
        resident = [each for each in state.models.values() if each.base is base and each.parked is None]
        surplus = len(resident) - state.limits.resident_models
        for model in sorted(resident, key=lambda each: each.used):
            is_idle = at - model.used > state.limits.idle_model_s
            if (is_idle or surplus > 0) and is_at_rest(model) and not model.unstepped and not model.failed_passes:
                surplus -= 1
                model.moving = True
                state.spawn(park(state, model))


def is_at_rest(model: Model) -> bool:
    """Whether no call of the model runs, waits or is lost, and it is on the learner."""
    queue = model.queue
    busy = model.running or queue.waiting or model.moving or queue.lost_passes
    return model.lora is not None and model.parked is None and not busy


async def park(state: State, model: Model) -> None:
    """The caller has set `moving`."""
    folder = folder_of(state, model.id)
    try:
        model.calls += 1
        await state.backend.call(model.id, model.calls, SaveFolder(str(folder), True, True))
    except RlsysError as error:
        log.warning("model %s: cannot be written to disk, and stays on the learner: %s", model.id, error)
        state.parks_after = time.monotonic() + AGAIN_S
        _flush(model)
        return
    state.backend.drop_model(model.id, model.calls + 1)
    model.calls, model.parked = 0, folder
    if model.id not in state.models:  # released meanwhile
        await asyncio.to_thread(remove_folder, folder)
        return
    rows.forget_calls(state.database, model.id)
    state.counts["parked"] += 1
    if model.held_back:
        await _restore(state, model)
    else:
        model.moving = False


async def _restore(state: State, model: Model) -> None:
    assert model.parked is not None
    folder = model.parked
    try:
        await state.backend.restore_model(model.base, model.id, model.session.tenant, folder, True)
    except RlsysError as error:
        log.error("model %s: cannot be brought back from disk: %s", model.id, error)
        model.moving = False
        held, model.held_back = model.held_back, []
        for call in held:
            call.fail(error)
        return
    # A folder that exists is a model's newest state: it goes before a call changes the model.
    await asyncio.to_thread(remove_folder, folder)
    model.parked = None
    if model.id not in state.models:  # released meanwhile
        state.backend.drop_model(model.id, 1)
    _flush(model)


def remove_unknown(state: State) -> None:
    """Remove folders of models that ended while no server ran."""
    root = state.store.root / FOLDER
    known = {each.parked for each in state.models.values()}
    for folder in root.iterdir() if root.is_dir() else ():
        if folder not in known:
            remove_folder(folder)


def folder_of(state: State, model_id: str) -> Path:
    """Folder in which a model is parked."""
    return state.store.root / FOLDER / folder_name(model_id)


def _flush(model: Model) -> None:
    model.moving = False
    held, model.held_back = model.held_back, []
    for call in held:
        call.go()
