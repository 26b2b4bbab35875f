"""What a call that takes a while returns: for threads ``.result(timeout)``, for tasks ``await``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar

from rlsys.errors import StalledError

T = TypeVar("T")


class ApiFuture(Generic[T], Awaitable[T]):
    """The answer to one call. May be asked any number of times, from any thread or event loop."""

    def __init__(self, answer: Future[Any], what: str, read: Callable[[Any], T], client: object = None) -> None:
        self._answer, self._what, self._read = answer, what, read
        self._client = client  # what it holds on the cluster is let go when nobody waits for its answers either
        self._lock = threading.Lock()
        self._value: tuple[T, ...] = ()

    def result(self, timeout: float | None = None) -> T:
        """The value.

        Raises:
            RlsysError: what went wrong, as it was raised where it went wrong.
            StalledError: no answer within `timeout` seconds; the call goes on, and may be asked again.
        """
        try:
            found = self._answer.result(timeout)
        except TimeoutError:
            if self._answer.done():
                raise
            raise self._late(timeout) from None
        return self._once(found)

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, without blocking the event loop."""
        waiting = asyncio.shield(asyncio.wrap_future(self._answer))  # a cancelled waiter must not cancel the call
        try:
            found = await asyncio.wait_for(waiting, timeout)
        except TimeoutError:
            if self._answer.done():
                raise
            raise self._late(timeout) from None
        return self._once(found)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def done(self) -> bool:
        return self._answer.done()

    def _once(self, found: Any) -> T:
        with self._lock:
            if not self._value:
                self._value = (self._read(found),)
            return self._value[0]

    def _late(self, timeout: float | None) -> StalledError:
        return StalledError(f"{self._what}: no answer within {timeout:g} s; the call goes on, ask again to wait longer")


class Ready:
    """A client that is there already, for scripts that wait for it as for a future."""

    def result(self, timeout: float | None = None) -> Self:
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        yield from ()
        return self
