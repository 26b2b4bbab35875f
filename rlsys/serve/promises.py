"""Promises: results of operations that clients ask for later, and again if an answer was lost."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from rlsys.serve.errors import Refusal, bad_request
from rlsys.serve.wire.results import Result

Clock = Callable[[], float]


@dataclass(slots=True, eq=False)
class Promise:
    """One operation. `queue_reason`: what its client shows while it waits; `cancel`: stops the operation."""

    id: str
    tenant: str
    session_id: str
    model_id: str | None = None
    sample_sequence_ids: tuple[str, ...] | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    when_settled: Callable[[], object] = lambda: None
    result: Result | None = None
    settled_at: float = 0.0
    polled_at: float | None = None  # when it was last given to a client
    queue_reason: Callable[[], str | None] = lambda: None
    cancel: Callable[[], object] = lambda: None


class Promises(Protocol):
    """Store of promises."""

    @property
    def nbytes(self) -> int:
        """Bytes of all results that are kept."""

    @property
    def unsettled(self) -> int:
        """Number of promises without a result."""

    def new(self, tenant: str, session_id: str, model_id: str | None = None) -> Promise: ...

    def restored(self, request_id: str, tenant: str, session_id: str, model_id: str) -> Promise:
        """The promise of an operation that an earlier process began."""

    def drop(self, promise: Promise) -> None:
        """Forget a promise that no client was given."""

    def settle(self, promise: Promise, result: Result) -> None:
        """Set the result. A promise that has one keeps it."""

    def get(self, request_id: str, tenant: str) -> Promise:
        """
        Raises:
            Refusal: 400: no id of a promise; 410: not known (any more), or another tenant's.
        """

    def known(self, request_id: str, tenant: str, session_id: str, model_id: str | None) -> Promise:
        """The promise of an earlier request; a stand-in with its id, which gives 410, if its result is not kept."""

    async def wait(self, promise: Promise, limit_s: float) -> Result | None:
        """The result once there is one; None after `limit_s`."""

    def expire(self) -> int:
        """Forget results whose time is over. Returns how many."""

    def of_session(self, session_id: str) -> list[Promise]: ...


class MemoryPromises:
    """Promises of this process. Ids of an earlier process are recognized, and refused with the reason."""

    def __init__(self, *, result_s: float, undelivered_s: float, max_bytes: int, clock: Clock = time.monotonic) -> None:
        self._result_s, self._undelivered_s, self._max_bytes, self._clock = result_s, undelivered_s, max_bytes, clock
        self._life = secrets.token_hex(4)
        self._by_id: OrderedDict[str, Promise] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def unsettled(self) -> int:
        return sum(promise.result is None for promise in self._by_id.values())

    def new(self, tenant: str, session_id: str, model_id: str | None = None) -> Promise:
        promise = Promise(f"{self._life}-{secrets.token_hex(16)}", tenant, session_id, model_id)
        self._by_id[promise.id] = promise
        return promise

    def restored(self, request_id: str, tenant: str, session_id: str, model_id: str) -> Promise:
        promise = self._by_id[request_id] = Promise(request_id, tenant, session_id, model_id)
        return promise

    def drop(self, promise: Promise) -> None:
        self._forget(promise)

    def settle(self, promise: Promise, result: Result) -> None:
        if promise.result is not None:
            return
        promise.result, promise.settled_at = result, self._clock()
        promise.cancel = promise.queue_reason = lambda: None
        if promise.id in self._by_id:
            self._nbytes += result.nbytes
        promise.settled.set()
        promise.when_settled()
        if self.nbytes > self._max_bytes:
            self._evict()

    def get(self, request_id: str, tenant: str) -> Promise:
        life, _, rest = request_id.partition("-")
        if len(life) != 8 or len(rest) != 32 or not all(char in "0123456789abcdef" for char in life + rest):
            raise bad_request(f"request_id: found {request_id[:80]!r}; wanted one that this server returned")
        promise = self._by_id.get(request_id)
        if promise is not None and promise.tenant == tenant:
            return promise
        if life != self._life:
            raise Refusal(410, "request_id: belongs to a server that has ended; submit the request again")
        raise Refusal(
            410, f"request_id: its result is not kept any more (limits.result_s = {self._result_s:g}); submit it again"
        )

    def known(self, request_id: str, tenant: str, session_id: str, model_id: str | None) -> Promise:
        return self._by_id.get(request_id) or Promise(request_id, tenant, session_id, model_id)

    async def wait(self, promise: Promise, limit_s: float) -> Result | None:
        # costs one coroutine
        if promise.result is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await promise.settled.wait()
        if promise.result is not None:
            promise.polled_at = self._clock()
        return promise.result

    def expire(self) -> int:
        now = self._clock()
        over = [promise for promise in self._by_id.values() if self._is_over(promise, now)]
        for promise in over:
            self._forget(promise)
        return len(over)

    def of_session(self, session_id: str) -> list[Promise]:
        return [promise for promise in self._by_id.values() if promise.session_id == session_id]

    def _is_over(self, promise: Promise, now: float) -> bool:
        if promise.result is None:
            return False
        if promise.polled_at is not None:
            return now - promise.polled_at > self._result_s
        return now - promise.settled_at > self._undelivered_s

    def _evict(self) -> None:
        """Delivered results go first, the oldest first."""
        settled = [promise for promise in self._by_id.values() if promise.result is not None]
        settled.sort(key=lambda promise: (promise.polled_at is None, promise.polled_at or promise.settled_at))
        for promise in settled:
            if self.nbytes <= self._max_bytes:
                return
            self._forget(promise)

    def _forget(self, promise: Promise) -> None:
        if self._by_id.pop(promise.id, None) is not None and promise.result is not None:
            self._nbytes -= promise.result.nbytes
