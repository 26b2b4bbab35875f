"""Executes the work of many models on one learner, turn by turn, in the order that `FairTurns` gives."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.client.backend import Answer
from rlsys.client.requests import Drop, Request
from rlsys.errors import ConfigError
from rlsys.service.fair_turns import FairTurns
from rlsys.service.host_turns import Turn


class TurnTaker(Protocol):
    """The learner, on one or several ranks. One method is called at a time."""

    async def turn(self, number: int, model_id: str, request: Request[Any] | None) -> Turn:
        """Take one turn of a piece of work; `request` begins it."""

    async def close(self, number: int) -> None:
        """Abandon work that was begun. The run is as if it had not been begun."""


@dataclass(eq=False, slots=True)
class _Work:
    number: int
    tenant: str
    model_id: str
    request: Request[Any]  # Any: each request has its own answer
    answer: asyncio.Future[Any]
    begun: bool = False
    tokens: int = 0  # worked so far
    abandoned: Exception | None = None


class TurnLoop:
    """`unsplit_tokens`: what a request without micro-batches counts, such as an optimizer step."""

    def __init__(self, taker: TurnTaker, unsplit_tokens: int) -> None:
        self._taker, self._unsplit_tokens = taker, unsplit_tokens
        self._queue: FairTurns[_Work] = FairTurns()
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._broken: Exception | None = None

    async def do(self, tenant: str, model_id: str, request: Request[Answer]) -> Answer:
        """Execute the request after the model's earlier ones. Work that has begun is finished even if the caller is
        cancelled."""
        if self._broken is not None:
            raise self._broken
        answer = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may be cancelled
        work = _Work(next(self._numbers), tenant, model_id, request, answer)
        self._queue.enter(tenant, model_id, work)
        self._wake.set()
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())
        try:
            result: Answer = await asyncio.shield(answer)
            return result
        except asyncio.CancelledError:
            if not work.begun and not answer.done():
                self._end(work)
            raise

    async def drop(self, tenant: str, model_id: str, why: str) -> None:
        """Abandon a model's work, also work that has begun, and drop the model."""
        for work in self._queue.work_of(model_id):
            error = ConfigError(f"training client {model_id}: {why}")
            if work.begun:
                work.abandoned = error
            else:
                self._end(work)
                work.answer.set_exception(error)
        await self.do(tenant, model_id, Drop())

    def fail(self, error: Exception) -> None:
        """The learner is broken: all work fails, now and later."""
        self._broken = error
        for work in self._queue.all_work():
            self._end(work)
            if not work.answer.done():
                work.answer.set_exception(error)

    async def _run(self) -> None:
        while True:
            while not len(self._queue):
                self._wake.clear()
                await self._wake.wait()
            await self._turn(self._queue.choose())

    async def _turn(self, work: _Work) -> None:
        request, work.begun = None if work.begun else work.request, True
        try:
            if work.abandoned is not None:
                await self._taker.close(work.number)
                raise work.abandoned
            turn = await self._taker.turn(work.number, work.model_id, request)
        except Exception as error:
            self._finish(work, self._unsplit_tokens)
            if not work.answer.done():
                work.answer.set_exception(error)
            return
        work.tokens += turn.tokens
        if not turn.done:
            self._queue.charge(work.tenant, work.model_id, turn.tokens)
            return
        self._finish(work, 0 if work.tokens else self._unsplit_tokens)
        if not work.answer.done():
            work.answer.set_result(turn.answer)

    def _finish(self, work: _Work, tokens: int) -> None:
        self._queue.charge(work.tenant, work.model_id, tokens)
        self._end(work)

    def _end(self, work: _Work) -> None:
        if work in self._queue.work_of(work.model_id):
            self._queue.remove(work.tenant, work.model_id, work)
