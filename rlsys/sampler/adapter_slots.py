"""Adapter slots of an engine: which versions are loaded, their running requests, the newest per run, and eviction."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlsys.errors import SamplingError, WeightSyncError
from rlsys.weight_sync.update import AdapterSnapshot

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

BASE_VERSION = -1


@dataclass(slots=True)
class Adapter:
    """One version in the engine. Ids are never reused, so no cached prefix outlives its adapter."""

    id: int
    version: int
    request: LoRARequest
    running: int = 0
    # of its running calls; Any: futures of different results share no other type
    work: set[asyncio.Future[Any]] = field(default_factory=set)
    movable: set[str] = field(default_factory=set)  # ids of its engine requests that continue under a newer version
    overtaken: bool = False  # by a newer version of the run
    rolled_back: bool = False


@dataclass(frozen=True, slots=True)
class AdapterLease:
    """The adapter that serves the requests of one call."""

    run_id: str | None
    version: int
    adapter: Adapter | None  # None: the base
    moves: bool  # to the newest version of the run, whenever there is a newer one
    rollbacks: int  # of the run, when the call began


class AdapterSlots:
    """Adapters by run and version, oldest first. `where` names the sampler in errors."""

    def __init__(self, where: str, most: int) -> None:
        self._where, self._max_held = where, most
        self._ids = itertools.count(1)
        self._live: dict[tuple[str, int], Adapter] = {}
        self._rollbacks: Counter[str | None] = Counter()

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._live

    def keys(self) -> tuple[tuple[str, int], ...]:
        return tuple(self._live)

    def make(self, snapshot: AdapterSnapshot) -> Adapter:
        """A new adapter, which is not live yet."""
        from vllm.lora.request import LoRARequest

        number = next(self._ids)
        name = f"{snapshot.run_id}/{snapshot.version}#{number}"  # part of the prefix cache's key
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=name)
        return Adapter(number, snapshot.version, request)

    def add(self, run_id: str, adapter: Adapter) -> list[str]:
        """Make an adapter live. Returns the ids of engine requests that must move to it."""
        older = [other for (run, _), other in self._live.items() if run == run_id]
        self._live[run_id, adapter.version] = adapter
        for other in older:
            other.overtaken = True
        return [request for other in older for request in other.movable]

    def get(self, run_id: str, version: int) -> Adapter:
        """
        Raises:
            SamplingError: it is not live.
        """
        adapter = self._live.get((run_id, version))
        if adapter is None:
            live = ", ".join(f"{run!r} {v}" for run, v in self._live) or "none"
            raise SamplingError(
                f"{self._where}: run {run_id!r} version {version} is not loaded; live run and version: {live}"
            )
        return adapter

    def hold(self, run_id: str | None, version: int, moves: bool = False) -> AdapterLease:
        """
        Raises:
            SamplingError: neither the version nor, for a call that moves, a newer one is live.
        """
        if run_id is None and version != BASE_VERSION:
            raise SamplingError(f"version: found {version} without a run; the base is version {BASE_VERSION}")
        adapter = None
        if run_id is not None:
            adapter = self._newest(run_id, version) if moves else self.get(run_id, version)
        return AdapterLease(run_id, version, adapter, moves, self._rollbacks[run_id])

    def serving(self, hold: AdapterLease) -> Adapter | None:
        """The adapter that serves the next request of a call.

        Raises:
            SamplingError: the run was rolled back meanwhile; its version numbers may now mean other weights.
        """
        if self._rollbacks[hold.run_id] != hold.rollbacks:
            raise self.rolled_back(hold.adapter)
        return self._newest(hold.run_id, hold.version) if hold.moves and hold.run_id is not None else hold.adapter

    def rolled_back(self, adapter: Adapter | None) -> SamplingError:
        name = "" if adapter is None else adapter.request.lora_name
        return SamplingError(
            f"{self._where}: adapter {name} was taken out while it worked, because its run went back to an earlier step"
        )

    def drop(self, run_id: str, version: int) -> Adapter:
        """
        Raises:
            SamplingError: it is not there, or requests still run on it.
        """
        adapter = self.get(run_id, version)
        if adapter.running:
            raise SamplingError(
                f"{self._where}: run {run_id!r} version {version} still has {adapter.running} running requests"
            )
        del self._live[run_id, version]
        return adapter

    def roll_back(self, run_id: str) -> list[Adapter]:
        """Remove all versions of the run and cancel their work. Returns them."""
        self._rollbacks[run_id] += 1
        mine = {key: adapter for key, adapter in self._live.items() if key[0] == run_id}
        for key, adapter in mine.items():
            del self._live[key]
            adapter.rolled_back = True
            for work in adapter.work:
                work.cancel()
        return list(mine.values())

    def in_the_way(self, run_id: str) -> tuple[str, int] | None:
        """The version to evict before `run_id` gets another: the oldest idle one that is not the last of its run.

        Raises:
            WeightSyncError: every version is in use.
        """
        if len(self._live) < self._max_held:
            return None
        last = dict(self._live.keys())  # run id -> version loaded last
        idle = [key for key, adapter in self._live.items() if not adapter.running and last[key[0]] != key[1]]
        if not idle:
            raise WeightSyncError(
                f"{self._where}: no room for run {run_id!r}: {len(self._live)} versions are live, each "
                "the last of its run or with running requests; raise sampler.max_live_adapters"
            )
        return idle[0]

    def _newest(self, run_id: str, at_least: int) -> Adapter:
        last = dict(self._live.keys()).get(run_id, BASE_VERSION)
        return self.get(run_id, max(last, at_least))


@contextmanager
def kept(adapter: Adapter | None, requests: int) -> Iterator[None]:
    """The adapter is not evicted while inside."""
    if adapter is not None:
        adapter.running += requests
    try:
        yield
    finally:
        if adapter is not None:
            adapter.running -= requests
