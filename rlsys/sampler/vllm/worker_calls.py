"""Calls of an engine's workers that are answered by all of them, for this call, or fail.

vLLM stops reading when the first worker reports an error; the answers of the others stay in their queues and pass for
those to the next call. So here no worker raises: an error is an answer too, and each answer carries its call's number.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rlsys.errors import ActorFailedError

Answer = tuple[int, int, str | None, object]  # rank, number of the call, error, value


class Worker(Protocol):
    """A worker of vLLM with rlsys.sampler.vllm.adapter_worker mixed in."""

    rank: int


def answer(worker: Worker, number: int, method: str, arguments: Sequence[object]) -> Answer:
    """In the worker: `method`'s result or its error."""
    try:
        return worker.rank, number, None, getattr(worker, method)(*arguments)
    except Exception as error:  # an answer like any other: a raise would end the engine
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(at.filename).name}:{at.lineno}"
        return worker.rank, number, f"{type(error).__name__}: {error} ({place})", None


def values(where: str, method: str, number: int, answers: Sequence[Answer], workers: int) -> list[object]:
    """All workers' results, by rank.

    Raises:
        ActorFailedError: a worker failed, or did not answer this call.
    """
    found = {rank: (error, value) for rank, asked, error, value in answers if asked == number}
    if sorted(found) != list(range(workers)):
        raise ActorFailedError(
            f"{where}: {method} was answered by workers {sorted(found)} of {workers}; wanted an answer from each"
        )
    errors = [f"worker {rank}: {found[rank][0]}" for rank in sorted(found) if found[rank][0] is not None]
    if errors:
        raise ActorFailedError(f"{where}: {method}: {'; '.join(errors)}")
    return [found[rank][1] for rank in range(workers)]
