"""Periodic work of a controller, and its last work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from rlsys.errors import StorageError
from rlsys.serve import parking, sessions
from rlsys.serve.checkpoints import Checkpoint
from rlsys.serve.state import State, now

DRAIN_S = 30.0  # how long pending work may take at the end
log = logging.getLogger("rlsys.serve")


async def stop_work(state: State) -> None:
    state.closing = True
    for model in list(state.models.values()):
        model.queue.abandon("the server is stopping")  # what they wait for is refused from now on
    deadline = asyncio.get_running_loop().time() + DRAIN_S
    while state.promises.unsettled and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    resting = [each for each in state.models.values() if parking.is_at_rest(each)]
    for model in resting:
        model.moving = True
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            await asyncio.gather(*(parking.park(state, model) for model in resting))
    for sampler in state.samplers.values():
        if sampler.snapshot is not None:
            state.backend.release(sampler.base, sampler.snapshot)
    sessions.note_seen(state)
    await state.drain(DRAIN_S)
    state.database.flush()


def remove_expired(state: State) -> None:
    """Delete checkpoints whose time is over. Samplers that were opened from them keep their weights."""
    for checkpoint in state.store.expired(now()):
        delete(state, checkpoint)


def reserve(state: State) -> None:
    """Keep room in the database for the time when its disk is full."""
    try:
        state.database.reserve()
    except StorageError as error:
        log.error("%s; calls of clients will fail soon", error)


def delete(state: State, checkpoint: Checkpoint) -> None:
    state.store.delete(checkpoint, checkpoint.path.run_id not in state.models)


def sweep(state: State) -> None:
    state.database.flush()
    sessions.sweep(state)
    parking.park_idle(state)


async def every(seconds: float, work: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(seconds)
        _logged(work)


async def every_in_thread(seconds: float, work: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(_logged, work)


def _logged(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception:  # the next round must come
        log.exception("periodic work failed")
