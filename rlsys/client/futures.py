"""Futures returned by client calls: ``.result(timeout)`` in threads, ``await`` in asyncio tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar

from rlsys.errors import StalledError

T = TypeVar("T")
Answer = TypeVar("Answer")


class ApiFuture(Generic[T], Awaitable[T]):
    """The result of one call. Can be read any number of times, from any thread or event loop."""

    def __init__(self, answer: Future[Answer], what: str, read: Callable[[Answer], T], client: object = None) -> None:
        self._answer: Future[Any] = answer  # Any: this class is generic in what `read` returns, not in the answer
        self._read: Callable[[], T] = lambda: read(answer.result())
        self._what = what
        self._client = client  # keeps the client, and its objects on the cluster, alive until the result is not needed
        self._lock = threading.Lock()
        self._value: tuple[T, ...] = ()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result. `timeout`: seconds; None: no limit.

        Raises:
            RlsysError: the error that the call raised, unchanged.
            StalledError: no result within `timeout` seconds; the call continues, and `result` can be called again.
        """
        try:
            self._answer.result(timeout)
        except TimeoutError:
            if self._answer.done():
                raise
            raise self._late(timeout) from None
        return self._once()

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, without blocking the event loop."""
        waiting = asyncio.shield(asyncio.wrap_future(self._answer))  # a cancelled waiter must not cancel the call
        try:
            await asyncio.wait_for(waiting, timeout)
        except TimeoutError:
            if self._answer.done():
                raise
            raise self._late(timeout) from None
        return self._once()

    def __await__(self) -> Generator[object, None, T]:
        return self.result_async().__await__()

    def done(self) -> bool:
        return self._answer.done()

    def _once(self) -> T:
        """Convert the answer, which has come, at the first call, and return the same object afterwards."""
        with self._lock:
            if not self._value:
                self._value = (self._read(),)
            return self._value[0]

    def _late(self, timeout: float | None) -> StalledError:
        return StalledError(
            f"{self._what}: no answer within {timeout:g} s; the call continues, call result() again to wait longer"
        )


class Ready:
    """Base class of clients that also act as a finished future, for scripts that call ``.result()`` on a client."""

    def result(self, timeout: float | None = None) -> Self:
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        return self

    def __await__(self) -> Generator[object, None, Self]:
        yield from ()
        return self
