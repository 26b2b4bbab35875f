"""Executes one client's calls in the order in which they were entered, in whatever order they arrive; each once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from rlsys.errors import StalledError

RESULTS_KEPT = 8  # of the latest calls, for callers that repeat one; a snapshot keeps its weights in memory


class CallOrder:
    """Calls are numbered from 1. Every number must be used once, if need be by a call that does nothing.

    A number that is used again gets the result of the first call, which is not repeated. If a number does not arrive
    within the limit while later ones wait, the first of these fails; the missing numbers are closed, and never run.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._next = 1
        self._waiting: dict[int, asyncio.Event] = {}
        self._busy = False
        self._closed: list[tuple[range, str]] = []
        self._results: OrderedDict[int, asyncio.Future[Any]] = OrderedDict()  # Any: each call has its own type

    @property
    def next(self) -> int:
        """Smallest number that was not executed."""
        return self._next

    @property
    def pending(self) -> tuple[int, ...]:
        """Numbers of calls that arrived and have not finished, ascending."""
        return tuple(sorted(seq for seq, result in self._results.items() if not result.done()))

    async def run(self, seq: int, what: str, work: Callable[[], Awaitable[Any]]) -> Any:  # Any: as above
        """The result of `work`, which runs after all smaller numbers, while no other call of this client runs.

        Raises:
            StalledError: a smaller number did not arrive within the limit, counted from the end of the last call; or
                this number was closed for this reason, or its result is not kept any more.
        """
        if seq in self._results:
            return await asyncio.shield(self._results[seq])
        if seq < self._next:
            why = next((why for numbers, why in self._closed if seq in numbers), None)
            raise StalledError(why or f"{what}: call {seq} of this client is done, and its result is not kept any more")
        result = self._results[seq] = asyncio.get_running_loop().create_future()
        result.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may have no second reader
        try:
            await self._turn(seq, what)
            self._busy = True
            try:
                result.set_result(await work())
            finally:
                self._busy = False
                self._advance(seq)
        except asyncio.CancelledError:
            result.cancel()
            self._results.pop(seq, None)
            raise
        except BaseException as error:
            result.set_exception(error)
        return await result

    async def _turn(self, seq: int, what: str) -> None:
        while seq > self._next:
            event = self._waiting.setdefault(seq, asyncio.Event())
            before = self._next
            try:
                await asyncio.wait_for(event.wait(), self._limit_s)
            except TimeoutError:
                if self._next == before and not self._busy and seq == min(self._waiting):
                    raise StalledError(self._close(seq, what)) from None

    def _close(self, seq: int, what: str) -> str:
        missing = range(self._next, seq)
        why = (
            f"{what}: call {seq} of this client waits for call {missing[0]}, which was entered before it and did not "
            f"arrive within {self._limit_s:g} s; its caller is gone or stuck. Calls {missing[0]} to {missing[-1]} will "
            "not run"
        )
        self._closed.append((missing, why))
        self._advance(seq)
        return why

    def _advance(self, seq: int) -> None:
        """Number `seq` is used up: the next call may run."""
        self._next = max(self._next, seq + 1)
        self._waiting.pop(seq, None)
        waiting = self._waiting.get(self._next)
        if waiting is not None:
            waiting.set()
        done = [number for number in self._results if number < self._next]
        for number in done[:-RESULTS_KEPT]:
            del self._results[number]
