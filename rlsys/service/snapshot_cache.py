"""LRU cache of the snapshots in an engine: loaded on request, never evicted while in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rlsys.errors import StalledError


@dataclass(slots=True)
class _Resident:
    users: int = 0


class SnapshotCache:
    """At most `bound` snapshots at once. `load` and `unload` take a snapshot's key; only one of them runs at a time."""

    def __init__(
        self,
        bound: int,
        load: Callable[[str], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
        limit_s: float,
    ) -> None:
        self._bound, self._load, self._unload, self._limit_s = bound, load, unload, limit_s
        self._resident: dict[str, _Resident] = {}  # least recently used first
        self._moving = asyncio.Lock()
        self._idle = asyncio.Condition()

    @property
    def keys(self) -> list[str]:
        return list(self._resident)

    @asynccontextmanager
    async def using(self, key: str) -> AsyncIterator[None]:
        """In the block, `key` is loaded and stays loaded.

        Raises:
            StalledError: the engine is full of snapshots in use, and none became idle within the limit.
        """
        resident = await self._enter(key)
        try:
            yield
        finally:
            resident.users -= 1
            if not resident.users:
                async with self._idle:
                    self._idle.notify_all()

    async def unload_when_idle(self, key: str) -> None:
        """Unload a snapshot that is no longer needed, after its requests are done."""
        async with self._moving:
            resident = self._resident.get(key)
            if resident is None:
                return
            async with self._idle:
                await self._idle.wait_for(lambda: not resident.users)
            del self._resident[key]
            await self._unload(key)

    async def _enter(self, key: str) -> _Resident:
        resident = self._resident.get(key)
        if resident is None:
            async with self._moving:
                resident = self._resident.get(key)  # another request may have loaded it meanwhile
                if resident is None:
                    await self._make_room(key)
                    await self._load(key)
                    resident = self._resident[key] = _Resident()
                resident.users += 1
        else:
            resident.users += 1
        self._resident[key] = self._resident.pop(key)
        return resident

    async def _make_room(self, key: str) -> None:
        while len(self._resident) >= self._bound:
            oldest = self._oldest_idle()
            if oldest is None:
                await self._wait_for_idle(key)
                continue
            del self._resident[oldest]
            await self._unload(oldest)

    def _oldest_idle(self) -> str | None:
        return next((key for key, resident in self._resident.items() if not resident.users), None)

    async def _wait_for_idle(self, key: str) -> None:
        try:
            async with self._idle:
                await asyncio.wait_for(self._idle.wait_for(lambda: self._oldest_idle() is not None), self._limit_s)
        except TimeoutError:
            raise StalledError(
                f"snapshot {key}: the engine holds {len(self._resident)} snapshots, all of them in use for "
                f"{self._limit_s:g} s; raise sampler.max_live_adapters, or send fewer requests at once"
            ) from None
