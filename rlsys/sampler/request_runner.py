"""Runs engine requests under a leased adapter version; a rollback of its run cancels them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, TypeVar

from rlsys.sampler.adapter_slots import Adapter, AdapterLease, AdapterSlots, kept
from rlsys.sampler.vllm_engine import VllmEngine

if TYPE_CHECKING:
    import vllm
    from vllm.outputs import RequestOutput

T = TypeVar("T")


class RequestRunner:
    """Requests of one engine."""

    def __init__(self, engine: VllmEngine, slots: AdapterSlots) -> None:
        self._engine, self._slots = engine, slots
        self._request_ids = itertools.count()
        self.running = 0  # requests of all current leases

    @contextmanager
    def hold(self, run_id: str | None, version: int, requests: int, moves: bool = False) -> Iterator[AdapterLease]:
        """Lease a version: it is not evicted inside the block, unless the requests move on.

        Raises:
            SamplingError: it is not live, or the engine sleeps.
        """
        self._engine.refuse_asleep()
        lease = self._slots.hold(run_id, version, moves)
        self.running += requests
        try:
            with kept(None if moves else lease.adapter, requests):
                yield lease
        finally:
            self.running -= requests

    @contextmanager
    def using(self, run_id: str | None, version: int, requests: int) -> Iterator[Adapter | None]:
        """The adapter of a version, which is not evicted inside the block; None for the base."""
        with self.hold(run_id, version, requests) as lease:
            yield lease.adapter

    async def generate(self, prompt: list[int], params: vllm.SamplingParams, adapter: Adapter | None) -> RequestOutput:
        """The output of one finished engine request, which is aborted when this task is cancelled."""
        output = await self._last_output(prompt, params, self._next_id(), adapter)
        assert output is not None, "a request that nobody aborted ends with an output or an error"
        return output

    async def outputs(
        self, prompt: list[int], params: vllm.SamplingParams, adapter: Adapter | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """All outputs of one request. Closing the iterator aborts the request in the engine.

        Raises:
            ActorDiedError: the engine died or failed meanwhile.
        """
        lora = None if adapter is None else adapter.request
        async with aclosing(self._engine.generate(prompt, params, self._next_id(), lora)) as outputs:
            while (output := await self._engine.guarded(anext(outputs, None))) is not None:
                yield output

    async def generate_until_overtaken(
        self, prompt: list[int], params: vllm.SamplingParams, adapter: Adapter
    ) -> RequestOutput | None:
        """As `generate`, and aborted also when a newer version of the run is loaded.

        None: that happened before the request started.
        """
        request_id = self._next_id()
        if adapter.overtaken:
            return None
        adapter.movable.add(request_id)
        try:
            return await self._last_output(prompt, params, request_id, adapter)
        finally:
            adapter.movable.discard(request_id)

    async def run(self, requests: Sequence[Coroutine[object, None, T]], adapter: Adapter | None) -> list[T]:
        """All results. Raises SamplingError if the adapter's run was rolled back meanwhile."""
        work = asyncio.ensure_future(self._engine.guarded(together(requests)))
        held = set() if adapter is None else adapter.work
        held.add(work)
        try:
            results = await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if adapter is not None and adapter.rolled_back and not task.cancelling():
                raise self._slots.rolled_back(adapter) from None
            raise
        finally:
            held.discard(work)
        return results

    async def _last_output(
        self, prompt: list[int], params: vllm.SamplingParams, request_id: str, adapter: Adapter | None
    ) -> RequestOutput | None:
        lora = None if adapter is None else adapter.request
        last = None
        async for output in self._engine.generate(prompt, params, request_id, lora):
            last = output
        return last

    def _next_id(self) -> str:
        return f"{self._engine.name}-{next(self._request_ids)}"


async def together(work: Sequence[Coroutine[object, None, T]]) -> list[T]:
    """All results, or the first error, with the others cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
