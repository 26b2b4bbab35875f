"""Executes one client's calls in the order in which they were entered, in whatever order they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rlsys.errors import StalledError


class CallOrder:
    """Calls are numbered from 1. Every number must be used once, if need be by a call that does nothing."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._next = 1
        self._waiting: dict[int, asyncio.Event] = {}
        self._busy = False

    @asynccontextmanager
    async def turn(self, seq: int, what: str) -> AsyncIterator[None]:
        """In the block, all smaller numbers are done and no other call of this client runs.

        Raises:
            StalledError: a smaller number did not arrive within the limit, counted from the end of the last call.
        """
        while seq > self._next:
            event = self._waiting.setdefault(seq, asyncio.Event())
            before = self._next
            try:
                await asyncio.wait_for(event.wait(), self._limit_s)
            except TimeoutError:
                if self._next == before and not self._busy:
                    del self._waiting[seq]
                    raise StalledError(
                        f"{what}: call {seq} of this client waits for call {before}, which was entered before it and "
                        f"did not arrive within {self._limit_s:g} s; its caller is gone or stuck"
                    ) from None
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self._next = max(self._next, seq + 1)
            self._waiting.pop(seq, None)
            waiting = self._waiting.get(self._next)
            if waiting is not None:
                waiting.set()
