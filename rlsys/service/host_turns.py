"""Work that has begun on one rank of a learner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from rlsys.client.requests import Request

if TYPE_CHECKING:  # loads torch
    from rlsys.learner.turns import Turns
    from rlsys.service.learner_host import TrainingHost

Args = TypeVarTuple("Args")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn did: `tokens` of a micro-batch, or the rest of the work, with its answer."""

    tokens: int
    done: bool
    answer: Any = None  # Any: each request has its own answer


class HostTurns:
    """By number. Not thread-safe."""

    def __init__(self, host: TrainingHost) -> None:
        self._host = host
        self._begun: dict[int, Turns[Any]] = {}

    def turn(self, number: int, model_id: str, request: Request[Any] | None) -> Turn:
        """Take one turn; `request` begins the work."""
        if request is not None:
            self._begun[number] = self._host.begin(model_id, request)
        try:
            return Turn(next(self._begun[number]), False)
        except StopIteration as end:
            del self._begun[number]
            return Turn(0, True, end.value)
        except BaseException:
            del self._begun[number]
            raise

    def close(self, number: int) -> None:
        self._begun.pop(number).close()


class ThreadRank:
    """`rlsys.service.turn_loop.TurnTaker` on one rank, whose work runs in one thread."""

    def __init__(self, thread: ThreadPoolExecutor, turns: HostTurns) -> None:
        self._thread, self._turns = thread, turns

    async def turn(self, number: int, model_id: str, request: Request[Any] | None) -> Turn:
        return await in_thread(self._thread, self._turns.turn, number, model_id, request)

    async def close(self, number: int) -> None:
        await in_thread(self._thread, self._turns.close, number)


async def in_thread(thread: ThreadPoolExecutor, work: Callable[[*Args], Result], *args: *Args) -> Result:
    return await asyncio.get_running_loop().run_in_executor(thread, work, *args)
