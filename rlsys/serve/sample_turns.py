"""Turns of users at the engines of a base: the one with the fewest running completions is next."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class SampleTurns:
    """Lets requests through while fewer than `capacity` completions run, so that the engines are full and their own
    queues, which know no users, are short. A request is let through in one piece, so the last one may exceed it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._running: Counter[str] = Counter()  # completions by user
        self._waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()

    @property
    def running(self) -> int:
        """Completions."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """Requests."""
        return sum(len(queue) for queue in self._waiting.values())

    @asynccontextmanager
    async def turn(self, user: str, n: int) -> AsyncIterator[None]:
        """Wait for the turn of a request of n completions, which run until the block ends."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user, deque()).append((n, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._running[user] -= n
                if not self._running[user]:
                    del self._running[user]
            self._admit()

    def _admit(self) -> None:
        while self._waiting and self.running < self._capacity:
            user = min(self._waiting, key=lambda each: self._running[each])  # of equal ones, who waits longest
            n, turn = self._waiting[user].popleft()
            if self._waiting[user]:
                self._waiting.move_to_end(user)
            else:
                del self._waiting[user]
            if not turn.cancelled():
                self._running[user] += n
                turn.set_result(None)
